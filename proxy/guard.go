package proxy

import (
	"context"
	"errors"
	"io/fs"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"slices"
	"sync/atomic"
	"time"

	"breakwater/pkg/config"
	"breakwater/pkg/oci"
	"breakwater/proxy/access"
	"breakwater/storage"

	"github.com/distribution/distribution/v3/registry/api/errcode"
	"github.com/opencontainers/go-digest"
)

// busyRetry is when those are told to come back whose password could not be looked at.
const busyRetry = 10 * time.Second

// guard says who may pull what by the registry port (DESIGN 13). It judges by the request and the
// configuration alone, before anything is looked up: what a caller may not have looks the same whether it is
// stored or not, exists upstream or not.
type guard struct {
	cfg  *config.Config
	gate *access.Gate          // tells who calls
	next atomic.Pointer[guard] // what has come after it; nil while it is the last
}

// newGuard reads the files that tell who calls. If they are the same as before's, what that one has learnt
// stays.
func newGuard(cfg *config.Config, before *guard, logger *slog.Logger) (*guard, error) {
	if before != nil && sameGate(cfg.Access, before.cfg.Access) {
		return &guard{cfg: cfg, gate: before.gate}, before.gate.Reload()
	}
	a := cfg.Access
	gate, err := access.New(access.Config{HTPasswd: a.HTPasswd, Token: access.Token(a.Token), ClientCAFile: a.ClientCAFile, Logger: logger})
	return &guard{cfg: cfg, gate: gate}, err
}

func sameGate(a, b config.Access) bool {
	return a.HTPasswd == b.HTPasswd && a.Token == b.Token && a.ClientCAFile == b.ClientCAFile
}

// CheckAccess reads the files by which a configuration tells who calls, and says what is wrong with them.
func CheckAccess(cfg *config.Config) error {
	_, err := newGuard(cfg, nil, slog.New(slog.DiscardHandler))
	return err
}

// caller is who sends a request.
type caller struct {
	access.Caller
	local bool  // from this host by loopback: may pull everything, and is not asked
	wrong error // what was wrong with what they have shown
}

// caller looks at who it is.
func (g *guard) caller(r *http.Request) caller {
	a := g.cfg.Access
	if a.Loopback != config.LoopbackAsked && fromLoopback(r) && (a.IsZero() || !forOthers(r)) {
		return caller{local: true}
	}
	who, err := g.gate.Caller(r)
	return caller{Caller: who, wrong: err}
}

// fromLoopback reports whether both ends of the connection are this host's own loopback.
func fromLoopback(r *http.Request) bool {
	local, _ := r.Context().Value(http.LocalAddrContextKey).(*net.TCPAddr)
	remote, err := netip.ParseAddrPort(r.RemoteAddr)
	return local != nil && local.IP.IsLoopback() && err == nil && remote.Addr().Unmap().IsLoopback()
}

// forOthers reports whether somebody says that they speak for others. Nobody gets more for it.
func forOthers(r *http.Request) bool {
	for _, name := range [...]string{"Forwarded", "X-Forwarded-For", "X-Real-Ip", "Via"} {
		if r.Header[name] != nil {
			return true
		}
	}
	return false
}

// refusal is why a caller may not have what a request asks for, nil if they may. unparsed is the error of a
// request that asks for nothing: it says what is configured, so that not everybody is told.
func (g *guard) refusal(ctx context.Context, who caller, t target, unparsed error) error {
	a := g.cfg.Access
	switch {
	case who.local:
		return nil
	case a.IsZero():
		return oci.NewError(errcode.ErrorCodeDenied, "this mirror serves its own host alone: its configuration has no `access:`")
	case errors.Is(who.wrong, access.ErrWrong):
		return g.ask(t, who.wrong)
	case errors.Is(who.wrong, access.ErrBusy):
		return &oci.Error{Status: http.StatusServiceUnavailable, Code: errcode.ErrorCodeUnavailable, Message: who.wrong.Error(), RetryAfter: busyRetry}
	case who.wrong != nil && ctx.Err() != nil:
		return errClientGone
	case who.wrong != nil:
		return who.wrong
	}
	if unparsed != nil || t.kind == kindBase {
		if who.Vouched() || a.Anonymous {
			return nil
		}
		return g.ask(t, nil)
	}
	allow, ruled := a.RuleFor(t.ref.Repository)
	switch {
	case slices.Contains(allow, config.AllowAnybody):
		return nil
	case !ruled && a.Anonymous && !g.cfg.IsPrivate(t.ref.Repository):
		return nil
	case !who.Vouched():
		return g.ask(t, nil)
	case !who.MayPull(func(name string) bool { return g.means(name, t.ref.Repository) }):
		return g.ask(t, errScope)
	case ruled && !who.among(allow):
		return t.denied(who.name())
	}
	return nil
}

