package proxy

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"breakwater/pkg/registrytest"

	"github.com/google/go-cmp/cmp"
)

// request is what a hostile client sends, as it goes over the wire, and what it must get for it.
type request struct {
	line   string   // without HTTP/1.1 at its end
	header []string // without one for Host, that is localhost:5000; "Host" alone sends none
	status int
	code   string // of the error JSON; "" where net/http answers by itself
}

// knows is the configuration of these tests: everything that a name may mean is in it.
const knows = oneUpstream + `
hosts: {quay.mirror.test: quay.test}
server_names: [mirror.test]
`

// refuse sends each request, and a GET as HEAD too, and holds the answer against what every answer to
// bad input has in common: it comes at once, nothing is asked of anybody, nothing is stored.
func refuse(t *testing.T, requests []request) {
	t.Helper()
	bubble(t, knows, func(r *rig) {
		for _, q := range requests {
			r.refuse(q)
			if target, get := strings.CutPrefix(q.line, "GET "); get {
				q.line, q.code = "HEAD "+target, ""
				r.refuse(q)
			}
			r.quiet(q.line)
		}
	})
}

func (r *rig) refuse(q request) answer {
	r.Helper()
	got := r.exchange(q.wire(), "")
	name := fmt.Sprintf("%.100q %.60q", q.line, q.header)
	if got.StatusCode != q.status || got.took > 0 {
		r.Errorf("%s: %d after %v, want %d at once: %.200s", name, got.StatusCode, got.took, q.status, got.body)
	}
	if q.code != "" && (got.code() != q.code || got.Header.Get("Content-Type") != "application/json") {
		r.Errorf("%s: %s %.200s, want JSON with %s", name, got.Header.Get("Content-Type"), got.body, q.code)
	}
	for header := range got.Header {
		if strings.HasPrefix(header, "Access-Control-") || header == "Location" || header == "Set-Cookie" || header == "Www-Authenticate" {
			r.Errorf("%s: the answer has %s", name, header)
		}
	}
	for _, leak := range []string{"goroutine", ".go:", r.dir, "hub.test:", "root:"} {
		if strings.Contains(string(got.body), leak) {
			r.Errorf("%s: the answer tells %q: %s", name, leak, got.body)
		}
	}
	return got
}

func (q request) wire() string {
	lines := []string{q.line + " HTTP/1.1", "Host: localhost:5000"}
	if slices.ContainsFunc(q.header, func(h string) bool { return strings.HasPrefix(h, "Host") }) {
		lines = lines[:1]
	}
	for _, h := range q.header {
		if h != "Host" {
			lines = append(lines, h)
		}
	}
	return strings.Join(lines, "\r\n") + "\r\n\r\n"
}

// exchange writes bytes to a connection of its own, then reads one answer. after is written once that has
// come, as is right after "100 Continue".
func (r *rig) exchange(send, after string) answer {
	r.Helper()
	conn, err := r.network.DialContext(r.Context(), "tcp", "localhost:5000")
	if err != nil {
		r.Fatal(err)
	}
	defer conn.Close()
	started := time.Now()
	_ = conn.SetDeadline(started.Add(time.Minute))
	sent := make(chan struct{})
	go func() { // the mirror need not read all of it
		defer close(sent)
		_, _ = io.WriteString(conn, send)
	}()
	defer func() { conn.Close(); <-sent }()
	method, _, _ := strings.Cut(send, " ")
	reader := bufio.NewReader(conn)
	resp, err := http.ReadResponse(reader, &http.Request{Method: method})
	if err != nil {
		r.Fatalf("%.100q: no answer: %v", send, err)
	}
	got := answer{Response: resp, took: time.Since(started)}
	got.body, got.err = io.ReadAll(resp.Body)
	resp.Body.Close()
	r.tells(send, got.Header, got.body)
	_, _ = io.WriteString(conn, after)
	_ = conn.SetReadDeadline(time.Now().Add(2 * time.Second)) // the lingering close of net/http takes 0.5 s
	_, err = reader.ReadByte()
	resp.Close = !errors.Is(err, os.ErrDeadlineExceeded)
	return got
}

