package proxy

import (
	"bytes"
	"context"
	"encoding/json"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"breakwater/pkg/registrytest"
)

// control asks the API of the control socket, as pid 7 of user 8, and reads the answer's lines.
func (r *rig) control(method, path string) (status int, lines []map[string]any) {
	r.Helper()
	return r.controlBy(r.mirror.Control("v1.2.3"), r.Context(), method, path, "")
}

func (r *rig) controlBy(h http.Handler, ctx context.Context, method, path, body string) (status int, lines []map[string]any) {
	r.Helper()
	req := httptest.NewRequest(method, "http://control"+path, strings.NewReader(body)).WithContext(ctx)
	req.RemoteAddr = "pid 7 uid 8"
	w := httptest.NewRecorder()
	h.ServeHTTP(w, req)
	for d := json.NewDecoder(w.Body); d.More(); {
		var line map[string]any
		if err := d.Decode(&line); err != nil {
			r.Fatalf("%s %s: %v", method, path, err)
		}
		lines = append(lines, line)
	}
	if len(lines) == 0 || !strings.HasPrefix(w.Header().Get("Content-Type"), "application/json") {
		r.Fatalf("%s %s: %d lines of %q", method, path, len(lines), w.Header().Get("Content-Type"))
	}
	return w.Code, lines
}

func TestControlTellsTheStatus(t *testing.T) {
	bubble(t, withTags("fresh_for: 0s"), func(r *rig) {
		r.quay.Push("org/app", "latest", storedImage)
		r.pull("latest", storedImage)
		r.quay.Push("org/app", "half", unseenImage)
		r.get(app+"/manifests/half").want(r, http.StatusOK)
		r.quay.Fault(registrytest.Match{}, registrytest.Status(http.StatusBadGateway))
		for _, tag := range []string{"a", "b", "c"} {
			r.get(app + "/manifests/" + tag)
		}
		synctest.Wait()
		status, lines := r.control(http.MethodGet, "/v1/status")
		var s Status
		raw, err := json.Marshal(lines[0])
		if err == nil {
			err = json.Unmarshal(raw, &s)
		}
		if err != nil || status != http.StatusOK {
			t.Fatal(status, err)
		}
		if s.Version != "v1.2.3" || s.Process != os.Getpid() || s.Data == "" {
			t.Errorf("%+v", s)
		}
		if u := s.Store; u.Images != 2 || u.Complete != 1 || !u.Built || u.Bytes < 100<<10 || u.Capacity != capacity {
			t.Errorf("%+v", u)
		}
		i := slices.IndexFunc(s.Upstreams, func(u UpstreamStatus) bool { return u.Registry == "quay.test" && u.Class == "manifest" })
		if len(s.Upstreams) != 6 || i < 0 || s.Upstreams[i].State != "open" || !strings.Contains(s.Upstreams[i].Reason, "502") || s.Upstreams[i].Failed < 3 {
			t.Errorf("%+v", s.Upstreams)
		}
	})
}

func TestControlRemovesImages(t *testing.T) {
	bubble(t, withTags("fresh_for: 1h"), func(r *rig) {
		for _, tag := range []string{"latest", "v1"} {
			r.quay.Push("org/app", tag, storedImage)
			r.pull(tag, storedImage)
		}
		for _, tt := range []struct {
			image  string
			status int
			want   string // of the one line
		}{
			{"quay.test/org/app:v9", http.StatusNotFound, "quay.test/org/app:v9 is not stored"},
			{"hub.test/org/app:v1", http.StatusNotFound, "hub.test/org/app:v1 is not stored"},
			{"org/App:v1", http.StatusBadRequest, `"org/App:v1" is not an image; write it as quay.io/org/app:tag`},
			{"../../etc/passwd", http.StatusBadRequest, "is not an image"},
			{"org/app:v1@" + storedImage.Digest().String(), http.StatusBadRequest, "is not an image"},
			{"org/app:v1", http.StatusOK, "quay.test/org/app:v1 0"}, // latest names the same
			{"org/app:v1", http.StatusNotFound, "is not stored"},
			{"quay.test/org/app", http.StatusOK, "quay.test/org/app:latest some"},
			{"quay.test/org/app@" + storedImage.Digest().String(), http.StatusNotFound, "is not stored"},
		} {
			path := url.PathEscape(tt.image)
			if tt.status == http.StatusOK {
				path = tt.image // as people write it for curl
			}
			status, lines := r.control(http.MethodDelete, "/v1/images/"+path)
			said, _ := lines[0]["error"].(string)
			if status == http.StatusOK {
				freed := "0"
				if lines[0]["freed"].(float64) > 100<<10 {
					freed = "some"
				}
				said = lines[0]["image"].(string) + " " + freed
			}
			if status != tt.status || !strings.Contains(said, tt.want) {
				t.Errorf("%s: %d %q, want %d %q", path, status, said, tt.status, tt.want)
			}
		}
		if r.holds(storedImage.Digest()) || r.holds(storedImage.Blobs[0].Digest) {
			t.Error("its files are left")
		}
		r.quay.Forget()
		r.pull("latest", storedImage)
		if r.asked() == 0 {
			t.Error("nothing was fetched again")
		}
	})
}

