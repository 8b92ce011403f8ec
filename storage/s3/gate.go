package s3

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"time"
)

const (
	// failuresToOpen is how many in a row open a gate. A time-out and a refused connection do at once:
	// nobody is to wait for the bucket twice.
	failuresToOpen = 3
	firstHoldOff   = time.Second
	maxHoldOff     = time.Minute
	// steadyAfter is how long a gate is closed until its hold-offs begin anew: a bucket that answers
	// probes and nothing else costs a wait a minute.
	steadyAfter = 2 * time.Minute
)

// verdict is what a request says of the bucket.
type verdict int

const (
	none verdict = iota // nothing: the caller has left, or our own disk was at fault
	good
	bad
	hopeless // nothing answers: opens at once
)

// gate lets requests through while the bucket answers them, and not too many. Open, as a breaker is,
// it lets none through, until a probe in the background has been answered.
type gate struct {
	b     *Bucket
	name  string
	slots chan struct{}
	probe func(context.Context) error

	failed atomic.Uint64 // requests, ever

	mu       sync.Mutex // guards what follows
	era      int        // grows when it opens and when it closes
	failures int        // in a row
	since    time.Time  // when it opened; zero while it is closed
	reason   string
	holdOff  time.Duration // the next
	closed   time.Time     // when it closed last
}

func (b *Bucket) newGate(name string, slots int, probe func(context.Context) error) *gate {
	return &gate{b: b, name: name, slots: make(chan struct{}, slots), probe: probe, holdOff: firstHoldOff}
}

// Gate is the state of the reads, or of the writes.
type Gate struct {
	Open   bool      // all fail at once with ErrOut
	Since  time.Time // when it opened
	Reason string
}

func (g *gate) state() Gate {
	g.mu.Lock()
	defer g.mu.Unlock()
	return Gate{Open: !g.since.IsZero(), Since: g.since, Reason: g.reason}
}

// refusal is ErrOut while the gate is open.
func (g *gate) refusal() error {
	_, err := g.current()
	return err
}

func (g *gate) current() (era int, err error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if !g.since.IsZero() {
		return g.era, fmt.Errorf("%w for %s since %s: %s", ErrOut, g.name, g.since.UTC().Format(time.RFC3339), g.reason)
	}
	return g.era, nil
}

// pass is the right to make a request.
type pass struct {
	*gate
	era    int
	waited bool   // for others' requests, which leaves less time for this one
	leave  func() // gives the slot back; may be called twice
}

// unhurried holds it against nobody that a request was too slow which had not all of its time.
func (p pass) unhurried(err error) error {
	if p.waited && errors.Is(err, errSlow) {
		return &ownError{err}
	}
	return err
}

// enter waits for a slot. It fails at once while the gate is open.
func (g *gate) enter(ctx context.Context) (pass, error) {
	if err := g.refusal(); err != nil {
		return pass{}, err
	}
	waited := false
	select {
	case g.slots <- struct{}{}:
	default:
		waited = true
		select {
		case g.slots <- struct{}{}:
		case <-ctx.Done():
			return pass{}, fmt.Errorf("too many %s: %w", g.name, context.Cause(ctx))
		}
	}
	leave := sync.OnceFunc(func() { <-g.slots })
	era, err := g.current() // it may have opened meanwhile
	if err != nil {
		leave()
		return pass{}, err
	}
	return pass{g, era, waited, leave}, nil
}

// settle notes how a request went. What began before the gate opened or closed says nothing any more.
func (p pass) settle(v verdict, err error) {
	if v == bad || v == hopeless {
		p.failed.Add(1)
	}
	if p.note(v, err) {
		p.b.log.Warn("the shared store is out", "for", p.name, "err", reason(err))
		p.b.start(p.recover)
	}
}

// note returns whether the gate has opened.
func (p pass) note(v verdict, err error) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.era != p.gate.era || v == none {
		return false
	}
	if v == good {
		p.failures = 0
		return false
	}
	if p.failures++; v == bad && p.failures < failuresToOpen {
		return false
	}
	now := time.Now()
	if now.Sub(p.closed) > steadyAfter {
		p.holdOff = firstHoldOff
	}
	p.gate.era++
	p.since, p.reason = now, reason(err)
	return true
}

// recover asks until the bucket answers.
func (g *gate) recover(ctx context.Context) {
	for {
		g.mu.Lock()
		wait := time.Duration(float64(g.holdOff) * (0.8 + 0.4*rand.Float64()))
		g.holdOff = min(2*g.holdOff, maxHoldOff)
		g.mu.Unlock()
		if !pause(ctx, wait) {
			return
		}
		probing, cancel := context.WithTimeoutCause(ctx, headerLimit, errSlow)
		err := g.probe(probing)
		if err != nil {
			err = explain(probing, err)
		}
		cancel()
		if ctx.Err() != nil {
			return
		}
		if judge(err) <= good {
			g.close()
			return
		}
		g.mu.Lock()
		g.reason = reason(err)
		g.mu.Unlock()
	}
}

func (g *gate) close() {
	g.mu.Lock()
	now := time.Now()
	out := now.Sub(g.since)
	g.era++
	g.since, g.reason, g.failures, g.closed = time.Time{}, "", 0, now
	g.mu.Unlock()
	g.b.log.Info("the shared store is back", "for", g.name, "duration", out)
}

// pause waits, and reports whether ctx lasted so long.
func pause(ctx context.Context, d time.Duration) bool {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return true
	case <-ctx.Done():
		return false
	}
}

// jitter is around d, so that hosts that have failed together do not try again together.
func jitter(d time.Duration) time.Duration {
	return time.Duration(float64(d) * (0.5 + rand.Float64()))
}

// reason is an error in a few words.
func reason(err error) string {
	var wrapped interface{ Unwrap() error }
	if api := apiError(err); api != "" {
		return api
	}
	// The SDK's words in front of an error say which operation it was, and little else.
	for errors.As(err, &wrapped) && isSDK(wrapped) {
		err = wrapped.Unwrap()
	}
	text := err.Error()
	return text[:min(len(text), 300)]
}