// quiet fails the test if the network has seen anything but clients, or the store has got anything.
func (r *rig) quiet(after string) {
	r.Helper()
	synctest.Wait()
	ours := func(e registrytest.Event) bool {
		return strings.HasPrefix(e.Address, "localhost") || strings.HasPrefix(e.Address, "mirror.test")
	}
	dials := slices.DeleteFunc(r.network.Dials(""), ours)
	lookups := slices.DeleteFunc(r.network.Lookups(""), ours)
	if len(dials)+len(lookups) > 0 {
		r.Errorf("%.100q: dialled %v and looked up %v, want nothing", after, dials, lookups)
	}
	if held := r.files(); len(held) > 0 {
		r.Errorf("%.100q: the store holds %v, want nothing", after, held)
	}
}

// files lists the files of content, records, and what is half-written.
func (r *rig) files() []string {
	r.Helper()
	var files []string
	for _, folder := range []string{"blobs", "records", "tmp", "quarantine"} {
		err := filepath.WalkDir(filepath.Join(r.dir, "data", folder), func(path string, entry os.DirEntry, err error) error {
			if err == nil && !entry.IsDir() {
				files = append(files, strings.TrimPrefix(path, r.dir+"/data/"))
			}
			return err
		})
		if err != nil {
			r.Fatal(err)
		}
	}
	return files
}

const (
	nothing = "0000000000000000000000000000000000000000000000000000000000000000"
	latest  = "/manifests/latest"
)

func TestH01PathsThatClimb(t *testing.T) {
	var requests []request
	for _, path := range []string{
		"/v2/../../etc/passwd", "/v2/..", "/v2/.", "/../v2/org/app" + latest, "/v2/./org/app" + latest, "/v2/org/../app" + latest,
		"/v2/%2e%2e%2f%2e%2e%2fetc/passwd", "/v2/%2e%2e/%2e%2e/etc" + latest, "/v2/org%2f..%2fapp" + latest, "/v2/%252e%252e/app" + latest,
		"/v2/..%5c..%5capp" + latest, `/v2/..\..\app` + latest, "//v2//", "/v2//", "/v2//org/app" + latest, "/v2/org//app" + latest, "/v2/org/app//manifests/latest",
		"/v2/quay.test/../docker.io/app" + latest, "/v2/quay.test/%2e%2e/app" + latest, "/v2/../tags/list", "/v2/org/../tags/list",
		"/v2/_blobs/sha256" + latest, "/v2/org/_tags" + latest, "/v2/_public" + latest, // the store's own folders
		"/", "/v1/", "/v2x/", "/v2xorg/app" + latest, "/v2.org/app" + latest, "/V2/", "/v2/latest", "/v2/org/app", "/v2/org/app/manifests", "/index.html", "/.well-known/security.txt", "/v2/org/app/blobs/uploads/",
	} {
		requests = append(requests, request{line: "GET " + path, status: 404, code: "NAME_INVALID"})
	}
	i := slices.IndexFunc(requests, func(q request) bool { return strings.HasSuffix(q.line, "/blobs/uploads/") })
	requests[i].status, requests[i].code = 400, "DIGEST_INVALID"
	refuse(t, append(requests, request{line: "GET /v2/org/app/manifests/..%2f..%2fetc%2fpasswd", status: 404, code: "MANIFEST_UNKNOWN"}))
}

func TestH02NamesThatAreNone(t *testing.T) {
	var requests []request
	for _, name := range []string{"Org/app", "org/App", "org/a__%20_b", "org/a%20b", "org/a___b", "org/-a", "org/a-", "org/.a", "org/a..b",
		strings.Repeat("a", 300), "org/" + strings.Repeat("a/", 150) + "a", "org/app/", "org/app%2f", "org/a%00", "%00", "org/a%0a", "org/a%0d%0aX:y",
		"org/a%ff", "org/%c3%a9", "org/a%7f", "org/a@b", "org/a:b", "org/a+b", "quay.test/Org", "quay.test/", "quay.test/a%00b", "quay.test", "localhost:5000"} {
		requests = append(requests,
			request{line: "GET /v2/" + name + latest, status: 404, code: "NAME_INVALID"},
			request{line: "GET /v2/" + name + "/blobs/sha256:" + nothing, status: 404, code: "NAME_INVALID"},
			request{line: "GET /v2/" + name + "/tags/list", status: 404, code: "NAME_INVALID"},
			request{line: "GET /v2/" + name + "/referrers/sha256:" + nothing, status: 404, code: "NAME_INVALID"},
		)
		if strings.HasPrefix(name, "org/") {
			requests = append(requests, request{line: "GET /v2/" + name + latest + "?ns=quay.test", status: 404, code: "NAME_INVALID"})
		}
	}
	refuse(t, requests)
}

