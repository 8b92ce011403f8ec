package main

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"breakwater/pkg/buckettest"
	"breakwater/pkg/oci"
	store "breakwater/storage/s3"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/credentials"
	"github.com/aws/aws-sdk-go-v2/service/s3"
	"github.com/opencontainers/go-digest"
	"golang.org/x/sync/errgroup"
)

// fleetKey is what the mirrors that share the bucket sign with.
const fleetKey = "5555555555555555555555555555555555555555555555555555555555555555"

// publishTime is how long a mirror may take to publish what it has pulled.
const publishTime = 2 * time.Minute

// sharedPull measures what a host gets that has nothing from the bucket of its fleet while the upstream is
// dead, beside a plain download of the same objects.
func (b *bench) sharedPull(ctx context.Context, s *samples) (rows []row, err error) {
	folder := filepath.Join(b.dir, "gateway")
	if err := os.Mkdir(folder, 0o700); err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(folder)) }()
	gateway, err := buckettest.StartGateway(folder)
	if err != nil {
		s.notes = append(s.notes, err.Error())
		return nil, nil
	}
	defer gateway.Close()
	for name, value := range buckettest.Environment() { // breakwater's too
		if err := os.Setenv(name, value); err != nil {
			return nil, err
		}
	}
	at := place{Bucket: gateway.URL, KeyFile: filepath.Join(b.dir, "fleet.key")}
	if err := os.WriteFile(at.KeyFile, []byte(fleetKey+"\n"), 0o600); err != nil {
		return nil, err
	}
	for _, of := range []struct {
		measure string
		layers  []int64
	}{{"image", layers()}, {"blob", []int64{256 << 20}}} {
		if err := b.fromBucket(ctx, s, of.measure, at, of.layers); err != nil {
			return nil, err
		}
	}
	return []row{
		s.row("image", "new host, upstream dead: 117 MiB from the shared store", "s").goalOf(atMost, 1.15, direct),
		s.row("blob", "  one blob of 256 MiB", "s").goalOf(atMost, 1.15, direct),
		s.row("image held", "  117 MiB, shared store at 100 MiB/s a connection", "s").goalOf(atMost, 1.15, direct),
		s.row("blob held", "  one blob of 256 MiB at that rate", "s").goalOf(atMost, 1.15, direct),
	}, nil
}

// fromBucket has one mirror publish an image, and others pull it: from a bucket as fast as this machine, and
// from one that is not.
func (b *bench) fromBucket(ctx context.Context, s *samples, measure string, at place, layers []int64) error {
	img, err := b.publish(layers...)
	if err != nil {
		return err
	}
	first, err := b.installSharing(ctx, at)
	if err != nil || first == nil {
		return err
	}
	if _, err := first.pull(ctx, img); err != nil {
		return err
	}
	if err := published(ctx, at, img); err != nil {
		return err
	}
	proxy, err := startHolding(at.Bucket, 100<<20)
	if err != nil {
		return err
	}
	defer proxy.Close()
	held := at
	held.Bucket = proxy.URL
	for round := range b.n {
		if err := b.newHost(ctx, s, measure, at, img, round); err != nil {
			return err
		}
		if err := b.newHost(ctx, s, measure+" held", held, img, round); err != nil {
			return err
		}
	}
	return nil
}

// newHost measures a pull by a mirror that has nothing while the upstream is dead, and a plain download.
func (b *bench) newHost(ctx context.Context, s *samples, measure string, at place, img Image, round int) error {
	m, err := b.installSharing(ctx, at)
	if err != nil {
		return err
	}
	if err := b.upstream.behave(Behaviour{Fault: Refuses}); err != nil {
		return err
	}
	pair := []*mirror{m, b.direct()}
	if round%2 == 1 {
		slices.Reverse(pair) // so that none always follows the other
	}
	s.rounds(1, pair, func(_ int, m *mirror) error {
		syscall.Sync() // nobody pays for what the one before has left to write
		var p pulled
		var err error
		if m.name == direct {
			p.wall, err = b.download(ctx, at.Bucket, img)
		} else {
			p, err = m.pull(ctx, img)
		}
		if err == nil {
			s.add(measure, m, p.wall.Seconds())
		}
		return err
	})
	return nil
}

