package access

import (
	"context"
	"hash/maphash"
	"net/netip"
	"time"
)

const (
	// coreTime is how long a password may wait for a core.
	coreTime = 5 * time.Second
	// lanes is how many hosts are told apart. Beyond, some share what they may have.
	lanes = 1 << 8
)

// cores are those that hash passwords: half of all, since pulls need the others. One host may have half of
// those at a time, rounded up: where it would keep them busy, others still get theirs in turn.
type cores struct {
	seed maphash.Seed
	all  chan struct{}
	host [lanes]chan struct{} // that each may have
}

func newCores(n int) *cores {
	c := &cores{seed: maphash.MakeSeed(), all: make(chan struct{}, n)}
	for i := range c.host {
		c.host[i] = make(chan struct{}, (n+1)/2)
	}
	return c
}

// take waits for a core, which leave gives back.
func (c *cores) take(ctx context.Context, from netip.Prefix) (leave func(), err error) {
	timer := time.NewTimer(coreTime)
	defer timer.Stop()
	lane := c.lane(from)
	for i, queue := range [...]chan struct{}{lane, c.all} {
		select {
		case queue <- struct{}{}:
			continue
		case <-timer.C:
			err = ErrBusy
		case <-ctx.Done():
			err = context.Cause(ctx)
		}
		if i > 0 {
			<-lane
		}
		return nil, err
	}
	return func() { <-c.all; <-lane }, nil
}

// lane is what the host may have of the cores.
func (c *cores) lane(from netip.Prefix) chan struct{} {
	return c.host[maphash.Comparable(c.seed, from)%lanes]
}
