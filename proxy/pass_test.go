package proxy

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"breakwater/pkg/registrytest"

	"golang.org/x/sys/unix"
)

// lose takes tmp/ away from the store: it can create no file any more.
func (r *rig) lose() {
	r.Helper()
	tmp := filepath.Join(r.dir, "data", "tmp")
	if err := os.RemoveAll(tmp); err != nil {
		r.Fatal(err)
	}
	if err := os.Mkdir(tmp, 0o700); err != nil { // another one, for whoever looks
		r.Fatal(err)
	}
}

// replace puts another file in the place of what this process has open of the store under a name: each of
// its reads and writes is that one's from now on.
func (r *rig) replace(name, other string) {
	r.Helper()
	file, err := os.OpenFile(other, os.O_RDWR, 0)
	if err != nil {
		r.Fatal(err)
	}
	defer file.Close()
	open, err := filepath.Glob("/proc/self/fd/*")
	if err != nil {
		r.Fatal(err)
	}
	for _, link := range open {
		to, err := os.Readlink(link)
		if err != nil || !strings.HasPrefix(to, filepath.Join(r.dir, "data", name)) {
			continue
		}
		var fd int
		if info, err := os.Stat(link); err != nil || !info.Mode().IsRegular() {
			continue
		}
		if _, err := fmt.Sscan(filepath.Base(link), &fd); err != nil {
			r.Fatal(err)
		}
		if err := unix.Dup3(int(file.Fd()), fd, unix.O_CLOEXEC); err != nil {
			r.Fatal(err)
		}
	}
}

// passes fails the test unless the answer says that it was passed through.
func (a answer) passes(r *rig, detail string) answer {
	r.Helper()
	if got := a.Header.Get("Cache-Status"); !strings.HasSuffix(got, "; detail="+detail) {
		r.Errorf("%s: Cache-Status %q, want detail=%s", a.Request.URL, got, detail)
	}
	return a
}

// What the store cannot take is served all the same, in every way that it can be asked for.
func TestPassedThrough(t *testing.T) {
	for _, tt := range []struct {
		name   string
		blob   registrytest.Blob
		header string
		fault  registrytest.Fault
		status int
		from   int
		detail string
	}{
		{name: "large", blob: bigLayer, status: 200, detail: "not-stored"},
		{name: "small", blob: smallLayer, status: 200, detail: "not-stored"},
		{name: "large, unknown size", blob: bigLayer, fault: unsized, status: 200, detail: "not-stored"},
		{name: "small, unknown size", blob: smallLayer, fault: unsized, status: 200, detail: "not-stored"},
		{name: "slow", blob: bigLayer, fault: slowly, status: 200, detail: "not-stored"},
		{name: "a range", blob: bigLayer, header: "Range: bytes=500000-", status: 206, from: 500000, detail: "unverified"},
		{name: "all of it as a range", blob: bigLayer, header: "Range: bytes=0-", status: 206, detail: "not-stored"},
		{name: "the last bytes", blob: bigLayer, header: "Range: bytes=-10", status: 200, detail: "not-stored"},
		{name: "two ranges", blob: bigLayer, header: "Range: bytes=0-1,5-6", status: 200, detail: "not-stored"},
		{name: "a range under a condition", blob: bigLayer, header: "Range: bytes=5-\nIf-Range: \"x\"", status: 200, detail: "not-stored"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			bubble(t, oneUpstream, func(r *rig) {
				r.quay.PutBlob("org/app", tt.blob.Bytes)
				if tt.fault != nil {
					r.quay.Fault(blobs, tt.fault)
				}
				r.lose()
				var header []string
				if tt.header != "" {
					header = strings.Split(tt.header, "\n")
				}
				r.get(blobPath(tt.blob), header...).want(r, tt.status).is(r, tt.blob.Bytes[tt.from:]).passes(r, tt.detail)
				if r.store.Trouble() == nil {
					r.Error("the store says that it can write")
				}
			})
		})
	}
	bubble(t, oneUpstream, func(r *rig) {
		r.quay.PutBlob("org/app", bigLayer.Bytes)
		r.lose()
		r.get(blobPath(bigLayer), "Range: bytes=10-19").want(r, 206).is(r, bigLayer.Bytes[10:20]).passes(r, "unverified")
		r.get(blobPath(bigLayer), "Range: bytes=0-19").want(r, 206).is(r, bigLayer.Bytes[:20]).passes(r, "unverified")
		if got := r.get(blobPath(bigLayer), "Range: bytes=1048576-"); got.StatusCode != 416 || got.code() != "RANGE_INVALID" {
			r.Errorf("behind the end: %d %s", got.StatusCode, got.body)
		}
		r.get(blobPath(bigLayer), `If-None-Match: "`+bigLayer.Digest.String()+`"`).want(r, 304)
		r.quay.Forget()
		r.do(http.MethodHead, blobPath(bigLayer)).want(r, 200)
		if n := r.quay.Count(gets); n > 0 {
			r.Errorf("HEAD has cost %d GETs", n)
		}
		r.get(app+"/blobs/"+unknown).want(r, 404)
		r.quay.Fault(all, registrytest.Status(503))
		if got := r.get(blobPath(smallLayer)); got.StatusCode != 503 || got.code() != "UNAVAILABLE" || !strings.Contains(string(got.body), "quay.test") {
			r.Errorf("upstream out: %d %s", got.StatusCode, got.body)
		}
	})
}

