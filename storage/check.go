package storage

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/opencontainers/go-digest"
	"golang.org/x/time/rate"
)

const (
	// checkBuffer is how much is hashed at a time.
	checkBuffer = 256 << 10
	// recheckAge is how long ago a blob was verified that is hashed again once it has been read whole.
	recheckAge = 24 * time.Hour
	// recheckRate is how many bytes a second are: a small part of what disks give.
	recheckRate = 32 << 20
	// maxDue bounds the blobs that wait for it. One that finds no place has it with its next read.
	maxDue = 1024
	// verifiedUnit is what the time of a verification is rounded to, see verifiedAt.
	verifiedUnit = time.Millisecond
	// uncleanFile holds when the data folder was last found in use by a process that had not closed it.
	uncleanFile = "UNCLEAN"
)

var (
	// errClosing ends what hashes when the Disk closes.
	errClosing    = errors.New("the store is being closed")
	errUnreadable = errors.New("cannot be read")
)

// checks is what is known to be right of what is stored, and who finds it out.
type checks struct {
	unclean  time.Time    // what was verified before is not trusted; zero if no process has ended uncleanly
	noted    bool         // the disk knows
	verified atomic.Int64 // bytes
	wrong    atomic.Int64 // files that were quarantined
	buffers  sync.Pool

	mu      sync.Mutex // guards what follows
	closed  bool
	first   map[digest.Digest]*check      // running
	right   map[digest.Digest]fs.FileInfo // files that are right, though their dates do not say so
	due     map[digest.Digest]bool        // read, and verified long ago
	wake    chan struct{}                 // tells of due
	damaged map[digest.Digest]bool        // until TakeDamaged
}

// check is the hashing of a stored file ahead of its first readers, who see what a download shows to its
// own: the end only once all is right.
type check struct {
	*Disk
	dgst digest.Digest
	file *os.File
	info fs.FileInfo
	watermark
}

// verifiedAt is when a stored file was last found right: its time of modification, which verification
// sets to a whole millisecond. Whoever writes to the file leaves a finer one. Zero if nobody knows, or if
// that time is still to come.
func verifiedAt(info fs.FileInfo) time.Time {
	at := info.ModTime()
	if at.Nanosecond()%int(verifiedUnit) != 0 || at.After(time.Now()) {
		return time.Time{}
	}
	return at
}

// trusts reports whether a file is served without being hashed first.
func (d *Disk) trusts(info fs.FileInfo) bool {
	at := verifiedAt(info)
	return !at.IsZero() && !at.Before(d.checks.unclean)
}

// vet has a blob that was just opened hashed ahead of its reader if it is not known to be right, and behind
// it if that was long ago.
func (d *Disk) vet(b *Blob, dgst digest.Digest) error {
	if d.trusts(b.info) {
		if time.Since(b.info.ModTime()) > recheckAge {
			b.whole = func() { d.recheck(dgst) }
		}
		return nil
	}
	c, err := d.firstRead(b, dgst)
	if c == nil || err != nil {
		return err
	}
	b.mark, b.ctx = &c.watermark, context.Background() // it ends with the file, or with the Disk
	if b.size > Withheld {
		return nil
	}
	// None of it is sent before the end: what is wrong can still be a miss.
	if _, err := c.await(b.ctx, max(0, b.size-1)); err != nil && !errors.Is(err, io.EOF) {
		return err
	}
	return nil
}

// firstRead is the check of an open file, which all share who read it meanwhile; nil if it is right.
func (d *Disk) firstRead(b *Blob, dgst digest.Digest) (*check, error) {
	d.checks.mu.Lock()
	defer d.checks.mu.Unlock()
	if right := d.checks.right[dgst]; right != nil && unchanged(right, b.info) {
		return nil, nil
	}
	if c := d.checks.first[dgst]; c != nil && os.SameFile(c.info, b.info) {
		return c, nil
	}
	if d.checks.closed {
		return nil, errClosing
	}
	file, err := duplicate(b.file)
	if err != nil {
		return nil, err
	}
	c := &check{Disk: d, dgst: dgst, file: file, info: b.info, watermark: watermark{size: b.size}}
	d.checks.first[dgst] = c
	readers := d.index.Open(dgst) // it takes its space until it is hashed
	d.work.Go(func() {
		defer d.index.Close(dgst, readers)
		c.run()
	})
	return c, nil
}

