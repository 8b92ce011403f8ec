package proxy

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"breakwater/pkg/config"
	"breakwater/pkg/oci"
	"breakwater/pkg/registrytest"
	"breakwater/proxy/upstream"
	"breakwater/storage"
	"breakwater/storage/s3"

	"github.com/opencontainers/go-digest"
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
	disk    storage.Config
	shared  *s3.Bucket // nil if the mirror has none
	untidy  bool       // files may be left in tmp
	client  *http.Client
	server  *registrytest.Server
	secure  *registrytest.Server // quay.test over https, in some tests
}

const oneUpstream = `
registries:
  quay.test: {upstreams: [{url: "http://quay.test:80"}]}
  docker.io: {upstreams: [{url: "http://hub.test:80"}]}
`

// app is the repository of most tests, by prefix.
const app = "/v2/quay.test/org/app"

// withTags is oneUpstream with these settings for tags, such as "fresh_for: 1m". What is asked for on
// the bare path is quay.test's too.
func withTags(tags string) string {
	return "default_registry: quay.test\ntags: {" + tags + "}" + oneUpstream
}

// capacity of the store: an ingest of unknown size may have a tenth of it.
const capacity = 64 << 20

// bubble runs f with a rig whose configuration is yaml.
func bubble(t *testing.T, yaml string, f func(*rig)) {
	t.Helper()
	bubbleOn(t, storage.Config{}, yaml, f)
}

// bubbleOn is bubble with a disk that may fail.
func bubbleOn(t *testing.T, disk storage.Config, yaml string, f func(*rig)) {
	t.Helper()
	dir := t.TempDir() // outside: its removal must come after everything in the bubble
	synctest.Test(t, func(t *testing.T) {
		r := &rig{T: t, network: registrytest.NewNetwork(), quay: registrytest.New(registrytest.Config{}), dir: dir, disk: disk}
		t.Cleanup(func() { _ = r.network.Close() })
		r.quay.Serve(t, r.network, "quay.test:80")
		r.start(yaml)
		t.Cleanup(r.stop)
		f(r)
	})
}

// config loads yaml, in which PASSWORD is a file with one in it. Nothing is completed unless it says so.
func (r *rig) config(yaml string) *config.Config {
	r.Helper()
	file, password := filepath.Join(r.dir, "config.yaml"), filepath.Join(r.dir, "password")
	for name, text := range map[string]string{file: strings.ReplaceAll(yaml, "PASSWORD", password), password: registrytest.Canary + "\n"} {
		if err := os.WriteFile(name, []byte(text), 0o600); err != nil {
			r.Fatal(err)
		}
	}
	cfg, err := config.Load(file, nil, nil)
	if err != nil {
		r.Fatal(err)
	}
	if !strings.Contains(yaml, "completion:") {
		cfg.Completion.Images = config.CompleteNone
	}
	if r.shared != nil {
		cfg.Shared.Wait = config.Set(2 * time.Second) // as it is by default where there is a bucket
	}
	return cfg
}

