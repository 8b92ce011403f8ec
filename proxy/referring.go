package proxy

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"strings"
	"time"

	"breakwater/pkg/oci"
	"breakwater/proxy/upstream"
	"breakwater/storage"
	"breakwater/storage/s3"

	"github.com/opencontainers/go-digest"
	ispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// referringTags are how signatures, attestations and SBOMs are named by those who know of no referrers
// API: sha256-<hex>.sig is cosign's.
var referringTags = [...]string{".sig", ".att", ".sbom"}

// tagsReferring are the tags of what may refer to a manifest.
func tagsReferring(subject oci.Reference) (tags []oci.Reference) {
	for _, suffix := range referringTags {
		tag := oci.Reference{Repository: subject.Repository, Tag: strings.Replace(subject.Digest.String(), ":", "-", 1) + suffix}
		if oci.ValidTag(tag.Tag) { // a sha512 is too long
			tags = append(tags, tag)
		}
	}
	return tags
}

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
		if err := c.fetchReferringTo(ctx, p, oci.Reference{Repository: p.ref.Repository, Digest: subject}); err != nil {
			return err
		}
	}
	return nil
}

// fetchReferringTo stores what refers to one manifest, and has it told to the fleet if upstreams had to be asked.
func (c *completions) fetchReferringTo(ctx context.Context, p *completion, subject oci.Reference) error {
	c.mu.Lock()
	p.fetched = true // so that it is tried again if this fails
	c.mu.Unlock()
	said, lease, told := c.m.fleet.referring(ctx, subject)
	index, tags, err := said.Index, []oci.Reference(nil), error(nil)
	if told {
		tags, err = c.m.fleet.adoptTags(ctx, subject, said.Tags)
	} else {
		index, tags, err = c.m.askReferring(ctx, subject)
	}
	if err == nil {
		err = c.fetchNamed(ctx, p, index, tags)
	}
	if err == nil && !told && c.m.fleet != nil {
		c.m.fleet.publish.referring(subject, lease)
		return nil
	}
	c.m.fleet.release(lease)
	return err
}

// askReferring asks the upstreams what refers to a manifest: by the API, and by tags, of which those are
// returned that are there.
func (m *Mirror) askReferring(ctx context.Context, subject oci.Reference) (index []byte, tags []oci.Reference, err error) {
	t := target{kind: kindReferrers, ref: subject}
	answer, err := m.askList(t, referrersPath(subject.Digest), m.askReferrers).wait(ctx, 0)
	if err != nil && isOutage(err) {
		return nil, nil, err
	}
	for _, tag := range tagsReferring(subject) {
		_, err := m.questionTag(tag, freshness{within: m.freshFor(tag)}).wait(ctx, 0)
		if err == nil {
			tags = append(tags, tag)
		} else if isOutage(err) {
			return nil, nil, err
		}
	}
	return answer.Body, tags, nil
}

// fetchNamed stores what an index and tags name.
func (c *completions) fetchNamed(ctx context.Context, p *completion, index []byte, tags []oci.Reference) error {
	var named []digest.Digest
	if index, err := oci.ParseManifest("", index, digest.SHA256); err == nil {
		for _, desc := range index.Manifests[:min(len(index.Manifests), maxReferring)] {
			named = append(named, desc.Digest)
		}
	}
	for _, tag := range tags {
		if manifest, _ := c.m.storedTag(tag); manifest.Digest != "" {
			named = append(named, manifest.Digest)
		}
	}
	for _, dgst := range named {
		manifest, err := c.manifest(ctx, oci.Reference{Repository: p.ref.Repository, Digest: dgst})
		if err == nil {
			c.m.expected.note(p.ref.Repository, manifest)
			err = c.trickle(ctx, p, c.m.store.Missing(p.ref.Repository, manifest))
		}
		if err != nil && isOutage(err) {
			return err
		}
	}
	return nil
}

// referring is what another host of the fleet has found lately to refer to a manifest. If none has, this host
// gets a lease to find out for all, unless another one has that.
func (f *fleet) referring(ctx context.Context, subject oci.Reference) (said s3.Referring, lease *s3.Lease, told bool) {
	if f == nil {
		return said, nil, false
	}
	come := func() bool {
		var err error
		said, err = f.adoptReferring(ctx, subject)
		return err == nil && time.Since(said.ValidatedAt) < refreshTime
	}
	if come() {
		return said, nil, true
	}
	lease, told = f.lead(ctx, referrersLease+subject.String(), time.Now(), come)
	return said, lease, told
}

// adoptTags has what the tags name that the fleet says refer to a manifest. Only an outage is an error.
func (f *fleet) adoptTags(ctx context.Context, subject oci.Reference, said []string) (tags []oci.Reference, err error) {
	for _, tag := range tagsReferring(subject) {
		if !slices.Contains(said, tag.Tag) {
			continue
		}
		_, err := f.word(tag).wait(ctx, 0)
		if err != nil {
			_, err = f.m.questionTag(tag, freshness{within: f.m.freshFor(tag)}).wait(ctx, 0)
		}
		if err == nil {
			tags = append(tags, tag)
		} else if isOutage(err) {
			return nil, err
		}
	}
	return tags, nil
}

