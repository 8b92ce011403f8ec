package storage

import (
	"errors"
	"io"
	"io/fs"
	"os"
	"path"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// call is one of those that the store makes of the file system.
type call string

// All of them. What the kernel does by itself, sendfile, is not among them.
const (
	callOpen     call = "open"
	callCreate   call = "create"
	callRead     call = "read"
	callWrite    call = "write"
	callSync     call = "sync"
	callTruncate call = "truncate"
	callAllocate call = "allocate"
	callRename   call = "rename"
	callRemove   call = "remove"
	callMkdir    call = "mkdir"
	callStat     call = "stat"
	callList     call = "list"
	callTouch    call = "touch"
)

// volume is the one seam between the store and the file system: nothing else in this package calls the
// os. fault is Config's.
type volume struct {
	fault atomic.Pointer[func(call, name string) error]
}

// errNoSync, from fault, leaves a sync out and tells nobody.
var errNoSync = errors.New("not synced")

func (v *volume) may(c call, name string) error {
	if fault := v.fault.Load(); fault != nil {
		return (*fault)(string(c), name)
	}
	return nil
}

// folder is a folder of the store, with its path below the data folder. Names may lead further down.
type folder struct {
	*volume
	root *os.Root
	path string
}

// openRoot opens a folder that is not below another one.
func (v *volume) openRoot(dir string) (folder, error) {
	err := v.may(callMkdir, dir)
	if err == nil {
		err = os.MkdirAll(dir, 0o700)
	}
	if err == nil {
		err = v.may(callOpen, dir)
	}
	if err != nil {
		return folder{}, err
	}
	root, err := os.OpenRoot(dir)
	return folder{v, root, "."}, err
}

// sub opens a folder below.
func (f folder) sub(name string) (folder, error) {
	if err := f.may(callOpen, name); err != nil {
		return folder{}, err
	}
	root, err := f.root.OpenRoot(name)
	return folder{f.volume, root, path.Join(f.path, name)}, err
}

func (f folder) openFile(c call, name string, flag int) (*os.File, error) {
	if err := f.may(c, name); err != nil {
		return nil, err
	}
	return f.root.OpenFile(name, flag|unix.O_NONBLOCK, 0o600) // a FIFO must not block
}

func (f folder) open(name string) (*os.File, error) { return f.openFile(callOpen, name, os.O_RDONLY) }

func (f folder) openToWrite(name string) (*os.File, error) {
	return f.openFile(callOpen, name, os.O_RDWR)
}

func (f folder) create(name string) (*os.File, error) {
	return f.openFile(callCreate, name, os.O_RDWR|os.O_CREATE|os.O_EXCL)
}

func (f folder) lstat(name string) (fs.FileInfo, error) {
	if err := f.may(callStat, name); err != nil {
		return nil, err
	}
	return f.root.Lstat(name)
}

func (f folder) mkdir(name string) error {
	if err := f.may(callMkdir, name); err != nil {
		return err
	}
	return f.root.Mkdir(name, 0o700)
}

func (f folder) rename(from, to string) error {
	if err := f.may(callRename, from); err != nil {
		return err
	}
	return f.root.Rename(from, to)
}

func (f folder) remove(name string) error {
	if err := f.may(callRemove, name); err != nil {
		return err
	}
	return f.root.Remove(name)
}

func (f folder) touch(name string, at time.Time) error {
	if err := f.may(callTouch, name); err != nil {
		return err
	}
	return f.root.Chtimes(name, at, at)
}

// each calls do for all that is in a folder, in no order, without holding all of it. What is known of each is
// asked of the disk.
func (f folder) each(name string, do func(fs.DirEntry) error) error {
	return list(f, name, func(dir *os.File) ([]fs.DirEntry, error) { return dir.ReadDir(atATime) }, do)
}

// eachName is each for who needs no more than the names.
func (f folder) eachName(name string, do func(string) error) error {
	return list(f, name, func(dir *os.File) ([]string, error) { return dir.Readdirnames(atATime) }, do)
}

// atATime is how many entries of a folder are held.
const atATime = 256

func list[E any](f folder, name string, next func(dir *os.File) ([]E, error), do func(E) error) error {
	dir, err := f.open(name)
	if err != nil {
		return err
	}
	defer dir.Close()
	for {
		if err := f.may(callList, name); err != nil {
			return err
		}
		entries, err := next(dir)
		for _, e := range entries {
			if err := do(e); err != nil {
				return err
			}
		}
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
	}
}

func (v *volume) read(file *os.File, p []byte) (int, error) {
	if err := v.may(callRead, file.Name()); err != nil {
		return 0, err
	}
	return file.Read(p)
}

// readAt leaves the file's offset alone.
func (v *volume) readAt(file *os.File, p []byte, offset int64) (int, error) {
	if err := v.may(callRead, file.Name()); err != nil {
		return 0, err
	}
	return file.ReadAt(p, offset)
}

func (v *volume) write(file *os.File, p []byte) (int, error) {
	err := v.may(callWrite, file.Name())
	if errors.Is(err, io.ErrShortWrite) {
		n, werr := file.Write(p[:len(p)/2])
		return n, errors.Join(werr, io.ErrShortWrite)
	}
	if err != nil {
		return 0, err
	}
	return file.Write(p)
}

// readFull fills p.
func (v *volume) readFull(file *os.File, p []byte) error {
	for n := 0; n < len(p); {
		m, err := v.read(file, p[n:])
		if n += m; errors.Is(err, io.EOF) {
			return io.ErrUnexpectedEOF
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// writer is write as an io.Writer.
type writer struct {
	*volume
	file *os.File
}

func (w writer) Write(p []byte) (int, error) { return w.write(w.file, p) }

func (v *volume) sync(file *os.File) error {
	if err := v.may(callSync, file.Name()); errors.Is(err, errNoSync) {
		return nil
	} else if err != nil {
		return err
	}
	return file.Sync()
}

func (v *volume) truncate(file *os.File, size int64) error {
	if err := v.may(callTruncate, file.Name()); err != nil {
		return err
	}
	return file.Truncate(size)
}

// allocate reserves the file's first size bytes on the disk without making it longer. A file system that
// cannot is not asked to.
func (v *volume) allocate(file *os.File, size int64) error {
	if err := v.may(callAllocate, file.Name()); err != nil || size == 0 {
		return err
	}
	conn, err := file.SyscallConn()
	if err != nil {
		return err
	}
	var serr error
	err = conn.Control(func(fd uintptr) {
		// fallocate would take all that there is before it says that it is not enough.
		var disk unix.Statfs_t
		var own unix.Stat_t
		if unix.Fstatfs(int(fd), &disk) == nil && unix.Fstat(int(fd), &own) == nil &&
			size-own.Blocks*512 > int64(disk.Bavail)*disk.Bsize {
			serr = unix.ENOSPC
			return
		}
		serr = ignoreEINTR(func() error { return unix.Fallocate(int(fd), unix.FALLOC_FL_KEEP_SIZE, 0, size) })
	})
	if err != nil {
		return err
	}
	if errors.Is(serr, unix.EOPNOTSUPP) || errors.Is(serr, unix.ENOSYS) {
		return nil
	}
	return os.NewSyscallError("fallocate", serr)
}

func ignoreEINTR(call func() error) error {
	for {
		if err := call(); !errors.Is(err, unix.EINTR) {
			return err
		}
	}
}

// duplicate opens an open file once more, whatever has its name by now. Both have one offset.
func duplicate(file *os.File) (*os.File, error) {
	conn, err := file.SyscallConn()
	if err != nil {
		return nil, err
	}
	var fd int
	var derr error
	err = conn.Control(func(old uintptr) { fd, derr = unix.FcntlInt(old, unix.F_DUPFD_CLOEXEC, 0) })
	if err = errors.Join(err, os.NewSyscallError("fcntl", derr)); err != nil {
		return nil, err
	}
	return os.NewFile(uintptr(fd), file.Name()), nil
}

// rarelyUsed asks the kernel not to drop, for what is read of a file now, what others read.
func rarelyUsed(file *os.File) {
	if conn, err := file.SyscallConn(); err == nil {
		_ = conn.Control(func(fd uintptr) { _ = unix.Fadvise(int(fd), 0, 0, unix.FADV_NOREUSE) })
	}
}
