//go:build linux

package main_test

import (
	"encoding/json"
	"maps"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"breakwater/pkg/registrytest"
)

// TestSharedGC collects what no tag names any more, by the real program. What a tag names can still be
// pulled, by a host that holds nothing and with every upstream gone.
func TestSharedGC(t *testing.T) {
	f := newFleet(t)
	a := f.host(t)
	first, second, platform := greeter(t, 1), greeter(t, 2), greeter(t, 52)
	build := registrytest.NewIndex(greeter(t, 51).For("linux/s390x"), platform)
	a.serve(t, sharing)
	f.push(t, supervisor, first)
	a.pull(t, supervisor, first)
	f.published(t, supervisor, first)
	f.push(t, supervisor, second)
	f.push(t, "org/build", build)
	a.pull(t, supervisor, second)
	a.pull(t, "org/build", build)
	a.pullReference(t, "org/build", platform.Digest().String(), platform)
	f.published(t, supervisor, second)
	f.published(t, "org/build", build)
	a.idle(t)

	published := f.names()
	if said := a.gc(t); !strings.Contains(said, " 0 of ") {
		t.Errorf("what is young would go: %s", said)
	}
	for name := range published {
		f.bucket.Age(name, 31*24*time.Hour)
	}
	said := a.gc(t)
	if !strings.Contains(said, "would be removed") || !strings.Contains(said, "--delete") || strings.Contains(said, " 0 of ") {
		t.Errorf("a dry run says %s", said)
	}
	if !maps.Equal(f.names(), published) {
		t.Error("a dry run has removed something")
	}
	if said := a.gc(t, "--grace", "1000h"); !strings.Contains(said, " 0 of ") {
		t.Errorf("with a longer grace: %s", said)
	}
	var found struct{ Removed int }
	if err := json.Unmarshal([]byte(a.gc(t, "--delete", "--output", "json")), &found); err != nil {
		t.Fatal(err)
	}
	left := f.names()
	if found.Removed != len(published)-len(left) {
		t.Errorf("%d were removed by its own word, by the bucket's %d", found.Removed, len(published)-len(left))
	}
	for _, gone := range digests(first)[:4] { // its last layer is in all images
		if name := sharedPrefix + "blobs/sha256/" + gone; left[name] || !published[name] {
			t.Errorf("%s: published %t, left %t, want it removed", name, published[name], left[name])
		}
	}
	for _, kept := range slices.Concat(digests(second), digests(build), digests(platform)) {
		if !left[sharedPrefix+"blobs/sha256/"+kept] {
			t.Errorf("%s was removed, which a tag needs", kept)
		}
	}
	if said := a.gc(t); !strings.Contains(said, " 0 of ") {
		t.Errorf("after it: %s", said)
	}

	b := f.host(t)
	b.upstream.shut()
	b.serve(t, sharing)
	b.pull(t, supervisor, second)
	b.pull(t, "org/build", build)
	b.pullReference(t, "org/build", platform.Digest().String(), platform)
}

// TestSharedGCRefuses is for what cannot be meant: the exit code says so.
func TestSharedGCRefuses(t *testing.T) {
	f := newFleet(t)
	h := f.host(t)
	with := h.write(t, "config.yaml", sharing)
	for _, row := range []struct{ args, want string }{
		{"--config " + with + " --grace 10m", "grace"},
		{"--config " + h.write(t, "alone.yaml", mirrored), "shared.s3.bucket"},
		{"--config " + h.write(t, "absent.yaml", strings.Replace(sharing, "bucket: ", "bucket: not-", 1)), "NoSuchBucket"},
	} {
		if said, err := h.output(h.command(t.Context(), nil, append([]string{binary(t), "shared", "gc"}, strings.Fields(row.args)...)...)); err == nil || !strings.Contains(said, row.want) {
			t.Errorf("%s: %v, %s, want to hear of %s", row.args, err, said, row.want)
		}
	}
}

// gc is what `shared gc` prints on the host.
func (m *member) gc(t *testing.T, args ...string) string {
	t.Helper()
	args = append([]string{binary(t), "shared", "gc", "--config", filepath.Join(m.dir, "config.yaml")}, args...)
	cmd := m.command(t.Context(), nil, args...)
	var said strings.Builder
	cmd.Stdout = &said
	if err := m.start(cmd); err != nil {
		t.Fatal(err)
	}
	if err := cmd.Wait(); err != nil {
		t.Fatalf("%v: %v\n%s", args, err, &said)
	}
	return said.String()
}

// names are all objects of the fleet but leases, which come and go.
func (f *fleet) names() map[string]bool {
	names := map[string]bool{}
	for _, name := range f.bucket.Names(sharedPrefix) {
		if !strings.HasPrefix(name, sharedPrefix+"leases/") {
			names[name] = true
		}
	}
	return names
}

// digests are an image's own, in hex: the manifest's, then those of its blobs.
func digests(image registrytest.Image) []string {
	found := []string{image.Digest().Encoded()}
	for _, blob := range image.Blobs {
		found = append(found, blob.Digest.Encoded())
	}
	return found
}
