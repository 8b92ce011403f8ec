package upstream

import (
	"testing"
	"testing/synctest"
	"time"

	"breakwater/pkg/registrytest"
)

// A fifth of what is under way may be second tries, and one of what is not.
func TestRetryBudget(t *testing.T) {
	for underWay, want := range map[int]int{0: 1, 4: 1, 10: 2, 50: 10} {
		guard(t, registrytest.Auth{}, func(g *guarded) {
			g.as(map[string]string{"quay.io": ""})
			g.Fault(registrytest.Match{}, registrytest.Delay(time.Second))
			for range underWay {
				go func() { _ = g.ask("quay.io", "org/a") }()
			}
			synctest.Wait()
			client := g.pool.Clients("quay.io")[0]
			var over []func()
			for range 60 {
				if done, ok := client.Retry(); ok {
					over = append(over, done)
				}
			}
			if len(over) != want {
				t.Errorf("%d second tries for %d requests, want %d", len(over), underWay, want)
			}
			over[0]()
			if _, ok := client.Retry(); !ok {
				t.Error("none left after one was over")
			}
			time.Sleep(time.Second)
			synctest.Wait()
			if n := client.budget.active.Load(); n != 0 {
				t.Errorf("%d requests under way after all have ended", n)
			}
		})
	}
}