func TestH02BytesThatNoPathHas(t *testing.T) {
	refuse(t, []request{
		{line: "GET /v2/org/a%zz" + latest, status: 400},
		{line: "GET /v2/org/a%" + latest, status: 400},
		{line: "GET /v2/org/a\x00" + latest, status: 400},
		{line: "GET /v2/org/a\x7f" + latest, status: 400},
		{line: "GET /v2/org/a b" + latest, status: 400},
		{line: "GET v2/org/app" + latest, status: 400},
		{line: "GET *", status: 400, code: "UNSUPPORTED"},
	})
}

func TestH03TagsThatAreNone(t *testing.T) {
	var requests []request
	for _, tag := range []string{strings.Repeat("x", 129), ".hidden", "-rf", "latest%3fns=x", "latest%23", "la%00test", "a%20b", "a%0ab", "%c3%a9", "a%2fb", "a+b", "", "%ff"} {
		requests = append(requests,
			request{line: "GET /v2/org/app/manifests/" + tag, status: 404, code: "MANIFEST_UNKNOWN"},
			request{line: "GET /v2/quay.test/org/app/manifests/" + tag, status: 404, code: "MANIFEST_UNKNOWN"},
		)
	}
	refuse(t, requests)
}

func TestH04DigestsThatAreNone(t *testing.T) {
	var requests []request
	for _, dgst := range []string{
		"sha256:" + nothing[1:], "sha256:" + nothing + "0", "sha256:" + strings.Repeat("AB", 32), "sha256:../../x", "sha256:..%2f..%2fx", "sha256:",
		"SHA256:" + nothing, "md5:" + nothing[:32], "sha256+b64:" + nothing, "sha512:" + nothing, ":" + nothing, "sha256:" + nothing + "%00", "sha256::" + nothing,
		"sha256:" + nothing + "@x", "sha256:" + nothing + ":x",
	} {
		for _, kind := range []string{"manifests", "blobs", "referrers"} {
			requests = append(requests, request{line: "GET /v2/org/app/" + kind + "/" + dgst, status: 400, code: "DIGEST_INVALID"})
		}
	}
	refuse(t, append(requests,
		request{line: "GET /v2/org/app/blobs/latest", status: 400, code: "DIGEST_INVALID"},
		request{line: "GET /v2/org/app/blobs/", status: 400, code: "DIGEST_INVALID"},
		request{line: "GET /v2/org/app/referrers/latest", status: 400, code: "DIGEST_INVALID"}))
}

// go-digest panics on an algorithm that is not linked in; distribution's registry has been taken down so.
func TestH05AlgorithmsThatAreNotLinked(t *testing.T) {
	var requests []request
	for _, dgst := range []string{"sha384:" + nothing + nothing[:32], "blake3:" + nothing, "sha3-256:" + nothing, "sha1:" + nothing[:40], "x:00", "multihash+base58:QmRZxt2b1FVZPNqd8hsiykDL3TdBDeTSPX9Kv46HmX4Gx8"} {
		for _, kind := range []string{"manifests", "blobs", "referrers"} {
			requests = append(requests, request{line: "GET /v2/org/app/" + kind + "/" + dgst, status: 400, code: "DIGEST_INVALID"})
		}
	}
	refuse(t, requests)
}

func TestH07RegistriesThatAreNotConfigured(t *testing.T) {
	var requests []request
	for _, registry := range []string{"evil.example", "evil.example:443", "169.254.169.254", "127.0.0.1:22", "localhost", "localhost:22", "quay.test.evil.example",
		"quay.test:80", "hub.test", "metadata.google.internal", "%5b::1%5d:22"} {
		for _, what := range []string{latest, "/tags/list", "/blobs/sha256:" + nothing, "/referrers/sha256:" + nothing, "/manifests/sha256:" + nothing} {
			requests = append(requests, request{line: "GET /v2/" + registry + "/org/app" + what, status: 404, code: "NAME_UNKNOWN"})
		}
		requests = append(requests, request{line: "GET /v2/org/app" + latest + "?ns=" + registry, status: 404, code: "NAME_UNKNOWN"})
	}
	for _, ns := range []string{"", "quay.test%00", "quay.test/", "../quay.test", "http://169.254.169.254/", "user:pw@quay.test", "quay.test%0d%0aX-Evil:1", "a%20b", strings.Repeat("a", 300)} {
		requests = append(requests, request{line: "GET /v2/org/app" + latest + "?ns=" + ns, status: 404, code: "NAME_INVALID"})
	}
	refuse(t, requests)
}

