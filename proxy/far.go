package proxy

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"strconv"
	"strings"

	"breakwater/proxy/upstream"
)

const (
	// farAhead is how far beyond what has arrived a range begins that is not waited for.
	farAhead = 8 << 20
	// maxFar is how many such ranges of a blob are fetched at a time.
	maxFar = 4
)

// farRange is a part of a blob that is asked for long before the fill gets there.
type farRange struct {
	fill     *fill
	from, to int64 // the last byte is to
	size     int64 // of the blob
}

// far is the request's range if it lies far beyond what has arrived. The caller sends it by sendFar.
func (f *fill) far(r *http.Request, size int64) (farRange, bool) {
	from, to, ok := singleRange(r)
	if !ok || size < 0 || from >= size {
		return farRange{}, false // ServeContent's
	}
	if to < 0 || to >= size {
		to = size - 1
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.ingest == nil || from < f.ingest.Released()+farAhead || f.farNow == maxFar {
		return farRange{}, false
	}
	f.farNow++
	return farRange{f, from, to, size}, true
}

// singleRange is the first byte that a request asks for, and the last, -1 if all that follow. It is false
// if that cannot be told: there is no range, or several, the last bytes are asked for, or there is a condition.
func singleRange(r *http.Request) (from, to int64, ok bool) {
	first, last, ok := strings.Cut(strings.TrimPrefix(r.Header.Get("Range"), "bytes="), "-")
	from, err := strconv.ParseInt(first, 10, 64)
	if !ok || err != nil || r.Header.Get("If-Range") != "" {
		return 0, -1, false
	}
	if last == "" {
		return from, -1, true
	}
	if to, err = strconv.ParseInt(last, 10, 64); err != nil || to < from {
		return 0, -1, false
	}
	return from, to, true
}

// sendFar passes a range on by an upstream request of its own: unverified, which the answer says, and
// not stored (DESIGN 6). It returns an error only if it has written nothing.
func (m *Mirror) sendFar(patience context.Context, w *response, r *http.Request, t target, far farRange) error {
	defer func() {
		far.fill.mu.Lock()
		far.fill.farNow--
		far.fill.mu.Unlock()
	}()
	sources, err := m.sources(t.ref)
	if err != nil {
		return err
	}
	race := &race[*body]{
		tasks:   m.asking,
		clients: clientsOf(sources),
		ask: func(_ context.Context, i int) (*body, error) {
			// The client's context: the body ends with it. What holds the fill's reference off does not concern it.
			body, err := sources[i].open(upstream.Again(r.Context()), m, far.from)
			if err == nil && body.size >= 0 && body.size != far.size {
				body.Close()
				err = &upstream.Error{Upstream: sources[i].name(), Class: "blob", Reason: "tells another size"}
			}
			return body, err
		},
		drop: func(body *body) { body.Close() },
	}
	body, _, err := race.run(patience)
	if err != nil {
		return t.answerFor(r.Context(), err)
	}
	defer body.Close()
	how := provenance{cache: cacheUnverified}
	if err := how.mark(w); err != nil {
		return err
	}
	setContent(w.Header(), blobType, t.ref.Digest)
	w.Header().Set("Accept-Ranges", "bytes")
	w.Header().Set("Content-Range", fmt.Sprintf("bytes %d-%d/%d", far.from, far.to, far.size))
	w.Header().Set("Content-Length", strconv.FormatInt(far.to-far.from+1, 10))
	w.WriteHeader(http.StatusPartialContent)
	if _, err := io.CopyN(patient{w}, body, far.to-far.from+1); err != nil {
		w.broken = err // the connection ends short of its Content-Length
	}
	return nil
}
