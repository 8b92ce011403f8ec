package upstream

import "sync/atomic"

// budget bounds the second tries of an upstream to a fifth of what is under way there, so that one that
// fails under load is not asked even more for it. One is always left.
type budget struct{ active, again atomic.Int64 }

// Retry asks for leave to try a second time. The caller calls done when that is over.
func (c *Client) Retry() (done func(), ok bool) {
	b := &c.budget
	if b.again.Add(1) > max(1, b.active.Load()/5) {
		b.again.Add(-1)
		return nil, false
	}
	return func() { b.again.Add(-1) }, true
}
