package main

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"breakwater/pkg/config"
	"breakwater/pkg/registrytest"
	"breakwater/proxy"
	"breakwater/storage"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
)

// newMirror is a mirror that nobody asks for anything it would have to fetch.
func newMirror(t *testing.T, dir string) *proxy.Mirror {
	t.Helper()
	cfg, err := config.Load("", nil, map[string]string{"data": dir})
	if err != nil {
		t.Fatal(err)
	}
	store, err := storage.Open(storage.Config{Dir: dir})
	if err != nil {
		t.Fatal(err)
	}
	mirror, err := proxy.New(proxy.Config{Config: cfg, Store: store})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		mirror.Close(context.Background())
		if err := store.Close(); err != nil {
			t.Error(err)
		}
	})
	return mirror
}

// runServer serves h as the program does, over TLS if there is a certificate, until the test ends.
func runServer(t *testing.T, l net.Listener, h http.Handler, certificates ...tls.Certificate) {
	t.Helper()
	server := newServer(h, slog.New(slog.DiscardHandler))
	var running sync.WaitGroup
	running.Go(func() {
		if len(certificates) > 0 {
			server.TLSConfig = &tls.Config{Certificates: certificates}
			_ = server.ServeTLS(l, "", "")
			return
		}
		_ = server.Serve(l)
	})
	t.Cleanup(func() {
		_ = server.Close()
		running.Wait()
	})
}

func loopback(t *testing.T) net.Listener {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	return l
}

// tell writes bytes to a connection of its own and reads one answer.
func tell(t *testing.T, address string, send []byte) *http.Response {
	t.Helper()
	conn, err := net.Dial("tcp", address)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	_ = conn.SetDeadline(time.Now().Add(10 * time.Second)) // a test that fails need not hang
	go func() { _, _ = conn.Write(send) }()                // the server need not read all of it
	resp, err := http.ReadResponse(bufio.NewReader(conn), nil)
	if err != nil {
		t.Fatalf("%.60q: no answer: %v", send, err)
	}
	resp.Body.Close()
	return resp
}

func TestH15FloodsOfHeaders(t *testing.T) {
	l := loopback(t)
	runServer(t, l, newMirror(t, t.TempDir()))
	address := l.Addr().String()
	begin := func(target string) string { return "GET " + target + " HTTP/1.1\r\nHost: " + address + "\r\n" }
	var lines strings.Builder
	for i := range 10_000 {
		fmt.Fprintf(&lines, "X-%d: 1\r\n", i)
	}
	for name, tt := range map[string]struct {
		send string
		want int
	}{
		"as much as anybody needs":     {begin("/v2/") + "X: " + strings.Repeat("x", 32<<10) + "\r\n\r\n", 200},
		"10,000 lines":                 {begin("/v2/") + lines.String() + "\r\n", 431},
		"2 MB in one line":             {begin("/v2/") + "X: " + strings.Repeat("x", 2<<20) + "\r\n\r\n", 431},
		"a name of 2 MB":               {begin("/v2/") + strings.Repeat("x", 2<<20) + ": x\r\n\r\n", 431},
		"2 MB of path":                 {begin("/v2/" + strings.Repeat("a/", 1<<20)), 431},
		"2 MB of method":               {strings.Repeat("M", 2<<20) + " /v2/ HTTP/1.1\r\n\r\n", 431},
		"100,000 cookies":              {begin("/v2/") + "Cookie: " + strings.Repeat("a=b; ", 100_000) + "\r\n\r\n", 431},
		"100,000 lines with a cookie":  {begin("/v2/") + strings.Repeat("Cookie: a=b\r\n", 100_000) + "\r\n", 431},
		"5,000 parameters":             {begin("/v2/?"+strings.Repeat("a=b&", 5000)) + "\r\n", 400},
		"5,000 parameters of a list":   {begin("/v2/org/app/tags/list?"+strings.Repeat("n=1&", 5000)) + "\r\n", 400},
		"5,000 registries":             {begin("/v2/org/app/manifests/latest?"+strings.Repeat("ns=quay.io&", 5000)) + "\r\n", 400},
		"60 KB of path, all of it .. ": {begin("/v2/"+strings.Repeat("../", 20_000)+"etc/passwd") + "\r\n", 404},
	} {
		if resp := tell(t, address, []byte(tt.send)); resp.StatusCode != tt.want || tt.want == 431 && !resp.Close {
			t.Errorf("%s: %d, closed %v, want %d", name, resp.StatusCode, resp.Close, tt.want)
		}
	}
}

