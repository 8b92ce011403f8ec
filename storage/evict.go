package storage

import (
	"context"
	"errors"
	"io/fs"
	"path"
	"slices"
	"syscall"
	"time"

	"breakwater/pkg/oci"

	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"
)

const (
	// overCapacity is how far the capacity may be exceeded while eviction makes room: a twentieth.
	overCapacity = 20
	// evictedAtOnce is how many images lose their names before the first of them goes: that the names are gone
	// has to be on the disk by then, which is half of what an eviction costs.
	evictedAtOnce = 512
	// minInodes is the part of a file system's inodes that is left free: a hundredth.
	minInodes = 100
	// diskLag is how long a file system may take to count what was deleted as free.
	diskLag = 10 * time.Second
)

// victim is an image on its way out, or content that no image needs.
type victim struct {
	dgst    digest.Digest
	tags    []tagKey  // whose records name it, or what goes with it
	content []leaving // manifests before what they need
	bytes   int64
	free    int64 // of them, once the files are gone: nobody reads those
}

// leaving is one file on its way out, and who has records of it.
type leaving struct {
	dgst      digest.Digest
	manifests []oci.Repository
	blobs     []oci.Repository
}

// Oldest takes what was pulled least recently out of the index, but none of kept and, while there is
// anything else, nothing that came only from registries that are out.
func (x *index) Oldest(kept []digest.Digest, out map[string]bool) (victim, bool) {
	x.mu.Lock()
	defer x.mu.Unlock()
	if !x.built {
		return victim{}, false
	}
	keep := map[id]bool{}
	for _, dgst := range kept {
		if i, ok := x.find(dgst); ok {
			keep[i] = true
		}
	}
	for _, out := range []map[string]bool{out, nil} {
		for range x.order.Len() {
			i, _, _ := x.order.GetOldest()
			if x.keeps(i, keep) || x.isOut(i, out) || x.refresh(i) {
				x.order.Add(i, struct{}{}) // as if it were pulled now: not looked at again so soon
				continue
			}
			return x.takeOut(i), true
		}
	}
	for i := range x.manifests { // what needs each other in a ring, which only malice makes
		if x.nodes[i].bytes > 0 && x.order.Len() == 0 && !x.keeps(i, keep) {
			return x.takeOut(i), true
		}
	}
	return victim{}, false
}

// keeps reports whether an image is kept, or one that goes with it.
func (x *index) keeps(i id, keep map[id]bool) bool {
	m := x.manifests[i]
	return keep[i] || m != nil && (slices.ContainsFunc(m.needs, func(i id) bool { return x.keeps(i, keep) }) ||
		slices.ContainsFunc(m.referrers, func(i id) bool { return x.keeps(i, keep) }))
}

// refresh dates an index like the last pull of what goes with it, and reports whether that is later than
// its own.
func (x *index) refresh(i id) bool {
	m := x.manifests[i]
	if m == nil {
		return false
	}
	own := m.pulled
	for _, need := range m.needs {
		if child := x.manifests[need]; child != nil {
			x.refresh(need)
			m.pulled = max(m.pulled, child.pulled)
		}
	}
	return m.pulled > own
}

func (x *index) isOut(i id, out map[string]bool) bool {
	m := x.manifests[i]
	return m != nil && len(m.repos) > 0 && !slices.ContainsFunc(m.repos, func(r repoID) bool { return !out[x.repos[r].Registry] })
}

// Take takes an image out of the index, with what only it needs.
func (x *index) Take(dgst digest.Digest) (victim, bool) {
	x.mu.Lock()
	defer x.mu.Unlock()
	i, ok := x.find(dgst)
	if !ok || x.nodes[i].bytes == 0 {
		return victim{}, false
	}
	return x.takeOut(i), true
}

func (x *index) takeOut(i id) victim {
	v := victim{dgst: x.digest(i)}
	x.take(i, &v)
	x.leaving += v.free
	return v
}

