package access

import (
	"context"
	"net/netip"
	"sync"
	"time"
)

const (
	// guesses is how many wrong passwords an address may show at once, and guessEvery how long it takes until
	// it may show another one.
	guesses    = 10
	guessEvery = 2 * time.Second
	// brakeTime is how long a password is held back. One that would have to wait longer is not looked at.
	brakeTime = 6 * time.Second
	// maxBraked bounds the addresses that are told apart; newcomers beyond it are braked together.
	maxBraked = 10_000
)

// brake slows those down who show wrong passwords, by their addresses: of IPv6 by the /64, which is one host's.
type brake struct {
	mu      sync.Mutex // guards spent
	spent   map[netip.Prefix]*spending
	crowded spending
}

// spending is how many guesses an address has spent, as of a time: it gets one back each guessEvery.
type spending struct {
	guesses int
	asOf    time.Time
}

// take spends one guess of the address, and waits until it has one. A password that is right gives it back.
func (b *brake) take(ctx context.Context, from netip.Addr) (giveBack func(), err error) {
	s, wait := b.spend(from)
	if wait > brakeTime {
		return nil, ErrBusy
	}
	if wait > 0 {
		timer := time.NewTimer(wait)
		defer timer.Stop()
		select {
		case <-timer.C:
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		}
	}
	return func() {
		b.mu.Lock()
		defer b.mu.Unlock()
		s.guesses = max(0, s.guesses-1)
	}, nil
}

// spend returns how long the address has to wait for its guess; it spends none if that is too long.
func (b *brake) spend(from netip.Addr) (*spending, time.Duration) {
	b.mu.Lock()
	defer b.mu.Unlock()
	now := time.Now()
	s := b.of(from, now)
	s.regain(now)
	wait := max(0, time.Duration(s.guesses-guesses+1)*guessEvery-now.Sub(s.asOf))
	if wait <= brakeTime {
		s.guesses++
	}
	return s, wait
}

// regain gives back what time has earned.
func (s *spending) regain(now time.Time) {
	earned := int(now.Sub(s.asOf) / guessEvery)
	if earned >= s.guesses {
		s.guesses, s.asOf = 0, now
		return
	}
	s.guesses -= earned
	s.asOf = s.asOf.Add(time.Duration(earned) * guessEvery)
}

// of is the address's spending. The lock is held.
func (b *brake) of(from netip.Addr, now time.Time) *spending {
	bits := 32
	if from.Is6() {
		bits = 64
	}
	key, _ := from.WithZone("").Prefix(bits) // the zero address has the zero prefix
	if s := b.spent[key]; s != nil {
		return s
	}
	if len(b.spent) >= maxBraked {
		for key, s := range b.spent {
			if s.regain(now); s.guesses == 0 {
				delete(b.spent, key)
			}
		}
		if len(b.spent) >= maxBraked {
			return &b.crowded
		}
	}
	if b.spent == nil {
		b.spent = map[netip.Prefix]*spending{}
	}
	s := &spending{asOf: now}
	b.spent[key] = s
	return s
}
