package main

import (
	"context"
	"fmt"
	"math/rand/v2"
	"sync"
	"time"

	"breakwater/pkg/oci"
	"breakwater/pkg/registrytest"

	"github.com/opencontainers/go-digest"
)

// What there is to pull: a tag of each of so many repositories, of which the first moves while all is well.
const (
	tagCount  = 5
	moving    = "app0"
	tagName   = "latest"
	moves     = 3
	layerSize = 24 << 10
)

// library is all that there is to pull, and what the fleet has published of it.
type library struct {
	tags   []oci.Reference
	random *rand.Rand

	mu        sync.Mutex // guards what follows
	images    map[digest.Digest]registrytest.Image
	pushed    map[string][]naming // by tag: what upstream has named, in order
	published map[string][]naming // by tag: what the fleet's record has named, in order
}

// naming is what a tag names since then.
type naming struct {
	digest digest.Digest
	since  time.Time
}

func newLibrary(seed uint64) *library {
	l := &library{random: rand.New(rand.NewPCG(seed, 1)), images: map[digest.Digest]registrytest.Image{},
		pushed: map[string][]naming{}, published: map[string][]naming{}}
	for i := range tagCount {
		l.tags = append(l.tags, oci.Reference{Repository: oci.Repository{Registry: registryName, Name: fmt.Sprintf("fleet/app%d", i)}, Tag: tagName})
	}
	return l
}

// push has the upstream name a new image of these layers by a tag.
func (l *library) push(u *upstream, tag oci.Reference, sizes ...int) registrytest.Image {
	var layers [][]byte
	l.mu.Lock()
	for _, size := range sizes {
		layers = append(layers, registrytest.Layer(l.random.Uint64(), size))
	}
	l.mu.Unlock()
	image := registrytest.NewImage(layers...)
	l.mu.Lock()
	l.images[image.Digest()] = image
	l.pushed[tag.String()] = append(l.pushed[tag.String()], naming{image.Digest(), time.Now()})
	l.mu.Unlock()
	u.registry.Push(tag.Name, tag.Tag, image)
	return image
}

// move moves a tag now and then, until the length of the phase is over.
func (l *library) move(ctx context.Context, u *upstream, length time.Duration) {
	for range moves {
		if !wait(ctx, length/(moves+1)) {
			return
		}
		l.push(u, l.tags[0], layerSize, layerSize/2)
	}
	wait(ctx, length/(moves+1))
}

// image is the one with that digest.
func (l *library) image(dgst digest.Digest) (registrytest.Image, bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	image, ok := l.images[dgst]
	return image, ok
}

// heard notes what the fleet's record of a tag names now.
func (l *library) heard(tag string, dgst digest.Digest) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if known := l.published[tag]; len(known) == 0 || known[len(known)-1].digest != dgst {
		l.published[tag] = append(known, naming{dgst, time.Now()})
	}
}

// isPublished reports whether there was a record of a tag at that time.
func (l *library) isPublished(tag string, at time.Time) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return len(l.published[tag]) > 0 && l.published[tag][0].since.Before(at)
}

// named reports whether upstream has named the digest by the tag at some time since then, or ever if
// then is zero.
func (l *library) named(tag string, dgst digest.Digest, then time.Time) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return wasNamed(l.pushed[tag], dgst, then)
}

// word is what an answer to a tag is beside the fleet's record.
type word int

const (
	agrees    word = iota // what the record has named since then
	ahead                 // newer than what has ever been published
	disagrees             // what the record does not name any more
)

// compare holds an answer against what the fleet's record of the tag has named since then.
func (l *library) compare(tag string, dgst digest.Digest, then time.Time) word {
	l.mu.Lock()
	defer l.mu.Unlock()
	published := l.published[tag]
	switch {
	case wasNamed(published, dgst, then):
		return agrees
	case len(published) == 0 || pushedAt(l.pushed[tag], dgst).After(pushedAt(l.pushed[tag], published[len(published)-1].digest)):
		return ahead
	}
	return disagrees
}

func pushedAt(history []naming, dgst digest.Digest) (at time.Time) {
	for _, n := range history {
		if n.digest == dgst {
			at = n.since
		}
	}
	return at
}

func wasNamed(history []naming, dgst digest.Digest, then time.Time) bool {
	for i, n := range history {
		if n.digest == dgst && (i+1 == len(history) || history[i+1].since.After(then)) {
			return true
		}
	}
	return false
}
