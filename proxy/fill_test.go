package proxy

import (
	"fmt"
	"io"
	"net"
	"net/http"
	"path/filepath"
	"strings"
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
				if n := r.quay.Count(gets); n > 1+maxBreaks {
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
				if name == "over the capacity" { // passed through
					r.wantShort(head, body, err, make([]byte, capacity+1))
				} else {
					r.wantShort(head, body, err, smallLayer.Bytes)
				}
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
