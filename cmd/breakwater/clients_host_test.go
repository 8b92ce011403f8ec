//go:build linux

package main_test

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"breakwater/pkg/registrytest"
)

// A host is a build host for one test: a folder, and a network namespace that has a loopback
// interface and nothing else. The upstream, the mirror and the clients that run on it reach each
// other and nobody else, so a client that gives up on the mirror cannot get its image elsewhere,
// and hosts of parallel tests use the same ports. All that runs on it ends with the test.
type host struct {
	dir       string
	work      chan func() // carried out by the thread that lives in the namespace
	program   string      // the mirror's binary, "" for the usual
	variables []string    // "NAME=value", of all that runs on it
}

func newHost(t *testing.T, programs ...string) *host {
	t.Helper()
	need(t, append(programs, "ip", "mount")...)
	h := &host{dir: t.TempDir(), work: make(chan func())}
	entered := make(chan error)
	go h.live(entered)
	if err := <-entered; err != nil {
		cannot(t, "no network namespace: %v", err)
	}
	t.Cleanup(func() { close(h.work) })
	return h
}

// live enters a new network namespace and carries out what is to be done there. Sockets belong to
// the namespace of the thread that made them, wherever they are used later, and so do processes.
func (h *host) live(entered chan<- error) {
	runtime.LockOSThread() // never unlocked, so the thread ends here, and the namespace with its last process
	err := syscall.Unshare(syscall.CLONE_NEWNET)
	if err == nil {
		err = exec.Command("ip", "link", "set", "lo", "up").Run()
	}
	entered <- err
	for f := range h.work {
		f()
	}
}

// do carries out f in the namespace.
func (h *host) do(f func()) {
	done := make(chan struct{})
	h.work <- func() { defer close(done); f() }
	<-done
}

func (h *host) listen(addr string) (l net.Listener, err error) {
	h.do(func() { l, err = net.Listen("tcp", addr) })
	return l, err
}

// client returns an HTTP client on this host, without keep-alive: each request is a new connection.
func (h *host) client() *http.Client {
	dial := func(ctx context.Context, network, addr string) (conn net.Conn, err error) {
		h.do(func() { conn, err = (&net.Dialer{}).DialContext(ctx, network, addr) })
		return conn, err
	}
	return &http.Client{Transport: &http.Transport{DialContext: dial, DisableKeepAlives: true, DisableCompression: true}}
}

// command prepares a program that can reach nothing but this host. Variables are "NAME=value".
func (h *host) command(ctx context.Context, variables []string, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, args[0], args[1:]...)
	cmd.Dir = h.dir
	cmd.Env = append([]string{"HOME=" + h.dir, "PATH=" + os.Getenv("PATH")}, slices.Concat(h.variables, variables)...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	cmd.WaitDelay = 5 * time.Second
	return cmd
}

// contain has cmd run as the first process of its own process and mount namespaces, with its own
// /run: when it ends, for whatever reason, all that it started and mounted is gone too.
func contain(cmd *exec.Cmd) *exec.Cmd {
	const enter = `mount --make-rprivate / && mount -t proc proc /proc && mount -t tmpfs tmpfs /run && exec "$@"`
	cmd.Args = append([]string{"sh", "-c", enter, "sh"}, cmd.Args...)
	cmd.Path = "/bin/sh"
	cmd.SysProcAttr.Cloneflags = syscall.CLONE_NEWPID | syscall.CLONE_NEWNS
	return cmd
}

func (h *host) start(cmd *exec.Cmd) (err error) {
	h.do(func() { err = cmd.Start() })
	return err
}

// output runs cmd to its end and returns all that it printed, which an error repeats.
func (h *host) output(cmd *exec.Cmd) (string, error) {
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	err := h.start(cmd)
	if err == nil {
		err = cmd.Wait()
	}
	if err != nil {
		err = fmt.Errorf("%s: %w\n%s", strings.Join(cmd.Args, " "), err, &out)
	}
	return out.String(), err
}

// daemon starts a contained daemon and waits until it accepts at its socket. Its log is shown if
// the test fails.
func (h *host) daemon(t *testing.T, cmd *exec.Cmd, socket string) {
	t.Helper()
	log, err := os.Create(filepath.Join(h.dir, filepath.Base(cmd.Path)+".log"))
	if err != nil {
		t.Fatal(err)
	}
	cmd.Stdout, cmd.Stderr = log, log
	if err := h.start(contain(cmd)); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
		_ = log.Close()
		showLog(t, log.Name())
	})
	within(t, 30*time.Second, func() error {
		conn, err := net.Dial("unix", socket)
		if err != nil {
			return err
		}
		return conn.Close()
	})
}

func showLog(t *testing.T, name string) {
	if !t.Failed() {
		return
	}
	log, err := os.ReadFile(name)
	if err != nil {
		t.Error(err)
	}
	const enough = 16 << 10
	t.Logf("end of %s:\n%s", name, log[max(0, len(log)-enough):])
}

// checkLog fails the test if the log tells a secret.
func checkLog(t *testing.T, name string) {
	log, err := os.ReadFile(name)
	if err != nil {
		t.Error(err)
	}
	if leak := registrytest.Leak(string(log)); leak != "" {
		t.Errorf("%s tells a secret: %s", name, leak)
	}
}

