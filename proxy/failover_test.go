package proxy

import (
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"breakwater/pkg/registrytest"
)

// broken is where the first body of these tests breaks off.
const broken = 300 << 10

// ranges is the Range of each GET that was served, in order.
func ranges(up *registrytest.Registry) []string {
	var all []string
	for _, request := range up.Requests(gets) {
		all = append(all, request.Header.Get("Range"))
	}
	return all
}

func from(n int) string { return fmt.Sprintf("bytes=%d-", n) }

// wantRanges fails the test unless each upstream had the GETs with these Ranges, and no other.
func (r *rig) wantRanges(ups []*registrytest.Registry, want ...[]string) {
	r.Helper()
	for i, up := range ups {
		if got := ranges(up); !slices.Equal(got, want[i]) {
			r.Errorf("%s was asked for %q, want %q", upstreamHosts[i], got, want[i])
		}
	}
}

// blackHole makes nothing pass to or from these hosts any more, once all that moves has come to rest.
func (r *rig) blackHole(hosts ...string) {
	go func() {
		synctest.Wait()
		for _, host := range hosts {
			r.network.SetLink(host, registrytest.Link{BlackHole: true})
		}
	}()
}

// What breaks off goes on from its byte, and the client sees one unbroken answer.
func TestFailover(t *testing.T) {
	first := func(f registrytest.Fault) func(*rig, []*registrytest.Registry) {
		return func(r *rig, _ []*registrytest.Registry) { r.quay.Fault(gets, registrytest.First(1, f)) }
	}
	all := func(f registrytest.Fault) func(*rig, []*registrytest.Registry) {
		return func(_ *rig, ups []*registrytest.Registry) {
			for _, up := range ups {
				up.Fault(gets, f)
			}
		}
	}
	second := func(f registrytest.Fault, then func(*rig, []*registrytest.Registry)) func(*rig, []*registrytest.Registry) {
		return func(r *rig, ups []*registrytest.Registry) {
			ups[1].Fault(gets, f)
			then(r, ups)
		}
	}
	cut := first(registrytest.Truncate(broken))
	for _, tt := range []struct {
		name   string
		n      int
		given  func(*rig, []*registrytest.Registry)
		limit  time.Duration
		ranges [][]string
	}{
		{"F04 black hole, second upstream", 2, func(r *rig, ups []*registrytest.Registry) {
			first(registrytest.Stall(broken))(r, ups)
			r.blackHole("quay.test:80")
		}, 20 * time.Second, [][]string{{""}, {from(broken)}}},
		{"F04 flow is dropped, same upstream", 1, func(r *rig, ups []*registrytest.Registry) {
			first(registrytest.Stall(broken))(r, ups)
			go func() {
				synctest.Wait()
				r.network.Drop("quay.test:80")
			}()
		}, 20 * time.Second, [][]string{{"", from(broken)}}},
		{"F04 all black holes, one recovers", 2, func(r *rig, ups []*registrytest.Registry) {
			first(registrytest.Stall(broken))(r, ups)
			r.blackHole("quay.test:80", "two.test:80")
			time.AfterFunc(16*time.Second, func() {
				r.network.Drop("quay.test:80") // what was there does not come back to life
				r.network.SetLink("quay.test:80", registrytest.Link{})
			})
		}, 20 * time.Second, [][]string{{"", from(broken)}, nil}},
		{"F20 ends early", 2, cut, 0, [][]string{{""}, {from(broken)}}},
		{"F20 ends before its first byte", 2, first(registrytest.Truncate(0)), 0, [][]string{{""}, {""}}},
		{"F21 is reset", 2, first(registrytest.Reset(broken)), 0, [][]string{{""}, {from(broken)}}},
		{"both, again and again", 2, all(registrytest.Truncate(broken)), 2 * time.Second,
			[][]string{{"", from(2 * broken)}, {from(broken), from(3 * broken)}}},
		{"second is out", 2, second(registrytest.Status(503), cut), 0, [][]string{{"", from(broken)}, {from(broken)}}},
		{"second has it not", 2, second(registrytest.Status(404), cut), 0, [][]string{{"", from(broken)}, {from(broken)}}},
		{"second knows no ranges", 2, second(registrytest.Header("Content-Range", "bytes 0-1048575/1048576"), cut), 0, [][]string{{"", from(broken)}, {from(broken)}}},
		{"second hangs", 2, second(registrytest.Hang(), cut), time.Second, [][]string{{"", from(broken)}, {from(broken)}}},
		{"second has another size", 2, second(registrytest.Header("Content-Range", fmt.Sprintf("bytes %d-1048576/1048577", broken)), cut), 0,
			[][]string{{"", from(broken)}, {from(broken)}}},
		{"third goes on", 3, second(registrytest.Status(503), cut), 0, [][]string{{""}, {from(broken)}, {from(broken)}}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			several(t, tt.n, "", func(r *rig, ups []*registrytest.Registry) {
				for _, up := range ups {
					up.PutBlob("org/app", bigLayer.Bytes)
				}
				tt.given(r, ups)
				began := time.Now()
				r.get(blobPath(bigLayer)).want(r, 200).is(r, bigLayer.Bytes)
				if took := time.Since(began); took > tt.limit {
					r.Errorf("the client waited for %v, want at most %v", took, tt.limit)
				}
				r.wantRanges(ups, tt.ranges...)
				synctest.Wait()
				if !r.holds(bigLayer.Digest) {
					r.Error("not stored")
				}
			})
		})
	}
}

