package upstream

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"time"

	"github.com/sony/gobreaker/v2"
)

const (
	// window is what failures are counted over. gobreaker credits a result to the bucket in which its
	// request began, so it must be much longer than any verdict takes.
	window       = 120 * time.Second
	bucket       = 5 * time.Second
	ratioMinimum = 10 // results in the window before half of them failing means anything

	firstHoldOff = 10 * time.Second // doubled each time that the upstream is still out
	maxHoldOff   = 60 * time.Second
	probeTimeout = 5 * time.Second
)

// class is what kind of request a breaker watches: a registry's token service, its manifests and
// its blobs come from different machines and fail by themselves.
type class int

const (
	classToken class = iota
	classManifest
	classBlob
)

func (c class) String() string { return [...]string{"token", "manifest", "blob"}[c] }

// consecutive is how many failures in a row trip.
func (c class) consecutive() uint32 {
	if c == classBlob {
		return 5
	}
	return 3
}

// longest is how long a verdict may take. Whoever has not settled by then never will.
func (c class) longest() time.Duration {
	if c == classBlob {
		return 45 * time.Second // header, then 30 s of body
	}
	return 15 * time.Second
}

// verdict is what the outcome of a request says about the upstream.
type verdict int

const (
	success     verdict = iota
	failure             // may be the fault of what was asked for: a broken image
	hostFailure         // DNS, dial, TLS: cannot be
	excluded            // says nothing
	probeFailed         // the upstream cannot give what it is known to have; the watcher's own verdict
)

// errNoProbe is a probe's answer when nothing is known that the upstream should have, or when what
// came back says nothing about it. The next user's request is the probe then.
var errNoProbe = errors.New("no known content to probe with")

// The names of a breaker's states.
const (
	stateClosed   = "closed"
	stateOpen     = "open"
	stateHalfOpen = "half-open"
	stateHeld     = "held" // in an Open only: the breaker is closed, this one reference is held off
)

// State is how a breaker stands.
type State struct {
	Name   string    // closed, open or half-open
	Since  time.Time // closed since; otherwise out since, however often it was tried meanwhile
	Until  time.Time // when it is tried again, or the trial in flight should be over; zero if closed
	Reason string    // of the latest failure; "" if closed
}

// Open is the error of a request that was refused without asking the upstream.
type Open struct {
	State  string // open, half-open, or held: only this reference, the rest of the upstream is well
	Reason string
	Since  time.Time
	Until  time.Time // there is no use in asking again before
}

// Error says what is out, since when and why.
func (o *Open) Error() string {
	what := "upstream is out"
	if o.State == stateHeld {
		what = "upstream keeps failing for this reference"
	}
	return fmt.Sprintf("%s since %s: %s", what, o.Since.UTC().Format(time.RFC3339), o.Reason)
}

// breakerConfig is what a breaker is made of.
type breakerConfig struct {
	class    class
	probe    func(ctx context.Context) error // asks for content known to be there, on the path users take; see errNoProbe
	logger   *slog.Logger                    // nil discards
	onChange func(State)                     // after each change of state, outside all locks; nil for none
	rand     func() float64                  // in [0,1); nil is rand.Float64
}

// breaker decides whether requests of one class may go to one upstream (DESIGN 8). gobreaker counts,
// and lets one trial through when half-open. In front of it stand the hold-off, which grows and has
// jitter, and the suspects: references that fail while the upstream may well be healthy. Behind it a
// watcher probes a sick upstream, so that no user has to.
type breaker struct {
	cfg      breakerConfig
	cancel   context.CancelFunc
	done     chan struct{} // closed when the watcher has ended
	due      *time.Timer   // wakes the watcher
	evidence atomic.Int32  // for readyToTrip, which runs under gobreaker's lock

	mu         sync.Mutex // guards what follows and all calls of counts
	counts     *gobreaker.TwoStepCircuitBreaker[struct{}]
	current    State
	generation int   // what was let through under another one has no say any more
	opened     int   // times in a row, with less than window closed in between
	trial      trial // the request that decides in half-open
	suspects   suspects
	run        spread // failures since the last success
	recent     spread // failures since the last change of state
}

// trial can be taken back; gobreaker would wait for its verdict forever.
type trial struct {
	done func(error)
	ends time.Time
}

// admission is what is remembered of a request that was let through.
type admission struct {
	reference  string
	generation int
	done       func(error)
	trial      time.Time // of its suspect reference
}

