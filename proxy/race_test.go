package proxy

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"breakwater/pkg/registrytest"
	"breakwater/proxy/upstream"
)

// upstreamHosts are the upstreams of quay.test in the order in which they are asked. The first is the
// rig's quay.
var upstreamHosts = []string{"quay.test:80", "two.test:80", "three.test:80", "four.test:80", "five.test:80", "six.test:80"}

// several runs f with a rig whose quay.test has n upstreams; tags are its settings for tags.
func several(t *testing.T, n int, tags string, f func(r *rig, ups []*registrytest.Registry)) {
	t.Helper()
	var urls []string
	for _, host := range upstreamHosts[:n] {
		urls = append(urls, fmt.Sprintf("{url: %q}", "http://"+host))
	}
	yaml := "default_registry: quay.test\ntags: {" + tags + "}\nregistries: {quay.test: {upstreams: [" + strings.Join(urls, ", ") + "]}}\n"
	bubble(t, yaml, func(r *rig) {
		ups := []*registrytest.Registry{r.quay}
		for _, host := range upstreamHosts[1:n] {
			up := registrytest.New(registrytest.Config{})
			up.Serve(r, r.network, host)
			ups = append(ups, up)
		}
		f(r, ups)
	})
}

// push gives an image to all of them.
func push(ups []*registrytest.Registry, tag string, image registrytest.Image) {
	for _, up := range ups {
		up.Push("org/app", tag, image)
	}
}

// health is how the upstream of that host does.
func (r *rig) health(host, class string) upstream.Health {
	r.Helper()
	for _, c := range r.mirror.pool.Clients("quay.test") {
		for _, h := range c.Health() {
			if c.Upstream() == host && h.Class == class {
				return h
			}
		}
	}
	r.Fatalf("no upstream %s", host)
	return upstream.Health{}
}

// began is how long after since each of them was first asked, -1 for never.
func began(ups []*registrytest.Registry, since time.Time) []time.Duration {
	var at []time.Duration
	for _, up := range ups {
		if requests := up.Requests(all); len(requests) > 0 {
			at = append(at, requests[0].Start.Sub(since))
		} else {
			at = append(at, -1)
		}
	}
	return at
}

// asks is each kind of request, for storedImage and with what it gets.
var asks = []struct {
	method, path string
	body         []byte
}{
	{"GET", "/manifests/latest", storedImage.Raw},
	{"HEAD", "/manifests/latest", nil},
	{"GET", "/manifests/" + storedImage.Digest().String(), storedImage.Raw},
	{"GET", "/blobs/" + storedImage.Blobs[1].Digest.String(), storedImage.Blobs[1].Bytes},
	{"HEAD", "/blobs/" + storedImage.Blobs[1].Digest.String(), nil},
	{"GET", "/tags/list", []byte(`{"name":"org/app","tags":["latest"]}`)},
}

// slowPhases is a host whose every phase takes a while, but never a second, until it says nothing more.
func (r *rig) slowPhases(host string) {
	name, _, _ := strings.Cut(host, ":")
	r.network.SetHost(name, registrytest.Host{Delay: 900 * time.Millisecond})
	r.network.SetLink(host, registrytest.Link{Silent: true, Latency: 900 * time.Millisecond})
}

// The fifth is reached on the first request, whatever that is.
func TestF74FourBlackHoles(t *testing.T) {
	link := func(l registrytest.Link) func(*rig, string) {
		return func(r *rig, host string) { r.network.SetLink(host, l) }
	}
	for name, tt := range map[string]struct {
		sick func(*rig, string)
		took time.Duration
	}{
		"black holes": {link(registrytest.Link{BlackHole: true}), 4 * time.Second},
		"silent":      {link(registrytest.Link{Silent: true}), 4 * time.Second},
		"slow phases": {(*rig).slowPhases, 8 * time.Second},
		"refuse":      {link(registrytest.Link{Refuse: true}), 0},
	} {
		for _, ask := range asks {
			t.Run(name+" "+ask.method+ask.path, func(t *testing.T) {
				t.Parallel()
				several(t, 5, "", func(r *rig, ups []*registrytest.Registry) {
					push(ups, "latest", storedImage)
					for _, host := range upstreamHosts[:4] {
						tt.sick(r, host)
					}
					got := r.do(ask.method, app+ask.path).want(r, 200).is(r, ask.body).fresh(r)
					if got.took != tt.took {
						r.Errorf("took %v, want %v", got.took, tt.took)
					}
				})
			})
		}
	}
}