func TestControlVerifies(t *testing.T) {
	bubble(t, oneUpstream, func(r *rig) {
		r.quay.Push("org/app", "latest", storedImage)
		r.pull("latest", storedImage)
		if status, lines := r.control(http.MethodPost, "/v1/verify"); status != http.StatusOK || lines[0]["progress"] == nil || lines[len(lines)-1]["report"].(map[string]any)["wrong"] != nil {
			t.Errorf("of what is good: %d %v", status, lines)
		}
		layer := storedImage.Blobs[1]
		wrong := bytes.Clone(layer.Bytes)
		wrong[len(wrong)/2] ^= 1
		name := filepath.Join(r.dir, "data", "blobs", "sha256", layer.Digest.Encoded())
		if err := os.WriteFile(name, wrong, 0o600); err != nil {
			t.Fatal(err)
		}
		status, lines := r.control(http.MethodPost, "/v1/verify")
		report, _ := lines[len(lines)-1]["report"].(map[string]any)
		found, _ := report["wrong"].([]any)
		if status != http.StatusOK || len(found) != 1 || r.holds(layer.Digest) {
			t.Fatalf("%d %v", status, lines)
		}
		one := found[0].(map[string]any)
		if one["digest"] != layer.Digest.String() || one["images"].([]any)[0] != "quay.test/org/app:latest" {
			t.Errorf("%v", one)
		}
		r.get(app+"/blobs/"+layer.Digest.String()).want(r, http.StatusOK).is(r, layer.Bytes)
		synctest.Wait()
	})
}

// Whoever asked may leave: nobody else wants to know.
func TestControlVerifiesOnlyForWhoListens(t *testing.T) {
	bubble(t, oneUpstream, func(r *rig) {
		r.quay.Push("org/app", "latest", storedImage)
		r.pull("latest", storedImage)
		ctx, cancel := context.WithCancel(r.Context())
		cancel()
		h := r.mirror.Control("v1")
		if _, lines := r.controlBy(h, ctx, http.MethodPost, "/v1/verify", ""); lines[len(lines)-1]["error"] != "the mirror stops: not all is verified" {
			t.Errorf("%v", lines)
		}
		// A reader that has stopped reading ends it as well, and the next one finds the way free.
		w := &gone{ResponseRecorder: httptest.NewRecorder()}
		h.ServeHTTP(w, httptest.NewRequest(http.MethodPost, "http://control/v1/verify", nil))
		if !strings.Contains(w.last, "error") {
			t.Errorf("all was verified for a reader that is gone: %s", w.last)
		}
		if _, lines := r.controlBy(h, r.Context(), http.MethodPost, "/v1/verify", ""); lines[len(lines)-1]["report"] == nil {
			t.Errorf("%v", lines)
		}
	})
}

// gone is a connection that cannot be written to any more.
type gone struct {
	*httptest.ResponseRecorder
	last string
}

func (g *gone) Write(line []byte) (int, error) {
	g.last = string(line)
	return 0, os.ErrDeadlineExceeded
}

func TestControlRefusesInJSON(t *testing.T) {
	bubble(t, oneUpstream, func(r *rig) {
		h := r.mirror.Control("v1")
		for _, tt := range []struct {
			method, path, body string
			status             int
			want               string
		}{
			{http.MethodGet, "/", "", http.StatusNotFound, "there are GET /v1/status"},
			{http.MethodGet, "/v2/", "", http.StatusNotFound, `there is no GET "/v2/"`},
			{http.MethodGet, "/metrics", "", http.StatusNotFound, "there is no"},
			{http.MethodPost, "/v1/status", "", http.StatusNotFound, `there is no POST "/v1/status"`},
			{http.MethodGet, "/v1/verify", "", http.StatusNotFound, "there is no"},
			{http.MethodPost, "/v1/images/alpine", "", http.StatusNotFound, "there is no"},
			{http.MethodPost, "/v1/verify", strings.Repeat("x", 1<<20), http.StatusBadRequest, "takes a body"},
			{http.MethodDelete, "/v1/images/", "", http.StatusBadRequest, "is not an image"},
		} {
			status, lines := r.controlBy(h, r.Context(), tt.method, tt.path, tt.body)
			if said, _ := lines[0]["error"].(string); status != tt.status || !strings.Contains(said, tt.want) {
				t.Errorf("%s %s: %d %q", tt.method, tt.path, status, said)
			}
		}
	})
}

func TestControlLogsWhoAsked(t *testing.T) {
	bubble(t, oneUpstream, func(r *rig) {
		var log bytes.Buffer
		r.mirror.logger = slog.New(slog.NewTextHandler(&log, nil))
		r.control(http.MethodDelete, "/v1/images/quay.test/org/app:gone")
		for _, want := range []string{`msg=control`, `method=DELETE`, `path=/v1/images/quay.test/org/app:gone`, `client="pid 7 uid 8"`, `status=404`} {
			if !strings.Contains(log.String(), want) {
				t.Errorf("no %s in %s", want, log.String())
			}
		}
	})
}

// TestH45ControlIsOnNoPort asks the two handlers that listen to TCP for what only the socket may give.
func TestH45ControlIsOnNoPort(t *testing.T) {
	bubble(t, oneUpstream, func(r *rig) {
		r.quay.Push("org/app", "latest", storedImage)
		r.pull("latest", storedImage)
		synctest.Wait()
		time.Sleep(time.Minute)
		for name, h := range map[string]http.Handler{"registry": r.mirror, "admin": r.mirror.Admin()} {
			for _, line := range []string{"GET /v1/status", "DELETE /v1/images/quay.test/org/app:latest", "POST /v1/verify", "DELETE /v2/quay.test/org/app/manifests/latest"} {
				method, path, _ := strings.Cut(line, " ")
				w := httptest.NewRecorder()
				h.ServeHTTP(w, byLoopback(httptest.NewRequest(method, path, nil)))
				if w.Code != http.StatusNotFound && w.Code != http.StatusMethodNotAllowed {
					t.Errorf("%s: %s: %d %s", name, line, w.Code, w.Body)
				}
			}
		}
		if !r.holds(storedImage.Digest()) {
			t.Error("it is gone")
		}
	})
}
