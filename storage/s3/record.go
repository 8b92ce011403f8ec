package s3

import (
	"bytes"
	"context"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/http"
	"strings"
	"sync/atomic"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/service/s3"
)

// maxRecord bounds what is read of a record. Most have some hundred bytes; who refers to a manifest, and the parts of
// a large blob, are the most that one tells.
const maxRecord = 128 << 10

// recordMark begins the first line of a record, which goes on with the key's id and the signature in
// hex. JSON follows.
const recordMark = "breakwater-record 1"

// keyring signs with the first key and verifies with all.
type keyring struct {
	keys    []signingKey
	ignored *atomic.Uint64 // records that were not taken
}

type signingKey struct {
	id     string
	secret []byte
}

func newKeyring(secrets [][]byte) keyring {
	k := keyring{ignored: new(atomic.Uint64)}
	for _, secret := range secrets {
		sum := sha256.Sum256(append([]byte("breakwater-key-id 1\n"), secret...))
		k.keys = append(k.keys, signingKey{hex.EncodeToString(sum[:4]), bytes.Clone(secret)})
	}
	return k
}

// sign covers the object's name as well, so that a record under another one's name fails.
func (k signingKey) sign(name string, body []byte) []byte {
	mac := hmac.New(sha256.New, k.secret)
	fmt.Fprintf(mac, "%s\n%s\n", recordMark, name)
	mac.Write(body)
	return mac.Sum(nil)
}

// storable is what a record can hold. Its check refuses what cannot have been published.
type storable interface{ check() error }

func (k keyring) seal(name string, v storable) ([]byte, error) {
	body, err := json.Marshal(v)
	if err != nil {
		return nil, err
	}
	key := k.keys[0]
	return fmt.Appendf(nil, "%s %s %x\n%s\n", recordMark, key.id, key.sign(name, append(body, '\n')), body), nil
}

// errOtherKey is why a record is not taken that may be right.
var errOtherKey = errors.New("is signed with a key that is not the fleet's")

// open decodes a record, and returns which of the keys has signed it for this name.
func (k keyring) open(name string, raw []byte, v storable) (signingKey, error) {
	none := signingKey{}
	line, body, found := bytes.Cut(raw, []byte("\n"))
	rest, marked := strings.CutPrefix(string(line), recordMark+" ")
	id, signature, both := strings.Cut(rest, " ")
	if !found || !marked || !both {
		return none, errors.New("is not a record")
	}
	signed, err := hex.DecodeString(signature)
	if err != nil {
		return none, errors.New("is not a record")
	}
	for _, key := range k.keys {
		if key.id != id {
			continue
		}
		if !hmac.Equal(signed, key.sign(name, body)) {
			return none, errors.New("has a wrong signature")
		}
		if err := json.Unmarshal(body, v); err != nil {
			return none, fmt.Errorf("is not a record: %w", err)
		}
		return key, v.check()
	}
	return none, fmt.Errorf("%w: %.20q", errOtherKey, id)
}

// signed is a record as it was found.
type signed struct {
	found     bool       // there is an object of that name, good or bad
	etag      string     // of the object
	modified  time.Time  // by the bucket's clock
	unchanged bool       // it is the one whose etag was given; nothing was decoded
	key       signingKey // that it was signed with
	oldKey    bool       // it was signed with another key than records are signed with now
	wrong     error      // why the record is ignored
	raw       []byte     // of one that is
}

// read gets a record; v is set unless it is not found, unchanged or wrong. It is no error that a
// record is not there. With an etag, one that is unchanged is not sent again.
func (b *Bucket) read(ctx context.Context, name, etag string, v storable) (signed, error) {
	rec, err := once(ctx, b.reads, headerLimit, func(ctx context.Context) (signed, error) {
		in := &s3.GetObjectInput{Bucket: &b.cfg.Bucket, Key: b.key(name)}
		if etag != "" {
			in.IfNoneMatch = &etag
		}
		out, err := b.client.GetObject(ctx, in)
		if err != nil {
			return signed{}, err
		}
		defer out.Body.Close()
		raw, err := io.ReadAll(io.LimitReader(out.Body, maxRecord+1))
		if err != nil {
			return signed{}, err
		}
		rec := signed{found: true, etag: aws.ToString(out.ETag), modified: aws.ToTime(out.LastModified)}
		if len(raw) > maxRecord {
			rec.wrong = fmt.Errorf("is over %d bytes", maxRecord)
		} else if rec.key, rec.wrong = b.keys.open(name, raw, v); rec.wrong != nil {
			rec.raw = raw
		}
		rec.oldKey = !bytes.HasPrefix(raw, fmt.Appendf(nil, "%s %s ", recordMark, b.keys.keys[0].id))
		return rec, nil
	})
	switch {
	case absent(err):
		return signed{}, nil
	case status(err) == http.StatusNotModified && etag != "":
		return signed{found: true, etag: etag, unchanged: true}, nil
	case err != nil:
		return signed{}, fmt.Errorf("read %s: %w", name, err)
	}
	if rec.wrong != nil {
		b.ignore(name, rec.wrong)
	}
	return rec, nil
}

// ignore counts a record that is not taken. Somebody who can write to the bucket can make as many of
// those as he likes: few are logged.
func (b *Bucket) ignore(name string, why error) {
	if n := b.keys.ignored.Add(1); n&(n-1) == 0 || n%1000 == 0 {
		b.log.Warn("ignored a record of the shared store", "record", name, "ignored", n, "err", why)
	}
}

// condition is what a write depends on: that there is no object, or that it is still that one.
type condition struct{ etag string }

func (c condition) match() *string {
	if c.etag == "" {
		return nil
	}
	return &c.etag
}

func (c condition) noneMatch() *string {
	if c.etag == "" {
		return aws.String("*")
	}
	return nil
}

func (b *Bucket) putInput(name string, raw []byte) *s3.PutObjectInput {
	in := &s3.PutObjectInput{Bucket: &b.cfg.Bucket, Key: b.key(name), Body: bytes.NewReader(raw)}
	in.ServerSideEncryption, in.SSEKMSKeyId = b.encryption()
	return in
}

// write publishes a record and returns its etag.
func (b *Bucket) write(ctx context.Context, name string, v storable, c condition) (string, error) {
	if b.clock.wrong() {
		by, _ := b.clock.offset()
		return "", fmt.Errorf("%w: the bucket's is ahead by %s", ErrClock, by.Round(time.Second))
	}
	raw, err := b.keys.seal(name, v)
	if err != nil {
		return "", err
	}
	out, err := often(ctx, b.writes, recordLimit, func(ctx context.Context) (*s3.PutObjectOutput, error) {
		in := b.putInput(name, raw)
		in.IfMatch, in.IfNoneMatch = c.match(), c.noneMatch()
		return b.client.PutObject(ctx, in)
	})
	if err != nil {
		return "", fmt.Errorf("write %s: %w", name, err)
	}
	return aws.ToString(out.ETag), nil
}

// errNone is for records that are not there, or ignored.
func errNone(name string) error { return fmt.Errorf("%s: %w", name, fs.ErrNotExist) }
