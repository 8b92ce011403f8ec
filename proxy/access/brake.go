package access

import (
	"context"
	"hash/maphash"
	"net/netip"
	"sync"
	"time"
)

const (
	// guesses is how many wrong passwords an address may show for a name at once, and guessEvery how long it
	// takes until it may show another one.
	guesses    = 10
	guessEvery = 2 * time.Second
	// guessedNames is how many names' guesses an address has in all.
	guessedNames = 10
	// brakeTime is how long a password is held back. One that would have to wait longer is not looked at.
	brakeTime = 6 * time.Second
	// braked is how many are told apart. Beyond, some share their guesses, and nobody can choose with whom.
	braked = 1 << 16
)

// brake slows those down who show wrong passwords: an address for each name by itself, so that whoever guesses
// at one does not keep those out who have another behind the same address, and for all names together.
type brake struct {
	seed maphash.Seed

	mu        sync.Mutex       // guards what follows
	names     [braked]spending // of an address for a name
	addresses [braked]spending
}

// spending is how many guesses have been spent, as of a time: some come back as time goes by.
type spending struct {
	guesses int
	asOf    time.Time
}

func newBrake() *brake { return &brake{seed: maphash.MakeSeed()} }

// host is what an address is braked as: of IPv6 the /64, which is one host's.
func host(from netip.Addr) netip.Prefix {
	bits := 32
	if from.Is6() {
		bits = 64
	}
	prefix, _ := from.WithZone("").Prefix(bits) // the zero address has the zero prefix
	return prefix
}

// take spends one guess of the host for the name, and waits until it has one.
func (b *brake) take(ctx context.Context, from netip.Prefix, name string) error {
	wait := b.spend(from, name)
	if wait > brakeTime {
		return ErrBusy
	}
	if wait > 0 {
		timer := time.NewTimer(wait)
		defer timer.Stop()
		select {
		case <-timer.C:
		case <-ctx.Done():
			b.giveBack(from, name)
			return context.Cause(ctx)
		}
	}
	return nil
}

// spend returns how long the host has to wait for its guess; it spends none if that is too long.
func (b *brake) spend(from netip.Prefix, name string) time.Duration {
	b.mu.Lock()
	defer b.mu.Unlock()
	now := time.Now()
	one, all := b.of(from, name)
	wait := max(one.wait(now, 1), all.wait(now, guessedNames))
	if wait <= brakeTime {
		one.guesses++
		all.guesses++
	}
	return wait
}

// giveBack is for a password that was right, or that was not looked at.
func (b *brake) giveBack(from netip.Prefix, name string) {
	b.mu.Lock()
	defer b.mu.Unlock()
	one, all := b.of(from, name)
	one.guesses = max(0, one.guesses-1)
	all.guesses = max(0, all.guesses-1)
}

// of is what the host has spent for the name, and for all. The lock is held.
func (b *brake) of(from netip.Prefix, name string) (one, all *spending) {
	type guess struct {
		from netip.Prefix
		name string
	}
	return &b.names[maphash.Comparable(b.seed, guess{from, name})%braked], &b.addresses[maphash.Comparable(b.seed, from)%braked]
}

// wait gives back what time has earned, and returns how long it is until there is a guess, of those of so many
// names.
func (s *spending) wait(now time.Time, names int) time.Duration {
	every := guessEvery / time.Duration(names)
	if earned := int(now.Sub(s.asOf) / every); earned >= s.guesses {
		s.guesses, s.asOf = 0, now
	} else {
		s.guesses -= earned
		s.asOf = s.asOf.Add(time.Duration(earned) * every)
	}
	return max(0, time.Duration(s.guesses-guesses*names+1)*every-now.Sub(s.asOf))
}
