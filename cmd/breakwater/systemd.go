package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"strings"
	"syscall"
	"time"

	"breakwater/pkg/config"

	"github.com/coreos/go-systemd/v22/activation"
	"github.com/coreos/go-systemd/v22/daemon"
	"golang.org/x/sys/unix"
)

// What a socket unit may call its sockets (FileDescriptorName=). One without a name of these is the
// registry API's, since systemd names a socket after its unit if nobody else does.
const (
	fdListen = "listen"
	fdAdmin  = "admin"
)

// pingsPerTimeout is how often the service manager hears of us in the time after which it takes us for
// hung: one ping may come late, and one may fail.
const pingsPerTimeout = 3

// listen returns the sockets of the registry API and of admin: those that the service manager has
// opened before we started and keeps open when we stop (sd_listen_fds(3)), or else new ones. One that is
// not where the configuration says is refused: it might be open to the network, and nobody has allowed that.
func listen(cfg *config.Config) (api, admin net.Listener, err error) {
	opened := map[string]net.Listener{}
	defer func() {
		if err != nil {
			for _, l := range opened {
				_ = l.Close()
			}
		}
	}()
	address := map[string]string{fdListen: cfg.Listen, fdAdmin: cfg.Admin}
	for _, file := range activation.Files(true) {
		l, err := net.FileListener(file)
		_ = file.Close() // the listener has a copy
		name := fdListen
		if file.Name() == fdAdmin {
			name = fdAdmin
		}
		switch {
		case err != nil:
			return nil, nil, fmt.Errorf("socket %s of the service manager: %w", file.Name(), err)
		case opened[name] != nil:
			err = fmt.Errorf("the service manager has opened two sockets for %s, %s and %s; leave one ListenStream= in the socket unit", name, opened[name].Addr(), l.Addr())
		case !isAt(l.Addr(), address[name]):
			err = fmt.Errorf("the service manager has opened %s, but the configuration says %s: %s; make both say the same (systemctl edit --full breakwater.socket)", l.Addr(), name, address[name])
		}
		if err != nil {
			return nil, nil, errors.Join(err, l.Close())
		}
		opened[name] = l
	}
	for _, name := range []string{fdListen, fdAdmin} {
		if opened[name] != nil {
			continue
		}
		l, err := net.Listen("tcp", address[name])
		if err != nil {
			return nil, nil, fmt.Errorf("listen for %s: %w", name, err)
		}
		opened[name] = l
	}
	return opened[fdListen], opened[fdAdmin], nil
}

// isAt reports whether a listener has the address that a configuration names.
func isAt(addr net.Addr, configured string) bool {
	tcp, ok := addr.(*net.TCPAddr)
	if !ok {
		return false
	}
	want, err := net.ResolveTCPAddr("tcp", configured)
	if err != nil || want.Port != 0 && want.Port != tcp.Port {
		return false
	}
	if strings.HasPrefix(configured, "localhost:") { // which may be either of two
		return tcp.IP.IsLoopback()
	}
	return want.IP.Equal(tcp.IP) || (want.IP == nil || want.IP.IsUnspecified()) && tcp.IP.IsUnspecified()
}

// manager is the service manager, if it wants to hear how we are (sd_notify(3)). With none it does nothing.
type manager struct{ logger *slog.Logger }

// tell sends states, each NAME=value.
func (m manager) tell(states ...string) {
	if _, err := daemon.SdNotify(false, strings.Join(states, "\n")); err != nil {
		m.logger.Warn("the service manager cannot be told", "err", err)
	}
}

// reload tells that the configuration is read again while load does that, and what came of it.
func (m manager) reload(load func() (status string)) {
	var now unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_MONOTONIC, &now); err != nil {
		m.logger.Warn("no monotonic clock", "err", err)
	}
	m.tell(daemon.SdNotifyReloading, fmt.Sprintf("MONOTONIC_USEC=%d", now.Nano()/int64(time.Microsecond)))
	m.tell(daemon.SdNotifyReady, "STATUS="+load())
}

// watch pings the service manager until ctx ends, each time after the mirror has answered itself at all
// addresses. A mirror that does not is restarted: it hangs, and its clients with it.
func (m manager) watch(ctx context.Context, requests map[string]string) {
	timeout, err := daemon.SdWatchdogEnabled(false)
	if err != nil {
		m.logger.Warn("no watchdog", "err", err)
	}
	if timeout == 0 {
		return
	}
	every := timeout / pingsPerTimeout
	ticker := time.NewTicker(every)
	defer ticker.Stop()
	for {
		alive := true
		for address, path := range requests {
			if err := answers(ctx, address, path, every); err != nil && ctx.Err() == nil {
				m.logger.Error("does not answer itself; the service manager restarts what hangs for too long", "address", address, "err", err)
				alive = false
			}
		}
		if alive {
			m.tell(daemon.SdNotifyWatchdog)
		}
		select {
		case <-ticker.C:
		case <-ctx.Done():
			return
		}
	}
}

// answers returns nil if whoever listens at the address reacts to a request within the time: a refusal,
// words about TLS and a connection closed for there being too many come from a server that lives as well.
func answers(ctx context.Context, address, path string, within time.Duration) error {
	ctx, cancel := context.WithTimeout(ctx, within)
	defer cancel()
	err := ask(ctx, address, path)
	if errors.Is(err, io.EOF) || errors.Is(err, syscall.ECONNRESET) || errors.Is(err, syscall.EPIPE) {
		return nil
	}
	return err
}

// ask sends a request and waits for the first byte of what comes back.
func ask(ctx context.Context, address, path string) error {
	conn, err := new(net.Dialer).DialContext(ctx, "tcp", address)
	if err != nil {
		return err
	}
	defer conn.Close()
	defer context.AfterFunc(ctx, func() { _ = conn.SetDeadline(time.Unix(1, 0)) })()
	if _, err := fmt.Fprintf(conn, "GET %s HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n", path); err != nil {
		return err
	}
	_, err = conn.Read(make([]byte, 1))
	return err
}
