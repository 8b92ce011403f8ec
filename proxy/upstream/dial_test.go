package upstream

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptrace"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
)

// wire is a network in memory: what names resolve to, what addresses do, and who was asked.
type wire struct {
	names   map[string][]string // host -> addresses
	refuses map[string]bool     // ip:port
	silent  map[string]bool     // ip:port that never answers
	serve   func(net.Conn)      // the far end of a connection; nil only closes it at the near end's close
	slow    time.Duration       // each connection takes so long

	waiting atomic.Int32 // for addresses that never answer

	mu      sync.Mutex
	lookups []string
	dials   []string
	far     []net.Conn
}

var errRefused = errors.New("connection refused")

func (w *wire) dialer(allowed ...string) *dialer {
	return &dialer{
		lookup: func(_ context.Context, host string) ([]netip.Addr, error) {
			w.mu.Lock()
			defer w.mu.Unlock()
			w.lookups = append(w.lookups, host)
			var ips []netip.Addr
			for _, s := range w.names[host] {
				ips = append(ips, netip.MustParseAddr(s))
			}
			if ips == nil {
				return nil, &net.DNSError{Err: "no such host", Name: host, IsNotFound: true}
			}
			return ips, nil
		},
		dial: func(ctx context.Context, _, ipport string) (net.Conn, error) {
			w.mu.Lock()
			w.dials = append(w.dials, ipport)
			w.mu.Unlock()
			switch {
			case w.refuses[ipport]:
				return nil, fmt.Errorf("%s: %w", ipport, errRefused)
			case w.silent[ipport]:
				w.waiting.Add(1)
				defer w.waiting.Add(-1)
				<-ctx.Done()
				return nil, ctx.Err()
			}
			time.Sleep(w.slow) // does not look at ctx: a connection that comes too late
			near, far := net.Pipe()
			w.mu.Lock()
			w.far = append(w.far, far)
			w.mu.Unlock()
			if w.serve != nil {
				go w.serve(far)
			}
			return near, nil
		},
		allowed: func(hostport string) bool { return slices.Contains(allowed, hostport) },
		refused: new(atomic.Int64),
	}
}

// open counts the connections whose near end is not closed.
func (w *wire) open() int {
	w.mu.Lock()
	defer w.mu.Unlock()
	n := 0
	for _, far := range w.far {
		_ = far.SetReadDeadline(time.Now().Add(time.Millisecond))
		if _, err := far.Read(make([]byte, 1)); !errors.Is(err, io.EOF) {
			n++
		}
	}
	return n
}

func wantPhase(t *testing.T, err error, phase, host string) {
	t.Helper()
	dial := new(DialError)
	if !errors.As(err, &dial) || dial.Phase != phase || dial.Host != host {
		t.Errorf("error is %v, want a DialError of phase %s, host %s", err, phase, host)
	}
}

func TestH29NothingPrivateIsReached(t *testing.T) {
	tests := []struct {
		host    string // as in a URL
		lookups []string
	}{
		{"169.254.169.254", nil},
		{"127.0.0.1", nil},
		{"127.1", nil},
		{"2130706433", nil},
		{"0x7f000001", nil},
		{"0177.0.0.1", nil},
		{"0x7f.1", nil},
		{"127.0.0.1.", nil},
		{"0.0.0.0", nil},
		{"0", nil},
		{"100.100.100.200", nil},
		{"255.255.255.255", nil},
		{"１２７.0.0.1", nil}, // net/http makes ASCII of it
		{"[::]", nil},
		{"[::1]", nil},
		{"[::ffff:169.254.169.254]", nil},
		{"[::ffff:a9fe:a9fe]", nil},
		{"[64:ff9b::a9fe:a9fe]", nil},
		{"[fd00:ec2::254]", nil},
		{"[fe80::1%25eth0]", nil},
		{"metadata.internal", []string{"metadata.internal"}},
		{"both.internal", []string{"both.internal"}},
	}
	for _, tt := range tests {
		t.Run(tt.host, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := &wire{names: map[string][]string{
					"registry.example":  {"192.0.2.1"},
					"metadata.internal": {"169.254.169.254"},
					"both.internal":     {"10.0.0.1", "::ffff:10.0.0.1", "fd00::1"},
				}}
				w.serve = func(conn net.Conn) {
					defer conn.Close()
					if _, err := http.ReadRequest(bufio.NewReader(conn)); err == nil {
						fmt.Fprintf(conn, "HTTP/1.1 302 Found\r\nLocation: http://%s/secret\r\nContent-Length: 0\r\nConnection: close\r\n\r\n", tt.host)
					}
				}
				transport := &http.Transport{DialContext: w.dialer().DialContext}
				defer transport.CloseIdleConnections()
				resp, err := (&http.Client{Transport: transport}).Get("http://registry.example/v2/")
				if err == nil {
					resp.Body.Close()
					t.Fatalf("it was reached: %s", resp.Status)
				}
				dial := new(DialError)
				if !errors.As(err, &dial) || dial.Phase != "guard" {
					t.Errorf("error is %v, want a DialError of phase guard", err)
				}
				if diff := cmp.Diff([]string{"192.0.2.1:80"}, w.dials); diff != "" {
					t.Errorf("dials (-want +got):\n%s", diff)
				}
				if diff := cmp.Diff(append([]string{"registry.example"}, tt.lookups...), w.lookups); diff != "" {
					t.Errorf("lookups (-want +got):\n%s", diff)
				}
			})
		})
	}
}

