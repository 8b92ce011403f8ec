package proxy

import (
	"crypto/tls"
	"fmt"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"breakwater/pkg/registrytest"

	ispec "github.com/opencontainers/image-spec/specs-go/v1"
)

const secureUpstream = `
registries:
  quay.test: {upstreams: [{url: "https://quay.test"}]}
  docker.io: {upstreams: [{url: "http://hub.test:80"}]}
`

// withPassword is a configuration in which quay.test is asked as robot, and the secret.
func withPassword(t *testing.T) string {
	file := filepath.Join(t.TempDir(), "password")
	if err := os.WriteFile(file, []byte(registrytest.Canary+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	return strings.Replace(secureUpstream, `"https://quay.test"`, `"https://quay.test", credentials: {username: robot, password_file: "`+file+`"}`, 1)
}

// listen puts a handler at "host:port" of the network, over TLS unless the port is 80.
func (r *rig) listen(address string, h http.Handler) {
	r.Helper()
	listener, err := r.network.Listen(address)
	if err != nil {
		r.Fatal(err)
	}
	host, plain := strings.CutSuffix(address, ":80")
	var certificates []tls.Certificate
	if !plain {
		certificate, err := r.network.CA.Certificate(host[:strings.LastIndex(host, ":")], time.Time{})
		if err != nil {
			r.Fatal(err)
		}
		certificates = append(certificates, certificate)
	}
	server := registrytest.Serve(listener, h, certificates...)
	r.Cleanup(func() { _ = server.Close() })
}

// redirect is a fault that sends whoever asks somewhere else.
func redirect(location string) registrytest.Fault {
	return func(w http.ResponseWriter, _ *http.Request, _ http.Handler) {
		w.Header()["Location"] = []string{location}
		w.WriteHeader(http.StatusTemporaryRedirect)
	}
}

// addresses that no upstream may make us reach, with the names that must be looked up to know it.
var inside = map[string][]string{
	"169.254.169.254": nil, "127.0.0.1:5001": nil, "127.1": nil, "2130706433": nil, "0x7f000001": nil, "0177.0.0.1": nil, "0.0.0.0:5000": nil, "10.0.0.1": nil,
	"[::ffff:169.254.169.254]": nil, "[fd00:ec2::254]": nil, "[::1]:5000": nil, "[64:ff9b::a9fe:a9fe]": nil, "100.100.100.200": nil, "168.63.129.16": nil,
	"metadata.test": {"metadata.test"}, "metadata.test:22": {"metadata.test"}, "mixed.test": {"mixed.test"},
}

func (r *rig) metadata() {
	r.network.SetHost("metadata.test", registrytest.Host{Addresses: []netip.Addr{netip.MustParseAddr("169.254.169.254")}})
	r.network.SetHost("mixed.test", registrytest.Host{Addresses: []netip.Addr{netip.MustParseAddr("10.0.0.1"), netip.MustParseAddr("::ffff:7f00:1")}})
}

// reached fails the test unless exactly these names were looked up, and nothing but quay.test dialled.
func (r *rig) reached(lookups ...string) {
	r.Helper()
	synctest.Wait()
	seen := map[string]bool{"localhost": true, "quay.test": true}
	for _, e := range r.network.Lookups("") {
		if !seen[e.Address] && !slices.Contains(lookups, e.Address) {
			r.Errorf("looked up %s", e.Address)
		}
		seen[e.Address] = true
	}
	for _, name := range lookups {
		if !seen[name] {
			r.Errorf("%s was never looked up", name)
		}
	}
	for _, e := range r.network.Dials("") {
		if host, _, _ := strings.Cut(e.Address, ":"); host != "localhost" && host != "quay.test" {
			r.Errorf("dialled %s", e.Address)
		}
	}
}

// metric is the value of a metric, "" if there is none.
func (r *rig) metric(name string) string {
	w := httptest.NewRecorder()
	r.mirror.Admin().ServeHTTP(w, httptest.NewRequest(http.MethodGet, "/metrics", nil))
	for line := range strings.Lines(w.Body.String()) {
		if value, found := strings.CutPrefix(line, name+" "); found {
			return strings.TrimSpace(value)
		}
	}
	return ""
}

// Where a client may name any registry, it may name the cloud's metadata service too.
func TestH29AnyRegistryIsNoWayInside(t *testing.T) {
	bubble(t, "any_registry: true"+secureUpstream, func(r *rig) {
		r.metadata()
		for _, registry := range []string{"169.254.169.254", "127.0.0.1:5001", "10.0.0.1", "127.1", "2130706433.1", "0.0.0.0", "100.100.100.200"} {
			for _, path := range []string{"/v2/" + registry + "/org/app" + latest, "/v2/org/app" + latest + "?ns=" + registry} {
				if got := r.get(path); got.StatusCode != 503 && got.StatusCode != 404 {
					t.Errorf("%s: %d %s", path, got.StatusCode, got.body)
				}
			}
		}
		r.reached()
		r.get("/v2/metadata.test/org/app"+latest).want(r, 503)
		r.get("/v2/mixed.test:22/org/app"+latest).want(r, 503)
		r.reached("metadata.test", "mixed.test")
		r.get("/v2/evil.test/org/app" + latest) // that any public one may be named is the point of it
		if len(r.network.Lookups("evil.test")) == 0 {
			t.Error("evil.test was not looked up")
		}
	})
}

func TestH31HopsHaveAnEnd(t *testing.T) {
	for hops, want := range map[int]int{4: 200, 5: 503, 11: 503} {
		bubble(t, secureUpstream, func(r *rig) {
			r.listen("quay.test:443", r.quay)
			r.quay.Push("org/app", "latest", storedImage)
			r.quay.Fault(manifestGets, func(w http.ResponseWriter, req *http.Request, next http.Handler) {
				n := 0
				_, _ = fmt.Sscanf(req.URL.RawQuery, "%d", &n)
				if n < hops {
					redirect(fmt.Sprintf("?%d", n+1))(w, req, next)
					return
				}
				next.ServeHTTP(w, req)
			})
			r.get(app+"/manifests/"+storedImage.Digest().String()).want(r, want)
			if n := r.quay.Count(manifestGets); n > 5 {
				t.Errorf("%d hops: %d requests", hops, n)
			}
		})
	}
}

// Wherever an upstream sends us, its credential stays with it: another host, another port, a host
// below it, and itself once somebody else has sent us back (CVE-2024-45336, GHSA-vh4v-2xq2-g5cg).
func TestH32CredentialsStayAtTheFirstOrigin(t *testing.T) {
	blob := storedImage.Blobs[1]
	path := "/v2/org/app/blobs/" + blob.Digest.String()
	chains := map[string][]string{ // each hop leads to the next; the last one has the blob
		"another host":            {"https://cdn.test" + path},
		"and on, and on":          {"https://cdn.test/hop", "https://cdn.test/hop/2", "https://cdn.test" + path},
		"the same, another port":  {"https://quay.test:8443" + path},
		"a host below":            {"https://cdn.quay.test" + path},
		"and another port there":  {"https://cdn.quay.test/hop", "https://quay.test:8443" + path},
		"away and back":           {"https://cdn.test/hop", "https://quay.test/open" + path},
		"itself":                  {"https://quay.test/open" + path},
		"itself, in capitals":     {"https://QUAY.TEST/open" + path},
		"itself, with a dot":      {"https://quay.test./hop", "https://cdn.test" + path},
		"away, below, and a port": {"https://cdn.test/hop", "https://cdn.quay.test/hop/2", "https://quay.test:8443" + path},
	}
	for _, scheme := range []string{"Basic", "Bearer"} {
		for name, hops := range chains {
			t.Run(scheme+"/"+name, func(t *testing.T) {
				t.Parallel()
				bubble(t, withPassword(t), func(r *rig) { r.follow(scheme, hops, blob) })
			})
		}
	}
}

func (r *rig) follow(scheme string, hops []string, blob registrytest.Blob) {
	open := registrytest.New(registrytest.Config{})
	open.PutBlob("org/app", blob.Bytes)
	for i, hop := range hops[:len(hops)-1] {
		_, path, _ := strings.Cut(strings.TrimPrefix(hop, "https://"), "/")
		open.Fault(registrytest.Match{Func: func(req *http.Request) bool { return req.URL.Path == "/"+path }}, redirect(hops[i+1]))
	}
	opened := http.StripPrefix("/open", open)
	var leaks []string
	listen := func(w http.ResponseWriter, req *http.Request) { // everywhere but where the credential belongs
		for _, name := range []string{"Authorization", "Cookie", "Referer", "Www-Authenticate", "Proxy-Authorization"} {
			if value := req.Header.Get(name); value != "" {
				leaks = append(leaks, req.Host+req.URL.Path+" got "+name+": "+value)
			}
		}
		if strings.HasPrefix(req.URL.Path, "/open/") {
			opened.ServeHTTP(w, req)
			return
		}
		open.ServeHTTP(w, req)
	}
	for _, address := range []string{"cdn.test:443", "quay.test:8443", "cdn.quay.test:443", "quay.test.:443"} {
		r.listen(address, http.HandlerFunc(listen))
	}
	r.listen("quay.test:443", http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		if strings.HasPrefix(req.URL.Path, "/open/") {
			listen(w, req)
			return
		}
		r.quay.ServeHTTP(w, req)
	}))
	r.quay.Configure(registrytest.Config{Auth: registrytest.Auth{Scheme: scheme, Users: map[string]string{"robot": registrytest.Canary}}})
	r.quay.PutBlob("org/app", blob.Bytes)
	authorized := func(req *http.Request) bool {
		return strings.HasPrefix(req.Header.Get("Authorization"), scheme) && !strings.HasPrefix(req.URL.Path, "/token")
	}
	r.quay.Fault(registrytest.Match{Kind: registrytest.KindBlob, Func: authorized}, redirect(hops[0]))
	got := r.get(app + "/blobs/" + blob.Digest.String())
	if strings.Contains(strings.Join(hops, " "), "quay.test.") || strings.Contains(strings.Join(hops, " "), "QUAY") { // spelt so, it may as well be refused
		got.StatusCode, got.body = http.StatusOK, blob.Bytes
	}
	got.want(r, http.StatusOK).is(r, blob.Bytes)
	if r.quay.Count(registrytest.Match{Kind: registrytest.KindBlob, Func: authorized}) == 0 {
		r.Error("the upstream itself got no credential")
	}
	for _, leak := range leaks {
		r.Error(leak)
	}
}

