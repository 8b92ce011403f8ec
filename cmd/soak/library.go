package main

import (
	"context"
	"fmt"
	"math/rand/v2"
	"sync"
	"time"

	"breakwater/pkg/registrytest"

	"github.com/opencontainers/go-digest"
)

// latest is the tag of each repository that moves.
const latest = "latest"

// perRepository is how many images a repository gets, one after the other.
const perRepository = 5

// image is one that upstreams may have.
type image struct {
	registrytest.Image
	repo string
	tag  string // that never moves
	next *image // that takes the tag latest from it; nil for the last
	// at is when each upstream was given it, zero for not yet. The library's mu guards it.
	at [upstreamCount]time.Time
}

// library is all that there is to pull, and which upstream has had what since when.
type library struct {
	images   []*image // in the order in which they appear
	first    int      // how many are there from the start: one of each repository
	blobs    map[digest.Digest][]byte
	byDigest map[digest.Digest]*image
	random   *rand.Rand // the appearing images' own
	extras   uint64

	mu       sync.RWMutex // guards what follows, and the images' at
	released int          // of images: at least one upstream has each of those
}

// newLibrary makes n images. Those of a repository share their first layer.
func newLibrary(n int, seed uint64) *library {
	random := rand.New(rand.NewPCG(seed, 1))
	l := &library{blobs: map[digest.Digest][]byte{}, byDigest: map[digest.Digest]*image{}, random: random, first: n / perRepository}
	layer := func() []byte {
		return registrytest.Layer(random.Uint64(), 4<<10<<random.IntN(10)+random.IntN(4<<10)) // 4 KiB to 2 MiB
	}
	bases := make([][]byte, l.first)
	for i := range bases {
		bases[i] = layer()
	}
	for i := range n {
		layers := [][]byte{bases[i%l.first]}
		for range 1 + random.IntN(2) {
			layers = append(layers, layer())
		}
		img := &image{Image: registrytest.NewImage(layers...), repo: fmt.Sprintf("soak/app%d", i%l.first), tag: fmt.Sprintf("v%d", i/l.first)}
		if i >= l.first {
			l.images[i-l.first].next = img
		}
		l.images = append(l.images, img)
		l.know(img)
	}
	return l
}

func (l *library) know(img *image) {
	l.byDigest[img.Digest()] = img
	for _, blob := range img.Blobs {
		l.blobs[blob.Digest] = blob.Bytes
	}
}

// extra is a new image that this upstream alone has. It must not be called while clients pull.
func (l *library) extra(u *upstream) *image {
	l.extras++
	img := &image{Image: registrytest.NewImage(registrytest.Layer(l.extras<<32, 512<<10)), repo: "soak/extra", tag: fmt.Sprintf("x%d", l.extras)}
	l.know(img)
	l.publish(u, img)
	return img
}

// publish gives an image to an upstream, where it is the latest of its repository then.
func (l *library) publish(u *upstream, img *image) {
	l.mu.Lock()
	img.at[u.index] = time.Now()
	l.mu.Unlock()
	u.registry.Push(img.repo, img.tag, img.Image)
	u.registry.PutManifest(img.repo, latest, img.MediaType, img.Raw)
}

// release lets clients ask for the first n images.
func (l *library) release(n int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.released = n
}

// appear publishes the images that are not there from the start, one by one: first at any upstream,
// a little later at the others. So there is always something that is not stored, and something that
// upstreams disagree about.
func (l *library) appear(ctx context.Context, upstreams []*upstream, length time.Duration) {
	gap := length * 9 / 10 / time.Duration(max(1, len(l.images)-l.first))
	var copying sync.WaitGroup
	defer copying.Wait()
	for n := l.first; n < len(l.images) && wait(ctx, gap); n++ {
		for i, at := range l.random.Perm(upstreamCount) {
			// Below the time until the repository's next image, so that no copy turns the tag back.
			lag := time.Duration(l.random.Int64N(int64(gap) * int64(l.first) / 2))
			if i == 0 {
				l.publish(upstreams[at], l.images[n])
				continue
			}
			copying.Go(func() {
				wait(ctx, lag) // the last ones at once: everything is everywhere in the end
				l.publish(upstreams[at], l.images[n])
			})
		}
		l.release(n + 1)
	}
}

// pick is an image that can be asked for: half of the time one of the newest.
func (l *library) pick(random *rand.Rand) *image {
	l.mu.RLock()
	defer l.mu.RUnlock()
	if newest := min(l.released, 8); random.IntN(2) == 0 {
		return l.images[l.released-1-random.IntN(newest)]
	}
	return l.images[random.IntN(l.released)]
}

// was reports whether an image has ever been what a tag names.
func (l *library) was(img *image, repo, tag string) bool {
	l.mu.RLock()
	defer l.mu.RUnlock()
	return img != nil && img.repo == repo && (tag == latest || tag == img.tag) && img.at != [upstreamCount]time.Time{}
}

// isSince reports whether at some time since then, or still, an upstream has named the image by a tag.
func (l *library) isSince(img *image, tag string, then time.Time) bool {
	l.mu.RLock()
	defer l.mu.RUnlock()
	for i, at := range img.at {
		if !at.IsZero() && (tag != latest || img.next == nil || img.next.at[i].IsZero() || img.next.at[i].After(then)) {
			return true
		}
	}
	return false
}
