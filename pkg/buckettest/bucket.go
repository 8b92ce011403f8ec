// Package buckettest is a bucket for tests: versitygw, a real S3 server, on loopback, behind a proxy
// that keeps a log of every request and misbehaves by rule, as package registrytest's registries do.
//
//	bucket := buckettest.Start(t)
//	bucket.Fault(buckettest.Reads, buckettest.SlowDown())
//	bucket.Heal()
package buckettest

import (
	"bytes"
	"context"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"breakwater/pkg/registrytest"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/credentials"
	"github.com/aws/aws-sdk-go-v2/service/s3"
)

// What a client of the bucket needs besides its URL. The region is us-east-1.
const (
	Name      = "fleet"
	AccessKey = "buckettest"
	SecretKey = "not a secret at all"
)

// Bucket is a bucket. It has path-style names only.
type Bucket struct {
	*registrytest.Scripted
	URL string // of the proxy, which stays when it is taken down

	t       testing.TB
	gateway *Gateway
	client  *s3.Client // of the gateway, past the proxy
	server  *registrytest.Server
}

// Start starts a bucket for one test, and points the environment, in which the SDK looks for
// credentials, at its own. The test is skipped if versitygw is not installed; in CI it fails.
func Start(t testing.TB) *Bucket {
	t.Helper()
	for name, value := range Environment() {
		t.Setenv(name, value)
	}
	b := &Bucket{t: t}
	b.startGateway()
	b.client = s3.New(s3.Options{
		BaseEndpoint:               aws.String(b.gateway.URL),
		Region:                     "us-east-1",
		UsePathStyle:               true,
		Credentials:                credentials.NewStaticCredentialsProvider(AccessKey, SecretKey, ""),
		HTTPClient:                 &http.Client{Transport: b.gateway.transport},
		RequestChecksumCalculation: aws.RequestChecksumCalculationWhenRequired,
		ResponseChecksumValidation: aws.ResponseChecksumValidationWhenRequired,
	})
	b.Scripted = registrytest.NewScripted(b.gateway.Proxy())
	b.listen("127.0.0.1:0")
	t.Cleanup(b.Down)
	return b
}

// View is another way to the same bucket, with a proxy and an address of its own: as another host sees
// it, which can be cut off alone.
func (b *Bucket) View() *Bucket {
	b.t.Helper()
	v := *b
	v.Scripted = registrytest.NewScripted(v.gateway.Proxy())
	v.listen("127.0.0.1:0")
	b.t.Cleanup(v.Down)
	return &v
}

// Environment is by what the SDK finds the bucket's credentials, and nobody else's.
func Environment() map[string]string {
	return map[string]string{
		"AWS_ACCESS_KEY_ID":           AccessKey,
		"AWS_SECRET_ACCESS_KEY":       SecretKey,
		"AWS_SESSION_TOKEN":           "",
		"AWS_CA_BUNDLE":               "",
		"AWS_PROFILE":                 "",
		"AWS_CONFIG_FILE":             os.DevNull,
		"AWS_SHARED_CREDENTIALS_FILE": os.DevNull,
		"AWS_EC2_METADATA_DISABLED":   "true",
	}
}

// startGateway starts the gateway in a folder of the test's.
func (b *Bucket) startGateway() {
	b.t.Helper()
	if _, err := installed(); err != nil && os.Getenv("CI") != "true" {
		b.t.Skipf("%v; testdata/install.sh installs it", err)
	}
	var err error
	if b.gateway, err = StartGateway(b.t.TempDir()); err != nil {
		b.t.Fatal(err)
	}
	b.t.Cleanup(b.gateway.Close)
}

func (b *Bucket) listen(address string) {
	b.t.Helper()
	l, err := net.Listen("tcp", address)
	if err != nil {
		b.t.Fatal(err)
	}
	b.server = registrytest.Serve(l, b.Scripted)
	b.URL = b.server.URL
}

// Down cuts all connections and refuses new ones.
func (b *Bucket) Down() {
	if b.server != nil {
		_ = b.server.Close()
		b.server = nil
	}
}

// Up listens again, at the same address.
func (b *Bucket) Up() {
	b.t.Helper()
	if b.server == nil {
		b.listen(b.URL[len("http://"):])
	}
}

// Put stores an object, whatever was there before. Like all that follows, it goes past the proxy.
func (b *Bucket) Put(name string, raw []byte) {
	b.t.Helper()
	_, err := b.client.PutObject(context.Background(), &s3.PutObjectInput{
		Bucket: aws.String(Name), Key: &name, Body: bytes.NewReader(raw),
	})
	if err != nil {
		b.t.Fatal(err)
	}
}

// Get returns an object's bytes.
func (b *Bucket) Get(name string) []byte {
	b.t.Helper()
	raw, err := b.get(name)
	if err != nil {
		b.t.Fatal(err)
	}
	return raw
}

func (b *Bucket) get(name string) ([]byte, error) {
	out, err := b.client.GetObject(context.Background(), &s3.GetObjectInput{Bucket: aws.String(Name), Key: &name})
	if err != nil {
		return nil, err
	}
	defer out.Body.Close()
	return io.ReadAll(out.Body)
}

// Remove deletes an object.
func (b *Bucket) Remove(name string) {
	b.t.Helper()
	if _, err := b.client.DeleteObject(context.Background(), &s3.DeleteObjectInput{Bucket: aws.String(Name), Key: &name}); err != nil {
		b.t.Fatal(err)
	}
}

// Names are the names of all objects that begin so, in order.
func (b *Bucket) Names(prefix string) []string {
	b.t.Helper()
	var names []string
	pages := s3.NewListObjectsV2Paginator(b.client, &s3.ListObjectsV2Input{Bucket: aws.String(Name), Prefix: &prefix})
	for pages.HasMorePages() {
		page, err := pages.NextPage(context.Background())
		if err != nil {
			b.t.Fatal(err)
		}
		for _, object := range page.Contents {
			names = append(names, *object.Key)
		}
	}
	slices.Sort(names)
	return names
}

// Uploads is how many multipart uploads are neither completed nor aborted.
func (b *Bucket) Uploads() int {
	b.t.Helper()
	out, err := b.client.ListMultipartUploads(context.Background(), &s3.ListMultipartUploadsInput{Bucket: aws.String(Name)})
	if err != nil {
		b.t.Fatal(err)
	}
	return len(out.Uploads)
}

// Age makes an object older: its Last-Modified is d ago.
func (b *Bucket) Age(name string, d time.Duration) {
	b.t.Helper()
	at := time.Now().Add(-d)
	if err := os.Chtimes(filepath.Join(b.gateway.folder, Name, filepath.FromSlash(name)), at, at); err != nil {
		b.t.Fatal(err)
	}
}

// AgeUploads makes all multipart uploads older: they were begun d ago.
func (b *Bucket) AgeUploads(d time.Duration) {
	b.t.Helper()
	at := time.Now().Add(-d)
	uploads, err := filepath.Glob(filepath.Join(b.gateway.folder, Name, ".sgwtmp", "multipart", "*", "*"))
	if err != nil {
		b.t.Fatal(err)
	}
	for _, upload := range uploads {
		if err := os.Chtimes(upload, at, at); err != nil {
			b.t.Fatal(err)
		}
	}
}
