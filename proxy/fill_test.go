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
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"breakwater/pkg/config"
	"breakwater/pkg/registrytest"
	"breakwater/storage"
)

// layers that these tests pull without the manifest that would tell their size.
var (
	bigLayer   = registrytest.NewImage(registrytest.Layer(4, 1<<20)).Blobs[1]
	smallLayer = registrytest.NewImage(registrytest.Layer(5, 10<<10)).Blobs[1]
)

const end = 64 << 10 // of a blob, withheld until all of it is verified

func blobPath(b registrytest.Blob) string { return app + "/blobs/" + b.Digest.String() }

// slowly gives the client time to be there before the end.
var slowly = registrytest.Drip(80<<10, 10*time.Millisecond)

// unsized takes the size away from whatever tells it.
var unsized = registrytest.Header("Content-Length", "")

func TestResume(t *testing.T) {
	const cut = 300 << 10
	for _, tt := range []struct {
		name  string
		fault registrytest.Fault
		took  time.Duration
	}{
		{"F20 ends early", registrytest.Truncate(cut), time.Second},
		{"F21 is reset", registrytest.Reset(cut), time.Second},
		{"F04 stalls", registrytest.Stall(cut), 20 * time.Second},
	} {
		for _, times := range []int{1, 2} {
			t.Run(fmt.Sprintf("%s, %d times", tt.name, times), func(t *testing.T) {
				t.Parallel()
				bubble(t, oneUpstream, func(r *rig) {
					r.quay.PutBlob("org/app", bigLayer.Bytes)
					r.quay.Fault(gets, registrytest.First(times, tt.fault))
					began := time.Now()
					r.get(blobPath(bigLayer)).want(r, 200).is(r, bigLayer.Bytes)
					if took, limit := time.Since(began), time.Duration(times)*tt.took; took > limit {
						r.Errorf("the client waited for %v, want at most %v", took, limit)
					}
					requests := r.quay.Requests(gets)
					if len(requests) != times+1 {
						r.Fatalf("%d GETs upstream, want %d", len(requests), times+1)
					}
					for i, request := range requests[1:] {
						if got, want := request.Header.Get("Range"), fmt.Sprintf("bytes=%d-", (i+1)*cut); got != want {
							r.Errorf("resumed with Range %q, want %q", got, want)
						}
					}
					synctest.Wait()
					if !r.holds(bigLayer.Digest) {
						r.Error("not stored")
					}
				})
			})
		}
	}
}

// What cannot be completed ends short of its Content-Length, or without its final chunk, by a clean
// close; nothing of it is stored, and the next request has all of it.
func TestF20NothingToResumeFrom(t *testing.T) {
	ranges := func(header ...string) registrytest.Fault { // makes all requests ask for this one
		return func(w http.ResponseWriter, req *http.Request, next http.Handler) {
			req.Header["Range"] = header
			next.ServeHTTP(w, req)
		}
	}
	for name, faults := range map[string][]registrytest.Fault{
		"cut":               {registrytest.Truncate(100 << 10)},
		"reset":             {registrytest.Reset(100 << 10)},
		"cut without sizes": {unsized, registrytest.Truncate(100 << 10)},
		"no ranges":         {ranges(), registrytest.Truncate(100 << 10)},
		"wrong range":       {registrytest.After(1, ranges("bytes=99999-")), registrytest.Truncate(100 << 10)},
		"then 500":          {registrytest.After(1, registrytest.Status(500)), registrytest.Truncate(100 << 10)},
		"stalls":            {registrytest.Stall(100 << 10)},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			bubble(t, oneUpstream, func(r *rig) {
				r.quay.PutBlob("org/app", bigLayer.Bytes)
				r.quay.Fault(blobs, append([]registrytest.Fault{slowly}, faults...)...)
				began := time.Now()
				head, body, err := r.raw(http.MethodGet, blobPath(bigLayer))
				r.wantShort(head, body, err, bigLayer.Bytes)
				if !strings.Contains(head, "chunked") && !strings.HasPrefix(string(bigLayer.Bytes), body) {
					r.Error("the bytes of another place were sent")
				}
				if took := time.Since(began); took > 100*time.Second {
					r.Errorf("given up after %v", took)
				}
				if n := r.quay.Count(gets); n > 1+maxResumes {
					r.Errorf("%d GETs upstream", n)
				}
				if r.holds(bigLayer.Digest) {
					r.Error("stored")
				}
				r.quay.Heal()
				time.Sleep(2 * time.Minute) // the reference is held off no longer
				r.get(blobPath(bigLayer)).want(r, 200).is(r, bigLayer.Bytes)
			})
		})
	}
}