// tricklingLayer comes byte by byte at its end.
var tricklingLayer = registrytest.NewImage(registrytest.Layer(6, trickling+40)).Blobs[1]

const trickling = 100 << 10

// trickle sends the bytes from trickling on one by one, one in ten seconds.
func trickle(w http.ResponseWriter, req *http.Request, next http.Handler) {
	whole := httptest.NewRecorder()
	next.ServeHTTP(whole, req)
	for name, values := range whole.Header() {
		w.Header()[name] = values
	}
	w.WriteHeader(whole.Code)
	body := whole.Body.Bytes()
	for i := max(len(body)-40, 0); ; i++ {
		_, _ = w.Write(body[:i])
		if _ = http.NewResponseController(w).Flush(); i == len(body) {
			return
		}
		select {
		case <-time.After(10 * time.Second):
		case <-req.Context().Done():
			panic(http.ErrAbortHandler)
		}
		body, i = body[i:], 0
	}
}

// A source that drips is left for another one that has the blob, and for no other.
func TestF05Drip(t *testing.T) {
	fault := func(f registrytest.Fault) func(*rig, []*registrytest.Registry) {
		return func(_ *rig, ups []*registrytest.Registry) { ups[1].Fault(all, f) }
	}
	for _, tt := range []struct {
		name  string
		n     int
		given func(*rig, []*registrytest.Registry)
		took  time.Duration // at most
		gets  int           // at quay
	}{
		{"another source", 2, func(*rig, []*registrytest.Registry) {}, 75 * time.Second, 1},
		{"alone", 1, func(*rig, []*registrytest.Registry) {}, 400 * time.Second, 1},
		{"another has it not", 2, fault(registrytest.Status(404)), 401 * time.Second, 2},
		{"another is out", 2, fault(registrytest.Status(503)), 401 * time.Second, 8},
		{"another is a black hole", 2, func(r *rig, _ []*registrytest.Registry) {
			r.network.SetLink("two.test:80", registrytest.Link{BlackHole: true})
		}, 410 * time.Second, 8},
		{"another drips too", 2, fault(trickle), 401 * time.Second, 8},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			several(t, tt.n, "", func(r *rig, ups []*registrytest.Registry) {
				for _, up := range ups {
					up.PutBlob("org/app", tricklingLayer.Bytes)
				}
				r.quay.Fault(gets, trickle)
				tt.given(r, ups)
				began := time.Now()
				if got := r.get(blobPath(tricklingLayer)).want(r, 200).is(r, tricklingLayer.Bytes); got.took > 0 {
					r.Errorf("no header for %v", got.took)
				}
				if took := time.Since(began); took > tt.took {
					r.Errorf("took %v, want at most %v", took, tt.took)
				}
				if n := r.quay.Count(gets); n > tt.gets {
					r.Errorf("%d GETs at the slow one, want at most %d", n, tt.gets)
				}
				if tt.name == "another source" {
					r.wantRanges(ups, []string{""}, []string{from(trickling + 6)})
				}
			})
		})
	}
}

