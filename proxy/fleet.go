package proxy

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/http/httptrace"
	"slices"
	"time"

	"breakwater/pkg/oci"
	"breakwater/proxy/upstream"
	"breakwater/storage"
	"breakwater/storage/s3"
)

const (
	// sharedName is what answers and logs call the shared store.
	sharedName = "shared store"
	// fleetTime is how long anybody waits for the bucket, in all, where an upstream could be asked instead.
	fleetTime = 2 * time.Second
	// leaseTime is how long of that anybody waits for the leave to ask upstreams for all. It only saves them a
	// question, and a bucket can be slow to write that is quick to read.
	leaseTime = 300 * time.Millisecond
	// followPause is between two looks at what another host of the fleet is fetching, and takePause between two
	// looks whether it still does: those are two requests to the bucket, of which one is a write.
	followPause = 250 * time.Millisecond
	takePause   = time.Second
)

// sharedError is the error of the shared store: all that it costs is that somebody else is asked.
type sharedError struct{ err error }

func (e *sharedError) Error() string { return sharedName + ": " + e.err.Error() }
func (e *sharedError) Unwrap() error { return e.err }

// fleet is what the mirrors of a fleet know together (DESIGN 9): read here, published by its publisher.
type fleet struct {
	m       *Mirror
	bucket  *s3.Bucket
	words   questions[struct{}]
	lag     lag
	publish *publisher
}

// open opens a blob of the bucket from offset on, if the fleet has a record that lets ref's repository read
// it.
func (f *fleet) open(ctx context.Context, ref oci.Reference, offset int64) (*body, error) {
	return f.openBy(ctx, ref, offset, func() (*s3.Body, error) { return f.bucket.Blob(ctx, ref.Digest, s3.Aligned(offset)) })
}

// openBy opens what open reads. The record is asked for at the same time.
func (f *fleet) openBy(ctx context.Context, ref oci.Reference, offset int64, open func() (*s3.Body, error)) (*body, error) {
	type reached struct {
		content s3.Content
		err     error
	}
	record := make(chan reached, 1)
	if !f.m.filling.start(func(life context.Context) {
		r := reached{err: errPanicked}
		defer func() { record <- r }()
		r.content, r.err = f.content(detached{life, ctx}, ref)
	}) {
		return nil, errClosed
	}
	blob, err := open()
	reach := <-record // it ends in time by itself
	if err != nil {
		return nil, &sharedError{err}
	}
	if reach.err == nil && blob.Size != reach.content.Size {
		reach.err = &sharedError{fmt.Errorf("%s is %d bytes long, recorded with %d", ref.Digest, blob.Size, reach.content.Size)}
	}
	if reach.err != nil {
		_ = blob.Close()
		return nil, reach.err
	}
	from := &sharedBody{reach.content.Verified(ref.Digest, blob, offset), f, ref}
	return &body{ReadCloser: from, size: blob.Size, confirmation: f.confirmation(ref.Repository, reach.content)}, nil
}

// sharedBody has the shared store's errors.
type sharedBody struct {
	io.ReadCloser
	fleet *fleet
	ref   oci.Reference
}

func (b *sharedBody) Read(p []byte) (int, error) {
	n, err := b.ReadCloser.Read(p)
	if errors.Is(err, s3.ErrWrong) {
		b.fleet.distrust(b.ref)
	}
	if err != nil && !errors.Is(err, io.EOF) {
		err = &sharedError{err}
	}
	return n, err
}

// content is the record by which a repository reaches what the bucket has.
func (f *fleet) content(ctx context.Context, ref oci.Reference) (s3.Content, error) {
	first := s3.PublicOnly
	if slices.ContainsFunc(f.m.pool.Clients(ref.Registry), func(client *upstream.Client) bool { return !f.m.shares(client, ref.Repository) }) {
		first = s3.PrivateFirst
	}
	content, err := f.bucket.Content(ctx, ref.Repository, ref.Digest, first)
	if err == nil && !content.Public && !f.reaches(ref.Repository, content) {
		content, err = f.bucket.Content(ctx, ref.Repository, ref.Digest, s3.PublicOnly)
	}
	if err == nil && !f.reaches(ref.Repository, content) {
		err = fmt.Errorf("%s is not for %s: %w", ref.Digest, ref.Repository, fs.ErrNotExist)
	}
	if err != nil {
		return content, &sharedError{err}
	}
	return content, nil
}

