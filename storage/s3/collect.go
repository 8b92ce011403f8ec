package s3

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/service/s3"
	"github.com/opencontainers/go-digest"
	"golang.org/x/sync/errgroup"
)

const (
	// collectLease is held by the one who deletes.
	collectLease = "collect"
	// deleteLimit is from the last look at an object until its deletion: who renews it while somebody
	// collects looks again after that time.
	deleteLimit = 5 * time.Second
	// batch is after how many requests there is progress; atOnce are under way.
	batch  = 64
	atOnce = 8
	// uploadGrace is for multipart uploads: big ones take long.
	uploadGrace = 24 * time.Hour
)

// Deletion says what Collect does with what nobody needs.
type Deletion int

// What Collect can do.
const (
	DryRun Deletion = iota // counts it
	Delete
)

// CollectOptions are what Collect is told.
type CollectOptions struct {
	Grace    time.Duration // what is younger stays; at least a day
	Delete   Deletion
	Progress func(Collected) // now and then, from the goroutine that has called Collect; nil for none
}

// Collected is what was found, and what of it nobody needs: with [Delete], it was removed.
type Collected struct {
	Objects, Removed    int   // without Unknown
	Bytes, RemovedBytes int64 // of them
	Uploads             int   // multipart uploads that nobody goes on with; aborted with [Delete]
	Unknown             int   // objects that this package has not stored; they stay
	Unsigned            int   // records that other keys have signed: what they name stays too
}

// collection is one run.
type collection struct {
	*Bucket
	opts   CollectOptions
	cutoff time.Time // by the bucket's clock: what was modified later stays
	found  Collected
	needed map[digest.Digest]bool
	// signatures are what old tags name by which something is found that refers to a digest: needed if that is.
	signatures map[digest.Digest][]digest.Digest

	mu     sync.Mutex // guards broken
	broken []error    // objects of which it cannot be told what they need
}

// Collect removes blobs that no tag's record needs, and the records of content that is not needed,
// if they are older than the grace: and leases and uploads that were left. A tag needs its manifest,
// all that it lists, and what is known to refer to those; a manifest with a young record needs the same. A tag
// by which signatures and the like are found (sha256-<hex>.sig) is needed if its subject is, or if it names its
// subject itself.
// Other hosts may go on publishing. It ends, with an error and nothing deleted, if any record or manifest cannot
// be read, or is wrong when it is read a second time: the error names all that are.
func (b *Bucket) Collect(ctx context.Context, opts CollectOptions) (Collected, error) {
	if opts.Grace < minGrace {
		return Collected{}, fmt.Errorf("collect: a grace of %s is less than %s", opts.Grace, minGrace)
	}
	c := &collection{Bucket: b, opts: opts, needed: map[digest.Digest]bool{}, signatures: map[digest.Digest][]digest.Digest{}}
	if opts.Delete == Delete {
		lease, err := b.Lease(ctx, collectLease)
		if err != nil {
			return Collected{}, fmt.Errorf("collect: %w", err)
		}
		defer lease.Release(context.WithoutCancel(ctx))
		ctx = lease.held
	}
	if err := c.run(ctx); err != nil {
		return c.found, fmt.Errorf("collect: %w", err)
	}
	return c.found, nil
}

func (c *collection) run(ctx context.Context) error {
	// The age of all is reckoned from before the first record was read: who has found a blob young
	// enough since has published by then what needs it.
	if _, err := c.head(ctx, versionName); err != nil {
		return err
	}
	c.cutoff = c.clock.now().Add(-c.opts.Grace)
	records, err := c.list(ctx, recordsFolder)
	if err != nil {
		return err
	}
	if err := c.mark(ctx, records); err != nil {
		return err
	}
	if err := c.markReferring(ctx, records); err != nil {
		return err
	}
	if len(c.broken) > 0 {
		return fmt.Errorf("nothing was removed, since it cannot be told what these need. Pull the image through a mirror that does not hold it yet, "+
			"which replaces what is wrong, or delete them by hand, and what only they name goes with them:\n%w", errors.Join(c.broken...))
	}
	for _, folder := range []string{blobsFolder, leasesFolder} {
		more, err := c.list(ctx, folder)
		if err != nil {
			return err
		}
		records = append(records, more...)
	}
	if err := c.sweep(ctx, records); err != nil {
		return err
	}
	return c.sweepUploads(ctx)
}

// listed is an object of a listing.
type listed struct {
	object
	name     string
	size     int64
	modified time.Time
}

