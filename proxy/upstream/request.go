package upstream

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strings"
	"time"

	"breakwater/pkg/oci"
)

// How long a body may bring nothing. That of a manifest, list or token must be over before those who
// wait for it leave, or it would be nobody's fault.
const (
	stallTimeout      = 15 * time.Second
	smallStallTimeout = 4 * time.Second
)

// query is one question about a repository.
type query struct {
	method string
	class  class
	ref    oci.Reference // what failures are counted by
	path   string        // behind the repository's name: /manifests/latest
	header http.Header
}

type againKey struct{}

// Again marks a request as the second try, or the rest, of something that was begun: the hold-off that
// its first failure has put on the reference does not concern it.
func Again(ctx context.Context) context.Context { return context.WithValue(ctx, againKey{}, true) }

// IsAgain reports whether Again has marked the request.
func IsAgain(ctx context.Context) bool { return ctx.Value(againKey{}) != nil }

// send asks, if hold and breaker allow it, and returns an answer with a status of 2xx. The caller
// settles it with nil or an *Error once it knows what the answer is worth.
func (c *Client) send(ctx context.Context, q query) (*http.Response, func(error), error) {
	if left := c.hold.left(time.Now()); left > 0 {
		return nil, nil, &Error{Upstream: c.base.Host, Class: q.class.String(), Kind: Throttled, Reason: "asked us to wait", RetryAfter: left, State: "held off"}
	}
	admit := c.breakers[q.class].allow
	if IsAgain(ctx) {
		admit = c.breakers[q.class].retry
	}
	verdict, err := admit(q.ref.String())
	if err != nil {
		return nil, nil, c.refused(q.class, err)
	}
	settle := c.settler(q.class, verdict)
	resp, err := c.authorized(ctx, q)
	if err == nil {
		err = c.judge(q.class, resp)
	}
	c.remember(q.ref, err)
	if err != nil {
		settle(err)
		return nil, nil, err
	}
	return resp, settle, nil
}

// settler wraps a breaker's settle so that an error says by itself what it counts for, and so that
// an *Error learns since when this has been going on.
func (c *Client) settler(class class, settle func(verdict, string)) func(error) {
	c.budget.active.Add(1)
	return func(err error) {
		c.budget.active.Add(-1)
		e := new(Error)
		switch {
		case err == nil:
			c.failing[class].Store(nil)
			c.counts[class].succeeded.Add(1)
			settle(success, "")
			return
		case !errors.As(err, &e):
			settle(excluded, err.Error())
			return
		}
		switch e.verdict {
		case success:
			c.failing[class].Store(nil)
			c.counts[class].succeeded.Add(1)
		case excluded:
			c.counts[class].excluded.Add(1)
		default:
			c.failedNow(class)
			c.counts[class].failed.Add(1)
		}
		settle(e.verdict, e.Reason)
		if dial := new(DialError); e.verdict == hostFailure && errors.As(e, &dial) {
			c.pool.hostFailed(dial.Host, e.Reason, c.breakers[class])
		}
		if failing := c.failing[class].Load(); failing != nil && e.Outage() {
			e.Since = failing.since
		}
		if e.Class == class.String() { // else the trouble was the token service's
			e.State = c.breakers[class].state().Name
		}
	}
}

// refused is the Error of a request that the breaker did not let through.
func (c *Client) refused(class class, err error) *Error {
	e := &Error{Upstream: c.base.Host, Class: class.String(), Reason: err.Error(), verdict: excluded}
	open := new(Open)
	if errors.As(err, &open) {
		e.Reason, e.State, e.Since, e.RetryAfter = open.Reason, open.State, open.Since, max(time.Until(open.Until), time.Second)
	}
	if failing := c.failing[class].Load(); failing != nil && (e.Since.IsZero() || failing.since.Before(e.Since)) {
		e.Since = failing.since
	}
	return e
}

