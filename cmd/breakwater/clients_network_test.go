//go:build linux

package main_test

import (
	"fmt"
	"net/http"
	"sync"
	"testing"
	"time"

	"breakwater/pkg/registrytest"
)

// TestF76ForgottenFlows has a firewall forget the connections that the mirror keeps: what is sent on
// them is lost, new ones are fine.
func TestF76ForgottenFlows(t *testing.T) {
	const kept, later = 8, 30 // tags asked for at once, so that connections are kept, and one after the other
	for _, row := range []struct {
		name   string
		stored int // tags that the mirror knows by then
	}{
		{"not stored", kept}, {"stored", kept + later},
	} {
		t.Run(row.name, func(t *testing.T) {
			t.Parallel()
			h := newHost(t, "iptables")
			up := h.upstream(t)
			for i := range kept + later {
				up.push(t, "org/image", fmt.Sprint("tag", i), registrytest.NewImage(registrytest.Layer(1, 4<<10)))
			}
			h.filter(t, "--table mangle --append INPUT -p tcp --dport 8080 -j CONNMARK --set-mark 1")
			m := h.serve(t, mirrored)
			healed := up.Fault(registrytest.Match{Host: upstreamAddr}, registrytest.Delay(300*time.Millisecond)) // or one connection would do
			var asking sync.WaitGroup
			for i := range kept {
				asking.Go(func() { h.wantTag(t, i) })
			}
			asking.Wait()
			healed()
			for i := kept; i < row.stored; i++ {
				h.wantTag(t, i)
			}
			before := up.connections()
			if len(before) < 2 {
				t.Errorf("%d connections were made, want several", len(before))
			}
			h.filter(t, "--table mangle --flush INPUT")
			h.filter(t, "--append INPUT -m connmark --mark 1 -j DROP")
			up.Forget()
			var slow []time.Duration
			for i := range later {
				if took := h.wantTag(t, kept+i); took > time.Second {
					slow = append(slow, took)
				}
			}
			if len(slow) > 1 || len(slow) == 1 && slow[0] > 15*time.Second {
				t.Errorf("slow requests took %v, want one at most, of at most 15s", slow)
			}
			for addr := range up.connections() {
				if before[addr] {
					t.Errorf("upstream heard something on %s, a forgotten connection", addr)
				}
			}
			if err := h.breaker("closed"); err != nil {
				t.Error(err)
			}
			t.Logf("%d connections were forgotten; slow requests: %v", len(before), slow)
			m.stop(t)
		})
	}
}

// wantTag asks for a tag by its number, wants it fresh unless that takes long, and returns how long.
func (h *host) wantTag(t *testing.T, i int) time.Duration {
	t.Helper()
	begin := time.Now()
	got, err := h.ask(http.MethodGet, fmt.Sprintf("http://%s/v2/org/image/manifests/tag%d", mirrorAddr, i))
	took := time.Since(begin)
	if err != nil || got.status != http.StatusOK || took < time.Second && got.header.Get("Warning") != "" {
		t.Errorf("tag%d: %d %v, %v after %v, want a fresh 200", i, got.status, got.header, err, took)
	}
	return took
}

// connections are the other ends of those that the requests of the log came by.
func (u *upstream) connections() map[string]bool {
	ends := map[string]bool{}
	for _, request := range u.Requests(registrytest.Match{Host: upstreamAddr}) {
		ends[request.RemoteAddr] = true
	}
	return ends
}