// mirror is a running `breakwater serve`.
type mirror struct {
	cmd *exec.Cmd
	// ended is closed when the process has ended; then err is set.
	ended chan struct{}
	err   error
}

const (
	mirrorAddr = "127.0.0.1:5000"
	adminAddr  = "127.0.0.1:5001"
)

// serve starts the mirror on the host's data folder, without a configuration file if that is empty,
// and returns when it accepts.
func (h *host) serve(t *testing.T, config string) *mirror {
	t.Helper()
	m := &mirror{ended: make(chan struct{})}
	file := ""
	if config != "" {
		file = h.write(t, "config.yaml", config)
	}
	m.cmd = h.command(t.Context(), nil, h.breakwater(t), "serve", "--data", h.data(), "--config", file)
	out, in, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	m.cmd.Stdout, m.cmd.Stderr = in, in
	if err := h.start(m.cmd); err != nil {
		t.Fatal(err)
	}
	_ = in.Close()
	go func() {
		m.err = m.cmd.Wait()
		close(m.ended)
	}()
	serving := make(chan struct{})
	go h.follow(out, serving)
	t.Cleanup(func() {
		m.kill()
		checkLog(t, filepath.Join(h.dir, "mirror.log"))
		showLog(t, filepath.Join(h.dir, "mirror.log"))
	})
	select {
	case <-serving:
	case <-m.ended:
		t.Fatalf("the mirror ended at its start: %v", m.err)
	case <-time.After(10 * time.Second):
		t.Fatal("the mirror does not serve")
	}
	return m
}

// follow keeps the mirror's log and tells when it serves.
func (h *host) follow(out io.ReadCloser, serving chan<- struct{}) {
	defer func() { _ = out.Close() }()
	log, err := os.OpenFile(filepath.Join(h.dir, "mirror.log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return
	}
	defer func() { _ = log.Close() }()
	for lines := bufio.NewScanner(out); lines.Scan(); {
		_, _ = fmt.Fprintln(log, lines.Text())
		if serving != nil && strings.Contains(lines.Text(), `"msg":"serving"`) {
			close(serving)
			serving = nil
		}
	}
}

// breakwater is the path of the host's program.
func (h *host) breakwater(t *testing.T) string {
	t.Helper()
	if h.program != "" {
		return h.program
	}
	return binary(t)
}

// kill ends the mirror as a power switch does.
func (m *mirror) kill() {
	_ = m.cmd.Process.Kill()
	<-m.ended
}

// stop ends the mirror as a service manager does, and wants exit status 0.
func (m *mirror) stop(t *testing.T) {
	t.Helper()
	_ = m.cmd.Process.Signal(syscall.SIGTERM)
	select {
	case <-m.ended:
	case <-time.After(40 * time.Second):
		t.Fatal("the mirror does not end")
	}
	if m.err != nil {
		t.Fatalf("the mirror ended: %v", m.err)
	}
}

// write puts a file in the host's folder and returns its path.
func (h *host) write(t *testing.T, name, text string) string {
	t.Helper()
	path := filepath.Join(h.dir, name)
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// binary is the path of the program, built as `make build` does.
func binary(t *testing.T) string {
	t.Helper()
	path, err := buildBinary()
	if err != nil {
		t.Fatal(err)
	}
	return path
}

var buildBinary = sync.OnceValues(func() (string, error) {
	path, err := filepath.Abs("../../bin/breakwater")
	if err != nil {
		return "", err
	}
	return path, build("-o", path, ".")
})

func build(args ...string) error {
	cmd := exec.Command("go", append([]string{"build", "-trimpath"}, args...)...)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("build: %w\n%s", err, out)
	}
	return nil
}

// cached returns the path of a program that testdata/install.sh builds.
func cached(program string) string {
	dir, err := os.UserCacheDir()
	if err != nil {
		return program
	}
	return filepath.Join(dir, "breakwater-test", "bin", program)
}

// need skips a test that these programs, or root, are missing for.
func need(t *testing.T, programs ...string) {
	t.Helper()
	if os.Getuid() != 0 {
		cannot(t, "not root: no namespaces and no daemons of the test's own")
	}
	for _, program := range programs {
		if _, err := exec.LookPath(program); err != nil {
			cannot(t, "%v; testdata/install.sh installs it", err)
		}
	}
}

// cannot skips a test, saying why. In CI nothing may be skipped.
func cannot(t *testing.T, format string, args ...any) {
	t.Helper()
	if os.Getenv("CI") == "true" {
		t.Fatalf(format, args...)
	}
	t.Skipf(format, args...)
}

// within waits until check passes. Only for what processes outside this one do.
func within(t *testing.T, limit time.Duration, check func() error) {
	t.Helper()
	err := errors.New("not tried")
	for end := time.Now().Add(limit); time.Now().Before(end); time.Sleep(20 * time.Millisecond) {
		if err = check(); err == nil {
			return
		}
	}
	t.Fatalf("not within %v: %v", limit, err)
}
