package config

import (
	"fmt"
	"maps"
	"net/netip"
	"net/url"
	"os"
	"path"
	"slices"
	"strings"

	"breakwater/pkg/oci"
)

// Access says who may pull by the registry port from beyond loopback. The zero value is nobody.
type Access struct {
	Anonymous    bool   `yaml:"anonymous,omitempty"`      // everybody, and nobody is asked
	HTPasswd     string `yaml:"htpasswd,omitempty"`       // file: names, and bcrypt hashes of their passwords
	Token        Token  `yaml:"token,omitempty"`          // the zero value takes no tokens
	ClientCAFile string `yaml:"client_ca_file,omitempty"` // authorities of the certificates that callers show
	PlainHTTP    bool   `yaml:"plain_http,omitempty"`     // something in front does TLS
	Loopback     string `yaml:"loopback,omitempty"`       // LoopbackOpen or LoopbackAsked; Load fills it in
	Rules        []Rule `yaml:"rules,omitempty"`          // ask RuleFor
}

// What Loopback may be: how those are treated who connect from the mirror's own host.
const (
	LoopbackOpen  = "open"  // they may pull everything, and are never asked who they are
	LoopbackAsked = "asked" // as everybody else: something may forward the network's connections
)

// Token is a token server as the distribution specification has it ("Token Authentication").
type Token struct {
	Realm    string `yaml:"realm,omitempty"`     // URL of the server, which clients are sent to
	Service  string `yaml:"service,omitempty"`   // what the mirror is called there: the tokens' audience
	Issuer   string `yaml:"issuer,omitempty"`    // who signs them
	KeysFile string `yaml:"keys_file,omitempty"` // the issuer's public keys: a JWKS, or PEM
}

// Rule says who may pull some repositories.
type Rule struct {
	Repositories []string `yaml:"repositories"` // patterns, as in Public
	Allow        []string `yaml:"allow"`        // names, AllowKnown or AllowAnybody
}

// Words that stand for many in a rule.
const (
	AllowKnown   = "*"         // all who have shown who they are
	AllowAnybody = "anonymous" // and all others too
)

// IsZero reports whether nothing is said of access, so that it is not written out.
func (a Access) IsZero() bool {
	return !a.Anonymous && !a.Asks() && !a.PlainHTTP && a.ClientCAFile == "" && a.Loopback == "" && len(a.Rules) == 0
}

// Asks reports whether callers can be asked who they are, with a challenge.
func (a Access) Asks() bool { return a.HTPasswd != "" || a.Token != (Token{}) }

// RuleFor is whom the first rule allows that names the repository; ok is false if there is none.
func (a Access) RuleFor(repo oci.Repository) (allow []string, ok bool) {
	for _, rule := range a.Rules {
		if matches(rule.Repositories, repo) {
			return rule.Allow, true
		}
	}
	return nil, false
}

// IsPrivate reports whether a repository is fetched with a credential, at whatever upstream of its
// registry, and is not public all the same.
func (c *Config) IsPrivate(repo oci.Repository) bool {
	return c.Registries[repo.Registry].hasAccount() && !c.IsPublic(repo)
}

// Shares reports whether what was got in a repository with a credential, "" for none, may be read through every
// other one: if it took none, or Public lists the repository, and no rule keeps that from anybody.
func (c *Config) Shares(repo oci.Repository, credential string) bool {
	if allow, ruled := c.Access.RuleFor(repo); ruled && !slices.Contains(allow, AllowAnybody) {
		return false
	}
	return credential == "" || c.IsPublic(repo)
}

// IsPublic reports whether a pattern of Public says that everybody may have this repository, whatever
// credential it was fetched with. In a pattern `*` stands for any characters but a slash; a pattern
// that ends in `*` also takes in all that lies below what it matches: quay.io/org/* holds
// quay.io/org/app and quay.io/org/app/cache, but not quay.io/org.
func (c *Config) IsPublic(repo oci.Repository) bool { return matches(c.Public, repo) }

func matches(patterns []string, repo oci.Repository) bool {
	for _, pattern := range patterns {
		for name := repo.String(); name != ""; name = name[:max(0, strings.LastIndexByte(name, '/'))] {
			if ok, err := path.Match(pattern, name); ok && err == nil {
				return true
			}
			if !strings.HasSuffix(pattern, "*") {
				break
			}
		}
	}
	return false
}