// reaches reports whether a repository may have what another host has published. Whether it is public is for this
// host's configuration to say, which may have become stricter. What took a credential is for hosts that have one
// for that registry too.
func (f *fleet) reaches(repo oci.Repository, c s3.Content) bool {
	origin := f.confirmation(repo, c)
	if c.Public && f.m.cfg.Load().Shares(origin.Repository, origin.Credential) {
		return true
	}
	return origin.Repository == repo && (origin.Credential == "" || f.hasAccount(repo.Registry))
}

// hasAccount reports whether this host has a credential for the registry.
func (f *fleet) hasAccount(registry string) bool {
	return slices.ContainsFunc(f.m.pool.Clients(registry), func(client *upstream.Client) bool { return client.Credential() != "" })
}

// confirmation is the word of the host that got the content for this repository, or for everybody. A host
// without an account cannot tell what others' accounts make private: it believes them.
func (f *fleet) confirmation(repo oci.Repository, c s3.Content) storage.Confirmation {
	origin := storage.Confirmation{At: c.ConfirmedAt, Upstream: c.Upstream, Credential: c.Credential, Repository: repo}
	if c.Public {
		origin.Repository = c.Repository
		if !f.hasAccount(c.Repository.Registry) {
			origin.Credential = ""
		}
	}
	return origin
}

// manifest fetches and stores a manifest that another host has published.
func (f *fleet) manifest(ctx context.Context, ref oci.Reference) (oci.Manifest, error) {
	ctx, cancel := context.WithTimeout(ctx, fleetTime)
	defer cancel()
	body, err := f.openBy(ctx, ref, 0, func() (*s3.Body, error) { return f.bucket.Manifest(ctx, ref.Digest) })
	if err != nil {
		return oci.Manifest{}, err
	}
	defer body.Close()
	if body.size > oci.MaxManifest {
		return oci.Manifest{}, &sharedError{fmt.Errorf("%s: %d bytes are no manifest", ref.Digest, body.size)}
	}
	raw, err := io.ReadAll(io.LimitReader(body, oci.MaxManifest))
	if err != nil {
		return oci.Manifest{}, err
	}
	manifest, err := oci.ParseManifest("", raw, ref.Digest.Algorithm())
	if err == nil && manifest.Digest != ref.Digest {
		f.distrust(ref)
		err = fmt.Errorf("%s is %s", ref.Digest, manifest.Digest)
	}
	if err != nil {
		return oci.Manifest{}, &sharedError{err}
	}
	f.m.keepManifest(body.confirmation, ref.Repository, manifest)
	return manifest, nil
}

// distrust is for content that is not what its digest says. Once this host has it from elsewhere, the bucket
// gets the right bytes.
func (f *fleet) distrust(ref oci.Reference) {
	f.m.logger.Error("the shared store has wrong bytes", "repository", ref.Repository, "digest", ref.Digest)
	f.bucket.Distrust(ref.Digest)
	f.publish.replace(ref)
}

// word asks the bucket what the fleet's newest record says of a tag, and has that adopted. There is one
// question for all who want to know.
func (f *fleet) word(ref oci.Reference) *question[struct{}] {
	return f.words.join(f.m.asking, ref.String(), func(ctx context.Context) (struct{}, error) {
		ctx, cancel := context.WithTimeout(ctx, fleetTime)
		defer cancel()
		err := f.adopt(ctx, ref)
		if err != nil && !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, s3.ErrOut) {
			f.m.logger.Warn("record of the fleet not adopted", "repository", ref.Repository, "reference", ref.Tag, "err", err)
		}
		return struct{}{}, err
	})
}

