package registrytest

import (
	"net/http"
	"slices"
	"strings"
	"sync"
	"time"
)

// Kind is what a request asks for.
type Kind string

// The kinds, by the request's path.
const (
	KindPing      Kind = "ping" // /v2/
	KindToken     Kind = "token"
	KindManifest  Kind = "manifest"
	KindBlob      Kind = "blob"
	KindCDN       Kind = "cdn" // a blob that the registry redirected
	KindTags      Kind = "tags"
	KindReferrers Kind = "referrers"
	KindOther     Kind = "other"
)

func kindOf(path string) Kind {
	part := contentPath.FindStringSubmatch(path)
	switch {
	case path == "/v2/" || path == "/v2":
		return KindPing
	case path == "/token":
		return KindToken
	case strings.HasPrefix(path, "/cdn/"):
		return KindCDN
	case part == nil:
		return KindOther
	}
	return map[string]Kind{"manifests": KindManifest, "blobs": KindBlob, "tags": KindTags, "referrers": KindReferrers}[part[2]]
}

// Match selects requests: all those that each of its fields selects. A zero field selects all.
type Match struct {
	Kind   Kind
	Method string
	Host   string // that was asked, with its port if that is not the scheme's own
	Path   string // a part of the path: a repository, a tag, a digest
	Func   func(*http.Request) bool
}

func (m Match) matches(r *http.Request) bool {
	return (m.Kind == "" || m.Kind == kindOf(r.URL.Path)) &&
		(m.Method == "" || m.Method == r.Method) &&
		(m.Host == "" || m.Host == r.Host) &&
		strings.Contains(r.URL.Path, m.Path) &&
		(m.Func == nil || m.Func(r))
}

// Request is a request that was served, or is being served.
type Request struct {
	*http.Request // its header and URL; the body and the context are not for reading
	Kind          Kind
	Start, End    time.Time // End is zero while the answer is under way
	Status        int       // 0 before there is one
	Sent          int64     // bytes of body
}

// script is what happens to the requests of a handler, and what has happened.
type script struct {
	mu    sync.Mutex // guards what is below, and what is in the calls
	rules []*rule
	calls []*call
}

// call is a request under way: its ResponseWriter counts.
type call struct {
	http.ResponseWriter
	*script
	Request
}

// play serves one request by h, as the rules want it.
func (s *script) play(w http.ResponseWriter, r *http.Request, h http.Handler) {
	// A clone, since what serves the request may change its header.
	c := &call{w, s, Request{Request: r.Clone(r.Context()), Kind: kindOf(r.URL.Path), Start: time.Now()}}
	s.mu.Lock()
	s.calls = append(s.calls, c)
	rules := slices.Clone(s.rules)
	s.mu.Unlock()
	defer func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		c.End = time.Now()
	}()
	for _, rule := range rules {
		if rule.match.matches(r) {
			h = rule.wrap(h)
		}
	}
	h.ServeHTTP(c, r)
	c.note(http.StatusOK, 0) // what net/http sends for a handler that wrote nothing
}

// Requests is what was asked so far, in the order in which it began.
func (s *script) Requests(m Match) []Request {
	s.mu.Lock()
	defer s.mu.Unlock()
	var found []Request
	for _, c := range s.calls {
		if m.matches(c.Request.Request) {
			found = append(found, c.Request)
		}
	}
	return found
}

// Count is how many such requests there were.
func (s *script) Count(m Match) int { return len(s.Requests(m)) }

// Forget empties the log; what is under way is not noted any more.
func (s *script) Forget() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.calls = nil
}

// note takes the first status, and bytes of body.
func (c *call) note(status, sent int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.Status == 0 && status >= 200 {
		c.Status = status
	}
	c.Sent += int64(sent)
}

func (c *call) WriteHeader(status int) {
	c.note(status, 0)
	c.ResponseWriter.WriteHeader(status)
}

func (c *call) Write(p []byte) (int, error) {
	n, err := c.ResponseWriter.Write(p)
	c.note(http.StatusOK, n)
	return n, err
}

// Unwrap is for http.ResponseController.
func (c *call) Unwrap() http.ResponseWriter { return c.ResponseWriter }
