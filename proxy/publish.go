package proxy

import (
	"context"
	"errors"
	"io/fs"
	"sync"
	"sync/atomic"
	"time"

	"breakwater/pkg/oci"
	"breakwater/storage"
	"breakwater/storage/s3"
)

const (
	maxUnpublished = 100_000 // beyond them the oldest is dropped; its next pull brings it back
	publishers     = 3       // at a time
	maxUploads     = 2       // blobs at a time that are uploaded while they arrive
	// An unchanged tag is published so often, by whichever host of the fleet comes first.
	republishEvery = time.Minute
	// What could not be published is tried again after publishPause, and after twice as long each time after
	// that, up to maxPublishPause, for publishFor.
	publishPause    = 5 * time.Second
	maxPublishPause = 10 * time.Minute
	publishFor      = 24 * time.Hour
	// knownFor is how long what was found in the bucket is believed to be there: half of the time for which
	// gc leaves alone what has just been looked at.
	knownFor = 6 * time.Hour
	// gatePause is between two looks whether the bucket takes something again.
	gatePause = time.Second
)

// errIncomplete says that something of an image is not stored yet: a new host that heard of it would not get
// it whole.
var errIncomplete = errors.New("not complete yet")

// errContested says that another host has published something else of a tag at about the same time.
var errContested = errors.New("another host was told otherwise")

// publisher writes to the shared store what this host knows and the fleet does not: blobs first, then
// manifests, then the tag's record, so that a record never names what is not there. All of it goes on behind;
// what waits is in a journal on the disk too, and outlives the process.
type publisher struct {
	*fleet
	wake    chan struct{} // there is something new
	uploads slots
	dropped atomic.Int64

	mu      sync.Mutex // guards what follows
	waiting map[oci.Reference]*publication
	queue   publications
	journal journal
	known   map[oci.Reference]time.Time // what is in the bucket, and when it was last seen to be
	asked   map[oci.Reference]bool      // manifests of which upstreams have said who refers to them
}

func newPublisher(f *fleet) *publisher {
	return &publisher{fleet: f, wake: make(chan struct{}, publishers), uploads: make(slots, maxUploads),
		waiting: map[oci.Reference]*publication{}, journal: newJournal(),
		known: map[oci.Reference]time.Time{}, asked: map[oci.Reference]bool{}}
}

// start takes up what the last process has left, and publishes until the mirror closes.
func (p *publisher) start() {
	p.m.sharing.start(p.bucket.Probe)
	p.m.sharing.start(func(ctx context.Context) {
		p.readJournal()
		for range publishers {
			p.m.sharing.start(p.run)
		}
		p.runJournal(ctx)
	})
}

// tag has the record of a tag published that an upstream has just confirmed, unless the fleet knows. The
// lease, if there is one, is released then.
func (p *publisher) tag(ref oci.Reference, lease *s3.Lease) {
	if p.m.cfg.Load().Shared.ReadOnly {
		return
	}
	tag, err := p.m.store.Tag(ref.Repository, ref.Tag)
	known := tag.Current.Digest == tag.Published.Digest
	future := func(t time.Time) bool { return time.Until(t) > storage.ClockTolerance } // which says nothing
	lately := !future(tag.Published.At) && tag.Current.ValidatedAt.Sub(tag.Published.At) < republishEvery-storage.ClockTolerance
	if err != nil || future(tag.Current.ValidatedAt) || known && lately {
		p.release(lease)
		return
	}
	if known { // a renewal, which is not worth a file
		p.add(ref, lease)
		return
	}
	p.addLasting(ref, lease)
}

// image has a manifest published with all that it needs, unless the fleet has it. ref is by digest.
func (p *publisher) image(ref oci.Reference) {
	if p.m.cfg.Load().Shared.ReadOnly || p.isKnown(ref) {
		return
	}
	p.addLasting(ref, nil)
}

// replace has content published again that the bucket has wrong.
func (p *publisher) replace(ref oci.Reference) {
	p.mu.Lock()
	delete(p.known, ref)
	p.mu.Unlock()
	if !p.m.cfg.Load().Shared.ReadOnly {
		p.add(ref, nil)
	}
}

// write publishes a tag or a manifest.
func (p *publisher) write(ctx context.Context, ref oci.Reference) error {
	if ref.Digest != "" {
		if err := p.writeImage(ctx, ref); err != nil {
			return err
		}
		return p.writeReferring(ctx, ref)
	}
	tag, err := p.m.store.Tag(ref.Repository, ref.Tag)
	if errors.Is(err, fs.ErrNotExist) {
		return nil // evicted since
	}
	if err != nil {
		return err
	}
	if err := p.writeImage(ctx, oci.Reference{Repository: ref.Repository, Digest: tag.Current.Digest}); err != nil {
		return err
	}
	published, err := p.bucket.PutTag(ctx, ref, s3.Tag{Digest: tag.Current.Digest, ValidatedAt: tag.Current.ValidatedAt,
		Upstream: tag.Current.Upstream, Generation: tag.Published.Generation})
	if err != nil {
		return err
	}
	if published.Digest != tag.Current.Digest {
		if err := p.adopt(ctx, ref); err != nil {
			return err
		}
		if now, err := p.m.store.Tag(ref.Repository, ref.Tag); err == nil && now.Current == tag.Current {
			return errContested
		}
		return nil
	}
	return p.m.store.AdoptTag(ref.Repository, ref.Tag, recordOf(published), published.Upstream)
}

