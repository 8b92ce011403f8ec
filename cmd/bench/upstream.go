package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/rpc"
	"os"
	"os/exec"
	"path"
	"strconv"
	"sync"
	"time"

	"github.com/opencontainers/go-digest"
	ispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// upstreamRole is the argument that makes this program the upstream, in a process of its own.
const upstreamRole = "upstream"

// Fault is what is wrong with the upstream.
type Fault string

// The faults that outages are made of.
const (
	Healthy   Fault = ""
	Refuses   Fault = "refuses connections"
	Hangs     Fault = "accepts and never answers"
	Throttles Fault = "answers 429"
	Cuts      Fault = "breaks each blob off in the middle, once"
)

// Behaviour is how the upstream answers from now on.
type Behaviour struct {
	Latency time.Duration // before each answer
	Rate    int64         // bytes a second of each answer's body; 0 for no limit
	Fault   Fault
}

// Upstream is a registry that holds what it is told to and misbehaves as it is told to. Its
// exported methods are called over net/rpc.
type Upstream struct {
	maker  *maker
	mu     sync.Mutex // guards what follows
	sent   int64      // bytes of bodies
	addr   string
	server *http.Server // nil while it refuses connections
	served sync.WaitGroup
	now    Behaviour
	change chan struct{} // closed when now changes: it frees what hangs
	images map[string]Image
	blobs  map[digest.Digest]Blob
	cut    map[digest.Digest]bool // those that were broken off
}

// serveUpstream is the upstream's process: it ends when the bench's end of the pipe is closed.
func serveUpstream() error {
	u := &Upstream{
		maker:  newMaker(),
		addr:   "127.0.0.1:0",
		change: make(chan struct{}),
		images: map[string]Image{},
		blobs:  map[digest.Digest]Blob{},
		cut:    map[digest.Digest]bool{},
	}
	if err := u.listen(); err != nil {
		return err
	}
	server := rpc.NewServer()
	if err := server.Register(u); err != nil {
		return fmt.Errorf("register upstream: %w", err)
	}
	server.ServeConn(pipe{os.Stdin, os.Stdout})
	u.refuse()
	return nil
}

// pipe is the two ends of a process's standard streams as one connection.
type pipe struct {
	io.Reader
	io.WriteCloser
}

func (u *Upstream) listen() error {
	l, err := net.Listen("tcp", u.addr)
	if err != nil {
		return fmt.Errorf("listen: %w", err)
	}
	u.addr = l.Addr().String() // the same one after each refusal
	server := &http.Server{Handler: u, ReadHeaderTimeout: time.Minute}
	u.server = server
	u.served.Go(func() {
		if err := server.Serve(l); !errors.Is(err, http.ErrServerClosed) {
			fmt.Fprintln(os.Stderr, "bench upstream:", err)
		}
	})
	return nil
}

func (u *Upstream) refuse() {
	if u.server == nil {
		return
	}
	_ = u.server.Close() // its connections are to break off
	u.served.Wait()
	u.server = nil
}

// Address tells where the upstream listens, as host:port.
func (u *Upstream) Address(_ struct{}, addr *string) error {
	u.mu.Lock()
	defer u.mu.Unlock()
	*addr = u.addr
	return nil
}

// Publish adds an image.
func (u *Upstream) Publish(img Image, _ *struct{}) error {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.images[img.Tag], u.images[img.Digest.String()] = img, img
	for _, b := range img.Blobs {
		u.blobs[b.Digest] = b
	}
	return nil
}

// Behave replaces the behaviour; what hangs goes on.
func (u *Upstream) Behave(b Behaviour, _ *struct{}) error {
	u.mu.Lock()
	defer u.mu.Unlock()
	close(u.change)
	u.change, u.now = make(chan struct{}), b
	switch {
	case b.Fault == Refuses:
		u.refuse()
	case u.server == nil:
		return u.listen()
	}
	return nil
}

// Sent tells how many bytes of bodies were sent since the start.
func (u *Upstream) Sent(_ struct{}, n *int64) error {
	u.mu.Lock()
	defer u.mu.Unlock()
	*n = u.sent
	return nil
}

