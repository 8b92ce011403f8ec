package storage

import (
	"errors"
	"fmt"
	"io/fs"
	"strings"
	"time"

	"breakwater/pkg/oci"

	"github.com/opencontainers/go-digest"
	ispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// Peek is Manifest for those who only look: no pull is noted.
func (d *Disk) Peek(repo oci.Repository, dgst digest.Digest) (oci.Manifest, error) {
	m, err := d.manifest(manifestKey{repo, dgst})
	if err != nil {
		return oci.Manifest{}, fmt.Errorf("manifest %s@%s: %w", repo, dgst, err)
	}
	return m, nil
}

// Images are the image manifests of m that this repository reaches: m itself or, of an index, those of
// its manifests that are stored.
func (d *Disk) Images(repo oci.Repository, m oci.Manifest) []oci.Manifest {
	if !m.IsIndex() {
		return []oci.Manifest{m}
	}
	var images []oci.Manifest
	for _, desc := range m.Manifests {
		child, err := d.manifest(manifestKey{repo, desc.Digest})
		if err == nil && !child.IsIndex() {
			images = append(images, child)
		}
	}
	return images
}

// Missing are the blobs of an image manifest that this repository cannot read from the store: not
// stored, of another size than the manifest says, or not confirmed here. Each is named once. What
// registries are not required to have, layers of foreign origin, is never missing.
func (d *Disk) Missing(repo oci.Repository, m oci.Manifest) []ispec.Descriptor {
	var missing []ispec.Descriptor
	looked := map[digest.Digest]bool{}
	for _, desc := range m.Blobs {
		if looked[desc.Digest] || foreign(desc) {
			continue
		}
		looked[desc.Digest] = true
		if !d.hasBlob(repo, desc) {
			missing = append(missing, desc)
		}
	}
	return missing
}

// foreign reports whether a layer may be had elsewhere only (image-spec, "Non-Distributable Layers",
// and Docker's schema 2).
func foreign(desc ispec.Descriptor) bool {
	return strings.Contains(desc.MediaType, ".foreign.") || strings.Contains(desc.MediaType, ".nondistributable.")
}

func (d *Disk) hasBlob(repo oci.Repository, desc ispec.Descriptor) bool {
	if d.leaves(desc.Digest) {
		return false // also if its file is still there
	}
	info, err := d.blobs[desc.Digest.Algorithm()].lstat(desc.Digest.Encoded())
	if err != nil || !info.Mode().IsRegular() || info.Size() != desc.Size {
		return false
	}
	r, _, err := d.reach(repo, desc.Digest)
	return err == nil && r.Size == desc.Size
}

// Complete reports whether the manifest is stored with all that a pull of it needs: of an image, every
// blob; of an index, at least one image, and every image that is stored.
func (d *Disk) Complete(repo oci.Repository, dgst digest.Digest) bool {
	m, err := d.manifest(manifestKey{repo, dgst})
	if err != nil {
		return false
	}
	images := d.Images(repo, m)
	for _, image := range images {
		if len(d.Missing(repo, image)) > 0 {
			return false
		}
	}
	return len(images) > 0
}

// RenewTag notes what an upstream has just said that a tag names, by the rules of PutTag. What it named
// before is its last complete image from now on, if that is complete and the new one is not.
func (d *Disk) RenewTag(repo oci.Repository, tag string, current Validated) error {
	return d.renewTag(repo, tag, current, func(*Tag) bool { return true })
}

// ClockTolerance is how far a time may be ahead of the clock and be taken for now: another host's was told to
// the second.
const ClockTolerance = 2 * time.Second

// AdoptTag notes what the fleet has published of a tag, and has it renewed by that if it was confirmed later
// than what is known here. Where the clocks cannot tell, a record goes before an older one, and what an
// upstream has told this host before what it has told another. A time in the future says nothing, and is taken
// only if nothing is known.
func (d *Disk) AdoptTag(repo oci.Repository, tag string, p Published, upstream string) error {
	p.At = p.At.UTC().Round(0)
	return d.renewTag(repo, tag, Validated{Digest: p.Digest, ValidatedAt: p.At, Upstream: upstream}, func(t *Tag) bool {
		latest := time.Now().Add(ClockTolerance)
		known, before := t.Current, t.Published
		if p.Generation >= before.Generation {
			t.Published = p
		}
		switch {
		case known.Digest == "":
			return true
		case p.At.After(latest) || p.Generation < before.Generation:
			return false
		case known.ValidatedAt.After(latest):
			return true
		case known.Digest == p.Digest:
			return p.At.After(known.ValidatedAt)
		case known.Digest == before.Digest && p.Generation > before.Generation:
			return p.At.After(known.ValidatedAt.Add(-ClockTolerance))
		}
		return p.At.After(known.ValidatedAt.Add(ClockTolerance))
	})
}

// renewTag makes current what a tag names, if the tag as it stands then is to be renewed.
func (d *Disk) renewTag(repo oci.Repository, tag string, current Validated, renew func(*Tag) bool) error {
	before, err := d.Tag(repo, tag)
	if err != nil {
		before = Tag{}
	}
	wasWhole := before.LastComplete.Digest == before.Current.Digest
	moved := before.Current.Digest != current.Digest
	whole := !moved && wasWhole || d.Complete(repo, current.Digest)
	wasWhole = wasWhole || moved && d.Complete(repo, before.Current.Digest)
	return d.updateTag(repo, tag, func(t *Tag) {
		if !renew(t) {
			return
		}
		if wasWhole && t.Current.Digest == before.Current.Digest {
			t.LastComplete = t.Current
		}
		t.Current = current
		if whole || t.LastComplete.Digest == current.Digest {
			t.LastComplete = current
		}
	})
}

// CompleteTag notes that the image that a tag names has been completed, if that is so.
func (d *Disk) CompleteTag(repo oci.Repository, tag string) error {
	found, err := d.Tag(repo, tag)
	if err != nil || found.LastComplete.Digest == found.Current.Digest || !d.Complete(repo, found.Current.Digest) {
		return err
	}
	return d.updateTag(repo, tag, func(t *Tag) {
		if t.Current.Digest == found.Current.Digest {
			t.LastComplete = t.Current
		}
	})
}

// updateTag changes a record that nobody else changes meanwhile.
func (d *Disk) updateTag(repo oci.Repository, tag string, change func(*Tag)) error {
	key := tagKey{repo, tag}
	mu := d.writers.of(key.record())
	mu.Lock()
	defer mu.Unlock()
	t, err := d.tag(key)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	change(&t)
	return d.putTag(key, t)
}

// HasRoom reports whether n more bytes can be taken in, if need be in the place of what was pulled least
// recently.
func (d *Disk) HasRoom(n int64) bool {
	return n <= d.capacity && (d.lacks(n) > 0 || d.free() >= n)
}