// F22 for what is passed through: nobody can take it for whole either.
func TestPassedThroughWrong(t *testing.T) {
	for _, tt := range []struct {
		name   string
		blob   registrytest.Blob
		faults []registrytest.Fault
		status string
	}{
		{"first byte", bigLayer, []registrytest.Fault{registrytest.FlipBit(0)}, "200"},
		{"last byte", bigLayer, []registrytest.Fault{registrytest.FlipBit(1<<20 - 1)}, "200"},
		{"unknown size", bigLayer, []registrytest.Fault{unsized, registrytest.FlipBit(0)}, "200"},
		{"small", smallLayer, []registrytest.Fault{registrytest.FlipBit(0)}, "503"},
		{"small, unknown size", smallLayer, []registrytest.Fault{unsized, registrytest.FlipBit(0)}, "503"},
		{"longer, unknown size", smallLayer, []registrytest.Fault{unsized, registrytest.Resize(1)}, "503"},
		{"broken off for good", bigLayer, []registrytest.Fault{registrytest.After(1, registrytest.Status(500)), registrytest.Truncate(broken)}, "200"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			bubble(t, oneUpstream, func(r *rig) {
				r.quay.PutBlob("org/app", tt.blob.Bytes)
				r.lose()
				lies := append([]registrytest.Fault{slowly}, tt.faults...)
				if tt.name == "broken off for good" {
					r.get(blobPath(tt.blob)).want(r, 200) // from now on it is passed through without a fill
				}
				match := blobs
				if tt.name == "broken off for good" {
					match = gets
				}
				r.quay.Fault(match, lies...)
				head, body, err := r.raw(http.MethodGet, blobPath(tt.blob))
				if !strings.HasPrefix(head, "HTTP/1.1 "+tt.status) {
					r.Fatalf("%s\n%s", head, body)
				}
				if tt.status == "200" {
					r.wantShort(head, body, err, tt.blob.Bytes)
				}
				if chunks := len(tt.blob.Bytes) / 1000; tt.status == "200" && len(body) > len(tt.blob.Bytes)-end+chunks {
					r.Errorf("%d bytes, of which some should have been withheld", len(body))
				}
				if tt.name == "broken off for good" {
					return
				}
				r.quay.Heal()
				time.Sleep(time.Minute)
				r.quay.Forget()
				r.get(blobPath(tt.blob)).want(r, 503)
				if n := r.asked(); n > 0 {
					r.Error("asked again for what it has lied about")
				}
			})
		})
	}
	t.Run("another source", func(t *testing.T) {
		several(t, 2, "", func(r *rig, ups []*registrytest.Registry) {
			for _, up := range ups {
				up.PutBlob("org/app", smallLayer.Bytes)
			}
			ups[0].Fault(gets, registrytest.FlipBit(0))
			r.lose()
			r.get(blobPath(smallLayer)).want(r, 200).is(r, smallLayer.Bytes).passes(r, "not-stored")
		})
	})
}

