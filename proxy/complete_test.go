package proxy

import (
	"fmt"
	"net/http"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"breakwater/pkg/oci"
	"breakwater/pkg/registrytest"

	"github.com/opencontainers/go-digest"
)

// completing is oneUpstream with that completion, such as "images: kept".
func completing(completion string) string { return "completion: {" + completion + "}" + oneUpstream }

// holdsAll reports whether all blobs of the image are stored.
func (r *rig) holdsAll(image registrytest.Image) bool {
	return !slices.ContainsFunc(image.Blobs, func(b registrytest.Blob) bool { return !r.holds(b.Digest) })
}

// cutOff takes quay.test away, open connections too.
func (r *rig) cutOff() {
	refuses(r)
	r.network.Reset("quay.test:80")
}

// layered is an image of n layers of that size.
func layered(n, size int) registrytest.Image {
	var layers [][]byte
	for i := range n {
		layers = append(layers, registrytest.Layer(uint64(size*100+i), size))
	}
	return registrytest.NewImage(layers...)
}

func TestWhatIsCompleted(t *testing.T) {
	image := registrytest.NewImage(registrytest.Layer(41, 1000), registrytest.Layer(42, 1000))
	index := registrytest.NewIndex(image, unseenImage.For("linux/arm64"))
	byTag, byDigest, config := "/manifests/latest", "/manifests/"+image.Digest().String(), "/blobs/"+image.Blobs[0].Digest.String()
	indexByDigest, layer := "/manifests/"+index.Digest().String(), "/blobs/"+image.Blobs[1].Digest.String()
	for _, tt := range []struct {
		images   string
		requests string // method and path, in turn
		want     bool
	}{
		{"all", "GET " + byTag, true},
		{"all", "HEAD " + byTag, false},
		{"all", "GET " + byDigest, true},
		{"all", "HEAD " + byDigest, false},
		{"all", "GET /manifests/multi", false},
		{"all", "GET " + indexByDigest, false},
		{"all", "GET /manifests/multi GET " + byDigest, true},
		{"all", "HEAD " + byTag + " GET " + config, true},
		{"all", "HEAD " + byTag + " HEAD " + config, false},
		{"all", "HEAD " + byTag + " GET " + layer, false},
		{"kept", "GET " + byTag, false},
		{"none", "GET " + byTag + " GET " + config, false},
	} {
		t.Run(tt.images+" "+tt.requests, func(t *testing.T) {
			t.Parallel()
			bubble(t, completing("images: "+tt.images), func(r *rig) {
				r.quay.Push("org/app", "latest", image)
				r.quay.Push("org/app", "multi", index)
				for request := range slices.Chunk(strings.Fields(tt.requests), 2) {
					r.do(request[0], app+request[1]).want(r, 200)
				}
				time.Sleep(time.Minute)
				if got := r.holdsAll(image); got != tt.want {
					r.Errorf("complete: %v, want %v", got, tt.want)
				}
				if bytes := r.metric("breakwater_completion_bytes_total"); (bytes != "0") != tt.want {
					r.Errorf("%s bytes fetched", bytes)
				}
				if r.holds(unseenImage.Blobs[1].Digest) {
					r.Error("another platform's image was fetched")
				}
			})
		})
	}
}

// A client finds the fills under way: what it asks for is fetched once.
func TestClientJoinsACompletion(t *testing.T) {
	bubble(t, completing("images: all"), func(r *rig) {
		image := layered(4, 300<<10)
		r.quay.Push("org/app", "latest", image)
		r.quay.Fault(blobs, registrytest.Drip(64<<10, time.Second))
		r.get(app+"/manifests/latest").want(r, 200)
		time.Sleep(2 * time.Second)
		if n := r.quay.Count(blobGets); n != 1+aheadAtOnce { // the config is whole by now
			r.Errorf("%d blobs under way, want the config and %d", n, aheadAtOnce)
		}
		var client sync.WaitGroup
		for _, blob := range image.Blobs {
			client.Go(func() { r.get(blobPath(blob)).want(r, 200).is(r, blob.Bytes) })
		}
		client.Wait()
		time.Sleep(time.Minute)
		if n := r.quay.Count(blobGets); n != len(image.Blobs) {
			r.Errorf("%d GETs upstream of %d blobs", n, len(image.Blobs))
		}
	})
}

