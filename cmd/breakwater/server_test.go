package main

import (
	"bufio"
	"log/slog"
	"net/http"
	"testing"
	"testing/synctest"
	"time"

	"breakwater/pkg/registrytest"
)

// TestStopAnswersWhoWasLetIn: who has connected before a stop, and asks a moment later, is answered, though
// net/http would read that and say nothing; who does not ask keeps nobody waiting.
func TestStopAnswersWhoWasLetIn(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		network := registrytest.NewNetwork()
		defer network.Close()
		listener, err := network.Listen("localhost:5000")
		if err != nil {
			t.Fatal(err)
		}
		s := newServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusNoContent) }), slog.New(slog.DiscardHandler))
		failed := make(chan error, 1)
		s.start(listener, failed)
		client, err := network.DialContext(t.Context(), "tcp", "localhost:5000")
		if err != nil {
			t.Fatal(err)
		}
		defer client.Close()
		idle, err := network.DialContext(t.Context(), "tcp", "localhost:5000")
		if err != nil {
			t.Fatal(err)
		}
		defer idle.Close()
		synctest.Wait()
		begun := time.Now()
		go func() {
			time.Sleep(unusedTimeout / 2)
			_, _ = client.Write([]byte("GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"))
		}()
		s.settle(begun.Add(unusedTimeout))
		if err := s.Shutdown(t.Context()); err != nil {
			t.Error(err)
		}
		if took := time.Since(begun); took > unusedTimeout+time.Second {
			t.Errorf("stopped after %v", took)
		}
		resp, err := http.ReadResponse(bufio.NewReader(client), nil)
		if err != nil || resp.StatusCode != http.StatusNoContent {
			t.Errorf("%v, %v", resp, err)
		} else {
			_ = resp.Body.Close()
		}
		if _, err := idle.Read([]byte{0}); err == nil {
			t.Error("who has never asked is let be")
		}
		<-failed
	})
}
