package s3

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"breakwater/pkg/buckettest"

	"github.com/opencontainers/go-digest"
)

// TestVerified: from whatever offset, what is given out is right, and nothing of a part is that has a wrong
// byte anywhere.
func TestVerified(t *testing.T) {
	key := newKeyring([][]byte{bytes.Repeat([]byte("k"), 32)}).keys[0]
	for _, size := range []int{0, 1, wholeSize, wholeSize + 1, longPart, longPart + 1, 3*longPart + 17} {
		raw := make([]byte, size)
		for i := 0; i < len(raw); i += 97 {
			raw[i] = byte(rand.Uint32())
		}
		dgst := digest.FromBytes(raw)
		c := Content{Size: int64(size)}
		if hasParts(c.Size) {
			var err error
			if c.parts, err = key.partsOf(dgst, bytes.NewReader(raw), c.Size); err != nil {
				t.Fatal(err)
			}
		}
		read := func(stored []byte, offset int) ([]byte, error) {
			at := Aligned(int64(offset))
			return io.ReadAll(c.Verified(dgst, io.NopCloser(bytes.NewReader(stored[at:])), int64(offset)))
		}
		for _, offset := range []int{0, size / 2, size} {
			if offset < 0 || offset > size {
				continue
			}
			got, err := read(raw, offset)
			if err != nil || !bytes.Equal(got, raw[offset:]) {
				t.Fatalf("%d bytes from %d: %d, %v", size, offset, len(got), err)
			}
			for _, wrong := range []int{0, size / 2, size - 1} {
				if size == 0 || wrong < int(Aligned(int64(offset))) {
					continue
				}
				evil := slices.Clone(raw)
				evil[wrong] ^= 1
				got, err := read(evil, offset)
				begin := int(Aligned(int64(wrong)))
				if !errors.Is(err, ErrWrong) || !bytes.Equal(got, raw[min(offset, begin):begin][:len(got)]) && offset < begin || offset >= begin && len(got) > 0 {
					t.Errorf("%d bytes from %d with a wrong one at %d: %d, %v", size, offset, wrong, len(got), err)
				}
			}
			if size > 0 && offset < size {
				if _, err := read(raw[:size-1], offset); !errors.Is(err, io.ErrUnexpectedEOF) {
					t.Errorf("%d bytes, one missing: %v", size, err)
				}
			}
		}
		if hasParts(c.Size) { // a record without them
			c.parts = nil
			if got, err := read(raw, size-1); err != nil || !bytes.Equal(got, raw[size-1:]) {
				t.Errorf("%d bytes without parts: %d, %v", size, len(got), err)
			}
		}
	}
	if _, err := key.partsOf("sha256:", bytes.NewReader(nil), longPart+1); err == nil {
		t.Error("parts of what is not there")
	}
}

// TestRotatedKey: content whose record was signed with the old key is signed anew when it is next published, so
// that the old key can go. Its parts are told by whichever key the record was signed with.
func TestRotatedKey(t *testing.T) {
	bucket := buckettest.Start(t)
	old, current := bytes.Repeat([]byte("o"), 32), bytes.Repeat([]byte("n"), 32)
	raw := bytes.Repeat([]byte("a"), wholeSize+1)
	dgst := digest.FromBytes(raw)
	verify := func(b *Bucket) {
		t.Helper()
		got, err := b.Content(t.Context(), app, dgst, PublicFirst)
		if err != nil || got.Size != int64(len(raw)) || got.parts == nil {
			t.Fatalf("%+v, %v", got, err)
		}
		if _, err := io.Copy(io.Discard, got.Verified(dgst, io.NopCloser(bytes.NewReader(raw)), 0)); err != nil {
			t.Error(err)
		}
	}
	c := Content{Size: int64(len(raw)), ConfirmedAt: time.Now(), Public: true}
	for _, keys := range [][][]byte{{old}, {old, current}, {current, old}} {
		b := open(t, bucket, func(c *Config) { c.Keys = keys })
		if len(keys) > 1 {
			verify(b)
		}
		if err := b.PutContent(t.Context(), app, dgst, c, bytes.NewReader(raw)); err != nil {
			t.Fatal(err)
		}
		verify(b)
	}
	verify(open(t, bucket, func(c *Config) { c.Keys = [][]byte{current} }))
}