// A redirect may have expired before it is used: a fresh one is asked for, once.
func TestF15ExpiredRedirect(t *testing.T) {
	registry, cdn := registrytest.Match{Kind: registrytest.KindBlob}, registrytest.Match{Kind: registrytest.KindCDN}
	for _, tt := range []struct {
		name          string
		n             int
		faults        []registrytest.Fault // of the CDN
		status        int
		registry, cdn int // requests
	}{
		{"fresh one is good", 1, []registrytest.Fault{registrytest.First(1, registrytest.Status(403))}, 200, 2, 2},
		{"fresh one too", 1, []registrytest.Fault{registrytest.Status(403)}, 503, 2, 2},
		{"fresh one too, next upstream", 2, []registrytest.Fault{registrytest.Status(403)}, 200, 2, 2},
		{"in the middle", 1, []registrytest.Fault{registrytest.First(1, registrytest.Stall(broken))}, 200, 2, 2},
		{"in the middle, fresh one is refused once", 1, []registrytest.Fault{
			registrytest.After(1, registrytest.First(1, registrytest.Status(403))), registrytest.First(1, registrytest.Stall(broken))}, 200, 3, 3},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			several(t, tt.n, "", func(r *rig, ups []*registrytest.Registry) {
				r.quay.Configure(registrytest.Config{CDN: "http://cdn.test", CDNLifetime: time.Second})
				r.quay.Serve(r, r.network, "cdn.test:80")
				for _, up := range ups {
					up.PutBlob("org/app", bigLayer.Bytes)
				}
				r.quay.Fault(cdn, tt.faults...)
				got := r.get(blobPath(bigLayer)).want(r, tt.status)
				if tt.status == 200 {
					got.is(r, bigLayer.Bytes)
				}
				if a, b := r.quay.Count(registry), r.quay.Count(cdn); a != tt.registry || b != tt.cdn {
					r.Errorf("%d requests to the registry, %d to the CDN, want %d and %d", a, b, tt.registry, tt.cdn)
				}
				used := map[string]bool{}
				for _, request := range r.quay.Requests(cdn) {
					used[request.URL.RawQuery] = true
				}
				if strings.HasPrefix(tt.name, "in the middle") && len(used) < 2 {
					r.Error("the redirect of 15 s ago was used again")
				}
				synctest.Wait() // it is a failure of the blob's, which is held off; else it is stored
				r.quay.Forget()
				if r.get(blobPath(bigLayer)).want(r, tt.status); r.asked() > 0 {
					r.Error("asked again at once")
				}
			})
		})
	}
}

