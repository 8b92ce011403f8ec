package proxy

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"slices"
	"sync"
	"sync/atomic"

	"breakwater/pkg/oci"
	"breakwater/proxy/upstream"
	"breakwater/storage"

	"github.com/opencontainers/go-digest"
)

const (
	// fillBuffer is how much a fill reads at a time.
	fillBuffer = 256 << 10
	// maxResumes is how often a body may break off without having brought resumeProgress in between.
	maxResumes     = 5
	resumeProgress = 1 << 20
)

// errElsewhere ends the wait of a request whose repository may not see what the fill brought.
var errElsewhere = errors.New("the content came through a repository that this one has no part in")

// fills are the downloads in flight, one a digest, whoever asked for it.
type fills struct {
	mu   sync.Mutex // guards open
	open map[digest.Digest]*fill
}

// fill is one download into the store. It has a goroutine of its own, which no client's leaving
// ends, and the sources of all who asked, which it tries one after the other.
type fill struct {
	dgst  digest.Digest
	ready chan struct{} // closed once the first bytes can be read, or nothing more will come

	mu      sync.Mutex // guards what follows
	sources []*source
	next    int             // of sources: to be tried
	ended   bool            // no source is taken on any more
	ingest  *storage.Ingest // set when ready, unless err is
	from    *source         // of ingest
	err     error           // set when ready, if no source had it
}

// source is an upstream that may have the blob, in the name of a repository.
type source struct {
	ref    oci.Reference
	client *upstream.Client
	public bool  // what comes from here may be seen by all
	err    error // why it ended; guarded by the fill's mu
	// confirmed says that upstream has it here, though the bytes come from another source.
	confirmed atomic.Bool
}

// joinFill returns the fill of ref's digest with ref's source among its own, and begins one if there is
// none.
func (m *Mirror) joinFill(ref oci.Reference) (*fill, *source, error) {
	client, err := m.client(ref.Repository)
	if err != nil {
		return nil, nil, err
	}
	src := &source{ref: ref, client: client, public: m.confirmation(client, ref.Repository).Public}
	for {
		m.fills.mu.Lock()
		f := m.fills.open[ref.Digest]
		if f == nil {
			f = &fill{dgst: ref.Digest, ready: make(chan struct{}), sources: []*source{src}}
			if !m.filling.start(func(ctx context.Context) { m.runFill(ctx, f) }) {
				m.fills.mu.Unlock()
				return nil, nil, errClosed
			}
			if m.fills.open == nil {
				m.fills.open = map[digest.Digest]*fill{}
			}
			m.fills.open[ref.Digest] = f
			m.fills.mu.Unlock()
			return f, src, nil
		}
		m.fills.mu.Unlock()
		if joined := f.add(src); joined != nil {
			return f, joined, nil
		}
		// It ended between the two locks: what it brought is stored, or the next one tries again.
		<-f.ready
		m.leaveFill(f)
	}
}

// add returns the fill's source for the same repository, or src, or nil if the fill is over.
func (f *fill) add(src *source) *source {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.ended && f.ingest == nil {
		return nil
	}
	for _, s := range f.sources {
		if s.ref == src.ref && s.client == src.client {
			return s
		}
	}
	f.sources = append(f.sources, src)
	return src
}

// inFlight reports whether the blob is on its way.
func (m *Mirror) inFlight(dgst digest.Digest) bool {
	m.fills.mu.Lock()
	defer m.fills.mu.Unlock()
	return m.fills.open[dgst] != nil
}

func (m *Mirror) leaveFill(f *fill) {
	m.fills.mu.Lock()
	defer m.fills.mu.Unlock()
	if m.fills.open[f.dgst] == f {
		delete(m.fills.open, f.dgst)
	}
}

// runFill tries source after source until one has brought the blob.
func (m *Mirror) runFill(ctx context.Context, f *fill) {
	m.metrics.fills.Inc()
	defer m.metrics.fills.Dec()
	defer m.leaveFill(f)
	defer f.end(errPanicked) // if nothing else has ended it, a panic has
	for {
		src := f.take()
		if src == nil {
			return
		}
		if blob, err := m.store.Blob(src.ref.Repository, f.dgst); err == nil { // stored since it was missed
			blob.Close()
			f.end(nil)
			return
		}
		err := m.fillFrom(ctx, f, src)
		if err == nil {
			return
		}
		level := slog.LevelWarn
		if up := new(upstream.Error); errors.As(err, &up) && !up.Outage() {
			level = slog.LevelDebug // there is no such blob: the client is told
		}
		m.logger.Log(ctx, level, "fill failed", "repository", src.ref.Repository, "digest", f.dgst, "upstream", src.client.Upstream(), "err", err)
		f.mu.Lock()
		src.err = err
		begun := f.ingest != nil
		f.mu.Unlock()
		if begun { // its readers have bytes that no other source can take back
			return
		}
	}
}

// take returns the next source, or ends the fill if there is none: in one step, so that none is
// added in between and forgotten.
func (f *fill) take() *source {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.next < len(f.sources) {
		f.next++
		return f.sources[f.next-1]
	}
	f.endLocked(f.sources[0].err)
	return nil
}

