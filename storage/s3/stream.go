package s3

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/service/s3"
	"github.com/opencontainers/go-digest"
)

// bodyStall is how long a body may send nothing.
const bodyStall = 5 * time.Second

// errStalled is why a body ends that sent nothing any more.
var errStalled = errors.New("the body stalls")

// stream is a range of a blob, as it arrives.
type stream struct {
	begin, end int64
	total      int64 // of the blob
	etag       string
	body       io.ReadCloser
	ctx        context.Context
	cancel     context.CancelCauseFunc
	stall      *time.Timer
}

// get asks for the bytes from begin to end, or to the blob's end if that comes first, of the object
// that the first range was of.
func (r *Body) get(begin, end int64, limit time.Duration) (*stream, error) {
	in := &s3.GetObjectInput{Bucket: &r.b.cfg.Bucket, Key: r.b.key(r.name)}
	in.Range = aws.String(fmt.Sprintf("bytes=%d-%d", begin, end-1))
	if r.etag != "" {
		in.IfMatch = &r.etag
	}
	s := &stream{begin: begin}
	s.ctx, s.cancel = context.WithCancelCause(r.ctx)
	slow := time.AfterFunc(limit, func() { s.cancel(errSlow) })
	out, err := r.b.client.GetObject(s.ctx, in)
	if !slow.Stop() && err == nil {
		_ = out.Body.Close()
		err = errSlow
	}
	if err != nil {
		err = explain(s.ctx, err)
		s.cancel(err)
		return nil, err
	}
	s.body, s.etag = out.Body, aws.ToString(out.ETag)
	s.stall = time.AfterFunc(bodyStall, func() { s.cancel(errStalled) })
	s.stall.Stop()
	if err := s.parse(out, end); err != nil {
		_ = s.Close()
		return nil, err
	}
	return s, nil
}

// parse finds out what was sent. A server that knows no ranges sends all.
func (s *stream) parse(out *s3.GetObjectOutput, end int64) error {
	length := aws.ToInt64(out.ContentLength)
	if out.ContentRange == nil && s.begin == 0 {
		s.end, s.total = length, length
		return nil
	}
	var first, last int64
	var err error
	text := aws.ToString(out.ContentRange)
	span, total, _ := strings.Cut(strings.TrimPrefix(text, "bytes "), "/")
	from, to, _ := strings.Cut(span, "-")
	for i, number := range []string{from, to, total} {
		var e error
		*[]*int64{&first, &last, &s.total}[i], e = strconv.ParseInt(number, 10, 64)
		err = errors.Join(err, e)
	}
	s.end = last + 1
	if err != nil || first != s.begin || s.end != min(end, s.total) || s.end-first != length {
		return fmt.Errorf("asked for bytes %d-%d and sent %q, %d bytes", s.begin, end-1, text, length)
	}
	return nil
}

// Read returns io.EOF once the whole range was read.
func (s *stream) Read(p []byte) (int, error) {
	if s.begin == s.end {
		return 0, io.EOF
	}
	s.stall.Reset(bodyStall)
	n, err := s.body.Read(p[:min(int64(len(p)), s.end-s.begin)])
	s.stall.Stop()
	s.begin += int64(n)
	switch {
	case err == nil:
		return n, nil
	case !errors.Is(err, io.EOF):
		if cause := context.Cause(s.ctx); errors.Is(cause, errStalled) {
			return n, cause
		}
		return n, explain(s.ctx, err)
	case s.begin < s.end:
		return n, io.ErrUnexpectedEOF
	}
	return n, nil
}

// Close ends the range.
func (s *stream) Close() error {
	s.stall.Stop()
	s.cancel(context.Canceled)
	return s.body.Close()
}

// buffers are pieces of memory of one size, so many at a time.
type buffers struct {
	slots chan struct{}
	pool  *sync.Pool
}

func newBuffers(n, size int) buffers {
	return buffers{make(chan struct{}, n), &sync.Pool{New: func() any {
		raw := make([]byte, size)
		return &raw
	}}}
}

// try is nil if all are in use.
func (b buffers) try() []byte {
	select {
	case b.slots <- struct{}{}:
		return *b.pool.Get().(*[]byte)
	default:
		return nil
	}
}

// take waits for one.
func (b buffers) take(ctx context.Context) ([]byte, error) {
	select {
	case b.slots <- struct{}{}:
		return *b.pool.Get().(*[]byte), nil
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
}

func (b buffers) give(raw []byte) {
	raw = raw[:cap(raw)]
	b.pool.Put(&raw)
	<-b.slots
}

const (
	// distrustFor is how long a blob with wrong bytes is not asked for.
	distrustFor = 10 * time.Minute
	// maxDistrusted bounds their number. Beyond it, who finds one wrong finds it wrong again.
	maxDistrusted = 1000
)

// distrusted are blobs whose bytes were not what their digests say.
type distrusted struct {
	mu    sync.Mutex // guards until
	until map[digest.Digest]time.Time
}

// Distrust is for a blob that was read and is not what its digest says: for 10 minutes it is
// fs.ErrNotExist here, and the next PutBlob or Upload replaces it. As long, each PutContent writes its record anew,
// since that may be what is wrong.
func (b *Bucket) Distrust(dgst digest.Digest) {
	b.log.Warn("the shared store has wrong bytes", "digest", dgst)
	b.wrong.add(dgst)
	b.misread.add(dgst)
}

func (d *distrusted) add(dgst digest.Digest) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.until == nil {
		d.until = map[digest.Digest]time.Time{}
	}
	for dgst, until := range d.until {
		if time.Now().After(until) {
			delete(d.until, dgst)
		}
	}
	if len(d.until) < maxDistrusted {
		d.until[dgst] = time.Now().Add(distrustFor)
	}
}

func (d *distrusted) has(dgst digest.Digest) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	return time.Now().Before(d.until[dgst])
}

// clear is for one that was replaced.
func (d *distrusted) clear(dgst digest.Digest) {
	d.mu.Lock()
	defer d.mu.Unlock()
	delete(d.until, dgst)
}
