package main

import (
	"context"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"runtime"
	"syscall"
	"time"

	"breakwater/storage"

	"breakwater/pkg/oci"

	"github.com/opencontainers/go-digest"
)

// The store that scale makes: a million blobs, sparse, since nothing reads them.
const (
	scaleImages = 100_000
	scaleBlobs  = 9 // of each image's own; its manifest is the tenth file
	scaleRepos  = 100
)

// scale measures what grows with the store: the start with a million files in the folder, the memory of
// the index, what an eviction costs at a hundred thousand images beside a thousand, and index.json.
func (b *bench) scale(ctx context.Context, s *samples) ([]row, error) {
	img, err := b.publish(1 << 20)
	if err != nil {
		return nil, err
	}
	mirrors, err := b.install(ctx, place{})
	if err != nil {
		return nil, err
	}
	for _, m := range s.warm(ctx, mirrors, img) {
		if m.name != breakwater {
			continue
		}
		if err := m.stop(syscall.SIGTERM); err != nil {
			return nil, err
		}
		data := filepath.Join(m.Dir, "data")
		if err := grow(ctx, data, 0, scaleImages); err != nil {
			return nil, err
		}
		start := time.Now()
		if err := m.start(ctx); err != nil {
			return nil, err
		}
		for !m.has(ctx, img) {
			if time.Since(start) > startTime || !wait(ctx, time.Millisecond) {
				return nil, fmt.Errorf("tag not served %s after a start", startTime)
			}
		}
		s.add("start", m, milliseconds(time.Since(start)))
		if err := m.stop(syscall.SIGKILL); err != nil {
			return nil, err
		}
		if err := m.measureStore(ctx, s, data); err != nil {
			return nil, err
		}
		small := filepath.Join(b.dir, "small")
		if err := grow(ctx, small, 0, scaleImages/100); err != nil {
			return nil, err
		}
		if err := m.measureEviction(ctx, s, small, "evict small", 500); err != nil {
			return nil, err
		}
		if err := os.RemoveAll(small); err != nil {
			return nil, err
		}
	}
	return []row{
		s.row("start", "start with 1 000 000 blobs: stored tag", "ms").goal(atMost, 1000),
		s.row("built", "  index built behind it after", "s").goal(atMost, 60),
		s.row("memory", "  memory of the index", "MiB").goal(atMost, 256),
		s.row("evict", "eviction of an image, of 100 000", "ms"),
		s.row("evict small", "  of 1 000", "ms"),
		s.row("export", "index.json of 100 000 images, written in", "s"),
		s.row("share", "  share of the time under steady pulls", "%").goal(atMost, 1),
	}, nil
}

// grow writes images from..to into a data folder as the mirror lays it out, much faster than by pulls. All of
// it is on the disk then, as in a store that was not written just now: what has not got there yet costs less to
// remove.
func grow(ctx context.Context, data string, from, to int) error {
	blobs := filepath.Join(data, "blobs", "sha256")
	if err := os.MkdirAll(blobs, 0o700); err != nil {
		return err
	}
	now := time.Now().UTC().Format(time.RFC3339)
	for n := from; n < to && ctx.Err() == nil; n++ {
		raw := []byte(`{"schemaVersion":2,"mediaType":"application/vnd.oci.image.manifest.v1+json","layers":[`)
		for i := range scaleBlobs {
			var seed [16]byte
			binary.BigEndian.PutUint64(seed[:], uint64(n))
			seed[15] = byte(i)
			sum := sha256.Sum256(seed[:])
			name := hex.EncodeToString(sum[:])
			file, err := os.Create(filepath.Join(blobs, name))
			if err == nil {
				err = errors.Join(file.Truncate(1<<20), file.Close())
			}
			if err != nil {
				return err
			}
			if i > 0 {
				raw = append(raw, ',')
			}
			raw = fmt.Appendf(raw, `{"mediaType":"application/vnd.oci.image.layer.v1.tar+gzip","digest":"sha256:%s","size":1048576}`, name)
		}
		raw = append(raw, "]}"...)
		dgst := digest.FromBytes(raw)
		repo := filepath.Join(data, "records", registryName, fmt.Sprintf("scale%d", n%scaleRepos))
		record := fmt.Appendf(nil, `{"size":%d,"media_type":"application/vnd.oci.image.manifest.v1+json","confirmed_at":%q}`, len(raw), now)
		tag := fmt.Appendf(nil, `{"current":{"digest":%q,"validated_at":%q}}`, dgst, now)
		for _, folder := range []string{"_manifests", "_tags"} {
			if err := os.MkdirAll(filepath.Join(repo, folder), 0o700); err != nil {
				return err
			}
		}
		err := errors.Join(
			os.WriteFile(filepath.Join(blobs, dgst.Encoded()), raw, 0o600),
			os.WriteFile(filepath.Join(repo, "_manifests", dgst.Encoded()), record, 0o600),
			os.WriteFile(filepath.Join(repo, "_tags", fmt.Sprintf("v%d", n)), tag, 0o600))
		if err != nil {
			return err
		}
	}
	syscall.Sync()
	return ctx.Err()
}

