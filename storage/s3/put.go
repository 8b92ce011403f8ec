package s3

import (
	"context"
	"errors"
	"fmt"
	"hash"
	"io"
	"net/url"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	v4 "github.com/aws/aws-sdk-go-v2/aws/signer/v4"
	"github.com/aws/aws-sdk-go-v2/service/s3"
	"github.com/aws/aws-sdk-go-v2/service/s3/types"
	"github.com/aws/smithy-go/middleware"
	"github.com/opencontainers/go-digest"
)

const (
	// maxSingle is the biggest blob that is sent in one request.
	maxSingle = 64 << 20
	// sendStall is how long a request with a body may make no progress, up to its answer; sendLimit is
	// for all of it, so that none goes on for ever.
	sendStall = 20 * time.Second
	sendLimit = time.Hour
	// maxCopy is the biggest object that one request copies (Amazon's limit is 5 GiB).
	maxCopy = 5 << 30
)

// info is what is known of an object without reading it.
type info struct {
	found    bool
	size     int64
	etag     string
	modified time.Time // by the bucket's clock
}

func (b *Bucket) head(ctx context.Context, name string) (info, error) {
	out, err := once(ctx, b.reads, headerLimit, func(ctx context.Context) (*s3.HeadObjectOutput, error) {
		return b.client.HeadObject(ctx, &s3.HeadObjectInput{Bucket: &b.cfg.Bucket, Key: b.key(name)})
	})
	if absent(err) {
		return info{}, nil
	}
	if err != nil {
		return info{}, fmt.Errorf("look at %s: %w", name, err)
	}
	return info{true, aws.ToInt64(out.ContentLength), aws.ToString(out.ETag), aws.ToTime(out.LastModified)}, nil
}

// PutBlob stores a blob of that size, unless it is there already. r is read from where it stands, more
// than once; nothing is stored if its bytes are not the digest's. One that is there is renewed if
// Collect might take it before a record needs it.
func (b *Bucket) PutBlob(ctx context.Context, dgst digest.Digest, size int64, r io.ReadSeeker) error {
	begin, err := r.Seek(0, io.SeekCurrent)
	if err != nil {
		return fmt.Errorf("write %s: %w", dgst, err)
	}
	return b.store(ctx, dgst, size, func(ctx context.Context, c condition) error {
		if _, err := r.Seek(begin, io.SeekStart); err != nil {
			return &ownError{err}
		}
		if size > maxSingle {
			return b.upload(ctx, dgst, size, r, c)
		}
		return b.put(ctx, &verified{r: r, begin: begin, size: size, dgst: dgst}, c)
	})
}

// Upload stores a blob whose bytes still arrive: in parts as they come, completed only if they are the
// digest's. size is -1 if it is not known. It returns nil, and has not read r to its end, if the blob
// is there already, or somebody else was faster.
func (b *Bucket) Upload(ctx context.Context, dgst digest.Digest, size int64, r io.Reader) error {
	sent := false
	return b.store(ctx, dgst, size, func(ctx context.Context, c condition) error {
		if sent {
			return &ownError{errors.New("it was deleted, and its bytes are gone")}
		}
		sent = true
		return b.upload(ctx, dgst, size, r, c)
	})
}

// store has a blob sent, unless the bucket has it.
func (b *Bucket) store(ctx context.Context, dgst digest.Digest, size int64, send func(context.Context, condition) error) error {
	if err := b.writable(); err != nil {
		return err
	}
	for range writeRaces {
		done, err := b.storeOnce(ctx, dgst, size, send)
		if err != nil {
			return fmt.Errorf("write %s: %w", blobName(dgst), err)
		}
		if done {
			return nil
		}
	}
	return fmt.Errorf("write %s: it is deleted all the time", blobName(dgst))
}

// storeOnce reports whether the blob is there to stay.
func (b *Bucket) storeOnce(ctx context.Context, dgst digest.Digest, size int64, send func(context.Context, condition) error) (bool, error) {
	name := blobName(dgst)
	there, err := b.head(ctx, name)
	if err != nil {
		return false, err
	}
	right := there.found && (size < 0 || there.size == size) && !b.wrong.has(dgst)
	aging := there.found && b.old(there.modified)
	if right && !aging {
		return true, nil
	}
	if right {
		if done, err := b.renew(ctx, name, there); done || err != nil {
			return done, err
		}
		if there, err = b.head(ctx, name); err != nil {
			return false, err
		}
	}
	err = send(ctx, condition{there.etag})
	if lost(err) { // to somebody who verifies as we do
		now, err := b.head(ctx, name)
		return now.found, err
	}
	if err != nil {
		return false, err
	}
	b.wrong.clear(dgst)
	if aging {
		return b.survived(ctx, name)
	}
	return true, nil
}

// renew makes an object young by copying it onto itself. It returns false if that has not helped.
func (b *Bucket) renew(ctx context.Context, name string, old info) (bool, error) {
	if old.size > maxCopy {
		return false, nil
	}
	out, err := once(ctx, b.writes, assembleLimit, func(ctx context.Context) (*s3.CopyObjectOutput, error) {
		in := &s3.CopyObjectInput{
			Bucket: &b.cfg.Bucket, Key: b.key(name),
			CopySource:        aws.String((&url.URL{Path: b.cfg.Bucket + "/" + *b.key(name)}).EscapedPath()),
			CopySourceIfMatch: &old.etag,
			MetadataDirective: types.MetadataDirectiveReplace, // without which it is refused as a copy onto itself
		}
		in.ServerSideEncryption, in.SSEKMSKeyId = b.encryption()
		return b.client.CopyObject(ctx, in)
	})
	switch {
	case err != nil && status(err) == 0:
		return false, fmt.Errorf("renew: %w", err)
	case err != nil, out.CopyObjectResult == nil, b.old(aws.ToTime(out.CopyObjectResult.LastModified)):
		return false, nil // refused, or it knows a copy onto itself as nothing to do
	}
	return b.survived(ctx, name)
}