// under is how many of these requests were under way at that time.
func under(requests []registrytest.Request, at time.Time) int {
	n := 0
	for _, req := range requests {
		if !req.Start.After(at) && (req.End.IsZero() || req.End.After(at)) {
			n++
		}
	}
	return n
}

// While somebody pulls, three at a time; ten seconds after the last blob request, one.
func TestCompletionGoesOnBehind(t *testing.T) {
	for name, client := range map[string]bool{"manifest only": false, "pulling": true} {
		bubble(t, completing("images: all"), func(r *rig) {
			image, second := layered(30, 100<<10), layered(4, 90<<10)
			r.quay.Push("org/app", "latest", image)
			r.quay.Push("org/second", "latest", second)
			r.quay.Fault(blobs, registrytest.Drip(20<<10, time.Second))
			began := time.Now()
			r.get(app+"/manifests/latest").want(r, 200)
			if client {
				go func() {
					for range 4 {
						time.Sleep(7 * time.Second)
						r.do(http.MethodHead, blobPath(image.Blobs[30]))
					}
				}()
			}
			time.Sleep(29 * time.Second)
			synctest.Wait()
			got, want := under(r.quay.Requests(blobGets), began.Add(22500*time.Millisecond)), 1
			if client {
				want = aheadAtOnce
			}
			if got != want {
				r.Errorf("%s: %d fills after 22.5 s, want %d", name, got, want)
			}
			if got := under(r.quay.Requests(blobGets), began.Add(4*time.Second)); got != aheadAtOnce {
				r.Errorf("%s: %d fills after 4 s, want %d", name, got, aheadAtOnce)
			}
			r.get("/v2/quay.test/org/second/manifests/latest").want(r, 200)
			time.Sleep(10 * time.Minute)
			for i := range 50 { // both are behind: one for the whole mirror
				if at := began.Add(time.Minute + time.Duration(i)*time.Second); under(r.quay.Requests(blobGets), at) > 1 {
					r.Errorf("%s: %d fills at a time after %v", name, under(r.quay.Requests(blobGets), at), at.Sub(began))
				}
			}
			if !r.holdsAll(image) || !r.holdsAll(second) {
				r.Errorf("%s: not complete after ten minutes", name)
			}
			if n := r.mirror.completions.count(); n > 0 {
				r.Errorf("%s: %d images still pending", name, n)
			}
		})
	}
}

func TestCompletionGivesWayToClients(t *testing.T) {
	bubble(t, completing("images: all"), func(r *rig) {
		image := registrytest.NewImage(registrytest.Layer(1, 100<<10), registrytest.Layer(2, 101<<10), registrytest.Layer(3, 102<<10), registrytest.Layer(4, 4<<20))
		r.quay.Push("org/app", "latest", image)
		r.quay.PutBlob("org/app", bigLayer.Bytes)
		last := image.Blobs[4]
		slow := r.quay.Fault(registrytest.Match{Kind: registrytest.KindBlob, Func: func(req *http.Request) bool { return !strings.Contains(req.URL.Path, last.Digest.String()) }}, registrytest.Drip(8<<10, time.Second))
		r.get(app+"/manifests/latest").want(r, 200)
		time.Sleep(9 * time.Second)
		var client sync.WaitGroup
		client.Go(func() { r.read(blobPath(bigLayer), 1) }) // its fill goes on for two minutes
		time.Sleep(5 * time.Second)                         // and what is left of the image is behind by now
		if r.quay.Count(registrytest.Match{Kind: registrytest.KindBlob, Path: last.Digest.String()}) != 1 || r.holds(last.Digest) {
			r.Fatal("the last layer should be under way")
		}
		time.Sleep(2 * time.Second)
		if r.holds(last.Digest) {
			r.Error("does not give way")
		}
		slow()
		client.Wait()
		synctest.Wait()
		time.Sleep(yieldPause)
		synctest.Wait()
		if !r.holds(last.Digest) {
			r.Error("gives way though nobody else is busy")
		}
	})
}

