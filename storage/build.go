package storage

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"path"
	"runtime"
	"runtime/debug"
	"strings"
	"sync"
	"time"

	"breakwater/pkg/oci"

	"github.com/opencontainers/go-digest"
	"golang.org/x/sync/errgroup"
)

// progressEvery is how often a long look through the store says how far it is.
const progressEvery = 10 * time.Second

// buildPause is how long nothing is tried after the store could not be looked through.
const buildPause = time.Minute

// foldersAtOnce is how many folders of records are read at the same time.
const foldersAtOnce = 4

// build fills the index from the disk, and tries again if that fails: nothing is evicted before.
func (d *Disk) build(ctx context.Context) {
	for !d.lookThrough(ctx) {
		select {
		case <-ctx.Done():
			return
		case <-time.After(buildPause):
		}
	}
}

// lookThrough notes content first, then what records say of it. What is stored meanwhile notes itself. Names
// that this package does not give are counted, told of, and left alone.
func (d *Disk) lookThrough(ctx context.Context) bool {
	b := &builder{Disk: d, begun: time.Now(), said: time.Now()}
	err := b.contents(ctx)
	if err == nil {
		err = b.note(ctx)
	}
	if ctx.Err() != nil {
		return false
	}
	if err != nil {
		d.log.Error("the store could not be looked through: nothing is evicted before it is", "err", err)
		return false
	}
	d.index.Finish()
	b.dropDangling()
	u := d.index.Usage()
	level := d.log.Debug
	if b.files > 0 {
		level = d.log.Info
	}
	level("store looked through", "images", u.Images, "complete", u.Complete, "contents", u.Contents, "size", u.Bytes,
		"unknown", b.unknown, "duration", time.Since(b.begun).Seconds())
	return true
}

type builder struct {
	*Disk
	begun   time.Time
	unknown int

	mu       sync.Mutex // guards what follows
	said     time.Time
	files    int
	dangling []tagKey // tags of what is not stored
}

// step is called for each file: it ends the walk with the process, says how far it is, and lets those go first
// who are served meanwhile.
func (b *builder) step(ctx context.Context) error {
	runtime.Gosched()
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.files++; b.files%256 == 0 && time.Since(b.said) > progressEvery {
		b.said = time.Now()
		b.log.Info("looking through the store", "files", b.files)
	}
	return ctx.Err()
}

func (b *builder) contents(ctx context.Context) error {
	for algorithm, in := range b.blobs {
		err := in.each(".", func(e fs.DirEntry) error {
			dgst, err := oci.ParseDigest(algorithm.String() + ":" + e.Name())
			if err != nil || !e.Type().IsRegular() {
				b.unknownFile(path.Join(in.path, e.Name()))
				return nil
			}
			info, err := e.Info()
			if err != nil {
				return ignoreAbsent(err)
			}
			b.index.Stored(dgst, allocated(info))
			return b.step(ctx)
		})
		if err != nil {
			return err
		}
	}
	return nil
}

func (b *builder) unknownFile(name string) {
	if b.unknown++; b.unknown <= 10 {
		b.log.Warn("the store holds a file that it has not written, and leaves it alone", "file", name)
	}
}

// note reads the records, of several folders at the same time: a cold disk answers four as fast as one.
func (b *builder) note(ctx context.Context) error {
	work, ctx := errgroup.WithContext(ctx)
	work.SetLimit(foldersAtOnce)
	err := b.eachRepository(func(repo oci.Repository, kind string) error {
		work.Go(func() (err error) {
			defer func() {
				if recovered := recover(); recovered != nil {
					err = fmt.Errorf("panic: %v\n%s", recovered, debug.Stack())
				}
			}()
			return b.noteFolder(ctx, repo, kind)
		})
		return ctx.Err()
	})
	return cmp.Or(work.Wait(), err)
}

