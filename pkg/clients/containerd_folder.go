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
	hostsFile  = "hosts.toml"
	backupFile = hostsFile + ".before-breakwater"
	// newFile is one that is not finished.
	newFile = hostsFile + ".breakwater-new"
	// newFolder ends the name of a folder that is not finished: only whole does it get the name that
	// containerd reads, so that a folder without our file was there before us.
	newFolder = ".breakwater-new"
	// maxHosts is far above what anybody writes into one.
	maxHosts = 1 << 20
)

// folder is the folder of a registry, as it was looked at.
type folder struct {
	root   *os.Root
	name   string
	exists bool
	odd    string      // what is there in its place that is not a folder
	hosts  fs.FileInfo // nil if there is none
	backup fs.FileInfo // nil if there is none
	ours   bool        // hosts is
	text   string      // of hosts, if it is ours
	certs  []string    // certificates, which containerd reads only where there is no hosts.toml
}

// look sees what is there. It follows no link, and opens nothing that may be a device or a pipe.
func look(root *os.Root, name string) (folder, error) {
	f := folder{root: root, name: name}
	if root == nil {
		return f, nil
	}
	info, err := root.Lstat(name)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return f, nil
	case err != nil:
		return f, err
	case !info.IsDir():
		f.odd = fmt.Sprintf("the registry's folder is not one (%s)", info.Mode().Type())
		return f, nil
	}
	f.exists = true
	for file, info := range map[string]*fs.FileInfo{hostsFile: &f.hosts, backupFile: &f.backup} {
		found, err := root.Lstat(path.Join(name, file))
		if err == nil {
			*info = found
		} else if !errors.Is(err, fs.ErrNotExist) {
			return f, err
		}
	}
	if f.hosts != nil && f.hosts.Mode().IsRegular() {
		// One that we may not read is not ours.
		if text, err := f.read(); err == nil && strings.HasPrefix(text, mark) {
			f.ours, f.text = true, text
		}
	}
	f.certs = f.certificates()
	return f, nil
}