// ServeHTTP answers as a registry does. It looks at the last two parts of the path only: all
// repositories hold the same.
func (u *Upstream) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	u.mu.Lock()
	now, change := u.now, u.change
	kind, name := path.Base(path.Dir(r.URL.Path)), path.Base(r.URL.Path)
	img, isImage := u.images[name]
	b, isBlob := u.blobs[digest.Digest(name)]
	cut := now.Fault == Cuts && r.Method == http.MethodGet && isBlob && !u.cut[b.Digest]
	if cut {
		u.cut[b.Digest] = true
	}
	u.mu.Unlock()

	switch now.Fault {
	case Hangs:
		select {
		case <-change:
		case <-r.Context().Done():
			return
		}
	case Throttles:
		http.Error(w, `{"errors":[{"code":"TOOMANYREQUESTS"}]}`, http.StatusTooManyRequests)
		return
	}
	if !wait(r.Context(), now.Latency) {
		return
	}
	s := &sender{ResponseWriter: w, r: r, upstream: u, rate: now.Rate, start: time.Now()}
	if cut {
		s.end = b.Size / 2
	}
	switch {
	case r.URL.Path == "/v2/":
		w.WriteHeader(http.StatusOK)
	case kind == "manifests" && isImage:
		s.serve(img.Digest, ispec.MediaTypeImageManifest, bytes.NewReader(img.Manifest))
	case kind == "blobs" && isBlob:
		s.serve(b.Digest, "application/octet-stream", u.maker.open(b))
	default:
		http.Error(w, `{"errors":[{"code":"NAME_UNKNOWN"}]}`, http.StatusNotFound)
	}
}

// sender counts the bytes of one body and holds them to a rate.
type sender struct {
	http.ResponseWriter
	r        *http.Request
	upstream *Upstream
	rate     int64
	start    time.Time
	n        int64
	end      int64 // after which the connection breaks; 0 for never
}

func (s *sender) serve(dgst digest.Digest, mediaType string, content io.ReadSeeker) {
	h := s.Header()
	h.Set("Content-Type", mediaType)
	h.Set("Docker-Content-Digest", dgst.String())
	h.Set("Etag", strconv.Quote(dgst.String()))
	http.ServeContent(s, s.r, "", time.Time{}, content)
}

func (s *sender) Write(p []byte) (int, error) {
	if s.end > 0 && s.n >= s.end {
		panic(http.ErrAbortHandler)
	}
	n, err := s.ResponseWriter.Write(p)
	s.n += int64(n)
	s.upstream.mu.Lock()
	s.upstream.sent += int64(n)
	s.upstream.mu.Unlock()
	if s.rate > 0 {
		wait(s.r.Context(), time.Until(s.start.Add(time.Duration(s.n*int64(time.Second)/s.rate))))
	}
	return n, err
}

// ReadFrom is there for its buffer: a larger one than io.Copy's costs fewer system calls.
func (s *sender) ReadFrom(r io.Reader) (int64, error) {
	return io.CopyBuffer(struct{ io.Writer }{s}, r, make([]byte, 256<<10))
}

// wait reports whether it has waited to the end.
func wait(ctx context.Context, d time.Duration) bool {
	if d <= 0 {
		return true
	}
	select {
	case <-time.After(d):
		return true
	case <-ctx.Done():
		return false
	}
}

// registry is the bench's end of the upstream's process.
type registry struct {
	cmd  *exec.Cmd
	rpc  *rpc.Client
	addr string
}

// startRegistry starts the upstream's process.
func startRegistry(ctx context.Context) (*registry, error) {
	self, err := os.Executable()
	if err != nil {
		return nil, fmt.Errorf("find the bench's own program: %w", err)
	}
	cmd := exec.CommandContext(ctx, self, upstreamRole)
	cmd.Stderr = os.Stderr
	stdin, err := cmd.StdinPipe()
	if err != nil {
		return nil, fmt.Errorf("start upstream: %w", err)
	}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		return nil, fmt.Errorf("start upstream: %w", err)
	}
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("start upstream: %w", err)
	}
	r := &registry{cmd: cmd, rpc: rpc.NewClient(pipe{stdout, stdin})}
	if err := r.rpc.Call("Upstream.Address", struct{}{}, &r.addr); err != nil {
		return nil, errors.Join(fmt.Errorf("ask upstream's address: %w", err), r.close())
	}
	return r, nil
}

func (r *registry) publish(img Image) error {
	return r.rpc.Call("Upstream.Publish", img, &struct{}{})
}

func (r *registry) behave(b Behaviour) error {
	return r.rpc.Call("Upstream.Behave", b, &struct{}{})
}

func (r *registry) sent() (int64, error) {
	var n int64
	err := r.rpc.Call("Upstream.Sent", struct{}{}, &n)
	return n, err
}

func (r *registry) close() error {
	_ = r.rpc.Close() // the process sees the end of its input and stops
	if err := r.cmd.Wait(); err != nil {
		return fmt.Errorf("stop upstream: %w", err)
	}
	return nil
}