func TestH29OddAddressesAreRefusedAtOnce(t *testing.T) {
	for _, address := range []string{"", "quay.io", ":443", "quay.io:", "quay.io:https", "quay.io:0", "quay.io:65536", "quay.io:-1", "127.1:443", "::1:443", "qu ay.io:443"} {
		w := &wire{}
		_, err := w.dialer(address).DialContext(t.Context(), "tcp", address) // even if it is configured
		wantPhase(t, err, "guard", address)
		if len(w.lookups)+len(w.dials) > 0 {
			t.Errorf("%q: looked up %v, dialled %v, want nothing", address, w.lookups, w.dials)
		}
	}
}

func TestH29ConfiguredHostsMayBePrivate(t *testing.T) {
	names := map[string][]string{"registry.internal": {"10.0.0.1"}, "mixed.example": {"10.0.0.1", "192.0.2.1"}}
	for address, want := range map[string]string{
		"registry.internal:5000":      "10.0.0.1:5000",
		"127.0.0.1:5000":              "127.0.0.1:5000",
		"[::1]:5000":                  "[::1]:5000",
		"[fe80::1%eth0]:5000":         "[fe80::1%eth0]:5000",
		"mixed.example:443":           "192.0.2.1:443", // not configured: what is private is left out
		"[::ffff:192.0.2.7]:443":      "192.0.2.7:443",
		"[64:ff9b::192.0.2.7]:443":    "[64:ff9b::c000:207]:443",
		"registry.internal:5001":      "", // another port
		"[::ffff:127.0.0.1]:5000":     "", // another spelling
		"registry.internal.evil:5000": "",
	} {
		w := &wire{names: names}
		conn, err := w.dialer("registry.internal:5000", "127.0.0.1:5000", "[::1]:5000", "[fe80::1%eth0]:5000").DialContext(t.Context(), "tcp", address)
		if want == "" {
			if err == nil || len(w.dials) > 0 {
				t.Errorf("%s: dialled %v, want it refused", address, w.dials)
			}
			continue
		}
		if err != nil {
			t.Errorf("%s: %v", address, err)
			continue
		}
		conn.Close()
		if diff := cmp.Diff([]string{want}, w.dials); diff != "" {
			t.Errorf("%s: dials (-want +got):\n%s", address, diff)
		}
	}
}

func TestF25NamesThatDoNotResolve(t *testing.T) {
	tests := []struct {
		name   string
		lookup func(ctx context.Context, host string) ([]netip.Addr, error)
		within time.Duration
		want   string
	}{
		{"NXDOMAIN", func(_ context.Context, host string) ([]netip.Addr, error) {
			return nil, &net.DNSError{Err: "no such host", Name: host, IsNotFound: true}
		}, 0, "no such host"},
		{"SERVFAIL", func(_ context.Context, host string) ([]netip.Addr, error) {
			return nil, &net.DNSError{Err: "server misbehaving", Name: host, IsTemporary: true}
		}, 0, "server misbehaving"},
		{"5 s delay", func(ctx context.Context, _ string) ([]netip.Addr, error) {
			select {
			case <-time.After(5 * time.Second):
				return []netip.Addr{netip.MustParseAddr("192.0.2.1")}, nil
			case <-ctx.Done():
				return nil, ctx.Err()
			}
		}, 2 * time.Second, "deadline exceeded"},
		{"empty", func(context.Context, string) ([]netip.Addr, error) { return nil, nil }, 0, "no addresses"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := &wire{}
				d := w.dialer("quay.io:443")
				d.lookup = tt.lookup
				begin := time.Now()
				_, err := d.DialContext(t.Context(), "tcp", "quay.io:443")
				wantPhase(t, err, "dns", "quay.io:443")
				if err == nil || !strings.Contains(err.Error(), tt.want) {
					t.Errorf("error %v does not say %q", err, tt.want)
				}
				if took := time.Since(begin); took != tt.within {
					t.Errorf("took %v, want %v", took, tt.within)
				}
				if len(w.dials) > 0 {
					t.Errorf("dialled %v", w.dials)
				}
			})
		})
	}
}

