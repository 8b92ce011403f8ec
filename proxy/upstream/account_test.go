package upstream

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"breakwater/pkg/oci"
	"breakwater/pkg/registrytest"
)

// helpers builds docker-credential-test, puts it on the PATH, and gives it these accounts: server, user
// and secret. It returns how often it was asked so far.
func helpers(t *testing.T, accounts ...string) (asked func() int) {
	t.Helper()
	dir := t.TempDir()
	build := exec.Command("go", "build", "-o", filepath.Join(dir, "docker-credential-test"), "./testdata/helper")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	file := filepath.Join(dir, "accounts")
	if err := os.WriteFile(file, []byte(strings.Join(accounts, "\n")+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	t.Setenv("PATH", dir+string(os.PathListSeparator)+os.Getenv("PATH"))
	t.Setenv("HELPER_ACCOUNTS", file)
	return func() int {
		raw, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		return strings.Count(string(raw), "asked ")
	}
}

func encoded(user, password string) string {
	return base64.StdEncoding.EncodeToString([]byte(user + ":" + password))
}

func TestAccountsAreFoundAsDockerFindsThem(t *testing.T) {
	helpers(t, "quay.test robot canary-of-helper", "https://index.docker.io/v1/ hub canary-of-hub", "token.test <token> canary-of-token", "broken.test fails canary", "odd.test babbles canary")
	files := map[string]string{
		"auths":    `{"auths":{"quay.test":{"auth":"` + encoded("robot", "of:file") + `"},"https://index.docker.io/v1/":{"auth":"` + encoded("hub", "p") + `"},"old.test":{"username":"u","password":"p"},"https://url.test/v1/":{"auth":"` + encoded("url", "p") + `"}}}`,
		"identity": `{"auths":{"quay.test":{"auth":"` + encoded("00000000-0000-0000-0000-000000000000", "") + `","identitytoken":"canary"}}}`,
		"store":    `{"credsStore":"test","auths":{"file.test":{"auth":"` + encoded("file", "p") + `"},"quay.test":{}}}`,
		"helpers":  `{"credHelpers":{"quay.test":"test"},"credsStore":"missing"}`,
		"sorry":    `{"credHelpers":{"quay.test":"../test"}}`,
		"bad":      `{"auths":{"quay.test":{"auth":"canary"}}}`,
		"nonsense": `canary`,
	}
	dir := t.TempDir()
	for name, text := range files {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	docker := func(name string) Account { return Account{DockerConfig: filepath.Join(dir, name)} }
	test := Account{Helper: "test"}
	tests := []struct {
		account              Account
		host, user, password string
		identity, err        string
	}{
		{Account{}, "quay.test", "", "", "", ""},
		{docker("auths"), "quay.test", "robot", "of:file", "", ""},
		{docker("auths"), "registry-1.docker.io", "hub", "p", "", ""},
		{docker("auths"), "old.test", "u", "p", "", ""},
		{docker("auths"), "url.test", "url", "p", "", ""},
		{docker("auths"), "other.test", "", "", "", ""},
		{docker("auths"), "quay.test:5000", "", "", "", ""},
		{docker("identity"), "quay.test", "00000000-0000-0000-0000-000000000000", "", "canary", ""},
		{docker("store"), "quay.test", "robot", "canary-of-helper", "", ""},
		{docker("store"), "file.test", "file", "p", "", ""},
		{docker("store"), "registry-1.docker.io", "hub", "canary-of-hub", "", ""},
		{docker("store"), "broken.test", "", "", "", "docker-credential-test failed"},
		{docker("helpers"), "quay.test", "robot", "canary-of-helper", "", ""},
		{docker("helpers"), "other.test", "", "", "", "docker-credential-missing is not on the PATH"},
		{docker("sorry"), "quay.test", "", "", "", "not the name of a credential helper"},
		{docker("bad"), "quay.test", "", "", "", "not one of docker's"},
		{docker("nonsense"), "quay.test", "", "", "", "not docker's config.json"},
		{docker("none"), "quay.test", "", "", "", "no such file"},
		{test, "quay.test", "robot", "canary-of-helper", "", ""},
		{test, "token.test", "", "", "canary-of-token", ""},
		{test, "other.test", "", "", "", ""},
		{test, "broken.test", "", "", "", "docker-credential-test failed"},
		{test, "odd.test", "", "", "", "docker-credential-test failed"},
	}
	for _, tt := range tests {
		s, err := tt.account.find(t.Context(), tt.host)
		if s.username != tt.user || s.password != tt.password || s.identity != tt.identity {
			t.Errorf("%+v for %s: %q %q %q", tt.account, tt.host, s.username, s.password, s.identity)
		}
		if (err == nil) != (tt.err == "") || err != nil && !strings.Contains(err.Error(), tt.err) {
			t.Errorf("%+v for %s: %v, want %q", tt.account, tt.host, err, tt.err)
		}
		if err != nil && registrytest.Leak(err.Error()) != "" {
			t.Errorf("%+v for %s: the error tells a secret: %v", tt.account, tt.host, err)
		}
	}
}

func TestHelperThatHangsIsEnded(t *testing.T) {
	helpers(t, "quay.test hangs x")
	ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
	defer cancel()
	began := time.Now()
	if _, err := (Account{Helper: "test"}).find(ctx, "quay.test"); err == nil || !strings.Contains(err.Error(), "did not answer") {
		t.Error(err)
	}
	if took := time.Since(began); took > helperTimeout {
		t.Errorf("took %v", took)
	}
}

// use makes these upstreams those of the pool.
func (g *guarded) use(configs ...Config) {
	g.Helper()
	if err := use(g.pool, configs, false); err != nil {
		g.Fatal(err)
	}
}

func TestHelperIsAskedOnceInAWhile(t *testing.T) {
	asked := helpers(t, "quay.test robot "+strings.ReplaceAll(robots["robot"], " ", "-"))
	auth := registrytest.Auth{Scheme: "Basic", Users: map[string]string{"robot": strings.ReplaceAll(robots["robot"], " ", "-")}}
	guard(t, auth, func(g *guarded) {
		g.use(Config{Registry: "quay.io", URL: "https://quay.test", Account: Account{Helper: "test"}})
		want := func(n int) {
			g.Helper()
			if err := g.ask("quay.io", "org/a"); err != nil {
				g.Fatal(err)
			}
			synctest.Wait() // for what is renewed behind
			if got := asked(); got != n {
				g.Errorf("asked %d times, want %d", got, n)
			}
		}
		for range 5 {
			want(1)
		}
		time.Sleep(helperRenew + time.Second)
		want(2)
		want(2)
		time.Sleep(helperLife + time.Second)
		want(3)
		// A secret that is refused is not used until its time is over.
		time.Sleep(retryAccount + time.Second)
		g.Configure(registrytest.Config{Auth: registrytest.Auth{Scheme: "Basic", Users: map[string]string{"robot": "new"}}})
		if err := os.WriteFile(os.Getenv("HELPER_ACCOUNTS"), []byte("quay.test robot new\n"), 0o600); err != nil {
			g.Fatal(err)
		}
		want(1)
	})
}

func TestIdentityTokensAreOnlyForTheTokenService(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(dir, "config.json")
	if err := os.WriteFile(file, []byte(`{"auths":{"quay.test":{"identitytoken":"canary-identity"}}}`), 0o600); err != nil {
		t.Fatal(err)
	}
	guard(t, registrytest.Auth{Scheme: "Bearer", Service: "quay"}, func(g *guarded) {
		var form string
		g.Fault(registrytest.Match{Kind: registrytest.KindToken}, func(w http.ResponseWriter, r *http.Request, next http.Handler) {
			if r.Method != http.MethodPost {
				next.ServeHTTP(w, r)
				return
			}
			_ = r.ParseForm()
			form = r.PostForm.Encode()
			asked := r.Clone(r.Context())
			asked.Method, asked.Body = http.MethodGet, http.NoBody
			asked.URL.RawQuery = "service=quay&scope=" + r.PostForm.Get("scope")
			next.ServeHTTP(w, asked)
		})
		g.use(Config{Registry: "quay.io", URL: "https://quay.test", Account: Account{DockerConfig: file}})
		if err := g.ask("quay.io", "org/a"); err != nil {
			g.Error(err)
		}
		if want := "client_id=breakwater&grant_type=refresh_token&refresh_token=canary-identity&scope=repository%3Aorg%2Fa%3Apull&service=quay"; form != want {
			g.Errorf("asked with %s, want %s", form, want)
		}
		for _, request := range g.Requests(registrytest.Match{}) {
			if strings.Contains(fmt.Sprint(request.Header, request.URL), "canary-identity") {
				g.Errorf("%s got the identity token", request.URL)
			}
		}
	})
}

// amazon is a scripted ECR endpoint: it gives the password canary-N for the Nth time.
func amazon(t *testing.T) (asked, broken *atomic.Int32) {
	t.Helper()
	asked, broken = new(atomic.Int32), new(atomic.Int32)
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Connection", "close")
		w.Header().Set("Content-Type", "application/x-amz-json-1.1")
		if !strings.HasSuffix(r.Header.Get("X-Amz-Target"), ".GetAuthorizationToken") || !strings.Contains(r.Header.Get("Authorization"), "/eu-west-1/ecr/") {
			t.Errorf("asked for %q with %q", r.Header.Get("X-Amz-Target"), r.Header.Get("Authorization"))
		}
		n := asked.Add(1)
		if broken.Load() > 0 {
			w.WriteHeader(http.StatusBadRequest)
			_, _ = w.Write([]byte(`{"__type":"InvalidSignatureException","message":"canary-message"}`))
			return
		}
		bubble := time.Now() // the server stands outside, but the request says what time it is
		if signed, err := time.Parse("20060102T150405Z", r.Header.Get("X-Amz-Date")); err == nil {
			bubble = signed
		}
		_ = json.NewEncoder(w).Encode(map[string]any{"authorizationData": []any{map[string]any{
			"authorizationToken": encoded("AWS", fmt.Sprintf("canary-%d", n)),
			"expiresAt":          bubble.Add(12 * time.Hour).Unix(),
		}}})
	}))
	t.Cleanup(server.Close)
	for name, value := range map[string]string{"AWS_ENDPOINT_URL_ECR": server.URL, "AWS_ACCESS_KEY_ID": "AKIDcanary", "AWS_SECRET_ACCESS_KEY": "canary", "AWS_CONFIG_FILE": "/dev/null",
		"AWS_SHARED_CREDENTIALS_FILE": "/dev/null", "AWS_MAX_ATTEMPTS": "1", "AWS_EC2_METADATA_DISABLED": "true"} {
		t.Setenv(name, value)
	}
	return asked, broken
}

