package buckettest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"breakwater/pkg/registrytest"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/service/s3"
	"github.com/aws/aws-sdk-go-v2/service/s3/types"
	"github.com/aws/smithy-go"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) {
	goleak.VerifyTestMain(m, goleak.IgnoreAnyFunction("github.com/docker/go-events.(*Broadcaster).run"))
}

// through is the bucket's client, by the proxy.
func (b *Bucket) through() *s3.Client {
	options := b.client.Options()
	options.BaseEndpoint = aws.String(b.URL)
	options.Retryer = aws.NopRetryer{}
	return s3.New(options)
}

func put(client *s3.Client, name, content string, conditions func(*s3.PutObjectInput)) (string, error) {
	in := &s3.PutObjectInput{Bucket: aws.String(Name), Key: &name, Body: strings.NewReader(content)}
	conditions(in)
	out, err := client.PutObject(context.Background(), in)
	if err != nil {
		return "", err
	}
	return *out.ETag, nil
}

func code(err error) string {
	var api smithy.APIError
	if errors.As(err, &api) {
		return api.ErrorCode()
	}
	return fmt.Sprint(err)
}

// What the shared store builds on must hold for the server that its tests run against.
func TestConditionsHold(t *testing.T) {
	b := Start(t)
	client := b.through()
	race := func(content string, conditions func(*s3.PutObjectInput)) (won int) {
		var wg sync.WaitGroup
		var n atomic.Int64
		for i := range 20 {
			wg.Go(func() {
				_, err := put(client, "a/b", fmt.Sprint(content, i), conditions)
				if err == nil {
					n.Add(1)
				} else if c := code(err); c != "PreconditionFailed" {
					t.Error(c)
				}
			})
		}
		wg.Wait()
		return int(n.Load())
	}
	if won := race("first ", func(in *s3.PutObjectInput) { in.IfNoneMatch = aws.String("*") }); won != 1 {
		t.Errorf("If-None-Match: %d of 20 have won", won)
	}
	head, err := client.HeadObject(t.Context(), &s3.HeadObjectInput{Bucket: aws.String(Name), Key: aws.String("a/b")})
	if err != nil {
		t.Fatal(err)
	}
	if won := race("second ", func(in *s3.PutObjectInput) { in.IfMatch = head.ETag }); won != 1 {
		t.Errorf("If-Match: %d of 20 have won", won)
	}
	if _, err := put(client, "a/c", "x", func(in *s3.PutObjectInput) { in.IfMatch = head.ETag }); code(err) != "NoSuchKey" {
		t.Errorf("If-Match on nothing: %v", err)
	}
	_, err = client.DeleteObject(t.Context(), &s3.DeleteObjectInput{Bucket: aws.String(Name), Key: aws.String("a/b"), IfMatch: head.ETag})
	if code(err) != "PreconditionFailed" {
		t.Errorf("DELETE If-Match: %v", err)
	}
}

func TestMultipartConditionHolds(t *testing.T) {
	b := Start(t)
	client := b.through()
	const name = "a/big"
	var wg sync.WaitGroup
	var won atomic.Int64
	for i := range 4 {
		wg.Go(func() {
			up, err := client.CreateMultipartUpload(context.Background(), &s3.CreateMultipartUploadInput{Bucket: aws.String(Name), Key: aws.String(name)})
			if err != nil {
				t.Error(err)
				return
			}
			part, err := client.UploadPart(context.Background(), &s3.UploadPartInput{
				Bucket: aws.String(Name), Key: aws.String(name), UploadId: up.UploadId, PartNumber: aws.Int32(1),
				Body: bytes.NewReader(bytes.Repeat([]byte{byte(i)}, 1000)),
			})
			if err != nil {
				t.Error(err)
				return
			}
			_, err = client.CompleteMultipartUpload(context.Background(), &s3.CompleteMultipartUploadInput{
				Bucket: aws.String(Name), Key: aws.String(name), UploadId: up.UploadId, IfNoneMatch: aws.String("*"),
				MultipartUpload: &types.CompletedMultipartUpload{Parts: []types.CompletedPart{{ETag: part.ETag, PartNumber: aws.Int32(1)}}},
			})
			if err == nil {
				won.Add(1)
			} else if c := code(err); c != "PreconditionFailed" {
				t.Error(c)
			}
		})
	}
	wg.Wait()
	if won.Load() != 1 {
		t.Errorf("%d of 4 have won", won.Load())
	}
	if n := b.Uploads(); n != 3 {
		t.Errorf("%d uploads are left", n)
	}
}

func TestFaults(t *testing.T) {
	b := Start(t)
	b.Put("a/blobs/1", []byte("one"))
	b.Put("a/blobs/2", []byte("two"))
	b.Age("a/blobs/1", time.Hour)
	client := b.through()
	get := func(name string) (string, *s3.GetObjectOutput, error) {
		out, err := client.GetObject(t.Context(), &s3.GetObjectInput{Bucket: aws.String(Name), Key: &name})
		if err != nil {
			return "", nil, err
		}
		defer out.Body.Close()
		var body bytes.Buffer
		_, err = body.ReadFrom(out.Body)
		return body.String(), out, err
	}
	body, out, err := get("a/blobs/1")
	if age := time.Since(*out.LastModified); err != nil || body != "one" || age < time.Hour-time.Second || age > time.Hour+time.Minute {
		t.Errorf("%q, %v old, %v", body, age, err)
	}
	for want, fault := range map[string]registrytest.Fault{
		"SlowDown": SlowDown(), "AccessDenied": Forbidden(), "XMinioStorageFull": Full(),
	} {
		b.Fault(Blobs, fault)
		if _, _, err := get("a/blobs/1"); code(err) != want {
			t.Errorf("%v, want %s", err, want)
		}
		b.Heal()
	}
	heal := b.Fault(Object("a/blobs/1"), Skew(10*time.Minute), b.Swap("a/blobs/2"))
	body, out, err = get("a/blobs/1")
	if err != nil || body != "two" || time.Until(*out.LastModified) < 9*time.Minute {
		t.Errorf("%q, %v, %v", body, out, err)
	}
	heal()
	b.Fault(Object("a/blobs/2"), registrytest.Truncate(1))
	if body, _, err := get("a/blobs/2"); err == nil {
		t.Errorf("%q", body)
	}
	b.Down()
	if _, _, err := get("a/blobs/1"); err == nil {
		t.Error("an answer from a bucket that is down")
	}
	b.Up()
	b.Forget()
	if body, _, err := get("a/blobs/1"); err != nil || body != "one" {
		t.Errorf("%q, %v", body, err)
	}
	if b.Count(Blobs) != 1 || b.Count(Reads) != 1 || b.Count(Writes) != 0 || b.Count(registrytest.Match{Method: http.MethodGet}) != 1 {
		t.Errorf("counted %v", b.Requests(All))
	}
	view := b.View()
	view.Down()
	view.Up()
	b.Down()
	b.URL, b.client = view.URL, view.client
	if out, err := b.through().GetObject(t.Context(), &s3.GetObjectInput{Bucket: aws.String(Name), Key: aws.String("a/blobs/1")}); err != nil {
		t.Errorf("another view is down too: %v", err)
	} else {
		out.Body.Close()
	}
	b.Remove("a/blobs/2")
	if names := b.Names("a/"); !slices.Equal(names, []string{"a/blobs/1"}) {
		t.Error(names)
	}
}
