package proxy

import (
	"cmp"
	"context"
	"errors"
	"net/http"
	"slices"
	"strings"
	"sync"
	"time"

	"breakwater/pkg/config"
	"breakwater/pkg/oci"
	"breakwater/proxy/upstream"

	"github.com/opencontainers/go-digest"
	ispec "github.com/opencontainers/image-spec/specs-go/v1"
)

const (
	maxPending   = 1000             // images being completed; beyond them the one that has waited longest goes
	maxHurried   = 32               // of them ahead of clients at a time
	aheadAtOnce  = 3                // fills of one image ahead of a client
	idleTime     = 10 * time.Second // without a blob request: nobody is pulling the image any more
	retryTime    = time.Minute      // until what could not be had is tried again
	giveUpTime   = 24 * time.Hour   // of trying
	recheckTime  = time.Minute      // in which an image that was found complete is not looked at again
	refreshTime  = 24 * time.Hour   // after which what refers to a complete image is asked for again
	maxNoted     = 10_000           // entries of each thing that is remembered
	maxReferring = 64               // manifests that refer to one image
)

// Why an image is not completed now, though nothing has failed.
var (
	errLater   = errors.New("goes on behind")
	errHurry   = errors.New("a client is pulling it")
	errSpent   = errors.New("the day's bytes are spent")
	errNoRoom  = errors.New("no room in the store")
	errRefused = errors.New("not to be completed any more")
)

// completions fetch what is missing of images, so that an outage finds them whole (DESIGN 6): a client
// never asks for a layer that it has already. An image whose manifest or config a client gets is
// hurried, ahead of the client; once nobody is pulling it, what is left goes on behind, one fill at a
// time for the whole mirror. The fills are the clients' own. They also remember what no upstream had.
type completions struct {
	m     *Mirror
	slots chan struct{} // one for each image that is hurried
	wake  chan struct{} // there is something new in the queue

	mu       sync.Mutex // guards what follows, and what a completion says it does
	pending  map[oci.Reference]*completion
	queue    []*completion                   // behind, the oldest first
	asked    map[oci.Reference]time.Time     // blobs: when a client last asked for them, while any image is pending
	configs  map[oci.Reference]digest.Digest // config blobs: the manifest that names them
	roots    map[oci.Reference]digest.Digest // tags and indexes: what they named when a client last asked
	whole    map[oci.Reference]time.Time     // images: when they were found complete
	failures map[oci.Reference]error         // blobs and manifests that no upstream had, and that none has given since
	day      time.Time                       // since when spent has been
	spent    int64
}

// completion is one image being completed.
type completion struct {
	ref  oci.Reference // its manifest, by digest; never an index
	done chan struct{} // closed once it is complete, or given up
	hail chan struct{} // holds one if a client has come since

	// completions.mu guards these.
	since   time.Time              // when it was begun
	touched time.Time              // when a client last asked for its manifest or config
	failed  time.Time              // when something of it was first not to be had, in the last try
	due     time.Time              // not tried before
	busy    bool                   // somebody is at it; otherwise it is in the queue
	keep    bool                   // the configuration wants it
	tags    map[oci.Reference]bool // that are answered by an older image because of it
	fetched bool                   // something of it was missing
}

// urgent reports whether it is always hurried, and tried again by itself.
func (p *completion) urgent() bool { return p.keep || len(p.tags) > 0 }

// haste tells who is at it behind that it is wanted sooner.
func (p *completion) haste() {
	select {
	case p.hail <- struct{}{}:
	default:
	}
}

func newCompletions(m *Mirror) *completions {
	return &completions{
		m:        m,
		slots:    make(chan struct{}, maxHurried),
		wake:     make(chan struct{}, 1),
		pending:  map[oci.Reference]*completion{},
		asked:    map[oci.Reference]time.Time{},
		configs:  map[oci.Reference]digest.Digest{},
		roots:    map[oci.Reference]digest.Digest{},
		whole:    map[oci.Reference]time.Time{},
		failures: map[oci.Reference]error{},
	}
}

// remember adds to a map that is begun anew when it is full: what is lost is asked for again.
func remember[V any](m map[oci.Reference]V, ref oci.Reference, v V) {
	if len(m) >= maxNoted {
		clear(m)
	}
	m[ref] = v
}