// A client that joins what is fetched behind does not wait for others.
func TestClientHurriesACompletion(t *testing.T) {
	p := newPace(behind)
	busy := func() bool { return true }
	synctest.Test(t, func(t *testing.T) {
		p = newPace(behind)
		held := make(chan error)
		go func() { held <- p.giveWay(busy) }()
		synctest.Wait()
		began := time.Now()
		p.raise(wanted)
		if err := <-held; err != nil || time.Since(began) > 0 {
			t.Errorf("%v after %v", err, time.Since(began))
		}
		if err := p.giveWay(busy); err != nil || time.Since(began) > 0 {
			t.Errorf("a client's fill waits: %v after %v", err, time.Since(began))
		}
		p.cutUnwanted()
		if err := p.giveWay(busy); err != nil {
			t.Errorf("a client's fill is cut: %v", err)
		}
	})
}

func TestBytesPerDay(t *testing.T) {
	bubble(t, completing("bytes_per_day: 250KiB"), func(r *rig) {
		image := layered(16, 100<<10)
		r.quay.Push("org/app", "latest", image)
		r.quay.Fault(blobs, registrytest.Drip(20<<10, time.Second))
		stored := func() int {
			n := 0
			for _, blob := range image.Blobs[1:] {
				if r.holds(blob.Digest) {
					n++
				}
			}
			return n
		}
		r.get(app+"/manifests/latest").want(r, 200)
		time.Sleep(15 * time.Second)
		hurried := stored()
		time.Sleep(12 * time.Hour)
		if n := stored(); n != hurried+2 {
			r.Errorf("%d layers after half a day, want %d and two", n, hurried)
		}
		time.Sleep(13 * time.Hour)
		if n := stored(); n != hurried+4 {
			r.Errorf("%d layers after a day, want %d and four", n, hurried)
		}
		if hurried > 12 {
			r.Errorf("%d layers ahead: the test tests nothing", hurried)
		}
	})
}

// The client of the first host had most layers from elsewhere; the next host has none.
func TestOutageAfterACompletion(t *testing.T) {
	for _, restart := range []bool{false, true} {
		bubble(t, completing("images: all"), func(r *rig) {
			image := layered(5, 70<<10)
			r.quay.Push("org/app", "latest", image)
			r.get(app+"/manifests/latest").want(r, 200)
			r.get(blobPath(image.Blobs[0])).want(r, 200)
			r.get(blobPath(image.Blobs[5])).want(r, 200)
			time.Sleep(time.Minute)
			r.cutOff()
			if tag, err := r.store.Tag(r.repository("org/app"), "latest"); err != nil || tag.LastComplete != tag.Current {
				r.Errorf("the record does not say that it is complete: %+v, %v", tag, err)
			}
			if restart {
				r.stop()
				r.start(completing("images: all"))
			}
			r.pull("latest", image)
		})
	}
}

func TestReferrersAreCompleted(t *testing.T) {
	for name, config := range map[string]registrytest.Config{"API": {}, "tags": {ReferrersTag: true}} {
		t.Run(name, func(t *testing.T) {
			bubble(t, completing("images: all"), func(r *rig) {
				r.quay.Configure(config)
				image := layered(1, 50<<10)
				index := registrytest.NewIndex(image)
				subjects := []registrytest.Image{image, index}
				var referring []registrytest.Image
				r.quay.Push("org/app", "latest", index)
				for i, subject := range subjects {
					signature := registrytest.NewImage(registrytest.Layer(uint64(70+i), 600)).Referring(subject, "application/signature")
					r.quay.Push("org/app", "", signature)
					cosign := registrytest.NewImage(registrytest.Layer(uint64(80+i), 600))
					r.quay.Push("org/app", strings.Replace(subject.Digest().String(), ":", "-", 1)+".sig", cosign)
					referring = append(referring, signature, cosign)
				}
				r.get(app+"/manifests/latest").want(r, 200)
				r.get(app+"/manifests/"+image.Digest().String()).want(r, 200)
				time.Sleep(time.Minute)
				r.cutOff()
				for i, subject := range subjects {
					got := r.get(app+"/referrers/"+subject.Digest().String()).want(r, 200)
					if !strings.Contains(string(got.body), referring[2*i].Digest().String()) {
						r.Errorf("referrers are %s", got.body)
					}
					r.get(app+"/manifests/"+strings.Replace(subject.Digest().String(), ":", "-", 1)+".sig").want(r, 200).is(r, referring[2*i+1].Raw)
				}
				for _, image := range referring {
					r.get(app+"/manifests/"+image.Digest().String()).want(r, 200).is(r, image.Raw)
					for _, blob := range image.Blobs {
						r.get(blobPath(blob)).want(r, 200).is(r, blob.Bytes)
					}
				}
			})
		})
	}
}

