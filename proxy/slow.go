package proxy

import (
	"context"
	"crypto/tls"
	"net"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// paceEvery is how often a client's progress is looked at.
const paceEvery = 15 * time.Second

type connKey struct{}

// ConnContext is for http.Server. By it a response sees how far its client has come: the kernel takes on
// megabytes for a client that reads a kilobyte a second, and no more before a good part of them has gone,
// so that Write alone would tell of no progress for minutes (FAULTS F65).
func ConnContext(ctx context.Context, conn net.Conn) context.Context {
	return context.WithValue(ctx, connKey{}, conn)
}

// keepPace moves the write deadline while the client's side of the connection acknowledges bytes, until
// stop is called. A connection that is not the kernel's has only the deadlines that are set by writing.
func (w *response) keepPace(ctx context.Context) (stop func()) {
	conn, _ := ctx.Value(connKey{}).(net.Conn)
	below := conn
	if secure, ok := conn.(*tls.Conn); ok {
		below = secure.NetConn()
	}
	kernel, ok := below.(syscall.Conn)
	if !ok {
		return func() {}
	}
	raw, err := kernel.SyscallConn()
	if err != nil {
		return func() {}
	}
	w.paced = true
	quit, done := make(chan struct{}), make(chan struct{})
	go func() { // ends with stop, which waits for it
		defer close(done)
		ticker := time.NewTicker(paceEvery)
		defer ticker.Stop()
		for last := acknowledged(raw); ; {
			select {
			case <-ticker.C:
			case <-quit:
				return
			}
			if now := acknowledged(raw); now > last {
				_ = conn.SetWriteDeadline(time.Now().Add(sendTimeout))
				last = now
			}
		}
	}()
	return func() {
		close(quit)
		<-done
	}
}

// acknowledged is how many bytes the other side has acknowledged on this connection.
func acknowledged(raw syscall.RawConn) (n uint64) {
	_ = raw.Control(func(fd uintptr) {
		if info, err := unix.GetsockoptTCPInfo(int(fd), unix.IPPROTO_TCP, unix.TCP_INFO); err == nil {
			n = info.Bytes_acked
		}
	})
	return n
}
