package storage

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"reflect"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"breakwater/pkg/oci"

	"github.com/google/go-cmp/cmp"
	"github.com/opencontainers/go-digest"
)

func latest(t *testing.T, d *Disk) Tag {
	t.Helper()
	got, err := d.Tag(app, "latest")
	if err != nil {
		t.Fatal(err)
	}
	return got
}

// forget empties what is in memory, as a restart does.
func (d *Disk) forget() {
	d.tags.entries.Purge()
	d.manifests.clear()
}

func TestPrivateContentStaysInItsRepository(t *testing.T) {
	d := open(t, t.TempDir())
	m, layer := image(t)
	dgst := store(t, d, app, layer, secret)
	if err := d.PutManifest(app, m, secret); err != nil {
		t.Fatal(err)
	}
	check := func(repo oci.Repository, reached bool) {
		t.Helper()
		for range 2 { // from the disk, then from memory
			_, err := d.Manifest(repo, m.Digest)
			if reached != (err == nil) || !reached && !errors.Is(err, fs.ErrNotExist) {
				t.Errorf("manifest in %s: %v", repo, err)
			}
		}
		for _, dgst := range []digest.Digest{dgst, m.Digest} {
			if b, err := d.Blob(repo, dgst); err == nil {
				_ = b.Close()
				if !reached {
					t.Errorf("%s is read in %s", dgst, repo)
				}
			} else if reached || !errors.Is(err, fs.ErrNotExist) {
				t.Errorf("blob in %s: %v", repo, err)
			}
		}
		err := d.PutTag(repo, "latest", Tag{Current: Validated{m.Digest, time.Now(), "u"}})
		if reached != (err == nil) || !reached && !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("tag in %s: %v", repo, err)
		}
	}
	check(app, true)
	check(other, false)
	if !d.holds(dgst) || !d.holds(m.Digest) {
		t.Error("not stored")
	}
	// A private manifest that lists a blob does not lend it.
	thief := oci.Repository{Registry: "quay.io", Name: "thief/app"}
	if err := d.PutManifest(thief, m, Confirmation{At: anonymous.At, Credential: "thief's"}); err != nil {
		t.Fatal(err)
	}
	wantAbsent(t, d, thief, dgst)
	// Another upstream could claim any digest.
	if err := d.Confirm(other, dgst, Confirmation{Upstream: "evil.test"}); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("confirmed by somebody who never gave it: %v", err)
	}
	check(other, false)
	// Confirmed here, and only here.
	for _, dgst := range []digest.Digest{dgst, m.Digest} {
		if err := d.Confirm(other, dgst, Confirmation{At: anonymous.At, Credential: "k2", Upstream: secret.Upstream}); err != nil {
			t.Fatal(err)
		}
	}
	check(other, true)
	third := oci.Repository{Registry: "quay.io", Name: "org/third"}
	check(third, false)
	d.forget()
	check(app, true)
	check(other, true)
	check(third, false)
	// Got anonymously, it is everybody's.
	for _, dgst := range []digest.Digest{dgst, m.Digest} {
		if err := d.Confirm(other, dgst, Confirmation{Upstream: secret.Upstream}); err != nil {
			t.Fatal(err)
		}
	}
	check(third, true)
}

// TestPublicByPolicy: the policy decides at each reading what is public; what is not any more stays with the
// repositories that got it.
func TestPublicByPolicy(t *testing.T) {
	dir := t.TempDir()
	d := open(t, dir)
	third := oci.Repository{Registry: "quay.io", Name: "org/third"}
	m, raw := image(t)
	layer := m.Blobs[0].Digest
	use := func(public ...oci.Repository) {
		d.Use(Policy{Public: func(repo oci.Repository, _ string) bool { return slices.Contains(public, repo) }})
	}
	check := func(when string, reached ...oci.Repository) {
		t.Helper()
		for _, repo := range []oci.Repository{app, other, third} {
			b, err := d.Blob(repo, layer)
			if err == nil {
				_ = b.Close()
			}
			_, manifestErr := d.Manifest(repo, m.Digest)
			if want := slices.Contains(reached, repo); want != (err == nil) || want != (manifestErr == nil) {
				t.Errorf("%s: %s reaches the blob: %v, the manifest: %v, want %v", when, repo, err, manifestErr, want)
			}
		}
	}
	use(app)
	limited := Confirmation{At: anonymous.At, Upstream: "u", Credential: "for its rate limit"}
	store(t, d, app, raw, limited)
	if err := d.PutManifest(app, m, limited); err != nil {
		t.Fatal(err)
	}
	check("public", app, other, third)
	use()
	check("no longer public", app)
	use(app)
	check("public again", app, other, third)
	use(other)
	for _, dgst := range []digest.Digest{layer, m.Digest} {
		if err := d.Confirm(other, dgst, Confirmation{Upstream: "u"}); err != nil {
			t.Fatal(err)
		}
	}
	check("got in a public one too", app, other, third)
	use()
	check("that one is no longer public either", app, other)
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	d = open(t, dir)
	use()
	check("after a restart", app, other)
}