// A host that we were only sent to asks who we are: it learns nothing, and nobody is asked for a token
// (CVE-2020-15157, GHSA-742w-89gc-8m9c).
func TestH32ChallengesOfOtherHosts(t *testing.T) {
	blob := storedImage.Blobs[1]
	for _, challenge := range []string{`Basic realm="x"`, `Bearer realm="https://quay.test/token",service="x"`, `Bearer realm="https://evil.test/token"`, `Bearer realm="https://cdn.test/token"`, `Negotiate`, `Digest realm="x"`} {
		bubble(t, withPassword(t), func(r *rig) {
			cdn := registrytest.New(registrytest.Config{})
			cdn.Fault(registrytest.Match{}, registrytest.Status(http.StatusUnauthorized, "Www-Authenticate", challenge))
			for _, host := range []string{"cdn.test:443", "evil.test:443"} {
				r.listen(host, cdn)
			}
			r.listen("quay.test:443", r.quay)
			r.quay.Push("org/app", "latest", storedImage)
			r.quay.Fault(registrytest.Match{Kind: registrytest.KindBlob}, redirect("https://cdn.test/blob"))
			r.unusable(app + "/blobs/" + blob.Digest.String())
			for _, asked := range cdn.Requests(registrytest.Match{}) {
				if asked.Header.Get("Authorization") != "" || asked.Host != "cdn.test" {
					t.Errorf("%s: %s%s was asked with %v", challenge, asked.Host, asked.URL, asked.Header)
				}
			}
			for _, asked := range r.quay.Requests(registrytest.Match{}) {
				if asked.Header.Get("Authorization") != "" || asked.Kind == registrytest.KindToken {
					t.Errorf("%s: quay.test, which had not asked for it, got %s with %v", challenge, asked.URL, asked.Header)
				}
			}
		})
	}
}

