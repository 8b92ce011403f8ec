package storage

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"breakwater/pkg/oci"

	lru "github.com/hashicorp/golang-lru/v2"
	"github.com/opencontainers/go-digest"
)

const (
	// manifestMemory bounds the manifests held in memory, a quarter of what the process may use.
	manifestMemory = 16 << 20
	// descriptorMemory is about what a decoded descriptor takes beside the manifest's bytes.
	descriptorMemory = 256
	// manifestEntries bounds the number of small ones.
	manifestEntries = 16 << 10
)

// manifestKey is a manifest as one repository reaches it.
type manifestKey struct {
	repo oci.Repository
	dgst digest.Digest
}

// manifestCache holds manifests that a repository reaches, so that a hot one costs no look at the
// disk. What is in it has been read from the store, hashed, and found to be reached: that only
// ends with remove. What is absent is never remembered.
type manifestCache struct {
	entries *lru.Cache[manifestKey, oci.Manifest]
	bytes   atomic.Int64

	changing sync.Mutex                      // held while entries are added or removed; guards keys
	keys     map[digest.Digest][]manifestKey // of entries

	mu    sync.Mutex           // guards pulls
	pulls map[manifestKey]pull // last ones that are not on the disk yet
}

// pull is when a manifest was asked for.
type pull struct {
	at   time.Time
	told bool // the index knows
}

// PutManifest stores a manifest, read from an upstream for this repository, unless its digest is
// not that of its bytes.
func (d *Disk) PutManifest(repo oci.Repository, m oci.Manifest, c Confirmation) error {
	if err := d.putManifest(repo, m, c); err != nil {
		return fmt.Errorf("store manifest %s@%s: %w", repo, m.Digest, err)
	}
	return nil
}

func (d *Disk) putManifest(repo oci.Repository, m oci.Manifest, c Confirmation) error {
	if got := m.Digest.Algorithm().FromBytes(m.Raw); got != m.Digest {
		return fmt.Errorf("%d bytes are %s: %w", len(m.Raw), got, ErrMismatch)
	}
	size := int64(len(m.Raw))
	_, lost := d.lost.Load(m.Digest)
	if info, err := d.blobs[m.Digest.Algorithm()].lstat(m.Digest.Encoded()); lost || err != nil || !info.Mode().IsRegular() || info.Size() != size || d.leaves(m.Digest) {
		if err := d.publishBlob(m.Digest, func() error { return d.put(d.blobName(m.Digest), m.Raw) }); err != nil {
			return err
		}
		d.lost.Delete(m.Digest)
	}
	var err error
	if d.public(c.origin(repo), c.Credential) {
		err = d.confirm(repo, m.Digest, size, c)
	} else {
		err = d.confirmAs(originRecord(m.Digest), record{Size: size, Repository: repo.String()}, c)
	}
	if err != nil {
		return err
	}
	name := manifestRecord(repo, m.Digest)
	if err := d.confirmAs(name, record{Size: size, MediaType: m.MediaType}, c); err != nil {
		return err
	}
	d.index.Manifest(repo, m, time.Time{})
	d.remember(manifestKey{repo, m.Digest}, m)
	return nil
}

// remember holds a manifest in memory, unless it was evicted since it was stored or read.
func (d *Disk) remember(key manifestKey, m oci.Manifest) {
	d.manifests.add(key, m)
	if d.leaves(key.dgst) {
		d.manifests.remove(key.dgst)
	}
}

// leaves reports whether content that is or was there is being evicted.
func (d *Disk) leaves(dgst digest.Digest) bool {
	return d.index.Built() && !d.index.Is(dgst)
}

// Manifest returns a stored manifest that this repository reaches, and notes that it was pulled.
// Otherwise, and if what is stored under the digest is not a manifest, it returns fs.ErrNotExist.
// What it returns is shared and must not be changed.
func (d *Disk) Manifest(repo oci.Repository, dgst digest.Digest) (oci.Manifest, error) {
	key := manifestKey{repo, dgst}
	m, err := d.manifest(key)
	if err != nil {
		return oci.Manifest{}, fmt.Errorf("manifest %s@%s: %w", repo, dgst, err)
	}
	d.manifests.pulled(key)
	return m, nil
}

