// Package upstream hides how one upstream registry is asked: connections and whom they may reach,
// credentials and tokens, the bounds of every phase, and the breakers that keep a sick upstream from
// being asked at all. Whatever an upstream does, an answer or an *Error comes within ten seconds.
package upstream

import (
	"context"
	"crypto/tls"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptrace"
	"net/netip"
	"sync"
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
	dialer   *dialer

	mu      sync.Mutex // guards what follows; nothing is called under it
	clients map[string][]*Client
	known   map[string]bool  // host:port of the configured upstreams
	holds   map[string]*hold // 429, by host and credential
	any     bool
	closed  bool
}

// NewPool returns a pool without upstreams.
func NewPool(settings Settings) *Pool {
	if settings.Logger == nil {
		settings.Logger = slog.New(slog.DiscardHandler)
	}
	p := &Pool{settings: settings, clients: map[string][]*Client{}, known: map[string]bool{}, holds: map[string]*hold{}}
	p.dialer = &dialer{lookup: settings.Lookup, dial: settings.Dial, allowed: p.configured}
	return p
}

// Use makes these the upstreams of the pool, in order within their registry. An upstream that it
// already had, unchanged, keeps its breakers and tokens. With anyRegistry set, registries that are
// not named here are asked at https://REGISTRY, if that is a public address.
func (p *Pool) Use(configs []Config, anyRegistry AnyRegistry) error {
	next, known := map[string][]*Client{}, map[string]bool{}
	p.mu.Lock()
	have := map[Config]*Client{}
	for _, list := range p.clients {
		for _, c := range list {
			have[c.cfg] = c
		}
	}
	p.mu.Unlock()
	for _, cfg := range configs {
		c := have[cfg]
		if c == nil {
			var err error
			if c, err = newClient(p, cfg); err != nil {
				return err
			}
		}
		delete(have, cfg)
		next[cfg.Registry] = append(next[cfg.Registry], c)
		known[hostPort(c.base)] = true
	}
	p.mu.Lock()
	p.clients, p.known, p.any = next, known, bool(anyRegistry)
	p.mu.Unlock()
	for _, c := range have {
		c.close()
	}
	return nil
}

// AnyRegistry says whether registries outside the configuration may be asked.
type AnyRegistry bool

// Clients returns the upstreams of a registry in the order in which they are asked, none for a
// registry that is not configured.
func (p *Pool) Clients(registry string) []*Client {
	p.mu.Lock()
	list := p.clients[registry]
	settled := list != nil || !p.any || p.closed || len(p.clients) >= maxAnyRegistry
	p.mu.Unlock()
	if settled {
		return list
	}
	c, err := newClient(p, Config{Registry: registry, URL: "https://" + registry})
	if err != nil {
		return nil
	}
	p.mu.Lock()
	if p.clients[registry] == nil && p.any && !p.closed {
		p.clients[registry], c = []*Client{c}, nil
	}
	list = p.clients[registry]
	p.mu.Unlock()
	if c != nil { // somebody else was faster
		c.close()
	}
	return list
}

// All returns every client, in no order.
func (p *Pool) All() []*Client {
	p.mu.Lock()
	defer p.mu.Unlock()
	var all []*Client
	for _, list := range p.clients {
		all = append(all, list...)
	}
	return all
}

// Close ends the probes and closes idle connections. Bodies that are being read are not cut.
func (p *Pool) Close() {
	p.mu.Lock()
	p.closed = true
	p.mu.Unlock()
	for _, c := range p.All() {
		c.close()
	}
}

// Refused is how many connections the guard has refused so far, since nothing configured is where
// they would have gone: an upstream tried to make us reach it.
func (p *Pool) Refused() int64 { return p.dialer.refused.Load() }

func (p *Pool) configured(hostport string) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.known[hostport]
}

// hold is the pause that a 429 of this host asks of this credential.
func (p *Pool) hold(key string) *hold {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.holds[key] == nil {
		p.holds[key] = &hold{}
	}
	return p.holds[key]
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

// transport returns a transport over the guarded dialer. TLS is ours too, so that its failures are
// told from those of the request.
func (p *Pool) transport() *http.Transport {
	protocols := new(http.Protocols)
	protocols.SetHTTP1(true)
	return &http.Transport{
		DialContext:            p.dialer.DialContext,
		DialTLSContext:         p.dialTLS,
		Protocols:              protocols,
		DisableCompression:     true, // digests are of the bytes as sent
		ResponseHeaderTimeout:  firstByteTimeout,
		IdleConnTimeout:        idleTimeout,
		MaxIdleConnsPerHost:    64,
		MaxResponseHeaderBytes: maxHeaderBytes,
		ReadBufferSize:         64 << 10,
	}
}

func (p *Pool) dialTLS(ctx context.Context, network, addr string) (net.Conn, error) {
	raw, err := p.dialer.DialContext(ctx, network, addr)
	if err != nil {
		return nil, err
	}
	cfg := p.settings.TLS.Clone()
	if cfg == nil {
		cfg = &tls.Config{}
	}
	if cfg.ServerName == "" {
		cfg.ServerName, _, _ = net.SplitHostPort(addr)
	}
	cfg.NextProtos = []string{"http/1.1"}
	ctx, cancel := context.WithTimeout(ctx, tlsTimeout)
	defer cancel()
	conn := tls.Client(raw, cfg)
	err = conn.HandshakeContext(ctx)
	if trace := httptrace.ContextClientTrace(ctx); trace != nil && trace.TLSHandshakeDone != nil {
		trace.TLSHandshakeDone(conn.ConnectionState(), err)
	}
	if err != nil {
		raw.Close()
		return nil, &DialError{Phase: "tls", Host: addr, Err: err}
	}
	return conn, nil
}
