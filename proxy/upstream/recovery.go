package upstream

import (
	"context"
	"sync"
	"time"
)

// A host that has just come back is not met by all who have waited for it (FAULTS F37): what was out
// because of load would be out again.
const (
	recoveryTime     = 10 * time.Second
	recoveryRequests = 16 // at once, in that time
)

// recovery bounds the requests under way to a host for a while after one of its breakers has closed.
type recovery struct {
	slots chan struct{}

	mu    sync.Mutex
	until time.Time
}

func newRecovery() *recovery { return &recovery{slots: make(chan struct{}, recoveryRequests)} }

// begin bounds requests from now on.
func (r *recovery) begin() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.until = time.Now().Add(recoveryTime)
}

// enter waits until one more request may go out, and returns what to call when it is over. Its error
// is ctx's.
func (r *recovery) enter(ctx context.Context) (leave func(), err error) {
	r.mu.Lock()
	left := time.Until(r.until)
	r.mu.Unlock()
	if left <= 0 {
		return func() {}, nil
	}
	over := time.NewTimer(left)
	defer over.Stop()
	select {
	case r.slots <- struct{}{}:
		return sync.OnceFunc(func() { <-r.slots }), nil
	case <-over.C:
		return func() {}, nil
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}