// Who lies is not asked again, if it is known who lied.
func TestF22LyingUpstream(t *testing.T) {
	lie, out := registrytest.FlipBit(0), registrytest.Status(503)
	for _, tt := range []struct {
		name    string
		blob    registrytest.Blob
		faults  [][]registrytest.Fault // at the first request
		whole   bool                   // it is served
		outThen bool                   // the first upstream, at the second request
		asked   []string               // then
		status  int                    // then
	}{
		{"first", bigLayer, [][]registrytest.Fault{{slowly, lie}, nil}, false, false, upstreamHosts[1:2], 200},
		{"first, before anything is let go", smallLayer, [][]registrytest.Fault{{lie}, nil}, true, false, nil, 200},
		{"one of two", bigLayer, [][]registrytest.Fault{{slowly, registrytest.Truncate(broken)}, {slowly, lie}}, false, false, upstreamHosts[:1], 200},
		{"one of two, the other is out", bigLayer, [][]registrytest.Fault{{slowly, registrytest.Truncate(broken)}, {slowly, lie}}, false, true, upstreamHosts[:2], 200},
		{"second, first brings nothing", bigLayer, [][]registrytest.Fault{{registrytest.Truncate(0)}, {slowly, lie}}, false, true, upstreamHosts[:1], 503},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			several(t, 2, "", func(r *rig, ups []*registrytest.Registry) {
				for i, up := range ups {
					up.PutBlob("org/app", tt.blob.Bytes)
					up.Fault(gets, tt.faults[i]...)
				}
				if tt.whole {
					r.get(blobPath(tt.blob)).want(r, 200).is(r, tt.blob.Bytes)
				} else {
					head, body, err := r.raw(http.MethodGet, blobPath(tt.blob))
					r.wantShort(head, body, err, tt.blob.Bytes)
				}
				synctest.Wait()
				if r.holds(tt.blob.Digest) != tt.whole {
					r.Errorf("stored: %v", r.holds(tt.blob.Digest))
				}
				for _, up := range ups {
					up.Forget()
					up.Heal()
				}
				if tt.outThen {
					r.quay.Fault(all, out)
				}
				time.Sleep(5 * time.Minute)
				got := r.get(blobPath(tt.blob)).want(r, tt.status)
				if tt.status == 200 {
					got.is(r, tt.blob.Bytes)
				}
				var asked []string
				for i, up := range ups {
					if up.Count(gets) > 0 {
						asked = append(asked, upstreamHosts[i])
					}
				}
				if !slices.Equal(asked, tt.asked) {
					r.Errorf("asked at the second request: %v, want %v", asked, tt.asked)
				}
				for _, host := range upstreamHosts[:2] {
					if h := r.health(host, "blob"); h.State != "closed" {
						r.Errorf("%s: %+v", host, h)
					}
				}
			})
		})
	}
}

// The CDN of the first sends every header and stalls every body: after five it is passed over, and no
// probe, nor the user who is one, lets it in again.
func TestF72StallsWithNext(t *testing.T) {
	several(t, 2, "", func(r *rig, ups []*registrytest.Registry) {
		cdn := registrytest.Match{Kind: registrytest.KindCDN}
		push(ups, "latest", storedImage)
		r.pull("latest", storedImage) // for the probes
		r.quay.Configure(registrytest.Config{CDN: "http://cdn.test"})
		r.quay.Serve(r, r.network, "cdn.test:80")
		r.quay.Fault(cdn, registrytest.Stall(1<<10))
		for i := range 20 {
			image := registrytest.NewImage(registrytest.Layer(uint64(40+i), 200<<10))
			push(ups, "latest", image)
			r.get(app+"/manifests/latest").want(r, 200).is(r, image.Raw).fresh(r)
			began := time.Now()
			got := r.get(blobPath(image.Blobs[1])).want(r, 200).is(r, image.Blobs[1].Bytes)
			if got.took > 0 {
				r.Errorf("blob %d: no header for %v", i, got.took)
			}
			if took := time.Since(began); took > 20*time.Second || i >= 5 && took > 0 {
				r.Errorf("blob %d took %v", i, took)
			}
			if i >= 5 {
				time.Sleep(20 * time.Second)
			}
		}
		if manifest, blob := r.health("quay.test:80", "manifest"), r.health("quay.test:80", "blob"); manifest.State != "closed" || blob.State == "closed" {
			r.Errorf("%+v, %+v", manifest, blob)
		}
		if n := ups[1].Count(manifests); n > 0 {
			r.Errorf("the second was asked for %d manifests", n)
		}
	})
}

