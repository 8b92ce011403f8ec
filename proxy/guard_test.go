package proxy

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"math/big"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"breakwater/pkg/config"
	"breakwater/pkg/registrytest"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/jwt"
	"golang.org/x/crypto/bcrypt"
)

// guarded is a mirror that is reached at localhost, and from beyond at mirror.test. quay.test is asked with an
// account, open.test without one.
const guarded = `
default_registry: open.test
listen: 0.0.0.0:5000
server_names: [mirror.test]
hosts: {quay.mirror.test: quay.test}
registries:
  quay.test: {upstreams: [{url: "https://quay.test", credentials: {username: ci, password_file: PASSWORD}}]}
  open.test: {upstreams: [{url: "http://open.test:80"}]}
`

const wrongPassword = registrytest.Canary + "-wrong"

// idents are the files and tokens of those who call.
type idents struct {
	dir    string
	signer *ecdsa.PrivateKey
}

// newIdents writes the files into a folder: ci and other have the password that is the canary.
func newIdents(t testing.TB) idents {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	hash, err := bcrypt.GenerateFromPassword([]byte(registrytest.Canary), bcrypt.MinCost)
	if err != nil {
		t.Fatal(err)
	}
	public, err := x509.MarshalPKIXPublicKey(key.Public())
	if err != nil {
		t.Fatal(err)
	}
	i := idents{t.TempDir(), key}
	ca := &x509.Certificate{SerialNumber: big.NewInt(1), NotAfter: time.Date(2090, 1, 1, 0, 0, 0, 0, time.UTC), IsCA: true, BasicConstraintsValid: true}
	raw, err := x509.CreateCertificate(rand.Reader, ca, ca, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	for name, text := range map[string]string{
		"HTPASSWD": fmt.Sprintf("ci:%s\nother:%s\n", hash, hash),
		"KEYS":     string(pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: public})),
		"CLIENTS":  string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: raw})),
		"CERT":     string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: raw})),
		"KEY":      "not looked at here",
	} {
		if err := os.WriteFile(filepath.Join(i.dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return i
}

// in puts the files' names into a configuration.
func (i idents) in(yaml string) string {
	for _, name := range []string{"HTPASSWD", "KEYS", "CLIENTS", "CERT", "KEY"} {
		yaml = strings.ReplaceAll(yaml, "$"+name, filepath.Join(i.dir, name))
	}
	return yaml
}

// token is a bearer's, for pulling some repositories.
func (i idents) token(t testing.TB, sub string, repositories ...string) string {
	t.Helper()
	signer, err := jose.NewSigner(jose.SigningKey{Algorithm: jose.ES256, Key: i.signer}, nil)
	if err != nil {
		t.Fatal(err)
	}
	access := []map[string]any{}
	for _, name := range repositories {
		access = append(access, map[string]any{"type": "repository", "name": name, "actions": []string{"pull"}})
	}
	token, err := jwt.Signed(signer).Claims(map[string]any{"iss": "auth.test", "aud": "mirror.test", "sub": sub, "exp": time.Now().Add(24 * time.Hour).Unix(), "access": access}).Serialize()
	if err != nil {
		t.Fatal(err)
	}
	return "Bearer " + token
}

// beyond serves the rig's mirror to others than its own host. Who sends X-Certificate is taken to have shown
// one of that name, which is TLS's to verify.
func (r *rig) beyond() {
	r.Helper()
	listener, err := r.network.Listen("mirror.test:5000")
	if err != nil {
		r.Fatal(err)
	}
	server := registrytest.Serve(listener, http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		if name := req.Header.Get("X-Certificate"); name != "" {
			block, _ := pem.Decode([]byte(r.file(r.mirror.guard.Load().cfg.Access.ClientCAFile)))
			ca, err := x509.ParseCertificate(block.Bytes)
			if err != nil {
				r.Error(err)
			}
			leaf := &x509.Certificate{Subject: pkix.Name{CommonName: name}, NotAfter: ca.NotAfter}
			req.TLS = &tls.ConnectionState{VerifiedChains: [][]*x509.Certificate{{leaf, ca}}}
		}
		r.mirror.ServeHTTP(w, req)
	}))
	r.Cleanup(func() { _ = server.Close() })
}

func (r *rig) file(name string) string {
	raw, err := os.ReadFile(name)
	if err != nil {
		r.Error(err)
	}
	return string(raw)
}

func basic(name, password string) string {
	req := &http.Request{Header: http.Header{}}
	req.SetBasicAuth(name, password)
	return "Authorization: " + req.Header.Get("Authorization")
}