// One answer within one budget, however many are out.
func TestF32AllOut(t *testing.T) {
	for name, link := range map[string]registrytest.Link{"black holes": {BlackHole: true}, "silent": {Silent: true}, "silent and far": {Silent: true, Latency: 950 * time.Millisecond}} {
		for _, ask := range asks {
			t.Run(name+" "+ask.method+ask.path, func(t *testing.T) {
				t.Parallel()
				several(t, 5, "", func(r *rig, ups []*registrytest.Registry) {
					push(ups, "latest", storedImage)
					for _, host := range upstreamHosts[:5] {
						r.network.SetLink(host, link)
					}
					got := r.do(ask.method, app+ask.path).want(r, 503)
					if got.took > headerBudget || got.Header.Get("Retry-After") == "" {
						r.Errorf("after %v, Retry-After %q", got.took, got.Header.Get("Retry-After"))
					}
					for _, host := range upstreamHosts[:5] {
						if n := len(r.network.Dials(host)); n != 1 {
							r.Errorf("%s was dialled %d times", host, n)
						}
					}
				})
			})
		}
	}
}

// When the others are asked while the first one is not done.
func TestF33NextStarts(t *testing.T) {
	delay := func(d time.Duration) func(*rig) { return suffers(all, registrytest.Delay(d)) }
	for _, tt := range []struct {
		name  string
		n     int
		first func(*rig)
		began []time.Duration // -1: not asked
	}{
		{"quick enough", 3, delay(900 * time.Millisecond), []time.Duration{0, -1, -1}},
		{"idle for a second", 3, delay(3 * time.Second), []time.Duration{0, time.Second, -1}},
		{"slow in phases", 2, func(r *rig) { r.slowPhases("quay.test:80") }, []time.Duration{-1, 2 * time.Second}},
		{"slow in phases, of many", 6, func(r *rig) { r.slowPhases("quay.test:80") }, []time.Duration{-1, 1600 * time.Millisecond, -1, -1, -1, -1}},
		{"fails", 3, delay(0), []time.Duration{0, 0, -1}},
		{"fails late", 3, delay(300 * time.Millisecond), []time.Duration{0, 300 * time.Millisecond, -1}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			several(t, tt.n, "", func(r *rig, ups []*registrytest.Registry) {
				push(ups, "latest", storedImage)
				if strings.HasPrefix(tt.name, "fails") {
					r.quay.Fault(all, registrytest.Status(503))
				}
				tt.first(r)
				started := time.Now()
				r.get(blobPath(storedImage.Blobs[1])).want(r, 200).is(r, storedImage.Blobs[1].Bytes)
				if got := began(ups, started); !slices.Equal(got, tt.began) {
					r.Errorf("asked after %v, want %v", got, tt.began)
				}
			})
		})
	}
}

// DESIGN 2, "Several answers": a good one wins; else an outage, else a refusal, else not found.
func TestSeveralAnswers(t *testing.T) {
	faults := map[string]registrytest.Fault{
		"503":    registrytest.Status(503),
		"429":    registrytest.Status(429),
		"403":    registrytest.Status(403),
		"404":    registrytest.Status(404),
		"hangs":  registrytest.Hang(),
		"portal": registrytest.Portal(),
	}
	for _, tt := range []struct {
		answers        []string
		manifest, blob int
	}{
		{[]string{"404", "good"}, 200, 200},
		{[]string{"403", "good"}, 200, 200},
		{[]string{"503", "good"}, 200, 200},
		{[]string{"429", "good"}, 200, 200},
		{[]string{"hangs", "good"}, 200, 200},
		{[]string{"portal", "good"}, 200, 200},
		{[]string{"503", "404", "403", "429", "good"}, 200, 200},
		{[]string{"404", "503"}, 503, 503},
		{[]string{"503", "404"}, 503, 503},
		{[]string{"404", "429"}, 503, 503},
		{[]string{"429", "403"}, 503, 503},
		{[]string{"403", "503"}, 503, 503},
		{[]string{"hangs", "404"}, 503, 503},
		{[]string{"404", "portal", "403"}, 503, 503},
		{[]string{"403", "404"}, 403, 404},
		{[]string{"404", "403"}, 403, 404},
		{[]string{"404", "404"}, 404, 404},
	} {
		t.Run(strings.Join(tt.answers, ", "), func(t *testing.T) {
			t.Parallel()
			for _, ask := range asks {
				several(t, len(tt.answers), "", func(r *rig, ups []*registrytest.Registry) {
					push(ups, "latest", storedImage)
					for i, answer := range tt.answers {
						if answer != "good" {
							ups[i].Fault(all, faults[answer])
						}
					}
					status := tt.manifest
					if strings.HasPrefix(ask.path, "/blobs/") {
						status = tt.blob
					}
					got := r.do(ask.method, app+ask.path).want(r, status)
					if status == 200 {
						got.is(r, ask.body)
					}
					if got.took > headerBudget {
						r.Errorf("took %v", got.took)
					}
				})
			}
		})
	}
}

