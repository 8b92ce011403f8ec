package storage

import (
	"context"
	"errors"
	"io/fs"
	"slices"
	"time"

	"breakwater/pkg/oci"

	"github.com/opencontainers/go-digest"
	"golang.org/x/time/rate"
)

const (
	// scrubAge is how long ago a file was verified that the scrub verifies again.
	scrubAge = 7 * 24 * time.Hour
	// scrubDelay is how long the scrub leaves a start alone, scrubPause how long it waits between two
	// looks through the store.
	scrubDelay = 10 * time.Second
	scrubPause = time.Hour
	// scrubLook is how many bytes a look at a file counts for that was verified since.
	scrubLook = 512
	// scrubTrouble is how long the scrub waits when the disk does not read. Once a file could not be read
	// a second time, it is the file.
	scrubTrouble = time.Minute
	// maxDamaged bounds what waits for TakeDamaged.
	maxDamaged = 1024
	// maxNeeders bounds the repositories that are named for one content.
	maxNeeders = 8
)

// scrubLoop verifies all of the store over and over, so many bytes a second. How far it has come is in
// the dates of the files.
func (d *Disk) scrubLoop(ctx context.Context, rateLimit int64) {
	limiter := rate.NewLimiter(rate.Limit(rateLimit), checkBuffer)
	for pause := scrubDelay; wait(ctx, pause); pause = scrubPause {
		err := d.eachContent(func(dgst digest.Digest, info fs.FileInfo) error { return d.scrub(ctx, dgst, info, limiter) })
		if err != nil && ctx.Err() == nil {
			d.log.Warn("cannot look through the store to verify it", "err", err)
		}
	}
}

// scrub verifies a file if that is due. Only ctx makes it return an error.
func (d *Disk) scrub(ctx context.Context, dgst digest.Digest, info fs.FileInfo, limiter *rate.Limiter) error {
	for d.Trouble() != nil {
		if !wait(ctx, scrubTrouble) {
			break
		}
	}
	if d.trusts(info) && time.Since(info.ModTime()) <= scrubAge {
		return limiter.WaitN(ctx, scrubLook)
	}
	paced := func(n int64) error { return limiter.WaitN(ctx, int(n)) }
	_, err := d.verifyFile(dgst, scrubAge, paced)
	if errors.Is(err, errUnreadable) {
		d.log.Warn("cannot verify a stored file", "digest", dgst, "err", err)
		if !wait(ctx, scrubTrouble) {
			return ctx.Err()
		}
		if info, err = d.verifyFile(dgst, scrubAge, paced); errors.Is(err, errUnreadable) {
			err = d.condemn(dgst, info, err)
		}
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) && ctx.Err() == nil {
		d.log.Warn("cannot verify a stored file", "digest", dgst, "err", err)
		wait(ctx, scrubTrouble)
	}
	return ctx.Err()
}

// wait returns false if ctx ended it.
func wait(ctx context.Context, d time.Duration) bool {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return true
	case <-ctx.Done():
		return false
	}
}

// eachContent calls do for all that has a stored file's name, in no order.
func (d *Disk) eachContent(do func(dgst digest.Digest, info fs.FileInfo) error) error {
	for algorithm, in := range d.blobs {
		err := in.each(".", func(e fs.DirEntry) error {
			dgst, err := oci.ParseDigest(algorithm.String() + ":" + e.Name())
			if err != nil {
				return nil // not ours
			}
			info, err := in.lstat(e.Name())
			if err != nil {
				return ignoreAbsent(err)
			}
			return do(dgst, info)
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// noteDamage keeps what was found wrong for TakeDamaged.
func (d *Disk) noteDamage(dgst digest.Digest) {
	d.checks.mu.Lock()
	defer d.checks.mu.Unlock()
	if len(d.checks.damaged) < maxDamaged {
		d.checks.damaged[dgst] = true
	}
}

// TakeDamaged returns what was quarantined since the last time, under the repositories that need it or
// that it came from, so that it can be fetched again before anybody asks.
func (d *Disk) TakeDamaged() (blobs, manifests []oci.Reference) {
	d.checks.mu.Lock()
	damaged := d.checks.damaged
	d.checks.damaged = map[digest.Digest]bool{}
	d.checks.mu.Unlock()
	for dgst := range damaged {
		repos, isManifest := d.index.Needers(dgst)
		if repo, ok := d.origin(dgst); ok && !slices.Contains(repos, repo) {
			repos = append(repos, repo)
		}
		for _, repo := range repos {
			if ref := (oci.Reference{Repository: repo, Digest: dgst}); isManifest {
				manifests = append(manifests, ref)
			} else {
				blobs = append(blobs, ref)
			}
		}
	}
	return blobs, manifests
}

// origin is the repository that content was got in first.
func (d *Disk) origin(dgst digest.Digest) (oci.Repository, bool) {
	for _, name := range [...]string{originRecord(dgst), publicRecord(dgst)} {
		var r record
		if d.readRecord(name, &r) != nil {
			continue
		}
		if repo, err := oci.ParseRepository(r.origin().Registry, r.origin().Name); err == nil {
			return repo, true
		}
	}
	return oci.Repository{}, false
}

// Needers are repositories that need content: as an image's, as a manifest of their own, or privately.
func (x *index) Needers(dgst digest.Digest) (repos []oci.Repository, isManifest bool) {
	x.mu.Lock()
	defer x.mu.Unlock()
	i, ok := x.find(dgst)
	if !ok {
		return nil, false
	}
	found := slices.Clone(x.private[i])
	for of, m := range x.manifests {
		if of == i || slices.Contains(m.needs, i) {
			found = append(found, m.repos...)
		}
	}
	for _, r := range found {
		if !slices.Contains(repos, x.repos[r]) && len(repos) < maxNeeders {
			repos = append(repos, x.repos[r])
		}
	}
	return repos, x.manifests[i] != nil
}
