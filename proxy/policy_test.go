package proxy

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"breakwater/pkg/oci"
	"breakwater/proxy/upstream"
)

var update = flag.Bool("update", false, "write the golden files anew")

// The whole policy in one file, to be read: what comes of all that an upstream may say or suffer, and
// then, word by word, what each kind of request gets when content is not stored and upstream does not
// give it.
func TestPolicy(t *testing.T) {
	repo := oci.Repository{Registry: "quay.test", Name: "org/app"}
	tagged, digested := oci.Reference{Repository: repo, Tag: "latest"}, oci.Reference{Repository: repo, Digest: unknown}
	targets := []struct {
		name   string
		target target
	}{
		{"tag", target{kind: kindManifest, ref: tagged}},
		{"tag, bare path", target{kind: kindManifest, ref: tagged, bare: true}},
		{"manifest", target{kind: kindManifest, ref: digested}},
		{"blob", target{kind: kindBlob, ref: digested}},
		{"blob, bare path", target{kind: kindBlob, ref: digested, bare: true}},
		{"tags/list", target{kind: kindTags, ref: oci.Reference{Repository: repo}}},
		{"referrers", target{kind: kindReferrers, ref: digested}},
	}
	since := time.Date(2017, time.July, 26, 10, 0, 0, 0, time.UTC)
	errs := []struct {
		name string
		err  error
	}{
		{"404", &upstream.Error{Upstream: "quay.test", Kind: upstream.NotFound, Status: 404, Reason: "answered 404"}},
		{"403", &upstream.Error{Upstream: "quay.test", Kind: upstream.Denied, Status: 403, Reason: "answered 403"}},
		{"401 after a token", &upstream.Error{Upstream: "quay.test", Kind: upstream.Denied, Status: 401, Reason: "answered 401"}},
		{"429", &upstream.Error{Upstream: "quay.test", Class: "manifest", Kind: upstream.Throttled, Status: 429, Reason: "answered 429", RetryAfter: 119500 * time.Millisecond}},
		{"503", &upstream.Error{Upstream: "quay.test", Class: "manifest", Status: 503, Reason: "answered 503", State: "closed", Since: since}},
		{"breaker open", &upstream.Error{Upstream: "quay.test", Class: "token", Reason: "dial failed", State: "open", Since: since, RetryAfter: 40 * time.Second}},
		{"wrapped", fmt.Errorf("fill: %w", &upstream.Error{Upstream: "quay.test", Class: "blob", Reason: "sent wrong content", Err: errors.New("secret")})},
		{"no answer in time", context.DeadlineExceeded},
		{"our own trouble", errors.New("no space left on device")},
	}
	var got strings.Builder
	got.WriteString(policyTable(t))
	got.WriteString("\nWhat is said when it is not stored:\n")
	for _, e := range errs {
		fmt.Fprintf(&got, "# %s\n", e.name)
		for _, tt := range targets {
			w := httptest.NewRecorder()
			oci.WriteError(w, tt.target.answerFor(t.Context(), e.err))
			retry := w.Header().Get("Retry-After")
			if retry == "" {
				retry = "-"
			}
			fmt.Fprintf(&got, "%-16s %d retry %-4s %s\n", tt.name, w.Code, retry, w.Body)
			if w.Code == 429 || w.Code == 401 || w.Header().Get("Www-Authenticate") != "" {
				t.Errorf("%s, %s: %d", e.name, tt.name, w.Code)
			}
		}
	}
	golden := filepath.Join("testdata", "policy.golden")
	if *update {
		if err := os.WriteFile(golden, []byte(got.String()), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(golden)
	if err != nil {
		t.Fatal(err)
	}
	if got.String() != string(want) {
		t.Errorf("the policy is another than in %s; if that is meant, run with -update and read the difference:\n%s", golden, got.String())
	}
	gone, cancel := context.WithCancel(t.Context())
	cancel()
	if err := targets[0].target.answerFor(gone, errs[4].err); !errors.Is(err, errClientGone) {
		t.Errorf("a client that has gone is answered %v", err)
	}
}
