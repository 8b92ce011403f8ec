//go:build linux

package main_test

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"breakwater/pkg/registrytest"
)

// slowDown gives a process a share of one processor, so that the tests' own can ask of it more than it
// can do.
func slowDown(t *testing.T, pid int, share float64) {
	t.Helper()
	const period = 20_000 // microseconds
	quota := strconv.Itoa(int(share * period))
	name := fmt.Sprintf("breakwater-slow-%d", time.Now().UnixNano())
	groups := []struct {
		folder string
		limits [][2]string
	}{
		{"/sys/fs/cgroup/cpu", [][2]string{{"cpu.cfs_period_us", strconv.Itoa(period)}, {"cpu.cfs_quota_us", quota}}},
		{"/sys/fs/cgroup", [][2]string{{"cpu.max", quota + " " + strconv.Itoa(period)}}},
	}
	var failed error
	for _, group := range groups {
		folder := filepath.Join(group.folder, name)
		err := os.Mkdir(folder, 0o755)
		if err == nil {
			t.Cleanup(func() { _ = os.Remove(folder) }) // it is empty once the process has ended
			for _, limit := range append(group.limits, [2]string{"cgroup.procs", strconv.Itoa(pid)}) {
				err = errors.Join(err, os.WriteFile(filepath.Join(folder, limit[0]), []byte(limit[1]), 0))
			}
		}
		if err == nil {
			return
		}
		if !errors.Is(err, fs.ErrNotExist) {
			failed = errors.Join(failed, err)
		}
	}
	cannot(t, "no control group for processors: %v", failed)
}

// TestF38Overload asks of the mirror three times what it can do, then half of it. What it could not do
// must not hold up what comes later.
func TestF38Overload(t *testing.T) {
	h := newHost(t)
	l, err := h.listen(upstreamAddr)
	if err != nil {
		t.Fatal(err)
	}
	reg := registrytest.New(registrytest.Config{})
	server := registrytest.Serve(l, reg)
	t.Cleanup(func() { _ = server.Close() })
	// A tenth of a processor, and so a tenth of the queue of connections that wait to be accepted.
	if out, err := h.output(h.command(t.Context(), nil, "sh", "-c", "echo 400 >/proc/sys/net/core/somaxconn")); err != nil {
		cannot(t, "no setting of the network: %v %s", err, out)
	}
	m := h.serve(t, mirrored)
	slowDown(t, m.cmd.Process.Pid, 0.1)
	c := newCrowd(t, h, reg)
	capacity := c.capacity(2 * time.Second)
	before, overload := c.sent.Load(), sized(10*time.Second, time.Minute)
	during := c.ask(3*capacity, overload)
	if offered := float64(c.sent.Load()-before) / overload.Seconds(); offered < 2*capacity {
		t.Errorf("the load was %.0f requests a second, want %.0f: nothing was tested", offered, 3*capacity)
	}
	const recovery, normal = 10, 3 // seconds
	after := c.ask(capacity/2, (recovery+normal)*time.Second)
	c.asking.Wait()
	troubled := 0
	for i := range after {
		if after[i].bad.Load() == 0 && float64(after[i].good.Load()) > 0.8*capacity/2 {
			continue
		}
		if troubled = i + 1; i >= recovery {
			t.Errorf("in second %d after the overload only %v were answered, want %.0f", i, &after[i], capacity/2)
		}
	}
	t.Logf("F38: %.0f requests a second can be answered; of three times as many %v in the last second; of half as many all, %d s later",
		capacity, &during[len(during)-1], troubled)
	m.stop(t)
}

// crowd is clients that do not wait for each other, have a connection each, and give up after a while.
type crowd struct {
	*testing.T
	host   *host
	stored [][2][]byte // requests, and bodies of their answers
	unseen [][2][]byte // the same, each for once
	next   atomic.Int64
	sent   atomic.Int64
	asking sync.WaitGroup
}

// tally is the requests that began in one second, by what became of them.
type tally struct{ good, bad atomic.Int64 }

func (n *tally) String() string {
	return fmt.Sprintf("%d of %d", n.good.Load(), n.good.Load()+n.bad.Load())
}

const unseenOf = 20 // one request of so many is for what is not stored