// slowly is a connection to a server on a network in memory, in a bubble.
type slowly struct {
	*testing.T
	net.Conn
	begun time.Time
}

func connect(t *testing.T, network *registrytest.Network, address string) *slowly {
	t.Helper()
	conn, err := network.DialContext(t.Context(), "tcp", address)
	if err != nil {
		t.Fatal(err)
	}
	return &slowly{t, conn, time.Now()}
}

func (s *slowly) send(text string) {
	if _, err := io.WriteString(s.Conn, text); err != nil && !errors.Is(err, net.ErrClosed) {
		return // the server has had enough; closed tells
	}
}

// ask sends a request and reads its answer; the connection stays open.
func (s *slowly) ask() {
	s.Helper()
	s.send("GET /v2/ HTTP/1.1\r\nHost: localhost:5000\r\n\r\n")
	resp, err := http.ReadResponse(bufio.NewReader(s.Conn), nil)
	if err != nil {
		s.Fatal(err)
	}
	_, _ = io.Copy(io.Discard, resp.Body)
	resp.Body.Close()
	if resp.StatusCode != http.StatusOK || time.Since(s.begun) > 0 {
		s.Errorf("%d after %v", resp.StatusCode, time.Since(s.begun))
	}
	s.begun = time.Now()
}

// closed waits for the server to end the connection, and wants that then.
func (s *slowly) closed(after time.Duration) {
	s.Helper()
	_ = s.SetReadDeadline(s.begun.Add(after + 2*time.Second))
	_, _ = io.Copy(io.Discard, s.Conn) // with a 408, perhaps
	if took := time.Since(s.begun); took < after || took > after+time.Second {
		s.Errorf("closed after %v, want %v", took, after)
	}
	s.Close()
}

func TestH16SlowClients(t *testing.T) {
	dir := t.TempDir()
	synctest.Test(t, func(t *testing.T) {
		network := registrytest.NewNetwork()
		defer network.Close()
		plain, err := network.Listen("localhost:5000")
		if err != nil {
			t.Fatal(err)
		}
		secure, err := network.Listen("localhost:5443")
		if err != nil {
			t.Fatal(err)
		}
		certificate, err := network.CA.Certificate("localhost", time.Time{})
		if err != nil {
			t.Fatal(err)
		}
		mirror := newMirror(t, dir)
		runServer(t, plain, mirror)
		runServer(t, secure, mirror, certificate)

		connect(t, network, "localhost:5000").closed(readHeaderTimeout) // says nothing
		connect(t, network, "localhost:5443").closed(readHeaderTimeout) // no handshake either
		const line = "GET /v2/ HTTP/1.1\r\n"
		for _, drip := range [][2]string{{"GET /v2/", "a"}, {line, "X-A: b\r\n"}, {line + "X: ", "x"}, {"\x16\x03\x01", "\x00"}} {
			for _, answered := range []int{0, 2} { // requests before
				s := connect(t, network, "localhost:5000")
				for range answered {
					s.ask()
				}
				s.send(drip[0])
				var dripping sync.WaitGroup
				dripping.Go(func() {
					for range 60 {
						s.send(drip[1])
						time.Sleep(100 * time.Millisecond)
					}
				})
				s.closed(readHeaderTimeout)
				dripping.Wait()
			}
		}
	})
}

func TestH16IdleConnections(t *testing.T) {
	dir := t.TempDir()
	synctest.Test(t, func(t *testing.T) {
		network := registrytest.NewNetwork()
		defer network.Close()
		l, err := network.Listen("localhost:5000")
		if err != nil {
			t.Fatal(err)
		}
		runServer(t, l, newMirror(t, dir))
		var idle []*slowly
		for range 4000 {
			s := connect(t, network, "localhost:5000")
			s.ask()
			idle = append(idle, s)
		}
		time.Sleep(idleTimeout - time.Second)
		idle[0].begun = time.Now()
		idle[0].ask()
		connect(t, network, "localhost:5000").ask() // a real client
		for _, s := range idle[1:] {
			s.closed(idleTimeout)
		}
		idle[0].closed(idleTimeout)
	})
}