// What the first has not, the second gives; and what either gets later is found at once.
func TestF17FoundOnSecond(t *testing.T) {
	for _, ask := range asks {
		t.Run(ask.method+ask.path, func(t *testing.T) {
			t.Parallel()
			for has := range 2 {
				several(t, 2, "", func(r *rig, ups []*registrytest.Registry) {
					r.do(ask.method, app+ask.path).want(r, 404)
					ups[has].Push("org/app", "latest", storedImage)
					for _, up := range ups {
						up.Forget()
					}
					r.do(ask.method, app+ask.path).want(r, 200).is(r, ask.body).fresh(r)
					if at := began(ups, time.Now()); !slices.Equal(at, []time.Duration{0, time.Duration(has) - 1}) {
						r.Errorf("asked after %v", at)
					}
				})
			}
		})
	}
}

// Who has answered 404 for a digest is asked for it after the others, for a while; not so for a tag, where
// the order says whose word counts.
func TestF17RememberedAbsence(t *testing.T) {
	for _, tt := range []struct {
		path  string
		later time.Duration
		asked []int // of each upstream
	}{
		{asks[0].path, time.Minute, []int{2, 0}}, // HEAD, GET
		{asks[2].path, time.Minute, []int{0, 1}},
		{asks[3].path, time.Minute, []int{0, 1}},
		{asks[2].path, time.Hour, []int{1, 0}},
		{asks[3].path, time.Hour, []int{1, 0}},
	} {
		several(t, 2, "", func(r *rig, ups []*registrytest.Registry) {
			ups[1].Fault(all, registrytest.Status(503))
			r.get(app+tt.path).want(r, 503) // nobody knows if it is there
			push(ups, "latest", storedImage)
			ups[1].Heal()
			for _, up := range ups {
				up.Forget()
			}
			time.Sleep(tt.later)
			r.get(app+tt.path).want(r, 200)
			if asked := []int{ups[0].Count(all), ups[1].Count(all)}; !slices.Equal(asked, tt.asked) {
				r.Errorf("%s after %v: asked %v times, want %v", tt.path, tt.later, asked, tt.asked)
			}
		})
	}
}

// What a lagging copy says of a tag while those before it are out (DESIGN 8).
func TestTagAtLaterUpstream(t *testing.T) {
	type state struct {
		first  func(*rig)
		second registrytest.Image
	}
	gone := func(r *rig) { r.quay.Delete("org/app", "latest") }
	for _, tt := range []struct {
		name  string
		tags  string
		state state
		want  registrytest.Image
		stale bool
	}{
		{"same digest confirms", "", state{suffers(all, registrytest.Status(503)), storedImage}, storedImage, false},
		{"another one does not turn it back", "", state{suffers(all, registrytest.Status(503)), newerImage}, storedImage, true},
		{"nor if the first throttles", "", state{suffers(all, registrytest.Status(429)), newerImage}, storedImage, true},
		{"nor if the first is silent", "", state{linked(registrytest.Link{Silent: true}), newerImage}, storedImage, true},
		{"nor if the first is a black hole", "", state{linked(registrytest.Link{BlackHole: true}), newerImage}, storedImage, true},
		{"but after max_stale", "max_stale: 5m", state{suffers(all, registrytest.Status(503)), newerImage}, newerImage, false},
		{"and if the first has it no more", "", state{gone, newerImage}, newerImage, false},
		{"and if the first refuses", "", state{suffers(all, registrytest.Status(403)), newerImage}, newerImage, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			several(t, 2, tt.tags, func(r *rig, ups []*registrytest.Registry) {
				push(ups, "latest", storedImage)
				r.pull("latest", storedImage)
				time.Sleep(age)
				ups[1].Push("org/app", "latest", tt.state.second)
				tt.state.first(r)
				for range 3 {
					got := r.get(app+"/manifests/latest").want(r, 200).is(r, tt.want.Raw)
					if stale := got.Header.Get("Warning") != ""; stale != tt.stale {
						r.Errorf("Warning %q", got.Header.Get("Warning"))
					}
					if got.took > patienceInAll {
						r.Errorf("took %v", got.took)
					}
				}
				if !tt.stale {
					return
				}
				r.network.SetLink("quay.test:80", registrytest.Link{})
				r.quay.Heal()
				r.quay.Push("org/app", "latest", unseenImage)
				time.Sleep(2 * time.Minute)
				r.get(app+"/manifests/latest").want(r, 200).is(r, unseenImage.Raw).fresh(r)
			})
		})
	}
}

