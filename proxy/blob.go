package proxy

import (
	"context"
	"errors"
	"io"
	"io/fs"
	"net/http"
	"strconv"
	"sync"
	"time"

	"breakwater/pkg/oci"
	"breakwater/proxy/upstream"
	"breakwater/storage"

	"github.com/distribution/distribution/v3/registry/api/errcode"
)

const blobType = "application/octet-stream"

// errNeedsSize is what HTTP/1.0 gets of a blob whose size nobody tells.
var errNeedsSize = &oci.Error{Status: http.StatusHTTPVersionNotSupported, Code: errcode.ErrorCodeUnsupported,
	Message: "upstream does not tell the size of this blob, which HTTP/1.0 needs; ask by HTTP/1.1, or again once it is stored"}

// serveBlob sends a blob from storage or, on a miss, from the fill that is storing it. It returns
// an error only if it has written nothing.
func (m *Mirror) serveBlob(w *response, r *http.Request, t target) error {
	defer w.keepPace(r.Context())()
	m.completions.blobAsked(r.Method, t.ref)
	how := provenance{cache: cacheHit}
	patience := r.Context()
	blob, err := m.store.Blob(t.ref.Repository, t.ref.Digest) // only if this repository reaches it
	if err != nil {
		if errors.Is(err, storage.ErrBusy) {
			return t.busy(err)
		}
		if !errors.Is(err, fs.ErrNotExist) {
			m.logger.Error("stored blob cannot be opened", "digest", t.ref.Digest, "err", err)
		}
		if r.Method == http.MethodHead {
			return m.statBlob(w, r, t) // HEAD never downloads
		}
		var cancel context.CancelFunc
		patience, cancel = context.WithTimeout(r.Context(), headerBudget) // for all that has to be waited for
		defer cancel()
		var f *fill
		blob, f, err = m.missBlob(r.Context(), patience, t.ref)
		if errors.As(err, new(*storeError)) {
			return m.pass(patience, w, r, t)
		}
		if err != nil {
			return t.answerFor(r.Context(), err)
		}
		how = f.provenance()
		if far, ok := f.far(r, blob.Size()); ok {
			defer blob.Close()
			return m.sendFar(patience, w, r, t, far)
		}
	}
	defer blob.Close()
	if how.cache == cacheHit && m.withheld(t, t.ref.Digest) {
		if _, err := m.askSize(r.Context(), t.ref); err != nil {
			return t.answerFor(r.Context(), err)
		}
	}
	if err := m.sending.take(patience); err != nil {
		return t.busy(err)
	}
	defer m.sending.leave()
	if blob.Size() < 0 && !r.ProtoAtLeast(1, 1) { // an end that is no end would look the same to it
		return errNeedsSize
	}
	if err := how.mark(w); err != nil {
		return err
	}
	setContent(w.Header(), blobType, t.ref.Digest)
	if blob.Size() < 0 {
		w.sendUnsized(r, blob)
		return nil
	}
	http.ServeContent(w, r, "", time.Time{}, blob) // Range, preconditions, sendfile
	if unreadable(w.broken) && how.cache == cacheHit {
		m.store.Quarantine(t.ref.Digest, w.broken) // the client comes back for the rest
	}
	return nil
}

// missBlob is the blob from upstream. What is stored, but not known to be in this repository, only has
// to be confirmed; all else is filled. A *storeError says that the store is of no help.
func (m *Mirror) missBlob(ctx, patience context.Context, ref oci.Reference) (*storage.Blob, *fill, error) {
	if err := m.untaken.reason(ref.Digest); err != nil {
		return nil, nil, err
	}
	f, err := m.joinFill(ref, wanted)
	if err != nil {
		return nil, nil, err
	}
	select {
	case <-f.ready:
	case <-patience.Done():
		return nil, f, context.Cause(patience)
	}
	ingest, err := f.outcome(ref.Repository)
	var blob *storage.Blob
	switch {
	case err != nil:
	case ingest == nil:
		blob, err = m.store.Blob(ref.Repository, ref.Digest)
		err = storeFailed(err)
	default:
		blob, err = ingest.Open(ctx)
		err = storeFailed(err)
	}
	return blob, f, err
}

// askSize asks upstream for a blob's size, which also confirms it in this repository.
func (m *Mirror) askSize(ctx context.Context, ref oci.Reference) (found[int64], error) {
	return m.sizes.join(m.asking, ref.String(), func(ctx context.Context) (found[int64], error) {
		if m.fleet != nil {
			if content, err := m.fleet.content(ctx, ref); err == nil {
				return found[int64]{content.Size, cacheShared}, nil
			}
		}
		size, err := first(ctx, m, ref, func(ctx context.Context, client *upstream.Client) (int64, error) {
			size, err := client.StatBlob(ctx, ref)
			if err == nil && m.store.StoredFrom(ref.Digest, client.Upstream()) {
				m.confirm(client, ref)
			}
			return size, err
		})
		return found[int64]{size, cacheFetched}, err
	}).wait(ctx, 0)
}

// confirm records that upstream has what is stored in this repository too.
func (m *Mirror) confirm(client *upstream.Client, ref oci.Reference) {
	if err := m.store.Confirm(ref.Repository, ref.Digest, confirmation(client)); err != nil {
		m.logNotStored("confirmation not stored", err, "repository", ref.Repository, "digest", ref.Digest)
	}
}

// statBlob answers HEAD of a blob that is not stored.
func (m *Mirror) statBlob(w *response, r *http.Request, t target) error {
	stat, err := m.askSize(r.Context(), t.ref)
	if err != nil {
		return t.answerFor(r.Context(), err)
	}
	how := provenance{cache: stat.cache}
	if err := how.mark(w); err != nil {
		return err
	}
	setContent(w.Header(), blobType, t.ref.Digest)
	w.Header().Set("Accept-Ranges", "bytes")
	if stat.content >= 0 {
		w.Header().Set("Content-Length", strconv.FormatInt(stat.content, 10))
	}
	w.WriteHeader(http.StatusOK)
	return nil
}

// sendUnsized sends a blob whose size will be known when it is whole: chunked, and without the final
// chunk if it turns out wrong.
func (w *response) sendUnsized(r *http.Request, blob io.Reader) {
	w.WriteHeader(http.StatusOK)
	if r.Method == http.MethodHead {
		return
	}
	if _, err := io.Copy(w, blob); err != nil {
		panic(http.ErrAbortHandler)
	}
}

// expectations are the sizes that a repository's manifests give its blobs: a hint where an upstream
// tells none, and a check where it does. They are lost with the process.
type expectations struct {
	mu    sync.Mutex // guards sizes
	sizes map[oci.Reference]int64
}

// maxExpectations bounds them; they are begun anew beyond it.
const maxExpectations = 50_000

func (e *expectations) note(repo oci.Repository, manifest oci.Manifest) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.sizes == nil || len(e.sizes)+len(manifest.Blobs) > maxExpectations {
		e.sizes = map[oci.Reference]int64{}
	}
	for _, desc := range manifest.Blobs {
		e.sizes[oci.Reference{Repository: repo, Digest: desc.Digest}] = desc.Size
	}
}

func (e *expectations) size(ref oci.Reference) (int64, bool) {
	e.mu.Lock()
	defer e.mu.Unlock()
	size, ok := e.sizes[ref]
	return size, ok
}
