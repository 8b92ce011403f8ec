package upstream

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"reflect"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"breakwater/pkg/oci"

	"github.com/opencontainers/go-digest"
)

// maxRedirects is enough for registry -> CDN -> region.
const maxRedirects = 4

// maxList bounds the answer to a tags or referrers request; registries page far below it.
const maxList = 4 << 20

// Config describes one upstream of a registry.
type Config struct {
	Registry         string // the name that clients ask for
	URL              string // https://quay.io; a path is kept before /v2/
	RepositoryPrefix string // "quay/" makes org/app quay/org/app there
	Account          Account
	DigestsOnly      bool     // what it says of tags is not to be trusted
	Proxy            string   // ProxyEnv, which "" is too, ProxyNone, or the URL of an HTTP proxy
	CAFile           string   // of certificate authorities that are trusted beside the system's
	CertFile         string   // of the certificate that is shown to the upstream, with its key; "" for none
	KeyFile          string   //
	RedirectHosts    []string // host or host:port that may be reached although their addresses are not public
	TrustedRealms    []string // those, and they may be given the credential
}

// Equal reports whether two upstreams are the same, so that what was learnt of one holds for the other.
func (c Config) Equal(other Config) bool { return reflect.DeepEqual(c, other) }

// Client asks one upstream.
type Client struct {
	cfg      Config
	base     *url.URL
	pool     *Pool
	route    *route
	http     *http.Client
	auth     *authorizer
	hold     *hold
	recovery *recovery
	breakers [3]*breaker // by class
	failing  [3]atomic.Pointer[streak]
	good     [2]atomic.Pointer[oci.Reference] // last content had: a manifest, a blob; for the probes
	shunned  marks[digest.Digest]             // it has sent wrong bytes for
	lacked   marks[oci.Reference]             // it has answered 404 for
	budget   budget
	counts   [3]counter
	latency  [3]latency
}

// streak is since when there have been only failures, and the last of them. One long after the last
// begins anew.
type streak struct{ since, last time.Time }

func (c *Client) failedNow(class class) {
	now := streak{time.Now(), time.Now()}
	if old := c.failing[class].Load(); old != nil && now.last.Sub(old.last) < window {
		now.since = old.since
	}
	c.failing[class].Store(&now)
}

// counter counts the requests of one class by what they came to.
type counter struct{ succeeded, failed, excluded atomic.Int64 }

func newClient(p *Pool, cfg Config) (*Client, error) {
	base, err := url.Parse(cfg.URL)
	if err != nil || base.Host == "" || (base.Scheme != "https" && base.Scheme != "http") {
		return nil, fmt.Errorf("upstream %q: not an http or https URL", cfg.URL)
	}
	c := &Client{cfg: cfg, base: base, pool: p}
	c.hold = p.hold(base.Host + "\x00" + c.Credential())
	c.recovery = p.recovery(hostPort(base))
	if c.route, err = newRoute(p, cfg, base); err != nil {
		return nil, fmt.Errorf("upstream %s: %w", base.Host, err)
	}
	c.http = &http.Client{Transport: transport{c.route.transport()}, CheckRedirect: checkRedirect}
	c.auth = newAuthorizer(c)
	probes := [3]func(context.Context) error{c.probeToken, c.probeManifest, c.probeBlob}
	for class := classToken; class <= classBlob; class++ {
		c.breakers[class] = newBreaker(breakerConfig{
			class:  class,
			probe:  probes[class],
			logger: p.settings.Logger.With("registry", cfg.Registry, "upstream", base.Host, "class", class.String()),
			onChange: func(s State) {
				if s.Name == stateClosed {
					c.failing[class].Store(nil)
					c.recovery.begin()
				}
			},
		})
	}
	return c, nil
}

// Upstream is the host of the upstream's URL, the name that answers and logs give it.
func (c *Client) Upstream() string { return c.base.Host }

// Registry is the name that clients ask for.
func (c *Client) Registry() string { return c.cfg.Registry }

// Health is how an upstream does in one class of requests.
type Health struct {
	Class                       string // token, manifest or blob
	State                       string // of the breaker: closed, open or half-open
	Since                       time.Time
	Reason                      string    // of the latest failure, "" while closed
	HeldUntil                   time.Time // a 429 has asked for: nothing is asked before
	Succeeded, Failed, Excluded int64     // requests so far
	FirstBytes                  FirstBytes
}

// Health tells of each class.
func (c *Client) Health() []Health {
	var all []Health
	for class := classToken; class <= classBlob; class++ {
		state, n := c.breakers[class].state(), &c.counts[class]
		held := time.Now().Add(c.hold.left(time.Now()))
		all = append(all, Health{class.String(), state.Name, state.Since, state.Reason, held, n.succeeded.Load(), n.failed.Load(), n.excluded.Load(), c.latency[class].firstBytes()})
	}
	return all
}