// judge is nil for an answer that can be used, and makes an *Error of any other one (DESIGN 8, "What
// counts"), closing its body.
func (c *Client) judge(class class, resp *http.Response) error {
	page := strings.HasPrefix(strings.ToLower(resp.Header.Get("Content-Type")), "text/html")
	if resp.StatusCode < 300 && !page {
		return nil
	}
	defer resp.Body.Close()
	switch resp.StatusCode {
	case http.StatusOK, http.StatusPartialContent, http.StatusForbidden, http.StatusNotFound, http.StatusGone:
		if page { // captive portals send one for everything, load balancers for what has no backend
			e := c.malformed(class, resp.StatusCode, errors.New("a page of HTML"))
			e.at(resp.Request.URL.Host)
			return e
		}
	}
	said := oci.ReadError(resp)
	e := &Error{Upstream: c.base.Host, Class: class.String(), Status: resp.StatusCode, Err: said, verdict: excluded}
	e.Reason = fmt.Sprintf("answered %d", resp.StatusCode)
	elsewhere := resp.Request.URL.Host != c.base.Host
	if elsewhere {
		e.Reason = fmt.Sprintf("%s, to which it redirects, answered %d", resp.Request.URL.Host, resp.StatusCode)
	}
	switch status := resp.StatusCode; {
	case status == http.StatusNotFound || status == http.StatusGone:
		e.Kind, e.verdict = NotFound, success
	case status == http.StatusTooManyRequests:
		e.Kind, e.RetryAfter = Throttled, c.pool.hold(resp.Request.URL.Host+"\x00"+c.Credential()).extend(resp.Header, time.Now())
		c.pool.settings.Logger.Warn("upstream asks us to wait", "upstream", resp.Request.URL.Host, "seconds", e.RetryAfter.Seconds())
	case elsewhere && (status == http.StatusForbidden || status == http.StatusUnauthorized):
		// An expired signature: no refusal, and nobody's fault unless a new redirect has it too.
	case status == http.StatusUnauthorized || status == http.StatusForbidden || status == http.StatusUnavailableForLegalReasons:
		e.Kind = Denied
	case status == http.StatusRequestedRangeNotSatisfiable:
		e.verdict = success
	case status == http.StatusRequestTimeout || status >= 500 || status < 400:
		e.verdict = failure
	}
	return e
}

// authorized asks with the authorization that worked last time, and once more with a new one if
// the upstream challenges.
func (c *Client) authorized(ctx context.Context, q query) (*http.Response, error) {
	authorization := c.auth.remembered(ctx, q.ref.Repository)
	resp, err := c.roundTrip(ctx, q, authorization)
	if err != nil || resp.StatusCode != http.StatusUnauthorized || resp.Request.URL.Host != c.base.Host {
		return resp, err
	}
	challenges := parseChallenges(resp.Header.Values("WWW-Authenticate"))
	authorization, err = c.auth.answer(ctx, q.ref.Repository, challenges, authorization)
	if err != nil || authorization == "" {
		if err == nil {
			return resp, nil // nothing to answer with: the 401 stands
		}
		resp.Body.Close()
		return nil, err
	}
	discard(resp.Body)
	return c.roundTrip(ctx, q, authorization)
}

// roundTrip sends one request, redirects included, bounded to its header in time; its body is
// bounded by stallTimeout from read to read.
func (c *Client) roundTrip(ctx context.Context, q query, authorization string) (*http.Response, error) {
	ctx, cancel := context.WithCancelCause(ctx)
	req, err := http.NewRequestWithContext(ctx, q.method, c.url(q), nil)
	if err != nil {
		cancel(nil)
		return nil, c.malformed(q.class, 0, err)
	}
	for name, values := range q.header {
		req.Header[name] = values
	}
	req.Header.Set("User-Agent", "breakwater")
	if authorization != "" {
		req.Header.Set("Authorization", authorization)
	}
	return c.do(ctx, cancel, q.class, req)
}

