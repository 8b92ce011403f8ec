package proxy

import (
	"context"
	"errors"
	"slices"
	"sync"

	"breakwater/pkg/config"
	"breakwater/pkg/oci"
	"breakwater/storage"

	"github.com/opencontainers/go-digest"
)

// fills are the downloads in flight.
type fills struct {
	mu      sync.Mutex // guards what follows
	open    map[fillKey]*fill
	running map[string]slots // by registry
}

// maxFills is how many fills of a registry go on at a time: each takes about half a megabyte of memory
// (FAULTS F59). Others wait for their turn. One registry that hangs takes none from another one.
const maxFills = 256

// turns are those of the fill's registry. Registries that only any_registry lets in share theirs.
func (fs *fills) turns(configured map[string]config.Registry, f *fill) slots {
	f.mu.Lock()
	registry := f.sources[0].ref.Registry // it has one from the start
	f.mu.Unlock()
	if _, ok := configured[registry]; !ok {
		registry = ""
	}
	fs.mu.Lock()
	defer fs.mu.Unlock()
	if fs.running == nil {
		fs.running = map[string]slots{}
	}
	if fs.running[registry] == nil {
		fs.running[registry] = make(slots, maxFills)
	}
	return fs.running[registry]
}

// fillKey says who shares a fill: everybody who wants the digest, but of a private repository only
// those who want it there. Until it is stored, nothing that another one of its registry says of the
// digest would prove that it has the content.
type fillKey struct {
	dgst digest.Digest
	repo oci.Repository // zero if public
}

// fill is one download into the store. It has a goroutine of its own, which no client's leaving
// ends, and the sources of all who asked.
type fill struct {
	fillKey
	ready chan struct{} // closed once the first bytes can be read, or nothing more will come
	over  chan struct{} // closed once it has ended and is none of the open fills any more
	pace  *pace

	mu      sync.Mutex // guards what follows
	sources []*source
	ended   bool            // no source is taken on any more
	ingest  *storage.Ingest // set when ready, unless err is
	cache   string          // set with it: how it is come by
	err     error           // set when ready, if no source had it
	farNow  int             // ranges far ahead that are being passed on
}

// joinFill returns the fill of ref's digest with ref's sources among its own, and begins one if there
// is none. It goes on as urgently as the most urgent of those who have joined wants.
func (m *Mirror) joinFill(ref oci.Reference, u urgency) (*fill, error) {
	sources, err := m.sources(ref)
	if err != nil {
		return nil, err
	}
	key := fillKey{dgst: ref.Digest}
	for _, src := range sources {
		if src.client != nil && !m.shares(src.client, ref.Repository) {
			key.repo = ref.Repository
		}
	}
	for {
		m.fills.mu.Lock()
		f := m.fills.open[key]
		if f == nil {
			f = &fill{fillKey: key, ready: make(chan struct{}), over: make(chan struct{}), pace: newPace(u), sources: sources}
			if !m.filling.start(func(ctx context.Context) { m.runFill(ctx, f) }) {
				m.fills.mu.Unlock()
				return nil, errClosed
			}
			if m.fills.open == nil {
				m.fills.open = map[fillKey]*fill{}
			}
			m.fills.open[key] = f
			m.fills.mu.Unlock()
			return f, nil
		}
		m.fills.mu.Unlock()
		if f.add(sources) {
			f.pace.raise(u)
			return f, nil
		}
		// It ended between the two locks: what it brought is stored, or the next one tries again.
		<-f.ready
		m.leaveFill(f)
	}
}

// add takes on sources that the fill does not have yet. It returns false if the fill is over.
func (f *fill) add(sources []*source) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.ended && f.ingest == nil {
		return false
	}
	for _, src := range sources {
		if !slices.ContainsFunc(f.sources, src.is) {
			f.sources = append(f.sources, src)
		}
	}
	return true
}

func (m *Mirror) leaveFill(f *fill) {
	m.fills.mu.Lock()
	defer m.fills.mu.Unlock()
	if m.fills.open[f.fillKey] == f {
		delete(m.fills.open, f.fillKey)
	}
}

// runFill asks its sources until one has brought the blob.
func (m *Mirror) runFill(ctx context.Context, f *fill) {
	m.metrics.fills.Inc()
	defer m.metrics.fills.Dec()
	defer m.completions.filled(f)
	defer m.leaveFill(f)
	defer f.end(errPanicked) // if nothing else has ended it, a panic has
	turns := m.fills.turns(m.cfg.Load().Registries, f)
	if err := turns.take(ctx); err != nil {
		f.end(err)
		return
	}
	defer turns.leave()
	for asked := false; ; asked = true {
		sources := f.take()
		if sources == nil {
			return
		}
		if slices.ContainsFunc(sources, func(src *source) bool { return m.isStored(ctx, src) }) {
			f.end(nil)
			return
		}
		var body *body
		var src *source
		var err error
		if m.fleet != nil && !asked {
			body, src, err = m.openShared(ctx, f, sources)
		} else {
			body, src, err = m.openBody(ctx, sources, f.tryOpen(m))
		}
		if err != nil {
			f.failUnasked(sources, err)
			continue // each source knows why
		}
		if err = m.transfer(ctx, f, src, body); err == nil {
			return
		}
		if errors.As(err, new(*storeError)) { // no other source would help
			m.notStored(f, err)
			f.end(err)
			return
		}
		if f.fail(src, err) { // its readers have bytes that no other source can take back
			return
		}
	}
}

