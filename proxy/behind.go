package proxy

import (
	"context"
	"errors"
	"slices"
	"strings"
	"time"

	"breakwater/pkg/oci"
	"breakwater/proxy/upstream"

	"github.com/opencontainers/go-digest"
	ispec "github.com/opencontainers/image-spec/specs-go/v1"
)

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