func TestECR(t *testing.T) {
	asked, broken := amazon(t)
	s, err := (Account{ECR: "eu-west-1"}).find(t.Context(), "123456789012.dkr.ecr.eu-west-1.amazonaws.com")
	if err != nil || s.username != "AWS" || s.password != "canary-1" || asked.Load() != 1 {
		t.Fatalf("%+v, %v", s, err)
	}
	if renew, until := time.Until(s.renew), time.Until(s.until); renew < 5*time.Hour || renew > 7*time.Hour || until < renew || until > 12*time.Hour {
		t.Errorf("renewed in %v, used for %v", renew, until)
	}
	broken.Store(1)
	if _, err = (Account{ECR: "eu-west-1"}).find(t.Context(), "x"); err == nil || !strings.Contains(err.Error(), "InvalidSignatureException") || strings.Contains(strings.ToLower(err.Error()), "canary") {
		t.Errorf("%v", err)
	}
}

func TestECRTokenIsRenewedEarly(t *testing.T) {
	asked, broken := amazon(t)
	guard(t, registrytest.Auth{Scheme: "Basic", Users: map[string]string{"AWS": "canary-1"}}, func(g *guarded) {
		g.use(Config{Registry: "quay.io", URL: "https://quay.test", Account: Account{ECR: "eu-west-1"}})
		pull := func(questions int32) {
			g.Helper()
			if err := g.ask("quay.io", "org/a"); err != nil {
				g.Error(err)
			}
			synctest.Wait()
			if n := asked.Load(); n != questions {
				g.Errorf("asked for %d tokens, want %d", n, questions)
			}
		}
		pull(1)
		time.Sleep(5 * time.Hour)
		pull(1)
		broken.Store(1)
		time.Sleep(2 * time.Hour)
		pull(2) // which fails behind; the old one is still good
		pull(2)
		time.Sleep(retryAccount + time.Second)
		pull(3)
		broken.Store(0)
		time.Sleep(retryAccount + time.Second)
		pull(4)
		g.Configure(registrytest.Config{Auth: registrytest.Auth{Scheme: "Basic", Users: map[string]string{"AWS": "canary-4"}}})
		pull(4)
	})
}

