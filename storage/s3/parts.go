package s3

import (
	"crypto/aes"
	"crypto/cipher"
	"crypto/hkdf"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"io"

	"github.com/opencontainers/go-digest"
)

// PartSize is how much of a blob is verified at a time: nothing of a part is given out before all of it is
// known to be right, so that a bucket that lies costs no client its download.
const PartSize = 8 << 20

const (
	// wholeSize is up to where content is verified by its digest, as one part: who publishes it need not read it.
	wholeSize = 256 << 10
	// maxRecordParts bounds the parts of a record: of larger blobs nothing is verified before the whole is.
	maxRecordParts = 2048
)

// ErrWrong is the error of bytes that are not what the record of their blob says.
var ErrWrong = errors.New("wrong bytes")

// hasParts reports whether content of that size is verified in parts.
func hasParts(size int64) bool { return size > wholeSize && size <= maxRecordParts*PartSize }

// parts tell the bytes of a blob right from wrong, piece by piece, by a GMAC of each (NIST SP 800-38D). Its digest
// vouches for the whole, as always, so that this need not be the second hash of every byte: it takes an eighth of the
// time.
type parts struct {
	mac  cipher.AEAD
	tags [][]byte
}

// partsKey is for one blob, which has one content, in parts of one size: so no nonce, the number of a part, is ever
// used for two.
func (k signingKey) partsKey(dgst digest.Digest) (cipher.AEAD, error) {
	key, err := hkdf.Key(sha256.New, k.secret, nil, fmt.Sprintf("breakwater-parts 1\n%d\n%s", PartSize, dgst), 32)
	if err != nil {
		return nil, err
	}
	block, err := aes.NewCipher(key)
	if err != nil {
		return nil, err
	}
	return cipher.NewGCM(block)
}

// tag is what a part has to have.
func (p *parts) tag(number int64, raw []byte) []byte {
	nonce := make([]byte, p.mac.NonceSize())
	binary.BigEndian.PutUint64(nonce, uint64(number))
	return p.mac.Seal(nil, nonce, nil, raw)
}

// partsOf are those of a blob that can be read.
func (k signingKey) partsOf(dgst digest.Digest, blob io.Reader, size int64) (*parts, error) {
	mac, err := k.partsKey(dgst)
	if err != nil {
		return nil, err
	}
	p := &parts{mac: mac}
	buf := make([]byte, min(size, PartSize))
	for at := int64(0); at < size; at += PartSize {
		part := buf[:min(size-at, PartSize)]
		if _, err := io.ReadFull(blob, part); err != nil {
			return nil, fmt.Errorf("read a part: %w", err)
		}
		p.tags = append(p.tags, p.tag(at/PartSize, part))
	}
	return p, nil
}

// vouched gives out what a record vouches for, and ends with ErrWrong where the bytes are others.
type vouched struct {
	io.ReadCloser
	content Content
	dgst    digest.Digest
	at      int64  // of the next part
	skip    int64  // bytes of it that were not asked for
	buf     []byte // of a part
	ready   []byte // verified, and not given out yet
	err     error
}

// Aligned is where a blob has to be opened that is to be read from offset on, verified.
func Aligned(offset int64) int64 { return offset - offset%PartSize }

// Verified is a blob that was opened at Aligned(offset), from offset on, as the record vouches for it. A
// record that is older than its parts vouches for none: then it is given out as it comes.
func (c Content) Verified(dgst digest.Digest, blob io.ReadCloser, offset int64) io.ReadCloser {
	at := Aligned(offset)
	if c.Size > wholeSize && c.parts == nil {
		return &rest{ReadCloser: blob, skip: offset - at}
	}
	return &vouched{ReadCloser: blob, content: c, dgst: dgst, at: at, skip: offset - at}
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
	n := min(v.content.Size-v.at, PartSize)
	if n == 0 {
		return io.EOF
	}
	if v.buf == nil {
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
	v.ready, v.skip = part[v.skip:], 0
	return nil
}

func (v *vouched) isRight(part []byte) bool {
	if v.content.parts == nil {
		return v.dgst.Algorithm().FromBytes(part) == v.dgst
	}
	number := v.at / PartSize
	return hmac.Equal(v.content.parts.tags[number], v.content.parts.tag(number, part))
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
