package proxy

import (
	"context"
	"errors"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"testing"
	"testing/synctest"
	"time"

	"breakwater/pkg/oci"
	"breakwater/pkg/registrytest"
	"breakwater/storage"

	"github.com/opencontainers/go-digest"
)

// rot flips a bit of a stored file at rest: nothing else tells of it.
func (r *rig) rot(dgst digest.Digest, at int64) {
	r.Helper()
	name := filepath.Join(r.dir, "data", "blobs", dgst.Algorithm().String(), dgst.Encoded())
	info, err := os.Stat(name)
	if err != nil {
		r.Fatal(err)
	}
	raw, err := os.ReadFile(name)
	if err != nil {
		r.Fatal(err)
	}
	raw[at] ^= 1
	if err := errors.Join(os.WriteFile(name, raw, 0o600), os.Chtimes(name, info.ModTime(), info.ModTime())); err != nil {
		r.Fatal(err)
	}
}

// powerCut restarts the mirror as if nobody had stopped it, on a disk that has lost a bit.
func (r *rig) powerCut(dgst digest.Digest, at int64) {
	r.Helper()
	r.stop()
	time.Sleep(time.Minute)
	r.rot(dgst, at)
	if err := os.WriteFile(filepath.Join(r.dir, "data", "LOCK"), []byte("1\n"), 0o600); err != nil {
		r.Fatal(err)
	}
	r.start(oneUpstream)
}

// What a power cut has spoilt: its first reader gets a body that ends short, the next one upstream's or an
// honest error, and all later ones what is right.
func TestF54PowerCut(t *testing.T) {
	layer := storedImage.Blobs[1]
	for name, test := range map[string]struct {
		ranged string
		out    bool
	}{
		"upstream up":                {},
		"upstream out":               {out: true},
		"a range at the end":         {ranged: "bytes=-100"},
		"a range at the end, in out": {ranged: "bytes=-100", out: true},
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, oneUpstream, func(r *rig) {
				r.quay.Push("org/app", "latest", storedImage)
				r.pull("latest", storedImage)
				r.powerCut(layer.Digest, 5)
				r.network.SetLink("quay.test:80", registrytest.Link{Refuse: test.out})
				var header []string
				status := http.StatusOK
				if test.ranged != "" {
					header, status = []string{"Range: " + test.ranged}, http.StatusPartialContent
				}
				got := r.get(blobPath(layer), header...)
				if most := len(layer.Bytes) - 64<<10; got.StatusCode != status || !errors.Is(got.err, io.ErrUnexpectedEOF) || len(got.body) > most || test.ranged != "" && len(got.body) > 0 {
					r.Errorf("first: %d, %d bytes, %v", got.StatusCode, len(got.body), got.err)
				}
				if !test.out {
					r.get(blobPath(layer), header...).want(r, status)
					synctest.Wait()
					r.quay.Forget()
					if got := r.get(blobPath(layer)).want(r, 200).is(r, layer.Bytes); got.Header.Get("Cache-Status") != cacheHit || r.asked() > 0 {
						r.Errorf("third: %s, upstream was asked %d times", got.Header.Get("Cache-Status"), r.asked())
					}
					return
				}
				if got := r.get(blobPath(layer), header...).want(r, 503); got.code() != "UNAVAILABLE" {
					r.Errorf("%s", got.body)
				}
				r.get("/v2/library/app/blobs/"+layer.Digest.String()).want(r, 404)
				time.Sleep(10 * time.Minute)
				r.network.SetLink("quay.test:80", registrytest.Link{})
				if time.Sleep(3 * time.Minute); !r.holds(layer.Digest) {
					r.Error("it was not fetched again by itself")
				}
				r.get(blobPath(layer)).want(r, 200).is(r, layer.Bytes)
			})
		})
	}
}

// What fits into what is withheld is fetched again before its first byte: nobody notices.
func TestF54PowerCutOfASmallBlob(t *testing.T) {
	config := storedImage.Blobs[0]
	bubble(t, oneUpstream, func(r *rig) {
		r.quay.Push("org/app", "latest", storedImage)
		r.pull("latest", storedImage)
		r.powerCut(config.Digest, 5)
		r.get(blobPath(config)).want(r, 200).is(r, config.Bytes)
	})
}

// What a disk has lost at rest is found behind a pull, fetched again by itself, and right from then on.
func TestF54RotIsRepaired(t *testing.T) {
	layer := storedImage.Blobs[1]
	bubble(t, oneUpstream, func(r *rig) {
		r.quay.Push("org/app", "latest", storedImage)
		r.pull("latest", storedImage)
		time.Sleep(25 * time.Hour)
		r.rot(layer.Digest, 5)
		r.get(blobPath(layer)).want(r, 200) // nobody knows yet
		if time.Sleep(30 * time.Second); !r.holds(layer.Digest) {
			r.Error("it was not fetched again")
		}
		r.quay.Forget()
		r.pull("latest", storedImage)
		if n := r.metric("breakwater_quarantined_files_total"); n != "1" {
			r.Errorf("%s files are quarantined", n)
		}
	})
}

// A manifest is fetched again as a manifest.
func TestRottenManifestIsRepaired(t *testing.T) {
	bubble(t, oneUpstream, func(r *rig) {
		r.quay.Push("org/app", "latest", storedImage)
		r.pull("latest", storedImage)
		r.rot(storedImage.Digest(), 5)
		report, err := r.store.Verify(r.Context(), func(storage.Progress) {})
		if err != nil || len(report.Wrong) != 1 || r.holds(storedImage.Digest()) {
			r.Fatalf("%+v, %v", report, err)
		}
		if time.Sleep(time.Minute); !r.holds(storedImage.Digest()) {
			r.Error("it was not fetched again")
		}
	})
}

// What no upstream has any more is asked for once.
func TestRotThatNobodyCanRepair(t *testing.T) {
	layer := storedImage.Blobs[1]
	bubble(t, oneUpstream, func(r *rig) {
		r.quay.Push("org/app", "latest", storedImage)
		r.pull("latest", storedImage)
		r.rot(layer.Digest, 5)
		r.quay.Fault(all, registrytest.Status(404))
		r.quay.Forget()
		if _, err := r.store.Verify(r.Context(), func(storage.Progress) {}); err != nil {
			r.Fatal(err)
		}
		time.Sleep(time.Hour)
		if n := r.quay.Count(registrytest.Match{}); n == 0 || n > 2 {
			r.Errorf("upstream was asked %d times", n)
		}
	})
}

// Whatever is wrong upstream, each is tried once a minute.
func TestRepairsAreTriedOnceAMinute(t *testing.T) {
	bubble(t, oneUpstream, func(r *rig) {
		tries := map[oci.Reference]int{}
		var refs []oci.Reference
		for _, blob := range storedImage.Blobs {
			refs = append(refs, oci.Reference{Repository: r.repository("org/app"), Digest: blob.Digest})
		}
		waiting := repairs{}
		for range 60 {
			waiting.add(refs, func(_ context.Context, ref oci.Reference) error {
				tries[ref]++
				return errOnItsWay
			})
			r.mirror.repair(r.Context(), waiting)
			time.Sleep(repairEvery)
		}
		for _, ref := range refs {
			if tries[ref] != 10 {
				r.Errorf("%s was tried %d times in ten minutes", ref, tries[ref])
			}
		}
	})
}
