package upstream

import (
	"context"
	"fmt"
	"net/http"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

func TestSuspectIsHeldOff(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		probes := 0
		b := newBreaker(breakerConfig{class: classManifest, probe: func(context.Context) error { probes++; return nil }})
		defer b.close()
		for i, want := range []time.Duration{2, 4, 8, 16, 32, 60, 60} {
			also := mustAllow(t, b, "other")
			mustAllow(t, b, "a")(failure, "answered 500")
			open := wantRefused(t, b, "a", stateHeld)
			if got := time.Until(open.Until); got != want*time.Second {
				t.Errorf("failure %d holds off for %v, want %v", i+1, got, want*time.Second)
			}
			if !strings.Contains(open.Error(), "this reference") || !strings.Contains(open.Error(), "answered 500") {
				t.Errorf("%q does not say that it is the reference, and why", open)
			}
			also(success, "")
			time.Sleep(want * time.Second)
			synctest.Wait()
			if want := max(0, i-1); probes != want {
				t.Errorf("%d probes after %d failures, want %d", probes, i+1, want)
			}
			wantState(t, b, stateClosed)
		}
		mustAllow(t, b, "a")(success, "")
		mustAllow(t, b, "a")(failure, "answered 500")
		if got := time.Until(wantRefused(t, b, "a", stateHeld).Until); got != firstSuspectHold {
			t.Errorf("the first failure after a success holds off for %v, want %v", got, firstSuspectHold)
		}
		time.Sleep(firstSuspectHold + window + time.Second)
		mustAllow(t, b, "a")(failure, "answered 500")
		if got := time.Until(wantRefused(t, b, "a", stateHeld).Until); got != firstSuspectHold {
			t.Errorf("the first failure for a long time holds off for %v, want %v", got, firstSuspectHold)
		}
	})
}

func TestSuspectIsTriedByOne(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBreaker(breakerConfig{class: classManifest, probe: probing(nil)})
		defer b.close()
		first, second, third := mustAllow(t, b, "a"), mustAllow(t, b, "a"), mustAllow(t, b, "a")
		first(failure, "answered 500")
		second(failure, "answered 500") // of the same moment: no further failure of the reference
		if got := time.Until(wantRefused(t, b, "a", stateHeld).Until); got != firstSuspectHold {
			t.Errorf("held off for %v, want %v", got, firstSuspectHold)
		}
		time.Sleep(firstSuspectHold)
		settle := mustAllow(t, b, "a")
		wantRefused(t, b, "a", stateHeld)
		third(excluded, "") // not the one that tries
		wantRefused(t, b, "a", stateHeld)
		settle(excluded, "")
		lost := mustAllow(t, b, "a")
		time.Sleep(classManifest.longest())
		settle = mustAllow(t, b, "a")
		lost(excluded, "")
		wantRefused(t, b, "a", stateHeld)
		settle(success, "")
		mustAllow(t, b, "a")
		mustAllow(t, b, "a")
	})
}

func TestSuspectsThirdFailureAsksWhoseFaultItIs(t *testing.T) {
	for _, tt := range []struct {
		name  string
		probe error
		want  string
	}{
		{"the upstream's", errSick, stateOpen},
		{"the reference's", nil, stateClosed},
		{"unknown", fmt.Errorf("throttled: %w", errNoProbe), stateClosed},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				b := newBreaker(breakerConfig{class: classBlob, probe: probing(tt.probe)})
				defer b.close()
				for range suspectFailures {
					time.Sleep(maxSuspectHold)
					wantState(t, b, stateClosed)
					mustAllow(t, b, "a")(failure, "answered 500")
					synctest.Wait()
				}
				wantState(t, b, tt.want)
				if tt.want == stateOpen {
					if reason := b.state().Reason; !strings.Contains(reason, errSick.Error()) {
						t.Errorf("reason %q does not say what the probe saw", reason)
					}
					return
				}
				wantRefused(t, b, "a", stateHeld)
				mustAllow(t, b, "b")(success, "")
			})
		})
	}
}

func TestSuspectsAreBounded(t *testing.T) {
	s, now := suspects{}, time.Now()
	for i := range 2 * maxSuspects {
		s.fail(fmt.Sprint(i), "answered 500", now.Add(time.Duration(i)))
	}
	if len(s) != maxSuspects {
		t.Errorf("%d suspects, want %d", len(s), maxSuspects)
	}
	if s.refuse(fmt.Sprint(maxSuspects), now) == nil || s.refuse(fmt.Sprint(maxSuspects-1), now) != nil {
		t.Error("not the oldest were dropped")
	}
}

func TestRetryIsNotHeldOffByTheFirstTry(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBreaker(breakerConfig{class: classManifest, probe: probing(nil)})
		defer b.close()
		mustAllow(t, b, "a")(failure, "answered 502")
		wantRefused(t, b, "a", stateHeld)
		settle, err := b.retry("a")
		if err != nil {
			t.Fatal(err)
		}
		settle(success, "")
		mustAllow(t, b, "a")
	})
}

func TestF12RetryAfter(t *testing.T) {
	now := time.Date(2017, time.July, 26, 12, 0, 0, 0, time.UTC)
	tests := []struct {
		value  string
		random float64
		want   time.Duration
	}{
		{"120", 0.5, 2 * time.Minute},
		{" 120 ", 0.5, 2 * time.Minute},
		{"0", 0.5, time.Second},
		{"3601", 0.5, time.Hour},
		{"999999999", 0.5, time.Hour},
		{"99999999999999999999999999", 0.5, time.Hour},
		{"", 0, 24 * time.Second},
		{"", 0.5, 30 * time.Second},
		{"", 1, 36 * time.Second},
		{"-5", 0.5, 30 * time.Second},
		{"1.5", 0.5, 30 * time.Second},
		{"1h", 0.5, 30 * time.Second},
		{"soon", 0.5, 30 * time.Second},
		{"Wed, 26 Jul 2017 12:02:00 GMT", 0.5, 2 * time.Minute},
		{"Wednesday, 26-Jul-17 12:02:00 GMT", 0.5, 2 * time.Minute},
		{"Wed, 26 Jul 2017 11:00:00 GMT", 0.5, time.Second},
		{"Thu, 01 Jan 1970 00:00:00 GMT", 0.5, time.Second},
		{"Fri, 01 Jan 2999 00:00:00 GMT", 0.5, time.Hour},
	}
	for _, tt := range tests {
		h := http.Header{}
		if tt.value != "" {
			h.Set("Retry-After", tt.value)
		}
		if got := retryAfter(h, now, func() float64 { return tt.random }); got != tt.want {
			t.Errorf("Retry-After %q is %v, want %v", tt.value, got, tt.want)
		}
	}
}

func TestF11HoldOff(t *testing.T) {
	var h hold
	now := time.Now()
	if got := h.left(now); got != 0 {
		t.Errorf("nothing was asked, and %v are left", got)
	}
	ask := func(seconds string) time.Duration { return h.extend(http.Header{"Retry-After": {seconds}}, now) }
	if got := ask("120"); got != 2*time.Minute {
		t.Errorf("held off for %v, want 2m", got)
	}
	if got := ask("10"); got != 2*time.Minute {
		t.Errorf("a later answer cut it to %v", got)
	}
	if got := h.left(now.Add(30 * time.Second)); got != 90*time.Second {
		t.Errorf("%v left after 30 s, want 90 s", got)
	}
	if got := h.left(now.Add(2 * time.Minute)); got != 0 {
		t.Errorf("%v left at its end, want none", got)
	}
}
