package upstream

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

// model is the breaker as DESIGN 8 words it: it keeps what has happened, and counts anew each time.
// Times are from the beginning of the sequence. References are a and b; 0 is none.
type model struct {
	now          time.Duration
	state        string
	since, until time.Duration
	openings     int // in a row
	trialEnds    time.Duration
	again        time.Duration // in half-open: the next probe; 0 for none
	history      []result      // since the state last changed
	changes      int
	held         [2]heldOff
	flying       *flight
	probes       int
}

type result struct {
	began, at time.Duration
	reference byte
	verdict   verdict
}

// heldOff is a reference that fails. Its zero value does not.
type heldOff struct {
	failures     int
	until, trial time.Duration
}

// flight is a request under way.
type flight struct {
	reference byte
	began     time.Duration
	changes   int           // that it has seen
	trial     time.Duration // end of its reference's
	deciding  bool          // in half-open
}

// step is an event, and what every probe answers meanwhile. An event is a reference and what comes of
// asking for it, as in TestBreakerTrips; "a(" is asked and not settled yet, ")+" and ")-" settle it.
// "!" is a host failure, "." waits until something is due, ":" for a window.
type step struct {
	event string
	probe verdict // success, probeFailed, or excluded: nothing to probe with
}

func (s step) String() string {
	return s.event + map[verdict]string{success: "", probeFailed: "[sick]", excluded: "[nothing known]"}[s.probe]
}

// refusal is the state and time with which reference would be refused; "" if it would not.
func (m *model) refusal(reference byte) (state string, until time.Duration) {
	if m.state == stateOpen {
		return stateOpen, m.until
	}
	if reference != 0 {
		switch h := m.held[reference-'a']; {
		case m.now < h.until:
			return stateHeld, h.until
		case m.now < h.trial:
			return stateHeld, m.now + time.Second
		}
	}
	if m.state == stateHalfOpen && m.now <= m.trialEnds {
		return stateHalfOpen, m.until
	}
	return "", 0
}

// begin is a request that is not refused.
func (m *model) begin(reference byte) flight {
	f := flight{reference: reference, began: m.now, changes: m.changes}
	if reference != 0 && m.held[reference-'a'].failures > 0 {
		f.trial = m.now + 15*time.Second
		m.held[reference-'a'].trial = f.trial
	}
	if m.state == stateHalfOpen {
		m.changes++ // whatever else tried has had its time
		f.changes, f.deciding = m.changes, true
		m.trialEnds, m.until = m.now+15*time.Second, m.now+5*time.Second
	}
	return f
}

func (m *model) end(f flight, v verdict, probe verdict) {
	if f.reference != 0 {
		switch h := &m.held[f.reference-'a']; {
		case v == success:
			*h = heldOff{}
		case h.trial == f.trial:
			h.trial = 0
		}
	}
	if f.changes != m.changes {
		return
	}
	if f.deciding {
		m.trialEnds = -1
	}
	if v == excluded {
		return
	}
	m.history = append(slices.Clip(m.history), result{f.began, m.now, f.reference, v})
	from := m.now
	switch {
	case v == success && m.state != stateClosed:
		m.change(stateClosed)
		m.since, m.until = m.now, 0
	case v != success && (m.state == stateHalfOpen || m.trips()):
		if m.state == stateClosed {
			if m.now-m.since >= 120*time.Second {
				m.openings = 0
			}
			m.since = m.now
		}
		m.until = m.now + []time.Duration{10, 20, 40, 60}[min(m.openings, 3)]*time.Second
		m.openings++
		m.change(stateOpen)
		from = m.until
	}
	if v == failure && m.fails(f.reference, from) >= 3 {
		m.probe(probe)
	}
}

func (m *model) change(state string) {
	m.state, m.history, m.held, m.trialEnds, m.again = state, nil, [2]heldOff{}, -1, 0
	m.changes++
}

