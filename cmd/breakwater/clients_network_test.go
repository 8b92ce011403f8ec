//go:build linux

package main_test

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	"breakwater/pkg/registrytest"

	"github.com/opencontainers/go-digest"
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

// TestF30PacketLoss loses packets on the way to upstream and back, while clients pull images that are
// not stored, and one that is.
func TestF30PacketLoss(t *testing.T) {
	for _, row := range []struct {
		name string
		lost float64
		fail bool // what is not stored may fail, in time
	}{
		{"5 percent", 0.05, false}, {"30 percent", 0.3, true},
	} {
		t.Run(row.name, func(t *testing.T) {
			t.Parallel()
			h := newHost(t, "iptables")
			up := h.upstream(t)
			stored := registrytest.NewImage(registrytest.Layer(1, 64<<10))
			up.push(t, "org/image", "latest", stored)
			m := h.serve(t, mirrored)
			l := &lossy{T: t, host: h, up: up, fail: row.fail}
			l.pull("org/image", "latest", stored)
			for _, port := range []string{"--sport", "--dport"} {
				h.filter(t, fmt.Sprintf("--append INPUT -p tcp %s 8080 -m statistic --mode random --probability %v -j DROP", port, row.lost))
			}
			ctx, cancel := context.WithTimeout(t.Context(), sized(10*time.Second, 5*time.Minute))
			defer cancel()
			var clients sync.WaitGroup
			for client := range 4 {
				clients.Go(func() {
					for i := 0; ctx.Err() == nil; i++ {
						image := registrytest.NewImage(registrytest.Layer(uint64(2+client+4*i), 256<<10))
						repository, tag := fmt.Sprint("org/client", client), fmt.Sprint("v", i)
						if err := registrytest.Push(t.Context(), up.URL, repository, tag, image); err != nil {
							t.Error(err)
							return
						}
						l.pull(repository, tag, image)
						l.hit(stored)
					}
				})
			}
			clients.Wait()
			t.Logf("F30: with %s of packets lost %d answers, %d images not had; the slowest header took %v, that of what is stored %v",
				row.name, l.answers, l.errors, l.slowest.Round(time.Millisecond), l.slowestHit.Round(time.Millisecond))
			m.stop(t)
		})
	}
}

// lossy is what clients get through a mirror whose upstream is hard to hear.
type lossy struct {
	*testing.T
	host *host
	up   *upstream
	fail bool

	mu                  sync.Mutex // guards what is below
	answers, errors     int
	slowest, slowestHit time.Duration
}

