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
	file   *os.File        // its offset is the Blob's
	size   int64           // of stored content
	ingest *Ingest         // nil once stored
	ctx    context.Context // ends the waiting for an ingest; Read has no parameter for it
	close  func()          // nil if nothing is to be done
}

// Blob opens stored content that this repository reaches. Otherwise it returns fs.ErrNotExist.
// What does not have the size that it was stored with, or cannot be read, is quarantined, and absent.
func (d *Disk) Blob(repo oci.Repository, dgst digest.Digest) (*Blob, error) {
	b, err := d.openBlob(repo, dgst)
	if err == nil {
		err = d.probe(b, dgst)
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
	r, err := d.reach(repo, dgst)
	if err == nil && r.Size != info.Size() {
		err = d.quarantine(in, dgst.Encoded(), fmt.Errorf("is %d bytes long, stored with %d", info.Size(), r.Size))
	}
	if err != nil {
		_ = file.Close()
		return nil, err
	}
	readers := d.index.Open(dgst)
	return &Blob{volume: d.volume, file: file, size: info.Size(), close: func() { d.index.Close(dgst, readers) }}, nil
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
	in := d.blobs[dgst.Algorithm()]
	_ = d.misread(d.quarantine(in, dgst.Encoded(), reason))
	if _, err := in.lstat(dgst.Encoded()); !errors.Is(err, fs.ErrNotExist) {
		d.lost.Store(dgst, nil) // until it is stored anew
	}
	d.noteGone(dgst)
	d.manifests.remove(dgst)
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
	if b.ingest != nil {
		return b.ingest.Size()
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
	if b.ingest != nil {
		if end, err = b.ingest.await(b.ctx, offset); err != nil {
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
	err := b.file.Close()
	if b.close != nil {
		b.close()
		b.close = nil
	}
	return err
}
