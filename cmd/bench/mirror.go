package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"text/template"
	"time"
)

// place is where and how a program runs.
type place struct {
	Dir      string // its own, empty at first
	Listen   string // host:port
	Admin    string // host:port, for the program that has one
	Upstream string // host:port
	Ahead    string // host:port of an upstream that is asked first; "" for none
	Bucket   string // URL of the S3 server whose bucket it shares; "" for none
	KeyFile  string // the fleet's
	FreshFor time.Duration
	Profile  string // the file for breakwater's profile, if one is wanted
}

func (p place) configFile() string { return filepath.Join(p.Dir, "config") }

// mirror is a program that runs, or has been stopped and may run again in the same place.
type mirror struct {
	program
	place
	cmd  *exec.Cmd     // nil when it does not run
	done chan struct{} // closed once cmd has ended
}

// bounds of a process's life: loading a store is the slowest start, a flush the slowest stop.
const (
	startTime = 20 * time.Second
	stopTime  = 10 * time.Second
)

// install configures the program for its place, where it is to listen on addresses that are free,
// and starts it there.
func (p program) install(ctx context.Context, at place) (*mirror, error) {
	var err error
	if at.Listen, err = freeAddress(); err != nil {
		return nil, err
	}
	if at.Admin, err = freeAddress(); err != nil {
		return nil, err
	}
	t, err := template.ParseFS(configs, p.config)
	if err != nil {
		return nil, fmt.Errorf("configure %s: %w", p.name, err)
	}
	var text bytes.Buffer
	if err := t.Execute(&text, at); err != nil {
		return nil, fmt.Errorf("configure %s: %w", p.name, err)
	}
	if err := errors.Join(os.MkdirAll(at.Dir, 0o755), os.WriteFile(at.configFile(), text.Bytes(), 0o644)); err != nil {
		return nil, err
	}
	m := &mirror{program: p, place: at}
	return m, m.start(ctx)
}

// freeAddress is an address that nobody listens on now.
func freeAddress() (string, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return "", fmt.Errorf("find a free port: %w", err)
	}
	return l.Addr().String(), l.Close()
}

// start runs the program and returns once it accepts connections.
func (m *mirror) start(ctx context.Context) error {
	log, err := os.OpenFile(filepath.Join(m.Dir, "log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return err
	}
	defer log.Close() // the process has its own
	m.cmd = m.command(ctx, m.place)
	m.cmd.Stdout, m.cmd.Stderr = log, log
	m.cmd.Cancel = func() error { return m.cmd.Process.Signal(syscall.SIGTERM) } // nginx ends its workers then
	m.cmd.WaitDelay = stopTime
	if err := m.cmd.Start(); err != nil {
		return fmt.Errorf("start %s: %w", m.name, err)
	}
	cmd, done := m.cmd, make(chan struct{})
	m.done = done
	go func() { // ends with the process; stop waits for it
		_ = cmd.Wait() // why it ended is in its log
		close(done)
	}()
	deadline := time.Now().Add(startTime)
	for time.Now().Before(deadline) {
		c, err := dial(ctx, m.Listen)
		if err == nil {
			return c.Close()
		}
		select {
		case <-m.done:
			m.cmd = nil
			return fmt.Errorf("start %s: it ended at once: %s", m.name, m.lastWords())
		case <-time.After(time.Millisecond):
		}
	}
	return errors.Join(fmt.Errorf("start %s: it does not listen after %s: %s", m.name, startTime, m.lastWords()), m.stop(syscall.SIGKILL))
}

// lastWords is the last line of the program's log that is not a stack.
func (m *mirror) lastWords() string {
	log, err := os.ReadFile(filepath.Join(m.Dir, "log"))
	if err != nil {
		return err.Error()
	}
	words, _, _ := strings.Cut(string(log), "\ngoroutine ")
	words = strings.TrimSpace(words)
	return words[strings.LastIndexByte(words, '\n')+1:]
}

// stop ends the program by sig, or by SIGKILL if that takes too long.
func (m *mirror) stop(sig syscall.Signal) error {
	if m.cmd == nil {
		return nil
	}
	cmd := m.cmd
	m.cmd = nil
	if err := cmd.Process.Signal(sig); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return fmt.Errorf("stop %s: %w", m.name, err)
	}
	select {
	case <-m.done:
		return nil
	case <-time.After(stopTime):
	}
	if err := cmd.Process.Kill(); err != nil {
		return fmt.Errorf("stop %s: %w", m.name, err)
	}
	<-m.done
	return fmt.Errorf("stop %s: it did not end on %s", m.name, sig)
}

// peak is the most memory that the program's processes have held, in MiB: the sum of their VmHWM.
func (m *mirror) peak() (float64, error) {
	if m.cmd == nil {
		return 0, fmt.Errorf("memory of %s: it does not run", m.name)
	}
	proc := fmt.Sprintf("/proc/%d", m.cmd.Process.Pid)
	children, err := os.ReadFile(fmt.Sprintf("%s/task/%d/children", proc, m.cmd.Process.Pid))
	if err != nil {
		return 0, fmt.Errorf("memory of %s: %w", m.name, err)
	}
	var sum float64
	for _, pid := range append(strings.Fields(string(children)), strconv.Itoa(m.cmd.Process.Pid)) {
		status, err := os.ReadFile("/proc/" + pid + "/status")
		if err != nil {
			return 0, fmt.Errorf("memory of %s: %w", m.name, err)
		}
		for line := range strings.Lines(string(status)) {
			var kib float64
			if n, _ := fmt.Sscanf(line, "VmHWM: %f kB", &kib); n == 1 {
				sum += kib / 1024
			}
		}
	}
	return sum, nil
}
