package registrytest

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/net/nettest"
)

func TestMain(m *testing.M) {
	goleak.VerifyTestMain(m, goleak.IgnoreAnyFunction("github.com/docker/go-events.(*Broadcaster).run")) // of Real
}

// client is an HTTP client on the network, closed at the end of the test.
func client(t *testing.T, n *Network) *http.Client {
	transport := &http.Transport{DialContext: n.DialContext, TLSClientConfig: &tls.Config{RootCAs: n.CA.Pool()}, DisableCompression: true}
	t.Cleanup(transport.CloseIdleConnections)
	return &http.Client{Transport: transport}
}

// pair is a connection to an address of the network, both ends.
func pair(n *Network, address string) (client, server net.Conn, stop func(), err error) {
	l, err := n.Listen(address)
	if err != nil {
		return nil, nil, nil, err
	}
	if client, err = n.DialContext(context.Background(), "tcp", address); err != nil {
		return nil, nil, nil, err
	}
	if server, err = l.Accept(); err != nil {
		return nil, nil, nil, err
	}
	return client, server, func() { _, _, _ = client.Close(), server.Close(), l.Close() }, nil
}

func TestConnIsANetConn(t *testing.T) {
	nettest.TestConn(t, func() (c1, c2 net.Conn, stop func(), err error) {
		return pair(NewNetwork(), "a.test:1")
	})
}

func TestHTTPSInABubble(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := NewNetwork()
		n.SetLink("quay.test:443", Link{Latency: 200 * time.Millisecond})
		reg := New(Config{})
		image := NewImage(Layer(1, 3<<20))
		reg.Push("org/app", "latest", image)
		server := reg.Serve(t, n, "quay.test:443")
		start := time.Now()
		resp, err := client(t, n).Get(server.URL + "/v2/org/app/blobs/" + image.Blobs[1].Digest.String())
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		if took := time.Since(start); took != 600*time.Millisecond { // dial, TLS, request
			t.Errorf("header after %v", took)
		}
		body, err := io.ReadAll(resp.Body)
		if err != nil || string(body) != string(image.Blobs[1].Bytes) {
			t.Errorf("%d bytes, %v", len(body), err)
		}
	})
}

func TestLinkFaults(t *testing.T) {
	const address = "quay.test:443"
	dial := func(n *Network, d time.Duration) (time.Duration, error) {
		ctx, cancel := context.WithTimeout(context.Background(), d)
		defer cancel()
		start := time.Now()
		c, err := n.DialContext(ctx, "tcp", address)
		if err == nil {
			err = c.Close()
		}
		return time.Since(start), err
	}
	synctest.Test(t, func(t *testing.T) {
		n := NewNetwork()
		n.SetLink(address, Link{})
		if _, err := dial(n, time.Second); !errors.Is(err, syscall.ECONNREFUSED) {
			t.Errorf("nobody listens: %v", err)
		}
		l, err := n.Listen(address)
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		n.SetLink(address, Link{Refuse: true})
		if took, err := dial(n, time.Second); !errors.Is(err, syscall.ECONNREFUSED) || took != 0 {
			t.Errorf("refused: %v after %v", err, took)
		}
		n.SetLink(address, Link{BlackHole: true})
		var timeout net.Error
		if took, err := dial(n, 3*time.Second); !errors.As(err, &timeout) || !timeout.Timeout() || took != 3*time.Second {
			t.Errorf("black hole: %v after %v", err, took)
		}
		time.AfterFunc(time.Second, func() { n.SetLink(address, Link{}) })
		if took, err := dial(n, 3*time.Second); err != nil || took != time.Second {
			t.Errorf("healed black hole: %v after %v", err, took)
		}
		n.SetLink(address, Link{Latency: 50 * time.Millisecond})
		if took, err := dial(n, time.Second); err != nil || took != 50*time.Millisecond {
			t.Errorf("latency: %v after %v", err, took)
		}
		if dials := n.Dials(address); len(dials) != 5 || len(n.Dials("")) != 5 || len(n.Lookups("quay.test")) != 5 {
			t.Errorf("dials %v, look-ups %v", dials, n.Lookups(""))
		}
	})
}

