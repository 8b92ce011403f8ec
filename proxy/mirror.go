// Package proxy answers the registry's pull API, from the store if it can and through fills if it
// must. One request runs: parse -> guard -> look up -> (miss) ask or fill -> respond. Only ServeHTTP
// turns an error into an answer, and only policy.go decides which.
//
// What a request needs from upstream is never done on its own stack: a question (what does this tag
// name?) or a fill (these bytes, please) is an object of the mirror's, which any number of requests
// wait for and which goes on when they leave.
package proxy

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"runtime/debug"
	"slices"
	"sync/atomic"
	"time"

	"breakwater/pkg/config"
	"breakwater/pkg/oci"
	"breakwater/proxy/upstream"
	"breakwater/storage"
	"breakwater/storage/s3"

	"github.com/distribution/distribution/v3/registry/api/errcode"
	"github.com/opencontainers/go-digest"
)

// Config is what a Mirror is made of.
type Config struct {
	Config *config.Config
	Store  *storage.Disk
	Shared *s3.Bucket // the fleet's shared store; nil if there is none
	// Upstreams are what the network is; nil for the system's.
	Upstreams upstream.Settings
	Logger    *slog.Logger // nil discards
}

// Mirror is the registry that clients see. It is an http.Handler.
type Mirror struct {
	cfg     atomic.Pointer[config.Config]
	guard   atomic.Pointer[guard]
	store   *storage.Disk
	pool    *upstream.Pool
	logger  *slog.Logger
	metrics *metrics
	fleet   *fleet // nil if there is no shared store

	asking    *tasks // questions, cut when the mirror closes: whoever asked is gone
	filling   *tasks // fills, which may finish
	sharing   *tasks // what goes on behind for the fleet: the next process goes on with it
	tags      questions[resolution]
	manifests questions[found[oci.Manifest]]
	sizes     questions[found[int64]]
	lists     questions[storage.Answer]
	fills     fills
	expected  expectations
	untaken   untaken
	unstored  unstored
	passing   slots // blobs that are passed through
	sending   slots // blobs that are sent from the disk

	completions *completions
	keepers     keepers
}

// New returns a mirror that serves. It dials nothing before the first request, but for what the
// configuration keeps.
func New(cfg Config) (*Mirror, error) {
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	if cfg.Upstreams.Logger == nil {
		cfg.Upstreams.Logger = cfg.Logger
	}
	m := &Mirror{store: cfg.Store, pool: upstream.NewPool(cfg.Upstreams), logger: cfg.Logger,
		passing: make(slots, maxPassed), sending: make(slots, maxSending)}
	panicked := func(recovered any) { m.logger.Error("task panicked", "err", recovered, "stack", string(debug.Stack())) }
	m.asking, m.filling, m.sharing = newTasks(panicked), newTasks(panicked), newTasks(panicked)
	if cfg.Shared != nil {
		m.fleet = &fleet{m: m, bucket: cfg.Shared}
		m.fleet.publish = newPublisher(m.fleet)
	}
	m.completions = newCompletions(m)
	m.metrics = newMetrics(m)
	if err := m.Use(cfg.Config); err != nil {
		return nil, err
	}
	if m.fleet != nil {
		m.fleet.publish.start()
	}
	m.asking.start(m.completions.runBehind)
	m.asking.start(m.repairLoop)
	return m, nil
}

// Use makes cfg the configuration from the next request on. Upstreams that it leaves as they were
// keep their breakers and tokens; what is being sent goes on as it began, but who still waits for an answer
// gets only what both the configuration of before and cfg let them have.
func (m *Mirror) Use(cfg *config.Config) error {
	var ups []upstream.Config
	for registry, r := range cfg.Registries {
		for _, u := range r.Upstreams {
			ups = append(ups, upstream.Config{
				Registry:         registry,
				URL:              u.URL,
				RepositoryPrefix: u.RepositoryPrefix,
				Account:          account(u.Credentials),
				DigestsOnly:      bool(u.DigestsOnly),
				Proxy:            u.Proxy,
				CAFile:           u.CAFile,
				CertFile:         u.ClientCert.CertFile,
				KeyFile:          u.ClientCert.KeyFile,
				RedirectHosts:    u.RedirectHosts,
				TrustedRealms:    u.TrustedRealms,
			})
		}
	}
	guard, err := newGuard(cfg, m.guard.Load(), m.logger)
	if err != nil {
		return err
	}
	use, err := m.pool.Prepare(ups, upstream.AnyRegistry(cfg.AnyRegistry))
	if err != nil {
		return fmt.Errorf("upstreams: %w", err)
	}
	// Nobody is let in by one configuration and answered with another's account: from before that may be asked
	// with until what the old one has asked concerns no newcomer, all are judged by both.
	if before := m.guard.Load(); before != nil {
		before.next.Store(guard)
	}
	m.cfg.Store(cfg) // says what is public of what is got
	m.store.Use(storage.Policy{Kept: m.Kept, Out: m.pool.Out, Public: cfg.Shares})
	use()
	m.tags.part()
	m.manifests.part()
	m.sizes.part()
	m.lists.part()
	m.guard.Store(guard)
	m.keepers.use(m, cfg)
	return nil
}