// Headers alone win no race: where no byte comes behind them, or of a small blob, which nobody may read
// before it is whole, not all, the second source is asked in time.
func TestF72StallsBeforeAnythingIsReleased(t *testing.T) {
	for name, tt := range map[string]struct {
		blob   registrytest.Blob
		stalls int64
	}{
		"small, no byte":        {smallLayer, 0},
		"small, but for a byte": {smallLayer, int64(len(smallLayer.Bytes)) - 1},
		"big, no byte":          {bigLayer, 0},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			several(t, 2, "", func(r *rig, ups []*registrytest.Registry) {
				for _, up := range ups {
					up.PutBlob("org/app", tt.blob.Bytes)
				}
				r.quay.Fault(gets, registrytest.Stall(tt.stalls))
				if got := r.get(blobPath(tt.blob)).want(r, 200).is(r, tt.blob.Bytes); got.took > waitBeforeNext {
					r.Errorf("took %v", got.took)
				}
				time.Sleep(time.Minute)
				if h := r.health("quay.test:80", "blob"); h.Failed != 1 {
					r.Errorf("the stall does not count: %+v", h)
				}
			})
		})
	}
}

// Five breaks without a megabyte in between end it, after pauses that grow. So
// little is not worth parking: nothing of it is left.
func TestFiveBreaks(t *testing.T) {
	for n := 1; n <= 2; n++ {
		several(t, n, "", func(r *rig, ups []*registrytest.Registry) {
			for _, up := range ups {
				up.PutBlob("org/app", bigLayer.Bytes)
				up.Fault(gets, registrytest.Truncate(100<<10))
			}
			began := time.Now()
			head, body, err := r.raw(http.MethodGet, blobPath(bigLayer))
			r.wantShort(head, body, err, bigLayer.Bytes)
			if want := 600 << 10; len(body) > want || len(body) < want-(100<<10) {
				r.Errorf("%d bytes, want all of the %d that came", len(body), want)
			}
			var at []time.Duration
			for _, up := range ups {
				for _, request := range up.Requests(gets) {
					at = append(at, request.Start.Sub(began))
				}
			}
			slices.Sort(at)
			const ms = time.Millisecond
			if want := []time.Duration{0, 0, 250 * ms, 750 * ms, 1750 * ms, 3750 * ms}; !slices.Equal(at, want) {
				r.Errorf("asked after %v, want %v", at, want)
			}
			synctest.Wait()
			if r.mirror.inFlight(bigLayer.Digest) || r.holds(bigLayer.Digest) {
				r.Error("it goes on")
			}
			if left, err := os.ReadDir(filepath.Join(r.dir, "data", "tmp")); err != nil || len(left) > 0 {
				r.Errorf("left in tmp: %v, %v", left, err)
			}
			for _, up := range ups {
				up.Heal()
			}
			time.Sleep(time.Minute)
			r.get(blobPath(bigLayer)).want(r, 200).is(r, bigLayer.Bytes)
		})
	}
}

// A megabyte of progress makes up for the breaks before it.
func TestBreaksWithProgress(t *testing.T) {
	huge := registrytest.NewImage(registrytest.Layer(8, 10<<20)).Blobs[1]
	several(t, 1, "", func(r *rig, ups []*registrytest.Registry) {
		r.quay.PutBlob("org/app", huge.Bytes)
		r.quay.Fault(gets, registrytest.Truncate(1<<20))
		began := time.Now()
		r.get(blobPath(huge)).want(r, 200).is(r, huge.Bytes)
		if took, n := time.Since(began), r.quay.Count(gets); took > 0 || n != 10 {
			r.Errorf("%d GETs, took %v", n, took)
		}
	})
}

// A fill whose sources could not all be asked before the mirror closed is over too.
func TestCloseWithSourcesLeft(t *testing.T) {
	several(t, 2, "", func(r *rig, ups []*registrytest.Registry) {
		r.quay.Fault(blobs, registrytest.Delay(500*time.Millisecond), registrytest.Status(503))
		answered := make(chan answer)
		go func() { answered <- r.get(blobPath(bigLayer)) }()
		synctest.Wait()
		r.mirror.filling.stop(r.Context())
		if got := <-answered; got.StatusCode != 503 {
			r.Errorf("%d %s", got.StatusCode, got.body)
		}
	})
}
