package proxy

import (
	"fmt"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"breakwater/pkg/buckettest"
	"breakwater/pkg/registrytest"
	"breakwater/storage/s3"

	"github.com/opencontainers/go-digest"
)

// TestF44ColdHost is the incident: a host that has never seen an image pulls it by its tag although every
// upstream is dead, or hangs, since another host of the fleet has pulled it before.
func TestF44ColdHost(t *testing.T) {
	for name, fault := range outages {
		t.Run(name, func(t *testing.T) {
			h := newHosts(t)
			image := h.push("v1", 441, 300<<10, 1<<20)
			a := h.host(shared)
			h.pulls(a, "v1", image).fresh(a)
			h.published(a, "v1", image.Digest())
			h.quay.Fault(everything, fault)
			b := h.host(shared)
			begun := time.Now()
			got := h.pulls(b, "v1", image)
			if took := time.Since(begun); took > 4*time.Second {
				t.Errorf("took %v", took)
			}
			if w := got.Header.Get("Warning"); !strings.HasPrefix(w, `299 - "stale by `) || got.Header.Get("Age") == "" {
				t.Errorf("Warning %q, Age %q", w, got.Header.Get("Age"))
			}
			h.pulls(a, "v1", image)
			if h.quay.Count(registrytest.Match{Kind: registrytest.KindBlob, Func: func(r *http.Request) bool { return r.Method == http.MethodGet }}) != len(image.Blobs) {
				t.Error("a blob was fetched from upstream more than once")
			}
		})
	}
}

// TestF44Digest is the same by digest, and by HEAD.
func TestF44Digest(t *testing.T) {
	h := newHosts(t)
	image := h.push("v1", 442, 300<<10)
	a := h.host(shared)
	h.pulls(a, "v1", image)
	h.published(a, "v1", image.Digest())
	h.quay.Fault(everything, outages["dead"])
	b := h.host(shared)
	for _, method := range []string{http.MethodHead, http.MethodGet} {
		b.do(method, app+"/manifests/"+image.Digest().String()).want(b, http.StatusOK)
		for _, blob := range image.Blobs {
			got := b.do(method, app+"/blobs/"+blob.Digest.String()).want(b, http.StatusOK)
			if method == http.MethodHead && got.ContentLength != int64(len(blob.Bytes)) {
				t.Errorf("%d bytes, want %d", got.ContentLength, len(blob.Bytes))
			}
		}
	}
}

// TestSharedCacheStatus: answers say that they came from the shared store, or did not.
func TestSharedCacheStatus(t *testing.T) {
	h := newHosts(t)
	image := h.push("v1", 446, 300<<10)
	manifest, layer := app+"/manifests/"+image.Digest().String(), app+"/blobs/"+image.Blobs[1].Digest.String()
	a := h.host(shared)
	type row struct{ method, path, cache string }
	for _, row := range []row{{http.MethodHead, layer, cacheFetched}, {http.MethodGet, layer, cacheFetched}, {http.MethodGet, manifest, cacheFetched}} {
		if got := a.do(row.method, row.path).want(a, http.StatusOK).Header.Get("Cache-Status"); got != row.cache {
			t.Errorf("first host: %s %s is answered %q, want %q", row.method, row.path, got, row.cache)
		}
	}
	h.pulls(a, "v1", image)
	h.published(a, "v1", image.Digest())
	b := h.host(shared)
	for _, row := range []row{
		{http.MethodHead, layer, cacheShared}, {http.MethodGet, layer, cacheShared},
		{http.MethodHead, manifest, cacheShared}, {http.MethodGet, manifest, cacheHit},
	} {
		if got := b.do(row.method, row.path).want(b, http.StatusOK).Header.Get("Cache-Status"); got != row.cache {
			t.Errorf("second host: %s %s is answered %q, want %q", row.method, row.path, got, row.cache)
		}
	}
	const fetched = `breakwater_fetched_bytes_total{source=`
	from, _ := strconv.Atoi(b.metric(fetched + `"shared"}`))
	if least := len(image.Blobs[1].Bytes); from < least || b.metric(fetched+`"upstream"}`) != "" { // the configuration may have come too
		t.Errorf("metrics tell of %d bytes from the shared store, want %d at least, and none from upstream", from, least)
	}
}

// TestSharedMiss: what nobody has ever pulled is told as fetched, and not as something old that was renewed.
func TestSharedMiss(t *testing.T) {
	h := newHosts(t)
	image := h.push("v1", 443, 300<<10)
	a := h.host(shared)
	for range 20 { // the upstream's answer is stored before, or after, the fleet's is looked at
		tag := fmt.Sprint("t", h.quay.Count(everything))
		h.quay.Push("org/app", tag, image)
		if got := a.get(app+"/manifests/"+tag).want(a, http.StatusOK); got.Header.Get("Cache-Status") == cacheMoved {
			t.Fatalf("Cache-Status %q", got.Header.Get("Cache-Status"))
		}
		image = image.Annotated("n", tag)
	}
}

