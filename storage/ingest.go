package storage

import (
	"context"
	"errors"
	"fmt"
	"hash"
	"io"
	"io/fs"
	"os"
	"path"
	"sync"
	"syscall"
	"time"

	"breakwater/pkg/oci"

	"github.com/opencontainers/go-digest"
)

const (
	// Withheld is how much of the end is not readable until the whole is verified, so that no client
	// can take wrong content for complete.
	Withheld = 64 << 10
	// reserveStep is how much space is reserved at a time when the size is not known.
	reserveStep = 64 << 20
)

var (
	// ErrMismatch is the error of content that is not what its digest or its size said: the upstream's
	// fault. All other errors of an ingest except ErrTooLarge are our own disk's.
	ErrMismatch = errors.New("content does not match")
	// ErrTooLarge is the error of content over the capacity or, if its size was not known, over a
	// tenth of it.
	ErrTooLarge = errors.New("content is too large to be stored")
)

// Ingest is content on its way into the store. One goroutine writes it; any number read what is
// released, behind the writer or long after. Nothing of it is stored before Commit has returned nil,
// and the writer ends every Ingest by Verify and Commit, or by Park or Abort.
//
// Where the bytes come from is the writer's business: after a source has broken off, it goes on at
// Written with another one. What can be read is a prefix, which is also all that is hashed. (Later a
// blob is fetched in several ranges at once; they will be written further on in the same file, and
// become part of the prefix when it reaches them.)
type Ingest struct {
	disk *Disk
	repo oci.Repository
	dgst digest.Digest

	file     *os.File
	name     string    // of the file, in tmp/
	hash     hash.Hash // of what is written
	hashed   int64     // bytes; this and the next four only for the writer
	written  int64     // as many as hashed, unless it was parked
	reserved int64     // bytes of disk space
	counted  int64     // bytes of it that the index counts
	broken   bool      // the disk has failed
	ended    bool

	watermark
}

// watermark is how much of a file can be read that is being written, or hashed.
type watermark struct {
	mu       sync.Mutex // guards what follows
	size     int64      // -1 while unknown
	released int64      // readable bytes
	verified bool
	err      error         // why no more will be released, or why it could not be stored
	wake     chan struct{} // closed when any of these changes; nil if nobody waits
}

// Ingest begins to take in content, fetched for this repository, of that size, or of an unknown one
// if size is -1. What this repository has parked of the same digest and size is gone on with by the
// first who comes: Written is more than 0 then, and some of it released, so an upstream must have said
// by now that it may be read. Space is reserved before Ingest returns, and what is parked gives way to
// it: an error that is syscall.ENOSPC says that there is none, ErrTooLarge that it is over what the
// store may hold.
func (d *Disk) Ingest(repo oci.Repository, dgst digest.Digest, size int64) (*Ingest, error) {
	if size > d.capacity {
		return nil, fmt.Errorf("ingest %s: %d bytes, capacity %d: %w", dgst, size, d.capacity, ErrTooLarge)
	}
	i := &Ingest{disk: d, repo: repo, dgst: dgst, hash: dgst.Algorithm().Hash(), watermark: watermark{size: max(size, -1)}}
	if !i.takeUp() {
		var err error
		if i.file, i.name, err = d.create(); err != nil {
			_ = d.wrote("create", 0, err)
			return nil, fmt.Errorf("ingest %s: %w", dgst, err)
		}
	}
	if err := i.reserve(max(size, 0)); err != nil {
		_ = d.wrote("reserve", size, err)
		i.discard()
		return nil, fmt.Errorf("ingest %s: %w", dgst, err)
	}
	return i, nil
}

