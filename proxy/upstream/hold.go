package upstream

import (
	"math/rand/v2"
	"net/http"
	"strings"
	"sync"
	"time"
)

const (
	maxSuspects      = 1024
	suspectFailures  = 3 // at which a probe decides whether it is the upstream
	firstSuspectHold = 2 * time.Second
	maxSuspectHold   = 60 * time.Second

	defaultRetryAfter = 30 * time.Second
	minRetryAfter     = time.Second
	maxRetryAfter     = time.Hour
)

// suspects are references that have failed at an upstream and not succeeded since. Each is held off,
// longer each time, so that one broken image costs little and closes nothing. Its breaker guards it.
type suspects map[string]*suspect

type suspect struct {
	failures int
	since    time.Time // of the first failure
	until    time.Time // nobody may ask before
	trial    time.Time // after that one may; its verdict should come by then
	reason   string
}

// refuse is nil if the reference may be asked for.
func (s suspects) refuse(reference string, now time.Time) *Open {
	x := s[reference]
	switch {
	case x == nil:
		return nil
	case now.Before(x.until):
		return &Open{State: stateHeld, Reason: x.reason, Since: x.since, Until: x.until}
	case now.Before(x.trial):
		return &Open{State: stateHeld, Reason: x.reason, Since: x.since, Until: now.Add(time.Second)}
	}
	return nil
}

// try notes that a suspect is being asked for until ends, which it returns; zero if it is none.
func (s suspects) try(reference string, ends time.Time) time.Time {
	x := s[reference]
	if x == nil {
		return time.Time{}
	}
	x.trial = ends
	return ends
}

// settle ends a try, whatever came of it; a success clears the suspect.
func (s suspects) settle(reference string, trial time.Time, v verdict) {
	x := s[reference]
	switch {
	case x == nil:
	case v == success:
		delete(s, reference)
	case x.trial.Equal(trial):
		x.trial = time.Time{}
	}
}

// fail holds a reference off, counted from then, and returns how often it has failed. Failures of
// requests that were under way when the hold began are part of the same one.
func (s suspects) fail(reference, reason string, from time.Time) int {
	x := s[reference]
	if x != nil && from.Before(x.until) {
		return 0
	}
	if x == nil || from.Sub(x.until) > window {
		s.makeRoom()
		x = &suspect{since: from}
		s[reference] = x
	}
	x.until = from.Add(min(firstSuspectHold<<min(x.failures, 10), maxSuspectHold))
	x.reason = reason
	x.failures++
	return x.failures
}

// makeRoom drops the suspect that will be let go first.
func (s suspects) makeRoom() {
	if len(s) < maxSuspects {
		return
	}
	var first string
	for reference, x := range s {
		if first == "" || x.until.Before(s[first].until) {
			first = reference
		}
	}
	delete(s, first)
}

// spread tells whether failures are of one reference or of several.
type spread struct {
	reference string    // that failed last
	at        time.Time // when it did
	other     time.Time // when one last failed that is not reference
	host      time.Time // when something last failed that no reference is to blame for
}

func (s *spread) add(reference string, v verdict, now time.Time) {
	if v != failure {
		s.host = now
		return
	}
	if s.reference != reference {
		s.reference, s.other = reference, s.at
	}
	s.at = now
}

func (s *spread) several(after time.Time) bool {
	return s.other.After(after) || s.host.After(after)
}

// hold is the pause that a host has asked of a credential by answering 429. The zero value holds
// nothing.
type hold struct {
	mu    sync.Mutex
	until time.Time
}

// left is how long nothing may be asked yet, 0 if it may.
func (h *hold) left(now time.Time) time.Duration {
	h.mu.Lock()
	defer h.mu.Unlock()
	return max(h.until.Sub(now), 0)
}

// extend holds off as an answer's header asks, never shorter than an earlier one did, and returns
// how long that is.
func (h *hold) extend(header http.Header, now time.Time) time.Duration {
	until := now.Add(retryAfter(header, now, rand.Float64))
	h.mu.Lock()
	defer h.mu.Unlock()
	if until.After(h.until) {
		h.until = until
	}
	return h.until.Sub(now)
}

// retryAfter reads Retry-After (RFC 9110, section 10.2.3): seconds or a date, within sane bounds.
// Without a legible one it is half a minute, spread out so that a fleet does not return as one.
func retryAfter(h http.Header, now time.Time, random func() float64) time.Duration {
	value := strings.TrimSpace(h.Get("Retry-After"))
	wait := time.Duration(float64(defaultRetryAfter) * (0.8 + 0.4*random()))
	if value != "" && strings.Trim(value, "0123456789") == "" {
		wait = maxRetryAfter
		if seconds, err := time.ParseDuration(value + "s"); err == nil { // fails on what overflows
			wait = seconds
		}
	} else if date, err := http.ParseTime(value); err == nil {
		wait = date.Sub(now)
	}
	return min(max(wait, minRetryAfter), maxRetryAfter)
}
