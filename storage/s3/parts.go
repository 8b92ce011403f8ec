package s3

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"

	"github.com/opencontainers/go-digest"
)

// PartSize is how much of a blob is verified at a time: nothing of a part is given out before all of it is
// known to be right, so that a bucket that lies costs no client its download.
const PartSize = 8 << 20

// maxRecordParts bounds those of a record: of larger blobs nothing is verified before the whole is.
const maxRecordParts = 2048

// ErrWrong is the error of bytes that are not what the record of their blob says.
var ErrWrong = errors.New("wrong bytes")

// hasParts reports whether content of that size is verified in parts. What is no larger than one is verified by
// its digest; what is over 16 GiB, when it is whole.
func hasParts(size int64) bool { return size > PartSize && size <= maxRecordParts*PartSize }

// partsOf are the SHA-256 of each PartSize bytes, and of what is left at the end.
func partsOf(r io.Reader, size int64) ([][]byte, error) {
	var parts [][]byte
	for left := size; left > 0; left -= PartSize {
		hash := sha256.New()
		if _, err := io.CopyN(hash, r, min(left, PartSize)); err != nil {
			return nil, fmt.Errorf("hash a part: %w", err)
		}
		parts = append(parts, hash.Sum(nil))
	}
	return parts, nil
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
	if c.Size > PartSize && c.parts == nil {
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
	if v.content.Size <= PartSize {
		return v.dgst.Algorithm().FromBytes(part) == v.dgst
	}
	sum := sha256.Sum256(part)
	return bytes.Equal(sum[:], v.content.parts[v.at/PartSize])
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