func account(c config.Credentials) upstream.Account {
	a := upstream.Account{Username: c.Username, PasswordFile: c.PasswordFile, DockerConfig: c.DockerConfig, Helper: c.Helper}
	if c.ECR != nil {
		a.ECR = c.ECR.Region
	}
	return a
}

// Close lets fills that clients wait for finish until ctx ends, then cuts them, and waits for all that
// runs. Requests should have ended before.
func (m *Mirror) Close(ctx context.Context) {
	m.asking.cancel()
	m.sharing.cancel()
	m.fills.cutUnwanted()
	m.filling.stop(ctx)
	m.asking.stop(ctx)
	m.sharing.stop(ctx)
	if m.fleet != nil {
		m.fleet.publish.writeJournal() // what has been added since its own goroutine ended
	}
	m.pool.Close()
}

// ServeHTTP answers one request. Only here does an error become a response.
func (m *Mirror) ServeHTTP(rw http.ResponseWriter, r *http.Request) {
	started := time.Now()
	w := newResponse(rw, r)
	var t target
	var err error
	defer func() {
		recovered := recover()
		if recovered != nil && recovered != any(http.ErrAbortHandler) {
			err = fmt.Errorf("panic: %v\n%s", recovered, debug.Stack())
			if w.status == 0 {
				w.setCache("breakwater")
				oci.WriteError(w, err)
				recovered = nil
			} else {
				recovered = http.ErrAbortHandler // too late for words; the client must not take it for whole
			}
		}
		m.logRequest(r, t, w, started, err)
		if recovered != nil {
			panic(recovered)
		}
	}()
	w.Header()["Docker-Distribution-Api-Version"] = []string{"registry/2.0"}
	err = m.serve(w, r, &t)
	switch {
	case err == nil || w.status != 0:
	case errors.Is(err, errClientGone):
		w.WriteHeader(http.StatusServiceUnavailable) // half of it may be there still: not an empty 200
	default:
		if w.Header().Get("Cache-Status") == "" {
			w.setCache("breakwater")
		}
		oci.WriteError(w, err)
	}
}

// ClientCAs are the authorities whose client certificates the registry's listener should ask for; nil if it
// should not. They may change at any time.
func (m *Mirror) ClientCAs() *x509.CertPool { return m.guard.Load().gate.ClientCAs() }

// serve parses, guards and dispatches. It returns an error only if it has written nothing.
func (m *Mirror) serve(w *response, r *http.Request, t *target) (err error) {
	guard := m.guard.Load()
	if r.ContentLength != 0 {
		w.Header().Set("Connection", "close")     // its body is never read …
		_ = w.control.SetReadDeadline(time.Now()) // … nor waited for by net/http, once we have answered
	}
	if err := checkOrigin(r); err != nil {
		return err
	}
	if r.Method != http.MethodGet && r.Method != http.MethodHead {
		w.Header().Set("Connection", "close")
		w.Header().Set("Allow", "GET, HEAD")
		return oci.NewError(errcode.ErrorCodeUnsupported, "this is a pull-through mirror: push to the registry itself")
	}
	if err := checkHost(guard.cfg, r); err != nil {
		return err
	}
	who := guard.caller(r)
	*t, err = parse(guard.cfg, r)
	t.caller = who.name()
	if refusal := guard.refusal(r.Context(), who, *t, err); refusal != nil {
		m.metrics.refusals.WithLabelValues(who.reason(refusal)).Inc()
		return refusal
	}
	if err != nil {
		return err
	}
	t.onlyPublic = t.kind != kindBase && guard.onlyPublic(who, t.ref.Repository)
	if t.ns != "" {
		w.Header().Set("OCI-Namespace", t.ns)
	}
	w.refusal = func() (string, error) { return guard.laterRefusal(r, *t) }
	if err := m.answer(w, r, *t); err != nil {
		if reason, refusal := w.refusal(); refusal != nil { // of which err may be one, or tell what is there
			m.metrics.refusals.WithLabelValues(reason).Inc()
			return refusal
		}
		return err
	}
	return nil
}