// start opens the store and serves a mirror at localhost:5000.
func (r *rig) start(yaml string) {
	r.Helper()
	var err error
	disk := r.disk
	disk.Dir, disk.Capacity = filepath.Join(r.dir, "data"), capacity
	if r.store, err = storage.Open(disk); err != nil {
		r.Fatal(err)
	}
	logged := registrytest.Watch(r)
	if testing.Verbose() {
		logged = io.MultiWriter(logged, r.Output())
	}
	r.mirror, err = New(Config{
		Config: r.config(yaml),
		Store:  r.store,
		Shared: r.shared,
		Upstreams: upstream.Settings{
			Lookup: r.network.Lookup,
			Dial:   r.network.DialContext,
			TLS:    &tls.Config{RootCAs: r.network.CA.Pool()},
		},
		Logger: slog.New(slog.NewTextHandler(logged, &slog.HandlerOptions{Level: slog.LevelDebug})),
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
	for _, path := range []string{"/metrics", "/readyz"} {
		w := httptest.NewRecorder()
		r.mirror.Admin().ServeHTTP(w, httptest.NewRequest(http.MethodGet, path, nil))
		r.tells(path, w.Result().Header, w.Body.Bytes())
	}
	r.mirror.Close(ctx)
	if err := r.store.Close(); err != nil {
		r.Error(err)
	}
	r.scan()
}

// scan fails the test if the store holds what is not its name's content, or what was left half-done.
func (r *rig) scan() {
	r.Helper()
	stored, err := filepath.Glob(filepath.Join(r.dir, "data", "blobs", "*", "*"))
	if err != nil {
		r.Fatal(err)
	}
	for _, name := range stored {
		raw, err := os.ReadFile(name)
		if want := digest.NewDigestFromEncoded(digest.Algorithm(filepath.Base(filepath.Dir(name))), filepath.Base(name)); err != nil || want.Algorithm().FromBytes(raw) != want {
			r.Errorf("stored %s holds %d other bytes: %v", want, len(raw), err)
		}
	}
	left, err := os.ReadDir(filepath.Join(r.dir, "data", "tmp"))
	left = slices.DeleteFunc(left, func(e os.DirEntry) bool { return strings.HasPrefix(e.Name(), "parked-") })
	if err != nil || len(left) > 0 && !r.untidy {
		r.Errorf("left in tmp: %v, %v", left, err)
	}
}

// answer is what a client got, and how long it took.
type answer struct {
	*http.Response
	body []byte
	err  error // of reading the body
	took time.Duration
}

// whom is somebody who calls, from somewhere.
type whom struct {
	name   string
	host   string   // and port that they connect to
	header []string // that they send
}

// Where a mirror is: by loopback, or beyond it.
const (
	near = "localhost:5000"
	far  = "mirror.test:5000"
)

// do sends a request to the mirror; header is "Name: value" lines.
func (r *rig) do(method, path string, header ...string) answer {
	r.Helper()
	return r.by(whom{host: near}, method, path, header...)
}

// by sends a request of somebody's.
func (r *rig) by(who whom, method, path string, header ...string) answer {
	r.Helper()
	req, err := http.NewRequest(method, "http://"+who.host+path, nil)
	if err != nil {
		r.Fatal(err)
	}
	for _, line := range slices.Concat(who.header, header) {
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
	r.tells(path, resp.Header, body)
	return answer{resp, body, err, took}
}

// tells fails the test if a secret is among what is told to others.
func (r *rig) tells(path string, header http.Header, body []byte) {
	r.Helper()
	if leak := registrytest.Leak(fmt.Sprint(header) + string(body)); leak != "" {
		r.Errorf("%s tells a secret: %s", path, leak)
	}
}

func (r *rig) get(path string, header ...string) answer {
	r.Helper()
	return r.do(http.MethodGet, path, header...)
}

// pull gets a tag of app and, once the image is there, all of its blobs.
func (r *rig) pull(tag string, image registrytest.Image) {
	r.Helper()
	got := r.get(app+"/manifests/"+tag).want(r, http.StatusOK)
	if dgst := got.Header.Get("Docker-Content-Digest"); dgst != image.Digest().String() {
		r.Fatalf("%s is %s, want %s", tag, dgst, image.Digest())
	}
	for _, blob := range image.Blobs {
		r.get(app+"/blobs/"+blob.Digest.String()).want(r, http.StatusOK).is(r, blob.Bytes)
	}
	synctest.Wait() // the client does not wait for the disk
}

// asked is how many requests the upstream has had since it was last forgotten.
func (r *rig) asked() int { return r.quay.Count(registrytest.Match{}) }

// raw sends a request on a connection of its own, and returns all that comes back, byte by byte, and
// how it ended: nil for a clean close.
func (r *rig) raw(method, path string) (head, body string, end error) {
	r.Helper()
	conn, err := r.network.DialContext(r.Context(), "tcp", "localhost:5000")
	if err != nil {
		r.Fatal(err)
	}
	defer conn.Close()
	if _, err := fmt.Fprintf(conn, "%s %s HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n", method, path); err != nil {
		r.Fatal(err)
	}
	raw, end := io.ReadAll(conn)
	r.tells(path, nil, raw)
	head, body, _ = strings.Cut(string(raw), "\r\n\r\n")
	return head, body, end
}

// byLoopback makes a request one that has come from this host, for tests that have no connection.
func byLoopback(req *http.Request) *http.Request {
	req = req.WithContext(context.WithValue(req.Context(), http.LocalAddrContextKey, &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1), Port: 5000}))
	req.Host, req.RemoteAddr = "127.0.0.1:5000", "127.0.0.1:40000"
	return req
}

// repository is what quay.test calls so.
func (r *rig) repository(name string) oci.Repository {
	r.Helper()
	repo, err := oci.ParseRepository("quay.test", name)
	if err != nil {
		r.Fatal(err)
	}
	return repo
}

// holds reports whether the blob is among the files of the store, whoever may read it.
func (r *rig) holds(dgst digest.Digest) bool {
	_, err := os.Stat(filepath.Join(r.dir, "data", "blobs", dgst.Algorithm().String(), dgst.Encoded()))
	return err == nil
}

// state is how the breaker of quay.test stands in a class.
func (r *rig) state(class string) string {
	for _, c := range r.mirror.pool.Clients("quay.test") {
		for _, h := range c.Health() {
			if h.Class == class {
				return h.State
			}
		}
	}
	return "unknown"
}

// is fails the test unless the body is exactly that.
func (a answer) is(r *rig, body []byte) answer {
	r.Helper()
	if !bytes.Equal(a.body, body) {
		r.Errorf("%s: %d bytes that are not the %d expected: %.200q", a.Request.URL, len(a.body), len(body), a.body)
	}
	return a
}

// code is that of the error in the body; "" if there is none.
func (a answer) code() string {
	var body struct {
		Errors []struct{ Code, Message string }
	}
	if json.Unmarshal(a.body, &body) != nil || len(body.Errors) == 0 {
		return ""
	}
	return body.Errors[0].Code
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

// inFlight reports whether a public blob is on its way.
func (m *Mirror) inFlight(dgst digest.Digest) bool {
	m.fills.mu.Lock()
	defer m.fills.mu.Unlock()
	return m.fills.open[fillKey{dgst: dgst}] != nil
}
