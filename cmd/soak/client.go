package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"time"

	"breakwater/pkg/oci"

	"github.com/opencontainers/go-digest"
)

// Bounds on the time to an answer's header, from what the client knows before it asks (DESIGN 2), and
// what a busy machine adds, with the race detector at work.
const (
	hitBound   = 0
	tagBound   = 4 * time.Second
	missBound  = 10 * time.Second
	slack      = 2 * time.Second
	bodyBound  = 2 * time.Minute // a body that nothing moves for so long is stuck
	resumes    = 3               // that a client tries for a body that ended short
	maxPatient = time.Second     // before it tries again what was refused, once
)

// client pulls images, one after the other, and checks what it gets.
type client struct {
	*soak
	random   *rand.Rand
	http     *http.Client
	thorough bool // it reads every blob whole, and never hangs up
}

func (s *soak) client(n uint64) *client {
	return &client{soak: s, random: rand.New(rand.NewPCG(s.seed, 100+n)), http: &http.Client{Transport: &http.Transport{DisableCompression: true}}}
}

// leave closes the client's connections.
func (c *client) leave() { c.http.CloseIdleConnections() }

// live pulls until ctx ends.
func (c *client) live(ctx context.Context) {
	defer c.leave()
	for wait(ctx, time.Duration(c.random.IntN(1000))*time.Millisecond) {
		img := c.library.pick(c.random)
		c.pull(ctx, img, []string{latest, img.tag, img.Digest().String()}[c.random.IntN(3)])
	}
}

// query is one request.
type query struct {
	method    string
	kind      string // manifests or blobs
	repo      string
	reference string
	bare      bool  // without the registry's name, as Docker asks its mirrors
	from, to  int64 // a range, up to but not including to; 0, 0 for none
}

func (q query) isTag() bool  { return !strings.HasPrefix(q.reference, "sha256:") }
func (q query) isPart() bool { return q.to > 0 }

func (q query) path() string {
	name := registryName + "/" + q.repo
	if q.bare {
		name = q.repo
	}
	return "/v2/" + name + "/" + q.kind + "/" + q.reference
}

// key names what is stored or not.
func (q query) key() string { return q.repo + " " + q.kind + " " + q.reference }

// pull reports whether the image came whole.
func (c *client) pull(ctx context.Context, img *image, reference string) bool {
	c.tally.note(func(n *counts) { n.pulls++ })
	q := query{method: http.MethodHead, kind: "manifests", repo: img.repo, reference: reference, bare: c.random.IntN(2) == 0}
	found, ok := c.manifest(ctx, q)
	if !ok {
		return false
	}
	q.method = http.MethodGet
	if c.random.IntN(2) == 0 {
		q.reference = found.Digest().String() // as containerd does; Docker asks for the tag again
	}
	if found, ok = c.manifest(ctx, q); !ok {
		return false
	}
	whole := true
	for _, blob := range found.Blobs {
		q.kind, q.reference = "blobs", blob.Digest.String()
		whole = c.blob(ctx, q) && whole && ctx.Err() == nil
	}
	if whole {
		c.tally.note(func(n *counts) { n.whole++ })
	}
	return whole
}

// manifest asks for one, once more if it is refused, and returns the image that it was.
func (c *client) manifest(ctx context.Context, q query) (*image, bool) {
	started := time.Now()
	resp, ok := c.ask(ctx, q)
	if !ok && c.again(ctx) {
		started = time.Now()
		resp, ok = c.ask(ctx, q)
	}
	if !ok {
		return nil, false
	}
	defer resp.Body.Close()
	dgst := digest.Digest(resp.Header.Get("Docker-Content-Digest"))
	img := c.library.byDigest[dgst]
	switch {
	case !q.isTag() && dgst.String() != q.reference:
		c.violate(q, resp, "answers with digest %s", dgst)
		return nil, false
	case q.isTag() && !c.library.was(img, q.repo, q.reference):
		c.violate(q, resp, "answers with digest %s, which the tag never named", dgst)
		return nil, false
	// Questions are shared, and take up to ten seconds.
	case q.isTag() && resp.Header.Get("Warning") == "" && !c.library.isSince(img, q.reference, started.Add(-missBound)):
		c.violate(q, resp, "answers with %s as what the tag names, which no upstream says any more", img.tag)
		return nil, false
	case q.method == http.MethodHead:
		return img, true
	}
	return img, c.body(ctx, q, resp, img.Raw).whole
}

