package proxy

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"time"

	"breakwater/proxy/upstream"
	"breakwater/storage"
)

const (
	// transferBuffer is how much is read at a time.
	transferBuffer = 256 << 10
	// maxBreaks is how often a body may break off without having brought breakProgress in between.
	maxBreaks     = 5
	breakProgress = 1 << 20
	// firstPause is waited for before the second try to go on, and doubled after it: whatever cut the
	// connection may have cut all others too.
	firstPause = 250 * time.Millisecond
	// A source that brings less than slowBytes in slowTime is left if there is another one.
	slowTime  = time.Minute
	slowBytes = 16 << 10 * 60
)

// errSlow ends the patience with a source that drips.
var errSlow = &upstream.Error{Reason: "body too slow"}

// transfer is a blob on its way from its sources: one body after the other, each from where the last
// one broke off, until it is whole. Whoever reads it never sees a seam.
type transfer struct {
	*fill
	ingest *storage.Ingest // where it goes; nil if it is passed through
	size   int64           // -1 if nobody could tell
	at     int64           // how far it has been read
	src    *source
	body   *body
	mixed  bool  // bytes of more than one source are in it
	broke  error // why the body broke off, behind what it has brought

	breaks int   // since breakProgress was last made …
	mark   int64 // … up to here
	// What the present body has brought since the last look at its speed, and how long it was waited for.
	// Whoever reads slowly does not make it slow.
	brought int64
	waited  time.Duration
}

// transfer brings the blob, beginning with the body that src has opened.
func (m *Mirror) transfer(ctx context.Context, f *fill, src *source, body *body) error {
	t := &transfer{fill: f, src: src, body: body}
	defer func() { t.body.Close() }()
	var err error
	if t.size, err = m.sizeOf(ctx, src, body); err != nil {
		return err
	}
	if t.ingest, err = m.store.Ingest(src.ref.Repository, f.dgst, t.size); err != nil {
		return storeFailed(err)
	}
	defer func() { t.ingest.Abort(errPanicked) }() // does nothing once it has ended
	if t.at = t.ingest.Written(); t.at > 0 {       // parked by an earlier fill
		if t.at == t.size || m.resume(ctx, t, t.order()) {
			t.mixed = true
		} else { // begin anew, with the body that is open
			t.ingest.Abort(errPanicked)
			if t.ingest, err = m.store.Ingest(src.ref.Repository, f.dgst, t.size); err != nil {
				return storeFailed(err)
			}
			t.at = 0
		}
	}
	if t.at != t.size {
		err = m.bring(ctx, t)
	}
	if err == nil {
		err = storeFailed(t.ingest.Verify())
	}
	if err != nil {
		t.ingest.Park(err) // the next request goes on from there, unless what came is wrong
		return t.judge(m, err)
	}
	f.publish(t.ingest, t.src.cache())
	if err := t.ingest.Commit(t.body.confirmation); err != nil {
		m.logNotStored("blob not stored", err, "digest", f.dgst) // its readers have all of it
	}
	return nil
}

// judge holds wrong content against its source, unless several have a part in it: nobody knows then who
// lied.
func (t *transfer) judge(m *Mirror, err error) error {
	if !errors.Is(err, storage.ErrMismatch) {
		return err
	}
	if !t.mixed {
		t.src.mismatch(m)
	}
	return t.src.lied(err)
}

