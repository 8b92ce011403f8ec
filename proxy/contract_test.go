package proxy

import (
	"fmt"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"breakwater/pkg/registrytest"
)

// The images of these tests: one that the mirror has, one that it has never seen, one that is newer.
var (
	storedImage = registrytest.NewImage(registrytest.Layer(1, 100<<10))
	unseenImage = registrytest.NewImage(registrytest.Layer(2, 100<<10))
	newerImage  = registrytest.NewImage(registrytest.Layer(3, 100<<10))
)

const unknown = "sha256:0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef"

// row is one row of the contract (DESIGN 2). Given that, somebody asks.
type row struct {
	name  string
	tags  string // configuration
	given func(*rig)
	path  string // behind app

	status int
	code   string
	body   []byte // of 200
	cache  string // Cache-Status begins with it
	stale  bool
	asked  int           // requests upstream
	took   time.Duration // until the header, at most
}

// check runs a row with GET and as HEAD.
func (tt row) check(t *testing.T) {
	for _, method := range []string{http.MethodGet, http.MethodHead} {
		t.Run(tt.name+" "+method, func(t *testing.T) {
			t.Parallel()
			bubble(t, withTags(tt.tags), func(r *rig) { tt.ask(r, method) })
		})
	}
}

func (tt row) ask(r *rig, method string) {
	r.quay.Push("org/app", "latest", storedImage)
	r.quay.Push("org/app", "unseen", unseenImage)
	if tt.given != nil {
		tt.given(r)
	}
	r.quay.Forget()
	path := tt.path
	if !strings.HasPrefix(path, "/v2/") {
		path = app + path
	}
	got := r.do(method, path).want(r, tt.status)
	if asked := r.asked(); asked != tt.asked && tt.asked >= 0 {
		r.Errorf("%d requests upstream, want %d: %v", asked, tt.asked, r.quay.Requests(registrytest.Match{}))
	}
	if got.took > tt.took {
		r.Errorf("answered after %v, want %v", got.took, tt.took)
	}
	if cache := got.Header.Get("Cache-Status"); !strings.HasPrefix(cache, tt.cache) || cache == "" {
		r.Errorf("Cache-Status %q, want %q", cache, tt.cache)
	}
	if got.Header.Get("Www-Authenticate") != "" {
		r.Error("a challenge: Docker would offer the user's password")
	}
	if tt.stale {
		got.stale(r, strconv.Itoa(int((age + got.took).Seconds())))
	} else {
		got.fresh(r)
	}
	if method == http.MethodHead && len(got.body) != 0 {
		r.Errorf("a body in answer to HEAD: %q", got.body)
	}
	switch {
	case tt.status == http.StatusOK:
		if method == http.MethodGet {
			got.is(r, tt.body)
		}
		if got.ContentLength != int64(len(tt.body)) || got.Header.Get("Docker-Content-Digest") == "" || got.Header.Get("Content-Type") == "" {
			r.Errorf("Content-Length %d, want %d; %v", got.ContentLength, len(tt.body), got.Header)
		}
	case method == http.MethodGet && got.code() != tt.code:
		r.Errorf("code %q, want %s: %s", got.code(), tt.code, got.body)
	}
	if tt.status == http.StatusServiceUnavailable {
		if n, err := strconv.Atoi(got.Header.Get("Retry-After")); err != nil || n < 1 || n > 3600 {
			r.Errorf("Retry-After %q", got.Header.Get("Retry-After"))
		}
		if method == http.MethodGet && !strings.Contains(string(got.body), "quay.test") {
			r.Errorf("does not name the upstream: %s", got.body)
		}
	}
}

// age is how long ago what is stored was pulled.
const age = 10 * time.Minute

// stored returns a given: storedImage was pulled as latest some time ago, and now this happens.
func stored(then func(*rig)) func(*rig) {
	return func(r *rig) {
		r.pull("latest", storedImage)
		time.Sleep(age)
		if then != nil {
			then(r)
		}
	}
}

// suffers returns a given: those requests upstream meet these faults.
func suffers(m registrytest.Match, faults ...registrytest.Fault) func(*rig) {
	return func(r *rig) { r.quay.Fault(m, faults...) }
}

func linked(link registrytest.Link) func(*rig) {
	return func(r *rig) { r.network.SetLink("quay.test:80", link) }
}

func moved(also ...func(*rig)) func(*rig) {
	return func(r *rig) {
		r.quay.Push("org/app", "latest", newerImage)
		for _, f := range also {
			f(r)
		}
	}
}

