package upstream

import (
	"errors"
	"io"
	"net/http"
	"sync"
	"sync/atomic"
	"time"

	"breakwater/pkg/oci"

	"github.com/opencontainers/go-digest"
)

const (
	// verdictBytes of body, and not its header, show that a blob host works: headers that come with
	// bodies that stall were the incident's own shape.
	verdictBytes = 256 << 10
	verdictTime  = 30 * time.Second
	// shunTime is how long an upstream is not asked again for a digest that it sent wrong bytes for.
	shunTime = 10 * time.Minute
	// maxLies is how many digests it may lie about in shunTime before that is a failure of its own.
	maxLies = 3
	// lackTime is how long a 404 is remembered.
	lackTime = 10 * time.Minute
	// maxMarks bounds what is held against an upstream; beyond it all is forgotten.
	maxMarks = 1000
)

// Body is a blob on its way. Reading it gives the breaker its verdict.
type Body struct {
	Size int64 // of the whole blob; -1 if the upstream did not say

	c       *Client
	ref     oci.Reference
	body    io.ReadCloser
	host    string // that it comes from, perhaps after redirects
	read    int64
	waiting atomic.Bool // in Read: the upstream's turn
	failed  func(error) *Error
	settle  func(error)
	settled bool
	late    *time.Timer
}

func newBody(c *Client, ref oci.Reference, resp *http.Response, settle func(error)) *Body {
	var once sync.Once
	b := &Body{Size: resp.ContentLength, c: c, ref: ref, body: resp.Body, host: resp.Request.URL.Host}
	b.failed = func(err error) *Error { return c.failed(resp.Request.Context(), classBlob, err) }
	b.settle = func(err error) { once.Do(func() { settle(err) }) }
	b.late = time.AfterFunc(verdictTime, func() {
		if !b.waiting.Load() {
			b.settle(&Error{Reason: "read slowly", verdict: excluded})
			return
		}
		b.settle(&Error{Upstream: c.base.Host, Class: classBlob.String(), Reason: "body too slow", verdict: failure})
	})
	return b
}

// Read fails with an *Error or io.EOF.
func (b *Body) Read(p []byte) (int, error) {
	b.waiting.Store(true)
	n, err := b.body.Read(p)
	b.waiting.Store(false)
	b.read += int64(n)
	if !b.settled && (b.read >= verdictBytes || errors.Is(err, io.EOF)) {
		b.settled = true
		b.late.Stop()
		b.settle(nil)
		b.c.good[1].Store(&b.ref)
	}
	if err != nil && !errors.Is(err, io.EOF) {
		failed := b.failed(err)
		if failed.Reason == "failed" {
			failed.Reason = "body broke off"
		}
		failed.at(b.host)
		if b.settled {
			b.c.breakers[classBlob].fail(b.ref.String(), failed.verdict, failed.Reason)
		}
		b.settle(failed)
		err = failed
	}
	return n, err
}

// Close ends the request. A body that was not read to a verdict gives none.
func (b *Body) Close() error {
	b.late.Stop()
	b.settle(&Error{Reason: "not waited for", verdict: excluded})
	return b.body.Close()
}

// Mismatch says that the upstream sent another blob than the digest names. It is not asked for that
// digest for ten minutes; three such digests count as a failure.
func (c *Client) Mismatch(ref oci.Reference) { c.lied(classBlob, ref) }

func (c *Client) lied(class class, ref oci.Reference) {
	if c.shunned.add(ref.Digest, time.Now().Add(shunTime)) >= maxLies {
		c.breakers[class].fail("", hostFailure, "sent wrong bytes for several digests")
	}
}

func (c *Client) shuns(class class, dgst digest.Digest) error {
	left := c.shunned.left(dgst)
	if left <= 0 {
		return nil
	}
	return &Error{Upstream: c.base.Host, Class: class.String(), State: "shunned", Reason: "sent wrong bytes for " + dgst.String(), RetryAfter: left, verdict: excluded}
}

// Lacked reports whether the upstream has lately answered that it has no such content: others are asked
// before it, and it is asked all the same.
func (c *Client) Lacked(ref oci.Reference) bool { return c.lacked.left(ref) > 0 }

// remember notes whether the upstream has that content. What it says of a tag may change at any time.
func (c *Client) remember(ref oci.Reference, err error) {
	e := new(Error)
	switch {
	case ref.Digest == "":
	case err == nil:
		c.lacked.drop(ref)
	case errors.As(err, &e) && e.Kind == NotFound:
		c.lacked.add(ref, time.Now().Add(lackTime))
	}
}

// marks are what is held against an upstream, and until when.
type marks[K comparable] struct {
	mu    sync.Mutex
	until map[K]time.Time
}

// add returns how many there are now.
func (m *marks[K]) add(key K, until time.Time) int {
	m.mu.Lock()
	defer m.mu.Unlock()
	for other, end := range m.until {
		if time.Now().After(end) {
			delete(m.until, other)
		}
	}
	if m.until == nil || len(m.until) >= maxMarks {
		m.until = map[K]time.Time{}
	}
	m.until[key] = until
	return len(m.until)
}

func (m *marks[K]) drop(key K) {
	m.mu.Lock()
	defer m.mu.Unlock()
	delete(m.until, key)
}

func (m *marks[K]) left(key K) time.Duration {
	m.mu.Lock()
	defer m.mu.Unlock()
	return time.Until(m.until[key])
}
