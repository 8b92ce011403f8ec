package proxy

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"breakwater/pkg/registrytest"
)

// A Range of a blob on its way is answered as soon as its bytes are there, from the same download.
func TestRangeInFlight(t *testing.T) {
	const arrived = 512 << 10
	bubble(t, oneUpstream, func(r *rig) {
		r.quay.PutBlob("org/app", bigLayer.Bytes)
		heal := r.quay.Fault(gets, registrytest.First(1, registrytest.Stall(arrived)))
		var clients sync.WaitGroup
		clients.Go(func() { r.get(blobPath(bigLayer)).want(r, 200).is(r, bigLayer.Bytes) })
		synctest.Wait()
		for _, tt := range []struct{ header, contentRange string }{
			{"bytes=0-0", "bytes 0-0/1048576"},
			{"bytes=1000-299999", "bytes 1000-299999/1048576"},
			{fmt.Sprintf("bytes=0-%d", arrived-1), fmt.Sprintf("bytes 0-%d/1048576", arrived-1)},
		} {
			got := r.get(blobPath(bigLayer), "Range: "+tt.header).want(r, 206)
			if got.took > 0 || got.Header.Get("Content-Range") != tt.contentRange {
				r.Errorf("%s: Content-Range %q after %v", tt.header, got.Header.Get("Content-Range"), got.took)
			}
			var first, last int
			_, _ = fmt.Sscanf(tt.header, "bytes=%d-%d", &first, &last)
			got.is(r, bigLayer.Bytes[first:last+1])
		}
		if got := r.get(blobPath(bigLayer), "Range: bytes=2000000-").want(r, 416); got.code() != "RANGE_INVALID" || got.Header.Get("Content-Range") != "bytes */1048576" {
			r.Errorf("%v %s", got.Header, got.body)
		}
		r.get(blobPath(bigLayer), `If-None-Match: "`+bigLayer.Digest.String()+`"`).want(r, 304)
		if got := r.do(http.MethodHead, blobPath(bigLayer)).want(r, 200); got.ContentLength != bigLayer.Size {
			r.Errorf("HEAD: Content-Length %d", got.ContentLength)
		}
		for _, header := range []string{fmt.Sprintf("bytes=%d-", arrived), "bytes=-100", fmt.Sprintf("bytes=%d-%d", arrived-10, arrived+10)} {
			clients.Go(func() {
				got := r.get(blobPath(bigLayer), "Range: "+header).want(r, 206)
				if got.took > 0 {
					r.Errorf("%s: no header for %v", header, got.took)
				}
				if !bytes.Contains(bigLayer.Bytes, got.body) || int64(len(got.body)) != got.ContentLength {
					r.Errorf("%s: %d wrong bytes", header, len(got.body))
				}
			})
		}
		time.Sleep(5 * time.Second)
		heal()
		clients.Wait()
		if n := r.quay.Count(gets); n != 1 {
			r.Errorf("%d GETs upstream, want 1", n)
		}
	})
}

// What has arrived is sent, though no more of it comes: not held in a buffer until it is full.
func TestFirstByteAtOnce(t *testing.T) {
	for name, faults := range map[string][]registrytest.Fault{"sized": nil, "chunked": {unsized}} {
		bubble(t, oneUpstream, func(r *rig) {
			r.quay.PutBlob("org/app", bigLayer.Bytes)
			r.quay.Fault(blobs, append(faults, registrytest.Stall(end+100))...)
			req, err := http.NewRequest(http.MethodGet, "http://localhost:5000"+blobPath(bigLayer), nil)
			if err != nil {
				r.Fatal(err)
			}
			began := time.Now()
			resp, err := r.client.Do(req)
			if err != nil {
				r.Fatal(err)
			}
			defer resp.Body.Close()
			first := make([]byte, 100)
			if _, err := io.ReadFull(resp.Body, first); err != nil || !bytes.Equal(first, bigLayer.Bytes[:100]) {
				r.Errorf("%s: %v", name, err)
			}
			if took := time.Since(began); took > 0 {
				r.Errorf("%s: what arrived at once came after %v", name, took)
			}
		})
	}
}

func TestF34Herd(t *testing.T) {
	bubble(t, oneUpstream, func(r *rig) {
		r.quay.PutBlob("org/app", bigLayer.Bytes)
		r.quay.Fault(blobs, registrytest.Drip(128<<10, 100*time.Millisecond))
		var clients sync.WaitGroup
		for i := range 64 {
			clients.Go(func() {
				time.Sleep(time.Duration(i) * 10 * time.Millisecond)
				if got := r.get(blobPath(bigLayer)).want(r, 200).is(r, bigLayer.Bytes); got.took > 0 {
					r.Errorf("client %d waited %v for its first byte", i, got.took)
				}
			})
		}
		clients.Wait()
		if n := r.asked(); n != 1 {
			r.Errorf("%d requests upstream, want 1", n)
		}
	})
}