// trips reports whether what has happened since the state last changed is enough.
func (m *model) trips() bool {
	var all, failed, row int
	var anywhere, inRow string // the references that failed; ! is no reference's fault
	for _, r := range m.history {
		counts := r.began > m.now-120*time.Second
		if r.verdict == success {
			if inRow = ""; counts { // one that took longer than the window is a success of nothing
				all, row = all+1, 0
			}
			continue
		}
		if r.verdict == probeFailed {
			return true
		}
		if counts {
			all, failed, row = all+1, failed+1, row+1
		}
		if r.at > m.now-120*time.Second {
			who := string(r.reference)
			if r.verdict == hostFailure {
				who = "!"
			}
			anywhere, inRow = anywhere+who, inRow+who
		}
	}
	several := func(who string) bool {
		return strings.Contains(who, "!") || strings.Contains(who, "a") && strings.Contains(who, "b")
	}
	return row >= 3 && several(inRow) || all >= 10 && 2*failed >= all && several(anywhere)
}

// fails holds a reference off and returns how often in a row.
func (m *model) fails(reference byte, from time.Duration) int {
	h := &m.held[reference-'a']
	if h.failures > 0 && from < h.until {
		return 0
	}
	if from-h.until > 120*time.Second {
		*h = heldOff{}
	}
	h.until = from + []time.Duration{2, 4, 8, 16, 32, 60}[min(h.failures, 5)]*time.Second
	h.failures++
	return h.failures
}

func (m *model) probe(answer verdict) {
	if m.state == stateOpen {
		m.state = stateHalfOpen
	}
	if state, _ := m.refusal(0); state == "" {
		m.probes++
		m.end(m.begin(0), answer, answer)
	}
	if m.state == stateHalfOpen {
		m.again = m.now + 60*time.Second
	}
}

// due is the next moment at which something may be asked that may not be now.
func (m *model) due() time.Duration {
	next := m.now + 125*time.Second
	if m.state == stateOpen {
		next = m.until
	}
	for _, at := range []time.Duration{m.held[0].until, m.held[0].trial, m.held[1].until, m.held[1].trial, m.trialEnds + 1} {
		if m.state != stateOpen && at > m.now {
			next = min(next, at)
		}
	}
	return next
}

func (m *model) wait(until time.Duration, probe verdict) {
	for {
		next := m.again
		if m.state == stateOpen {
			next = m.until
		}
		if next == 0 || next > until {
			break
		}
		m.now = next
		m.probe(probe)
	}
	m.now = until
}

var verdicts = map[byte]verdict{'+': success, '-': failure, '!': hostFailure, '?': excluded}

// take lets one event happen. It reports whether that can be.
func (m *model) take(s step) bool {
	switch how := s.event[len(s.event)-1]; s.event[0] {
	case '.':
		m.wait(m.due(), s.probe)
	case ':':
		m.wait(m.now+125*time.Second, s.probe)
	case '!':
		if m.state != stateOpen && (m.state != stateHalfOpen || m.now > m.trialEnds) {
			m.end(m.begin(0), hostFailure, s.probe)
		}
	case ')':
		if m.flying == nil {
			return false
		}
		f := *m.flying
		m.flying = nil
		m.end(f, verdicts[how], s.probe)
	default:
		if how == '(' && m.flying != nil {
			return false
		}
		if refused, _ := m.refusal(s.event[0]); refused != "" {
			return how == '+' || how == '(' // what would have come of it makes no difference
		}
		f := m.begin(s.event[0])
		if how == '(' {
			m.flying = &f
			return true
		}
		m.end(f, verdicts[how], s.probe)
	}
	return true
}

// subject is the breaker that has gone through the same.
type subject struct {
	*breaker
	begun  time.Time
	answer atomic.Int32
	probes atomic.Int32
	flying func(verdict, string)
}

func newSubject() *subject {
	s := &subject{begun: time.Now()}
	s.breaker = newBreaker(breakerConfig{class: classManifest, rand: steady, probe: func(context.Context) error {
		s.probes.Add(1)
		return map[verdict]error{success: nil, probeFailed: errSick, excluded: errNoProbe}[verdict(s.answer.Load())]
	}})
	return s
}

