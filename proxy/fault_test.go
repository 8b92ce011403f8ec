package proxy

import (
	"fmt"
	"net/http"
	"net/http/httptest"
	"strconv"
	"strings"
	"testing"
	"time"

	"breakwater/pkg/registrytest"
)

// serve asks the mirror without a connection in between, for tests of many requests.
func (r *rig) serve(path string) *http.Response {
	w := httptest.NewRecorder()
	r.mirror.ServeHTTP(w, byLoopback(httptest.NewRequest(http.MethodGet, path, nil)))
	r.tells(path, w.Result().Header, w.Body.Bytes())
	return w.Result()
}

func TestF02NeverSeen(t *testing.T) {
	bubble(t, oneUpstream, func(r *rig) {
		r.network.SetLink("quay.test:80", registrytest.Link{Refuse: true})
		began := time.Now()
		for i := range 10 {
			for _, path := range []string{fmt.Sprint("/manifests/v", i), "/manifests/" + unknown, "/blobs/" + unknown, "/tags/list"} {
				got := r.get(app+path).want(r, 503)
				for _, part := range []string{`"upstream":"quay.test:80"`, `"reason":"dial failed: connection refused"`, `"since":"` + began.UTC().Format(time.RFC3339)} {
					if !strings.Contains(string(got.body), part) {
						r.Errorf("%s: no %s in %s", path, part, got.body)
					}
				}
				if got.Header.Get("Retry-After") == "" {
					r.Errorf("%s: no Retry-After", path)
				}
			}
		}
		if took := time.Since(began); took > 0 {
			r.Errorf("took %v", took)
		}
		if n := len(r.network.Dials("quay.test:80")); n > 5 {
			r.Errorf("%d dials in no time", n)
		}
	})
}

func TestF06SlowFirstByte(t *testing.T) {
	const slow = 4900 * time.Millisecond
	bubble(t, oneUpstream, func(r *rig) {
		r.quay.Push("org/app", "latest", storedImage)
		r.quay.Fault(all, registrytest.Delay(slow))
		for path, hops := range map[string]time.Duration{"/manifests/latest": 2, "/blobs/" + storedImage.Blobs[1].Digest.String(): 1, "/tags/list": 1} {
			if got := r.get(app+path).want(r, 200).fresh(r); got.took != hops*slow {
				r.Errorf("%s took %v, want %v", path, got.took, hops*slow)
			}
		}
		for _, h := range r.mirror.pool.All()[0].Health() {
			if h.State != "closed" || h.Failed+h.Excluded > 0 {
				r.Errorf("slow counts against the upstream: %+v", h)
			}
		}
		w := httptest.NewRecorder()
		r.mirror.Admin().ServeHTTP(w, httptest.NewRequest(http.MethodGet, "/metrics", nil))
		for class, n := range map[string]int{"manifest": 3, "blob": 1} { // HEAD, GET and a list; GET
			labels := fmt.Sprintf(`class=%q,registry="quay.test",upstream="quay.test:80"`, class)
			for _, want := range []string{
				fmt.Sprintf(`breakwater_upstream_first_byte_seconds_bucket{%s,le="4"} 0`, labels),
				fmt.Sprintf(`breakwater_upstream_first_byte_seconds_bucket{%s,le="5"} %d`, labels, n),
				fmt.Sprintf(`breakwater_upstream_first_byte_seconds_sum{%s} %v`, labels, (time.Duration(n) * slow).Seconds()),
			} {
				if !strings.Contains(w.Body.String(), want) {
					r.Errorf("no %s in\n%s", want, w.Body)
				}
			}
		}
	})
}

func TestF07FirstByteTooSlow(t *testing.T) {
	bubble(t, oneUpstream, func(r *rig) {
		r.quay.Push("org/app", "latest", storedImage)
		r.pull("latest", storedImage)
		time.Sleep(age)
		r.quay.Forget()
		r.quay.Fault(all, registrytest.Delay(30*time.Second))
		for _, path := range []string{"/manifests/other", "/manifests/" + unknown, "/blobs/" + unknown} {
			r.get(app+path).want(r, 503)
		}
		r.get(app+"/manifests/latest").want(r, 200).stale(r, "616")
		time.Sleep(time.Minute)
		for _, request := range r.quay.Requests(all) {
			if took := request.End.Sub(request.Start); took != 5*time.Second {
				r.Errorf("%s %s was given %v, want 5 s", request.Method, request.URL, took)
			}
		}
	})
}

