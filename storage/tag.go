package storage

import (
	"errors"
	"fmt"
	"io/fs"
	"path"
	"sync"
	"time"

	"breakwater/pkg/oci"

	lru "github.com/hashicorp/golang-lru/v2"
	"github.com/opencontainers/go-digest"
)

// tagEntries bounds the tags held in memory, at about 500 bytes each.
const tagEntries = 8 << 10

// Tag is what a tag is known to name.
type Tag struct {
	Current      Validated `json:"current"`
	LastComplete Validated `json:"last_complete,omitzero"` // answered while Current cannot be had whole
	Published    Published `json:"published,omitzero"`     // the fleet's newest record, as far as it was seen
}

// Published is what the record in the fleet's shared store says of a tag.
type Published struct {
	Digest     digest.Digest `json:"digest"`
	At         time.Time     `json:"at"`         // when an upstream last said so, by this host's clock
	Generation uint64        `json:"generation"` // grows with each change of the record, and never goes back
}

// Validated is a digest, and when which upstream has last said that the tag names it.
type Validated struct {
	Digest      digest.Digest `json:"digest"`
	ValidatedAt time.Time     `json:"validated_at"`
	Upstream    string        `json:"upstream,omitempty"`
}

func (t *Tag) check() error {
	if _, err := oci.ParseDigest(t.Current.Digest.String()); err != nil {
		return err
	}
	for _, dgst := range []digest.Digest{t.LastComplete.Digest, t.Published.Digest} {
		if dgst == "" {
			continue
		}
		if _, err := oci.ParseDigest(dgst.String()); err != nil {
			return err
		}
	}
	if t.LastComplete.Digest == "" && t.LastComplete != (Validated{}) {
		return fmt.Errorf("the last complete image has no digest")
	}
	return nil
}

// wall takes out the monotonic clock, which stands still while the machine sleeps: ages are true.
func (v Validated) wall() Validated {
	v.ValidatedAt = v.ValidatedAt.UTC().Round(0)
	return v
}

type tagKey struct {
	repo oci.Repository
	tag  string
}

func (k tagKey) record() string { return path.Join(k.repo.Registry, k.repo.Name, "_tags", k.tag) }

// tagCache holds tag records. Those in behind are newer than the disk's.
type tagCache struct {
	entries *lru.Cache[tagKey, Tag]

	mu     sync.Mutex // guards behind
	behind map[tagKey]Tag
}

func newTagCache() (*tagCache, error) {
	entries, err := lru.New[tagKey, Tag](tagEntries)
	return &tagCache{entries: entries, behind: map[tagKey]Tag{}}, err
}

// Tag returns the record of a tag, or fs.ErrNotExist.
func (d *Disk) Tag(repo oci.Repository, tag string) (Tag, error) {
	key := tagKey{repo, tag}
	if t, ok := d.tags.entries.Get(key); ok {
		return t, nil
	}
	mu := d.writers.of(key.record())
	mu.Lock()
	defer mu.Unlock()
	t, err := d.tag(key)
	if err != nil {
		return Tag{}, fmt.Errorf("tag %s:%s: %w", repo, tag, err)
	}
	return t, nil
}

// tag returns and remembers the newest record; its stripe is held.
func (d *Disk) tag(key tagKey) (Tag, error) {
	if t, ok := d.tags.newest(key); ok {
		return t, nil
	}
	var t Tag
	if err := d.readRecord(key.record(), &t); err != nil {
		return Tag{}, err
	}
	d.tags.entries.Add(key, t)
	return t, nil
}

// newest returns a tag's record if it is held, and then the disk has none that is newer.
func (c *tagCache) newest(key tagKey) (Tag, bool) {
	if t, ok := c.entries.Get(key); ok {
		return t, true
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	t, ok := c.behind[key]
	return t, ok
}

// PutTag notes what a tag names. A change of a digest is durable before it returns, and refused with
// fs.ErrNotExist if its manifest is not stored or not reached by this repository; the rest is
// written behind, at the latest by Close.
func (d *Disk) PutTag(repo oci.Repository, tag string, t Tag) error {
	key := tagKey{repo, tag}
	mu := d.writers.of(key.record())
	mu.Lock()
	defer mu.Unlock()
	if err := d.putTag(key, t); err != nil {
		return fmt.Errorf("store tag %s:%s: %w", repo, tag, err)
	}
	return nil
}

func (d *Disk) putTag(key tagKey, t Tag) error {
	t.Current, t.LastComplete = t.Current.wall(), t.LastComplete.wall()
	if err := t.check(); err != nil {
		return err
	}
	old, err := d.tag(key)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if t.Current.Digest == old.Current.Digest && t.LastComplete.Digest == old.LastComplete.Digest {
		d.tags.mu.Lock()
		d.tags.behind[key] = t
		d.tags.mu.Unlock()
		d.tags.entries.Add(key, t)
		return nil
	}
	for _, v := range []Validated{t.Current, t.LastComplete} {
		if v.Digest == "" || v.Digest == old.Current.Digest || v.Digest == old.LastComplete.Digest {
			continue // looked at before; if it is gone since, that must not hold the other one back
		}
		if _, err := d.manifest(manifestKey{key.repo, v.Digest}); err != nil {
			return fmt.Errorf("manifest %s: %w", v.Digest, err)
		}
	}
	d.tags.entries.Remove(key) // if it fails, only the disk knows how far it came
	if err := d.writeTag(key, t); err != nil {
		return err
	}
	d.exporter.changed.Store(true)
	if !d.index.Tagged(key, t) { // evicted since it was looked at
		return errors.Join(d.records.remove(key.record()), fmt.Errorf("manifest %s: %w", t.Current.Digest, fs.ErrNotExist))
	}
	d.tags.entries.Add(key, t)
	return nil
}

// forget makes the disk's record the newest.
func (c *tagCache) forget(key tagKey) {
	c.entries.Remove(key)
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.behind, key)
}

// writeTag makes a record durable; its stripe is held.
func (d *Disk) writeTag(key tagKey, t Tag) error {
	if err := d.writeRecord(key.record(), &t); err != nil {
		return err
	}
	d.tags.mu.Lock()
	defer d.tags.mu.Unlock()
	delete(d.tags.behind, key)
	return nil
}

// flushTags writes the records that are behind.
func (d *Disk) flushTags() {
	d.tags.mu.Lock()
	keys := make([]tagKey, 0, len(d.tags.behind))
	for key := range d.tags.behind {
		keys = append(keys, key)
	}
	d.tags.mu.Unlock()
	for _, key := range keys {
		err := d.flushTag(key)
		if err != nil && d.Trouble() != nil {
			return // it says so itself; they stay behind
		}
		if err != nil {
			d.log.Warn("cannot note a tag's confirmation", "repository", key.repo.String(), "reference", key.tag, "err", err)
		}
	}
}

func (d *Disk) flushTag(key tagKey) error {
	mu := d.writers.of(key.record())
	mu.Lock()
	defer mu.Unlock()
	d.tags.mu.Lock()
	t, ok := d.tags.behind[key]
	d.tags.mu.Unlock()
	if !ok {
		return nil
	}
	return d.writeTag(key, t)
}
