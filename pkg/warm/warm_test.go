package warm_test

import (
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"breakwater/pkg/oci"
	"breakwater/pkg/registrytest"
	"breakwater/pkg/warm"

	"github.com/google/go-cmp/cmp"
)

// TestPull has a scripted registry answer as a mirror does, and as one that is broken.
func TestPull(t *testing.T) {
	const hit, fetched, moved, confirmed = "breakwater; hit", "breakwater; fwd=uri-miss; fwd-status=200", "breakwater; fwd=stale; fwd-status=200", "breakwater; fwd=stale; fwd-status=200; detail=confirmed"
	image := registrytest.NewImage(registrytest.Layer(1, 100_000), registrytest.Layer(2, 10_000), registrytest.Layer(2, 10_000))
	layer := image.Blobs[1].Digest.String()
	blob, manifest := registrytest.Match{Kind: registrytest.KindBlob}, registrytest.Match{Kind: registrytest.KindManifest}
	status := func(s string) registrytest.Fault { return registrytest.Header("Cache-Status", s) }
	for _, row := range []struct {
		name     string
		fault    func(reg *registrytest.Registry)
		answered string
		fetched  []string
		warning  string
		err      string // "" is none
	}{
		{"stored", func(reg *registrytest.Registry) { reg.Fault(registrytest.Match{}, status(hit)) }, warm.Stored, nil, "", ""},
		{"confirmed", func(reg *registrytest.Registry) {
			reg.Fault(manifest, status(confirmed))
			reg.Fault(blob, status(hit))
		}, warm.Stored, nil, "", ""},
		{"moved", func(reg *registrytest.Registry) {
			reg.Fault(manifest, status(moved))
			reg.Fault(blob, status(hit))
		}, warm.Fetched, []string{"manifests/v1"}, "", ""},
		{"a blob fetched", func(reg *registrytest.Registry) {
			reg.Fault(registrytest.Match{Func: func(r *http.Request) bool { return !strings.HasSuffix(r.URL.Path, layer) }}, status(hit))
			reg.Fault(registrytest.Match{Func: func(r *http.Request) bool { return strings.HasSuffix(r.URL.Path, layer) }}, status(fetched))
		}, warm.Fetched, []string{"blobs/" + layer}, "", ""},
		{"stale", func(reg *registrytest.Registry) {
			reg.Fault(manifest, status("breakwater; hit; ttl=-60; detail=outage"), registrytest.Header("Warning", `299 - "stale by 1m0s: it's out"`))
			reg.Fault(blob, status(hit))
		}, warm.Stale, nil, "stale by 1m0s: it's out", ""},
		{"nobody says", func(*registrytest.Registry) {}, warm.Stored, nil, "", "was not answered by a breakwater"},
		{"a nameless blob", func(reg *registrytest.Registry) { reg.Fault(manifest, status(hit)) }, warm.Stored, nil, "", "blobs/sha256:"},
		{"wrong bytes", func(reg *registrytest.Registry) {
			reg.Fault(registrytest.Match{}, status(hit))
			reg.Fault(registrytest.Match{Func: func(r *http.Request) bool { return strings.HasSuffix(r.URL.Path, layer) }}, registrytest.FlipBit(70_000))
		}, warm.Stored, nil, "", "blob " + layer + ": "},
		{"cut short", func(reg *registrytest.Registry) {
			reg.Fault(registrytest.Match{}, status(hit))
			reg.Fault(registrytest.Match{Func: func(r *http.Request) bool { return strings.HasSuffix(r.URL.Path, layer) }}, registrytest.Truncate(70_000))
		}, warm.Stored, nil, "", "unexpected EOF"},
		{"refused", func(reg *registrytest.Registry) {
			reg.Fault(registrytest.Match{}, status(hit))
			reg.Fault(manifest, registrytest.Status(http.StatusServiceUnavailable))
		}, warm.Stored, nil, "", "quay.test/org/app:v1: UNAVAILABLE: "},
	} {
		t.Run(row.name, func(t *testing.T) {
			reg := registrytest.New(registrytest.Config{})
			reg.Push("quay.test/org/app", "v1", image)
			row.fault(reg)
			mirror, ref := open(t, reg, []string{"linux/amd64"})
			var read, all int64
			got, err := mirror.Pull(t.Context(), ref, func(r, a int64) {
				if r < read {
					t.Errorf("%d bytes read after %d", r, read)
				}
				read, all = r, a
			})
			if (err == nil) != (row.err == "") || err != nil && (!strings.Contains(err.Error(), row.err) || got.Error != err.Error()) {
				t.Fatalf("%v, want %q", err, row.err)
			}
			if row.err != "" {
				return
			}
			size := image.Blobs[0].Size + 110_000
			if read != size || all != size || got.Bytes != size || got.Digest != image.Digest().String() {
				t.Errorf("%d of %d bytes, %+v, want %d", read, all, got, size)
			}
			if got.Answered != row.answered || got.Warning != row.warning {
				t.Errorf("%+v, want %s %q", got, row.answered, row.warning)
			}
			if diff := cmp.Diff(row.fetched, got.Fetched); diff != "" {
				t.Error(diff)
			}
			if n := reg.Count(blob); n != 3 {
				t.Errorf("%d blobs asked for, of which two are one", n)
			}
		})
	}
}

