package upstream

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
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

// Config describes one upstream of a registry. It is comparable: equal means unchanged.
type Config struct {
	Registry         string // the name that clients ask for
	URL              string // https://quay.io; a path is kept before /v2/
	RepositoryPrefix string // "quay/" makes org/app quay/org/app there
	Username         string // "" is anonymous
	PasswordFile     string // read whenever a token is asked for, so that a new password needs no restart
}

// Client asks one upstream.
type Client struct {
	cfg      Config
	base     *url.URL
	pool     *Pool
	http     *http.Client
	auth     *authorizer
	hold     *hold
	breakers [3]*breaker // by class
	failing  [3]atomic.Pointer[time.Time]
	good     [2]atomic.Pointer[oci.Reference] // last content had: a manifest, a blob; for the probes
	shunned  shunned
	counts   [3]counter
}

// counter counts the requests of one class by what they came to.
type counter struct{ succeeded, failed, excluded atomic.Int64 }

func newClient(p *Pool, cfg Config) (*Client, error) {
	base, err := url.Parse(cfg.URL)
	if err != nil || base.Host == "" || (base.Scheme != "https" && base.Scheme != "http") {
		return nil, fmt.Errorf("upstream %q: not an http or https URL", cfg.URL)
	}
	c := &Client{cfg: cfg, base: base, pool: p, hold: p.hold(base.Host + "\x00" + cfg.Username)}
	c.http = &http.Client{Transport: p.transport(), CheckRedirect: checkRedirect}
	c.auth = newAuthorizer(c)
	probes := [3]func(context.Context) error{c.probeToken, c.probeManifest, c.probeBlob}
	for class := classToken; class <= classBlob; class++ {
		c.breakers[class] = newBreaker(breakerConfig{
			class:  class,
			probe:  probes[class],
			logger: p.settings.Logger.With("registry", cfg.Registry, "upstream", base.Host, "class", class.String()),
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
	Reason                      string // of the latest failure, "" while closed
	Succeeded, Failed, Excluded int64  // requests so far
}

// Health tells of each class.
func (c *Client) Health() []Health {
	var all []Health
	for class := classToken; class <= classBlob; class++ {
		state, n := c.breakers[class].state(), &c.counts[class]
		all = append(all, Health{class.String(), state.Name, state.Since, state.Reason, n.succeeded.Load(), n.failed.Load(), n.excluded.Load()})
	}
	return all
}

// Credential identifies the account in use, without its secret; "" is anonymous.
func (c *Client) Credential() string {
	if c.cfg.Username == "" {
		return ""
	}
	return c.base.Host + "/" + c.cfg.Username
}

func (c *Client) close() {
	c.auth.close()
	for _, b := range c.breakers {
		b.close()
	}
	c.http.CloseIdleConnections()
}

// breakersOf are those that a connection failure to hostport counts for.
func (c *Client) breakersOf(hostport string) []*breaker {
	if hostPort(c.base) != hostport {
		return nil
	}
	return c.breakers[classManifest:]
}

// Resolved is what a tag named when the upstream was asked.
type Resolved struct {
	Digest   digest.Digest
	Manifest *oci.Manifest // set if only the whole manifest could tell the digest
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
			return Resolved{Digest: dgst}, nil
		}
		settle(nil)
	} else if e := new(Error); !errors.As(err, &e) || (e.Status != http.StatusMethodNotAllowed && e.Status != http.StatusNotImplemented && e.Status != http.StatusBadRequest) {
		return Resolved{}, err
	}
	m, err := c.manifest(ctx, ref, c.resend)
	return Resolved{Digest: m.Digest, Manifest: &m}, err
}

var manifestAccept = http.Header{"Accept": oci.ManifestTypes}

// Manifest fetches a manifest and verifies it: against the digest asked for, or at least its form.
// Errors are *Error.
func (c *Client) Manifest(ctx context.Context, ref oci.Reference) (oci.Manifest, error) {
	return c.manifest(ctx, ref, c.send)
}

type sender func(context.Context, query) (*http.Response, func(error), error)

func (c *Client) manifest(ctx context.Context, ref oci.Reference, send sender) (oci.Manifest, error) {
	if err := c.shuns(classManifest, ref.Digest); err != nil {
		return oci.Manifest{}, err
	}
	resp, settle, err := send(ctx, query{http.MethodGet, classManifest, ref, "/manifests/" + ref.Identifier(), manifestAccept})
	if err != nil {
		return oci.Manifest{}, err
	}
	defer resp.Body.Close()
	raw, err := c.readAll(resp, classManifest, oci.MaxManifest)
	if err != nil {
		settle(err)
		return oci.Manifest{}, err
	}
	algorithm := digest.SHA256
	if ref.Digest != "" {
		algorithm = ref.Digest.Algorithm()
	}
	m, err := oci.ParseManifest(resp.Header.Get("Content-Type"), raw, algorithm)
	if err == nil && ref.Digest != "" && m.Digest != ref.Digest {
		settle(nil)
		c.Mismatch(ref)
		return oci.Manifest{}, &Error{Upstream: c.base.Host, Class: classManifest.String(), Reason: "sent other bytes than the digest names"}
	}
	if err != nil {
		err = c.malformed(classManifest, resp.StatusCode, err)
		settle(err)
		return oci.Manifest{}, err
	}
	settle(nil)
	c.good[0].Store(&ref)
	return m, nil
}

// StatBlob returns a blob's size, -1 if the upstream does not tell. Errors are *Error.
func (c *Client) StatBlob(ctx context.Context, ref oci.Reference) (int64, error) {
	path := "/blobs/" + ref.Digest.String()
	resp, settle, err := c.send(ctx, query{http.MethodHead, classBlob, ref, path, nil})
	if err == nil {
		resp.Body.Close()
		settle(nil)
		return resp.ContentLength, nil
	}
	// Some registries refuse HEAD of blobs that they hand out (public.ecr.aws answers 401).
	if e := new(Error); !errors.As(err, &e) || e.Status == 0 || e.Kind == NotFound || e.Kind == Throttled {
		return 0, err
	}
	resp, settle, err = c.resend(ctx, query{http.MethodGet, classBlob, ref, path, http.Header{"Range": {"bytes=0-0"}}})
	if err != nil {
		return 0, err
	}
	resp.Body.Close()
	settle(nil)
	if resp.StatusCode == http.StatusPartialContent {
		_, total := contentRange(resp.Header)
		return total, nil
	}
	return resp.ContentLength, nil
}

// Blob opens a blob's bytes from offset on. Errors are *Error; those of the Body too.
func (c *Client) Blob(ctx context.Context, ref oci.Reference, offset int64) (*Body, error) {
	if err := c.shuns(classBlob, ref.Digest); err != nil {
		return nil, err
	}
	var header http.Header
	if offset > 0 {
		header = http.Header{"Range": {fmt.Sprintf("bytes=%d-", offset)}}
	}
	q := query{http.MethodGet, classBlob, ref, "/blobs/" + ref.Digest.String(), header}
	send := c.send
	if offset > 0 {
		send = c.resend
	}
	resp, settle, err := send(ctx, q)
	if expired(err) {
		if resp, settle, err = c.resend(ctx, q); expired(err) {
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
	Header    http.Header
}

// List asks for what stands behind a repository's name: "/tags/list?n=5". Errors are *Error.
func (c *Client) List(ctx context.Context, repo oci.Repository, path string) (List, error) {
	ref := oci.Reference{Repository: repo, Tag: path}
	resp, settle, err := c.send(ctx, query{http.MethodGet, classManifest, ref, path, http.Header{"Accept": {"application/json", "*/*"}}})
	if err != nil {
		return List{}, err
	}
	defer resp.Body.Close()
	raw, err := c.readAll(resp, classManifest, maxList)
	settle(err)
	return List{raw, resp.Header.Get("Content-Type"), resp.Header.Get("Link"), resp.Header}, err
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