// Credential identifies what is shown to the upstream, an account or a certificate, without its secret; "" is
// anonymous.
func (c *Client) Credential() string {
	switch {
	case c.cfg.Account != (Account{}):
		return c.base.Host + "/" + c.cfg.Account.id()
	case c.cfg.CertFile != "":
		return c.base.Host + "/certificate"
	}
	return ""
}

// AnswersTags reports whether the upstream may say what a tag names; it is asked for digests if not.
func (c *Client) AnswersTags() bool { return !c.cfg.DigestsOnly }

// retire ends the probes. What was begun may go on, tokens included.
func (c *Client) retire() {
	for _, b := range c.breakers {
		b.close()
	}
	c.http.CloseIdleConnections()
}

// breakersOf are those that a connection failure to hostport counts for: the upstream's own host, or
// the proxy on the way to it.
func (c *Client) breakersOf(hostport string) []*breaker {
	if hostPort(c.base) != hostport && !c.route.isProxy(hostport) {
		return nil
	}
	return c.breakers[classManifest:]
}

// Resolved is what a tag named when the upstream was asked.
type Resolved struct {
	Digest   digest.Digest
	Manifest *oci.Manifest // set if only the whole manifest could tell the digest
	Validation
}

// Resolve asks for a tag's, or confirms a manifest's, digest by HEAD, which registries do not count
// against a rate limit. If HEAD is unsupported or does not say, it fetches the manifest. Errors are
// *Error.
func (c *Client) Resolve(ctx context.Context, ref oci.Reference) (Resolved, error) {
	resp, settle, err := c.send(ctx, query{http.MethodHead, classManifest, ref, "/manifests/" + ref.Identifier(), manifestAccept})
	if err == nil {
		resp.Body.Close()
		if dgst, err := oci.ParseDigest(resp.Header.Get("Docker-Content-Digest")); err == nil && (ref.Digest == "" || ref.Digest == dgst) {
			settle(nil)
			c.good[0].Store(&ref)
			return Resolved{Digest: dgst, Validation: validation(resp.Header)}, nil
		}
		settle(nil)
	} else if e := new(Error); !errors.As(err, &e) || (e.Status != http.StatusMethodNotAllowed && e.Status != http.StatusNotImplemented && e.Status != http.StatusBadRequest) {
		return Resolved{}, err
	}
	return c.manifest(Again(ctx), ref)
}

var manifestAccept = http.Header{"Accept": oci.ManifestTypes}

// Manifest fetches a manifest and verifies it: against the digest asked for, or at least its form.
// Errors are *Error.
func (c *Client) Manifest(ctx context.Context, ref oci.Reference) (oci.Manifest, error) {
	got, err := c.manifest(ctx, ref)
	if err != nil {
		return oci.Manifest{}, err
	}
	return *got.Manifest, nil
}

func (c *Client) manifest(ctx context.Context, ref oci.Reference) (Resolved, error) {
	if err := c.shuns(classManifest, ref.Digest); err != nil {
		return Resolved{}, err
	}
	resp, settle, err := c.send(ctx, query{http.MethodGet, classManifest, ref, "/manifests/" + ref.Identifier(), manifestAccept})
	if err != nil {
		return Resolved{}, err
	}
	defer resp.Body.Close()
	raw, err := c.readAll(resp, classManifest, oci.MaxManifest)
	if err != nil {
		settle(err)
		return Resolved{}, err
	}
	algorithm := digest.SHA256
	if ref.Digest != "" {
		algorithm = ref.Digest.Algorithm()
	}
	m, err := oci.ParseManifest(resp.Header.Get("Content-Type"), raw, algorithm)
	if err == nil && ref.Digest != "" && m.Digest != ref.Digest {
		settle(nil)
		c.lied(classManifest, ref)
		return Resolved{}, &Error{Upstream: c.base.Host, Class: classManifest.String(), Reason: "sent other bytes than the digest names", verdict: excluded}
	}
	if err != nil {
		err = c.malformed(classManifest, resp.StatusCode, err)
		settle(err)
		return Resolved{}, err
	}
	settle(nil)
	c.good[0].Store(&ref)
	return Resolved{m.Digest, &m, validation(resp.Header)}, nil
}

// errSaysNothing settles what does not show that blobs can be had: headers do not.
var errSaysNothing = errors.New("headers only")

// StatBlob returns a blob's size, -1 if the upstream does not tell. Errors are *Error.
func (c *Client) StatBlob(ctx context.Context, ref oci.Reference) (int64, error) {
	path := "/blobs/" + ref.Digest.String()
	resp, settle, err := c.send(ctx, query{http.MethodHead, classBlob, ref, path, nil})
	if err == nil {
		resp.Body.Close()
		settle(errSaysNothing)
		return resp.ContentLength, nil
	}
	// Some registries refuse HEAD of blobs that they hand out (public.ecr.aws answers 401).
	if e := new(Error); !errors.As(err, &e) || e.Status == 0 || e.Kind == NotFound || e.Kind == Throttled {
		return 0, err
	}
	resp, settle, err = c.send(Again(ctx), query{http.MethodGet, classBlob, ref, path, http.Header{"Range": {"bytes=0-0"}}})
	if err != nil {
		return 0, err
	}
	resp.Body.Close()
	settle(errSaysNothing)
	if resp.StatusCode == http.StatusPartialContent {
		_, total := contentRange(resp.Header)
		return total, nil
	}
	return resp.ContentLength, nil
}