func TestH08NotAProxy(t *testing.T) {
	refuse(t, []request{
		{line: "GET http://169.254.169.254/latest/", header: []string{"Host: 169.254.169.254"}, status: 400, code: "UNSUPPORTED"},
		{line: "GET http://169.254.169.254/latest/", status: 400, code: "UNSUPPORTED"},
		{line: "GET http://quay.test/v2/org/app" + latest, status: 400, code: "UNSUPPORTED"},
		{line: "GET http://localhost:5000/v2/org/app" + latest, header: []string{"Host: evil.example"}, status: 400, code: "UNSUPPORTED"},
		{line: "GET https://quay.test/v2/", status: 400, code: "UNSUPPORTED"},
		{line: "GET ftp://quay.test/v2/", status: 400, code: "UNSUPPORTED"},
		{line: "GET file:///etc/passwd", status: 400, code: "UNSUPPORTED"},
		{line: "GET mailto:x", status: 400, code: "UNSUPPORTED"},
		{line: "CONNECT quay.test:443", status: 405, code: "UNSUPPORTED"},
		{line: "CONNECT 169.254.169.254:80", status: 405, code: "UNSUPPORTED"},
	})
}

func TestH09HostsThatAreNotOurs(t *testing.T) {
	var requests []request
	for _, host := range []string{"evil.example", "evil.example:5000", "localhost.evil.example:5000", "169.254.169.254", "192.0.2.7:5000", "[2001:db8::1]:5000",
		"quay.test", "0.0.0.0:5000", "localhost:80", "localhost:5001", "127.0.0.1:5001", "[::1]:5001", "127.0.0.1.nip.io:5000", "2130706433:5000", "xlocalhost", "localhost.", "localhost:5000:5000"} {
		requests = append(requests,
			request{line: "GET /v2/", header: []string{"Host: " + host}, status: 421, code: "DENIED"},
			request{line: "GET /v2/org/app" + latest, header: []string{"Host: " + host}, status: 421, code: "DENIED"})
	}
	for _, host := range []string{"", "a b", "localhost:5000/x", "user@localhost", `a\b`, "[::1", "localhost:x"} {
		requests = append(requests, request{line: "GET /v2/", header: []string{"Host: " + host}, status: 400})
	}
	refuse(t, append(requests,
		request{line: "GET /v2/", header: []string{"Host"}, status: 400},
		request{line: "GET /v2/", header: []string{"Host: localhost:5000", "Host: evil.example"}, status: 400}))
}

func TestH09HostsThatAreOurs(t *testing.T) {
	bubble(t, knows, func(r *rig) {
		for _, host := range []string{"localhost", "localhost:5000", "LOCALHOST:5000", "127.0.0.1:5000", "127.0.0.1", "[::1]:5000", "mirror.test", "mirror.test:5000", "Mirror.Test", "mirror.test:443", "quay.mirror.test:5000"} {
			r.refuse(request{line: "GET /v2/", header: []string{"Host: " + host}, status: 200})
		}
		addresses, err := r.network.Lookup(r.Context(), "localhost")
		if err != nil {
			r.Fatal(err)
		}
		reached := addresses[0].String() // which need not be on loopback
		r.refuse(request{line: "GET /v2/", header: []string{"Host: " + reached + ":5000"}, status: 200})
		r.refuse(request{line: "GET /v2/", header: []string{"Host: " + reached + ":5001"}, status: 421, code: "DENIED"})
		for _, name := range []string{"quay.test", "docker.io", "evil.example"} { // what a host name means is settled, whatever else is said
			r.refuse(request{line: "GET /v2/" + name + "/.." + latest + "?ns=docker.io", header: []string{"Host: quay.mirror.test"}, status: 404, code: "NAME_INVALID"})
		}
		r.quiet("hosts that are ours")
	})
}