// again waits before what was refused is tried again; false if there is no use in it.
func (c *client) again(ctx context.Context) bool {
	if !wait(ctx, time.Duration(c.random.Int64N(int64(maxPatient)))) {
		return false
	}
	c.tally.note(func(n *counts) { n.retries++ })
	return true
}

// blob gets one as clients do: mostly whole, and on from where it ended if it ended short.
func (c *client) blob(ctx context.Context, q query) bool {
	content := c.library.blobs[digest.Digest(q.reference)]
	size := int64(len(content))
	if !c.thorough {
		switch c.random.IntN(12) {
		case 0:
			q.method = http.MethodHead
			resp, ok := c.ask(ctx, q)
			if ok {
				resp.Body.Close()
			}
			return ok
		case 1:
			q.from = c.random.Int64N(size)
			q.to = q.from + 1 + c.random.Int64N(size-q.from)
		case 2:
			ctx, hangUp := context.WithCancel(ctx)
			defer hangUp()
			if resp, ok := c.ask(ctx, q); ok {
				_, _ = io.CopyN(io.Discard, resp.Body, c.random.Int64N(size))
				c.tally.note(func(n *counts) { n.hungUp++ })
				hangUp()
				resp.Body.Close()
			}
			return false
		}
	}
	for tries := 0; ; tries++ {
		resp, ok := c.ask(ctx, q)
		if !ok && tries == 0 && c.again(ctx) {
			continue
		}
		if !ok {
			return false
		}
		want := content
		if q.isPart() {
			want = content[q.from:q.to]
		}
		got := c.body(ctx, q, resp, want)
		if got.whole || got.wrong || tries == resumes || ctx.Err() != nil {
			return got.whole
		}
		if !q.isPart() {
			q.to = size
		}
		if q.from += got.bytes; q.from == q.to {
			return false // all of it came, but for the end that says so
		}
		c.tally.note(func(n *counts) { n.ranges++ })
	}
}

// ask sends one request and checks its header. Without ok there is nothing to read.
func (c *client) ask(ctx context.Context, q query) (resp *http.Response, ok bool) {
	_, stored := c.tally.stored.Load(q.key())
	req, err := http.NewRequestWithContext(ctx, q.method, c.mirror.url+q.path(), nil)
	if err != nil {
		c.tally.violate("%s: %v", q.path(), err)
		return nil, false
	}
	req.Header.Set("Accept", strings.Join(oci.ManifestTypes, ", "))
	want := http.StatusOK
	if q.isPart() {
		req.Header.Set("Range", fmt.Sprintf("bytes=%d-%d", q.from, q.to-1))
		want = http.StatusPartialContent
	}
	started := time.Now()
	resp, err = c.http.Do(req)
	took := time.Since(started)
	if err != nil {
		if ctx.Err() == nil {
			c.violate(q, nil, "no answer after %s: %v", took, err)
		}
		return nil, false
	}
	c.checkTime(q, resp, took, stored)
	c.tally.note(func(n *counts) {
		n.requests++
		n.headers = append(n.headers, took)
		n.statuses[resp.StatusCode]++
		if resp.Header.Get("Warning") != "" {
			n.stale++
		}
	})
	if resp.StatusCode == want {
		if q.isTag() || resp.Header.Get("Cache-Status") == "breakwater; hit" {
			c.tally.stored.Store(q.key(), nil)
		}
		return resp, true
	}
	c.checkRefusal(q, resp, stored)
	resp.Body.Close()
	return nil, false
}

func (c *client) checkTime(q query, resp *http.Response, took time.Duration, stored bool) {
	bound := missBound
	switch {
	case stored && q.isTag():
		bound = tagBound
	case stored:
		bound = hitBound
	}
	if took > bound+slack {
		c.violate(q, resp, "header after %s, stored: %v", took.Round(time.Millisecond), stored)
	}
}