var (
	all       = registrytest.Match{}
	heads     = registrytest.Match{Method: http.MethodHead}
	gets      = registrytest.Match{Method: http.MethodGet}
	manifests = registrytest.Match{Kind: registrytest.KindManifest}
	blobs     = registrytest.Match{Kind: registrytest.KindBlob}

	hangs   = suffers(all, registrytest.Hang())
	refuses = linked(registrytest.Link{Refuse: true})
	// tokenRefused is a registry that takes no token that its service gives out.
	tokenRefused = suffers(manifests, registrytest.Status(401, "Www-Authenticate", `Bearer realm="http://quay.test/token",service="x"`))
)

func TestStoredDigestAsksNobody(t *testing.T) {
	layer := storedImage.Blobs[1]
	for _, state := range []row{{name: "hangs", given: hangs}, {name: "refuses", given: refuses}, {name: "503", given: suffers(all, registrytest.Status(503))},
		{name: "lies", given: suffers(all, registrytest.Portal())}, {name: "gone", given: func(r *rig) { r.quay.Delete("org/app", storedImage.Digest().String()) }}} {
		for name, content := range map[string]row{
			"manifest": {path: "/manifests/" + storedImage.Digest().String(), body: storedImage.Raw},
			"blob":     {path: "/blobs/" + layer.Digest.String(), body: layer.Bytes},
		} {
			content.name, content.given = name+", upstream "+state.name, stored(state.given)
			content.status, content.cache = 200, "breakwater; hit"
			content.check(t)
		}
	}
}

func TestStoredTag(t *testing.T) {
	const latest = "/manifests/latest"
	s := time.Second
	old, newer := storedImage.Raw, newerImage.Raw
	confirmed, stale := "breakwater; fwd=stale; fwd-status=200; detail=confirmed", "breakwater; fwd=stale; detail="
	for _, tt := range []row{
		{name: "within fresh_for", tags: "fresh_for: 11m", given: moved(hangs), status: 200, body: old, cache: "breakwater; hit"},
		{name: "fresh_for over", tags: "fresh_for: 9m", status: 200, body: old, cache: confirmed, asked: 1},
		{name: "unchanged", status: 200, body: old, cache: confirmed, asked: 1},
		{name: "moved", given: moved(), status: 200, body: newer, cache: "breakwater; fwd=stale; fwd-status=200", asked: 2},
		{name: "HEAD unsupported", given: moved(suffers(heads, registrytest.Status(405))), status: 200, body: newer, asked: 2},
		{name: "HEAD without digest", given: moved(suffers(heads, registrytest.Header("Docker-Content-Digest", ""))), status: 200, body: newer, asked: 2},
		{name: "HEAD with a digest of nonsense", given: moved(suffers(heads, registrytest.Header("Docker-Content-Digest", "sha256:../../x"))), status: 200, body: newer, asked: 2},
		{name: "H26 GET with a digest of nonsense", given: moved(suffers(all, registrytest.Header("Docker-Content-Digest", "x"))), status: 200, body: newer, asked: 2},
		{name: "newer one answers 500", given: moved(suffers(gets, registrytest.Status(500))), status: 200, body: old, cache: "breakwater; fwd=stale; fwd-status=500; detail=outage", stale: true, asked: 4, took: retryPause},
		{name: "newer one is not there", given: moved(suffers(gets, registrytest.Status(404))), status: 200, body: old, cache: "breakwater; fwd=stale; fwd-status=404", stale: true, asked: 2},
		{name: "newer one is denied", given: moved(suffers(gets, registrytest.Status(403))), status: 403, code: "DENIED", asked: 2},
		{name: "newer one never comes", given: moved(suffers(gets, registrytest.Hang())), status: 200, body: old, cache: stale + "timeout", stale: true, asked: 2, took: 1500 * time.Millisecond},
		{name: "hangs", given: hangs, status: 200, body: old, cache: stale + "timeout", stale: true, asked: 1, took: 1500 * time.Millisecond},
		{name: "hangs for long", tags: "revalidate_timeout: 3s", given: hangs, status: 200, body: old, cache: stale + "timeout", stale: true, asked: 1, took: 3 * s},
		{name: "hangs, no patience", tags: "revalidate_timeout: 0s", given: hangs, status: 200, body: old, cache: stale + "timeout", stale: true, asked: 1, took: time.Millisecond},
		{name: "black hole", given: linked(registrytest.Link{BlackHole: true}), status: 200, body: old, cache: stale + "timeout", stale: true, took: 1500 * time.Millisecond},
		{name: "F01 refuses", given: refuses, status: 200, body: old, cache: stale + "outage", stale: true},
		{name: "resets", given: linked(registrytest.Link{ResetAfter: 1}), status: 200, body: old, cache: stale + "outage", stale: true, asked: 1},
		{name: "500", given: suffers(all, registrytest.Status(500)), status: 200, body: old, cache: "breakwater; fwd=stale; fwd-status=500; detail=outage", stale: true, asked: 2, took: retryPause},
		{name: "429", given: suffers(all, registrytest.Status(429)), status: 200, body: old, cache: "breakwater; fwd=stale; fwd-status=429; detail=throttled", stale: true, asked: 1},
		{name: "max_stale not yet over", tags: "max_stale: 11m", given: refuses, status: 200, body: old, stale: true},
		{name: "max_stale over", tags: "max_stale: 9m", given: refuses, status: 503, code: "UNAVAILABLE"},
		{name: "max_stale over, hangs", tags: "max_stale: 9m", given: hangs, status: 503, code: "UNAVAILABLE", asked: 1, took: 10 * s},
		{name: "max_stale over, slow", tags: "max_stale: 9m", given: suffers(all, registrytest.Delay(4*s)), status: 200, body: old, cache: confirmed, asked: 1, took: 4 * s},
		{name: "max_stale 0", tags: "max_stale: 0s", given: suffers(all, registrytest.Status(503)), status: 503, code: "UNAVAILABLE", asked: 2, took: retryPause},
		{name: "F16 not found", given: suffers(all, registrytest.Status(404)), status: 404, code: "MANIFEST_UNKNOWN", asked: 1},
		{name: "F16 not found, on_not_found stale", tags: "on_not_found: stale", given: suffers(all, registrytest.Status(404)), status: 200, body: old, cache: "breakwater; fwd=stale; fwd-status=404; detail=not-found", stale: true, asked: 1},
		{name: "F16 not found, on_denied stale", tags: "on_denied: stale", given: suffers(all, registrytest.Status(404)), status: 404, code: "MANIFEST_UNKNOWN", asked: 1},
		{name: "F13 token refused", given: tokenRefused, status: 403, code: "DENIED", asked: 3},
		{name: "F13 token refused, on_denied stale", tags: "on_denied: stale", given: tokenRefused, status: 200, body: old, cache: "breakwater; fwd=stale; fwd-status=401; detail=denied", stale: true, asked: 3},
		{name: "F14 denied", given: suffers(all, registrytest.Status(403)), status: 403, code: "DENIED", asked: 1},
		{name: "F14 denied, on_denied stale", tags: "on_denied: stale", given: suffers(all, registrytest.Status(403)), status: 200, body: old, cache: "breakwater; fwd=stale; fwd-status=403; detail=denied", stale: true, asked: 1},
		{name: "F14 denied, on_not_found stale", tags: "on_not_found: stale", given: suffers(all, registrytest.Status(403)), status: 403, code: "DENIED", asked: 1},
	} {
		tt.path, tt.given = latest, stored(tt.given)
		tt.check(t)
	}
}