func TestF08ErrorOnEveryRequest(t *testing.T) {
	for status, references := range map[int]int{500: 1, 502: 10, 503: 1, 504: 10} {
		t.Run(fmt.Sprintf("%d for %d references", status, references), func(t *testing.T) {
			t.Parallel()
			bubble(t, oneUpstream, func(r *rig) {
				r.quay.Push("org/app", "latest", storedImage)
				r.pull("latest", storedImage)
				time.Sleep(age)
				r.quay.Forget()
				r.quay.Fault(all, registrytest.Status(status))
				began := time.Now()
				for i := 0; time.Since(began) < time.Minute; i++ {
					path, want := fmt.Sprint(app, "/manifests/v", i%references), 503
					if i%2 == 0 {
						path, want = app+"/manifests/latest", 200
					}
					asked := time.Now()
					if got := r.serve(path); got.StatusCode != want || time.Since(asked) > retryPause {
						r.Fatalf("%s: %d after %v, want %d at once", path, got.StatusCode, time.Since(asked), want)
					}
					time.Sleep(10 * time.Millisecond)
				}
				if n := r.asked(); n > 12 {
					r.Errorf("%d requests upstream in a minute, want at most 12", n)
				}
				if state := r.state("manifest"); state == "closed" {
					r.Error("breaker closed")
				}
			})
		})
	}
}

func TestF10Flapping(t *testing.T) {
	bubble(t, oneUpstream, func(r *rig) {
		r.quay.Push("org/app", "latest", storedImage)
		r.pull("latest", storedImage)
		opened, before := 0, "closed"
		for began := time.Now(); time.Since(began) < 30*time.Minute; {
			r.quay.Heal()
			if int(time.Since(began).Seconds())/10%2 == 1 {
				r.quay.Fault(all, registrytest.Status(503))
			}
			for range 10 {
				for _, tag := range []string{"latest", "a", "b"} {
					if got := r.serve(app + "/manifests/" + tag); tag == "latest" && got.StatusCode != 200 {
						r.Fatalf("%d for what is stored", got.StatusCode)
					}
				}
				state := r.state("manifest")
				if before == "closed" && state == "open" {
					opened++
				}
				before = state
				time.Sleep(time.Second)
			}
		}
		if opened < 2 || opened > 25 {
			r.Errorf("opened %d times, want at most 25", opened)
		}
	})
}

func TestF11Throttled(t *testing.T) {
	bubble(t, oneUpstream, func(r *rig) {
		r.quay.Push("org/app", "latest", storedImage)
		r.pull("latest", storedImage)
		time.Sleep(age)
		heal := r.quay.Fault(all, registrytest.Status(429, "Retry-After", "120"))
		r.get(app+"/manifests/latest").want(r, 200).stale(r, "600")
		heal()
		r.quay.Forget()
		for left := 120; left > 0; left -= 10 {
			got := r.get(app+"/manifests/latest").want(r, 200).stale(r, strconv.Itoa(720-left))
			if cache := got.Header.Get("Cache-Status"); !strings.HasPrefix(cache, "breakwater; hit; ttl=-") || !strings.HasSuffix(cache, "detail=throttled") {
				r.Errorf("Cache-Status %q", cache)
			}
			for _, path := range []string{"/manifests/other", "/manifests/" + unknown, "/blobs/" + unknown, "/tags/list"} {
				if got := r.get(app+path).want(r, 503); got.Header.Get("Retry-After") != strconv.Itoa(left) || got.took > 0 {
					r.Errorf("%s: Retry-After %q after %v, want %d", path, got.Header.Get("Retry-After"), got.took, left)
				}
			}
			time.Sleep(10 * time.Second)
		}
		if r.asked() > 0 {
			r.Errorf("%d requests in the time that was asked for", r.asked())
		}
		for _, class := range []string{"token", "manifest", "blob"} {
			if state := r.state(class); state != "closed" {
				r.Errorf("breaker of %s is %s", class, state)
			}
		}
		r.get(app+"/manifests/latest").want(r, 200).fresh(r)
		r.quay.Forget()
		r.quay.Fault(all, registrytest.Status(429, "Retry-After", "1"))
		for range 20 {
			r.get(app+"/manifests/latest").want(r, 200)
			time.Sleep(time.Second)
		}
		if n := r.asked(); n != 20 {
			r.Errorf("asked %d times, want 20: a throttled upstream is not out", n)
		}
	})
}