// laterRefusal is why a request that this guard has let in is refused by one that has come since: what it has
// waited for may have been got with an account that only that one's configuration has.
func (g *guard) laterRefusal(r *http.Request, t target) (reason string, err error) {
	for g = g.next.Load(); g != nil; g = g.next.Load() {
		who := g.caller(r)
		if err := g.refusal(r.Context(), who, t, nil); err != nil {
			return who.reason(err), err
		}
	}
	return "", nil
}

// among reports whether a rule names the caller.
func (c caller) among(allow []string) bool {
	return slices.ContainsFunc(c.Names, func(name string) bool {
		return slices.Contains(allow, name) || slices.Contains(allow, config.AllowKnown)
	})
}

// name is what the caller is called in logs; "" if they are not known.
func (c caller) name() string {
	if !c.Known() {
		return ""
	}
	return c.Names[0]
}

// reason is why a caller is refused, in a word.
func (c caller) reason(refusal error) string {
	switch {
	case errors.Is(c.wrong, access.ErrWrong):
		return "wrong"
	case c.wrong != nil:
		return "busy"
	case oci.AsError(refusal).Status == http.StatusUnauthorized:
		return "unknown"
	}
	return "denied"
}

// errScope is a good token that is good for something else.
var errScope = errors.New("the token is not good for this repository")

// means reports whether a token calls a repository so: by what names it in a path below /v2/, of which clients
// make the scope that they ask for. Where a host or ns says what the path does not, the same scope would be good
// for two repositories, so that there it is good for the one of the path alone.
func (g *guard) means(name string, repo oci.Repository) bool {
	meant, err := new(target).repository(g.cfg, "", name)
	return err == nil && meant == repo
}

// ask asks the caller who they are, for wrong that they have shown, if there is a way to ask, and refuses them
// if not.
func (g *guard) ask(t target, wrong error) error {
	name := ""
	if t.ref.Name != "" {
		name = t.ref.Repository.String()
	}
	challenge := g.gate.Challenge(name, wrong)
	if challenge == "" {
		return t.denied("")
	}
	e := oci.NewError(errcode.ErrorCodeUnauthorized, "this mirror wants to know who you are")
	if e.Challenge = challenge; wrong != nil {
		e.Message = wrong.Error()
	}
	return e
}

// denied refuses what is asked for: a blob is not found, so that clients go on elsewhere. whom is the caller's
// name, "" if they have none.
func (t target) denied(whom string) error {
	if whom == "" {
		whom = "those who have not shown who they are"
	}
	switch {
	case t.ref.Name == "":
		return oci.NewError(errcode.ErrorCodeDenied, "this mirror is not for %s", whom)
	case t.kind == kindBlob:
		return oci.NewError(errcode.ErrorCodeBlobUnknown, "%s is not for %s, by this mirror's `access:`", t.ref, whom)
	}
	return oci.NewError(errcode.ErrorCodeDenied, "%s is not for %s, by this mirror's `access:`", t.ref, whom)
}

// onlyPublic reports whether nothing may be served of a repository but what was got without a credential: what
// the store holds of it may be from a time when the configuration had one.
func (g *guard) onlyPublic(who caller, repo oci.Repository) bool {
	_, ruled := g.cfg.Access.RuleFor(repo)
	return !who.local && !ruled && !who.Vouched() && !g.cfg.IsPublic(repo)
}

// withheld reports whether content that is stored and that its repository reaches is not for this request: it
// has to be confirmed first, as if another repository had it.
func (m *Mirror) withheld(t target, dgst digest.Digest) bool {
	if !t.onlyPublic {
		return false
	}
	reach, err := m.store.Confirmed(t.ref.Repository, dgst)
	return err != nil || !reach.Public
}

// storedAnswer is the stored list, unless it is not for this request.
func (m *Mirror) storedAnswer(t target, path string) (storage.Answer, error) {
	stored, err := m.store.Answer(t.ref.Repository, path)
	if err == nil && t.onlyPublic && stored.Credential != "" {
		return storage.Answer{}, fs.ErrNotExist
	}
	return stored, err
}
