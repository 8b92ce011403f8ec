package s3

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"time"

	"github.com/opencontainers/go-digest"
)

const (
	// firstRange is how much of a blob the first request asks for: all of most blobs.
	firstRange = 16 << 20
	// rangeSize and rangesAhead are for the rest of big blobs: so many ranges are fetched while one is
	// being read.
	rangeSize   = 8 << 20
	rangesAhead = 3
	// readAhead bounds the ranges in memory, of all blobs. Who gets none reads one after the other.
	readAhead = 12
	// proven is how much of a body says that the bucket delivers (DESIGN.md, section 8).
	proven = 256 << 10
)

// errChanged is why a body ends that is not of one object.
var errChanged = errors.New("the object was replaced while it was read")

// Body is a blob on its way, which the caller verifies. Of big ones, several ranges are fetched at a
// time. It is for one goroutine.
type Body struct {
	Size int64 // of the whole blob

	b      *Bucket
	name   string
	etag   string // of the object that the first range was of
	ctx    context.Context
	cancel context.CancelCauseFunc
	unhook func() bool
	pass   pass   // which it has left: for what its bytes say of the bucket
	leave  func() // lets the next download in

	offset  int64         // of the next byte to be read
	asked   int64         // up to where ranges have been asked for
	current io.ReadCloser // the range that is being read; nil between two
	ahead   []*chunk      // in order
	got     int64
	err     error // for good
}

// Blob opens a blob from offset on. It is fs.ErrNotExist if the bucket does not have it. Many are read at a
// time; others wait for their turn as long as ctx lasts, and then have an answer within 2 s. The download
// lasts as long as ctx does.
func (b *Bucket) Blob(ctx context.Context, dgst digest.Digest, offset int64) (*Body, error) {
	if err := b.reads.refusal(); err != nil {
		return nil, fmt.Errorf("read %s: %w", blobName(dgst), err)
	}
	select {
	case b.bodies <- struct{}{}:
	case <-ctx.Done():
		return nil, fmt.Errorf("read %s: too many downloads: %w", blobName(dgst), context.Cause(ctx))
	case <-b.ctx.Done():
		return nil, errClosed
	}
	r, err := b.body(ctx, dgst, offset)
	if err != nil {
		<-b.bodies
		return nil, err
	}
	r.leave = func() { <-b.bodies }
	return r, nil
}

// Manifest is Blob, from its beginning on, for what is small: it waits for no download.
func (b *Bucket) Manifest(ctx context.Context, dgst digest.Digest) (*Body, error) {
	return b.body(ctx, dgst, 0)
}

// body opens a blob.
func (b *Bucket) body(ctx context.Context, dgst digest.Digest, offset int64) (*Body, error) {
	name := blobName(dgst)
	if b.wrong.has(dgst) {
		return nil, errNone(name)
	}
	begun := time.Now()
	waiting, cancel := b.bounded(ctx, headerLimit)
	defer cancel()
	p, err := b.reads.enter(waiting)
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", name, err)
	}
	defer p.leave() // the header is what others wait for
	r := &Body{b: b, name: name, pass: p, offset: offset, leave: func() {}}
	r.ctx, r.cancel = context.WithCancelCause(ctx)
	r.unhook = context.AfterFunc(b.ctx, func() { r.cancel(errClosed) })
	if err := r.open(headerLimit - time.Since(begun)); err != nil {
		err = p.unhurried(err)
		p.settle(judge(err), err)
		_ = r.Close()
		if absent(err) {
			return nil, errNone(name)
		}
		return nil, fmt.Errorf("read %s: %w", name, err)
	}
	r.lookAhead()
	return r, nil
}

// open asks for the first range.
func (r *Body) open(limit time.Duration) error {
	first, err := r.get(r.offset, r.offset+firstRange, limit)
	if status(err) == http.StatusRequestedRangeNotSatisfiable && r.offset == 0 {
		return nil // it is empty
	}
	if err != nil {
		return err
	}
	r.Size, r.etag, r.current, r.asked = first.total, first.etag, first, first.end
	return nil
}

