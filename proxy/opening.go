package proxy

import (
	"context"
	"errors"
	"sync"
	"time"
)

// errTaken is the error of who comes after somebody who has taken it.
var errTaken = errors.New("somebody has it")

// opening is a blob that is being opened at the bucket. Who has waited long enough asks the upstreams too, and
// takes what comes first.
type opening struct {
	src    *source
	cancel context.CancelFunc // ends it, and the body
	done   chan struct{}

	mu       sync.Mutex // guards what follows
	unwanted bool
	body     *body // until somebody takes it
	err      error
}

// begin opens the blob at the bucket for a fill.
func (f *fleet) begin(ctx context.Context, fill *fill, src *source) *opening {
	ctx, cancel := context.WithCancel(ctx)
	o := &opening{src: src, cancel: cancel, done: make(chan struct{}), err: errPanicked}
	begun := f.m.filling.start(func(context.Context) {
		defer close(o.done)
		body, err := src.open(ctx, f.m, 0)
		o.mu.Lock()
		defer o.mu.Unlock()
		if o.body, o.err = body, err; err != nil {
			cancel()
			if !o.unwanted {
				fill.fail(src, err)
			}
			return
		}
		body.cancel = cancel
		if o.unwanted {
			o.body = nil
			body.Close()
		}
	})
	if !begun {
		o.err = errClosed
		cancel()
		close(o.done)
	}
	return o
}

// isLate waits for it so long, and reports whether that was not enough.
func (o *opening) isLate(ctx context.Context, patience time.Duration) bool {
	timer := time.NewTimer(patience)
	defer timer.Stop()
	select {
	case <-o.done:
		return false
	case <-timer.C:
	case <-ctx.Done():
	}
	return true
}

// take waits for what it brings, which only one may have.
func (o *opening) take(ctx context.Context) (*body, error) {
	select {
	case <-o.done:
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	body := o.body
	o.body = nil
	if body == nil && o.err == nil {
		return nil, errTaken
	}
	return body, o.err
}

// drop ends it, unless somebody has taken what it has brought. It is held against nobody.
func (o *opening) drop() {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.unwanted = true
	select {
	case <-o.done:
		if o.body != nil {
			o.body.Close()
			o.body = nil
		}
	default:
		o.cancel()
	}
}

const (
	// firstLag is how long the upstreams are asked first after one of them was quicker than the bucket, which
	// had had its time; twice as long each time after that, up to maxLag, until the bucket was quick enough for
	// steadyLag.
	firstLag  = 2 * time.Second
	maxLag    = time.Minute
	steadyLag = 2 * time.Minute
)

// lag is how long a slow bucket is asked last: it costs one wait now and then, and not one for each blob.
type lag struct {
	mu    sync.Mutex // guards what follows
	until time.Time
	next  time.Duration
}

// note returns for how long from now on, 0 if that is known already.
func (l *lag) note() time.Duration {
	l.mu.Lock()
	defer l.mu.Unlock()
	now := time.Now()
	if now.Before(l.until) {
		return 0
	}
	if now.Sub(l.until) > steadyLag {
		l.next = firstLag
	}
	d := l.next
	l.until, l.next = now.Add(d), min(2*d, maxLag)
	return d
}

func (l *lag) isOn() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return time.Now().Before(l.until)
}
