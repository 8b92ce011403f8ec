package s3

import (
	"bytes"
	"errors"
	"io/fs"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"breakwater/pkg/buckettest"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"github.com/opencontainers/go-digest"
)

var (
	someDigest  = digest.FromString("some")
	otherDigest = digest.FromString("other")
)

// about lets times differ that went through the bucket's clock and back.
var about = cmpopts.EquateApproxTime(time.Second)

func TestF43ForgedRecordsAreIgnored(t *testing.T) {
	server := buckettest.Start(t)
	b := open(t, server)
	good := Tag{Digest: someDigest, ValidatedAt: time.Now()}
	if _, err := b.PutTag(t.Context(), latest, good); err != nil {
		t.Fatal(err)
	}
	name := prefix + tagName(latest)
	real := server.Get(name)
	forger := open(t, server, func(c *Config) { c.Keys = [][]byte{[]byte("not the fleet's key")} })
	forged, err := forger.keys.seal(tagName(latest), &published{otherDigest, time.Now(), "evil", 9})
	if err != nil {
		t.Fatal(err)
	}
	id := b.keys.keys[0].id
	ours := func(p published) []byte {
		raw, err := b.keys.seal(tagName(latest), &p)
		if err != nil {
			t.Fatal(err)
		}
		return raw
	}
	for title, raw := range map[string][]byte{
		"another key":          forged,
		"another key, our id":  bytes.Replace(forged, []byte(forger.keys.keys[0].id), []byte(id), 1),
		"changed":              bytes.Replace(real, []byte(someDigest), []byte(otherDigest), 1),
		"cut short":            real[:len(real)-3],
		"longer":               append(bytes.Clone(real), "{}"...),
		"no signature":         bytes.SplitAfterN(real, []byte("\n"), 2)[1],
		"signature of nothing": []byte("breakwater-record 1 " + id + " \n{}\n"),
		"not hex":              []byte("breakwater-record 1 " + id + " zz\n{}\n"),
		"empty":                {},
		"no digest":            ours(published{"../../etc", time.Now(), "", 1 << 40}),
		"no time":              ours(published{Digest: someDigest, Generation: 1 << 40}),
		"too big":              append(bytes.Clone(real), bytes.Repeat([]byte(" "), maxRecord)...),
	} {
		t.Run(title, func(t *testing.T) {
			ignored := b.Health().Ignored
			server.Put(name, raw)
			b.Forget(latest)
			if got, err := b.Tag(t.Context(), latest); !errors.Is(err, fs.ErrNotExist) {
				t.Errorf("%+v, %v", got, err)
			}
			if n := b.Health().Ignored; n != ignored+1 {
				t.Errorf("ignored %d, then %d", ignored, n)
			}
			// Publishing puts it right.
			got, err := b.PutTag(t.Context(), latest, Tag{Digest: otherDigest, ValidatedAt: time.Now()})
			if err != nil || got.Digest != otherDigest || got.Generation < 2 {
				t.Errorf("%+v, %v", got, err)
			}
			if got, err := open(t, server).Tag(t.Context(), latest); err != nil || got.Digest != otherDigest {
				t.Errorf("%+v, %v", got, err)
			}
		})
	}
	if h := b.Health(); h.Reads.Open || h.Failures != 0 {
		t.Errorf("the bucket is blamed: %+v", h)
	}
}

func TestH41RecordsOfOtherNames(t *testing.T) {
	server := buckettest.Start(t)
	b := open(t, server)
	old := latest
	old.Tag = "v1"
	if _, err := b.PutTag(t.Context(), old, Tag{Digest: someDigest, ValidatedAt: time.Now()}); err != nil {
		t.Fatal(err)
	}
	server.Put(prefix+tagName(latest), server.Get(prefix+tagName(old))) // the record of another tag
	if got, err := b.Tag(t.Context(), latest); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("%+v, %v", got, err)
	}
	private := Content{Size: 3, ConfirmedAt: time.Now(), Credential: "u"}
	if err := b.PutContent(t.Context(), app, someDigest, private, nil); err != nil {
		t.Fatal(err)
	}
	server.Put(prefix+publicName(someDigest), server.Get(prefix+privateName(app, someDigest)))
	other := app
	other.Name = "org/other"
	if got, err := b.Content(t.Context(), other, someDigest, PublicFirst); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("what is private to one repository is in another: %+v, %v", got, err)
	}
	// A blob under a record's name, and a record under a blob's: whoever reads that hashes it.
	server.Put(prefix+tagName(latest), noise(1000, 1))
	b.Forget(latest)
	if got, err := b.Tag(t.Context(), latest); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("%+v, %v", got, err)
	}
	server.Put(prefix+blobName(someDigest), server.Get(prefix+tagName(old)))
	if raw, err := readBlob(t.Context(), b, someDigest, 0); err != nil || digest.FromBytes(raw) == someDigest {
		t.Errorf("%d bytes, %v", len(raw), err)
	}
}

