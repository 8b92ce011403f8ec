package clients

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"strings"

	"golang.org/x/sys/unix"
)

const (
	hostsFile = "hosts.toml"
	// Docker and containerd take what ends in .crt, .cert or .key for the registry's own, where there is no
	// hosts.toml; Docker's own store even where there is one.
	caFile     = "breakwater-ca.pem"
	clientFile = "breakwater-client.pem" // certificate and key, which no moment finds apart
	// keptSuffix ends the name of a file that was there before ours; newSuffix, of one that is not finished.
	keptSuffix = ".before-breakwater"
	newSuffix  = ".breakwater-new"
	// maxFile is far above what anybody writes into one.
	maxFile = 1 << 20
)

// fileNames are those of all files that may be ours, each behind those that it names.
var fileNames = []string{caFile, clientFile, hostsFile}

// place is where one file of a folder's belongs, as it was looked at.
type place struct {
	root         *os.Root
	folder, name string
	there        fs.FileInfo // nil if there is none
	kept         fs.FileInfo // what was there before ours, nil if there is none
	ours         bool        // what is there is
	text         string      // of that, if it is ours
}

func (p place) path() string     { return path.Join(p.folder, p.name) }
func (p place) keptName() string { return p.name + keptSuffix }
func (p place) keptPath() string { return p.path() + keptSuffix }

// look sees what is there.
func (p *place) look() error {
	for name, info := range map[string]*fs.FileInfo{p.path(): &p.there, p.keptPath(): &p.kept} {
		found, err := p.root.Lstat(name)
		if err == nil {
			*info = found
		} else if !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	if p.there != nil && p.there.Mode().IsRegular() {
		// One that we may not read is not ours.
		if text, err := p.read(); err == nil && strings.HasPrefix(text, mark) {
			p.ours, p.text = true, text
		}
	}
	return nil
}

func (p place) read() (string, error) {
	file, err := p.root.OpenFile(p.path(), os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if err != nil {
		return "", err
	}
	defer file.Close()
	text, err := io.ReadAll(io.LimitReader(file, maxFile))
	return string(text), err
}

const toStay = "is there to stay (`breakwater setup containerd --write`)"

// interrupted reports whether what was kept is still what is in force: a replacement was not finished.
func (p place) interrupted() bool {
	return p.there != nil && p.kept != nil && os.SameFile(p.there, p.kept)
}

// plan is what is done so that the file is as it should be.
func (p place) plan(want file, existing Existing) (act Act, note string) {
	mirror, why := heldFor(want.text), "is not breakwater's"
	stays := p.ours && mirror != "" && heldFor(p.text) == ""
	if stays {
		why = "is there to stay, for another mirror (`breakwater setup containerd --write`)"
	}
	switch {
	case p.there == nil:
		return Write, ""
	case p.ours && p.text == want.text && p.there.Mode().Perm() == want.mode:
		return Unchanged, ""
	case stays && strings.Contains(p.text, hostTable(mirror)):
		return Keep, toStay
	case p.ours && !stays:
		return Update, ""
	case !p.there.Mode().IsRegular():
		return foreign(fmt.Sprintf("is not a file (%s)", p.there.Mode().Type()), existing)
	case p.kept != nil && !p.interrupted():
		return foreign(why+", and "+p.keptName()+" beside it is from an earlier replacement; move away one of the two", existing)
	case existing == ExistingReplace:
		return Replace, ""
	}
	return foreign(why+"; "+
		"--existing replace puts it aside until --undo, --existing keep leaves it and writes the others", existing)
}

// foreign is what happens to what must not be replaced.
func foreign(why string, existing Existing) (Act, string) {
	if existing == ExistingKeep {
		why, _, _ = strings.Cut(why, "; ")
		return Keep, why
	}
	return Refuse, why
}

// undo is what is done to have what was there before, if anything is.
func (p place) undo() (change Change, ok bool) {
	kept := p.kept != nil && p.kept.Mode().IsRegular()
	switch {
	case p.ours && kept || p.interrupted() && kept:
		return Change{Act: Restore}, true
	case p.ours:
		return Change{Act: Remove}, true
	case kept && p.there == nil:
		return Change{Act: Keep, Note: "was taken away since breakwater wrote it; what was there before that is " + p.keptName()}, true
	case kept:
		return Change{Act: Keep, Note: "was changed since breakwater wrote it; what was there before that is " + p.keptName()}, true
	}
	return Change{}, false
}

// carryOut does it. At no moment is there no file where one was and one will be.
func (p place) carryOut(act Act, want file) error {
	switch act {
	case Write:
		return p.write(want, p.root.Link) // which takes no file's place
	case Update:
		return p.write(want, p.root.Rename)
	case Replace:
		return p.write(want, func(written, there string) error {
			if p.kept == nil {
				if err := p.root.Link(there, p.keptPath()); err != nil {
					return err
				}
			}
			return p.root.Rename(written, there)
		})
	case Restore:
		if p.interrupted() { // rename does nothing with two names of one file
			return p.root.Remove(p.keptPath())
		}
		if err := p.root.Rename(p.keptPath(), p.path()); err != nil {
			return err
		}
		return syncFolder(p.root, p.folder)
	case Remove:
		if err := p.root.Remove(p.path()); err != nil {
			return err
		}
		if p.root.Remove(p.folder) == nil { // which fails if there is something in it
			return syncFolder(p.root, ".")
		}
		return syncFolder(p.root, p.folder)
	}
	return nil
}

// write writes the file, and puts it in its place.
func (p place) write(want file, put func(written, there string) error) error {
	written := p.path() + newSuffix
	if err := writeFile(p.root, written, want); err != nil {
		return errors.Join(err, p.remove(written))
	}
	err := put(written, p.path())
	if err = errors.Join(err, p.remove(written)); err != nil {
		return err
	}
	return syncFolder(p.root, p.folder)
}

func (p place) remove(name string) error {
	if err := p.root.Remove(name); !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

func writeFile(root *os.Root, name string, want file) error {
	file, err := root.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	_, err = file.WriteString(want.text)
	if err == nil {
		err = file.Chmod(want.mode)
	}
	if err == nil {
		err = file.Sync()
	}
	return errors.Join(err, file.Close())
}
