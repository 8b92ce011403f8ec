package upstream

import (
	"context"
	"errors"
	"net/http"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"breakwater/pkg/registrytest"
)

func TestF37RecoveryWithoutABurst(t *testing.T) {
	guard(t, registrytest.Auth{}, func(g *guarded) {
		// Two registries at one host, and a breaker that opens and closes for one of them.
		g.use(Config{Registry: "quay.io", URL: "https://quay.test"}, Config{Registry: "other", URL: "https://quay.test"})
		if err := g.ask("quay.io", "org/a"); err != nil {
			g.Fatal(err)
		}
		remove := g.Fault(registrytest.Match{}, registrytest.Status(http.StatusServiceUnavailable))
		for _, repo := range []string{"org/a", "org/b", "org/c"} {
			_ = g.ask("quay.io", repo)
		}
		manifests := g.pool.Clients("quay.io")[0].breakers[classManifest]
		wantState(g.T, manifests, stateOpen)
		remove()
		out := time.Now()
		for manifests.state().Name != stateClosed {
			time.Sleep(100 * time.Millisecond)
			if time.Since(out) > maxHoldOff {
				g.Fatal("no probe has closed the breaker")
			}
		}
		if took := time.Since(out); took > firstHoldOff*12/10+5*time.Second {
			g.Errorf("closed after %v", took)
		}
		var busy, most, served atomic.Int32
		defer g.Fault(registrytest.Match{Kind: registrytest.KindManifest}, func(w http.ResponseWriter, r *http.Request, next http.Handler) {
			now := busy.Add(1)
			defer busy.Add(-1)
			for was := most.Load(); now > was; was = most.Load() {
				most.CompareAndSwap(was, now)
			}
			time.Sleep(500 * time.Millisecond)
			served.Add(1)
			next.ServeHTTP(w, r)
		})()
		burst := func(n int, budget time.Duration) (failed int32) {
			most.Store(0)
			var all sync.WaitGroup
			var failures atomic.Int32
			for i := range n {
				all.Go(func() {
					ctx, cancel := context.WithTimeout(context.Background(), budget)
					defer cancel()
					c := g.pool.Clients([]string{"quay.io", "other"}[i%2])[0]
					if _, err := c.Manifest(ctx, reference(c.Registry(), "org/a")); err != nil {
						failures.Add(1)
						if e := new(Error); !errors.As(err, &e) || e.verdict != excluded {
							g.Errorf("%v counts", err)
						}
					}
				})
			}
			all.Wait()
			synctest.Wait()
			return failures.Load()
		}
		if failed := burst(200, headerTimeout); failed > 0 || most.Load() != recoveryRequests {
			g.Errorf("%d failed, %d at once, want %d", failed, most.Load(), recoveryRequests)
		}
		if failed := burst(200, 1200*time.Millisecond); failed == 0 {
			g.Error("nobody failed for want of time")
		}
		wantState(g.T, manifests, stateClosed)
		time.Sleep(recoveryTime)
		if failed := burst(100, headerTimeout); failed > 0 || most.Load() != 100 {
			g.Errorf("later %d failed, %d at once, want 100", failed, most.Load())
		}
	})
}