func TestNotStored(t *testing.T) {
	s := time.Second
	wanted := map[string]row{
		"tag":       {path: "/manifests/unseen", body: unseenImage.Raw},
		"manifest":  {path: "/manifests/" + unseenImage.Digest().String(), body: unseenImage.Raw},
		"blob":      {path: "/blobs/" + unseenImage.Blobs[1].Digest.String(), body: unseenImage.Blobs[1].Bytes},
		"bare tag":  {path: "/v2/org/app/manifests/unseen", body: unseenImage.Raw},
		"bare blob": {path: "/v2/org/app/blobs/" + unseenImage.Blobs[1].Digest.String(), body: unseenImage.Blobs[1].Bytes},
	}
	for _, state := range []struct {
		name           string
		given          func(*rig)
		manifest, blob int // status
		asked          int // -1: that is not the point
		took           time.Duration
	}{
		{name: "is up", manifest: 200, blob: 200, asked: -1},
		{name: "F02 refuses", given: refuses, manifest: 503, blob: 503},
		{name: "F03 black hole", given: linked(registrytest.Link{BlackHole: true}), manifest: 503, blob: 503, took: 10 * s},
		{name: "F07 hangs", given: hangs, manifest: 503, blob: 503, asked: 1, took: 5 * s},
		{name: "drips its header", given: linked(registrytest.Link{StallAfter: 20}), manifest: 503, blob: 503, asked: 1, took: 10 * s},
		{name: "F24 portal", given: suffers(all, registrytest.Portal()), manifest: 503, blob: 503, asked: -1},
		{name: "500", given: suffers(all, registrytest.Status(500)), manifest: 503, blob: 503, asked: -1, took: retryPause},
		{name: "429", given: suffers(all, registrytest.Status(429)), manifest: 503, blob: 503, asked: 1},
		{name: "418", given: suffers(all, registrytest.Status(418)), manifest: 503, blob: 503, asked: -1},
		{name: "304", given: suffers(all, registrytest.Status(304)), manifest: 503, blob: 503, asked: -1},
		{name: "loops", given: suffers(all, registrytest.Status(302, "Location", "/v2/org/app/manifests/unseen")), manifest: 503, blob: 503, asked: -1},
		{name: "F13 token refused", given: suffers(all, registrytest.Status(401)), manifest: 403, blob: 404, asked: -1},
		{name: "F14 denied", given: suffers(all, registrytest.Status(403)), manifest: 403, blob: 404, asked: -1},
		{name: "not found", given: suffers(all, registrytest.Status(404)), manifest: 404, blob: 404, asked: 1},
	} {
		for kind, tt := range wanted {
			tt.name, tt.given, tt.took, tt.asked = kind+", upstream "+state.name, state.given, state.took, state.asked
			tt.status, tt.cache = state.manifest, "breakwater"
			unknown := "MANIFEST_UNKNOWN"
			if strings.HasSuffix(kind, "blob") {
				tt.status, unknown = state.blob, "BLOB_UNKNOWN"
			}
			if kind == "bare blob" && tt.status == 503 {
				tt.status = 404
			}
			tt.code = map[int]string{403: "DENIED", 404: unknown, 503: "UNAVAILABLE"}[tt.status]
			if tt.status == 200 {
				tt.cache = "breakwater; fwd=uri-miss; fwd-status=200"
			}
			tt.check(t)
		}
	}
}

