package proxy

import (
	"net/http"
	"sync"
	"testing"

	"breakwater/pkg/buckettest"
	"breakwater/pkg/oci"
	"breakwater/pkg/registrytest"
)

// TestSharedWithinReachAgain: a host that could not get the newer image goes on with the older one until the
// fleet has the newer one, and no longer: in an outage all hosts give the same.
func TestSharedWithinReachAgain(t *testing.T) {
	h := newHosts(t)
	first := h.push("latest", 541, 200<<10)
	a, b := h.host(shared), h.host(shared)
	h.pulls(a, "latest", first)
	h.published(a, "latest", first.Digest())
	h.pulls(b, "latest", first)
	second := h.push("latest", 542, 200<<10)
	heal := h.quay.Fault(registrytest.Match{Kind: registrytest.KindBlob}, registrytest.Status(http.StatusServiceUnavailable))
	b.get(app+"/manifests/latest").want(b, http.StatusOK)
	b.get(app+"/blobs/"+second.Blobs[1].Digest.String()).want(b, http.StatusServiceUnavailable)
	b.shared.Forget(reference(b, "latest"))
	if got := h.pulls(b, "latest", first); got.Header.Get("Cache-Status") == "" || got.Header.Get("Warning") == "" {
		t.Errorf("the older image is not stale: %v", got.Header)
	}
	heal()
	h.pulls(a, "latest", second)
	h.published(a, "latest", second.Digest())
	h.quay.Fault(everything, outages["dead"])
	b.shared.Forget(reference(b, "latest"))
	h.pulls(b, "latest", second)
}

// TestSharedNoLeaseInOutage: where nobody is asked, nobody leads: the bucket is not asked who may.
func TestSharedNoLeaseInOutage(t *testing.T) {
	h := newHosts(t)
	image := h.push("v1", 551, 200<<10)
	a := h.host("tags: {fresh_for: 1ms}\n" + shared)
	h.pulls(a, "v1", image)
	h.published(a, "v1", image.Digest())
	h.quay.Fault(everything, outages["dead"])
	h.eventually("the breaker is open", func() bool {
		for _, tag := range []string{"v1", "v2", "v3"} { // of one reference alone nothing would follow
			a.get(app + "/manifests/" + tag)
		}
		return a.state("manifest") == "open"
	})
	asked := h.bucket.Count(buckettest.Leases)
	for range 3 {
		h.pulls(a, "v1", image)
	}
	if n := h.bucket.Count(buckettest.Leases) - asked; n != 0 {
		t.Errorf("%d requests for leases", n)
	}
}

// TestSharedLeadUntilComplete: who asks what a tag names while another host is fetching the image is told once
// the fleet has it, and does not ask the upstream.
func TestSharedLeadUntilComplete(t *testing.T) {
	h := newHosts(t)
	yaml := "tags: {fresh_for: 1h}\n" + shared
	a, b := h.host(yaml), h.host(yaml)
	image := h.push("v1", 561, 200<<10)
	heads := func() int {
		return h.quay.Count(registrytest.Match{Kind: registrytest.KindManifest, Method: http.MethodHead, Path: "/manifests/v1"})
	}
	a.do(http.MethodHead, app+"/manifests/v1").want(a, http.StatusOK)
	h.eventually("a has looked whether it can publish the tag", func() bool {
		return a.mirror.fleet.publish.tries(reference(a, "v1")) > 0
	})
	leases := h.bucket.Count(buckettest.Leases)
	var asks sync.WaitGroup
	asks.Go(func() { b.do(http.MethodHead, app+"/manifests/v1").want(b, http.StatusOK) })
	h.eventually("b wants to ask too", func() bool { return h.bucket.Count(buckettest.Leases) > leases })
	h.pulls(a, "v1", image)
	asks.Wait()
	if n := heads(); n != 1 {
		t.Errorf("%d questions upstream, want 1", n)
	}
}

// tries is how often a publication that waits has been tried in vain.
func (p *publisher) tries(ref oci.Reference) int {
	p.mu.Lock()
	defer p.mu.Unlock()
	if w := p.waiting[ref]; w != nil {
		return w.tries
	}
	return 0
}
