package clients

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
)

// newFolder ends the name of a folder that is not finished: only whole does it get the name that containerd reads,
// so that a folder without our files was there before us.
const newFolder = ".breakwater-new"

// folder is the folder of a registry, as it was looked at.
type folder struct {
	root   *os.Root
	name   string
	exists bool
	odd    string   // what is there in its place that is not a folder
	places []place  // of all files that may be ours
	certs  []string // certificates, which containerd reads only where there is no hosts.toml
}

// look sees what is there. It follows no link, and opens nothing that may be a device or a pipe.
func look(root *os.Root, name string) (folder, error) {
	f := folder{root: root, name: name}
	for _, file := range fileNames {
		f.places = append(f.places, place{root: root, folder: name, name: file})
	}
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
	for i := range f.places {
		if err := f.places[i].look(); err != nil {
			return f, err
		}
	}
	f.certs = f.certificates()
	return f, nil
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

// step is a change of one file, and what it takes to carry it out.
type step struct {
	Change
	place place
	file  file
}

// plan is what is done so that the folder has the wanted files, in their order, and behind that no others of ours.
// A file that has to be kept keeps the folder as it is: a part of ours is of no use, and names what is not ours.
// own tells which others are the writer's.
func (f folder) plan(dir string, want []file, existing Existing, own func(place) bool) (steps []step) {
	for _, w := range want {
		p := f.places[slices.Index(fileNames, w.name)]
		s := step{Change{Path: filepath.Join(dir, f.name, w.name)}, p, w}
		s.Act, s.Note = p.plan(w, existing)
		switch {
		case f.odd != "":
			s.Path = filepath.Join(dir, f.name, hostsFile)
			s.Act, s.Note = foreign(f.odd, existing)
			return []step{s}
		case s.Act == Write && w.name == hostsFile && f.certs != nil:
			s.Note = "beside it containerd no longer reads " + strings.Join(f.certs, ", ") + ": if the registry itself needs that, write a hosts.toml of your own with ca or client, and use --existing keep"
		}
		if s.Act == Write || s.Act == Update || s.Act == Replace {
			s.Content = w.shown
		}
		steps = append(steps, s)
	}
	isKept := func(s step) bool { return s.Act == Keep }
	if slices.ContainsFunc(steps, isKept) {
		return slices.DeleteFunc(steps, func(s step) bool { return !isKept(s) })
	}
	return append(steps, f.undo(dir, func(p place) bool {
		return p.ours && own(p) && !slices.ContainsFunc(want, func(w file) bool { return w.name == p.name })
	})...)
}

// undo is what is done to have what was there before, of those files: each before those that it names.
func (f folder) undo(dir string, of func(place) bool) (steps []step) {
	for _, p := range slices.Backward(f.places) {
		if change, ok := p.undo(); ok && of(p) {
			change.Path = filepath.Join(dir, f.name, p.name)
			steps = append(steps, step{change, p, file{}})
		}
	}
	return steps
}

// leave tells of our files that are not the caller's.
func (f folder) leave(dir string, own func(place) bool) (steps []step) {
	for _, p := range f.places {
		if !p.ours || own(p) {
			continue
		}
		note := toStay
		if mirror := heldFor(p.text); mirror != "" {
			note = "is held for the mirror " + mirror + " by a `breakwater setup containerd --hold`, which takes it away when it ends"
		}
		steps = append(steps, step{Change{Path: filepath.Join(dir, f.name, p.name), Act: Keep, Note: note}, p, file{}})
	}
	return steps
}

// carryOut does it, and returns what is done: after one that fails, none that builds on it.
func (f folder) carryOut(steps []step) (done []Change, err error) {
	if !f.exists && len(steps) > 0 && steps[0].Act == Write {
		err = f.write(steps)
		if err != nil {
			return nil, fmt.Errorf("%s %s: %w", Write, filepath.Dir(steps[0].Path), err)
		}
		return changes([]task{{f, steps}}), nil
	}
	for _, s := range steps {
		err := s.place.carryOut(s.Act, s.file)
		if errors.Is(err, fs.ErrNotExist) && (s.Act == Remove || s.Act == Restore) {
			err = nil // somebody was sooner
		}
		if err != nil {
			return done, fmt.Errorf("%s %s: %w", s.Act, s.Path, err)
		}
		done = append(done, s.Change)
	}
	return done, nil
}

// write makes the folder with the files in it.
func (f folder) write(steps []step) error {
	unfinished := f.name + newFolder
	err := f.root.Mkdir(unfinished, 0o700)
	if err == nil {
		err = f.root.Chmod(unfinished, 0o755) // whatever the umask says
	}
	for _, s := range steps {
		if err == nil {
			err = writeFile(f.root, path.Join(unfinished, s.file.name), s.file)
		}
	}
	if err == nil {
		err = syncFolder(f.root, unfinished)
	}
	if err == nil {
		err = f.root.Rename(unfinished, f.name)
	}
	if err != nil {
		return errors.Join(err, f.root.RemoveAll(unfinished))
	}
	return syncFolder(f.root, ".")
}

func syncFolder(root *os.Root, name string) error {
	dir, err := root.Open(name)
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
		if strings.HasSuffix(entry.Name(), newFolder) {
			err = errors.Join(err, root.RemoveAll(entry.Name()))
			continue
		}
		for _, name := range fileNames {
			unfinished := path.Join(entry.Name(), name+newSuffix)
			if info, lerr := root.Lstat(unfinished); lerr == nil && info.Mode().IsRegular() {
				err = errors.Join(err, root.Remove(unfinished))
			}
		}
	}
	return err
}
