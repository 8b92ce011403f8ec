package storage

import (
	"context"
	"errors"
	"fmt"
	"hash"
	"io"
	"io/fs"
	"math"
	"os"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/opencontainers/go-digest"
)

const (
	// parkedPrefix begins the name of a parked file in tmp/. No session's name is like it: those are of
	// upper case.
	parkedPrefix = "parked-"
	// parkedFor is how long a parked ingest waits for somebody who wants the rest.
	parkedFor = time.Hour
	// worthParking is what an ingest must have. Less is fetched again as fast as it is found again.
	worthParking = 1 << 20
	// catchUpRate is how many bytes not hashed yet are hashed for each that is written: little is left
	// to do at the end, and a source that brings little cannot make us read much.
	catchUpRate = 4
)

// parkedHash is how far a parked file has been hashed. It is true only of the file that info
// describes, and belongs to whoever takes it out of the Disk's map.
type parkedHash struct {
	hash   hash.Hash
	hashed int64
	info   fs.FileInfo
}

// describes reports whether a file is the one that was hashed, and not written to since.
func (p *parkedHash) describes(info fs.FileInfo) bool {
	return os.SameFile(p.info, info) && p.info.Size() == info.Size() && p.info.ModTime().Equal(info.ModTime())
}

// Park ends an ingest that no source is left for, and keeps its bytes and their space: within an
// hour, the next Ingest of the same digest and size for the same repository goes on from there, also
// after a restart. Readers get err once they have read what was released. What is not worth it is
// aborted: less than 1 MiB, an unknown size, wrong content (err is ErrMismatch), or what the disk could
// not write. After Commit, Abort or a first Park, it does nothing.
func (i *Ingest) Park(err error) {
	if i.ended {
		return
	}
	if i.size < 0 || i.written < worthParking || i.verified || i.broken || errors.Is(err, ErrMismatch) {
		i.Abort(err)
		return
	}
	i.ended = true
	i.fail(err)
	if perr := errors.Join(i.file.Close(), i.disk.park(i)); perr != nil {
		i.release()
		_ = i.disk.tmp.remove(i.name)
		i.disk.log.Warn("cannot park a download", "digest", i.dgst, "err", perr)
	}
}

// park gives an ingest's file the name by which it is found again. Of two it keeps the longer.
func (d *Disk) park(i *Ingest) error {
	now := time.Now()
	if err := d.tmp.touch(i.name, now); err != nil {
		return err
	}
	info, err := d.tmp.lstat(i.name)
	if err != nil {
		return err
	}
	name := i.parkedName()
	d.parking.Lock()
	defer d.parking.Unlock()
	if old, err := d.tmp.lstat(name); err == nil && d.checkParked(name, old) == nil && old.Size() >= info.Size() {
		i.release()
		return d.tmp.remove(i.name)
	}
	if err := d.tmp.rename(i.name, name); err != nil {
		return err
	}
	d.parked[name] = &parkedHash{i.hash, i.hashed, info}
	d.freeSpace(name)
	d.space[name], i.counted = i.counted, 0
	return nil
}

// freeSpace counts a parked file's space as nobody's. The lock is held.
func (d *Disk) freeSpace(name string) {
	d.index.Reserve(-d.space[name], 0)
	delete(d.space, name)
}

