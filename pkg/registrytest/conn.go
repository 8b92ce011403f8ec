package registrytest

import (
	"errors"
	"io"
	"net"
	"os"
	"sync"
	"syscall"
	"time"
)

// window is how many bytes a connection holds between its two ends before a write waits. It is
// small beside what kernels hold, so that a writer soon feels a slow reader.
const window = 64 << 10

// never is when a segment arrives that is lost, and what comes after it.
var never = time.Unix(1<<40, 0)

// circuit is one connection of a [Network], both of its ends. It waits on a sync.Cond, which
// synctest counts as durable, and never while it holds the lock.
type circuit struct {
	addr    string // "host:port" of the end that listens
	changed sync.Cond
	done    func() // called when both ends are closed

	// mu guards what is below, and both ends.
	mu      sync.Mutex
	link    Link
	dropped bool
	client  *conn
	server  *conn
}

// conn is one end: a net.Conn that also has *net.TCPConn's CloseWrite and SetLinger.
type conn struct {
	*circuit
	peer          *conn
	local, remote net.Addr
	inbox         []segment // what the peer wrote and this end has not read yet
	held          int       // bytes in inbox
	received      int64     // bytes that ever came
	shut          bool      // this end writes no more
	closed        bool
	linger        int
	reading       deadline
	writing       deadline
}

// segment is bytes on their way, or what ends them: io.EOF or ECONNRESET.
type segment struct {
	at   time.Time // when it arrives; zero is at once
	data []byte
	end  error
}

type deadline struct {
	at    time.Time
	timer *time.Timer
}

func (d *deadline) passed() bool { return !d.at.IsZero() && !time.Now().Before(d.at) }

func newCircuit(addr string, link Link, client, server net.Addr) *circuit {
	c := &circuit{addr: addr, link: link}
	c.changed.L = &c.mu
	c.client = &conn{circuit: c, local: client, remote: server, linger: -1}
	c.server = &conn{circuit: c, local: server, remote: client, linger: -1, peer: c.client}
	c.client.peer = c.server
	return c
}

// set changes the connection and wakes all who wait for it.
func (c *circuit) set(change func()) {
	c.mu.Lock()
	defer c.mu.Unlock()
	change()
	c.changed.Broadcast()
}

// drop loses all that either end sends from now on. With the lock held.
func (c *circuit) drop() {
	c.dropped = true
	for _, end := range []*conn{c.client, c.server} {
		end.inbox = append(end.inbox, segment{at: never})
	}
}

// sever ends both directions, behind what has been sent. With the lock held.
func (c *circuit) sever(end error) {
	for _, from := range []*conn{c.client, c.server} {
		from.shut = true
		from.deliver(segment{end: end})
	}
}

// reset ends both directions at once, whatever the link says. With the lock held.
func (c *circuit) reset() {
	c.link, c.dropped = Link{}, false
	for _, to := range []*conn{c.client, c.server} {
		to.shut, to.held = true, 0
		to.inbox = []segment{{end: syscall.ECONNRESET}}
	}
}

func (c *conn) Read(b []byte) (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for {
		switch {
		case c.closed:
			return 0, c.fail("read", net.ErrClosed)
		case c.reading.passed():
			return 0, c.fail("read", os.ErrDeadlineExceeded)
		case len(b) == 0:
			return 0, nil
		case c.arrived():
			return c.take(b)
		}
		c.changed.Wait()
	}
}

// arrived reports whether the next segment is here.
func (c *conn) arrived() bool {
	return c.link.passes() && len(c.inbox) > 0 && !time.Now().Before(c.inbox[0].at)
}

// take reads what is here. An end stays in the inbox for the reads that follow.
func (c *conn) take(b []byte) (n int, err error) {
	for n < len(b) && c.arrived() {
		next := &c.inbox[0]
		if next.end != nil {
			break
		}
		copied := copy(b[n:], next.data)
		n += copied
		if next.data = next.data[copied:]; len(next.data) == 0 {
			c.inbox = c.inbox[1:]
		}
	}
	if n > 0 {
		c.held -= n
		c.changed.Broadcast()
		return n, nil
	}
	if end := c.inbox[0].end; !errors.Is(end, io.EOF) {
		return 0, c.fail("read", os.NewSyscallError("read", end))
	}
	return 0, io.EOF
}

func (c *conn) Write(b []byte) (n int, err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for {
		err, room := c.unwritable(), window-c.peer.held
		switch {
		case err != nil || n == len(b):
			return n, err
		case room > 0:
			n += c.send(b[n:min(len(b), n+room)])
		default:
			c.changed.Wait()
		}
	}
}

// ReadFrom sends what r has. As the kernel does with a file that it is handed, it takes from r only
// what it can send at once: when a deadline passes, r stands where the rest begins.
func (c *conn) ReadFrom(r io.Reader) (n int64, err error) {
	piece := make([]byte, 32<<10)
	for {
		room, err := c.awaitRoom()
		if err != nil {
			return n, err
		}
		read, err := r.Read(piece[:min(len(piece), room)])
		sent, failed := c.Write(piece[:read])
		n += int64(sent)
		switch {
		case failed != nil:
			return n, failed
		case errors.Is(err, io.EOF):
			return n, nil
		case err != nil:
			return n, err
		}
	}
}