// TestAccessChallenges holds the words by which callers are asked, which clients depend on.
func TestAccessChallenges(t *testing.T) {
	i := newIdents(t)
	for _, policy := range policies {
		if !strings.Contains(policy.access, "htpasswd") && !strings.Contains(policy.access, "token") {
			continue
		}
		bubble(t, i.in(guarded+policy.access), func(r *rig) {
			r.beyond()
			nobody := whom{"nobody", far, nil}
			for path, scope := range map[string]string{"/v2/": "", "/v2/quay.test/org/app" + latest: "quay.test/org/app", "/v2/org/app" + latest + "?ns=quay.test": "quay.test/org/app", "/v2/org/app/tags/list": "open.test/org/app", "/v2/evil.test/org/app" + latest: "", "/v2/Org/app" + latest: ""} {
				got := r.by(nobody, http.MethodGet, path)
				want := `Basic realm="Breakwater"`
				if strings.Contains(policy.access, "token") {
					if want = `Bearer realm="https://auth.test/token",service="mirror.test"`; scope != "" {
						want += `,scope="repository:` + scope + `:pull"`
					}
				}
				if challenge := got.Header.Get("Www-Authenticate"); got.StatusCode != 401 || challenge != want || got.code() != "UNAUTHORIZED" {
					r.Errorf("%s: %d %s, want %s", path, got.StatusCode, challenge, want)
				}
			}
			for _, method := range []string{"POST", "PUT", "PATCH", "DELETE"} { // says nothing of who calls
				r.by(nobody, method, "/v2/quay.test/org/app/blobs/uploads/").want(r, 405)
			}
			r.quiet("challenges")
		})
	}
}

// TestTokensByName holds by which names a token is good for a repository: by what clients make a scope of, which
// is the path as people type it, and never for another repository than the path alone would mean.
func TestTokensByName(t *testing.T) {
	i := newIdents(t)
	const hub = "default_registry: docker.io\nhosts: {hub.mirror.test: docker.io, quay.mirror.test: quay.test}\n"
	const quay = "default_registry: quay.test\nhosts: {hub.mirror.test: docker.io}\n"
	const alpine, typed, byHost = "/v2/docker.io/library/alpine", "/v2/alpine", "/v2/alpine Host: hub.mirror.test:5000"
	for _, tt := range []struct {
		config, scope string
		good, denied  []string // paths, and a host
	}{
		{hub, "alpine", []string{typed, alpine, "/v2/library/alpine", "/v2/docker.io/alpine", "/v2/alpine?ns=docker.io", byHost}, []string{"/v2/quay.test/alpine", "/v2/quay.test/library/alpine", "/v2/org/alpine"}},
		{hub, "library/alpine", []string{typed, alpine, "/v2/library/alpine", byHost}, []string{"/v2/quay.test/library/alpine", "/v2/library/other"}},
		{hub, "docker.io/alpine", []string{typed, alpine, "/v2/docker.io/alpine", byHost}, []string{"/v2/quay.test/alpine", "/v2/docker.io/docker.io/alpine"}},
		{hub, "docker.io/library/alpine", []string{typed, alpine}, []string{"/v2/docker.io/library/other"}},
		{hub, "org/app", []string{"/v2/org/app", "/v2/docker.io/org/app"}, []string{"/v2/quay.test/org/app", "/v2/org/app?ns=quay.test", "/v2/org/app Host: quay.mirror.test:5000", "/v2/org/app/sub", "/v2/library/app"}},
		{hub, "quay.test/org/app", []string{"/v2/quay.test/org/app", "/v2/org/app?ns=quay.test", "/v2/org/app Host: quay.mirror.test:5000"}, []string{"/v2/org/app", "/v2/docker.io/quay.test/org/app"}},
		{quay, "alpine", []string{typed, "/v2/quay.test/alpine"}, []string{alpine, "/v2/quay.test/library/alpine", byHost}},
		{quay, "library/alpine", []string{"/v2/library/alpine"}, []string{alpine, typed}},
		{quay, "docker.io/alpine", []string{alpine, "/v2/docker.io/alpine", byHost}, []string{typed, "/v2/quay.test/docker.io/alpine"}},
		{hub, "", nil, []string{typed}},
		{hub, "library/*", nil, []string{typed}},
		{hub, "/alpine", nil, []string{typed}},
		{hub, "Alpine", nil, []string{typed}},
		{hub, "evil.test/alpine", nil, []string{typed}},
	} {
		access := `access: {token: {realm: "https://auth.test/token", service: mirror.test, issuer: auth.test, keys_file: $KEYS}, plain_http: true, loopback: open}`
		bubble(t, i.in("listen: 0.0.0.0:5000\nserver_names: [mirror.test]\nregistries:\n  quay.test: {upstreams: [{url: \"https://quay.test\"}]}\n  docker.io: {upstreams: [{url: \"https://docker.test\"}]}\n"+tt.config+access), func(r *rig) {
			r.beyond()
			for status, paths := range map[int][]string{http.StatusServiceUnavailable: tt.good, http.StatusUnauthorized: tt.denied} { // upstreams are not there
				for _, path := range paths {
					path, host, _ := strings.Cut(path, " ")
					repo, query, _ := strings.Cut(path, "?")
					who := whom{"ci", far, []string{"Authorization: " + i.token(t, "ci", tt.scope)}}
					if host != "" {
						who.header = append(who.header, host)
					}
					if got := r.by(who, http.MethodGet, repo+latest+"?"+query); got.StatusCode != status {
						r.Errorf("default %.30q, scope %q: %s %s is %d, want %d", tt.config, tt.scope, path, host, got.StatusCode, status)
					}
				}
			}
		})
	}
}

