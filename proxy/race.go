package proxy

import (
	"context"
	"crypto/tls"
	"errors"
	"math/rand/v2"
	"net/http/httptrace"
	"sync"
	"sync/atomic"
	"time"

	"breakwater/proxy/upstream"
)

const (
	// idleBeforeNext is how long an upstream may complete no phase before the next one is asked too.
	idleBeforeNext = time.Second
	// waitBeforeNext, or less where there are many, is how long it may take in all: whoever is healthy
	// must have been asked with time to spare before headerBudget.
	waitBeforeNext = 2 * time.Second
	waitForAll     = 8 * time.Second
	// A second try comes only after failures that came soon: there is no time for two time-outs. The pause
	// before it, of between half of retryPause and all of it, is not the same for all who were cut off.
	retryWithin = 2 * time.Second
	retryPause  = 100 * time.Millisecond
)

// progress is when something last went on.
type progress struct{ at atomic.Int64 } // Unix nanoseconds

func (p *progress) note() { p.at.Store(time.Now().UnixNano()) }

// idle is how long nothing has gone on.
func (p *progress) idle() time.Duration { return time.Since(time.Unix(0, p.at.Load())) }

// trace notes each phase that a request completes, for token and content alike.
func (p *progress) trace() *httptrace.ClientTrace {
	noteIf := func(err error) {
		if err == nil {
			p.note()
		}
	}
	return &httptrace.ClientTrace{
		DNSDone:              func(i httptrace.DNSDoneInfo) { noteIf(i.Err) },
		ConnectDone:          func(_, _ string, err error) { noteIf(err) },
		TLSHandshakeDone:     func(_ tls.ConnectionState, err error) { noteIf(err) },
		GotConn:              func(httptrace.GotConnInfo) { p.note() },
		GotFirstResponseByte: p.note,
	}
}

// race is one thing being asked of several upstreams, in order, each before the one in front of it has
// failed: four black holes must not hide a healthy fifth (DESIGN 8). The first good answer wins; those
// still asked are left running, so that their breakers learn how they do. If all have failed, one is asked
// a second time, unless the question is a second try itself or there are too many of them.
type race[T any] struct {
	tasks   *tasks
	clients []*upstream.Client // nil for one that is no upstream
	// ask asks one of them. Its context does not end with the race.
	ask  func(ctx context.Context, i int) (T, error)
	drop func(T) // of what comes too late; nil if nothing has to be done

	ended []chan struct{} // each closed when that one is done

	mu      sync.Mutex // guards what follows
	decided bool
	errs    []error // nil while it is asked
	results chan finish[T]
}

// finish is how one upstream's part of a race ends.
type finish[T any] struct {
	i      int
	answer T
	err    error
}

// run returns the answer and who gave it. If nobody does, the error is worst's.
func (r *race[T]) run(ctx context.Context) (T, int, error) {
	n, once, start := len(r.clients), upstream.IsAgain(ctx), time.Now()
	r.errs, r.results, r.ended = make([]error, n), make(chan finish[T], n+1), make([]chan struct{}, n)
	for i := range r.ended {
		r.ended[i] = make(chan struct{})
	}
	limit := waitBeforeNext
	if n > 1 {
		limit = min(limit, waitForAll/time.Duration(n-1))
	}
	var latest *progress // of the one asked last, while it has not ended
	var began time.Time
	next := time.NewTimer(0)
	defer next.Stop()
	for started, ended := 0, 0; ; {
		select {
		case <-next.C:
			if latest != nil {
				if left := min(idleBeforeNext-latest.idle(), limit-time.Since(began)); left > 0 {
					next.Reset(left)
					continue
				}
			}
			latest, began = r.start(ctx, started), time.Now()
			if started++; started < n {
				next.Reset(min(idleBeforeNext, limit))
			}
		case f := <-r.results:
			if f.err == nil {
				return f.answer, f.i, nil
			}
			if ended++; ended == n && !once && time.Since(start) < retryWithin {
				once = true
				if r.retry(ctx) {
					ended--
				}
			}
			if ended == n {
				return f.answer, f.i, worst(r.errs)
			}
			if f.i == started-1 && started < n {
				latest = nil
				next.Reset(0)
			}
		case <-ctx.Done():
			r.mu.Lock()
			r.decided = true
			r.mu.Unlock()
			var none T
			return none, 0, context.Cause(ctx)
		}
	}
}