// checkRefusal knows what may be refused, and how: nothing that is stored, and never with 404 what
// exists but for blobs on the bare path, which send Docker to the Hub.
func (c *client) checkRefusal(q query, resp *http.Response, stored bool) {
	raw, _ := io.ReadAll(io.LimitReader(resp.Body, 64<<10))
	var body struct {
		Errors []struct{ Code, Message string }
	}
	_ = json.Unmarshal(raw, &body)
	says := func(code string) bool {
		return q.method == http.MethodHead || len(body.Errors) > 0 && body.Errors[0].Code == code
	}
	seconds, err := strconv.Atoi(resp.Header.Get("Retry-After"))
	toTheHub := q.bare && q.kind == "blobs"
	switch {
	case stored:
		c.violate(q, resp, "is stored, and refused: %s", raw)
	case resp.StatusCode == http.StatusServiceUnavailable && !toTheHub:
		if !says("UNAVAILABLE") || err != nil || seconds < 1 {
			c.violate(q, resp, "refused without a reason and a time: Retry-After %q, %s", resp.Header.Get("Retry-After"), raw)
		}
	case resp.StatusCode == http.StatusNotFound && toTheHub:
		if !says("BLOB_UNKNOWN") {
			c.violate(q, resp, "refused with %s", raw)
		}
	default:
		c.violate(q, resp, "an upstream has it, and this is answered: %s", raw)
	}
}

// got is what came of a body.
type got struct {
	bytes int64
	whole bool // to its announced end, and right
	wrong bool // some byte was
}

// body reads one and compares it. Whatever is announced as all of a blob, or as its end, must be right
// if it comes whole; a part before the end may be passed on before anybody can know (DESIGN 2).
func (c *client) body(ctx context.Context, q query, resp *http.Response, want []byte) (g got) {
	defer resp.Body.Close()
	stuck := time.AfterFunc(bodyBound, func() { resp.Body.Close() })
	defer stuck.Stop()
	buf := make([]byte, 32<<10)
	var err error
	for err == nil {
		var n int
		n, err = resp.Body.Read(buf)
		expected := want[min(g.bytes, int64(len(want))):]
		g.wrong = g.wrong || !bytes.HasPrefix(expected, buf[:n])
		g.bytes += int64(n)
		if n > 0 {
			stuck.Reset(bodyBound)
		}
	}
	c.tally.note(func(n *counts) { n.bytes += g.bytes })
	right := !g.wrong && g.bytes == int64(len(want))
	switch inner := q.isPart() && q.to < int64(len(c.library.blobs[digest.Digest(q.reference)])); {
	case errors.Is(err, io.EOF) && right:
		g.whole = true
	case errors.Is(err, io.EOF) && inner && resp.Header.Get("Cache-Status") != "breakwater; hit":
		c.tally.note(func(n *counts) { n.wrongParts++ })
	case errors.Is(err, io.EOF):
		c.violate(q, resp, "came as complete with %d bytes of %d, not all of them right", g.bytes, len(want))
	case ctx.Err() != nil:
	case errors.Is(err, io.ErrUnexpectedEOF):
		c.tally.note(func(n *counts) { n.short++ })
		if _, stored := c.tally.stored.Load(q.key()); stored && resp.Header.Get("Cache-Status") == "breakwater; hit" {
			c.violate(q, resp, "is stored, and ended after %d bytes of %d", g.bytes, len(want))
		}
	default:
		c.violate(q, resp, "broke after %d bytes of %d: %v", g.bytes, len(want), err)
	}
	return g
}

// violate notes an answer that should not have been, with the weather at that time.
func (c *client) violate(q query, resp *http.Response, format string, args ...any) {
	weather := make([]string, upstreamCount)
	for i, u := range c.upstreams {
		weather[i] = u.present()
	}
	answer := ""
	if resp != nil {
		answer = fmt.Sprintf(" [%d, %s]", resp.StatusCode, resp.Header.Get("Cache-Status"))
	}
	c.tally.violate("%s %s range %d-%d%s, upstreams %s: %s", q.method, q.path(), q.from, q.to, answer, strings.Join(weather, ", "), fmt.Sprintf(format, args...))
}

// tasks are goroutines that are waited for; the first error is what they come to.
type tasks struct {
	sync.WaitGroup
	once sync.Once
	err  error
}

// Go runs f in a goroutine.
func (t *tasks) Go(f func() error) {
	t.WaitGroup.Go(func() {
		if err := f(); err != nil {
			t.once.Do(func() { t.err = err })
		}
	})
}

// Wait returns the first error once all have ended.
func (t *tasks) Wait() error {
	t.WaitGroup.Wait()
	return t.err
}