// publish lets readers in.
func (f *fill) publish(ingest *storage.Ingest, src *source) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.ingest == nil {
		f.ingest, f.from = ingest, src
		close(f.ready)
	}
}

// end is how a fill ends that has let nobody in.
func (f *fill) end(err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.endLocked(err)
}

func (f *fill) endLocked(err error) {
	if !f.ended && f.ingest == nil {
		f.err = err
		close(f.ready)
	}
	f.ended = true
}

// fillFrom downloads from one source, and goes on from where it broke off.
func (m *Mirror) fillFrom(ctx context.Context, f *fill, src *source) error {
	body, err := src.client.Blob(ctx, src.ref, 0)
	if err != nil {
		return err
	}
	defer func() { body.Close() }()
	size, err := m.sizeOf(ctx, src, body)
	if err != nil {
		return err
	}
	ingest, err := m.store.Ingest(src.ref.Repository, f.dgst, size)
	if err != nil {
		return err
	}
	defer func() { ingest.Abort(errPanicked) }() // does nothing once it has ended
	buf := make([]byte, fillBuffer)
	for breaks, mark := 0, int64(0); ; {
		err = f.copy(ingest, src, body, buf)
		if err == nil || !errors.As(err, new(*upstream.Error)) || ctx.Err() != nil || size < 0 {
			break
		}
		if ingest.Written()-mark >= resumeProgress {
			breaks, mark = 0, ingest.Written()
		}
		if breaks++; breaks > maxResumes {
			break
		}
		next, resume := src.client.Blob(ctx, src.ref, ingest.Written())
		if resume != nil {
			break
		}
		body.Close()
		body = next
	}
	if err == nil {
		err = ingest.Verify()
	}
	if err != nil {
		ingest.Abort(err)
		if errors.Is(err, storage.ErrMismatch) {
			src.client.Mismatch(src.ref)
			err = src.lied(err)
		}
		return err
	}
	f.publish(ingest, src)
	if err := ingest.Commit(m.confirmation(src.client, src.ref.Repository)); err != nil {
		m.logger.Error("blob not stored", "digest", f.dgst, "err", err) // its readers have all of it
		return nil
	}
	f.mu.Lock()
	others := slices.Clone(f.sources)
	f.mu.Unlock()
	for _, other := range others {
		if other.confirmed.Load() {
			m.confirm(other.client, other.ref)
		}
	}
	return nil
}

// lied is the error of a source that sent other bytes than the digest names.
func (s *source) lied(err error) error {
	return &upstream.Error{Upstream: s.client.Upstream(), Class: "blob", Reason: "sent wrong content", Err: err}
}

// copy moves what the body has into the ingest, and lets readers in at the first byte that they may
// have. An *upstream.Error is the body's, any other the ingest's.
func (f *fill) copy(ingest *storage.Ingest, src *source, body *upstream.Body, buf []byte) error {
	for {
		n, err := body.Read(buf)
		if n > 0 {
			if _, err := ingest.Write(buf[:n]); err != nil {
				return err
			}
			if ingest.Released() > 0 {
				f.publish(ingest, src)
			}
		}
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
	}
}

// sizeOf settles how long the blob is, -1 if nobody can tell. A length that contradicts the manifest
// is refused before a byte of it is released.
func (m *Mirror) sizeOf(ctx context.Context, src *source, body *upstream.Body) (int64, error) {
	size := body.Size
	if size < 0 {
		stat, err := src.client.StatBlob(ctx, src.ref)
		if err == nil {
			size = stat
		}
	}
	expected, known := m.expected.size(src.ref)
	switch {
	case size < 0 && known:
		return expected, nil
	case known && size != expected:
		return 0, src.lied(fmt.Errorf("%d bytes announced where the manifest says %d", size, expected))
	}
	return size, nil
}

// openFill waits until a fill of ref can be read, and opens it. fs.ErrNotExist says that it is stored
// by now; errElsewhere, that it comes from a repository whose content is private, and that
// upstream must confirm it for this one.
func (m *Mirror) openFill(ctx context.Context, ref oci.Reference) (*storage.Blob, *source, error) {
	f, src, err := m.joinFill(ref)
	if err != nil {
		return nil, nil, err
	}
	started, cancel := context.WithTimeout(ctx, headerBudget)
	defer cancel()
	select {
	case <-f.ready:
	case <-started.Done():
		return nil, src, context.Cause(started)
	}
	f.mu.Lock()
	ingest, from, err := f.ingest, f.from, f.err
	if err != nil && src.err != nil {
		err = src.err
	}
	f.mu.Unlock()
	switch {
	case ingest == nil && err == nil:
		return nil, src, fs.ErrNotExist
	case err != nil:
		return nil, src, err
	case !from.public && from.ref.Repository != ref.Repository && !src.confirmed.Load():
		return nil, src, errElsewhere
	}
	blob, err := ingest.Open(ctx)
	return blob, src, err
}