func TestH41SwappedBlobIsReplaced(t *testing.T) {
	server := buckettest.Start(t)
	b := open(t, server)
	raw, evil := noise(5000, 1), noise(5000, 2)
	dgst := digest.FromBytes(raw)
	server.Put(prefix+blobName(dgst), evil)
	if got, err := readBlob(t.Context(), b, dgst, 0); err != nil || !bytes.Equal(got, evil) {
		t.Fatal(err)
	}
	b.Distrust(dgst)
	if _, err := b.Blob(t.Context(), dgst, 0); !errors.Is(err, fs.ErrNotExist) {
		t.Error(err)
	}
	if err := b.PutBlob(t.Context(), dgst, int64(len(raw)), bytes.NewReader(raw)); err != nil {
		t.Fatal(err)
	}
	if got, err := readBlob(t.Context(), b, dgst, 0); err != nil || !bytes.Equal(got, raw) {
		t.Errorf("%d bytes, %v", len(got), err)
	}
	server.Put(prefix+blobName(dgst), evil[:100]) // of a wrong size: nobody need have read it
	if err := b.PutBlob(t.Context(), dgst, int64(len(raw)), bytes.NewReader(raw)); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(server.Get(prefix+blobName(dgst)), raw) {
		t.Error("it was not replaced")
	}
}

func TestH41ReplayedRecord(t *testing.T) {
	server := buckettest.Start(t)
	b := open(t, server)
	name := prefix + tagName(latest)
	at := time.Now().Add(-time.Hour)
	if _, err := b.PutTag(t.Context(), latest, Tag{Digest: someDigest, ValidatedAt: at}); err != nil {
		t.Fatal(err)
	}
	first := server.Get(name)
	if got, err := b.PutTag(t.Context(), latest, Tag{Digest: otherDigest, ValidatedAt: at.Add(time.Minute)}); err != nil || got.Generation != 2 {
		t.Fatalf("%+v, %v", got, err)
	}
	server.Put(name, first)
	b.Forget(latest)
	if got, err := b.Tag(t.Context(), latest); !errors.Is(err, fs.ErrNotExist) || b.Health().Ignored != 1 {
		t.Errorf("%+v, %v, %d ignored", got, err, b.Health().Ignored)
	}
	// A host that has seen nothing cannot know; one that has goes over it.
	fresh := open(t, server)
	if got, err := fresh.Tag(t.Context(), latest); err != nil || got.Digest != someDigest {
		t.Errorf("%+v, %v", got, err)
	}
	if got, err := b.PutTag(t.Context(), latest, Tag{Digest: otherDigest, ValidatedAt: at.Add(time.Minute)}); err != nil || got.Generation != 3 {
		t.Errorf("%+v, %v", got, err)
	}
	// It can also have been told: by its disk, of a former life.
	server.Put(name, first)
	if got, err := open(t, server).PutTag(t.Context(), latest, Tag{Digest: otherDigest, ValidatedAt: at, Generation: 7}); err != nil || got.Generation != 8 || got.Digest != otherDigest {
		t.Errorf("%+v, %v", got, err)
	}
}

func TestH41DatedInTheFuture(t *testing.T) {
	server := buckettest.Start(t)
	b := open(t, server)
	future := time.Date(2099, 1, 1, 0, 0, 0, 0, time.UTC)
	if _, err := b.PutTag(t.Context(), latest, Tag{Digest: someDigest, ValidatedAt: future}); !errors.Is(err, ErrClock) {
		t.Errorf("published: %v", err)
	}
	raw, err := b.keys.seal(tagName(latest), &published{someDigest, future, "", 4})
	if err != nil {
		t.Fatal(err)
	}
	server.Put(prefix+tagName(latest), raw)
	b.Forget(latest)
	got, err := b.Tag(t.Context(), latest)
	if err != nil || time.Until(got.ValidatedAt) < 24*time.Hour {
		t.Errorf("%+v, %v", got, err)
	}
	got, err = b.PutTag(t.Context(), latest, Tag{Digest: someDigest, ValidatedAt: time.Now()})
	if err != nil || got.Generation != 5 || time.Until(got.ValidatedAt) > 0 {
		t.Errorf("it stands: %+v, %v", got, err)
	}
}

