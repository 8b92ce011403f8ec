package main

import (
	"context"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"time"

	"golang.org/x/sync/errgroup"
)

// window is how long one program is under load in one round.
const window = 1500 * time.Millisecond

// load is what a program has done under load.
type load struct {
	bytes     int64
	wall      time.Duration
	latencies []time.Duration // one an answer
}

func (l load) rate() float64  { return float64(len(l.latencies)) / l.wall.Seconds() }
func (l load) speed() float64 { return float64(l.bytes) / (1 << 20) / l.wall.Seconds() }

// p99 is in milliseconds.
func (l load) p99() float64 {
	slices.Sort(l.latencies)
	return milliseconds(l.latencies[len(l.latencies)*99/100])
}

func milliseconds(d time.Duration) float64 { return float64(d.Microseconds()) / 1000 }

// question is what a load asks for, and how large the answer is.
type question struct {
	request []byte
	size    int64
}

// hammer asks the same question on n connections for the window's time.
func (m *mirror) hammer(ctx context.Context, q question, n int) (load, error) {
	null, err := sink()
	if err != nil {
		return load{}, err
	}
	defer null.Close()
	loads := make([]load, n)
	group, ctx := errgroup.WithContext(ctx)
	start := time.Now()
	for i := range loads {
		group.Go(func() error {
			c, err := dial(ctx, m.Listen)
			if err != nil {
				return err
			}
			defer c.Close()
			l := &loads[i]
			for before := time.Now(); before.Sub(start) < window && ctx.Err() == nil; {
				if err := c.get(q.request, q.size, null); err != nil {
					return err
				}
				after := time.Now()
				l.latencies = append(l.latencies, after.Sub(before))
				l.bytes += q.size
				before = after
			}
			return nil
		})
	}
	if err := group.Wait(); err != nil {
		return load{}, err
	}
	all := load{wall: time.Since(start)}
	for _, l := range loads {
		all.bytes += l.bytes
		all.latencies = append(all.latencies, l.latencies...)
	}
	return all, nil
}

// storedBlob measures how fast a blob leaves the disk's cache. nginx sends a plain file.
func (b *bench) storedBlob(ctx context.Context, s *samples) ([]row, error) {
	const size = 64 << 20
	img, mirrors, err := b.stored(ctx, s, size)
	if err != nil {
		return nil, err
	}
	blob := img.Blobs[1]
	s.rounds(b.n, mirrors, func(_ int, m *mirror) error {
		q := question{request(http.MethodGet, "blobs/"+blob.Digest.String()), size}
		if m.name == nginx {
			q.request = []byte("GET /files/blob HTTP/1.1\r\nHost: localhost\r\n\r\n")
			if err := b.plainFile(filepath.Join(m.Dir, "files"), blob); err != nil {
				return err
			}
		}
		l, err := m.hammer(ctx, q, 8)
		if err == nil {
			s.add("speed", m, l.speed())
		}
		return err
	})
	return []row{s.row("speed", "stored blob, 8 connections, 64 MiB", "MiB/s").goalOf(atLeast, 0.95, nginx)}, nil
}

// plainFile writes the blob to dir for nginx, once.
func (b *bench) plainFile(dir string, blob Blob) error {
	name := filepath.Join(dir, "blob")
	if _, err := os.Stat(name); err == nil {
		return nil
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	f, err := os.Create(name)
	if err != nil {
		return err
	}
	defer f.Close()
	if _, err := io.Copy(f, b.maker.open(blob)); err != nil {
		return err
	}
	return f.Close()
}

func (b *bench) storedByTag(ctx context.Context, s *samples) ([]row, error) {
	return b.storedManifest(ctx, s, func(img Image) string { return img.Tag }, "stored manifest by tag, 32 connections")
}

func (b *bench) storedByDigest(ctx context.Context, s *samples) ([]row, error) {
	return b.storedManifest(ctx, s, func(img Image) string { return img.Digest.String() }, "stored manifest by digest, 32 connections")
}

func (b *bench) storedManifest(ctx context.Context, s *samples, name func(Image) string, figure string) ([]row, error) {
	img, mirrors, err := b.stored(ctx, s, 1<<20, 1<<20, 1<<20)
	if err != nil {
		return nil, err
	}
	q := question{request(http.MethodGet, "manifests/"+name(img)), int64(len(img.Manifest))}
	s.rounds(b.n, mirrors, func(_ int, m *mirror) error {
		l, err := m.hammer(ctx, q, 32)
		if err == nil {
			s.add("rate", m, l.rate())
			s.add("p99", m, l.p99())
		}
		return err
	})
	return []row{
		s.row("rate", figure, "/s").goalOf(atLeast, 1, nginx),
		s.row("p99", "  p99", "ms"),
	}, nil
}

// stored starts the programs, with tags fresh for an hour, and pulls a new image through each.
func (b *bench) stored(ctx context.Context, s *samples, layers ...int64) (Image, []*mirror, error) {
	img, err := b.publish(layers...)
	if err != nil {
		return Image{}, nil, err
	}
	mirrors, err := b.install(ctx, place{FreshFor: time.Hour})
	if err != nil {
		return Image{}, nil, err
	}
	return img, s.warm(ctx, mirrors, img), nil
}

// warm pulls the image through each program and returns those that could.
func (s *samples) warm(ctx context.Context, mirrors []*mirror, img Image) []*mirror {
	return slices.DeleteFunc(mirrors, func(m *mirror) bool {
		_, err := m.pull(ctx, img)
		if err != nil {
			s.fail(m, err)
		}
		return err != nil
	})
}
