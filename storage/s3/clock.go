package s3

import (
	"sync"
	"time"
)

const (
	// maxSkew is how far off a host's clock may be, for it to publish anything.
	maxSkew = 5 * time.Minute
	// clockTolerance is how far in the future a time may seem to be that is not.
	clockTolerance = 2 * time.Second
	// dateWidth is how old a Date may be: it has whole seconds, and some servers renew it once a second.
	dateWidth = 2 * time.Second
)

// clock knows how far the bucket's clock is ahead of this host's. Each answer bounds that: at some
// moment between request and answer, the bucket's time was in the second that its Date names.
type clock struct {
	mu     sync.Mutex // guards what follows
	lo, hi time.Duration
	known  bool
}

// observe takes in an answer. What contradicts all before means that a clock was set.
func (c *clock) observe(sent, received, date time.Time) {
	sent, received = sent.Round(0), received.Round(0) // by the wall clock: it is the one to correct
	lo, hi := date.Sub(received), date.Add(dateWidth).Sub(sent)
	if lo > hi {
		return // it was set in between
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.known && max(lo, c.lo) <= min(hi, c.hi) {
		lo, hi = max(lo, c.lo), min(hi, c.hi)
	}
	c.lo, c.hi, c.known = lo, hi, true
}

// offset is what to add to this host's time; not known before the first answer. A clock that may be right is
// taken for right: so hosts that keep time agree to less than the second that the bucket tells it by.
func (c *clock) offset() (by time.Duration, known bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.lo <= 0 && c.hi >= 0 {
		return 0, c.known
	}
	return (c.lo + c.hi) / 2, c.known
}

// wrong reports whether this host's clock is too far off to publish anything.
func (c *clock) wrong() bool {
	by, _ := c.offset()
	return by.Abs() > maxSkew
}

// now is the bucket's time.
func (c *clock) now() time.Time { return c.there(time.Now()) }

// there turns this host's time into the bucket's.
func (c *clock) there(t time.Time) time.Time {
	if t.IsZero() {
		return t
	}
	by, _ := c.offset()
	return t.UTC().Round(0).Add(by)
}

// here turns the bucket's time into this host's. What seems to be in the future within the tolerance
// is now.
func (c *clock) here(t time.Time) time.Time {
	if t.IsZero() {
		return t
	}
	by, _ := c.offset()
	t = t.Add(-by)
	if now := time.Now().UTC().Round(0); t.After(now) && !t.After(now.Add(clockTolerance)) {
		return now
	}
	return t
}

// future reports whether a time of the bucket's has not come yet.
func (c *clock) future(t time.Time) bool { return t.After(c.now().Add(clockTolerance)) }
