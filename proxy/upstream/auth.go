package upstream

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"slices"
	"strings"
	"sync"
	"time"

	"breakwater/pkg/oci"

	"golang.org/x/net/publicsuffix"
	"golang.org/x/sync/singleflight"
)

const (
	maxTokenBody = 256 << 10
	maxToken     = 16 << 10
	maxRealm     = 2 << 10
	// Life of a token: what the answer says, within these. It is used until 80 % of it is over, so that
	// none runs out on the way, and from 60 % on the next one is fetched ahead of need.
	defaultTokenLife = time.Minute // distribution's token specification
	minTokenLife     = 30 * time.Second
	maxTokenLife     = time.Hour
	refusalLife      = time.Minute // a token service's 401 or 403 is not asked for again before
	maxTokens        = 10_000      // repositories of an upstream with a token of their own
)

// authorizer finds what to put into Authorization: nothing, Basic, or a Bearer token. What an
// upstream wants is learned from its first challenge; tokens are kept by what they are for, and
// belong to one credential, since a client has only one.
type authorizer struct {
	client *Client
	flight singleflight.Group

	life context.Context // ends when the client closes
	end  context.CancelFunc

	mu      sync.Mutex           // guards what follows
	learnt  map[string]challenge // by repository name
	tokens  map[challenge]token
	kept    secret    // of the account, if it takes long to find
	unfound time.Time // the account's secret is not looked for before
	why     error
	closed  bool
	fetches sync.WaitGroup
}

func newAuthorizer(c *Client) *authorizer {
	a := &authorizer{client: c}
	a.life, a.end = context.WithCancel(context.Background())
	return a
}

// close ends the requests for tokens and waits for them.
func (a *authorizer) close() {
	a.mu.Lock()
	a.closed = true
	a.mu.Unlock()
	a.end()
	a.fetches.Wait()
}

// challenge is what a token is asked with. Basic has only a scheme.
type challenge struct{ scheme, realm, service, scope string }

type token struct {
	authorization string    // "" for a refusal that is remembered
	renew         time.Time // from then on whoever uses it has the next one fetched; zero is never
	until         time.Time
}

// remembered is the authorization to send to a repository unasked, "" if none is known.
func (a *authorizer) remembered(ctx context.Context, repo oci.Repository) string {
	a.mu.Lock()
	ch, known := a.learnt[repo.Name]
	t := a.tokens[ch]
	a.mu.Unlock()
	switch {
	case known && ch.scheme == "basic":
		s, _ := a.secret(ctx)
		return s.authorization()
	case known && time.Now().Before(t.until):
		if !t.renew.IsZero() && time.Now().After(t.renew) {
			a.begin(context.Background(), ch) // nobody waits for it
		}
		return t.authorization
	}
	return ""
}

// answer is what to answer the challenges of a 401 with, "" if there is nothing. sent is the
// authorization that was challenged: never given again. Errors are *Error.
func (a *authorizer) answer(ctx context.Context, repo oci.Repository, challenges []map[string]string, sent string) (string, error) {
	ch, ok := a.choose(repo, challenges)
	if !ok {
		return "", nil
	}
	a.learn(repo, ch)
	if ch.scheme == "basic" {
		if sent != "" {
			a.forget()
		}
		s, err := a.secret(ctx)
		if err != nil || s.authorization() == sent {
			return "", err
		}
		return s.authorization(), nil
	}
	a.mu.Lock()
	t, ok := a.tokens[ch]
	a.mu.Unlock()
	if ok && time.Now().Before(t.until) {
		if t.authorization == "" {
			return "", a.denied(http.StatusUnauthorized)
		}
		if t.authorization != sent {
			return t.authorization, nil
		}
	}
	select {
	case r := <-a.begin(ctx, ch):
		authorization, _ := r.Val.(string)
		if e := new(Error); errors.As(r.Err, &e) {
			own := *e // whoever asked for content writes into it what that means there
			return "", &own
		}
		return authorization, r.Err
	case <-ctx.Done():
		return "", a.client.failed(ctx, classToken, ctx.Err())
	}
}

