package s3

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"

	"breakwater/pkg/buckettest"
	"breakwater/pkg/oci"
	"breakwater/pkg/registrytest"

	"github.com/opencontainers/go-digest"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) {
	_ = flag.Set("rapid.checks", "15") // each writes hundreds of times; 100 were run too
	goleak.VerifyTestMain(m, goleak.IgnoreAnyFunction("github.com/docker/go-events.(*Broadcaster).run"))
}

var (
	fleetKey  = []byte("the key that the fleet shares")
	secondKey = []byte("the one that comes after it")
	app       = oci.Repository{Registry: "quay.io", Name: "org/app"}
	latest    = oci.Reference{Repository: app, Tag: "latest"}
)

const prefix = "breakwater/"

// open returns a host's view of the bucket.
func open(t testing.TB, server *buckettest.Bucket, change ...func(*Config)) *Bucket {
	t.Helper()
	cfg := Config{Bucket: buckettest.Name, Prefix: prefix, Endpoint: server.URL, PathStyle: true, Keys: [][]byte{fleetKey}}
	for _, f := range change {
		f(&cfg)
	}
	b, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(b.Close)
	return b
}

// noise is n bytes that compress badly.
func noise(n int, seed uint64) []byte {
	raw := make([]byte, n)
	_, _ = rand.NewChaCha8([32]byte{byte(seed)}).Read(raw)
	return raw
}

func readBlob(ctx context.Context, b *Bucket, dgst digest.Digest, offset int64) ([]byte, error) {
	body, err := b.Blob(ctx, dgst, offset)
	if err != nil {
		return nil, err
	}
	defer body.Close()
	return io.ReadAll(body)
}

func TestConfigIsChecked(t *testing.T) {
	_, err := New(Config{Bucket: "No", Prefix: "/x", Endpoint: "ftp://a", Encryption: "rot13", KMSKey: "k", Keys: [][]byte{[]byte("short")}})
	for _, want := range []string{"bucket", "prefix", "endpoint", "encryption", "KMS", "key 1"} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%v does not name %s", err, want)
		}
	}
	if _, err := New(Config{Bucket: "builds"}); err == nil || !strings.Contains(err.Error(), "region") || !strings.Contains(err.Error(), "key is missing") {
		t.Error(err)
	}
	b, err := New(Config{Bucket: "builds", Region: "eu-central-1", Keys: [][]byte{fleetKey}})
	if err != nil {
		t.Fatal(err)
	}
	b.Close()
	if _, err := b.Tag(t.Context(), latest); !errors.Is(err, errClosed) {
		t.Errorf("after Close: %v", err)
	}
}

func TestBlobs(t *testing.T) {
	server := buckettest.Start(t)
	b := open(t, server)
	for _, size := range []int{0, 1, 100_000, firstRange, firstRange + 1, 3*rangeSize + firstRange + 5} {
		t.Run(fmt.Sprint(size), func(t *testing.T) {
			raw := noise(size, uint64(size))
			dgst := digest.FromBytes(raw)
			if _, err := b.Blob(t.Context(), dgst, 0); !errors.Is(err, fs.ErrNotExist) {
				t.Fatal(err)
			}
			if err := b.PutBlob(t.Context(), dgst, int64(size), bytes.NewReader(raw)); err != nil {
				t.Fatal(err)
			}
			server.Forget()
			got, err := readBlob(t.Context(), b, dgst, 0)
			if err != nil || !bytes.Equal(got, raw) {
				t.Fatalf("%d bytes, %v", len(got), err)
			}
			want := 1
			if size > firstRange {
				want += (size - firstRange + rangeSize - 1) / rangeSize
			}
			if n := server.Count(registrytest.Match{Method: http.MethodGet}); n != want {
				t.Errorf("%d requests, want %d", n, want)
			}
			if size > 10 {
				if got, err := readBlob(t.Context(), b, dgst, int64(size)-7); err != nil || !bytes.Equal(got, raw[size-7:]) {
					t.Errorf("%d bytes, %v", len(got), err)
				}
			}
			server.Forget()
			if err := b.PutBlob(t.Context(), dgst, int64(size), bytes.NewReader(raw)); err != nil {
				t.Fatal(err)
			}
			if n := server.Count(buckettest.Writes); n != 0 {
				t.Errorf("%d writes of what is there", n)
			}
		})
	}
	if n := b.Health().Failures; n != 0 {
		t.Errorf("%d failures", n)
	}
}

