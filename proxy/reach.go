package proxy

import (
	"context"
	"errors"
	"slices"
	"time"

	"breakwater/pkg/oci"
	"breakwater/proxy/upstream"

	"github.com/opencontainers/go-digest"
	ispec "github.com/opencontainers/image-spec/specs-go/v1"
)

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

// outOfReach is why the image that a tag names cannot be had whole: a blob or manifest of it that no
// upstream has given, or that blobs are out at all of them; nil if it may be had. What has failed is then
// tried again, for as long as the tag names it.
func (c *completions) outOfReach(tag oci.Reference, m oci.Manifest) error {
	out := c.m.blobsOut(tag.Registry)
	if out != nil && c.m.fleet.offers(tag, m) {
		out = nil
	}
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

// offered has what could not be had of an image tried anew: the fleet says that the bucket has it whole.
func (c *completions) offered(repo oci.Repository, m oci.Manifest) {
	images := c.m.store.Images(repo, m)
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, image := range images {
		for _, desc := range slices.Concat(image.Blobs, image.Manifests) {
			delete(c.failures, oci.Reference{Repository: repo, Digest: desc.Digest})
		}
	}
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

// tagsOut reports whether none of these upstreams is asked what a tag names, since their breakers are not closed.
func tagsOut(clients []*upstream.Client) bool {
	return !slices.ContainsFunc(clients, func(client *upstream.Client) bool {
		return slices.ContainsFunc(client.Health(), func(h upstream.Health) bool { return h.Class == "manifest" && h.State == "closed" })
	})
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
