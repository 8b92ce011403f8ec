package clients

import (
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"net/url"
	"os"
	"slices"
	"strings"
)

// defaultFolder is where containerd looks for a registry that has no folder.
const defaultFolder = "_default"

// Containerd is what is told to containerd, and to all that reads files like its own, in
// DIR/REGISTRY/hosts.toml and the files that this one names (containerd, docs/hosts.md). None of them needs a
// restart.
type Containerd struct {
	Dir        string            // DIR, such as /etc/containerd/certs.d
	Mirror     string            // the URL of the mirror
	Registries map[string]string // by name: the URL of its own server, which is asked when the mirror does not serve
	Others     Others            // of registries that are not named
	Referrers  Referrers
	// Authorization is the value of that header, "" for none: only root may read the files then.
	Authorization string
	// CA is certificates of authorities in PEM, "" for none: containerd trusts them beside the host's own, for
	// the mirror alone.
	CA string
	// Client is a certificate and its key in PEM, "" for none, which containerd shows to the mirror. Only root
	// may read the file with it.
	Client   string
	Existing Existing
	held     bool // until who writes it ends
}

// Others says whether registries that are not named are asked of the mirror too.
type Others bool

// Referrers says whether the mirror is named for referrers too, a word with which containerd before 2.2
// does not read a file at all.
type Referrers bool

// Plan is what Write would do. It refuses what cannot be written at all; where Write would refuse a file
// that is there, the change of that file says so.
func (c Containerd) Plan() ([]Change, error) {
	return c.plan(func(*os.Root) (bool, error) { return false, nil })
}

// Check is what is left to do so that the files are as they should be, by Write or, where the folder is held, by its
// holder. It only reads.
func (c Containerd) Check() ([]Change, error) { return c.plan(isHeld) }

func (c Containerd) plan(held func(*os.Root) (bool, error)) ([]Change, error) {
	if err := c.check(); err != nil {
		return nil, err
	}
	root, err := os.OpenRoot(c.Dir)
	if errors.Is(err, fs.ErrNotExist) {
		todo, err := c.todo(nil) // all is to be written
		return changes(todo), err
	}
	if err != nil {
		return nil, err
	}
	defer root.Close()
	if c.held, err = held(root); err != nil {
		return nil, err
	}
	todo, err := c.todo(root)
	return changes(todo), err
}

// Write names the mirror for each registry, and undoes that for those for which it was named before. If
// a file must not be replaced, nothing is written, and the error names all such files. What a process that runs
// holds, of registries that are not named here, is left to it.
func (c Containerd) Write() ([]Change, error) { return c.write(func(*os.Root) error { return nil }) }

// write calls may before anything is written.
func (c Containerd) write(may func(*os.Root) error) ([]Change, error) {
	if err := c.check(); err != nil {
		return nil, err
	}
	if err := os.MkdirAll(c.Dir, 0o755); err != nil {
		return nil, err
	}
	return locked(c.Dir, func(root *os.Root) ([]Change, error) {
		if err := may(root); err != nil {
			return nil, err
		}
		todo, err := c.todo(root)
		if err != nil {
			return nil, err
		}
		var refused []error
		for _, change := range changes(todo) {
			if change.Act == Refuse {
				refused = append(refused, fmt.Errorf("%s: %s", change.Path, change.Note))
			}
		}
		if refused != nil {
			return nil, fmt.Errorf("nothing is written:\n%w", errors.Join(refused...))
		}
		return carryOut(root, todo)
	})
}

// Undo restores what was there before Write, in dir. What somebody has changed since is left alone, and what a
// process that runs holds.
func Undo(dir string) ([]Change, error) {
	return undo(dir, func(root *os.Root) (func(place) bool, error) { return Containerd{}.own(root) })
}

// undo restores what was there before those of our files that whose tells.
func undo(dir string, whose func(*os.Root) (func(place) bool, error)) ([]Change, error) {
	if _, err := os.Stat(dir); errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	return locked(dir, func(root *os.Root) ([]Change, error) {
		own, err := whose(root)
		if err != nil {
			return nil, err
		}
		names, err := folders(root)
		if err != nil {
			return nil, err
		}
		var todo []task
		for _, name := range names {
			f, err := look(root, name)
			if err != nil {
				return nil, err
			}
			todo = append(todo, task{f, append(f.undo(dir, own), f.leave(dir, own)...)})
		}
		return carryOut(root, todo)
	})
}

// own tells which of our files are not left to somebody else: those that are to stay, to who writes such, and those
// that are held, to their holder, if it runs.
func (c Containerd) own(root *os.Root) (func(place) bool, error) {
	if c.held || root == nil {
		return func(p place) bool { return heldFor(p.text) != "" }, nil
	}
	held, err := isHeld(root)
	return func(p place) bool { return !held || heldFor(p.text) == "" }, err
}

// task is what is to be done in one folder, in this order.
type task struct {
	folder folder
	steps  []step
}

func changes(todo []task) []Change {
	all := []Change{}
	for _, t := range todo {
		for _, s := range t.steps {
			all = append(all, s.Change)
		}
	}
	return all
}

// carryOut goes on with the next folder past what fails, and returns what is done.
func carryOut(root *os.Root, todo []task) ([]Change, error) {
	if err := sweep(root); err != nil {
		return nil, err
	}
	done, failed := []Change{}, []error(nil)
	for _, t := range todo {
		steps, err := t.folder.carryOut(t.steps)
		done, failed = append(done, steps...), append(failed, err)
	}
	return done, errors.Join(failed...)
}