func TestDialTriesAddressesInTurn(t *testing.T) {
	names := map[string][]string{
		"quay.io":   {"2606:4700::1", "2606:4700::2", "2606:4700::3", "192.0.2.1"},
		"docker.io": {"192.0.2.1", "192.0.2.2", "2606:4700::1"},
	}
	many := make([]string, 100)
	for i := range many {
		many[i] = fmt.Sprintf("192.0.2.%d", i)
	}
	names["many.example"] = many
	all := func(host string) map[string]bool {
		set := map[string]bool{}
		for _, ip := range names[host] {
			set[net.JoinHostPort(ip, "443")] = true
		}
		return set
	}
	tests := []struct {
		name   string
		host   string
		wire   *wire
		within time.Duration
		want   []string // in order; nil does not matter
		err    string
	}{
		{"the first is well", "quay.io", &wire{}, 0, []string{"[2606:4700::1]:443"}, ""},
		{"the first is black-holed", "quay.io", &wire{silent: map[string]bool{"[2606:4700::1]:443": true}},
			250 * time.Millisecond, []string{"[2606:4700::1]:443", "192.0.2.1:443"}, ""},
		{"one family is black-holed", "docker.io", &wire{silent: map[string]bool{"192.0.2.1:443": true, "192.0.2.2:443": true}},
			250 * time.Millisecond, []string{"192.0.2.1:443", "[2606:4700::1]:443"}, ""},
		{"the first refuses", "docker.io", &wire{refuses: map[string]bool{"192.0.2.1:443": true}},
			0, []string{"192.0.2.1:443", "[2606:4700::1]:443"}, ""},
		{"all refuse", "quay.io", &wire{refuses: all("quay.io")},
			0, []string{"[2606:4700::1]:443", "192.0.2.1:443", "[2606:4700::2]:443", "[2606:4700::3]:443"}, "[2606:4700::1]:443: connection refused"},
		{"all are black-holed", "quay.io", &wire{silent: all("quay.io")}, 3 * time.Second, nil, "deadline exceeded"},
		{"a hundred are black-holed", "many.example", &wire{silent: all("many.example")}, 3 * time.Second, nil, "deadline exceeded"},
		{"a hundred refuse", "many.example", &wire{refuses: all("many.example")}, 0, nil, "connection refused"},
		{"slower than the delay", "docker.io", &wire{slow: 300 * time.Millisecond},
			300 * time.Millisecond, []string{"192.0.2.1:443", "[2606:4700::1]:443"}, ""},
		{"slower than the bound", "docker.io", &wire{slow: 4 * time.Second}, 3 * time.Second, nil, "deadline exceeded"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := tt.wire
				w.names = names
				begin := time.Now()
				conn, err := w.dialer().DialContext(t.Context(), "tcp", tt.host+":443")
				if took := time.Since(begin); took != tt.within {
					t.Errorf("took %v, want %v", took, tt.within)
				}
				if tt.err != "" {
					wantPhase(t, err, "dial", tt.host+":443")
					if err == nil || !strings.Contains(err.Error(), tt.err) {
						t.Errorf("error is %v, want %q", err, tt.err)
					}
				} else if err != nil {
					t.Fatal(err)
				}
				synctest.Wait()
				if n := w.waiting.Load(); n > 0 {
					t.Errorf("%d attempts are still under way", n)
				}
				time.Sleep(10 * time.Second) // the slow ones arrive
				synctest.Wait()
				if tt.want != nil {
					if diff := cmp.Diff(tt.want, w.dials); diff != "" {
						t.Errorf("dials (-want +got):\n%s", diff)
					}
				}
				if len(w.dials) > maxAddresses {
					t.Errorf("%d dials, want at most %d", len(w.dials), maxAddresses)
				}
				left := 0
				if conn != nil {
					left = 1
				}
				if open := w.open(); open != left {
					t.Errorf("%d connections are open, want %d", open, left)
				}
				if conn != nil {
					conn.Close()
				}
			})
		})
	}
}

