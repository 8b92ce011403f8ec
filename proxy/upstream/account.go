package upstream

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/url"
	"os"
	"os/exec"
	"regexp"
	"strings"
	"time"

	"github.com/aws/aws-sdk-go-v2/config"
	"github.com/aws/aws-sdk-go-v2/service/ecr"
	"github.com/aws/smithy-go"
	"github.com/aws/smithy-go/logging"
	"github.com/docker/docker-credential-helpers/client"
	"github.com/docker/docker-credential-helpers/credentials"
)

const (
	maxDockerConfig = 1 << 20
	maxHelperOutput = 1 << 20
	helperTimeout   = 5 * time.Second
	// A helper's answer is asked for again behind the first use after helperRenew, and is not used past
	// helperLife. What could not be found is not looked for again before retryAccount.
	helperRenew  = time.Minute
	helperLife   = 10 * time.Minute
	retryAccount = 10 * time.Second
)

// Account says where the credential for an upstream is found; the zero value is anonymous. It holds
// no secret: that is read when it is needed.
type Account struct {
	Username     string
	PasswordFile string // of Username; the others stand alone
	DockerConfig string // file: docker's config.json, with auths, credHelpers and credsStore
	Helper       string // docker-credential-HELPER is a program on the PATH
	ECR          string // region of an Amazon ECR: a token for whom the AWS SDK finds us to be
}

// id tells the accounts of a host apart; "" is anonymous. No user's name has a colon (RFC 7617).
func (a Account) id() string {
	switch {
	case a.DockerConfig != "":
		return "docker_config:" + a.DockerConfig
	case a.Helper != "":
		return "helper:" + a.Helper
	case a.ECR != "":
		return "ecr:" + a.ECR
	}
	return a.Username
}

// secret is what an account proves itself with; the zero value is anonymous.
type secret struct {
	username, password string
	identity           string    // for the token service instead, and for nobody else
	found              time.Time // zero: it was not worth keeping
	renew              time.Time // whoever uses it later has it looked up again, behind
	until              time.Time // nobody uses it later
}

// authorization is the secret for HTTP's Basic scheme, "" for anonymous.
func (s secret) authorization() string {
	if s.username == "" && s.password == "" {
		return ""
	}
	return "Basic " + base64.StdEncoding.EncodeToString([]byte(s.username+":"+s.password))
}

// find looks up the account's secret for an upstream's host. Its errors say nothing that was read.
func (a Account) find(ctx context.Context, host string) (secret, error) {
	switch {
	case a.DockerConfig != "":
		return readDockerConfig(ctx, a.DockerConfig, host)
	case a.Helper != "":
		return runHelper(ctx, a.Helper, dockerServer(host))
	case a.ECR != "":
		return askECR(ctx, a.ECR)
	case a.Username == "":
		return secret{}, nil
	}
	password, err := os.ReadFile(a.PasswordFile)
	if err != nil {
		return secret{}, fmt.Errorf("password_file: %w", err)
	}
	return secret{username: a.Username, password: strings.TrimRight(string(password), "\r\n")}, nil
}

// dockerHub is under what docker keeps the account of the Hub.
const dockerHub = "https://index.docker.io/v1/"

// dockerServer is under what docker keeps the account of a host.
func dockerServer(host string) string {
	switch host {
	case "registry-1.docker.io", "docker.io", "index.docker.io":
		return dockerHub
	}
	return host
}

// readDockerConfig finds a host's account as docker does: by its own helper, else by the general one,
// else in the file itself.
func readDockerConfig(ctx context.Context, file, host string) (secret, error) {
	f, err := os.Open(file)
	if err != nil {
		return secret{}, fmt.Errorf("docker_config: %w", err)
	}
	defer f.Close()
	var cfg struct {
		Auths       map[string]dockerAuth `json:"auths"`
		CredHelpers map[string]string     `json:"credHelpers"`
		CredsStore  string                `json:"credsStore"`
	}
	if err := json.NewDecoder(io.LimitReader(f, maxDockerConfig)).Decode(&cfg); err != nil {
		return secret{}, fmt.Errorf("docker_config: %s is not docker's config.json", file)
	}
	server := dockerServer(host)
	helper := cfg.CredsStore
	for key, name := range cfg.CredHelpers {
		if dockerServer(bareHost(key)) == server {
			helper = name
		}
	}
	if helper != "" {
		if s, err := runHelper(ctx, helper, server); err != nil || s.username != "" || s.identity != "" {
			return s, err
		}
	}
	auth, exact := cfg.Auths[server]
	for key, other := range cfg.Auths {
		if !exact && dockerServer(bareHost(key)) == server {
			auth = other
		}
	}
	s, err := auth.secret()
	if err != nil {
		return secret{}, fmt.Errorf("docker_config: the entry for %s in %s is not one of docker's", host, file)
	}
	return s, nil
}

