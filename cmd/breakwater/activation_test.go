//go:build linux

package main_test

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// serviceManager stands in for systemd: it opens sockets, starts mirrors with them, and hears their notes.
type serviceManager struct {
	*host
	names    []string
	sockets  []*os.File
	watchdog time.Duration
	notes    *net.UnixConn
}

func newServiceManager(t *testing.T) *serviceManager {
	t.Helper()
	s := &serviceManager{host: newHost(t)}
	var err error
	s.notes, err = net.ListenUnixgram("unixgram", &net.UnixAddr{Name: filepath.Join(s.dir, "notify"), Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = s.notes.Close()
		for _, socket := range s.sockets {
			_ = socket.Close()
		}
	})
	return s
}

// open makes a socket that mirrors inherit.
func (s *serviceManager) open(t *testing.T, name, network, address string) {
	t.Helper()
	var opened interface {
		io.Closer
		File() (*os.File, error)
	}
	var err error
	s.do(func() {
		switch network {
		case "tcp":
			var l net.Listener
			l, err = net.Listen(network, address)
			opened, _ = l.(*net.TCPListener)
		case "udp":
			var c net.PacketConn
			c, err = net.ListenPacket(network, address)
			opened, _ = c.(*net.UDPConn)
		}
	})
	if err != nil {
		t.Fatal(err)
	}
	file, err := opened.File()
	if err != nil {
		t.Fatal(err)
	}
	_ = opened.Close() // the file stays
	s.names, s.sockets = append(s.names, name), append(s.sockets, file)
}

// mirror is one that gets the sockets. It has its process's id in LISTEN_PID.
func (s *serviceManager) mirror(t *testing.T, args ...string) *exec.Cmd {
	t.Helper()
	variables := []string{"NOTIFY_SOCKET=" + filepath.Join(s.dir, "notify"),
		"LISTEN_FDS=" + strconv.Itoa(len(s.sockets)), "LISTEN_FDNAMES=" + strings.Join(s.names, ":")}
	if s.watchdog > 0 {
		variables = append(variables, "WATCHDOG_USEC="+strconv.FormatInt(s.watchdog.Microseconds(), 10))
	}
	args = append([]string{"sh", "-c", `LISTEN_PID=$$ exec "$@"`, "sh", binary(t), "serve", "--config", "", "--data", filepath.Join(s.dir, "data"), "--log-format", "text"}, args...)
	ctx, cancel := context.WithTimeout(t.Context(), patience) // one that ought to be refused could run on
	t.Cleanup(cancel)
	cmd := s.command(ctx, variables, args...)
	cmd.ExtraFiles = s.sockets
	return cmd
}

// expect returns the next note, which has to have these lines.
func (s *serviceManager) expect(t *testing.T, lines ...string) string {
	t.Helper()
	_ = s.notes.SetReadDeadline(time.Now().Add(20 * time.Second))
	note := make([]byte, 4<<10)
	n, err := s.notes.Read(note)
	if err != nil {
		t.Fatalf("no note with %q: %v", lines, err)
	}
	note = note[:n]
	for _, line := range lines {
		if !strings.Contains("\n"+string(note)+"\n", "\n"+line) {
			t.Fatalf("noted %q, want %q", note, lines)
		}
	}
	return string(note)
}

// TestSocketOutlivesRestart connects while no mirror runs, as a Docker daemon does that starts or pulls
// then: the next mirror answers.
func TestSocketOutlivesRestart(t *testing.T) {
	t.Parallel()
	s := newServiceManager(t)
	s.open(t, "breakwater.socket", "tcp", mirrorAddr) // what systemd names it by itself
	s.open(t, "admin", "tcp", "127.0.0.1:6001")
	for range 2 {
		conn, err := s.dial(mirrorAddr)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := io.WriteString(conn, "GET /v2/ HTTP/1.1\r\nHost: localhost\r\n\r\n"); err != nil {
			t.Fatal(err)
		}
		cmd := s.mirror(t, "--admin", "127.0.0.1:6001")
		if err := s.start(cmd); err != nil {
			t.Fatal(err)
		}
		_ = conn.SetReadDeadline(time.Now().Add(20 * time.Second))
		if res, err := http.ReadResponse(bufio.NewReader(conn), nil); err != nil || res.StatusCode != http.StatusOK {
			t.Errorf("who connected before the start got %v, %v", res, err)
		}
		_ = conn.Close()
		s.expect(t, "READY=1", "STATUS=serving at "+mirrorAddr)
		if got, err := s.ask(http.MethodGet, "http://127.0.0.1:6001/healthz"); err != nil || got.status != http.StatusOK {
			t.Errorf("admin: %d %v", got.status, err)
		}
		if err := cmd.Process.Signal(syscall.SIGTERM); err != nil {
			t.Fatal(err)
		}
		s.expect(t, "STOPPING=1")
		if err := cmd.Wait(); err != nil {
			t.Errorf("ended: %v", err)
		}
	}
}