// TestPolicyBesideReads changes the policy, as a SIGHUP does, while manifests are read into memory.
func TestPolicyBesideReads(t *testing.T) {
	d := open(t, t.TempDir())
	var manifests []digest.Digest
	for range 8 {
		m, _ := image(t)
		if err := d.PutManifest(app, m, anonymous); err != nil {
			t.Fatal(err)
		}
		manifests = append(manifests, m.Digest)
	}
	var readers sync.WaitGroup
	for range 2 {
		readers.Go(func() {
			for i := range 200 {
				if _, err := d.Manifest(app, manifests[i%len(manifests)]); err != nil {
					t.Error(err)
				}
			}
		})
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		readers.Wait()
	}()
	for {
		select {
		case <-done:
			return
		default:
			d.Use(Policy{})
		}
	}
}

func TestConfirmRefusesWhatIsNotStored(t *testing.T) {
	d := open(t, t.TempDir())
	_, dgst := content(100)
	for _, c := range []Confirmation{anonymous, secret} {
		if err := d.Confirm(app, dgst, c); !errors.Is(err, fs.ErrNotExist) {
			t.Error(err)
		}
	}
	if _, err := d.root.root.Stat("records/quay.io"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a record of it: %v", err)
	}
}

func TestPutManifest(t *testing.T) {
	d := open(t, t.TempDir())
	m, layer := image(t)
	wrong := m
	wrong.Digest = digest.FromBytes(layer)
	if err := d.PutManifest(app, wrong, anonymous); !errors.Is(err, ErrMismatch) {
		t.Errorf("wrong digest: %v", err)
	}
	wantEmpty(t, d, "blobs/sha256")
	store(t, d, app, layer, anonymous)
	if got, err := d.Manifest(app, digest.FromBytes(layer)); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a layer is the manifest %v, %v", got, err)
	}
	if err := d.PutManifest(app, m, anonymous); err != nil {
		t.Fatal(err)
	}
	d.forget()
	got, err := d.Manifest(other, m.Digest) // public, without a record there
	if diff := cmp.Diff(m, got); err != nil || diff != "" {
		t.Error(err, diff)
	}
	m512, err := oci.ParseManifest("", m.Raw, digest.SHA512)
	if err != nil {
		t.Fatal(err)
	}
	if err := d.PutManifest(app, m512, anonymous); err != nil {
		t.Fatal(err)
	}
	d.forget()
	if got, err := d.Manifest(app, m512.Digest); err != nil || got.Digest != m512.Digest {
		t.Error(got.Digest, err)
	}
	if err := d.root.root.WriteFile(d.blobName(m.Digest), []byte("cut"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := d.PutManifest(app, m, anonymous); err != nil { // heals it
		t.Fatal(err)
	}
	wantBlob(t, d, app, m.Raw)
}

func TestManifestMemoryIsBounded(t *testing.T) {
	c, err := newManifestCache()
	if err != nil {
		t.Fatal(err)
	}
	var keys []manifestKey
	for n := range 100 {
		key := manifestKey{app, digest.FromString(fmt.Sprint(n))}
		keys = append(keys, key)
		for range 2 {
			c.add(key, oci.Manifest{Digest: key.dgst, Raw: make([]byte, 1<<20)})
		}
		if c.bytes.Load() > manifestMemory {
			t.Fatalf("%d bytes", c.bytes.Load())
		}
	}
	if n := c.entries.Len(); n < 14 || n > 16 {
		t.Errorf("%d entries", n)
	}
	c.add(manifestKey{other, ""}, oci.Manifest{Raw: make([]byte, manifestMemory)})
	if c.entries.Len() < 14 {
		t.Error("a huge manifest has driven out the others")
	}
	for _, key := range keys {
		c.remove(key.dgst)
	}
	if c.bytes.Load() != 0 || c.entries.Len() != 0 {
		t.Errorf("%d bytes, %d entries after removal", c.bytes.Load(), c.entries.Len())
	}
}

// A manifest is forgotten for all repositories, and what the cache drops by itself leaves nothing behind.
func TestManifestIsForgottenEverywhere(t *testing.T) {
	c, err := newManifestCache()
	if err != nil {
		t.Fatal(err)
	}
	gone, stays := digest.FromString("gone"), digest.FromString("stays")
	for _, repo := range []oci.Repository{app, other} {
		for _, dgst := range []digest.Digest{gone, stays} {
			c.add(manifestKey{repo, dgst}, oci.Manifest{Digest: dgst})
		}
	}
	c.remove(gone)
	for _, repo := range []oci.Repository{app, other} {
		if c.entries.Contains(manifestKey{repo, gone}) || !c.entries.Contains(manifestKey{repo, stays}) {
			t.Errorf("%s: %v", repo, c.entries.Keys())
		}
	}
	for n := range manifestEntries + 10 {
		dgst := digest.FromString(fmt.Sprint(n))
		c.add(manifestKey{app, dgst}, oci.Manifest{Digest: dgst})
	}
	if len(c.keys) != manifestEntries || len(c.keys) != c.entries.Len() || c.keys[stays] != nil {
		t.Errorf("%d digests, %d entries", len(c.keys), c.entries.Len())
	}
}

func TestQuarantineForgetsManifests(t *testing.T) {
	d := open(t, t.TempDir())
	m, _ := image(t)
	if err := d.PutManifest(app, m, anonymous); err != nil {
		t.Fatal(err)
	}
	d.Quarantine(m.Digest, errors.New("read error"))
	if _, err := d.Manifest(app, m.Digest); !errors.Is(err, fs.ErrNotExist) {
		t.Error(err)
	}
	if err := d.PutManifest(app, m, anonymous); err != nil {
		t.Fatal(err)
	}
	if _, err := d.Manifest(app, m.Digest); err != nil {
		t.Error(err)
	}
}

func TestTagRefusesWhatIsNotStored(t *testing.T) {
	d := open(t, t.TempDir())
	m1, _ := image(t)
	m2, _ := image(t)
	if err := d.PutManifest(app, m1, anonymous); err != nil {
		t.Fatal(err)
	}
	first := Tag{Current: Validated{m1.Digest, anonymous.At, "u"}}
	if err := d.PutTag(app, "latest", first); err != nil {
		t.Fatal(err)
	}
	for _, bad := range []Tag{
		{Current: Validated{m2.Digest, time.Now(), "u"}},
		{Current: Validated{m2.Digest, time.Now(), "u"}, LastComplete: first.Current},
		{Current: first.Current, LastComplete: Validated{m2.Digest, time.Now(), "u"}},
	} {
		if err := d.PutTag(app, "latest", bad); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("%v: %v", bad, err)
		}
	}
	if err := d.PutTag(app, "latest", Tag{}); err == nil {
		t.Error("a tag that names nothing")
	}
	if got := latest(t, d); got != first {
		t.Errorf("%v, want %v", got, first)
	}
	// The old image may be gone when the tag moves on.
	if err := errors.Join(d.PutManifest(app, m2, anonymous), d.root.root.Remove(d.blobName(m1.Digest))); err != nil {
		t.Fatal(err)
	}
	d.forget()
	moved := Tag{Current: Validated{m2.Digest, anonymous.At, "u"}, LastComplete: first.Current}
	if err := d.PutTag(app, "latest", moved); err != nil {
		t.Error(err)
	}
	d.forget()
	if got := latest(t, d); got != moved {
		t.Errorf("%v, want %v", got, moved)
	}
}

