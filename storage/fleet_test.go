package storage

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"breakwater/pkg/oci"

	"github.com/opencontainers/go-digest"
)

// TestAdoptTag: what the fleet has published goes before what is known only if it was confirmed later or, where
// clocks cannot tell, if what is known is the fleet's older word.
func TestAdoptTag(t *testing.T) {
	now := time.Now().UTC().Round(0)
	d := open(t, t.TempDir())
	ours := d.imageOf(t, app, anonymous, d.blob(t, app, anonymous)).Digest
	theirs := d.imageOf(t, app, anonymous, d.blob(t, app, anonymous)).Digest
	ago := func(d time.Duration) time.Time { return now.Add(-d) }
	tests := map[string]struct {
		known  Tag
		at     time.Time
		number uint64
		want   digest.Digest
	}{
		"nothing known":           {Tag{}, ago(time.Hour), 1, theirs},
		"nothing known, future":   {Tag{}, now.Add(time.Hour), 1, theirs},
		"later":                   {Tag{Current: Validated{Digest: ours, ValidatedAt: ago(time.Minute)}}, ago(30 * time.Second), 1, theirs},
		"earlier":                 {Tag{Current: Validated{Digest: ours, ValidatedAt: ago(time.Minute)}}, ago(2 * time.Minute), 1, ours},
		"in the future":           {Tag{Current: Validated{Digest: ours, ValidatedAt: ago(time.Minute)}}, now.Add(time.Minute), 1, ours},
		"ours in the future":      {Tag{Current: Validated{Digest: ours, ValidatedAt: now.Add(time.Hour)}}, ago(time.Minute), 1, theirs},
		"nearly the same":         {Tag{Current: Validated{Digest: ours, ValidatedAt: ago(time.Minute)}}, ago(59 * time.Second), 1, ours},
		"after the fleet's":       {Tag{Current: Validated{Digest: ours, ValidatedAt: ago(time.Minute)}, Published: Published{Digest: ours, Generation: 4}}, ago(61 * time.Second), 5, theirs},
		"long before the fleet's": {Tag{Current: Validated{Digest: ours, ValidatedAt: ago(time.Minute)}, Published: Published{Digest: ours, Generation: 4}}, ago(time.Hour), 5, ours},
		"played again":            {Tag{Current: Validated{Digest: ours, ValidatedAt: ago(time.Minute)}, Published: Published{Digest: ours, Generation: 4}}, ago(time.Second), 3, ours},
	}
	for name, tt := range tests {
		tag := fmt.Sprintf("t%x", digest.FromString(name).Encoded()[:8])
		if tt.known.Current.Digest != "" {
			if err := d.PutTag(app, tag, tt.known); err != nil {
				t.Fatal(err)
			}
		}
		if err := d.AdoptTag(app, tag, Published{Digest: theirs, At: tt.at, Generation: tt.number}, "quay.io"); err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		got, err := d.Tag(app, tag)
		if err != nil || got.Current.Digest != tt.want {
			t.Errorf("%s: %s, %v, want %s", name, got.Current.Digest, err, tt.want)
		}
		if want := max(tt.number, tt.known.Published.Generation); got.Published.Generation != want {
			t.Errorf("%s: generation %d, want %d", name, got.Published.Generation, want)
		}
	}
	absent := Published{Digest: digest.FromString("absent"), At: now, Generation: 1}
	if err := d.AdoptTag(app, "absent", absent, ""); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a tag of what is not stored: %v", err)
	}
}

func TestConfirmed(t *testing.T) {
	d := open(t, t.TempDir())
	public, private := d.blob(t, app, anonymous), d.blob(t, app, secret)
	for _, tt := range []struct {
		repo   oci.Repository
		dgst   digest.Digest
		public bool
		found  bool
	}{
		{app, public.Digest, true, true}, {other, public.Digest, true, true},
		{app, private.Digest, false, true}, {other, private.Digest, false, false},
		{app, digest.FromString("absent"), false, false},
	} {
		c, err := d.Confirmed(tt.repo, tt.dgst)
		if tt.found != (err == nil) || !tt.found && !errors.Is(err, fs.ErrNotExist) || c.Public != tt.public || tt.found && (c.Size != public.Size || c.At.IsZero()) {
			t.Errorf("%s in %s: %+v, %v", tt.dgst, tt.repo, c, err)
		}
	}
}

// TestUnpublished: what was noted outlives the process, what was taken back does not, and what was written by
// half is forgotten.
func TestUnpublished(t *testing.T) {
	dir := t.TempDir()
	d := open(t, dir)
	tag, image := oci.Reference{Repository: app, Tag: "v1"}, oci.Reference{Repository: app, Digest: digest.FromString("image")}
	done := oci.Reference{Repository: other, Tag: "v2"}
	for _, ref := range []oci.Reference{tag, image, done, tag} {
		if err := d.NoteUnpublished(ref); err != nil {
			t.Fatal(err)
		}
	}
	for range 2 {
		if err := d.ForgetUnpublished(done); err != nil {
			t.Fatal(err)
		}
	}
	half := filepath.Join(dir, "unpublished", journalName(done))
	if err := os.WriteFile(half, []byte("quay.io/or"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	d = open(t, dir)
	var found []string
	if err := d.Unpublished(func(ref oci.Reference) { found = append(found, ref.String()) }); err != nil {
		t.Fatal(err)
	}
	slices.Sort(found)
	want := []string{tag.String(), image.String()}
	slices.Sort(want)
	if !slices.Equal(found, want) {
		t.Errorf("%v, want %v", found, want)
	}
	if _, err := os.Stat(half); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("what was written by half: %v", err)
	}
}