func TestLinkBreaksConnections(t *testing.T) {
	const address = "a.test:1"
	for _, test := range []struct {
		name string
		link Link
		act  func(*Network)
		want error // what the client reads after the first bytes
		read int
	}{
		{"cut", Link{CutAfter: 4}, nil, io.EOF, 4},
		{"reset", Link{ResetAfter: 4}, nil, syscall.ECONNRESET, 4},
		{"stall", Link{StallAfter: 4}, nil, context.DeadlineExceeded, 4},
		{"silent", Link{Silent: true}, nil, context.DeadlineExceeded, 0},
		{"dropped", Link{}, func(n *Network) { n.Drop(address) }, context.DeadlineExceeded, 0},
		{"restarted", Link{}, func(n *Network) { n.Reset(address) }, syscall.ECONNRESET, 0},
		{"unplugged", Link{}, func(n *Network) { n.SetLink(address, Link{BlackHole: true}) }, context.DeadlineExceeded, 0},
	} {
		synctest.Test(t, func(t *testing.T) {
			n := NewNetwork()
			n.SetLink(address, test.link)
			client, server, stop, err := pair(n, address)
			if err != nil {
				t.Fatal(err)
			}
			defer stop()
			if test.act != nil {
				test.act(n)
			}
			go func() { _, _ = server.Write([]byte("123456789")) }()
			_ = client.SetReadDeadline(time.Now().Add(time.Minute))
			got, err := io.ReadAll(client)
			var timeout net.Error
			switch {
			case len(got) != test.read:
				t.Errorf("%s: read %q", test.name, got)
			case errors.Is(test.want, io.EOF) && err != nil:
				t.Errorf("%s: %v", test.name, err)
			case errors.Is(test.want, syscall.ECONNRESET) && !errors.Is(err, syscall.ECONNRESET):
				t.Errorf("%s: %v", test.name, err)
			case errors.Is(test.want, context.DeadlineExceeded) && (!errors.As(err, &timeout) || !timeout.Timeout()):
				t.Errorf("%s: %v", test.name, err)
			}
		})
	}
}

func TestNames(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := NewNetwork()
		reg := New(Config{})
		reg.Serve(t, n, "quay.test:80")
		first, err := n.Lookup(t.Context(), "quay.test")
		if err != nil || len(first) != 1 {
			t.Fatal(first, err)
		}
		for _, test := range []struct {
			host Host
			want string
		}{
			{Host{Code: NXDomain}, "lookup quay.test: no such host"},
			{Host{Code: ServFail}, "lookup quay.test: server misbehaving"},
			{Host{Code: NoData}, "[] <nil>"},
			{Host{Delay: 5 * time.Second}, "lookup quay.test: context deadline exceeded"},
			{Host{Addresses: []netip.Addr{netip.MustParseAddr("10.0.0.1")}}, "[10.0.0.1] <nil>"},
			{Host{}, fmt.Sprint(first, nil)},
		} {
			n.SetHost("quay.test", test.host)
			ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
			got, err := n.Lookup(ctx, "quay.test")
			cancel()
			if text := fmt.Sprint(got, err); text != test.want && text != "[] "+test.want {
				t.Errorf("%+v: %s", test.host, text)
			}
		}
		if _, err := n.Lookup(t.Context(), "unknown.test"); err == nil {
			t.Error("a host that was never mentioned is found")
		}
		n.SetHost("quay.test", Host{Addresses: []netip.Addr{netip.MustParseAddr("10.0.0.1")}})
		resp, err := client(t, n).Get("http://10.0.0.1/v2/")
		if err != nil {
			t.Fatal(err)
		}
		resp.Body.Close()
		if dials := n.Dials("quay.test:80"); len(dials) != 1 || reg.Count(Match{Kind: KindPing}) != 1 {
			t.Errorf("dials %v", dials)
		}
	})
}

func TestF27Certificates(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := NewNetwork()
		good, err := n.CA.Certificate("quay.test", time.Time{})
		expired, err2 := n.CA.Certificate("quay.test", time.Now().Add(-time.Hour))
		other, err3 := n.CA.Certificate("other.test", time.Time{})
		unknown, err4 := NewCA().Certificate("quay.test", time.Time{})
		if err := errors.Join(err, err2, err3, err4); err != nil {
			t.Fatal(err)
		}
		for _, test := range []struct {
			certificate tls.Certificate
			link        Link
			want        string // in the error
		}{
			{good, Link{}, ""},
			{expired, Link{}, "expired"},
			{other, Link{}, "not quay.test"},
			{unknown, Link{}, "unknown authority"},
			{good, Link{Silent: true}, "timeout"},
		} {
			n.SetLink("quay.test:443", test.link)
			l, err := n.Listen("quay.test:443")
			if err != nil {
				t.Fatal(err)
			}
			server := Serve(l, New(Config{}), test.certificate)
			c := client(t, n)
			c.Transport.(*http.Transport).TLSHandshakeTimeout = 4 * time.Second
			start := time.Now()
			resp, err := c.Get("https://quay.test/v2/")
			if err == nil {
				resp.Body.Close()
			}
			if (err == nil) != (test.want == "") || err != nil && !strings.Contains(err.Error(), test.want) {
				t.Errorf("%q: %v", test.want, err)
			}
			if took := time.Since(start); test.link.Silent != (took == 4*time.Second) {
				t.Errorf("%q: after %v", test.want, took)
			}
			if err := server.Close(); err != nil {
				t.Error(err)
			}
		}
	})
}

func TestCloseWaitsForHandlers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := NewNetwork()
		l, err := n.Listen("a.test:80")
		if err != nil {
			t.Fatal(err)
		}
		began, ended := make(chan struct{}), false
		server := Serve(l, http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
			close(began)
			<-r.Context().Done()
			time.Sleep(time.Second)
			ended = true
		}))
		c := client(t, n)
		go func() {
			if resp, err := c.Get(server.URL); err == nil {
				_ = resp.Body.Close()
				t.Error("an answer from a handler that gave none")
			}
		}()
		<-began
		if err := server.Close(); err != nil || !ended {
			t.Errorf("closed with %v before the handler ended", err)
		}
	})
}