// With whom the newer image is, and what is the matter with it.
var outOfReach = []struct {
	name    string
	newer   registrytest.Image // tagged latest after storedImage
	pull    []string           // what a client asks for, and does not get all of
	lacking digest.Digest
}{
	{"a layer", newerImage, []string{"/manifests/latest", "/blobs/" + newerImage.Blobs[1].Digest.String()}, newerImage.Blobs[1].Digest},
	{"an index's image", registrytest.NewIndex(newerImage), []string{"/manifests/latest", "/manifests/" + newerImage.Digest().String()}, newerImage.Digest()},
	{"a layer of an index's image", registrytest.NewIndex(newerImage, unseenImage.For("linux/arm64")),
		[]string{"/manifests/latest", "/manifests/" + newerImage.Digest().String(), "/blobs/" + newerImage.Blobs[1].Digest.String()}, newerImage.Blobs[1].Digest},
}

// While the newer image cannot be had whole, its tag names the last one that can, and within a minute of its
// return the newer one.
func TestLastCompleteImage(t *testing.T) {
	for _, tt := range outOfReach {
		for _, status := range []int{404, 503, 403, 429} {
			for _, images := range []string{"all", "none"} {
				if images == "none" && status != 404 {
					continue
				}
				t.Run(fmt.Sprint(tt.name, " ", status, " ", images), func(t *testing.T) {
					t.Parallel()
					bubble(t, completing("images: "+images), func(r *rig) {
						r.quay.Push("org/app", "latest", storedImage)
						r.pull("latest", storedImage)
						time.Sleep(age)
						r.get(app+"/manifests/latest").want(r, 200).fresh(r)
						validated := time.Now()
						time.Sleep(age)
						r.quay.Push("org/app", "latest", tt.newer)
						r.quay.Fault(registrytest.Match{Path: tt.lacking.String()}, registrytest.Status(status))
						r.do(http.MethodHead, app+"/manifests/latest").want(r, 200).fresh(r)
						for _, path := range tt.pull {
							r.get(app + path)
						}
						for range 3 {
							old := fmt.Sprint(int(time.Since(validated).Seconds()))
							got := r.get(app+"/manifests/latest").want(r, 200).is(r, storedImage.Raw).stale(r, old)
							if cache := got.Header.Get("Cache-Status"); !strings.HasSuffix(cache, "detail=incomplete") || !strings.HasPrefix(cache, "breakwater; ") {
								r.Errorf("Cache-Status %q", cache)
							}
							if got := r.do(http.MethodHead, app+"/manifests/latest").want(r, 200).stale(r, old); got.Header.Get("Docker-Content-Digest") != storedImage.Digest().String() {
								r.Errorf("HEAD names %s", got.Header.Get("Docker-Content-Digest"))
							}
							r.get(app+"/manifests/"+tt.newer.Digest().String()).want(r, 200).is(r, tt.newer.Raw)
							time.Sleep(99 * time.Second)
						}
						r.quay.Heal()
						time.Sleep(retryTime + time.Second)
						r.get(app+"/manifests/latest").want(r, 200).is(r, tt.newer.Raw).fresh(r)
						time.Sleep(time.Minute)
						if !r.holdsAll(newerImage) {
							r.Error("the newer image is not complete")
						}
						refuses(r)
						time.Sleep(age)
						r.get(app+"/manifests/latest").want(r, 200).is(r, tt.newer.Raw)
					})
				})
			}
		}
	}
}