// A tag that is deleted and later unreachable: the record outlives the refusal.
func TestF16RecordOutlivesRefusal(t *testing.T) {
	for _, status := range []int{404, 403} {
		bubble(t, oneUpstream, func(r *rig) {
			r.quay.Push("org/app", "latest", storedImage)
			r.pull("latest", storedImage)
			time.Sleep(age)
			r.quay.Fault(all, registrytest.Status(status))
			r.get(app+"/manifests/latest").want(r, status)
			time.Sleep(age)
			r.network.SetLink("quay.test:80", registrytest.Link{Refuse: true})
			r.get(app+"/manifests/latest").want(r, 200).stale(r, "1200").is(r, storedImage.Raw)
			r.network.SetLink("quay.test:80", registrytest.Link{})
			r.quay.Heal()
			time.Sleep(time.Minute) // the reference is held off no longer
			r.get(app+"/manifests/latest").want(r, 200).fresh(r)
		})
	}
}

func TestPushThenPull(t *testing.T) {
	bubble(t, oneUpstream, func(r *rig) {
		layer := unseenImage.Blobs[1]
		r.get(app+"/manifests/unseen").want(r, 404)
		r.get(app+"/manifests/"+unseenImage.Digest().String()).want(r, 404)
		r.get(app+"/blobs/"+layer.Digest.String()).want(r, 404)
		r.quay.Push("org/app", "unseen", unseenImage)
		r.pull("unseen", unseenImage)
	})
}

func TestTagMovesBetweenHeadAndGet(t *testing.T) {
	bubble(t, oneUpstream, func(r *rig) {
		r.quay.Push("org/app", "latest", storedImage)
		r.quay.Fault(heads, func(w http.ResponseWriter, req *http.Request, next http.Handler) {
			next.ServeHTTP(w, req)
			r.quay.Push("org/app", "latest", newerImage)
		})
		r.pull("latest", storedImage) // never a mixture
		if n := r.quay.Count(registrytest.Match{Kind: registrytest.KindManifest, Method: http.MethodGet, Path: "latest"}); n != 0 {
			r.Errorf("%d GETs by tag: they count against rate limits and may name another image", n)
		}
		r.pull("latest", newerImage)
	})
}

func TestQuestionGoesOnForTheNext(t *testing.T) {
	bubble(t, withTags("fresh_for: 1m"), func(r *rig) {
		r.quay.Push("org/app", "latest", storedImage)
		r.pull("latest", storedImage)
		time.Sleep(age)
		r.quay.Push("org/app", "latest", newerImage)
		r.quay.Fault(all, registrytest.Delay(4*time.Second))
		r.get(app+"/manifests/latest").want(r, 200).stale(r, "601").is(r, storedImage.Raw)
		time.Sleep(8 * time.Second)
		r.quay.Forget()
		got := r.get(app+"/manifests/latest").want(r, 200).fresh(r).is(r, newerImage.Raw)
		if got.took > 0 || r.asked() > 0 {
			r.Errorf("took %v and %d requests, though it was asked for before", got.took, r.asked())
		}
	})
}

