package storage

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
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

// Verify hashes all that is stored, and quarantines what is wrong. It ends with ctx.
func (d *Disk) Verify(ctx context.Context, progress func(Progress)) (Report, error) {
	var p Progress
	var all []digest.Digest
	for algorithm, in := range d.blobs {
		err := in.each(".", func(e fs.DirEntry) error {
			info, err := in.lstat(e.Name())
			if dgst, perr := oci.ParseDigest(algorithm.String() + ":" + e.Name()); err == nil && perr == nil && info.Mode().IsRegular() {
				all = append(all, dgst)
				p.AllBytes += info.Size()
			}
			return ctx.Err()
		})
		if err != nil {
			return Report{}, err
		}
	}
	slices.Sort(all)
	p.AllFiles = len(all)
	progress(p)
	var r Report
	buffer := make([]byte, 1<<20)
	for _, dgst := range all {
		wrong, err := d.verify(ctx, dgst, buffer, func(n int) {
			p.Bytes += int64(n)
			progress(p)
		})
		found := Wrong{Digest: dgst, Images: d.index.Needing(dgst)}
		switch {
		case ctx.Err() != nil:
			return r, ctx.Err()
		case errors.Is(err, fs.ErrNotExist): // gone since it was counted
		case err != nil:
			found.Reason = err.Error()
			r.Unreadable = append(r.Unreadable, found)
		case wrong != nil:
			found.Reason = wrong.Error()
			r.Wrong = append(r.Wrong, found)
			d.Quarantine(dgst, wrong)
		}
		p.Files++
		progress(p)
	}
	r.Files, r.Bytes = p.Files, p.Bytes
	return r, nil
}

// verify says what is wrong with stored content, or why it cannot be told.
func (d *Disk) verify(ctx context.Context, dgst digest.Digest, buffer []byte, read func(n int)) (wrong, err error) {
	file, _, err := d.openFile(d.blobs[dgst.Algorithm()], dgst.Encoded())
	if err != nil {
		return nil, err
	}
	defer file.Close()
	hash := dgst.Algorithm().Hash()
	for ctx.Err() == nil {
		n, err := d.read(file, buffer)
		hash.Write(buffer[:n])
		read(n)
		if errors.Is(err, io.EOF) {
			if got := digest.NewDigest(dgst.Algorithm(), hash); got != dgst {
				return fmt.Errorf("is %s", got), nil
			}
			return nil, nil
		}
		if err != nil {
			if reason := new(os.PathError); errors.As(err, &reason) {
				err = reason.Err // its name is said already
			}
			return nil, err
		}
	}
	return nil, ctx.Err()
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
		if x.nodes[i].bytes == 0 || !x.reaches(i, need) {
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