// Two thousand half-open headers are closed within five seconds and keep no real client out; beyond the
// cap, connections are closed at once.
func TestF67Slowloris(t *testing.T) {
	dir := t.TempDir()
	synctest.Test(t, func(t *testing.T) {
		network := registrytest.NewNetwork()
		defer network.Close()
		l, err := network.Listen("localhost:5000")
		if err != nil {
			t.Fatal(err)
		}
		runServer(t, l, newMirror(t, dir))
		var half []*slowly
		for range 2000 {
			s := connect(t, network, "localhost:5000")
			s.send("GET /v2/ HTTP/1.1\r\nX: ")
			half = append(half, s)
		}
		connect(t, network, "localhost:5000").ask() // a real client
		for _, s := range half {
			s.closed(readHeaderTimeout)
		}
	})
	server := newServer(http.NotFoundHandler(), slog.New(slog.DiscardHandler))
	ours, theirs := net.Pipe()
	defer theirs.Close()
	for range maxConnections {
		server.ConnState(ours, http.StateNew)
	}
	open := func() bool {
		_ = theirs.SetReadDeadline(time.Now().Add(10 * time.Millisecond))
		_, err := theirs.Read([]byte{0})
		return errors.Is(err, os.ErrDeadlineExceeded)
	}
	if !open() {
		t.Error("closed below the cap")
	}
	server.ConnState(ours, http.StateClosed)
	server.ConnState(ours, http.StateNew)
	if !open() {
		t.Error("closed though another one has gone")
	}
	if server.ConnState(ours, http.StateNew); open() {
		t.Error("open beyond the cap")
	}
}

func TestH17NoHTTP2InTheClear(t *testing.T) {
	l := loopback(t)
	runServer(t, l, newMirror(t, t.TempDir()))
	address := l.Addr().String()
	var preface bytes.Buffer
	preface.WriteString(http2.ClientPreface)
	if err := http2.NewFramer(&preface, nil).WriteSettings(); err != nil {
		t.Fatal(err)
	}
	if resp := tell(t, address, preface.Bytes()); resp.ProtoMajor != 1 || resp.StatusCode < 400 || !resp.Close {
		t.Errorf("the preface was answered %s %d, closed %v", resp.Proto, resp.StatusCode, resp.Close)
	}
	upgrade := "GET /v2/ HTTP/1.1\r\nHost: " + address + "\r\nConnection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAARAAAAAAAIAAAAA\r\n\r\n"
	if resp := tell(t, address, []byte(upgrade)); resp.StatusCode != http.StatusOK || resp.Header.Get("Upgrade") != "" {
		t.Errorf("Upgrade: h2c was answered %d, Upgrade: %s", resp.StatusCode, resp.Header.Get("Upgrade"))
	}
}

// flood is a server over TLS that counts what it is doing, and a client of HTTP/2 that has no manners.
type flood struct {
	*testing.T
	address string
	ca      *registrytest.CA
	running atomic.Int64
	peak    atomic.Int64
	release chan struct{} // ends the requests for /v2/slow, whoever has left
}

func newFlood(t *testing.T) *flood {
	f := &flood{T: t, ca: registrytest.NewCA(), release: make(chan struct{})}
	certificate, err := f.ca.Certificate("127.0.0.1", time.Time{})
	if err != nil {
		t.Fatal(err)
	}
	mirror := newMirror(t, t.TempDir())
	l := loopback(t)
	f.address = l.Addr().String()
	runServer(t, l, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		for now, peak := f.running.Add(1), int64(0); now > peak && !f.peak.CompareAndSwap(peak, now); {
			peak = f.peak.Load()
		}
		defer f.running.Add(-1)
		if r.URL.Path == "/v2/slow" {
			<-f.release
		}
		mirror.ServeHTTP(w, r)
	}), certificate)
	return f
}

