package storage

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/opencontainers/go-digest"
)

// flip changes one bit of stored content behind the store's back.
func flip(t testing.TB, dir string, dgst digest.Digest) {
	t.Helper()
	name := filepath.Join(dir, "blobs", dgst.Algorithm().String(), dgst.Encoded())
	raw, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	raw[len(raw)/2] ^= 1
	if err := os.WriteFile(name, raw, 0o600); err != nil {
		t.Fatal(err)
	}
}

func TestVerifyFindsAFlippedBit(t *testing.T) {
	dir := t.TempDir()
	d := bounded(t, dir, 1<<30)
	shared, sharedDigest := content(300 << 10)
	layers(t, d, app, "one", shared)
	layers(t, d, other, "two", shared)
	good, goodDigest := content(2000)
	layers(t, d, app, "good", good)
	var last Progress
	r, err := d.Verify(t.Context(), func(p Progress) { last = p })
	if err != nil || len(r.Wrong) > 0 || r.Files != 5 || r.Files != last.AllFiles || r.Bytes != last.AllBytes {
		t.Errorf("before: %+v, %v, %+v", r, err, last)
	}
	flip(t, dir, sharedDigest)
	r, err = d.Verify(t.Context(), func(Progress) {})
	if want := []string{other.String() + ":two", app.String() + ":one"}; err != nil || len(r.Wrong) != 1 ||
		r.Wrong[0].Digest != sharedDigest || !slices.Equal(r.Wrong[0].Images, want) {
		t.Errorf("%+v, %v; want %s of %v", r, err, sharedDigest, want)
	}
	if d.holds(sharedDigest) || !d.holds(goodDigest) {
		t.Error("the wrong one is not quarantined, or the good one is")
	}
	if r, err = d.Verify(t.Context(), func(Progress) {}); err != nil || len(r.Wrong) > 0 || r.Files != 4 {
		t.Errorf("afterwards: %+v, %v", r, err)
	}
}

func TestVerifyTellsOfWhatCannotBeRead(t *testing.T) {
	d := bounded(t, t.TempDir(), 1<<30)
	raw, dgst := content(1000)
	layers(t, d, app, "one", raw)
	d.on(callRead, func(name string) error {
		if filepath.Base(name) == dgst.Encoded() {
			return os.ErrPermission
		}
		return nil
	})
	r, err := d.Verify(t.Context(), func(Progress) {})
	if err != nil || len(r.Unreadable) != 1 || r.Unreadable[0].Digest != dgst || len(r.Wrong) > 0 || !d.holds(dgst) {
		t.Errorf("%+v, %v", r, err)
	}
}

func TestVerifyEndsWithItsContext(t *testing.T) {
	d := bounded(t, t.TempDir(), 1<<30)
	raw, _ := content(4 << 20)
	layers(t, d, app, "one", raw)
	ctx, cancel := context.WithCancel(t.Context())
	_, err := d.Verify(ctx, func(p Progress) {
		if p.Bytes > 2<<20 {
			t.Errorf("%d bytes read after the end", p.Bytes)
		}
		if p.Bytes > 0 {
			cancel()
		}
	})
	if !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
}