func TestH10WebPages(t *testing.T) {
	var requests []request
	for _, header := range []string{"Sec-Fetch-Site: cross-site", "Sec-Fetch-Site: same-site", "Sec-Fetch-Site: x", "Origin: null", "Origin: https://evil.example", "Origin: http://localhost:5000"} {
		for _, line := range []string{"GET /v2/", "GET /v2/org/app" + latest, "GET /v2/org/app/blobs/sha256:" + nothing, "OPTIONS /v2/", "OPTIONS /v2/org/app" + latest, "POST /v2/org/app/blobs/uploads/"} {
			requests = append(requests, request{line: line, header: []string{header, "Access-Control-Request-Method: GET", "Access-Control-Request-Private-Network: true"}, status: 403, code: "DENIED"})
		}
	}
	refuse(t, requests)
}

// A verb that is checked behind the router is one that some path forgets (CVE-2026-41888).
func TestH11VerbsThatChange(t *testing.T) {
	bubble(t, knows, func(r *rig) {
		image := registrytest.NewImage(registrytest.Layer(1, 1000))
		for _, method := range []string{"POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "PROPFIND"} {
			for _, path := range []string{"/", "/v2/", "/v2/org/app/blobs/uploads/", "/v2/org/app/blobs/uploads/?mount=sha256:" + nothing + "&from=org/other", "/v2/quay.test/org/app" + latest,
				"/v2/org/app/manifests/" + image.Digest().String(), "/v2/org/app/blobs/sha256:" + nothing, "/v2/evil.example/x" + latest, "/v2/../x", "/metrics"} {
				for _, length := range []string{"0", "1000", "1000000000"} { // of a body that never comes
					q := request{line: method + " " + path, header: []string{"Content-Length: " + length}, status: 405, code: "UNSUPPORTED"}
					if got := r.refuse(q); !got.Close || got.Header.Get("Allow") != "GET, HEAD" {
						r.Errorf("%s, %s bytes: closed %v, Allow %q", q.line, length, got.Close, got.Header.Get("Allow"))
					}
				}
			}
		}
		r.quiet("verbs that change")
	})
}

func TestH12MethodsThatAreNone(t *testing.T) {
	bubble(t, knows, func(r *rig) {
		for _, method := range []string{"FOO", "get", "Get", "GETX", strings.Repeat("M", 10<<10)} {
			if got := r.refuse(request{line: method + " /v2/org/app" + latest, status: 405, code: "UNSUPPORTED"}); !got.Close {
				r.Errorf("%.10s: the connection stays open", method)
			}
		}
		r.refuse(request{line: "G@T /v2/", status: 400})
		r.refuse(request{line: "G\x00T /v2/", status: 400})
		r.quiet("methods that are none")
		w := httptest.NewRecorder()
		r.mirror.Admin().ServeHTTP(w, httptest.NewRequest(http.MethodGet, "/metrics", nil))
		for line := range strings.Lines(w.Body.String()) {
			if strings.HasPrefix(line, "breakwater_requests_total") && !strings.Contains(line, `method="other"`) {
				t.Errorf("a method of the client's is a label: %s", line)
			}
		}
	})
}

func TestH14BodiesAreNotRead(t *testing.T) {
	bubble(t, knows, func(r *rig) {
		part := strings.Repeat("x", 1000)
		for _, header := range []string{"Content-Length: 1073741824", "Content-Length: 2000", "Content-Length: 1000\r\nExpect: 100-continue", "Transfer-Encoding: chunked"} {
			for _, line := range []string{"GET /v2/", "HEAD /v2/", "GET /v2/../x", "GET /v2/org/app/blobs/sha256:0"} {
				q := request{line: line, header: strings.Split(header, "\r\n")}
				for _, body := range []string{"", part, strings.Repeat(part, 500)} {
					if strings.HasPrefix(header, "Transfer") {
						body = fmt.Sprintf("%x\r\n%s\r\n", len(body), body)
					}
					got := r.exchange(q.wire()+body, "")
					if got.StatusCode == http.StatusContinue || got.took > 0 || !got.Close {
						t.Errorf("%s, %s, %d bytes of it: %d after %v, closed %v; want an answer at once and no more", line, header, len(body), got.StatusCode, got.took, got.Close)
					}
				}
			}
		}
		r.quiet("bodies")
	})
}

