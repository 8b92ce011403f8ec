package main

import (
	"fmt"
	"math/rand/v2"
	"net"
	"net/http"
	"path"
	"strings"
	"sync"
	"time"

	"breakwater/pkg/registrytest"
)

const (
	// latency is what each answer takes at least, as from somewhere else.
	latency = 30 * time.Millisecond
	// slowest is what an answer takes at most in the brown-out, in which half of them are failures.
	slowest = 4 * time.Second
)

// upstream is a registry whose state changes.
type upstream struct {
	registry *registrytest.Registry
	library  *library
	tally    *tally
	url      string
	address  string               // where nobody else on this machine is likely to want the port
	server   *registrytest.Server // nil while it refuses

	mu   sync.Mutex // guards dice
	dice *rand.Rand
}

func newUpstream(seed uint64, l *library, t *tally) (*upstream, error) {
	u := &upstream{registry: registrytest.New(registrytest.Config{}), library: l, tally: t, address: "127.0.0.2:0", dice: rand.New(rand.NewPCG(seed, 2))}
	for _, tag := range l.tags {
		l.push(u, tag, layerSize, layerSize/2)
	}
	if err := u.become(up); err != nil {
		return nil, err
	}
	u.url = u.server.URL
	return u, nil
}

func (u *upstream) listen() error {
	if u.server != nil {
		return nil
	}
	l, err := net.Listen("tcp", u.address)
	if err != nil {
		return fmt.Errorf("upstream: %w", err)
	}
	u.address = l.Addr().String()
	u.server = registrytest.Serve(l, u)
	return nil
}

// close refuses connections, and cuts those that there are.
func (u *upstream) close() error {
	if u.server == nil {
		return nil
	}
	err := u.server.Close()
	u.server = nil
	return err
}

// become makes it what it is in a phase.
func (u *upstream) become(phase int) error {
	u.registry.Heal()
	u.registry.Forget()
	switch phase {
	case outage:
		return u.close()
	case brownOut:
		u.registry.Fault(registrytest.Match{}, u.sick)
	default:
		u.registry.Fault(registrytest.Match{}, registrytest.Delay(latency))
	}
	return u.listen()
}

// hang has it accept connections and never answer.
func (u *upstream) hang() error {
	u.registry.Heal()
	u.registry.Fault(registrytest.Match{}, registrytest.Hang())
	return u.listen()
}

// sick is slow, and fails half of the time.
func (u *upstream) sick(w http.ResponseWriter, r *http.Request, next http.Handler) {
	u.mu.Lock()
	fails, late := u.dice.IntN(2) == 0, time.Duration(u.dice.Int64N(int64(slowest)))
	u.mu.Unlock()
	if fails {
		next = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			registrytest.Status(http.StatusServiceUnavailable)(w, r, next)
		})
	}
	registrytest.Delay(late)(w, r, next)
}

// limit has blobs come at a rate, in bytes a second, until remove is called.
func (u *upstream) limit(rate int) (remove func()) {
	const pieces = 50 // a second
	return u.registry.Fault(registrytest.Match{Kind: registrytest.KindBlob}, registrytest.Drip(rate/pieces, time.Second/pieces))
}

// ServeHTTP counts requests by what they ask for.
func (u *upstream) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	kind, name := path.Base(path.Dir(r.URL.Path)), path.Base(r.URL.Path)
	repo := strings.TrimPrefix(path.Dir(path.Dir(r.URL.Path)), "/v2/")
	switch {
	case kind == "manifests" && strings.HasPrefix(name, "sha256-"):
		kind = "a signature's tag"
	case kind == "manifests" && strings.HasPrefix(name, "sha256:"):
		kind = "a manifest"
	case kind == "manifests":
		kind = "a tag"
		u.tally.tagAsked(r.Method, registryName+"/"+repo+":"+name)
	case kind == "blobs":
		kind = "a blob"
		u.tally.blobAsked(r.Method, name)
	}
	u.tally.note(func(n *counts) { n.upstream[r.Method+" of "+kind]++ })
	u.registry.ServeHTTP(w, r)
}
