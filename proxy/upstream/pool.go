// Package upstream hides how one upstream registry is asked: connections and whom they may reach,
// credentials and tokens, the bounds of every phase, and the breakers that keep a sick upstream from
// being asked at all. Every hop of a request ends within ten seconds, and a body that stalls within
// fifteen, whatever an upstream does.
package upstream

import (
	"context"
	"crypto/tls"
	"log/slog"
	"net"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"time"
)

// Bounds of each phase of a request (DESIGN 8); those of DNS and dial are the dialer's.
const (
	tlsTimeout       = 4 * time.Second
	firstByteTimeout = 5 * time.Second
	headerTimeout    = 10 * time.Second // the whole request, token and redirects included
	idleTimeout      = 90 * time.Second
	maxHeaderBytes   = 64 << 10 // signed redirects are long, nothing else is
	maxAnyRegistry   = 1000     // registries that only any_registry made known
	maxHolds         = 10_000   // hosts that have answered 429
)

// Settings are what all upstreams of a process share.
type Settings struct {
	Logger *slog.Logger // nil discards
	// Lookup and Dial replace the system's resolver and dialer; nil for those.
	Lookup func(ctx context.Context, host string) ([]netip.Addr, error)
	Dial   func(ctx context.Context, network, ipport string) (net.Conn, error)
	TLS    *tls.Config // nil for Go's defaults
}

// Pool holds the clients of all configured upstreams and what they share: what is known of a host is
// known to every registry that it fronts.
type Pool struct {
	settings Settings
	refused  atomic.Int64 // connections, by the guard

	mu      sync.Mutex           // guards what follows; nothing is called under it
	clients map[string][]*Client // of the configured registries
	guests  map[string]*Client   // of those that only any_registry lets in
	retired []*Client            // no longer configured; what they began may go on
	known   map[string]bool      // host:port of the configured upstreams
	holds   map[string]*hold     // 429, by host and credential
	back    map[string]*recovery // by host:port
	any     bool
	closed  bool
}

// NewPool returns a pool without upstreams.
func NewPool(settings Settings) *Pool {
	if settings.Logger == nil {
		settings.Logger = slog.New(slog.DiscardHandler)
	}
	return &Pool{settings: settings, clients: map[string][]*Client{}, guests: map[string]*Client{}, known: map[string]bool{}, holds: map[string]*hold{}, back: map[string]*recovery{}}
}

// Prepare returns what makes these the upstreams of the pool, in order within their registry; until it is
// called, and if there is an error, nothing changes. An upstream that the pool already had, unchanged, keeps
// its breakers and tokens; one that it has no more finishes what it has begun. With anyRegistry set,
// registries that are not named here are asked at https://REGISTRY, if that is a public address.
func (p *Pool) Prepare(configs []Config, anyRegistry AnyRegistry) (use func(), err error) {
	next, known := map[string][]*Client{}, map[string]bool{}
	p.mu.Lock()
	var have []*Client
	for _, list := range p.clients {
		have = append(have, list...)
	}
	p.mu.Unlock()
	for _, cfg := range configs {
		var c *Client
		if i := slices.IndexFunc(have, func(c *Client) bool { return c.cfg.Equal(cfg) }); i >= 0 {
			c = have[i]
			have = slices.Delete(have, i, i+1)
		} else {
			var err error
			if c, err = newClient(p, cfg); err != nil {
				return nil, err
			}
		}
		next[cfg.Registry] = append(next[cfg.Registry], c)
		known[hostPort(c.base)] = true
	}
	return func() {
		p.mu.Lock()
		p.clients, p.known, p.any = next, known, bool(anyRegistry)
		for registry, c := range p.guests {
			if next[registry] != nil || !p.any {
				delete(p.guests, registry)
				have = append(have, c)
			}
		}
		p.retired = append(p.retired, have...)
		p.mu.Unlock()
		for _, c := range have {
			c.retire()
		}
	}, nil
}

// AnyRegistry says whether registries outside the configuration may be asked.
type AnyRegistry bool

// Clients returns the upstreams of a registry in the order in which they are asked, none for a
// registry that is not configured.
func (p *Pool) Clients(registry string) []*Client {
	p.mu.Lock()
	list, guest := p.clients[registry], p.guests[registry]
	closed := !p.any || p.closed
	p.mu.Unlock()
	if list != nil || closed {
		return list
	}
	if guest == nil {
		guest = p.invite(registry)
	}
	if guest == nil {
		return nil
	}
	return []*Client{guest}
}

// invite makes a client for a registry that is not configured. There is room for maxAnyRegistry of
// them; beyond that any other one has to go.
func (p *Pool) invite(registry string) *Client {
	c, err := newClient(p, Config{Registry: registry, URL: "https://" + registry})
	if err != nil {
		return nil
	}
	var gone *Client
	p.mu.Lock()
	if faster := p.guests[registry]; faster != nil || p.closed {
		gone, c = c, faster
	} else {
		if len(p.guests) >= maxAnyRegistry {
			for name, other := range p.guests {
				delete(p.guests, name)
				gone = other
				break
			}
		}
		p.guests[registry] = c
	}
	if gone != nil {
		p.retired = append(p.retired, gone)
	}
	p.mu.Unlock()
	if gone != nil {
		gone.retire()
	}
	return c
}

// All returns every client, in no order.
func (p *Pool) All() []*Client {
	p.mu.Lock()
	defer p.mu.Unlock()
	var all []*Client
	for _, list := range p.clients {
		all = append(all, list...)
	}
	for _, c := range p.guests {
		all = append(all, c)
	}
	return all
}

// Out reports whether a registry could give nothing back now: none of its upstreams' blob breakers is
// closed.
func (p *Pool) Out(registry string) bool {
	p.mu.Lock()
	list := p.clients[registry]
	if guest := p.guests[registry]; guest != nil {
		list = []*Client{guest}
	}
	p.mu.Unlock()
	return len(list) > 0 && !slices.ContainsFunc(list, func(c *Client) bool {
		return c.breakers[classBlob].state().Name == stateClosed && c.breakers[classManifest].state().Name == stateClosed
	})
}

// Close ends the probes and closes idle connections. Bodies that are being read are not cut.
func (p *Pool) Close() {
	p.mu.Lock()
	p.closed = true
	retired := p.retired
	p.mu.Unlock()
	for _, c := range append(p.All(), retired...) {
		c.retire()
		c.auth.close()
	}
}

// Refused is how many connections the guard has refused so far, since nothing configured is where
// they would have gone: an upstream tried to make us reach it.
func (p *Pool) Refused() int64 { return p.refused.Load() }

func (p *Pool) configured(hostport string) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.known[hostport]
}

// hold is the pause that a 429 of this host asks of this credential.
func (p *Pool) hold(key string) *hold {
	p.mu.Lock()
	defer p.mu.Unlock()
	if len(p.holds) > maxHolds {
		clear(p.holds) // an upstream may redirect to any number of hosts; the clients keep their own
	}
	if p.holds[key] == nil {
		p.holds[key] = &hold{}
	}
	return p.holds[key]
}

// recovery is what bounds the requests to a host that has just come back.
func (p *Pool) recovery(hostport string) *recovery {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.back[hostport] == nil {
		p.back[hostport] = newRecovery()
	}
	return p.back[hostport]
}

// hostFailed tells every breaker behind that host:port that it cannot be connected to.
func (p *Pool) hostFailed(hostport, reason string, except *breaker) {
	for _, c := range p.All() {
		for _, b := range c.breakersOf(hostport) {
			if b != except {
				b.fail("", hostFailure, reason)
			}
		}
	}
}