// Each phase makes progress, but all together they take too long for a stored tag.
func TestPatienceInAll(t *testing.T) {
	for _, tt := range []struct {
		phase, took time.Duration
		stale       bool
	}{
		{900 * time.Millisecond, 3600 * time.Millisecond, false},
		{1400 * time.Millisecond, 4 * time.Second, true},
	} {
		bubble(t, strings.ReplaceAll(oneUpstream, "http://quay.test:80", "https://quay.test"), func(r *rig) {
			r.quay.Serve(r, r.network, "quay.test:443")
			r.quay.Push("org/app", "latest", storedImage)
			r.pull("latest", storedImage)
			time.Sleep(age)
			r.network.SetHost("quay.test", registrytest.Host{Delay: tt.phase})
			r.network.SetLink("quay.test:443", registrytest.Link{Latency: tt.phase})
			got := r.get(app+"/manifests/latest").want(r, 200)
			if got.took != tt.took || (got.Header.Get("Warning") != "") != tt.stale {
				r.Errorf("phases of %v: answered after %v, want %v; Warning %q", tt.phase, got.took, tt.took, got.Header.Get("Warning"))
			}
		})
	}
}

func TestOneQuestionForAll(t *testing.T) {
	bubble(t, oneUpstream, func(r *rig) {
		r.quay.Push("org/app", "latest", storedImage)
		r.quay.Fault(all, registrytest.Delay(time.Second))
		for _, want := range []int{2, 1} { // HEAD and GET; then HEAD
			r.quay.Forget()
			var clients sync.WaitGroup
			for i := range 50 {
				clients.Go(func() {
					time.Sleep(time.Duration(i) * 10 * time.Millisecond)
					r.get(app+"/manifests/latest").want(r, 200).fresh(r).is(r, storedImage.Raw)
				})
			}
			clients.Wait()
			if r.asked() != want {
				r.Errorf("%d requests upstream for 50 clients, want %d", r.asked(), want)
			}
			time.Sleep(age)
		}
	})
}

func TestBreakerOpensAndProbesClose(t *testing.T) {
	bubble(t, oneUpstream, func(r *rig) {
		r.quay.Push("org/app", "latest", storedImage)
		r.pull("latest", storedImage)
		time.Sleep(age)
		r.quay.Fault(all, registrytest.Status(503))
		for i := range 3 {
			r.get(fmt.Sprint(app, "/manifests/", i)).want(r, 503)
		}
		r.quay.Forget()
		began := time.Now()
		got := r.get(app+"/manifests/latest").want(r, 200).stale(r, "600")
		if cache := got.Header.Get("Cache-Status"); cache != "breakwater; hit; ttl=-600; detail=outage" {
			r.Errorf("Cache-Status %q", cache)
		}
		got = r.get(app+"/manifests/never").want(r, 503)
		if !strings.Contains(string(got.body), "since "+began.UTC().Format(time.RFC3339)) || !strings.Contains(string(got.body), `"state":"open"`) {
			r.Errorf("says neither since when nor in what state: %s", got.body)
		}
		if r.asked() > 0 || time.Since(began) > 0 {
			r.Errorf("%d requests, %v, with the breaker open", r.asked(), time.Since(began))
		}
		time.Sleep(30 * time.Second)
		r.quay.Heal()
		r.quay.Forget()
		time.Sleep(77 * time.Second) // nobody asks
		synctest.Wait()
		if state := r.state("manifest"); state != "closed" {
			r.Errorf("%s 77 s after the recovery", state)
		}
		if n := r.asked(); n != 1 {
			r.Errorf("%d requests to find that out, want 1", n)
		}
		r.get(app+"/manifests/latest").want(r, 200).fresh(r)
	})
}

func TestBaseNeedsNoUpstream(t *testing.T) {
	bubble(t, oneUpstream, func(r *rig) {
		r.network.SetLink("quay.test:80", registrytest.Link{BlackHole: true})
		for _, method := range []string{http.MethodGet, http.MethodHead} {
			for _, path := range []string{"/v2/", "/v2", "/v2/?ns=quay.test"} {
				got := r.do(method, path).want(r, 200)
				if got.took > 0 || got.Header.Get("Docker-Distribution-Api-Version") != "registry/2.0" {
					r.Errorf("%s %s: %v, %v", method, path, got.took, got.Header)
				}
			}
		}
		if n := len(r.network.Dials("quay.test:80")); n > 0 {
			r.Errorf("%d dials", n)
		}
	})
}