// What is passed through breaks off and goes on as a fill does: one unbroken answer.
func TestPassedThroughUnbroken(t *testing.T) {
	for name, fault := range map[string]registrytest.Fault{
		"cut": registrytest.Truncate(broken), "reset": registrytest.Reset(broken), "stall": registrytest.Stall(broken),
	} {
		for n := 1; n <= 2; n++ {
			t.Run(fmt.Sprintf("%s, %d upstreams", name, n), func(t *testing.T) {
				several(t, n, "", func(r *rig, ups []*registrytest.Registry) {
					for _, up := range ups {
						up.PutBlob("org/app", bigLayer.Bytes)
					}
					r.lose()
					r.get(blobPath(bigLayer)).want(r, 200) // from now on it is passed through without a fill
					r.quay.Forget()
					r.quay.Fault(gets, registrytest.First(1, fault))
					r.get(blobPath(bigLayer)).want(r, 200).is(r, bigLayer.Bytes).passes(r, "not-stored")
					if got := ranges(ups[n-1]); got[len(got)-1] != from(broken) {
						r.Errorf("%q at the last, want it to go on from %d", got, broken)
					}
				})
			})
		}
	}
}

// A client that is slow is no fault of the upstream's, and no reason to ask another.
func TestPassedThroughToASlowClient(t *testing.T) {
	several(t, 2, "", func(r *rig, ups []*registrytest.Registry) {
		raw := registrytest.Layer(1, 4<<20)
		for _, up := range ups {
			up.PutBlob("org/app", raw)
		}
		blob := registrytest.NewImage(raw).Blobs[1]
		r.lose()
		r.get(blobPath(blob)).want(r, 200) // from now on it is passed through without a fill
		r.quay.Forget()
		conn, err := r.network.DialContext(r.Context(), "tcp", "localhost:5000")
		if err != nil {
			r.Fatal(err)
		}
		defer conn.Close()
		if _, err := fmt.Fprintf(conn, "GET %s HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n", blobPath(blob)); err != nil {
			r.Fatal(err)
		}
		var got []byte
		buf := make([]byte, 32<<10)
		for began := time.Now(); time.Since(began) < 5*time.Minute; time.Sleep(30 * time.Second) {
			n, err := io.ReadFull(conn, buf)
			if err != nil {
				r.Fatalf("after %v: %v", time.Since(began), err)
			}
			got = append(got, buf[:n]...)
		}
		rest, err := io.ReadAll(conn)
		if _, body, _ := strings.Cut(string(append(got, rest...)), "\r\n\r\n"); err != nil || body != string(raw) {
			r.Errorf("%d bytes, %v", len(body), err)
		}
		r.wantRanges(ups, []string{""}, nil)
		for _, h := range r.mirror.pool.Clients("quay.test")[0].Health() {
			if h.Failed > 0 || h.State != "closed" {
				r.Errorf("held against the upstream: %+v", h)
			}
		}
	})
}

// Who leaves does not keep a connection upstream.
func TestPassedThroughUntilTheClientLeaves(t *testing.T) {
	bubble(t, oneUpstream, func(r *rig) {
		r.quay.PutBlob("org/app", bigLayer.Bytes)
		r.lose()
		r.get(blobPath(bigLayer)).want(r, 200) // from now on it is passed through without a fill
		r.quay.Forget()
		r.quay.Fault(gets, registrytest.Stall(broken))
		ctx, leave := context.WithCancel(r.Context())
		defer leave()
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://localhost:5000"+blobPath(bigLayer), nil)
		if err != nil {
			r.Fatal(err)
		}
		resp, err := r.client.Do(req)
		if err != nil {
			r.Fatal(err)
		}
		read := make(chan error)
		go func() {
			_, err := io.Copy(io.Discard, resp.Body)
			read <- errors.Join(err, resp.Body.Close())
		}()
		time.Sleep(time.Second)
		leave()
		<-read
		time.Sleep(time.Second)
		if requests := r.quay.Requests(gets); len(requests) != 1 || requests[0].End.IsZero() {
			r.Errorf("upstream: %+v", requests)
		}
	})
}

