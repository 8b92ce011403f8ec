package storage

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"

	"breakwater/pkg/oci"

	"github.com/opencontainers/go-digest"
)

// Blob is content open for reading: stored, or still arriving. It is an io.ReadSeekCloser for one
// goroutine, and does not show its file's SyscallConn: the kernel would read what an ingest has not
// released.
type Blob struct {
	*volume
	file  *os.File        // its offset is the Blob's
	size  int64           // of stored content
	info  fs.FileInfo     // of stored content, when it was opened
	mark  *watermark      // nil if all can be read at once
	ctx   context.Context // ends the waiting at the mark; Read has no parameter for it
	close func()          // nil if nothing is to be done
	whole func()          // what is to be done if it has been read to its end; nil if nothing
}

// Blob opens stored content that this repository reaches. Otherwise it returns fs.ErrNotExist.
// What does not have the size that it was stored with, or cannot be read, is quarantined, and absent. What
// has not been verified since an unclean stop, or was written to by somebody else, is hashed ahead of its
// readers: they wait for it as for a download, and may find it wrong as they may that, or absent if it is
// short.
func (d *Disk) Blob(repo oci.Repository, dgst digest.Digest) (*Blob, error) {
	b, err := d.openBlob(repo, dgst)
	if err == nil {
		err = d.probe(b, dgst)
	}
	if err == nil {
		if err = d.vet(b, dgst); err != nil {
			_ = b.Close()
		}
	}
	if err != nil {
		return nil, fmt.Errorf("blob %s: %w", dgst, err)
	}
	return b, nil
}

func (d *Disk) openBlob(repo oci.Repository, dgst digest.Digest) (*Blob, error) {
	if _, lost := d.lost.Load(dgst); lost {
		return nil, fmt.Errorf("%s cannot be read: %w", dgst, fs.ErrNotExist)
	}
	in := d.blobs[dgst.Algorithm()]
	file, info, err := d.openFile(in, dgst.Encoded())
	if err != nil {
		if errors.Is(err, fs.ErrNotExist) {
			d.noteGone(dgst)
		}
		return nil, err
	}
	r, _, err := d.reach(repo, dgst)
	if err == nil && r.Size != info.Size() {
		err = fmt.Errorf("is %d bytes long, stored with %d", info.Size(), r.Size)
		d.Quarantine(dgst, err)
		err = fmt.Errorf("%s %w: %w", dgst, err, fs.ErrNotExist)
	}
	if err != nil {
		_ = file.Close()
		return nil, err
	}
	readers := d.index.Open(dgst)
	return &Blob{volume: d.volume, file: file, size: info.Size(), info: info, close: func() { d.index.Close(dgst, readers) }}, nil
}

// noteGone tells the index that somebody has removed a file behind our back, if it was not stored again
// since.
func (d *Disk) noteGone(dgst digest.Digest) {
	if !d.index.Is(dgst) {
		return
	}
	name := d.blobName(dgst)
	mu := d.writers.of(name)
	mu.Lock()
	defer mu.Unlock()
	if _, err := d.root.lstat(name); errors.Is(err, fs.ErrNotExist) {
		d.index.Gone(dgst)
	}
}

// Quarantine takes stored content that has turned out wrong or unreadable out of service, so that
// it is fetched again. Those who have it open may read on.
func (d *Disk) Quarantine(dgst digest.Digest, reason error) {
	mu := d.writers.of(d.blobName(dgst))
	mu.Lock()
	defer mu.Unlock()
	d.quarantineLocked(dgst, reason)
}

// quarantineLocked is Quarantine for who holds the stripe.
func (d *Disk) quarantineLocked(dgst digest.Digest, reason error) {
	in := d.blobs[dgst.Algorithm()]
	_ = d.misread(d.quarantine(in, dgst.Encoded(), reason))
	if _, err := in.lstat(dgst.Encoded()); errors.Is(err, fs.ErrNotExist) {
		d.index.Gone(dgst)
	} else {
		d.lost.Store(dgst, nil) // until it is stored anew
	}
	d.manifests.remove(dgst)
	d.noteDamage(dgst)
}

// probe reads a byte: a disk that has died is found out while the answer can still come from elsewhere.
func (d *Disk) probe(b *Blob, dgst digest.Digest) error {
	if b.size == 0 {
		return nil
	}
	err := d.inTurn(func() error {
		if err := d.may(callRead, b.file.Name()); err != nil {
			return err
		}
		_, err := b.file.ReadAt(make([]byte, 1), 0)
		return err
	})
	if err == nil {
		return nil
	}
	_ = b.Close()
	if errors.Is(err, ErrBusy) {
		return err
	}
	d.Quarantine(dgst, err)
	return fmt.Errorf("%w: %w", err, fs.ErrNotExist)
}

// Size is the length in bytes, or -1 while it is not known.
func (b *Blob) Size() int64 {
	if b.mark != nil {
		return b.mark.Size()
	}
	return b.size
}

// Await waits until there is something to read at the Blob's offset. It returns the file, whose
// offset is the Blob's, and how many bytes of it may be read from there: at least one, at most limit.
// This is for sendfile; whoever takes more gets bytes that are not verified. At the end it returns
// io.EOF, and for an ingest that has failed, once all released bytes are read, the reason.
func (b *Blob) Await(limit int64) (*os.File, int64, error) {
	offset, err := b.file.Seek(0, io.SeekCurrent)
	if err != nil {
		return nil, 0, err
	}
	end := b.size
	if b.mark != nil {
		if end, err = b.mark.await(b.ctx, offset); err != nil {
			return nil, 0, err
		}
	}
	if offset >= end {
		return nil, 0, io.EOF
	}
	return b.file, min(limit, end-offset), nil
}

// Read reads what may be read, waiting for it if it is still to arrive.
func (b *Blob) Read(p []byte) (int, error) {
	if len(p) == 0 {
		return 0, nil
	}
	file, n, err := b.Await(int64(len(p)))
	if err != nil {
		return 0, err
	}
	read, err := b.read(file, p[:n])
	if errors.Is(err, io.EOF) {
		err = io.ErrUnexpectedEOF // somebody has cut the file
	}
	return read, err
}

// Seek sets the offset. It does not wait: io.SeekEnd is an error while the size is not known.
func (b *Blob) Seek(offset int64, whence int) (int64, error) {
	if whence != io.SeekEnd {
		return b.file.Seek(offset, whence)
	}
	size := b.Size()
	if size < 0 {
		return 0, errors.New("seek from the end: the size is not known yet")
	}
	return b.file.Seek(size+offset, io.SeekStart)
}

// Close closes the Blob. An ingest goes on.
func (b *Blob) Close() error {
	if b.whole != nil {
		if end, err := b.file.Seek(0, io.SeekCurrent); err == nil && end == b.size {
			b.whole()
		}
		b.whole = nil
	}
	err := b.file.Close()
	if b.close != nil {
		b.close()
		b.close = nil
	}
	return err
}
