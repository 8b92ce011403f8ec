package proxy

import (
	"bytes"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"breakwater/pkg/buckettest"
	"breakwater/pkg/oci"
	"breakwater/pkg/registrytest"
	"breakwater/storage/s3"

	"github.com/opencontainers/go-digest"
)

// hosts are the mirrors of a fleet, with one upstream and one bucket, in real time: the bucket is another
// program's.
type hosts struct {
	*testing.T
	bucket *buckettest.Bucket
	quay   *registrytest.Registry
}

func newHosts(t *testing.T) *hosts {
	h := &hosts{t, buckettest.Start(t), registrytest.New(registrytest.Config{})}
	t.Cleanup(func() { h.bucket.Heal() })
	return h
}

var fleetKey = []byte(strings.Repeat("k", 32))

// host is one more mirror.
func (h *hosts) host(yaml string) *rig {
	h.Helper()
	return h.hostIn(h.TempDir(), yaml, h.open(s3.Config{}))
}

// hostIn is a mirror with that data folder, of before or not, and that view of the bucket.
func (h *hosts) hostIn(dir, yaml string, bucket *s3.Bucket) *rig {
	h.Helper()
	r := &rig{T: h.T, network: registrytest.NewNetwork(), quay: h.quay, dir: dir, shared: bucket}
	h.Cleanup(r.shared.Close)
	h.Cleanup(func() { _ = r.network.Close() })
	h.quay.Serve(h.T, r.network, "quay.test:80")
	h.quay.Serve(h.T, r.network, "quay.test:443")
	r.start(yaml)
	h.Cleanup(func() {
		if r.server != nil {
			r.stop()
		}
	})
	return r
}

// kill ends a mirror, and what it had not written to the bucket yet.
func (h *hosts) kill(r *rig) {
	r.stop()
	r.server = nil
	r.shared.Close()
}

// open opens the bucket as one host does.
func (h *hosts) open(cfg s3.Config) *s3.Bucket {
	h.Helper()
	cfg.Bucket, cfg.Endpoint, cfg.Region, cfg.PathStyle = buckettest.Name, h.bucket.URL, "us-east-1", true
	cfg.Keys = [][]byte{fleetKey}
	b, err := s3.New(cfg)
	if err != nil {
		h.Fatal(err)
	}
	return b
}

// eventually waits until something holds that goes on behind.
func (h *hosts) eventually(what string, holds func() bool) {
	h.Helper()
	for deadline := time.Now().Add(20 * time.Second); !holds(); {
		if time.Now().After(deadline) {
			h.Fatalf("not so after 20 s: %s", what)
		}
		<-time.After(10 * time.Millisecond)
	}
}

// pulls gets a tag of app and all of its blobs.
func (h *hosts) pulls(r *rig, tag string, image registrytest.Image) answer {
	h.Helper()
	got := r.get(app+"/manifests/"+tag).want(r, http.StatusOK)
	if dgst := got.Header.Get("Docker-Content-Digest"); dgst != image.Digest().String() {
		h.Fatalf("%s is %s, want %s", tag, dgst, image.Digest())
	}
	for _, blob := range image.Blobs {
		r.get(app+"/blobs/"+blob.Digest.String()).want(r, http.StatusOK).is(r, blob.Bytes)
	}
	return got
}

// published waits until the fleet's record of a tag of app names that.
func (h *hosts) published(r *rig, tag string, dgst digest.Digest) {
	h.Helper()
	ref := reference(r, tag)
	h.eventually(tag+" is published", func() bool {
		r.shared.Forget(ref)
		got, err := r.shared.Tag(h.Context(), ref)
		return err == nil && got.Digest == dgst
	})
}

// reference is a tag of app.
func reference(r *rig, tag string) oci.Reference {
	return oci.Reference{Repository: r.repository("org/app"), Tag: tag}
}

// push has the upstream name a new image by a tag of org/app.
func (h *hosts) push(tag string, seed uint64, sizes ...int) registrytest.Image {
	h.Helper()
	var layers [][]byte
	for i, size := range sizes {
		layers = append(layers, registrytest.Layer(seed+uint64(i), size))
	}
	image := registrytest.NewImage(layers...)
	h.quay.Push("org/app", tag, image)
	return image
}

// everything is every request to the upstream.
var everything = registrytest.Match{}

const shared = "completion: {images: all}" + oneUpstream

// outages are how an upstream is gone.
var outages = map[string]registrytest.Fault{"dead": registrytest.Status(http.StatusBadGateway), "hanging": registrytest.Hang()}

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

// redate changes when a tag's record was validated and written, as the holder of the fleet's key can.
func (h *hosts) redate(name string, at time.Time) {
	h.Helper()
	var body map[string]any
	if err := json.Unmarshal(bytes.SplitN(h.bucket.Get(name), []byte("\n"), 2)[1], &body); err != nil {
		h.Fatal(err)
	}
	body["validated_at"], body["generation"] = at.UTC(), body["generation"].(float64)+1
	raw, err := json.Marshal(body)
	if err != nil {
		h.Fatal(err)
	}
	raw = append(raw, '\n')
	const mark = "breakwater-record 1"
	mac := hmac.New(sha256.New, fleetKey)
	fmt.Fprintf(mac, "%s\n%s\n%s", mark, name, raw)
	id := sha256.Sum256(append([]byte("breakwater-key-id 1\n"), fleetKey...))
	h.bucket.Put(name, fmt.Appendf(nil, "%s %x %x\n%s", mark, id[:4], mac.Sum(nil), raw))
	h.bucket.Age(name, max(0, time.Since(at)))
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

// TestSharedReadOnly: a host that is told so publishes nothing, and reads.
func TestSharedReadOnly(t *testing.T) {
	h := newHosts(t)
	image, other := h.push("v1", 541, 200<<10), h.push("v2", 542, 200<<10)
	a := h.host(shared)
	h.pulls(a, "v1", image)
	h.published(a, "v1", image.Digest())
	h.eventually("all is published", func() bool { return a.mirror.fleet.publish.count() == 0 })
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
