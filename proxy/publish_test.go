package proxy

import (
	"net/http"
	"testing"
	"time"

	"breakwater/pkg/buckettest"
	"breakwater/pkg/registrytest"
)

// TestSharedNoLeaseWithoutUpload: a host that cannot upload what it is fetching does not have others wait for it.
func TestSharedNoLeaseWithoutUpload(t *testing.T) {
	h := newHosts(t)
	image := h.push("v1", 571, 600<<10)
	a := h.host("completion: {images: none}" + oneUpstream)
	for range maxUploads {
		if err := a.mirror.fleet.publish.uploads.take(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	a.get(app+"/manifests/v1").want(a, http.StatusOK)
	blob := image.Blobs[1]
	h.quay.Fault(registrytest.Match{Kind: registrytest.KindBlob}, registrytest.Drip(60<<10, time.Second))
	got := make(chan answer, 1)
	leases := h.bucket.Count(buckettest.Leases)
	begun := time.Now()
	go func() { got <- a.get(app + "/blobs/" + blob.Digest.String()) }()
	h.eventually("a may fetch it for the fleet", func() bool { return h.bucket.Count(buckettest.Leases) > leases })
	h.eventually("the lease is released", func() bool {
		return h.bucket.Count(buckettest.Leases) > leases+1 && len(h.bucket.Names("leases/")) == 0
	})
	if took := time.Since(begun); took > headerBudget/2 {
		t.Errorf("others were told for %v that it comes", took)
	}
	(<-got).is(a, blob.Bytes)
}