func TestH19Lists(t *testing.T) {
	refuse(t, []request{
		{line: "GET /v2/_catalog", status: 404, code: "NAME_INVALID"},
		{line: "GET /v2/_catalog?n=100000", status: 404, code: "NAME_INVALID"},
		{line: "GET /v2/quay.test/_catalog", status: 404, code: "NAME_INVALID"},
		{line: "GET /v2/_catalog/tags/list", status: 404, code: "NAME_INVALID"},
		{line: "GET /v2/org/app/tags/list?n=-1", status: 400, code: "PAGINATION_NUMBER_INVALID"},
		{line: "GET /v2/org/app/tags/list?n=1e9", status: 400, code: "PAGINATION_NUMBER_INVALID"},
		{line: "GET /v2/org/app/tags/list?n=NaN", status: 400, code: "PAGINATION_NUMBER_INVALID"},
		{line: "GET /v2/org/app/tags/list?n=99999999999999999999", status: 400, code: "PAGINATION_NUMBER_INVALID"},
		{line: "GET /v2/org/app/tags/list?n=0x10", status: 400, code: "PAGINATION_NUMBER_INVALID"},
		{line: "GET /v2/org/app/tags/list?last=" + strings.Repeat("x", 1<<20), status: 400, code: "UNSUPPORTED"},
		{line: "GET /v2/org/app/tags/list?last=" + strings.Repeat("x", 5000), status: 400, code: "UNSUPPORTED"},
		{line: "GET /v2/org/app/tags/list?" + strings.Repeat("a&", 5000), status: 400, code: "UNSUPPORTED"},
	})
	bubble(t, knows, func(r *rig) { // CVE-2023-2253: upstream allocates what it is asked for
		r.quay.Push("org/app", "latest", registrytest.NewImage())
		r.get("/v2/quay.test/org/app/tags/list?n=1000000000").want(r, 200)
		for _, asked := range r.quay.Requests(registrytest.Match{Kind: registrytest.KindTags}) {
			if n := asked.URL.Query().Get("n"); n != "1000" {
				t.Errorf("upstream was asked for n=%s, want 1000", n)
			}
		}
	})
}

func TestH20Accept(t *testing.T) {
	bubble(t, knows, func(r *rig) {
		image := registrytest.NewIndex(registrytest.NewImage(registrytest.Layer(1, 10)))
		r.quay.Push("org/app", "latest", image)
		for _, accept := range []string{"", strings.Repeat("application/x, ", 64<<10/15), "*/*;q=NaN", "*/*", "text/html", "application/*;q=1e999", ";;;,,,", "\xff", "*/*;q=0"} {
			for _, name := range []string{"latest", image.Digest().String()} {
				got := r.exchange(request{line: "GET /v2/quay.test/org/app/manifests/" + name, header: []string{"Accept: " + accept}}.wire(), "")
				if got.StatusCode != 200 || got.Header.Get("Content-Type") != image.MediaType || string(got.body) != string(image.Raw) {
					t.Errorf("Accept: %.20q: %d %s, want the manifest as it is stored", accept, got.StatusCode, got.Header.Get("Content-Type"))
				}
			}
		}
		for _, asked := range r.quay.Requests(registrytest.Match{Kind: registrytest.KindManifest}) {
			if len(asked.Header.Values("Accept")) != 4 {
				t.Errorf("upstream was asked with Accept: %.100q", asked.Header.Values("Accept"))
			}
		}
	})
}

// What only a proxy of ours could say, anybody can.
func TestH21ForwardedHeadersSayNothing(t *testing.T) {
	spoofed := func(host string) []string {
		return []string{"X-Forwarded-Host: " + host, "X-Forwarded-For: 127.0.0.1", "X-Forwarded-Proto: https", "X-Forwarded-Prefix: /evil", "X-Real-Ip: 127.0.0.1", "X-Host: " + host,
			"Forwarded: for=127.0.0.1;host=" + host + ";proto=https", "X-Original-Url: /v2/", "X-Rewrite-Url: /v2/", "X-Http-Method-Override: DELETE", "Via: 1.1 x"}
	}
	bubble(t, knows, func(r *rig) {
		r.refuse(request{line: "GET /v2/", header: append(spoofed("localhost:5000"), "Host: evil.example"), status: 421, code: "DENIED"})
		r.refuse(request{line: "GET /v2/", header: append(spoofed("evil.example"), "Host: localhost:5000"), status: 200})
		r.refuse(request{line: "GET /v2/../x", header: spoofed("localhost:5000"), status: 404, code: "NAME_INVALID"})
		r.refuse(request{line: "DELETE /v2/", header: []string{"X-Http-Method-Override: GET"}, status: 405, code: "UNSUPPORTED"})
		r.quiet("spoofed headers")
		r.quay.Push("org/app", "a", registrytest.NewImage())
		r.quay.Push("org/app", "b", registrytest.NewImage())
		plain := r.get("/v2/quay.test/org/app/tags/list?n=1").want(r, 200)
		got := r.get("/v2/quay.test/org/app/tags/list?n=1", spoofed("evil.example")...).want(r, 200)
		if diff := cmp.Diff(plain.Header["Link"], got.Header["Link"]); diff != "" || len(got.Header["Link"]) != 1 {
			t.Errorf("Link (-plain +spoofed):\n%s", diff)
		}
		for _, asked := range r.quay.Requests(registrytest.Match{}) {
			for name := range asked.Header {
				if strings.HasPrefix(name, "X-") || name == "Forwarded" || name == "Via" {
					t.Errorf("upstream got the client's %s", name)
				}
			}
		}
	})
}

