package proxy

import (
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"breakwater/pkg/registrytest"
)

// policies are how a mirror may be guarded, and who calls then.
var policies = []struct {
	name, access string
	callers      func(t testing.TB, i idents) []whom
}{
	{"htpasswd, and rules", `access: {htpasswd: $HTPASSWD, plain_http: true, loopback: open, rules: [{repositories: [quay.test/org/*], allow: [ci]}, {repositories: [quay.test/team/*], allow: ["*"]}, {repositories: [open.test/free/*], allow: [anonymous]}]}`, passworded},
	{"htpasswd, without rules", `access: {htpasswd: $HTPASSWD, plain_http: true, loopback: open}`, passworded},
	{"anonymous", "public: [quay.test/team/*]\naccess: {anonymous: true, rules: [{repositories: [quay.test/free/*], allow: [anonymous]}]}", func(testing.TB, idents) []whom {
		return []whom{{"nobody", far, nil}, {"wrong", far, []string{basic("ci", wrongPassword)}}}
	}},
	{"token, and a rule", `access: {token: {realm: "https://auth.test/token", service: mirror.test, issuer: auth.test, keys_file: $KEYS}, plain_http: true, loopback: open, rules: [{repositories: [quay.test/team/*], allow: [other]}]}`, func(t testing.TB, i idents) []whom {
		bearer := func(sub string, repositories ...string) []string {
			return []string{"Authorization: " + i.token(t, sub, repositories...)}
		}
		return []whom{
			{"nobody", far, nil},
			{"wrong", far, []string{"Authorization: Bearer " + wrongPassword}},
			{"other", far, bearer("other", "quay.test/other", "org/app", "free/app")},
			{"ci", far, bearer("ci", "quay.test/org/app", "quay.test/org/unseen", "quay.test/org/none", "quay.test/org/big", "quay.test/team/app", "open.test/org/app")},
		}
	}},
	{"certificates, and a rule", "tls: {cert_file: $CERT, key_file: $KEY}\naccess: {client_ca_file: $CLIENTS, rules: [{repositories: [quay.test/org/*], allow: [ci]}, {repositories: [open.test/free/*], allow: [anonymous]}]}", certified},
	{"certificates, or anonymous", "tls: {cert_file: $CERT, key_file: $KEY}\naccess: {client_ca_file: $CLIENTS, anonymous: true}", certified},
	{"no policy", "listen: 127.0.0.1:5000", func(testing.TB, idents) []whom {
		return []whom{{"nobody", far, nil}, {"wrong", far, []string{basic("ci", wrongPassword)}}}
	}},
}

func passworded(testing.TB, idents) []whom {
	return []whom{
		{"nobody", far, nil},
		{"podman", far, []string{basic("", "")}}, // what it says that has no password
		{"wrong", far, []string{basic("ci", wrongPassword)}},
		{"other", far, []string{basic("other", registrytest.Canary)}},
		{"ci", far, []string{basic("ci", registrytest.Canary)}},
	}
}

func certified(testing.TB, idents) []whom {
	return []whom{{"nobody", far, nil}, {"other", far, []string{"X-Certificate: other"}}, {"ci", far, []string{"X-Certificate: ci"}}}
}

// asked is a request, with APP for a repository of which all is stored.
type asked struct {
	name, path string
	header     []string
}

// ways are all ways to ask for what is private: of one repository, however it is called.
func ways() []asked {
	manifest, layer := "/manifests/"+storedImage.Digest().String(), "/blobs/"+storedImage.Blobs[1].Digest.String()
	return []asked{
		{"by tag", "/v2/quay.test/APP" + latest, nil},
		{"by digest", "/v2/quay.test/APP" + manifest, nil},
		{"config", "/v2/quay.test/APP/blobs/" + storedImage.Blobs[0].Digest.String(), nil},
		{"layer", "/v2/quay.test/APP" + layer, nil},
		{"layer, a range", "/v2/quay.test/APP" + layer, []string{"Range: bytes=0-9"}},
		{"layer, if changed", "/v2/quay.test/APP" + layer, []string{`If-None-Match: "` + storedImage.Blobs[1].Digest.String() + `"`}},
		{"by ns, tag", "/v2/APP" + latest + "?ns=quay.test", nil},
		{"by ns, layer", "/v2/APP" + layer + "?ns=quay.test", nil},
		{"by ns and prefix", "/v2/quay.test/APP" + latest + "?ns=quay.test", nil},
		{"by host, tag", "/v2/APP" + latest, []string{"Host: quay.mirror.test:5000"}},
		{"by host, layer", "/v2/APP" + layer, []string{"Host: quay.mirror.test:5000"}},
		{"tags", "/v2/quay.test/APP/tags/list", nil},
		{"referrers", "/v2/quay.test/APP/referrers/" + storedImage.Digest().String(), nil},
	}
}

