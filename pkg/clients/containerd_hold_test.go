package clients

import (
	"bytes"
	"context"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

// said is a log that is read while it is written.
type said struct {
	mu  sync.Mutex // guards log
	log bytes.Buffer
}

func (s *said) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.log.Write(p)
}

func (s *said) clear() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.log.Reset()
}

func (s *said) String() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.log.String()
}

func always(c Containerd) func() (Containerd, error) {
	return func() (Containerd, error) { return c, nil }
}

// TestHold lets others at the files while they are held.
func TestHold(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := newCertsD(t)
		d.put("quay.io/hosts.toml", "mine", 0o600)
		before := d.tree()
		var log said
		ctx, cancel := context.WithCancel(t.Context())
		ended := make(chan error, 1)
		c := d.containerd()
		c.Existing = ExistingReplace
		go func() { ended <- Hold(ctx, always(c), slog.New(slog.NewTextHandler(&log, nil))) }()
		synctest.Wait()
		held := d.tree()
		if held["quay.io/"+hostsFile+keptSuffix] == "" || held["docker.io/hosts.toml"] == "" {
			t.Errorf("held: %v", held)
		}
		time.Sleep(10 * lookAgain)
		synctest.Wait()
		d.same("held for long", d.tree(), held)
		warnings := func() int { return strings.Count(log.String(), "level=WARN") }
		if warnings() != 0 {
			t.Errorf("log:\n%s", &log)
		}
		if err := os.RemoveAll(filepath.Join(d.dir, "docker.io")); err != nil {
			t.Fatal(err)
		}
		time.Sleep(lookAgain)
		synctest.Wait()
		if d.tree()["docker.io/hosts.toml"] == "" || warnings() != 1 {
			t.Errorf("what has vanished is not there again: %v\n%s", d.tree(), &log)
		}
		d.put("docker.io/hosts.toml", "k3s's", 0o600)
		time.Sleep(3 * lookAgain)
		synctest.Wait()
		if !strings.Contains(d.tree()["docker.io/hosts.toml"], "k3s's") || warnings() != 2 {
			t.Errorf("a foreign file is not left, and said once: %v\n%s", d.tree(), &log)
		}
		if err := os.RemoveAll(filepath.Join(d.dir, "docker.io")); err != nil {
			t.Fatal(err)
		}
		cancel()
		if err := <-ended; err != nil {
			t.Error(err)
		}
		d.same("released", d.tree(), before)
	})
}

// TestHoldLoses is a folder that goes away with all that is in it, as a whole.
func TestHoldLoses(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := newCertsD(t)
		var log said
		ctx, cancel := context.WithCancel(t.Context())
		ended := make(chan error, 1)
		go func() { ended <- Hold(ctx, always(d.containerd()), slog.New(slog.NewTextHandler(&log, nil))) }()
		synctest.Wait()
		if err := os.RemoveAll(d.dir); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(d.dir, nil, 0o600); err != nil { // now it cannot be written
			t.Fatal(err)
		}
		time.Sleep(4 * lookAgain)
		synctest.Wait()
		if n := strings.Count(log.String(), "level=ERROR"); n != 1 {
			t.Errorf("said %d times that it cannot write:\n%s", n, &log)
		}
		if err := os.Remove(d.dir); err != nil {
			t.Fatal(err)
		}
		time.Sleep(lookAgain)
		synctest.Wait()
		if d.tree()["quay.io/hosts.toml"] == "" {
			t.Errorf("not there again: %v", d.tree())
		}
		cancel()
		if err := <-ended; err != nil {
			t.Error(err)
		}
	})
}

func TestHoldRefuses(t *testing.T) {
	d := newCertsD(t)
	d.put("quay.io/hosts.toml", "mine", 0o600)
	before := d.tree()
	if err := Hold(t.Context(), always(d.containerd()), slog.New(slog.DiscardHandler)); err == nil {
		t.Error("held")
	}
	d.same("after it", d.tree(), before)
}