// One that is slow, but answers, is waited for before a stored tag is called stale because of what a
// later one says: or it would be so for ever.
func TestTagFirstSlow(t *testing.T) {
	for name, tt := range map[string]struct {
		fault registrytest.Fault // after the delay
		want  registrytest.Image
	}{
		"answers":        {registrytest.Delay(0), newerImage},
		"has it no more": {registrytest.Status(404), unseenImage},
		"refuses":        {registrytest.Status(403), unseenImage},
		"fails":          {registrytest.Status(503), storedImage},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			several(t, 2, "", func(r *rig, ups []*registrytest.Registry) {
				push(ups, "latest", storedImage)
				r.pull("latest", storedImage)
				time.Sleep(age)
				r.quay.Push("org/app", "latest", newerImage)
				ups[1].Push("org/app", "latest", unseenImage)
				r.quay.Fault(heads, registrytest.Delay(1200*time.Millisecond), tt.fault)
				got := r.get(app+"/manifests/latest").want(r, 200).is(r, tt.want.Raw)
				if stale := got.Header.Get("Warning") != ""; stale != (name == "fails") {
					r.Errorf("Warning %q", got.Header.Get("Warning"))
				}
			})
		})
	}
}

// An upstream with tags: false is asked for digests only.
func TestDigestsOnly(t *testing.T) {
	yaml := `{default_registry: quay.test, registries: {quay.test: {upstreams: [{url: "http://two.test:80", tags: false}, {url: "http://quay.test:80"}]}}}`
	bubble(t, yaml, func(r *rig) {
		two := registrytest.New(registrytest.Config{})
		two.Serve(r, r.network, "two.test:80")
		two.Push("org/app", "latest", newerImage)
		r.quay.Push("org/app", "latest", storedImage)
		r.pull("latest", storedImage)
		r.quay.Fault(all, registrytest.Status(503))
		r.get(app+"/manifests/latest").want(r, 200).is(r, storedImage.Raw).stale(r, "0")
		r.get(app+"/manifests/other").want(r, 503)
		r.get(app+"/tags/list").want(r, 503)
		for _, path := range []string{"/manifests/latest", "/manifests/other", "/tags/list"} {
			if n := two.Count(registrytest.Match{Path: path}); n > 0 {
				r.Errorf("asked %d times for %s", n, path)
			}
		}
		r.get(app+"/manifests/"+newerImage.Digest().String()).want(r, 200).is(r, newerImage.Raw)
		r.get(blobPath(newerImage.Blobs[1])).want(r, 200).is(r, newerImage.Blobs[1].Bytes)
	})
}

// Those who lose are left running, so that their breakers learn; then nobody waits for them any more.
func TestLosersTeachBreakers(t *testing.T) {
	for class, path := range map[string]func(registrytest.Image) string{
		"manifest": func(i registrytest.Image) string { return "/manifests/" + i.Digest().String() },
		"blob":     func(i registrytest.Image) string { return "/blobs/" + i.Blobs[1].Digest.String() },
	} {
		t.Run(class, func(t *testing.T) {
			t.Parallel()
			several(t, 2, "", func(r *rig, ups []*registrytest.Registry) {
				slow := registrytest.Delay(4 * time.Second)
				r.quay.Fault(all, slow, registrytest.Status(503))
				var took time.Duration
				for i := range 6 {
					image := registrytest.NewImage(registrytest.Layer(uint64(20+i), 10<<10))
					push(ups, "latest", image)
					got := r.get(app+path(image)).want(r, 200)
					took = got.took
					if i == 0 && took != time.Second {
						r.Errorf("took %v, want 1 s", took)
					}
					time.Sleep(10 * time.Second)
				}
				for _, request := range r.quay.Requests(all) {
					if took := request.End.Sub(request.Start); took != 4*time.Second {
						r.Errorf("a loser was given %v of the 4 s that it needs", took)
					}
				}
				if h := r.health("quay.test:80", class); h.State == "closed" || h.Failed == 0 || took > 0 {
					r.Errorf("%+v, and the last request took %v", h, took)
				}
				if h := r.health("two.test:80", class); h.State != "closed" || h.Failed+h.Excluded > 0 {
					r.Errorf("%+v", h)
				}
			})
		})
	}
}

