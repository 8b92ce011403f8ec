package proxy

import (
	"fmt"
	"net/http"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"breakwater/pkg/registrytest"
)

// place is what a hostile upstream at https://quay.test names, and what may be looked up and dialled on
// the way to finding out that it is none of ours.
type place struct {
	url            string
	lookups, dials []string
	entrusted      bool // as a realm, with the credential: it is of the upstream's domain
}

func hostilePlaces() []place {
	places := []place{
		{"https://evil.test/x", []string{"evil.test"}, []string{"evil.test:443"}, false},
		{"//evil.test/x", []string{"evil.test"}, []string{"evil.test:443"}, false},
		{"https://evil.test/v2/org/app/manifests/latest?ns=evil.test", []string{"evil.test"}, []string{"evil.test:443"}, false},
		{"https://quay.test:8443/x", nil, []string{"quay.test:8443"}, false},
		{"https://cdn.quay.test/x", []string{"cdn.quay.test"}, []string{"cdn.quay.test:443"}, true},
		{"https://evil.test:0/", []string{"evil.test"}, []string{"evil.test:0"}, false},
		{"https://quay.test/v2/?again", nil, nil, true},
	}
	for host, lookups := range inside {
		places = append(places, place{url: "https://" + host + "/latest/meta-data/", lookups: lookups})
	}
	for _, url := range []string{
		"?again", "/elsewhere?again", "", "https://quay.test/token?x=1&service=evil&again",
		"http://evil.test/", "http://quay.test/v2/", "HTTP://evil.test/",
		"file:///etc/passwd", "gopher://evil.test/1x", "ftp://evil.test/x", "javascript:alert(1)", "data:text/plain,x", "unix:///var/run/docker.sock", "about:blank",
		"https://user:pw@evil.test/", "https://:@evil.test/", "https:evil.test", "https:///evil.test", "https://", "https://evil.test:https/", "https://evil.test:99999/",
		`/\evil.test/`, `\\evil.test\x`, `https:\\evil.test\x`, "https://quay.test\\@evil.test/", "https://evil.test%00.quay.test/", "https://evil.test\x01/", "https://[evil.test]/",
		"http://evil.test/" + strings.Repeat("x", 10<<10),
	} {
		places = append(places, place{url: url})
	}
	return places
}

