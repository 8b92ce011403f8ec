package proxy

import (
	"net/http"
	"strings"
	"testing"
	"time"

	"breakwater/pkg/buckettest"
	"breakwater/pkg/registrytest"
)

// headsOfV1 are the questions upstream what v1 names.
var headsOfV1 = registrytest.Match{Kind: registrytest.KindManifest, Method: http.MethodHead, Path: "/manifests/v1"}

// TestSharedTold: an answer that another host was given says so, and that nobody was asked.
func TestSharedTold(t *testing.T) {
	h := newHosts(t)
	image := h.push("v1", 601, 200<<10)
	yaml := "tags: {fresh_for: 1h}\n" + shared
	a := h.host(yaml)
	h.pulls(a, "v1", image)
	h.published(a, "v1", image.Digest())
	h.redate("records/quay.test/org/app/_tags/v1", time.Now().Add(-2*time.Minute))
	h.quay.Forget()
	b := h.host(yaml)
	for _, want := range []string{cacheTold, cacheHit} {
		got := b.get(app+"/manifests/v1").want(b, http.StatusOK).fresh(b)
		if cache, age := got.Header.Get("Cache-Status"), got.Header.Get("Age"); cache != want || age != "120" && age != "121" {
			t.Errorf("Cache-Status %q, Age %s, want %q and two minutes", cache, age, want)
		}
	}
	if n := h.quay.Count(headsOfV1); n > 0 {
		t.Errorf("%d questions upstream", n)
	}
}

// TestSharedSlowBucket: a bucket that is slow, or hangs, to read or to write, costs at most one wait of two
// seconds, and a healthy upstream's word is what is answered.
func TestSharedSlowBucket(t *testing.T) {
	slow := registrytest.Delay(1700 * time.Millisecond)
	for name, tt := range map[string]struct {
		match registrytest.Match
		fault registrytest.Fault
		limit time.Duration
	}{
		"slow to write":  {buckettest.Writes, slow, 1200 * time.Millisecond},
		"slow to read":   {buckettest.Reads, slow, 3 * time.Second},
		"slow":           {buckettest.All, slow, 3 * time.Second},
		"hangs to write": {buckettest.Writes, registrytest.Hang(), 1200 * time.Millisecond},
		"hangs":          {buckettest.All, registrytest.Hang(), 3 * time.Second},
	} {
		for _, stored := range []string{"", "stored"} {
			t.Run(strings.TrimSpace(name+" "+stored), func(t *testing.T) {
				h := newHosts(t)
				image := h.push("v1", 610, 200<<10)
				a := h.host("tags: {fresh_for: 1ms}\n" + shared)
				if stored != "" {
					h.pulls(a, "v1", image)
					h.published(a, "v1", image.Digest())
				}
				h.eventually("all is published", func() bool { return a.mirror.completions.count() == 0 && a.mirror.fleet.publish.count() == 0 })
				h.quay.Fault(everything, registrytest.Delay(200*time.Millisecond))
				h.bucket.Fault(tt.match, tt.fault)
				h.quay.Forget()
				for range 3 {
					a.shared.Forget(reference(a, "v1"))
					begun := time.Now()
					a.get(app+"/manifests/v1").want(a, http.StatusOK).fresh(a)
					if took := time.Since(begun); took > tt.limit {
						t.Errorf("took %v", took)
					}
				}
				if h.quay.Count(headsOfV1) == 0 {
					t.Error("upstream was not asked")
				}
			})
		}
	}
}

