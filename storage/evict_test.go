package storage

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"breakwater/pkg/oci"

	"github.com/opencontainers/go-digest"
)

// pulled is an image as it is after a pull: its manifest, its tag, and its blobs.
type pulled struct {
	repo  oci.Repository
	tag   string
	m     oci.Manifest
	blobs [][]byte
}

// layers stores an image of these blobs under a tag.
func layers(t testing.TB, d *Disk, repo oci.Repository, tag string, blobs ...[]byte) pulled {
	t.Helper()
	p := pulled{repo, tag, manifestOf(t, tag, blobs...), blobs}
	for _, raw := range blobs {
		store(t, d, repo, raw, anonymous)
	}
	name(t, d, p)
	return p
}

func manifestOf(t testing.TB, note string, blobs ...[]byte) oci.Manifest {
	t.Helper()
	var descs []string
	for _, raw := range blobs {
		descs = append(descs, fmt.Sprintf(`{"mediaType":"a/b","digest":%q,"size":%d}`, digest.FromBytes(raw), len(raw)))
	}
	return parsed(t, json.RawMessage(fmt.Sprintf(`{"layers":[%s],"annotations":{"note":%q}}`, strings.Join(descs, ","), note)))
}

// indexOf is an index of these images.
func indexOf(t testing.TB, images ...oci.Manifest) oci.Manifest {
	t.Helper()
	var descs []string
	for _, m := range images {
		descs = append(descs, fmt.Sprintf(`{"mediaType":%q,"digest":%q,"size":%d}`, m.MediaType, m.Digest, len(m.Raw)))
	}
	return parsed(t, json.RawMessage(fmt.Sprintf(`{"manifests":[%s]}`, strings.Join(descs, ","))))
}

// name stores the manifest, and the tag if there is one.
func name(t testing.TB, d *Disk, p pulled) {
	t.Helper()
	err := d.PutManifest(p.repo, p.m, anonymous)
	if err == nil && p.tag != "" {
		err = d.PutTag(p.repo, p.tag, Tag{Current: Validated{p.m.Digest, time.Now(), "u"}})
	}
	if err != nil {
		t.Fatal(err)
	}
}

// there reports whether all of an image is stored, and fails the test if it is there in part, or if a
// record of what is gone is left.
func (p pulled) there(t testing.TB, d *Disk, shared ...[]byte) bool {
	t.Helper()
	_, err := d.Tag(p.repo, p.tag)
	there := err == nil
	if _, err := d.manifest(manifestKey{p.repo, p.m.Digest}); (err == nil) != there {
		t.Errorf("%s: tag there: %v, manifest: %v", p.tag, there, err)
	}
	for _, raw := range p.blobs {
		if slices.ContainsFunc(shared, func(s []byte) bool { return bytes.Equal(s, raw) }) {
			continue
		}
		if dgst := digest.FromBytes(raw); d.holds(dgst) != there {
			t.Errorf("%s: there: %v, blob %s: %v", p.tag, there, dgst, d.holds(dgst))
		}
	}
	if !there {
		for _, dgst := range []digest.Digest{p.m.Digest} {
			left, err := fs.Glob(d.root.root.FS(), "records/*/*/*/"+dgst.Encoded())
			more, merr := fs.Glob(d.root.root.FS(), "records/*/"+dgst.Encoded())
			if err != nil || merr != nil || len(left)+len(more) > 0 {
				t.Errorf("%s is gone, but not %v %v", p.tag, left, more)
			}
		}
	}
	return there
}

// bounded opens a store of that capacity, with its index built.
func bounded(t testing.TB, dir string, capacity int64) *Disk {
	t.Helper()
	d, err := Open(Config{Dir: dir, Capacity: capacity})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = d.Close() })
	built(t, d)
	return d
}

// built waits for the index.
func built(t testing.TB, d *Disk) {
	t.Helper()
	for begun := time.Now(); !d.Usage().Built; time.Sleep(time.Millisecond) {
		if time.Since(begun) > time.Minute {
			t.Fatal("the index is not built")
		}
	}
}