// What is private stays so: each is passed through from where it has been asked for.
func TestPassedThroughPrivately(t *testing.T) {
	private(t, withAccount, func(r *rig) {
		r.quay.Push("org/app", "newer", newerImage)
		layer := newerImage.Blobs[1]
		r.lose()
		for range 2 {
			r.get(theirs+"/blobs/"+layer.Digest.String()).want(r, 200).is(r, layer.Bytes).passes(r, "not-stored")
			for _, header := range [][]string{nil, {"Range: bytes=10-"}} {
				for _, repo := range []string{other, nobody} {
					if got := r.get(repo+"/blobs/"+layer.Digest.String(), header...); got.StatusCode != 404 {
						r.Errorf("%s: %d, %d bytes", repo, got.StatusCode, len(got.body))
					}
				}
			}
		}
		r.get(theirs+"/manifests/newer").want(r, 200)
		for _, repo := range []string{other, nobody} {
			if got := r.get(repo + "/manifests/" + newerImage.Digest().String()); got.StatusCode == 200 {
				r.Errorf("%s: the manifest in memory", repo)
			}
		}
	})
}

// F49: however many come at once, the disk is tried once, and each of them is served.
func TestF49AllAtOnce(t *testing.T) {
	bubble(t, oneUpstream, func(r *rig) {
		r.quay.PutBlob("org/app", bigLayer.Bytes)
		r.quay.Fault(blobs, slowly)
		r.lose()
		var clients sync.WaitGroup
		for range 32 {
			clients.Go(func() { r.get(blobPath(bigLayer)).want(r, 200).is(r, bigLayer.Bytes) })
		}
		clients.Wait()
		if n := r.store.Errors()["create"]; n != 1 {
			r.Errorf("the disk was tried %d times", n)
		}
		if n := r.quay.Count(gets); n != 33 {
			r.Errorf("%d GETs upstream, want one of the fill and one a client", n)
		}
		time.Sleep(untakenFor + time.Second)
		r.get(blobPath(bigLayer)).want(r, 200)
		if n := r.store.Errors()["create"]; n != 2 {
			r.Errorf("later the disk was tried %d times", n-1)
		}
	})
}

// F49: a disk that fails in the middle ends the bodies short; who comes back for the rest has it from
// upstream. Later the blob is stored.
func TestF49DiskFailsInTheMiddle(t *testing.T) {
	bubble(t, oneUpstream, func(r *rig) {
		r.quay.PutBlob("org/app", bigLayer.Bytes)
		r.quay.Fault(blobs, registrytest.First(1, registrytest.Drip(80<<10, 10*time.Millisecond)))
		begun := make(chan answer)
		for range 4 {
			go func() { begun <- r.get(blobPath(bigLayer)) }()
		}
		time.Sleep(45 * time.Millisecond)
		synctest.Wait()
		r.replace("tmp", "/dev/full")
		r.quay.Forget()
		for range 4 {
			got := <-begun
			if got.StatusCode != 200 || got.err == nil || len(got.body) < 80<<10 || len(got.body) > 500<<10 {
				r.Fatalf("%d, %v, %d bytes", got.StatusCode, got.err, len(got.body))
			}
			rest := r.get(blobPath(bigLayer), "Range: "+from(len(got.body))).want(r, 206).passes(r, "unverified")
			rest.body = append(got.body, rest.body...)
			rest.is(r, bigLayer.Bytes)
		}
		if n := r.quay.Count(gets); n != 4 {
			r.Errorf("%d GETs for four rests", n)
		}
		r.get(blobPath(bigLayer)).want(r, 200).is(r, bigLayer.Bytes).passes(r, "not-stored")
		time.Sleep(untakenPartsFor + time.Second)
		if got := r.get(blobPath(bigLayer)).want(r, 200).is(r, bigLayer.Bytes); got.Header.Get("Cache-Status") != cacheFetched {
			r.Errorf("then: %s", got.Header.Get("Cache-Status"))
		}
		synctest.Wait()
		if !r.holds(bigLayer.Digest) || r.store.Trouble() != nil {
			r.Errorf("stored: %v, %v", r.holds(bigLayer.Digest), r.store.Trouble())
		}
	})
}