// reserve makes room for the first n bytes.
func (i *Ingest) reserve(n int64) error {
	if n <= i.reserved {
		return nil
	}
	if i.size < 0 { // only the writer changes it
		limit := i.disk.capacity / 10
		if n > limit {
			return fmt.Errorf("more than %d bytes of unknown size: %w", limit, ErrTooLarge)
		}
		n = min(max(n, i.reserved+reserveStep), limit)
	}
	d := i.disk
	if n > i.counted {
		if err := d.makeRoom(n - i.counted); err != nil {
			return err
		}
		i.counted = n
	}
	allocate := func() error { return d.withRoom(func() error { return d.allocate(i.file, n) }) }
	err := allocate()
	if lacks := d.lacks(n - i.reserved); errors.Is(err, syscall.ENOSPC) && lacks > 0 && d.evict(lacks, "disk is full") > 0 {
		err = allocate()
	}
	if err == nil {
		i.reserved = n
	}
	return err
}

// release counts the ingest's space as nobody's.
func (i *Ingest) release() {
	i.disk.index.Reserve(-i.counted, 0)
	i.counted = 0
}

// Write adds to the end. It returns ErrMismatch for more than was announced, and ErrTooLarge.
func (i *Ingest) Write(p []byte) (int, error) {
	end := i.written + int64(len(p))
	if i.size >= 0 && end > i.size {
		return 0, fmt.Errorf("ingest %s: more than %d bytes: %w", i.dgst, i.size, ErrMismatch)
	}
	if err := i.reserve(end); err != nil {
		_ = i.disk.wrote("reserve", end, err)
		return 0, fmt.Errorf("ingest %s: %w", i.dgst, err)
	}
	n, err := i.disk.write(i.file, p)
	if i.hashed == i.written {
		i.hash.Write(p[:n])
		i.hashed += int64(n)
	}
	i.written += int64(n)
	if err == nil {
		err = i.catchUp(catchUpRate * int64(n))
	}
	if i.broken = err != nil; i.broken {
		_ = i.disk.wrote("write", 0, err)
	}
	if failed := i.raise(i.readable()); failed != nil {
		return n, failed
	}
	if err != nil {
		return n, fmt.Errorf("ingest %s: %w", i.dgst, err)
	}
	return n, nil
}

// readable is how much of what is written may be released before it is verified.
func (i *Ingest) readable() int64 {
	if i.size < 0 {
		return i.written - Withheld
	}
	return min(i.written, i.size-Withheld)
}

// raise lets the first n bytes be read, or returns why no more will be.
func (w *watermark) raise(n int64) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.err == nil && n > w.released {
		w.released = n
		w.wakeLocked()
	}
	return w.err
}

// raiseAll lets all be read, since it is verified, or returns why no more will be.
func (w *watermark) raiseAll(size int64) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.err == nil {
		w.size, w.released, w.verified = size, size, true
		w.wakeLocked()
	}
	return w.err
}

// Released is how many bytes can be read.
func (w *watermark) Released() int64 {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.released
}

// Written is how many bytes there are, those that were parked among them.
func (i *Ingest) Written() int64 { return i.written }

// Verify ends the writing: if all is right, all of it becomes readable, before the disk has it. Its
// error is ErrMismatch, or the disk's if it cannot read back what was parked; then the end is never
// released.
func (i *Ingest) Verify() error {
	err := i.verify()
	if err != nil {
		err = fmt.Errorf("verify %s: %w", i.dgst, err)
		i.Abort(err)
	}
	return err
}

func (i *Ingest) verify() error {
	if i.size >= 0 && i.size != i.written {
		return fmt.Errorf("%d bytes of %d: %w", i.written, i.size, ErrMismatch)
	}
	if err := i.catchUp(i.written); err != nil {
		return err
	}
	if got := digest.NewDigest(i.dgst.Algorithm(), i.hash); got != i.dgst {
		return fmt.Errorf("%d bytes are %s: %w", i.written, got, ErrMismatch)
	}
	return i.raiseAll(i.written)
}

// Commit stores what Verify has found right, as confirmed in the repository that it was fetched for.
// An error says that it could not be stored; those who have it open can read all of it.
func (i *Ingest) Commit(c Confirmation) error {
	if !i.verified || i.ended {
		err := fmt.Errorf("commit %s: is not verified, or has ended", i.dgst)
		i.Abort(err)
		return err
	}
	i.ended = true
	defer i.release()
	err := i.disk.wrote("commit", i.written, i.store(c))
	if err == nil {
		i.disk.lost.Delete(i.dgst)
		return nil
	}
	err = fmt.Errorf("commit %s: %w", i.dgst, err)
	i.mu.Lock()
	defer i.mu.Unlock()
	i.err = err // for those who come too late to open it
	return err
}