// TestF44OnlyWhenUnknown: what nobody of the fleet has ever pulled is an outage as ever, and 404 if the
// upstream says so.
func TestF44OnlyWhenUnknown(t *testing.T) {
	h := newHosts(t)
	b := h.host(shared)
	if got := b.get(app + "/manifests/none"); got.StatusCode != http.StatusNotFound || got.code() != "MANIFEST_UNKNOWN" {
		t.Errorf("%d %s", got.StatusCode, got.body)
	}
	absent := digest.FromString("absent").String()
	if got := b.get(app + "/blobs/" + absent); got.StatusCode != http.StatusNotFound {
		t.Errorf("%d %s", got.StatusCode, got.body)
	}
	h.quay.Fault(everything, outages["dead"])
	for _, path := range []string{"/manifests/none", "/manifests/" + absent, "/blobs/" + absent} {
		if got := b.get(app + path); got.StatusCode != http.StatusServiceUnavailable || !strings.Contains(string(got.body), "quay.test") {
			t.Errorf("%s: %d %s", path, got.StatusCode, got.body)
		}
	}
}

// TestSharedFreshness: a tag that another host has confirmed lately is not asked for again.
func TestSharedFreshness(t *testing.T) {
	h := newHosts(t)
	image := h.push("v1", 501, 200<<10)
	yaml := "tags: {fresh_for: 1h}\n" + shared
	a := h.host(yaml)
	h.pulls(a, "v1", image)
	h.published(a, "v1", image.Digest())
	h.eventually("what refers to it has been asked for", func() bool { return a.mirror.completions.count() == 0 })
	h.quay.Forget()
	for range 3 {
		b := h.host(yaml)
		h.pulls(b, "v1", image).fresh(b)
	}
	for _, r := range h.quay.Requests(everything) {
		if !strings.Contains(r.URL.Path, "/referrers/") && !strings.Contains(r.URL.Path, "/manifests/sha256-") {
			t.Errorf("%s %s upstream", r.Method, r.URL.Path)
		}
	}
}

// TestSharedOneAsks: of hosts that want to know the same tag, or the same blob, at the same moment one asks.
func TestSharedOneAsks(t *testing.T) {
	h := newHosts(t)
	image := h.push("v1", 502, 200<<10)
	everybody := func() {
		var mirrors []*rig
		for range 8 {
			mirrors = append(mirrors, h.host("tags: {fresh_for: 1m}\n"+shared))
		}
		var all sync.WaitGroup
		for _, r := range mirrors {
			all.Go(func() { h.pulls(r, "v1", image).fresh(r) })
		}
		all.Wait()
		h.published(mirrors[0], "v1", image.Digest())
		for _, r := range mirrors {
			h.eventually("all is published", func() bool { return r.mirror.fleet.publish.count() == 0 })
		}
	}
	h.quay.Fault(registrytest.Match{Kind: registrytest.KindManifest}, registrytest.Delay(200*time.Millisecond))
	everybody()
	for _, blob := range image.Blobs {
		n := h.quay.Count(registrytest.Match{Kind: registrytest.KindBlob, Func: func(r *http.Request) bool {
			return r.Method == http.MethodGet && strings.HasSuffix(r.URL.Path, blob.Digest.Encoded())
		}})
		t.Logf("blob of %d bytes: %d fetches for 8 hosts", len(blob.Bytes), n)
		if n > 3 {
			t.Errorf("%d fetches of a blob", n)
		}
	}
	h.redate("records/quay.test/org/app/_tags/v1", time.Now().Add(-2*time.Minute))
	h.quay.Forget()
	everybody()
	n := h.quay.Count(registrytest.Match{Func: func(r *http.Request) bool { return strings.HasSuffix(r.URL.Path, "/manifests/v1") }})
	t.Logf("tag: %d questions for 8 hosts", n)
	if n > 2 {
		t.Errorf("%d questions upstream, want at most 2", n)
	}
}

// TestSharedAgreement: in an outage every host gives what was published last, also one that has an older
// image whole; one that was cut off from the bucket gives its own newer one, and says that.
func TestSharedAgreement(t *testing.T) {
	h := newHosts(t)
	first := h.push("latest", 511, 200<<10)
	a, b := h.host(shared), h.host(shared)
	h.pulls(a, "latest", first)
	h.published(a, "latest", first.Digest())
	h.pulls(b, "latest", first)
	second := h.push("latest", 512, 200<<10)
	h.pulls(a, "latest", second)
	h.published(a, "latest", second.Digest())
	h.bucket.Fault(buckettest.Writes, buckettest.Forbidden())
	told := time.Now()
	h.eventually("the clocks can tell", func() bool { return time.Since(told) > 3*time.Second })
	third := h.push("latest", 513, 200<<10)
	b.shared.Forget(reference(b, "latest"))
	h.pulls(b, "latest", third) // cannot be published
	h.quay.Fault(everything, outages["dead"])
	c := h.host(shared)
	h.pulls(c, "latest", second)
	h.pulls(a, "latest", second)
	got := h.pulls(b, "latest", third)
	if !strings.Contains(got.Header.Get("Cache-Status"), "detail=unpublished") {
		t.Errorf("Cache-Status %q", got.Header.Get("Cache-Status"))
	}
	h.bucket.Heal()
	h.published(b, "latest", third.Digest())
	a.shared.Forget(reference(a, "latest"))
	c.shared.Forget(reference(c, "latest"))
	h.pulls(a, "latest", third)
	h.pulls(c, "latest", third)
}

