package s3

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"hash"
	"io"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/service/s3"
	"github.com/aws/aws-sdk-go-v2/service/s3/types"
	"github.com/opencontainers/go-digest"
	"golang.org/x/sync/errgroup"
)

const (
	// partSize times the 10,000 parts that Amazon takes is 156 GiB.
	partSize = 16 << 20
	// partsAtOnce are under way of one upload, maxParts in memory of all.
	partsAtOnce = 2
	maxParts    = 6
)

// upload is a blob that is stored in parts.
type upload struct {
	b    *Bucket
	name string
	dgst digest.Digest
	size int64 // -1 if it is not known
	id   string

	r     io.Reader
	hash  hash.Hash
	read  int64
	parts []*types.CompletedPart
}

// upload stores what r has until its end, if that is the digest's. What fits into one part is sent in
// one request.
func (b *Bucket) upload(ctx context.Context, dgst digest.Digest, size int64, r io.Reader, c condition) error {
	u := &upload{b: b, name: blobName(dgst), dgst: dgst, size: size, r: r, hash: dgst.Algorithm().Hash()}
	first, err := b.parts.take(ctx)
	if err != nil {
		return &ownError{err}
	}
	n, last, err := u.fill(first)
	if err != nil || last {
		defer b.parts.give(first)
		if err != nil {
			return err
		}
		return b.put(ctx, &verified{r: bytes.NewReader(first[:n]), size: int64(n), dgst: dgst}, c)
	}
	if err := u.create(ctx); err != nil {
		b.parts.give(first)
		return err
	}
	if err = u.send(ctx, first); err == nil {
		err = u.complete(ctx, c)
	}
	if err != nil {
		u.abort(ctx)
	}
	return err
}

// fill reads a part, and says whether it is the last. Behind the last, all bytes are the right ones.
func (u *upload) fill(part []byte) (n int, last bool, err error) {
	n, err = io.ReadFull(u.r, part)
	u.hash.Write(part[:n])
	u.read += int64(n)
	last = errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF)
	switch got := digest.NewDigest(u.dgst.Algorithm(), u.hash); {
	case err != nil && !last:
		return n, false, &ownError{err}
	case u.size >= 0 && (u.read > u.size || last && u.read < u.size):
		return n, last, &ownError{fmt.Errorf("has %d bytes and not %d", u.read, u.size)}
	case last && got != u.dgst:
		return n, last, &ownError{fmt.Errorf("is %s and not %s", got, u.dgst)}
	}
	return n, last, nil
}

func (u *upload) create(ctx context.Context) error {
	out, err := often(ctx, u.b.writes, recordLimit, func(ctx context.Context) (*s3.CreateMultipartUploadOutput, error) {
		in := &s3.CreateMultipartUploadInput{Bucket: &u.b.cfg.Bucket, Key: u.b.key(u.name)}
		in.ServerSideEncryption, in.SSEKMSKeyId = u.b.encryption()
		return u.b.client.CreateMultipartUpload(ctx, in)
	})
	if err == nil {
		u.id = aws.ToString(out.UploadId)
	}
	return err
}

// send sends the first part, which is full, and all that follow.
func (u *upload) send(ctx context.Context, part []byte) error {
	group, ctx := errgroup.WithContext(ctx)
	group.SetLimit(partsAtOnce)
	n, last, err := len(part), false, error(nil)
	for {
		u.sendPart(ctx, group, part[:n])
		if last {
			break
		}
		if part, err = u.b.parts.take(ctx); err != nil {
			err = &ownError{err} // if a part has failed, Wait says so
			break
		}
		if n, last, err = u.fill(part); err != nil || n == 0 {
			u.b.parts.give(part)
			break
		}
	}
	if failed := group.Wait(); failed != nil {
		return failed
	}
	return err
}

// sendPart waits for its turn, and has the part sent and given back.
func (u *upload) sendPart(ctx context.Context, group *errgroup.Group, part []byte) {
	done := &types.CompletedPart{PartNumber: aws.Int32(int32(len(u.parts) + 1))}
	u.parts = append(u.parts, done)
	group.Go(func() error {
		defer u.b.parts.give(part)
		out, err := often(ctx, u.b.writes, sendLimit, func(ctx context.Context) (*s3.UploadPartOutput, error) {
			return watched(ctx, bytes.NewReader(part), func(ctx context.Context, body io.Reader) (*s3.UploadPartOutput, error) {
				return u.b.client.UploadPart(ctx, &s3.UploadPartInput{
					Bucket: &u.b.cfg.Bucket, Key: u.b.key(u.name), UploadId: &u.id, PartNumber: done.PartNumber, Body: body,
				})
			})
		})
		if err == nil {
			done.ETag = out.ETag
		}
		return err
	})
}

func (u *upload) complete(ctx context.Context, c condition) error {
	in := &s3.CompleteMultipartUploadInput{
		Bucket: &u.b.cfg.Bucket, Key: u.b.key(u.name), UploadId: &u.id,
		IfMatch: c.match(), IfNoneMatch: c.noneMatch(),
		MultipartUpload: &types.CompletedMultipartUpload{},
	}
	for _, part := range u.parts {
		in.MultipartUpload.Parts = append(in.MultipartUpload.Parts, *part)
	}
	_, err := often(ctx, u.b.writes, assembleLimit, func(ctx context.Context) (*s3.CompleteMultipartUploadOutput, error) {
		return u.b.client.CompleteMultipartUpload(ctx, in)
	})
	return err
}

// abort frees what the parts take, also when the caller has left. What it cannot, Collect does.
func (u *upload) abort(ctx context.Context) {
	_, err := often(context.WithoutCancel(ctx), u.b.writes, recordLimit, func(ctx context.Context) (*s3.AbortMultipartUploadOutput, error) {
		return u.b.client.AbortMultipartUpload(ctx, &s3.AbortMultipartUploadInput{Bucket: &u.b.cfg.Bucket, Key: u.b.key(u.name), UploadId: &u.id})
	})
	if err != nil && !absent(err) {
		u.b.log.Debug("cannot abort an upload", "digest", u.dgst, "err", err)
	}
}