func TestKeysAreRotated(t *testing.T) {
	server := buckettest.Start(t)
	keys := func(keys ...[]byte) func(*Config) { return func(c *Config) { c.Keys = keys } }
	old, both, next := open(t, server, keys(fleetKey)), open(t, server, keys(secondKey, fleetKey)), open(t, server, keys(secondKey))
	at := time.Now().Add(-time.Hour)
	if _, err := old.PutTag(t.Context(), latest, Tag{Digest: someDigest, ValidatedAt: at}); err != nil {
		t.Fatal(err)
	}
	if got, err := both.Tag(t.Context(), latest); err != nil || got.Digest != someDigest {
		t.Errorf("%+v, %v", got, err)
	}
	if _, err := next.Tag(t.Context(), latest); !errors.Is(err, fs.ErrNotExist) {
		t.Error(err)
	}
	if got, err := both.PutTag(t.Context(), latest, Tag{Digest: otherDigest, ValidatedAt: at.Add(time.Minute)}); err != nil || got.Generation != 2 {
		t.Errorf("%+v, %v", got, err)
	}
	next.Forget(latest)
	if got, err := next.Tag(t.Context(), latest); err != nil || got.Digest != otherDigest {
		t.Errorf("%+v, %v", got, err)
	}
	if raw := server.Get(prefix + tagName(latest)); bytes.Contains(raw, secondKey) || strings.Count(string(raw), "\n") != 2 {
		t.Errorf("%s", raw)
	}
}

func TestContent(t *testing.T) {
	server := buckettest.Start(t)
	b := open(t, server)
	at := time.Now().Add(-time.Minute).UTC()
	public := Content{Size: 7, ConfirmedAt: at, Upstream: "https://quay.io", Public: true}
	private := Content{Size: 9, MediaType: "a/b", ConfirmedAt: at, Upstream: "https://quay.io", Credential: "robot"}
	long := digest.SHA512.FromString("long")
	other := app
	other.Name = "org/other"
	for _, row := range []struct {
		dgst digest.Digest
		c    Content
	}{{someDigest, public}, {otherDigest, private}, {long, public}} {
		if err := b.PutContent(t.Context(), app, row.dgst, row.c, nil); err != nil {
			t.Fatal(err)
		}
		for _, first := range []Reach{PublicFirst, PrivateFirst} {
			got, err := b.Content(t.Context(), app, row.dgst, first)
			if diff := cmp.Diff(row.c, got, about, cmp.AllowUnexported(Content{})); diff != "" || err != nil {
				t.Errorf("%s %v", diff, err)
			}
			if _, err := b.Content(t.Context(), other, row.dgst, first); (err == nil) != row.c.Public || err != nil && !errors.Is(err, fs.ErrNotExist) {
				t.Errorf("in another repository: %v", err)
			}
		}
		if _, err := b.Content(t.Context(), app, row.dgst, PublicOnly); (err == nil) != row.c.Public || err != nil && !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("only if it is public: %v", err)
		}
	}
	server.Forget()
	again := public
	again.ConfirmedAt, again.Upstream = time.Now(), "https://elsewhere"
	if err := b.PutContent(t.Context(), app, someDigest, again, nil); err != nil || server.Count(buckettest.Writes) != 0 {
		t.Errorf("%v after %d writes", err, server.Count(buckettest.Writes))
	}
	server.Age(prefix+publicName(someDigest), renewAfter+time.Minute)
	if err := b.PutContent(t.Context(), app, someDigest, again, nil); err != nil || server.Count(buckettest.Writes) != 1 {
		t.Errorf("%v after %d writes", err, server.Count(buckettest.Writes))
	}
	reader := open(t, server, func(c *Config) { c.ReadOnly = true })
	if err := reader.PutContent(t.Context(), app, someDigest, public, nil); !errors.Is(err, ErrReadOnly) {
		t.Error(err)
	}
	if err := reader.PutBlob(t.Context(), someDigest, 4, strings.NewReader("some")); !errors.Is(err, ErrReadOnly) {
		t.Error(err)
	}
}