// A body that comes too late is closed, and blamed on nobody.
func TestLosingBodyIsClosed(t *testing.T) {
	several(t, 3, "", func(r *rig, ups []*registrytest.Registry) {
		for i, up := range ups {
			up.PutBlob("org/app", bigLayer.Bytes)
			up.Fault(all, registrytest.Delay(time.Duration(4-i)*time.Second)) // at 4, 4 and 4 s
		}
		r.get(blobPath(bigLayer)).want(r, 200).is(r, bigLayer.Bytes)
		time.Sleep(time.Second)
		whole := 0
		for i, up := range ups {
			requests := up.Requests(all)
			if len(requests) != 1 || requests[0].End.IsZero() {
				r.Errorf("%s: %d requests, or one that is still under way", upstreamHosts[i], len(requests))
				continue
			}
			if requests[0].Sent == bigLayer.Size {
				whole++
			}
			if h := r.health(upstreamHosts[i], "blob"); h.State != "closed" || h.Failed > 0 {
				r.Errorf("%s: %+v", upstreamHosts[i], h)
			}
		}
		if whole != 1 {
			r.Errorf("%d whole bodies, want 1", whole)
		}
	})
}

// An upstream that fails now and then is noticed by nobody who has a second one.
func TestF09FailsNowAndThen(t *testing.T) {
	const pulls = 1000
	several(t, 2, "", func(r *rig, ups []*registrytest.Registry) {
		image := registrytest.NewImage(registrytest.Layer(7, 1<<10))
		push(ups, "latest", image)
		r.quay.Fault(all, registrytest.Chance(0.2, 1, registrytest.Status(503)))
		for i := range pulls {
			layer := registrytest.Layer(uint64(1000+i), 1<<10)
			dgst := ups[0].PutBlob("org/app", layer)
			ups[1].PutBlob("org/app", layer)
			for _, path := range []string{"/manifests/latest", "/blobs/" + dgst.String()} {
				if got := r.serve(app + path); got.StatusCode != 200 || got.Header.Get("Warning") != "" {
					r.Errorf("pull %d: %s: %d, Warning %q", i, path, got.StatusCode, got.Header.Get("Warning"))
				}
			}
			time.Sleep(100 * time.Millisecond)
		}
		synctest.Wait()
		failed := int(r.health("quay.test:80", "manifest").Failed + r.health("quay.test:80", "blob").Failed)
		if failed < pulls/20 {
			r.Fatalf("only %d requests failed: nothing was tested", failed)
		}
		if n := r.asked() + ups[1].Count(all); n > 2*pulls+failed+pulls/5 {
			r.Errorf("%d requests for %d questions, of which %d failed", n, 2*pulls, failed)
		}
	})
}

// HEAD names a digest of one upstream: its manifest is not had from a mix of them.
func TestTagManifestFromTheSameUpstream(t *testing.T) {
	several(t, 2, "", func(r *rig, ups []*registrytest.Registry) {
		ups[0].Push("org/app", "latest", storedImage)
		ups[1].Push("org/app", "latest", newerImage)
		r.quay.Fault(gets, registrytest.Status(503))
		r.get(app+"/manifests/latest").want(r, 200).is(r, newerImage.Raw)
		if n := ups[1].Count(registrytest.Match{Method: http.MethodGet, Path: storedImage.Digest().String()}); n > 0 {
			r.Error("asked for what another upstream's tag names")
		}
	})
}

// Nobody waits for one who has panicked.
func TestRacePanics(t *testing.T) {
	several(t, 1, "", func(r *rig, _ []*registrytest.Registry) {
		ctx, cancel := context.WithTimeout(r.Context(), time.Minute)
		defer cancel()
		race := &race[int]{tasks: r.mirror.filling, clients: slices.Repeat(r.mirror.pool.Clients("quay.test"), 2), ask: func(context.Context, int) (int, error) { panic("scripted") }}
		if _, _, err := race.run(ctx); !errors.Is(err, errPanicked) {
			r.Error(err)
		}
	})
}
