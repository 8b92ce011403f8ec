package storage

import (
	"context"
	"errors"
	"io/fs"
	"slices"

	"breakwater/pkg/oci"

	"github.com/opencontainers/go-digest"
)

// Progress is how far a look at everything has come.
type Progress struct {
	Files    int   `json:"files"`
	AllFiles int   `json:"all_files"`
	Bytes    int64 `json:"bytes"`
	AllBytes int64 `json:"all_bytes"`
}

// Report is what a look at everything has found.
type Report struct {
	Files      int     `json:"files"`
	Bytes      int64   `json:"bytes"`
	Wrong      []Wrong `json:"wrong,omitempty"`      // quarantined: it is fetched again when it is asked for
	Unreadable []Wrong `json:"unreadable,omitempty"` // still there, for people to look at
}

// Wrong is stored content that is not what its name says, or cannot be read.
type Wrong struct {
	Digest digest.Digest `json:"digest"`
	Images []string      `json:"images,omitempty"` // tags that need it; repositories, where no tag does
	Reason string        `json:"reason"`
}

// Verify hashes all that is stored, as fast as it can be read. What is wrong is quarantined; what cannot be
// read is left alone, since it may be the whole disk. It ends with ctx, and returns what it has found until
// then.
func (d *Disk) Verify(ctx context.Context, progress func(Progress)) (Report, error) {
	var p Progress
	err := d.eachContent(func(_ digest.Digest, info fs.FileInfo) error {
		p.AllFiles++
		p.AllBytes += info.Size()
		return ctx.Err()
	})
	if err != nil {
		return Report{}, err
	}
	progress(p)
	var r Report
	err = d.eachContent(func(dgst digest.Digest, _ fs.FileInfo) error {
		_, err := d.verifyFile(dgst, -1, func(n int64) error {
			p.Bytes += n
			progress(p)
			return ctx.Err()
		})
		switch {
		case err == nil:
		case errors.Is(err, ErrMismatch), errors.Is(err, errForeign):
			r.Wrong = append(r.Wrong, Wrong{dgst, d.index.Needing(dgst), reason(err)})
		case errors.Is(err, fs.ErrNotExist): // evicted since
			return ctx.Err()
		case errors.Is(err, errUnreadable):
			r.Unreadable = append(r.Unreadable, Wrong{dgst, d.index.Needing(dgst), reason(err)})
		default:
			return err
		}
		p.Files++
		progress(p)
		return ctx.Err()
	})
	r.Files, r.Bytes = p.Files, p.Bytes
	return r, err
}

// reason is what is wrong, without the name of the file.
func reason(err error) string {
	if wrong := new(condemned); errors.As(err, &wrong) {
		return wrong.reason.Error()
	}
	if failed := new(fs.PathError); errors.As(err, &failed) {
		return failed.Err.Error()
	}
	return err.Error()
}

// Needing names the images that need content, by their tags; where they have none, by their repositories.
func (x *index) Needing(dgst digest.Digest) []string {
	x.mu.Lock()
	defer x.mu.Unlock()
	need, ok := x.find(dgst)
	if !ok {
		return nil
	}
	var names []string
	for i, m := range x.manifests {
		if x.nodes[i].bytes == 0 && i != need || !x.reaches(i, need) {
			continue
		}
		for _, key := range m.tags {
			names = append(names, oci.Reference{Repository: key.repo, Tag: key.tag}.String())
		}
		if len(m.tags) == 0 && x.nodes[i].needed == 0 {
			for _, r := range m.repos {
				names = append(names, oci.Reference{Repository: x.repos[r], Digest: x.digest(i)}.String())
			}
		}
	}
	slices.Sort(names)
	return slices.Compact(names)
}
