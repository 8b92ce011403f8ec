package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"time"

	"breakwater/pkg/oci"
	"breakwater/proxy"
	"breakwater/storage"
	"breakwater/storage/s3"

	"github.com/opencontainers/go-digest"
)

const (
	capacity = 256 << 20 // of a host's disk: never reached
	// behind is how far a host's answer may be behind the fleet's record (DESIGN 9).
	behind = 5 * time.Second
	// bucketWait is how long hosts wait for the bucket (DESIGN 9).
	bucketWait = 2 * time.Second
	// slack is what a busy machine adds to any bound.
	slack = 2 * time.Second
	// again is of how many pulls one gets all blobs, though the host's engine has them.
	again = 20
)

// host is a mirror with its disk and its bucket, and the engine beside it that pulls.
type host struct {
	*fleet
	index  int
	dir    string
	disk   *storage.Disk
	shared *s3.Bucket
	mirror *proxy.Mirror
	random *rand.Rand
	late   bool // it is new in the outage

	mu     sync.Mutex // guards what follows
	engine map[digest.Digest]bool
	stored map[string]bool // paths that were answered whole
}

// host starts one more.
func (f *fleet) host(index int) (h *host, err error) {
	h = &host{fleet: f, index: index, dir: filepath.Join(f.disks, "host"+strconv.Itoa(index)), random: rand.New(rand.NewPCG(f.seed, 100+uint64(index))),
		late: index >= f.size, engine: map[digest.Digest]bool{}, stored: map[string]bool{}}
	defer func() {
		if err != nil {
			err = errors.Join(fmt.Errorf("host %d: %w", index, err), h.close())
		}
	}()
	log := slog.New(f.log.of(index))
	if h.disk, err = storage.Open(storage.Config{Dir: h.dir, Capacity: capacity, Logger: log}); err != nil {
		return nil, err
	}
	if h.shared, err = f.bucket.open(f.cfg, f.bucket.url); err != nil {
		return nil, err
	}
	h.mirror, err = proxy.New(proxy.Config{Config: f.cfg, Store: h.disk, Shared: h.shared, Logger: log})
	return h, err
}

// close ends it, and removes what it has stored.
func (h *host) close() error {
	at, cancel := context.WithCancel(context.Background())
	cancel() // at once
	if h.mirror != nil {
		h.mirror.Close(at)
	}
	if h.shared != nil {
		h.shared.Close()
	}
	var err error
	if h.disk != nil {
		err = h.disk.Close()
	}
	return errors.Join(err, os.RemoveAll(h.dir))
}

// live pulls one tag or another until ctx ends.
func (h *host) live(ctx context.Context, pause time.Duration) {
	for wait(ctx, time.Duration(h.random.Int64N(int64(2*pause)))) {
		h.pull(ctx, h.library.tags[h.random.IntN(len(h.library.tags))], h.random.IntN(again) == 0)
	}
}

// pull does what an engine does: HEAD of the tag, GET of the manifest and of the blobs that it lacks, or of
// all. It reports whether all of them came.
func (h *host) pull(ctx context.Context, tag oci.Reference, all bool) bool {
	h.tally.note(func(n *counts) { n.pulls++ })
	dgst := digest.Digest(h.tag(ctx, tag))
	image, known := h.library.image(dgst)
	if !known {
		return false // it was refused, or violates
	}
	h.mu.Lock()
	has := h.engine[dgst]
	h.mu.Unlock()
	if has && !all {
		return true
	}
	whole := h.get(ctx, tag, "manifests", dgst.String(), image.Raw)
	for _, blob := range image.Blobs {
		whole = whole && h.get(ctx, tag, "blobs", blob.Digest.String(), blob.Bytes)
	}
	if whole {
		h.mu.Lock()
		h.engine[dgst] = true
		h.mu.Unlock()
		h.tally.note(func(n *counts) { n.whole++ })
	}
	return whole
}

