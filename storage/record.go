package storage

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"path"
	"strings"
	"time"

	"breakwater/pkg/oci"

	"github.com/opencontainers/go-digest"
)

// maxRecord bounds what is read of a record. The largest is an answer's, with its body in base64.
const maxRecord = 2 * maxAnswer

// Confirmation says that an upstream has let us read some content, and how.
type Confirmation struct {
	At         time.Time // zero is now
	Upstream   string
	Credential string // an opaque id of what was shown to the upstream; "" is anonymous
	// Repository is where the content was got; zero is the one that it is confirmed in.
	Repository oci.Repository
}

func (c Confirmation) origin(repo oci.Repository) oci.Repository {
	if c.Repository != (oci.Repository{}) {
		return c.Repository
	}
	return repo
}

// public reports whether what was got so may be read through every repository, by the policy of now.
func (d *Disk) public(origin oci.Repository, credential string) bool {
	if p := d.policy.Load(); p != nil && p.Public != nil {
		return p.Public(origin, credential)
	}
	return credential == ""
}

// record is what is known of stored content: in records/_public for everybody, unless the policy has changed
// since, else in the repository that it was confirmed in.
type record struct {
	Size        int64     `json:"size"`
	MediaType   string    `json:"media_type,omitempty"` // of manifests
	Repository  string    `json:"repository,omitempty"` // in _public and _private: where it was got first
	ConfirmedAt time.Time `json:"confirmed_at,omitzero"`
	Upstream    string    `json:"upstream,omitempty"`
	Credential  string    `json:"credential,omitempty"`
	Platforms   []string  `json:"platforms,omitempty"` // of indexes: those that were asked for
	PulledAt    time.Time `json:"pulled_at,omitzero"`  // of manifests
}

// storable is what a file in records/ can hold. Its check refuses what cannot have been stored.
type storable interface{ check() error }

func (r *record) check() error {
	if r.Size < 0 {
		return fmt.Errorf("size is %d", r.Size)
	}
	return nil
}

// confirms reports whether the record lets its repository read the content. One that was only made
// to note a pull does not.
func (r record) confirms() bool { return !r.ConfirmedAt.IsZero() }

// origin is the repository that the content was got in first.
func (r record) origin() oci.Repository {
	registry, name, _ := strings.Cut(r.Repository, "/")
	return oci.Repository{Registry: registry, Name: name}
}

func publicRecord(dgst digest.Digest) string { return path.Join("_public", dgst.Encoded()) }

func blobRecord(repo oci.Repository, dgst digest.Digest) string {
	return path.Join(repo.Registry, repo.Name, "_blobs", dgst.Encoded())
}

func manifestRecord(repo oci.Repository, dgst digest.Digest) string {
	return path.Join(repo.Registry, repo.Name, "_manifests", dgst.Encoded())
}

// reach returns the record by which a repository reaches stored content, and whether all do, or fs.ErrNotExist.
func (d *Disk) reach(repo oci.Repository, dgst digest.Digest) (r record, public bool, err error) {
	for i, name := range [...]string{publicRecord(dgst), blobRecord(repo, dgst), manifestRecord(repo, dgst)} {
		var r record
		err := d.readRecord(name, &r)
		isPublic := i == 0 && err == nil && d.public(r.origin(), r.Credential)
		if err == nil && r.confirms() && (i > 0 || isPublic || r.origin() == repo) {
			return r, isPublic, nil
		}
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return record{}, false, err
		}
	}
	return record{}, false, fmt.Errorf("%s is not confirmed in %s: %w", dgst, repo, fs.ErrNotExist)
}

// Reach is how a repository reaches stored content.
type Reach struct {
	Confirmation
	Public bool // every other repository reaches it too
	Size   int64
}

// Confirmed tells how a repository reaches stored content. It is fs.ErrNotExist if it does not, or if the
// content is not stored.
func (d *Disk) Confirmed(repo oci.Repository, dgst digest.Digest) (Reach, error) {
	r, public, err := d.reach(repo, dgst)
	if err == nil {
		_, err = d.blobs[dgst.Algorithm()].lstat(dgst.Encoded())
	}
	if err != nil {
		return Reach{}, fmt.Errorf("confirmation of %s: %w", dgst, err)
	}
	c := Confirmation{At: r.ConfirmedAt, Upstream: r.Upstream, Credential: r.Credential, Repository: repo}
	if public {
		c.Repository = r.origin()
	}
	return Reach{c, public, r.Size}, nil
}

// originRecord says where content came from that some repositories may read: only that upstream's
// word is taken for others.
func originRecord(dgst digest.Digest) string { return path.Join("_private", dgst.Encoded()) }

// StoredFrom reports whether the content is stored, whole as far as its size tells, and came from
// that upstream.
func (d *Disk) StoredFrom(dgst digest.Digest, upstream string) bool {
	_, err := d.storedFrom(dgst, upstream)
	return err == nil
}

