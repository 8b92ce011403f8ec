package registrytest

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"sync"
	"syscall"
	"time"
)

// Network is a network in memory: listeners, connections and names. What waits on it blocks
// durably under testing/synctest, so that a time-out of a minute costs nothing; create it inside
// the bubble that uses it. Give its DialContext to an http.Transport, its Lookup to what resolves
// names. Bytes that one end writes are held, 64 KiB at most, until the other reads them.
//
// A host gets a name and a public address of its own when it is first mentioned by Listen or
// SetLink; a dial to that address reaches the host. localhost is at 127.0.0.1, from where it is dialled too.
type Network struct {
	CA *CA // of the certificates that [Registry.Serve] takes for port 443

	// mu guards what is below. It is taken before the lock of a circuit.
	mu        sync.Mutex
	listeners map[string]*listener  // by "host:port"
	links     map[string]Link       // by "host:port"
	hosts     map[string]Host       // by name, as set
	addresses map[string]netip.Addr // by name: each host's own
	circuits  map[*circuit]bool
	relinked  chan struct{} // closed and replaced when a link changes
	dials     []Event
	lookups   []Event
	ports     int
}

// Link is how the way to one address is. The zero Link is a healthy one.
type Link struct {
	Refuse    bool          // dialling ends at once with ECONNREFUSED
	BlackHole bool          // nothing passes: dialling blocks, connections stall, until the link is another
	Silent    bool          // connections are made, but then nothing passes
	Latency   time.Duration // of a round trip: dialling takes one, a byte half of one

	// Of each connection, counted in the bytes that the listening end has sent. 0 is never.
	CutAfter   int64 // it ends cleanly, too early
	ResetAfter int64 // it is reset
	StallAfter int64 // nothing passes any more
}

func (l Link) passes() bool { return !l.BlackHole && !l.Silent }

// breaksAt is the first byte that does not pass, 0 for none.
func (l Link) breaksAt() int64 {
	var first int64
	for _, n := range []int64{l.CutAfter, l.ResetAfter, l.StallAfter} {
		if n > 0 && (first == 0 || n < first) {
			first = n
		}
	}
	return first
}

// Host is what is answered for a name. The zero Host is found at the address that the Network gave it.
type Host struct {
	Addresses []netip.Addr // others, such as private ones; they lead to the host too
	Code      RCode
	Delay     time.Duration
}

// RCode is the outcome of a query (RFC 1035, section 4.1.1), or NoData (RFC 2308, section 2.2).
type RCode int

// The outcomes that a Host may have.
const (
	NoError  RCode = 0
	ServFail RCode = 2
	NXDomain RCode = 3
	NoData   RCode = -1 // an answer without addresses
)

// Event is one dial ("host:port", or "ip:port" if no host has that address) or look-up.
type Event struct {
	At      time.Time
	Address string
}

// NewNetwork returns a network on which nothing listens.
func NewNetwork() *Network {
	return &Network{
		CA:        NewCA(),
		listeners: map[string]*listener{},
		links:     map[string]Link{},
		hosts:     map[string]Host{},
		addresses: map[string]netip.Addr{},
		circuits:  map[*circuit]bool{},
		relinked:  make(chan struct{}),
	}
}

// Listen takes "host:port".
func (n *Network) Listen(address string) (net.Listener, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.listeners[address] != nil {
		return nil, &net.OpError{Op: "listen", Net: "tcp", Err: os.NewSyscallError("bind", syscall.EADDRINUSE)}
	}
	ip, port, err := n.place(address)
	if err != nil {
		return nil, fmt.Errorf("listen on %q: %w", address, err)
	}
	l := &listener{network: n, address: address, addr: net.TCPAddrFromAddrPort(netip.AddrPortFrom(ip, port)),
		backlog: make(chan *conn, 128), closed: make(chan struct{})}
	n.listeners[address] = l
	return l, nil
}

// SetLink changes the way to "host:port", for the connections that are there too.
func (n *Network) SetLink(address string, link Link) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if _, _, err := n.place(address); err != nil {
		panic(fmt.Sprintf("registrytest: link to %q: %v", address, err))
	}
	n.links[address] = link
	close(n.relinked)
	n.relinked = make(chan struct{})
	for c := range n.circuits {
		if c.addr == address {
			c.set(func() { c.link = link })
		}
	}
}

// Drop makes the connections that exist to "host:port" stall for ever, as a firewall does that has
// forgotten them; new ones are as the link is.
func (n *Network) Drop(address string) { n.each(address, (*circuit).drop) }