func TestAccountsHaveIdentities(t *testing.T) {
	seen := map[string]Account{}
	for _, account := range []Account{{}, {Username: "robot"}, {Username: "helper"}, {Username: "ecr"}, {Helper: "robot"}, {Helper: "other"}, {ECR: "us-east-1"}, {ECR: "us-east-2"}, {DockerConfig: "robot"}, {DockerConfig: "/other"}} {
		if other, twice := seen[account.id()]; twice {
			t.Errorf("%+v and %+v are both %q", account, other, account.id())
		}
		seen[account.id()] = account
	}
	if (Account{}).id() != "" {
		t.Error("nobody has an identity")
	}
}

// Accounts of one host share neither secrets, tokens nor pauses.
func TestH34AccountsAreKeptApart(t *testing.T) {
	helpers(t, "quay.test robot canary-of-robot")
	file := filepath.Join(t.TempDir(), "config.json")
	if err := os.WriteFile(file, []byte(`{"auths":{"quay.test":{"auth":"`+encoded("other", "canary-of-other")+`"}}}`), 0o600); err != nil {
		t.Fatal(err)
	}
	auth := registrytest.Auth{Scheme: "Bearer", Service: "quay", Users: map[string]string{"robot": "canary-of-robot", "other": "canary-of-other"}}
	guard(t, auth, func(g *guarded) {
		g.use(Config{Registry: "one", URL: "https://quay.test", Account: Account{Helper: "test"}}, Config{Registry: "two", URL: "https://quay.test", Account: Account{DockerConfig: file}}, Config{Registry: "three", URL: "https://quay.test"})
		identities := map[string]bool{}
		for _, registry := range []string{"one", "two", "three"} {
			err := g.ask(registry, "org/a")
			if (err == nil) != (registry != "three") {
				g.Errorf("%s: %v", registry, err)
			}
			identity := g.pool.Clients(registry)[0].Credential()
			identities[identity] = true
			if strings.Contains(identity, registrytest.Canary) {
				g.Errorf("%s tells a secret", identity)
			}
		}
		if len(identities) != 3 {
			g.Errorf("%v for three accounts", identities)
		}
		users := map[string]int{}
		for _, request := range g.tokens() {
			users[request.Header.Get("Authorization")]++
		}
		if len(users) != 3 {
			g.Errorf("tokens were asked for as %v", users)
		}
		remove := g.Fault(registrytest.Match{Kind: registrytest.KindManifest}, registrytest.First(1, registrytest.Status(http.StatusTooManyRequests, "Retry-After", "60")))
		defer remove()
		if err := g.ask("one", "org/b"); err == nil {
			g.Error("a 429 is no error")
		}
		if e := new(Error); !errors.As(g.ask("one", "org/b"), &e) || e.Kind != Throttled {
			g.Errorf("one: %v", e)
		}
		if err := g.ask("two", "org/b"); err != nil {
			g.Errorf("two has to wait for one's 429: %v", err)
		}
	})
}