// begin fetches a token, once for all who want it.
func (a *authorizer) begin(ctx context.Context, ch challenge) <-chan singleflight.Result {
	return a.once(ctx, ch.realm+"\x00"+ch.service+"\x00"+ch.scope, func(ctx context.Context) (any, error) { return a.fetch(ctx, ch) })
}

// once does what several may want at the same time. One waiter's hurry must not fail the others, but
// its trace tells how its question goes on.
func (a *authorizer) once(ctx context.Context, key string, do func(context.Context) (any, error)) <-chan singleflight.Result {
	return a.flight.DoChan(key, func() (any, error) {
		a.mu.Lock()
		closed := a.closed
		if !closed {
			a.fetches.Add(1)
		}
		a.mu.Unlock()
		if closed {
			return "", a.client.failed(a.life, classToken, a.life.Err())
		}
		defer a.fetches.Done()
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), headerTimeout)
		defer cancel()
		defer context.AfterFunc(a.life, cancel)()
		return do(ctx)
	})
}

// choose picks the challenge to answer: Bearer if its realm may be asked, else Basic if there is a
// credential.
func (a *authorizer) choose(repo oci.Repository, challenges []map[string]string) (challenge, bool) {
	for _, c := range challenges {
		if c[""] != "bearer" {
			continue
		}
		if _, err := a.realm(c["realm"]); err != nil {
			a.client.pool.settings.Logger.Warn("token realm refused", "upstream", a.client.base.Host, "err", err)
			continue
		}
		scope := c["scope"]
		if scope == "" {
			scope = "repository:" + a.client.cfg.RepositoryPrefix + repo.Name + ":pull"
		}
		return challenge{"bearer", c["realm"], c["service"], scope}, true
	}
	for _, c := range challenges {
		if c[""] == "basic" && a.client.cfg.Account != (Account{}) {
			return challenge{scheme: "basic"}, true
		}
	}
	return challenge{}, false
}

func (a *authorizer) learn(repo oci.Repository, ch challenge) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.learnt == nil || len(a.learnt) >= maxTokens {
		a.learnt, a.tokens = map[string]challenge{}, map[challenge]token{}
	}
	a.learnt[repo.Name] = ch
}

func (a *authorizer) keep(ch challenge, t token) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.tokens == nil || len(a.tokens) >= maxTokens {
		a.tokens = map[challenge]token{}
	}
	a.tokens[ch] = t
}

// fetch asks the token service, behind its own breaker, and keeps what it says.
func (a *authorizer) fetch(ctx context.Context, ch challenge) (string, error) {
	c := a.client
	verdict, err := c.breakers[classToken].allow(ch.scope)
	if err != nil {
		return "", c.refused(classToken, err)
	}
	settle := c.settler(classToken, verdict)
	t, err := a.ask(ctx, ch)
	settle(err)
	if err == nil {
		a.keep(ch, t)
		return t.authorization, nil
	}
	e := new(Error)
	if errors.As(err, &e) {
		if e.Kind == Denied {
			a.keep(ch, token{until: time.Now().Add(refusalLife)})
		}
		blameless := *e // to whoever wanted the token: the registry itself did nothing wrong
		blameless.verdict = excluded
		err = &blameless
	}
	return "", err
}

// ask is one request to the token service (distribution, "Token Authentication Specification").
func (a *authorizer) ask(ctx context.Context, ch challenge) (token, error) {
	c := a.client
	realm, err := a.realm(ch.realm)
	if err != nil {
		return token{}, c.malformed(classToken, 0, err)
	}
	var own secret
	if a.trusts(realm) {
		if own, err = a.secret(ctx); err != nil {
			return token{}, err
		}
	}
	ctx, cancel := context.WithCancelCause(ctx)
	req, err := tokenRequest(ctx, realm, ch, own)
	if err != nil {
		cancel(nil)
		return token{}, c.malformed(classToken, 0, err)
	}
	resp, err := c.do(ctx, cancel, classToken, req)
	if err != nil {
		return token{}, err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return token{}, a.judge(resp)
	}
	raw, err := c.readAll(resp, classToken, maxTokenBody)
	if err != nil {
		return token{}, err
	}
	return a.parse(raw)
}

