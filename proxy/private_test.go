package proxy

import (
	"bytes"
	"crypto/tls"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"breakwater/pkg/registrytest"
	"breakwater/proxy/upstream"
)

// private is a rig whose quay.test lets nobody but robot in, and whose Hub is open to all.
func private(t *testing.T, f func(r *rig, hub *registrytest.Registry)) {
	t.Helper()
	bubble(t, withPassword(t), func(r *rig) {
		hub := registrytest.New(registrytest.Config{})
		hub.Serve(r, r.network, "hub.test:80")
		r.quay.Serve(r, r.network, "quay.test:443")
		r.quay.Configure(registrytest.Config{Auth: registrytest.Auth{Scheme: "Bearer", Users: map[string]string{"robot": "hunter2"}}})
		r.quay.Push("org/app", "latest", storedImage)
		f(r, hub)
	})
}

// everywhere asks for private content under names that it does not belong to.
func (r *rig) everywhere(status int) {
	r.Helper()
	blob := "/blobs/" + storedImage.Blobs[1].Digest.String()
	manifest := "/manifests/" + storedImage.Digest().String()
	for _, name := range []string{"/v2/docker.io/org/app", "/v2/org/app", "/v2/quay.test/org/other"} {
		for _, path := range []string{blob, manifest} {
			for _, method := range []string{http.MethodGet, http.MethodHead} {
				for _, span := range []string{"X: x", "Range: bytes=0-9", "Range: bytes=-10", "If-None-Match: *"} {
					want := status
					if status != http.StatusNotFound && path == blob && name == "/v2/org/app" {
						want = http.StatusNotFound // as on the bare path in an outage
					}
					if got := r.do(method, name+path, span); got.StatusCode != want {
						r.Errorf("%s %s%s %s: %d, want %d: %.100q", method, name, path, span, got.StatusCode, want, got.body)
					}
				}
			}
		}
	}
}

// What is stored once is not for everybody who knows its digest (CVE-2024-39897, CVE-2026-35172).
func TestPrivateContentStaysInItsRepository(t *testing.T) {
	private(t, func(r *rig, hub *registrytest.Registry) {
		r.pull("latest", storedImage)
		r.everywhere(http.StatusNotFound)
		if n := hub.Count(registrytest.Match{}); n == 0 {
			t.Error("the Hub was never asked if it has the content")
		}
		time.Sleep(time.Hour)
		hub.Fault(registrytest.Match{}, registrytest.Status(http.StatusServiceUnavailable))
		r.quay.Fault(registrytest.Match{}, registrytest.Status(http.StatusServiceUnavailable))
		r.everywhere(http.StatusServiceUnavailable)
		r.get(app+"/blobs/"+storedImage.Blobs[1].Digest.String()).want(r, http.StatusOK) // where it belongs, nobody is asked
		r.get(app+latest).want(r, http.StatusOK).stale(r, "3600")
	})
}

func TestPrivateContentIsConfirmedByHead(t *testing.T) {
	private(t, func(r *rig, hub *registrytest.Registry) {
		r.pull("latest", storedImage)
		blob := storedImage.Blobs[1]
		hub.Push("org/app", "", storedImage)
		r.get("/v2/org/app/blobs/"+blob.Digest.String()).want(r, http.StatusOK).is(r, blob.Bytes)
		r.get("/v2/org/app/manifests/"+storedImage.Digest().String()).want(r, http.StatusOK).is(r, storedImage.Raw)
		if n := hub.Count(registrytest.Match{Method: http.MethodGet}); n > 0 {
			t.Errorf("%d GETs for content that is stored", n)
		}
		hub.Forget()
		r.get("/v2/org/app/blobs/"+blob.Digest.String()).want(r, http.StatusOK).is(r, blob.Bytes)
		if n := hub.Count(registrytest.Match{}); n > 0 {
			t.Errorf("%d requests for what is confirmed", n)
		}
		r.get("/v2/quay.test/org/other/blobs/"+blob.Digest.String()).want(r, http.StatusOK) // what is public is everybody's
	})
}

func TestPrivateContentInFlight(t *testing.T) {
	private(t, func(r *rig, _ *registrytest.Registry) {
		image := registrytest.NewImage(registrytest.Layer(1, 1<<20))
		r.quay.Push("org/big", "latest", image)
		blob := image.Blobs[1]
		r.quay.Fault(blobGets, registrytest.Stall(512<<10))
		path := "/blobs/" + blob.Digest.String()
		var reader sync.WaitGroup
		reader.Go(func() { r.get("/v2/quay.test/org/big" + path) })
		time.Sleep(time.Second)
		for _, name := range []string{"/v2/docker.io/org/app", "/v2/quay.test/org/other"} {
			for _, span := range []string{"X: x", "Range: bytes=0-9"} {
				if got := r.get(name+path, span); got.StatusCode == http.StatusOK || got.StatusCode == http.StatusPartialContent {
					t.Errorf("%s %s: %d, %d bytes", name, span, got.StatusCode, len(got.body))
				}
			}
		}
		r.quay.Heal()
		reader.Wait()
		synctest.Wait()
	})
}