// TestLoopbackIsOpen holds whose connections are trusted: those of this host, unless they say that they speak
// for others, or the configuration says that they may.
func TestLoopbackIsOpen(t *testing.T) {
	i := newIdents(t)
	for loopback, trusted := range map[string]bool{config.LoopbackOpen: true, config.LoopbackAsked: false} {
		bubble(t, i.in(guarded+"access: {htpasswd: $HTPASSWD, plain_http: true, loopback: "+loopback+"}"), func(r *rig) {
			r.beyond()
			status := func(open bool) int {
				if open {
					return 200
				}
				return 401
			}
			r.by(whom{"", near, nil}, http.MethodGet, "/v2/").want(r, status(trusted))
			r.by(whom{"", near, []string{basic("ci", wrongPassword)}}, http.MethodGet, "/v2/").want(r, status(trusted))
			r.by(whom{"", near, []string{basic("ci", registrytest.Canary)}}, http.MethodGet, "/v2/").want(r, 200)
			for _, header := range []string{"X-Forwarded-For: 192.0.2.9", "X-Forwarded-For: 127.0.0.1", "Forwarded: for=192.0.2.9", "X-Real-IP: 192.0.2.9", "Via: 1.1 front"} {
				r.by(whom{"", near, []string{header}}, http.MethodGet, "/v2/").want(r, 401)
				r.by(whom{"", far, []string{header}}, http.MethodGet, "/v2/").want(r, 401)
			}
			for _, header := range []string{"X-Forwarded-For: 127.0.0.1", "Forwarded: for=127.0.0.1", "Host: localhost:5000"} { // nobody believes that
				if got := r.by(whom{"", far, []string{header}}, http.MethodGet, "/v2/"); got.StatusCode != 401 {
					r.Errorf("%s: %d", header, got.StatusCode)
				}
			}
		})
	}
}