// connect returns an HTTP/2 connection behind its preface, and what the server has ended it with.
func (f *flood) connect() (net.Conn, *http2.Framer, <-chan string) {
	f.Helper()
	conn, err := tls.Dial("tcp", f.address, &tls.Config{RootCAs: f.ca.Pool(), NextProtos: []string{"h2"}})
	if err != nil {
		f.Fatal(err)
	}
	f.Cleanup(func() { _ = conn.Close() })
	if got := conn.ConnectionState().NegotiatedProtocol; got != "h2" {
		f.Fatalf("negotiated %q", got)
	}
	_ = conn.SetDeadline(time.Now().Add(20 * time.Second)) // a test that fails need not hang
	framer := http2.NewFramer(conn, conn)
	_, err = io.WriteString(conn, http2.ClientPreface)
	if err := errors.Join(err, framer.WriteSettings()); err != nil {
		f.Fatal(err)
	}
	ended := make(chan string, 1)
	go func() {
		for said := "EOF"; ; {
			frame, err := framer.ReadFrame()
			if err != nil {
				ended <- said
				return
			}
			if away, ok := frame.(*http2.GoAwayFrame); ok {
				said = away.ErrCode.String()
			}
		}
	}()
	return conn, framer, ended
}

// headers is a block of fields, with what stands in every request in front of a path.
func (f *flood) headers(fields ...[2]string) []byte {
	if fields[0][0] == ":path" {
		fields = append([][2]string{{":method", "GET"}, {":scheme", "https"}, {":authority", f.address}}, fields...)
	}
	var block bytes.Buffer
	encoder := hpack.NewEncoder(&block)
	for _, field := range fields {
		if err := encoder.WriteField(hpack.HeaderField{Name: field[0], Value: field[1], Sensitive: true}); err != nil { // into no table
			f.Fatal(err)
		}
	}
	return block.Bytes()
}

// served fails the test unless somebody else is served.
func (f *flood) served() {
	f.Helper()
	client := &http.Client{Transport: &http.Transport{TLSClientConfig: &tls.Config{RootCAs: f.ca.Pool()}, ForceAttemptHTTP2: true}}
	defer client.CloseIdleConnections()
	resp, err := client.Get("https://" + f.address + "/v2/")
	if err != nil {
		f.Fatal(err)
	}
	resp.Body.Close()
	if resp.StatusCode != http.StatusOK || resp.ProtoMajor != 2 {
		f.Errorf("a client of the mirror got %d over %s", resp.StatusCode, resp.Proto)
	}
}

// CVE-2023-44487: a request that is reset at once costs its sender nothing.
func TestH17RapidResets(t *testing.T) {
	resets := 5000
	if os.Getenv("FAULTS") == "full" {
		resets = 100_000
	}
	for _, path := range []string{"/v2/", "/v2/slow"} {
		t.Run(path, func(t *testing.T) {
			f := newFlood(t)
			release := sync.OnceFunc(func() { close(f.release) })
			defer release()
			before := runtime.NumGoroutine()
			conn, framer, ended := f.connect()
			block := f.headers([2]string{":path", path})
			var err error
			for i := 0; i < resets && err == nil; i++ {
				stream := uint32(2*i + 1)
				err = framer.WriteHeaders(http2.HeadersFrameParam{StreamID: stream, BlockFragment: block, EndStream: true, EndHeaders: true})
				err = errors.Join(err, framer.WriteRSTStream(stream, http2.ErrCodeCancel))
			}
			f.served()
			if path == "/v2/slow" { // nothing that it began has ended
				if said := <-ended; said != "ENHANCE_YOUR_CALM" {
					t.Errorf("the connection ended with %s", said)
				}
			}
			peak, goroutines := f.peak.Load(), runtime.NumGoroutine()-before
			if peak > 251 || goroutines > 300 {
				t.Errorf("%d requests were served at once, by %d goroutines", peak, goroutines)
			}
			t.Logf("H17: of %d streams of %s that were reset at once %d were served at the same time", resets, path, peak)
			_ = conn.Close()
			release()
			f.served()
		})
	}
}

// CVE-2023-45288: header blocks that never end are decoded all the same.
func TestH17ContinuationFlood(t *testing.T) {
	f := newFlood(t)
	_, framer, ended := f.connect()
	err := framer.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: f.headers([2]string{":path", "/v2/"}), EndStream: true})
	field := f.headers([2]string{"x", strings.Repeat("x", 16000)})
	sent := 0
	for ; err == nil && sent < 64<<20; sent += len(field) {
		err = framer.WriteContinuation(1, false, field)
	}
	if err == nil {
		t.Errorf("%d bytes of header were taken in", sent)
	}
	if said := <-ended; said == "NO_ERROR" {
		t.Errorf("the connection ended with %s", said)
	}
	f.served()
}
