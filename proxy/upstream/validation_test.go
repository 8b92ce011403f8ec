package upstream

import (
	"context"
	"maps"
	"net/http"
	"strings"
	"testing"
	"time"

	"breakwater/pkg/oci"
	"breakwater/pkg/registrytest"

	"github.com/google/go-cmp/cmp"
)

func TestF71Validation(t *testing.T) {
	now := time.Now()
	date := func(ago time.Duration) string { return now.Add(-ago).UTC().Format(http.TimeFormat) }
	tests := map[string]struct {
		header string // name: value; name: value
		ago    time.Duration
		stale  bool
	}{
		"a registry":                 {"Age: 3600; Warning: 299 - \"x\"", 0, false},
		"another cache":              {"Cache-Status: Squid\\; fwd=stale\\; ttl=-5; Age: 3600", 0, false},
		"a hit":                      {"Cache-Status: breakwater\\; hit; Date: " + date(10*time.Second), 10 * time.Second, false},
		"a hit within fresh_for":     {"Cache-Status: breakwater\\; hit; Age: 50", 50 * time.Second, false},
		"fetched":                    {"Cache-Status: breakwater\\; fwd=uri-miss\\; fwd-status=200", 0, false},
		"moved":                      {"Cache-Status: breakwater\\; fwd=stale\\; fwd-status=200", 0, false},
		"confirmed":                  {"Cache-Status: breakwater\\; fwd=stale\\; fwd-status=200\\; detail=confirmed", 0, false},
		"confirmed by 304":           {"Cache-Status: breakwater\\; fwd=stale\\; fwd-status=304\\; detail=confirmed", 0, false},
		"stale by timeout":           {"Cache-Status: breakwater\\; fwd=stale\\; detail=timeout; Age: 7200; Date: " + date(time.Minute), 7260 * time.Second, true},
		"stale by outage":            {"Cache-Status: breakwater\\; fwd=stale\\; fwd-status=503\\; detail=outage; Age: 7200", 7200 * time.Second, true},
		"stale, breaker open":        {"Cache-Status: breakwater\\; hit\\; ttl=-7200\\; detail=outage; Age: 7200", 7200 * time.Second, true},
		"fresh":                      {"Cache-Status: breakwater\\; hit\\; ttl=30; Age: 5", 5 * time.Second, false},
		"a warning alone":            {"Cache-Status: breakwater\\; hit; Warning: 299 - \"stale\"", 0, true},
		"another warning":            {"Cache-Status: breakwater\\; hit; Warning: 214 - \"x\"", 0, false},
		"two tiers, the near stale":  {"Cache-Status: breakwater\\; hit, breakwater\\; fwd=stale\\; detail=timeout", 0, true},
		"two tiers, the far stale":   {"Cache-Status: breakwater\\; fwd=stale\\; detail=timeout, breakwater\\; fwd=uri-miss\\; fwd-status=200", 0, false},
		"behind another cache":       {"Cache-Status: breakwater\\; hit\\; ttl=-1, ExampleCDN\\; hit", 0, true},
		"a clock ahead":              {"Cache-Status: breakwater\\; hit; Age: 5; Date: " + date(-time.Hour), 5 * time.Second, false},
		"an age below nothing":       {"Cache-Status: breakwater\\; hit; Age: -5", 0, false},
		"an age that is no number":   {"Cache-Status: breakwater\\; hit; Age: yesterday", 0, false},
		"an age beyond all measures": {"Cache-Status: breakwater\\; hit; Age: 99999999999999999999", 0, false},
	}
	for name, tt := range tests {
		h := http.Header{}
		for field := range strings.SplitSeq(strings.ReplaceAll(tt.header, "\\;", "\x00"), "; ") {
			key, value, _ := strings.Cut(field, ": ")
			h.Add(key, strings.ReplaceAll(value, "\x00", ";"))
		}
		got := validation(h)
		if ago := time.Since(got.ValidatedAt); ago < tt.ago-time.Second || ago > tt.ago+2*time.Second || got.Stale != tt.stale {
			t.Errorf("%s: %v ago, stale %v; want %v, %v", name, ago, got.Stale, tt.ago, tt.stale)
		}
	}
}

func TestF71AnswersSayHowOldTheyAre(t *testing.T) {
	guard(t, registrytest.Auth{}, func(g *guarded) {
		g.use(Config{Registry: "quay.io", URL: "https://quay.test"})
		c, ref := g.pool.Clients("quay.io")[0], reference("quay.io", "org/a")
		check := func(how string, got Validation, err error, ago time.Duration) {
			g.Helper()
			want := Validation{ValidatedAt: time.Now().Add(-ago).Truncate(time.Second), Stale: ago > 0}
			if diff := cmp.Diff(want, got); diff != "" || err != nil {
				g.Errorf("%s: %v\n%s", how, err, diff)
			}
		}
		ask := func(ago time.Duration) {
			resolved, err := c.Resolve(context.Background(), ref)
			check("HEAD", resolved.Validation, err, ago)
			noHead := g.Fault(registrytest.Match{Func: func(r *http.Request) bool { return r.Method == http.MethodHead }}, registrytest.Status(http.StatusMethodNotAllowed))
			resolved, err = c.Resolve(context.Background(), ref)
			check("GET", resolved.Validation, err, ago)
			noHead()
			list, err := c.List(context.Background(), ref.Repository, "/tags/list", func(List) error { return nil })
			check("list", list.Validation, err, ago)
		}
		ask(0)
		g.Fault(registrytest.Match{}, registrytest.Header("Cache-Status", "breakwater; fwd=stale; detail=timeout"), registrytest.Header("Age", "7200"), registrytest.Header("Warning", `299 - "stale by 2h"`))
		ask(2 * time.Hour)
	})
}

// A regional Breakwater answers 503 for the registry that is out, and only that one suffers.
func TestF71OneRegistryOfARegionalMirror(t *testing.T) {
	guard(t, registrytest.Auth{}, func(g *guarded) {
		g.PutManifest("well/a", "latest", oci.MediaTypeDockerManifest, []byte(`{"schemaVersion":2,"mediaType":"`+oci.MediaTypeDockerManifest+`","layers":[]}`))
		g.use(Config{Registry: "dead", URL: "https://quay.test", RepositoryPrefix: "dead/"}, Config{Registry: "well", URL: "https://quay.test", RepositoryPrefix: "well/"})
		g.Fault(registrytest.Match{Func: func(r *http.Request) bool { return strings.HasPrefix(r.URL.Path, "/v2/dead/") }},
			registrytest.Header("Cache-Status", "breakwater"), registrytest.Status(http.StatusServiceUnavailable, "Retry-After", "30"))
		for _, repo := range []string{"a", "b", "c", "d", "e"} {
			if err := g.ask("dead", repo); err == nil {
				g.Error("no error")
			}
		}
		if err := g.ask("well", "a"); err != nil {
			g.Errorf("well: %v", err)
		}
		states := map[string]string{}
		for _, c := range g.pool.All() {
			states[c.Registry()] = c.Health()[classManifest].State
		}
		if want := map[string]string{"dead": stateOpen, "well": stateClosed}; !maps.Equal(states, want) {
			g.Errorf("%v", states)
		}
	})
}