// TestPartsAreToldOnce: a blob is read for its parts by the first who publishes it, and by nobody after that.
func TestPartsAreToldOnce(t *testing.T) {
	bucket := buckettest.Start(t)
	raw := bytes.Repeat([]byte("0123456789abcdef"), (longPart+1<<10)/16)
	dgst := digest.FromBytes(raw)
	c := Content{Size: int64(len(raw)), ConfirmedAt: time.Now(), Public: true}
	for i := range 2 {
		b := open(t, bucket)
		from := bytes.NewReader(raw)
		if err := b.PutContent(t.Context(), app, dgst, c, from); err != nil {
			t.Fatal(err)
		}
		if read := len(raw) - from.Len(); read != []int{len(raw), 0}[i] {
			t.Errorf("host %d has read %d bytes", i, read)
		}
		if got, err := b.Content(t.Context(), app, dgst, PublicFirst); err != nil || got.parts == nil || len(got.parts.Tags) != 6*tagSize {
			t.Errorf("%+v, %v", got, err)
		}
		bucket.Age(prefix+publicName(dgst), renewAfter+time.Minute) // the next one renews it
	}
}

// TestPartsFit: from whatever offset a blob is opened, a part begins; nobody has to hold more than 1 MiB of a blob of
// up to 2 GiB, and 4 MiB of others; the first is soon there; and the record of the largest can be read.
func TestPartsFit(t *testing.T) {
	if partAt(0) > 64<<10 {
		t.Errorf("the first part has %d bytes, which take a slow bucket too long", partAt(0))
	}
	var number int64
	for at := int64(0); at < maxPartsSize; number++ {
		n := partAt(at)
		if limit := int64(1 << 20); at < 2<<30 && n > limit || n > 4*limit {
			t.Fatalf("%d bytes at %d", n, at)
		}
		for _, offset := range []int64{at, at + 1, at + n/2, at + n - 1} {
			if Aligned(offset) != at {
				t.Fatalf("%d: aligned to %d, not to %d", offset, Aligned(offset), at)
			}
		}
		at += n
	}
	if got := partsBefore(maxPartsSize); got != number {
		t.Errorf("%d parts, not %d", got, number)
	}
	k := newKeyring([][]byte{fleetKey})
	name := strings.Repeat("n", 255)
	raw, err := k.seal("x", &content{maxPartsSize, name, time.Now(), name, name, name, &partTags{partsLayout, make([]byte, saltSize), make([]byte, number*tagSize)}})
	if err != nil || len(raw) > maxRecord {
		t.Errorf("a record of %d bytes, %v", len(raw), err)
	}
	var got content
	if _, err := k.open("x", raw, &got); err != nil || got.Parts == nil {
		t.Error(err)
	}
}

// zeros are any number of bytes.
type zeros struct{}

func (zeros) Read(p []byte) (int, error) { clear(p); return len(p), nil }
func (zeros) Close() error               { return nil }

// TestPartsMemory: all downloads that there may be at a time hold one part each.
func TestPartsMemory(t *testing.T) {
	const size = 4 * longPart
	dgst := digest.FromBytes(make([]byte, size))
	p, err := newKeyring([][]byte{fleetKey}).keys[0].partsOf(dgst, zeros{}, size)
	if err != nil {
		t.Fatal(err)
	}
	heap := func() uint64 {
		var m runtime.MemStats
		runtime.GC()
		runtime.ReadMemStats(&m)
		return m.HeapAlloc
	}
	before := heap()
	var open []io.ReadCloser
	for range maxReads {
		v := Content{Size: size, parts: p}.Verified(dgst, zeros{}, 0)
		if _, err := io.CopyN(io.Discard, v, 2*longPart+1); err != nil {
			t.Fatal(err)
		}
		open = append(open, v)
	}
	if held := int64(heap() - before); held > maxReads*(longPart+longPart/8) {
		t.Errorf("%d downloads hold %d MiB", len(open), held>>20)
	}
	runtime.KeepAlive(open)
}

