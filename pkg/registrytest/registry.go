// Package registrytest is a registry for tests that does as it is told: it serves the pull side of
// the OCI distribution API from memory, keeps a log of every request, and misbehaves by rule. It
// runs on real sockets, or on a [Network] in memory on which testing/synctest can make time pass.
//
//	network := registrytest.NewNetwork()
//	reg := registrytest.New(registrytest.Config{})
//	image := registrytest.NewImage(registrytest.Layer(1, 1<<20))
//	reg.Push("org/app", "latest", image)
//	reg.Serve(t, network, "quay.test:443") // https; clients trust network.CA.Pool()
//
//	reg.Fault(registrytest.Match{Kind: registrytest.KindBlob}, registrytest.First(2, registrytest.Truncate(1000)))
//	reg.Fault(registrytest.Match{}, registrytest.Status(503)) // an outage …
//	reg.Heal()                                                // … and its end
//
// One Registry can be served at several addresses: they are then the hosts of one service, such as
// its token server and its CDN (see [Config]), and [Match] tells them apart.
//
// [Real] is distribution's registry in this process, [Proxy] a TCP proxy that breaks connections.
package registrytest

import (
	"bytes"
	"crypto/hmac"
	"crypto/sha256"
	"crypto/tls"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"net/url"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"breakwater/pkg/oci"

	"github.com/distribution/distribution/v3/registry/api/errcode"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// Config is what a Registry is like when it is well. The zero Config is an open registry that
// serves its blobs itself.
type Config struct {
	Auth Auth
	// CDN is where GET of a blob is redirected to: the URL, scheme and host only, of an address at
	// which this Registry is served too. "" for nowhere.
	CDN string
	// CDNLifetime is how long a redirect's signature holds; after it the CDN answers 403. 0 is 10 min.
	CDNLifetime time.Duration
	// ReferrersTag makes it a registry without the referrers API: that is 404, and the tag
	// sha256-<hex> is the index of referrers (distribution-spec, "Referrers Tag Schema").
	ReferrersTag bool
}

// Registry is a scripted registry. All its methods may be called while it serves.
type Registry struct {
	script

	mu           sync.Mutex // guards what is below
	config       Config
	repositories map[string]*repository
	tokens       map[string]grant
}

type repository struct {
	blobs     map[digest.Digest][]byte
	manifests map[digest.Digest]manifest
	tags      map[string]digest.Digest
}

type manifest struct {
	mediaType string
	raw       []byte
}

// New returns an empty registry.
func New(config Config) *Registry {
	return &Registry{config: config, repositories: map[string]*repository{}, tokens: map[string]grant{}}
}

// Configure replaces the configuration. Tokens given out before stay good: see [Registry.Revoke].
func (g *Registry) Configure(config Config) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.config = config
}

// Push stores an image with all that it reaches; without a tag if tag is "".
func (g *Registry) Push(repo, tag string, image Image) {
	for _, child := range image.Images {
		g.Push(repo, "", child)
	}
	for _, blob := range image.Blobs {
		g.PutBlob(repo, blob.Bytes)
	}
	g.PutManifest(repo, tag, image.MediaType, image.Raw)
}

// PutBlob stores a blob.
func (g *Registry) PutBlob(repo string, raw []byte) digest.Digest {
	g.mu.Lock()
	defer g.mu.Unlock()
	dgst := digest.FromBytes(raw)
	g.repository(repo).blobs[dgst] = raw
	return dgst
}

// PutManifest stores any bytes as a manifest; without a tag if tag is "".
func (g *Registry) PutManifest(repo, tag, mediaType string, raw []byte) digest.Digest {
	g.mu.Lock()
	defer g.mu.Unlock()
	dgst := digest.FromBytes(raw)
	r := g.repository(repo)
	r.manifests[dgst] = manifest{mediaType, raw}
	if tag != "" {
		r.tags[tag] = dgst
	}
	return dgst
}

// Delete forgets a tag, or the manifest and blob of that digest with its tags.
func (g *Registry) Delete(repo, reference string) {
	g.mu.Lock()
	defer g.mu.Unlock()
	r := g.repository(repo)
	dgst := digest.Digest(reference)
	delete(r.tags, reference)
	delete(r.manifests, dgst)
	delete(r.blobs, dgst)
	for tag, at := range r.tags {
		if at == dgst {
			delete(r.tags, tag)
		}
	}
}

func (g *Registry) repository(name string) *repository {
	r := g.repositories[name]
	if r == nil {
		r = &repository{map[digest.Digest][]byte{}, map[digest.Digest]manifest{}, map[string]digest.Digest{}}
		g.repositories[name] = r
	}
	return r
}

// Start serves the registry on loopback, over HTTP, until the test ends. Outside tests, use [Serve].
func (g *Registry) Start(t testing.TB) *Server {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s := Serve(l, g)
	t.Cleanup(func() { _ = s.Close() })
	return s
}

