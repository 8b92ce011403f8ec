package proxy

import (
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"breakwater/pkg/registrytest"
	"breakwater/storage"
)

// well is the count of a disk that does not fail.
const well = -1 << 40

// nth makes the Nth call of the file system fail, once.
type nth struct {
	n     atomic.Int64 // calls so far, or well
	fails int64
	with  func() error
}

func (f *nth) call(string, string) error {
	if f.n.Load() >= 0 && f.n.Add(1) == f.fails {
		return f.with()
	}
	return nil
}

// fired reports whether a call has failed.
func (f *nth) fired() bool { return f.n.Load() >= f.fails }

// A fixed piece of work with the Nth call of the file system failing, for N = 1, 2, 3 … until none fails any
// more: what the network can give is given, nothing wrong is served or stored, what was a hit is one after
// a restart with the upstream out, and no record points at a manifest that is not stored.
func TestF48F49F51F53NthCallFails(t *testing.T) {
	image := registrytest.NewImage(registrytest.Layer(9, 100<<10), registrytest.Layer(10, 3<<20))
	newer := image.Annotated("newer", "yes")
	for i, tt := range []struct {
		name string
		with func() error
	}{
		{"EIO", func() error { return syscall.EIO }},
		{"ENOSPC", func() error { return syscall.ENOSPC }},
		{"EMFILE", func() error { return syscall.EMFILE }},
		{"short write", func() error { return io.ErrShortWrite }},
		{"panic", func() error { panic(errors.New("scripted")) }},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			// In CI every fifth call fails, in one of the ways; with FAULTS=full each one in all of them.
			first, step, most := int64(1+5*i), int64(25), int64(0)
			if os.Getenv("FAULTS") == "full" {
				first, step = 1, 1
			}
			for n := first; ; n += step {
				fault := &nth{fails: n, with: tt.with}
				fault.n.Store(well)
				var fired bool
				bubbleOn(t, storage.Config{Fault: fault.call}, oneUpstream, func(r *rig) {
					fired = r.nthFails(fault, tt.name == "panic", image, newer)
				})
				if t.Failed() {
					t.Fatalf("call %d", n)
				}
				if !fired {
					break
				}
				most = n
			}
			t.Logf("up to call %d of the file system has failed", most)
			if most < 50 {
				t.Errorf("only %d calls were there to fail", most)
			}
		})
	}
}

// panicking says that a failing call does not return.
type panicking bool

// nthFails does the work, and reports whether a call has failed in it.
func (r *rig) nthFails(fault *nth, panics panicking, image, newer registrytest.Image) bool {
	fault.n.Store(0)
	hits := map[string][]byte{}
	var mu sync.Mutex // guards hits
	ask := func(path string, want []byte) {
		for try := 0; ; try++ {
			got := r.get(app + path)
			whole := got.err == nil && got.StatusCode == http.StatusOK
			if whole && bool(panics) && try < 3 && got.Header.Get("Warning") != "" {
				continue // the question has panicked: the stored answer, marked stale
			}
			if whole && string(got.body) != string(want) {
				r.Errorf("%s: %d bytes, wrong", path, len(got.body))
			}
			if whole {
				if strings.Contains(got.Header.Get("Cache-Status"), "breakwater; hit") {
					mu.Lock()
					hits[path] = want
					mu.Unlock()
				}
				return
			}
			if got.err != nil && try < 3 && len(got.body) < len(want) && string(got.body) == string(want[:len(got.body)]) {
				rest := r.get(app+path, fmt.Sprintf("Range: bytes=%d-", len(got.body))) // as every client does
				if rest.err == nil && rest.StatusCode == http.StatusPartialContent && string(rest.body) == string(want[len(got.body):]) {
					return
				}
				continue
			}
			if got.StatusCode == http.StatusInternalServerError && try < 3 && bool(panics) {
				continue // logged, and the next one is served
			}
			r.Errorf("%s: %d, %v: %.200q", path, got.StatusCode, got.err, got.body)
			return
		}
	}
	for _, pushed := range []registrytest.Image{image, newer} {
		r.quay.Push("org/app", "latest", pushed)
		for range 2 {
			ask("/manifests/latest", pushed.Raw)
			ask("/manifests/"+pushed.Digest().String(), pushed.Raw)
			var clients sync.WaitGroup
			for _, blob := range pushed.Blobs {
				for range 2 {
					clients.Go(func() { ask("/blobs/"+blob.Digest.String(), blob.Bytes) })
				}
			}
			clients.Wait()
			synctest.Wait()
			time.Sleep(90 * time.Second) // what is written behind is
			synctest.Wait()
		}
	}
	fired := fault.fired()
	fault.n.Store(well)
	r.quay.Fault(registrytest.Match{}, registrytest.Status(503))
	r.untidy = bool(panics) // what a panic leaves is swept at the next start
	r.stop()
	r.untidy = false
	r.start(oneUpstream)
	for path, want := range hits {
		if got := r.get(app + path); strings.HasPrefix(path, "/manifests/latest") {
			if got.StatusCode != 200 || got.code() == "" && string(got.body) != string(image.Raw) && string(got.body) != string(newer.Raw) {
				r.Errorf("%s was a hit, and is %d after a restart", path, got.StatusCode)
			}
		} else if got.StatusCode != 200 || string(got.body) != string(want) {
			r.Errorf("%s was a hit, and is %d after a restart", path, got.StatusCode)
		}
	}
	if tag, err := r.store.Tag(r.repository("org/app"), "latest"); err == nil {
		if _, err := r.store.Manifest(r.repository("org/app"), tag.Current.Digest); err != nil {
			r.Errorf("the record points at a manifest that is not stored: %v", err)
		}
	}
	return fired
}