// writeImage publishes a manifest, and what it needs before it.
func (p *publisher) writeImage(ctx context.Context, ref oci.Reference) error {
	if p.isKnown(ref) {
		return nil
	}
	manifest, err := p.m.store.Peek(ref.Repository, ref.Digest)
	if errors.Is(err, fs.ErrNotExist) { // a blob by itself, or not here yet
		if err = p.writeContent(ctx, ref, ""); errors.Is(err, fs.ErrNotExist) {
			err = errIncomplete
		}
		return err
	}
	if err != nil {
		return err
	}
	images := p.m.store.Images(ref.Repository, manifest)
	if !p.m.store.Complete(ref.Repository, ref.Digest) {
		return errIncomplete
	}
	for _, image := range images {
		for _, desc := range image.Blobs {
			err := p.writeContent(ctx, oci.Reference{Repository: ref.Repository, Digest: desc.Digest}, "")
			if errors.Is(err, fs.ErrNotExist) && len(p.m.store.Missing(ref.Repository, image)) == 0 {
				continue // of foreign origin: nobody stores it
			}
			if err != nil {
				return err
			}
		}
		if image.Digest == manifest.Digest {
			continue
		}
		if err := p.writeContent(ctx, oci.Reference{Repository: ref.Repository, Digest: image.Digest}, image.MediaType); err != nil {
			return err
		}
	}
	return p.writeContent(ctx, ref, manifest.MediaType)
}

// writeContent publishes a blob or, with a media type, a manifest.
func (p *publisher) writeContent(ctx context.Context, ref oci.Reference, mediaType string) error {
	if p.isKnown(ref) {
		return nil
	}
	blob, err := p.m.store.Blob(ref.Repository, ref.Digest)
	if err != nil {
		return err
	}
	defer blob.Close()
	if err := p.bucket.PutBlob(ctx, ref.Digest, blob.Size(), blob); err != nil {
		return err
	}
	return p.writeRecord(ctx, ref, mediaType)
}

// writeRecord publishes how content is reached that the bucket has.
func (p *publisher) writeRecord(ctx context.Context, ref oci.Reference, mediaType string) error {
	reach, err := p.m.store.Confirmed(ref.Repository, ref.Digest)
	if err != nil {
		return err
	}
	blob, err := p.m.store.Blob(ref.Repository, ref.Digest)
	if err != nil {
		return err
	}
	defer blob.Close()
	err = p.bucket.PutContent(ctx, ref.Repository, ref.Digest, s3.Content{Size: reach.Size, MediaType: mediaType, ConfirmedAt: reach.At,
		Upstream: reach.Upstream, Credential: reach.Credential, Repository: reach.Repository, Public: reach.Public}, blob)
	if err != nil {
		return err
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	remember(p.known, ref, time.Now())
	return nil
}

func (p *publisher) isKnown(ref oci.Reference) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	at, ok := p.known[ref]
	return ok && time.Since(at) < knownFor
}

// upload writes a blob to the bucket while a fill brings it, so that other hosts of the fleet, which know by
// the lease that it comes, need not ask an upstream.
func (p *publisher) upload(f *fill, ref oci.Reference, lease *s3.Lease) {
	select {
	case p.uploads <- struct{}{}:
	default: // it goes with its image; whoever saw the lease would wait for nothing
		p.release(lease)
		return
	}
	if !p.m.sharing.start(func(ctx context.Context) {
		defer p.uploads.leave()
		defer p.release(lease)
		if err := p.follow(ctx, f, ref); err != nil && ctx.Err() == nil {
			p.m.logger.Debug("blob not published while it came", "repository", ref.Repository, "digest", ref.Digest, "err", err)
		}
	}) {
		p.uploads.leave()
		p.release(lease)
	}
}

// follow uploads what a fill brings.
func (p *publisher) follow(ctx context.Context, f *fill, ref oci.Reference) error {
	select {
	case <-f.ready:
	case <-ctx.Done():
		return ctx.Err()
	}
	ingest, err := f.outcome(ref.Repository)
	if err != nil || ingest == nil || ingest.Size() < 0 {
		return err
	}
	blob, err := ingest.Open(ctx)
	if err != nil {
		return err
	}
	defer blob.Close()
	if err := p.bucket.Upload(ctx, ref.Digest, ingest.Size(), blob); err != nil {
		return err
	}
	select {
	case <-f.over:
		return p.writeRecord(ctx, ref, "")
	case <-ctx.Done():
		return ctx.Err()
	}
}

// count is how much waits to be published.
func (p *publisher) count() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return len(p.waiting)
}
