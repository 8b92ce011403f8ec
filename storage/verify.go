package storage

import (
	"context"
	"errors"
	"io/fs"
	"time"

	"breakwater/pkg/oci"

	"github.com/opencontainers/go-digest"
)

// progressStep is how often Verify tells how far it is.
const progressStep = 100 * time.Millisecond

// Progress is how far a Verify has come. What is stored meanwhile can make it more than all.
type Progress struct {
	Files, AllFiles int
	Bytes, AllBytes int64
}

// Report is what a Verify has found.
type Report struct {
	Files      int   // that were hashed
	Bytes      int64 // in them
	Wrong      []Wrong
	Unreadable []Wrong
}

// Wrong is content that is not what its name says, or that the disk does not read.
type Wrong struct {
	Digest digest.Digest
	Images []oci.Reference // a few of those that need it
	Reason string
}

// Verify hashes all that is stored, once, as fast as it can be read. What is wrong is quarantined; what
// cannot be read is told of and left alone, since it may be the whole disk. It calls progress, which may be
// nil, a few times a second, and returns with an error what it has found until then.
func (d *Disk) Verify(ctx context.Context, progress func(Progress)) (Report, error) {
	var r Report
	var p Progress
	said := time.Now()
	say := func() {
		if progress != nil {
			progress(p)
		}
		said = time.Now()
	}
	err := d.eachContent(func(_ digest.Digest, info fs.FileInfo) error {
		p.AllFiles++
		p.AllBytes += info.Size()
		return ctx.Err()
	})
	if err != nil {
		return r, err
	}
	say()
	err = d.eachContent(func(dgst digest.Digest, _ fs.FileInfo) error {
		_, err := d.verifyFile(dgst, -1, func(n int64) error {
			p.Bytes += n
			if time.Since(said) >= progressStep {
				say()
			}
			return ctx.Err()
		})
		switch {
		case err == nil:
		case errors.Is(err, ErrMismatch), errors.Is(err, errForeign):
			r.Wrong = append(r.Wrong, Wrong{dgst, d.index.Images(dgst), err.Error()})
		case errors.Is(err, fs.ErrNotExist):
			return ctx.Err() // evicted since
		case errors.Is(err, errUnreadable):
			r.Unreadable = append(r.Unreadable, Wrong{dgst, d.index.Images(dgst), err.Error()})
		default:
			return err
		}
		p.Files++
		return ctx.Err()
	})
	r.Files, r.Bytes = p.Files, p.Bytes
	say()
	return r, err
}