func TestF12RetryAfter(t *testing.T) {
	bubble(t, oneUpstream, func(r *rig) {
		for _, tt := range []struct {
			header   string
			min, max int // seconds
		}{
			{"", 24, 36}, {"soon", 24, 36}, {"-5", 24, 36}, {"999999999", 3600, 3600}, {"99999999999999999999", 3600, 3600}, {"0", 1, 1}, {"7", 7, 7},
			{"Sat, 01 Jan 1994 00:00:00 GMT", 1, 1}, {"Fri, 31 Dec 2100 23:59:59 GMT", 3600, 3600},
		} {
			heal := r.quay.Fault(all, registrytest.Status(429, "Retry-After", tt.header))
			for range 2 {
				got := r.get(app+"/manifests/other").want(r, 503)
				seconds, err := strconv.Atoi(got.Header.Get("Retry-After"))
				if err != nil || seconds < tt.min || seconds > tt.max {
					r.Errorf("%q is passed on as %q, want %d to %d", tt.header, got.Header.Get("Retry-After"), tt.min, tt.max)
				}
			}
			heal()
			time.Sleep(time.Duration(tt.max) * time.Second)
			r.get(app+"/manifests/other").want(r, 404)
		}
	})
}

// The registry is up, but its token service is not.
func TestF18TokenServiceOut(t *testing.T) {
	for name, link := range map[string]registrytest.Link{"refuses": {Refuse: true}, "black hole": {BlackHole: true}, "hangs": {Silent: true}, "503": {}} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			bubble(t, oneUpstream, func(r *rig) {
				r.quay.Configure(registrytest.Config{Auth: registrytest.Auth{Scheme: "Bearer", Realm: "http://auth.test/token"}})
				r.quay.Serve(r, r.network, "auth.test:80")
				r.quay.Push("org/app", "latest", storedImage)
				r.pull("latest", storedImage)
				time.Sleep(age)
				r.network.SetLink("auth.test:80", link)
				if name == "503" {
					r.quay.Fault(registrytest.Match{Kind: registrytest.KindToken}, registrytest.Status(503))
				}
				for range 5 {
					got := r.get(app+"/manifests/latest").want(r, 200).is(r, storedImage.Raw)
					if got.Header.Get("Warning") == "" || got.took > 1500*time.Millisecond {
						r.Errorf("stored tag: Warning %q after %v", got.Header.Get("Warning"), got.took)
					}
					r.get(blobPath(storedImage.Blobs[1])).want(r, 200).is(r, storedImage.Blobs[1].Bytes)
					for _, repo := range []string{"app", "one", "two"} {
						got := r.get("/v2/quay.test/org/"+repo+"/manifests/other").want(r, 503)
						if got.took > 10*time.Second || !strings.Contains(string(got.body), `"class":"token"`) {
							r.Errorf("miss: after %v, %s", got.took, got.body)
						}
						r.get("/v2/quay.test/org/"+repo+"/blobs/"+unknown).want(r, 503)
					}
				}
				if token, manifest, blob := r.state("token"), r.state("manifest"), r.state("blob"); token == "closed" || manifest != "closed" || blob != "closed" {
					r.Errorf("breakers: token %s, manifest %s, blob %s", token, manifest, blob)
				}
			})
		})
	}
}

// Quay's own shape: the registry is up, but the host that it redirects blobs to is not.
func TestF19CDNOut(t *testing.T) {
	for name, link := range map[string]registrytest.Link{"refuses": {Refuse: true}, "black hole": {BlackHole: true}, "hangs": {Silent: true}, "503": {}, "F72 stalls": {StallAfter: 2000}} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			bubble(t, oneUpstream, func(r *rig) {
				r.quay.Configure(registrytest.Config{CDN: "http://cdn.test"})
				r.quay.Serve(r, r.network, "cdn.test:80")
				r.network.SetLink("cdn.test:80", link)
				if name == "503" {
					r.quay.Fault(registrytest.Match{Kind: registrytest.KindCDN}, registrytest.Status(503))
				}
				for i := range 6 {
					image := registrytest.NewImage(registrytest.Layer(uint64(10+i), 200<<10))
					r.quay.Push("org/app", "latest", image)
					got := r.get(blobPath(image.Blobs[1]))
					if got.took > 10*time.Second || got.StatusCode != 503 && got.err == nil {
						r.Errorf("%d after %v", got.StatusCode, got.took)
					}
					if got.StatusCode == 503 && !strings.Contains(string(got.body), "cdn.test") {
						r.Errorf("does not name the host: %s", got.body)
					}
				}
				r.quay.Push("org/app", "latest", storedImage)
				r.get(app+"/manifests/latest").want(r, 200).fresh(r).is(r, storedImage.Raw)
				time.Sleep(time.Minute)
				if manifest, blob := r.state("manifest"), r.state("blob"); manifest != "closed" || blob == "closed" {
					r.Errorf("breakers: manifest %s, blob %s", manifest, blob)
				}
			})
		})
	}
}

