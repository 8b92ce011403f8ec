// Package access hides how those who call show who they are: passwords, bearer tokens and client
// certificates, the files that say which of them are good, and what keeps guessing slow and cheap. It
// promises that a Caller who has a name, or a scope, has shown it; that files are read again when they
// change, and that one which cannot be read changes nothing; and that it never tells a secret.
// What a caller may do is for others to say.
package access

import (
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"net/netip"
)

// Config is what a Gate is made of. Without any of the three ways nobody is known.
type Config struct {
	HTPasswd     string // file of names and bcrypt hashes; "" takes no passwords
	Token        Token  // the zero value takes no tokens
	ClientCAFile string // PEM file of authorities; "" takes no certificates
	Logger       *slog.Logger
}

// What is wrong with what a caller has shown. Neither tells what it was.
var (
	// ErrWrong is a password or a token that is none of ours, or is no longer good.
	ErrWrong = errors.New("wrong name, password or token")
	// ErrBusy is too much guessing, from that address or in all.
	ErrBusy = errors.New("too many passwords to look at; try again later")
)

// Gate tells who calls. It needs no closing.
type Gate struct {
	passwords   *passwords   // nil if none are taken
	tokens      *tokens      // nil if none are taken
	authorities *authorities // nil if no certificates are taken
}

// New reads the files, and says with file and line what is wrong with them.
func New(cfg Config) (*Gate, error) {
	g := new(Gate)
	var errs []error
	var err error
	if cfg.HTPasswd != "" {
		if g.passwords, err = newPasswords(cfg.HTPasswd, cfg.Logger); err != nil {
			errs = append(errs, fmt.Errorf("access.htpasswd: %w", err))
		}
	}
	if cfg.Token != (Token{}) {
		if g.tokens, err = newTokens(cfg.Token, cfg.Logger); err != nil {
			errs = append(errs, fmt.Errorf("access.token.keys_file: %w", err))
		}
	}
	if cfg.ClientCAFile != "" {
		if g.authorities, err = newAuthorities(cfg.ClientCAFile, cfg.Logger); err != nil {
			errs = append(errs, fmt.Errorf("access.client_ca_file: %w", err))
		}
	}
	if len(errs) > 0 {
		return nil, errors.Join(errs...)
	}
	return g, nil
}

// Reload reads the files now. What cannot be read is as it was, and the error says why.
func (g *Gate) Reload() error {
	var errs []error
	if g.passwords != nil {
		errs = append(errs, g.passwords.file.reload())
	}
	if g.tokens != nil {
		errs = append(errs, g.tokens.file.reload())
	}
	if g.authorities != nil {
		errs = append(errs, g.authorities.file.reload())
	}
	return errors.Join(errs...)
}

// Caller is who sends a request, as far as it was shown. The zero Caller has shown nothing.
type Caller struct {
	Names []string // those that rules may know the caller by, the first for logs
	token *claims  // nil if no token was shown
	sure  bool     // a password or a certificate was shown, which are good for everything
}

// Known reports whether the caller has shown who they are.
func (c Caller) Known() bool { return len(c.Names) > 0 }

// Vouched reports whether anything good was shown: a name, or the token of a bearer without one.
func (c Caller) Vouched() bool { return c.Known() || c.token != nil }

// MayPull reports whether what was shown is good for a repository, which is what those names mean that means
// says so of: a token says by names what it is good for (distribution-spec, "Token Scope Documentation").
func (c Caller) MayPull(means func(name string) bool) bool {
	return c.sure || c.token != nil && c.token.mayPull(means)
}

// Caller is who sends the request. Its error is ErrWrong, ErrBusy, or that of a request that has ended.
// That a caller shows an empty name and password, as some clients do who have none, is as if they showed
// nothing.
func (g *Gate) Caller(r *http.Request) (Caller, error) {
	var c Caller
	if g.authorities != nil {
		c.Names = g.authorities.names(r.TLS)
		c.sure = len(c.Names) > 0
	}
	shown := r.Header.Values("Authorization")
	if len(shown) == 0 || g.passwords == nil && g.tokens == nil {
		return c, nil
	}
	name, password, basic := r.BasicAuth()
	switch {
	case len(shown) > 1:
		return Caller{}, ErrWrong
	case basic && name == "" && password == "":
		return c, nil
	case g.passwords != nil && basic:
		if err := g.passwords.check(r.Context(), client(r), name, password); err != nil {
			return Caller{}, err
		}
		c.Names, c.sure = append(c.Names, name), true
	case g.tokens != nil && !basic:
		claims, err := g.tokens.check(shown[0])
		if err != nil {
			return Caller{}, err
		}
		if c.token = claims; claims.Subject != "" {
			c.Names = append(c.Names, claims.Subject)
		}
	default:
		return Caller{}, ErrWrong
	}
	return c, nil
}

// Challenge is the WWW-Authenticate that asks a caller who they are, for pulling the repository that goes
// by that name, none if it is "". wrong is what was wrong with what they have shown, nil if they have shown
// nothing. It is "" if there is no way to ask.
func (g *Gate) Challenge(name string, wrong error) string {
	switch {
	case g.tokens != nil:
		return g.tokens.challenge(name, wrong)
	case g.passwords != nil:
		return `Basic realm="Breakwater"`
	}
	return ""
}

// ClientCAs are the authorities whose certificates a listener should ask for; nil if it should not.
func (g *Gate) ClientCAs() *x509.CertPool {
	if g.authorities == nil {
		return nil
	}
	return g.authorities.file.get().pool
}

// client is the address that the request came from; the zero one if there is none.
func client(r *http.Request) netip.Addr {
	from, err := netip.ParseAddrPort(r.RemoteAddr)
	if err != nil {
		return netip.Addr{}
	}
	return from.Addr().Unmap()
}
