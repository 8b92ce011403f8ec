package s3

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"slices"

	"breakwater/pkg/oci"

	"github.com/opencontainers/go-digest"
)

// mark finds what is needed.
func (c *collection) mark(ctx context.Context, records []listed) error {
	var roots []digest.Digest
	for len(records) > 0 {
		some := records[:min(batch, len(records))]
		records = records[len(some):]
		found := make([]digest.Digest, len(some))
		unsigned := make([]bool, len(some))
		if err := each(ctx, len(some), func(ctx context.Context, i int) (err error) {
			found[i], unsigned[i], err = c.root(ctx, some[i])
			return err
		}); err != nil {
			return err
		}
		for i, dgst := range found {
			if unsigned[i] {
				c.found.Unsigned++
			}
			if l := some[i]; l.kind == tagRecord && l.dgst != "" && l.dgst != dgst && c.over(l.modified) {
				c.signatures[l.dgst] = append(c.signatures[l.dgst], dgst)
				continue
			}
			roots = c.need(roots, dgst)
		}
		c.progress()
	}
	return c.walk(ctx, roots)
}

// need adds a manifest to those that are still to be walked, unless it is known to be needed, or is none.
func (c *collection) need(manifests []digest.Digest, dgst digest.Digest) []digest.Digest {
	if dgst == "" || c.needed[dgst] {
		return manifests
	}
	c.needed[dgst] = true
	return append(manifests, dgst)
}

// markReferring finds what refers to what is needed, which is needed too, and what refers to that.
func (c *collection) markReferring(ctx context.Context, records []listed) error {
	records = slices.DeleteFunc(slices.Clone(records), func(l listed) bool { return l.kind != referringRecord })
	for {
		var roots []digest.Digest
		for subject, by := range c.signatures {
			if !c.needed[subject] {
				continue
			}
			delete(c.signatures, subject)
			for _, dgst := range by {
				roots = c.need(roots, dgst)
			}
		}
		var some []listed
		records = slices.DeleteFunc(records, func(l listed) bool {
			take := c.needed[l.dgst] && len(some) < batch
			if take {
				some = append(some, l)
			}
			return take
		})
		if len(some) == 0 && len(roots) == 0 {
			return nil
		}
		indexes := make([]oci.Manifest, len(some))
		unsigned := make([]bool, len(some))
		if err := each(ctx, len(some), func(ctx context.Context, i int) (err error) {
			indexes[i], unsigned[i], err = c.index(ctx, some[i].name)
			return err
		}); err != nil {
			return err
		}
		for i, index := range indexes {
			if unsigned[i] {
				c.found.Unsigned++
			}
			for _, desc := range index.Manifests {
				roots = c.need(roots, desc.Digest)
			}
		}
		if err := c.walk(ctx, roots); err != nil {
			return err
		}
	}
}

// root returns the manifest that a record needs, "" if it needs none.
func (c *collection) root(ctx context.Context, l listed) (dgst digest.Digest, unsigned bool, err error) {
	switch {
	case l.kind == tagRecord:
		var tag published
		found, unsigned, err := c.record(ctx, l.name, &tag)
		if err != nil || !found {
			return "", false, err
		}
		if unsigned { // nobody vouches for the name, so that it may be a wrong one
			if there, err := c.head(ctx, blobName(tag.Digest)); err != nil || !there.found {
				c.isBroken(l.name, fmt.Errorf("names %s, which is not there, and is not signed by the fleet", tag.Digest))
				return "", true, err
			}
		}
		return tag.Digest, unsigned, nil
	case l.kind == contentRecord && !c.over(l.modified):
		var record content
		found, unsigned, err := c.record(ctx, l.name, &record)
		if err != nil || !found || record.MediaType == "" {
			return "", unsigned, err
		}
		return l.dgst, unsigned, nil
	}
	return "", false, nil
}

// index is what a record tells of who refers to a manifest.
func (c *collection) index(ctx context.Context, name string) (index oci.Manifest, unsigned bool, err error) {
	var r referring
	found, unsigned, err := c.record(ctx, name, &r)
	if err != nil || !found {
		return oci.Manifest{}, false, err
	}
	index, err = oci.ParseManifest("", r.Index, digest.SHA256)
	if err != nil {
		if unsigned {
			c.isBroken(name, fmt.Errorf("tells nothing, and is not signed by the fleet: %w", err))
		}
		return oci.Manifest{}, unsigned, nil // signed, it names nothing
	}
	return index, unsigned, nil
}

