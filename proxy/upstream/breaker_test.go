package upstream

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) {
	for _, name := range []string{"HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"} {
		_ = os.Unsetenv(name) // no test asks the proxy of whoever runs it
	}
	goleak.VerifyTestMain(m)
}

var errSick = errors.New("still sick")

// probing returns a probe that answers err.
func probing(err error) func(context.Context) error {
	return func(context.Context) error { return err }
}

// steady makes every hold-off as long as its mean.
func steady() float64 { return 0.5 }

// openBreaker returns a breaker in a bubble that has just tripped, after host failures.
func openBreaker(t *testing.T, cfg breakerConfig) *breaker {
	t.Helper()
	b := newBreaker(cfg)
	t.Cleanup(b.close)
	time.Sleep(time.Hour)
	for range cfg.class.consecutive() {
		b.fail("", hostFailure, "dial failed")
	}
	wantState(t, b, stateOpen)
	return b
}

func wantState(t *testing.T, b *breaker, name string) {
	t.Helper()
	if got := b.state(); got.Name != name {
		t.Fatalf("breaker is %s (%s), want %s", got.Name, got.Reason, name)
	}
}

// wantRefused asks and checks that nothing went out, and why.
func wantRefused(t *testing.T, b *breaker, reference, state string) *Open {
	t.Helper()
	_, err := b.allow(reference)
	open := new(Open)
	if !errors.As(err, &open) || open.State != state {
		t.Fatalf("allow(%s) = %v, want it refused as %s", reference, err, state)
	}
	return open
}

func mustAllow(t *testing.T, b *breaker, reference string) func(verdict, string) {
	t.Helper()
	settle, err := b.allow(reference)
	if err != nil {
		t.Fatalf("allow(%s): %v", reference, err)
	}
	return settle
}

// Each event is a reference and what came of it: + success, - failure, ! host failure, ? excluded;
// a number waits for so many seconds.
func TestBreakerTrips(t *testing.T) {
	tests := []struct {
		name   string
		class  class
		events string
		want   string
	}{
		{"three in a row of two references", classManifest, "a- b- a-", stateOpen},
		{"token like manifest", classToken, "a- b- a-", stateOpen},
		{"two in a row", classManifest, "a- b-", stateClosed},
		{"of one reference", classManifest, "a- a- a- a- a- a- a- a- a- a- a- a-", stateClosed},
		{"a success in between", classManifest, "a- b- c+ a-", stateClosed},
		{"the row's failures are of one, the other's is before a success", classManifest, "b- c+ a- a- a-", stateClosed},
		{"what is excluded breaks no row", classManifest, "a- b- c? a-", stateOpen},
		{"host failures need no second reference", classManifest, "a! a! a!", stateOpen},
		{"one host failure shows that it is not the reference", classManifest, "a- a! a-", stateOpen},
		{"five for blobs", classBlob, "a- b- a- b- a-", stateOpen},
		{"four for blobs", classBlob, "a- b- a- b-", stateClosed},
		{"half of ten", classManifest, "a+ b- a+ c- a+ b- a+ c- a+ b-", stateOpen},
		{"half of nine", classManifest, "b- a+ c- a+ b- a+ c- a+ b-", stateClosed},
		{"less than half", classManifest, "a+ a+ b- a+ a+ c- a+ a+ b- a+ a+ c- a+ a+ b- a+ a+ c-", stateClosed},
		{"half of ten, all of one", classManifest, "a+ b- a+ b- a+ b- a+ b- a+ b- a+ b-", stateClosed},
		{"half of what is not excluded", classManifest, "d? d? d? d? a+ b- a+ c- a+ b- a+ c- d? a+ d? b-", stateOpen},
		{"the window forgets a row", classManifest, "a- b- 120 a-", stateClosed},
		{"the window keeps a row", classManifest, "a- b- 110 a-", stateOpen},
		{"the window slides", classManifest, "100 a- b- 30 a-", stateOpen},
		{"the window forgets the second reference of a row", classManifest, "b- 119 a- 5 a- a-", stateClosed},
		{"the window forgets the second reference of a ratio", classManifest, "b- 125 a+ a- a+ a- a+ a- a+ a- a+ a-", stateClosed},
		{"the window forgets the ratio", classManifest, "a+ b- a+ c- a+ b- a+ c- a+ 130 b- a+", stateClosed},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				b := newBreaker(breakerConfig{class: tt.class, probe: probing(errNoProbe)})
				defer b.close()
				for _, event := range strings.Fields(tt.events) {
					if seconds, err := time.ParseDuration(event + "s"); err == nil {
						time.Sleep(seconds)
						continue
					}
					settle, err := b.retry(event[:1]) // not held off for having failed
					if err != nil {
						t.Fatalf("%s: %v", event, err)
					}
					settle(map[byte]verdict{'+': success, '-': failure, '!': hostFailure, '?': excluded}[event[1]], "broken")
					synctest.Wait()
				}
				wantState(t, b, tt.want)
			})
		})
	}
}