func (d *Disk) manifest(key manifestKey) (oci.Manifest, error) {
	if m, ok := d.manifests.entries.Get(key); ok {
		return m, nil
	}
	policy := d.policy.Load()
	b, err := d.openBlob(key.repo, key.dgst)
	if err != nil {
		return oci.Manifest{}, err
	}
	defer b.Close()
	if b.size > oci.MaxManifest {
		return oci.Manifest{}, fmt.Errorf("%d bytes are no manifest: %w", b.size, fs.ErrNotExist)
	}
	raw := make([]byte, b.size)
	err = d.inTurn(func() error {
		_, err := io.ReadFull(b, raw)
		return err
	})
	if err != nil {
		if errors.Is(err, ErrBusy) {
			return oci.Manifest{}, err
		}
		d.Quarantine(key.dgst, err)
		return oci.Manifest{}, fmt.Errorf("%w: %w", err, fs.ErrNotExist)
	}
	if got := key.dgst.Algorithm().FromBytes(raw); got != key.dgst {
		d.Quarantine(key.dgst, fmt.Errorf("is %s", got))
		return oci.Manifest{}, fs.ErrNotExist
	}
	m, err := oci.ParseManifest("", raw, key.dgst.Algorithm())
	if err != nil {
		return oci.Manifest{}, errors.Join(err, fs.ErrNotExist)
	}
	d.remember(key, m)
	if d.policy.Load() != policy { // it may not be this repository's any more
		d.manifests.remove(key.dgst)
	}
	return m, nil
}

// flushPulls writes when manifests were last pulled, where there is a record: names that clients make
// up must not become folders.
func (d *Disk) flushPulls() {
	d.index.Pulled(d.manifests.untold())
	for key, p := range d.manifests.takePulls() {
		err := d.flushPull(key, p.at)
		if err != nil && d.Trouble() != nil {
			return // it says so itself; a pull more or less changes little
		}
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			d.log.Warn("cannot note a pull", "repository", key.repo.String(), "digest", key.dgst, "err", err)
		}
	}
}

func (d *Disk) flushPull(key manifestKey, at time.Time) error {
	name := manifestRecord(key.repo, key.dgst)
	mu := d.writers.of(name)
	mu.Lock()
	defer mu.Unlock()
	var r record
	if err := d.readRecord(name, &r); err != nil {
		return err
	}
	r.PulledAt = at.UTC().Round(0)
	return d.writeRecord(name, &r)
}

func newManifestCache() (*manifestCache, error) {
	c := &manifestCache{keys: map[digest.Digest][]manifestKey{}, pulls: map[manifestKey]pull{}}
	var err error
	c.entries, err = lru.NewWithEvict(manifestEntries, c.removed)
	return c, err
}

// removed is called for each entry that goes, by whoever makes it go.
func (c *manifestCache) removed(key manifestKey, m oci.Manifest) {
	c.bytes.Add(-memory(m))
	keys := slices.DeleteFunc(c.keys[key.dgst], func(k manifestKey) bool { return k == key })
	if c.keys[key.dgst] = keys; len(keys) == 0 {
		delete(c.keys, key.dgst)
	}
}

// memory is about how many bytes a manifest takes.
func memory(m oci.Manifest) int64 {
	return int64(len(m.Raw)) + descriptorMemory*int64(4+len(m.Manifests)+len(m.Blobs))
}

func (c *manifestCache) add(key manifestKey, m oci.Manifest) {
	if memory(m) > manifestMemory/4 {
		return
	}
	c.changing.Lock()
	defer c.changing.Unlock()
	if known, _ := c.entries.ContainsOrAdd(key, m); !known {
		c.bytes.Add(memory(m))
		c.keys[key.dgst] = append(c.keys[key.dgst], key)
	}
	for c.bytes.Load() > manifestMemory {
		c.entries.RemoveOldest()
	}
}

func (c *manifestCache) remove(dgst digest.Digest) {
	c.changing.Lock()
	defer c.changing.Unlock()
	for _, key := range slices.Clone(c.keys[dgst]) {
		c.entries.Remove(key)
	}
}

func (c *manifestCache) clear() {
	c.changing.Lock()
	defer c.changing.Unlock()
	c.entries.Purge()
}

func (c *manifestCache) pulled(key manifestKey) {
	now := time.Now()
	c.mu.Lock()
	defer c.mu.Unlock()
	if len(c.pulls) < manifestEntries {
		c.pulls[key] = pull{at: now}
	}
}

// untold takes the pulls that the index does not know of.
func (c *manifestCache) untold() map[manifestKey]time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	untold := map[manifestKey]time.Time{}
	for key, p := range c.pulls {
		if !p.told {
			untold[key] = p.at
			c.pulls[key] = pull{p.at, true}
		}
	}
	return untold
}

func (c *manifestCache) takePulls() map[manifestKey]pull {
	c.mu.Lock()
	defer c.mu.Unlock()
	pulls := c.pulls
	c.pulls = map[manifestKey]pull{}
	return pulls
}
