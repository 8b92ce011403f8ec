package proxy

import (
	"context"
	"errors"
	"time"

	"breakwater/proxy/upstream"

	ispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// runBehind completes what nobody is pulling any more, until ctx ends.
func (c *completions) runBehind(ctx context.Context) {
	for ctx.Err() == nil {
		p, due := c.next()
		if p == nil {
			c.await(ctx, due)
			continue
		}
		if c.settle(ctx, p, c.fetchBehind(ctx, p)) { // it has become urgent meanwhile
			c.mu.Lock()
			c.hurry(p)
			c.mu.Unlock()
		}
	}
}

// next takes what is due out of the queue, or says when something will be: zero is never.
func (c *completions) next() (*completion, time.Time) {
	c.mu.Lock()
	defer c.mu.Unlock()
	var first time.Time
	for _, p := range c.queue {
		if !p.due.After(time.Now()) {
			c.unqueue(p)
			p.busy = true
			select {
			case <-p.hail: // of before
			default:
			}
			return p, time.Time{}
		}
		if first.IsZero() || p.due.Before(first) {
			first = p.due
		}
	}
	return nil, first
}

// await waits until something new is in the queue, or that time has come.
func (c *completions) await(ctx context.Context, due time.Time) {
	var timer <-chan time.Time
	if !due.IsZero() {
		t := time.NewTimer(time.Until(due))
		defer t.Stop()
		timer = t.C
	}
	select {
	case <-timer:
	case <-c.wake:
	case <-ctx.Done():
	}
}

// fetchBehind fetches what is missing of an image, one blob after the other, and what refers to it.
func (c *completions) fetchBehind(ctx context.Context, p *completion) error {
	_, missing, err := c.missing(ctx, p)
	if err != nil {
		return err
	}
	if err := c.trickle(ctx, p, missing); err != nil {
		return err
	}
	if !c.complete(p) {
		return nil
	}
	return c.fetchReferring(ctx, p)
}

// trickle fetches blobs behind. Those after the first that no upstream has are tried all the same.
func (c *completions) trickle(ctx context.Context, p *completion, blobs []ispec.Descriptor) error {
	var failed error
	for _, desc := range blobs {
		if !c.affords(desc.Size) {
			return errSpent
		}
		err := c.fill(ctx, p, desc, behind)
		if up := new(upstream.Error); err != nil && !errors.As(err, &up) {
			return err
		}
		if err == nil {
			c.spend(desc.Size)
		} else if failed == nil {
			failed = err
		}
	}
	return failed
}

// affords reports whether the day's bytes are enough for so many more.
func (c *completions) affords(n int64) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if time.Since(c.day) >= 24*time.Hour {
		c.day, c.spent = time.Now(), 0
	}
	return c.spent+n <= c.m.cfg.Load().Completion.BytesPerDay.Bytes
}

func (c *completions) spend(n int64) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.spent += n
}