// open returns the mirror that reg plays, and the image that it is asked for.
func open(t *testing.T, reg *registrytest.Registry, platforms []string) (*warm.Mirror, oci.Reference) {
	t.Helper()
	mirror, err := warm.New(reg.Start(t).URL, platforms)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(mirror.Close)
	ref, err := oci.ParseImage("quay.test/org/app:v1")
	if err != nil {
		t.Fatal(err)
	}
	return mirror, ref
}

// TestOneTry: what the mirror refuses it has tried itself.
func TestOneTry(t *testing.T) {
	reg := registrytest.New(registrytest.Config{})
	reg.Fault(registrytest.Match{Kind: registrytest.KindManifest}, registrytest.Status(http.StatusServiceUnavailable))
	mirror, ref := open(t, reg, nil)
	if _, err := mirror.Pull(t.Context(), ref, func(int64, int64) {}); err == nil {
		t.Error("pulled")
	}
	if n := reg.Count(registrytest.Match{Kind: registrytest.KindManifest}); n != 1 {
		t.Errorf("asked %d times", n)
	}
}

// TestAccount: a mirror that asks who we are is told what docker login has stored.
func TestAccount(t *testing.T) {
	reg := registrytest.New(registrytest.Config{Auth: registrytest.Auth{Scheme: "Basic", Users: map[string]string{"ci": "password"}}})
	reg.Push("quay.test/org/app", "v1", registrytest.NewImage(registrytest.Layer(1, 100)))
	reg.Fault(registrytest.Match{}, registrytest.Header("Cache-Status", "breakwater; hit"))
	url := reg.Start(t).URL
	dir := t.TempDir()
	t.Setenv("DOCKER_CONFIG", dir)
	t.Setenv("HOME", dir)
	t.Setenv("XDG_RUNTIME_DIR", dir)
	ref, err := oci.ParseImage("quay.test/org/app:v1")
	if err != nil {
		t.Fatal(err)
	}
	pull := func() error {
		mirror, err := warm.New(url, nil)
		if err != nil {
			t.Fatal(err)
		}
		defer mirror.Close()
		_, err = mirror.Pull(t.Context(), ref, func(int64, int64) {})
		return err
	}
	if err := pull(); err == nil || !strings.Contains(err.Error(), "UNAUTHORIZED") {
		t.Errorf("with no account: %v", err)
	}
	login := `{"auths": {"` + strings.TrimPrefix(url, "http://") + `": {"username": "ci", "password": "password"}}}`
	if err := os.WriteFile(filepath.Join(dir, "config.json"), []byte(login), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := pull(); err != nil {
		t.Errorf("with an account: %v", err)
	}
}

// TestThreeBlobs counts how many are read at a time.
func TestThreeBlobs(t *testing.T) {
	reg := registrytest.New(registrytest.Config{})
	var layers [][]byte
	for i := range uint64(9) {
		layers = append(layers, registrytest.Layer(i, 100))
	}
	reg.Push("quay.test/org/app", "v1", registrytest.NewImage(layers...))
	reg.Fault(registrytest.Match{}, registrytest.Header("Cache-Status", "breakwater; hit"))
	now, most := make(chan int, 1), 0
	now <- 0
	arrived := make(chan struct{}, 20)
	release := make(chan struct{})
	reg.Fault(registrytest.Match{Kind: registrytest.KindBlob}, func(w http.ResponseWriter, r *http.Request, next http.Handler) {
		n := <-now + 1
		most = max(most, n)
		now <- n
		arrived <- struct{}{}
		<-release
		next.ServeHTTP(w, r)
		now <- <-now - 1
	})
	mirror, ref := open(t, reg, nil)
	go func() {
		for range 3 {
			<-arrived // all three together, before the first is let go
		}
		select {
		case <-arrived: // and no fourth one, as far as somebody can tell who waits
		case <-time.After(200 * time.Millisecond):
		}
		close(release)
	}()
	if _, err := mirror.Pull(t.Context(), ref, func(int64, int64) {}); err != nil {
		t.Error(err)
	}
	if <-now; most != 3 {
		t.Errorf("%d at a time", most)
	}
}

func TestNew(t *testing.T) {
	for _, wrong := range []string{"", "127.0.0.1:5000", "unix:///x", "http://", "http://x/y", "http://a:b@x", "http://x?y", "http://a b"} {
		if _, err := warm.New(wrong, nil); err == nil {
			t.Errorf("%q is good", wrong)
		}
	}
	for _, good := range []string{"http://127.0.0.1:5000", "https://mirror.internal", "https://mirror", "http://[::1]:5000"} {
		if _, err := warm.New(good, nil); err != nil {
			t.Errorf("%q: %v", good, err)
		}
	}
}