// noteFolder reads records of one kind. The way to each is short: from its folder, which is opened once.
func (b *builder) noteFolder(ctx context.Context, repo oci.Repository, kind string) error {
	in, err := b.records.sub(path.Join(repo.Registry, repo.Name, kind))
	if err != nil {
		return err
	}
	defer in.root.Close()
	return in.eachName(".", func(name string) error {
		if err := b.step(ctx); err != nil {
			return err
		}
		dgst := digestOf(name)
		switch {
		case kind == "_tags" && oci.ValidTag(name):
			return b.tagged(in, tagKey{repo, name})
		case kind == "_manifests" && dgst != "":
			return b.stored(in, repo, dgst)
		case kind == "_blobs" && dgst != "" && b.index.Is(dgst):
			b.index.Private(repo, dgst)
		}
		return nil
	})
}

// digestOf is the digest that a record is named after: the two algorithms' hex differ in length.
func digestOf(name string) digest.Digest {
	algorithm := digest.SHA256
	if len(name) == 2*64 {
		algorithm = digest.SHA512
	}
	dgst, err := oci.ParseDigest(algorithm.String() + ":" + name)
	if err != nil {
		return ""
	}
	return dgst
}

// stored notes a manifest that a repository has a record of. Its bytes are hashed, since they decide what
// is evicted with it.
func (b *builder) stored(in folder, repo oci.Repository, dgst digest.Digest) error {
	if !b.index.Is(dgst) {
		return nil
	}
	var r record
	if err := b.readRecordIn(in, dgst.Encoded(), &r); err != nil {
		return ignoreAbsent(err)
	}
	file, info, err := b.openFile(b.blobs[dgst.Algorithm()], dgst.Encoded())
	if err != nil {
		return ignoreAbsent(err)
	}
	defer file.Close()
	raw := make([]byte, min(info.Size(), oci.MaxManifest))
	if err := b.readFull(file, raw); err != nil && !errors.Is(err, io.ErrUnexpectedEOF) {
		return err
	}
	m, err := oci.ParseManifest("", raw, dgst.Algorithm())
	if err != nil || m.Digest != dgst {
		return nil // whoever asks for it finds out
	}
	pulled := r.PulledAt
	if pulled.IsZero() {
		pulled = r.ConfirmedAt
	}
	b.index.Manifest(repo, m, pulled)
	return nil
}

func (b *builder) tagged(in folder, key tagKey) error {
	mu := b.writers.of(key.record())
	mu.Lock()
	defer mu.Unlock()
	t, ok := b.tags.newest(key)
	if !ok {
		if err := b.readRecordIn(in, key.tag, &t); err != nil {
			return ignoreAbsent(err)
		}
	}
	b.index.Tagged(key, t)
	if !b.index.Is(t.Current.Digest) {
		b.mu.Lock()
		b.dangling = append(b.dangling, key)
		b.mu.Unlock()
	}
	return nil
}

// dropDangling removes the records of tags whose manifest is gone: an eviction was cut in the middle, or
// somebody has removed files.
func (b *builder) dropDangling() {
	for _, key := range b.dangling {
		if err := b.dropFromTag(key); err != nil {
			b.log.Warn("cannot remove the record of a tag that names nothing", "repository", key.repo.String(), "reference", key.tag, "err", err)
		}
	}
}

func ignoreAbsent(err error) error {
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return err
}

// eachRepository calls do for each folder of records of each repository: _tags, _manifests …
func (d *Disk) eachRepository(do func(repo oci.Repository, kind string) error) error {
	return d.records.each(".", func(registry fs.DirEntry) error {
		if !registry.IsDir() || strings.HasPrefix(registry.Name(), "_") {
			return nil
		}
		return d.eachBelow(oci.Repository{Registry: registry.Name()}, do)
	})
}

func (d *Disk) eachBelow(repo oci.Repository, do func(repo oci.Repository, kind string) error) error {
	return d.records.each(path.Join(repo.Registry, repo.Name), func(e fs.DirEntry) error {
		switch {
		case !e.IsDir():
			return nil
		case strings.HasPrefix(e.Name(), "_"):
			return do(repo, e.Name())
		}
		return d.eachBelow(oci.Repository{Registry: repo.Registry, Name: path.Join(repo.Name, e.Name())}, do)
	})
}