func TestTagConfirmationsAreWrittenBehind(t *testing.T) {
	dir := t.TempDir()
	synctest.Test(t, func(t *testing.T) {
		d := open(t, dir)
		m, _ := image(t)
		tag := func() Tag { return Tag{Current: Validated{m.Digest, time.Now().UTC().Round(0), "u"}} }
		first := tag()
		if err := errors.Join(d.PutManifest(app, m, anonymous), d.PutTag(app, "latest", first)); err != nil {
			t.Fatal(err)
		}
		onDisk := func() (on Tag) {
			if err := d.readRecord(tagKey{app, "latest"}.record(), &on); err != nil {
				t.Fatal(err)
			}
			return on
		}
		time.Sleep(100 * time.Millisecond)
		second := tag()
		if err := d.PutTag(app, "latest", second); err != nil {
			t.Fatal(err)
		}
		if onDisk() != first || latest(t, d) != second {
			t.Error("an unchanged digest was not kept in memory")
		}
		d.forget() // it must not depend on the cache
		if latest(t, d) != second {
			t.Error("forgotten")
		}
		time.Sleep(flushEvery + time.Second)
		if onDisk() != second {
			t.Error("not written behind")
		}
		third := tag()
		if err := errors.Join(d.PutTag(app, "latest", third), d.Close()); err != nil {
			t.Fatal(err)
		}
		d = open(t, dir)
		if latest(t, d) != third {
			t.Error("lost by Close")
		}
		if err := d.Close(); err != nil {
			t.Fatal(err)
		}
	})
}