// takeUp goes on with what is parked of the ingest's digest and size, and reports whether anything
// is. The file gets a name that makes it this ingest's alone.
func (i *Ingest) takeUp() bool {
	if i.size < worthParking {
		return false
	}
	d := i.disk
	parked, name := i.parkedName(), d.temporaryName()
	state, err := func() (*parkedHash, error) {
		d.parking.Lock()
		defer d.parking.Unlock() // also if the disk panics: nobody could park any more
		state := d.parked[parked]
		delete(d.parked, parked)
		i.counted = d.space[parked]
		delete(d.space, parked)
		return state, d.tmp.rename(parked, name)
	}()
	if errors.Is(err, fs.ErrNotExist) {
		i.release()
		return false
	}
	var file *os.File
	var info fs.FileInfo
	if err == nil {
		file, info, err = d.openParked(parked, name)
	}
	if err != nil {
		i.release()
		d.log.Warn("dropped a parked download", "file", parked, "err", errors.Join(err, d.tmp.remove(name)))
		return false
	}
	i.file, i.name, i.written = file, name, info.Size()
	i.released = max(0, i.readable())
	if state != nil && state.describes(info) {
		i.hash, i.hashed = state.hash, state.hashed
	}
	return true
}

// openParked opens what was parked and has another name now, to be written at its end.
func (d *Disk) openParked(parked, name string) (*os.File, fs.FileInfo, error) {
	file, err := d.tmp.openToWrite(name)
	if err != nil {
		return nil, nil, err
	}
	info, err := checkFile(d.tmp, name, file)
	if err == nil {
		err = d.checkParked(parked, info)
	}
	if err == nil {
		_, err = file.Seek(0, io.SeekEnd)
	}
	if err != nil {
		_ = file.Close()
		return nil, nil, err
	}
	return file, info, nil
}

// parkedName is where the ingest is parked. It tells the repository too: whoever knows a digest and a
// size could else have another registry announce them, and be sent what is private in this one.
func (i *Ingest) parkedName() string {
	return fmt.Sprintf("%s%s-%s-%d-%s", parkedPrefix, i.dgst.Algorithm(), i.dgst.Encoded(), i.size, digest.FromString(i.repo.String()).Encoded()[:32])
}

// parseParked returns the digest and the size in a parked file's name.
func parseParked(name string) (digest.Digest, int64, error) {
	words := strings.Split(name, "-")
	if len(words) != 5 {
		return "", 0, fmt.Errorf("%s is not the name of a parked file", name)
	}
	dgst := digest.Digest(words[1] + ":" + words[2])
	size, err := strconv.ParseInt(words[3], 10, 64)
	return dgst, size, errors.Join(err, dgst.Validate())
}

// checkParked returns why a file cannot be gone on with: it is not what Park leaves, or its time is
// over. One from the future was parked by a clock that was wrong; nobody knows when.
func (d *Disk) checkParked(name string, info fs.FileInfo) error {
	dgst, size, err := parseParked(name)
	if err != nil {
		return err
	}
	stat, ok := info.Sys().(*syscall.Stat_t)
	switch age := time.Since(info.ModTime()); {
	case !info.Mode().IsRegular() || !ok || stat.Nlink > 1:
		return fmt.Errorf("%s %w", name, errForeign)
	case d.blobs[dgst.Algorithm()].root == nil || size > d.capacity || info.Size() < worthParking || info.Size() > size:
		return fmt.Errorf("%d bytes of %s cannot have been parked", info.Size(), name)
	case age.Abs() > parkedFor:
		return fmt.Errorf("%s was parked %s ago", name, age)
	}
	return nil
}

// eachParked calls f, which may remove it, for all that has a parked file's name.
func (d *Disk) eachParked(f func(name string) error) error {
	return d.tmp.each(".", func(e fs.DirEntry) error {
		if !strings.HasPrefix(e.Name(), parkedPrefix) {
			return nil
		}
		return f(e.Name())
	})
}

// dropExpired removes what nobody has taken up for an hour, and what cannot be taken up.
func (d *Disk) dropExpired() {
	err := d.eachParked(func(name string) error {
		d.parking.Lock()
		defer d.parking.Unlock()
		info, err := d.tmp.lstat(name)
		if errors.Is(err, fs.ErrNotExist) { // taken up
			return nil
		}
		if err == nil {
			err = d.checkParked(name, info)
		}
		if err != nil {
			delete(d.parked, name)
			d.freeSpace(name)
			d.log.Info("dropped a parked download", "reason", err, "err", d.tmp.remove(name))
		}
		return nil
	})
	if err != nil {
		d.log.Warn("cannot look for parked downloads", "err", err)
	}
}

