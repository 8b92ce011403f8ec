//go:build linux

package main_test

import (
	"context"
	"path/filepath"
	"strings"
	"testing"
)

// TestConformance runs the pull part of OCI's conformance program against content that the mirror
// pulls through: first what it has never seen, then what it has, then in an outage.
func TestConformance(t *testing.T) {
	t.Parallel()
	h := newHost(t, cached("conformance"))
	up := h.upstream(t)
	const repository = "conformance/repo1"
	image := greeter(t, 1)
	_, manifest, _ := strings.Cut(up.push(t, repository, "single", image)[1], "@")
	_, index, _ := strings.Cut(up.pushBuild(t, repository, "multi")[1], "@")
	var blobs []string
	for _, blob := range image.Blobs {
		blobs = append(blobs, blob.Digest.String())
	}
	variables := []string{
		"OCI_REGISTRY=" + mirrorAddr, "OCI_TLS=disabled", "OCI_VERSION=1.1", "OCI_REPO1=" + repository,
		"OCI_API_PUSH=false", "OCI_API_BLOBS_DELETE=false", "OCI_API_MANIFESTS_DELETE=false", "OCI_API_TAGS_DELETE=false",
		"OCI_RO_DATA_TAGS=single multi",
		"OCI_RO_DATA_MANIFESTS=" + manifest + " " + index,
		"OCI_RO_DATA_BLOBS=" + strings.Join(blobs, " "),
		"OCI_RO_DATA_REFERRERS=" + manifest + " " + index,
		"OCI_RESULTS_DIR=" + filepath.Join(h.dir, "results"),
	}
	h.serve(t, mirrored)
	for _, round := range []struct {
		name   string
		filter string // the branch of the program's tests, all if empty
		begin  func()
	}{
		{"unseen", "", func() {}},
		{"stored", "", func() {}},
		{"outage", "OCI Conformance Test/read-only", up.kill}, // that nobody has a manifest cannot be known now
	} {
		t.Run(round.name, func(t *testing.T) {
			round.begin()
			ctx, cancel := context.WithTimeout(t.Context(), patience)
			defer cancel()
			out, err := h.output(h.command(ctx, append(variables, "OCI_FILTER_TEST="+round.filter), cached("conformance")))
			// Its exit status says little: without pushes it crashes after its report.
			if !strings.Contains(out, "OCI Conformance Result: Pass") {
				t.Errorf("not conformant: %v\n%s", err, out)
			}
		})
	}
}
