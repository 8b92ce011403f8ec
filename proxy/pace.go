package proxy

import (
	"errors"
	"sync"
	"time"
)

// urgency is who needs a fill.
type urgency int

const (
	behind urgency = iota // nobody, so far as is known
	ahead                 // a client is likely to ask for it in a moment
	wanted                // a client waits for it
)

// yieldPause is how long a fill that nobody needs waits before each read while others are under way: it
// still brings enough not to count as slow.
const yieldPause = 250 * time.Millisecond

// errUnwanted ends a fill that no client waits for when the mirror closes.
var errUnwanted = errors.New("nobody waits for it, and the mirror is shutting down")

// pace is how urgently a fill goes on.
type pace struct {
	began urgency

	mu      sync.Mutex // guards what follows
	urgency urgency
	changed chan struct{} // closed and replaced when something changes
	cut     bool
}

func newPace(u urgency) *pace { return &pace{began: u, urgency: u, changed: make(chan struct{})} }

// raise makes it at least that urgent.
func (p *pace) raise(u urgency) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if u > p.urgency {
		p.urgency = u
		p.changedLocked()
	}
}

func (p *pace) changedLocked() {
	close(p.changed)
	p.changed = make(chan struct{})
}

// cutUnwanted ends the fill unless a client waits for it.
func (p *pace) cutUnwanted() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.urgency < wanted {
		p.cut = true
		p.changedLocked()
	}
}

// giveWay is called before each read. It holds back who is needed by nobody while others are busy.
func (p *pace) giveWay(busy func() bool) error {
	u, changed, cut := p.state()
	if !cut && u == behind && busy() {
		pause := time.NewTimer(yieldPause)
		defer pause.Stop()
		select {
		case <-pause.C:
		case <-changed:
		}
		_, _, cut = p.state()
	}
	if cut {
		return errUnwanted
	}
	return nil
}

func (p *pace) state() (u urgency, changed <-chan struct{}, cut bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.urgency, p.changed, p.cut && p.urgency < wanted
}

// busy reports whether a fill is under way that somebody needs.
func (fs *fills) busy() bool {
	fs.mu.Lock()
	defer fs.mu.Unlock()
	for _, f := range fs.open {
		if u, _, _ := f.pace.state(); u > behind {
			return true
		}
	}
	return false
}

// cutUnwanted ends the fills that no client waits for: those that do are given their time.
func (fs *fills) cutUnwanted() {
	fs.mu.Lock()
	defer fs.mu.Unlock()
	for _, f := range fs.open {
		f.pace.cutUnwanted()
	}
}
