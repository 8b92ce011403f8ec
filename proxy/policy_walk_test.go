package proxy

import (
	"crypto/tls"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"breakwater/pkg/registrytest"
	"breakwater/proxy/upstream"
)

const firstAndNext = `
default_registry: quay.test
tags: {%s}
registries:
  quay.test: {upstreams: [{url: "https://quay.test"}, {url: "http://two.test:80"}]}
`

// ailments are all that the first upstream may say or suffer. The next one is well, and has nothing.
var ailments = []struct {
	name string
	ails func(r *rig, path string) // which is asked for next
}{
	{"200", func(*rig, string) {}},
	{"404", ails(all, registrytest.Status(404))},
	{"410", ails(all, registrytest.Status(410))},
	{"401 after a token", ails(registrytest.Match{Func: func(req *http.Request) bool { return req.URL.Path != "/token" }}, realm("https://quay.test/token"))},
	{"403", ails(all, registrytest.Status(403))},
	{"451", ails(all, registrytest.Status(451))},
	{"408", ails(all, registrytest.Status(408))},
	{"429, Retry-After: 120", ails(all, registrytest.Status(429, "Retry-After", "120"))},
	{"500", ails(all, registrytest.Status(500))},
	{"503", ails(all, registrytest.Status(503))},
	{"200 and a page of HTML", ails(all, registrytest.Portal())},
	{"200 and wrong bytes (the tag has moved)", moves(func(w http.ResponseWriter, r *http.Request, next http.Handler) {
		registrytest.FlipBit(10)(lingering{w}, r, next)
	})},
	{"200 and malformed JSON (the tag has moved)", moves(func(w http.ResponseWriter, _ *http.Request, _ http.Handler) {
		w.Header().Set("Content-Type", storedImage.MediaType)
		_, _ = w.Write([]byte(`{"schemaVersion":2,`))
	})},
	{"200 and cut after 100 bytes (the tag has moved)", moves(registrytest.Truncate(100))},
	{"refuses connections", func(r *rig, _ string) { r.sever(registrytest.Link{Refuse: true}) }},
	{"is not in the DNS", func(r *rig, _ string) {
		r.network.SetHost("quay.test", registrytest.Host{Code: registrytest.NXDomain})
		r.network.Reset("quay.test:443")
	}},
	{"certificate has expired", func(r *rig, _ string) { r.expire() }},
	{"black hole", func(r *rig, _ string) { r.sever(registrytest.Link{BlackHole: true}) }},
	{"accepts, and says nothing", ails(all, registrytest.Hang())},
	{"has asked us to wait for 120 s", func(r *rig, _ string) {
		defer r.quay.Fault(all, registrytest.Status(429, "Retry-After", "120"))()
		r.get(app + "/manifests/other")
	}},
	{"this reference is held off", func(r *rig, path string) {
		r.quay.Fault(all, registrytest.Status(500))
		r.get(path)
		synctest.Wait()
	}},
	{"breaker is open", func(r *rig, _ string) {
		r.sever(registrytest.Link{Refuse: true})
		for i := range 5 {
			r.get(fmt.Sprint(app, "/manifests/v", i))
			r.get(fmt.Sprintf("%s/blobs/sha256:%064d", app, i))
		}
	}},
	{"our own disk fails", func(r *rig, _ string) {
		tmp := filepath.Join(r.dir, "data", "tmp")
		if err := os.Rename(tmp, tmp+".gone"); err != nil {
			r.Fatal(err)
		}
		r.Cleanup(func() {
			if err := os.Rename(tmp+".gone", tmp); err != nil {
				r.Error(err)
			}
		})
	}},
}

// lingering writes after a moment each: whoever waits for the first bytes has them before the last ones come.
type lingering struct{ http.ResponseWriter }

func (l lingering) Write(p []byte) (int, error) {
	time.Sleep(time.Millisecond)
	return l.ResponseWriter.Write(p)
}

func ails(m registrytest.Match, faults ...registrytest.Fault) func(*rig, string) {
	return func(r *rig, _ string) { r.quay.Fault(m, faults...) }
}

// moves makes GETs suffer, and so that a stored tag needs one.
func moves(fault registrytest.Fault) func(*rig, string) {
	return func(r *rig, _ string) {
		r.quay.Push("org/app", "latest", newerImage)
		r.quay.Fault(gets, fault)
	}
}

