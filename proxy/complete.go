package proxy

import (
	"cmp"
	"context"
	"errors"
	"net/http"
	"slices"
	"sync"
	"time"

	"breakwater/pkg/config"
	"breakwater/pkg/oci"

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
	fetched, err := c.m.askManifest(ref).wait(ctx, 0)
	return fetched.content, err
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
	if c.m.fleet != nil {
		c.m.fleet.publish.image(p.ref)
	}
	for root := range c.rootsOf(p.ref) {
		if root.Tag == "" {
			continue
		}
		if err := c.m.store.CompleteTag(root.Repository, root.Tag); err != nil {
			c.m.logger.Debug("tag not noted as complete", "repository", root.Repository, "reference", root.Tag, "err", err)
		}
		if c.m.fleet != nil {
			c.m.fleet.publish.tag(root, nil)
		}
	}
	answer, err := c.m.store.Answer(p.ref.Repository, referrersPath(p.ref.Digest))
	return fetched || err != nil || time.Since(answer.ValidatedAt) > refreshTime
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