// Whatever the way that a credential was found, it goes to the first origin alone.
func TestH32NoAccountFollowsARedirect(t *testing.T) {
	helpers(t, "quay.test robot canary-of-robot")
	file := filepath.Join(t.TempDir(), "config.json")
	if err := os.WriteFile(file, []byte(`{"auths":{"quay.test":{"auth":"`+encoded("other", "canary-of-other")+`"}}}`), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, scheme := range []string{"Basic", "Bearer"} {
		guard(t, registrytest.Auth{Scheme: scheme, Service: "quay", Users: map[string]string{"robot": "canary-of-robot", "other": "canary-of-other"}}, func(g *guarded) {
			var told atomic.Int32
			hop := func(host, next string) {
				g.listen(host, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
					if len(r.Header["Authorization"]) > 0 || len(r.Header["Cookie"]) > 0 || len(r.Header["Referer"]) > 0 {
						t.Errorf("%s was told %v", host, r.Header)
					}
					told.Add(1)
					http.Redirect(w, r, next, http.StatusTemporaryRedirect)
				}))
			}
			hop("sub.quay.test:443", "https://quay.test:8443/2") // to which Go would forward it
			hop("quay.test:8443", "https://b.example/3")
			hop("b.example:443", "https://nowhere.example/4")
			g.use(Config{Registry: "one", URL: "https://quay.test", Account: Account{Helper: "test"}}, Config{Registry: "two", URL: "https://quay.test", Account: Account{DockerConfig: file}})
			for _, registry := range []string{"one", "two"} {
				if err := g.ask(registry, "org/a"); err != nil {
					g.Fatal(err)
				}
				remove := g.Fault(registrytest.Match{Kind: registrytest.KindManifest}, registrytest.Status(http.StatusTemporaryRedirect, "Location", "https://sub.quay.test/1"))
				_ = g.ask(registry, "org/a")
				remove()
			}
			if n := told.Load(); n != 6 {
				g.Errorf("%d hops, want 6", n)
			}
		})
	}
}

