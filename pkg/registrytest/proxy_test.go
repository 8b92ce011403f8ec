package registrytest

import (
	"errors"
	"io"
	"net"
	"os"
	"syscall"
	"testing"
	"time"
)

func TestProxyBreaksRealConnections(t *testing.T) {
	reg := New(Config{})
	content := Layer(1, 300_000)
	path := "/v2/org/app/blobs/" + reg.PutBlob("org/app", content).String()
	p, err := NewProxy(reg.Start(t).URL[len("http://"):])
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	for _, test := range []struct {
		name  string
		link  Link
		whole bool
		err   error
	}{
		{"healthy", Link{}, true, nil},
		{"refuse", Link{Refuse: true}, false, syscall.ECONNREFUSED},
		{"healthy again", Link{}, true, nil},
		{"cut", Link{CutAfter: 100_000}, false, io.ErrUnexpectedEOF},
		{"reset", Link{ResetAfter: 100_000}, false, syscall.ECONNRESET},
		{"slow", Link{Latency: 20 * time.Millisecond}, true, nil},
	} {
		if err := p.SetLink(test.link); err != nil {
			t.Fatal(err)
		}
		start := time.Now()
		_, body, err := ask(t, "GET", "http://"+p.Address+path)
		if (len(body) == len(content)) != test.whole || !errors.Is(err, test.err) {
			t.Errorf("%s: %d bytes, %v", test.name, len(body), err)
		}
		if took := time.Since(start); took < 2*test.link.Latency {
			t.Errorf("%s: took %v", test.name, took)
		}
	}
	if n := p.Connections(); n != 5 {
		t.Errorf("%d connections", n)
	}
}

func TestProxyStalls(t *testing.T) {
	reg := New(Config{})
	p, err := NewProxy(reg.Start(t).URL[len("http://"):])
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	silent := func(c net.Conn) bool {
		_ = c.SetReadDeadline(time.Now().Add(50 * time.Millisecond))
		_, err := io.WriteString(c, "GET /v2/ HTTP/1.1\r\nHost: a.test\r\n\r\n")
		if err == nil {
			_, err = c.Read(make([]byte, 4<<10)) // the whole answer
		}
		return errors.Is(err, os.ErrDeadlineExceeded)
	}
	c, err := net.Dial("tcp", p.Address)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if silent(c) {
		t.Error("a healthy link is silent")
	}
	p.Drop()
	if !silent(c) {
		t.Error("a dropped connection is not silent")
	}
	if err := p.SetLink(Link{BlackHole: true}); err != nil {
		t.Fatal(err)
	}
	hole, err := net.Dial("tcp", p.Address)
	if err != nil {
		t.Fatal(err)
	}
	defer hole.Close()
	if !silent(hole) {
		t.Error("a black hole is not silent")
	}
	if err := p.SetLink(Link{}); err != nil {
		t.Fatal(err)
	}
	_ = hole.SetReadDeadline(time.Now().Add(5 * time.Second))
	if _, err := hole.Read(make([]byte, 1)); err != nil {
		t.Errorf("healed: %v", err)
	}
	p.Reset()
	if _, err := io.Copy(io.Discard, hole); !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("reset: %v", err)
	}
}
