package proxy

import (
	"io"
	"log/slog"
	"net/http"
	"path/filepath"
	"testing"

	"breakwater/pkg/config"
	"breakwater/pkg/oci"
	"breakwater/pkg/registrytest"
	"breakwater/storage"

	"github.com/opencontainers/go-digest"
)

// discardResponse is a ResponseWriter that costs nothing.
type discardResponse struct{ header http.Header }

func (d discardResponse) Header() http.Header         { return d.header }
func (d discardResponse) Write(p []byte) (int, error) { return len(p), nil }
func (d discardResponse) WriteHeader(int)             {}

// BenchmarkManifestHit is what a stored manifest costs from ServeHTTP on, its access line included.
func BenchmarkManifestHit(b *testing.B) {
	store, err := storage.Open(storage.Config{Dir: filepath.Join(b.TempDir(), "data"), Capacity: 1 << 30})
	if err != nil {
		b.Fatal(err)
	}
	defer store.Close()
	cfg, err := config.Load("", nil, map[string]string{"data": b.TempDir()})
	if err != nil {
		b.Fatal(err)
	}
	cfg.Completion.Images = config.CompleteNone // the image has no blobs, and quay.io is not to be asked for them
	m, err := New(Config{Config: cfg, Store: store, Logger: slog.New(slog.NewJSONHandler(io.Discard, nil))})
	if err != nil {
		b.Fatal(err)
	}
	defer m.Close(b.Context())
	repo := oci.Repository{Registry: "quay.io", Name: "org/app"}
	image := registrytest.NewImage(registrytest.Layer(1, 1000))
	manifest, err := oci.ParseManifest("", image.Raw, digest.SHA256)
	if err == nil {
		err = store.PutManifest(repo, manifest, storage.Confirmation{})
	}
	if err != nil {
		b.Fatal(err)
	}
	r, err := http.NewRequest(http.MethodGet, "/v2/quay.io/org/app/manifests/"+image.Digest().String(), nil)
	if err != nil {
		b.Fatal(err)
	}
	r = byLoopback(r)
	r.RequestURI = r.URL.Path
	b.ReportAllocs()
	for b.Loop() {
		w := discardResponse{http.Header{}}
		m.ServeHTTP(w, r)
		if w.header.Get("Docker-Content-Digest") == "" {
			b.Fatal(w.header)
		}
	}
}