// awaitRoom waits until something can be written, and returns how much.
func (c *conn) awaitRoom() (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for {
		if err := c.unwritable(); err != nil {
			return 0, err
		}
		if room := window - c.peer.held; room > 0 {
			return room, nil
		}
		c.changed.Wait()
	}
}

// unwritable is why nothing can be written, whether or not there is room. With the lock held.
func (c *conn) unwritable() error {
	switch {
	case c.closed:
		return c.fail("write", net.ErrClosed)
	case c.writing.passed():
		return c.fail("write", os.ErrDeadlineExceeded)
	case c.shut, c.peer.closed && c.link.passes() && !c.dropped:
		return c.fail("write", os.NewSyscallError("write", syscall.EPIPE))
	}
	return nil
}

// send gives b to the peer, up to the byte at which the link breaks.
func (c *conn) send(b []byte) int {
	limit := c.link.breaksAt()
	if c == c.client || limit == 0 || c.peer.received+int64(len(b)) < limit {
		c.deliver(segment{data: b})
		return len(b)
	}
	n := max(0, int(limit-c.peer.received))
	c.deliver(segment{data: b[:n]})
	switch limit {
	case c.link.StallAfter:
		c.drop()
	case c.link.ResetAfter:
		c.sever(syscall.ECONNRESET)
	case c.link.CutAfter:
		c.sever(io.EOF)
	}
	c.link.CutAfter, c.link.ResetAfter, c.link.StallAfter = 0, 0, 0 // once
	return n
}

// deliver puts s on its way to the peer.
func (c *conn) deliver(s segment) {
	p := c.peer
	if s.data = append([]byte(nil), s.data...); len(s.data) == 0 && s.end == nil {
		return
	}
	if c.link.Latency > 0 {
		s.at = time.Now().Add(c.link.Latency / 2)
		time.AfterFunc(c.link.Latency/2, func() { c.set(func() {}) })
	}
	p.inbox = append(p.inbox, s)
	p.held += len(s.data)
	p.received += int64(len(s.data))
	c.changed.Broadcast()
}

// CloseWrite ends what this end sends; it can still read.
func (c *conn) CloseWrite() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed {
		return c.fail("close", net.ErrClosed)
	}
	if !c.shut {
		c.shut = true
		c.deliver(segment{end: io.EOF})
	}
	return nil
}

// SetLinger with 0 makes Close a reset.
func (c *conn) SetLinger(seconds int) error {
	c.set(func() { c.linger = seconds })
	return nil
}

// Close ends both directions. As with TCP, the peer reads a reset after what it has been sent if
// this end has not read all that came, or lingers for 0 seconds; else a clean end.
func (c *conn) Close() error {
	c.mu.Lock()
	if c.closed {
		c.mu.Unlock()
		return c.fail("close", net.ErrClosed)
	}
	switch {
	case c.linger == 0 || c.held > 0:
		c.deliver(segment{end: syscall.ECONNRESET})
	case !c.shut:
		c.deliver(segment{end: io.EOF})
	}
	c.closed, c.shut = true, true
	for _, d := range []*deadline{&c.reading, &c.writing} {
		if d.timer != nil {
			d.timer.Stop()
		}
	}
	c.inbox, c.held = nil, 0
	c.changed.Broadcast()
	both := c.peer.closed
	c.mu.Unlock()
	if both {
		c.done()
	}
	return nil
}

func (c *conn) LocalAddr() net.Addr  { return c.local }
func (c *conn) RemoteAddr() net.Addr { return c.remote }

func (c *conn) SetDeadline(t time.Time) error {
	return errors.Join(c.setDeadline(&c.reading, t), c.setDeadline(&c.writing, t))
}
func (c *conn) SetReadDeadline(t time.Time) error  { return c.setDeadline(&c.reading, t) }
func (c *conn) SetWriteDeadline(t time.Time) error { return c.setDeadline(&c.writing, t) }

func (c *conn) setDeadline(d *deadline, t time.Time) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed {
		return c.fail("set", net.ErrClosed)
	}
	d.at = t
	if d.timer != nil {
		d.timer.Stop()
	}
	// Not for what has passed, as net/http sets at the end of each request: the broadcast tells of it, and a timer
	// that is due at once may crash Go 1.26's runtime, in a bubble with the race detector.
	if left := time.Until(t); !t.IsZero() && left > 0 {
		d.timer = time.AfterFunc(left, func() { c.set(func() {}) })
	}
	c.changed.Broadcast()
	return nil
}

func (c *conn) fail(op string, err error) error {
	return &net.OpError{Op: op, Net: "tcp", Source: c.local, Addr: c.remote, Err: err}
}
