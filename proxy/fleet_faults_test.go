package proxy

import (
	"bytes"
	"fmt"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"testing"
	"time"

	"breakwater/pkg/buckettest"
	"breakwater/pkg/oci"
	"breakwater/pkg/registrytest"

	"github.com/opencontainers/go-digest"
)

// TestF40BucketMissing: a mirror starts and serves with a bucket that is not there, and says so.
func TestF40BucketMissing(t *testing.T) {
	h := newHosts(t)
	image := h.push("v1", 401, 300<<10)
	h.bucket.Down()
	a := h.host(shared)
	h.pulls(a, "v1", image).fresh(a)
	h.pulls(a, "v1", image).fresh(a)
	w := httptest.NewRecorder()
	a.mirror.Admin().ServeHTTP(w, httptest.NewRequest(http.MethodGet, "/readyz", nil))
	if w.Code != http.StatusOK || !strings.Contains(w.Body.String(), "shared store: out since ") {
		t.Errorf("%d %s", w.Code, w.Body)
	}
	h.bucket.Up()
	h.published(a, "v1", image.Digest()) // what waited is published then
}

// TestF41BucketSick: a bucket that hangs, throttles, refuses or cuts costs one wait of two seconds, and
// then nothing.
func TestF41BucketSick(t *testing.T) {
	for name, fault := range map[string]registrytest.Fault{
		"hanging": registrytest.Hang(), "slow": registrytest.Delay(10 * time.Second), "throttling": buckettest.SlowDown(),
		"forbidden": buckettest.Forbidden(), "full": buckettest.Full(), "failing": registrytest.Status(http.StatusInternalServerError),
		"cutting": registrytest.Truncate(10),
	} {
		t.Run(name, func(t *testing.T) {
			h := newHosts(t)
			a := h.host(shared)
			var images []registrytest.Image
			for i := range 5 {
				images = append(images, h.push(fmt.Sprint("v", i), uint64(4100+10*i), 200<<10))
			}
			h.bucket.Fault(buckettest.All, fault)
			var waits time.Duration
			for i, image := range images {
				begun := time.Now()
				h.pulls(a, fmt.Sprint("v", i), image).fresh(a)
				waits += time.Since(begun)
			}
			if waits > 4*time.Second {
				t.Errorf("five pulls took %v", waits)
			}
			begun := time.Now()
			h.pulls(a, "v0", images[0])
			if took := time.Since(begun); took > time.Second {
				t.Errorf("a hit took %v", took)
			}
			h.bucket.Heal()
			h.published(a, "v4", images[4].Digest())
		})
	}
}

// TestF41OnlyWritesFail: a host that may read and not write is a host of the fleet all the same.
func TestF41OnlyWritesFail(t *testing.T) {
	h := newHosts(t)
	image := h.push("v1", 412, 200<<10)
	a := h.host(shared)
	h.pulls(a, "v1", image)
	h.published(a, "v1", image.Digest())
	h.bucket.Fault(buckettest.Writes, buckettest.Forbidden())
	h.quay.Fault(everything, outages["dead"])
	b := h.host(shared)
	h.pulls(b, "v1", image)
}

// TestF43Forged: a record that somebody without the fleet's key has written is ignored.
func TestF43Forged(t *testing.T) {
	h := newHosts(t)
	image := h.push("v1", 431, 200<<10)
	a := h.host(shared)
	h.pulls(a, "v1", image)
	h.published(a, "v1", image.Digest())
	for _, name := range h.bucket.Names("records/") {
		if strings.Contains(name, "/_tags/") {
			raw := h.bucket.Get(name)
			h.bucket.Put(name, bytes.Replace(raw, []byte(image.Digest().Encoded()), []byte(digest.FromString("evil").Encoded()), 1))
		}
	}
	h.quay.Fault(everything, outages["dead"])
	b := h.host(shared)
	if got := b.get(app + "/manifests/v1"); got.StatusCode != http.StatusServiceUnavailable {
		t.Errorf("%d %s", got.StatusCode, got.body)
	}
	h.pulls(a, "v1", image) // who has seen the true one goes on with it
}

// TestH41Swapped: bytes that are not what their name says are never served, cost no client its download while
// an upstream is well, and are put right.
func TestH41Swapped(t *testing.T) {
	h := newHosts(t)
	image := h.push("v1", 411, 200<<10, 12<<20)
	a := h.host(shared)
	h.pulls(a, "v1", image)
	h.published(a, "v1", image.Digest())
	swap := func() {
		for i, at := range []int{100, 10 << 20} {
			name := "blobs/sha256/" + image.Blobs[1+i].Digest.Encoded()
			evil := slices.Clone(image.Blobs[1+i].Bytes)
			evil[at] ^= 1
			h.bucket.Put(name, evil)
		}
	}
	swap()
	b := h.host(shared)
	h.pulls(b, "v1", image)
	h.eventually("the bucket has the right bytes again", func() bool {
		return !slices.ContainsFunc(image.Blobs, func(blob registrytest.Blob) bool {
			return digest.FromBytes(h.bucket.Get("blobs/sha256/"+blob.Digest.Encoded())) != blob.Digest
		})
	})
	h.quay.Fault(everything, outages["dead"])
	swap()
	c := h.host("completion: {images: none}" + oneUpstream)
	c.get(app+"/manifests/v1").want(c, http.StatusOK)
	if got := c.get(app + "/blobs/" + image.Blobs[1].Digest.String()); got.StatusCode != http.StatusServiceUnavailable {
		t.Errorf("%d, %d bytes", got.StatusCode, len(got.body))
	}
	if got := c.get(app + "/blobs/" + image.Blobs[2].Digest.String()); got.StatusCode == http.StatusOK && (got.err == nil || !bytes.HasPrefix(image.Blobs[2].Bytes, got.body)) {
		t.Errorf("%d, %d bytes, %v", got.StatusCode, len(got.body), got.err)
	}
}

