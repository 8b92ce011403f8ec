package upstream

import (
	"errors"
	"runtime"
	"testing"
	"testing/synctest"
	"time"

	"github.com/sony/gobreaker/v2"
)

// What breaker.go relies on in gobreaker. Where one of these fails after an update, so does the wrapper.
func TestGobreakerFacts(t *testing.T) {
	type subject struct {
		*gobreaker.TwoStepCircuitBreaker[struct{}]
		asked []gobreaker.Counts // by ReadyToTrip
	}
	begin := func(t *testing.T, s *subject) func(error) {
		t.Helper()
		done, err := s.Allow()
		if err != nil {
			t.Fatal(err)
		}
		return done
	}
	facts := []struct {
		name  string
		check func(t *testing.T, s *subject) // trips at three failures in a row
	}{
		{"a result counts where its request began, so after the window not at all", func(t *testing.T, s *subject) {
			late := begin(t, s)
			time.Sleep(window + bucket)
			begin(t, s)(errFailed)
			begin(t, s)(errFailed)
			late(errFailed)
			if last := s.asked[len(s.asked)-1]; last.ConsecutiveFailures != 2 {
				t.Errorf("%d failures counted, want 2", last.ConsecutiveFailures)
			}
		}},
		{"failures in a row leave with the window", func(t *testing.T, s *subject) {
			begin(t, s)(errFailed)
			begin(t, s)(errFailed)
			time.Sleep(window)
			begin(t, s)(errFailed)
			if last := s.asked[len(s.asked)-1]; last.ConsecutiveFailures != 1 || last.TotalFailures != 1 {
				t.Errorf("counts are %+v, want one failure", last)
			}
		}},
		{"failures in a row stay for all of the window but a bucket", func(t *testing.T, s *subject) {
			begin(t, s)(errFailed)
			begin(t, s)(errFailed)
			time.Sleep(window - bucket)
			begin(t, s)(errFailed)
			if s.State() != gobreaker.StateOpen {
				t.Error("not open")
			}
		}},
		{"requests count before their results", func(t *testing.T, s *subject) {
			begin(t, s)
			begin(t, s)(errFailed)
			if last := s.asked[0]; last.Requests != 2 || last.TotalFailures != 1 {
				t.Errorf("counts are %+v, want two requests, one failure", last)
			}
		}},
		{"what is excluded breaks no row", func(t *testing.T, s *subject) {
			begin(t, s)(errFailed)
			begin(t, s)(errFailed)
			begin(t, s)(errExcluded)
			begin(t, s)(errFailed)
			if s.State() != gobreaker.StateOpen {
				t.Error("not open")
			}
		}},
		{"State makes the change to half-open, a nanosecond late", func(t *testing.T, s *subject) {
			trip(t, s.TwoStepCircuitBreaker)
			time.Sleep(time.Nanosecond)
			if s.State() != gobreaker.StateOpen {
				t.Error("not open at its expiry")
			}
			time.Sleep(time.Nanosecond)
			if s.State() != gobreaker.StateHalfOpen {
				t.Error("not half-open after its expiry")
			}
		}},
		{"results of an earlier state are ignored", func(t *testing.T, s *subject) {
			late := begin(t, s)
			trip(t, s.TwoStepCircuitBreaker)
			time.Sleep(time.Second)
			late(nil)
			if s.State() != gobreaker.StateHalfOpen {
				t.Error("a success from before the trip closed it")
			}
			begin(t, s) // nor did it take the trial's place
		}},
		{"a lost trial blocks half-open forever", func(t *testing.T, s *subject) {
			trip(t, s.TwoStepCircuitBreaker)
			time.Sleep(time.Second)
			begin(t, s)
			time.Sleep(24 * time.Hour)
			if _, err := s.Allow(); !errors.Is(err, gobreaker.ErrTooManyRequests) {
				t.Errorf("Allow = %v, want ErrTooManyRequests", err)
			}
		}},
		{"an excluded trial makes place for the next", func(t *testing.T, s *subject) {
			trip(t, s.TwoStepCircuitBreaker)
			time.Sleep(time.Second)
			begin(t, s)(errExcluded)
			begin(t, s)(nil)
			if s.State() != gobreaker.StateClosed {
				t.Error("not closed by one success")
			}
		}},
		{"a failed trial opens", func(t *testing.T, s *subject) {
			trip(t, s.TwoStepCircuitBreaker)
			time.Sleep(time.Second)
			begin(t, s)(errFailed)
			if s.State() != gobreaker.StateOpen {
				t.Error("not open")
			}
		}},
	}
	for _, f := range facts {
		t.Run(f.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s := &subject{}
				s.TwoStepCircuitBreaker = gobreaker.NewTwoStepCircuitBreaker[struct{}](gobreaker.Settings{
					Interval: window, BucketPeriod: bucket, Timeout: time.Nanosecond,
					ReadyToTrip: func(c gobreaker.Counts) bool {
						s.asked = append(s.asked, c)
						return c.ConsecutiveFailures >= 3
					},
					IsExcluded: func(err error) bool { return errors.Is(err, errExcluded) },
				})
				f.check(t, s)
			})
		})
	}
}

func trip(t *testing.T, cb *gobreaker.TwoStepCircuitBreaker[struct{}]) {
	t.Helper()
	for range 3 {
		done, err := cb.Allow()
		if err != nil {
			t.Fatal(err)
		}
		done(errFailed)
	}
	if cb.State() != gobreaker.StateOpen {
		t.Fatal("three failures do not trip")
	}
}

// The other fact: callbacks hold the lock, so that one that asked the breaker anything would hang.
func TestGobreakerCallsBackUnderItsLock(t *testing.T) {
	order := make(chan string, 2)
	var cb *gobreaker.TwoStepCircuitBreaker[struct{}]
	cb = gobreaker.NewTwoStepCircuitBreaker[struct{}](gobreaker.Settings{ReadyToTrip: func(gobreaker.Counts) bool {
		go func() {
			cb.State()
			order <- "state"
		}()
		for range 100 {
			runtime.Gosched()
		}
		order <- "callback"
		return false
	}})
	done, err := cb.Allow()
	if err != nil {
		t.Fatal(err)
	}
	done(errFailed)
	if first := <-order; first != "callback" {
		t.Errorf("the lock was free during a callback")
	}
	<-order
}