// wantShort fails the test unless that is an answer which began well and which no client can take for
// a complete one.
func (r *rig) wantShort(head, body string, err error, whole []byte) {
	r.Helper()
	if err != nil {
		r.Errorf("ended by %v, want a clean close", err)
	}
	if !strings.HasPrefix(head, "HTTP/1.1 200 OK\r\n") {
		r.Fatalf("head %q", head)
	}
	if strings.Contains(head, "\r\nTransfer-Encoding: chunked") {
		if strings.HasSuffix(body, "0\r\n\r\n") {
			r.Error("has its final chunk")
		}
		return
	}
	if !strings.Contains(head, fmt.Sprintf("\r\nContent-Length: %d\r\n", len(whole))) || len(body) >= len(whole) {
		r.Errorf("%d bytes of %d: %q", len(body), len(whole), head)
	}
	if len(body) > len(whole)-end {
		r.Errorf("%d bytes of the %d that are withheld were let go", len(body)-len(whole)+end, end)
	}
}

func TestF22WrongBytes(t *testing.T) {
	for _, tt := range []struct {
		name   string
		blob   registrytest.Blob
		faults []registrytest.Fault
		status int
	}{
		{"first byte", bigLayer, []registrytest.Fault{registrytest.FlipBit(0)}, 200},
		{"last byte", bigLayer, []registrytest.Fault{registrytest.FlipBit(1<<20 - 1)}, 200},
		{"first byte, unknown size", bigLayer, []registrytest.Fault{unsized, registrytest.FlipBit(0)}, 200},
		{"last byte, unknown size", bigLayer, []registrytest.Fault{unsized, registrytest.FlipBit(1<<20 - 1)}, 200},
		{"small", smallLayer, []registrytest.Fault{registrytest.FlipBit(0)}, 503},
		{"small, unknown size", smallLayer, []registrytest.Fault{unsized, registrytest.FlipBit(0)}, 503},
		{"H27 longer", smallLayer, []registrytest.Fault{registrytest.Resize(1)}, 503},
		{"H27 longer, unknown size", smallLayer, []registrytest.Fault{unsized, registrytest.Resize(1)}, 503},
		{"H27 shorter", smallLayer, []registrytest.Fault{registrytest.Resize(-1)}, 503},
		{"H27 empty", smallLayer, []registrytest.Fault{registrytest.Resize(-10 << 10)}, 503},
		{"H28 compressed", smallLayer, []registrytest.Fault{registrytest.Header("Content-Encoding", "gzip"), registrytest.FlipBit(0)}, 503},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			bubble(t, oneUpstream, func(r *rig) {
				r.quay.PutBlob("org/app", tt.blob.Bytes)
				r.quay.Fault(blobs, append([]registrytest.Fault{slowly}, tt.faults...)...)
				head, body, err := r.raw(http.MethodGet, blobPath(tt.blob))
				if tt.status == 200 {
					r.wantShort(head, body, err, tt.blob.Bytes)
				} else if !strings.HasPrefix(head, "HTTP/1.1 503 ") || !strings.Contains(body, "UNAVAILABLE") {
					r.Errorf("%s\n%s", head, body)
				}
				synctest.Wait()
				if r.holds(tt.blob.Digest) {
					r.Error("stored")
				}
				if r.state("blob") != "closed" {
					r.Error("one lie has opened the breaker")
				}
				r.quay.Heal()
				time.Sleep(shunned - time.Minute)
				r.quay.Forget()
				r.get(blobPath(tt.blob)).want(r, 503)
				if r.asked() > 0 {
					r.Error("asked again for what it has lied about")
				}
				time.Sleep(2 * time.Minute)
				r.get(blobPath(tt.blob)).want(r, 200).is(r, tt.blob.Bytes)
			})
		})
	}
}

const shunned = 10 * time.Minute // as DESIGN 8 says

// The size that a manifest gives a blob holds against what upstream announces.
func TestH27AnnouncedSizeContradictsManifest(t *testing.T) {
	image := registrytest.NewImage(bigLayer.Bytes)
	for _, delta := range []int64{1, -1, -1 << 20} {
		bubble(t, oneUpstream, func(r *rig) {
			r.quay.Push("org/app", "latest", image)
			r.get(app+"/manifests/latest").want(r, 200)
			r.quay.Fault(gets, registrytest.Resize(delta))
			r.get(blobPath(image.Blobs[1])).want(r, 503) // before its first byte
		})
	}
}