// read asks for a blob, reads n bytes of it, and hangs up.
func (r *rig) read(path string, n int64) {
	r.Helper()
	ctx, cancel := context.WithCancel(r.Context())
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://localhost:5000"+path, nil)
	if err != nil {
		r.Fatal(err)
	}
	resp, err := r.client.Do(req)
	if err != nil {
		r.Fatal(err)
	}
	defer resp.Body.Close()
	if _, err := io.CopyN(io.Discard, resp.Body, n); err != nil {
		r.Errorf("%s: %v", path, err)
	}
}

func TestF35LeaderLeaves(t *testing.T) {
	for _, followers := range []int{50, 0} {
		bubble(t, oneUpstream, func(r *rig) {
			r.quay.PutBlob("org/app", bigLayer.Bytes)
			r.quay.Fault(blobs, registrytest.Drip(128<<10, time.Second))
			var clients sync.WaitGroup
			clients.Go(func() { r.read(blobPath(bigLayer), bigLayer.Size/10) })
			synctest.Wait()
			for range followers {
				clients.Go(func() { r.get(blobPath(bigLayer)).want(r, 200).is(r, bigLayer.Bytes) })
			}
			clients.Wait()
			time.Sleep(10 * time.Second)
			synctest.Wait()
			if n := r.asked(); n != 1 || !r.holds(bigLayer.Digest) {
				r.Errorf("with %d followers: %d requests upstream, stored: %v", followers, n, r.holds(bigLayer.Digest))
			}
		})
	}
}

// panics on one message of a log, on the goroutine that logs it.
type panics struct {
	slog.Handler
	message string
}

func (p panics) Handle(_ context.Context, record slog.Record) error {
	if record.Message == p.message {
		panic(errors.New("scripted"))
	}
	return nil
}

func (panics) Enabled(context.Context, slog.Level) bool { return true }

func TestF36LeaderFails(t *testing.T) {
	for _, tt := range []struct{ name, path, panics string }{
		{name: "blob", path: blobPath(bigLayer)},
		{name: "manifest", path: app + "/manifests/" + bigLayer.Digest.String()},
		{name: "tag", path: app + "/manifests/latest"},
		{name: "panic", path: blobPath(bigLayer), panics: "fill failed"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			bubble(t, oneUpstream, func(r *rig) {
				r.mirror.logger = slog.New(panics{slog.DiscardHandler, tt.panics})
				r.quay.PutBlob("org/app", bigLayer.Bytes)
				r.quay.Fault(all, registrytest.Delay(time.Second), registrytest.Status(500))
				answers := make([]answer, 50)
				var clients sync.WaitGroup
				for i := range answers {
					clients.Go(func() { answers[i] = r.get(tt.path).want(r, 503) })
				}
				clients.Wait()
				for _, got := range answers {
					if got.took > 2*time.Second+retryPause {
						r.Errorf("waited for %v", got.took)
					}
					if got.is(r, answers[0].body); tt.panics == "" && !strings.Contains(string(got.body), "answered 500") {
						r.Errorf("does not say why: %s", got.body)
					}
				}
				if r.asked() != 2 { // the second try is all waiters' too
					r.Errorf("%d requests upstream, want 2", r.asked())
				}
				r.quay.Heal()
				time.Sleep(time.Minute)
				if tt.name == "blob" || tt.name == "panic" {
					r.get(tt.path).want(r, 200).is(r, bigLayer.Bytes)
				}
			})
		})
	}
}

func TestF63Close(t *testing.T) {
	for _, tt := range []struct {
		name  string
		fault registrytest.Fault
		whole bool
		took  time.Duration
	}{
		{"slow", registrytest.Drip(128<<10, time.Second), true, 7 * time.Second},
		{"stalled", registrytest.Stall(300 << 10), false, 10 * time.Second},
	} {
		bubble(t, oneUpstream, func(r *rig) {
			r.quay.PutBlob("org/app", bigLayer.Bytes)
			r.quay.Fault(blobs, tt.fault)
			var clients sync.WaitGroup
			for range 20 {
				clients.Go(func() {
					head, body, err := r.raw(http.MethodGet, blobPath(bigLayer))
					if !tt.whole {
						r.wantShort(head, body, err, bigLayer.Bytes)
					} else if body != string(bigLayer.Bytes) {
						r.Errorf("%d bytes", len(body))
					}
				})
			}
			synctest.Wait()
			began := time.Now()
			ctx, cancel := context.WithTimeout(r.Context(), 10*time.Second)
			defer cancel()
			clients.Go(func() {
				time.Sleep(time.Second)
				r.get(app+"/manifests/other").want(r, 503) // no new task is begun
			})
			r.mirror.Close(ctx)
			if left, err := os.ReadDir(filepath.Join(r.dir, "data", "tmp")); err != nil || len(left) > 0 || r.holds(bigLayer.Digest) != tt.whole {
				r.Errorf("%s: left in tmp: %v, %v; stored: %v", tt.name, left, err, !tt.whole)
			}
			if took := time.Since(began); took != tt.took {
				r.Errorf("%s: closed after %v, want %v", tt.name, took, tt.took)
			}
			clients.Wait()
		})
	}
}