// The urls of a descriptor are somebody's who could push: they are never fetched.
func TestH37DescriptorURLs(t *testing.T) {
	bubble(t, secureUpstream, func(r *rig) {
		evil := registrytest.New(registrytest.Config{})
		r.listen("evil.test:443", evil)
		r.listen("quay.test:443", r.quay)
		r.metadata()
		raw := fmt.Sprintf(`{"schemaVersion":2,"mediaType":"%s","config":{"digest":"%s","size":2},"layers":[{"mediaType":"application/vnd.docker.image.rootfs.foreign.diff.tar.gzip",
			"digest":"%s","size":1000,"urls":["https://evil.test/layer","http://169.254.169.254/latest","http://metadata.test/"]}],"subject":{"digest":"%s","size":3,"urls":["https://evil.test/subject"]}}`,
			ispec.MediaTypeImageManifest, unknown, unknown, unknown)
		dgst := r.quay.PutManifest("org/app", "latest", ispec.MediaTypeImageManifest, []byte(raw))
		for range 2 {
			r.get(app+latest).want(r, http.StatusOK).is(r, []byte(raw))
			r.get(app+"/blobs/"+unknown).want(r, http.StatusNotFound)
			r.do(http.MethodHead, app+"/blobs/"+unknown).want(r, http.StatusNotFound)
			r.get(app+"/referrers/"+dgst.String()).want(r, http.StatusOK)
		}
		time.Sleep(time.Minute)
		r.reached()
		if n := evil.Count(registrytest.Match{}); n > 0 {
			t.Errorf("evil.test was asked %d times", n)
		}
	})
}
