//go:build linux

package main_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"math/big"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"breakwater/pkg/registrytest"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/jwt"
	"golang.org/x/crypto/bcrypt"
)

const (
	farHost  = "192.0.2.1" // of the host, beyond loopback
	farAddr  = farHost + ":5000"
	authAddr = farHost + ":5002"
)

// beyond gives the host an address that is not loopback's.
func (h *host) beyond(t *testing.T) {
	t.Helper()
	if out, err := h.output(h.command(t.Context(), nil, "ip", "address", "add", farHost+"/32", "dev", "lo")); err != nil {
		t.Fatal(out, err)
	}
}

// authority issues the certificates of these tests.
type authority struct {
	*testing.T
	host *host
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

func newAuthority(t *testing.T, h *host) *authority {
	t.Helper()
	a := &authority{T: t, host: h}
	template := &x509.Certificate{Subject: pkix.Name{CommonName: "authority"}, IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign}
	var raw []byte
	raw, a.key = a.sign(template, template)
	cert, err := x509.ParseCertificate(raw)
	if err != nil {
		t.Fatal(err)
	}
	a.cert = cert
	h.write(t, "ca.crt", string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: raw})))
	return a
}

func (a *authority) sign(template, parent *x509.Certificate) ([]byte, *ecdsa.PrivateKey) {
	a.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		a.Fatal(err)
	}
	signer := a.key
	if signer == nil {
		signer = key
	}
	template.SerialNumber, template.NotBefore, template.NotAfter = big.NewInt(time.Now().UnixNano()), time.Now().Add(-time.Hour), time.Now().Add(time.Hour)
	raw, err := x509.CreateCertificate(rand.Reader, template, parent, key.Public(), signer)
	if err != nil {
		a.Fatal(err)
	}
	return raw, key
}

// issue writes a certificate and its key to files of that name.
func (a *authority) issue(name string, use x509.ExtKeyUsage) (certFile, keyFile string, pair tls.Certificate) {
	a.Helper()
	raw, key := a.sign(&x509.Certificate{Subject: pkix.Name{CommonName: name}, IPAddresses: []net.IP{net.ParseIP(farHost)}, ExtKeyUsage: []x509.ExtKeyUsage{use}}, a.cert)
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		a.Fatal(err)
	}
	certFile = a.host.write(a.T, name+".crt", string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: raw})))
	keyFile = a.host.write(a.T, name+".key", string(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der})))
	return certFile, keyFile, tls.Certificate{Certificate: [][]byte{raw}, PrivateKey: key}
}

// serveTokens is a token server of the distribution specification: ci may pull org/secret, other may not. The
// public key is in token.pem.
func (a *authority) serveTokens() {
	a.Helper()
	l, err := a.host.listen(authAddr)
	if err != nil {
		a.Fatal(err)
	}
	_, _, pair := a.issue("auth", x509.ExtKeyUsageServerAuth)
	signing, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		a.Fatal(err)
	}
	public, err := x509.MarshalPKIXPublicKey(signing.Public())
	if err != nil {
		a.Fatal(err)
	}
	a.host.write(a.T, "token.pem", string(pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: public})))
	signer, err := jose.NewSigner(jose.SigningKey{Algorithm: jose.ES256, Key: signing}, nil)
	if err != nil {
		a.Fatal(err)
	}
	server := registrytest.Serve(l, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if err := r.ParseForm(); err != nil {
			a.Error(err)
		}
		name, password, given := r.BasicAuth()
		if r.Method == http.MethodPost { // OAuth 2, which containerd tries first
			name, password, given = r.FormValue("username"), r.FormValue("password"), r.FormValue("password") != ""
		}
		if given && password != registrytest.Canary {
			http.Error(w, "{}", http.StatusUnauthorized)
			return
		}
		access := []map[string]any{}
		for _, scopes := range r.Form["scope"] {
			for scope := range strings.FieldsSeq(scopes) {
				if part := strings.Split(scope, ":"); len(part) == 3 && name == "ci" {
					access = append(access, map[string]any{"type": part[0], "name": part[1], "actions": strings.Split(part[2], ",")})
				}
			}
		}
		claims := map[string]any{"iss": "auth", "aud": r.FormValue("service"), "sub": name, "exp": time.Now().Add(time.Minute).Unix(), "access": access}
		token, err := jwt.Signed(signer).Claims(claims).Serialize()
		if err != nil {
			a.Error(err)
		}
		w.Header().Set("Content-Type", "application/json")
		_ = json.NewEncoder(w).Encode(map[string]any{"token": token, "access_token": token, "expires_in": 60})
	}), pair)
	a.Cleanup(func() { _ = server.Close() })
}

// account is what a client has of somebody: a name and a password, or a certificate.
type account struct {
	name, password string
	cert, key      string // files
}