// F51: what upstream says is answered, though it cannot be noted; in an outage what could be noted is.
func TestF51Answered(t *testing.T) {
	bubble(t, oneUpstream, func(r *rig) {
		r.quay.Push("org/app", "latest", storedImage)
		r.pull("latest", storedImage)
		r.get(app+"/tags/list").want(r, 200)
		time.Sleep(age)
		r.lose()
		r.quay.Push("org/app", "latest", newerImage)
		r.quay.Push("org/app", "other", newerImage)
		r.quay.Forget()
		for range 2 {
			r.get(app+"/manifests/latest").want(r, 200).fresh(r).is(r, newerImage.Raw)
			r.get(app+"/manifests/"+newerImage.Digest().String()).want(r, 200).fresh(r).is(r, newerImage.Raw)
			if got := r.get(app+"/tags/list").want(r, 200).fresh(r); !strings.Contains(string(got.body), "other") {
				r.Errorf("%s", got.body)
			}
		}
		if n := r.quay.Count(registrytest.Match{Method: http.MethodGet, Kind: registrytest.KindManifest}); n != 1 {
			r.Errorf("%d GETs of a manifest that is in memory", n)
		}
		r.quay.Fault(all, registrytest.Status(503))
		r.get(app+"/manifests/latest").want(r, 200).stale(r, "600").is(r, storedImage.Raw)
		if got := r.get(app+"/tags/list").want(r, 200).stale(r, "600"); strings.Contains(string(got.body), "other") {
			r.Errorf("%s", got.body)
		}
	})
}

// F53: a stored blob that cannot be read ends short, and is then had anew.
func TestF53Unreadable(t *testing.T) {
	image := registrytest.NewImage(registrytest.Layer(53, 4<<20))
	blob := image.Blobs[1]
	bubble(t, oneUpstream, func(r *rig) {
		r.quay.Push("org/app", "latest", image)
		r.pull("latest", image)
		req, err := http.NewRequest(http.MethodGet, "http://localhost:5000"+blobPath(blob), nil)
		if err != nil {
			r.Fatal(err)
		}
		resp, err := r.client.Do(req)
		if err != nil {
			r.Fatal(err)
		}
		synctest.Wait() // it waits for the client to read
		r.replace("blobs", "/proc/self/mem")
		if body, err := io.ReadAll(resp.Body); err == nil || len(body) >= len(blob.Bytes) {
			r.Errorf("%d bytes, %v", len(body), err)
		}
		_ = resp.Body.Close()
		synctest.Wait()
		if r.holds(blob.Digest) || r.store.Errors()["read"] != 1 {
			r.Errorf("not quarantined; %v", r.store.Errors())
		}
		if got := r.get(blobPath(blob)).want(r, 200).is(r, blob.Bytes); got.Header.Get("Cache-Status") != cacheFetched {
			r.Errorf("then: %s", got.Header.Get("Cache-Status"))
		}
		synctest.Wait()
		if got := r.get(blobPath(blob)).want(r, 200).is(r, blob.Bytes); got.Header.Get("Cache-Status") != cacheHit {
			r.Errorf("at last: %s", got.Header.Get("Cache-Status"))
		}
	})
}

// F58: who would hold one thread more than there may be waits for at most 10 s.
func TestF58NoMoreThreads(t *testing.T) {
	for name, of := range map[string]func(*Mirror) slots{
		"sent":           func(m *Mirror) slots { return m.sending },
		"passed through": func(m *Mirror) slots { return m.passing },
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, oneUpstream, func(r *rig) {
				r.quay.Push("org/app", "latest", storedImage)
				r.pull("latest", storedImage)
				blob := storedImage.Blobs[1]
				if name == "passed through" {
					blob = bigLayer
					r.quay.PutBlob("org/app", blob.Bytes)
					r.lose()
				}
				all := of(r.mirror)
				for range cap(all) {
					all <- struct{}{}
				}
				got := r.get(blobPath(blob))
				if got.StatusCode != 503 || got.code() != "UNAVAILABLE" || got.took != headerBudget || got.Header.Get("Retry-After") == "" {
					r.Errorf("%d after %v, %v, %s", got.StatusCode, got.took, got.Header, got.body)
				}
				time.AfterFunc(headerBudget/2, all.leave)
				if got := r.get(blobPath(blob)).want(r, 200).is(r, blob.Bytes); got.took != headerBudget/2 {
					r.Errorf("after %v", got.took)
				}
			})
		})
	}
}