// TestHoldOfADeletedMount: k3s has deleted the folder that a container has mounted; this process has it by a
// descriptor.
func TestHoldOfADeletedMount(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := newCertsD(t)
		if err := os.Mkdir(d.dir, 0o755); err != nil {
			t.Fatal(err)
		}
		mount, err := os.Open(d.dir)
		if err != nil {
			t.Fatal(err)
		}
		defer mount.Close()
		c := d.containerd()
		c.Dir = fmt.Sprintf("/proc/self/fd/%d", mount.Fd())
		ended := make(chan error, 1)
		go func() { ended <- Hold(t.Context(), always(c), slog.New(slog.DiscardHandler)) }()
		time.Sleep(2 * lookAgain)
		synctest.Wait()
		if d.tree()["docker.io/hosts.toml"] == "" {
			t.Fatalf("not held: %v", d.tree())
		}
		if err := os.RemoveAll(d.dir); err != nil {
			t.Fatal(err)
		}
		time.Sleep(lookAgain)
		synctest.Wait()
		select {
		case err := <-ended:
			if err == nil || !strings.Contains(err.Error(), "was deleted") {
				t.Error(err)
			}
		default:
			t.Error("still held")
		}
	})
}

// TestHoldRenews has what is told to containerd change, and be unreadable and broken for a while, as a Secret's mount
// may be.
func TestHoldRenews(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := newCertsD(t)
		var log said
		ctx, cancel := context.WithCancel(t.Context())
		ended := make(chan error, 1)
		c := d.certified()
		c.Authorization = "Basic b2xk"
		var now atomic.Pointer[Containerd] // nil for what cannot be read
		now.Store(&c)
		wanted := func() (Containerd, error) {
			if c := now.Load(); c != nil {
				return *c, nil
			}
			return Containerd{}, os.ErrNotExist
		}
		go func() { ended <- Hold(ctx, wanted, slog.New(slog.NewTextHandler(&log, nil))) }()
		synctest.Wait()
		held := func(file string) string {
			t.Helper()
			text, err := os.ReadFile(filepath.Join(d.dir, "quay.io", file))
			if err != nil {
				t.Fatal(err)
			}
			return string(text)
		}
		look := func(change func(*Containerd)) {
			next := c
			change(&next)
			now.Store(&next)
			time.Sleep(lookAgain)
			synctest.Wait()
		}
		says := func(what string, times int) {
			t.Helper()
			if n := strings.Count(log.String(), what); n != times {
				t.Errorf("%q is said %d times, not %d:\n%s", what, n, times, &log)
			}
		}
		before := d.tree()
		certificate, key := newPair(t)
		for what, bad := range map[string]func(c *Containerd){
			"not printable":      func(c *Containerd) { c.Authorization = "Basic \x00" },
			"is it whole":        func(c *Containerd) { c.CA = certificate[:99] },
			"client certificate": func(c *Containerd) { c.Client = certificate + c.Client[strings.Index(c.Client, "-----BEGIN PRIVATE"):] },
			"does not exist":     nil,
		} {
			if bad == nil {
				now.Store(nil)
				time.Sleep(2 * lookAgain)
				synctest.Wait()
			} else {
				look(bad)
				look(bad)
			}
			d.same("while it is broken", d.tree(), before)
			says("level=WARN", 1)
			says(what, 1)
			log.clear()
		}
		look(func(*Containerd) {})
		says("level", 0)
		c.Authorization, c.CA = "Basic bmV3", c.CA+certificate
		look(func(*Containerd) {})
		says("the authorization has changed", 1)
		says("the authority's certificates have changed", 1)
		says("the client's certificate has changed", 0)
		says("level=WARN", 0)
		says("act=update", 2)
		if !strings.Contains(held(hostsFile), "Basic bmV3") || !strings.HasSuffix(held(caFile), c.CA) {
			t.Errorf("held: %s", held(hostsFile))
		}
		c.Client = certificate + key
		look(func(*Containerd) {})
		says("the client's certificate has changed", 1)
		if !strings.HasSuffix(held(clientFile), c.Client) {
			t.Errorf("held: %s", held(clientFile))
		}
		d.put("quay.io/hosts.toml", mark, 0o600) // which is no renewal
		look(func(*Containerd) {})
		says("level=WARN", 1)
		for _, secret := range []string{"b2xk", "bmV3", "BEGIN"} {
			says(secret, 0)
		}
		cancel()
		if err := <-ended; err != nil {
			t.Error(err)
		}
	})
}
