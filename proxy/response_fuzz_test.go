package proxy

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"mime"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"strings"
	"testing"
	"time"

	"breakwater/pkg/oci"
	"breakwater/pkg/registrytest"
	"breakwater/proxy/upstream"
	"breakwater/storage"

	"github.com/google/go-cmp/cmp"
	"github.com/opencontainers/go-digest"
)

// ranged is a mirror of which a blob is stored, and then, under other names, on its way.
type ranged struct {
	*Mirror
	raw      []byte
	dgst     digest.Digest
	manifest oci.Manifest
	flights  int
}

func newRanged(f *testing.F) *ranged {
	f.Helper()
	store, err := storage.Open(storage.Config{Dir: f.TempDir()})
	if err != nil {
		f.Fatal(err)
	}
	nowhere := upstream.Settings{
		Lookup: func(context.Context, string) ([]netip.Addr, error) { return nil, io.ErrClosedPipe },
		Dial:   func(context.Context, string, string) (net.Conn, error) { return nil, io.ErrClosedPipe },
	}
	m, err := New(Config{Config: loaded(f, oneUpstream), Store: store, Upstreams: nowhere})
	if err != nil {
		f.Fatal(err)
	}
	f.Cleanup(func() {
		m.Close(context.Background())
		if err := store.Close(); err != nil {
			f.Error(err)
		}
	})
	raw := registrytest.Layer(1, 100<<10)
	r := &ranged{Mirror: m, raw: raw, dgst: digest.FromBytes(raw)}
	ingest := r.ingest(f, oci.Repository{Registry: "quay.test", Name: "org/app"})
	if err := r.finish(ingest, 0); err != nil {
		f.Fatal(err)
	}
	image := registrytest.NewImage(raw)
	if r.manifest, err = oci.ParseManifest(image.MediaType, image.Raw, digest.SHA256); err != nil {
		f.Fatal(err)
	}
	if err := store.PutManifest(oci.Repository{Registry: "quay.test", Name: "org/app"}, r.manifest, storage.Confirmation{}); err != nil {
		f.Fatal(err)
	}
	return r
}

func (r *ranged) ingest(t testing.TB, repo oci.Repository) *storage.Ingest {
	t.Helper()
	ingest, err := r.store.Ingest(repo, r.dgst, int64(len(r.raw)))
	if err != nil {
		t.Fatal(err)
	}
	return ingest
}

// finish writes what is missing. What is confirmed so is private: no other repository reaches it.
func (r *ranged) finish(ingest *storage.Ingest, from int) error {
	if _, err := ingest.Write(r.raw[from:]); err != nil {
		return err
	}
	if err := ingest.Verify(); err != nil {
		return err
	}
	return ingest.Commit(storage.Confirmation{Credential: "robot"})
}

// get asks the mirror for a path.
func (r *ranged) get(path string, header http.Header) *httptest.ResponseRecorder {
	req := httptest.NewRequest(http.MethodGet, path, nil)
	req.Host, req.Header = "localhost", header
	w := httptest.NewRecorder()
	r.ServeHTTP(w, req)
	return w
}

// whileFilled asks for the blob while a fill of it goes on, in a repository where nobody has it yet.
func (r *ranged) whileFilled(t *testing.T, header http.Header, at int) *httptest.ResponseRecorder {
	t.Helper()
	r.flights++
	repo := oci.Repository{Registry: "quay.test", Name: fmt.Sprintf("flight/%d", r.flights)}
	client, err := r.client(repo)
	if err != nil {
		t.Fatal(err)
	}
	src := &source{ref: oci.Reference{Repository: repo, Digest: r.dgst}, client: client, public: true}
	f := &fill{dgst: r.dgst, ready: make(chan struct{}), sources: []*source{src}}
	ingest := r.ingest(t, repo)
	if _, err := ingest.Write(r.raw[:at]); err != nil {
		t.Fatal(err)
	}
	r.fills.mu.Lock()
	r.fills.open = map[digest.Digest]*fill{r.dgst: f}
	r.fills.mu.Unlock()
	f.publish(ingest, src)
	finished := make(chan error)
	go func() {
		time.Sleep(time.Duration(at%3) * 100 * time.Microsecond) // so that some wait for it, and some do not
		finished <- r.finish(ingest, at)
	}()
	w := r.get("/v2/"+repo.String()+"/blobs/"+r.dgst.String(), header)
	if err := <-finished; err != nil {
		t.Fatal(err)
	}
	r.leaveFill(f)
	return w
}