// take is the model's, until then.
func (s *subject) take(step step, until time.Duration) {
	s.answer.Store(int32(step.probe))
	switch how := step.event[len(step.event)-1]; step.event[0] {
	case '.', ':':
		time.Sleep(until - time.Since(s.begun))
	case '!':
		s.fail("", hostFailure, "dial failed")
	case ')':
		if s.flying != nil {
			s.flying(verdicts[how], "answered 500")
		}
	default:
		settle, err := s.allow(step.event[:1])
		if how == '(' {
			s.flying = settle
		} else if err == nil {
			settle(verdicts[how], "answered 500")
		}
	}
}

// differs is where the breaker is not what the model is, "" if nowhere.
func (s *subject) differs(m model) string {
	got := s.state()
	var until time.Duration
	if !got.Until.IsZero() {
		until = got.Until.Sub(s.begun)
	}
	if got.Name != m.state || got.Since.Sub(s.begun) != m.since || until != m.until || int(s.probes.Load()) != m.probes {
		return fmt.Sprintf("%s since %v until %v after %d probes, want %s since %v until %v after %d", got.Name, got.Since.Sub(s.begun), until, s.probes.Load(), m.state, m.since, m.until, m.probes)
	}
	for _, reference := range []byte("ab") {
		state, until := "", time.Duration(0)
		settle, err := s.allow(string(reference))
		if open := new(Open); errors.As(err, &open) {
			state, until = open.State, open.Until.Sub(s.begun)
		}
		wantState, wantUntil := m.refusal(reference)
		if state != wantState || until != wantUntil {
			return fmt.Sprintf("%c is refused as %q until %v, want %q until %v", reference, state, until, wantState, wantUntil)
		}
		if err == nil {
			m.end(m.begin(reference), excluded, excluded)
			settle(excluded, "")
		}
	}
	return ""
}

// Every sequence of so many events, of each alphabet: the breaker does what the model does. What makes
// no difference to the model is tried once, and that it makes none to the breaker is part of it.
func TestBreakerModel(t *testing.T) {
	for _, tt := range []struct {
		name     string
		before   string // what has happened already
		alphabet string
	}{
		{"from the start", "", "a+ a- b- ! ."},
		{"requests that overlap", "", "a( )+ )- a- b- ! ."},
		{"after a quiet time", ":", "a- b- a? . :"},
		{"with half a window of results", "a+ a+ a+ a+ b- . b- .", "a+ a- b- ."},
		{"when out", "! ! !", "a( )+ )- a? b- ."},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				tried := 0
				var try func(m model, steps []step)
				try = func(m model, steps []step) {
					tried++
					compare(t, m, steps)
					if len(steps) == modelLength+len(strings.Fields(tt.before)) {
						return
					}
					for _, event := range strings.Fields(tt.alphabet) {
						for _, probe := range []verdict{success, probeFailed, excluded} {
							next, s := m, step{event, probe}
							if next.take(s) {
								try(next, append(slices.Clip(steps), s))
							}
							if next.probes == m.probes {
								break
							}
						}
					}
				}
				m, steps := model{state: stateClosed, trialEnds: -1}, []step(nil)
				for _, event := range strings.Fields(tt.before) {
					s := step{event: event}
					m.take(s)
					steps = append(steps, s)
				}
				try(m, steps)
				t.Logf("%d sequences", tried)
			})
		})
	}
}

// compare lets the steps happen to a new breaker, at the model's times.
func compare(t *testing.T, want model, steps []step) {
	s, m := newSubject(), model{state: stateClosed, trialEnds: -1}
	defer s.close()
	for _, step := range steps {
		probes := m.probes
		m.take(step)
		s.take(step, m.now)
		if m.probes != probes {
			synctest.Wait()
		}
	}
	synctest.Wait()
	if diff := s.differs(want); diff != "" {
		t.Fatalf("%v: %s", steps, diff)
	}
}