// dockerConfig is where most clients look for passwords.
func (a account) dockerConfig(t *testing.T, h *host) string {
	t.Helper()
	auths := "{}"
	if a.name != "" {
		auths = fmt.Sprintf(`{%q: {"auth": %q}}`, farAddr, base64.StdEncoding.EncodeToString([]byte(a.name+":"+a.password)))
	}
	return h.write(t, "account/config.json", `{"auths": `+auths+`}`)
}

// accessClients pull an image of quay.io through a mirror beyond loopback, as somebody.
var accessClients = []struct {
	name     string
	programs []string
	start    func(t *testing.T, h *host) func(t *testing.T, who account, image string) (string, error)
	ways     string // that it has to show who it is
}{
	{"crane", []string{cached("crane")}, accessCrane, "htpasswd, token"},
	{"podman", []string{"podman"}, accessPodman, "htpasswd, token, certificate"},
	{"skopeo", []string{"skopeo"}, accessSkopeo, "htpasswd, token, certificate"},
	{"containerd-1.6", []string{"containerd", "ctr"}, func(t *testing.T, h *host) func(*testing.T, account, string) (string, error) {
		return accessContainerd(startDebianContainerd(t, h).(*containerd), accountByFlag)
	}, "htpasswd, token, certificate"},
	{"containerd-2.4", []string{cached("containerd"), cached("ctr")}, func(t *testing.T, h *host) func(*testing.T, account, string) (string, error) {
		return accessContainerd(startContainerd(t, h).(*containerd), accountByFlag)
	}, "htpasswd, token, certificate"},
	{"containerd-header", []string{cached("containerd"), cached("ctr")}, func(t *testing.T, h *host) func(*testing.T, account, string) (string, error) {
		return accessContainerd(startContainerd(t, h).(*containerd), accountByHeader)
	}, "htpasswd"},
	{"docker", []string{"dockerd", "docker"}, accessDocker, "htpasswd, token"},
}

func accessCrane(_ *testing.T, h *host) func(*testing.T, account, string) (string, error) {
	return func(t *testing.T, who account, image string) (string, error) {
		ctx, cancel := context.WithTimeout(t.Context(), patience)
		defer cancel()
		variables := []string{"SSL_CERT_FILE=" + filepath.Join(h.dir, "ca.crt"), "DOCKER_CONFIG=" + filepath.Dir(who.dockerConfig(t, h))}
		return h.output(h.command(ctx, variables, cached("crane"), "pull", "--format=oci", farAddr+"/quay.io/"+image, t.TempDir()))
	}
}

// farMirror is what podman and skopeo read.
func farMirror(t *testing.T, h *host) {
	t.Helper()
	h.write(t, ".config/containers/registries.conf", fmt.Sprintf(
		"[[registry]]\nprefix = \"quay.io\"\nlocation = \"quay.io\"\n[[registry.mirror]]\nlocation = %q\n", farAddr+"/quay.io"))
}