// bring copies all of it into the ingest, and lets readers in at the first byte that they may have.
func (m *Mirror) bring(ctx context.Context, t *transfer) error {
	buf := make([]byte, transferBuffer)
	for {
		if err := t.pace.giveWay(m.fills.busy); err != nil {
			return err
		}
		n, err := m.read(ctx, t, buf)
		if n > 0 {
			m.metrics.fetched.WithLabelValues(t.src.kind()).Add(float64(n))
			if _, err := t.ingest.Write(buf[:n]); err != nil {
				return storeFailed(err)
			}
			if t.ingest.Released() > 0 {
				t.publish(t.ingest, t.src.cache())
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

// read reads on, and goes on at another source or the same one when a body breaks off. It returns
// io.EOF at the end of the whole, and an *upstream.Error once no source has the rest.
func (m *Mirror) read(ctx context.Context, t *transfer, p []byte) (int, error) {
	for {
		n, err := t.read(p)
		if err == nil || errors.Is(err, io.EOF) || t.size < 0 { // nobody can tell where the rest of unknown size ends
			return n, err
		}
		m.logger.Warn("body broke off", "repository", t.src.ref.Repository, "digest", t.dgst, "upstream", t.src.name(), "size", t.at, "err", err)
		if errors.Is(err, errSlow) {
			t.broke = nil
			if others := t.others(); len(others) > 0 { // the last may have failed a moment ago
				m.resume(ctx, t, others) // who drips goes on if nobody else does
			}
			continue
		}
		if t.at-t.mark >= breakProgress {
			t.breaks, t.mark = 0, t.at
		}
		for resumed := false; !resumed; t.breaks++ {
			if t.breaks == maxBreaks || !pause(ctx, t.breaks) {
				return 0, err
			}
			resumed = m.resume(ctx, t, t.order())
		}
	}
}

// read reads from the present body: some bytes, or why there are none.
func (t *transfer) read(p []byte) (int, error) {
	if t.broke != nil {
		return 0, t.broke
	}
	began := time.Now()
	n, err := t.body.Read(p)
	t.waited += time.Since(began)
	t.at, t.brought = t.at+int64(n), t.brought+int64(n)
	if errors.Is(err, io.EOF) && (t.size < 0 || t.at == t.size) {
		return n, io.EOF
	}
	if errors.Is(err, io.EOF) && t.at < t.size { // it had no length of its own to be held to
		err = &upstream.Error{Upstream: t.src.name(), Class: "blob", Reason: "body ended early"}
	}
	if err != nil {
		t.broke = err
	} else if t.waited >= slowTime {
		if t.brought < slowBytes && len(t.others()) > 0 {
			t.broke = errSlow
		}
		t.brought, t.waited = 0, 0
	}
	if n > 0 {
		return n, nil // first things first
	}
	return 0, t.broke
}

// pause waits before the next try to go on; false if there is none, since ctx has ended.
func pause(ctx context.Context, breaks int) bool {
	if breaks == 0 {
		return ctx.Err() == nil
	}
	select {
	case <-time.After(firstPause << (breaks - 1)):
		return true
	case <-ctx.Done():
		return false
	}
}

// resume opens the rest of the blob at one of these sources. Nothing has changed if none has it.
func (m *Mirror) resume(ctx context.Context, t *transfer, sources []*source) bool {
	at, size := t.at, t.size // those who lose still ask when it has gone on
	body, src, err := m.openBody(upstream.Again(ctx), sources, func(ctx context.Context, src *source) (*body, error) {
		body, err := src.open(ctx, m, at)
		if err == nil && body.size >= 0 && body.size != size {
			body.Close()
			return nil, src.lied(fmt.Errorf("%d bytes where another announced %d", body.size, size))
		}
		return body, err
	})
	if err != nil {
		return false
	}
	t.body.Close()
	t.body, t.src, t.mixed = body, src, t.mixed || src != t.src && at > 0
	t.broke, t.brought, t.waited = nil, 0, 0
	m.metrics.resumes.Inc()
	return true
}

// order is where to go on when the body has broken off: the next source, and last of all the same one.
func (t *transfer) order() []*source {
	t.mu.Lock()
	defer t.mu.Unlock()
	at := slices.Index(t.sources, t.src)
	return slices.Concat(t.sources[at+1:], t.sources[:at+1])
}

// others are the sources besides the present one that may have the blob.
func (t *transfer) others() []*source {
	t.mu.Lock()
	defer t.mu.Unlock()
	return slices.DeleteFunc(slices.Clone(t.sources), func(s *source) bool { return s == t.src || s.err != nil })
}
