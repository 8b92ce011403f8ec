//go:build linux

package main_test

import (
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"breakwater/pkg/registrytest"
)

// scheduling is what a busy machine of two cores may add to a bound.
const scheduling = 500 * time.Millisecond

// TestF01F02RefusedConnections and TestF03BlackHole are the same faults in the network itself.
func TestF01F02RefusedConnections(t *testing.T) {
	networkFault{rule: "REJECT --reject-with tcp-reset", first: 1500 * time.Millisecond, miss: 500 * time.Millisecond}.test(t)
}

func TestF03BlackHole(t *testing.T) {
	networkFault{rule: "DROP", first: 1500 * time.Millisecond, miss: 10 * time.Second}.test(t)
}

// networkFault is what becomes of packets to the upstream, and how long an answer may take: the
// first stale one, and one for an image that is not stored.
type networkFault struct {
	rule        string
	first, miss time.Duration
}

func (f networkFault) test(t *testing.T) {
	h := newHost(t, "iptables", "dockerd", "docker", "containerd", "ctr")
	up := h.upstream(t)
	names := up.push(t, "org/image", "latest", greeter(t, 1))
	up.push(t, "org/unseen", "latest", greeter(t, 2))
	engines := map[string]client{"docker.io/": startDocker(t, h), "quay.io/": startDebianContainerd(t, h)}
	m := h.serve(t, mirrored)
	for registry, c := range engines {
		pullAll(t, c, []string{registry + names[0], registry + names[1]})
	}
	table := func(action string) { h.filter(t, action+" OUTPUT -p tcp --dport 8080 -j "+f.rule) }
	table("--append")
	t.Run("stored", func(t *testing.T) {
		h.wantStale(t, f.first)
		took := make([]time.Duration, 20)
		for i := range took {
			took[i] = h.wantStale(t, f.first)
		}
		if median := slices.Sorted(slices.Values(took))[len(took)/2]; median > 50*time.Millisecond {
			t.Errorf("stale answers took %v, want half of them within 50ms", took)
		}
		within(t, 20*time.Second, func() error {
			h.wantStale(t, f.first)
			return h.breaker("open")
		})
		h.wantRefusal(t, 50*time.Millisecond)
		for registry, c := range engines {
			pullAll(t, c, []string{registry + names[0], registry + names[1]})
		}
	})
	table("--delete")
	m.stop(t)
	m = h.serve(t, mirrored)
	table("--append")
	t.Run("unseen", func(t *testing.T) {
		h.wantRefusal(t, f.miss)
		for registry, c := range engines {
			if out, err := c.pull(t, registry+"org/unseen:latest"); err == nil {
				t.Errorf("pulled what was never stored:\n%s", out)
			}
		}
		// containerd goes on to its next host, if it has one.
		l, err := h.listen("127.0.0.1:8081")
		if err != nil {
			t.Fatal(err)
		}
		defer func(other *registrytest.Server) { _ = other.Close() }(registrytest.Serve(l, up.Real))
		h.write(t, "certs.d/_default/hosts.toml", fmt.Sprintf(
			"server = \"http://%s\"\n[host.\"http://%s\"]\n  capabilities = [\"pull\", \"resolve\"]\n", l.Addr(), mirrorAddr))
		pullAll(t, engines["quay.io/"], []string{"quay.io/org/unseen:latest"})
	})
	table("--delete")
	m.stop(t)
}

// filter changes the packets that pass on the host: what iptables is told.
func (h *host) filter(t *testing.T, rule string) {
	t.Helper()
	args := append([]string{"iptables"}, strings.Fields(rule)...)
	if out, err := h.output(h.command(t.Context(), nil, args...)); err != nil {
		cannot(t, "no packet filter: %v %s", err, out)
	}
}

// wantStale asks for a stored tag and wants it marked stale, in time. It returns the time it took.
func (h *host) wantStale(t *testing.T, limit time.Duration) time.Duration {
	t.Helper()
	begin := time.Now()
	got, err := h.ask(http.MethodGet, "http://"+mirrorAddr+"/v2/org/image/manifests/latest")
	took := time.Since(begin)
	if err != nil {
		t.Fatal(err)
	}
	if got.status != http.StatusOK || !strings.HasPrefix(got.header.Get("Warning"), `299 - "stale`) ||
		got.header.Get("Age") == "" || !strings.HasPrefix(got.header.Get("Cache-Status"), "breakwater; ") {
		t.Errorf("stored tag: %d %v, want a stale 200", got.status, got.header)
	}
	if took > limit+scheduling {
		t.Errorf("stored tag: took %v, want %v", took, limit)
	}
	return took
}

// wantRefusal asks for an image that is not stored and wants to be told why it cannot be had.
func (h *host) wantRefusal(t *testing.T, limit time.Duration) {
	t.Helper()
	begin := time.Now()
	got, err := h.ask(http.MethodGet, "http://"+mirrorAddr+"/v2/org/unseen/manifests/latest")
	took := time.Since(begin)
	if err != nil {
		t.Fatal(err)
	}
	if got.status != http.StatusServiceUnavailable || got.header.Get("Retry-After") == "" ||
		got.header.Get("Content-Type") != "application/json" ||
		!strings.Contains(got.body, `"UNAVAILABLE"`) || !strings.Contains(got.body, upstreamAddr) {
		t.Errorf("unseen tag: %d %v %s, want a 503 that names the upstream", got.status, got.header, got.body)
	}
	if took > limit+scheduling {
		t.Errorf("unseen tag: took %v, want %v", took, limit)
	}
}

// breaker returns nil if the breaker of docker.io's manifests is in that state.
func (h *host) breaker(state string) error {
	metrics, err := h.ask(http.MethodGet, "http://"+adminAddr+"/metrics")
	want := fmt.Sprintf(`breakwater_breaker_state{class="manifest",registry="docker.io",state=%q,upstream=%q} 1`, state, upstreamAddr)
	if err == nil && !strings.Contains(metrics.body, want) {
		err = fmt.Errorf("metrics have no %s", want)
	}
	return err
}

// TestF39BootWithoutNetwork starts the mirror, not configured at all, where there is no route, no
// DNS and no upstream, on a store that was filled elsewhere.
func TestF39BootWithoutNetwork(t *testing.T) {
	connected := newHost(t)
	up := connected.upstream(t)
	names := append(up.push(t, "org/image", "latest", greeter(t, 1)), up.pushBuild(t, "org/build", "latest")...)
	for i, name := range names {
		names[i] = "quay.io/" + name
	}
	m := connected.serve(t, mirrored)
	pullAll(t, startCrane(t, connected), []string{mirrorAddr + "/" + names[0], mirrorAddr + "/" + names[2]})
	m.stop(t)

	h := newHost(t, "containerd", "ctr")
	if err := os.Rename(filepath.Join(connected.dir, "data"), filepath.Join(h.dir, "data")); err != nil {
		t.Fatal(err)
	}
	begin := time.Now()
	m = h.serve(t, "")
	if took := time.Since(begin); took > time.Second+scheduling {
		t.Errorf("listening after %v, want 1s", took)
	}
	for _, path := range []string{"/healthz", "/readyz"} {
		if got, err := h.ask(http.MethodGet, "http://"+adminAddr+path); err != nil || got.status != http.StatusOK {
			t.Errorf("%s: %d %v, want 200", path, got.status, err)
		}
	}
	pullAll(t, startDebianContainerd(t, h), names)
	m.stop(t)
}