// adopt makes the fleet's newest record the stored one, unless what is stored was confirmed later. Its
// manifest is stored first.
func (f *fleet) adopt(ctx context.Context, ref oci.Reference) error {
	published, err := f.bucket.Tag(ctx, ref)
	if err != nil {
		return err
	}
	tag, err := f.m.store.Tag(ref.Repository, ref.Tag)
	if seen := tag.Published; err == nil && (published.Generation < seen.Generation ||
		published.Generation == seen.Generation && !published.ValidatedAt.After(tag.Current.ValidatedAt)) {
		return nil // played again, or nothing new
	}
	named := oci.Reference{Repository: ref.Repository, Digest: published.Digest}
	manifest, err := f.m.store.Peek(named.Repository, named.Digest)
	if err != nil {
		if manifest, err = f.manifest(ctx, named); err != nil {
			return err
		}
	}
	if err := f.m.store.AdoptTag(ref.Repository, ref.Tag, recordOf(published), published.Upstream); err != nil {
		return err
	}
	if tag.Published.Digest != published.Digest {
		f.m.completions.offered(ref.Repository, manifest)
	}
	return nil
}

// recordOf is what the store notes of a record of the fleet's.
func recordOf(published s3.Tag) storage.Published {
	return storage.Published{Digest: published.Digest, At: published.ValidatedAt, Generation: published.Generation}
}

// hear waits for the fleet's word on a tag, for at most fleetTime, or until the upstreams, which are asked at the
// same time, have given theirs.
func (f *fleet) hear(ctx context.Context, ref oci.Reference, upstreams *question[resolution]) {
	ctx, cancel := context.WithTimeout(ctx, fleetTime)
	defer cancel()
	word := f.word(ref)
	select {
	case <-word.done:
		return
	case <-ctx.Done():
		return
	case <-upstreams.done:
	}
	if upstreams.err != nil { // the fleet's word is all that there will be
		_, _ = word.wait(ctx, 0)
	}
}

// leadTag is what another host of the fleet was told of a tag, if that is fresh enough, or will be in a moment
// since another host is asking. If not, the upstreams are to be asked: with a lease, for all of the fleet. None of
// that takes longer than fleetTime, nor counts as time that an upstream takes.
func (f *fleet) leadTag(ctx context.Context, ref oci.Reference, clients []*upstream.Client, want freshness) (resolution, *s3.Lease) {
	defer holdPatience(ctx, fleetTime)()
	ctx, cancel := context.WithTimeout(detached{ctx, context.Background()}, fleetTime) // without the upstreams' trace
	defer cancel()
	var answer resolution
	known := func() bool {
		manifest, tag := f.m.storedTag(ref)
		if want.met(tag.Current.ValidatedAt) {
			answer = resolution{manifest: manifest, at: tag.Current.ValidatedAt, told: true, durable: true}
		}
		return answer.told
	}
	come := func() bool {
		f.bucket.Forget(ref) // what is remembered may be old
		return f.adopt(ctx, ref) == nil && known()
	}
	_, _ = f.word(ref).wait(ctx, 0)
	if known() || tagsOut(clients) {
		return answer, nil
	}
	following, stop := context.WithTimeout(ctx, f.m.cfg.Load().Shared.Wait.Duration)
	defer stop()
	for {
		lease, err := f.claim(ctx, ref.String(), leaseTime)
		if lease != nil && come() {
			f.release(lease)
			return answer, nil
		}
		if !errors.Is(err, s3.ErrHeld) || f.follow(following, come) || following.Err() != nil {
			return answer, lease
		}
	}
}

// offers reports whether an image that a tag names can be had from the bucket.
func (f *fleet) offers(tag oci.Reference, m oci.Manifest) bool {
	if f == nil || f.bucket.Health().Reads.Open {
		return false
	}
	known, err := f.m.store.Tag(tag.Repository, tag.Tag)
	return err == nil && known.Published.Digest == m.Digest
}