// do is the one place that puts a request on the wire, for content and tokens alike.
func (c *Client) do(ctx context.Context, cancel context.CancelCauseFunc, class class, req *http.Request) (*http.Response, error) {
	bound := time.AfterFunc(headerTimeout, func() { cancel(errNoHeader) })
	defer bound.Stop()
	client := *c.http
	if class == classToken {
		client.CheckRedirect = func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }
	}
	leave := func() {}
	if class != classToken { // which is asked for by those who have been let in
		var err error
		if leave, err = c.recovery.enter(ctx); err != nil {
			cancel(nil)
			return nil, &Error{Upstream: c.base.Host, Class: class.String(), Reason: "has just come back, and others are asking", Err: err, verdict: excluded}
		}
	}
	end := func(cause error) { leave(); cancel(cause) }
	began := time.Now()
	resp, again, err := c.try(&client, req)
	if err != nil {
		failed := c.failed(ctx, class, withoutURL(resp, err))
		if again && errors.Is(context.Cause(ctx), errNoHeader) {
			failed.verdict = excluded // the second try had what the first had left
		}
		if u := new(url.Error); errors.As(err, &u) {
			if last, err := url.Parse(u.URL); err == nil {
				failed.at(last.Host)
			}
		}
		end(nil)
		if failed.verdict != excluded {
			c.pool.closeIdle(c)
		}
		return nil, failed
	}
	c.latency[class].observe(time.Since(began))
	resp.Body = &stallGuard{ReadCloser: resp.Body, cancel: end, timeout: stallTimeout, timer: stopped(func() {
		end(errStalled)
		c.pool.closeIdle(c)
	})}
	if class != classBlob {
		resp.Body.(*stallGuard).timeout = smallStallTimeout
	}
	return resp, nil
}

func (c *Client) url(q query) string {
	return c.base.JoinPath("v2", c.cfg.RepositoryPrefix+q.ref.Name).String() + q.path
}

// checkRedirect lets an upstream send us elsewhere a few times, but never down to http, and never
// with our credentials or the address that we come from, not even to itself (CVE-2024-45336). Where
// to is the dial guard's matter.
func checkRedirect(req *http.Request, via []*http.Request) error {
	if len(via) > maxRedirects {
		return fmt.Errorf("more than %d redirects", maxRedirects)
	}
	from, to := via[len(via)-1].URL, req.URL
	if (to.Scheme != "https" && to.Scheme != "http") || (from.Scheme == "https" && to.Scheme != "https") || to.User != nil {
		return fmt.Errorf("redirect from %s to %.20s URL refused", from.Scheme, to.Scheme)
	}
	req.Header.Del("Authorization")
	req.Header.Del("Referer")
	return nil
}

// transport hides a Location that is no URL from http.Client, whose error would tell all of it: it may
// well be a signed one.
type transport struct{ *http.Transport }

func (t transport) RoundTrip(req *http.Request) (*http.Response, error) {
	resp, err := t.Transport.RoundTrip(req)
	if err == nil {
		if _, err := req.URL.Parse(resp.Header.Get("Location")); err != nil {
			resp.Header.Del("Location")
		}
	}
	return resp, err
}

// withoutURL drops from http.Client's error what may be a signed URL: its prefix, and, if there was an
// answer but its redirect could not be followed, all of it.
func withoutURL(resp *http.Response, err error) error {
	if resp != nil {
		return errors.New("redirect that may not be followed")
	}
	if u := new(url.Error); errors.As(err, &u) {
		return u.Err
	}
	return err
}

// discard reads the rest of a small body, so that the connection can be used again.
func discard(body io.ReadCloser) {
	_, _ = io.CopyN(io.Discard, body, 4<<10)
	body.Close()
}

// stallGuard cancels the request when one Read brings nothing for too long.
type stallGuard struct {
	io.ReadCloser
	cancel  context.CancelCauseFunc
	timeout time.Duration
	timer   *time.Timer
}

func stopped(f func()) *time.Timer {
	t := time.AfterFunc(time.Hour, f)
	t.Stop()
	return t
}

func (g *stallGuard) Read(p []byte) (int, error) {
	g.timer.Reset(g.timeout)
	n, err := g.ReadCloser.Read(p)
	g.timer.Stop()
	return n, err
}

func (g *stallGuard) Close() error {
	g.timer.Stop()
	err := g.ReadCloser.Close()
	g.cancel(nil)
	return err
}
