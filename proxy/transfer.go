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

// transfer moves a blob from its sources into the store: one body after the other, each from where
// the last one broke off, until it is whole. Readers never see a seam.
type transfer struct {
	*fill
	ingest *storage.Ingest
	size   int64 // -1 if nobody could tell
	src    *source
	body   *upstream.Body
	mixed  bool // bytes of more than one source are in it
}

// transfer brings the blob, beginning with the body that src has opened.
func (m *Mirror) transfer(ctx context.Context, f *fill, src *source, body *upstream.Body) error {
	t := &transfer{fill: f, src: src, body: body}
	defer func() { t.body.Close() }()
	var err error
	if t.size, err = m.sizeOf(ctx, src, body); err != nil {
		return err
	}
	if t.ingest, err = m.store.Ingest(src.ref.Repository, f.dgst, t.size); err != nil {
		return err
	}
	defer func() { t.ingest.Abort(errPanicked) }() // does nothing once it has ended
	if t.ingest.Written() > 0 {                    // parked by an earlier fill
		if t.ingest.Written() == t.size || m.resume(ctx, t, t.order()) {
			t.mixed = true
		} else { // begin anew, with the body that is open
			t.ingest.Abort(errPanicked)
			if t.ingest, err = m.store.Ingest(src.ref.Repository, f.dgst, t.size); err != nil {
				return err
			}
		}
	}
	if t.ingest.Written() != t.size {
		err = m.bring(ctx, t)
	}
	if err == nil {
		err = t.ingest.Verify()
	}
	if err != nil {
		t.ingest.Park(err) // the next request goes on from there, unless what came is wrong
		if errors.Is(err, storage.ErrMismatch) {
			if !t.mixed { // else nobody knows who lied
				t.src.client.Mismatch(t.src.ref)
			}
			err = t.src.lied(err)
		}
		return err
	}
	f.publish(t.ingest)
	if err := t.ingest.Commit(m.confirmation(t.src.client, src.ref.Repository)); err != nil {
		m.logger.Error("blob not stored", "digest", f.dgst, "err", err) // its readers have all of it
	}
	return nil
}

// bring copies until the end of the last body.
func (m *Mirror) bring(ctx context.Context, t *transfer) error {
	buf := make([]byte, transferBuffer)
	for breaks, mark := 0, int64(0); ; {
		err := t.copy(buf, m.fills.busy)
		if err == nil || !errors.As(err, new(*upstream.Error)) || t.size < 0 {
			return err // whole; or our own trouble; or nobody could tell where its end is
		}
		if t.ingest.Written()-mark >= breakProgress {
			breaks, mark = 0, t.ingest.Written()
		}
		m.logger.Warn("body broke off", "repository", t.src.ref.Repository, "digest", t.dgst, "upstream", t.src.client.Upstream(), "size", t.ingest.Written(), "err", err)
		if errors.Is(err, errSlow) {
			if others := t.others(); len(others) > 0 { // the last may have failed a moment ago
				m.resume(ctx, t, others) // who drips goes on if nobody else does
			}
			continue
		}
		for resumed := false; !resumed; breaks++ {
			if breaks == maxBreaks || !pause(ctx, breaks) {
				return err
			}
			resumed = m.resume(ctx, t, t.order())
		}
	}
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
	at, size := t.ingest.Written(), t.size // those who lose still ask when it is written on
	body, src, err := m.openBody(upstream.Again(ctx), sources, func(ctx context.Context, src *source) (*upstream.Body, error) {
		body, err := src.open(ctx, at)
		if err == nil && body.Size >= 0 && body.Size != size {
			body.Close()
			return nil, src.lied(fmt.Errorf("%d bytes where another announced %d", body.Size, size))
		}
		return body, err
	})
	if err != nil {
		return false
	}
	t.body.Close()
	t.body, t.src, t.mixed = body, src, t.mixed || src != t.src && at > 0
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

// copy moves what the body has into the ingest, and lets readers in at the first byte that they may
// have. An *upstream.Error is the body's, any other the ingest's or ours. It gives way while others are busy.
func (t *transfer) copy(buf []byte, busy func() bool) error {
	for began, brought := time.Now(), 0; ; {
		if err := t.pace.giveWay(busy); err != nil {
			return err
		}
		n, err := t.body.Read(buf)
		if n > 0 {
			if _, err := t.ingest.Write(buf[:n]); err != nil {
				return err
			}
			if t.ingest.Released() > 0 {
				t.publish(t.ingest)
			}
		}
		if errors.Is(err, io.EOF) && (t.size < 0 || t.ingest.Written() == t.size) {
			return nil
		}
		if errors.Is(err, io.EOF) { // it had no length of its own to be held to
			return &upstream.Error{Upstream: t.src.client.Upstream(), Class: "blob", Reason: "body ended early"}
		}
		if err != nil {
			return err
		}
		brought += n
		if time.Since(began) >= slowTime {
			if brought < slowBytes && len(t.others()) > 0 {
				return errSlow
			}
			began, brought = time.Now(), 0
		}
	}
}

// others are the sources besides the present one that may have the blob.
func (t *transfer) others() []*source {
	t.mu.Lock()
	defer t.mu.Unlock()
	return slices.DeleteFunc(slices.Clone(t.sources), func(s *source) bool { return s == t.src || s.err != nil })
}

// lied is the error of a source that sent other bytes than the digest names.
func (s *source) lied(err error) error {
	return &upstream.Error{Upstream: s.client.Upstream(), Class: "blob", Reason: "sent wrong content", Err: err}
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
		src.client.Mismatch(src.ref)
		return 0, src.lied(fmt.Errorf("%d bytes announced where the manifest says %d", size, expected))
	}
	return size, nil
}
