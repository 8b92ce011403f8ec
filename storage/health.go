package storage

import (
	"errors"
	"maps"
	"sync"
	"syscall"
	"time"
)

const (
	// maxReading is how many may wait for the disk to open or read something small: each holds a thread, of
	// which the runtime allows 10 000.
	maxReading = 512
	// readPatience is how long the rest waits for its turn.
	readPatience = 10 * time.Second
	// troubleFor is how long after a failure any write that succeeds ends the trouble; before, only one
	// that would have been as hard: small files find room where a large one did not.
	troubleFor = 5 * time.Second
)

// ErrBusy is the error of a look-up for which the disk had no time.
var ErrBusy = errors.New("the disk does not keep up")

// Trouble is that the store cannot write.
type Trouble struct {
	Since time.Time
	Err   error // of the last write that failed
}

// Reason is the error in a few words.
func (t *Trouble) Reason() string {
	if errno := syscall.Errno(0); errors.As(t.Err, &errno) {
		return errno.Error()
	}
	return t.Err.Error()
}

// health is how the disk does. Nothing probes it: whoever has something to write tries.
type health struct {
	mu      sync.Mutex // guards what follows
	trouble *Trouble   // nil while writing succeeds
	lastly  time.Time  // when a write has failed last
	wanted  int64      // bytes that there was no room for then; 0 if that was not the trouble
	errors  map[string]int64
}

// Trouble is nil as long as the store can write: since when it cannot, and why. It ends with a write
// that succeeds.
func (d *Disk) Trouble() *Trouble {
	d.health.mu.Lock()
	defer d.health.mu.Unlock()
	return d.health.trouble
}

// Errors is how many operations have failed since the start: create, reserve, write, commit, record, read.
func (d *Disk) Errors() map[string]int64 {
	d.health.mu.Lock()
	defer d.health.mu.Unlock()
	return maps.Clone(d.health.errors)
}

// wrote notes how a write of size bytes has ended, and returns err.
func (d *Disk) wrote(operation string, size int64, err error) error {
	if errors.Is(err, ErrTooLarge) {
		return err // not the disk's
	}
	h := &d.health
	h.mu.Lock()
	defer h.mu.Unlock()
	now := time.Now()
	switch {
	case err != nil:
		h.countLocked(operation)
		h.lastly, h.wanted = now, 0
		if errors.Is(err, syscall.ENOSPC) {
			h.wanted = size
		}
		since := now
		if h.trouble != nil {
			since = h.trouble.Since
		} else {
			d.log.Error("store cannot write: what it holds is served, the rest is passed through", "operation", operation, "err", err)
		}
		h.trouble = &Trouble{since, err}
	case h.trouble != nil && (h.wanted > 0 && size >= h.wanted || now.Sub(h.lastly) >= troubleFor):
		d.log.Info("store can write again", "duration", now.Sub(h.trouble.Since).Seconds())
		h.trouble = nil
	}
	return err
}

// misread counts a read that has failed, and returns err.
func (d *Disk) misread(err error) error {
	d.health.mu.Lock()
	defer d.health.mu.Unlock()
	d.health.countLocked("read")
	return err
}

func (h *health) countLocked(operation string) {
	if h.errors == nil {
		h.errors = map[string]int64{}
	}
	h.errors[operation]++
}

// enter waits for leave to hold a thread in the disk, or returns ErrBusy. Whoever has it leaves.
func (d *Disk) enter() error {
	select {
	case d.reading <- struct{}{}:
		return nil
	default:
	}
	late := time.NewTimer(readPatience)
	defer late.Stop()
	select {
	case d.reading <- struct{}{}:
		return nil
	case <-late.C:
		return ErrBusy
	}
}

func (d *Disk) leave() { <-d.reading }

// inTurn calls f, which reads something small, or returns ErrBusy.
func (d *Disk) inTurn(f func() error) error {
	if err := d.enter(); err != nil {
		return err
	}
	defer d.leave()
	return f()
}