// pull gets a tag and all that it names, as far as that is to be had.
func (l *lossy) pull(repository, tag string, image registrytest.Image) {
	const limit = 10 * time.Second // of each header
	took, err := l.get(repository+"/manifests/"+tag, image.Digest(), limit)
	for _, blob := range image.Blobs {
		if err == nil {
			var next time.Duration
			next, err = l.get(repository+"/blobs/"+blob.Digest.String(), blob.Digest, limit)
			took = max(took, next)
		}
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.slowest = max(l.slowest, took)
	if err != nil {
		l.errors++
		if !l.fail {
			l.Error(err)
		}
	}
}

// hit gets what is stored: a tag, which may be stale after revalidate_timeout in all, and a blob.
func (l *lossy) hit(image registrytest.Image) {
	took, err := l.get("org/image/manifests/latest", image.Digest(), 4*time.Second)
	if err != nil {
		l.Error(err)
	}
	blob := image.Blobs[1].Digest
	if _, err := l.get("org/image/blobs/"+blob.String(), blob, time.Second); err != nil {
		l.Error(err)
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.slowestHit = max(l.slowestHit, took)
}

// get wants the whole content, with its header in time, which it returns, or to be told that there is
// none.
func (l *lossy) get(path string, want digest.Digest, limit time.Duration) (time.Duration, error) {
	l.mu.Lock()
	l.answers++
	l.mu.Unlock()
	begin := time.Now()
	r, err := http.NewRequest(http.MethodGet, "http://"+mirrorAddr+"/v2/"+path, nil)
	if err != nil {
		return 0, err
	}
	r.Header.Set("Accept", "*/*")
	res, err := l.host.client().Do(r)
	took := time.Since(begin)
	if took > limit+scheduling {
		l.Errorf("%s: header after %v, want %v at most", path, took, limit)
	}
	if err != nil {
		return took, err
	}
	defer func() { _ = res.Body.Close() }()
	body, err := io.ReadAll(res.Body)
	switch {
	case res.StatusCode != http.StatusOK:
		err = fmt.Errorf("%s: %d %s", path, res.StatusCode, body)
	case err == nil && digest.FromBytes(body) != want:
		l.Errorf("%s: %d wrong bytes", path, len(body))
	}
	return took, err
}

// linkRate is 1 Mbit/s, in bytes.
const linkRate = 125_000

// TestF31SlowLink has what upstream sends pass a narrow link: what is not stored comes as fast as the
// link lets it, and is not taken for stalled although there is another upstream; what is stored is as
// fast as ever.
func TestF31SlowLink(t *testing.T) {
	t.Parallel()
	h := newHost(t, "iptables", "tc")
	up := h.upstream(t)
	up.second(t)
	image := registrytest.NewImage(registrytest.Layer(1, 1<<20), registrytest.Layer(2, sized(12, 80)*linkRate))
	stored, missing := image.Blobs[1], image.Blobs[2]
	up.push(t, "org/image", "latest", image)
	m := h.serve(t, mirroredTwice)
	h.watch(t, stored)
	for _, args := range []string{
		"ip link set lo mtu 1500 gso_max_segs 1", // or a packet would take half a second
		"tc qdisc add dev lo root handle 1: htb", // what is in no class is not held back
		fmt.Sprintf("tc class add dev lo parent 1: classid 1:1 htb rate %dbps burst 15k", linkRate),
	} {
		if out, err := h.output(h.command(t.Context(), nil, strings.Fields(args)...)); err != nil {
			cannot(t, "no traffic control: %v %s", err, out)
		}
	}
	h.filter(t, "--table mangle --append OUTPUT -p tcp --sport 8080 -j CLASSIFY --set-class 1:1")
	done := make(chan struct{})
	var seen pauses
	var took time.Duration
	begin := time.Now()
	go func() {
		defer close(done)
		seen = h.watch(t, missing)
		took = time.Since(begin)
	}()
	var hits int64
	for running := true; running; hits++ {
		h.watch(t, stored)
		select {
		case <-done:
			running = false
		case <-time.After(20 * time.Millisecond): // there is another processor's work to do
		}
	}
	beside := time.Since(begin)
	alone := time.Duration(missing.Size) * time.Second / linkRate
	if took < alone*9/10 || took > 2*alone {
		t.Errorf("%d bytes took %v, want about %v", missing.Size, took, alone)
	}
	if seen.longest > alone/2 {
		t.Errorf("nothing came for %v, after %d bytes, want a little at a time", seen.longest, seen.at)
	}
	// No read has a limit: their clients share two processors with those of other tests.
	if read, carried := hits*stored.Size, int64(beside.Seconds()*linkRate); read < 4*carried {
		t.Errorf("%d bytes of what is stored were read while the link carries %d, want far more", read, carried)
	}
	if first, second := up.gets(upstreamAddr, missing), up.gets(secondAddr, missing); len(first) != 1 || len(second) != 0 {
		t.Errorf("upstreams were asked %d and %d times, want the first, once", len(first), len(second))
	}
	t.Logf("F31: %d bytes took %v of a link that needs %v; what is stored was read %d times beside, each time in %v",
		missing.Size, took.Round(time.Millisecond), alone, hits, (beside / time.Duration(hits)).Round(time.Millisecond))
	m.stop(t)
}