// TestH41Future: a record dated in the future is answered as of unknown age, and refused with max_stale.
func TestH41Future(t *testing.T) {
	h := newHosts(t)
	image := h.push("v1", 415, 200<<10)
	a := h.host(shared)
	h.pulls(a, "v1", image)
	h.published(a, "v1", image.Digest())
	ref := reference(a, "v1")
	h.redate("records/quay.test/org/app/_tags/v1", time.Date(2099, 1, 1, 0, 0, 0, 0, time.UTC))
	h.quay.Fault(everything, outages["dead"])
	b := h.host("tags: {fresh_for: 1h}\n" + shared)
	got := h.pulls(b, "v1", image)
	if w := got.Header.Get("Warning"); !strings.Contains(w, "nobody knows how much") || got.Header.Get("Age") != "" {
		t.Errorf("Warning %q, Age %q", w, got.Header.Get("Age"))
	}
	c := h.host("tags: {max_stale: 10000h}\n" + shared)
	if got := c.get(app + "/manifests/v1"); got.StatusCode != http.StatusServiceUnavailable || !strings.Contains(string(got.body), "future") {
		t.Errorf("%d %s", got.StatusCode, got.body)
	}
	h.quay.Heal()
	d := h.host("tags: {fresh_for: 1h}\n" + shared)
	h.pulls(d, "v1", image).fresh(d)
	h.eventually("the record is of today again", func() bool {
		d.shared.Forget(ref)
		now, err := d.shared.Tag(t.Context(), ref)
		return err == nil && time.Since(now.ValidatedAt) > -time.Minute
	})
}

// TestF41Queue: what waits for a bucket that is out is bounded; the oldest goes, and is counted.
func TestF41Queue(t *testing.T) {
	h := newHosts(t)
	h.bucket.Down()
	a := h.host("completion: {images: none}" + oneUpstream)
	p := a.mirror.fleet.publish
	first := h.push("first", 470, 100)
	h.pulls(a, "first", first)
	h.eventually("the bucket is known to be out", func() bool { return a.shared.Health().Reads.Open || a.shared.Health().Writes.Open })
	for i := range maxUnpublished {
		p.add(oci.Reference{Repository: a.repository("org/app"), Tag: fmt.Sprint("t", i)}, nil)
	}
	if n, dropped := p.count(), p.dropped.Load(); n != maxUnpublished || dropped == 0 {
		t.Errorf("%d wait, %d were dropped", n, dropped)
	}
	w := httptest.NewRecorder()
	a.mirror.Admin().ServeHTTP(w, httptest.NewRequest(http.MethodGet, "/metrics", nil))
	for _, line := range []string{"breakwater_shared_unpublished 100000", "breakwater_shared_out{access=\"read\"} 1"} {
		if !strings.Contains(w.Body.String(), line) {
			t.Errorf("no %s in the metrics", line)
		}
	}
}

// TestF41SlowBodies: a bucket whose headers come and whose bodies drip, or stall, costs one wait of 2 s, and what
// it has is had from the upstream; with every upstream out it is had from the bucket all the same.
func TestF41SlowBodies(t *testing.T) {
	for name, fault := range map[string]registrytest.Fault{"drip": registrytest.Drip(16<<10, time.Second), "stall": registrytest.Stall(1000)} {
		t.Run(name, func(t *testing.T) {
			h := newHosts(t)
			image := h.push("v1", 571, 80<<10, 81<<10, 82<<10, 83<<10)
			a := h.host(shared)
			h.pulls(a, "v1", image)
			h.published(a, "v1", image.Digest())
			b := h.host("completion: {images: none}" + oneUpstream)
			b.get(app+"/manifests/v1").want(b, http.StatusOK)
			h.bucket.Fault(registrytest.Match{Method: http.MethodGet, Path: "/blobs/"}, fault)
			begun := time.Now()
			for i, blob := range image.Blobs[1:4] {
				got := b.get(app+"/blobs/"+blob.Digest.String()).want(b, http.StatusOK).is(b, blob.Bytes)
				if cache := got.Header.Get("Cache-Status"); cache != cacheFetched {
					t.Errorf("blob %d: %s", i, cache)
				}
			}
			if took := time.Since(begun); took > 2*fleetTime {
				t.Errorf("took %v, want one wait of %v", took, fleetTime)
			}
			if h := b.shared.Health(); h.Reads.Open {
				t.Errorf("records are not read either: %+v", h.Reads)
			}
			if name == "stall" {
				return
			}
			h.quay.Fault(everything, outages["dead"])
			last := image.Blobs[4]
			b.get(app+"/blobs/"+last.Digest.String()).want(b, http.StatusOK).is(b, last.Bytes)
		})
	}
}