// A client's credentials are for the registry that it thinks it talks to, not for another one.
func TestClientsHeadersStayHere(t *testing.T) {
	bubble(t, knows, func(r *rig) {
		image := registrytest.NewImage(registrytest.Layer(1, 1000))
		r.quay.Push("org/app", "latest", image)
		header := []string{"Authorization: Basic c2VjcmV0", "Cookie: secret=1", "Proxy-Authorization: Basic c2VjcmV0", "User-Agent: secret", "Referer: http://secret", "X-Registry-Auth: secret"}
		r.get("/v2/quay.test/org/app"+latest, header...).want(r, 200)
		r.get("/v2/quay.test/org/app/tags/list", header...).want(r, 200)
		r.get("/v2/quay.test/org/app/blobs/"+image.Blobs[0].Digest.String(), header...).want(r, 200)
		for _, asked := range r.quay.Requests(registrytest.Match{}) {
			if said := fmt.Sprint(asked.Header); strings.Contains(said, "ecret") || strings.Contains(said, "c2Vj") {
				t.Errorf("%s %s went upstream with %s", asked.Method, asked.URL, said)
			}
		}
	})
}

func TestH45OnlyTheRegistryOnItsPort(t *testing.T) {
	var requests []request
	for _, path := range []string{"/metrics", "/healthz", "/readyz", "/debug/pprof/", "/debug/pprof/heap", "/debug/vars", "/v2/metrics", "/v2/debug/pprof"} {
		requests = append(requests, request{line: "GET " + path, status: 404, code: "NAME_INVALID"})
	}
	refuse(t, requests)
	bubble(t, knows, func(r *rig) {
		for line, want := range map[string]int{"GET /metrics": 200, "GET /healthz": 200, "GET /readyz": 200, "GET /debug/pprof/": 404, "GET /debug/pprof/profile": 404, "GET /debug/vars": 404,
			"GET /": 404, "GET /v2/": 404, "POST /metrics": 405, "DELETE /healthz": 405, "PUT /readyz": 405} {
			method, path, _ := strings.Cut(line, " ")
			w := httptest.NewRecorder()
			r.mirror.Admin().ServeHTTP(w, httptest.NewRequest(method, path, nil))
			if w.Code != want {
				t.Errorf("admin: %s: %d, want %d", line, w.Code, want)
			}
		}
	})
}

// Two requests in one write are two requests, and what looks like one inside a body is none.
func TestRequestsAreNotSmuggled(t *testing.T) {
	inner := request{line: "GET /v2/quay.test/org/app" + latest}.wire()
	for name, header := range map[string][]string{
		"both lengths":    {"Content-Length: 0", "Transfer-Encoding: chunked"},
		"two lengths":     {"Content-Length: 0", fmt.Sprintf("Content-Length: %d", len(inner))},
		"one length":      {fmt.Sprintf("Content-Length: %d", len(inner))},
		"odd encoding":    {"Transfer-Encoding: xchunked"},
		"folded":          {"X-A: 1\r\n Transfer-Encoding: chunked", fmt.Sprintf("Content-Length: %d", len(inner))},
		"space in name":   {"Transfer-Encoding : chunked"},
		"negative length": {"Content-Length: -1"},
	} {
		bubble(t, knows, func(r *rig) {
			got := r.exchange(request{line: "GET /v2/", header: header}.wire()+inner, "")
			if !got.Close {
				t.Errorf("%s: %d, and the connection stays open", name, got.StatusCode)
			}
			r.quiet(name)
		})
	}
}
