package registrytest

import (
	"net"
	"net/http"
	"testing"
)

func TestScripted(t *testing.T) {
	s := NewScripted(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { _, _ = w.Write([]byte(r.URL.Path)) }))
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	server := Serve(l, s)
	defer server.Close()
	if _, body, err := ask(t, "GET", server.URL+"/any/thing"); err != nil || string(body) != "/any/thing" {
		t.Errorf("%q, %v", body, err)
	}
	remove := s.Fault(Match{Path: "/thing"}, Status(503))
	if resp, _, err := ask(t, "GET", server.URL+"/any/thing"); err != nil || resp.StatusCode != 503 {
		t.Errorf("%v, %v", resp, err)
	}
	remove()
	if resp, _, err := ask(t, "GET", server.URL+"/any/thing"); err != nil || resp.StatusCode != 200 || s.Count(Match{Method: "GET"}) != 3 {
		t.Errorf("%v, %v after %d", resp, err, s.Count(Match{}))
	}
}
