package proxy

import (
	"net/http"
	"strings"
	"testing"
	"time"

	"breakwater/pkg/registrytest"
)

func TestPullThrough(t *testing.T) {
	bubble(t, oneUpstream, func(r *rig) {
		image := registrytest.NewImage(registrytest.Layer(1, 300<<10), registrytest.Layer(2, 10))
		r.quay.Push("org/app", "latest", image)
		got := r.get("/v2/quay.test/org/app/manifests/latest").want(r, 200).fresh(r)
		if string(got.body) != string(image.Raw) || got.Header.Get("Docker-Content-Digest") != image.Digest().String() {
			t.Errorf("got %s", got.body)
		}
		for _, blob := range image.Blobs {
			for range 2 {
				got := r.get("/v2/quay.test/org/app/blobs/"+blob.Digest.String()).want(r, 200)
				if string(got.body) != string(blob.Bytes) {
					t.Errorf("blob %s differs", blob.Digest)
				}
			}
		}
		if n := r.quay.Count(registrytest.Match{Kind: registrytest.KindBlob}); n != len(image.Blobs) {
			t.Errorf("%d blob requests upstream, want %d", n, len(image.Blobs))
		}
	})
}

func TestF03BlackHoledUpstream(t *testing.T) {
	bubble(t, oneUpstream, func(r *rig) {
		image := registrytest.NewImage(registrytest.Layer(1, 1000))
		r.quay.Push("org/app", "latest", image)
		r.get("/v2/quay.test/org/app/manifests/latest").want(r, 200)
		time.Sleep(time.Hour)
		r.network.SetLink("quay.test:80", registrytest.Link{BlackHole: true})
		got := r.get("/v2/quay.test/org/app/manifests/latest").want(r, 200).stale(r, "3601")
		if got.took > 1600*time.Millisecond {
			t.Errorf("stale after %v, want 1.5 s", got.took)
		}
		if cache := got.Header.Get("Cache-Status"); !strings.HasPrefix(cache, "breakwater; fwd=stale; detail=timeout") {
			t.Errorf("Cache-Status %q", cache)
		}
		got = r.get("/v2/quay.test/org/app/manifests/other").want(r, 503)
		if got.took > 10*time.Second || got.Header.Get("Retry-After") == "" || !strings.Contains(string(got.body), "quay.test") {
			t.Errorf("%v, Retry-After %q, %s", got.took, got.Header.Get("Retry-After"), got.body)
		}
	})
}

func TestHealthyButFarIsNeverStale(t *testing.T) {
	yaml := strings.ReplaceAll(oneUpstream, "http://quay.test:80", "https://quay.test")
	bubble(t, yaml, func(r *rig) {
		r.quay.Configure(registrytest.Config{Auth: registrytest.Auth{Scheme: "Bearer"}})
		r.quay.Serve(r, r.network, "quay.test:443")
		image := registrytest.NewImage(registrytest.Layer(1, 1000))
		r.quay.Push("org/app", "latest", image)
		r.network.SetLink("quay.test:443", registrytest.Link{Latency: 200 * time.Millisecond})
		r.network.SetHost("quay.test", registrytest.Host{Delay: 200 * time.Millisecond})
		r.get("/v2/quay.test/org/app/manifests/latest").want(r, 200).fresh(r)
		time.Sleep(24 * time.Hour) // connections and tokens are cold again
		moved := registrytest.NewImage(registrytest.Layer(2, 1000))
		r.quay.Push("org/app", "latest", moved)
		got := r.get("/v2/quay.test/org/app/manifests/latest").want(r, http.StatusOK).fresh(r)
		if string(got.body) != string(moved.Raw) {
			t.Error("got the old manifest")
		}
		t.Log("cold at 200 ms:", got.took)
	})
}