// store makes the verified file durable under its name, and then what lets it be read: a record
// never points at what is not stored.
func (i *Ingest) store(c Confirmation) error {
	d := i.disk
	err := d.truncate(i.file, i.written) // gives back what was reserved and not needed
	if err == nil {
		err = d.sync(i.file)
	}
	if err := d.publishBlob(i.dgst, func() error { return d.publish(i.file, i.name, d.blobName(i.dgst), err) }); err != nil {
		return err
	}
	return d.confirm(i.repo, i.dgst, i.written, c)
}

// publishBlob has content given its name by publish, and notes that it is stored. What was evicted under
// the same name is not removed in between.
func (d *Disk) publishBlob(dgst digest.Digest, publish func() error) error {
	name := d.blobName(dgst)
	mu := d.writers.of(name)
	mu.Lock()
	defer mu.Unlock()
	err := publish()
	var info fs.FileInfo
	if err == nil {
		_ = d.root.touch(name, time.Now().Truncate(verifiedUnit)) // what has another date is hashed again
		info, err = d.root.lstat(name)
	}
	if err != nil {
		_ = d.root.remove(name) // its name may be lost; what is not certain is not stored
		d.index.Gone(dgst)
		return err
	}
	d.index.Stored(dgst, allocated(info))
	return nil
}

// Abort ends an ingest without storing it. Readers get err once they have read what was released.
// After Commit, or a first Abort, it does nothing.
func (i *Ingest) Abort(err error) {
	if i.ended {
		return
	}
	i.ended = true
	i.fail(err)
	i.discard()
}

// fail tells the readers why no more comes: before the file's name goes, so that Open can say it too.
func (w *watermark) fail(err error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.err = err
	w.wakeLocked()
}

func (i *Ingest) discard() {
	i.release()
	_ = i.file.Close()
	_ = i.disk.tmp.remove(i.name)
}

func (w *watermark) wakeLocked() {
	if w.wake != nil {
		close(w.wake)
		w.wake = nil
	}
}

// Size is the length in bytes, or -1 while it is not known.
func (w *watermark) Size() int64 {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.size
}

// Open opens what is being written for reading from its start. The Blob has a descriptor and an
// offset of its own, and stays readable after Commit. Its waiting ends with ctx, which concerns
// nobody else.
func (i *Ingest) Open(ctx context.Context) (*Blob, error) {
	file, err := i.disk.tmp.open(i.name)
	if errors.Is(err, fs.ErrNotExist) { // committed since
		file, _, err = i.disk.openFile(i.disk.blobs[i.dgst.Algorithm()], i.dgst.Encoded())
	}
	if err == nil {
		return &Blob{volume: i.disk.volume, file: file, mark: &i.watermark, ctx: ctx}, nil
	}
	i.mu.Lock()
	defer i.mu.Unlock()
	if i.err != nil {
		err = i.err
	}
	return nil, fmt.Errorf("open %s: %w", i.dgst, err)
}

// await waits until a byte at offset is readable, and returns how many are from the start.
func (w *watermark) await(ctx context.Context, offset int64) (int64, error) {
	for {
		w.mu.Lock()
		released, verified, err := w.released, w.verified, w.err
		if w.wake == nil && offset >= released && !verified && err == nil {
			w.wake = make(chan struct{})
		}
		wake := w.wake
		w.mu.Unlock()
		switch {
		case offset < released:
			return released, nil
		case verified:
			return 0, io.EOF
		case err != nil:
			return 0, err
		}
		select {
		case <-wake:
		case <-ctx.Done():
			return 0, context.Cause(ctx)
		}
	}
}

func (d *Disk) blobName(dgst digest.Digest) string {
	return path.Join(d.blobs[dgst.Algorithm()].path, dgst.Encoded())
}
