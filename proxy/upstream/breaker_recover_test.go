package upstream

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"pgregory.net/rapid"
)

// Whatever has happened, an upstream that is well again is used again, in bounded time, and until
// then one request at a time is enough to see it.
func TestBreakerAlwaysRecovers(t *testing.T) {
	const (
		bound      = 72*time.Second + probeTimeout + 45*time.Second + time.Second // longest hold-off, probe, lost verdict
		references = 4
	)
	synctest.Test(t, func(t *testing.T) {
		check := func(t *rapid.T) {
			healthy := false
			known := rapid.Bool().Draw(t, "known")
			var probeFails atomic.Int32
			class := class(rapid.IntRange(int(classToken), int(classBlob)).Draw(t, "class"))
			b := newBreaker(breakerConfig{class: class, probe: func(ctx context.Context) error {
				switch {
				case !known:
					return errNoProbe
				case healthy:
					return nil
				case probeFails.Add(1)%3 == 0:
					<-ctx.Done()
					return ctx.Err()
				}
				return errSick
			}})
			defer b.close()
			var flying []func(verdict, string)
			reference := rapid.Custom(func(t *rapid.T) string { return fmt.Sprint(rapid.IntRange(1, references).Draw(t, "reference")) })
			verdicts := rapid.SampledFrom([]verdict{success, failure, failure, failure, hostFailure, excluded})
			allow := func(ask func(string) (func(verdict, string), error), reference string) {
				before := b.state()
				settle, err := ask(reference)
				if open := new(Open); err != nil && !errors.As(err, &open) {
					t.Fatalf("refused with %v", err)
				}
				switch after := b.state(); {
				case err == nil && (before.Name == stateOpen || after.Name == stateOpen):
					t.Fatal("let through while open")
				case err == nil && after.Name == stateHalfOpen:
					if _, err := b.retry("another"); err == nil {
						t.Fatal("two trials at once")
					}
				}
				if err == nil {
					flying = append(flying, settle)
				}
			}
			t.Repeat(map[string]func(*rapid.T){
				"allow": func(t *rapid.T) { allow(b.allow, reference.Draw(t, "of")) },
				"retry": func(t *rapid.T) { allow(b.retry, reference.Draw(t, "of")) },
				"settle": func(t *rapid.T) {
					if len(flying) == 0 {
						t.Skip() // this action only: rapid draws another one
					}
					i := rapid.IntRange(0, len(flying)-1).Draw(t, "which")
					flying[i](verdicts.Draw(t, "verdict"), "reason")
					if rapid.Bool().Draw(t, "forget") {
						flying = slices.Delete(flying, i, i+1)
					}
				},
				"fail": func(t *rapid.T) { b.fail(reference.Draw(t, "of"), verdicts.Draw(t, "verdict"), "reason") },
				"wait": func(t *rapid.T) {
					time.Sleep(time.Duration(rapid.IntRange(0, 150_000).Draw(t, "ms")) * time.Millisecond)
				},
				"": func(t *rapid.T) {
					synctest.Wait()
					switch s := b.state(); {
					case s.Name == stateOpen && time.Until(s.Until) > 72*time.Second:
						t.Fatalf("held off for %v", time.Until(s.Until))
					case (s.Name == stateClosed) != s.Until.IsZero(), s.Since.After(time.Now()):
						t.Fatalf("state %+v", s)
					}
				},
			})
			healthy = true
			begin := time.Now()
			for i := 0; ; i++ {
				served := true
				for r := range references {
					if settle, err := b.allow(fmt.Sprint(r + 1)); err == nil {
						settle(success, "")
					} else {
						served = false
					}
				}
				if served && b.state().Name == stateClosed {
					break
				}
				if time.Since(begin) > bound {
					t.Fatalf("%+v after %v of health", b.state(), time.Since(begin))
				}
				time.Sleep(time.Second)
				synctest.Wait()
			}
		}
		rapid.Check(struct{ rapid.TB }{t}, check) // hides t's Deadline, which a bubble has not
	})
}

func TestBreakerConcurrently(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var sick atomic.Bool
		var trials atomic.Int32
		b := newBreaker(breakerConfig{class: classManifest, probe: func(context.Context) error {
			if sick.Load() {
				return errSick
			}
			return nil
		}, onChange: func(State) { trials.Add(1) }})
		defer b.close()
		var wg sync.WaitGroup
		for worker := range 16 {
			wg.Go(func() {
				random := rand.New(rand.NewPCG(1, uint64(worker)))
				for i := range 300 {
					settle, err := b.allow(fmt.Sprint(random.IntN(20)))
					if err == nil {
						go settle(verdict(random.IntN(4)), "reason")
						settle(success, "")
					}
					b.state()
					if i%10 == 0 {
						b.fail("", hostFailure, "dial failed")
					}
					time.Sleep(time.Duration(random.IntN(1000)) * time.Millisecond)
					sick.Store(random.IntN(2) == 0)
				}
			})
		}
		wg.Wait()
		if trials.Load() == 0 {
			t.Error("it never tripped: nothing was tested")
		}
	})
}

func TestBreakerCloseWaitsForTheProbe(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ended := false
		b := openBreaker(t, breakerConfig{class: classToken, rand: steady, probe: func(ctx context.Context) error {
			<-ctx.Done()
			time.Sleep(time.Second)
			ended = true
			return ctx.Err()
		}})
		time.Sleep(10*time.Second + time.Millisecond)
		b.close()
		if !ended {
			t.Error("close did not wait for the probe")
		}
		wantState(t, b, stateHalfOpen) // a probe that close ended says nothing
		b.close()
	})
}
