package main

import (
	"context"
	"log/slog"
	"net"
	"net/http"
	"sync"
	"sync/atomic"
	"time"

	"breakwater/proxy"
)

// Bounds of a connection. A body's own deadline moves with its progress (proxy).
const (
	readHeaderTimeout = 5 * time.Second
	writeTimeout      = 60 * time.Second
	idleTimeout       = 120 * time.Second
	maxHeaderBytes    = 64 << 10
	// maxConnections is how many there are at a time. Those over it are closed at once: clients go on to
	// their next registry, and who holds connections for nothing loses them within seconds.
	maxConnections = 8192
	// unusedTimeout is how long a stop waits for the first request of a connection that was made just before
	// it: its client is answered by nobody else.
	unusedTimeout = 250 * time.Millisecond
	settlePause   = 5 * time.Millisecond
)

// server is an http.Server that answers everybody whom it has let in, also when it stops.
type server struct {
	*http.Server
	listener net.Listener // nil before start
	serving  sync.WaitGroup
	unused   sync.Map // connections of which no request has come to the handler
}

// connKey is a context's connection.
type connKey struct{}

func newServer(handler http.Handler, logger *slog.Logger) *server {
	s := &server{}
	s.Server = &http.Server{
		Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			s.unused.Delete(r.Context().Value(connKey{}))
			handler.ServeHTTP(w, r)
		}),
		ReadHeaderTimeout: readHeaderTimeout,
		WriteTimeout:      writeTimeout,
		IdleTimeout:       idleTimeout,
		MaxHeaderBytes:    maxHeaderBytes,
		ConnContext: func(ctx context.Context, conn net.Conn) context.Context {
			return proxy.ConnContext(context.WithValue(ctx, connKey{}, conn), conn)
		},
		ErrorLog: slog.NewLogLogger(logger.Handler(), slog.LevelDebug),
	}
	var connections atomic.Int64
	s.ConnState = func(conn net.Conn, state http.ConnState) {
		switch state {
		case http.StateNew:
			s.unused.Store(conn, nil)
			if connections.Add(1) > maxConnections {
				_ = conn.Close()
			}
		case http.StateClosed, http.StateHijacked:
			connections.Add(-1)
			s.unused.Delete(conn)
		}
	}
	return s
}

// newControlServer serves the control socket. What runs there long ends at once when it stops.
func newControlServer(mirror *proxy.Mirror, logger *slog.Logger) *server {
	s := newServer(mirror.Control(buildVersion()), logger)
	ctx, cancel := context.WithCancel(context.Background())
	s.BaseContext = func(net.Listener) context.Context { return ctx }
	s.RegisterOnShutdown(cancel)
	return s
}

// start serves whom l lets in, by TLS if there is a configuration of it. failed is told why that ends, and has
// room for it.
func (s *server) start(l net.Listener, failed chan<- error) {
	s.listener = l
	s.serving.Go(func() {
		if s.TLSConfig != nil {
			failed <- s.ServeTLS(l, "", "")
			return
		}
		failed <- s.Serve(l)
	})
}

// settle lets nobody in any more, and waits until the first request of each connection that was let in has
// come to the handler: a server that is being shut down reads it and says nothing (net/http). Clients also open
// connections that they may never use, for which Shutdown would wait five seconds while nobody can connect:
// those are closed then.
func (s *server) settle(until time.Time) {
	if s.listener == nil {
		return
	}
	_ = s.listener.Close()
	s.serving.Wait() // now each of them is known
	ticker := time.NewTicker(settlePause)
	defer ticker.Stop()
	for {
		late, left := !time.Now().Before(until), false
		s.unused.Range(func(conn, _ any) bool {
			left = true
			if late {
				_ = conn.(net.Conn).Close()
			}
			return true
		})
		if !left || late {
			return
		}
		<-ticker.C
	}
}
