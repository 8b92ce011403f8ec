package storage

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"
)

// Owner is a user and a group.
type Owner struct{ User, Group int }

// String is how chown writes it.
func (o Owner) String() string { return fmt.Sprintf("%d:%d", o.User, o.Group) }

// Giving says how much of a data folder changes hands.
type Giving int

// GiveEmpty is for a folder with nothing in it, GiveAll for a store that nobody has open.
const (
	GiveEmpty Giving = iota
	GiveAll
)

// lostAndFound is in the root of each ext file system, and no store.
const lostAndFound = "lost+found"

// Give makes dir, if it is not there, the data folder of an owner, which Open leaves to whoever runs it. It
// reports whether there was anything to do. It needs CAP_CHOWN and no other capability, if dir belongs to
// whoever calls it: kubelet makes folders that belong to root. With GiveAll it may be killed and called again.
func Give(dir string, to Owner, giving Giving) (given bool, err error) {
	err = os.MkdirAll(filepath.Dir(dir), 0o755)
	if err == nil {
		err = os.Mkdir(dir, 0o700)
	}
	if err != nil && !errors.Is(err, fs.ErrExist) {
		return false, err
	}
	info, err := os.Stat(dir)
	if err != nil {
		return false, err
	}
	if !info.IsDir() {
		return false, fmt.Errorf("%s is not a folder", dir)
	}
	from := ownerOf(info)
	if from == to { // we may not even be let in
		return false, nil
	}
	if from.User == to.User {
		return true, os.Chown(dir, to.User, to.Group)
	}
	root, err := os.OpenRoot(dir)
	if err != nil {
		return false, err
	}
	defer root.Close()
	g := gift{root, from, to}
	entries, err := g.entries(".")
	if err != nil {
		return false, err
	}
	if len(entries) > 0 {
		if giving != GiveAll {
			return false, fmt.Errorf("%s belongs to %s, not to %s, and is not empty: --recursive hands over all that is in it", dir, from, to)
		}
		if err := g.walk(".", g.check); err != nil {
			return false, err
		}
		if err := g.walk(".", g.give); err != nil {
			return false, err
		}
	}
	// The mode first: afterwards the folder is another's, and it takes a capability.
	if err := root.Chmod(".", 0o700); err != nil {
		return false, err
	}
	return true, root.Lchown(".", to.User, to.Group)
}

// gift is a folder that changes hands.
type gift struct {
	root     *os.Root
	from, to Owner
}

func (g gift) entries(name string) ([]fs.DirEntry, error) {
	dir, err := g.root.Open(name)
	if err != nil {
		return nil, err
	}
	defer dir.Close()
	entries, err := dir.ReadDir(-1)
	if name != "." || err != nil {
		return entries, err
	}
	kept := entries[:0]
	for _, entry := range entries {
		if entry.Name() != lostAndFound {
			kept = append(kept, entry)
		}
	}
	return kept, nil
}

// walk visits what is in a folder, and each folder after all that is in it. One that has been given is done
// with, and we may not even be let in.
func (g gift) walk(name string, visit func(name string, info fs.FileInfo) error) error {
	entries, err := g.entries(name)
	if err != nil {
		return err
	}
	for _, entry := range entries {
		name := filepath.Join(name, entry.Name())
		info, err := g.root.Lstat(name)
		if err != nil {
			return err
		}
		if info.IsDir() && ownerOf(info).User != g.to.User {
			if err := g.walk(name, visit); err != nil {
				return err
			}
		}
		if err := visit(name, info); err != nil {
			return err
		}
	}
	return nil
}

// check refuses what is nobody's who has to do with the store: its owner may have made a hard link to it.
func (g gift) check(name string, info fs.FileInfo) error {
	if of := ownerOf(info); of.User != g.from.User && of.User != g.to.User {
		return fmt.Errorf("%s belongs to %s, who is neither %s nor %s: have a look at it first", filepath.Join(g.root.Name(), name), of, g.from, g.to)
	}
	return nil
}

func (g gift) give(name string, info fs.FileInfo) error {
	if err := g.check(name, info); err != nil || ownerOf(info) == g.to {
		return err
	}
	return g.root.Lchown(name, g.to.User, g.to.Group)
}

func ownerOf(info fs.FileInfo) Owner {
	stat := info.Sys().(*syscall.Stat_t)
	return Owner{int(stat.Uid), int(stat.Gid)}
}