func (x *index) take(i id, v *victim) {
	m, l := x.manifests[i], leaving{dgst: x.digest(i)}
	for _, r := range x.private[i] {
		l.blobs = append(l.blobs, x.repos[r])
	}
	delete(x.private, i)
	if m != nil {
		for _, r := range m.repos {
			l.manifests = append(l.manifests, x.repos[r])
		}
		for _, key := range slices.Clone(m.tags) {
			v.tags = append(v.tags, key)
			x.untag(key)
		}
		delete(x.manifests, i)
	}
	if x.nodes[i].bytes > 0 {
		v.bytes += x.nodes[i].bytes
		v.free += x.vanish(i)
		v.content = append(v.content, l)
	}
	if m != nil {
		for _, need := range slices.Concat(m.needs, m.referrers) {
			x.nodes[need].needed--
			own := x.manifests[need]
			switch {
			case x.nodes[need].needed > 0:
			case own != nil && slices.ContainsFunc(own.tags, func(k tagKey) bool { _, of := oci.SubjectOf(k.tag); return !of }):
				x.rank(need) // it has a name of its own
			default:
				x.take(need, v)
			}
		}
	}
	x.forget(i)
}

// Is reports whether content is stored.
func (x *index) Is(dgst digest.Digest) bool {
	x.mu.Lock()
	defer x.mu.Unlock()
	i, ok := x.find(dgst)
	return ok && x.nodes[i].bytes > 0
}

// Registries are those that something came from.
func (x *index) Registries() map[string]bool {
	x.mu.Lock()
	defer x.mu.Unlock()
	all := map[string]bool{}
	for _, repo := range x.repos {
		all[repo.Registry] = true
	}
	return all
}

// Left notes that the files of what was taken out are gone.
func (x *index) Left(victims []victim) {
	x.mu.Lock()
	defer x.mu.Unlock()
	for _, v := range victims {
		x.leaving -= v.free
	}
}

// Reserve counts n more bytes as on their way, unless that exceeds limit.
func (x *index) Reserve(n, limit int64) bool {
	x.mu.Lock()
	defer x.mu.Unlock()
	if n > 0 && x.used+x.leaving+x.reserved > limit-n {
		return false
	}
	x.reserved += n
	return true
}

// Over is how many bytes have to go, besides those that are about to.
func (x *index) Over(capacity int64) int64 {
	x.mu.Lock()
	defer x.mu.Unlock()
	return x.used + x.reserved - capacity
}

// Used is how many bytes are stored.
func (x *index) Used() int64 {
	x.mu.Lock()
	defer x.mu.Unlock()
	return x.used
}

// spared is the policy as it stands: what is kept, and who is out.
func (d *Disk) spared() (kept []digest.Digest, out map[string]bool) {
	p := d.policy.Load()
	if p == nil {
		return nil, nil
	}
	if p.Kept != nil {
		for _, ref := range p.Kept() {
			if ref.Digest != "" {
				kept = append(kept, ref.Digest)
			} else if t, err := d.Tag(ref.Repository, ref.Tag); err == nil {
				kept = append(kept, t.Current.Digest, t.LastComplete.Digest)
			}
		}
	}
	kept = slices.DeleteFunc(kept, func(dgst digest.Digest) bool { return dgst == "" })
	if p.Out != nil {
		out = d.index.Registries()
		for registry := range out {
			out[registry] = p.Out(registry)
		}
	}
	return kept, out
}

// evict makes images go until so many bytes are freed, and returns how many were. No stripe is held. It waits
// for others that do the same, also to free nothing.
func (d *Disk) evict(bytes int64, why string) (freed int64) {
	d.evicting.Lock()
	defer d.evicting.Unlock()
	d.index.Pulled(d.manifests.untold())
	kept, out := d.spared()
	for freed < bytes {
		var victims []victim
		for freed < bytes && len(victims) < evictedAtOnce {
			v, ok := d.index.Oldest(kept, out)
			if !ok {
				bytes = freed // no more can go
				break
			}
			freed += v.bytes
			d.log.Info("evicted", "digest", v.dgst, "tags", len(v.tags), "files", len(v.content), "size", v.bytes, "reason", why)
			victims = append(victims, v)
		}
		d.delete(victims...)
		d.evicted.Add(int64(len(victims)))
	}
	return freed
}

