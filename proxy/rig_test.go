package proxy

import (
	"context"
	"crypto/tls"
	"io"
	"log/slog"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"breakwater/pkg/config"
	"breakwater/pkg/registrytest"
	"breakwater/proxy/upstream"
	"breakwater/storage"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// rig is a mirror and its upstream quay.test on a network in memory, in a bubble of its own time.
type rig struct {
	*testing.T
	network *registrytest.Network
	quay    *registrytest.Registry
	mirror  *Mirror
	store   *storage.Disk
	dir     string
	client  *http.Client
	server  *registrytest.Server
}

const oneUpstream = `
registries:
  quay.test: {upstreams: [{url: "http://quay.test:80"}]}
  docker.io: {upstreams: [{url: "http://hub.test:80"}]}
`

// bubble runs f with a rig whose configuration is yaml.
func bubble(t *testing.T, yaml string, f func(*rig)) {
	t.Helper()
	dir := t.TempDir() // outside: its removal must come after everything in the bubble
	synctest.Test(t, func(t *testing.T) {
		r := &rig{T: t, network: registrytest.NewNetwork(), quay: registrytest.New(registrytest.Config{}), dir: dir}
		t.Cleanup(func() { _ = r.network.Close() })
		r.quay.Serve(t, r.network, "quay.test:80")
		r.start(yaml)
		t.Cleanup(r.stop)
		f(r)
	})
}

func (r *rig) config(yaml string) *config.Config {
	r.Helper()
	file := filepath.Join(r.dir, "config.yaml")
	if err := os.WriteFile(file, []byte(yaml), 0o600); err != nil {
		r.Fatal(err)
	}
	cfg, err := config.Load(file, nil, nil)
	if err != nil {
		r.Fatal(err)
	}
	return cfg
}

// start opens the store and serves a mirror at localhost:5000.
func (r *rig) start(yaml string) {
	r.Helper()
	var err error
	if r.store, err = storage.Open(storage.Config{Dir: filepath.Join(r.dir, "data"), Capacity: 1 << 30}); err != nil {
		r.Fatal(err)
	}
	var logged io.Writer = io.Discard
	if testing.Verbose() {
		logged = r.Output()
	}
	r.mirror, err = New(Config{
		Config: r.config(yaml),
		Store:  r.store,
		Upstreams: upstream.Settings{
			Lookup: r.network.Lookup,
			Dial:   r.network.DialContext,
			TLS:    &tls.Config{RootCAs: r.network.CA.Pool()},
		},
		Logger: slog.New(slog.NewTextHandler(logged, nil)),
	})
	if err != nil {
		r.Fatal(err)
	}
	listener, err := r.network.Listen("localhost:5000")
	if err != nil {
		r.Fatal(err)
	}
	r.server = registrytest.Serve(listener, r.mirror)
	r.client = &http.Client{Transport: &http.Transport{DialContext: r.network.DialContext, DisableCompression: true, DisableKeepAlives: true}}
}

func (r *rig) stop() {
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	_ = r.server.Close()
	r.mirror.Close(ctx)
	if err := r.store.Close(); err != nil {
		r.Error(err)
	}
}

// answer is what a client got, and how long it took.
type answer struct {
	*http.Response
	body []byte
	err  error // of reading the body
	took time.Duration
}

// do sends a request to the mirror; header is "Name: value" lines.
func (r *rig) do(method, path string, header ...string) answer {
	r.Helper()
	req, err := http.NewRequest(method, "http://localhost:5000"+path, nil)
	if err != nil {
		r.Fatal(err)
	}
	for _, line := range header {
		name, value, _ := strings.Cut(line, ": ")
		if name == "Host" {
			req.Host = value
		}
		req.Header.Add(name, value)
	}
	started := time.Now()
	resp, err := r.client.Do(req)
	if err != nil {
		r.Fatalf("%s %s: %v", method, path, err)
	}
	took := time.Since(started)
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	return answer{resp, body, err, took}
}

func (r *rig) get(path string, header ...string) answer {
	r.Helper()
	return r.do(http.MethodGet, path, header...)
}

// want fails the test unless the answer has that status and a body without errors.
func (a answer) want(r *rig, status int) answer {
	r.Helper()
	if a.StatusCode != status || a.err != nil {
		r.Fatalf("%s %s: %d, want %d; %v; Cache-Status: %s\n%.400s", a.Request.Method, a.Request.URL, a.StatusCode, status, a.err, a.Header.Get("Cache-Status"), a.body)
	}
	return a
}

// stale fails the test unless the answer says that it is stale, and truly how old.
func (a answer) stale(r *rig, age string) answer {
	r.Helper()
	if !strings.HasPrefix(a.Header.Get("Warning"), "299 - \"") || a.Header.Get("Age") != age {
		r.Errorf("%s: Warning %q, Age %q, want a warning and %q", a.Request.URL, a.Header.Get("Warning"), a.Header.Get("Age"), age)
	}
	return a
}

// fresh fails the test if the answer says that it is stale.
func (a answer) fresh(r *rig) answer {
	r.Helper()
	if w := a.Header.Get("Warning"); w != "" {
		r.Errorf("%s: Warning %q on an answer that should be fresh", a.Request.URL, w)
	}
	return a
}