func (r *rig) sever(link registrytest.Link) {
	r.network.Reset("quay.test:443")
	r.network.SetLink("quay.test:443", link)
}

// expire gives quay.test a certificate that has run out.
func (r *rig) expire() {
	_ = r.secure.Close()
	listener, err := r.network.Listen("quay.test:443")
	if err != nil {
		r.Fatal(err)
	}
	certificate, err := r.network.CA.Certificate("quay.test", time.Now().Add(-time.Hour))
	if err != nil {
		r.Fatal(err)
	}
	server := registrytest.Serve(listener, r.quay, []tls.Certificate{certificate}...)
	r.Cleanup(func() { _ = server.Close() })
}

// askers are who is answered. What is stored was confirmed ten minutes ago.
var askers = []struct{ name, tags, path string }{
	{"tag, stored", "", app + latest},
	{"tag, stored, both switches on stale", "on_denied: stale, on_not_found: stale", app + latest},
	{"tag, older than max_stale", "max_stale: 9m", app + latest},
	{"tag, older, both switches on stale", "max_stale: 9m, on_denied: stale, on_not_found: stale", app + latest},
	{"manifest, not stored", "", app + "/manifests/" + unseenImage.Digest().String()},
	{"blob, not stored", "", app + "/blobs/" + unseenImage.Blobs[1].Digest.String()},
	{"blob, not stored, bare path", "", "/v2/org/app/blobs/" + unseenImage.Blobs[1].Digest.String()},
}

// policyTable is what happens, for each ailment and asker.
func policyTable(t *testing.T) string {
	lines := make([][]string, len(ailments))
	t.Run("walk", func(t *testing.T) {
		for i, ailment := range ailments {
			lines[i] = make([]string, len(askers))
			for j, asker := range askers {
				t.Run(ailment.name+"/"+asker.name, func(t *testing.T) {
					t.Parallel()
					bubble(t, fmt.Sprintf(firstAndNext, asker.tags), func(r *rig) {
						lines[i][j] = fmt.Sprintf("  %-36s %s", asker.name, r.outcome(ailment.ails, asker.path))
					})
				})
			}
		}
	})
	var table strings.Builder
	fmt.Fprintf(&table, "  %-36s %-22s %-6s %s\n", "", "breaker verdict", "next?", "answer")
	for i, ailment := range ailments {
		fmt.Fprintf(&table, "# %s\n%s\n", ailment.name, strings.Join(lines[i], "\n"))
	}
	return table.String()
}

// outcome is one line: what a request is counted as at the first upstream, whether the next one is asked,
// and what the client gets.
func (r *rig) outcome(ails func(*rig, string), path string) string {
	next := registrytest.New(registrytest.Config{})
	next.Serve(r, r.network, "two.test:80")
	r.secure = r.quay.Serve(r, r.network, "quay.test:443")
	r.quay.Push("org/app", "latest", storedImage)
	r.quay.Push("org/app", "", unseenImage)
	r.pull("latest", storedImage)
	time.Sleep(age)
	ails(r, path)
	class := "manifest"
	if strings.Contains(path, "/blobs/") {
		class = "blob"
	}
	before := r.health("quay.test", class)
	next.Forget()
	got := r.get(path)
	time.Sleep(15 * time.Second) // what was not waited for ends
	synctest.Wait()
	asked := "no"
	if next.Count(all) > 0 {
		asked = "asked"
	}
	return fmt.Sprintf("%-22s %-6s %s", r.verdict(before, path), asked, got.summary(r))
}

// verdict is what has been counted since. A failure that counts for all classes is the host's.
func (r *rig) verdict(before upstream.Health, path string) string {
	after := r.health("quay.test", before.Class)
	var verdicts []string
	if after.Succeeded > before.Succeeded {
		verdicts = append(verdicts, "success")
	}
	if after.Excluded > before.Excluded {
		verdicts = append(verdicts, "excluded")
	}
	if after.Failed > before.Failed {
		// Three, and two of one reference in the other class, are enough there if the three count too.
		class, other := "manifest", app+"/manifests/other"
		if before.Class == class {
			class, other = "blob", app+"/blobs/"+unknown
		}
		for _, path := range []string{path, path, other, other} {
			r.get(path)
			time.Sleep(5 * time.Second)
		}
		if what := "failure"; r.state(class) == "closed" {
			verdicts = append(verdicts, what)
		} else {
			verdicts = append(verdicts, "host "+what)
		}
	}
	if verdicts == nil {
		return "not asked"
	}
	return strings.Join(verdicts, ", ")
}