// The newer image is named as soon as it can be had again, before all of it is there.
func TestNewerImageIsNamedOnceItCanBeHad(t *testing.T) {
	for name, client := range map[string]bool{"tried by a client": true, "tried by the mirror": false} {
		bubble(t, completing("images: all"), func(r *rig) {
			newer := registrytest.NewImage(registrytest.Layer(51, 1000), registrytest.Layer(52, 2<<20))
			r.quay.Push("org/app", "latest", storedImage)
			r.pull("latest", storedImage)
			r.quay.Push("org/app", "latest", newer)
			r.quay.Fault(registrytest.Match{Kind: registrytest.KindBlob, Path: newer.Blobs[2].Digest.String()}, registrytest.Drip(8<<10, time.Second))
			heal := r.quay.Fault(registrytest.Match{Kind: registrytest.KindBlob, Path: newer.Blobs[1].Digest.String()}, registrytest.Status(404))
			r.get(app+"/manifests/latest").want(r, 200).is(r, newer.Raw)
			synctest.Wait() // its completion has failed, and no client has tried
			r.get(app+"/manifests/latest").want(r, 200).is(r, storedImage.Raw)
			time.Sleep(5 * time.Second)
			heal()
			if client {
				r.get(blobPath(newer.Blobs[1])).want(r, 200)
			} else {
				time.Sleep(retryTime)
			}
			synctest.Wait()
			r.get(app+"/manifests/latest").want(r, 200).is(r, newer.Raw).fresh(r)
			if r.holdsAll(newer) {
				r.Errorf("%s: it is complete already: the test tests nothing", name)
			}
		})
	}
}

// The last complete image is subject to max_stale by its own age.
func TestLastCompleteImageTooOld(t *testing.T) {
	for _, tt := range []struct {
		maxStale string
		want     registrytest.Image
	}{{"11m", storedImage}, {"9m", newerImage}, {"0s", newerImage}} {
		bubble(t, "completion: {images: none}\n"+withTags("max_stale: "+tt.maxStale), func(r *rig) {
			r.quay.Push("org/app", "latest", storedImage)
			r.pull("latest", storedImage)
			time.Sleep(age)
			r.quay.Push("org/app", "latest", newerImage)
			r.quay.Fault(registrytest.Match{Kind: registrytest.KindBlob, Path: newerImage.Blobs[1].Digest.String()}, registrytest.Status(404))
			r.get(app+"/manifests/latest").want(r, 200).is(r, newerImage.Raw)
			r.get(blobPath(newerImage.Blobs[1])).want(r, 404)
			r.get(app+"/manifests/latest").want(r, 200).is(r, tt.want.Raw)
		})
	}
}

// Blobs are out at all upstreams: nobody has to find out that the newer image's cannot be had.
func TestLastCompleteImageWhileBlobsAreOut(t *testing.T) {
	several(t, 2, "", func(r *rig, ups []*registrytest.Registry) {
		push(ups, "latest", storedImage)
		r.pull("latest", storedImage)
		time.Sleep(age)
		push(ups, "latest", newerImage)
		r.get(app+"/manifests/latest").want(r, 200).is(r, newerImage.Raw).fresh(r)
		for i, up := range ups {
			up.Fault(registrytest.Match{Kind: registrytest.KindBlob}, registrytest.Status(503))
			if i == 0 {
				for i := range 10 {
					r.get(app + "/blobs/" + digest.FromString(fmt.Sprint(i)).String())
				}
				r.get(app+"/manifests/latest").want(r, 200).is(r, newerImage.Raw).fresh(r) // the second has them
			}
		}
		for i := range 10 {
			r.get(app + "/blobs/" + digest.FromString(fmt.Sprint("later", i)).String())
		}
		for _, host := range upstreamHosts[:2] {
			if state := r.health(host, "blob").State; state != "open" {
				r.Fatalf("%s: %s", host, state)
			}
		}
		got := r.get(app+"/manifests/latest").want(r, 200).is(r, storedImage.Raw).stale(r, "600")
		if cache := got.Header.Get("Cache-Status"); cache != "breakwater; fwd=stale; fwd-status=200; detail=incomplete" {
			r.Errorf("Cache-Status %q", cache)
		}
		for _, up := range ups {
			up.Heal()
		}
		time.Sleep(77 * time.Second)
		r.get(app+"/manifests/latest").want(r, 200).is(r, newerImage.Raw).fresh(r)
	})
}