func TestPullsAreWrittenBehind(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := open(t, t.TempDir())
		m, _ := image(t)
		if err := d.PutManifest(app, m, anonymous); err != nil {
			t.Fatal(err)
		}
		for _, repo := range []oci.Repository{app, other} {
			if _, err := d.Manifest(repo, m.Digest); err != nil {
				t.Fatal(err)
			}
		}
		pulled := time.Now()
		time.Sleep(2 * time.Minute)
		var r record
		if err := d.readRecord(manifestRecord(app, m.Digest), &r); err != nil {
			t.Fatal(err)
		}
		if !r.PulledAt.Equal(pulled) || r.MediaType != m.MediaType || r.Size != int64(len(m.Raw)) || !r.confirms() {
			t.Errorf("%+v", r)
		}
		if err := d.readRecord(manifestRecord(other, m.Digest), &r); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("a name that a client made up has a record: %v", err)
		}
		if err := d.records.root.Remove(publicRecord(m.Digest)); err != nil {
			t.Fatal(err)
		}
		d.forget()
		wantAbsent(t, d, other, m.Digest)
		wantBlob(t, d, app, m.Raw)
		if err := d.Close(); err != nil {
			t.Fatal(err)
		}
	})
}

func TestAnswers(t *testing.T) {
	d := open(t, t.TempDir())
	want := Answer{Body: []byte(`{"tags":[]}`), MediaType: "application/json", Link: "next", ValidatedAt: anonymous.At, Upstream: "u"}
	if _, err := d.Answer(app, "tags?n=1"); !errors.Is(err, fs.ErrNotExist) {
		t.Error(err)
	}
	for n := range maxAnswers + 10 {
		if err := d.PutAnswer(app, fmt.Sprint("tags?n=", n), want); err != nil {
			t.Fatal(err)
		}
	}
	got, err := d.Answer(app, fmt.Sprint("tags?n=", maxAnswers+9))
	if diff := cmp.Diff(want, got); err != nil || diff != "" {
		t.Error(err, diff)
	}
	names, err := fs.Glob(d.root.root.FS(), "records/quay.io/org/app/_answers/*")
	if err != nil || len(names) != maxAnswers {
		t.Errorf("%d answers, %v", len(names), err)
	}
	if _, err := d.Answer(app, "tags?n=0"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the oldest: %v", err)
	}
	if _, err := d.Answer(other, fmt.Sprint("tags?n=", maxAnswers+9)); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("in another repository: %v", err)
	}
	huge := Answer{Body: make([]byte, maxAnswer)}
	if err := d.PutAnswer(app, "huge", huge); err != nil {
		t.Error(err)
	}
	if got, err := d.Answer(app, "huge"); err != nil || len(got.Body) != maxAnswer {
		t.Error(len(got.Body), err)
	}
	huge.Body = append(huge.Body, 0)
	if err := d.PutAnswer(app, "huge", huge); !errors.Is(err, ErrTooLarge) {
		t.Error(err)
	}
}

// Whatever a record holds, it is refused or means the same when it is written again.
func FuzzRecord(f *testing.F) {
	f.Add([]byte(`{"current":{"digest":"sha256:44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a","validated_at":"2017-07-26T08:00:00Z","upstream":"u"}}`))
	f.Add([]byte(`{"size":2,"media_type":"a/b","confirmed_at":"2017-07-26T08:00:00Z","credential":"k","platforms":["linux/amd64"]}`))
	f.Add([]byte(`{"body":"e30=","media_type":"application/json","validated_at":"0000-01-01T00:00:00+23:59"}`))
	f.Fuzz(func(t *testing.T, raw []byte) {
		for _, v := range []storable{new(Tag), new(record), new(Answer)} {
			if decodeRecord(raw, v) != nil {
				continue
			}
			if tag, ok := v.(*Tag); ok {
				_ = tag.Current.Digest.Algorithm() // panics if a malformed one came through
			}
			again, err := json.Marshal(v)
			if err != nil {
				t.Fatalf("%T cannot be written again: %v", v, err)
			}
			w := reflect.New(reflect.TypeOf(v).Elem()).Interface().(storable)
			if err := decodeRecord(again, w); err != nil {
				t.Fatalf("%s, written again, is refused: %v", again, err)
			}
			if third, err := json.Marshal(w); err != nil || !slices.Equal(again, third) {
				t.Fatalf("%s becomes %s, %v", again, third, err)
			}
		}
	})
}

// holds reports whether there is a file for the content, whoever reaches it.
func (d *Disk) holds(dgst digest.Digest) bool {
	info, err := d.blobs[dgst.Algorithm()].root.Lstat(dgst.Encoded())
	return err == nil && info.Mode().IsRegular()
}
