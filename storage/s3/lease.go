package s3

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/service/s3"
)

const (
	// leaseLife is how long a lease holds that is not renewed, by the bucket's time.
	leaseLife = 15 * time.Second
	// leaseRenewal leaves room for a renewal that fails.
	leaseRenewal = 5 * time.Second
)

// Lease is the right to do something that one host of the fleet does at a time. It is renewed by
// itself until Release, or until the ctx that it was taken with ends: then it expires.
type Lease struct {
	b      *Bucket
	name   string          // of the object
	held   context.Context // until it is lost
	cancel context.CancelCauseFunc
	ended  chan struct{} // closed when it is not renewed any more
	etag   string        // of the object, if it is ours; for keep until it has ended
}

// Lease takes a lease that nobody holds. It is ErrHeld if somebody does, and has an answer within 2 s.
// Nobody learns the name from the bucket.
func (b *Bucket) Lease(ctx context.Context, name string) (*Lease, error) {
	if err := b.writable(); err != nil {
		return nil, err
	}
	l := &Lease{b: b, name: leaseName(name), ended: make(chan struct{})}
	taking, cancel := b.bounded(ctx, headerLimit)
	defer cancel()
	etag, err := l.put(taking, condition{})
	if lost(err) {
		var there info
		if there, err = b.head(taking, l.name); err != nil {
			return nil, err
		}
		if there.found && !b.expired(there) {
			return nil, fmt.Errorf("%w %q", ErrHeld, name)
		}
		etag, err = l.put(taking, condition{there.etag})
	}
	if lost(err) {
		return nil, fmt.Errorf("%w %q", ErrHeld, name)
	}
	if err != nil {
		return nil, fmt.Errorf("lease %q: %w", name, err)
	}
	l.etag = etag
	l.held, l.cancel = context.WithCancelCause(ctx)
	if !b.start(l.keep) {
		l.cancel(errClosed)
		return nil, errClosed
	}
	return l, nil
}

// expired goes by the bucket's time, in whose seconds Last-Modified is told.
func (b *Bucket) expired(lease info) bool { return b.clock.now().Sub(lease.modified) > leaseLife }

// held reports whether somebody holds a lease.
func (b *Bucket) held(ctx context.Context, name string) (bool, error) {
	there, err := b.head(ctx, leaseName(name))
	return there.found && !b.expired(there), err
}

// put writes the lease's object. Its content is never the same twice, so that no two have the same etag.
func (l *Lease) put(ctx context.Context, c condition) (string, error) {
	out, err := once(ctx, l.b.writes, headerLimit, func(ctx context.Context) (*s3.PutObjectOutput, error) {
		in := l.b.putInput(l.name, []byte(rand.Text()+"\n"))
		in.IfMatch, in.IfNoneMatch = c.match(), c.noneMatch()
		return l.b.client.PutObject(ctx, in)
	})
	if err != nil {
		return "", err
	}
	return aws.ToString(out.ETag), nil
}

// errLeaseLost is why what was done under a lease has to end.
var errLeaseLost = errors.New("the lease was lost")

// keep renews the lease.
func (l *Lease) keep(closing context.Context) {
	defer close(l.ended)
	defer l.cancel(errLeaseLost)
	defer context.AfterFunc(closing, func() { l.cancel(errClosed) })()
	for renewed := time.Now(); pause(l.held, leaseRenewal); {
		asked := time.Now()
		etag, err := l.put(l.held, condition{l.etag})
		switch {
		case err == nil:
			l.etag, renewed = etag, asked
		case lost(err), time.Since(renewed) > leaseLife-leaseRenewal:
			return
		}
	}
}

// Lost is closed when the lease is not held any more, or may soon be somebody else's.
func (l *Lease) Lost() <-chan struct{} { return l.held.Done() }

// Release gives the lease back. One that is somebody else's by now stays his.
func (l *Lease) Release(ctx context.Context) {
	l.cancel(context.Canceled)
	<-l.ended
	if err := l.b.remove(ctx, l.name, l.etag); err != nil && !lost(err) {
		l.b.log.Debug("a lease is left to expire", "err", err)
	}
}