// TestAccessOfWhatWasPrivate: what was got with an account that the configuration no longer has is as good as
// not stored for callers whom nobody knows, until upstream gives it without one.
func TestAccessOfWhatWasPrivate(t *testing.T) {
	i := newIdents(t)
	later := strings.Replace(guarded, ", credentials: {username: ci, password_file: PASSWORD}", "", 1) + "access: {anonymous: true}"
	with := guarded + "access: {htpasswd: $HTPASSWD, plain_http: true, loopback: open}"
	nobody := whom{"nobody", far, nil}
	layer, manifest := "/blobs/"+storedImage.Blobs[1].Digest.String(), "/manifests/"+storedImage.Digest().String()
	paths := []string{app + latest, app + manifest, app + layer, app + "/tags/list", app + "/referrers/" + storedImage.Digest().String()}
	bubble(t, i.in(with), func(r *rig) {
		users := map[string]string{"ci": registrytest.Canary}
		r.quay.Configure(registrytest.Config{Auth: registrytest.Auth{Scheme: "Basic", Users: users}})
		r.quay.Serve(r, r.network, "quay.test:443")
		r.quay.Push("org/app", "latest", storedImage)
		r.pull("latest", storedImage)
		for _, path := range paths {
			r.get(path).want(r, 200)
		}
		if err := r.mirror.Use(r.config(i.in(later))); err != nil {
			r.Fatal(err)
		}
		r.beyond()
		time.Sleep(age)
		statuses := func(who whom) string {
			var all []int
			for _, path := range paths {
				for _, method := range []string{http.MethodGet, http.MethodHead} {
					all = append(all, r.by(who, method, path).StatusCode)
				}
			}
			return fmt.Sprint(all)
		}
		if got := statuses(nobody); got != "[403 403 403 403 404 404 403 403 403 403]" {
			r.Errorf("upstream refuses: %s", got)
		}
		r.down()
		if got := statuses(nobody); got != "[503 503 503 503 503 503 503 503 503 503]" {
			r.Errorf("upstream is out: %s", got)
		}
		if got := statuses(whom{"", near, nil}); got != "[200 200 200 200 200 200 200 200 200 200]" {
			r.Errorf("by loopback, upstream is out: %s", got)
		}
		r.network.SetLink("quay.test:443", registrytest.Link{})
		r.quay.Configure(registrytest.Config{}) // now it is for everybody
		time.Sleep(5 * time.Minute)
		r.quay.Forget()
		if got := statuses(nobody); got != "[200 200 200 200 200 200 200 200 200 200]" {
			r.Errorf("upstream gives it to everybody: %s", got)
		}
		if n := r.quay.Count(registrytest.Match{Kind: registrytest.KindBlob, Method: http.MethodGet}); n > 0 {
			r.Errorf("%d downloads of what is stored", n)
		}
		r.down()
		if got := statuses(nobody); got != "[200 200 200 200 200 200 200 200 200 200]" {
			r.Errorf("confirmed, and upstream is out: %s", got)
		}
	})
}

// TestAccessBySharedStore: a host that has nothing on disk finds private content in the shared store, for those
// who may have it, and a host without an account for nobody.
func TestAccessBySharedStore(t *testing.T) {
	i := newIdents(t)
	h := newHosts(t)
	h.quay.Configure(registrytest.Config{Auth: registrytest.Auth{Scheme: "Basic", Users: map[string]string{"ci": registrytest.Canary}}})
	h.quay.Push("org/app", "latest", storedImage)
	a := h.host("completion: {images: all}" + withAccount)
	h.pulls(a, "latest", storedImage)
	h.published(a, "latest", storedImage.Digest())
	h.quay.Fault(everything, outages["dead"])
	paths := []string{app + latest, app + "/manifests/" + storedImage.Digest().String(), app + "/blobs/" + storedImage.Blobs[1].Digest.String()}
	statuses := func(r *rig, who whom) string {
		var all []int
		for _, path := range paths {
			all = append(all, r.by(who, http.MethodHead, path).StatusCode, r.by(who, http.MethodGet, path).StatusCode)
		}
		return fmt.Sprint(all)
	}
	policy := strings.Replace(guarded, "docker.io", "open.test", 1)
	b := h.host(i.in(policy + policies[0].access))
	b.beyond()
	for _, want := range []struct {
		who      whom
		statuses string
	}{
		{whom{"nobody", far, nil}, "[401 401 401 401 401 401]"},
		{whom{"wrong", far, []string{basic("ci", wrongPassword)}}, "[401 401 401 401 401 401]"},
		{whom{"other", far, []string{basic("other", registrytest.Canary)}}, "[403 403 403 403 404 404]"},
		{whom{"ci", far, []string{basic("ci", registrytest.Canary)}}, "[200 200 200 200 200 200]"},
		{whom{"other", far, []string{basic("other", registrytest.Canary)}}, "[403 403 403 403 404 404]"},
		{whom{"nobody", far, nil}, "[401 401 401 401 401 401]"},
	} {
		if got := statuses(b, want.who); got != want.statuses {
			t.Errorf("%s: %s, want %s", want.who.name, got, want.statuses)
		}
	}
	without := strings.Replace(policy, ", credentials: {username: ci, password_file: PASSWORD}", "", 1)
	c := h.host(i.in(without + "access: {anonymous: true}"))
	c.beyond()
	for _, who := range []whom{{"nobody", far, nil}, {"loopback", near, nil}} {
		if got := statuses(c, who); got != "[503 503 503 503 503 503]" {
			t.Errorf("a host without an account, %s: %s", who.name, got)
		}
	}
}