// Whoever does not wait any more has not seen the host fail.
func TestDialEndsWithItsContext(t *testing.T) {
	for _, phase := range []string{"dns", "dial"} {
		synctest.Test(t, func(t *testing.T) {
			w := &wire{silent: map[string]bool{"192.0.2.1:443": true}, names: map[string][]string{"quay.io": {"192.0.2.1"}}}
			d := w.dialer()
			if phase == "dns" {
				d.lookup = func(ctx context.Context, _ string) ([]netip.Addr, error) {
					<-ctx.Done()
					return nil, ctx.Err()
				}
			}
			ctx, cancel := context.WithTimeout(t.Context(), time.Second)
			defer cancel()
			begin := time.Now()
			_, err := d.DialContext(ctx, "tcp", "quay.io:443")
			if took := time.Since(begin); took != time.Second || !errors.Is(err, context.DeadlineExceeded) {
				t.Errorf("%s: %v after %v, want the context's error after 1s", phase, err, took)
			}
			if dial := new(DialError); errors.As(err, &dial) {
				t.Errorf("%s: %v blames the host", phase, err)
			}
		})
	}
}

// counts of httptrace's hooks, which the proxy takes for phases completed.
type hooks struct {
	mu   sync.Mutex
	said []string
}

func (h *hooks) trace(ctx context.Context) context.Context {
	say := func(format string, args ...any) {
		h.mu.Lock()
		defer h.mu.Unlock()
		h.said = append(h.said, fmt.Sprintf(format, args...))
	}
	return httptrace.WithClientTrace(ctx, &httptrace.ClientTrace{
		DNSStart:     func(i httptrace.DNSStartInfo) { say("lookup %s", i.Host) },
		DNSDone:      func(i httptrace.DNSDoneInfo) { say("found %v %v", i.Addrs, i.Err) },
		ConnectStart: func(network, addr string) { say("connect %s %s", network, addr) },
		ConnectDone:  func(network, addr string, err error) { say("connected %s %s %v", network, addr, err) },
	})
}

func TestDialFiresTraces(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := &wire{names: map[string][]string{"quay.io": {"2606:4700::1", "192.0.2.1"}}, refuses: map[string]bool{"[2606:4700::1]:443": true}}
		var h hooks
		conn, err := w.dialer().DialContext(h.trace(t.Context()), "tcp", "quay.io:443")
		if err != nil {
			t.Fatal(err)
		}
		conn.Close()
		want := []string{
			"lookup quay.io", "found [{2606:4700::1 } {192.0.2.1 }] <nil>",
			"connect tcp [2606:4700::1]:443", "connected tcp [2606:4700::1]:443 [2606:4700::1]:443: connection refused",
			"connect tcp 192.0.2.1:443", "connected tcp 192.0.2.1:443 <nil>",
		}
		if diff := cmp.Diff(want, h.said); diff != "" {
			t.Errorf("hooks (-want +got):\n%s", diff)
		}
	})
}

// The system's resolver and dialer know the hooks as well: each must fire once all the same.
func TestDialBySystemFiresTracesOnce(t *testing.T) {
	listener, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	_, port, _ := net.SplitHostPort(listener.Addr().String())
	d := &dialer{allowed: func(string) bool { return true }}
	for _, host := range []string{"localhost", "127.0.0.1"} {
		var h hooks
		conn, err := d.DialContext(h.trace(t.Context()), "tcp", net.JoinHostPort(host, port))
		if err != nil {
			t.Fatal(err)
		}
		conn.Close()
		for i, said := range h.said {
			if slices.Contains(h.said[:i], said) {
				t.Errorf("%s: said twice: %s", host, said)
			}
		}
		if last := fmt.Sprintf("connected tcp 127.0.0.1:%s <nil>", port); !slices.Contains(h.said, last) {
			t.Errorf("%s: never said %q but %q", host, last, h.said)
		}
		if named := strings.HasPrefix(h.said[0], "lookup "); named != (host == "localhost") {
			t.Errorf("%s: first said %q", host, h.said[0])
		}
	}
}