func (c *check) run() {
	defer c.file.Close()
	hashed := int64(0)
	err := c.hash(c.dgst, c.file, func(n int64) error {
		hashed += n
		_ = c.raise(min(hashed, c.size-Withheld)) // only fail ends it
		return c.closing()
	})
	if err == nil {
		c.approve(c.dgst, c.info)
	} else if !errors.Is(err, errClosing) {
		err = c.condemn(c.dgst, c.info, err) // before a reader can come again
	}
	c.checks.mu.Lock()
	if c.checks.first[c.dgst] == c {
		delete(c.checks.first, c.dgst)
	}
	c.checks.mu.Unlock()
	if err != nil {
		c.fail(err)
		return
	}
	_ = c.raiseAll(c.size)
}

func (d *Disk) closing() error {
	d.checks.mu.Lock()
	defer d.checks.mu.Unlock()
	if d.checks.closed {
		return errClosing
	}
	return nil
}

// unchanged reports whether a file is the one that info tells of, and was not written to since.
func unchanged(info, now fs.FileInfo) bool {
	return os.SameFile(info, now) && info.Size() == now.Size() && info.ModTime().Equal(now.ModTime())
}

// hash hashes an open file, and calls each with the length of each piece; an error of that ends it. It
// returns ErrMismatch for what is wrong, and errUnreadable for what the disk does not give.
func (d *Disk) hash(dgst digest.Digest, file *os.File, each func(n int64) error) error {
	buf, ok := d.checks.buffers.Get().(*[]byte)
	if !ok {
		fresh := make([]byte, checkBuffer)
		buf = &fresh
	}
	defer d.checks.buffers.Put(buf)
	hash := dgst.Algorithm().Hash()
	for size := int64(0); ; {
		n, err := d.readAt(file, *buf, size)
		if n > 0 {
			hash.Write((*buf)[:n])
			size += int64(n)
			d.checks.verified.Add(int64(n))
			if err := each(int64(n)); err != nil {
				return err
			}
		}
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return fmt.Errorf("%w: %w", errUnreadable, err)
		}
	}
	if got := digest.NewDigest(dgst.Algorithm(), hash); got != dgst {
		return fmt.Errorf("is %s: %w", got, ErrMismatch)
	}
	return nil
}

// approve dates a file as verified now, unless it was written to since it was opened, or another has its
// name. If the disk does not let it, memory has to do.
func (d *Disk) approve(dgst digest.Digest, info fs.FileInfo) {
	name := d.blobName(dgst)
	mu := d.writers.of(name)
	mu.Lock()
	defer mu.Unlock()
	now, err := d.root.lstat(name)
	if err != nil || !unchanged(info, now) {
		return
	}
	if err := d.root.touch(name, time.Now().Truncate(verifiedUnit)); err != nil {
		d.log.Debug("cannot date what was verified", "digest", dgst, "err", err)
	}
	if now, err = d.root.lstat(name); err != nil || d.trusts(now) {
		return
	}
	d.checks.mu.Lock()
	defer d.checks.mu.Unlock()
	d.checks.right[dgst] = now
}

// condemn takes a file out of service that is wrong, unless another has its name by now, and returns an
// error that says so and is fs.ErrNotExist.
func (d *Disk) condemn(dgst digest.Digest, info fs.FileInfo, reason error) error {
	name := d.blobName(dgst)
	mu := d.writers.of(name)
	mu.Lock()
	defer mu.Unlock()
	if now, err := d.root.lstat(name); err == nil && os.SameFile(info, now) {
		d.quarantineLocked(dgst, reason)
	}
	return &condemned{name, reason}
}