// summary is an answer in a few words.
func (a answer) summary(r *rig) string {
	said := fmt.Sprint(a.StatusCode)
	switch retry := a.Header.Get("Retry-After"); {
	case a.StatusCode == http.StatusOK && a.err != nil:
		said += ", ends short"
	case a.Header.Get("Warning") != "":
		said += " stale"
	case a.StatusCode != http.StatusOK:
		said += " " + a.code()
		if seconds, err := strconv.Atoi(retry); strings.Contains(string(a.body), `"state":"open"`) && err == nil && seconds >= 8 && seconds <= 12 {
			retry = "8 to 12" // it has jitter
		}
		if retry != "" {
			said += ", retry after " + retry
		}
	}
	if a.took > headerBudget {
		r.Errorf("%s: took %v", a.Request.URL, a.took)
	}
	if a.StatusCode == 429 || a.StatusCode == 401 || a.Header.Get("Www-Authenticate") != "" {
		r.Errorf("%s: %d", a.Request.URL, a.StatusCode)
	}
	return said
}

// The credential was revoked: the registry takes no token that its service gives out.
func TestF13TokenRefused(t *testing.T) {
	refusedBy(t, 401, registrytest.Match{Func: func(req *http.Request) bool { return req.URL.Path != "/token" }}, realm("http://quay.test/token"))
}

func TestF14Denied(t *testing.T) { refusedBy(t, 403, all, registrytest.Status(403)) }

// refusedBy holds what an upstream's refusal is: no outage, a reason to ask the next one, and no word on
// what is stored by digest.
func refusedBy(t *testing.T, status int, m registrytest.Match, fault registrytest.Fault) {
	for onDenied, want := range map[string]int{"refuse": 403, "stale": 200} {
		t.Run("on_denied "+onDenied, func(t *testing.T) {
			several(t, 2, "on_denied: "+onDenied, func(r *rig, ups []*registrytest.Registry) {
				r.quay.Push("org/app", "latest", storedImage)
				r.pull("latest", storedImage)
				time.Sleep(age)
				r.quay.Fault(m, fault)
				ups[1].Fault(m, registrytest.Status(404))
				for i := range 20 {
					got := r.get(app+latest).want(r, want)
					if want == 200 {
						got.stale(r, fmt.Sprint(int(age.Seconds())+i))
						if cache := got.Header.Get("Cache-Status"); cache != fmt.Sprintf("breakwater; fwd=stale; fwd-status=%d; detail=denied", status) {
							r.Errorf("Cache-Status %q", cache)
						}
					} else if got.code() != "DENIED" || got.Header.Get("Www-Authenticate") != "" {
						r.Errorf("%v: %s", got.Header, got.body)
					}
					r.get(fmt.Sprint(app, "/manifests/v", i)).want(r, 403)
					r.get(fmt.Sprintf("%s/blobs/sha256:%064d", app, i)).want(r, 404)
					time.Sleep(time.Second)
				}
				for _, class := range []string{"token", "manifest", "blob"} {
					if h := r.health("quay.test:80", class); h.State != "closed" || h.Failed > 0 || h.Excluded == 0 && class != "token" {
						r.Errorf("a refusal was taken for an outage: %+v", h)
					}
				}
				for _, up := range ups {
					up.Forget()
				}
				r.get(app+"/manifests/"+storedImage.Digest().String()).want(r, 200).fresh(r).is(r, storedImage.Raw)
				r.get(blobPath(storedImage.Blobs[1])).want(r, 200).fresh(r).is(r, storedImage.Blobs[1].Bytes)
				if n := ups[0].Count(all) + ups[1].Count(all); n > 0 {
					r.Errorf("%d requests for what is stored", n)
				}
				ups[1].Heal()
				ups[1].Push("org/app", "unseen", unseenImage)
				r.get(app+"/manifests/unseen").want(r, 200).is(r, unseenImage.Raw)
				r.get(blobPath(unseenImage.Blobs[1])).want(r, 200).is(r, unseenImage.Blobs[1].Bytes)
				if ups[0].Count(all) == 0 {
					r.Error("the first upstream was not asked first")
				}
			})
		})
	}
}
