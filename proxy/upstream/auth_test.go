package upstream

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"breakwater/pkg/oci"
	"breakwater/pkg/registrytest"

	"github.com/google/go-cmp/cmp"
)

func TestChallenges(t *testing.T) {
	type challenges = []map[string]string
	bearer := map[string]string{"": "bearer", "realm": "https://auth.docker.io/token", "service": "registry.docker.io"}
	tests := map[string]struct {
		lines []string
		want  challenges
	}{
		"none":               {nil, nil},
		"empty":              {[]string{"", " ", ",, ,"}, nil},
		"Docker Hub":         {[]string{`Bearer realm="https://auth.docker.io/token",service="registry.docker.io"`}, challenges{bearer}},
		"spaces and case":    {[]string{"\tBEARER  Realm = \"https://auth.docker.io/token\" ,\t, SERVICE=\"registry.docker.io\","}, challenges{bearer}},
		"tokens as values":   {[]string{"Bearer realm=https, service=x"}, challenges{{"": "bearer", "realm": "https", "service": "x"}}},
		"commas and quotes":  {[]string{`Bearer scope="repository:a:pull,push",error="say \"no\"",realm="a\\b"`}, challenges{{"": "bearer", "scope": "repository:a:pull,push", "error": `say "no"`, "realm": `a\b`}}},
		"two on one line":    {[]string{`Basic realm="x", Bearer realm="https://auth.docker.io/token",service="registry.docker.io"`}, challenges{{"": "basic", "realm": "x"}, bearer}},
		"two lines":          {[]string{`Negotiate`, `Bearer realm="https://auth.docker.io/token",service="registry.docker.io"`}, challenges{{"": "negotiate"}, bearer}},
		"without parameters": {[]string{"Basic, Negotiate"}, challenges{{"": "basic"}, {"": "negotiate"}}},
		"token68":            {[]string{"Negotiate YWJj=="}, challenges{{"": "negotiate"}}},
		"quote left open":    {[]string{`Bearer service="x",realm="https://auth`}, challenges{{"": "bearer", "service": "x"}}},
		"quote left escaped": {[]string{`Bearer service="x",realm="\`}, challenges{{"": "bearer", "service": "x"}}},
		"no value":           {[]string{`Bearer service="x",realm=`}, challenges{{"": "bearer", "service": "x"}}},
		"a parameter alone":  {[]string{`="x"`, `realm="x"`}, challenges{{"": "realm"}}},
		"not a token":        {[]string{"Bearer\x00realm=x", "é", `"Bearer" realm="x"`}, challenges{{"": "bearer"}}},
		"a line inside":      {[]string{"Bearer realm=\"a\r\nb\""}, challenges{{"": "bearer", "realm": "a\r\nb"}}},
	}
	for name, tt := range tests {
		if diff := cmp.Diff(tt.want, parseChallenges(tt.lines)); diff != "" {
			t.Errorf("%s (-want +got):\n%s", name, diff)
		}
	}
	if n := len(parseChallenges([]string{strings.Repeat("Basic, ", 10_000), strings.Repeat("Bearer, ", 10_000)})); n > maxChallenges+1 {
		t.Errorf("%d challenges were read", n)
	}
}

func FuzzChallenges(f *testing.F) {
	f.Add(`Bearer realm="https://auth.docker.io/token",service="registry.docker.io",scope="repository:a:pull"`, "")
	f.Add(`Basic realm="\"", Negotiate YWJj==`, "Bearer a=b c=d")
	f.Fuzz(func(t *testing.T, first, second string) {
		all := parseChallenges([]string{first, second})
		if len(all) > maxChallenges+1 {
			t.Fatalf("%d challenges", len(all))
		}
		var lines []string // as they could have been sent, too
		for _, challenge := range all {
			parameters := []string{}
			for _, name := range slices.Sorted(maps.Keys(challenge)) {
				if token, rest := cutToken(name); name != "" && (token != name || rest != "" || strings.ToLower(name) != name) {
					t.Errorf("%q is no name of a parameter", name)
				}
				if name != "" {
					parameters = append(parameters, name+`="`+strings.NewReplacer(`\`, `\\`, `"`, `\"`).Replace(challenge[name])+`"`)
				}
			}
			if token, rest := cutToken(challenge[""]); token == "" || rest != "" {
				t.Errorf("%q is no scheme", challenge[""])
			}
			lines = append(lines, challenge[""]+" "+strings.Join(parameters, ", "))
		}
		if diff := cmp.Diff(all, parseChallenges(lines)); diff != "" {
			t.Errorf("%q (-read +read again):\n%s", lines, diff)
		}
	})
}

// guarded is a registry at https://quay.test that wants to know who asks, and those who ask it.
type guarded struct {
	*testing.T
	*registrytest.Registry
	network *registrytest.Network
	pool    *Pool
	folder  string
}

// guard runs f in a bubble in which quay.test, pool and network are.
func guard(t *testing.T, auth registrytest.Auth, f func(*guarded)) {
	t.Helper()
	folder := t.TempDir()
	synctest.Test(t, func(t *testing.T) {
		network := registrytest.NewNetwork()
		g := &guarded{t, registrytest.New(registrytest.Config{Auth: auth}), network, nil, folder}
		t.Cleanup(func() { _ = network.Close() })
		g.Serve(t, network, "quay.test:443")
		for _, repo := range []string{"org/a", "org/b"} {
			g.PutManifest(repo, "latest", oci.MediaTypeDockerManifest, []byte(`{"schemaVersion":2,"mediaType":"`+oci.MediaTypeDockerManifest+`","layers":[]}`))
		}
		g.pool = NewPool(Settings{Lookup: network.Lookup, Dial: network.DialContext, TLS: &tls.Config{RootCAs: network.CA.Pool()},
			Logger: slog.New(slog.NewTextHandler(registrytest.Watch(t), &slog.HandlerOptions{Level: slog.LevelDebug}))})
		t.Cleanup(g.pool.Close)
		f(g)
	})
}

// as configures registries, each with the user that quay.test is asked as; "" is nobody.
func (g *guarded) as(users map[string]string) {
	g.Helper()
	var configs []Config
	for registry, user := range users {
		cfg := Config{Registry: registry, URL: "https://quay.test", Account: Account{Username: user}}
		if user != "" {
			cfg.Account.PasswordFile = filepath.Join(g.folder, user)
			if err := os.WriteFile(cfg.Account.PasswordFile, []byte(robots[user]+"\r\n"), 0o600); err != nil {
				g.Fatal(err)
			}
		}
		configs = append(configs, cfg)
	}
	if err := use(g.pool, configs, false); err != nil {
		g.Fatal(err)
	}
}

// ask asks for a repository's manifest in the name of a registry. What it says of it must tell no secret.
func (g *guarded) ask(registry, repo string) error {
	g.Helper()
	c := g.pool.Clients(registry)[0]
	_, err := c.Manifest(context.Background(), oci.Reference{Repository: oci.Repository{Registry: registry, Name: repo}, Tag: "latest"})
	said := fmt.Sprintf("%v %+v %s", err, c.Health(), c.Credential())
	if e := new(Error); errors.As(err, &e) {
		said += fmt.Sprintf(" %+v", *e)
	}
	if leak := registrytest.Leak(said); leak != "" {
		g.Errorf("a secret is told: %s", leak)
	}
	return err
}

func (g *guarded) tokens() []registrytest.Request {
	return g.Requests(registrytest.Match{Func: func(r *http.Request) bool { return strings.Contains(r.URL.Path, "/token") }})
}

// robots are users with their passwords.
var robots = map[string]string{"robot": registrytest.Canary + " of robot", "other": registrytest.Canary + " of other"}

// listen serves h over TLS at "host:port" of the network.
func (g *guarded) listen(address string, h http.Handler) {
	g.Helper()
	listener, err := g.network.Listen(address)
	if err != nil {
		g.Fatal(err)
	}
	certificate, err := g.network.CA.Certificate(address[:strings.LastIndex(address, ":")], time.Time{})
	if err != nil {
		g.Fatal(err)
	}
	server := registrytest.Serve(listener, h, certificate)
	g.Cleanup(func() { _ = server.Close() })
}

func TestH34Realms(t *testing.T) {
	const asked, trusted = "asked", "trusted" // asked anonymously; given the credential; "" for refused
	tests := map[string]string{
		"https://quay.test/token":                          trusted,
		"https://quay.test:443/token":                      trusted,
		"https://auth.quay.test/token":                     trusted, // of the same registrable domain
		"https://auth.quay.test/token?account=robot":       trusted,
		"https://evil.test/token":                          asked,
		"https://quay.test.evil.test/token":                asked,
		"https://notquay.test/token":                       asked,
		"https://quay.test:8443/token":                     asked,
		"https://auth.quay.test:8443/token":                asked,
		"https://198.51.100.77/token":                      asked, // by address, whoever it is
		"https://evil.test/quay.test/token":                asked,
		"https://evil.test/token?quay.test":                asked,
		"http://quay.test/token":                           "",
		"http://evil.test/token":                           "",
		"https://127.0.0.1/token":                          "",
		"https://localhost.test/token":                     "", // which is 127.0.0.1
		"https://169.254.169.254/token":                    "",
		"https://[::ffff:127.0.0.1]/token":                 "",
		"https://2130706433/token":                         "",
		"https://quay.test@evil.test/token":                "",
		"https://robot:password@quay.test/token":           "",
		"https://quay.test/token?x=1&service=evil":         "",
		"https://quay.test/token?scope=repository:*:*":     "",
		"https://quay.test/token#fragment":                 "",
		"https://quay.test\\@evil.test/token":              "",
		"https://quay.test%2eevil.test/token":              "",
		"https://quay.test/" + strings.Repeat("x", 10<<10): "",
		"https:quay.test/token":                            "",
		"//quay.test/token":                                "",
		"/token":                                           "",
		"":                                                 "",
		"file:///etc/passwd":                               "",
		"https://":                                         "",
	}
	for realm, want := range tests {
		t.Run(fmt.Sprintf("%.60s", realm), func(t *testing.T) {
			auth := registrytest.Auth{Scheme: "Bearer", Realm: realm, Service: "quay", Users: robots}
			guard(t, auth, func(g *guarded) {
				hosts := []string{"auth.quay.test:443", "evil.test:443", "quay.test.evil.test:443", "notquay.test:443", "quay.test:8443", "auth.quay.test:8443", "198.51.100.77:443", "localhost.test:443", "127.0.0.1:443"}
				for _, host := range hosts {
					g.listen(host, g.Registry)
				}
				g.network.SetHost("localhost.test", registrytest.Host{Addresses: []netip.Addr{netip.MustParseAddr("127.0.0.1")}})
				if realm == "" { // the scripted registry would put its own there
					g.Fault(registrytest.Match{Kind: registrytest.KindManifest}, registrytest.Status(http.StatusUnauthorized, "Www-Authenticate", `Bearer realm="",service="quay"`))
				}
				g.as(map[string]string{"quay.io": "robot"})
				if err := g.ask("quay.io", "org/a"); (err == nil) != (want == trusted) {
					g.Errorf("asking for the manifest: %v", err)
				}
				got := ""
				for _, request := range g.tokens() {
					if got == "" {
						got = asked
					}
					if request.Header.Get("Authorization") != "" {
						got = trusted
					}
					if q := request.URL.Query(); q.Get("service") != "quay" || !slices.Equal(q["scope"], []string{"repository:org/a:pull"}) {
						g.Errorf("asked with %v", q)
					}
				}
				if got != want {
					g.Errorf("the realm was %q, want it %q", got, want)
				}
				for _, request := range g.Requests(registrytest.Match{}) {
					if !strings.Contains(request.URL.Path, "/token") && strings.HasPrefix(request.Header.Get("Authorization"), "Basic") {
						g.Errorf("%s%s got the password", request.Host, request.URL)
					}
				}
				if want == "" && len(g.network.Dials("")) > 1 {
					g.Errorf("dialled %v", g.network.Dials(""))
				}
			})
		})
	}
}

// Everybody may have a host below these.
func TestH34PublicSuffixesAreNoDomain(t *testing.T) {
	for base, realm := range map[string]string{
		"https://a.github.io":          "https://b.github.io/token",
		"https://a.co.uk":              "https://b.co.uk/token",
		"https://quay":                 "https://quay/../token",
		"https://a.s3.amazonaws.com":   "https://b.s3.amazonaws.com/token",
		"https://198.51.100.1":         "https://198.51.100.2/token",
		"https://203.0.100.1":          "https://198.51.100.1/token",
		"https://198.51.100.1:444":     "https://198.51.100.1/token",
		"https://localhost":            "https://a.localhost/token",
		"https://[2001:db8::1]":        "https://[2001:db8::2]/token",
		"http://quay.test":             "https://auth.quay.test/token",
		"https://registry.example.com": "https://registry.example.com.:443/token",
	} {
		p := NewPool(Settings{})
		c, err := newClient(p, Config{Registry: "x.io", URL: base, Account: Account{Username: "robot"}})
		if err != nil {
			t.Fatal(err)
		}
		u, err := c.auth.realm(realm)
		if trusted := err == nil && c.auth.trusts(u); trusted != (base == "https://quay") {
			t.Errorf("%s trusts %s: %v", base, realm, trusted)
		}
		c.retire()
		c.auth.close()
	}
}

// reply makes the token service say something else.
func reply(status int, body string, pairs ...string) registrytest.Fault {
	return func(w http.ResponseWriter, _ *http.Request, _ http.Handler) {
		for i := 0; i < len(pairs); i += 2 {
			w.Header().Set(pairs[i], pairs[i+1])
		}
		w.WriteHeader(status)
		_, _ = w.Write([]byte(body))
	}
}

func TestH35TokenReplies(t *testing.T) {
	tests := map[string]registrytest.Fault{
		"redirect":                reply(302, "", "Location", "https://evil.test/token"),
		"redirect, same host":     reply(307, "", "Location", "https://quay.test/token/2"),
		"endless":                 registrytest.Endless(),
		"1 GB":                    registrytest.Header("Content-Length", "1000000000"),
		"over 256 KiB":            reply(200, `{"token":"x","padding":"`+strings.Repeat("x", 256<<10)+`"}`),
		"a token of 1 MB":         reply(200, `{"token":"`+strings.Repeat("x", 1<<20)+`"}`),
		"a token of 16 KiB and 1": reply(200, `{"token":"`+strings.Repeat("x", 16<<10+1)+`"}`),
		"CR and LF":               reply(200, `{"token":"x\r\nX-Evil: 1"}`),
		"a space":                 reply(200, `{"token":"x y"}`),
		"NUL":                     reply(200, `{"token":"x\u0000"}`),
		"not ASCII":               reply(200, `{"token":"ä"}`),
		"DEL":                     reply(200, `{"token":"x\u007f"}`),
		"empty":                   reply(200, `{"token":""}`),
		"none":                    reply(200, `{}`),
		"null":                    reply(200, `null`),
		"a number":                reply(200, `{"token":1}`),
		"a list":                  reply(200, `["token"]`),
		"a page":                  registrytest.Portal(),
		"nothing":                 reply(200, ""),
		"204":                     reply(204, ""),
		"100,000 deep":            reply(200, strings.Repeat("[", 100_000)),
		"500":                     reply(500, `{"token":"x"}`),
		"404":                     reply(404, `{"token":"x"}`),
		"expires in words":        reply(200, `{"token":"x","expires_in":"soon"}`),
		"expires in 1e999":        reply(200, `{"token":"x","expires_in":1e999}`),
	}
	for name, fault := range tests {
		t.Run(name, func(t *testing.T) {
			guard(t, registrytest.Auth{Scheme: "Bearer", Users: robots}, func(g *guarded) {
				evil := registrytest.New(registrytest.Config{})
				g.listen("evil.test:443", evil)
				g.Fault(registrytest.Match{Kind: registrytest.KindToken}, fault)
				g.as(map[string]string{"quay.io": "robot"})
				err := g.ask("quay.io", "org/a")
				e := new(Error)
				if !errors.As(err, &e) || e.Kind != Unavailable || e.Class != "token" || strings.Contains(err.Error(), "xx") {
					g.Errorf("%v, want the token service to be an outage", err)
				}
				if n := evil.Count(registrytest.Match{}); n > 0 {
					g.Errorf("evil.test was asked %d times", n)
				}
				if n := g.Count(registrytest.Match{}); n != 2 {
					g.Errorf("%d requests, want one for the manifest and one for a token", n)
				}
				for _, request := range g.tokens() {
					if request.Sent > 1<<20 {
						g.Errorf("%d bytes were taken in", request.Sent)
					}
				}
				health := g.pool.Clients("quay.io")[0].Health()
				if health[classToken].Failed != 1 || health[classManifest].Failed != 0 {
					g.Errorf("the token service failed %d times, the registry %d, want 1 and 0", health[classToken].Failed, health[classManifest].Failed)
				}
			})
		})
	}
}

// A token is used until 80 % of its life are over, and that life is between 30 s and an hour. Whoever
// uses it in its last quarter has the next one fetched, and does not wait for it.
func TestH35TokenLife(t *testing.T) {
	for expires, life := range map[string]time.Duration{
		"-1": 30 * time.Second, "0": time.Minute, "1": 30 * time.Second, "30": 30 * time.Second, "300": 5 * time.Minute, "299.9": 299900 * time.Millisecond,
		"3600": time.Hour, "3601": time.Hour, "1000000000000": time.Hour, "1e300": time.Hour, "-1e300": 30 * time.Second, "null": time.Minute,
	} {
		guard(t, registrytest.Auth{Scheme: "Bearer", Users: robots, ExpiresIn: 24 * time.Hour}, func(g *guarded) {
			g.Fault(registrytest.Match{Kind: registrytest.KindToken}, expiring(expires), registrytest.Delay(time.Second))
			g.as(map[string]string{"quay.io": "robot"})
			ask := func(tokens int, took time.Duration) {
				g.Helper()
				begin := time.Now()
				if err := g.ask("quay.io", "org/a"); err != nil {
					g.Errorf("expires_in %s: %v", expires, err)
				}
				if waited := time.Since(begin); waited != took {
					g.Errorf("expires_in %s: waited %v, want %v", expires, waited, took)
				}
				time.Sleep(time.Second)
				if n := len(g.tokens()); n != tokens {
					g.Errorf("expires_in %s: %d tokens by now, want %d", expires, n, tokens)
				}
			}
			ask(1, time.Second)
			time.Sleep(life*6/10 - 1500*time.Millisecond)
			ask(1, 0)
			ask(2, 0) // the second one is there now
			time.Sleep(life*6/10 - 1500*time.Millisecond)
			ask(2, 0)
			time.Sleep(life*2/10 + time.Second)
			ask(3, time.Second) // and has run out
		})
	}
}

// expiring changes what the token service says of a token's life.
func expiring(seconds string) registrytest.Fault {
	return func(w http.ResponseWriter, r *http.Request, next http.Handler) {
		next.ServeHTTP(rewriter{w, func(body string) string {
			return strings.Replace(body, `"expires_in":`+strconv.Itoa(24*3600), `"expires_in":`+seconds, 1)
		}}, r)
	}
}

type rewriter struct {
	http.ResponseWriter
	change func(string) string
}

func (w rewriter) WriteHeader(status int) {
	w.Header().Del("Content-Length")
	w.ResponseWriter.WriteHeader(status)
}

func (w rewriter) Write(p []byte) (int, error) {
	_, err := w.ResponseWriter.Write([]byte(w.change(string(p))))
	return len(p), err
}

// However many want it, a token is asked for once, and then once for each repository.
func TestTokensAreShared(t *testing.T) {
	guard(t, registrytest.Auth{Scheme: "Bearer", Users: robots, ExpiresIn: time.Hour}, func(g *guarded) {
		g.as(map[string]string{"quay.io": "robot"})
		g.Fault(registrytest.Match{Kind: registrytest.KindToken}, registrytest.Delay(time.Second))
		for range 2 {
			for _, repo := range []string{"org/a", "org/b"} {
				var all sync.WaitGroup
				for range 50 {
					all.Go(func() {
						if err := g.ask("quay.io", repo); err != nil {
							g.Error(err)
						}
					})
				}
				all.Wait()
			}
		}
		if n := len(g.tokens()); n != 2 {
			g.Errorf("%d tokens for two repositories, want 2", n)
		}
		g.Revoke() // before their time
		if err := g.ask("quay.io", "org/a"); err != nil {
			g.Error(err)
		}
		if n := len(g.tokens()); n != 3 {
			g.Errorf("%d tokens after they were revoked, want 3", n)
		}
		g.Fault(registrytest.Match{Kind: registrytest.KindManifest}, registrytest.Status(http.StatusUnauthorized, "Www-Authenticate", `Bearer realm="https://quay.test/token"`))
		if err := g.ask("quay.io", "org/a"); !denied(err) {
			g.Errorf("401 with every token: %v, want it denied", err)
		}
		if n := len(g.tokens()); n > 5 {
			g.Errorf("%d tokens for a registry that takes none", n)
		}
	})
}

func denied(err error) bool {
	e := new(Error)
	return errors.As(err, &e) && e.Kind == Denied
}

// One waiter's leaving is not the others'.
func TestTokenOutlivesItsFirstWaiter(t *testing.T) {
	guard(t, registrytest.Auth{Scheme: "Bearer", Users: robots}, func(g *guarded) {
		g.as(map[string]string{"quay.io": "robot"})
		g.Fault(registrytest.Match{Kind: registrytest.KindToken}, registrytest.Delay(2*time.Second))
		ctx, cancel := context.WithTimeout(g.Context(), time.Second)
		defer cancel()
		var second sync.WaitGroup
		second.Go(func() {
			time.Sleep(500 * time.Millisecond)
			if err := g.ask("quay.io", "org/a"); err != nil {
				g.Error(err)
			}
		})
		_, err := g.pool.Clients("quay.io")[0].Manifest(ctx, oci.Reference{Repository: oci.Repository{Registry: "quay.io", Name: "org/a"}, Tag: "latest"})
		if e := new(Error); !errors.As(err, &e) || e.Reason != "not waited for" {
			g.Errorf("the first waiter got %v", err)
		}
		second.Wait()
		if n := len(g.tokens()); n != 1 {
			g.Errorf("%d tokens, want 1", n)
		}
	})
}

func TestTokenRefusalIsRemembered(t *testing.T) {
	for _, status := range []int{http.StatusUnauthorized, http.StatusForbidden} {
		guard(t, registrytest.Auth{Scheme: "Bearer", Users: robots}, func(g *guarded) {
			g.as(map[string]string{"quay.io": "robot"})
			heal := g.Fault(registrytest.Match{Kind: registrytest.KindToken}, registrytest.Status(status))
			ask := func(want int) {
				g.Helper()
				for range 5 {
					if err := g.ask("quay.io", "org/a"); !denied(err) {
						g.Errorf("%v, want it denied", err)
					}
				}
				if n := len(g.tokens()); n != want {
					g.Errorf("asked %d times by now, want %d", n, want)
				}
			}
			ask(1)
			time.Sleep(59 * time.Second)
			ask(1)
			time.Sleep(2 * time.Second)
			ask(2)
			heal()
			time.Sleep(61 * time.Second)
			if err := g.ask("quay.io", "org/a"); err != nil {
				g.Error(err)
			}
			if h := g.pool.Clients("quay.io")[0].Health()[classToken]; h.Failed > 0 || h.State != "closed" {
				g.Errorf("a refusal was taken for a failure: %+v", h)
			}
		})
	}
}

// What one account has been given is not another's, though host, realm, service and scope are the same.
func TestAccountsShareNoToken(t *testing.T) {
	for _, scheme := range []string{"Basic", "Bearer"} {
		auth := registrytest.Auth{Scheme: scheme, Users: robots, Public: []string{"org/b"}, ExpiresIn: time.Hour}
		guard(t, auth, func(g *guarded) {
			g.as(map[string]string{"one.io": "robot", "two.io": "other", "open.io": ""})
			for range 2 {
				for _, registry := range []string{"one.io", "two.io", "open.io"} {
					g.Forget()
					if err := g.ask(registry, "org/a"); denied(err) != (registry == "open.io") {
						g.Errorf("%s, %s: private: %v", scheme, registry, err)
					}
					if err := g.ask(registry, "org/b"); err != nil {
						g.Errorf("%s, %s: public: %v", scheme, registry, err)
					}
				}
			}
			if scheme == "Basic" {
				return
			}
			g.Revoke()
			owner := map[string]string{} // of what stood in Authorization
			for _, registry := range []string{"one.io", "two.io", "open.io", "one.io", "two.io"} {
				g.Forget()
				if err := g.ask(registry, "org/b"); err != nil {
					g.Errorf("%s: %v", registry, err)
				}
				for _, request := range g.Requests(registrytest.Match{}) {
					sent := request.Header.Get("Authorization")
					if was := owner[sent]; sent != "" && was != "" && was != registry {
						g.Errorf("%s sent what is %s's", registry, was)
					}
					owner[sent] = registry
				}
			}
		})
	}
}

// A password that has changed needs no restart, and one that cannot be read is not the upstream's fault.
func TestPasswordIsReadWhenNeeded(t *testing.T) {
	guard(t, registrytest.Auth{Scheme: "Basic", Users: robots}, func(g *guarded) {
		g.as(map[string]string{"quay.io": "robot"})
		file := filepath.Join(g.folder, "robot")
		if err := os.WriteFile(file, []byte("old password"), 0o600); err != nil {
			g.Fatal(err)
		}
		if err := g.ask("quay.io", "org/a"); !denied(err) {
			g.Errorf("%v, want it denied", err)
		}
		if err := os.Remove(file); err != nil {
			g.Fatal(err)
		}
		err := g.ask("quay.io", "org/a")
		if e := new(Error); !errors.As(err, &e) || e.Kind != Unavailable || e.verdict != excluded {
			g.Errorf("%v, want an outage that is our own", err)
		}
		g.as(map[string]string{"quay.io": "robot"})
		if err := g.ask("quay.io", "org/a"); err != nil {
			g.Error(err)
		}
	})
}

// use makes these the upstreams of the pool.
func use(pool *Pool, configs []Config, anyRegistry AnyRegistry) error {
	use, err := pool.Prepare(configs, anyRegistry)
	if err == nil {
		use()
	}
	return err
}