// What gobreaker is told; it wants errors.
var (
	errFailed   = errors.New("failed")
	errExcluded = errors.New("excluded")
)

// newBreaker returns a closed breaker. Its watcher runs until close.
func newBreaker(cfg breakerConfig) *breaker {
	if cfg.logger == nil {
		cfg.logger = slog.New(slog.DiscardHandler)
	}
	if cfg.onChange == nil {
		cfg.onChange = func(State) {}
	}
	if cfg.rand == nil {
		cfg.rand = rand.Float64
	}
	ctx, cancel := context.WithCancel(context.Background())
	b := &breaker{
		cfg:      cfg,
		cancel:   cancel,
		done:     make(chan struct{}),
		due:      time.NewTimer(maxHoldOff),
		current:  State{Name: stateClosed, Since: time.Now()},
		suspects: suspects{},
	}
	b.due.Stop() // nothing is due yet
	b.counts = gobreaker.NewTwoStepCircuitBreaker[struct{}](gobreaker.Settings{
		Interval:     window,
		BucketPeriod: bucket,
		Timeout:      time.Nanosecond, // the hold-off is ours
		ReadyToTrip:  b.readyToTrip,
		IsExcluded:   func(err error) bool { return errors.Is(err, errExcluded) },
	})
	go b.watch(ctx)
	return b
}

// close ends the watcher and waits for it. Requests are still judged, but nothing is probed.
func (b *breaker) close() {
	b.cancel()
	<-b.done
}

// state returns how the breaker stands now.
func (b *breaker) state() State {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.current
}

// allow asks whether a request for reference may go out. If so the caller calls settle once it knows
// what the outcome says, from any goroutine; only the first call counts, and none at all counts as
// excluded. If not, err is an *Open.
func (b *breaker) allow(reference string) (settle func(v verdict, reason string), err error) {
	defer b.unlock(b.lock())
	now := time.Now()
	if open := b.suspects.refuse(reference, now); open != nil && b.current.Name != stateOpen {
		return nil, open
	}
	return b.admit(reference, now)
}

// retry is allow for a second try of the same request, which the hold-off that the first one has
// put on its reference does not concern.
func (b *breaker) retry(reference string) (settle func(v verdict, reason string), err error) {
	defer b.unlock(b.lock())
	return b.admit(reference, time.Now())
}

// fail counts a failure that no request of its own stands for: a body that stalls after its verdict,
// a host that requests of another class could not reach.
func (b *breaker) fail(reference string, v verdict, reason string) {
	if settle, err := b.retry(reference); err == nil {
		settle(v, reason)
	}
}

// admit lets a request through if the state allows one. The lock is held.
func (b *breaker) admit(reference string, now time.Time) (func(verdict, string), error) {
	if b.trial.done != nil && now.After(b.trial.ends) {
		b.trial.done(errExcluded)
		b.trial = trial{}
		b.generation++ // it is too late for a verdict
	}
	if b.current.Name == stateOpen {
		return nil, &Open{State: stateOpen, Reason: b.current.Reason, Since: b.current.Since, Until: b.current.Until}
	}
	done, err := b.counts.Allow()
	if err != nil { // half-open, and the trial is taken
		return nil, &Open{State: stateHalfOpen, Reason: b.current.Reason, Since: b.current.Since, Until: b.current.Until}
	}
	ends := now.Add(b.cfg.class.longest())
	if b.current.Name == stateHalfOpen {
		b.trial = trial{done, ends}
		b.current.Until = now.Add(probeTimeout)
	}
	a := admission{reference, b.generation, done, b.suspects.try(reference, ends)}
	var once sync.Once
	return func(v verdict, reason string) { once.Do(func() { b.settle(a, v, reason) }) }, nil
}

func (b *breaker) settle(a admission, v verdict, reason string) {
	defer b.unlock(b.lock())
	now := time.Now()
	b.suspects.settle(a.reference, a.trial, v)
	if a.generation != b.generation {
		return
	}
	switch v {
	case success:
		b.run = spread{}
		a.done(nil)
		if b.current.Name != stateClosed {
			b.change(State{Name: stateClosed, Since: now})
		}
	case excluded:
		a.done(errExcluded)
		b.trial = trial{}
	default:
		b.failed(a, v, reason, now)
	}
}

