package storage

import (
	"errors"
	"fmt"
	"hash/maphash"
	"io/fs"
	"os"
	"path"
	"strconv"
	"sync"
	"syscall"
)

// checkFolder refuses a folder that is not one of ours alone: what anybody may write to, or have
// pointed elsewhere, cannot be trusted to hold what was put there.
func checkFolder(in folder, name string) error {
	info, err := in.lstat(name)
	if err != nil {
		return err
	}
	if !info.IsDir() {
		return fmt.Errorf("%s is not a folder but %s", name, info.Mode())
	}
	if info.Mode().Perm()&0o002 != 0 {
		return fmt.Errorf("%s may be written by every user (%s): take that away with chmod o-w", name, info.Mode())
	}
	return nil
}

// errForeign is the reason against a file that cannot have come from this package: a link would show
// another file's bytes, a FIFO would block.
var errForeign = errors.New("is not a regular file with one name")

// openFile opens what must be a file of ours. Anything else is quarantined, and fs.ErrNotExist.
func (d *Disk) openFile(in folder, name string) (*os.File, fs.FileInfo, error) {
	if err := d.enter(); err != nil {
		return nil, nil, err
	}
	defer d.leave()
	file, err := in.open(name)
	if err != nil {
		if found, lerr := in.lstat(name); lerr == nil && !found.Mode().IsRegular() {
			err = d.quarantine(in, name, errForeign)
		}
		return nil, nil, err
	}
	info, err := checkFile(in, name, file)
	if errors.Is(err, errForeign) {
		err = d.quarantine(in, name, err)
	}
	if err != nil {
		_ = file.Close()
		return nil, nil, err
	}
	return file, info, nil
}

// checkFile returns errForeign if the open file, or what it was opened by, is not one of ours.
func checkFile(in folder, name string, file *os.File) (fs.FileInfo, error) {
	info, err := file.Stat()
	if err != nil {
		return nil, err
	}
	entry, err := in.lstat(name) // os.Root follows links that stay inside
	if err != nil {
		return nil, err
	}
	stat, ok := info.Sys().(*syscall.Stat_t)
	if !entry.Mode().IsRegular() || !info.Mode().IsRegular() || !ok || stat.Nlink > 1 {
		return nil, fmt.Errorf("%s %w", name, errForeign)
	}
	return info, nil
}

// allocated is how many bytes of the disk a file takes.
func allocated(info fs.FileInfo) int64 {
	if stat, ok := info.Sys().(*syscall.Stat_t); ok {
		return stat.Blocks * 512 // whatever the disk's own block is
	}
	return info.Size()
}

// quarantine takes a file out of service, and returns an error that says so and is fs.ErrNotExist.
func (d *Disk) quarantine(in folder, name string, reason error) error {
	from := path.Join(in.path, name)
	err := d.root.rename(from, path.Join("quarantine", path.Base(name)+"."+d.temporaryName()))
	if err == nil {
		d.checks.wrong.Add(1)
	}
	if !errors.Is(err, fs.ErrNotExist) { // somebody else was faster
		d.log.Error("quarantined a file that must not be served", "file", from, "reason", reason, "err", err)
	}
	return fmt.Errorf("%s %w: %w", from, reason, fs.ErrNotExist)
}

func (d *Disk) temporaryName() string {
	return d.session + "-" + strconv.FormatUint(d.sequence.Add(1), 10)
}

// create makes a temporary file, and returns its name in tmp/.
func (d *Disk) create() (*os.File, string, error) {
	name := d.temporaryName()
	file, err := d.tmp.create(name)
	return file, name, err
}

// put writes a file so that after a crash there is all of it or what was there before.
func (d *Disk) put(name string, raw []byte) error {
	return d.wrote("record", int64(len(raw)), d.withRoom(func() error { return d.tryPut(name, raw) }))
}

func (d *Disk) tryPut(name string, raw []byte) error {
	file, temporary, err := d.create()
	if err != nil {
		return err
	}
	_, err = d.write(file, raw)
	if err == nil {
		err = d.sync(file)
	}
	return d.publish(file, temporary, name, err)
}

// publish closes a temporary file and, unless writing it has failed, gives it its name. When it
// returns nil the file is stored. A failed fsync is never repeated: the kernel forgets what it could
// not write, and a second one would succeed.
func (d *Disk) publish(file *os.File, temporary, name string, written error) error {
	err := errors.Join(written, file.Close())
	if err == nil {
		err = d.root.rename(path.Join(d.tmp.path, temporary), name)
	}
	if err != nil {
		_ = d.tmp.remove(temporary)
		return err
	}
	return d.syncFolder(path.Dir(name))
}

// makeFolder makes a folder for records and its parents, durably.
func (d *Disk) makeFolder(name string) error {
	d.folders.Lock()
	defer d.folders.Unlock()
	return d.makeFolderLocked(name)
}

func (d *Disk) makeFolderLocked(name string) error {
	if _, err := d.root.lstat(name); err == nil || !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	parent := path.Dir(name)
	if err := d.makeFolderLocked(parent); err != nil {
		return err
	}
	if err := d.root.mkdir(name); err != nil {
		return err
	}
	if err := d.syncFolder(parent); err != nil {
		_ = d.root.remove(name)
		return err
	}
	return nil
}

// syncFolder makes the names in a folder durable.
func (d *Disk) syncFolder(name string) error {
	file, err := d.root.open(name)
	if err != nil {
		return err
	}
	return errors.Join(d.sync(file), file.Close())
}

// stripes orders the writers of one record: a writer holds its stripe while it reads and writes the
// file, so that what is in memory and what is on the disk change in the same order. A stripe is
// taken before any other lock and never together with another stripe.
type stripes struct {
	seed maphash.Seed
	mu   [64]sync.Mutex
}

func (s *stripes) of(name string) *sync.Mutex {
	return &s.mu[maphash.String(s.seed, name)%uint64(len(s.mu))]
}
