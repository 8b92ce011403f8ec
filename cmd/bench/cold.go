package main

import (
	"bytes"
	"context"
	"crypto/sha256"
	"fmt"
	"hash"
	"io"
	"net/http"
	"syscall"
	"time"

	"github.com/opencontainers/go-digest"
	"golang.org/x/sync/errgroup"
)

// pulled is how long a pull took.
type pulled struct {
	wall      time.Duration
	firstByte time.Duration // until the first byte of a layer
}

// pull does what containerd does with an empty store: HEAD of the tag, GET of the manifest by digest,
// then the blobs, three at a time. It checks every digest. The connections are new.
func (m *mirror) pull(ctx context.Context, img Image) (pulled, error) {
	start := time.Now()
	c, err := dial(ctx, m.Listen)
	if err != nil {
		return pulled{}, err
	}
	defer c.Close()
	head, err := c.ask(request(http.MethodHead, "manifests/"+img.Tag))
	if err != nil {
		return pulled{}, fmt.Errorf("HEAD of tag %s: %w", img.Tag, err)
	}
	if head.status != http.StatusOK {
		return pulled{}, fmt.Errorf("HEAD of tag %s: status %d", img.Tag, head.status)
	}
	var manifest bytes.Buffer
	if err := c.get(request(http.MethodGet, "manifests/"+img.Digest.String()), int64(len(img.Manifest)), &manifest); err != nil {
		return pulled{}, fmt.Errorf("GET of manifest %s: %w", img.Digest, err)
	}
	if !bytes.Equal(manifest.Bytes(), img.Manifest) {
		return pulled{}, fmt.Errorf("manifest %s is not what was published", img.Digest)
	}
	var first time.Time // written by the one goroutine that has the first layer
	queue := make(chan Blob, len(img.Blobs))
	for _, blob := range img.Blobs {
		queue <- blob
	}
	close(queue)
	group, ctx := errgroup.WithContext(ctx)
	for range 3 {
		group.Go(func() error {
			c, err := dial(ctx, m.Listen)
			if err != nil {
				return err
			}
			defer c.Close()
			for blob := range queue {
				arrived, err := c.getBlob(blob)
				if err != nil {
					return err
				}
				if blob == img.Blobs[1] {
					first = arrived
				}
			}
			return nil
		})
	}
	if err := group.Wait(); err != nil {
		return pulled{}, err
	}
	return pulled{wall: time.Since(start), firstByte: first.Sub(start)}, nil
}

// getBlob checks the blob's digest, and tells when its first byte was there.
func (c *conn) getBlob(blob Blob) (time.Time, error) {
	h := &arrival{Hash: sha256.New()}
	if err := c.get(request(http.MethodGet, "blobs/"+blob.Digest.String()), blob.Size, h); err != nil {
		return time.Time{}, fmt.Errorf("GET of blob %s: %w", blob.Digest, err)
	}
	if got := digest.NewDigest(digest.SHA256, h); got != blob.Digest {
		return time.Time{}, fmt.Errorf("blob %s has digest %s", blob.Digest, got)
	}
	return h.first, nil
}

// arrival hashes a body and notes when it began to arrive.
type arrival struct {
	hash.Hash
	first time.Time
}

func (a *arrival) Write(p []byte) (int, error) {
	if a.first.IsZero() {
		a.first = time.Now()
	}
	return a.Hash.Write(p)
}

// ReadFrom is there for its buffer: io.Copy's is smaller, and clients' are not.
func (a *arrival) ReadFrom(r io.Reader) (int64, error) {
	return io.CopyBuffer(struct{ io.Writer }{a}, r, make([]byte, 256<<10))
}

// layers are those of the image of 117 MiB.
func layers() []int64 { return []int64{48 << 20, 32 << 20, 20 << 20, 12 << 20, 4 << 20, 1 << 20} }

// coldPull measures a pull that nobody has done before, from an upstream as fast as this machine.
func (b *bench) coldPull(ctx context.Context, s *samples) ([]row, error) {
	err := b.pulls(ctx, s, Behaviour{})
	return []row{s.row("wall", "cold pull of 117 MiB", "s").goalOf(atMost, 0.9, nginx)}, err
}