// hasAccount reports whether an upstream is told who we are.
func (r Registry) hasAccount() bool {
	return slices.ContainsFunc(r.Upstreams, func(up Upstream) bool { return up.Credentials != (Credentials{}) || up.ClientCert != (TLS{}) })
}

// settleAccess completes what was left out of a policy that there is.
func (c *Config) settleAccess() {
	if c.Access.IsZero() || c.Access.Loopback != "" {
		return
	}
	c.Access.Loopback = LoopbackOpen
	if c.Access.PlainHTTP { // what is in front may be on this host
		c.Access.Loopback = LoopbackAsked
	}
}

// BeyondLoopback reports whether the registry API is to be reached from other hosts.
func (c *Config) BeyondLoopback() bool {
	host, ok := newProblems().address("listen", c.Listen)
	addr, err := netip.ParseAddr(host)
	return ok && host != "localhost" && (err != nil || !addr.Unmap().IsLoopback())
}

// validateAccess refuses a listener that no policy guards, a policy that guards nothing, and what would
// open to the network what took a credential.
func (c *Config) validateAccess(p *problems) {
	a, beyond := c.Access, c.BeyondLoopback()
	ways := a.Anonymous || a.Asks() || a.ClientCAFile != ""
	switch {
	case beyond && !ways:
		p.add("listen", "%s is beyond loopback, where `access:` must say who may pull; write `access: {anonymous: true}` for everybody, or htpasswd, token or client_ca_file there; or 127.0.0.1 here, and run a mirror on each host", c.Listen)
	case !a.IsZero() && !ways:
		p.add("access", "lets nobody in; write htpasswd, token, client_ca_file or anonymous: true")
	case !a.IsZero() && !beyond && a.Loopback == LoopbackOpen:
		p.add("access", "guards nothing, since listen is on loopback, where pulls are open; write loopback: asked if something forwards the network's connections there, or take access away")
	}
	if a.IsZero() {
		return
	}
	p.oneOf("access.loopback", a.Loopback, LoopbackOpen, LoopbackAsked)
	if a.Anonymous && a.Asks() {
		p.add("access.anonymous", "lets everybody in without asking, so that clients would never show a password or token; take it away, and open single repositories by a rule with allow: [%s]", AllowAnybody)
	}
	c.validateAsking(p, beyond)
	c.validateClientCA(p)
	c.validateRules(p)
	c.validateOpen(p, beyond)
}

// validateAsking checks passwords and tokens, and that they are not sent in the clear.
func (c *Config) validateAsking(p *problems, beyond bool) {
	a := c.Access
	at := "access.htpasswd"
	if a.HTPasswd != "" {
		p.secretFile(at, a.HTPasswd)
	}
	if a.Token != (Token{}) {
		if a.HTPasswd != "" {
			p.add(at, "and token too: clients would not know which to show; keep one of the two")
		}
		at = "access.token"
		a.Token.validate(p, a.PlainHTTP)
	}
	switch {
	case a.Asks() && beyond && c.TLS.CertFile == "" && !a.PlainHTTP:
		p.add(at, "would be shown in the clear; give tls a certificate, or write plain_http: true if something in front of the mirror does TLS")
	case a.PlainHTTP && c.TLS.CertFile != "":
		p.add("access.plain_http", "true, but tls has a certificate; keep one of the two")
	}
}

func (t Token) validate(p *problems, plain bool) {
	const at = "access.token."
	u, err := url.Parse(t.Realm)
	switch {
	case t.Realm == "":
		p.add(at+"realm", "missing; write the URL at which the token server gives tokens, such as https://auth.internal/token")
	case err != nil || u.Host == "" || u.Scheme != "https" && (u.Scheme != "http" || !plain):
		p.add(at+"realm", "is not a URL that clients could send passwords to; write https:// and a host, such as https://auth.internal/token")
	case u.User != nil || u.Fragment != "" || !quotable(t.Realm):
		p.add(at+"realm", "has something in it that no challenge can say; write https:// and a host, such as https://auth.internal/token")
	}
	if t.Service == "" || !quotable(t.Service) {
		p.add(at+"service", "missing or not plain; write what the token server calls this mirror, such as mirror.internal: the audience of its tokens")
	}
	if t.Issuer == "" {
		p.add(at+"issuer", "missing; write the iss of the server's tokens")
	}
	if t.KeysFile == "" {
		p.add(at+"keys_file", "missing; write the issuer's public keys to a file, as a JWKS or as PEM certificates, and name it here")
	} else if _, err := os.Stat(t.KeysFile); err != nil {
		p.add(at+"keys_file", "%v", err)
	}
}