// delete removes the files of what was taken out of the index: the names of all first, so that no record ever
// points at a manifest that is not stored. What cannot be removed is found again at the next start.
func (d *Disk) delete(victims ...victim) {
	defer d.index.Left(victims)
	var err error
	folders := map[string]bool{}
	for _, v := range victims {
		for _, key := range v.tags {
			err = errors.Join(err, d.dropFromTag(key))
			folders[path.Join(d.records.path, path.Dir(key.record()))] = true
		}
	}
	for folder := range folders {
		err = errors.Join(err, d.syncFolder(folder))
	}
	for _, v := range victims {
		for _, l := range v.content {
			err = errors.Join(err, d.deleteContent(l))
		}
	}
	if err != nil {
		d.log.Warn("cannot remove all of what was evicted", "images", len(victims), "err", err)
	}
}

// deleteContent removes content, and then what is known of it.
func (d *Disk) deleteContent(l leaving) error {
	err := d.removeUnlessBack(l.dgst, d.root, d.blobName(l.dgst))
	if len(l.manifests) > 0 {
		d.manifests.remove(l.dgst)
	}
	records := []string{publicRecord(l.dgst), originRecord(l.dgst)}
	for _, repo := range l.manifests {
		records = append(records, manifestRecord(repo, l.dgst))
	}
	for _, repo := range l.blobs {
		records = append(records, blobRecord(repo, l.dgst))
	}
	for _, record := range records {
		err = errors.Join(err, d.removeUnlessBack(l.dgst, d.records, record))
	}
	return err
}