// A client may be as slow as it likes, but must take something now and then.
func TestF65SlowClient(t *testing.T) {
	for name, stored := range map[string]func(*rig){
		"hit":  func(r *rig) { r.get(blobPath(bigLayer)); synctest.Wait() },
		"miss": func(*rig) {},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			bubble(t, oneUpstream, func(r *rig) {
				r.quay.PutBlob("org/app", bigLayer.Bytes)
				stored(r)
				ask := func() net.Conn {
					conn, err := r.network.DialContext(r.Context(), "tcp", "localhost:5000")
					if err != nil {
						r.Fatal(err)
					}
					_, _ = fmt.Fprintf(conn, "GET %s HTTP/1.1\r\nHost: localhost\r\n\r\n", blobPath(bigLayer))
					return conn
				}
				slow, silent := ask(), ask()
				defer slow.Close()
				defer silent.Close()
				var got []byte
				for took := []byte{0}; len(got) < 1000; got = append(got, took...) {
					if _, err := io.ReadFull(slow, took); err != nil {
						r.Fatalf("cut after %d bytes, one each 30 s: %v", len(got), err)
					}
					time.Sleep(30 * time.Second)
				}
				head, _, _ := bytes.Cut(got, []byte("\r\n\r\n"))
				rest := make([]byte, len(head)+len("\r\n\r\n")+len(bigLayer.Bytes)-len(got))
				if _, err := io.ReadFull(slow, rest); err != nil || !bytes.HasSuffix(append(got, rest...), bigLayer.Bytes) {
					r.Errorf("the rest of it: %v", err)
				}
				if late, _ := io.ReadAll(silent); len(late) > len(bigLayer.Bytes)/2 {
					r.Errorf("who took nothing for long got %d bytes after all", len(late))
				}
			})
		})
	}
}

// More fills than have room in memory wait for their turn; those of another registry have theirs.
func TestF59FillsTakeTurns(t *testing.T) {
	bubble(t, oneUpstream, func(r *rig) {
		hub := registrytest.New(registrytest.Config{})
		hub.Serve(r, r.network, "hub.test:80")
		other := hub.PutBlob("library/app", bigLayer.Bytes).String()
		var most, now atomic.Int64
		r.quay.Fault(gets, func(w http.ResponseWriter, req *http.Request, next http.Handler) {
			most.Store(max(most.Load(), now.Add(1)))
			defer now.Add(-1)
			time.Sleep(4 * time.Second)
			next.ServeHTTP(w, req)
		})
		var clients sync.WaitGroup
		for i := range maxFills + 20 {
			layer := registrytest.Layer(uint64(1000+i), 1<<10)
			dgst := r.quay.PutBlob("org/app", layer)
			clients.Go(func() {
				if got := r.serve(app + "/blobs/" + dgst.String()); got.StatusCode != 200 {
					r.Errorf("%s: %d", dgst, got.StatusCode)
				}
			})
		}
		time.Sleep(time.Second)
		if got := r.get("/v2/docker.io/app/blobs/"+other).want(r, 200); got.took > 0 {
			r.Errorf("another registry's blob waited for %v", got.took)
		}
		clients.Wait()
		if n := most.Load(); n != maxFills {
			r.Errorf("%d at a time, want %d", n, maxFills)
		}
	})
}

func TestF66ClientHangsUp(t *testing.T) {
	open := func() int {
		files, err := os.ReadDir("/proc/self/fd")
		if err != nil {
			t.Skip("no /proc to count descriptors in: ", err)
		}
		return len(files)
	}
	bubble(t, oneUpstream, func(r *rig) {
		other := registrytest.Layer(7, 1<<20)
		r.quay.PutBlob("org/app", bigLayer.Bytes)
		onItsWay := app + "/blobs/" + r.quay.PutBlob("org/app", other).String()
		r.get(blobPath(bigLayer)).want(r, 200)
		synctest.Wait()
		before := open()
		r.quay.Fault(blobs, registrytest.Drip(200<<10, time.Second))
		var clients sync.WaitGroup
		for range 20 {
			clients.Go(func() { r.read(blobPath(bigLayer), 64<<10) })
			clients.Go(func() { r.read(onItsWay, 64<<10) })
		}
		clients.Wait()
		time.Sleep(2 * time.Minute)
		synctest.Wait() // what is due then has files open for a moment
		if after := open(); after > before {
			r.Errorf("%d descriptors, %d before", after, before)
		}
		for _, h := range r.mirror.pool.All()[0].Health() {
			if h.Failed > 0 {
				r.Errorf("counts against the upstream: %+v", h)
			}
		}
	})
}
