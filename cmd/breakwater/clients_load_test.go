//go:build linux

package main_test

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"breakwater/pkg/registrytest"

	"github.com/opencontainers/go-digest"
)

// huge is an upstream with one blob, which may be larger than memory: the same block again and again.
type huge struct {
	size   int64
	digest digest.Digest
	block  []byte // twice, so that a piece from anywhere in the first follows
	gets   atomic.Int64
	// released is closed when more than the first block may be sent.
	released chan struct{}
}

const blockSize = 1 << 20

// huge serves the blob at upstreamAddr, in every repository.
func (h *host) huge(t *testing.T, size int64) *huge {
	t.Helper()
	u := &huge{size: size, block: make([]byte, blockSize), released: make(chan struct{})}
	_, _ = rand.NewChaCha8([32]byte{65}).Read(u.block) // never fails
	u.block = slices.Concat(u.block, u.block)
	hash := sha256.New()
	_, _ = io.Copy(hash, u.content())
	u.digest = digest.NewDigest(digest.SHA256, hash)
	l, err := h.listen(upstreamAddr)
	if err != nil {
		t.Fatal(err)
	}
	server := registrytest.Serve(l, u)
	t.Cleanup(func() { _ = server.Close() })
	return u
}

func (u *huge) content() *io.SectionReader { return io.NewSectionReader(u, 0, u.size) }

// ReadAt is for content.
func (u *huge) ReadAt(p []byte, at int64) (n int, err error) {
	for n < len(p) {
		n += copy(p[n:], u.block[(at+int64(n))%blockSize:])
	}
	return n, nil
}

func (u *huge) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if !strings.HasSuffix(r.URL.Path, "/blobs/"+u.digest.String()) {
		http.NotFound(w, r)
		return
	}
	if r.Method == http.MethodGet {
		u.gets.Add(1)
	}
	w.Header().Set("Content-Type", "application/octet-stream")
	http.ServeContent(w, r, "", time.Time{}, held{u.content(), u})
}

// held is a body that waits until it is released.
type held struct {
	*io.SectionReader
	*huge
}

func (b held) Read(p []byte) (int, error) {
	if at, _ := b.Seek(0, io.SeekCurrent); at >= blockSize {
		<-b.released
	}
	return b.SectionReader.Read(p)
}

func (b held) ReadAt(p []byte, at int64) (int, error) { return b.SectionReader.ReadAt(p, at) }

// path is the blob's at the mirror.
func (u *huge) path() string { return "/v2/org/image/blobs/" + u.digest.String() }

// equal reads n bytes of a body and wants them to be the blob's, from its byte at on.
func (u *huge) equal(body io.Reader, at, n int64) error {
	got := make([]byte, min(n, 256<<10))
	for end := at + n; at < end; at += int64(len(got)) {
		got = got[:min(int64(len(got)), end-at)]
		if _, err := io.ReadFull(body, got); err != nil {
			return fmt.Errorf("after %d bytes: %w", at, err)
		}
		if !bytes.Equal(got, u.block[at%blockSize:][:len(got)]) {
			return fmt.Errorf("wrong bytes after %d", at)
		}
	}
	return nil
}

// get is the whole blob for one client.
func (h *host) get(u *huge) error {
	res, err := h.client().Get("http://" + mirrorAddr + u.path())
	if err != nil {
		return err
	}
	defer func() { _ = res.Body.Close() }()
	if res.StatusCode != http.StatusOK || res.ContentLength != u.size {
		return fmt.Errorf("%s with %d bytes", res.Status, res.ContentLength)
	}
	return u.equal(res.Body, 0, u.size)
}

// TestF34Herd has many clients want the same blob, which is not stored, at once.
func TestF34Herd(t *testing.T) {
	t.Parallel()
	h := newHost(t)
	u := h.huge(t, sized[int64](64<<20, 1<<30))
	m := h.serve(t, mirrored)
	n := sized(64, 500)
	var begun, clients sync.WaitGroup
	begun.Add(n)
	first := make([]time.Duration, n)
	begin := time.Now()
	for i := range n {
		clients.Go(func() {
			asked := time.Now()
			res, err := h.client().Get("http://" + mirrorAddr + u.path())
			if err == nil {
				err = u.equal(res.Body, 0, 1<<10)
			}
			first[i] = time.Since(asked)
			begun.Done()
			if err == nil {
				err = u.equal(res.Body, 1<<10, u.size-1<<10)
				_ = res.Body.Close()
			}
			if err != nil {
				t.Error(err)
			}
		})
	}
	begun.Wait() // all of them follow the one download
	close(u.released)
	clients.Wait()
	took := time.Since(begin)
	if n := u.gets.Load(); n != 1 {
		t.Errorf("%d downloads, want 1", n)
	}
	t.Logf("F34: %d clients had %d MiB in %v, %.0f MiB/s; the slowest first byte took %v",
		n, u.size>>20, took.Round(time.Millisecond), float64(int64(n)*u.size>>20)/took.Seconds(), slices.Max(first).Round(time.Millisecond))
	m.stop(t)
}