// referrersLease begins the name of a lease to ask who refers to a manifest.
const referrersLease = "referrers "

// adoptReferring returns the fleet's word on what refers to a manifest, and stores it, unless a later one is
// stored.
func (f *fleet) adoptReferring(ctx context.Context, subject oci.Reference) (s3.Referring, error) {
	said, err := f.bucket.Referring(ctx, subject.Repository, subject.Digest)
	if err != nil {
		return said, err
	}
	if said.Credential != "" && !f.hasAccount(subject.Registry) {
		return s3.Referring{}, fs.ErrNotExist
	}
	path := referrersPath(subject.Digest)
	if stored, err := f.m.store.Answer(subject.Repository, path); err == nil && !said.ValidatedAt.After(stored.ValidatedAt) {
		return said, nil
	}
	err = f.m.store.PutAnswer(subject.Repository, path, storage.Answer{Body: said.Index, MediaType: ispec.MediaTypeImageIndex,
		ValidatedAt: said.ValidatedAt, Upstream: said.Upstream, Credential: said.Credential})
	if err != nil {
		f.m.logNotStored("list not stored", err, "repository", subject.Repository, "reference", path)
	}
	return said, nil
}

// hearReferring has the fleet's word stored, for whoever asks in an outage where nothing is. A slow bucket costs
// referrersPatience.
func (f *fleet) hearReferring(ctx context.Context, subject oci.Reference) {
	ctx, cancel := context.WithTimeout(ctx, referrersPatience)
	defer cancel()
	_, _ = f.words.join(f.m.asking, referrersLease+subject.String(), func(ctx context.Context) (struct{}, error) {
		_, err := f.adoptReferring(ctx, subject)
		return struct{}{}, err
	}).wait(ctx, 0)
}

// referring has it published what upstreams have just said of who refers to a manifest, with that. The lease, if
// there is one, is released then.
func (p *publisher) referring(subject oci.Reference, lease *s3.Lease) {
	if p.m.cfg.Load().Shared.ReadOnly {
		p.release(lease)
		return
	}
	p.mu.Lock()
	remember(p.asked, subject, true)
	behind := len(p.queue) > publishers
	p.mu.Unlock()
	if behind { // nobody waits so long
		p.release(lease)
		lease = nil
	}
	p.add(subject, lease)
}

// writeReferring publishes what refers to a manifest that the bucket has, if upstreams have been asked for all of
// that, and who it is. Unlike a tag it does not outlive the process: the next one asks again within a day.
func (p *publisher) writeReferring(ctx context.Context, subject oci.Reference) error {
	p.mu.Lock()
	asked := p.asked[subject]
	p.mu.Unlock()
	if !asked {
		return nil
	}
	answer, err := p.m.store.Answer(subject.Repository, referrersPath(subject.Digest))
	var index oci.Manifest
	if err == nil {
		index, err = oci.ParseManifest("", answer.Body, digest.SHA256)
	}
	if err != nil || len(answer.Body) > s3.MaxReferring {
		p.forgetAsked(subject) // there is nothing to tell
		return nil
	}
	for _, desc := range index.Manifests[:min(len(index.Manifests), maxReferring)] {
		err := p.writeImage(ctx, oci.Reference{Repository: subject.Repository, Digest: desc.Digest})
		if err != nil && !errors.Is(err, errIncomplete) { // which upstream does not have either
			return err
		}
	}
	said := s3.Referring{Index: answer.Body, ValidatedAt: answer.ValidatedAt, Upstream: answer.Upstream, Credential: answer.Credential}
	for _, tag := range tagsReferring(subject) {
		if _, err := p.m.store.Tag(tag.Repository, tag.Tag); err != nil {
			continue
		}
		if err := p.write(ctx, tag); err != nil {
			return err // a record without it would say that it does not exist
		}
		said.Tags = append(said.Tags, tag.Tag)
	}
	if err := p.bucket.PutReferring(ctx, subject.Repository, subject.Digest, said); err != nil {
		return fmt.Errorf("what refers to %s: %w", subject, err)
	}
	p.forgetAsked(subject)
	return nil
}

// forgetAsked is for a manifest of which nothing is left to be published that upstreams said.
func (p *publisher) forgetAsked(subject oci.Reference) {
	p.mu.Lock()
	defer p.mu.Unlock()
	delete(p.asked, subject)
}

// isOutage reports whether an error leaves open if the thing exists, or is our own.
func isOutage(err error) bool {
	up := new(upstream.Error)
	return !errors.As(err, &up) || up.Outage()
}