// TestSharedOldImageIsNotLast: a host that has an older image whole takes the newer one from the bucket when
// the upstreams are out, rather than going back.
func TestSharedOldImageIsNotLast(t *testing.T) {
	h := newHosts(t)
	first := h.push("latest", 521, 200<<10)
	a, b := h.host(shared), h.host(shared)
	h.pulls(a, "latest", first)
	h.pulls(b, "latest", first)
	h.eventually("b knows that the first is published", func() bool { // else its word is as good as the fleet's, for two seconds
		tag, err := b.store.Tag(b.repository("org/app"), "latest")
		return err == nil && tag.Published.Digest == first.Digest()
	})
	second := h.push("latest", 522, 200<<10)
	h.pulls(a, "latest", second)
	h.published(a, "latest", second.Digest())
	h.quay.Fault(everything, outages["dead"])
	for _, blob := range first.Blobs { // the breaker of blobs opens
		for range 6 {
			b.get("/v2/quay.test/org/other/blobs/" + digest.FromString(blob.Digest.String()).String())
			b.get("/v2/quay.test/org/third/blobs/" + digest.FromString("x"+blob.Digest.String()).String())
		}
	}
	b.shared.Forget(reference(b, "latest"))
	h.pulls(b, "latest", second)
}

// TestSharedRestart: what was not published when the process was killed is published by the next one.
func TestSharedRestart(t *testing.T) {
	h := newHosts(t)
	image := h.push("v1", 531, 200<<10)
	h.bucket.Down()
	dir := t.TempDir()
	a := h.hostIn(dir, shared, h.open(s3.Config{}))
	h.pulls(a, "v1", image)
	h.eventually("the image is complete", func() bool { return a.store.Complete(a.repository("org/app"), image.Digest()) })
	h.kill(a)
	a = h.hostIn(dir, shared, h.open(s3.Config{}))
	h.quay.Fault(everything, outages["dead"])
	h.bucket.Up()
	h.published(a, "v1", image.Digest())
}

// TestSharedPrivate: what was got with a credential stays private: another repository does not get it from
// the bucket, and the one that it is confirmed in does, on a host that has never asked.
func TestSharedPrivate(t *testing.T) {
	h := newHosts(t)
	h.quay.Configure(registrytest.Config{Auth: registrytest.Auth{Scheme: "Basic", Users: map[string]string{"ci": registrytest.Canary}}})
	h.quay.Push("org/app", "latest", storedImage)
	yaml := "completion: {images: all}" + withAccount
	a := h.host(yaml)
	h.pulls(a, "latest", storedImage)
	h.published(a, "latest", storedImage.Digest())
	for _, name := range h.bucket.Names("records/") {
		if strings.HasPrefix(name, "records/_public/") {
			t.Errorf("%s is for everybody", name)
		}
	}
	for _, r := range []*rig{a, h.host(yaml)} {
		h.quay.Fault(everything, outages["dead"])
		r.refused(other, 503, 503)
		r.refused(nobody, 503, 503)
		h.pulls(r, "latest", storedImage)
		r.refused(other, 503, 503)
		r.refused(nobody, 503, 503)
	}
}

// TestSharedReadOnly: a host that is told so publishes nothing, and reads.
func TestSharedReadOnly(t *testing.T) {
	h := newHosts(t)
	image, other := h.push("v1", 541, 200<<10), h.push("v2", 542, 200<<10)
	a := h.host(shared)
	h.pulls(a, "v1", image)
	h.published(a, "v1", image.Digest())
	h.eventually("all is published, and its leases are given back", func() bool {
		isLease := func(name string) bool { return strings.Contains(name, "leases/") }
		return a.mirror.completions.count() == 0 && a.mirror.fleet.publish.count() == 0 && !slices.ContainsFunc(h.bucket.Names(""), isLease)
	})
	b := h.hostIn(t.TempDir(), shared, h.open(s3.Config{ReadOnly: true}))
	cfg := *b.mirror.cfg.Load()
	cfg.Shared.ReadOnly = true
	if err := b.mirror.Use(&cfg); err != nil {
		t.Fatal(err)
	}
	before := h.bucket.Names("")
	h.pulls(b, "v1", image)
	h.pulls(b, "v2", other)
	h.eventually("the image is complete", func() bool { return b.mirror.completions.count() == 0 })
	after := h.bucket.Names("")
	if !slices.Equal(after, before) || b.mirror.fleet.publish.count() != 0 {
		t.Errorf("%v, then %v", before, after)
	}
}