func TestBreakerHoldOffGrows(t *testing.T) {
	for _, tt := range []struct {
		name   string
		random float64
		want   []time.Duration
	}{
		{"mean", 0.5, []time.Duration{10 * time.Second, 20 * time.Second, 40 * time.Second, 60 * time.Second, 60 * time.Second}},
		{"least", 0, []time.Duration{8 * time.Second, 16 * time.Second, 32 * time.Second, 48 * time.Second, 48 * time.Second}},
		{"most", 1, []time.Duration{12 * time.Second, 24 * time.Second, 48 * time.Second, 72 * time.Second, 72 * time.Second}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var probes []time.Time
				b := openBreaker(t, breakerConfig{
					class: classManifest,
					rand:  func() float64 { return tt.random },
					probe: func(context.Context) error {
						probes = append(probes, time.Now())
						return errSick
					},
				})
				begin := time.Now()
				var got []time.Duration
				for range tt.want {
					state := b.state()
					if !state.Since.Equal(begin) {
						t.Errorf("out since %v, want %v", state.Since, begin)
					}
					got = append(got, time.Until(state.Until))
					open := wantRefused(t, b, "a", stateOpen)
					if !open.Until.Equal(state.Until) || !open.Since.Equal(begin) {
						t.Errorf("refused until %v since %v, state says %v since %v", open.Until, open.Since, state.Until, begin)
					}
					time.Sleep(time.Until(state.Until))
					synctest.Wait()
				}
				if diff := cmp.Diff(tt.want, got); diff != "" {
					t.Errorf("hold-offs (-want +got):\n%s", diff)
				}
				if len(probes) != len(tt.want) {
					t.Errorf("%d probes, want one a hold-off: %d", len(probes), len(tt.want))
				}
			})
		})
	}
}

func TestBreakerHoldOffStartsAnew(t *testing.T) {
	for healthy, want := range map[time.Duration]time.Duration{
		window - time.Second: 20 * time.Second,
		window:               10 * time.Second,
	} {
		synctest.Test(t, func(t *testing.T) {
			b := openBreaker(t, breakerConfig{class: classManifest, rand: steady, probe: probing(nil)})
			time.Sleep(10 * time.Second)
			synctest.Wait()
			wantState(t, b, stateClosed)
			time.Sleep(healthy)
			for range 3 {
				b.fail("", hostFailure, "dial failed")
			}
			if got := time.Until(b.state().Until); got != want {
				t.Errorf("hold-off after %v of health is %v, want %v", healthy, got, want)
			}
		})
	}
}

func TestBreakerProbesInUsersStead(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var bound time.Duration
		var states []string
		b := openBreaker(t, breakerConfig{
			class:    classManifest,
			rand:     steady,
			onChange: func(s State) { states = append(states, s.Name) },
			probe: func(ctx context.Context) error {
				deadline, _ := ctx.Deadline()
				bound = time.Until(deadline)
				time.Sleep(3 * time.Second)
				return nil
			},
		})
		time.Sleep(10*time.Second - time.Nanosecond)
		wantRefused(t, b, "a", stateOpen)
		time.Sleep(time.Nanosecond)
		synctest.Wait()
		if bound != probeTimeout {
			t.Errorf("probe has %v, want %v", bound, probeTimeout)
		}
		open := wantRefused(t, b, "a", stateHalfOpen)
		if left := time.Until(open.Until); left != probeTimeout {
			t.Errorf("refused for %v, want %v", left, probeTimeout)
		}
		time.Sleep(3 * time.Second)
		synctest.Wait()
		wantState(t, b, stateClosed)
		mustAllow(t, b, "a")(success, "")
		if diff := cmp.Diff([]string{stateOpen, stateHalfOpen, stateClosed}, states); diff != "" {
			t.Errorf("changes told (-want +got):\n%s", diff)
		}
	})
}