// condemned is the error of a file that was found wrong. It is fs.ErrNotExist.
type condemned struct {
	name   string
	reason error
}

func (c *condemned) Error() string   { return c.name + " " + c.reason.Error() }
func (c *condemned) Unwrap() []error { return []error{c.reason, fs.ErrNotExist} }

// recheck has a blob hashed behind, when there is time.
func (d *Disk) recheck(dgst digest.Digest) {
	d.checks.mu.Lock()
	defer d.checks.mu.Unlock()
	if len(d.checks.due) >= maxDue {
		return
	}
	d.checks.due[dgst] = true
	select {
	case d.checks.wake <- struct{}{}:
	default: // it knows
	}
}

// recheckLoop hashes what is due, one at a time.
func (d *Disk) recheckLoop(ctx context.Context) {
	limiter := rate.NewLimiter(recheckRate, checkBuffer)
	for {
		select {
		case <-ctx.Done():
			return
		case <-d.checks.wake:
		}
		for dgst, ok := d.nextDue(); ok && ctx.Err() == nil; dgst, ok = d.nextDue() {
			_, err := d.verifyFile(dgst, recheckAge, func(n int64) error { return limiter.WaitN(ctx, int(n)) })
			if err != nil && !errors.Is(err, fs.ErrNotExist) && ctx.Err() == nil {
				d.log.Warn("cannot verify a stored blob", "digest", dgst, "err", err)
			}
		}
	}
}

func (d *Disk) nextDue() (digest.Digest, bool) {
	d.checks.mu.Lock()
	defer d.checks.mu.Unlock()
	for dgst := range d.checks.due {
		delete(d.checks.due, dgst)
		return dgst, true
	}
	return "", false
}

// verifyFile hashes a stored file, unless it was verified more lately than age; an error of each ends it.
// What is wrong is quarantined, and fs.ErrNotExist; what is errUnreadable is left where it is.
func (d *Disk) verifyFile(dgst digest.Digest, age time.Duration, each func(n int64) error) (fs.FileInfo, error) {
	file, info, err := d.openFile(d.blobs[dgst.Algorithm()], dgst.Encoded())
	if err != nil {
		return nil, err
	}
	defer file.Close()
	if d.trusts(info) && time.Since(info.ModTime()) <= age {
		return info, nil
	}
	rarelyUsed(file)
	err = d.hash(dgst, file, each)
	if errors.Is(err, ErrMismatch) {
		err = d.condemn(dgst, info, err)
	}
	if err == nil {
		d.approve(dgst, info)
	}
	return info, err
}

// noteUnclean learns when a process last did not close the data folder: this one has found it so, or has
// read of it. What was verified before stays in doubt over clean stops, for as long as nobody has read it.
func (d *Disk) noteUnclean() error {
	if d.checks.unclean.IsZero() {
		file, info, err := d.openFile(d.root, uncleanFile)
		if errors.Is(err, fs.ErrNotExist) {
			d.checks.noted = true
			return nil
		}
		if err != nil {
			return err
		}
		defer file.Close()
		raw := make([]byte, min(info.Size(), 64))
		if err := d.readFull(file, raw); err != nil {
			return err
		}
		at, err := time.Parse(time.RFC3339Nano, strings.TrimSpace(string(raw)))
		if err == nil && !at.After(time.Now()) {
			d.checks.unclean, d.checks.noted = at, true
			return nil
		}
		d.checks.unclean = time.Now()
	}
	err := d.put(uncleanFile, []byte(d.checks.unclean.UTC().Format(time.RFC3339Nano)+"\n"))
	if d.checks.noted = err == nil; err != nil { // a full disk is no reason not to serve what is on it
		d.log.Warn("cannot note that the store was not closed", "err", err)
	}
	return nil
}