// tag asks what a tag names; "" if there is no answer.
func (h *host) tag(ctx context.Context, tag oci.Reference) string {
	begun := time.Now()
	got := h.ask(ctx, http.MethodHead, tag, "manifests", tag.Tag)
	if got.Code != http.StatusOK {
		if got.Code != 0 && h.late && h.library.isPublished(tag.String(), begun.Add(-behind)) && h.tally.bucketInTime() {
			h.violate(tag, got, "a new host does not get what is published")
		}
		return ""
	}
	dgst := digest.Digest(got.Header().Get("Docker-Content-Digest"))
	stale, name := got.Header().Get("Warning") != "", tag.String()
	if !h.library.named(name, dgst, time.Time{}) {
		h.violate(tag, got, "answers with %s, which the tag never named", dgst)
		return ""
	}
	if !stale && !h.library.named(name, dgst, begun.Add(-freshFor-2*behind-slack)) {
		h.violate(tag, got, "answers with %s as fresh, which no upstream has named for more than %s", dgst, freshFor)
	}
	since := begun.Add(-behind)
	if !stale {
		since = since.Add(-freshFor) // it need not ask anybody until then
	}
	said := h.library.compare(name, dgst, since)
	h.tally.answered(stale, said, time.Since(begun))
	if said == disagrees {
		h.log.of(h.index).dissent(got.Header())
	}
	if since = since.Add(-slack); h.tally.phase() == outage && h.library.compare(name, dgst, since) == disagrees {
		h.violate(tag, got, "answers with %s, which the fleet's record has not named for %s", dgst, time.Since(since).Round(time.Second))
	}
	return dgst.String()
}

// get reports whether it has got what it should.
func (h *host) get(ctx context.Context, repo oci.Reference, kind, name string, want []byte) bool {
	got := h.ask(ctx, http.MethodGet, repo, kind, name)
	if got.Code != http.StatusOK {
		return false
	}
	length, err := strconv.Atoi(got.Header().Get("Content-Length"))
	short := err == nil && got.Body.Len() < length || got.cut
	switch {
	case short:
		h.tally.note(func(n *counts) { n.short++ })
		return false
	case !bytes.Equal(got.Body.Bytes(), want):
		h.violate(repo, got, "%s came as complete with %d bytes of %d, not all of them right", name, got.Body.Len(), len(want))
		return false
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	h.stored[kind+name] = true
	return true
}

// answer is what came of a request.
type answer struct {
	*httptest.ResponseRecorder
	cut bool // the connection ends short
}

// ask sends one request, and checks the refusal if there is one.
func (h *host) ask(ctx context.Context, method string, repo oci.Reference, kind, name string) (got answer) {
	loopback := &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1), Port: 5000} // where a mirror serves everybody
	r := httptest.NewRequestWithContext(context.WithValue(ctx, http.LocalAddrContextKey, loopback), method, fmt.Sprintf("/v2/%s/%s/%s/%s", repo.Registry, repo.Name, kind, name), nil)
	r.Host, r.RemoteAddr = "localhost", "127.0.0.1:40000"
	r.Header.Set("Accept", strings.Join(oci.ManifestTypes, ", "))
	got.ResponseRecorder = httptest.NewRecorder()
	begun := time.Now()
	func() {
		defer func() { got.cut = recover() != nil }() // as net/http does with http.ErrAbortHandler
		h.mirror.ServeHTTP(got, r)
	}()
	if ctx.Err() != nil {
		got.Code = 0 // nobody waits for it
		return got
	}
	took := time.Since(begun)
	h.mu.Lock()
	stored := h.stored[kind+name]
	h.mu.Unlock()
	h.tally.note(func(n *counts) {
		n.requests++
		n.statuses[got.Code]++
		n.slowest = max(n.slowest, took)
	})
	switch {
	case got.Code == http.StatusNotFound:
		h.violate(repo, got, "%s %s: it exists: %s", method, name, got.Body)
	case got.Code != http.StatusOK && stored:
		h.violate(repo, got, "%s %s: it is stored, and refused: %s", method, name, got.Body)
	case got.Code != http.StatusOK:
		h.tally.refused(got.Code, kind, got.Body.String())
	}
	return got
}

// violate notes an answer that should not have been.
func (h *host) violate(ref oci.Reference, got answer, format string, args ...any) {
	h.tally.violate("host %d, %s [%d, %s, Warning %q]: %s", h.index, ref, got.Code, got.Header().Get("Cache-Status"), got.Header().Get("Warning"), fmt.Sprintf(format, args...))
}