func (f folder) read() (string, error) {
	file, err := f.root.OpenFile(path.Join(f.name, hostsFile), os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if err != nil {
		return "", err
	}
	defer file.Close()
	text, err := io.ReadAll(io.LimitReader(file, maxHosts))
	return string(text), err
}

// certificates are only told of: a folder that we may not read has none.
func (f folder) certificates() (names []string) {
	entries, _ := fs.ReadDir(f.root.FS(), f.name)
	for _, entry := range entries {
		if ext := path.Ext(entry.Name()); ext == ".crt" || ext == ".cert" {
			names = append(names, entry.Name())
		}
	}
	return names
}

// interrupted reports whether the backup is still what is in force: a replacement was not finished.
func (f folder) interrupted() bool {
	return f.hosts != nil && f.backup != nil && os.SameFile(f.hosts, f.backup)
}

// plan is what is done so that the file is as it should be.
func (f folder) plan(want file, existing Existing) (act Act, note string) {
	switch {
	case f.odd != "":
		return f.foreign(f.odd, existing)
	case f.hosts == nil && f.certs != nil:
		return Write, "beside it containerd no longer reads " + strings.Join(f.certs, ", ") + ": if the registry itself needs that, write a hosts.toml of your own with ca or client, and use --existing keep"
	case f.hosts == nil:
		return Write, ""
	case f.ours && f.text == want.text && f.hosts.Mode().Perm() == want.mode:
		return Unchanged, ""
	case f.ours:
		return Update, ""
	case !f.hosts.Mode().IsRegular():
		return f.foreign(fmt.Sprintf("is not a file (%s)", f.hosts.Mode().Type()), existing)
	case f.backup != nil && !f.interrupted():
		return f.foreign("is not breakwater's, and "+backupFile+" beside it is from an earlier replacement; move away one of the two", existing)
	case existing == ExistingReplace:
		return Replace, ""
	}
	return f.foreign("is not breakwater's; "+
		"--existing replace puts it aside until --undo, --existing keep leaves it and writes the others", existing)
}

// foreign is what happens to what must not be replaced.
func (f folder) foreign(why string, existing Existing) (Act, string) {
	if existing == ExistingKeep {
		why, _, _ = strings.Cut(why, "; ")
		return Keep, why
	}
	return Refuse, why
}

// undo is what is done to have what was there before, if anything is.
func (f folder) undo() (change Change, ok bool) {
	kept := f.backup != nil && f.backup.Mode().IsRegular()
	switch {
	case f.ours && kept || f.interrupted() && kept:
		return Change{Act: Restore}, true
	case f.ours:
		return Change{Act: Remove}, true
	case kept && f.hosts == nil:
		return Change{Act: Keep, Note: "was taken away since breakwater wrote it; what was there before that is " + backupFile}, true
	case kept:
		return Change{Act: Keep, Note: "was changed since breakwater wrote it; what was there before that is " + backupFile}, true
	}
	return Change{}, false
}

// carryOut does it. At no moment is there no file where one was and one will be.
func (f folder) carryOut(act Act, want file) error {
	hosts, backup := path.Join(f.name, hostsFile), path.Join(f.name, backupFile)
	switch act {
	case Write:
		if !f.exists {
			return f.writeFolder(want)
		}
		return f.write(want, f.root.Link) // which takes no file's place
	case Update:
		return f.write(want, f.root.Rename)
	case Replace:
		return f.write(want, func(written, hosts string) error {
			if f.backup == nil {
				if err := f.root.Link(hosts, backup); err != nil {
					return err
				}
			}
			return f.root.Rename(written, hosts)
		})
	case Restore:
		if !f.ours { // rename does nothing with two names of one file
			return f.root.Remove(backup)
		}
		if err := f.root.Rename(backup, hosts); err != nil {
			return err
		}
		return f.sync(f.name)
	case Remove:
		if err := f.root.Remove(hosts); err != nil {
			return err
		}
		_ = f.root.Remove(f.name) // which fails if somebody has something in it
		return f.sync(".")
	}
	return nil
}

// write writes the file, and puts it in its place.
func (f folder) write(want file, place func(written, hosts string) error) error {
	written := path.Join(f.name, newFile)
	if err := f.writeFile(written, want); err != nil {
		return errors.Join(err, f.remove(written))
	}
	err := place(written, path.Join(f.name, hostsFile))
	if err = errors.Join(err, f.remove(written)); err != nil {
		return err
	}
	return f.sync(f.name)
}

// writeFolder makes the folder with the file in it.
func (f folder) writeFolder(want file) error {
	folder := f.name + newFolder
	err := f.root.Mkdir(folder, 0o700)
	if err == nil {
		err = f.root.Chmod(folder, 0o755) // whatever the umask says
	}
	if err == nil {
		err = f.writeFile(path.Join(folder, hostsFile), want)
	}
	if err == nil {
		err = f.sync(folder)
	}
	if err == nil {
		err = f.root.Rename(folder, f.name)
	}
	if err != nil {
		return errors.Join(err, f.root.RemoveAll(folder))
	}
	return f.sync(".")
}

func (f folder) writeFile(name string, want file) error {
	file, err := f.root.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
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

func (f folder) remove(name string) error {
	if err := f.root.Remove(name); !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

func (f folder) sync(name string) error {
	dir, err := f.root.Open(name)
	if err != nil {
		return err
	}
	return errors.Join(dir.Sync(), dir.Close())
}

// folders are the names in root that may be registries' folders, sorted.
func folders(root *os.Root) (names []string, err error) {
	entries, err := fs.ReadDir(root.FS(), ".")
	for _, entry := range entries {
		if !strings.HasSuffix(entry.Name(), newFolder) {
			names = append(names, entry.Name())
		}
	}
	return names, err
}

// sweep removes what a process that was killed had not finished.
func sweep(root *os.Root) error {
	entries, err := fs.ReadDir(root.FS(), ".")
	for _, entry := range entries {
		if !entry.IsDir() {
			continue
		}
		name := entry.Name()
		if strings.HasSuffix(name, newFolder) {
			err = errors.Join(err, root.RemoveAll(name))
			continue
		}
		unfinished := path.Join(name, newFile)
		if info, lerr := root.Lstat(unfinished); lerr == nil && info.Mode().IsRegular() {
			err = errors.Join(err, root.Remove(unfinished))
		}
	}
	return err
}
