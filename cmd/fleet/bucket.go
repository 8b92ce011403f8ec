package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"time"

	"breakwater/pkg/buckettest"
	"breakwater/pkg/config"
	"breakwater/pkg/oci"
	"breakwater/pkg/registrytest"
	"breakwater/storage/s3"
)

// bucket is a real one, behind a proxy that counts.
type bucket struct {
	url      string
	gateway  *buckettest.Gateway
	proxy    http.Handler
	server   *registrytest.Server
	observer *s3.Bucket // reads what is published, past the proxy; nil until there is a configuration
	library  *library
	tally    *tally
}

func newBucket(dir string, l *library, t *tally) (*bucket, error) {
	folder := filepath.Join(dir, "bucket")
	if err := os.Mkdir(folder, 0o700); err != nil {
		return nil, err
	}
	gateway, err := buckettest.StartGateway(folder)
	if err != nil {
		return nil, err
	}
	b := &bucket{gateway: gateway, proxy: gateway.Proxy(), library: l, tally: t}
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		gateway.Close()
		return nil, err
	}
	b.server = registrytest.Serve(listener, b)
	b.url = b.server.URL
	return b, nil
}

func (b *bucket) close() error {
	if b.observer != nil {
		b.observer.Close()
	}
	err := b.server.Close()
	b.gateway.Close()
	return err
}

// open opens the bucket as a host does, at a URL.
func (b *bucket) open(cfg *config.Config, url string) (*s3.Bucket, error) {
	keys, err := cfg.Shared.Keys()
	if err != nil {
		return nil, err
	}
	s := cfg.Shared.S3
	return s3.New(s3.Config{Bucket: s.Bucket, Prefix: s.Prefix, Region: s.Region, Endpoint: url, PathStyle: s.PathStyle, Keys: keys})
}

// ServeHTTP counts requests by what they ask for, and looks at what they have published.
func (b *bucket) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	name := strings.TrimPrefix(r.URL.Path, "/"+buckettest.Name+"/")
	tag := ""
	what := "other"
	switch repo, last, isTag := strings.Cut(name, "/_tags/"); {
	case isTag && strings.HasPrefix(last, "sha256-"):
		what = "a signature's tag"
	case isTag:
		what, tag = "a tag's record", strings.TrimPrefix(repo, "records/")+":"+last
	case strings.HasPrefix(name, "records/"):
		what = "a blob's record"
	case strings.HasPrefix(name, "blobs/"):
		what = "a blob"
	case strings.HasPrefix(name, "leases/"):
		what = "a lease"
	case name == "VERSION":
		what = "a probe"
	}
	kind := r.Method + " of " + what
	b.tally.note(func(n *counts) { n.bucket[kind]++ })
	begun := time.Now()
	answer := &status{ResponseWriter: w}
	b.proxy.ServeHTTP(answer, r)
	b.tally.bucketAnswered(kind, answer.code, time.Since(begun))
	if tag != "" && r.Method == http.MethodPut && answer.code == http.StatusOK {
		b.tally.tagPublished(tag)
		if err := b.observe(tag); err != nil {
			b.tally.violate("what was published of %s cannot be read: %v", tag, err)
		}
	}
}

// observe reads a tag's record as a host would.
func (b *bucket) observe(tag string) error {
	if b.observer == nil {
		return errors.New("nobody observes the bucket")
	}
	repo, name, _ := strings.Cut(strings.TrimPrefix(tag, registryName+"/"), ":")
	ref := oci.Reference{Repository: oci.Repository{Registry: registryName, Name: repo}, Tag: name}
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	b.observer.Forget(ref)
	published, err := b.observer.Tag(ctx, ref)
	if err != nil {
		return fmt.Errorf("tag %s: %w", ref, err)
	}
	b.library.heard(tag, published.Digest)
	return nil
}

// status notes that of an answer.
type status struct {
	http.ResponseWriter
	code int
}

func (s *status) WriteHeader(code int) {
	if s.code == 0 && code >= 200 {
		s.code = code
	}
	s.ResponseWriter.WriteHeader(code)
}

// Unwrap is for http.ResponseController.
func (s *status) Unwrap() http.ResponseWriter { return s.ResponseWriter }
