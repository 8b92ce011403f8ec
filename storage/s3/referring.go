package s3

import (
	"context"
	"fmt"
	"time"

	"breakwater/pkg/oci"

	"github.com/opencontainers/go-digest"
)

// MaxReferring bounds a Referring's index: a record holds it whole, in base64.
const MaxReferring = 64 << 10

// Referring is what an upstream has said of who refers to a manifest.
type Referring struct {
	Index       []byte    // by the referrers API, or by the tag that stands in for it
	Tags        []string  // of signatures and the like; it had no others
	ValidatedAt time.Time // by this host's clock
	Upstream    string
	Credential  string // as in storage.Answer
}

// referring is Referring as it is published: its time is the bucket's.
type referring struct {
	Index       []byte    `json:"index"`
	Tags        []string  `json:"tags,omitempty"`
	ValidatedAt time.Time `json:"validated_at"`
	Upstream    string    `json:"upstream,omitempty"`
	Credential  string    `json:"credential,omitempty"`
}

func (r *referring) check() error {
	if r.ValidatedAt.IsZero() || len(r.Index) > MaxReferring {
		return fmt.Errorf("validated at %s, an index of %d bytes", r.ValidatedAt, len(r.Index))
	}
	for _, tag := range r.Tags {
		if !oci.ValidTag(tag) {
			return fmt.Errorf("%q is no tag", tag)
		}
	}
	return nil
}

// Referring returns what was published last of who refers to a manifest, fs.ErrNotExist if nothing was. It has
// an answer within 2 s.
func (b *Bucket) Referring(ctx context.Context, repo oci.Repository, subject digest.Digest) (Referring, error) {
	ctx, cancel := b.bounded(ctx, headerLimit)
	defer cancel()
	name := referringName(repo, subject)
	var r referring
	rec, err := b.read(ctx, name, "", &r)
	if err != nil {
		return Referring{}, err
	}
	if !rec.found || rec.wrong != nil || b.clock.future(r.ValidatedAt) {
		return Referring{}, errNone(name)
	}
	return Referring{r.Index, r.Tags, b.clock.here(r.ValidatedAt), r.Upstream, r.Credential}, nil
}

// PutReferring publishes who refers to a manifest, unless what is published was validated later.
func (b *Bucket) PutReferring(ctx context.Context, repo oci.Repository, subject digest.Digest, r Referring) error {
	if err := b.writable(); err != nil {
		return err
	}
	name := referringName(repo, subject)
	next := referring{r.Index, r.Tags, b.clock.there(r.ValidatedAt), r.Upstream, r.Credential}
	if err := next.check(); err != nil {
		return fmt.Errorf("write %s: %w", name, err)
	}
	return b.contend(ctx, name, func() (bool, error) {
		var old referring
		rec, err := b.read(ctx, name, "", &old)
		if err != nil {
			return false, err
		}
		if rec.found && rec.wrong == nil && !rec.oldKey && !b.clock.future(old.ValidatedAt) && !next.ValidatedAt.After(old.ValidatedAt) {
			return true, nil
		}
		_, err = b.write(ctx, name, &next, condition{rec.etag})
		return err == nil, err
	})
}
