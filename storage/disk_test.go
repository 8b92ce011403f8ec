package storage

import (
	"bytes"
	"crypto/rand"
	"encoding/json"
	"errors"
	"flag"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"breakwater/pkg/oci"

	"github.com/opencontainers/go-digest"
	"go.uber.org/goleak"
)

var (
	app       = oci.Repository{Registry: "quay.io", Name: "org/app"}
	other     = oci.Repository{Registry: "localhost:5000", Name: "org/app"}
	anonymous = Confirmation{At: time.Date(2017, 7, 26, 8, 0, 0, 0, time.UTC), Upstream: "https://quay.io"}
	secret    = Confirmation{At: anonymous.At, Upstream: "https://quay.io", Credential: "k1"}
)

func TestMain(m *testing.M) {
	if dir := os.Getenv(crashDir); dir != "" {
		writeUntilKilled(dir)
	}
	_ = flag.Set("rapid.checks", "12") // each syncs hundreds of times; -rapid.checks=100 was run too
	goleak.VerifyTestMain(m)
}

func open(t testing.TB, dir string) *Disk {
	t.Helper()
	d, err := Open(Config{Dir: dir, Capacity: 1 << 30})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := d.Close(); err != nil && !errors.Is(err, os.ErrClosed) {
			t.Error(err)
		}
	})
	return d
}

// on has f called ahead of each such call, to make it fail.
func (d *Disk) on(c call, f func(name string) error) {
	fault := func(made, name string) error {
		if made != string(c) {
			return nil
		}
		return f(name)
	}
	d.fault.Store(&fault)
}

func content(size int) ([]byte, digest.Digest) {
	raw := make([]byte, size)
	_, _ = rand.Read(raw)
	return raw, digest.FromBytes(raw)
}

// image returns the manifest of an image with one layer of random bytes.
func image(t testing.TB) (oci.Manifest, []byte) {
	t.Helper()
	layer, dgst := content(1000)
	raw, err := json.Marshal(map[string]any{"schemaVersion": 2, "layers": []any{map[string]any{
		"mediaType": "application/vnd.oci.image.layer.v1.tar", "digest": dgst, "size": len(layer)}}})
	if err != nil {
		t.Fatal(err)
	}
	m, err := oci.ParseManifest("", raw, digest.SHA256)
	if err != nil {
		t.Fatal(err)
	}
	return m, layer
}

func store(t testing.TB, d *Disk, repo oci.Repository, raw []byte, c Confirmation) digest.Digest {
	t.Helper()
	dgst := digest.FromBytes(raw)
	in, err := d.Ingest(repo, dgst, int64(len(raw)))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := in.Write(raw); err != nil {
		t.Fatal(err)
	}
	if err := commit(in, c); err != nil {
		t.Fatal(err)
	}
	return dgst
}

func wantBlob(t testing.TB, d *Disk, repo oci.Repository, want []byte) {
	t.Helper()
	b, err := d.Blob(repo, digest.FromBytes(want))
	if err != nil {
		t.Fatal(err)
	}
	defer b.Close()
	if got, err := io.ReadAll(b); err != nil || !bytes.Equal(got, want) || b.Size() != int64(len(want)) {
		t.Fatalf("%d bytes of %d, %v", len(got), len(want), err)
	}
}

func wantAbsent(t testing.TB, d *Disk, repo oci.Repository, dgst digest.Digest) {
	t.Helper()
	b, err := d.Blob(repo, dgst)
	if !errors.Is(err, fs.ErrNotExist) {
		t.Fatalf("blob %s in %s: %v, want fs.ErrNotExist", dgst, repo, err)
	}
	if b != nil {
		t.Fatal("a blob with an error")
	}
}

func TestStoredIsThereAfterReopen(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "a", "b")
	d := open(t, dir)
	m, layer := image(t)
	tag := Tag{Current: Validated{m.Digest, time.Now(), "https://quay.io"}}
	store(t, d, app, layer, anonymous)
	if err := d.PutManifest(app, m, anonymous); err != nil {
		t.Fatal(err)
	}
	if err := d.PutTag(app, "latest", tag); err != nil {
		t.Fatal(err)
	}
	check := func(d *Disk) {
		t.Helper()
		wantBlob(t, d, app, layer)
		wantBlob(t, d, app, m.Raw)
		got, err := d.Manifest(app, m.Digest)
		if err != nil || !bytes.Equal(got.Raw, m.Raw) || got.MediaType != m.MediaType || len(got.Blobs) != 1 {
			t.Fatalf("%+v, %v", got, err)
		}
		record, err := d.Tag(app, "latest")
		if err != nil || record.Current.Digest != m.Digest || !record.Current.ValidatedAt.Equal(tag.Current.ValidatedAt) {
			t.Fatalf("%+v, %v", record, err)
		}
		if _, err := d.Tag(app, "none"); !errors.Is(err, fs.ErrNotExist) {
			t.Fatal(err)
		}
	}
	check(d)
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	check(open(t, dir))
	_ = filepath.WalkDir(dir, func(path string, e fs.DirEntry, err error) error {
		if info, ierr := e.Info(); err != nil || ierr != nil || info.Mode().Perm()&0o077 != 0 {
			t.Errorf("%s: %v %v %v", path, info.Mode(), err, ierr)
		}
		return nil
	})
}

func TestF68SecondProcessRefuses(t *testing.T) {
	dir := t.TempDir()
	d := open(t, dir)
	_, err := Open(Config{Dir: dir})
	if err == nil || !strings.Contains(err.Error(), dir) || !strings.Contains(err.Error(), strconv.Itoa(os.Getpid())) {
		t.Fatalf("%v, want the folder and the holder", err)
	}
	raw, _ := content(10)
	store(t, d, app, raw, anonymous) // the first is not disturbed
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	wantBlob(t, open(t, dir), app, raw)
}