// openShared opens the blob at the bucket, or at an upstream if the bucket does not have it or takes its time.
func (m *Mirror) openShared(ctx context.Context, f *fill, sources []*source) (*body, *source, error) {
	var shared, upstreams []*source
	for _, src := range sources {
		if src.client == nil {
			shared = append(shared, src)
		} else {
			upstreams = append(upstreams, src)
		}
	}
	if m.fleet.lag.isOn() {
		return m.openBody(ctx, slices.Concat(upstreams, shared), f.tryOpen(m))
	}
	o, late := m.fleet.fetch(ctx, f, shared)
	if o == nil {
		return m.openBody(ctx, upstreams, f.tryOpen(m))
	}
	if !late {
		body, err := o.take(ctx)
		return body, o.src, err
	}
	body, src, err := m.openBody(ctx, append(upstreams, o.src), func(ctx context.Context, src *source) (*body, error) {
		if src == o.src {
			return o.take(ctx)
		}
		return f.tryOpen(m)(ctx, src)
	})
	switch {
	case err != nil:
		o.drop()
	case src != o.src:
		m.fleet.overtaken(o)
	}
	return body, src, err
}

// tryOpen opens a source, and notes if that fails.
func (f *fill) tryOpen(m *Mirror) func(context.Context, *source) (*body, error) {
	return func(ctx context.Context, src *source) (*body, error) {
		body, err := src.open(ctx, m, 0)
		f.fail(src, err)
		return body, err
	}
}

// isStored reports whether the blob is stored for the source's repository: since it was missed, or
// because its upstream, which gave it to another repository, now confirms it in this one.
func (m *Mirror) isStored(ctx context.Context, src *source) bool {
	if blob, err := m.store.Blob(src.ref.Repository, src.ref.Digest); err == nil {
		blob.Close()
		return true
	}
	if src.client == nil || !m.store.StoredFrom(src.ref.Digest, src.client.Upstream()) {
		return false
	}
	if _, err := src.client.StatBlob(ctx, src.ref); err != nil {
		return false
	}
	m.confirm(src.client, src.ref)
	blob, err := m.store.Blob(src.ref.Repository, src.ref.Digest)
	if err != nil {
		return false
	}
	blob.Close()
	return true
}

// take returns the sources that may still have the blob, or ends the fill if there is none: in one
// step, so that none is added in between and forgotten.
func (f *fill) take() []*source {
	f.mu.Lock()
	defer f.mu.Unlock()
	var left []*source
	var errs []error
	for _, src := range f.sources {
		if errs = append(errs, src.err); src.err == nil {
			left = append(left, src)
		}
	}
	if left == nil {
		f.endLocked(worst(errs))
	}
	return left
}

// fail notes why a source is of no use, nil if it is, and returns whether readers have been let in.
func (f *fill) fail(src *source, err error) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	src.err = err
	return f.ingest != nil
}

// failUnasked notes the error of a race for those who were never asked in it, since the mirror closes:
// they would be left over for ever.
func (f *fill) failUnasked(sources []*source, err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, src := range sources {
		if src.err == nil {
			src.err = err
		}
	}
}

// hasReaders reports whether readers have been let in.
func (f *fill) hasReaders() bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.ingest != nil
}

// publish lets readers in.
func (f *fill) publish(ingest *storage.Ingest, cache string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.ingest == nil {
		f.ingest, f.cache = ingest, cache
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

// provenance is how what it brings is come by: by the source that let readers in.
func (f *fill) provenance() provenance {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.cache == "" { // it was stored meanwhile
		return provenance{cache: cacheFetched}
	}
	return provenance{cache: f.cache}
}

// outcome is what a request for that repository gets: an ingest to read; neither, if the blob is
// stored by now; or why it cannot be had there.
func (f *fill) outcome(repo oci.Repository) (*storage.Ingest, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if errors.As(f.err, new(*storeError)) {
		return nil, f.err
	}
	if f.err != nil {
		var own []error
		for _, src := range f.sources {
			if src.ref.Repository == repo && src.err != nil {
				own = append(own, src.err)
			}
		}
		if own != nil {
			return nil, worst(own)
		}
		return nil, f.err
	}
	return f.ingest, nil
}