// todo is what is to be done with each registry's files, and with those of ours for others. root is nil
// if there is no folder yet.
func (c Containerd) todo(root *os.Root) ([]task, error) {
	wanted, err := c.wanted(root)
	if err != nil {
		return nil, err
	}
	names := slices.Collect(maps.Keys(wanted))
	if root != nil {
		there, err := folders(root)
		if err != nil {
			return nil, err
		}
		names = append(names, there...)
	}
	own, err := c.own(root)
	if err != nil {
		return nil, err
	}
	slices.Sort(names)
	var todo []task
	for _, name := range slices.Compact(names) {
		f, err := look(root, name)
		if err != nil {
			return nil, err
		}
		var want []file
		if server, ok := wanted[name]; ok {
			want = c.files(server)
		}
		todo = append(todo, task{f, f.plan(c.Dir, want, c.Existing, own)})
	}
	return todo, nil
}

// wanted are the folders in which a file should be, and its server.
func (c Containerd) wanted(root *os.Root) (map[string]string, error) {
	wanted := map[string]string{}
	for registry, server := range c.Registries {
		name := portFolder(registry)
		if name != registry && root != nil {
			// containerd takes the first that exists: a folder of the other form stays in force.
			_, err := root.Lstat(name)
			if errors.Is(err, fs.ErrNotExist) {
				if _, err = root.Lstat(registry); err == nil {
					name = registry
				}
			}
			if err != nil && !errors.Is(err, fs.ErrNotExist) {
				return nil, err
			}
		}
		wanted[name] = server
	}
	if c.Others {
		wanted[defaultFolder] = ""
	}
	return wanted, nil
}

// portFolder is where containerd looks first for a registry whose name has a port.
func portFolder(registry string) string {
	if at := strings.LastIndexByte(registry, ':'); at > 0 {
		return registry[:at] + "_" + registry[at+1:] + "_"
	}
	return registry
}

// mark begins each file of ours, and nobody else's. Text before what is in PEM means nothing there.
const mark = "# Managed by breakwater"

// heldMark begins each that is held; behind it on its line is the mirror.
const heldMark = mark + ", held for "

// heading says whose a file is, and how it goes.
func (c Containerd) heading() string {
	if c.held {
		return heldMark + c.Mirror + "\n# `breakwater setup containerd --hold` restores what was here before, when it ends.\n"
	}
	return mark + ": `breakwater setup containerd --undo` restores what was here before.\n"
}

// heldFor is the mirror for which a file with that text is held, "" if it is to stay, or is not ours.
func heldFor(text string) string {
	rest, _ := strings.CutPrefix(text, heldMark)
	mirror, _, _ := strings.Cut(rest, "\n")
	if rest == text {
		return ""
	}
	return mirror
}

// file is what one file of a folder's should be.
type file struct {
	name, text string
	mode       fs.FileMode
	shown      string // of the text, to whoever asks what would be written
}

// files are those of a registry's folder, each behind those that it names: containerd does not pull at all by one
// that names what is not there.
func (c Containerd) files(server string) (files []file) {
	if c.CA != "" {
		files = append(files, file{name: caFile, text: c.heading() + c.CA, mode: 0o644})
	}
	if c.Client != "" {
		files = append(files, file{name: clientFile, text: c.heading() + c.Client, mode: 0o600})
	}
	hidden := c
	hosts := file{name: hostsFile, text: c.hosts(server), mode: 0o644}
	if c.Authorization != "" {
		hosts.mode, hidden.Authorization = 0o600, "…"
	}
	hosts.shown = hidden.hosts(server)
	return append(files, hosts)
}

// hosts names the mirror, and the registry's own server, if it is known which that is. check has seen to
// it that what Go quotes is what TOML quotes. Capabilities that are not written would be all, push too. A name of
// a file is one in the same folder.
func (c Containerd) hosts(server string) string {
	var text strings.Builder
	text.WriteString(c.heading())
	if server != "" {
		fmt.Fprintf(&text, "server = %q\n", server)
	}
	words := `"pull", "resolve"`
	if c.Referrers {
		words += `, "referrers"`
	}
	fmt.Fprintf(&text, "%s  capabilities = [%s]\n", hostTable(c.Mirror), words)
	if c.CA != "" {
		fmt.Fprintf(&text, "  ca = %q\n", caFile)
	}
	if c.Client != "" {
		fmt.Fprintf(&text, "  client = %q\n", clientFile)
	}
	if c.Authorization != "" {
		fmt.Fprintf(&text, "  [host.%q.header]\n    Authorization = %q\n", c.Mirror, c.Authorization)
	}
	return text.String()
}

func hostTable(mirror string) string { return fmt.Sprintf("\n[host.%q]\n", mirror) }

// check finds mistakes in what the files are made of. It never repeats the secret.
func (c Containerd) check() error {
	u, err := url.Parse(c.Mirror)
	switch {
	case err != nil || !printable(c.Mirror) || u.Host == "" || u.Scheme != "http" && u.Scheme != "https":
		return fmt.Errorf("mirror %q: write its URL, such as http://127.0.0.1:5000", c.Mirror)
	case u.User != nil || u.RawQuery != "" || u.Fragment != "":
		return errors.New("mirror: an account, a query or a fragment has no place in its URL")
	case !printable(c.Authorization):
		return errors.New("authorization: what is not printable ASCII has no place in a header")
	}
	if err := c.checkTLS(u.Scheme); err != nil {
		return err
	}
	for registry, server := range c.Registries {
		if registry == "" || strings.ContainsAny(registry, "/\\") || strings.HasPrefix(registry, ".") || !printable(registry+server) {
			return fmt.Errorf("%q is not the name of a registry", registry)
		}
	}
	return nil
}

func printable(s string) bool {
	return strings.IndexFunc(s, func(r rune) bool { return r < ' ' || r > '~' }) < 0
}