// TestReferring: the latest word on what refers to a manifest is kept, and one that says less than nothing is not.
func TestReferring(t *testing.T) {
	server := buckettest.Start(t)
	b := open(t, server)
	if _, err := b.Referring(t.Context(), app, someDigest); !errors.Is(err, fs.ErrNotExist) {
		t.Error(err)
	}
	now := time.Now().UTC()
	older := Referring{Index: []byte(`{"manifests":[]}`), ValidatedAt: now.Add(-time.Hour), Upstream: "https://quay.io"}
	newer := Referring{Index: []byte("{}"), Tags: []string{"sha256-1.sig"}, ValidatedAt: now, Upstream: "https://quay.io", Credential: "robot"}
	for i, put := range []Referring{older, newer, older} {
		if err := b.PutReferring(t.Context(), app, someDigest, put); err != nil {
			t.Fatal(err)
		}
		want := []Referring{older, newer, newer}[i]
		if got, err := b.Referring(t.Context(), app, someDigest); err != nil || !cmp.Equal(want, got, about) {
			t.Errorf("%v %s", err, cmp.Diff(want, got, about))
		}
	}
	other := app
	other.Name = "org/other"
	if _, err := b.Referring(t.Context(), other, someDigest); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("in another repository: %v", err)
	}
	for what, wrong := range map[string]Referring{
		"no time":    {Index: []byte("{}")},
		"no tag":     {Index: []byte("{}"), ValidatedAt: now, Tags: []string{"a/b"}},
		"much":       {Index: make([]byte, MaxReferring+1), ValidatedAt: now},
		"all of it,": {Index: make([]byte, MaxReferring), ValidatedAt: now.Add(time.Second), Tags: []string{strings.Repeat("a", 128)}},
	} {
		if err := b.PutReferring(t.Context(), app, someDigest, wrong); (err == nil) != (what == "all of it,") {
			t.Errorf("%s: %v", what, err)
		}
	}
	if got, err := b.Referring(t.Context(), app, someDigest); err != nil || len(got.Index) != MaxReferring {
		t.Errorf("the largest: %d bytes, %v", len(got.Index), err)
	}
	ahead := newer
	ahead.ValidatedAt = now.Add(time.Hour)
	if err := b.PutReferring(t.Context(), app, someDigest, ahead); err != nil {
		t.Fatal(err)
	}
	if _, err := b.Referring(t.Context(), app, someDigest); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("of the future: %v", err)
	}
	reader := open(t, server, func(c *Config) { c.ReadOnly = true })
	if err := reader.PutReferring(t.Context(), app, someDigest, newer); !errors.Is(err, ErrReadOnly) {
		t.Error(err)
	}
}

func TestHostsClockIsOff(t *testing.T) {
	credentials(t)
	for _, off := range []time.Duration{-10 * time.Minute, 10 * time.Minute, 2 * time.Minute, -20 * time.Minute} {
		t.Run(off.String(), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				m := &memory{}
				right := m.connect(t)
				defer right.Close()
				validated := time.Now().Add(-time.Hour)
				if _, err := right.PutTag(t.Context(), latest, Tag{Digest: someDigest, ValidatedAt: validated}); err != nil {
					t.Fatal(err)
				}
				// Of a host that is fast by 10 minutes, the bucket is behind by as much.
				m.set(func() { m.skew = -off })
				b := m.connect(t)
				defer b.Close()
				got, err := b.Tag(t.Context(), latest)
				if off.Abs() > 15*time.Minute { // what a bucket tolerates: now it has said what time it is
					if err == nil {
						t.Error("an answer to a request of another time")
					}
					got, err = b.Tag(t.Context(), latest)
				}
				if want := validated.Add(off); err != nil || got.ValidatedAt.Sub(want).Abs() > time.Second {
					t.Errorf("%+v, want %v, %v", got, want, err)
				}
				_, err = b.PutTag(t.Context(), latest, Tag{Digest: otherDigest, ValidatedAt: time.Now()})
				tooFar := off.Abs() > maxSkew
				if errors.Is(err, ErrClock) != tooFar || err != nil && !tooFar || b.Health().ClockWrong != tooFar {
					t.Errorf("%v, %+v", err, b.Health())
				}
				if err := b.PutContent(t.Context(), app, someDigest, Content{ConfirmedAt: time.Now()}, nil); errors.Is(err, ErrClock) != tooFar {
					t.Error(err)
				}
			})
		})
	}
}