// A blob on disk, a blob on its way and a manifest are answered as net/http answers for bytes.
func FuzzRange(f *testing.F) {
	r := newRanged(f)
	etag := `"` + r.dgst.String() + `"`
	for _, seed := range []string{"", "bytes=0-0", "bytes=0-", "bytes=-1", "bytes=5-4", "bytes=102399-", "bytes=102400-", "bytes=-102401", "bytes=0-9,20-29", "bytes=0-9,5-14,-1", "bytes=,", "bytes=-",
		"bytes=0-18446744073709551615", "bytes=9223372036854775807-", "items=0-1", "bytes 0-1", "Bytes=0-1", "bytes= 0 - 1 ", "bytes=--1", "bytes=0-0, ,", "bytes=0x0-1", "bytes=0-99999,0-99999,0-99999"} {
		f.Add(seed, "", "", uint(0))
		f.Add(seed, etag, "", uint(50<<10))
		f.Add(seed, `W/"x"`, etag, uint(100<<10))
		f.Add(seed, "Sat, 01 Jan 2000 00:00:00 GMT", "*", uint(99<<10+1))
	}
	f.Fuzz(func(t *testing.T, ranges, ifRange, ifNoneMatch string, at uint) {
		header := http.Header{}
		for name, value := range map[string]string{"Range": ranges, "If-Range": ifRange, "If-None-Match": ifNoneMatch} {
			if value != "" {
				header[name] = []string{value}
			}
		}
		app := oci.Repository{Registry: "quay.test", Name: "org/app"}
		same(t, "a stored blob", served(header, blobType, r.dgst, r.raw), r.get("/v2/"+app.String()+"/blobs/"+r.dgst.String(), header))
		same(t, "a blob in flight", served(header, blobType, r.dgst, r.raw), r.whileFilled(t, header, int(at%uint(len(r.raw)))))
		m := r.manifest
		same(t, "a manifest", served(header, m.MediaType, m.Digest, m.Raw), r.get("/v2/"+app.String()+"/manifests/"+m.Digest.String(), header))
	})
}

// served is what net/http makes of it.
func served(header http.Header, mediaType string, dgst digest.Digest, raw []byte) *httptest.ResponseRecorder {
	req := httptest.NewRequest(http.MethodGet, "/", nil)
	req.Header = header
	w := httptest.NewRecorder()
	setContent(w.Header(), mediaType, dgst)
	http.ServeContent(w, req, "", time.Time{}, bytes.NewReader(raw))
	return w
}

func same(t *testing.T, what string, want, got *httptest.ResponseRecorder) {
	t.Helper()
	if want.Code == http.StatusRequestedRangeNotSatisfiable { // the words are ours
		want.Body, got.Body = nil, nil
		want.Header().Set("Content-Type", got.Header().Get("Content-Type"))
		want.Header().Set("Content-Length", got.Header().Get("Content-Length"))
	}
	if diff := cmp.Diff(told(want), told(got)); diff != "" || !bytes.Equal(unbound(want), unbound(got)) {
		t.Errorf("%s (-want +got):\n%s%d bytes of body, want %d", what, diff, len(unbound(got)), len(unbound(want)))
	}
}

// told is what an answer says of its body.
func told(w *httptest.ResponseRecorder) []string {
	lines := []string{fmt.Sprint(w.Code)}
	for _, name := range []string{"Content-Type", "Content-Length", "Content-Range", "Accept-Ranges", "Etag", "Content-Encoding"} {
		value, _, _ := strings.Cut(w.Header().Get(name), "; boundary=")
		if w.Code == http.StatusRequestedRangeNotSatisfiable && (name == "Etag" || name == "Accept-Ranges") {
			value = "" // they describe what is not sent
		}
		lines = append(lines, name+": "+value)
	}
	return lines
}

// unbound is the body, with the boundary that net/http has drawn for its parts taken out.
func unbound(w *httptest.ResponseRecorder) []byte {
	if w.Body == nil {
		return nil
	}
	_, parameters, err := mime.ParseMediaType(w.Header().Get("Content-Type"))
	if boundary := parameters["boundary"]; err == nil && boundary != "" {
		return bytes.ReplaceAll(w.Body.Bytes(), []byte(boundary), nil)
	}
	return w.Body.Bytes()
}