// record reads one, and if it is wrong, until it comes twice the same, since what comes may be wrong where what is
// stored is right. What is signed with another key is taken at its word then: the keys may be the wrong ones. Any
// other that stays wrong is broken, and not found.
func (c *collection) record(ctx context.Context, name string, v storable) (found, unsigned bool, err error) {
	var last []byte
	why := errors.New("comes differently each time")
	for i := range 3 {
		rec, err := c.read(ctx, name, "", v)
		if err != nil || rec.wrong == nil {
			return rec.found, false, err
		}
		if i > 0 && bytes.Equal(rec.raw, last) {
			why = rec.wrong
			break
		}
		last = rec.raw
	}
	if errors.Is(why, errOtherKey) {
		_, body, _ := bytes.Cut(last, []byte("\n"))
		if why = json.Unmarshal(body, v); why == nil {
			why = v.check()
		}
	}
	if why != nil {
		c.isBroken(name, why)
		return false, false, nil
	}
	return true, true, nil
}

// isBroken notes an object of which it cannot be told what it needs.
func (c *collection) isBroken(name string, why error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.broken = append(c.broken, fmt.Errorf("%s/%s: %w", c.cfg.Bucket, *c.key(name), why))
}

// walk adds all that these manifests reach.
func (c *collection) walk(ctx context.Context, manifests []digest.Digest) error {
	for len(manifests) > 0 {
		some := manifests[:min(batch, len(manifests))]
		manifests = manifests[len(some):]
		found := make([]oci.Manifest, len(some))
		if err := each(ctx, len(some), func(ctx context.Context, i int) (err error) {
			found[i], err = c.manifest(ctx, some[i])
			return err
		}); err != nil {
			return err
		}
		for _, m := range found {
			for _, desc := range m.Blobs {
				c.needed[desc.Digest] = true
			}
			for _, desc := range m.Manifests {
				manifests = c.need(manifests, desc.Digest)
			}
		}
		c.progress()
	}
	return nil
}

// manifest reads one, and once more if it is not what its digest says; if that stays so, it is broken. What is not
// there, or is no manifest, reaches nothing.
func (c *collection) manifest(ctx context.Context, dgst digest.Digest) (oci.Manifest, error) {
	raw, err := c.bytes(ctx, dgst)
	if errors.Is(err, ErrWrong) {
		raw, err = c.bytes(ctx, dgst)
	}
	switch {
	case errors.Is(err, ErrWrong):
		c.isBroken(blobName(dgst), err)
		return oci.Manifest{}, nil
	case errors.Is(err, fs.ErrNotExist):
		return oci.Manifest{}, nil
	case err != nil:
		return oci.Manifest{}, err
	}
	m, err := oci.ParseManifest("", raw, dgst.Algorithm())
	if err != nil {
		c.log.Warn("not a manifest, though a record names it", "digest", dgst, "err", err)
		return oci.Manifest{}, nil
	}
	return m, nil
}

// bytes reads a blob that is said to be a manifest, no more of it than one may have, if it is what its digest says.
func (c *collection) bytes(ctx context.Context, dgst digest.Digest) ([]byte, error) {
	if c.wrong.has(dgst) { // which Blob says is not there
		return nil, ErrWrong
	}
	body, err := c.Blob(ctx, dgst, 0)
	if err != nil {
		return nil, err
	}
	defer body.Close()
	hash := dgst.Algorithm().Hash()
	hashed := io.TeeReader(body, hash)
	raw, err := io.ReadAll(io.LimitReader(hashed, oci.MaxManifest+1))
	if err != nil {
		return nil, err
	}
	if _, err := io.Copy(io.Discard, hashed); err != nil {
		return nil, err
	}
	if sum := digest.NewDigest(dgst.Algorithm(), hash); sum != dgst {
		return nil, fmt.Errorf("%w: is %s", ErrWrong, sum)
	}
	return raw, nil
}
