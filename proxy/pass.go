package proxy

import (
	"context"
	"errors"
	"fmt"
	"hash"
	"io"
	"log/slog"
	"net/http"
	"sync"
	"time"

	"breakwater/pkg/oci"
	"breakwater/proxy/upstream"
	"breakwater/storage"

	"github.com/distribution/distribution/v3/registry/api/errcode"
	"github.com/opencontainers/go-digest"
)

const (
	// maxPassed is how many blobs are passed through at a time, each with a connection of its own and
	// passedMemory.
	maxPassed = 512
	// passedChunk is how much of one is read at a time.
	passedChunk  = 16 << 10
	passedMemory = storage.Withheld + passedChunk
	// maxUnsized is how much is passed on of a blob whose size nobody tells: it may have no end.
	maxUnsized = 16 << 30
	// maxSending is how many blobs are sent from the disk at a time: each may hold a thread for as long as
	// the disk takes, and the runtime ends a process that has 10 000 of them. It is far from what clients
	// that are merely slow come to.
	maxSending = 4096
	// How long a digest is passed through at once after the store could not take it: until whoever came
	// with the first has been served and, if they have had a part, has come back for the rest.
	untakenFor      = 5 * time.Second
	untakenPartsFor = time.Minute
	// maxUntaken bounds them; they are begun anew beyond it.
	maxUntaken = 1000
	// So are the manifests that the disk would not have, and of which none is larger than maxUnstoredSize.
	maxUnstored     = 64
	maxUnstoredSize = 256 << 10
)

// storeError is trouble of our own store. It never fails a download that the network can serve
// (DESIGN 7): what it concerns is passed through.
type storeError struct{ err error }

func (e *storeError) Error() string { return e.err.Error() }
func (e *storeError) Unwrap() error { return e.err }

// storeFailed marks an error of the store, unless it is only handed on by it.
func storeFailed(err error) error {
	if err == nil || errors.Is(err, storage.ErrMismatch) || errors.As(err, new(*upstream.Error)) || errors.As(err, new(*storeError)) {
		return err
	}
	return &storeError{err}
}

// notStored notes that the store could not take what a fill has brought.
func (m *Mirror) notStored(f *fill, err error) {
	parts := f.hasReaders()
	m.logNotStored("blob not stored, but passed through", err, "digest", f.dgst)
	switch {
	case errors.Is(err, storage.ErrTooLarge) && parts: // it may have no end; where it is cut is the limit
	case parts:
		m.untaken.note(f.dgst, err, untakenPartsFor)
	default:
		m.untaken.note(f.dgst, err, untakenFor)
	}
}

// logNotStored says that something could not be stored, unless the store has said already that it cannot
// write.
func (m *Mirror) logNotStored(message string, err error, attrs ...any) {
	level := slog.LevelError
	if m.store.Trouble() != nil {
		level = slog.LevelDebug
	}
	m.logger.Log(context.Background(), level, message, append(attrs, "err", err)...)
}

// untaken are the digests that the store has just failed to take, and why.
type untaken struct {
	mu    sync.Mutex // guards until
	until map[digest.Digest]declined
}

type declined struct {
	err   error
	until time.Time
}

func (u *untaken) note(dgst digest.Digest, err error, duration time.Duration) {
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.until == nil || len(u.until) >= maxUntaken {
		u.until = map[digest.Digest]declined{}
	}
	u.until[dgst] = declined{err, time.Now().Add(duration)}
}

// reason is why the store is not tried, nil if it is.
func (u *untaken) reason(dgst digest.Digest) error {
	u.mu.Lock()
	defer u.mu.Unlock()
	r, ok := u.until[dgst]
	if ok && time.Now().After(r.until) {
		delete(u.until, dgst)
		return nil
	}
	return r.err
}

// unstored are manifests that the disk would not have, each as one repository gave it.
type unstored struct {
	mu        sync.Mutex // guards manifests
	manifests map[oci.Reference]oci.Manifest
}

