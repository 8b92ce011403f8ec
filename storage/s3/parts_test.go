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
	for _, size := range []int{0, 1, 1000, PartSize, PartSize + 1, 2*PartSize + 17} {
		raw := make([]byte, size)
		for i := 0; i < len(raw); i += 97 {
			raw[i] = byte(rand.Uint32())
		}
		dgst := digest.FromBytes(raw)
		c := Content{Size: int64(size)}
		if hasParts(c.Size) {
			var err error
			if c.parts, err = partsOf(bytes.NewReader(raw), c.Size); err != nil {
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
		if size > PartSize { // a record of before there were parts
			c.parts = nil
			if got, err := read(raw, PartSize+1); err != nil || !bytes.Equal(got, raw[PartSize+1:]) {
				t.Errorf("%d bytes without parts: %d, %v", size, len(got), err)
			}
		}
	}
	if _, err := partsOf(bytes.NewReader(nil), PartSize+1); err == nil {
		t.Error("parts of what is not there")
	}
}

// TestRotatedKey: content whose record was signed with the old key is signed anew when it is next published, so
// that the old key can go.
func TestRotatedKey(t *testing.T) {
	bucket := buckettest.Start(t)
	old, current := bytes.Repeat([]byte("o"), 32), bytes.Repeat([]byte("n"), 32)
	dgst := digest.FromString("content")
	c := Content{Size: 7, ConfirmedAt: time.Now(), Public: true}
	for _, keys := range [][][]byte{{old}, {old, current}, {current, old}} {
		b := open(t, bucket, func(c *Config) { c.Keys = keys })
		if err := b.PutContent(t.Context(), app, dgst, c, nil); err != nil {
			t.Fatal(err)
		}
	}
	b := open(t, bucket, func(c *Config) { c.Keys = [][]byte{current} })
	if got, err := b.Content(t.Context(), app, dgst, PublicFirst); err != nil || got.Size != c.Size {
		t.Errorf("%+v, %v", got, err)
	}
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
		if got, err := b.Content(t.Context(), app, dgst, PublicFirst); err != nil || len(got.parts) != 2 {
			t.Errorf("%d parts, %v", len(got.parts), err)
		}
		bucket.Age(prefix+publicName(dgst), renewAfter+time.Minute) // the next one renews it
	}
}