// certFolder is the client's certificates as podman and skopeo want them.
func (a account) certFolder(t *testing.T, h *host) string {
	t.Helper()
	dir := t.TempDir()
	files := map[string]string{"ca.crt": filepath.Join(h.dir, "ca.crt"), "client.cert": a.cert, "client.key": a.key}
	for name, from := range files {
		if from == "" {
			continue
		}
		raw, err := os.ReadFile(from)
		if err == nil {
			err = os.WriteFile(filepath.Join(dir, name), raw, 0o600)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

func accessPodman(t *testing.T, h *host) func(*testing.T, account, string) (string, error) {
	p := &podman{host: h, cgroup: newCgroup(t)}
	farMirror(t, h)
	return func(t *testing.T, who account, image string) (string, error) {
		p.storage = t.TempDir()
		return p.podman(t, "pull", "--authfile", who.dockerConfig(t, h), "--cert-dir", who.certFolder(t, h), "quay.io/"+image)
	}
}

func accessSkopeo(t *testing.T, h *host) func(*testing.T, account, string) (string, error) {
	farMirror(t, h)
	return func(t *testing.T, who account, image string) (string, error) {
		ctx, cancel := context.WithTimeout(t.Context(), patience)
		defer cancel()
		return h.output(h.command(ctx, nil, "skopeo", "copy", "--src-authfile", who.dockerConfig(t, h), "--src-cert-dir", who.certFolder(t, h), "docker://quay.io/"+image, "oci:"+t.TempDir()))
	}
}

// How containerd knows an account: ctr is told, or, as for a kubelet's pulls, it is in hosts.toml.
const (
	accountByFlag = iota
	accountByHeader
)

// accessContainerd names the mirror in hosts.toml, and there is no other place to go.
func accessContainerd(c *containerd, by int) func(*testing.T, account, string) (string, error) {
	return func(t *testing.T, who account, image string) (string, error) {
		text := fmt.Sprintf("server = %[1]q\n[host.%[1]q]\n  capabilities = [\"pull\", \"resolve\"]\n  ca = %[2]q\n", "https://"+farAddr, filepath.Join(c.host.dir, "ca.crt"))
		if who.cert != "" {
			text += fmt.Sprintf("  client = [[%q, %q]]\n", who.cert, who.key)
		}
		if who.name != "" && by == accountByHeader {
			text += fmt.Sprintf("  [host.%q.header]\n    Authorization = \"Basic %s\"\n", "https://"+farAddr, base64.StdEncoding.EncodeToString([]byte(who.name+":"+who.password)))
		}
		c.host.write(t, "far/quay.io/hosts.toml", text)
		held, err := c.do(t, "images", "ls", "--quiet")
		if err != nil {
			return held, err
		}
		for _, image := range strings.Fields(held) {
			if out, err := c.do(t, "images", "rm", "--sync", image); err != nil {
				return out, err
			}
		}
		args := []string{"images", "pull", "--hosts-dir", filepath.Join(c.host.dir, "far")}
		if who.name != "" && by == accountByFlag {
			args = append(args, "--user", who.name+":"+who.password)
		}
		return c.do(t, append(args, "quay.io/"+image)...)
	}
}

// accessDocker pulls by the mirror's own name, since registry-mirrors have no accounts.
func accessDocker(t *testing.T, h *host) func(*testing.T, account, string) (string, error) {
	d := startDockerWith(t, h, "SSL_CERT_FILE="+filepath.Join(h.dir, "ca.crt"))
	return func(t *testing.T, who account, image string) (string, error) {
		if out, err := d.docker(t, "image", "prune", "--all", "--force"); err != nil {
			return out, err
		}
		return d.docker(t, "--config", filepath.Dir(who.dockerConfig(t, h)), "pull", farAddr+"/quay.io/"+image)
	}
}

// secretly is a mirror beyond loopback, where ci alone may have org/secret, and everybody who is known all else.
const secretly = `
listen: ` + farAddr + `
admin: ` + adminAddr + `
tls: {cert_file: mirror.crt, key_file: mirror.key}
default_registry: quay.io
registries:
  quay.io:
    upstreams: [{url: "http://` + upstreamAddr + `"}]
access:
  %s
  rules: [{repositories: [quay.io/org/secret], allow: [ci]}]
`

// TestAccessClients has real clients pull from beyond loopback what ci alone may have: as ci, as somebody else,
// with a wrong password, and as nobody; by passwords, by tokens and by certificates.
func TestAccessClients(t *testing.T) {
	for _, row := range accessClients {
		t.Run(row.name, func(t *testing.T) {
			t.Parallel()
			h := newHost(t, row.programs...)
			h.beyond(t)
			a := newAuthority(t, h)
			a.serveTokens()
			a.issue("mirror", x509.ExtKeyUsageServerAuth)
			up := h.upstream(t)
			up.push(t, "org/secret", "latest", greeter(t, 71).Docker())
			hash, err := bcrypt.GenerateFromPassword([]byte(registrytest.Canary), bcrypt.MinCost)
			if err != nil {
				t.Fatal(err)
			}
			h.write(t, "htpasswd", fmt.Sprintf("ci:%s\nother:%s\n", hash, hash))
			pull := row.start(t, h)
			certified := func(name string) account {
				cert, key, _ := a.issue(name, x509.ExtKeyUsageClientAuth)
				return account{cert: cert, key: key}
			}
			for name, way := range map[string]struct {
				access    string
				ci, other account
			}{
				"htpasswd": {"htpasswd: htpasswd", account{name: "ci", password: registrytest.Canary}, account{name: "other", password: registrytest.Canary}},
				"token": {`token: {realm: "https://` + authAddr + `/token", service: mirror, issuer: auth, keys_file: token.pem}`,
					account{name: "ci", password: registrytest.Canary}, account{name: "other", password: registrytest.Canary}},
				"certificate": {"client_ca_file: ca.crt", certified("ci"), certified("other")},
			} {
				if !strings.Contains(row.ways, name) {
					continue
				}
				t.Run(name, func(t *testing.T) {
					m := h.serve(t, fmt.Sprintf(secretly, way.access))
					for who, denied := range map[string]account{"nobody": {}, "other": way.other, "wrong": {name: "ci", password: "wrong"}} {
						if out, err := pull(t, denied, "org/secret:latest"); err == nil {
							t.Errorf("%s has got it: %s", who, out)
						}
					}
					up.Forget()
					begin := time.Now()
					if out, err := pull(t, way.ci, "org/secret:latest"); err != nil {
						t.Errorf("ci: %v %s", err, out)
					}
					t.Logf("pulled in %v", time.Since(begin).Round(time.Millisecond))
					for _, r := range up.Requests(registrytest.Match{}) {
						if r.Header.Get("Authorization") != "" {
							t.Error("upstream was told a client's secret")
						}
					}
					m.stop(t)
				})
			}
		})
	}
}

// logged waits until the mirror has logged something.
func (h *host) logged(t *testing.T, message string) {
	t.Helper()
	within(t, 10*time.Second, func() error {
		log, err := os.ReadFile(filepath.Join(h.dir, "mirror.log"))
		if err == nil && !strings.Contains(string(log), message) {
			err = fmt.Errorf("%q is not in the log", message)
		}
		return err
	})
}

// reload gives the mirror another configuration, of which it logs that message.
func (h *host) reload(t *testing.T, m *mirror, config, message string) {
	t.Helper()
	h.write(t, "config.yaml", config)
	if err := m.cmd.Process.Signal(syscall.SIGHUP); err != nil {
		t.Fatal(err)
	}
	h.logged(t, message)
}

// TestReloadBeyondLoopback: while the mirror listens beyond loopback, a configuration that lets nobody say who
// may pull there is refused, although it is good for the next start; and certificates are read again.
func TestReloadBeyondLoopback(t *testing.T) {
	h := newHost(t)
	h.beyond(t)
	a := newAuthority(t, h)
	a.issue("mirror", x509.ExtKeyUsageServerAuth)
	m := h.serve(t, fmt.Sprintf(secretly, "client_ca_file: ca.crt"))
	hangup := func(config, message string) {
		t.Helper()
		h.reload(t, m, config, message)
	}
	status := func() int {
		t.Helper()
		client := h.client()
		client.Transport.(*http.Transport).TLSClientConfig = &tls.Config{InsecureSkipVerify: true}
		res, err := client.Get("https://" + farAddr + "/v2/")
		if err != nil {
			t.Fatal(err)
		}
		defer res.Body.Close()
		return res.StatusCode
	}
	if got := status(); got != http.StatusForbidden {
		t.Errorf("nobody gets %d", got)
	}
	hangup("listen: 127.0.0.1:5000\n", "192.0.2.1:5000 is beyond loopback, where `access:` must say who may pull")
	if got := status(); got != http.StatusForbidden {
		t.Errorf("after a reload that is refused nobody gets %d", got)
	}
	a.issue("mirror", x509.ExtKeyUsageServerAuth)
	if err := os.WriteFile(filepath.Join(h.dir, "mirror.key"), []byte("x"), 0o600); err != nil {
		t.Fatal(err)
	}
	hangup(fmt.Sprintf(secretly, "anonymous: true\n  client_ca_file: ca.crt"), "certificate not reloaded; the old one stays in force")
	h.logged(t, `"configuration reloaded"`)
	if got := status(); got != http.StatusOK {
		t.Errorf("after anonymous: true nobody gets %d", got)
	}
	m.stop(t)

	a.issue("mirror", x509.ExtKeyUsageServerAuth)
	m = h.serve(t, mirrored) // on loopback: what is said of the next start changes nothing yet
	hangup(fmt.Sprintf(secretly, "client_ca_file: ca.crt"), "configuration reloaded; listen")
	if got, err := h.ask(http.MethodGet, "http://"+mirrorAddr+"/v2/"); err != nil || got.status != http.StatusOK {
		t.Errorf("by loopback: %+v %v", got, err)
	}
	m.stop(t)
}

// TestReloadKeepsAsking: who comes by loopback and is asked who they are, since something forwards others there,
// is asked until the end, whatever is good for the next start.
func TestReloadKeepsAsking(t *testing.T) {
	h := newHost(t)
	h.beyond(t)
	h.write(t, "htpasswd", "ci:$2y$05$"+strings.Repeat("a", 53)+"\n")
	newAuthority(t, h).issue("mirror", x509.ExtKeyUsageServerAuth)
	m := h.serve(t, mirrored+"access: {htpasswd: htpasswd, plain_http: true}\n")
	for _, row := range []struct{ name, config, message string }{
		{"without a policy", mirrored, "access: none, where"},
		{"with TLS of its own", fmt.Sprintf(secretly, "htpasswd: htpasswd"), "access.loopback: open, where"},
	} {
		h.reload(t, m, row.config, row.message)
		if got, err := h.ask(http.MethodGet, "http://"+mirrorAddr+"/v2/"); err != nil || got.status != http.StatusUnauthorized {
			t.Errorf("%s: nobody gets %+v %v", row.name, got, err)
		}
	}
	h.reload(t, m, mirrored+"access: {htpasswd: htpasswd, plain_http: true}\nserver_names: [mirror.internal]\n", `"configuration reloaded"`)
	m.stop(t)
}
