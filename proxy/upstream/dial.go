package upstream

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net"
	"net/http/httptrace"
	"net/netip"
	"slices"
	"sync/atomic"
	"time"
)

// Bounds of what comes before a connection (DESIGN 8).
const (
	lookupTimeout = 2 * time.Second
	dialTimeout   = 3 * time.Second
	attemptDelay  = 250 * time.Millisecond // RFC 8305, "Connection Attempt Delay"
	maxAddresses  = 16                     // of one name; dialTimeout has no room for more
)

// DialError says why there is no connection to a host.
type DialError struct {
	Phase string // dns, dial, proxy, tls; guard: nothing was sent to it, since that is not allowed; setup: we cannot
	Host  string // host:port as it was asked for
	Err   error
}

// Error names the phase and the host.
func (e *DialError) Error() string { return fmt.Sprintf("%s %s: %v", e.Phase, e.Host, e.Err) }

// Unwrap returns what lies beneath.
func (e *DialError) Unwrap() error { return e.Err }

// dialer connects to hosts, but to none that an upstream must not make us reach. What the guard sees
// are the very addresses that are connected to, however they were named and whoever resolved them.
type dialer struct {
	lookup  func(ctx context.Context, host string) ([]netip.Addr, error)        // nil is the system's resolver
	dial    func(ctx context.Context, network, ipport string) (net.Conn, error) // nil is a net.Dialer
	allowed func(hostport string) bool                                          // wherever it is; nil allows only what is public
	refused *atomic.Int64                                                       // by the guard
}

// DialContext connects an http.Transport to host:port. Errors are *DialError, or ctx's if that ended
// first.
func (d *dialer) DialContext(ctx context.Context, network, hostport string) (net.Conn, error) {
	host, port, err := net.SplitHostPort(hostport)
	literal, named := netip.ParseAddr(host)
	if err != nil || !isPort(port) || (named != nil && !isName(host)) {
		d.refused.Add(1)
		return nil, &DialError{Phase: "guard", Host: hostport, Err: errors.New("not a host and port")}
	}
	ips := []netip.Addr{literal}
	if named != nil {
		if ips, err = d.resolve(ctx, host); err != nil {
			return nil, failedIn(ctx, "dns", hostport, err)
		}
	}
	if d.allowed == nil || !d.allowed(hostport) {
		ips = slices.DeleteFunc(slices.Clone(ips), func(ip netip.Addr) bool { return !isPublic(ip) })
	}
	if len(ips) == 0 {
		d.refused.Add(1)
		return nil, &DialError{Phase: "guard", Host: hostport, Err: errors.New("not a public address")}
	}
	conn, err := d.connect(ctx, network, addresses(ips, port))
	if err != nil {
		return nil, failedIn(ctx, "dial", hostport, err)
	}
	return conn, nil
}

func failedIn(ctx context.Context, phase, hostport string, err error) error {
	if ctx.Err() != nil {
		return fmt.Errorf("%s %s: %w", phase, hostport, ctx.Err()) // nobody waits: not the host's fault
	}
	return &DialError{Phase: phase, Host: hostport, Err: err}
}

// resolve looks host up within lookupTimeout. It returns at least one address.
func (d *dialer) resolve(ctx context.Context, host string) (ips []netip.Addr, err error) {
	if trace := httptrace.ContextClientTrace(ctx); trace != nil {
		if trace.DNSStart != nil {
			trace.DNSStart(httptrace.DNSStartInfo{Host: host})
		}
		if trace.DNSDone != nil {
			defer func() {
				info := httptrace.DNSDoneInfo{Err: err}
				for _, ip := range ips {
					info.Addrs = append(info.Addrs, net.IPAddr{IP: ip.AsSlice(), Zone: ip.Zone()})
				}
				trace.DNSDone(info)
			}()
		}
	}
	ctx, cancel := context.WithTimeout(ctx, lookupTimeout)
	defer cancel()
	if d.lookup != nil {
		ips, err = d.lookup(untraced{ctx}, host)
	} else {
		ips, err = net.DefaultResolver.LookupNetIP(untraced{ctx}, "ip", host)
	}
	if err == nil && len(ips) == 0 {
		err = errors.New("no addresses")
	}
	return ips, err
}

// addresses orders what to try: the families in turn, each as resolved (RFC 8305, section 4).
func addresses(ips []netip.Addr, port string) []string {
	var lists [2][]string // the first family, the other
	for _, ip := range ips {
		i := 0
		if ip.Unmap().Is4() != ips[0].Unmap().Is4() {
			i = 1
		}
		lists[i] = append(lists[i], net.JoinHostPort(ip.Unmap().String(), port))
	}
	var ordered []string
	for i := range max(len(lists[0]), len(lists[1])) {
		for _, list := range lists {
			if i < len(list) {
				ordered = append(ordered, list[i])
			}
		}
	}
	return ordered[:min(len(ordered), maxAddresses)]
}

// connect races the addresses within dialTimeout: one more sets out whenever the last one has failed
// or has said nothing for attemptDelay.
func (d *dialer) connect(ctx context.Context, network string, addresses []string) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(ctx, dialTimeout)
	defer cancel() // the losers give up
	type result struct {
		conn net.Conn
		err  error
	}
	results := make(chan result)
	attempt := func(address string) {
		conn, err := d.attempt(ctx, network, address)
		select {
		case results <- result{conn, err}:
		case <-ctx.Done(): // too late
			if err == nil {
				conn.Close()
			}
		}
	}
	next := time.NewTimer(0)
	defer next.Stop()
	var first error // as telling as any
	for started, ended := 0, 0; ended < len(addresses); {
		select {
		case <-next.C:
			go attempt(addresses[started])
			if started++; started < len(addresses) {
				next.Reset(attemptDelay)
			}
		case r := <-results:
			if r.err == nil {
				return r.conn, nil
			}
			first = cmp.Or(first, r.err)
			if ended++; started < len(addresses) {
				next.Reset(0)
			}
		case <-ctx.Done():
			return nil, cmp.Or(first, ctx.Err())
		}
	}
	return nil, first
}

func (d *dialer) attempt(ctx context.Context, network, address string) (conn net.Conn, err error) {
	if trace := httptrace.ContextClientTrace(ctx); trace != nil {
		if trace.ConnectStart != nil {
			trace.ConnectStart(network, address)
		}
		if trace.ConnectDone != nil {
			defer func() { trace.ConnectDone(network, address, err) }()
		}
	}
	if d.dial != nil {
		return d.dial(untraced{ctx}, network, address)
	}
	return new(net.Dialer).DialContext(untraced{ctx}, network, address)
}

// untraced hides a context's values from the system's resolver and dialer: they know the hooks of
// httptrace too, and would fire each a second time.
type untraced struct{ context.Context }

func (untraced) Value(any) any { return nil }