// TestPartsOfAWrongDisk: a host whose copy is wrong does not vouch for it.
func TestPartsOfAWrongDisk(t *testing.T) {
	server := buckettest.Start(t)
	raw := bytes.Repeat([]byte("a"), wholeSize+1)
	rotten := bytes.Clone(raw)
	rotten[7] ^= 1
	dgst := digest.FromBytes(raw)
	b := open(t, server)
	c := Content{Size: int64(len(raw)), ConfirmedAt: time.Now(), Public: true}
	if err := b.PutContent(t.Context(), app, dgst, c, bytes.NewReader(rotten)); !errors.Is(err, ErrWrong) {
		t.Error(err)
	}
	if names := server.Names(prefix + recordsFolder); len(names) > 0 {
		t.Errorf("published: %q", names)
	}
}

// TestWrongPartsAreReplaced: parts that are wrong, though signed, where the blob is right, are told anew once somebody
// has distrusted the blob, under another key.
func TestWrongPartsAreReplaced(t *testing.T) {
	server := buckettest.Start(t)
	raw := bytes.Repeat([]byte("a"), wholeSize+1)
	dgst := digest.FromBytes(raw)
	a := open(t, server)
	wrong, err := a.keys.keys[0].partsOf(dgst, bytes.NewReader(raw), int64(len(raw)))
	if err != nil {
		t.Fatal(err)
	}
	wrong.Tags[0] ^= 1
	c := Content{Size: int64(len(raw)), ConfirmedAt: time.Now(), Public: true}
	put := func(b *Bucket) {
		t.Helper()
		if err := errors.Join(b.PutBlob(t.Context(), dgst, c.Size, bytes.NewReader(raw)), b.PutContent(t.Context(), app, dgst, c, bytes.NewReader(raw))); err != nil {
			t.Fatal(err)
		}
	}
	c.parts = wrong
	put(a)
	c.parts = nil
	read := func(b *Bucket) (Content, error) {
		t.Helper()
		got, err := b.Content(t.Context(), app, dgst, PublicFirst)
		if err != nil {
			t.Fatal(err)
		}
		body, err := b.Blob(t.Context(), dgst, 0)
		if err != nil {
			t.Fatal(err)
		}
		defer body.Close()
		_, err = io.Copy(io.Discard, got.Verified(dgst, body, 0))
		return got, err
	}
	b := open(t, server)
	put(b) // it has no reason to doubt
	before, err := read(b)
	if !errors.Is(err, ErrWrong) {
		t.Fatal(err)
	}
	b.Distrust(dgst)
	put(b)
	after, err := read(open(t, server))
	if err != nil || bytes.Equal(before.parts.Salt, after.parts.Salt) {
		t.Errorf("%v, salts %x and %x", err, before.parts.Salt, after.parts.Salt)
	}
}

// TestOldParts: a record of a layout that is no use is good for the rest, and told anew.
func TestOldParts(t *testing.T) {
	server := buckettest.Start(t)
	raw := bytes.Repeat([]byte("a"), wholeSize+1)
	dgst := digest.FromBytes(raw)
	b := open(t, server)
	c := Content{Size: int64(len(raw)), ConfirmedAt: time.Now(), Public: true}
	name := publicName(dgst)
	for i, body := range []string{
		`{"size":65537,"confirmed_at":"2026-01-01T00:00:00Z","part_size":8388608,"part_tags":["AAAA"]}`,
		`{"size":65537,"confirmed_at":"2026-01-01T00:00:00Z","parts":{"layout":3,"salt":"AAAA","tags":"AAAA"}}`,
	} {
		key := b.keys.keys[0]
		server.Put(prefix+name, fmt.Appendf(nil, "%s %s %x\n%s\n", recordMark, key.id, key.sign(name, []byte(body+"\n")), body))
		if got, err := b.Content(t.Context(), app, dgst, PublicFirst); err != nil || got.Size != c.Size || got.parts != nil {
			t.Errorf("%d: %+v, %v", i, got, err)
		}
		if err := b.PutContent(t.Context(), app, dgst, c, bytes.NewReader(raw)); err != nil {
			t.Error(err)
		}
		if got, err := b.Content(t.Context(), app, dgst, PublicFirst); err != nil || got.parts == nil {
			t.Errorf("%d: %+v, %v", i, got, err)
		}
	}
}