// removeUnlessBack removes a file, unless its content has been stored again since it was taken out.
func (d *Disk) removeUnlessBack(dgst digest.Digest, in folder, name string) error {
	mu := d.writers.of(name)
	mu.Lock()
	defer mu.Unlock()
	if d.index.Is(dgst) {
		return nil
	}
	if err := in.remove(name); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// dropFromTag takes what is not stored any more out of a tag's record, or all of the record.
func (d *Disk) dropFromTag(key tagKey) error {
	mu := d.writers.of(key.record())
	mu.Lock()
	defer mu.Unlock()
	t, err := d.tag(key)
	if err != nil {
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		return err
	}
	if !d.index.Is(t.LastComplete.Digest) {
		t.LastComplete = Validated{}
	}
	if !d.index.Is(t.Current.Digest) {
		t.Current, t.LastComplete = t.LastComplete, Validated{}
	}
	d.tags.forget(key)
	d.exporter.changed.Store(true)
	if t.Current.Digest == "" {
		err := d.records.remove(key.record())
		if errors.Is(err, fs.ErrNotExist) {
			err = nil
		}
		return err
	}
	err = d.writeTag(key, t)
	d.index.Tagged(key, t)
	return err
}

// makeRoom lets n bytes be written, by taking space from what is parked and then from images: within the
// capacity, to which a twentieth may be added for a while, and so that the disk keeps its floor. The bytes
// are reserved when it returns nil; syscall.ENOSPC says that there is no room. No stripe is held.
func (d *Disk) makeRoom(n int64) error {
	hard := d.capacity + d.capacity/overCapacity
	if hard < d.capacity { // no bound
		hard = d.capacity
	}
	for !d.index.Reserve(n, hard) {
		if d.dropOldest() {
			continue
		}
		over := d.index.Over(hard) + n                                           // not positive while what makes room is being removed
		if over > d.index.Used() || d.evict(over, "capacity") == 0 && over > 0 { // nothing goes in vain
			return syscall.ENOSPC
		}
	}
	if d.index.Over(d.capacity) > 0 || d.underFloor() > 0 {
		select {
		case d.pressed <- struct{}{}:
		default: // it knows
		}
	}
	return nil
}

// lacks is how many bytes the disk lacks to take n more; 0 if it has them, or if all images together would
// not make up for it.
func (d *Disk) lacks(n int64) int64 {
	lacks := max(n-d.free(), 0)
	if lacks > d.index.Used() {
		return 0
	}
	return lacks
}

// free is what the disk has left for us.
func (d *Disk) free() int64 {
	var disk unix.Statfs_t
	if unix.Fstatfs(int(d.lockFile.Fd()), &disk) != nil {
		return 0
	}
	return int64(disk.Bavail) * disk.Bsize
}

// underFloor is how many bytes the disk lacks to its floor, of space or of inodes, each of which counts as
// a record.
func (d *Disk) underFloor() int64 {
	var disk unix.Statfs_t
	if d.lockFile == nil || unix.Fstatfs(int(d.lockFile.Fd()), &disk) != nil {
		return 0
	}
	lacks := d.minFree - int64(disk.Bavail)*disk.Bsize
	if disk.Files > 0 {
		lacks = max(lacks, (int64(disk.Files/minInodes)-int64(disk.Ffree))*recordSpace)
	}
	return lacks
}

// evictLoop brings the store back under its capacity, and the disk over its floor.
func (d *Disk) evictLoop(ctx context.Context) {
	ticker := time.NewTicker(time.Minute)
	defer ticker.Stop()
	var settled time.Time // when the disk will have counted what was deleted last
	for ; ctx.Err() == nil; d.wait(ctx, ticker.C) {
		if over := d.index.Over(d.capacity); over > 0 {
			d.evict(over, "capacity")
		}
		for now := time.Now(); now.After(settled) && d.underFloor() > 0; settled = now.Add(diskLag) {
			if !d.dropOldest() && d.evict(d.underFloor(), "disk is nearly full") == 0 {
				break
			}
		}
	}
}

// wait returns when the eviction should look again.
func (d *Disk) wait(ctx context.Context, due <-chan time.Time) {
	select {
	case <-ctx.Done():
	case <-due:
	case <-d.pressed:
	}
}

// Remove deletes an image by hand: a tag, with the image that it names unless something else does, or an
// image by its digest, with the tags that name it. It returns how many bytes that was, and fs.ErrNotExist
// if nothing of the kind is stored.
func (d *Disk) Remove(ref oci.Reference) (int64, error) {
	if !d.index.Built() {
		return 0, errors.New("the store is still being looked through: try again in a minute")
	}
	d.evicting.Lock()
	defer d.evicting.Unlock()
	dgst := ref.Digest
	if dgst == "" {
		t, err := d.Tag(ref.Repository, ref.Tag)
		if err != nil {
			return 0, err
		}
		if others := d.index.Names(t.Current.Digest, tagKey{ref.Repository, ref.Tag}); others > 0 {
			return 0, d.removeTag(tagKey{ref.Repository, ref.Tag})
		}
		dgst = t.Current.Digest
	} else if _, err := d.manifest(manifestKey{ref.Repository, dgst}); err != nil {
		return 0, err // not what this repository calls so
	}
	v, ok := d.index.Take(dgst)
	if !ok {
		return 0, fs.ErrNotExist
	}
	d.delete(v)
	return v.bytes, nil
}

// Names counts the tags that name content, besides one.
func (x *index) Names(dgst digest.Digest, besides tagKey) int {
	x.mu.Lock()
	defer x.mu.Unlock()
	i, ok := x.find(dgst)
	m := x.manifests[i]
	if !ok || m == nil {
		return 0
	}
	return len(slices.DeleteFunc(slices.Clone(m.tags), func(k tagKey) bool { return k == besides }))
}

func (d *Disk) removeTag(key tagKey) error {
	mu := d.writers.of(key.record())
	mu.Lock()
	defer mu.Unlock()
	d.index.Untag(key)
	d.tags.forget(key)
	d.exporter.changed.Store(true)
	return d.records.remove(key.record())
}

// Untag notes that a tag has no record any more.
func (x *index) Untag(key tagKey) {
	x.mu.Lock()
	defer x.mu.Unlock()
	x.untag(key)
}