// Serve serves the registry at "host:port" of a network until the test ends: over HTTPS at port 443,
// else over HTTP.
func (g *Registry) Serve(t testing.TB, n *Network, address string) *Server {
	t.Helper()
	l, err := n.Listen(address)
	if err != nil {
		t.Fatal(err)
	}
	var certificates []tls.Certificate
	if host, found := strings.CutSuffix(address, ":443"); found {
		certificate, err := n.CA.Certificate(host, time.Time{})
		if err != nil {
			t.Fatal(err)
		}
		certificates = append(certificates, certificate)
	}
	s := Serve(l, g, certificates...)
	t.Cleanup(func() { _ = s.Close() })
	return s
}

// ServeHTTP answers one request, as the rules want it or as a registry does.
func (g *Registry) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	g.play(w, r, http.HandlerFunc(g.serve))
}

var contentPath = regexp.MustCompile(`^/v2/(.+)/(manifests|blobs|referrers|tags)/([^/]+)$`)

// serve answers without faults.
func (g *Registry) serve(w http.ResponseWriter, r *http.Request) {
	w.Header().Set("Docker-Distribution-Api-Version", "registry/2.0")
	kind := kindOf(r.URL.Path)
	if r.Method != http.MethodGet && r.Method != http.MethodHead {
		oci.WriteError(w, oci.NewError(errcode.ErrorCodeUnsupported, "pull only"))
		return
	}
	g.mu.Lock()
	config := g.config
	g.mu.Unlock()
	part := contentPath.FindStringSubmatch(r.URL.Path)
	switch {
	case kind == KindToken:
		g.serveToken(w, r, config.Auth)
		return
	case kind == KindCDN:
		g.serveCDN(w, r)
		return
	case part == nil && kind != KindPing:
		http.NotFound(w, r)
		return
	case part == nil:
		part = make([]string, 4)
	}
	if !g.authorize(w, r, config.Auth, part[1]) {
		return
	}
	var err error
	switch kind {
	case KindPing:
		writeJSON(w, r, "application/json", struct{}{})
	case KindManifest:
		err = g.serveManifest(w, r, part[1], part[3])
	case KindBlob:
		err = g.serveBlob(w, r, part[1], digest.Digest(part[3]))
	case KindTags:
		err = g.serveTags(w, r, part[1])
	case KindReferrers:
		err = g.serveReferrers(w, r, part[1], digest.Digest(part[3]))
	}
	if err != nil {
		oci.WriteError(w, err)
	}
}

func (g *Registry) serveManifest(w http.ResponseWriter, r *http.Request, repo, reference string) error {
	g.mu.Lock()
	at := g.repository(repo)
	dgst, tagged := at.tags[reference]
	if !tagged {
		dgst = digest.Digest(reference)
	}
	m, found := at.manifests[dgst]
	referrersTag := g.config.ReferrersTag
	g.mu.Unlock()
	if subject, isTag := strings.CutPrefix(reference, "sha256-"); !found && isTag && referrersTag {
		if index := g.referrers(repo, digest.Digest("sha256:"+subject), ""); len(index.Manifests) > 0 {
			m, found = manifest{index.MediaType, marshal(index)}, true
			dgst = digest.FromBytes(m.raw)
		}
	}
	if !found {
		return oci.NewError(errcode.ErrorCodeManifestUnknown, "no manifest %s in %s", reference, repo)
	}
	serveContent(w, r, m.mediaType, dgst, m.raw)
	return nil
}

func (g *Registry) serveBlob(w http.ResponseWriter, r *http.Request, repo string, dgst digest.Digest) error {
	g.mu.Lock()
	raw, found := g.repository(repo).blobs[dgst]
	config := g.config
	g.mu.Unlock()
	if !found {
		return oci.NewError(errcode.ErrorCodeBlobUnknown, "no blob %s in %s", dgst, repo)
	}
	if config.CDN != "" && r.Method == http.MethodGet {
		if config.CDNLifetime == 0 {
			config.CDNLifetime = 10 * time.Minute
		}
		expires := strconv.FormatInt(time.Now().Add(config.CDNLifetime).UnixNano(), 10)
		path := "/cdn/" + repo + "/" + dgst.String()
		query := url.Values{"expires": {expires}, "signature": {sign(path, expires)}}
		http.Redirect(w, r, config.CDN+path+"?"+query.Encode(), http.StatusTemporaryRedirect)
		return nil
	}
	serveContent(w, r, "application/octet-stream", dgst, raw)
	return nil
}

// serveCDN answers as an object store behind signed URLs: errors are XML and 403.
func (g *Registry) serveCDN(w http.ResponseWriter, r *http.Request) {
	refuse := func(status int, code string) {
		w.Header().Set("Content-Type", "application/xml")
		w.WriteHeader(status)
		_, _ = fmt.Fprintf(w, "<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n<Error><Code>%s</Code></Error>", code)
	}
	expires := r.URL.Query().Get("expires")
	at, err := strconv.ParseInt(expires, 10, 64)
	if err != nil || r.URL.Query().Get("signature") != sign(r.URL.Path, expires) {
		refuse(http.StatusForbidden, "SignatureDoesNotMatch")
		return
	}
	if !time.Now().Before(time.Unix(0, at)) {
		refuse(http.StatusForbidden, "AccessDenied")
		return
	}
	repo, name := cutLast(strings.TrimPrefix(r.URL.Path, "/cdn/"), "/")
	g.mu.Lock()
	raw, found := g.repository(repo).blobs[digest.Digest(name)]
	g.mu.Unlock()
	if !found {
		refuse(http.StatusNotFound, "NoSuchKey")
		return
	}
	w.Header().Set("Content-Type", "application/octet-stream")
	http.ServeContent(w, r, "", time.Time{}, bytes.NewReader(raw))
}