// Real sockets: a cut answer must end with FIN, since a reset makes containerd fail the pull.
func TestCutIsNoReset(t *testing.T) {
	quay := registrytest.New(registrytest.Config{})
	quay.PutBlob("org/app", bigLayer.Bytes)
	store, err := storage.Open(storage.Config{Dir: filepath.Join(t.TempDir(), "data"), Capacity: capacity})
	if err != nil {
		t.Fatal(err)
	}
	mirror, err := New(Config{Store: store, Config: &config.Config{DefaultRegistry: "quay.test", Registries: map[string]config.Registry{
		"quay.test": {Upstreams: []config.Upstream{{URL: quay.Start(t).URL}}}}}})
	if err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	server := registrytest.Serve(l, mirror)
	defer func() {
		_ = server.Close()
		mirror.Close(t.Context())
		_ = store.Close()
	}()
	for name, faults := range map[string][]registrytest.Fault{"sized": {registrytest.FlipBit(0)}, "chunked": {unsized, registrytest.FlipBit(0)}} {
		t.Run(name, func(t *testing.T) {
			layer := registrytest.Layer(uint64(len(name)), 1<<20)
			dgst := quay.PutBlob("org/app", layer)
			defer quay.Fault(blobs, append([]registrytest.Fault{slowly}, faults...)...)()
			conn, err := net.Dial("tcp", l.Addr().String())
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			if _, err := fmt.Fprintf(conn, "GET %s/blobs/%s HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n", app, dgst); err != nil {
				t.Fatal(err)
			}
			raw, err := io.ReadAll(conn)
			head, body, _ := strings.Cut(string(raw), "\r\n\r\n")
			(&rig{T: t}).wantShort(head, body, err, layer)
		})
	}
}

func TestF75UnknownSize(t *testing.T) {
	for _, layer := range []registrytest.Blob{bigLayer, smallLayer} {
		bubble(t, oneUpstream, func(r *rig) {
			r.quay.PutBlob("org/app", layer.Bytes)
			r.quay.Fault(blobs, unsized)
			head := r.do(http.MethodHead, blobPath(layer)).want(r, 200)
			if head.ContentLength >= 0 || head.Header.Get("Docker-Content-Digest") != layer.Digest.String() {
				r.Errorf("HEAD: %v", head.Header)
			}
			got := r.get(blobPath(layer)).want(r, 200).is(r, layer.Bytes)
			if got.Header.Get("Docker-Content-Digest") != layer.Digest.String() {
				r.Errorf("GET: %v", got.Header)
			}
			synctest.Wait()
			r.quay.Forget()
			for _, method := range []string{http.MethodGet, http.MethodHead} {
				if got := r.do(method, blobPath(layer)).want(r, 200); got.ContentLength != layer.Size {
					r.Errorf("%s of it stored: Content-Length %d", method, got.ContentLength)
				}
			}
			if r.asked() > 0 {
				r.Error("it was not stored")
			}
		})
	}
}

func TestF75Endless(t *testing.T) {
	for name, faults := range map[string][]registrytest.Fault{
		"unknown size":      {registrytest.Endless()},
		"over the capacity": {registrytest.Header("Content-Length", "67108865")},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			bubble(t, oneUpstream, func(r *rig) {
				r.quay.PutBlob("org/app", smallLayer.Bytes)
				r.quay.Fault(blobs, faults...)
				head, body, err := r.raw(http.MethodGet, blobPath(smallLayer))
				if name == "over the capacity" {
					if !strings.HasPrefix(head, "HTTP/1.1 503 ") {
						r.Errorf("%s: begun, though it cannot end well", head)
					}
					return
				}
				r.wantShort(head, body, err, smallLayer.Bytes)
				if len(body) > capacity/10*11/10 {
					r.Errorf("%d bytes of it", len(body))
				}
				if r.holds(smallLayer.Digest) {
					r.Error("stored")
				}
			})
		})
	}
}

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
					if got.took > time.Second {
						r.Errorf("waited for %v", got.took)
					}
					if got.is(r, answers[0].body); tt.panics == "" && !strings.Contains(string(got.body), "answered 500") {
						r.Errorf("does not say why: %s", got.body)
					}
				}
				if r.asked() != 1 {
					r.Errorf("%d requests upstream, want 1", r.asked())
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