// Read reads on. Its errors are for good, and no bytes are missing before io.EOF.
func (r *Body) Read(p []byte) (int, error) {
	for r.err == nil && len(p) > 0 {
		if r.current == nil {
			if r.offset == r.Size {
				r.end(io.EOF)
				break
			}
			if err := r.next(); err != nil {
				r.end(err)
				break
			}
		}
		n, err := r.current.Read(p)
		r.offset += int64(n)
		if r.got += int64(n); r.got >= proven {
			r.pass.settle(good, nil)
			r.got = 0 // and again after so many bytes
		}
		if errors.Is(err, io.EOF) {
			_ = r.current.Close()
			r.current, err = nil, nil
			r.lookAhead()
		}
		if err != nil {
			r.end(err)
		}
		if n > 0 {
			return n, nil
		}
	}
	return 0, r.err
}

// end notes why nothing more comes.
func (r *Body) end(err error) {
	if errors.Is(err, io.EOF) {
		r.err = io.EOF
		r.pass.settle(good, nil)
		return
	}
	if status(err) == http.StatusPreconditionFailed {
		err = errChanged
		r.err = fmt.Errorf("read %s: %w", r.name, err)
		return
	}
	r.err = fmt.Errorf("read %s: %w", r.name, err)
	r.pass.settle(judge(err), err)
}

// next makes the next range the current one.
func (r *Body) next() error {
	if len(r.ahead) == 0 {
		s, err := r.get(r.offset, min(r.offset+rangeSize, r.Size), headerLimit)
		if err != nil {
			return err
		}
		r.current, r.asked = s, s.end
		return nil
	}
	c := r.ahead[0]
	select {
	case <-c.done:
	case <-r.ctx.Done():
		return &ownError{context.Cause(r.ctx)}
	}
	r.ahead = r.ahead[1:]
	if c.err != nil {
		r.b.chunks.give(c.raw)
		return c.err
	}
	r.current = &read{*bytes.NewReader(c.raw), func() { r.b.chunks.give(c.raw) }}
	return nil
}

// chunk is a range that is fetched ahead.
type chunk struct {
	begin int64
	raw   []byte
	done  chan struct{}
	err   error // set when done
}

// read is a chunk that is being read.
type read struct {
	bytes.Reader
	give func()
}

// Close gives its memory back.
func (r *read) Close() error {
	r.give()
	return nil
}

// lookAhead has ranges fetched, as far as there is memory for them.
func (r *Body) lookAhead() {
	for len(r.ahead) < rangesAhead && r.asked < r.Size {
		raw := r.b.chunks.try()
		if raw == nil {
			return
		}
		c := &chunk{begin: r.asked, raw: raw[:min(rangeSize, r.Size-r.asked)], done: make(chan struct{})}
		if !r.b.start(func(context.Context) { r.fetch(c) }) {
			r.b.chunks.give(raw)
			return
		}
		r.ahead = append(r.ahead, c)
		r.asked += int64(len(c.raw))
	}
}

func (r *Body) fetch(c *chunk) {
	defer close(c.done)
	s, err := r.get(c.begin, c.begin+int64(len(c.raw)), headerLimit)
	if err != nil {
		c.err = err
		return
	}
	defer s.Close()
	_, c.err = io.ReadFull(s, c.raw)
}

// Close ends the download.
func (r *Body) Close() error {
	r.unhook()
	r.cancel(context.Canceled)
	for _, c := range r.ahead {
		<-c.done
		r.b.chunks.give(c.raw)
	}
	r.ahead = nil
	if r.current != nil {
		_ = r.current.Close()
		r.current = nil
	}
	if r.err == nil {
		r.err = errClosed
	}
	r.leave()
	r.leave = func() {}
	return nil
}