// note says how storing a manifest has ended.
func (u *unstored) note(ref oci.Reference, manifest oci.Manifest, err error) {
	u.mu.Lock()
	defer u.mu.Unlock()
	if err == nil || errors.Is(err, storage.ErrMismatch) || len(manifest.Raw) > maxUnstoredSize {
		delete(u.manifests, ref)
		return
	}
	if u.manifests == nil || len(u.manifests) >= maxUnstored {
		u.manifests = map[oci.Reference]oci.Manifest{}
	}
	u.manifests[ref] = manifest
}

func (u *unstored) get(ref oci.Reference) (oci.Manifest, bool) {
	u.mu.Lock()
	defer u.mu.Unlock()
	manifest, ok := u.manifests[ref]
	return manifest, ok
}

// slots bound how many do something at a time.
type slots chan struct{}

// take waits for a slot until ctx ends, for at most headerBudget. Whoever has one leaves it.
func (s slots) take(ctx context.Context) error {
	select {
	case s <- struct{}{}:
		return nil
	default:
	}
	late := time.NewTimer(headerBudget)
	defer late.Stop()
	select {
	case s <- struct{}{}:
		return nil
	case <-late.C:
		return context.DeadlineExceeded
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

func (s slots) leave() { <-s }

// busy is the answer when there was no slot in time.
func (t target) busy(err error) error {
	if errors.Is(err, context.Canceled) {
		return errClientGone
	}
	e := &oci.Error{Status: http.StatusServiceUnavailable, Code: errcode.ErrorCodeUnavailable, RetryAfter: retryAfter,
		Message: "this mirror's disk does not keep up with what it is asked for"}
	if t.bare && t.kind == kindBlob {
		e.Status, e.Code = http.StatusNotFound, errcode.ErrorCodeBlobUnknown
	}
	return e
}

// passed is a blob that is read from upstream by one client alone, since the store cannot take it. It
// is an io.ReadSeeker for http.ServeContent, which seeks only before it reads.
type passed struct {
	*transfer
	mirror *Mirror
	ctx    context.Context // the client's; Read has no parameter for it
	hash   hash.Hash       // nil for a part, of which nobody can tell whether it is right
	buf    []byte          // read, and not given out yet
	ready  int             // how much of it may be
	err    error           // what comes behind that
}

// pass sends a blob that the store cannot take: from its sources, as a fill has them, and verified as a
// fill is. Of a range nothing tells whether it is right, which the answer says. It returns an error only
// if it has written nothing.
func (m *Mirror) pass(patience context.Context, w *response, r *http.Request, t target) error {
	if err := m.passing.take(patience); err != nil {
		return t.busy(err)
	}
	defer m.passing.leave()
	from, to, ok := singleRange(r)
	if !ok && r.Header.Get("Range") != "" { // it may be ignored (RFC 9110, 14.2)
		r = r.Clone(r.Context())
		r.Header.Del("Range")
	}
	p, err := m.openPassed(r.Context(), patience, t.ref, from, to)
	if up := new(upstream.Error); errors.As(err, &up) && up.Status == http.StatusRequestedRangeNotSatisfiable {
		return oci.NewError(errcode.ErrorCodeRangeInvalid, "the range is outside the content")
	}
	if err != nil {
		return t.answerFor(r.Context(), err)
	}
	defer func() { p.body.Close() }()
	if p.size < 0 && !r.ProtoAtLeast(1, 1) {
		return errNeedsSize
	}
	m.metrics.passedThrough.Inc()
	how := provenance{cache: cacheNotStored}
	if p.hash == nil {
		how.cache = cacheUnverified
	}
	if err := how.mark(w); err != nil {
		return err
	}
	setContent(w.Header(), blobType, t.ref.Digest)
	if p.size < 0 {
		w.sendUnsized(r, p)
		return nil
	}
	http.ServeContent(w, r, "", time.Time{}, p)
	if !errors.Is(p.err, io.EOF) {
		w.broken = p.err // the connection ends short of its Content-Length
	}
	return nil
}

// openPassed opens a blob from one byte to another, of which the last is -1 for the end, at the first of
// the reference's own sources that has it.
func (m *Mirror) openPassed(ctx, patience context.Context, ref oci.Reference, from, to int64) (*passed, error) {
	all, err := m.sources(ref)
	if err != nil {
		return nil, err
	}
	f := &fill{fillKey: fillKey{dgst: ref.Digest}, ready: make(chan struct{}), sources: all} // that nobody else joins
	for {
		sources := f.take()
		if sources == nil {
			_, err := f.outcome(ref.Repository)
			return nil, err
		}
		body, src, err := m.openBody(patience, sources, func(values context.Context, src *source) (*body, error) {
			values = detached{ctx, values} // the body ends with the client
			if from > 0 {
				values = upstream.Again(values)
			}
			body, err := src.open(values, m, from)
			f.fail(src, err)
			return body, err
		})
		if err != nil && patience.Err() != nil {
			return nil, err
		}
		if err != nil {
			f.failUnasked(sources, err)
			continue // each source knows why
		}
		p := &passed{transfer: &transfer{fill: f, src: src, body: body, at: from, mark: from}, mirror: m, ctx: ctx, buf: make([]byte, 0, passedMemory)}
		if err = p.begin(patience, to); err == nil {
			return p, nil
		}
		p.body.Close()
		f.fail(src, err)
	}
}

// begin reads what may be given out first, all of it if it is small: until then another source can be
// asked.
func (p *passed) begin(patience context.Context, to int64) (err error) {
	if p.size, err = p.mirror.sizeOf(patience, p.src, p.body); err != nil {
		return err
	}
	if p.at == 0 && (to < 0 || to >= p.size-1) {
		p.hash = p.dgst.Algorithm().Hash()
	} else if p.size < 0 {
		return &upstream.Error{Upstream: p.src.name(), Class: "blob", Reason: "does not tell the size"}
	}
	for p.ready == 0 && p.err == nil {
		p.fetch()
	}
	if p.ready == 0 && !errors.Is(p.err, io.EOF) {
		return p.err
	}
	return nil
}

// Read gives out what may be given out: not the end of a whole blob before all of it is verified.
func (p *passed) Read(b []byte) (int, error) {
	for p.ready == 0 && p.err == nil {
		p.fetch()
	}
	if p.ready == 0 {
		return 0, p.err
	}
	n := copy(b, p.buf[:p.ready])
	p.buf, p.ready = p.buf[:copy(p.buf, p.buf[n:])], p.ready-n
	return n, nil
}

// fetch reads some more.
func (p *passed) fetch() {
	n, err := p.mirror.read(p.ctx, p.transfer, p.buf[len(p.buf):min(len(p.buf)+passedChunk, cap(p.buf))])
	more := p.buf[len(p.buf) : len(p.buf)+n]
	p.buf = p.buf[:len(p.buf)+n]
	if p.hash == nil {
		p.ready, p.err = len(p.buf), err
		return
	}
	p.hash.Write(more)
	if p.size < 0 && p.at > maxUnsized {
		err = fmt.Errorf("more than %d bytes of unknown size: %w", int64(maxUnsized), storage.ErrTooLarge)
	}
	if errors.Is(err, io.EOF) || p.size >= 0 && p.at >= p.size {
		err = p.verify()
	}
	switch {
	case errors.Is(err, io.EOF):
		p.ready = len(p.buf)
	case p.size < 0:
		p.ready = max(0, len(p.buf)-storage.Withheld)
	default:
		p.ready = max(0, min(len(p.buf), int(p.size-storage.Withheld-(p.at-int64(len(p.buf))))))
	}
	p.err = err
}

// verify is io.EOF if all that has come is the blob.
func (p *passed) verify() error {
	got := digest.NewDigest(p.dgst.Algorithm(), p.hash)
	if got == p.dgst && (p.size < 0 || p.at == p.size) {
		return io.EOF
	}
	err := p.judge(p.mirror, fmt.Errorf("%d bytes are %s: %w", p.at, got, storage.ErrMismatch))
	p.mirror.logSource(p.ctx, p.src, err)
	return err
}

// Seek says where the blob begins and ends. It goes nowhere: the sources have been asked for what is
// read, and for nothing else.
func (p *passed) Seek(offset int64, whence int) (int64, error) {
	if whence == io.SeekEnd {
		offset += p.size
	}
	return offset, nil
}
