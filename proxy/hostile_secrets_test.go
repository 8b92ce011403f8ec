package proxy

import (
	"bytes"
	"crypto/tls"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"breakwater/pkg/registrytest"
	"breakwater/proxy/upstream"
)

// asRobot makes quay.test let nobody in but robot, who must get a token first.
func (r *rig) asRobot() {
	r.quay.Serve(r, r.network, "quay.test:443")
	r.quay.Configure(registrytest.Config{Auth: registrytest.Auth{Scheme: "Bearer", Users: map[string]string{"robot": "hunter2"}}})
	r.quay.Push("org/app", "latest", storedImage)
}

// A token service is not asked about what the store answers by itself.
func TestTokensAreNotAskedForWhatIsStored(t *testing.T) {
	bubble(t, withPassword(t), func(r *rig) {
		r.asRobot()
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
	bubble(t, withPassword(t), func(r *rig) {
		r.asRobot()
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
			req := httptest.NewRequest(http.MethodGet, path, nil)
			req.Host = "localhost"
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
			for _, fault := range []registrytest.Fault{registrytest.Status(403), registrytest.Portal(), registrytest.Truncate(10), registrytest.Status(307, "Location", "ftp://cdn.test/url-secret")} {
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
		for _, reply := range []string{`{"token":"token-secret\u0001"}`, `{"token":"token-secret`} {
			r.quay.Fault(registrytest.Match{Kind: registrytest.KindToken}, func(w http.ResponseWriter, _ *http.Request, _ http.Handler) {
				_, _ = w.Write([]byte(reply))
			})
			time.Sleep(time.Hour)
			ask(blob)
			ask(app + latest)
		}
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
