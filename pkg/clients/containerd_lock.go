package clients

import (
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// errHeld is of a folder that another process holds.
var errHeld = errors.New("another `breakwater setup containerd --hold` holds it")

// locked runs f while no other process changes anything in dir.
func locked(dir string, f func(*os.Root) ([]Change, error)) ([]Change, error) {
	root, err := os.OpenRoot(dir)
	if err != nil {
		return nil, err
	}
	defer root.Close()
	here, err := root.Open(".")
	if err != nil {
		return nil, err
	}
	defer here.Close() // which frees the lock
	if err := unix.Flock(int(here.Fd()), unix.LOCK_EX); err != nil {
		return nil, fmt.Errorf("lock %s: %w", dir, err)
	}
	return f(root)
}

// hold returns the folder with a lock that says that it is held, until it is closed or this process ends. was is what
// hold returned before, or nil: a folder may have been made anew since. It is called by who has it locked.
//
// There are two locks, as others may change files in a folder that is held: for that moment they have flock, and
// a holder has a lock of an open file description (fcntl(2), F_OFD_SETLK). Of a folder that is one for reading,
// of which there may be many: so each asks before. Both locks are the folder's own, whatever its path is in a
// container, and leave nothing in it.
func hold(root *os.Root, was *os.File) (*os.File, error) {
	here, err := root.Open(".")
	if err != nil {
		return was, err
	}
	if was != nil && sameFile(here, was) {
		return was, here.Close()
	}
	held, err := isHeld(root)
	if err == nil && held {
		err = fmt.Errorf("%s: %w%s", root.Name(), errHeld, holder(root))
	}
	if err == nil {
		err = unix.FcntlFlock(here.Fd(), unix.F_OFD_SETLK, &unix.Flock_t{Type: unix.F_RDLCK})
	}
	if err != nil {
		return was, errors.Join(err, here.Close())
	}
	if was != nil {
		_ = was.Close() // its folder is gone
	}
	return here, nil
}

func sameFile(a, b *os.File) bool {
	one, err := a.Stat()
	if err != nil {
		return false
	}
	other, err := b.Stat()
	return err == nil && os.SameFile(one, other)
}

// isHeld reports whether a process that runs holds the folder; who holds it itself is told so too.
func isHeld(root *os.Root) (bool, error) {
	here, err := root.Open(".")
	if err != nil {
		return false, err
	}
	defer here.Close()
	lock := unix.Flock_t{Type: unix.F_WRLCK} // which would not be granted; this asks only
	if err := unix.FcntlFlock(here.Fd(), unix.F_OFD_GETLK, &lock); err != nil {
		return false, fmt.Errorf("lock %s: %w", root.Name(), err)
	}
	return lock.Type != unix.F_UNLCK, nil
}

// holder says for which mirror the folder is held, as the files in it tell. A process has another number in each
// container.
func holder(root *os.Root) string {
	names, _ := folders(root)
	for _, name := range names {
		f, err := look(root, name)
		if err != nil {
			continue
		}
		for _, p := range f.places {
			if mirror := heldFor(p.text); mirror != "" {
				return ", for the mirror " + mirror
			}
		}
	}
	return ""
}
