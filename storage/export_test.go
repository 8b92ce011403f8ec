package storage

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"breakwater/pkg/oci"

	ispec "github.com/opencontainers/image-spec/specs-go/v1"
)

func exported(t *testing.T, d *Disk) map[string]ispec.Descriptor {
	t.Helper()
	raw, err := d.root.root.ReadFile("index.json")
	var index ispec.Index
	if err == nil {
		err = json.Unmarshal(raw, &index)
	}
	if err != nil || index.SchemaVersion != 2 {
		t.Fatalf("%s\n%v", raw, err)
	}
	names := map[string]ispec.Descriptor{}
	for _, desc := range index.Manifests {
		names[desc.Annotations[ispec.AnnotationRefName]] = desc
	}
	return names
}

func TestIndexFollowsTheTags(t *testing.T) {
	dir := t.TempDir()
	synctest.Test(t, func(t *testing.T) {
		d := open(t, dir)
		if got := exported(t, d); len(got) != 0 {
			t.Errorf("%v at the start", got)
		}
		m, _ := image(t)
		tag := Tag{Current: Validated{m.Digest, anonymous.At, "u"}}
		deep := oci.Repository{Registry: "quay.io", Name: "org/app/deep"}
		if err := d.PutManifest(app, m, anonymous); err != nil {
			t.Fatal(err)
		}
		for _, repo := range []oci.Repository{app, deep, other} { // the last two have no record of the manifest
			for _, name := range []string{"latest", "v1"} {
				if err := d.PutTag(repo, name, tag); err != nil {
					t.Fatal(err)
				}
			}
		}
		time.Sleep(2 * time.Second)
		got := exported(t, d)
		for _, name := range []string{"quay.io/org/app:latest", "quay.io/org/app/deep:v1", "localhost:5000/org/app:v1"} {
			if desc := got[name]; desc.Digest != m.Digest || desc.Size != int64(len(m.Raw)) || desc.MediaType != m.MediaType {
				t.Errorf("%s is %+v", name, desc)
			}
		}
		if len(got) != 6 {
			t.Errorf("%d names", len(got))
		}
		m2, _ := image(t)
		tag.Current.Digest = m2.Digest
		if err := errors.Join(d.PutManifest(app, m2, anonymous), d.PutTag(app, "latest", tag), d.Close()); err != nil {
			t.Fatal(err)
		}
	})
	synctest.Test(t, func(t *testing.T) {
		d := open(t, dir)
		current := latest(t, d).Current.Digest
		if got := exported(t, d)["quay.io/org/app:latest"].Digest; got != current {
			t.Errorf("%s after Close", got)
		}
		if err := errors.Join(d.Close(), spoilWith("index.json", "half")(mustRoot(t, dir)), spoilWith("LOCK", "1\n")(mustRoot(t, dir))); err != nil {
			t.Fatal(err)
		}
		d = open(t, dir)
		time.Sleep(2 * time.Second)
		if got := exported(t, d)["quay.io/org/app:latest"].Digest; got != current {
			t.Errorf("%s after an unclean stop", got)
		}
		if err := d.Close(); err != nil {
			t.Fatal(err)
		}
	})
}

func mustRoot(t *testing.T, dir string) *os.Root {
	t.Helper()
	root, err := os.OpenRoot(dir)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = root.Close() })
	return root
}

// index.json takes at most a hundredth of the time, however often tags move.
func TestIndexIsNotWrittenTooOften(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := open(t, t.TempDir())
		var writes atomic.Int64
		d.on(callSync, func(name string) error {
			info, err := os.Stat(name)
			if err == nil && !info.IsDir() {
				time.Sleep(50 * time.Millisecond) // what an export takes
				writes.Add(1)
			}
			return err
		})
		begun := time.Now()
		for range 300 {
			d.exporter.changed.Store(true)
			time.Sleep(time.Second)
		}
		share := float64(writes.Load()) * 0.05 / time.Since(begun).Seconds()
		if share > 0.01 || writes.Load() < 20 {
			t.Errorf("%d writes, %.4f of the time", writes.Load(), share)
		}
		if err := d.Close(); err != nil {
			t.Fatal(err)
		}
	})
}

func TestSkopeoReadsTheFolder(t *testing.T) {
	skopeo, err := exec.LookPath("skopeo")
	if err != nil {
		if os.Getenv("CI") == "true" {
			t.Fatal(err)
		}
		t.Skip("skopeo is not installed")
	}
	dir := t.TempDir()
	d := open(t, dir)
	config := []byte(`{"architecture":"amd64","os":"linux","rootfs":{"type":"layers","diff_ids":[]}}`)
	dgst := store(t, d, app, config, anonymous)
	m, err := oci.ParseManifest("", fmt.Appendf(nil, `{"schemaVersion":2,"mediaType":%q,"config":{"mediaType":%q,"digest":%q,"size":%d},"layers":[]}`,
		ispec.MediaTypeImageManifest, ispec.MediaTypeImageConfig, dgst, len(config)), "sha256")
	if err == nil {
		err = errors.Join(d.PutManifest(app, m, anonymous), d.PutTag(app, "v1.0", Tag{Current: Validated{m.Digest, anonymous.At, "u"}}), d.export())
	}
	if err != nil {
		t.Fatal(err)
	}
	for _, state := range []string{"open", "closed"} {
		to := t.TempDir()
		out, err := exec.CommandContext(t.Context(), skopeo, "--insecure-policy", "copy", "oci:"+dir+":quay.io/org/app:v1.0", "dir:"+to).CombinedOutput()
		if err != nil {
			t.Errorf("%s: %v\n%s", state, err, out)
		}
		if raw, err := os.ReadFile(filepath.Join(to, "manifest.json")); err != nil || string(raw) != string(m.Raw) {
			t.Errorf("%s: copied %q, %v", state, raw, err)
		}
		if raw, err := os.ReadFile(filepath.Join(to, dgst.Encoded())); err != nil || string(raw) != string(config) {
			t.Errorf("%s: copied %q, %v", state, raw, err)
		}
		if state == "open" {
			if err := d.Close(); err != nil {
				t.Fatal(err)
			}
		}
	}
}