// startHolding starts a proxy that passes on answers of an S3 server at a rate, in bytes a second of each.
func startHolding(endpoint string, rate int64) (*httptest.Server, error) {
	target, err := url.Parse(endpoint)
	if err != nil {
		return nil, err
	}
	proxy := &httputil.ReverseProxy{
		Rewrite: func(r *httputil.ProxyRequest) {
			r.SetURL(target)
			r.Out.Host = r.In.Host // their signatures cover it
		},
		Transport: &http.Transport{DisableCompression: true},
	}
	return httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		proxy.ServeHTTP(&holder{ResponseWriter: w, r: r, rate: rate, start: time.Now()}, r)
	})), nil
}

// holder holds the bytes of one body to a rate.
type holder struct {
	http.ResponseWriter
	r     *http.Request
	rate  int64
	start time.Time
	n     int64
}

func (h *holder) Write(p []byte) (int, error) {
	n, err := h.ResponseWriter.Write(p)
	h.n += int64(n)
	wait(h.r.Context(), time.Until(h.start.Add(time.Duration(h.n*int64(time.Second)/h.rate))))
	return n, err
}

// Unwrap is for http.ResponseController.
func (h *holder) Unwrap() http.ResponseWriter { return h.ResponseWriter }

// installSharing installs breakwater, which alone can share a bucket; nil if it is not to be run.
func (b *bench) installSharing(ctx context.Context, at place) (*mirror, error) {
	mirrors, err := b.install(ctx, at)
	if err != nil {
		return nil, err
	}
	i := slices.IndexFunc(mirrors, func(m *mirror) bool { return m.name == breakwater })
	if i < 0 {
		return nil, nil
	}
	return mirrors[i], nil
}

// published waits until the image's tag is.
func published(ctx context.Context, at place, img Image) error {
	key, err := hex.DecodeString(fleetKey)
	if err != nil {
		return err
	}
	bucket, err := store.New(store.Config{Bucket: buckettest.Name, Region: "us-east-1", Endpoint: at.Bucket, PathStyle: true, Keys: [][]byte{key}})
	if err != nil {
		return err
	}
	defer bucket.Close()
	ref := oci.Reference{Repository: oci.Repository{Registry: registryName, Name: repository}, Tag: img.Tag}
	for deadline := time.Now().Add(publishTime); ; {
		bucket.Forget(ref)
		if _, err = bucket.Tag(ctx, ref); err == nil {
			return nil
		}
		if time.Now().After(deadline) || !wait(ctx, 100*time.Millisecond) {
			return fmt.Errorf("tag %s is not published after %s: %w", img.Tag, publishTime, err)
		}
	}
}

// download gets the objects of an image's blobs as the mirror does, three at a time, each by one GET: written
// to a file that nobody waits to be on the disk, and hashed.
func (b *bench) download(ctx context.Context, endpoint string, img Image) (time.Duration, error) {
	dir, err := os.MkdirTemp(b.dir, "download-")
	if err != nil {
		return 0, err
	}
	defer os.RemoveAll(dir)
	start := time.Now()
	client := s3.New(s3.Options{
		BaseEndpoint:               &endpoint,
		Region:                     "us-east-1",
		UsePathStyle:               true,
		Credentials:                credentials.NewStaticCredentialsProvider(buckettest.AccessKey, buckettest.SecretKey, ""),
		ResponseChecksumValidation: aws.ResponseChecksumValidationWhenRequired,
	})
	group, ctx := errgroup.WithContext(ctx)
	group.SetLimit(3)
	for _, blob := range img.Blobs {
		group.Go(func() error {
			object, err := client.GetObject(ctx, &s3.GetObjectInput{Bucket: aws.String(buckettest.Name),
				Key: aws.String("blobs/" + strings.ReplaceAll(blob.Digest.String(), ":", "/"))})
			if err != nil {
				return err
			}
			defer object.Body.Close()
			f, err := os.Create(filepath.Join(dir, blob.Digest.Encoded()))
			if err != nil {
				return err
			}
			defer f.Close()
			h := sha256.New()
			if _, err := io.CopyBuffer(struct{ io.Writer }{io.MultiWriter(f, h)}, struct{ io.Reader }{object.Body}, make([]byte, 256<<10)); err != nil {
				return err
			}
			if got := digest.NewDigest(digest.SHA256, h); got != blob.Digest {
				return fmt.Errorf("blob %s has digest %s", blob.Digest, got)
			}
			return f.Close()
		})
	}
	err = group.Wait()
	return time.Since(start), err
}
