package s3

import (
	"context"
	"fmt"
	"io"
	"strings"
	"time"

	"breakwater/pkg/oci"

	"github.com/opencontainers/go-digest"
)

const (
	// minGrace is the shortest grace that Collect takes.
	minGrace = 24 * time.Hour
	// renewAfter is how old something may be that is relied on: whoever finds it has the rest of the
	// grace to publish what needs it, whatever Collect was told.
	renewAfter = minGrace / 2
	// writeRaces is how often a write that came too late is tried again.
	writeRaces = 5
	raceWait   = 50 * time.Millisecond
)

// Content is what the fleet knows of a blob or a manifest that a repository may read.
type Content struct {
	Size        int64
	MediaType   string    // of manifests
	ConfirmedAt time.Time // by this host's clock
	Upstream    string
	Credential  string         // as in storage.Confirmation
	Repository  oci.Repository // of public content: where it was got
	Public      bool           // may be read through every repository, if the reader's configuration says so too
	parts       *parts         // nil if its record tells none
}

// content is Content as it is published: its time is the bucket's, and whether it is public is in the
// record's name.
type content struct {
	Size        int64     `json:"size"`
	MediaType   string    `json:"media_type,omitempty"`
	ConfirmedAt time.Time `json:"confirmed_at"`
	Upstream    string    `json:"upstream,omitempty"`
	Credential  string    `json:"credential,omitempty"`
	Repository  string    `json:"repository,omitempty"` // of public content
	Parts       *partTags `json:"parts,omitempty"`
}

func (c *content) check() error {
	if c.Size < 0 || c.ConfirmedAt.IsZero() {
		return fmt.Errorf("size is %d, confirmed at %s", c.Size, c.ConfirmedAt)
	}
	if c.Parts == nil {
		return nil
	}
	if c.Parts.Layout != partsLayout || !hasParts(c.Size) {
		c.Parts = nil
	} else if len(c.Parts.Salt) != saltSize || int64(len(c.Parts.Tags)) != tagSize*partsBefore(c.Size) {
		return fmt.Errorf("%d bytes tell the parts of %d", len(c.Parts.Tags), c.Size)
	}
	return nil
}

// Reach says which record Content asks for first.
type Reach int

// The ways to content.
const (
	PublicFirst  Reach = iota // the record for everybody
	PrivateFirst              // the repository's own
	PublicOnly                // the record for everybody, and no other
)

// Content says how a repository reaches a blob or a manifest: by the record for everybody, or by its
// own. It is fs.ErrNotExist if there is none of those asked for, and has an answer within 2 s.
func (b *Bucket) Content(ctx context.Context, repo oci.Repository, dgst digest.Digest, first Reach) (Content, error) {
	ctx, cancel := b.bounded(ctx, headerLimit)
	defer cancel()
	names := []string{publicName(dgst), privateName(repo, dgst)}
	switch first {
	case PrivateFirst:
		names[0], names[1] = names[1], names[0]
	case PublicOnly:
		names = names[:1]
	}
	for _, name := range names {
		var c content
		rec, err := b.read(ctx, name, "", &c)
		if err != nil {
			return Content{}, err
		}
		if rec.found && rec.wrong == nil {
			registry, in, _ := strings.Cut(c.Repository, "/")
			found := Content{c.Size, c.MediaType, b.clock.here(c.ConfirmedAt), c.Upstream, c.Credential,
				oci.Repository{Registry: registry, Name: in}, name == publicName(dgst), nil}
			if c.Parts != nil {
				mac, err := rec.key.partsKey(dgst, c.Parts.Salt)
				if err != nil {
					return Content{}, err
				}
				found.parts = &parts{*c.Parts, mac}
			}
			return found, nil
		}
	}
	return Content{}, errNone(names[len(names)-1])
}

// PutContent publishes how a blob or a manifest is reached: by everybody if c is public, else by this
// repository. A record that says the same already is left as it is, but renewed if Collect might
// take it soon, or if it was signed with a key that is on its way out. From is the content, which is only read for
// what no record tells yet, or one by which wrong bytes were found (see Distrust): by what it is verified in parts. It
// is ErrWrong, and nothing is published, if it was read and is not what its digest says.
func (b *Bucket) PutContent(ctx context.Context, repo oci.Repository, dgst digest.Digest, c Content, from io.Reader) error {
	if err := b.writable(); err != nil {
		return err
	}
	name := privateName(repo, dgst)
	if c.Public {
		name = publicName(dgst)
	}
	return b.contend(ctx, name, func() (bool, error) { return b.putContent(ctx, name, dgst, &c, from) })
}

// contend tries to write a record until it is there, or others have been sooner too often.
func (b *Bucket) contend(ctx context.Context, name string, try func() (done bool, err error)) error {
	for range writeRaces {
		done, err := try()
		if done || err != nil && !lost(err) {
			return err
		}
		if !pause(ctx, jitter(raceWait)) {
			return context.Cause(ctx)
		}
	}
	return fmt.Errorf("write %s: others write it all the time", name)
}

// putContent reports whether the record is there to stay.
func (b *Bucket) putContent(ctx context.Context, name string, dgst digest.Digest, c *Content, from io.Reader) (bool, error) {
	var old content
	rec, err := b.read(ctx, name, "", &old)
	if err != nil {
		return false, err
	}
	current := rec.found && rec.wrong == nil && !rec.oldKey && old.Size == c.Size
	told := current && (!hasParts(c.Size) || old.Parts != nil && !b.misread.has(dgst))
	aging := rec.found && b.old(rec.modified)
	if told && old.MediaType == c.MediaType && !aging {
		return true, nil
	}
	next := content{c.Size, c.MediaType, b.clock.there(c.ConfirmedAt), c.Upstream, c.Credential, "", nil}
	if c.Public {
		next.Repository = c.Repository.String()
	}
	switch {
	case told:
		next.Parts = old.Parts
	case hasParts(c.Size):
		if c.parts == nil { // not read by the try before
			if c.parts, err = b.keys.keys[0].partsOf(dgst, from, c.Size); err != nil {
				return false, err
			}
		}
		next.Parts = &c.parts.partTags
	}
	if next.ConfirmedAt.IsZero() {
		next.ConfirmedAt = b.clock.now()
	}
	if err := next.check(); err != nil {
		return false, err
	}
	if _, err := b.write(ctx, name, &next, condition{rec.etag}); err != nil {
		return false, err
	}
	if aging {
		return b.survived(ctx, name)
	}
	return true, nil
}