// served is told of each manifest that a client got and that may have something missing.
func (c *completions) served(method string, ref oci.Reference, m oci.Manifest) {
	image := oci.Reference{Repository: ref.Repository, Digest: m.Digest}
	c.mu.Lock()
	defer c.mu.Unlock()
	if ref.Tag != "" || m.IsIndex() {
		remember(c.roots, ref, m.Digest)
	}
	if m.IsIndex() {
		return // which of its images is wanted, nobody can tell yet
	}
	if len(m.Blobs) > 0 {
		remember(c.configs, oci.Reference{Repository: ref.Repository, Digest: m.Blobs[0].Digest}, m.Digest)
	}
	if method == http.MethodGet { // not HEAD: whoever asks what a tag names need not want the image
		c.pulled(image)
	}
}

// blobAsked is told of each request for a blob.
func (c *completions) blobAsked(method string, ref oci.Reference) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if len(c.pending) > 0 {
		remember(c.asked, ref, time.Now())
	}
	if image, ok := c.configs[ref]; ok && method == http.MethodGet {
		c.pulled(oci.Reference{Repository: ref.Repository, Digest: image})
	}
}

// pulled begins to complete an image that a client is pulling. The lock is held.
func (c *completions) pulled(image oci.Reference) {
	now := time.Now()
	if at, ok := c.whole[image]; ok && now.Sub(at) < recheckTime || c.m.cfg.Load().Completion.Images != config.CompleteAll {
		return
	}
	p := c.at(image)
	if p == nil {
		return
	}
	p.touched = now
	switch {
	case p.busy:
		p.haste()
	case now.Sub(p.failed) >= retryTime: // else it is tried again soon, and the client tries by itself
		c.hurry(p)
	}
}

// at is the completion of an image, a new one if there is none; nil if there are too many that cannot wait.
// The lock is held.
func (c *completions) at(image oci.Reference) *completion {
	if p := c.pending[image]; p != nil {
		return p
	}
	if len(c.pending) >= maxPending {
		if len(c.queue) == 0 {
			return nil
		}
		c.leave(c.queue[0])
	}
	p := &completion{ref: image, done: make(chan struct{}), hail: make(chan struct{}, 1), since: time.Now(), tags: map[oci.Reference]bool{}}
	c.pending[image] = p
	return p
}

// leave forgets a completion. The lock is held.
func (c *completions) leave(p *completion) {
	c.unqueue(p)
	if c.pending[p.ref] == p {
		delete(c.pending, p.ref)
	}
	select {
	case <-p.done:
	default:
		close(p.done)
	}
}

func (c *completions) unqueue(p *completion) {
	c.queue = slices.DeleteFunc(c.queue, func(q *completion) bool { return q == p })
}

// enqueue has it done behind. The lock is held.
func (c *completions) enqueue(p *completion) {
	p.busy = false
	c.queue = append(c.queue, p)
	select {
	case c.wake <- struct{}{}:
	default:
	}
}

// hurry has it done ahead. The lock is held.
func (c *completions) hurry(p *completion) {
	c.unqueue(p)
	p.busy = true
	if time.Until(p.due) > retryTime {
		p.due = time.Time{} // what was spent behind does not concern it
	}
	if !c.m.asking.start(func(ctx context.Context) { c.runAhead(ctx, p) }) {
		c.leave(p)
	}
}

// runAhead completes an image at once.
func (c *completions) runAhead(ctx context.Context, p *completion) {
	for {
		if !c.sleepUntilDue(ctx, p) {
			return
		}
		select {
		case c.slots <- struct{}{}:
		case <-ctx.Done():
			return
		}
		err := c.fetchAhead(ctx, p)
		<-c.slots
		if err == nil && c.complete(p) {
			err = errLater // what refers to it
		}
		if !c.settle(ctx, p, err) {
			return
		}
	}
}

func (c *completions) sleepUntilDue(ctx context.Context, p *completion) bool {
	c.mu.Lock()
	left := time.Until(p.due)
	c.mu.Unlock()
	if left <= 0 {
		return ctx.Err() == nil
	}
	due := time.NewTimer(left)
	defer due.Stop()
	select {
	case <-due.C:
		return true
	case <-ctx.Done():
		return false
	}
}