// A token service is not asked about what the store answers by itself.
func TestTokensAreNotAskedForWhatIsStored(t *testing.T) {
	private(t, func(r *rig, _ *registrytest.Registry) {
		r.pull("latest", storedImage)
		time.Sleep(time.Hour) // no token lives that long
		r.quay.Forget()
		for _, blob := range storedImage.Blobs {
			r.get(app+"/blobs/"+blob.Digest.String()).want(r, http.StatusOK)
		}
		r.get(app+"/manifests/"+storedImage.Digest().String()).want(r, http.StatusOK)
		if n := r.asked(); n > 0 {
			t.Errorf("%d requests for stored content", n)
		}
	})
}

// Secrets end up where logs and metrics end up (CVE-2025-48374, GHSA-prh4-vhfh-24mj).
func TestSecretsAreNotLogged(t *testing.T) {
	private(t, func(r *rig, _ *registrytest.Registry) {
		var log bytes.Buffer
		cfg := r.mirror.cfg.Load()
		mirror, err := New(Config{
			Config:    cfg,
			Store:     r.store,
			Upstreams: upstream.Settings{Lookup: r.network.Lookup, Dial: r.network.DialContext, TLS: &tls.Config{RootCAs: r.network.CA.Pool()}},
			Logger:    slog.New(slog.NewTextHandler(&log, &slog.HandlerOptions{Level: slog.LevelDebug})),
		})
		if err != nil {
			t.Fatal(err)
		}
		var said strings.Builder
		ask := func(path string) {
			w := httptest.NewRecorder()
			req := httptest.NewRequest(http.MethodGet, "http://localhost"+path, nil)
			req.Header.Set("Authorization", "Basic client-secret")
			mirror.ServeHTTP(w, req)
			_ = w.Result().Header.Write(&said)
			said.Write(w.Body.Bytes())
			synctest.Wait()
		}
		blob := app + "/blobs/" + storedImage.Blobs[1].Digest.String()
		signed := "?X-Amz-Signature=url-secret&sig=url-secret"
		ask(app + latest)
		ask(app + latest + "?token=query-secret")
		for _, location := range []string{"https://cdn.test/url-secret" + signed, "https://nowhere.test/url-secret" + signed, "http://plain.test/url-secret" + signed, "https://u:url-secret@cdn.test/", "https://10.0.0.1/url-secret" + signed} {
			for _, fault := range []registrytest.Fault{registrytest.Status(403), registrytest.Portal(), registrytest.Truncate(10), registrytest.Status(307, "Location", "ftp://url-secret/")} {
				remove := r.quay.Fault(registrytest.Match{Kind: registrytest.KindBlob}, redirect(location))
				cdn := registrytest.New(registrytest.Config{})
				cdn.Fault(registrytest.Match{}, fault)
				certificate, err := r.network.CA.Certificate("cdn.test", time.Time{})
				if err != nil {
					t.Fatal(err)
				}
				listener, err := r.network.Listen("cdn.test:443")
				if err != nil {
					t.Fatal(err)
				}
				server := registrytest.Serve(listener, cdn, certificate)
				ask(blob)
				remove()
				_ = server.Close()
				time.Sleep(5 * time.Minute)
			}
		}
		r.quay.Fault(registrytest.Match{Kind: registrytest.KindToken}, func(w http.ResponseWriter, _ *http.Request, _ http.Handler) {
			_, _ = w.Write([]byte(`{"token":"token-secret\u0001"}`))
		})
		time.Sleep(time.Hour)
		ask(app + latest)
		r.quay.Revoke()
		mirror.Close(r.Context())
		w := httptest.NewRecorder()
		mirror.Admin().ServeHTTP(w, httptest.NewRequest(http.MethodGet, "/metrics", nil))
		mirror.Admin().ServeHTTP(w, httptest.NewRequest(http.MethodGet, "/readyz", nil))
		for where, text := range map[string]string{"the log": log.String(), "an answer": said.String(), "the metrics": w.Body.String()} {
			if len(text) == 0 {
				t.Errorf("%s is empty", where)
			}
			for _, secret := range []string{"hunter2", "cm9ib3Q6aHVudGVyMg", "Bearer ", "Basic ", "client-secret", "url-secret", "X-Amz", "token-secret", "query-secret"} {
				if i := strings.Index(text, secret); i >= 0 {
					t.Errorf("%s tells %q: %s", where, secret, text[max(0, i-200):min(len(text), i+50)])
				}
			}
		}
	})
}