// TestSharedNoLeaseWhileOut: who knows that the bucket is out for either, does not ask it who may ask upstream.
func TestSharedNoLeaseWhileOut(t *testing.T) {
	for name, match := range map[string]registrytest.Match{"reads": buckettest.Reads, "writes": buckettest.Writes} {
		t.Run(name, func(t *testing.T) {
			h := newHosts(t)
			image := h.push("v1", 620, 200<<10)
			a := h.host("tags: {fresh_for: 1ms}\n" + shared)
			h.pulls(a, "v1", image)
			h.published(a, "v1", image.Digest())
			h.eventually("all is published", func() bool { return a.mirror.completions.count() == 0 && a.mirror.fleet.publish.count() == 0 })
			h.bucket.Fault(match, registrytest.Hang())
			h.eventually("it is known to be out", func() bool {
				a.shared.Forget(reference(a, "v1"))
				h.pulls(a, "v1", image).fresh(a)
				return a.shared.Health().Reads.Open || a.shared.Health().Writes.Open
			})
			taking := registrytest.Match{Path: "/leases/", Method: http.MethodPut}
			asked := h.bucket.Count(taking)
			for range 3 {
				h.pulls(a, "v1", image).fresh(a)
			}
			if n := h.bucket.Count(taking) - asked; n != 0 {
				t.Errorf("%d requests for leases", n)
			}
		})
	}
}

// TestSharedKeepEvery: what is kept is asked for as often as the configuration says, also where tags are fresh for
// longer and nobody of the fleet but this host has asked.
func TestSharedKeepEvery(t *testing.T) {
	h := newHosts(t)
	h.push("v1", 630, 1000)
	a := h.host("tags: {fresh_for: 1h}\nkeep: [{image: quay.test/org/app:v1, every: 10s}]\n" + shared)
	h.eventually("the first is published", func() bool {
		got, err := a.shared.Tag(t.Context(), reference(a, "v1"))
		return err == nil && got.Digest != ""
	})
	second := h.push("v1", 631, 1000)
	h.eventually("it has the new one", func() bool {
		tag, err := a.store.Tag(a.repository("org/app"), "v1")
		return err == nil && tag.LastComplete.Digest == second.Digest()
	})
}

// TestSharedKeepTold: of hosts that keep the same image, one asks for all.
func TestSharedKeepTold(t *testing.T) {
	h := newHosts(t)
	image := h.push("v1", 640, 1000)
	a := h.host("tags: {fresh_for: 1h}\n" + shared)
	h.pulls(a, "v1", image)
	h.published(a, "v1", image.Digest())
	h.quay.Forget()
	b := h.host("tags: {fresh_for: 1h}\nkeep: [{image: quay.test/org/app:v1, every: 30m}]\n" + shared)
	h.eventually("b has it", func() bool { return b.store.Complete(b.repository("org/app"), image.Digest()) })
	if n := h.quay.Count(headsOfV1); n > 0 {
		t.Errorf("%d questions upstream", n)
	}
}

// TestSharedLateLease: a lease that comes when nobody waits for it any more is given back.
func TestSharedLateLease(t *testing.T) {
	h := newHosts(t)
	image := h.push("v1", 650, 1000)
	a := h.host("tags: {fresh_for: 1ms}\n" + shared)
	h.pulls(a, "v1", image)
	h.published(a, "v1", image.Digest())
	h.eventually("all is published", func() bool { return a.mirror.completions.count() == 0 && a.mirror.fleet.publish.count() == 0 })
	h.eventually("no lease is held", func() bool { return len(h.bucket.Names("leases/")) == 0 })
	h.bucket.Fault(buckettest.Leases, registrytest.Delay(2*leaseTime))
	a.get(app+"/manifests/v1").want(a, http.StatusOK).fresh(a)
	h.eventually("the lease has come", func() bool { return len(h.bucket.Names("leases/")) == 1 })
	h.eventually("it is given back", func() bool { return len(h.bucket.Names("leases/")) == 0 })
}

// TestSharedFresherQuestion: who wants to hear an upstream is not answered by a question that the fleet may answer.
func TestSharedFresherQuestion(t *testing.T) {
	h := newHosts(t)
	a := h.host(shared)
	h.quay.Fault(everything, registrytest.Hang())
	t.Cleanup(h.quay.Heal)
	ref := reference(a, "v1")
	told, asked := a.mirror.questionTag(ref, freshness{within: time.Hour}), a.mirror.questionTag(ref, freshness{})
	if told == asked || asked != a.mirror.questionTag(ref, freshness{}) {
		t.Error("questions of different freshness are one, or of the same are two")
	}
}
