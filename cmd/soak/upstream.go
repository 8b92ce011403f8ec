package main

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"net"
	"net/http"
	"path"
	"strconv"
	"sync"
	"time"

	"breakwater/pkg/registrytest"
)

const upstreamCount = 3

// upstream is a registry whose weather changes. The first serves blobs itself, the second wants tokens,
// the third redirects to a CDN; tokens and CDN share the weather.
type upstream struct {
	index    int
	url      string
	cdn      string // host:port; "" for none
	registry *registrytest.Registry
	hosts    []*host
	random   *rand.Rand // the weather's own

	mu     sync.Mutex // guards what follows
	dice   *rand.Rand // the requests'
	now    string     // the weather
	served map[string]int
}

// host is one address of an upstream.
type host struct {
	address string
	server  *registrytest.Server // nil while it refuses
}

// newUpstream listens where nobody else on this machine is likely to want the port: while it refuses,
// any connection that a client makes from 127.0.0.1 could get it.
func newUpstream(index int, seed uint64) (*upstream, error) {
	u := &upstream{
		index:    index,
		registry: registrytest.New(registrytest.Config{}),
		random:   rand.New(rand.NewPCG(seed, 10+uint64(index))),
		dice:     rand.New(rand.NewPCG(seed, 20+uint64(index))),
		now:      "up",
		served:   map[string]int{},
	}
	address := fmt.Sprintf("127.0.0.%d:0", 2+index)
	u.hosts = []*host{{address: address}}
	if index == 2 {
		u.hosts = append(u.hosts, &host{address: address})
	}
	if err := u.listen(); err != nil {
		return nil, errors.Join(err, u.close())
	}
	u.url = u.hosts[0].server.URL
	switch index {
	case 1:
		u.registry.Configure(registrytest.Config{Auth: registrytest.Auth{Scheme: "Bearer", Service: "soak"}})
	case 2:
		u.cdn = u.hosts[1].address
		u.registry.Configure(registrytest.Config{CDN: u.hosts[1].server.URL})
	}
	return u, nil
}

func (u *upstream) listen() error {
	for _, h := range u.hosts {
		if h.server != nil {
			continue
		}
		l, err := net.Listen("tcp", h.address)
		if err != nil {
			return fmt.Errorf("upstream %d: %w", u.index, err)
		}
		h.address = l.Addr().String() // the same one after each refusal
		h.server = registrytest.Serve(l, u)
	}
	return nil
}

// close refuses connections, and cuts those that there are.
func (u *upstream) close() error {
	var err error
	for _, h := range u.hosts {
		if h.server != nil {
			err = errors.Join(err, h.server.Close())
			h.server = nil
		}
	}
	return err
}

// ServeHTTP counts requests by weather.
func (u *upstream) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	u.mu.Lock()
	u.served[u.now]++
	u.mu.Unlock()
	u.registry.ServeHTTP(w, r)
}

// roll is a random number below n, for a request.
func (u *upstream) roll(n int) int {
	u.mu.Lock()
	defer u.mu.Unlock()
	return u.dice.IntN(n)
}

func (u *upstream) present() string {
	u.mu.Lock()
	defer u.mu.Unlock()
	return u.now
}

// requests is how many came by weather.
func (u *upstream) requests() map[string]int {
	u.mu.Lock()
	defer u.mu.Unlock()
	return maps.Clone(u.served)
}

// spells are the kinds of weather, up apart: what happens to a request. nil is nobody to ask.
var spells = []struct {
	name  string
	fault func(*upstream) registrytest.Fault
}{
	{"down", nil},
	{"hanging", (*upstream).hang},
	{"slow", (*upstream).slow},
	{"cutting", (*upstream).cut},
	{"lying", (*upstream).lie},
	{"failing", (*upstream).fail},
	{"throttling", (*upstream).throttle},
}

// weather changes until ctx ends, and is fair then. Half of the spells are fair.
func (u *upstream) weather(ctx context.Context) error {
	for fair := u.random.IntN(2) == 0; ctx.Err() == nil; fair = !fair {
		length := time.Duration(2000+u.random.IntN(6000)) * time.Millisecond
		if fair {
			if err := u.clear(); err != nil {
				return err
			}
			wait(ctx, length)
			continue
		}
		spell := spells[u.random.IntN(len(spells))]
		u.mu.Lock()
		u.now = spell.name
		u.mu.Unlock()
		if spell.fault == nil {
			if err := u.close(); err != nil {
				return err
			}
		} else {
			u.registry.Fault(registrytest.Match{}, spell.fault(u))
		}
		wait(ctx, length)
		if err := u.clear(); err != nil {
			return err
		}
	}
	return u.clear()
}

func (u *upstream) clear() error {
	u.mu.Lock()
	u.now = "up"
	u.mu.Unlock()
	u.registry.Heal()
	u.registry.Forget() // five minutes of requests are much to remember
	return u.listen()
}

// hang does not answer, or stops in the middle of its answer.
func (u *upstream) hang() registrytest.Fault {
	return func(w http.ResponseWriter, r *http.Request, next http.Handler) {
		fault := registrytest.Hang()
		if u.roll(3) == 0 {
			fault = registrytest.Stall(u.offset())
		}
		fault(w, r, next)
	}
}

// slow is late, and then sends little at a time.
func (u *upstream) slow() registrytest.Fault {
	return func(w http.ResponseWriter, r *http.Request, next http.Handler) {
		late := time.Duration(u.roll(4000)) * time.Millisecond
		drips := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			registrytest.Drip(32<<10, 100*time.Millisecond)(w, r, next)
		})
		registrytest.Delay(late)(w, r, drips)
	}
}

// cut ends bodies somewhere, half of them by a reset; those that are shorter come whole.
func (u *upstream) cut() registrytest.Fault {
	return func(w http.ResponseWriter, r *http.Request, next http.Handler) {
		fault := registrytest.Truncate(u.offset())
		if u.roll(2) == 0 {
			fault = registrytest.Reset(u.offset())
		}
		fault(w, r, next)
	}
}

// lie changes a bit of each body, but not of all content: for each digest there is an upstream that
// never lies, or all three could have lied about one, and none would be asked again for ten minutes.
func (u *upstream) lie() registrytest.Fault {
	return func(w http.ResponseWriter, r *http.Request, next http.Handler) {
		name := path.Base(r.URL.Path)
		last, err := strconv.ParseUint(name[len(name)-1:], 16, 8)
		if err == nil && int(last)%upstreamCount != u.index {
			registrytest.FlipBit(u.offset())(w, r, next)
			return
		}
		next.ServeHTTP(w, r)
	}
}

func (u *upstream) fail() registrytest.Fault {
	return func(w http.ResponseWriter, r *http.Request, next http.Handler) {
		status := []int{http.StatusInternalServerError, http.StatusBadGateway, http.StatusServiceUnavailable}[u.roll(3)]
		registrytest.Status(status)(w, r, next)
	}
}

func (u *upstream) throttle() registrytest.Fault {
	return func(w http.ResponseWriter, r *http.Request, next http.Handler) {
		registrytest.Status(http.StatusTooManyRequests, "Retry-After", strconv.Itoa(1+u.roll(4)))(w, r, next)
	}
}

// offset is where in a body something happens; small ones are hit as often as large ones.
func (u *upstream) offset() int64 {
	return int64(u.roll(1 << (1 + u.roll(20))))
}