// TestSecretsAreInNoOutput makes everything go wrong that has to do with accounts, and searches what
// was said of it.
func TestSecretsAreInNoOutput(t *testing.T) {
	helpers(t, "quay.test robot canary-1", "broken.test fails canary-2", "odd.test babbles canary-3", "token.test <token> canary-4")
	_, broken := amazon(t)
	broken.Store(1)
	t.Setenv("HTTPS_PROXY", "http://user:canary-5@proxy.test:3128")
	dir := t.TempDir()
	write := func(name, text string) string {
		file := filepath.Join(dir, name)
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		return file
	}
	accounts := map[string]Account{
		"password": {Username: "robot", PasswordFile: write("password", "canary-6")},
		"gone":     {Username: "robot", PasswordFile: filepath.Join(dir, "gone")},
		"docker":   {DockerConfig: write("docker", `{"auths":{"quay.test":{"auth":"`+encoded("robot", "canary-7")+`"}}}`)},
		"bad":      {DockerConfig: write("bad", `{"auths":{"quay.test":{"auth":"canary-8"}}}`)},
		"helper":   {Helper: "test"},
		"ecr":      {ECR: "eu-west-1"},
	}
	streams, err := os.Create(filepath.Join(dir, "streams"))
	if err != nil {
		t.Fatal(err)
	}
	defer streams.Close()
	stdout, stderr := os.Stdout, os.Stderr
	os.Stdout, os.Stderr = streams, streams
	defer func() { os.Stdout, os.Stderr = stdout, stderr }()
	var said bytes.Buffer
	synctest.Test(t, func(t *testing.T) {
		network := registrytest.NewNetwork()
		defer network.Close()
		pool := NewPool(Settings{Lookup: network.Lookup, Dial: network.DialContext, Logger: slog.New(slog.NewTextHandler(&said, &slog.HandlerOptions{Level: slog.LevelDebug}))})
		defer pool.Close()
		for _, proxy := range []string{ProxyEnv, ProxyNone, "http://user:canary-9@proxy.test:3128"} {
			for _, scheme := range []string{"Basic", "Bearer"} {
				for name, account := range accounts {
					for _, host := range []string{"quay.test", "broken.test", "odd.test", "token.test"} {
						registry := registrytest.New(registrytest.Config{Auth: registrytest.Auth{Scheme: scheme, Users: map[string]string{"robot": "x"}}})
						listener, err := network.Listen(host + ":80")
						if err != nil {
							t.Fatal(err)
						}
						server := registrytest.Serve(listener, registry)
						cfg := Config{Registry: "quay.io", URL: "http://" + host, Account: account, Proxy: proxy, CAFile: filepath.Join(dir, "password")}
						if err := use(pool, []Config{cfg}, false); err != nil {
							t.Fatal(err)
						}
						c := pool.Clients("quay.io")[0]
						for range 4 {
							_, err = c.Resolve(t.Context(), oci.Reference{Repository: oci.Repository{Registry: "quay.io", Name: "org/" + name}, Tag: "latest"})
							fmt.Fprintf(&said, "%v\n%+v\n%+v\n%s\n", err, err, c.Health(), c.Credential())
							if e := new(Error); errors.As(err, &e) {
								fmt.Fprintf(&said, "%+v %v\n", *e, errors.Unwrap(e))
							}
						}
						_ = server.Close()
					}
				}
			}
		}
		for _, bad := range []string{"socks5://user:canary-10@proxy.test", "http://user:canary-10@%zz", "canary-10"} {
			err := use(pool, []Config{{Registry: "quay.io", URL: "https://quay.test", Proxy: bad}}, false)
			if err == nil {
				t.Errorf("%s is accepted", bad)
			}
			fmt.Fprintln(&said, err)
		}
	})
	printed, err := os.ReadFile(streams.Name())
	if err != nil {
		t.Fatal(err)
	}
	said.Write(printed)
	if leak := registrytest.Leak(said.String()); leak != "" {
		t.Errorf("a secret is told: %s", leak)
	}
	if !strings.Contains(said.String(), "cannot find our credentials") {
		t.Error("nothing went wrong")
	}
}