func newCrowd(t *testing.T, h *host, reg *registrytest.Registry) *crowd {
	t.Helper()
	c := &crowd{T: t, host: h}
	get := func(path string, body []byte) [2][]byte {
		return [2][]byte{fmt.Appendf(nil, "GET /v2/org/image%s HTTP/1.1\r\nHost: %s\r\nAccept: */*\r\nConnection: close\r\n\r\n", path, mirrorAddr), body}
	}
	for i := range 20 {
		image := registrytest.NewImage(registrytest.Layer(uint64(i), 4<<10))
		reg.Push("org/image", fmt.Sprint("v", i), image)
		c.stored = append(c.stored, get("/blobs/"+image.Blobs[1].Digest.String(), image.Blobs[1].Bytes),
			get("/manifests/"+image.Digest().String(), image.Raw), get(fmt.Sprint("/manifests/v", i), image.Raw))
	}
	for i := range 20_000 {
		raw := strconv.AppendInt(nil, int64(i), 10)
		c.unseen = append(c.unseen, get("/blobs/"+reg.PutBlob("org/image", raw).String(), raw))
	}
	for _, request := range c.stored {
		if err := c.get(request); err != nil {
			t.Fatal(err)
		}
	}
	return c
}

// one asks for the next thing.
func (c *crowd) one() error {
	i := int(c.next.Add(1))
	if i%unseenOf == 0 {
		return c.get(c.unseen[i/unseenOf%len(c.unseen)])
	}
	return c.get(c.stored[i%len(c.stored)])
}

// get wants the right answer within two seconds, and not a stale one.
func (c *crowd) get(request [2][]byte) error {
	c.sent.Add(1)
	conn, err := c.host.connect(netip.MustParseAddrPort(mirrorAddr))
	if err != nil {
		return err
	}
	defer func() { _ = conn.Close() }()
	_ = conn.SetDeadline(time.Now().Add(2 * time.Second))
	if _, err = conn.Write(request[0]); err != nil {
		return err
	}
	res, err := http.ReadResponse(bufio.NewReader(conn), nil)
	if err != nil {
		return err
	}
	body, err := io.ReadAll(res.Body)
	if err == nil && (res.StatusCode != http.StatusOK || !bytes.Equal(body, request[1]) || res.Header.Get("Warning") != "") {
		err = fmt.Errorf("%.60q: %s, %v, %.100q", request[0], res.Status, res.Header, body)
	}
	return err
}

// connect begins to connect. What is written waits for it, under the connection's deadline: the host's
// thread makes the sockets of many clients, and must not wait for one.
func (h *host) connect(addr netip.AddrPort) (net.Conn, error) {
	var fd int
	var err error
	h.do(func() {
		fd, err = syscall.Socket(syscall.AF_INET, syscall.SOCK_STREAM|syscall.SOCK_NONBLOCK|syscall.SOCK_CLOEXEC, 0)
	})
	if err != nil {
		return nil, err
	}
	file := os.NewFile(uintptr(fd), "")
	defer func() { _ = file.Close() }()
	err = syscall.Connect(fd, &syscall.SockaddrInet4{Addr: addr.Addr().As4(), Port: int(addr.Port())})
	if err != nil && !errors.Is(err, syscall.EINPROGRESS) {
		return nil, err
	}
	return net.FileConn(file)
}

// capacity is how many requests a second are answered to clients that wait for their answers.
func (c *crowd) capacity(d time.Duration) float64 {
	var clients sync.WaitGroup
	var answered atomic.Int64
	begin := time.Now()
	for range 16 {
		clients.Go(func() {
			for time.Since(begin) < d {
				if err := c.one(); err != nil {
					c.Error(err)
					return
				}
				answered.Add(1)
			}
		})
	}
	clients.Wait()
	return float64(answered.Load()) / time.Since(begin).Seconds()
}

// ask begins so many requests a second, whatever becomes of them: the tallies are true once the last
// has ended.
func (c *crowd) ask(rate float64, d time.Duration) []tally {
	tallies := make([]tally, int(d.Seconds()))
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for begin, begun := time.Now(), 0.0; ; <-tick.C {
		since := time.Since(begin)
		if since >= d {
			return tallies
		}
		for ; begun < rate*since.Seconds(); begun++ {
			n := &tallies[int(since.Seconds())]
			c.asking.Go(func() {
				if c.one() == nil {
					n.good.Add(1)
				} else {
					n.bad.Add(1)
				}
			})
		}
	}
}