// others are requests for what is not private, or for nothing.
var others = []asked{
	{"the API", "/v2/", nil},
	{"open, tag", "/v2/open.test/org/app" + latest, nil},
	{"open, layer", "/v2/open.test/org/app/blobs/" + unseenImage.Blobs[1].Digest.String(), nil},
	{"open, bare path", "/v2/org/app" + latest, nil},
	{"open, a private layer", "/v2/open.test/org/app/blobs/" + storedImage.Blobs[1].Digest.String(), nil},
	{"open, named by a rule", "/v2/open.test/free/app" + latest, nil},
	{"open, free, bare path", "/v2/free/app" + latest, nil},
	{"private, team", "/v2/quay.test/team/app" + latest, nil},
	{"private, free", "/v2/quay.test/free/app" + latest, nil},
	{"not configured", "/v2/evil.test/org/app" + latest, nil},
	{"no name", "/v2/Org/App" + latest, nil},
	{"nothing", "/", nil},
}

// TestAccess walks all ways to ask for something, for all callers and policies, and holds a table of the
// answers.
func TestAccess(t *testing.T) {
	i := newIdents(t)
	tables := make([]string, len(policies))
	t.Run("walk", func(t *testing.T) {
		for n, policy := range policies {
			t.Run(strings.ReplaceAll(policy.name, ",", ""), func(t *testing.T) { // commas would be in the names of files
				t.Parallel()
				yaml := guarded
				if strings.HasPrefix(policy.access, "listen:") {
					yaml = strings.Replace(yaml, "listen: 0.0.0.0:5000\n", "", 1)
				}
				bubble(t, i.in(yaml+policy.access), func(r *rig) {
					callers := append(policy.callers(t, i), whom{"loopback", near, nil})
					tables[n] = "# " + policy.name + "\n" + r.walkAccess(callers)
				})
			})
		}
	})
	holdGolden(t, "access.golden", strings.Join(tables, ""))
}