// tokenRequest is a GET with or without Basic, or for an identity token the POST of distribution's
// "Oauth2 Token Authentication".
func tokenRequest(ctx context.Context, realm *url.URL, ch challenge, own secret) (*http.Request, error) {
	q := realm.Query()
	if own.identity != "" {
		q = url.Values{"grant_type": {"refresh_token"}, "client_id": {"breakwater"}, "refresh_token": {own.identity}}
	}
	if ch.service != "" {
		q.Set("service", ch.service)
	}
	q.Set("scope", ch.scope)
	if own.identity != "" {
		req, err := http.NewRequestWithContext(ctx, http.MethodPost, realm.String(), strings.NewReader(q.Encode()))
		if err == nil {
			req.Header = http.Header{"User-Agent": {"breakwater"}, "Content-Type": {"application/x-www-form-urlencoded"}}
		}
		return req, err
	}
	realm.RawQuery = q.Encode()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, realm.String(), nil)
	if err != nil {
		return nil, err
	}
	req.Header.Set("User-Agent", "breakwater")
	if authorization := own.authorization(); authorization != "" {
		req.Header.Set("Authorization", authorization)
	}
	return req, nil
}

// judge reads the token service's status: its 404 is no word on any content, and its 401 or 403
// refuses us.
func (a *authorizer) judge(resp *http.Response) *Error {
	status := resp.StatusCode
	if status == http.StatusUnauthorized || status == http.StatusForbidden {
		a.forget()
		return a.denied(status)
	}
	if status == http.StatusTooManyRequests {
		return &Error{Upstream: a.client.base.Host, Class: classToken.String(), Status: status, Kind: Throttled, Reason: "token service asked us to wait",
			RetryAfter: a.client.pool.hold(resp.Request.URL.Host+"\x00"+a.client.Credential()).extend(resp.Header, time.Now()), verdict: excluded}
	}
	return &Error{Upstream: a.client.base.Host, Class: classToken.String(), Status: status, Reason: fmt.Sprintf("token service answered %d", status), verdict: failure}
}

func (a *authorizer) denied(status int) *Error {
	return &Error{Upstream: a.client.base.Host, Class: classToken.String(), Kind: Denied, Status: status, Reason: "token service refuses our credentials", verdict: excluded}
}

func (a *authorizer) parse(raw []byte) (token, error) {
	var body struct {
		Token       string  `json:"token"`
		AccessToken string  `json:"access_token"`
		ExpiresIn   float64 `json:"expires_in"` // seconds
	}
	if err := json.Unmarshal(raw, &body); err != nil {
		return token{}, a.client.malformed(classToken, http.StatusOK, fmt.Errorf("token: %w", err))
	}
	value := body.Token
	if value == "" {
		value = body.AccessToken
	}
	outside := func(r rune) bool { return r <= ' ' || r > '~' }
	if value == "" || len(value) > maxToken || strings.ContainsFunc(value, outside) {
		return token{}, a.client.malformed(classToken, http.StatusOK, errors.New("the token is empty, too long, or not printable ASCII"))
	}
	life := defaultTokenLife
	if body.ExpiresIn != 0 {
		life = time.Duration(min(max(body.ExpiresIn, 0), maxTokenLife.Seconds()) * float64(time.Second))
	}
	life = max(life, minTokenLife)
	now := time.Now()
	return token{"Bearer " + value, now.Add(life * 6 / 10), now.Add(life * 8 / 10)}, nil
}

