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

func (s *said) String() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.log.String()
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
		go func() { ended <- c.Hold(ctx, slog.New(slog.NewTextHandler(&log, nil))) }()
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
		go func() { ended <- d.containerd().Hold(ctx, slog.New(slog.NewTextHandler(&log, nil))) }()
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
	if err := d.containerd().Hold(t.Context(), slog.New(slog.DiscardHandler)); err == nil {
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
		go func() { ended <- c.Hold(t.Context(), slog.New(slog.DiscardHandler)) }()
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
