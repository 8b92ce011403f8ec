package main

import (
	"context"
	"io"
	"net"
	"testing"
	"time"
)

// TestAnswers says which servers the watchdog takes for alive.
func TestAnswers(t *testing.T) {
	for _, row := range []struct {
		name  string
		serve func(net.Conn) // nil accepts nothing
		alive bool
	}{
		{"answers", func(c net.Conn) { _, _ = io.WriteString(c, "HTTP/1.1 200 OK\r\n\r\n") }, true},
		{"refuses", func(c net.Conn) { _, _ = io.WriteString(c, "HTTP/1.0 400 Bad Request\r\n\r\n") }, true},
		{"has too many connections", func(c net.Conn) { _ = c.Close() }, true},
		{"cuts it off", func(c net.Conn) { _ = c.(*net.TCPConn).SetLinger(0); _ = c.Close() }, true},
		{"accepts and is silent", func(net.Conn) {}, false},
		{"accepts nothing", nil, false},
	} {
		t.Run(row.name, func(t *testing.T) {
			t.Parallel()
			l, err := net.Listen("tcp", "127.0.0.1:0")
			if err != nil {
				t.Fatal(err)
			}
			served := make(chan struct{})
			go func() {
				defer close(served)
				if row.serve == nil {
					return
				}
				conn, err := l.Accept()
				if err != nil {
					t.Error(err)
					return
				}
				defer conn.Close()
				row.serve(conn)
				_, _ = io.Copy(io.Discard, conn) // until the other side has had enough
			}()
			limit := 10 * time.Second // of which nothing is needed
			if !row.alive {
				limit = 100 * time.Millisecond
			}
			if err := answers(t.Context(), l.Addr().String(), "/v2/", limit); (err == nil) != row.alive {
				t.Errorf("%v, want alive: %v", err, row.alive)
			}
			<-served
			_ = l.Close()
			if err := answers(t.Context(), l.Addr().String(), "/v2/", limit); err == nil {
				t.Error("alive with nobody there")
			}
		})
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := answers(ctx, "127.0.0.1:1", "/", time.Hour); err == nil {
		t.Error("alive after the end")
	}
}

func TestIsAt(t *testing.T) {
	for _, row := range []struct {
		opened, configured string
		want               bool
	}{
		{"127.0.0.1:5000", "127.0.0.1:5000", true},
		{"127.0.0.1:5000", "localhost:5000", true},
		{"[::1]:5000", "localhost:5000", true},
		{"[::1]:5000", "[::1]:5000", true},
		{"127.0.0.1:41234", "127.0.0.1:0", true},
		{"[::]:5000", ":5000", true},
		{"0.0.0.0:5000", "[::]:5000", true},
		{"127.0.0.1:5001", "127.0.0.1:5000", false},
		{"127.0.0.1:5001", "localhost:5000", false},
		{"0.0.0.0:5000", "127.0.0.1:5000", false},
		{"[::]:5000", "localhost:5000", false},
		{"192.0.2.1:5000", "localhost:5000", false},
		{"192.0.2.1:5000", ":5000", false},
		{"127.0.0.1:5000", "[::1]:5000", false},
		{"127.0.0.1:5000", "127.0.0.1", false},
	} {
		addr, err := net.ResolveTCPAddr("tcp", row.opened)
		if err != nil {
			t.Fatal(err)
		}
		if got := isAt(addr, row.configured); got != row.want {
			t.Errorf("%s for %s: %v", row.opened, row.configured, got)
		}
	}
	if isAt(&net.UnixAddr{Name: "127.0.0.1:5000", Net: "unix"}, "127.0.0.1:5000") {
		t.Error("a unix socket is at a TCP address")
	}
}