// fetchAhead fetches what is missing, a few blobs at a time. Those after the first to fail are tried all
// the same, but not waited for beyond its next try.
func (c *completions) fetchAhead(ctx context.Context, p *completion) error {
	manifest, missing, err := c.missing(ctx, p)
	if err != nil {
		return err
	}
	ended := make(chan error, len(missing))
	var failed, later error
	var again <-chan time.Time
	for under := 0; ; {
		for len(missing) > 0 && under < aheadAtOnce {
			if c.idle(p, manifest.Blobs) {
				missing, later = nil, errLater
				break
			}
			desc := missing[0]
			started := c.m.asking.start(func(ctx context.Context) {
				err := errPanicked
				defer func() { ended <- err }()
				err = c.fill(ctx, p, desc, ahead)
			})
			if !started {
				return errClosed
			}
			missing = missing[1:]
			under++
		}
		if under == 0 {
			return cmp.Or(failed, later)
		}
		select {
		case err := <-ended:
			if under--; err != nil && failed == nil {
				failed, again = err, time.After(retryTime)
				c.mu.Lock()
				p.failed = time.Now()
				c.mu.Unlock()
			}
		case <-again:
			return failed
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// idle reports whether no client is pulling the image any more.
func (c *completions) idle(p *completion, blobs []ispec.Descriptor) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	last := p.touched
	for _, desc := range blobs {
		if at := c.asked[oci.Reference{Repository: p.ref.Repository, Digest: desc.Digest}]; at.After(last) {
			last = at
		}
	}
	return !p.urgent() && time.Since(last) >= idleTime
}

// missing is the image's manifest, which is fetched if need be, and what it lacks.
func (c *completions) missing(ctx context.Context, p *completion) (oci.Manifest, []ispec.Descriptor, error) {
	c.mu.Lock()
	urgent := p.urgent()
	p.failed = time.Time{}
	c.mu.Unlock()
	if c.m.cfg.Load().Completion.Images != config.CompleteAll && !urgent {
		return oci.Manifest{}, nil, errRefused
	}
	manifest, err := c.manifest(ctx, p.ref)
	if err != nil {
		return manifest, nil, err
	}
	c.m.expected.note(p.ref.Repository, manifest)
	missing := c.m.store.Missing(p.ref.Repository, manifest)
	c.mu.Lock()
	defer c.mu.Unlock()
	p.fetched = p.fetched || len(missing) > 0
	return manifest, missing, nil
}

func (c *completions) manifest(ctx context.Context, ref oci.Reference) (oci.Manifest, error) {
	manifest, err := c.m.store.Peek(ref.Repository, ref.Digest)
	if err == nil {
		return manifest, nil
	}
	return c.m.askManifest(ref).wait(ctx, 0)
}

// fill has one blob stored. Its error is an *upstream.Error if no upstream has it.
func (c *completions) fill(ctx context.Context, p *completion, desc ispec.Descriptor, u urgency) error {
	if !c.m.store.HasRoom(desc.Size) {
		return errNoRoom
	}
	ref := oci.Reference{Repository: p.ref.Repository, Digest: desc.Digest}
	f, err := c.m.joinFill(ref, u)
	if err != nil {
		return err
	}
	var hail <-chan struct{}
	if u == behind {
		hail = p.hail
	}
	select {
	case <-f.over:
		return c.m.cameTo(f, ref)
	case <-hail:
		return errHurry
	case <-ctx.Done():
		return ctx.Err()
	}
}

// cameTo is nil if a fill that is over has brought its blob to ref's repository, or else why not.
func (m *Mirror) cameTo(f *fill, ref oci.Reference) error {
	blob, err := m.store.Blob(ref.Repository, ref.Digest)
	if err == nil {
		return blob.Close()
	}
	if _, none := f.outcome(ref.Repository); none != nil {
		return none
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, src := range f.sources { // it broke off when readers had been let in
		if src.ref == ref && src.err != nil {
			err = src.err
		}
	}
	return err
}

// filled is called when a fill is over, whoever began it.
func (c *completions) filled(f *fill) {
	defer close(f.over)
	if c.m.asking.ctx.Err() != nil {
		return // what was cut says nothing
	}
	f.mu.Lock()
	sources, ingest := slices.Clone(f.sources), f.ingest
	f.mu.Unlock()
	for i, src := range sources {
		if slices.ContainsFunc(sources[:i], func(s *source) bool { return s.ref == src.ref }) {
			continue
		}
		err := c.m.cameTo(f, src.ref)
		c.tried(src.ref, err)
		if i == 0 && err == nil && ingest != nil && f.pace.began < wanted {
			c.m.metrics.completionBytes.Add(float64(ingest.Size()))
		}
	}
}

// tried notes what became of fetching a blob or a manifest at all its upstreams.
func (c *completions) tried(ref oci.Reference, err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if up := new(upstream.Error); errors.As(err, &up) || errors.Is(err, context.DeadlineExceeded) {
		remember(c.failures, ref, err)
	} else if err == nil {
		delete(c.failures, ref)
	}
}

// complete notes that nothing is missing of an image, and reports whether what refers to it is.
func (c *completions) complete(p *completion) bool {
	c.mu.Lock()
	remember(c.whole, p.ref, time.Now())
	select {
	case <-p.done:
	default:
		close(p.done)
	}
	fetched := p.fetched
	c.mu.Unlock()
	for root := range c.rootsOf(p.ref) {
		if root.Tag == "" {
			continue
		}
		if err := c.m.store.CompleteTag(root.Repository, root.Tag); err != nil {
			c.m.logger.Debug("tag not noted as complete", "repository", root.Repository, "reference", root.Tag, "err", err)
		}
	}
	answer, err := c.m.store.Answer(p.ref.Repository, referrersPath(p.ref.Digest))
	return fetched || err != nil || time.Since(answer.ValidatedAt) > refreshTime
}

// rootsOf are the tags and indexes, as clients have lately asked for them, by which an image is reached,
// each with what it named.
func (c *completions) rootsOf(image oci.Reference) map[oci.Reference]digest.Digest {
	near := map[oci.Reference]digest.Digest{}
	c.mu.Lock()
	for root, named := range c.roots {
		if root.Repository == image.Repository {
			near[root] = named
		}
	}
	c.mu.Unlock()
	for root, named := range near {
		if !c.reaches(root.Repository, named, image.Digest) {
			delete(near, root)
		}
	}
	return near
}

// reaches reports whether a manifest is the image, or an index that lists it.
func (c *completions) reaches(repo oci.Repository, named, image digest.Digest) bool {
	if named == image {
		return true
	}
	index, err := c.m.store.Peek(repo, named)
	return err == nil && slices.ContainsFunc(index.Manifests, func(desc ispec.Descriptor) bool { return desc.Digest == image })
}

// settle decides how it goes on, and reports whether the caller has to try again when it is due.
func (c *completions) settle(ctx context.Context, p *completion, err error) (again bool) {
	if err != nil {
		c.dropMovedTags(p)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	now := time.Now()
	switch {
	case err == nil, errors.Is(err, errRefused), errors.Is(err, errClosed), ctx.Err() != nil:
		c.leave(p)
		return false
	case errors.Is(err, errLater):
		c.enqueue(p)
		return false
	case errors.Is(err, errHurry):
		c.hurry(p)
		return false
	case errors.Is(err, errSpent):
		p.due = c.day.Add(24 * time.Hour)
	case now.Sub(p.since) > giveUpTime && !p.keep:
		c.leave(p)
		return false
	default:
		if p.failed.IsZero() {
			p.failed = now
		}
		p.due = p.failed.Add(retryTime)
		c.m.metrics.completionFailures.Inc()
		c.m.logger.Debug("image not completed", "repository", p.ref.Repository, "digest", p.ref.Digest, "err", err)
	}
	if p.urgent() {
		return true
	}
	c.enqueue(p)
	return false
}

// dropMovedTags forgets the tags that name something else by now. One that nobody but those wanted is
// given up.
func (c *completions) dropMovedTags(p *completion) {
	c.mu.Lock()
	tags := make([]oci.Reference, 0, len(p.tags))
	for tag := range p.tags {
		tags = append(tags, tag)
	}
	c.mu.Unlock()
	for _, tag := range tags {
		record, err := c.m.store.Tag(tag.Repository, tag.Tag)
		if err != nil || !c.reaches(tag.Repository, record.Current.Digest, p.ref.Digest) {
			c.mu.Lock()
			if delete(p.tags, tag); !p.urgent() {
				p.since = time.Time{}
			}
			c.mu.Unlock()
		}
	}
}

// runBehind completes what nobody is pulling any more, until ctx ends.
func (c *completions) runBehind(ctx context.Context) {
	for ctx.Err() == nil {
		p, due := c.next()
		if p == nil {
			c.await(ctx, due)
			continue
		}
		if c.settle(ctx, p, c.fetchBehind(ctx, p)) { // it has become urgent meanwhile
			c.mu.Lock()
			c.hurry(p)
			c.mu.Unlock()
		}
	}
}

// next takes what is due out of the queue, or says when something will be: zero is never.
func (c *completions) next() (*completion, time.Time) {
	c.mu.Lock()
	defer c.mu.Unlock()
	var first time.Time
	for _, p := range c.queue {
		if !p.due.After(time.Now()) {
			c.unqueue(p)
			p.busy = true
			select {
			case <-p.hail: // of before
			default:
			}
			return p, time.Time{}
		}
		if first.IsZero() || p.due.Before(first) {
			first = p.due
		}
	}
	return nil, first
}

// await waits until something new is in the queue, or that time has come.
func (c *completions) await(ctx context.Context, due time.Time) {
	var timer <-chan time.Time
	if !due.IsZero() {
		t := time.NewTimer(time.Until(due))
		defer t.Stop()
		timer = t.C
	}
	select {
	case <-timer:
	case <-c.wake:
	case <-ctx.Done():
	}
}

// fetchBehind fetches what is missing of an image, one blob after the other, and what refers to it.
func (c *completions) fetchBehind(ctx context.Context, p *completion) error {
	_, missing, err := c.missing(ctx, p)
	if err != nil {
		return err
	}
	if err := c.trickle(ctx, p, missing); err != nil {
		return err
	}
	if !c.complete(p) {
		return nil
	}
	return c.fetchReferring(ctx, p)
}

// trickle fetches blobs behind. Those after the first that no upstream has are tried all the same.
func (c *completions) trickle(ctx context.Context, p *completion, blobs []ispec.Descriptor) error {
	var failed error
	for _, desc := range blobs {
		if !c.affords(desc.Size) {
			return errSpent
		}
		err := c.fill(ctx, p, desc, behind)
		if up := new(upstream.Error); err != nil && !errors.As(err, &up) {
			return err
		}
		if err == nil {
			c.spend(desc.Size)
		} else if failed == nil {
			failed = err
		}
	}
	return failed
}

// affords reports whether the day's bytes are enough for so many more.
func (c *completions) affords(n int64) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if time.Since(c.day) >= 24*time.Hour {
		c.day, c.spent = time.Now(), 0
	}
	return c.spent+n <= c.m.cfg.Load().Completion.BytesPerDay.Bytes
}

func (c *completions) spend(n int64) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.spent += n
}

// referringTags are how signatures, attestations and SBOMs are named by those who know of no referrers
// API: sha256-<hex>.sig is cosign's.
var referringTags = [...]string{".sig", ".att", ".sbom"}

// fetchReferring stores the answers to who refers to an image, or to an index that it was reached by, and
// what they name. Only an outage is an error.
func (c *completions) fetchReferring(ctx context.Context, p *completion) error {
	subjects := []digest.Digest{p.ref.Digest}
	for _, named := range c.rootsOf(p.ref) {
		if !slices.Contains(subjects, named) {
			subjects = append(subjects, named)
		}
	}
	for _, subject := range subjects {
		referring, err := c.referring(ctx, p.ref.Repository, subject)
		if err != nil {
			return err
		}
		for _, dgst := range referring {
			manifest, err := c.manifest(ctx, oci.Reference{Repository: p.ref.Repository, Digest: dgst})
			if err == nil {
				c.m.expected.note(p.ref.Repository, manifest)
				err = c.trickle(ctx, p, c.m.store.Missing(p.ref.Repository, manifest))
			}
			if err != nil && isOutage(err) {
				return err
			}
		}
	}
	return nil
}

// isOutage reports whether an error leaves open if the thing exists, or is our own.
func isOutage(err error) bool {
	up := new(upstream.Error)
	return !errors.As(err, &up) || up.Outage()
}

// referring are the manifests that refer to one, by the API and by tags.
func (c *completions) referring(ctx context.Context, repo oci.Repository, subject digest.Digest) ([]digest.Digest, error) {
	t := target{kind: kindReferrers, ref: oci.Reference{Repository: repo, Digest: subject}}
	answer, err := c.m.askList(t, referrersPath(subject), c.m.askReferrers).wait(ctx, 0)
	if err != nil && isOutage(err) {
		return nil, err
	}
	var referring []digest.Digest
	if index, err := oci.ParseManifest("", answer.Body, digest.SHA256); err == nil {
		for _, desc := range index.Manifests[:min(len(index.Manifests), maxReferring)] {
			referring = append(referring, desc.Digest)
		}
	}
	for _, suffix := range referringTags {
		tag := oci.Reference{Repository: repo, Tag: strings.Replace(subject.String(), ":", "-", 1) + suffix}
		if !oci.ValidTag(tag.Tag) {
			continue // of a sha512
		}
		resolved, err := c.m.questionTag(tag).wait(ctx, 0)
		switch {
		case err == nil:
			referring = append(referring, resolved.manifest.Digest)
		case isOutage(err):
			return nil, err
		}
	}
	return referring, nil
}

// outOfReach is why the image that a tag names cannot be had whole: a blob or manifest of it that no
// upstream has given, or that blobs are out at all of them; nil if it may be had. What has failed is then
// tried again, for as long as the tag names it.
func (c *completions) outOfReach(tag oci.Reference, m oci.Manifest) error {
	out := c.m.blobsOut(tag.Registry)
	c.mu.Lock()
	failures := len(c.failures)
	c.mu.Unlock()
	if failures == 0 && out == nil {
		return nil
	}
	images := slices.DeleteFunc(c.m.store.Images(tag.Repository, m), func(image oci.Manifest) bool { return len(c.m.store.Missing(tag.Repository, image)) == 0 })
	c.mu.Lock()
	defer c.mu.Unlock()
	why := out
	failed := func(desc ispec.Descriptor) bool {
		err := c.failures[oci.Reference{Repository: tag.Repository, Digest: desc.Digest}]
		if err != nil {
			why = err
		}
		return err != nil
	}
	for _, image := range images {
		if slices.ContainsFunc(image.Blobs, failed) || out != nil {
			c.retryFor(tag, image.Digest)
		}
	}
	for _, desc := range m.Manifests {
		if failed(desc) {
			c.retryFor(tag, desc.Digest)
		}
	}
	return why
}

// retryFor tries an image again until it is complete or the tag has moved on. The lock is held.
func (c *completions) retryFor(tag oci.Reference, image digest.Digest) {
	p := c.at(oci.Reference{Repository: tag.Repository, Digest: image})
	if p == nil || p.tags[tag] {
		return
	}
	p.tags[tag] = true
	if p.busy {
		p.haste()
		return
	}
	if p.due.IsZero() { // it has failed a moment ago
		p.due = time.Now().Add(retryTime)
	}
	c.hurry(p)
}

// blobsOut is why none of a registry's upstreams gives blobs, nil if one may.
func (m *Mirror) blobsOut(registry string) error {
	var out error
	for _, client := range m.pool.Clients(registry) {
		health := client.Health()
		blobs := health[len(health)-1]
		switch {
		case blobs.State == "open":
			out = &upstream.Error{Upstream: client.Upstream(), Class: blobs.Class, Reason: blobs.Reason, State: blobs.State, Since: blobs.Since}
		case time.Until(blobs.HeldUntil) > 0:
			out = &upstream.Error{Upstream: client.Upstream(), Class: blobs.Class, Kind: upstream.Throttled, Reason: "asked us to wait"}
		default:
			return nil
		}
	}
	return out
}

// count is how many images are being completed or wait for it.
func (c *completions) count() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return len(c.pending)
}

// hold has a kept image completed, and returns what is closed once it is, or has been given up.
func (c *completions) hold(image oci.Reference) <-chan struct{} {
	c.mu.Lock()
	defer c.mu.Unlock()
	p := c.at(image)
	if p == nil {
		return nil
	}
	p.keep = true
	if p.busy {
		p.haste()
	} else {
		c.hurry(p)
	}
	return p.done
}

// release lets go of an image that is not kept any more.
func (c *completions) release(image oci.Reference) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if p := c.pending[image]; p != nil {
		p.keep = false
	}
}