// fetch opens a fill's blob as the fleet has it: nil if it does not have it, and late if it takes its time. If
// nobody else of the fleet is about to fetch it, this host does so for all of them.
func (f *fleet) fetch(ctx context.Context, fill *fill, shared []*source) (o *opening, late bool) {
	for _, src := range shared {
		come := func() bool {
			o = f.begin(ctx, fill, src)
			late = o.isLate(ctx, fleetTime)
			return late || o.err == nil
		}
		if come() {
			return o, late
		}
		if !errors.Is(o.err, fs.ErrNotExist) {
			continue
		}
		lease, came := f.lead(ctx, src.ref.Digest.String(), time.Now(), come)
		if came {
			return o, late
		}
		if lease != nil {
			f.publish.upload(fill, src.ref, lease)
		}
		return nil, false // other repositories' records would not be there sooner
	}
	return nil, false
}

// overtaken is for a blob that an upstream has brought while the bucket still took its time.
func (f *fleet) overtaken(o *opening) {
	o.drop()
	if d := f.lag.note(); d > 0 {
		f.m.logger.Warn("the shared store is slow: upstreams are asked for blobs first", "repository", o.src.ref.Repository, "digest", o.src.ref.Digest, "duration", d)
	}
}

// lead waits while another host of the fleet is doing something, until come says that it is done, for at most
// the configuration's shared.wait. It was last found not to be then. It returns a lease if this host is to do
// it, whatever it is; nil if nobody else is known to. The caller releases it.
func (f *fleet) lead(ctx context.Context, name string, looked time.Time, come func() bool) (*s3.Lease, bool) {
	following, stop := context.WithTimeout(ctx, f.m.cfg.Load().Shared.Wait.Duration)
	defer stop()
	for ; ; looked = time.Now() {
		lease, err := f.claim(ctx, name, fleetTime)
		if lease != nil && time.Since(looked) > followPause && come() {
			f.release(lease)
			return nil, true
		}
		if !errors.Is(err, s3.ErrHeld) {
			return lease, false
		}
		if f.follow(following, come) {
			return nil, true
		}
		if following.Err() != nil {
			return nil, false
		}
	}
}

// claim takes a lease. It is s3.ErrHeld if another host has it. One that takes longer than the limit, or than ctx
// lasts, is given back when it comes, and none is asked for while the bucket is out.
func (f *fleet) claim(ctx context.Context, name string, limit time.Duration) (*s3.Lease, error) {
	if health := f.bucket.Health(); health.Reads.Open || health.Writes.Open {
		return nil, s3.ErrOut
	}
	type claimed struct {
		lease *s3.Lease
		err   error
	}
	taken := make(chan claimed)
	waiting, leave := context.WithTimeout(ctx, limit)
	defer leave()
	if !f.m.sharing.start(func(life context.Context) { // it is held for longer than anybody waits
		lease, err := f.bucket.Lease(life, name)
		select {
		case taken <- claimed{lease, err}:
		case <-waiting.Done():
			f.release(lease)
		}
	}) {
		return nil, errClosed
	}
	select {
	case c := <-taken:
		return c.lease, c.err
	case <-waiting.Done():
		return nil, context.Cause(waiting)
	}
}

// follow looks if something has come that another host is about, for takePause or until ctx ends.
func (f *fleet) follow(ctx context.Context, come func() bool) bool {
	ctx, cancel := context.WithTimeout(ctx, takePause)
	defer cancel()
	for ctx.Err() == nil {
		select {
		case <-time.After(followPause):
		case <-ctx.Done():
		}
		if come() {
			return true
		}
		completed(ctx)
	}
	return false
}

// completed notes that whoever is waited for has done something.
func completed(ctx context.Context) {
	if trace := httptrace.ContextClientTrace(ctx); trace != nil && trace.GotFirstResponseByte != nil {
		trace.GotFirstResponseByte()
	}
}

// release gives a lease back, behind.
func (f *fleet) release(lease *s3.Lease) {
	if lease == nil {
		return
	}
	f.m.sharing.start(func(ctx context.Context) {
		ctx, cancel := context.WithTimeout(ctx, headerBudget)
		defer cancel()
		lease.Release(ctx)
	})
}
