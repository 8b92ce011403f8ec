package proxy

import (
	"bytes"
	"context"
	"fmt"
	"mime"
	"net/http"
	"net/http/httptest"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"breakwater/pkg/registrytest"
	"breakwater/storage"

	"github.com/google/go-cmp/cmp"
	"github.com/opencontainers/go-digest"
	ispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// ranged is a mirror and its upstream, which has blobs that nobody has asked for yet.
type ranged struct {
	*Mirror
	manifest []byte

	mu   sync.Mutex // guards what follows: the one blob that there is
	dgst digest.Digest
	raw  []byte
	at   int // upstream rests before this byte
}

func newRanged(f *testing.F) *ranged {
	f.Helper()
	r := &ranged{manifest: registrytest.NewImage(registrytest.Layer(1, 10)).Raw}
	up := httptest.NewServer(http.HandlerFunc(r.serveUpstream))
	f.Cleanup(up.Close)
	store, err := storage.Open(storage.Config{Dir: f.TempDir()})
	if err != nil {
		f.Fatal(err)
	}
	yaml := strings.Replace(oneUpstream, "http://quay.test:80", up.URL, 1)
	if r.Mirror, err = New(Config{Config: loaded(f, yaml), Store: store}); err != nil {
		f.Fatal(err)
	}
	f.Cleanup(func() {
		r.Close(context.Background())
		if err := store.Close(); err != nil {
			f.Error(err)
		}
	})
	return r
}

// serveUpstream sends the blob in two parts, so that those who read it have to wait for the second.
func (r *ranged) serveUpstream(w http.ResponseWriter, req *http.Request) {
	if strings.Contains(req.URL.Path, "/manifests/") {
		w.Header().Set("Content-Type", ispec.MediaTypeImageManifest)
		_, _ = w.Write(r.manifest)
		return
	}
	r.mu.Lock()
	raw, at := r.raw, r.at
	r.mu.Unlock()
	w.Header().Set("Content-Type", blobType)
	w.Header().Set("Content-Length", strconv.Itoa(len(raw)))
	_, _ = w.Write(raw[:at])
	_ = http.NewResponseController(w).Flush()
	time.Sleep(time.Duration(at%3) * 100 * time.Microsecond)
	_, _ = w.Write(raw[at:])
}

// renew is a blob that has never been asked for.
func (r *ranged) renew(at uint) (digest.Digest, []byte) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.raw == nil {
		r.raw = registrytest.Layer(1, 100<<10)
	}
	r.raw = slices.Clone(r.raw)
	for i := range r.raw { // counts
		if r.raw[i]++; r.raw[i] != 0 {
			break
		}
	}
	r.dgst, r.at = digest.FromBytes(r.raw), int(at%uint(len(r.raw)))
	return r.dgst, r.raw
}

// get asks the mirror for something of a repository.
func (r *ranged) get(path string, header http.Header) *httptest.ResponseRecorder {
	req := httptest.NewRequest(http.MethodGet, app+path, nil)
	req.Header = header
	w := httptest.NewRecorder()
	r.ServeHTTP(w, byLoopback(req))
	return w
}

// A blob on its way, a blob on disk and a manifest are answered as net/http answers for bytes.
func FuzzRange(f *testing.F) {
	r := newRanged(f)
	for _, seed := range []string{"", "bytes=0-0", "bytes=0-", "bytes=-1", "bytes=5-4", "bytes=102399-", "bytes=102400-", "bytes=-102401", "bytes=0-9,20-29", "bytes=0-9,5-14,-1", "bytes=,", "bytes=-",
		"bytes=0-18446744073709551615", "bytes=9223372036854775807-", "items=0-1", "bytes 0-1", "Bytes=0-1", "bytes= 0 - 1 ", "bytes=--1", "bytes=0-0, ,", "bytes=0x0-1", "bytes=0-99999,0-99999,0-99999"} {
		f.Add(seed, "", "", uint(0))
		f.Add(seed, "ETAG", "", uint(50<<10))
		f.Add(seed, `W/"x"`, "ETAG", uint(100<<10-1))
		f.Add(seed, "Sat, 01 Jan 2000 00:00:00 GMT", "*", uint(99<<10+1))
	}
	f.Fuzz(func(t *testing.T, ranges, ifRange, ifNoneMatch string, at uint) {
		header := func(dgst digest.Digest) http.Header {
			h := http.Header{}
			for name, value := range map[string]string{"Range": ranges, "If-Range": ifRange, "If-None-Match": ifNoneMatch} {
				if value != "" {
					h[name] = []string{strings.ReplaceAll(value, "ETAG", `"`+dgst.String()+`"`)}
				}
			}
			return h
		}
		dgst, raw := r.renew(at)
		want := served(header(dgst), blobType, dgst, raw)
		same(t, "a blob on its way", want, r.get("/blobs/"+dgst.String(), header(dgst)))
		for r.inFlight(dgst) {
			time.Sleep(100 * time.Microsecond)
		}
		same(t, "a stored blob", want, r.get("/blobs/"+dgst.String(), header(dgst)))
		dgst = digest.FromBytes(r.manifest)
		want = served(header(dgst), ispec.MediaTypeImageManifest, dgst, r.manifest)
		same(t, "a manifest", want, r.get("/manifests/"+dgst.String(), header(dgst)))
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