func TestBreakerProbeThatHangs(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := openBreaker(t, breakerConfig{class: classBlob, rand: steady, probe: func(ctx context.Context) error {
			<-ctx.Done()
			return ctx.Err()
		}})
		time.Sleep(10*time.Second + probeTimeout)
		synctest.Wait()
		wantState(t, b, stateOpen)
		if got := time.Until(b.state().Until); got != 20*time.Second {
			t.Errorf("held off for %v more, want 20s", got)
		}
	})
}

func TestBreakerUsersTryWhenNothingIsKnown(t *testing.T) {
	setup := func(t *testing.T) *breaker {
		b := openBreaker(t, breakerConfig{class: classBlob, rand: steady, probe: probing(errNoProbe)})
		time.Sleep(10 * time.Second)
		synctest.Wait()
		wantState(t, b, stateHalfOpen)
		return b
	}
	t.Run("one at a time, success closes", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			b := setup(t)
			settle := mustAllow(t, b, "a")
			wantRefused(t, b, "a", stateHalfOpen)
			wantRefused(t, b, "b", stateHalfOpen)
			settle(success, "")
			wantState(t, b, stateClosed)
			mustAllow(t, b, "b")
		})
	})
	t.Run("excluded lets the next try", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			b := setup(t)
			mustAllow(t, b, "a")(excluded, "")
			mustAllow(t, b, "b")(success, "")
			wantState(t, b, stateClosed)
		})
	})
	t.Run("failure opens for longer, and others go first the next time", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			b := setup(t)
			mustAllow(t, b, "a")(failure, "broken")
			wantState(t, b, stateOpen)
			if got := time.Until(b.state().Until); got != 20*time.Second {
				t.Errorf("held off for %v more, want 20s", got)
			}
			wantRefused(t, b, "a", stateOpen)
			time.Sleep(20 * time.Second)
			synctest.Wait()
			wantRefused(t, b, "a", stateHeld)
			time.Sleep(firstSuspectHold)
			mustAllow(t, b, "a")(excluded, "")
			mustAllow(t, b, "b")(success, "")
			mustAllow(t, b, "a")
		})
	})
	t.Run("a lost verdict holds it up no longer than a verdict may take", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			b := setup(t)
			lost := mustAllow(t, b, "a")
			time.Sleep(classBlob.longest())
			wantRefused(t, b, "b", stateHalfOpen)
			time.Sleep(time.Nanosecond)
			settle := mustAllow(t, b, "b")
			lost(failure, "found again") // too late
			wantState(t, b, stateHalfOpen)
			settle(success, "")
			wantState(t, b, stateClosed)
		})
	})
	t.Run("a late verdict is one", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			b := setup(t)
			settle := mustAllow(t, b, "a")
			time.Sleep(40 * time.Second)
			settle(success, "")
			settle(failure, "said twice")
			wantState(t, b, stateClosed)
		})
	})
	t.Run("another class's host failure is a verdict too", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			b := setup(t)
			b.fail("", hostFailure, "dial failed")
			wantState(t, b, stateOpen)
			b.fail("", hostFailure, "dial failed") // tells nothing new
			if got := time.Until(b.state().Until); got != 20*time.Second {
				t.Errorf("held off for %v more, want 20s", got)
			}
		})
	})
}

func TestBreakerIgnoresTheStateBefore(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBreaker(breakerConfig{class: classManifest, rand: steady, probe: probing(nil)})
		defer b.close()
		early := []func(verdict, string){mustAllow(t, b, "x"), mustAllow(t, b, "y"), mustAllow(t, b, "z"), mustAllow(t, b, "u")}
		for range 3 {
			b.fail("", hostFailure, "dial failed")
		}
		early[0](success, "")
		wantState(t, b, stateOpen)
		time.Sleep(10 * time.Second)
		synctest.Wait()
		wantState(t, b, stateClosed)
		for _, settle := range early[1:] {
			settle(failure, "answered 500")
		}
		wantState(t, b, stateClosed)
		mustAllow(t, b, "y")(success, "")
	})
	synctest.Test(t, func(t *testing.T) {
		b := newBreaker(breakerConfig{class: classManifest, rand: steady, probe: probing(nil)})
		defer b.close()
		for _, reference := range []string{"a", "b", "a"} {
			b.fail(reference, failure, "answered 500")
		}
		wantState(t, b, stateOpen)
		time.Sleep(10 * time.Second)
		synctest.Wait()
		for range ratioMinimum {
			b.fail("a", failure, "answered 500") // b's failure is history
		}
		wantState(t, b, stateClosed)
	})
}

func TestVerdictCountsOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBreaker(breakerConfig{class: classManifest, probe: probing(nil)})
		defer b.close()
		settle := mustAllow(t, b, "a")
		for range 5 {
			settle(hostFailure, "dial failed")
		}
		wantState(t, b, stateClosed)
	})
}

func TestHostFailureHoldsNoReferenceOff(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBreaker(breakerConfig{class: classManifest, probe: probing(nil)})
		defer b.close()
		mustAllow(t, b, "a")(hostFailure, "dial failed")
		mustAllow(t, b, "a")(success, "")
	})
}

// 100 requests a second for one tag, all answered with 500.
func TestF08BreakerLetsFewThrough(t *testing.T) {
	for name, probe := range map[string]error{"known content": errSick, "nothing known": errNoProbe} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				sent := 0
				b := newBreaker(breakerConfig{class: classManifest, probe: func(context.Context) error {
					if !errors.Is(probe, errNoProbe) {
						sent++
					}
					return probe
				}})
				defer b.close()
				for end := time.Now().Add(time.Minute); time.Now().Before(end); time.Sleep(10 * time.Millisecond) {
					if settle, err := b.allow("a"); err == nil {
						sent++
						settle(failure, "answered 500")
					}
				}
				if sent > 12 {
					t.Errorf("%d requests in a minute, want at most 12", sent)
				}
			})
		})
	}
}

func TestF10FlappingUpstream(t *testing.T) {
	for seed := range uint64(20) {
		synctest.Test(t, func(t *testing.T) {
			begin := time.Now()
			good := func() bool { return time.Since(begin)%(20*time.Second) < 10*time.Second }
			var opened atomic.Int32
			var before atomic.Value
			before.Store(stateClosed)
			random := rand.New(rand.NewPCG(seed, seed))
			b := newBreaker(breakerConfig{
				class: classManifest,
				rand:  random.Float64,
				onChange: func(s State) {
					if before.Swap(s.Name) == stateClosed {
						opened.Add(1)
					}
				},
				probe: func(context.Context) error {
					if good() {
						return nil
					}
					return errSick
				},
			})
			defer b.close()
			for i := 0; time.Since(begin) < 30*time.Minute; i++ {
				if settle, err := b.allow(fmt.Sprint(i % 50)); err == nil {
					if good() {
						settle(success, "")
					} else {
						settle(failure, "answered 503")
					}
				}
				time.Sleep(100 * time.Millisecond)
			}
			if n := opened.Load(); n < 1 || n > 25 {
				t.Errorf("opened %d times in 30 minutes, want at most 25", n)
			}
		})
	}
}

// A CDN that sends headers and then nothing: each failure takes 40 s to tell.
func TestF72StalledBodiesOpenTheBlobBreaker(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBreaker(breakerConfig{class: classBlob, rand: steady, probe: func(ctx context.Context) error {
			<-ctx.Done() // its body stalls as well
			return ctx.Err()
		}})
		defer b.close()
		for i := range 5 {
			settle := mustAllow(t, b, fmt.Sprint(i))
			time.AfterFunc(40*time.Second, func() { settle(failure, "cdn.example: body too slow") })
			time.Sleep(10 * time.Second)
		}
		wantState(t, b, stateClosed)
		time.Sleep(30 * time.Second)
		synctest.Wait()
		wantState(t, b, stateOpen)
		for end := time.Now().Add(10 * time.Minute); time.Now().Before(end); time.Sleep(time.Second) {
			if _, err := b.allow("a"); err == nil {
				t.Fatal("a user was let through to a stalling CDN")
			}
		}
	})
}

// 500 for one tag at 100/min, 200 for the rest.
func TestF73OneBrokenReferenceClosesNothing(t *testing.T) {
	for name, probe := range map[string]error{"known content": nil, "nothing known": errNoProbe} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				b := newBreaker(breakerConfig{class: classManifest, probe: probing(probe)})
				defer b.close()
				asked := 0
				for i := range 1000 { // ten minutes
					if settle, err := b.allow("broken"); err == nil {
						asked++
						settle(failure, "answered 500")
					}
					time.Sleep(600 * time.Millisecond)
					if i%10 == 0 { // few: the broken one may well be the most of what is asked
						settle := mustAllow(t, b, fmt.Sprint(i))
						settle(success, "")
					}
				}
				wantRefused(t, b, "broken", stateHeld)
				if asked > 15 {
					t.Errorf("the broken reference was asked for %d times, want it held off", asked)
				}
			})
		})
	}
}