// TestAccessOfWhatTheFleetTells: what another host of the fleet, or this one at another time, was told with an
// account does not stand for what upstream says to callers whom nobody knows.
func TestAccessOfWhatTheFleetTells(t *testing.T) {
	i := newIdents(t)
	without := strings.Replace(guarded, ", credentials: {username: ci, password_file: PASSWORD}", "", 1) + "access: {anonymous: true}\n"
	with := guarded + "access: {htpasswd: $HTPASSWD, plain_http: true, loopback: open}\n"
	nobody := whom{"nobody", far, nil}
	for _, fresh := range []string{"tags: {fresh_for: 0s}\n", "tags: {fresh_for: 1h}\n"} {
		h := newHosts(t)
		h.quay.Configure(registrytest.Config{Auth: registrytest.Auth{Scheme: "Basic", Users: map[string]string{"ci": registrytest.Canary}}})
		h.quay.Push("org/app", "latest", storedImage)
		a := h.host(i.in(with + fresh))
		h.pulls(a, "latest", storedImage)
		h.published(a, "latest", storedImage.Digest())
		if err := a.mirror.Use(a.config(i.in(without + fresh))); err != nil {
			t.Fatal(err)
		}
		a.beyond()
		for _, path := range []string{app + latest, app + "/manifests/" + storedImage.Digest().String()} {
			for _, method := range []string{http.MethodGet, http.MethodHead} {
				if got := a.by(nobody, method, path); got.StatusCode != http.StatusForbidden {
					t.Errorf("%s%s %s: %d %s", fresh, method, path, got.StatusCode, got.Header.Get("Cache-Status"))
				}
			}
		}
		h.quay.Configure(registrytest.Config{}) // now it is for everybody
		h.quay.Forget()
		got := a.by(nobody, http.MethodGet, app+latest).want(a, http.StatusOK)
		if cache := got.Header.Get("Cache-Status"); cache != cacheConfirmed || h.quay.Count(registrytest.Match{Method: http.MethodHead, Path: "/manifests/latest"}) != 1 {
			t.Errorf("%s%q, and upstream was asked: %v", fresh, cache, h.quay.Requests(everything))
		}
	}
}

// TestAccessIsReloaded: a policy that has changed holds from the next request on, and one whose file is broken
// changes nothing.
func TestAccessIsReloaded(t *testing.T) {
	i := newIdents(t)
	bubble(t, i.in(guarded+"access: {htpasswd: $HTPASSWD, plain_http: true}"), func(r *rig) {
		r.beyond()
		ci, nobody := whom{"ci", far, []string{basic("ci", registrytest.Canary)}}, whom{"nobody", far, nil}
		r.by(ci, http.MethodGet, "/v2/").want(r, 200)
		r.by(nobody, http.MethodGet, "/v2/").want(r, 401)
		broken := r.config(i.in(guarded + "access: {htpasswd: $CERT, plain_http: true}"))
		if err := r.mirror.Use(broken); err == nil || !strings.Contains(err.Error(), "access.htpasswd: "+filepath.Join(i.dir, "CERT")+":1: not a name") {
			r.Error(err)
		}
		r.by(ci, http.MethodGet, "/v2/").want(r, 200)
		if err := r.mirror.Use(r.config(i.in(guarded + `access: {htpasswd: $HTPASSWD, plain_http: true, rules: [{repositories: [quay.test/*], allow: [other]}]}`))); err != nil {
			r.Fatal(err)
		}
		r.by(ci, http.MethodGet, app+latest).want(r, 403)
		if err := r.mirror.Use(r.config(i.in(guarded + "public: [quay.test/org/*]\naccess: {anonymous: true}"))); err != nil {
			r.Fatal(err)
		}
		r.by(nobody, http.MethodGet, "/v2/").want(r, 200)
		synctest.Wait()
	})
}

// TestAccessIsCounted holds what is told of refusals.
func TestAccessIsCounted(t *testing.T) {
	i := newIdents(t)
	bubble(t, i.in(guarded+policies[0].access), func(r *rig) {
		r.beyond()
		for n, who := range passworded(t, i) {
			for range n + 1 {
				r.by(who, http.MethodGet, app+latest)
			}
		}
		for reason, want := range map[string]string{"unknown": "3", "wrong": "3", "denied": "4"} {
			if got := r.metric(`breakwater_access_refusals_total{reason="` + reason + `"}`); got != want {
				r.Errorf("%s: %s, want %s", reason, got, want)
			}
		}
		var body struct{ Errors []struct{ Code string } }
		if got := r.by(whom{"", far, nil}, http.MethodGet, app+latest); json.Unmarshal(got.body, &body) != nil || body.Errors[0].Code != "UNAUTHORIZED" {
			r.Errorf("%s", got.body)
		}
	})
}