// answer is for a request that was let in. It returns an error only if it has written nothing.
func (m *Mirror) answer(w *response, r *http.Request, t target) error {
	switch t.kind {
	case kindManifest:
		return m.serveManifest(w, r, t)
	case kindBlob:
		return m.serveBlob(w, r, t)
	case kindTags:
		return m.serveTags(w, r, t)
	case kindReferrers:
		return m.serveReferrers(w, r, t)
	}
	w.setCache("breakwater; hit")
	w.Header().Set("Content-Type", "application/json")
	_, err := w.Write([]byte("{}\n"))
	return err
}

// upstreams are those of a reference's registry, in the order in which they are asked: what is not a
// digest concerns only those who are trusted with tags. parse has seen to it that there is one, unless
// the configuration has just lost it.
func (m *Mirror) upstreams(ref oci.Reference) ([]*upstream.Client, error) {
	clients := slices.Clone(m.pool.Clients(ref.Registry))
	if len(clients) == 0 {
		return nil, fmt.Errorf("registry %s has no upstream", ref.Registry)
	}
	if ref.Digest == "" {
		clients = slices.DeleteFunc(clients, func(c *upstream.Client) bool { return !c.AnswersTags() })
	} else { // what is named by its digest is the same from all of them
		slices.SortStableFunc(clients, func(a, b *upstream.Client) int { return order(a.Lacked(ref)) - order(b.Lacked(ref)) })
	}
	if len(clients) == 0 {
		return nil, &upstream.Error{Reason: "it has only upstreams with tags: false"}
	}
	return clients, nil
}

// order puts those who lack something behind the others.
func order(lacks bool) int {
	if lacks {
		return 1
	}
	return 0
}

// askAll is a race of a registry's upstreams for what is had in one piece. Each has headerBudget.
func askAll[T any](m *Mirror, clients []*upstream.Client, ask func(context.Context, *upstream.Client) (T, error)) *race[T] {
	return &race[T]{tasks: m.asking, clients: clients, ask: func(ctx context.Context, i int) (T, error) {
		ctx, cancel := context.WithTimeout(ctx, headerBudget)
		defer cancel()
		return ask(ctx, clients[i])
	}}
}

// first is the answer of the first upstream of the reference's registry that has one.
func first[T any](ctx context.Context, m *Mirror, ref oci.Reference, ask func(context.Context, *upstream.Client) (T, error)) (T, error) {
	clients, err := m.upstreams(ref)
	if err != nil {
		var none T
		return none, err
	}
	answer, _, err := askAll(m, clients, ask).run(ctx)
	return answer, err
}

// confirmation records that this upstream let us have something, and on whose account.
func confirmation(c *upstream.Client) storage.Confirmation {
	return storage.Confirmation{At: time.Now(), Upstream: c.Upstream(), Credential: c.Credential()}
}

// shares reports whether what this upstream lets us have of a repository is for every other one too (DESIGN 13).
func (m *Mirror) shares(c *upstream.Client, repo oci.Repository) bool {
	return m.cfg.Load().Shares(repo, c.Credential())
}

// setContent sets the headers that identify what is sent.
func setContent(h http.Header, mediaType string, dgst digest.Digest) {
	h["Content-Type"] = []string{mediaType}
	h["Docker-Content-Digest"] = []string{dgst.String()}
	h["Etag"] = []string{`"` + dgst.String() + `"`}
}

// logRequest writes the access line.
func (m *Mirror) logRequest(r *http.Request, t target, w *response, started time.Time, err error) {
	duration := time.Since(started)
	m.metrics.request(r.Method, t.kind, w, duration)
	level := slog.LevelInfo
	if errors.Is(err, errClientGone) {
		level = slog.LevelDebug
	} else if w.status >= http.StatusInternalServerError || w.broken != nil && !hungUp(w.broken) {
		level = slog.LevelWarn
	}
	if !m.logger.Enabled(r.Context(), level) {
		return
	}
	attrs := []slog.Attr{
		slog.String("method", r.Method),
		slog.String("repository", t.ref.Repository.String()),
		slog.String("reference", t.ref.Identifier()),
		slog.String("kind", t.kind.String()),
		slog.Int("status", w.status),
		slog.Int64("size", w.sent),
		slog.Float64("duration", duration.Seconds()),
		slog.String("cache", w.cache),
		slog.String("client", r.RemoteAddr),
	}
	if t.ref.Name == "" {
		attrs[1], attrs[2] = slog.String("path", r.URL.Path), slog.String("host", r.Host)
	}
	if t.caller != "" {
		attrs = append(attrs, slog.String("caller", t.caller))
	}
	if err != nil {
		attrs = append(attrs, slog.String("err", err.Error()))
	}
	if w.broken != nil {
		attrs = append(attrs, slog.String("broken", w.broken.Error()))
	}
	m.logger.LogAttrs(r.Context(), level, "request", attrs...)
}