func TestF23TruncatedManifest(t *testing.T) {
	another := func(w http.ResponseWriter, req *http.Request, next http.Handler) {
		again := req.Clone(req.Context())
		again.URL.Path = "/v2/org/app/manifests/" + unseenImage.Digest().String()
		next.ServeHTTP(w, again)
	}
	noHead := func(r *rig) { r.quay.Fault(heads, registrytest.Status(405)) }
	for _, tt := range []struct {
		name  string
		fault registrytest.Fault
		also  func(*rig)
	}{
		{"by digest, as if whole", registrytest.Resize(-10), nil},
		{"by digest, cut", registrytest.Truncate(100), nil},
		{"by digest, another one", another, nil},
		{"by tag, as if whole", registrytest.Resize(-10), noHead},
		{"by tag, cut", registrytest.Truncate(100), noHead},
		{"by tag, empty", registrytest.Resize(-1 << 20), noHead},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			bubble(t, oneUpstream, func(r *rig) {
				r.quay.Push("org/app", "latest", storedImage)
				r.quay.Push("org/app", "unseen", unseenImage)
				r.pull("latest", storedImage)
				before, err := r.store.Tag(r.repository("org/app"), "latest")
				if err != nil {
					r.Fatal(err)
				}
				time.Sleep(age)
				moved(suffers(gets, tt.fault))(r)
				if tt.also != nil {
					tt.also(r)
				}
				r.get(app+"/manifests/latest").want(r, 200).stale(r, "600").is(r, storedImage.Raw)
				r.get(app+"/manifests/"+newerImage.Digest().String()).want(r, 503)
				if after, err := r.store.Tag(r.repository("org/app"), "latest"); err != nil || after != before {
					r.Errorf("the record is %+v, was %+v: %v", after, before, err)
				}
				if r.holds(newerImage.Digest()) {
					r.Error("stored")
				}
				r.quay.Heal()
				time.Sleep(shunned + time.Second)
				r.get(app+"/manifests/latest").want(r, 200).fresh(r).is(r, newerImage.Raw)
			})
		})
	}
}

func TestF24CaptivePortal(t *testing.T) {
	bubble(t, oneUpstream, func(r *rig) {
		r.quay.Push("org/app", "latest", storedImage)
		r.pull("latest", storedImage)
		time.Sleep(age)
		r.quay.Fault(all, registrytest.Portal())
		r.get(app+"/manifests/latest").want(r, 200).stale(r, "600").is(r, storedImage.Raw)
		r.get(blobPath(storedImage.Blobs[1])).want(r, 200).is(r, storedImage.Blobs[1].Bytes)
		for _, method := range []string{http.MethodGet, http.MethodHead} {
			for _, path := range []string{"/manifests/other", "/manifests/" + unknown, "/blobs/" + unknown, "/tags/list", "/referrers/" + unknown} {
				if got := r.do(method, app+path).want(r, 503); strings.Contains(string(got.body), "accept our terms") {
					r.Errorf("%s: %s", path, got.body)
				}
			}
		}
		if state := r.state("manifest"); state == "closed" {
			r.Error("a portal counts as success")
		}
		r.quay.Heal()
		time.Sleep(77 * time.Second)
		r.get(app+"/manifests/latest").want(r, 200).fresh(r)
	})
}

// One broken image, asked for again and again, must not close the registry to others.
func TestF73OneBrokenTag(t *testing.T) {
	bubble(t, oneUpstream, func(r *rig) {
		r.quay.Push("org/app", "latest", storedImage)
		for i := range 100 {
			r.quay.Push("org/app", fmt.Sprint("v", i), storedImage.Annotated("n", strconv.Itoa(i)))
		}
		broken := registrytest.Match{Path: "/broken"}
		r.quay.Fault(broken, registrytest.Status(500))
		for i := range 1000 { // 100 a minute
			if got := r.serve(app + "/manifests/broken"); got.StatusCode != 503 {
				r.Fatalf("%d for the broken one", got.StatusCode)
			}
			if i >= 100 && i%10 == 0 { // after the first minute, a miss every 6 s
				if got := r.serve(fmt.Sprint(app, "/manifests/v", i/10)); got.StatusCode != 200 {
					r.Errorf("%d for v%d", got.StatusCode, i/10)
				}
			}
			time.Sleep(600 * time.Millisecond)
		}
		if n := r.quay.Count(broken); n > 2*20 { // each time twice
			r.Errorf("asked %d times for the broken one in 10 min", n)
		}
	})
}