// sign makes the signature of a CDN's URL. That the key is known does no harm in a test.
func sign(path, expires string) string {
	mac := hmac.New(sha256.New, []byte("registrytest"))
	mac.Write([]byte(path + "\n" + expires))
	return Canary + hex.EncodeToString(mac.Sum(nil))
}

// cutLast is strings.Cut at the last sep; all is before it if there is none.
func cutLast(s, sep string) (before, after string) {
	i := strings.LastIndex(s, sep)
	if i < 0 {
		return s, ""
	}
	return s[:i], s[i+len(sep):]
}

// serveTags pages by n and last (distribution-spec, "Listing Tags").
func (g *Registry) serveTags(w http.ResponseWriter, r *http.Request, repo string) error {
	g.mu.Lock()
	tags := []string{}
	for tag := range g.repository(repo).tags {
		tags = append(tags, tag)
	}
	g.mu.Unlock()
	if len(tags) == 0 {
		return oci.NewError(errcode.ErrorCodeNameUnknown, "no repository %s", repo)
	}
	slices.Sort(tags)
	query := r.URL.Query()
	if last := query.Get("last"); last != "" {
		i, found := slices.BinarySearch(tags, last)
		if found {
			i++
		}
		tags = tags[i:]
	}
	if query.Has("n") {
		n, err := strconv.Atoi(query.Get("n"))
		if err != nil || n < 0 {
			return oci.NewError(errcode.ErrorCodePaginationNumberInvalid, "n is %q", query.Get("n"))
		}
		if n < len(tags) {
			tags = tags[:n]
			if n > 0 {
				next := url.Values{"n": {strconv.Itoa(n)}, "last": {tags[n-1]}}
				w.Header().Set("Link", fmt.Sprintf("<%s?%s>; rel=\"next\"", r.URL.Path, next.Encode()))
			}
		}
	}
	writeJSON(w, r, "application/json", map[string]any{"name": repo, "tags": tags})
	return nil
}

func (g *Registry) serveReferrers(w http.ResponseWriter, r *http.Request, repo string, subject digest.Digest) error {
	g.mu.Lock()
	referrersTag := g.config.ReferrersTag
	g.mu.Unlock()
	if referrersTag {
		return oci.NewError(errcode.ErrorCodeNameUnknown, "no referrers API")
	}
	if err := subject.Validate(); err != nil {
		return oci.NewError(errcode.ErrorCodeDigestInvalid, "%s", err)
	}
	artifactType := r.URL.Query().Get("artifactType")
	if artifactType != "" {
		w.Header().Set("OCI-Filters-Applied", "artifactType")
	}
	writeJSON(w, r, ispec.MediaTypeImageIndex, g.referrers(repo, subject, artifactType))
	return nil
}

// referrers is the index of the manifests whose subject that is.
func (g *Registry) referrers(repo string, subject digest.Digest, artifactType string) ispec.Index {
	g.mu.Lock()
	defer g.mu.Unlock()
	index := ispec.Index{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ispec.MediaTypeImageIndex, Manifests: []ispec.Descriptor{}}
	for dgst, m := range g.repository(repo).manifests {
		var body ispec.Manifest
		if json.Unmarshal(m.raw, &body) != nil || body.Subject == nil || body.Subject.Digest != subject {
			continue
		}
		if body.ArtifactType == "" {
			body.ArtifactType = body.Config.MediaType
		}
		if artifactType == "" || artifactType == body.ArtifactType {
			index.Manifests = append(index.Manifests, ispec.Descriptor{MediaType: m.mediaType, Digest: dgst,
				Size: int64(len(m.raw)), ArtifactType: body.ArtifactType, Annotations: body.Annotations})
		}
	}
	slices.SortFunc(index.Manifests, func(a, b ispec.Descriptor) int { return strings.Compare(string(a.Digest), string(b.Digest)) })
	return index
}

// serveContent answers with bytes that have a digest, also HEAD, Range and If-None-Match.
func serveContent(w http.ResponseWriter, r *http.Request, mediaType string, dgst digest.Digest, raw []byte) {
	h := w.Header()
	h.Set("Content-Type", mediaType)
	h.Set("Docker-Content-Digest", dgst.String())
	h.Set("Etag", `"`+dgst.String()+`"`)
	http.ServeContent(w, r, "", time.Time{}, bytes.NewReader(raw))
}

func writeJSON(w http.ResponseWriter, r *http.Request, mediaType string, v any) {
	w.Header().Set("Content-Type", mediaType)
	http.ServeContent(w, r, "", time.Time{}, bytes.NewReader(marshal(v)))
}