// old reports whether something is so old that it must not be relied on.
func (b *Bucket) old(modified time.Time) bool { return b.clock.now().Sub(modified) > renewAfter }

// survived reports whether an object that was just written will last. Collect may have looked at it
// while it was old, and delete it now.
func (b *Bucket) survived(ctx context.Context, name string) (bool, error) {
	collecting, err := b.held(ctx, collectLease)
	if err != nil {
		return false, err
	}
	if collecting && !pause(ctx, deleteLimit) {
		return false, context.Cause(ctx)
	}
	now, err := b.head(ctx, name)
	if err != nil {
		return false, err
	}
	return now.found && !b.old(now.modified), nil
}

// put sends a blob in one request. It breaks off if its bytes are wrong.
func (b *Bucket) put(ctx context.Context, v *verified, c condition) error {
	if v.size == 0 && v.dgst.Algorithm().FromBytes(nil) != v.dgst {
		return &ownError{fmt.Errorf("is empty and not %s", v.dgst)} // a body that nobody reads
	}
	_, err := often(ctx, b.writes, sendLimit, func(ctx context.Context) (*s3.PutObjectOutput, error) {
		if _, err := v.Seek(0, io.SeekStart); err != nil {
			return nil, &ownError{err}
		}
		in := &s3.PutObjectInput{
			Bucket: &b.cfg.Bucket, Key: b.key(blobName(v.dgst)), ContentLength: &v.size,
			IfMatch: c.match(), IfNoneMatch: c.noneMatch(),
		}
		in.ServerSideEncryption, in.SSEKMSKeyId = b.encryption()
		out, err := watched(ctx, v, func(ctx context.Context, body io.Reader) (*s3.PutObjectOutput, error) {
			in.Body = body
			return b.client.PutObject(ctx, in, signedAs(v.dgst))
		})
		if v.err != nil {
			return nil, &ownError{v.err}
		}
		return out, err
	})
	return err
}

// watched ends a request whose body makes no progress on the network, up to its answer.
func watched[T any](ctx context.Context, r io.ReadSeeker, send func(context.Context, io.Reader) (T, error)) (T, error) {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	stall := time.AfterFunc(sendStall, func() { cancel(errSlow) })
	defer stall.Stop()
	out, err := send(ctx, &pulse{r, stall})
	if err != nil {
		err = explain(ctx, err)
	}
	return out, err
}

// pulse is a body whose stall does not run while it is read.
type pulse struct {
	io.ReadSeeker
	stall *time.Timer
}

func (p *pulse) Read(raw []byte) (int, error) {
	p.stall.Stop()
	defer p.stall.Reset(sendStall)
	return p.ReadSeeker.Read(raw)
}

// signedAs has a request signed with the digest as the hash of its body, which the server checks. It
// saves hashing the body first.
func signedAs(dgst digest.Digest) func(*s3.Options) {
	return func(o *s3.Options) {
		if dgst.Algorithm() != digest.SHA256 {
			return
		}
		o.APIOptions = append(o.APIOptions, func(stack *middleware.Stack) error {
			return stack.Finalize.Add(middleware.FinalizeMiddlewareFunc("BodyIsDigest",
				func(ctx context.Context, in middleware.FinalizeInput, next middleware.FinalizeHandler) (middleware.FinalizeOutput, middleware.Metadata, error) {
					return next.HandleFinalize(v4.SetPayloadHash(ctx, dgst.Encoded()), in)
				}), middleware.Before)
		})
	}
}

// verified is the body of a request, read from begin on. It ends in an error, ahead of its last byte,
// if it is not what its digest says.
type verified struct {
	r           io.ReadSeeker
	begin, size int64
	dgst        digest.Digest

	offset int64
	hash   hash.Hash
	err    error
}

// Seek is from the body's begin.
func (v *verified) Seek(offset int64, whence int) (int64, error) {
	switch whence {
	case io.SeekStart:
		offset += v.begin
	case io.SeekEnd:
		offset, whence = v.begin+v.size+offset, io.SeekStart
	}
	at, err := v.r.Seek(offset, whence)
	if err != nil {
		v.err = err
		return 0, err
	}
	if v.offset = at - v.begin; v.offset == 0 {
		v.hash = v.dgst.Algorithm().Hash()
	}
	return v.offset, nil
}

func (v *verified) Read(p []byte) (int, error) {
	if v.err != nil {
		return 0, v.err
	}
	n, err := v.r.Read(p[:min(int64(len(p)), v.size-v.offset)])
	v.offset += int64(n)
	v.hash.Write(p[:n])
	switch {
	case v.offset == v.size && v.sum() != v.dgst:
		v.err = fmt.Errorf("is %s and not %s", v.sum(), v.dgst)
		return 0, v.err
	case v.offset == v.size && n == 0:
		return 0, io.EOF
	case errors.Is(err, io.EOF) && v.offset < v.size:
		v.err = io.ErrUnexpectedEOF
		return n, v.err
	case err != nil && !errors.Is(err, io.EOF):
		v.err = err
		return n, err
	}
	return n, nil
}

func (v *verified) sum() digest.Digest { return digest.NewDigest(v.dgst.Algorithm(), v.hash) }