// bareHost is the host of a key, which old versions of docker wrote as a URL.
func bareHost(key string) string {
	if u, err := url.Parse(key); err == nil && u.Host != "" {
		return u.Host
	}
	host, _, _ := strings.Cut(key, "/")
	return host
}

// dockerAuth is an entry in docker's config.json.
type dockerAuth struct {
	Auth          string `json:"auth"` // user:password in base64
	Username      string `json:"username"`
	Password      string `json:"password"`
	IdentityToken string `json:"identitytoken"`
}

func (d dockerAuth) secret() (secret, error) {
	s := secret{username: d.Username, password: d.Password, identity: d.IdentityToken}
	if d.Auth == "" {
		return s, nil
	}
	raw, err := base64.StdEncoding.DecodeString(d.Auth)
	if err != nil {
		return secret{}, err
	}
	username, password, ok := strings.Cut(string(raw), ":")
	if !ok {
		return secret{}, errors.New("no colon")
	}
	s.username, s.password = username, strings.TrimRight(password, "\x00")
	return s, nil
}

var helperName = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._-]*$`)

// runHelper asks a credential helper. That it knows no account is no error.
func runHelper(ctx context.Context, name, server string) (secret, error) {
	if !helperName.MatchString(name) {
		return secret{}, fmt.Errorf("%.50q is not the name of a credential helper", name)
	}
	file, err := exec.LookPath("docker-credential-" + name)
	if err != nil {
		return secret{}, fmt.Errorf("docker-credential-%s is not on the PATH", name)
	}
	ctx, cancel := context.WithTimeout(ctx, helperTimeout)
	defer cancel()
	program := func(args ...string) client.Program {
		return &helper{exec.CommandContext(ctx, file, args...)}
	}
	now := time.Now()
	s := secret{found: now, renew: now.Add(helperRenew), until: now.Add(helperLife)}
	answer, err := client.Get(program, server)
	switch {
	case credentials.IsErrCredentialsNotFound(err):
		return s, nil
	case ctx.Err() != nil:
		return secret{}, fmt.Errorf("docker-credential-%s did not answer", name)
	case err != nil: // and what it printed may be a secret
		return secret{}, fmt.Errorf("docker-credential-%s failed", name)
	}
	if answer.Username == "<token>" {
		s.identity = answer.Secret
	} else {
		s.username, s.password = answer.Username, answer.Secret
	}
	return s, nil
}

// helper is a run of a credential helper. What it writes to its standard error is nobody's: it would
// end up in our log.
type helper struct{ cmd *exec.Cmd }

// Input is the program's standard input.
func (h *helper) Input(in io.Reader) { h.cmd.Stdin = in }

// Output runs the program. It returns even if children of the program outlive it.
func (h *helper) Output() ([]byte, error) {
	var out bytes.Buffer
	h.cmd.Stdout = &limitedWriter{&out, maxHelperOutput}
	h.cmd.WaitDelay = time.Second
	err := h.cmd.Run()
	return out.Bytes(), err
}

// limitedWriter fails when more than left bytes are written to it.
type limitedWriter struct {
	to   io.Writer
	left int
}

func (w *limitedWriter) Write(p []byte) (int, error) {
	if w.left -= len(p); w.left < 0 {
		return 0, io.ErrShortWrite
	}
	return w.to.Write(p)
}

// askECR has Amazon's service make a token, which is good for twelve hours. Whose token it is, and
// where the service is, is found as all programs of the SDK find it.
func askECR(ctx context.Context, region string) (secret, error) {
	cfg, err := config.LoadDefaultConfig(ctx, config.WithRegion(region), config.WithLogger(logging.Nop{}))
	if err != nil {
		return secret{}, errors.New("ecr: the configuration of the AWS SDK cannot be read")
	}
	answer, err := ecr.NewFromConfig(cfg).GetAuthorizationToken(ctx, nil)
	if err != nil {
		// The messages of some errors repeat the request, with its security token.
		if api := smithy.APIError(nil); errors.As(err, &api) {
			return secret{}, fmt.Errorf("ecr: GetAuthorizationToken answered %.100q", api.ErrorCode())
		}
		return secret{}, fmt.Errorf("ecr: GetAuthorizationToken in %s failed", region)
	}
	if len(answer.AuthorizationData) == 0 || answer.AuthorizationData[0].AuthorizationToken == nil {
		return secret{}, errors.New("ecr: GetAuthorizationToken gave none")
	}
	s, err := dockerAuth{Auth: *answer.AuthorizationData[0].AuthorizationToken}.secret()
	if err != nil {
		return secret{}, errors.New("ecr: GetAuthorizationToken gave one that is not user and password")
	}
	s.found = time.Now()
	life := maxTokenLife
	if expires := answer.AuthorizationData[0].ExpiresAt; expires != nil {
		life = max(expires.Sub(s.found), minTokenLife)
	}
	s.renew, s.until = s.found.Add(life/2), s.found.Add(life*9/10)
	return s, nil
}
