package proxy

import (
	"crypto/sha256"
	"encoding/hex"
	"maps"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"time"

	"breakwater/pkg/buckettest"
	"breakwater/pkg/oci"
	"breakwater/storage"
	"breakwater/storage/s3"
)

// TestSharedJournalAfterRenewal: a tag that moves while its unchanged record waits to be renewed outlives the
// process as any other does.
func TestSharedJournalAfterRenewal(t *testing.T) {
	h := newHosts(t)
	dir := t.TempDir()
	a := h.hostIn(dir, shared, h.open(s3.Config{}))
	ref := reference(a, "v1")
	first := h.push("v1", 920, 1000)
	h.pulls(a, "v1", first)
	h.published(a, "v1", first.Digest())
	h.eventually("all is published", func() bool { return a.mirror.completions.count() == 0 && a.mirror.fleet.publish.count() == 0 })
	h.redate("records/quay.test/org/app/_tags/v1", time.Now().Add(-2*republishEvery)) // or it needs no renewal
	a.shared.Forget(ref)
	h.bucket.Fault(buckettest.Writes, buckettest.Forbidden())
	tag, err := a.store.Tag(ref.Repository, ref.Tag)
	if err != nil {
		t.Fatal(err)
	}
	tag.Published.At = tag.Published.At.Add(-2 * republishEvery)
	if err := a.store.PutTag(ref.Repository, ref.Tag, tag); err != nil {
		t.Fatal(err)
	}
	a.mirror.fleet.publish.tag(ref, nil)
	if n := a.mirror.fleet.publish.count(); n != 1 {
		t.Fatalf("%d wait, want the renewal", n)
	}
	second := h.push("v1", 921, 1000)
	h.pulls(a, "v1", second)
	h.eventually("the journal has the tag", func() bool { return slices.Contains(a.journal(), ref.String()) })
	h.kill(a)
	h.bucket.Heal()
	h.quay.Fault(everything, outages["dead"])
	b := h.hostIn(dir, shared, h.open(s3.Config{}))
	h.published(b, "v1", second.Digest())
	h.eventually("the journal is empty", func() bool { return len(b.journal()) == 0 })
}

// TestSharedJournalHangs: a disk that does not take the journal holds up nobody who pulls, and what it could not be
// told by then is written at a clean stop.
func TestSharedJournalHangs(t *testing.T) {
	h := newHosts(t)
	h.bucket.Fault(buckettest.Writes, buckettest.Forbidden())
	image := h.push("v1", 930, 1000)
	var disk hanging
	a := h.hostOn(storage.Config{Fault: disk.fault}, t.TempDir(), "completion: {images: none}"+oneUpstream, h.open(s3.Config{}))
	tag, byDigest := reference(a, "v1"), oci.Reference{Repository: a.repository("org/app"), Digest: image.Digest()}
	goOn := disk.hang(tag, byDigest)
	defer goOn()
	answered := make(chan struct{})
	go func() {
		defer close(answered)
		h.pulls(a, "v1", image)
		a.get(app+"/manifests/"+image.Digest().String()).want(a, http.StatusOK)
	}()
	select {
	case <-answered:
	case <-time.After(10 * time.Second):
		t.Error("nobody is answered while the disk hangs")
	}
	<-disk.hung
	goOn()
	<-answered
	h.kill(a)
	if got, want := a.journal(), []string{tag.String(), byDigest.String()}; !slices.Equal(got, want) {
		t.Errorf("the journal has %v, want %v", got, want)
	}
}