// slow asks for the blob on a connection with a small receive buffer: what the client does not read,
// the mirror can hardly send.
func (h *host) slow(t *testing.T, u *huge) io.Reader {
	t.Helper()
	var conn net.Conn
	var err error
	d := net.Dialer{Control: func(_, _ string, raw syscall.RawConn) error {
		var err error
		return errors.Join(raw.Control(func(fd uintptr) { err = syscall.SetsockoptInt(int(fd), syscall.SOL_SOCKET, syscall.SO_RCVBUF, 4<<10) }), err)
	}}
	h.do(func() { conn, err = d.Dial("tcp", mirrorAddr) })
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	_, _ = fmt.Fprintf(conn, "GET %s HTTP/1.1\r\nHost: %s\r\n\r\n", u.path(), mirrorAddr) // else there is no answer
	res, err := http.ReadResponse(bufio.NewReaderSize(conn, 1<<10), nil)
	if err != nil || res.StatusCode != http.StatusOK || res.ContentLength != u.size {
		t.Fatalf("%v, %v, want 200 with %d bytes", res, err, u.size)
	}
	return res.Body
}

// TestF65SlowClients has clients take 1 KiB/s of a large blob that is not stored. It is stored long
// before they have it, others are served as ever, and nobody is cut; in full, which takes longer, one
// who takes nothing is.
func TestF65SlowClients(t *testing.T) {
	t.Parallel()
	h := newHost(t)
	u := h.huge(t, sized[int64](64<<20, 5<<30))
	close(u.released)
	h.serve(t, mirrored)
	ctx, stop := context.WithTimeout(t.Context(), sized(70*time.Second, 5*time.Minute)) // in full, long enough for the cut
	defer stop()
	begin, n := time.Now(), sized(50, 500)
	var clients sync.WaitGroup
	for range n {
		body := h.slow(t, u)
		clients.Go(func() {
			for at := int64(0); ctx.Err() == nil; at += 1 << 10 {
				if err := u.equal(body, at, 1<<10); err != nil {
					t.Errorf("a slow client: %v", err)
					return
				}
				pause(ctx, time.Second)
			}
		})
	}
	h.slow(t, u) // and takes nothing
	within(t, sized(time.Minute, 3*time.Minute), func() error {
		_, err := os.Stat(filepath.Join(h.dir, "data", "blobs", "sha256", u.digest.Encoded()))
		return err
	})
	stored := time.Since(begin)
	var reads []time.Duration
	for ctx.Err() == nil {
		began := time.Now()
		if err := h.get(u); err != nil {
			t.Error(err)
		}
		reads = append(reads, time.Since(began))
		pause(ctx, time.Second)
	}
	clients.Wait()
	log, err := os.ReadFile(filepath.Join(h.dir, "mirror.log"))
	if err != nil {
		t.Fatal(err)
	}
	if cut := bytes.Count(log, []byte(`"broken"`)); cut != sized(0, 1) {
		t.Errorf("%d clients were cut, want %d", cut, sized(0, 1))
	}
	if slowest := slices.Max(reads); slowest > time.Duration(u.size>>20)*300*time.Millisecond {
		t.Errorf("another client needed %v for %d MiB", slowest, u.size>>20)
	}
	if n := u.gets.Load(); n != 1 {
		t.Errorf("%d downloads, want 1", n)
	}
	t.Logf("F65: %d MiB were stored after %v; beside %d slow clients another one needed %v for all of it, half of the time",
		u.size>>20, stored.Round(time.Millisecond), n, slices.Sorted(slices.Values(reads))[len(reads)/2].Round(time.Millisecond))
}

// pause waits beside programs that take real time.
func pause(ctx context.Context, d time.Duration) {
	select {
	case <-ctx.Done():
	case <-time.After(d):
	}
}

// TestF59Memory has many clients pull as many blobs at once from an upstream that takes a while. All get
// theirs, and the mirror's memory stays within 256 MiB.
func TestF59Memory(t *testing.T) {
	t.Parallel()
	h := newHost(t)
	n := sized(200, 2000)
	reg := registrytest.New(registrytest.Config{})
	reg.Fault(registrytest.Match{Kind: registrytest.KindBlob}, registrytest.Delay(sized(2*time.Second, 500*time.Millisecond)))
	l, err := h.listen(upstreamAddr)
	if err != nil {
		t.Fatal(err)
	}
	server := registrytest.Serve(l, reg)
	t.Cleanup(func() { _ = server.Close() })
	m := h.serve(t, mirrored)
	var clients sync.WaitGroup
	for i := range n {
		layer := registrytest.Layer(uint64(5900+i), 256<<10)
		dgst := reg.PutBlob("org/app", layer)
		clients.Go(func() {
			for range 10 { // as clients do that are told to come back
				got, err := h.ask(http.MethodGet, "http://"+mirrorAddr+"/v2/quay.io/org/app/blobs/"+dgst.String())
				if err == nil && got.status == http.StatusOK && got.body == string(layer) {
					return
				}
				if err != nil || got.status != http.StatusServiceUnavailable {
					t.Errorf("%s: %d, %v", dgst, got.status, err)
					return
				}
			}
			t.Errorf("%s could not be had", dgst)
		})
	}
	clients.Wait()
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", m.cmd.Process.Pid))
	if err != nil {
		t.Fatal(err)
	}
	_, peak, _ := strings.Cut(string(status), "VmHWM:")
	var kilobytes int
	if _, err := fmt.Sscan(peak, &kilobytes); err != nil {
		t.Fatal(err)
	}
	t.Logf("F59: %d pulls at once, at most %d MiB", n, kilobytes>>10)
	if kilobytes > 256<<10 {
		t.Errorf("%d KiB of memory", kilobytes)
	}
	m.stop(t)
}
