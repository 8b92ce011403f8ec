package storage

import (
	"encoding/json"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"testing"
	"time"

	"breakwater/pkg/oci"

	"github.com/opencontainers/go-digest"
	ispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// parsed is a manifest as it comes from upstream.
func parsed(t testing.TB, v any) oci.Manifest {
	t.Helper()
	raw, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	m, err := oci.ParseManifest("", raw, digest.SHA256)
	if err != nil {
		t.Fatal(err)
	}
	return m
}

// blob describes new bytes, and stores them for repo unless c is the zero value.
func (d *Disk) blob(t testing.TB, repo oci.Repository, c Confirmation) ispec.Descriptor {
	t.Helper()
	raw, dgst := content(100)
	if c != (Confirmation{}) {
		d.ingest(t, repo, raw, dgst, c)
	}
	return ispec.Descriptor{MediaType: ispec.MediaTypeImageLayer, Digest: dgst, Size: int64(len(raw))}
}

// ingest stores a blob.
func (d *Disk) ingest(t testing.TB, repo oci.Repository, raw []byte, dgst digest.Digest, c Confirmation) {
	t.Helper()
	i, err := d.Ingest(repo, dgst, int64(len(raw)))
	if err == nil {
		_, err = i.Write(raw)
	}
	if err == nil {
		err = i.Verify()
	}
	if err == nil {
		err = i.Commit(c)
	}
	if err != nil {
		t.Fatal(err)
	}
}

// imageOf stores the manifest of an image of these blobs, the first of which is its config.
func (d *Disk) imageOf(t testing.TB, repo oci.Repository, c Confirmation, blobs ...ispec.Descriptor) oci.Manifest {
	t.Helper()
	m := parsed(t, ispec.Manifest{MediaType: ispec.MediaTypeImageManifest, Config: blobs[0], Layers: blobs[1:]})
	if err := d.PutManifest(repo, m, c); err != nil {
		t.Fatal(err)
	}
	return m
}

func TestMissing(t *testing.T) {
	d := open(t, t.TempDir())
	stored, private, absent := d.blob(t, app, anonymous), d.blob(t, app, secret), d.blob(t, app, Confirmation{})
	elsewhere := d.blob(t, other, secret)
	cut, gone, lied := d.blob(t, app, anonymous), d.blob(t, app, anonymous), d.blob(t, app, anonymous)
	if err := d.blobs[digest.SHA256].root.Remove(gone.Digest.Encoded()); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(filepath.Join(d.root.root.Name(), "blobs/sha256", cut.Digest.Encoded()), 50); err != nil {
		t.Fatal(err)
	}
	lied.Size++
	windows := d.blob(t, app, Confirmation{})
	windows.MediaType = "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip"
	nondistributable := d.blob(t, app, Confirmation{})
	nondistributable.MediaType = "application/vnd.oci.image.layer.nondistributable.v1.tar+gzip"
	m := d.imageOf(t, app, anonymous, stored, private, absent, absent, elsewhere, cut, gone, lied, windows, nondistributable)
	var got []digest.Digest
	for _, desc := range d.Missing(app, m) {
		got = append(got, desc.Digest)
	}
	want := []digest.Digest{absent.Digest, elsewhere.Digest, cut.Digest, gone.Digest, lied.Digest}
	if len(got) != len(want) {
		t.Fatalf("missing %v, want %v", got, want)
	}
	for i := range want {
		if got[i] != want[i] {
			t.Errorf("missing %d: %s, want %s", i, got[i], want[i])
		}
	}
}

func TestComplete(t *testing.T) {
	d := open(t, t.TempDir())
	whole := d.imageOf(t, app, anonymous, d.blob(t, app, anonymous), d.blob(t, app, anonymous))
	part := d.imageOf(t, app, anonymous, d.blob(t, app, anonymous), d.blob(t, app, Confirmation{}))
	never := parsed(t, ispec.Manifest{MediaType: ispec.MediaTypeImageManifest, Config: d.blob(t, app, anonymous)})
	index := func(children ...oci.Manifest) oci.Manifest {
		x := ispec.Index{MediaType: ispec.MediaTypeImageIndex, Manifests: []ispec.Descriptor{}}
		for _, m := range children {
			x.Manifests = append(x.Manifests, ispec.Descriptor{MediaType: m.MediaType, Digest: m.Digest, Size: int64(len(m.Raw))})
		}
		m := parsed(t, x)
		if err := d.PutManifest(app, m, anonymous); err != nil {
			t.Fatal(err)
		}
		return m
	}
	for name, tt := range map[string]struct {
		m    oci.Manifest
		want bool
	}{
		"all blobs":                       {whole, true},
		"a blob is missing":               {part, false},
		"the manifest is missing":         {never, false},
		"index of nothing":                {index(), false},
		"index, no image stored":          {index(never), false},
		"index, the stored one is whole":  {index(never, whole), true},
		"index, one of two stored is not": {index(whole, part), false},
	} {
		if got := d.Complete(app, tt.m.Digest); got != tt.want {
			t.Errorf("%s: %v", name, got)
		}
	}
	if m, err := d.Peek(app, whole.Digest); err != nil || m.Digest != whole.Digest {
		t.Errorf("Peek: %v, %v", m.Digest, err)
	}
	if len(d.manifests.takePulls()) > 0 {
		t.Error("looking counts as pulling")
	}
}

func TestLastCompleteIsKeptTrue(t *testing.T) {
	d := open(t, t.TempDir())
	raw, dgst := content(100)
	config, late := d.blob(t, app, anonymous), ispec.Descriptor{Digest: dgst, Size: 100}
	first := d.imageOf(t, app, anonymous, config)
	second := d.imageOf(t, app, anonymous, config, late)
	third := d.imageOf(t, app, anonymous, config, d.blob(t, app, Confirmation{}))
	at := anonymous.At
	names := func(m oci.Manifest) {
		t.Helper()
		at = at.Add(time.Hour)
		if err := d.RenewTag(app, "latest", Validated{Digest: m.Digest, ValidatedAt: at}); err != nil {
			t.Fatal(err)
		}
	}
	check := func(current, last oci.Manifest, lastAt time.Time) {
		t.Helper()
		got := latest(t, d)
		if got.Current.Digest != current.Digest || !got.Current.ValidatedAt.Equal(at) {
			t.Errorf("current is %v", got.Current)
		}
		if got.LastComplete.Digest != last.Digest || !got.LastComplete.ValidatedAt.Equal(lastAt) {
			t.Errorf("last complete is %v, want %s at %v", got.LastComplete, last.Digest, lastAt)
		}
	}
	names(third)
	check(third, oci.Manifest{}, time.Time{})
	names(first)
	check(first, first, at)
	names(first)
	check(first, first, at)
	whole := at
	names(second)
	check(second, first, whole)
	names(second)
	check(second, first, whole)
	if err := d.CompleteTag(app, "latest"); err != nil {
		t.Fatal(err)
	}
	check(second, first, whole)
	d.ingest(t, app, raw, dgst, anonymous)
	if err := d.CompleteTag(app, "latest"); err != nil {
		t.Fatal(err)
	}
	check(second, second, at)
	whole = at
	names(third)
	check(third, second, whole)
	d.forget()
	check(third, second, whole)
	if err := d.CompleteTag(app, "other"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a tag that is not known: %v", err)
	}
}

// What was completed unnoticed is known to be complete when the tag moves on.
func TestLastCompleteIsSeenWhenTheTagMoves(t *testing.T) {
	d := open(t, t.TempDir())
	raw, dgst := content(100)
	first := d.imageOf(t, app, anonymous, ispec.Descriptor{Digest: dgst, Size: 100})
	second := d.imageOf(t, app, anonymous, d.blob(t, app, Confirmation{}))
	if err := d.RenewTag(app, "latest", Validated{Digest: first.Digest, ValidatedAt: anonymous.At}); err != nil {
		t.Fatal(err)
	}
	d.ingest(t, app, raw, dgst, anonymous)
	if err := d.RenewTag(app, "latest", Validated{Digest: second.Digest, ValidatedAt: anonymous.At.Add(time.Hour)}); err != nil {
		t.Fatal(err)
	}
	if got := latest(t, d); got.LastComplete.Digest != first.Digest || !got.LastComplete.ValidatedAt.Equal(anonymous.At) {
		t.Errorf("%+v", got)
	}
}

func TestHasRoom(t *testing.T) {
	d := open(t, t.TempDir())
	if !d.HasRoom(1<<20) || d.HasRoom(1<<30+1) {
		t.Errorf("1 MiB: %v; over capacity: %v", d.HasRoom(1<<20), d.HasRoom(1<<30+1))
	}
	d = bounded(t, t.TempDir(), 1<<62)
	if d.HasRoom(1 << 61) {
		t.Error("more than the disk has")
	}
}
