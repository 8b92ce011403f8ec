package proxy

import (
	"context"
	"errors"
	"net/http/httptrace"
	"sync"
	"time"
)

const (
	// headerBudget is how long any client waits for its header, whatever upstreams do.
	headerBudget = 10 * time.Second
	// patienceInAll is how long a stored answer is held back while upstream makes progress.
	patienceInAll = 4 * time.Second
)

// errImpatient is what a waiter gets who has something better to do than to wait on.
var errImpatient = errors.New("upstream did not answer in time")

// questions are what upstreams are being asked at the moment, each once for all who want to know.
type questions[T any] struct {
	mu   sync.Mutex // guards open
	open map[string]*question[T]
}

// question is asked on a goroutine of its own and goes on when those who wait for it leave.
type question[T any] struct {
	started  time.Time
	progress progress
	done     chan struct{}
	answer   T
	err      error
}

// join returns the open question of that key, or begins it with ask on tasks.
func (qs *questions[T]) join(tasks *tasks, key string, ask func(context.Context) (T, error)) *question[T] {
	qs.mu.Lock()
	defer qs.mu.Unlock()
	if q := qs.open[key]; q != nil {
		return q
	}
	q := &question[T]{started: time.Now(), done: make(chan struct{}), err: errPanicked}
	q.progress.note()
	begun := tasks.start(func(ctx context.Context) {
		defer func() { // also when ask panics: nobody may wait for ever
			qs.mu.Lock()
			if qs.open[key] == q {
				delete(qs.open, key)
			}
			qs.mu.Unlock()
			close(q.done)
		}()
		ctx, cancel := context.WithTimeout(ctx, headerBudget)
		defer cancel()
		ctx = context.WithValue(ctx, patienceKey{}, &q.progress)
		q.answer, q.err = ask(httptrace.WithClientTrace(ctx, q.progress.trace()))
	})
	if !begun {
		q.err = errClosed
		close(q.done)
		return q
	}
	if qs.open == nil {
		qs.open = map[string]*question[T]{}
	}
	qs.open[key] = q
	return q
}

// part lets those who wait have their answers, and nobody else: who comes from now on asks anew.
func (qs *questions[T]) part() {
	qs.mu.Lock()
	defer qs.mu.Unlock()
	clear(qs.open)
}

type patienceKey struct{}

// holdPatience has nobody lose patience with the question that is asked with ctx for so long, or until release is
// called: upstreams are not asked yet, and are not to blame.
func holdPatience(ctx context.Context, long time.Duration) (release func()) {
	p, ok := ctx.Value(patienceKey{}).(*progress)
	if !ok {
		return func() {}
	}
	p.at.Store(time.Now().Add(long).UnixNano())
	return p.note
}

// wait returns the answer, within headerBudget. With patience it gives up sooner, with errImpatient,
// once upstream has not completed a phase for that long, or after patienceInAll.
func (q *question[T]) wait(ctx context.Context, patience time.Duration) (T, error) {
	var none T
	ctx, cancel := context.WithTimeout(ctx, headerBudget)
	defer cancel()
	var impatient <-chan time.Time
	if patience > 0 {
		timer := time.NewTimer(q.left(patience))
		defer timer.Stop()
		impatient = timer.C
	}
	for {
		select {
		case <-q.done:
			return q.answer, q.err
		case <-ctx.Done():
			return none, context.Cause(ctx)
		case <-impatient:
			left := q.left(patience)
			if left <= 0 {
				return none, errImpatient
			}
			impatient = time.After(left)
		}
	}
}

// left is how much longer there is patience.
func (q *question[T]) left(patience time.Duration) time.Duration {
	return min(patience-q.progress.idle(), max(patienceInAll, patience)-time.Since(q.started))
}
