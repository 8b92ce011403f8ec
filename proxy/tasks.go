package proxy

import (
	"context"
	"errors"
	"sync"
)

var (
	errClosed   = errors.New("the mirror is shutting down")
	errPanicked = errors.New("the task panicked")
)

// tasks owns every goroutine of the mirror: fills and questions run on it, never on a client's
// stack. stop ends them and waits.
type tasks struct {
	ctx    context.Context // ends with the mirror, and with nothing else
	cancel context.CancelFunc
	onFail func(recovered any)

	mu     sync.Mutex // guards closed against a late Add
	closed bool
	wg     sync.WaitGroup
}

func newTasks(onFail func(recovered any)) *tasks {
	t := &tasks{onFail: onFail}
	t.ctx, t.cancel = context.WithCancel(context.Background())
	return t
}

// start runs f, or returns false once the mirror closes.
func (t *tasks) start(f func(context.Context)) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.closed {
		return false
	}
	t.wg.Add(1)
	go func() {
		defer t.wg.Done()
		defer func() {
			if recovered := recover(); recovered != nil {
				t.onFail(recovered)
			}
		}()
		f(t.ctx)
	}()
	return true
}

// stop refuses new tasks, lets those that run finish until ctx ends, then cancels and awaits them.
func (t *tasks) stop(ctx context.Context) {
	t.mu.Lock()
	t.closed = true
	t.mu.Unlock()
	finished := make(chan struct{})
	go func() {
		t.wg.Wait()
		close(finished)
	}()
	select {
	case <-finished:
	case <-ctx.Done():
	}
	t.cancel()
	<-finished
}