// Stores that only speak S3's language of before 2025 take what is sent.
func TestNothingNewIsAskedOfTheStore(t *testing.T) {
	server := buckettest.Start(t)
	b := open(t, server)
	raw := noise(maxSingle+5, 1)
	for _, raw := range [][]byte{raw, raw[:1000]} {
		source := &counting{Reader: bytes.NewReader(raw)}
		if err := b.PutBlob(t.Context(), digest.FromBytes(raw), int64(len(raw)), source); err != nil || source.n != len(raw) {
			t.Fatalf("%v, %d bytes were read", err, source.n)
		}
	}
	if _, err := b.PutTag(t.Context(), latest, Tag{Digest: someDigest, ValidatedAt: time.Now()}); err != nil {
		t.Fatal(err)
	}
	for _, r := range server.Requests(buckettest.All) {
		for name, values := range r.Header {
			lower := strings.ToLower(name + ": " + strings.Join(values, ","))
			if strings.Contains(lower, "checksum") || strings.Contains(lower, "aws-chunked") || strings.Contains(lower, "trailer") {
				t.Errorf("%s %s has %s", r.Method, r.URL, lower)
			}
		}
		if want := digest.FromBytes(raw[:1000]).Encoded(); r.Method == http.MethodPut && strings.HasSuffix(r.URL.Path, want) && r.Header.Get("X-Amz-Content-Sha256") != want {
			t.Errorf("not signed as its digest: %v", r.Header)
		}
	}
}

func TestWrongBytesAreNotStored(t *testing.T) {
	server := buckettest.Start(t)
	b := open(t, server)
	other := digest.FromString("something else")
	errBroken := errors.New("broken")
	for _, size := range []int{0, 1000, partSize + 5} {
		raw := noise(size, 1)
		whole := digest.FromBytes(append(slices.Clone(raw), 'x'))
		for name, put := range map[string]func() error{
			"wrong":         func() error { return b.PutBlob(t.Context(), other, int64(size), bytes.NewReader(raw)) },
			"short":         func() error { return b.PutBlob(t.Context(), whole, int64(size)+1, bytes.NewReader(raw)) },
			"upload wrong":  func() error { return b.Upload(t.Context(), other, -1, bytes.NewReader(raw)) },
			"upload short":  func() error { return b.Upload(t.Context(), whole, int64(size)+1, bytes.NewReader(raw)) },
			"upload longer": func() error { return b.Upload(t.Context(), other, int64(size)-1, bytes.NewReader(raw)) },
		} {
			if err := put(); err == nil {
				t.Errorf("%s: %d bytes were stored", name, size)
			}
		}
		broken := io.MultiReader(bytes.NewReader(raw), failing{errBroken})
		if err := b.Upload(t.Context(), digest.FromBytes(raw), -1, broken); !errors.Is(err, errBroken) {
			t.Errorf("%d: %v", size, err)
		}
	}
	raw := noise(maxSingle+5, 1)
	if err := b.PutBlob(t.Context(), other, int64(len(raw)), bytes.NewReader(raw)); err == nil {
		t.Error("a big one was stored")
	}
	// The caller leaves in the middle.
	ctx, cancel := context.WithCancel(t.Context())
	left := io.MultiReader(bytes.NewReader(raw[:2*partSize+5]), reading(func([]byte) (int, error) {
		cancel()
		return 0, ctx.Err()
	}))
	if err := b.Upload(ctx, digest.FromBytes(raw), int64(len(raw)), left); !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
	if names := server.Names(""); len(names) != 0 {
		t.Errorf("stored: %v", names)
	}
	if n := server.Uploads(); n != 0 {
		t.Errorf("%d uploads are left", n)
	}
	if h := b.Health(); h.Writes.Open || h.Failures != 0 {
		t.Errorf("the bucket is blamed: %+v", h)
	}
}

// counting counts what is read.
type counting struct {
	*bytes.Reader
	n int
}

func (c *counting) Read(p []byte) (int, error) {
	n, err := c.Reader.Read(p)
	c.n += n
	return n, err
}

type reading func([]byte) (int, error)

func (f reading) Read(p []byte) (int, error) { return f(p) }

type failing struct{ error }

func (e failing) Read([]byte) (int, error) { return 0, e.error }

func TestUploadFollowsWhatArrives(t *testing.T) {
	server := buckettest.Start(t)
	b := open(t, server)
	raw := noise(5*partSize+17, 3)
	r, w := io.Pipe()
	done := make(chan error, 1)
	go func() { done <- b.Upload(context.Background(), digest.FromBytes(raw), int64(len(raw)), r) }()
	parts := func() int {
		return server.Count(registrytest.Match{Method: http.MethodPut, Func: func(r *http.Request) bool { return r.URL.Query().Has("partNumber") }})
	}
	_, _ = w.Write(raw[:3*partSize])
	within(t, func() bool { return parts() == 3 }) // though the rest has not come
	if names := server.Names(""); len(names) != 0 {
		t.Errorf("visible before it is whole: %v", names)
	}
	_, _ = w.Write(raw[3*partSize:])
	_ = w.Close()
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	if got, err := readBlob(t.Context(), b, digest.FromBytes(raw), 0); err != nil || !bytes.Equal(got, raw) {
		t.Errorf("%d bytes, %v", len(got), err)
	}
	if err := b.Upload(t.Context(), digest.FromBytes(raw), -1, failing{errors.New("must not be read")}); err != nil {
		t.Error(err)
	}
}

// within waits for what other goroutines and the server do.
func within(t *testing.T, check func() bool) {
	t.Helper()
	for end := time.Now().Add(30 * time.Second); !check(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("it does not come about")
		}
	}
}