// heap is what is live on it.
func heap() float64 {
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return float64(m.HeapAlloc) / (1 << 20)
}

// measureStore opens the store in this process.
func (m *mirror) measureStore(ctx context.Context, s *samples, data string) error {
	before, start := heap(), time.Now()
	d, err := open(ctx, data, 0)
	if err != nil {
		return err
	}
	s.add("built", m, time.Since(start).Seconds())
	s.add("memory", m, heap()-before)
	// Steady pulls of tags that move: each names another image of its repository now and then.
	repo := oci.Repository{Registry: registryName, Name: "scale0"}
	first, err := d.Tag(repo, "v0")
	if err != nil {
		return errors.Join(err, d.Close())
	}
	second, err := d.Tag(repo, fmt.Sprint("v", scaleRepos))
	if err != nil {
		return errors.Join(err, d.Close())
	}
	wrote := d.Usage().Exports
	for begun, n := time.Now(), 0; time.Since(begun) < time.Minute && wait(ctx, 100*time.Millisecond); n++ {
		named := first
		if n%2 == 0 {
			named = second
		}
		if err := d.PutTag(repo, "v0", storage.Tag{Current: named.Current}); err != nil {
			return errors.Join(err, d.Close())
		}
		if u := d.Usage(); u.Exports > wrote { // the next may not begin before a hundred times that long
			took := u.ExportTime.Seconds() / float64(u.Exports)
			s.add("export", m, took)
			s.add("share", m, 100*took/(took+u.ExportPause.Seconds()))
			break
		}
	}
	if err := d.Close(); err != nil {
		return err
	}
	return m.measureEviction(ctx, s, data, "evict", 2000)
}

// measureEviction makes a number of images go, by opening the store with too small a capacity.
func (m *mirror) measureEviction(ctx context.Context, s *samples, data, measure string, images int64) error {
	d, err := open(ctx, data, 0)
	if err != nil {
		return err
	}
	bytes := d.Usage().Bytes
	if err := d.Close(); err != nil {
		return err
	}
	const each = scaleBlobs*4096 + 8192 // a record for each blob, and the manifest
	if d, err = open(ctx, data, bytes-images*each); err != nil {
		return err
	}
	start, gone := time.Now(), d.Usage().Evicted
	for d.Usage().Evicted < images && time.Since(start) < time.Minute {
		if !wait(ctx, 10*time.Millisecond) {
			break
		}
	}
	if left := d.Usage().Evicted - gone; left > 0 {
		s.add(measure, m, milliseconds(time.Since(start))/float64(left))
	}
	return d.Close()
}

// open opens a store and waits until it has been looked through.
func open(ctx context.Context, data string, capacity int64) (*storage.Disk, error) {
	d, err := storage.Open(storage.Config{Dir: data, Capacity: capacity, Logger: slog.New(slog.DiscardHandler)})
	if err != nil {
		return nil, err
	}
	for start := time.Now(); !d.Usage().Built; {
		if time.Since(start) > 5*time.Minute || !wait(ctx, 10*time.Millisecond) {
			return nil, errors.Join(errors.New("the store was not looked through in five minutes"), d.Close())
		}
	}
	return d, nil
}