// quotable reports whether text can stand in a challenge's quotes as it is.
func quotable(text string) bool {
	return !strings.ContainsFunc(text, func(r rune) bool { return r <= ' ' || r > '~' || r == '"' || r == '\\' })
}

func (c *Config) validateClientCA(p *problems) {
	const at = "access.client_ca_file"
	switch file := c.Access.ClientCAFile; {
	case file == "":
		return
	case c.TLS.CertFile == "":
		p.add(at, "callers show certificates by TLS alone; give tls a certificate")
	}
	if _, err := os.Stat(c.Access.ClientCAFile); err != nil {
		p.add(at, "%v", err)
	}
}

// validateRules refuses rules that name no repository that there could be, or nobody.
func (c *Config) validateRules(p *problems) {
	known := c.Access.Asks() || c.Access.ClientCAFile != ""
	for i, rule := range c.Access.Rules {
		at := fmt.Sprintf("access.rules[%d]", i)
		c.patterns(p, at+".repositories", rule.Repositories)
		if len(rule.Repositories) == 0 {
			p.add(at+".repositories", "empty; write patterns, such as quay.io/org/*")
		}
		if len(rule.Allow) == 0 {
			p.add(at+".allow", `empty; write names, "*" for all who have shown who they are, or anonymous for everybody`)
		}
		p.unique(at+".allow", rule.Allow)
		for j, name := range rule.Allow {
			switch at := fmt.Sprintf("%s.allow[%d]", at, j); {
			case name == "":
				p.add(at, "empty; write a name")
			case name == AllowAnybody && len(rule.Allow) > 1:
				p.add(at, "lets everybody in, also those that are named beside it; keep it alone, or take it away")
			case name != AllowAnybody && !known:
				p.add(at, "%q cannot show who they are; write htpasswd, token or client_ca_file into access, or allow: [%s] for everybody", name, AllowAnybody)
			}
		}
	}
}

// validateOpen refuses accounts at a mirror that asks nobody who they are, unless it is said who may have
// what they fetch: as it stands nobody could, and that was hardly meant.
func (c *Config) validateOpen(p *problems, beyond bool) {
	if !c.Access.Anonymous || c.Access.ClientCAFile != "" || !beyond && c.Access.Loopback == LoopbackOpen {
		return
	}
	for _, name := range slices.Sorted(maps.Keys(c.Registries)) {
		if c.Registries[name].hasAccount() && !c.namesSome(name) {
			p.add("registries."+name, "is asked with an account, so that what it has is private, and `access: {anonymous: true}` asks nobody who they are: say who may have it. "+
				"Write what everybody may have under public, such as %s/org/*; or give access an htpasswd, token or client_ca_file in the place of anonymous", name)
		}
	}
}

// namesSome reports whether a pattern of public or of a rule says something of the registry's repositories.
func (c *Config) namesSome(registry string) bool {
	patterns := slices.Clone(c.Public)
	for _, rule := range c.Access.Rules {
		patterns = append(patterns, rule.Repositories...)
	}
	return slices.ContainsFunc(patterns, func(pattern string) bool {
		first, _, _ := strings.Cut(pattern, "/")
		ok, err := path.Match(first, registry)
		return ok && err == nil
	})
}

// patterns refuses those that match no repository that there could be.
func (c *Config) patterns(p *problems, list string, patterns []string) {
	for i, pattern := range patterns {
		at := fmt.Sprintf("%s[%d]", list, i)
		registry, name, _ := strings.Cut(pattern, "/")
		repo, err := oci.ParseRepository(strings.ReplaceAll(registry, "*", "x"), strings.ReplaceAll(name, "*", "x"))
		switch {
		case err != nil:
			p.add(at, "%q is not a registry and a repository, with * for what varies; write it as docker.io/library/*", pattern)
		case repo.Name != name && !strings.Contains(name, "*"):
			p.add(at, "names no repository; write %s", repo)
		case !c.AnyRegistry && !strings.Contains(registry, "*"):
			p.configured(at, registry, c.Registries)
		}
	}
	p.unique(list, patterns)
}
