package storage

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"slices"
	"sync"
	"testing"

	"breakwater/pkg/oci"

	"github.com/opencontainers/go-digest"
	"pgregory.net/rapid"
)

// kept is the store as its model has it: images in the order of their last pull.
type kept struct {
	order []int // of images, the one to go first in front
}

func (k *kept) pull(image int) {
	k.drop(image)
	k.order = append(k.order, image)
}

func (k *kept) drop(image int) {
	k.order = slices.DeleteFunc(k.order, func(i int) bool { return i == image })
}

// The images that the machine plays with: all have the first layer in common, and neighbours another.
var machineImages = func() (images []pulled) {
	layer := func(n int) []byte { return bytes.Repeat([]byte(fmt.Sprintf("layer %02d\n", n)), 3000) }
	for i := range 8 {
		blobs := [][]byte{layer(0), layer(1 + i/2), layer(10 + i)}
		m, err := oci.ParseManifest("", fmt.Appendf(nil, `{"layers":[%s],"annotations":{"note":"%d"}}`, descriptors(blobs), i), digest.SHA256)
		if err != nil {
			panic(err)
		}
		images = append(images, pulled{app, fmt.Sprint("v", i), m, blobs})
	}
	return images
}()

func descriptors(blobs [][]byte) string {
	var all string
	for i, raw := range blobs {
		if i > 0 {
			all += ","
		}
		all += fmt.Sprintf(`{"mediaType":"a/b","digest":%q,"size":%d}`, digest.FromBytes(raw), len(raw))
	}
	return all
}

// machine runs a store and its model side by side.
type machine struct {
	*testing.T
	d     *Disk
	dir   string
	model kept
}

// fetch pulls an image as a client does: what is not stored is brought first.
func (m *machine) fetch(p pulled) error {
	if _, err := m.d.Manifest(p.repo, p.m.Digest); err != nil {
		if err := m.d.PutManifest(p.repo, p.m, anonymous); err != nil {
			return err
		}
		_, _ = m.d.Manifest(p.repo, p.m.Digest)
	}
	for _, raw := range p.blobs {
		dgst := digest.FromBytes(raw)
		b, err := m.d.Blob(p.repo, dgst)
		if err == nil {
			got, err := io.ReadAll(b)
			if cerr := b.Close(); err != nil || cerr != nil || !bytes.Equal(got, raw) {
				return fmt.Errorf("%s: %d bytes that are not its own: %w", dgst, len(got), errors.Join(err, cerr))
			}
			if m.d.index.Is(dgst) {
				continue
			}
		}
		in, err := m.d.Ingest(p.repo, dgst, int64(len(raw)))
		if err == nil {
			_, err = in.Write(raw)
		}
		if err == nil {
			err = commit(in, anonymous)
		}
		if err != nil {
			return err
		}
	}
	err := m.d.PutTag(p.repo, p.tag, Tag{Current: Validated{p.m.Digest, anonymous.At, "u"}})
	if errors.Is(err, fs.ErrNotExist) { // evicted meanwhile
		return nil
	}
	return err
}

// check holds what must be so after each step: what is called complete is, what is counted is there, and no
// record points at what is not stored.
func (m *machine) check(rt *rapid.T) {
	u := m.d.Usage()
	if sum := onDisk(m, m.d); u.Bytes != sum || u.Reserved != 0 {
		rt.Fatalf("%+v, on the disk are %d bytes", u, sum)
	}
	for _, p := range machineImages {
		complete, _ := m.d.index.Complete(p.m.Digest)
		all := true
		for _, raw := range p.blobs {
			all = all && m.d.holds(digest.FromBytes(raw))
		}
		if there := m.d.holds(p.m.Digest); complete != (there && all) {
			rt.Fatalf("%s is called complete: %v; manifest: %v, all blobs: %v", p.tag, complete, there, all)
		}
		if tag, err := m.d.Tag(p.repo, p.tag); err == nil && !m.d.holds(tag.Current.Digest) {
			rt.Fatalf("the record of %s points at %s, which is not stored", p.tag, tag.Current.Digest)
		}
	}
}

// checkModel compares which images are there, one step at a time.
func (m *machine) checkModel(rt *rapid.T) {
	for i, p := range machineImages {
		if want, got := slices.Contains(m.model.order, i), m.d.holds(p.m.Digest); got != want {
			rt.Fatalf("%s is there: %v, want %v; order %v", p.tag, got, want, m.model.order)
		}
	}
}

// The store does what its model does: put, get, evict, remove, reopen, one after the other and at once.
func TestStoreAgainstModel(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		dir := t.TempDir()
		m := &machine{T: t, dir: dir, d: bounded(t, dir, 1<<30)}
		defer func() { _ = m.d.Close() }()
		image := rapid.IntRange(0, len(machineImages)-1)
		rt.Repeat(map[string]func(*rapid.T){
			"": m.check,
			"pull": func(rt *rapid.T) {
				i := image.Draw(rt, "image")
				if err := m.fetch(machineImages[i]); err != nil {
					rt.Fatal(err)
				}
				m.model.pull(i)
				m.checkModel(rt)
			},
			"evict": func(rt *rapid.T) {
				freed := m.d.evict(1, "test")
				if (freed > 0) != (len(m.model.order) > 0) {
					rt.Fatalf("freed %d of %v", freed, m.model.order)
				}
				if freed > 0 {
					m.model.order = m.model.order[1:]
				}
				m.checkModel(rt)
			},
			"remove": func(rt *rapid.T) {
				i := image.Draw(rt, "image")
				_, err := m.d.Remove(oci.Reference{Repository: app, Tag: machineImages[i].tag})
				if errors.Is(err, fs.ErrNotExist) == slices.Contains(m.model.order, i) {
					rt.Fatalf("%v of %v", err, m.model.order)
				}
				m.model.drop(i)
				m.checkModel(rt)
			},
			"reopen": func(*rapid.T) {
				if err := m.d.Close(); err != nil {
					rt.Fatal(err)
				}
				m.d = bounded(t, dir, 1<<30)
				m.checkModel(rt)
			},
			"at once": func(rt *rapid.T) {
				var all sync.WaitGroup
				errs := make(chan error, 32)
				for _, i := range rapid.SliceOfN(image, 2, 6).Draw(rt, "images") {
					all.Go(func() { errs <- m.fetch(machineImages[i]) })
				}
				for range rapid.IntRange(0, 3).Draw(rt, "evictions") {
					all.Go(func() { m.d.evict(1, "test") })
				}
				all.Wait()
				close(errs)
				for err := range errs {
					if err != nil {
						rt.Fatal(err)
					}
				}
				// Which of them are left, some in part, and in which order they go, is the race's: begin anew.
				m.model.order = nil
				for i, p := range machineImages {
					left := m.d.holds(p.m.Digest)
					if err := m.fetch(p); err != nil {
						rt.Fatal(err)
					}
					if m.model.pull(i); left {
						continue
					}
					if _, err := m.d.Remove(oci.Reference{Repository: app, Digest: p.m.Digest}); err != nil {
						rt.Fatal(err)
					}
					m.model.drop(i)
				}
				m.checkModel(rt)
			},
		})
	})
}
