//go:build linux

package main_test

import (
	"errors"
	"io"
	"net"
	"net/http"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"breakwater/pkg/registrytest"
)

// TestF63StopWithDownloads stops the mirror while 200 downloads run: what can be finished within
// 30 s is finished, and stored; the rest is cut, and nothing that is cut is taken for whole.
func TestF63StopWithDownloads(t *testing.T) {
	t.Parallel()
	const running = 200
	for _, row := range []struct {
		name  string
		fault registrytest.Fault // of the upstream's blobs
		then  func(*upstream)    // once the mirror stops
		whole int
		limit time.Duration
		later func(*upstream) // before the mirror serves again
	}{
		{"finished", registrytest.Stall(512 << 10), func(u *upstream) { u.Heal() }, running, 30 * time.Second, (*upstream).kill},
		{"cut", registrytest.Drip(1<<10, 100*time.Millisecond), func(*upstream) {}, 0, 35 * time.Second, func(u *upstream) { u.Heal() }},
	} {
		t.Run(row.name, func(t *testing.T) {
			t.Parallel()
			h := newHost(t)
			up := h.upstream(t)
			image := greeter(t, 1)
			up.push(t, "org/image", "latest", image)
			up.Fault(registrytest.Match{Kind: registrytest.KindBlob}, row.fault)
			m := h.serve(t, mirrored)
			d := h.download(t, image.Blobs[1:3], running)
			begin := time.Now()
			if err := m.cmd.Process.Signal(syscall.SIGTERM); err != nil {
				t.Fatal(err)
			}
			within(t, 2*time.Second, func() error {
				if conn, err := h.dial(mirrorAddr); err == nil {
					_ = conn.Close()
					return errors.New("the mirror still accepts")
				}
				return nil
			})
			row.then(up)
			if whole := d.wait(); whole != row.whole {
				t.Errorf("%d of %d downloads were finished, want %d", whole, running, row.whole)
			}
			<-m.ended
			if took := time.Since(begin); m.err != nil || took > row.limit {
				t.Errorf("ended after %v: %v, want status 0 within %v", took, m.err, row.limit)
			}
			row.later(up)
			m = h.serve(t, mirrored)
			if whole := h.download(t, image.Blobs[1:3], 2).wait(); whole != 2 {
				t.Errorf("%d of 2 blobs could be had afterwards", whole)
			}
			m.stop(t)
		})
	}
}

// downloads are requests for blobs whose answers have begun.
type downloads struct {
	running sync.WaitGroup
	mu      sync.Mutex // guards whole
	whole   int
}

// download begins n downloads, of each blob in turn, and returns when all of them run.
func (h *host) download(t *testing.T, blobs []registrytest.Blob, n int) *downloads {
	t.Helper()
	d := &downloads{}
	var begun sync.WaitGroup
	begun.Add(n)
	for i := range n {
		blob := blobs[i%len(blobs)]
		d.running.Go(func() {
			res, err := h.client().Get("http://" + mirrorAddr + "/v2/org/image/blobs/" + blob.Digest.String())
			begun.Done()
			if err != nil {
				t.Error(err)
				return
			}
			defer func() { _ = res.Body.Close() }()
			body, err := io.ReadAll(res.Body)
			if err != nil && res.StatusCode == http.StatusOK {
				return // cut short, and the client knows
			}
			if string(body) != string(blob.Bytes) {
				t.Errorf("%d with %d bytes, want the blob's %d", res.StatusCode, len(body), len(blob.Bytes))
				return
			}
			d.mu.Lock()
			defer d.mu.Unlock()
			d.whole++
		})
	}
	begun.Wait()
	return d
}

// wait returns how many were downloaded whole.
func (d *downloads) wait() int {
	d.running.Wait()
	return d.whole
}

func (h *host) dial(addr string) (conn net.Conn, err error) {
	h.do(func() { conn, err = net.Dial("tcp", addr) })
	return conn, err
}

// TestF68TwoMirrorsOnOneFolder starts a second mirror on the folder of the first, which goes on.
func TestF68TwoMirrorsOnOneFolder(t *testing.T) {
	h := newHost(t)
	m := h.serve(t, mirrored)
	folder := filepath.Join(h.dir, "data")
	begin := time.Now()
	out, err := h.output(h.command(t.Context(), nil, binary(t), "serve", "--config", "",
		"--listen", "127.0.0.1:6000", "--admin", "127.0.0.1:6001", "--data", folder))
	if err == nil || !strings.Contains(out, folder) || !strings.Contains(out, "in use") {
		t.Errorf("%v: %s, want to be told that %s is in use", err, out, folder)
	}
	if took := time.Since(begin); took > time.Second+scheduling {
		t.Errorf("refused after %v, want 1s", took)
	}
	if got, err := h.ask(http.MethodGet, "http://"+mirrorAddr+"/v2/"); err != nil || got.status != http.StatusOK {
		t.Errorf("the first mirror: %d %v, want 200", got.status, err)
	}
	m.stop(t)
}
