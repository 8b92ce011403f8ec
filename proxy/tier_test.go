package proxy

import (
	"net/http"
	"path/filepath"
	"testing"
	"time"

	"breakwater/pkg/registrytest"
	"breakwater/proxy/upstream"
	"breakwater/storage"
)

// F71: node -> regional mirror -> registry. While the registry is out, the node passes on that the
// answer is stale, with its true age, and does not take it for a confirmation.
func TestF71AgesAreTrueAtBothTiers(t *testing.T) {
	region := t.TempDir()
	bubble(t, `registries: {docker.io: {upstreams: [{url: "http://region.test:5000"}]}}`, func(r *rig) {
		store, err := storage.Open(storage.Config{Dir: filepath.Join(region, "data"), Capacity: 1 << 30})
		if err != nil {
			r.Fatal(err)
		}
		mirror, err := New(Config{Config: r.config(`{listen: ":5000", access: {anonymous: true}, default_registry: docker.io, server_names: [region.test], registries: {docker.io: {upstreams: [{url: "http://quay.test:80"}]}}}`),
			Store: store, Upstreams: upstream.Settings{Lookup: r.network.Lookup, Dial: r.network.DialContext}})
		if err != nil {
			r.Fatal(err)
		}
		listener, err := r.network.Listen("region.test:5000")
		if err != nil {
			r.Fatal(err)
		}
		server := registrytest.Serve(listener, mirror)
		defer func() {
			_ = server.Close()
			mirror.Close(r.Context())
			if err := store.Close(); err != nil {
				r.Error(err)
			}
		}()
		image := registrytest.NewImage(registrytest.Layer(1, 100))
		r.quay.Push("org/app", "latest", image)
		r.get("/v2/org/app/manifests/latest").want(r, http.StatusOK).fresh(r)
		time.Sleep(time.Hour)
		r.quay.Fault(registrytest.Match{}, registrytest.Status(http.StatusServiceUnavailable))
		r.get("/v2/org/app/manifests/latest").want(r, http.StatusOK).stale(r, "3600")
		time.Sleep(time.Hour)
		r.get("/v2/org/app/manifests/latest").want(r, http.StatusOK).stale(r, "7200")
		r.quay.Heal()
		time.Sleep(2 * time.Minute) // the region's breaker has seen it
		r.get("/v2/org/app/manifests/latest").want(r, http.StatusOK).fresh(r)
	})
}
