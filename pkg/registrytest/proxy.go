package registrytest

import (
	"context"
	"fmt"
	"io"
	"net"
	"sync"
)

// Proxy forwards TCP connections on loopback to an address, over a [Link] that can be made bad. What
// a program cannot do is lose a SYN: with BlackHole a connection is made, but nothing passes.
type Proxy struct {
	Address string // where it listens, "127.0.0.1:port"

	between *Network                 // of one address, behind: what lies between the sockets
	enter   func() (net.Conn, error) // connects a client's socket to it
	leave   func() (net.Conn, error) // connects it to the target
	stop    context.CancelFunc       // ends both
	running sync.WaitGroup           // accepting and copying

	mu       sync.Mutex   // guards listener
	listener net.Listener // nil while it refuses
}

// behind is the target's address in the network of a Proxy.
const behind = "target:1"

// NewProxy returns a proxy to a target, "host:port", over a healthy link.
func NewProxy(target string) (*Proxy, error) {
	ctx, stop := context.WithCancel(context.Background())
	p := &Proxy{Address: "127.0.0.1:0", between: NewNetwork(), stop: stop}
	p.enter = func() (net.Conn, error) { return p.between.DialContext(ctx, "tcp", behind) }
	p.leave = func() (net.Conn, error) { return new(net.Dialer).DialContext(ctx, "tcp", target) }
	inner, err := p.between.Listen(behind)
	if err == nil {
		p.running.Go(func() { p.accept(inner, p.leave) })
		err = p.SetLink(Link{})
	}
	if err != nil {
		_ = p.Close()
		return nil, fmt.Errorf("proxy to %s: %w", target, err)
	}
	return p, nil
}

// SetLink changes the way to the target, for the connections that are there too. It fails if the
// proxy's port has been taken by another while it refused.
func (p *Proxy) SetLink(link Link) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if link.Refuse && p.listener != nil {
		_ = p.listener.Close()
		p.listener = nil
	}
	if !link.Refuse && p.listener == nil {
		l, err := net.Listen("tcp", p.Address)
		if err != nil {
			return fmt.Errorf("listen again: %w", err)
		}
		p.listener, p.Address = l, l.Addr().String()
		p.running.Go(func() { p.accept(l, p.enter) })
	}
	p.between.SetLink(behind, link)
	return nil
}

// Drop makes the connections that exist stall for ever; new ones are as the link is.
func (p *Proxy) Drop() { p.between.Drop(behind) }

// Reset ends the connections that exist.
func (p *Proxy) Reset() { p.between.Reset(behind) }

// Connections is how many were made so far.
func (p *Proxy) Connections() int { return len(p.between.Dials(behind)) }

// Close stops listening, resets every connection, and waits for their ends.
func (p *Proxy) Close() error {
	err := p.SetLink(Link{Refuse: true})
	p.stop()
	_ = p.between.Close()
	p.running.Wait()
	return err
}

// accept joins each connection that l has to one of next, until l is closed.
func (p *Proxy) accept(l net.Listener, next func() (net.Conn, error)) {
	for {
		a, err := l.Accept()
		if err != nil {
			return
		}
		p.running.Go(func() {
			defer a.Close()
			b, err := next()
			if err != nil {
				abort(a)
				return
			}
			defer b.Close()
			var back sync.WaitGroup
			back.Go(func() { forward(a, b) })
			forward(b, a)
			back.Wait()
		})
	}
}

// forward copies until src ends, and ends dst in the same way.
func forward(dst, src net.Conn) {
	if _, err := io.Copy(dst, src); err != nil {
		abort(dst)
		abort(src)
		return
	}
	if half, ok := dst.(interface{ CloseWrite() error }); ok {
		_ = half.CloseWrite()
	}
}

// abort closes with a reset.
func abort(c net.Conn) {
	if l, ok := c.(interface{ SetLinger(int) error }); ok {
		_ = l.SetLinger(0)
	}
	_ = c.Close()
}