// TestSharedJournalOrder: whatever changes while the journal is being written, the disk ends with what waits; and
// what is added after its goroutine has ended is written by Close.
func TestSharedJournalOrder(t *testing.T) {
	h := newHosts(t)
	h.bucket.Down()
	var disk hanging
	a := h.hostOn(storage.Config{Fault: disk.fault}, t.TempDir(), "completion: {images: none}"+oneUpstream, h.open(s3.Config{}))
	p, ref := a.mirror.fleet.publish, reference(a, "v1")
	p.m.sharing.cancel()
	p.m.sharing.stop(t.Context()) // the test writes the journal
	lasting, renewal, done := func() { p.addLasting(ref, nil) }, func() { p.add(ref, nil) }, func() { p.done(ref) }
	type changes []func()
	for name, tt := range map[string]struct {
		before changes // the journal is written after each; the disk hangs after the last if there is a change during that
		during changes
		want   bool
	}{
		"noted":                          {before: changes{lasting}, want: true},
		"a renewal":                      {before: changes{renewal}},
		"done":                           {before: changes{lasting, done}},
		"noted after a renewal":          {before: changes{renewal, lasting}, want: true},
		"done while noted":               {before: changes{lasting}, during: changes{done}},
		"done and again while noted":     {before: changes{lasting}, during: changes{done, lasting}, want: true},
		"renewed and done while noted":   {before: changes{lasting}, during: changes{renewal, done}},
		"again while forgotten":          {before: changes{lasting, done}, during: changes{lasting}, want: true},
		"renewed while forgotten":        {before: changes{lasting, done}, during: changes{renewal}},
		"again and done while forgotten": {before: changes{lasting, done}, during: changes{lasting, done}},
	} {
		t.Run(name, func(t *testing.T) {
			for i, do := range tt.before {
				do()
				if i < len(tt.before)-1 || tt.during == nil {
					p.writeJournal()
					continue
				}
				goOn := disk.hang(ref)
				written := make(chan struct{})
				go func() {
					defer close(written)
					p.writeJournal()
				}()
				select {
				case <-disk.hung:
				case <-written:
					t.Fatal("nothing was written")
				}
				for _, do := range tt.during {
					do()
				}
				goOn()
				<-written
			}
			if got := slices.Contains(a.journal(), ref.String()); got != tt.want {
				t.Errorf("in the journal: %v, want %v", got, tt.want)
			}
			done()
			p.writeJournal()
			if got := a.journal(); len(got) != 0 {
				t.Errorf("the journal has %v", got)
			}
		})
	}
	lasting()
	h.kill(a)
	if got := a.journal(); !slices.Contains(got, ref.String()) {
		t.Errorf("the journal has %v", got)
	}
}

// done has a publication leave that waits.
func (p *publisher) done(ref oci.Reference) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if w := p.waiting[ref]; w != nil {
		p.leave(w)
	}
}

// hanging is a disk that may hang in calls for the journal.
type hanging struct {
	mu    sync.Mutex // guards what follows
	names []string   // of files
	until chan struct{}
	hung  chan struct{} // gets something when it does
}

func (d *hanging) fault(_, name string) error {
	d.mu.Lock()
	hangs, until, hung := slices.Contains(d.names, name), d.until, d.hung
	d.mu.Unlock()
	if !hangs {
		return nil
	}
	select {
	case hung <- struct{}{}:
	default:
	}
	<-until
	return nil
}

// hang has the files of references hang until goOn is called.
func (d *hanging) hang(refs ...oci.Reference) (goOn func()) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.names, d.until, d.hung = nil, make(chan struct{}), make(chan struct{}, 1)
	for _, ref := range refs {
		sum := sha256.Sum256([]byte(ref.String()))
		d.names = append(d.names, hex.EncodeToString(sum[:]))
	}
	return sync.OnceFunc(func() {
		d.mu.Lock()
		d.names = nil
		d.mu.Unlock()
		close(d.until)
	})
}

// journal is what the disk has to tell the next process.
func (r *rig) journal() []string {
	r.Helper()
	files, err := filepath.Glob(filepath.Join(r.dir, "data", "unpublished", "*"))
	if err != nil {
		r.Fatal(err)
	}
	noted := map[string]bool{}
	for _, file := range files {
		if raw, err := os.ReadFile(file); err == nil && len(raw) > 0 {
			noted[string(raw)] = true
		}
	}
	return slices.Sorted(maps.Keys(noted))
}