// A tag that has moved on is not waited for any more.
func TestRetriesEndWhenTheTagMoves(t *testing.T) {
	bubble(t, completing("images: none"), func(r *rig) {
		r.quay.Push("org/app", "latest", storedImage)
		r.pull("latest", storedImage)
		r.quay.Push("org/app", "latest", newerImage)
		lacking := registrytest.Match{Kind: registrytest.KindBlob, Path: newerImage.Blobs[1].Digest.String()}
		r.quay.Fault(lacking, registrytest.Status(404))
		r.get(app+"/manifests/latest").want(r, 200)
		r.get(blobPath(newerImage.Blobs[1])).want(r, 404)
		r.get(app+"/manifests/latest").want(r, 200).is(r, storedImage.Raw)
		r.quay.Forget()
		time.Sleep(10*time.Minute + time.Second)
		if n := r.quay.Count(lacking); n != 10 {
			r.Errorf("tried %d times in ten minutes", n)
		}
		r.quay.Push("org/app", "latest", unseenImage)
		r.get(app+"/manifests/latest").want(r, 200).is(r, unseenImage.Raw).fresh(r)
		r.quay.Forget()
		time.Sleep(time.Hour)
		if n := r.quay.Count(lacking); n > 1 {
			r.Errorf("tried %d times though the tag names something else", n)
		}
	})
}

// A completion holds nobody up who wants to stop; a client's download is waited for.
func TestCloseCutsCompletions(t *testing.T) {
	bubble(t, completing("images: all"), func(r *rig) {
		image := layered(1, 4<<20)
		r.quay.Push("org/app", "latest", image)
		r.quay.Fault(blobs, registrytest.Drip(16<<10, time.Second))
		r.get(app+"/manifests/latest").want(r, 200)
		time.Sleep(2 * time.Second)
		began := time.Now()
		r.mirror.Close(r.Context())
		if took := time.Since(began); took > 2*time.Second {
			r.Errorf("closed after %v", took)
		}
	})
}

func TestCompletionsAreBounded(t *testing.T) {
	for name, tt := range map[string]struct {
		begin       func(*completions, *completion)
		first, last bool // of the images are pending
	}{
		"all are urgent":    {func(*completions, *completion) {}, true, false},
		"all are behind":    {(*completions).enqueue, false, true},
		"the first to wait": {func(c *completions, p *completion) { c.queue = append([]*completion{p}, c.queue...) }, true, true},
	} {
		c := newCompletions(nil)
		image := func(i int) oci.Reference { return oci.Reference{Digest: digest.FromString(fmt.Sprint(i))} }
		for i := range maxPending + 100 {
			if p := c.at(image(i)); p != nil {
				tt.begin(c, p)
			}
		}
		if n := c.count(); n != maxPending || len(c.queue) > maxPending {
			t.Errorf("%s: %d pending, %d in the queue, want at most %d", name, n, len(c.queue), maxPending)
		}
		if first, last := c.pending[image(0)] != nil, c.pending[image(maxPending+99)] != nil; first != tt.first || last != tt.last {
			t.Errorf("%s: the first is pending: %v, the last: %v", name, first, last)
		}
	}
}

func TestNothingIsCompletedWithoutRoom(t *testing.T) {
	bubble(t, completing("images: all"), func(r *rig) {
		image := registrytest.NewImage(registrytest.Layer(1, capacity+1), registrytest.Layer(2, 1000))
		r.quay.Push("org/app", "latest", image)
		r.get(app+"/manifests/latest").want(r, 200)
		time.Sleep(10 * time.Minute)
		if n := r.quay.Count(registrytest.Match{Path: image.Blobs[1].Digest.String()}); n > 0 || !r.holds(image.Blobs[2].Digest) {
			r.Errorf("asked %d times for what is larger than the store; the other is stored: %v", n, r.holds(image.Blobs[2].Digest))
		}
		r.get(app+"/manifests/latest").want(r, 200).fresh(r)
	})
}
