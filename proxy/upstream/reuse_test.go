package upstream

import (
	"net/http"
	"testing"
	"time"

	"breakwater/pkg/oci"
	"breakwater/pkg/registrytest"
)

func reference(registry, name string) oci.Reference {
	return oci.Reference{Repository: oci.Repository{Registry: registry, Name: name}, Tag: "latest"}
}

func TestF76DeadPooledConnections(t *testing.T) {
	for name, kill := range map[string]func(*registrytest.Network, string){"dropped": (*registrytest.Network).Drop, "reset": (*registrytest.Network).Reset} {
		guard(t, registrytest.Auth{}, func(g *guarded) {
			g.use(Config{Registry: "quay.io", URL: "https://quay.test"}, Config{Registry: "other", URL: "https://quay.test"})
			// Several connections, some of them for another registry.
			release := g.Fault(registrytest.Match{}, registrytest.Delay(time.Second))
			done := make(chan error)
			for i := range 12 {
				go func() { done <- g.ask([]string{"quay.io", "other"}[i%2], "org/a") }()
			}
			for range 12 {
				if err := <-done; err != nil {
					g.Fatal(err)
				}
			}
			release()
			kill(g.network, "quay.test:443")
			slow := 0
			for i := range 20 {
				began := time.Now()
				if err := g.ask([]string{"quay.io", "other"}[i%2], "org/a"); err != nil {
					g.Errorf("%s: %v", name, err)
				}
				if took := time.Since(began); took > firstByteTimeout+time.Second {
					g.Errorf("%s: took %v", name, took)
				} else if took > time.Second {
					slow++
				}
			}
			if slow > 1 || name == "reset" && slow > 0 {
				g.Errorf("%s: %d slow requests", name, slow)
			}
			for _, c := range g.pool.All() {
				for _, h := range c.Health() {
					if h.State != stateClosed || h.Failed > 0 || h.Excluded > 0 {
						g.Errorf("%s: %+v", name, h)
					}
				}
			}
		})
	}
}

// Who asks while the first to find out still waits is not made to wait as well.
func TestF76DoubtSpreads(t *testing.T) {
	guard(t, registrytest.Auth{}, func(g *guarded) {
		g.use(Config{Registry: "quay.io", URL: "https://quay.test"}, Config{Registry: "other", URL: "https://quay.test"})
		release := g.Fault(registrytest.Match{}, registrytest.Delay(time.Second))
		done := make(chan error)
		ask := func(n int) {
			for i := range n {
				go func() { done <- g.ask([]string{"quay.io", "other"}[i%2], "org/a") }()
			}
		}
		wait := func(n int) {
			for range n {
				if err := <-done; err != nil {
					g.Error(err)
				}
			}
		}
		ask(12)
		wait(12)
		release()
		g.network.Drop("quay.test:443")
		ask(1)
		time.Sleep(1500 * time.Millisecond)
		began := time.Now()
		ask(12)
		wait(12)
		if took := time.Since(began); took > time.Second {
			g.Errorf("twelve that came later took %v", took)
		}
		wait(1)
	})
}

// A host that has died is not excused for having had connections.
func TestF76DeadHostCounts(t *testing.T) {
	guard(t, registrytest.Auth{}, func(g *guarded) {
		g.use(Config{Registry: "quay.io", URL: "https://quay.test"})
		if err := g.ask("quay.io", "org/a"); err != nil {
			g.Fatal(err)
		}
		g.network.SetLink("quay.test:443", registrytest.Link{BlackHole: true})
		for range 3 {
			began := time.Now()
			if err := g.ask("quay.io", "org/a"); err == nil {
				g.Fatal("no error")
			}
			if took := time.Since(began); took > headerTimeout {
				g.Errorf("took %v", took)
			}
		}
		wantState(g.T, g.pool.All()[0].breakers[classManifest], stateOpen)
	})
}

// An answer that is late on a new connection is not asked for again.
func TestF76NewConnectionsAreNotRetried(t *testing.T) {
	guard(t, registrytest.Auth{}, func(g *guarded) {
		g.use(Config{Registry: "quay.io", URL: "https://quay.test"})
		defer g.Fault(registrytest.Match{}, registrytest.Hang())()
		if err := g.ask("quay.io", "org/a"); err == nil {
			g.Fatal("no error")
		}
		if n := g.Count(registrytest.Match{}); n != 1 {
			g.Errorf("%d requests", n)
		}
		if h := g.pool.All()[0].Health()[classManifest]; h.Failed != 1 {
			g.Errorf("%+v", h)
		}
		g.Fault(registrytest.Match{}, registrytest.Status(http.StatusOK))()
	})
}