// realm parses the address of a token service. It must be one that nobody can mistake for another,
// on https unless the upstream itself is not.
func (a *authorizer) realm(s string) (*url.URL, error) {
	u, err := url.Parse(s)
	switch {
	case len(s) > maxRealm:
		return nil, errors.New("realm is too long")
	case err != nil:
		return nil, errors.New("realm is not a URL")
	case u.Host == "" || u.User != nil || u.Opaque != "" || u.Fragment != "":
		return nil, errors.New("realm is not a plain URL")
	case u.Scheme != "https" && (u.Scheme != "http" || a.client.base.Scheme != "http"):
		return nil, fmt.Errorf("realm has scheme %.20q", u.Scheme)
	case u.Query().Has("service") || u.Query().Has("scope"):
		return nil, errors.New("realm brings a service or scope of its own")
	}
	return u, nil
}

// trusts reports whether the realm may see the upstream's credential: the same host, one that the
// configuration names, or the same registrable domain, never by address (CVE-2026-33540, GHSA-3p65-76g6-3w7r).
func (a *authorizer) trusts(realm *url.URL) bool {
	base := a.client.base
	if realm.Scheme != base.Scheme {
		return false
	}
	if slices.Contains(a.client.route.own, hostPort(realm)) {
		return true
	}
	if _, err := netip.ParseAddr(realm.Hostname()); err == nil || net.ParseIP(base.Hostname()) != nil || realm.Port() != base.Port() {
		return false
	}
	theirs, err := publicsuffix.EffectiveTLDPlusOne(realm.Hostname())
	if err != nil {
		return false
	}
	ours, err := publicsuffix.EffectiveTLDPlusOne(base.Hostname())
	return err == nil && ours == theirs
}

// secret is what the account proves itself with, found anew or kept from the last time. Errors are
// *Error.
func (a *authorizer) secret(ctx context.Context) (secret, error) {
	if a.client.cfg.Account == (Account{}) {
		return secret{}, nil
	}
	now := time.Now()
	a.mu.Lock()
	kept, unfound, why := a.kept, a.unfound, a.why
	a.mu.Unlock()
	if now.Before(kept.until) {
		if now.After(kept.renew) && now.After(unfound) {
			a.once(ctx, "", a.find) // nobody waits for it
		}
		return kept, nil
	}
	if now.Before(unfound) {
		return secret{}, a.lacking(why)
	}
	select {
	case r := <-a.once(ctx, "", a.find):
		s, _ := r.Val.(secret)
		if r.Err != nil {
			return secret{}, a.lacking(r.Err)
		}
		return s, nil
	case <-ctx.Done():
		return secret{}, a.client.failed(ctx, classToken, ctx.Err())
	}
}

// lacking is the Error of a request that cannot be made for want of a credential: nobody's fault but
// our own.
func (a *authorizer) lacking(err error) *Error {
	return &Error{Upstream: a.client.base.Host, Class: classToken.String(), Reason: "cannot find our credentials for it", Err: err, verdict: excluded}
}

// find looks the secret up. What took a program or a service to find is kept as long as it is good,
// and its failure for a while.
func (a *authorizer) find(ctx context.Context) (any, error) {
	account := a.client.cfg.Account
	s, err := account.find(ctx, a.client.base.Host)
	a.mu.Lock()
	defer a.mu.Unlock()
	a.unfound, a.why = time.Time{}, err
	if err != nil && account.Username == "" {
		a.unfound = time.Now().Add(retryAccount)
	}
	if err == nil && !s.found.IsZero() {
		a.kept = s
	}
	return s, err
}

// forget drops a kept secret that was refused, unless it is new: then another would be the same.
func (a *authorizer) forget() {
	a.mu.Lock()
	defer a.mu.Unlock()
	if time.Since(a.kept.found) > retryAccount {
		a.kept = secret{}
	}
}

// probe asks for a token as somebody did before.
func (a *authorizer) probe(ctx context.Context) error {
	a.mu.Lock()
	var known challenge
	for _, ch := range a.learnt {
		if ch.scheme == "bearer" {
			known = ch
			break
		}
	}
	a.mu.Unlock()
	if known.scheme == "" {
		return errNoProbe
	}
	a.client.http.CloseIdleConnections()
	t, err := a.ask(ctx, known)
	if err != nil {
		return probed(err)
	}
	a.keep(known, t)
	return nil
}