// Reset ends the connections that exist to "host:port", as a host does that has been restarted.
func (n *Network) Reset(address string) { n.each(address, (*circuit).reset) }

func (n *Network) each(address string, act func(*circuit)) {
	n.mu.Lock()
	defer n.mu.Unlock()
	for c := range n.circuits {
		if c.addr == address {
			c.set(func() { act(c) })
		}
	}
}

// SetHost changes what Lookup answers for a name.
func (n *Network) SetHost(name string, host Host) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if _, err := n.own(name); err != nil {
		panic(fmt.Sprintf("registrytest: host %q: %v", name, err))
	}
	n.hosts[name] = host
}

// Dials is what was dialled so far: at "host:port", or everything for "".
func (n *Network) Dials(address string) []Event { return n.events(&n.dials, address) }

// Lookups is which names were asked for so far: that one, or all for "".
func (n *Network) Lookups(name string) []Event { return n.events(&n.lookups, name) }

func (n *Network) events(log *[]Event, address string) []Event {
	n.mu.Lock()
	defer n.mu.Unlock()
	var found []Event
	for _, e := range *log {
		if address == "" || e.Address == address {
			found = append(found, e)
		}
	}
	return found
}

// Close closes every listener and resets every connection.
func (n *Network) Close() error {
	n.mu.Lock()
	defer n.mu.Unlock()
	for _, l := range n.listeners {
		l.close()
	}
	for c := range n.circuits {
		c.set(c.reset)
	}
	return nil
}

// Lookup answers as net.Resolver's LookupNetIP does: an IP address is its own answer, without a
// query; errors are *net.DNSError.
func (n *Network) Lookup(ctx context.Context, name string) ([]netip.Addr, error) {
	if ip, err := netip.ParseAddr(name); err == nil {
		return []netip.Addr{ip}, nil
	}
	n.mu.Lock()
	n.lookups = append(n.lookups, Event{time.Now(), name})
	host := n.hosts[name]
	addresses := n.reach(name)
	n.mu.Unlock()
	if err := sleep(ctx, host.Delay); err != nil {
		return nil, &net.DNSError{Err: err.Error(), Name: name, UnwrapErr: err, IsTimeout: errors.Is(err, context.DeadlineExceeded)}
	}
	switch {
	case host.Code == ServFail:
		return nil, &net.DNSError{Err: "server misbehaving", Name: name, IsTemporary: true}
	case host.Code == NoData:
		return nil, nil
	case host.Code == NXDomain, len(addresses) == 0:
		return nil, &net.DNSError{Err: "no such host", Name: name, IsNotFound: true}
	}
	return addresses, nil
}

// reach is the addresses that lead to a host: none if there is no such host. With the lock held.
func (n *Network) reach(name string) []netip.Addr {
	if set := n.hosts[name].Addresses; len(set) > 0 {
		return slices.Clone(set)
	}
	if own, known := n.addresses[name]; known {
		return []netip.Addr{own}
	}
	return nil
}

// DialContext connects to "host:port", after a Lookup, or to "ip:port", as net.Dialer does. Errors
// are *net.OpError.
func (n *Network) DialContext(ctx context.Context, network, address string) (net.Conn, error) {
	fail := func(err error) (net.Conn, error) {
		return nil, &net.OpError{Op: "dial", Net: network, Err: err}
	}
	name, port, err := net.SplitHostPort(address)
	if err != nil {
		return fail(err)
	}
	addresses, err := n.Lookup(ctx, name)
	if err != nil {
		return fail(err)
	}
	if len(addresses) == 0 {
		return fail(&net.AddrError{Err: "no address", Addr: address})
	}
	target := n.target(name, port)
	for {
		n.mu.Lock()
		link, relinked := n.links[target], n.relinked
		n.mu.Unlock()
		if !link.BlackHole {
			if err := sleep(ctx, link.Latency); err != nil {
				return fail(err)
			}
			break
		}
		select {
		case <-ctx.Done():
			return fail(ctx.Err())
		case <-relinked: // as a lost SYN is sent again
		}
	}
	c, err := n.connect(ctx, target)
	if err != nil {
		return fail(err)
	}
	return c, nil
}