// storedFrom returns the size.
func (d *Disk) storedFrom(dgst digest.Digest, upstream string) (int64, error) {
	info, err := d.blobs[dgst.Algorithm()].lstat(dgst.Encoded())
	if err != nil {
		return 0, err
	}
	for _, name := range [...]string{originRecord(dgst), publicRecord(dgst)} {
		var r record
		err := d.readRecord(name, &r)
		if err == nil && r.Upstream == upstream && r.Size == info.Size() && info.Mode().IsRegular() {
			return r.Size, nil
		}
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return 0, err
		}
	}
	return 0, fmt.Errorf("nothing vouches for it: %w", fs.ErrNotExist)
}

// Confirm notes that an upstream has let this repository read what is already stored. From now on
// Blob and Manifest find it there; if it is public there, then in every repository. A registry
// could claim any digest: only the upstream that the content came from is believed, and for content
// that no record vouches for, nobody. Then, and if it is not stored, it is fs.ErrNotExist.
func (d *Disk) Confirm(repo oci.Repository, dgst digest.Digest, c Confirmation) error {
	size, err := d.storedFrom(dgst, c.Upstream)
	if err == nil {
		err = d.confirm(repo, dgst, size, c)
	}
	if err != nil {
		return fmt.Errorf("confirm %s in %s: %w", dgst, repo, err)
	}
	return nil
}

// confirm writes the record that lets stored content be read: by all, or by this repository.
func (d *Disk) confirm(repo oci.Repository, dgst digest.Digest, size int64, c Confirmation) error {
	if origin := c.origin(repo); d.public(origin, c.Credential) {
		if err := d.demote(dgst); err != nil {
			return err
		}
		return d.confirmAs(publicRecord(dgst), record{Size: size, Repository: origin.String()}, c)
	}
	if err := d.confirmAs(originRecord(dgst), record{Size: size, Repository: repo.String()}, c); err != nil {
		return err
	}
	err := d.confirmAs(blobRecord(repo, dgst), record{Size: size}, c)
	if err == nil {
		d.index.Private(repo, dgst)
	}
	return err
}

// demote makes room for another repository's public record: one that is not public any more becomes its own
// repository's.
func (d *Disk) demote(dgst digest.Digest) error {
	name := publicRecord(dgst)
	var old record
	switch err := d.readRecord(name, &old); {
	case errors.Is(err, fs.ErrNotExist):
		return nil
	case err != nil:
		return err
	case !old.confirms() || d.public(old.origin(), old.Credential):
		return nil
	}
	c := Confirmation{At: old.ConfirmedAt, Upstream: old.Upstream, Credential: old.Credential}
	if err := d.confirm(old.origin(), dgst, old.Size, c); err != nil {
		return err
	}
	mu := d.writers.of(name)
	mu.Lock()
	defer mu.Unlock()
	var now record
	if err := d.readRecord(name, &now); err != nil || d.public(now.origin(), now.Credential) {
		return nil // another one was quicker
	}
	return d.records.remove(name)
}

// confirmAs writes one record, unless it says the same already.
func (d *Disk) confirmAs(name string, r record, c Confirmation) error {
	mu := d.writers.of(name)
	mu.Lock()
	defer mu.Unlock()
	var old record
	err := d.readRecord(name, &old)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if old.confirms() && old.Size == r.Size {
		return nil
	}
	if c.At.IsZero() {
		c.At = time.Now()
	}
	r.ConfirmedAt, r.Upstream, r.Credential = c.At.UTC().Round(0), c.Upstream, c.Credential
	r.Platforms, r.PulledAt = old.Platforms, old.PulledAt
	return d.writeRecord(name, &r)
}

// writeRecord writes a record; once it returns nil, a power cut does not undo it.
func (d *Disk) writeRecord(name string, v storable) error {
	raw, err := json.Marshal(v)
	if err != nil {
		return err
	}
	name = path.Join(d.records.path, name)
	if err := d.makeFolder(path.Dir(name)); err != nil {
		return d.wrote("record", 0, err)
	}
	return d.put(name, raw)
}

// readRecord decodes a record into v. A record that is not there, or cannot be read as one, is
// fs.ErrNotExist.
func (d *Disk) readRecord(name string, v storable) error { return d.readRecordIn(d.records, name, v) }

// readRecordIn is readRecord for who has opened a folder below records.
func (d *Disk) readRecordIn(in folder, name string, v storable) error {
	file, info, err := d.openFile(in, name)
	if err != nil {
		return err
	}
	defer file.Close()
	if info.Size() > maxRecord {
		return d.quarantine(in, name, fmt.Errorf("is a record of %d bytes", info.Size()))
	}
	raw := make([]byte, info.Size())
	if err := d.inTurn(func() error { return d.readFull(file, raw) }); err != nil {
		if errors.Is(err, ErrBusy) {
			return err
		}
		return d.quarantine(in, name, err) // it can be had again
	}
	if err := decodeRecord(raw, v); err != nil {
		return d.quarantine(in, name, err)
	}
	return nil
}

// decodeRecord accepts what writeRecord has written, now or in a later version of this layout.
func decodeRecord(raw []byte, v storable) error {
	if err := json.Unmarshal(raw, v); err != nil {
		return fmt.Errorf("is not a record: %w", err)
	}
	return v.check()
}