// realm is a fault that asks for a token from somewhere else.
func realm(url string) registrytest.Fault {
	return registrytest.Status(http.StatusUnauthorized, "Www-Authenticate", `Bearer realm="`+strings.ReplaceAll(url, `\`, `\\`)+`",service="quay",scope="repository:org/app:pull"`)
}

// walk is a mirror whose upstream lets robot in and then names a place.
type walk struct {
	*rig
	place
	names registrytest.Fault // the place
	evil  *registrytest.Registry
	named atomic.Int32 // answers in which it did
}

// hostile makes such requests, if they bring the token that the password has got, be answered by the
// place, and so whoever follows it to quay.test itself.
func (w *walk) hostile(m registrytest.Match) {
	also := m.Func
	m.Func = func(req *http.Request) bool {
		return (req.Header.Get("Authorization") != "" || m.Kind == registrytest.KindToken) && (also == nil || also(req))
	}
	name := func(rw http.ResponseWriter, req *http.Request, next http.Handler) {
		w.named.Add(1)
		w.names(rw, req, next)
	}
	w.quay.Fault(m, name)
	w.quay.Fault(registrytest.Match{Func: strayed}, name)
}

// strayed is a request that was sent to quay.test by it.
func strayed(req *http.Request) bool {
	return strings.Contains(req.URL.RawQuery, "again") || strings.Contains(req.URL.Path, "evil.test")
}

// refused fails the test unless that is an answer of the contract for what cannot be had.
func (w *walk) refused(got answer) {
	w.Helper()
	code := map[int]string{503: "UNAVAILABLE", 403: "DENIED", 404: "BLOB_UNKNOWN"}[got.StatusCode]
	if code == "" || got.Request.Method == http.MethodGet && got.code() != code || got.took > headerBudget ||
		(got.StatusCode == 503) != (got.Header.Get("Retry-After") != "") || got.Header.Get("Www-Authenticate") != "" {
		w.Errorf("%s %s: %d after %v, %v: %s", got.Request.Method, got.Request.URL.Path, got.StatusCode, got.took, got.Header, got.body)
	}
}

// confined fails the test if the mirror has gone where it was sent, or told anybody there who it is.
func (w *walk) confined(what string) {
	w.Helper()
	synctest.Wait()
	if w.named.Load() == 0 {
		w.Errorf("%s: the place was never named", what)
	}
	for _, e := range w.network.Lookups("") {
		if e.Address != "localhost" && e.Address != "quay.test" && !slices.Contains(w.lookups, e.Address) {
			w.Errorf("%s: looked up %s", what, e.Address)
		}
	}
	for _, e := range w.network.Dials("") {
		if e.Address != "localhost:5000" && e.Address != "quay.test:443" && !slices.Contains(w.dials, e.Address) {
			w.Errorf("%s: dialled %s", what, e.Address)
		}
	}
	if w.entrusted {
		return
	}
	for _, asked := range append(w.evil.Requests(all), w.quay.Requests(registrytest.Match{Func: strayed})...) {
		for _, name := range []string{"Authorization", "Cookie", "Referer", "Proxy-Authorization"} {
			if value := asked.Header.Get(name); value != "" {
				w.Errorf("%s: %s%.100s got %s: %s", what, asked.Host, asked.URL, name, value)
			}
		}
	}
	for _, asked := range w.quay.Requests(registrytest.Match{Func: func(req *http.Request) bool { _, _, given := req.BasicAuth(); return given }}) {
		if asked.Kind != registrytest.KindToken {
			w.Errorf("%s: the password was sent to %.100s", what, asked.URL)
		}
	}
}

// kept is what the store holds, but for what is parked until its rest can be had.
func (w *walk) kept() []string {
	return slices.DeleteFunc(w.files(), func(name string) bool { return strings.HasPrefix(name, "tmp/parked-") })
}

var (
	partly  = func(req *http.Request) bool { return req.Header.Get("Range") != "" }
	wholly  = func(req *http.Request) bool { return req.Header.Get("Range") == "" }
	longRaw = registrytest.Layer(9, 10<<20)
)

// kinds is every kind of request that goes upstream, each answered by the place.
var kinds = []struct {
	name string
	make func(*walk)
}{
	{"manifest by tag", func(w *walk) { w.asks(registrytest.KindManifest, latest) }},
	{"manifest by digest", func(w *walk) { w.asks(registrytest.KindManifest, "/manifests/"+storedImage.Digest().String()) }},
	{"blob", func(w *walk) { w.asks(registrytest.KindBlob, "/blobs/"+storedImage.Blobs[1].Digest.String()) }},
	{"tags/list", func(w *walk) { w.asks(registrytest.KindTags, "/tags/list") }},
	{"referrers", func(w *walk) {
		w.hostile(manifests) // the tag scheme
		w.asks(registrytest.KindReferrers, "/referrers/"+storedImage.Digest().String())
	}},
	{"token", func(w *walk) {
		w.asks(registrytest.KindToken, latest)
		if n := w.evil.Count(all); n > 0 {
			w.Errorf("a token was looked for elsewhere, %d times", n)
		}
	}},
	{"rest of a body that was cut", func(w *walk) {
		blob := w.quay.PutBlob("org/app", longRaw[:300<<10])
		w.quay.Fault(registrytest.Match{Kind: registrytest.KindBlob, Func: wholly}, registrytest.Truncate(100<<10))
		w.hostile(registrytest.Match{Kind: registrytest.KindBlob, Func: partly})
		if got := w.get(app + "/blobs/" + blob.String()); got.StatusCode != 200 || got.err == nil || string(got.body) != string(longRaw[:len(got.body)]) {
			w.Errorf("%d, %d bytes, %v", got.StatusCode, len(got.body), got.err)
		}
	}},
	{"range far ahead", func(w *walk) {
		path := app + "/blobs/" + w.quay.PutBlob("org/app", longRaw).String()
		w.quay.Fault(registrytest.Match{Kind: registrytest.KindBlob, Func: wholly}, registrytest.Stall(64<<10))
		w.hostile(registrytest.Match{Kind: registrytest.KindBlob, Func: partly})
		done := make(chan struct{})
		go func() {
			defer close(done)
			w.get(path)
		}()
		synctest.Wait()
		w.refused(w.get(path, "Range: bytes=9437184-9437193"))
		<-done
	}},
	{"probes", func(w *walk) {
		w.pull("latest", storedImage)
		before := w.kept()
		remove := w.quay.Fault(all, registrytest.Status(503))
		for i := range 5 {
			w.get(fmt.Sprint(app, "/manifests/v", i))
			w.get(fmt.Sprintf("%s/blobs/sha256:%064d", app, i))
		}
		w.hostile(all)
		remove()
		time.Sleep(5 * time.Minute)
		for _, class := range []string{"manifest", "blob"} {
			if state := w.state(class); state == "closed" {
				w.Errorf("a probe has closed the breaker of %s", class)
			}
		}
		if after := w.kept(); !slices.Equal(before, after) {
			w.Errorf("the store held %v, and now %v", before, after)
		}
	}},
}

func (w *walk) asks(kind registrytest.Kind, path string) {
	w.hostile(registrytest.Match{Kind: kind})
	for _, method := range []string{http.MethodGet, http.MethodHead} {
		w.refused(w.do(method, app+path))
	}
}

// Wherever an upstream can name a host, whatever it names, and whatever it was asked for: the mirror goes
// nowhere that is not public, tells nobody who it is, and stores nothing.
func TestH29H31H32H34HostsThatUpstreamsName(t *testing.T) {
	for way, names := range map[string]func(string) registrytest.Fault{"redirect": redirect, "realm": realm} {
		for _, p := range hostilePlaces() {
			t.Run(fmt.Sprintf("%s/%.60s", way, p.url), func(t *testing.T) {
				t.Parallel()
				bubble(t, withPassword(t), func(r *rig) {
					p.entrusted = p.entrusted && way == "realm"
					w := &walk{rig: r, place: p, names: names(p.url)}
					w.arrive()
					for _, kind := range kinds {
						kind.make(w)
						w.confined(kind.name)
						if kept := w.kept(); len(kept) > 0 && kind.name != "probes" {
							w.Errorf("%s: the store holds %v", kind.name, kept)
						}
						w.quay.Heal()
						w.quay.Forget()
						w.evil.Forget()
						w.named.Store(0)
						time.Sleep(10 * time.Minute) // what is out by now is tried again
					}
					if p.dials == nil && p.lookups != nil && r.metric("breakwater_refused_addresses_total") == "0" {
						t.Error("breakwater_refused_addresses_total is 0")
					}
				})
			})
		}
	}
}

// A Link names a next page, not a place (GHSA-h7vf-4x9w-h99v), and pages have an end (GHSA-298f-872v-2rcx).
func TestH29H31H32PlacesInLinks(t *testing.T) {
	for _, p := range hostilePlaces() {
		t.Run(fmt.Sprintf("%.60s", p.url), func(t *testing.T) {
			t.Parallel()
			bubble(t, withPassword(t), func(r *rig) {
				query := "?last=a&n=1"
				if strings.Contains(p.url, "?") {
					query = "&last=a&n=1"
				}
				// Pages are asked for with the token, where the first one was: nobody else may be asked at all.
				w := &walk{rig: r, place: place{entrusted: true}, names: header("Link", "<"+strings.ReplaceAll(p.url, "\x01", "%01")+query+`>; rel="next"`)}
				w.arrive()
				w.hostile(registrytest.Match{Kind: registrytest.KindTags})
				got := w.get(app+"/tags/list?n=1").want(r, http.StatusOK)
				if next := got.Header.Get("Link"); next != "" && !strings.HasPrefix(next, "<"+app+"/tags/list?") {
					t.Errorf("the client is sent to %s", next)
				}
				w.confined("tags/list")
				w.named.Store(0)
				path := "/v2/org/app/referrers/" + storedImage.Digest().String()
				w.hostile(registrytest.Match{Kind: registrytest.KindReferrers})
				w.get(app+"/referrers/"+storedImage.Digest().String()).want(r, http.StatusOK)
				w.confined("referrers")
				if n := w.quay.Count(registrytest.Match{Kind: registrytest.KindReferrers}); n > maxPages+1 { // one was challenged
					t.Errorf("%d pages of referrers were asked for", n)
				}
				for _, asked := range w.quay.Requests(all) {
					if asked.Kind == registrytest.KindReferrers && asked.URL.Path != path || asked.Kind == registrytest.KindOther {
						t.Errorf("asked for %s", asked.URL)
					}
				}
			})
		})
	}
}

// arrive puts everybody at their addresses.
func (w *walk) arrive() {
	w.metadata()
	w.asRobot()
	w.evil = registrytest.New(registrytest.Config{})
	w.evil.Fault(all, registrytest.Portal())
	for _, address := range []string{"evil.test:80", "evil.test:443", "quay.test:8443", "cdn.quay.test:443"} {
		w.listen(address, w.evil)
	}
}