func (c *collection) list(ctx context.Context, folder string) ([]listed, error) {
	var all []listed
	pages := s3.NewListObjectsV2Paginator(c.client, &s3.ListObjectsV2Input{Bucket: &c.cfg.Bucket, Prefix: c.key(folder)})
	for pages.HasMorePages() {
		page, err := once(ctx, c.reads, listLimit, func(ctx context.Context) (*s3.ListObjectsV2Output, error) { return pages.NextPage(ctx) })
		if err != nil {
			return nil, fmt.Errorf("list %s: %w", folder, err)
		}
		for _, o := range page.Contents {
			name := strings.TrimPrefix(aws.ToString(o.Key), c.cfg.Prefix)
			l := listed{parseName(name), name, aws.ToInt64(o.Size), aws.ToTime(o.LastModified)}
			if l.kind == unknownObject {
				c.found.Unknown++
				continue
			}
			c.found.Objects++
			c.found.Bytes += l.size
			all = append(all, l)
		}
		c.progress()
	}
	return all, nil
}

func (c *collection) progress() {
	if c.opts.Progress != nil {
		c.opts.Progress(c.found)
	}
}

// over reports whether the grace is over.
func (c *collection) over(modified time.Time) bool { return modified.Before(c.cutoff) }

// sweep removes what is neither needed nor young: records before the blobs that they tell of.
func (c *collection) sweep(ctx context.Context, all []listed) error {
	all = slices.DeleteFunc(all, func(l listed) bool {
		return l.kind == tagRecord && l.dgst == "" || l.kind == versionObject || c.needed[l.dgst] || !c.over(l.modified)
	})
	for len(all) > 0 {
		some := all[:min(batch, len(all))]
		all = all[len(some):]
		removed := make([]bool, len(some))
		err := each(ctx, len(some), func(ctx context.Context, i int) (err error) {
			removed[i], err = c.removeOld(ctx, some[i].name)
			return err
		})
		for i, l := range some {
			if removed[i] {
				c.found.Removed++
				c.found.RemovedBytes += l.size
			}
		}
		c.progress()
		if err != nil {
			return err
		}
	}
	return nil
}

// removeOld looks once more, since somebody may have renewed the object, and reports whether it was
// removed, or would be.
func (c *collection) removeOld(ctx context.Context, name string) (bool, error) {
	if c.opts.Delete == DryRun {
		return true, nil
	}
	ctx, cancel := c.bounded(ctx, deleteLimit)
	defer cancel()
	now, err := c.head(ctx, name)
	if err != nil || !now.found || !c.over(now.modified) {
		return false, err
	}
	if err = c.remove(ctx, name, now.etag); lost(err) {
		return false, nil
	}
	return err == nil, err
}

// remove deletes an object if it is still that one, where the store can tell.
func (b *Bucket) remove(ctx context.Context, name, etag string) error {
	in := &s3.DeleteObjectInput{Bucket: &b.cfg.Bucket, Key: b.key(name), IfMatch: &etag}
	ask := func(ctx context.Context) (*s3.DeleteObjectOutput, error) { return b.client.DeleteObject(ctx, in) }
	_, err := once(ctx, b.writes, headerLimit, ask)
	if status(err) == http.StatusNotImplemented {
		in.IfMatch = nil
		_, err = once(ctx, b.writes, headerLimit, ask)
	}
	if err != nil {
		return fmt.Errorf("delete %s: %w", name, err)
	}
	return nil
}

// sweepUploads aborts multipart uploads that nobody goes on with.
func (c *collection) sweepUploads(ctx context.Context) error {
	old := c.clock.now().Add(-max(c.opts.Grace, uploadGrace))
	pages := s3.NewListMultipartUploadsPaginator(c.client, &s3.ListMultipartUploadsInput{Bucket: &c.cfg.Bucket, Prefix: c.key(blobsFolder)})
	for pages.HasMorePages() {
		page, err := once(ctx, c.reads, listLimit, func(ctx context.Context) (*s3.ListMultipartUploadsOutput, error) { return pages.NextPage(ctx) })
		if err != nil {
			return fmt.Errorf("list uploads: %w", err)
		}
		for _, up := range page.Uploads {
			if aws.ToTime(up.Initiated).After(old) {
				continue
			}
			c.found.Uploads++
			if c.opts.Delete == DryRun {
				continue
			}
			_, err := often(ctx, c.writes, recordLimit, func(ctx context.Context) (*s3.AbortMultipartUploadOutput, error) {
				return c.client.AbortMultipartUpload(ctx, &s3.AbortMultipartUploadInput{Bucket: &c.cfg.Bucket, Key: up.Key, UploadId: up.UploadId})
			})
			if err != nil && !absent(err) {
				return fmt.Errorf("abort an upload: %w", err)
			}
		}
		c.progress()
	}
	return nil
}

// each calls f for 0 … n-1, some at a time, until one fails.
func each(ctx context.Context, n int, f func(context.Context, int) error) error {
	group, ctx := errgroup.WithContext(ctx)
	group.SetLimit(atOnce)
	for i := range n {
		group.Go(func() error {
			if ctx.Err() != nil {
				return context.Cause(ctx)
			}
			return f(ctx, i)
		})
	}
	return group.Wait()
}