// target is the "host:port" at which a dial arrives; it notes the dial.
func (n *Network) target(name, port string) string {
	n.mu.Lock()
	defer n.mu.Unlock()
	target := net.JoinHostPort(name, port)
	if ip, err := netip.ParseAddr(name); err == nil && n.listeners[target] == nil {
		target = n.hostAt(ip.Unmap(), port)
	}
	n.dials = append(n.dials, Event{time.Now(), target})
	return target
}

// hostAt is the "host:port" of the host with that address, one that listens there if several have
// it, or "ip:port". With the lock held.
func (n *Network) hostAt(ip netip.Addr, port string) string {
	found := net.JoinHostPort(ip.String(), port)
	for _, host := range slices.Backward(slices.Sorted(maps.Keys(n.addresses))) {
		at := net.JoinHostPort(host, port)
		if slices.Contains(n.reach(host), ip) && (n.listeners[at] != nil || n.listeners[found] == nil) {
			found = at
		}
	}
	return found
}

func (n *Network) connect(ctx context.Context, target string) (*conn, error) {
	n.mu.Lock()
	l, link := n.listeners[target], n.links[target]
	if l == nil || link.Refuse {
		n.mu.Unlock()
		return nil, os.NewSyscallError("connect", syscall.ECONNREFUSED)
	}
	n.ports++
	client := &net.TCPAddr{IP: net.IPv4(192, 0, 2, 1), Port: 32768 + n.ports%28232}
	if at, ok := l.addr.(*net.TCPAddr); ok && at.IP.IsLoopback() {
		client.IP = at.IP
	}
	c := newCircuit(target, link, client, l.addr)
	c.done = func() {
		n.mu.Lock()
		defer n.mu.Unlock()
		delete(n.circuits, c)
	}
	n.circuits[c] = true
	n.mu.Unlock()
	select {
	case l.backlog <- c.server:
		select {
		case <-l.closed: // it may have emptied its backlog before
			c.set(c.reset)
		default:
		}
		return c.client, nil
	case <-l.closed:
		c.done()
		return nil, os.NewSyscallError("connect", syscall.ECONNREFUSED)
	case <-ctx.Done():
		c.done()
		return nil, ctx.Err()
	}
}

// place gives the host of "host:port" an address if it has none. With the lock held.
func (n *Network) place(address string) (netip.Addr, uint16, error) {
	name, service, err := net.SplitHostPort(address)
	if err != nil {
		return netip.Addr{}, 0, err
	}
	port, err := strconv.ParseUint(service, 10, 16)
	if err != nil {
		return netip.Addr{}, 0, err
	}
	if ip, err := netip.ParseAddr(name); err == nil {
		return ip, uint16(port), nil
	}
	ip, err := n.own(name)
	return ip, uint16(port), err
}

// own is the host's own address. With the lock held.
func (n *Network) own(name string) (netip.Addr, error) {
	if ip, known := n.addresses[name]; known {
		return ip, nil
	}
	if name == "localhost" {
		n.addresses[name] = netip.AddrFrom4([4]byte{127, 0, 0, 1})
		return n.addresses[name], nil
	}
	// 198.51.100.0/24 is for documentation (RFC 5737): no guard takes it for private, and no packet
	// that escaped would reach anybody.
	last := len(n.addresses) + 1
	if last > 254 {
		return netip.Addr{}, errors.New("no address is left")
	}
	n.addresses[name] = netip.AddrFrom4([4]byte{198, 51, 100, byte(last)})
	return n.addresses[name], nil
}

type listener struct {
	network *Network
	address string
	addr    net.Addr
	backlog chan *conn
	closed  chan struct{}
}

func (l *listener) Addr() net.Addr { return l.addr }

func (l *listener) Accept() (net.Conn, error) {
	select {
	case <-l.closed:
	case c := <-l.backlog:
		return c, nil
	}
	return nil, &net.OpError{Op: "accept", Net: "tcp", Addr: l.addr, Err: net.ErrClosed}
}

// Close resets the connections that nobody has accepted.
func (l *listener) Close() error {
	l.network.mu.Lock()
	defer l.network.mu.Unlock()
	l.close()
	return nil
}

func (l *listener) close() {
	if l.network.listeners[l.address] != l {
		return
	}
	delete(l.network.listeners, l.address)
	close(l.closed)
	for {
		select {
		case c := <-l.backlog:
			c.set(c.reset)
		default:
			return
		}
	}
}

// sleep waits, or returns ctx's error.
func sleep(ctx context.Context, d time.Duration) error {
	if d <= 0 {
		return ctx.Err()
	}
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}