// heldPull is as coldPull, from an upstream that is slower than this machine.
func (b *bench) heldPull(ctx context.Context, s *samples) ([]row, error) {
	err := b.pulls(ctx, s, Behaviour{Rate: 100 << 20})
	return []row{s.row("wall", "cold pull, upstream at 100 MiB/s a connection", "s").goalOf(atMost, 1.05, direct)}, err
}

func (b *bench) pulls(ctx context.Context, s *samples, from Behaviour) error {
	mirrors, err := b.install(ctx, place{})
	if err != nil {
		return err
	}
	if err := b.upstream.behave(from); err != nil {
		return err
	}
	images := make([]Image, b.n)
	for i := range images {
		if images[i], err = b.publish(layers()...); err != nil {
			return err
		}
	}
	s.rounds(b.n, append(mirrors, b.direct()), func(round int, m *mirror) error {
		syscall.Sync() // nobody pays for what the one before has left to write
		p, err := m.pull(ctx, images[round])
		if err == nil {
			s.add("wall", m, p.wall.Seconds())
		}
		return err
	})
	return nil
}

// distantPull measures what one gets from an upstream that is 40 ms away, at 16 MiB/s a connection.
func (b *bench) distantPull(ctx context.Context, s *samples) ([]row, error) {
	mirrors, err := b.install(ctx, place{})
	if err != nil {
		return nil, err
	}
	img, err := b.publish(64 << 20)
	if err != nil {
		return nil, err
	}
	if err := b.upstream.behave(Behaviour{Latency: 40 * time.Millisecond, Rate: 16 << 20}); err != nil {
		return nil, err
	}
	s.rounds(1, append(mirrors, b.direct()), func(_ int, m *mirror) error {
		p, err := m.pull(ctx, img)
		if err == nil {
			s.add("first", m, milliseconds(p.firstByte))
			s.add("wall", m, p.wall.Seconds())
		}
		return err
	})
	return []row{
		s.row("first", "upstream 40 ms away, 16 MiB/s: first byte", "ms"),
		s.row("wall", "  cold pull of 64 MiB", "s"),
	}, nil
}

// herd measures 32 clients that want the same cold blob of 256 MiB of a program just started.
func (b *bench) herd(ctx context.Context, s *samples) ([]row, error) {
	const size, clients = 256 << 20, 32
	for range min(b.n, 3) {
		img, err := b.publish(size)
		if err != nil {
			return nil, err
		}
		mirrors, err := b.install(ctx, place{})
		if err != nil {
			return nil, err
		}
		s.rounds(1, mirrors, func(_ int, m *mirror) error {
			syscall.Sync()
			return b.stampede(ctx, s, m, img.Blobs[1], clients)
		})
	}
	return []row{
		s.worst("bytes", "herd of 32, cold 256 MiB: upstream bytes", "x size").goal(exactly, 1),
		s.row("wall", "  wall", "s").goalOf(atMost, 1, nginx),
		s.worst("peak", "  peak memory", "MiB").goal(atMost, 64),
	}, nil
}

func (b *bench) stampede(ctx context.Context, s *samples, m *mirror, blob Blob, clients int) error {
	before, err := b.upstream.sent()
	if err != nil {
		return err
	}
	null, err := sink()
	if err != nil {
		return err
	}
	defer null.Close()
	start := time.Now()
	group, ctx := errgroup.WithContext(ctx)
	for i := range clients {
		group.Go(func() error {
			c, err := dial(ctx, m.Listen)
			if err != nil {
				return err
			}
			defer c.Close()
			if i > 0 {
				return c.get(request(http.MethodGet, "blobs/"+blob.Digest.String()), blob.Size, null)
			}
			_, err = c.getBlob(blob) // one of them checks the digest: 32 would measure their own hashing
			return err
		})
	}
	if err := group.Wait(); err != nil {
		return err
	}
	s.add("wall", m, time.Since(start).Seconds())
	after, err := b.upstream.sent()
	if err != nil {
		return err
	}
	s.add("bytes", m, float64(after-before)/float64(blob.Size))
	peak, err := m.peak()
	if err != nil {
		return err
	}
	s.add("peak", m, peak)
	return nil
}