// TestSocketsThatAreRefused starts mirrors with sockets that the configuration does not mean, above all
// one that is open to the network.
func TestSocketsThatAreRefused(t *testing.T) {
	t.Parallel()
	for _, row := range []struct {
		name string
		open func(*testing.T, *serviceManager)
		want string
	}{
		{"beyond loopback", func(t *testing.T, s *serviceManager) { s.open(t, "listen", "tcp", "0.0.0.0:5000") }, "configuration says listen: 127.0.0.1:5000"},
		{"another port", func(t *testing.T, s *serviceManager) { s.open(t, "admin", "tcp", "127.0.0.1:6001") }, "configuration says admin: 127.0.0.1:5001"},
		{"two", func(t *testing.T, s *serviceManager) {
			s.open(t, "listen", "tcp", mirrorAddr)
			s.open(t, "breakwater.socket", "tcp", "[::1]:5000")
		}, "two sockets for listen"},
		{"not a stream", func(t *testing.T, s *serviceManager) { s.open(t, "listen", "udp", mirrorAddr) }, "socket listen of the service manager"},
	} {
		t.Run(row.name, func(t *testing.T) {
			t.Parallel()
			s := newServiceManager(t)
			row.open(t, s)
			if out, err := s.output(s.mirror(t)); err == nil || !strings.Contains(out, row.want) {
				t.Errorf("%v: %s, want %q", err, out, row.want)
			}
		})
	}
}

// TestSocketActivate has systemd's own program open the port and start the mirror at the first connection.
func TestSocketActivate(t *testing.T) {
	t.Parallel()
	h := newHost(t, "systemd-socket-activate")
	cmd := h.command(t.Context(), nil, "systemd-socket-activate", "--listen="+mirrorAddr, "--fdname=listen",
		binary(t), "serve", "--config", "", "--data", filepath.Join(h.dir, "data"))
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := h.start(cmd); err != nil {
		t.Fatal(err)
	}
	var got answer
	within(t, 20*time.Second, func() (err error) {
		got, err = h.ask(http.MethodGet, "http://"+mirrorAddr+"/v2/") // refused until the port is open
		return err
	})
	_ = cmd.Process.Signal(syscall.SIGTERM)
	if err := cmd.Wait(); err != nil || got.status != http.StatusOK {
		t.Errorf("%d, ended: %v\n%s", got.status, err, &out)
	}
}

// TestReloadIsNoted reads a good and a bad configuration again.
func TestReloadIsNoted(t *testing.T) {
	t.Parallel()
	s := newServiceManager(t)
	config := s.write(t, "config.yaml", mirrored)
	cmd := s.mirror(t, "--config", config)
	if err := s.start(cmd); err != nil {
		t.Fatal(err)
	}
	s.expect(t, "READY=1")
	for _, row := range []struct{ config, status string }{
		{mirrored + "server_names: [mirror.internal]\n", "STATUS=configuration reloaded"},
		{"registries: [\n", "STATUS=configuration not reloaded"},
	} {
		s.write(t, "config.yaml", row.config)
		before := monotonic(t)
		if err := cmd.Process.Signal(syscall.SIGHUP); err != nil {
			t.Fatal(err)
		}
		note := s.expect(t, "RELOADING=1", "MONOTONIC_USEC=")
		var at int64
		if _, err := fmt.Sscanf(note, "RELOADING=1\nMONOTONIC_USEC=%d", &at); err != nil || at < before || at > monotonic(t) {
			t.Errorf("at %d, %v, want it between %d and now", at, err, before)
		}
		s.expect(t, "READY=1", row.status)
	}
	_ = cmd.Process.Signal(syscall.SIGTERM)
	s.expect(t, "STOPPING=1")
	if err := cmd.Wait(); err != nil {
		t.Errorf("ended: %v", err)
	}
}

// monotonic is the time that systemd compares with, in microseconds.
func monotonic(t *testing.T) int64 {
	t.Helper()
	var now unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_MONOTONIC, &now); err != nil {
		t.Fatal(err)
	}
	return now.Nano() / 1000
}

// TestWatchdogTellsWhatHangs hangs a mirror in its calls of accept, while all else of it runs: the pings
// end, and come back with it.
func TestWatchdogTellsWhatHangs(t *testing.T) {
	t.Parallel()
	s := newServiceManager(t)
	need(t, "strace")
	s.watchdog = 600 * time.Millisecond
	cmd := s.mirror(t)
	log, in, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer log.Close()
	cmd.Stderr = in
	if err := s.start(cmd); err != nil {
		t.Fatal(err)
	}
	_ = in.Close()
	hung := make(chan struct{}, 1000)
	go func() {
		defer close(hung)
		for lines := bufio.NewScanner(log); lines.Scan(); {
			if strings.Contains(lines.Text(), "does not answer itself") {
				hung <- struct{}{}
			}
		}
	}()
	s.expect(t, "READY=1")
	for range 3 {
		s.expect(t, "WATCHDOG=1")
	}
	strace := s.command(t.Context(), nil, "strace", "-f", "-qq", "-o", "/dev/null", "-e", "trace=accept4", "-e", "inject=accept4:delay_enter=600s", "-p", strconv.Itoa(cmd.Process.Pid))
	if err := s.start(strace); err != nil {
		t.Fatal(err)
	}
	for range 2 { // both addresses, or one of them twice
		<-hung
	}
	for { // what was sent before
		_ = s.notes.SetReadDeadline(time.Now().Add(time.Millisecond))
		if _, err := s.notes.Read(make([]byte, 100)); err != nil {
			break
		}
	}
	for range 6 {
		<-hung
	}
	_ = s.notes.SetReadDeadline(time.Now().Add(time.Millisecond))
	note := make([]byte, 100)
	if n, err := s.notes.Read(note); err == nil {
		t.Errorf("hangs, and has sent %q", note[:n])
	}
	if err := strace.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	_ = strace.Wait()
	s.expect(t, "WATCHDOG=1")
	_ = cmd.Process.Signal(syscall.SIGTERM)
	if err := cmd.Wait(); err != nil {
		t.Errorf("ended: %v", err)
	}
}