// onDisk is what the blobs take of the disk, with a record each.
func onDisk(t testing.TB, d *Disk) int64 {
	t.Helper()
	var sum int64
	for _, in := range d.blobs {
		err := in.each(".", func(e fs.DirEntry) error {
			info, err := e.Info()
			if err == nil {
				sum += allocated(info) + recordSpace
			}
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	return sum
}

// Whole images go, those that were pulled least recently first; what others need stays.
func TestEvictsByImage(t *testing.T) {
	for _, restart := range []string{"", "after a restart"} {
		t.Run(restart, func(t *testing.T) {
			dir := t.TempDir()
			d := bounded(t, dir, 10<<20)
			base, _ := content(1 << 20)
			var images []pulled
			for i := range 5 {
				own, _ := content(1 << 20)
				images = append(images, layers(t, d, app, fmt.Sprint("v", i), base, own))
			}
			for _, i := range []int{1, 2, 3, 4, 0} {
				if _, err := d.Manifest(app, images[i].m.Digest); err != nil {
					t.Fatal(err)
				}
			}
			if restart != "" {
				if err := d.Close(); err != nil {
					t.Fatal(err)
				}
				d = bounded(t, dir, 10<<20)
			}
			u := d.Usage()
			if u.Images != 5 || u.Complete != 5 || u.Contents != 11 || u.Bytes != onDisk(t, d) || u.Reserved != 0 {
				t.Errorf("%+v, on the disk are %d bytes", u, onDisk(t, d))
			}
			if freed := d.evict(2<<20, "test"); freed < 2<<20 {
				t.Errorf("freed %d", freed)
			}
			var there []string
			for _, p := range images {
				if p.there(t, d, base) {
					there = append(there, p.tag)
				}
			}
			if fmt.Sprint(there) != "[v0 v3 v4]" {
				t.Errorf("%v are left", there)
			}
			wantBlob(t, d, app, base)
			if u := d.Usage(); u.Bytes != onDisk(t, d) || u.Images != 3 || u.Complete != 3 {
				t.Errorf("%+v, on the disk are %d bytes", u, onDisk(t, d))
			}
			d.evict(1<<40, "test")
			if u := d.Usage(); u.Bytes != 0 || u.Contents != 0 || onDisk(t, d) != 0 {
				t.Errorf("%+v after all has gone, on the disk are %d bytes", u, onDisk(t, d))
			}
		})
	}
}

// An index goes with its platforms, but for one that has a name of its own; what refers to an image goes
// with it.
func TestEvictsWhatBelongsTogether(t *testing.T) {
	for _, restart := range []string{"", "after a restart"} {
		t.Run(restart, func(t *testing.T) {
			dir := t.TempDir()
			d := bounded(t, dir, 1<<30)
			one, _ := content(1000)
			two, _ := content(1000)
			sig, _ := content(1000)
			arm := pulled{app, "", manifestOf(t, "arm", one), [][]byte{one}}
			amd := layers(t, d, app, "amd64", two)
			store(t, d, app, one, anonymous)
			name(t, d, arm)
			all := pulled{app, "latest", indexOf(t, amd.m, arm.m, manifestOf(t, "never asked for")), nil}
			name(t, d, all)
			store(t, d, app, sig, anonymous)
			signature := pulled{app, "", parsed(t, json.RawMessage(fmt.Sprintf(`{"layers":[{"mediaType":"a/b","digest":%q,"size":1000}],"subject":{"mediaType":"a/b","digest":%q,"size":1}}`,
				digest.FromBytes(sig), all.m.Digest))), nil}
			name(t, d, signature)
			old := pulled{app, strings.Replace(all.m.Digest.String(), ":", "-", 1) + ".sig", manifestOf(t, "sig"), nil}
			name(t, d, old)
			if restart != "" {
				if err := d.Close(); err != nil {
					t.Fatal(err)
				}
				d = bounded(t, dir, 1<<30)
			}
			if u := d.Usage(); u.Images != 1 || u.Complete != 1 {
				t.Errorf("%+v", u)
			}
			v, ok := d.index.Oldest(nil, nil)
			if !ok || v.dgst != all.m.Digest {
				t.Fatalf("%v goes first, want %s", v, all.m.Digest)
			}
			d.delete(v)
			for dgst, want := range map[digest.Digest]bool{all.m.Digest: false, arm.m.Digest: false, digest.FromBytes(one): false, signature.m.Digest: false,
				digest.FromBytes(sig): false, old.m.Digest: false, amd.m.Digest: true, digest.FromBytes(two): true} {
				if d.holds(dgst) != want {
					t.Errorf("%s is there: %v", dgst, !want)
				}
			}
			if u := d.Usage(); u.Images != 1 || u.Bytes != onDisk(t, d) {
				t.Errorf("%+v, on the disk are %d bytes", u, onDisk(t, d))
			}
		})
	}
}

// Of the images that go together, none of the files goes before the names of all have gone for good, which
// takes one sync of their folder.
func TestEvictionTakesNamesFirst(t *testing.T) {
	d := bounded(t, t.TempDir(), 1<<30)
	unsafe := func(c, _ string) error {
		if c == string(callSync) {
			return errNoSync // what is stored here is not to outlive anything
		}
		return nil
	}
	d.fault.Store(&unsafe)
	for i := range evictedAtOnce + 1 {
		own, _ := content(1000)
		layers(t, d, app, fmt.Sprint("v", i), own)
	}
	var calls []string
	fault := func(c, name string) error {
		switch {
		case c == string(callRemove) && strings.Contains(name, "_tags/"):
			calls = append(calls, "name")
		case c == string(callSync) && strings.HasSuffix(name, "_tags"):
			calls = append(calls, "sync")
		case c == string(callRemove) && strings.HasPrefix(name, "blobs/"):
			calls = append(calls, "file")
		}
		return nil
	}
	d.fault.Store(&fault)
	d.evict(1<<40, "test")
	d.fault.Store(nil)
	want := slices.Repeat([]string{"name"}, evictedAtOnce)
	want = append(append(want, "sync"), slices.Repeat([]string{"file"}, 2*evictedAtOnce)...)
	want = append(want, "name", "sync", "file", "file")
	if !slices.Equal(calls, want) {
		t.Errorf("%v", calls)
	}
}

// What is evicted takes its space until its files are gone, and who needs that waits for it: nothing else goes
// in its place.
func TestEvictedSpaceIsNotGivenAwayBeforeItIsFree(t *testing.T) {
	const capacity = 20 << 20
	d := bounded(t, t.TempDir(), capacity)
	var images []pulled
	for i := range 2 {
		own, _ := content(9 << 20)
		images = append(images, layers(t, d, app, fmt.Sprint("v", i), own))
	}
	removing, proceed := make(chan struct{}), make(chan struct{})
	var once sync.Once
	fault := func(c, name string) error {
		if c == string(callRemove) && strings.HasPrefix(name, "blobs/") {
			once.Do(func() {
				close(removing)
				<-proceed
			})
		}
		return nil
	}
	d.fault.Store(&fault)
	var work sync.WaitGroup
	work.Go(func() { d.evict(1, "test") })
	<-removing
	if u := d.Usage(); u.Bytes != onDisk(t, d) {
		t.Errorf("%+v, on the disk are %d bytes", u, onDisk(t, d))
	}
	if d.index.Reserve(9<<20, capacity) {
		t.Error("what is still on the disk was given away")
	}
	made := make(chan error, 1)
	work.Go(func() { made <- d.makeRoom(9 << 20) })
	select {
	case err := <-made:
		t.Errorf("room was made of what is still on the disk: %v", err)
	case <-time.After(10 * time.Millisecond):
	}
	close(proceed)
	work.Wait()
	if err := <-made; err != nil || images[0].there(t, d) || !images[1].there(t, d) {
		t.Errorf("%v, or not the older one is gone", err)
	}
	if u := d.Usage(); u.Bytes != onDisk(t, d) || u.Reserved != 9<<20 || u.Evicted != 1 {
		t.Errorf("%+v, on the disk are %d bytes", u, onDisk(t, d))
	}
}

// What is kept never goes, and what could not be had again goes last.
func TestEvictionSpares(t *testing.T) {
	d := bounded(t, t.TempDir(), 1<<30)
	hub := oci.Repository{Registry: "docker.io", Name: "library/app"}
	var images []pulled
	for i, repo := range []oci.Repository{app, app, hub, app, hub} {
		own, _ := content(10_000)
		images = append(images, layers(t, d, repo, fmt.Sprint("v", i), own))
	}
	d.Use(Policy{
		Kept: func() []oci.Reference {
			return []oci.Reference{{Repository: hub, Tag: "v2"}, {Repository: app, Digest: images[1].m.Digest}}
		},
		Out: func(registry string) bool { return registry == app.Registry },
	})
	for n, want := range []string{"[v0 v1 v2 v3]", "[v1 v2 v3]", "[v1 v2]", "[v1 v2]"} {
		d.evict(1, "test")
		var there []string
		for _, p := range images {
			if p.there(t, d) {
				there = append(there, p.tag)
			}
		}
		if fmt.Sprint(there) != want {
			t.Errorf("after %d: %v are left, want %s", n+1, there, want)
		}
	}
}

// The limit holds while more than it comes, and each image that is called complete is.
func TestF61WorkingSetOfThreeTimesTheCapacity(t *testing.T) {
	const capacity = 4 << 20
	d := bounded(t, t.TempDir(), capacity)
	base, _ := content(512 << 10)
	var images []pulled
	for i := range 48 {
		own, _ := content(256 << 10)
		images = append(images, pulled{app, fmt.Sprint("v", i), manifestOf(t, fmt.Sprint("v", i), base, own), [][]byte{base, own}})
	}
	random := rand.New(rand.NewPCG(1, 61))
	fetched := map[digest.Digest]int{}
	for range 300 {
		p := images[random.IntN(len(images))]
		if _, err := d.Manifest(p.repo, p.m.Digest); err != nil {
			for _, raw := range p.blobs {
				if dgst := digest.FromBytes(raw); !d.index.Is(dgst) {
					store(t, d, app, raw, anonymous)
					fetched[dgst]++
				}
			}
			name(t, d, p)
		}
		d.evicting.Lock() // nothing is half gone
		if sum := onDisk(t, d); sum > capacity+capacity/overCapacity {
			t.Errorf("%d bytes on the disk, capacity %d", sum, int64(capacity))
		}
		if p := images[random.IntN(len(images))]; p.there(t, d, base) && !d.holds(digest.FromBytes(base)) {
			t.Errorf("%s has lost the layer that all share", p.tag)
		}
		d.evicting.Unlock()
		if t.Failed() {
			return
		}
	}
	if n := fetched[digest.FromBytes(base)]; n > 1 {
		t.Errorf("the layer that all share was fetched %d times", n)
	}
	if u := d.Usage(); u.Bytes != onDisk(t, d) || u.Images != u.Complete || u.Images < 8 || u.Evicted == 0 {
		t.Errorf("%+v, on the disk are %d bytes", u, onDisk(t, d))
	}
}

// What is evicted while somebody reads it takes its space until that ends.
func TestF60SpaceOfWhatIsStillRead(t *testing.T) {
	d := bounded(t, t.TempDir(), 1<<30)
	raw, dgst := content(1 << 20)
	layers(t, d, app, "latest", raw)
	b, err := d.Blob(app, dgst)
	if err != nil {
		t.Fatal(err)
	}
	second, err := d.Blob(app, dgst)
	if err != nil {
		t.Fatal(err)
	}
	if d.evict(1, "test"); d.holds(dgst) {
		t.Fatal("it is still there")
	}
	if u := d.Usage(); u.Bytes < 1<<20 {
		t.Errorf("%+v while it is read", u)
	}
	layers(t, d, app, "latest", raw) // it is back meanwhile, and takes its space again
	if u := d.Usage(); u.Bytes < 2<<20 {
		t.Errorf("%+v while it is read and stored again", u)
	}
	if got, err := io.ReadAll(b); err != nil || !bytes.Equal(got, raw) {
		t.Errorf("%d bytes, %v", len(got), err)
	}
	if err := errors.Join(b.Close(), second.Close()); err != nil {
		t.Fatal(err)
	}
	if u := d.Usage(); u.Bytes != onDisk(t, d) {
		t.Errorf("%+v, on the disk are %d bytes", u, onDisk(t, d))
	}
}

// The last complete image outlives the current one in the record, and the other way round.
func TestEvictionKeepsTheOtherOfATag(t *testing.T) {
	for _, goes := range []string{"current", "last complete"} {
		d := bounded(t, t.TempDir(), 1<<30)
		one, _ := content(1000)
		two, _ := content(1000)
		complete, current := layers(t, d, app, "latest", one), layers(t, d, app, "latest", two)
		at := time.Now().UTC().Round(0)
		if err := d.PutTag(app, "latest", Tag{Current: Validated{current.m.Digest, at, "u"}, LastComplete: Validated{complete.m.Digest, at.Add(-time.Hour), "u"}}); err != nil {
			t.Fatal(err)
		}
		victim, left := current, complete
		if goes == "last complete" {
			victim, left = complete, current
		}
		v, ok := d.index.Take(victim.m.Digest)
		if !ok {
			t.Fatal("not there")
		}
		d.delete(v)
		for range 2 {
			tag, err := d.Tag(app, "latest")
			if err != nil || tag.Current.Digest != left.m.Digest || tag.LastComplete != (Validated{}) {
				t.Errorf("%s goes: %+v, %v", goes, tag, err)
			}
			d.forget()
		}
	}
}

func TestRemoveByHand(t *testing.T) {
	d := bounded(t, t.TempDir(), 1<<30)
	raw, _ := content(10_000)
	p := layers(t, d, app, "latest", raw)
	other := p
	other.tag = "v1"
	name(t, d, other)
	reference := func(tag string) oci.Reference { return oci.Reference{Repository: app, Tag: tag} }
	if n, err := d.Remove(reference("latest")); err != nil || n != 0 {
		t.Errorf("%d bytes, %v", n, err)
	}
	if _, err := d.Tag(app, "latest"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the tag is there: %v", err)
	}
	if !other.there(t, d) {
		t.Error("the image is gone though it has another name")
	}
	if n, err := d.Remove(reference("v1")); err != nil || n < 10_000 {
		t.Errorf("%d bytes, %v", n, err)
	}
	if other.there(t, d) {
		t.Error("it is still there")
	}
	if _, err := d.Remove(reference("v1")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("%v, want absent", err)
	}
	p = layers(t, d, app, "latest", raw)
	if _, err := d.Remove(oci.Reference{Repository: app, Digest: digest.FromString("x")}); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("%v, want absent", err)
	}
	if n, err := d.Remove(oci.Reference{Repository: app, Digest: p.m.Digest}); err != nil || n < 10_000 || p.there(t, d) {
		t.Errorf("%d bytes, %v", n, err)
	}
}

// Files that are removed behind the store's back are misses, and counted as gone.
func TestFilesRemovedBehindItsBack(t *testing.T) {
	dir := t.TempDir()
	d := bounded(t, dir, 1<<30)
	raw, dgst := content(10_000)
	p := layers(t, d, app, "latest", raw)
	if err := os.Remove(filepath.Join(dir, "blobs", "sha256", dgst.Encoded())); err != nil {
		t.Fatal(err)
	}
	wantAbsent(t, d, app, dgst)
	if u := d.Usage(); u.Complete != 0 || u.Bytes != onDisk(t, d) {
		t.Errorf("%+v, on the disk are %d bytes", u, onDisk(t, d))
	}
	store(t, d, app, raw, anonymous)
	if u := d.Usage(); u.Complete != 1 || u.Bytes != onDisk(t, d) {
		t.Errorf("%+v, on the disk are %d bytes", u, onDisk(t, d))
	}
	if err := errors.Join(os.Remove(filepath.Join(dir, "blobs", "sha256", p.m.Digest.Encoded())), d.Close()); err != nil {
		t.Fatal(err)
	}
	bounded(t, dir, 1<<30)
	if _, err := os.Stat(filepath.Join(dir, "records", app.Registry, app.Name, "_tags", "latest")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a record points at a manifest that is not stored: %v", err)
	}
}

// Space is reserved before a download writes, what is parked gives way first, and where nothing can go
// there is none.
func TestCapacityIsReserved(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const capacity = 20 << 20
		d, err := Open(Config{Dir: t.TempDir(), Capacity: capacity})
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = d.Close() }()
		synctest.Wait()
		raw, dgst := content(10 << 20)
		in := begin(t, d, dgst, int64(len(raw)))
		other, second := content(10 << 20)
		park(t, d, other, 2<<20)
		third, fourth := content(10 << 20)
		if u := d.Usage(); u.Reserved != 20<<20 {
			t.Errorf("%+v", u)
		}
		again := begin(t, d, fourth, int64(len(third)))
		if left := parkedFiles(t, d); len(left) != 0 {
			t.Errorf("%v did not give way", left)
		}
		if _, err := d.Ingest(app, second, int64(len(other))); !errors.Is(err, syscall.ENOSPC) {
			t.Errorf("%v, want no space: nothing can go", err)
		}
		again.Abort(errors.New("enough"))
		write(t, in, raw)
		if err := commit(in, anonymous); err != nil {
			t.Fatal(err)
		}
		if u := d.Usage(); u.Reserved != 0 || u.Bytes != onDisk(t, d) {
			t.Errorf("%+v, on the disk are %d bytes", u, onDisk(t, d))
		}
	})
}