func (r *race[T]) start(ctx context.Context, i int) *progress {
	p := new(progress)
	p.note()
	r.begin(i, func(life context.Context) (T, error) {
		return r.ask(httptrace.WithClientTrace(detached{life, ctx}, p.trace()), i)
	})
	return p
}

// retry asks the first of those whose answer may be another one next time; false if there is none, or
// no leave to.
func (r *race[T]) retry(ctx context.Context) bool {
	for i, err := range r.errs {
		up := new(upstream.Error)
		if !errors.As(err, &up) || !up.Fleeting() || r.clients[i] == nil {
			continue
		}
		done, ok := r.clients[i].Retry()
		if !ok {
			continue
		}
		r.begin(i, func(life context.Context) (T, error) {
			defer done()
			select {
			case <-time.After(retryPause/2 + rand.N(retryPause/2)):
			case <-life.Done():
			}
			return r.ask(upstream.Again(detached{life, ctx}), i)
		})
		return true
	}
	return false
}

func (r *race[T]) begin(i int, ask func(life context.Context) (T, error)) {
	begun := r.tasks.start(func(life context.Context) {
		f := finish[T]{i: i, err: errPanicked}
		defer func() { r.end(f) }() // also when ask panics: nobody may wait for ever
		f.answer, f.err = ask(life)
	})
	if !begun {
		r.end(finish[T]{i: i, err: errClosed})
	}
}

func (r *race[T]) end(f finish[T]) {
	r.mu.Lock()
	late := r.decided
	r.decided = r.decided || f.err == nil
	if again := new(upstream.Error); r.errs[f.i] == nil || f.err == nil || errors.As(f.err, &again) && again.State != "open" {
		r.errs[f.i] = f.err // a breaker that has opened meanwhile did so for what was said first
	}
	select {
	case <-r.ended[f.i]: // a second try
	default:
		close(r.ended[f.i])
	}
	r.mu.Unlock()
	switch {
	case !late:
		r.results <- f // there is room for all
	case f.err == nil && r.drop != nil:
		r.drop(f.answer)
	}
}

// refusedBefore waits for all that come before i, and reports whether they have answered that they do
// not have it, or not for us: none of them is out.
func (r *race[T]) refusedBefore(ctx context.Context, i int) bool {
	for before := range i {
		select {
		case <-r.ended[before]:
		case <-ctx.Done():
			return false
		}
		r.mu.Lock()
		err := r.errs[before]
		r.mu.Unlock()
		up := new(upstream.Error)
		if !errors.As(err, &up) || up.Outage() {
			return false
		}
	}
	return true
}

// worst is what several upstreams' errors come to (DESIGN 2, "Several answers"): any failure or 429
// makes it an outage, else any refusal a refusal, else it is not found. What the shared store says comes
// to nothing: it only saves asking.
func worst(errs []error) error {
	rank := func(err error) int {
		up := new(upstream.Error)
		switch {
		case errors.As(err, new(*sharedError)):
			return -1
		case !errors.As(err, &up) || up.Outage():
			return 2
		case up.Kind == upstream.Denied:
			return 1
		}
		return 0
	}
	worst := errs[0]
	for _, err := range errs[1:] {
		if rank(err) > rank(worst) {
			worst = err
		}
	}
	return worst
}

// detached has one context's life and another's values.
type detached struct {
	context.Context
	values context.Context
}

func (d detached) Value(key any) any { return d.values.Value(key) }
