package proxy

import (
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"slices"
	"strings"

	"breakwater/pkg/config"
	"breakwater/pkg/oci"

	"github.com/distribution/distribution/v3/registry/api/errcode"
)

// kind is what a request asks for.
type kind int

const (
	kindBase kind = iota
	kindManifest
	kindBlob
	kindTags
	kindReferrers
)

func (k kind) String() string { return [...]string{"base", "manifest", "blob", "tags", "referrers"}[k] }

// maxQuery is longer than any query that a client sends: ns, n, last, artifactType.
const maxQuery = 4 << 10

// target is a request, understood.
type target struct {
	kind  kind
	ref   oci.Reference // for tags without tag and digest
	query url.Values
	// bare is set for the path that Docker's registry-mirrors use, which names no registry. Docker
	// waits 50 s on a 5xx for a blob there before it goes to the Hub (CLIENTS 2b).
	bare bool
	ns   string // to be echoed as OCI-Namespace
	// What the guard has found.
	caller     string // "" if not known
	onlyPublic bool   // nothing that was got with a credential may be served
}

// parse is the only code that knows how URLs name things: four ways for a repository, in the order
// hosts entry, ns, first path component, default registry (DESIGN 4). Its error is an *oci.Error.
func parse(cfg *config.Config, r *http.Request) (target, error) {
	if len(r.URL.RawQuery) > maxQuery {
		return target{}, &oci.Error{Status: http.StatusBadRequest, Code: errcode.ErrorCodeUnsupported, Message: "the query is too long"}
	}
	path, ok := strings.CutPrefix(r.URL.Path, "/v2")
	if !ok || (path != "" && path[0] != '/') {
		return target{}, notHere("there is nothing at this path; the registry's API is under /v2/")
	}
	if path == "" || path == "/" {
		return target{kind: kindBase}, nil
	}
	t := target{query: r.URL.Query()}
	name, last, ok := t.split(path[1:])
	if !ok {
		return target{}, notHere("%.100q names no manifest, blob, tag list or referrers", r.URL.Path)
	}
	var err error
	if t.ref.Repository, err = t.repository(cfg, r.Host, name); err != nil {
		return target{}, err
	}
	switch t.kind {
	case kindManifest:
		t.ref, err = oci.ParseReference(t.ref.Repository, last)
	case kindBlob, kindReferrers:
		t.ref.Digest, err = oci.ParseDigest(last)
	}
	return t, err
}

// split cuts the path behind /v2/ into a name and what stands last, and settles the kind.
func (t *target) split(path string) (name, last string, ok bool) {
	if name, ok := strings.CutSuffix(path, "/tags/list"); ok {
		t.kind = kindTags
		return name, "", true
	}
	for end := len(path); ; { // the last verb counts: names may have these words in them
		i := strings.LastIndexByte(path[:end], '/')
		if i < 0 {
			return "", "", false
		}
		switch path[i+1 : end] {
		case "manifests":
			t.kind = kindManifest
		case "blobs":
			t.kind = kindBlob
		case "referrers":
			t.kind = kindReferrers
		default:
			end = i
			continue
		}
		if end == len(path) {
			return "", "", false
		}
		return path[:i], path[end+1:], true
	}
}

// repository settles which registry is meant and what its repository is called there.
func (t *target) repository(cfg *config.Config, host, name string) (oci.Repository, error) {
	registry, named := cfg.Hosts[hostname(host)]
	if !named && t.query.Has("ns") {
		registry, named = t.query.Get("ns"), true
		t.ns = registry
	}
	if named { // BuildKit says it twice, as ns and as prefix
		name = strings.TrimPrefix(name, registry+"/")
	} else if first, rest, _ := strings.Cut(name, "/"); cfg.NamesRegistry(first) {
		registry, name = first, rest
	} else {
		registry, t.bare = cfg.DefaultRegistry, true
	}
	repo, err := oci.ParseRepository(registry, name)
	if err != nil {
		e := oci.AsError(err)
		e.Status = http.StatusNotFound // it names nothing, and could not
		return repo, e
	}
	if _, ok := cfg.Registries[registry]; !ok && !cfg.AnyRegistry {
		return repo, &oci.Error{Status: http.StatusNotFound, Code: errcode.ErrorCodeNameUnknown,
			Message: "registry " + registry + " is not configured in this mirror"}
	}
	return repo, nil
}

func notHere(format string, args ...any) *oci.Error {
	e := oci.NewError(errcode.ErrorCodeNameInvalid, format, args...)
	e.Status = http.StatusNotFound
	return e
}

// checkOrigin refuses what could only come from a web page: it could otherwise read a private
// image through its visitor's own mirror.
func checkOrigin(r *http.Request) error {
	site := r.Header.Get("Sec-Fetch-Site")
	if r.Header.Get("Origin") != "" || (site != "" && site != "none" && site != "same-origin") {
		return oci.NewError(errcode.ErrorCodeDenied, "web pages may not use this registry")
	}
	return nil
}

// checkHost refuses names that are not ours: a page of evil.example whose name was rebound to this
// address sends Host: evil.example (DESIGN 13).
func checkHost(cfg *config.Config, r *http.Request) error {
	if r.URL.IsAbs() || r.URL.Host != "" || !strings.HasPrefix(r.RequestURI, "/") {
		return &oci.Error{Status: http.StatusBadRequest, Code: errcode.ErrorCodeUnsupported, Message: "this is a registry, not a proxy: the request must name a path"}
	}
	u, err := url.Parse("//" + r.Host)
	if err != nil || u.Host != r.Host || u.Hostname() == "" {
		return &oci.Error{Status: http.StatusBadRequest, Code: errcode.ErrorCodeUnsupported, Message: "the Host header is malformed"}
	}
	name := hostname(r.Host)
	own := func(s string) bool { return strings.EqualFold(s, name) }
	if cfg.Hosts[name] != "" || slices.ContainsFunc(cfg.ServerNames, own) {
		return nil // at any port: whatever stands in front of us may have another
	}
	// An address cannot be rebound, and the one that the client reached is ours; not so another port.
	local, known := r.Context().Value(http.LocalAddrContextKey).(net.Addr)
	addr, err := netip.ParseAddr(name)
	loopback := name == "localhost" || (err == nil && addr.IsLoopback())
	if !known || (loopback && u.Port() == "") || (loopback && u.Port() == port(local)) || r.Host == local.String() {
		return nil
	}
	return &oci.Error{Status: http.StatusMisdirectedRequest, Code: errcode.ErrorCodeDenied,
		Message: "this mirror does not answer for host " + r.Host + "; add its name to server_names"}
}

func port(a net.Addr) string {
	_, port, _ := net.SplitHostPort(a.String())
	return port
}

// hostname is the Host header without its port, in lower case.
func hostname(host string) string {
	if name, _, err := net.SplitHostPort(host); err == nil {
		host = name
	}
	return strings.ToLower(strings.Trim(host, "[]"))
}