// Blob opens a blob, from offset on. Errors are *Error; those of the Body too.
func (c *Client) Blob(ctx context.Context, ref oci.Reference, offset int64) (*Body, error) {
	if err := c.shuns(classBlob, ref.Digest); err != nil {
		return nil, err
	}
	var header http.Header
	if offset > 0 {
		header = http.Header{"Range": {fmt.Sprintf("bytes=%d-", offset)}}
	}
	q := query{http.MethodGet, classBlob, ref, "/blobs/" + ref.Digest.String(), header}
	resp, settle, err := c.send(ctx, q)
	if expired(err) {
		if resp, settle, err = c.send(Again(ctx), q); expired(err) {
			c.breakers[classBlob].fail(ref.String(), failure, "refuses its own redirects")
		}
	}
	if err != nil {
		return nil, err
	}
	body := newBody(c, ref, resp, settle)
	switch {
	case offset > 0 && resp.StatusCode != http.StatusPartialContent:
		err = c.malformed(classBlob, resp.StatusCode, errors.New("the range was not honoured"))
	case offset > 0:
		var from int64
		if from, body.Size = contentRange(resp.Header); from != offset {
			err = c.malformed(classBlob, resp.StatusCode, fmt.Errorf("a range from %d instead of %d", from, offset))
		}
	}
	if err != nil {
		body.settle(err)
		body.Close()
		return nil, err
	}
	return body, nil
}

// expired reports whether the host that we were redirected to would not have the redirect.
func expired(err error) bool {
	e := new(Error)
	return errors.As(err, &e) && e.Kind == Unavailable && (e.Status == http.StatusForbidden || e.Status == http.StatusUnauthorized)
}

// List is an answer to a tags or referrers request.
type List struct {
	Body      []byte
	MediaType string
	Link      string // as sent: the next page, or ""
	Validation
}

// List asks for what stands behind a repository's name: "/tags/list?n=5". An answer that check does not
// accept is malformed. Errors are *Error.
func (c *Client) List(ctx context.Context, repo oci.Repository, path string, check func(List) error) (List, error) {
	ref := oci.Reference{Repository: repo, Tag: path}
	resp, settle, err := c.send(ctx, query{http.MethodGet, classManifest, ref, path, http.Header{"Accept": {"application/json", "*/*"}}})
	if err != nil {
		return List{}, err
	}
	defer resp.Body.Close()
	raw, err := c.readAll(resp, classManifest, maxList)
	list := List{raw, resp.Header.Get("Content-Type"), resp.Header.Get("Link"), validation(resp.Header)}
	if err == nil {
		if err = check(list); err != nil {
			err = c.malformed(classManifest, resp.StatusCode, err)
		}
	}
	settle(err)
	return list, err
}

func (c *Client) readAll(resp *http.Response, class class, limit int64) ([]byte, error) {
	if resp.ContentLength > limit {
		return nil, c.malformed(class, resp.StatusCode, fmt.Errorf("%d bytes are over the limit of %d", resp.ContentLength, limit))
	}
	raw, err := io.ReadAll(io.LimitReader(resp.Body, limit+1))
	switch {
	case err != nil:
		return nil, c.failed(resp.Request.Context(), class, err)
	case int64(len(raw)) > limit:
		return nil, c.malformed(class, resp.StatusCode, fmt.Errorf("the body is over the limit of %d bytes", limit))
	case resp.ContentLength >= 0 && int64(len(raw)) != resp.ContentLength:
		return nil, c.malformed(class, resp.StatusCode, io.ErrUnexpectedEOF)
	}
	return raw, nil
}

// contentRange reads "bytes 7-9/100" as 7 and 100, -1 for what is not told.
func contentRange(h http.Header) (from, total int64) {
	span, size, _ := strings.Cut(strings.TrimPrefix(h.Get("Content-Range"), "bytes "), "/")
	first, _, _ := strings.Cut(span, "-")
	from, total = -1, -1
	if n, err := strconv.ParseInt(first, 10, 64); err == nil {
		from = n
	}
	if n, err := strconv.ParseInt(size, 10, 64); err == nil {
		total = n
	}
	return from, total
}

// hostPort is the address that u is dialled at.
func hostPort(u *url.URL) string {
	if u.Port() != "" {
		return u.Host
	}
	if u.Scheme == "http" {
		return u.Host + ":80"
	}
	return u.Host + ":443"
}
