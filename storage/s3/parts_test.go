package s3

import (
	"bytes"
	"errors"
	"io"
	"math/rand/v2"
	"slices"
	"testing"
	"time"

	"breakwater/pkg/buckettest"

	"github.com/opencontainers/go-digest"
)

// TestVerified: from whatever offset, what is given out is right, and nothing of a part is that has a wrong
// byte anywhere.
func TestVerified(t *testing.T) {
	key := newKeyring([][]byte{bytes.Repeat([]byte("k"), 32)}).keys[0]
	for _, size := range []int{0, 1, wholeSize, wholeSize + 1, PartSize, PartSize + 1, 2*PartSize + 17} {
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
	if _, err := key.partsOf("sha256:", bytes.NewReader(nil), PartSize+1); err == nil {
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
	raw := bytes.Repeat([]byte("0123456789abcdef"), (PartSize+1<<10)/16)
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
		if got, err := b.Content(t.Context(), app, dgst, PublicFirst); err != nil || got.parts == nil || len(got.parts.tags) != 2 {
			t.Errorf("%+v, %v", got, err)
		}
		bucket.Age(prefix+publicName(dgst), renewAfter+time.Minute) // the next one renews it
	}
}