func holdGolden(t *testing.T, name, got string) {
	t.Helper()
	golden := filepath.Join("testdata", name)
	if *update {
		if err := os.WriteFile(golden, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(golden)
	if err != nil {
		t.Fatal(err)
	}
	if got != string(want) {
		t.Errorf("the answers are others than in %s; if that is meant, run with -update and read the difference:\n%s", golden, got)
	}
}

// walkAccess asks for everything: while upstream is well, while a blob is on its way, and while upstream is
// out.
func (r *rig) walkAccess(callers []whom) string {
	r.beyond()
	open := registrytest.New(registrytest.Config{})
	open.Serve(r, r.network, "open.test:80")
	r.quay.Configure(registrytest.Config{Auth: registrytest.Auth{Scheme: "Basic", Users: map[string]string{"ci": registrytest.Canary}}})
	r.quay.Serve(r, r.network, "quay.test:443")
	for _, repo := range []string{"org/app", "org/unseen", "team/app", "free/app"} {
		r.quay.Push(repo, "latest", storedImage)
		open.Push(repo, "latest", unseenImage)
	}
	big := "/v2/quay.test/org/big/blobs/" + r.quay.PutBlob("org/big", bigLayer.Bytes).String()
	r.pull("latest", storedImage)
	for _, path := range []string{app + "/tags/list", app + "/referrers/" + storedImage.Digest().String()} {
		r.get(path).want(r, 200)
	}
	time.Sleep(age)

	var table strings.Builder
	fmt.Fprintf(&table, "  %-32s", "")
	for _, who := range callers {
		fmt.Fprintf(&table, " %-18s", who.name)
	}
	table.WriteString("\n")
	line := func(name string, cell func(whom) string) {
		fmt.Fprintf(&table, "  %-32s", name)
		for _, who := range callers {
			fmt.Fprintf(&table, " %-18s", cell(who))
		}
		table.WriteString("\n")
	}
	private := func(phase string) {
		for _, q := range ways() {
			line(phase+q.name, func(who whom) string { return r.cell(who, q) })
		}
	}
	private("")
	for _, q := range others {
		line(q.name, func(who whom) string { return r.said(who, http.MethodGet, q).summaryOfAccess() })
	}

	r.quay.Fault(registrytest.Match{Method: http.MethodGet, Path: "/org/big/blobs/"}, registrytest.Drip(64<<10, time.Second))
	done := make(chan struct{})
	go func() {
		defer close(done)
		r.by(whom{"", near, nil}, http.MethodGet, big).is(r, bigLayer.Bytes)
	}()
	time.Sleep(time.Second)
	line("in flight", func(who whom) string {
		return r.said(who, http.MethodGet, asked{"in flight", big, nil}).summaryOfAccess()
	})
	line("in flight, a range", func(who whom) string { return r.by(who, http.MethodGet, big, "Range: bytes=0-9").summaryOfAccess() })
	<-done

	r.down()
	private("out: ")
	return table.String()
}

// refusedAll reports whether an answer is a refusal of the guard's, which says nothing of what there is.
func refusedAll(a answer) bool {
	return a.StatusCode == http.StatusUnauthorized || strings.Contains(string(a.body), "is not for ") || strings.Contains(string(a.body), "serves its own host alone")
}

// cell is what somebody gets of a repository of which all is stored. What they are refused, they are refused in
// the same words of one that is not stored, and of one that does not exist: without anybody being asked.
func (r *rig) cell(who whom, q asked) string {
	r.Helper()
	of := func(repo string) asked {
		q := q
		q.path = strings.ReplaceAll(q.path, "APP", repo)
		return q
	}
	before, dials := r.asked(), len(r.network.Dials("quay.test:443"))
	got := r.said(who, http.MethodGet, of("org/app"))
	if refusedAll(got) {
		for _, repo := range []string{"org/unseen", "org/none"} {
			other := r.said(who, http.MethodGet, of(repo))
			words := strings.ReplaceAll(string(other.body), repo, "org/app")
			challenge := strings.ReplaceAll(other.Header.Get("Www-Authenticate"), repo, "org/app")
			if other.StatusCode != got.StatusCode || words != string(got.body) || challenge != got.Header.Get("Www-Authenticate") {
				r.Errorf("%s, %s: %d %s of what is stored, %d %s of %s", q.name, who.name, got.StatusCode, got.body, other.StatusCode, other.body, repo)
			}
			if names, others := headerNames(got), headerNames(other); names != others {
				r.Errorf("%s, %s: headers %s of what is stored, %s of %s", q.name, who.name, names, others, repo)
			}
		}
		if n := r.asked() - before; n > 0 || len(r.network.Dials("quay.test:443")) > dials {
			r.Errorf("%s, %s: %d requests upstream for who may not have it", q.name, who.name, n)
		}
	}
	return got.summaryOfAccess()
}

func headerNames(a answer) string {
	var names []string
	for name, values := range a.Header {
		if name == "Content-Length" || name == "Date" || name == "Www-Authenticate" {
			values = nil
		}
		names = append(names, name+"="+strings.Join(values, ","))
	}
	slices.Sort(names)
	return strings.Join(names, " ")
}

// said asks by GET, and by HEAD, which must say the same.
func (r *rig) said(who whom, method string, q asked) answer {
	r.Helper()
	got := r.by(who, method, q.path, q.header...)
	head := r.by(who, http.MethodHead, q.path, q.header...)
	if head.StatusCode != got.StatusCode || len(head.body) > 0 || head.Header.Get("Www-Authenticate") != got.Header.Get("Www-Authenticate") {
		r.Errorf("%s, %s: %d by %s, %d by HEAD", q.name, who.name, got.StatusCode, method, head.StatusCode)
	}
	if who.host == near && (got.StatusCode == http.StatusUnauthorized || got.Header.Get("Www-Authenticate") != "") {
		r.Errorf("%s: a 401 on loopback", q.name)
	}
	if challenge := got.Header.Get("Www-Authenticate"); (challenge != "") != (got.StatusCode == http.StatusUnauthorized) {
		r.Errorf("%s, %s: %d with the challenge %q", q.name, who.name, got.StatusCode, challenge)
	}
	if refusedAll(got) {
		for _, name := range []string{"Docker-Content-Digest", "Etag", "Content-Range", "Age", "Warning", "Oci-Namespace", "Link", "Retry-After"} {
			if got.Header.Get(name) != "" {
				r.Errorf("%s, %s: refused, with %s: %s", q.name, who.name, name, got.Header.Get(name))
			}
		}
		if cache := got.Header.Get("Cache-Status"); cache != "breakwater" {
			r.Errorf("%s, %s: refused, with Cache-Status: %s", q.name, who.name, cache)
		}
	}
	return got
}

// summaryOfAccess is an answer in a few words.
func (a answer) summaryOfAccess() string {
	words := fmt.Sprint(a.StatusCode)
	if code := a.code(); code != "" {
		words += " " + code
	}
	if a.Header.Get("Warning") != "" {
		words += " stale"
	}
	return words
}