// failed counts a failure and trips if that is enough. The lock is held.
func (b *breaker) failed(a admission, v verdict, reason string, now time.Time) {
	b.run.add(a.reference, v, now)
	b.recent.add(a.reference, v, now)
	b.evidence.Store(b.weigh(v, now))
	a.done(errFailed)
	from := now
	if b.counts.State() != gobreaker.StateClosed {
		b.trip(reason, now)
		from = b.current.Until // so that the next trial, if users must make it, is of another reference
	}
	if v == failure && b.suspects.fail(a.reference, reason, from) >= suspectFailures {
		b.due.Reset(0) // is it the reference or the upstream?
	}
}

// What the failures that gobreaker has counted prove, each more than the one before.
const (
	oneReference    = int32(iota) // may be one broken image
	severalInWindow               // of several references
	severalInRow                  // without a success in between
	certain                       // a probe has failed
)

func (b *breaker) weigh(v verdict, now time.Time) int32 {
	switch after := now.Add(-window); {
	case v == probeFailed:
		return certain
	case b.run.several(after):
		return severalInRow
	case b.recent.several(after):
		return severalInWindow
	}
	return oneReference
}

func (b *breaker) readyToTrip(c gobreaker.Counts) bool {
	evidence := b.evidence.Load()
	results := c.TotalSuccesses + c.TotalFailures // not Requests: some of them are still on their way
	inRow := c.ConsecutiveFailures >= b.cfg.class.consecutive()
	half := results >= ratioMinimum && 2*c.TotalFailures >= results
	return evidence == certain || evidence >= severalInRow && inRow || evidence >= severalInWindow && half
}

// trip opens the breaker, from closed or after a trial, for longer than the last time. The lock is
// held.
func (b *breaker) trip(reason string, now time.Time) {
	since := b.current.Since
	if b.current.Name == stateClosed {
		if now.Sub(since) >= window {
			b.opened = 0
		}
		since = now
	}
	holdOff := min(firstHoldOff<<b.opened, maxHoldOff)
	holdOff = time.Duration(float64(holdOff) * (0.8 + 0.4*b.cfg.rand()))
	b.opened = min(b.opened+1, 3)
	b.change(State{Name: stateOpen, Since: since, Until: now.Add(holdOff), Reason: reason})
	b.due.Reset(holdOff)
}

// change opens or closes. What is in flight has no say in the new state, and who was suspect is not
// any more: it was the upstream. The lock is held.
func (b *breaker) change(to State) {
	b.current = to
	b.generation++
	b.trial = trial{}
	b.due.Stop()
	clear(b.suspects)
	b.run, b.recent = spread{}, spread{}
}

// watch probes whenever that is due: when a hold-off is over, or a reference keeps failing.
func (b *breaker) watch(ctx context.Context) {
	defer close(b.done)
	defer b.due.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-b.due.C:
			if settle, err := b.begin(); err == nil {
				settle(b.examine(ctx))
			}
			if b.state().Name == stateHalfOpen { // it could not be tried: it may ask us to wait, or refuse us
				b.due.Reset(maxHoldOff)
			}
		}
	}
}

// begin is allow for the watcher, and the one way from open to half-open.
func (b *breaker) begin() (settle func(v verdict, reason string), err error) {
	defer b.unlock(b.lock())
	now := time.Now()
	// It may have tripped since the timer fired: then that is not due any more.
	if b.current.Name == stateOpen && !now.Before(b.current.Until) {
		b.current.Name = stateHalfOpen
	}
	return b.admit("", now)
}

func (b *breaker) examine(ctx context.Context) (verdict, string) {
	probing, cancel := context.WithTimeout(ctx, probeTimeout)
	defer cancel()
	err := b.cfg.probe(probing)
	switch {
	case err == nil:
		return success, ""
	case errors.Is(err, errNoProbe) || ctx.Err() != nil:
		return excluded, ""
	}
	if e := new(Error); errors.As(err, &e) {
		return probeFailed, e.Reason
	}
	return probeFailed, err.Error()
}

func (b *breaker) lock() State {
	b.mu.Lock()
	return b.current
}

// unlock tells of a change since lock, once the lock is free: loggers do I/O.
func (b *breaker) unlock(before State) {
	after := b.current
	b.mu.Unlock()
	if after.Name == before.Name {
		return
	}
	switch {
	case after.Name == stateClosed:
		b.cfg.logger.Info("breaker closed", "out", after.Since.Sub(before.Since))
	case before.Name == stateClosed:
		b.cfg.logger.Warn("breaker opened", "reason", after.Reason, "until", after.Until)
	default:
		b.cfg.logger.Debug("breaker "+after.Name, "reason", after.Reason)
	}
	b.cfg.onChange(after)
}