// dropOldest removes what was parked first, and reports whether anything was.
func (d *Disk) dropOldest() bool {
	var oldest string
	var parkedAt time.Time
	err := d.eachParked(func(name string) error {
		info, err := d.tmp.lstat(name)
		if err == nil && info.Mode().IsRegular() && (oldest == "" || info.ModTime().Before(parkedAt)) {
			oldest, parkedAt = name, info.ModTime()
		}
		return nil
	})
	if err != nil || oldest == "" {
		return false
	}
	d.parking.Lock()
	defer d.parking.Unlock()
	delete(d.parked, oldest)
	d.freeSpace(oldest)
	err = d.tmp.remove(oldest)
	d.log.Info("dropped a parked download", "file", oldest, "reason", "space is short", "err", err)
	return err == nil || errors.Is(err, fs.ErrNotExist) // taken up since: look again
}

// withRoom calls f, which writes to the disk, again for as long as it finds no space and something
// parked can give way to it.
func (d *Disk) withRoom(f func() error) error {
	for {
		err := f()
		if !errors.Is(err, syscall.ENOSPC) || !d.dropOldest() {
			return err
		}
	}
}

// rehash hashes what an earlier process has parked, so that whoever takes it up need not.
func (d *Disk) rehash(ctx context.Context) {
	err := d.eachParked(func(name string) error {
		if err := d.rehashParked(ctx, name); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("%s: %w", name, err)
		}
		return nil
	})
	if err != nil && ctx.Err() == nil {
		d.log.Warn("cannot hash parked downloads", "err", err)
	}
}

func (d *Disk) rehashParked(ctx context.Context, name string) error {
	file, state, err := d.openToRehash(name)
	if file == nil {
		return err
	}
	defer file.Close()
	buf := make([]byte, 256<<10)
	for {
		n, err := d.read(file, buf)
		if errors.Is(err, io.EOF) {
			return nil
		}
		d.parking.Lock()
		taken := d.parked[name] != state
		if !taken {
			state.hash.Write(buf[:n])
			state.hashed += int64(n)
		}
		d.parking.Unlock()
		if taken || err != nil || ctx.Err() != nil {
			return errors.Join(err, ctx.Err())
		}
	}
}

// openToRehash opens what an earlier process has parked, and notes that it is being hashed. The file is nil if
// this process has parked it.
func (d *Disk) openToRehash(name string) (*os.File, *parkedHash, error) {
	dgst, _, err := parseParked(name)
	if err != nil {
		return nil, nil, err
	}
	d.parking.Lock()
	defer d.parking.Unlock()
	if d.parked[name] != nil {
		return nil, nil, nil
	}
	file, info, err := d.openFile(d.tmp, name)
	if err != nil {
		return nil, nil, err
	}
	state := &parkedHash{hash: dgst.Algorithm().Hash(), info: info}
	d.parked[name] = state
	if _, known := d.space[name]; !known {
		d.space[name] = allocated(info)
		d.index.Reserve(allocated(info), math.MaxInt64)
	}
	return file, state, nil
}

// catchUp hashes up to limit of what has been written and is not hashed yet. There is something only
// in an ingest that was taken up before anybody had hashed what it began with.
func (i *Ingest) catchUp(limit int64) error {
	n := min(limit, i.written-i.hashed)
	if n <= 0 {
		return nil
	}
	err := i.disk.may(callRead, i.name)
	var read int64
	if err == nil {
		read, err = io.Copy(i.hash, io.NewSectionReader(i.file, i.hashed, n))
	}
	i.hashed += read
	if err == nil && read < n {
		err = io.ErrUnexpectedEOF // somebody has cut the file
	}
	i.broken = err != nil
	return err
}
