package s3

import (
	"crypto/aes"
	"crypto/cipher"
	"crypto/hkdf"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/bits"

	"github.com/opencontainers/go-digest"
)

// A blob is verified in parts: nothing of a part is given out before all of it is known to be right, so that a bucket
// that lies costs no client its download. The first are small, so that a slow bucket gives something soon; they grow
// with what lies before them, and do not depend on the blob's size, which who opens one does not know yet. A part is
// what a download holds in memory: 1 MiB, and beyond 2 GiB, where more of them would not fit into a record, 4 MiB.
const (
	firstPart = 64 << 10
	longPart  = 1 << 20
	lastPart  = 4 << 20
	lastParts = 2 << 30 // where those begin
	// partsLayout is that of these numbers: the parts of another one are no use.
	partsLayout = 2
)

const (
	// wholeSize is up to where content is verified by its digest, as one part: who publishes it need not read it.
	wholeSize = firstPart
	// maxPartsSize is of the largest blob whose parts fit into a record: of larger ones nothing is verified before
	// the whole is.
	maxPartsSize = 16 << 30
	// tagSize and saltSize are in bytes.
	tagSize  = 16
	saltSize = 16
)

// ErrWrong is the error of bytes that are not what their digest, or the record of their blob, says.
var ErrWrong = errors.New("wrong bytes")

// partAt is how long the part is in which an offset lies, if the blob does not end before.
func partAt(offset int64) int64 {
	switch {
	case offset < firstPart:
		return firstPart
	case offset < longPart: // each is as long as all before it
		return 1 << (bits.Len64(uint64(offset)) - 1)
	case offset < lastParts:
		return longPart
	}
	return lastPart
}

// partsBefore is how many parts begin before an offset.
func partsBefore(offset int64) (n int64) {
	for at := int64(0); at < offset; at += partAt(at) {
		n++
	}
	return n
}

// hasParts reports whether content of that size is verified in parts.
func hasParts(size int64) bool { return size > wholeSize && size <= maxPartsSize }

// partTags are the parts of a blob as they are published.
type partTags struct {
	Layout int    `json:"layout"`
	Salt   []byte `json:"salt"`
	Tags   []byte `json:"tags"` // of all parts, in order
}

// parts tell the bytes of a blob right from wrong, piece by piece, by a GMAC of each (NIST SP 800-38D). Its digest
// vouches for the whole, as always, so that this need not be the second hash of every byte: it takes an eighth of the
// time.
type parts struct {
	partTags
	mac cipher.AEAD
}

// partsKey is for one reading of one blob, of which the salt is: so no nonce, the offset of a part, is ever used for
// two messages, not even if that blob was read wrong once.
func (k signingKey) partsKey(dgst digest.Digest, salt []byte) (cipher.AEAD, error) {
	key, err := hkdf.Key(sha256.New, k.secret, salt, fmt.Sprintf("breakwater-parts %d\n%s", partsLayout, dgst), 32)
	if err != nil {
		return nil, err
	}
	block, err := aes.NewCipher(key)
	if err != nil {
		return nil, err
	}
	return cipher.NewGCM(block)
}

// tag is what the part that begins at an offset has to have.
func (p *parts) tag(at int64, raw []byte) []byte {
	nonce := make([]byte, p.mac.NonceSize())
	binary.BigEndian.PutUint64(nonce, uint64(at))
	return p.mac.Seal(nil, nonce, nil, raw)
}

// partsOf are those of a blob that can be read. It is ErrWrong if that is not what its digest says: nobody signs for
// what is wrong on his disk.
func (k signingKey) partsOf(dgst digest.Digest, blob io.Reader, size int64) (*parts, error) {
	p := &parts{partTags: partTags{Layout: partsLayout, Salt: make([]byte, saltSize)}}
	_, _ = rand.Read(p.Salt) // never fails
	var err error
	if p.mac, err = k.partsKey(dgst, p.Salt); err != nil {
		return nil, err
	}
	hash := dgst.Algorithm().Hash()
	buf := make([]byte, min(size, partAt(size)))
	for at := int64(0); at < size; {
		part := buf[:min(size-at, partAt(at))]
		if _, err := io.ReadFull(blob, part); err != nil {
			return nil, fmt.Errorf("read a part: %w", err)
		}
		hash.Write(part)
		p.Tags = append(p.Tags, p.tag(at, part)...)
		at += int64(len(part))
	}
	if sum := digest.NewDigest(dgst.Algorithm(), hash); sum != dgst {
		return nil, fmt.Errorf("this host's copy of %s is %s: %w", dgst, sum, ErrWrong)
	}
	return p, nil
}

// vouched gives out what a record vouches for, and ends with ErrWrong where the bytes are others.
type vouched struct {
	io.ReadCloser
	content Content
	dgst    digest.Digest
	at      int64  // of the next part
	number  int64  // of it
	skip    int64  // bytes of it that were not asked for
	buf     []byte // of a part
	ready   []byte // verified, and not given out yet
	err     error
}

// Aligned is where a blob has to be opened that is to be read from offset on, verified.
func Aligned(offset int64) int64 { return offset - offset%partAt(offset) }

// Verified is a blob that was opened at Aligned(offset), from offset on, as the record vouches for it. A
// record that is older than its parts vouches for none: then it is given out as it comes.
func (c Content) Verified(dgst digest.Digest, blob io.ReadCloser, offset int64) io.ReadCloser {
	at := Aligned(offset)
	if c.Size > wholeSize && c.parts == nil {
		return &rest{ReadCloser: blob, skip: offset - at}
	}
	return &vouched{ReadCloser: blob, content: c, dgst: dgst, at: at, number: partsBefore(at), skip: offset - at}
}

func (v *vouched) Read(p []byte) (int, error) {
	for len(v.ready) == 0 && v.err == nil {
		v.err = v.next()
	}
	if len(v.ready) == 0 {
		return 0, v.err
	}
	n := copy(p, v.ready)
	v.ready = v.ready[n:]
	return n, nil
}

// next reads a part whole.
func (v *vouched) next() error {
	n := min(v.content.Size-v.at, partAt(v.at))
	if n == 0 {
		return io.EOF
	}
	if int64(len(v.buf)) < n {
		v.buf = make([]byte, n)
	}
	part := v.buf[:n]
	if _, err := io.ReadFull(v.ReadCloser, part); err != nil {
		if errors.Is(err, io.EOF) {
			err = io.ErrUnexpectedEOF
		}
		return err
	}
	if !v.isRight(part) {
		return fmt.Errorf("%s: bytes %d to %d: %w", v.dgst, v.at, v.at+n-1, ErrWrong)
	}
	v.at += n
	v.number++
	v.ready, v.skip = part[v.skip:], 0
	return nil
}

func (v *vouched) isRight(part []byte) bool {
	if v.content.parts == nil {
		return v.dgst.Algorithm().FromBytes(part) == v.dgst
	}
	p, from := v.content.parts, v.number*tagSize
	return hmac.Equal(p.Tags[from:from+tagSize], p.tag(v.at, part))
}

// rest leaves out what was not asked for.
type rest struct {
	io.ReadCloser
	skip int64
}

func (r *rest) Read(p []byte) (int, error) {
	if r.skip > 0 {
		n, err := io.CopyN(io.Discard, r.ReadCloser, r.skip)
		if r.skip -= n; err != nil {
			return 0, err
		}
	}
	return r.ReadCloser.Read(p)
}
