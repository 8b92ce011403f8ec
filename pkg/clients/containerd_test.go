package clients

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/pelletier/go-toml/v2"
)

// certsD is a folder of registries for one test.
type certsD struct {
	*testing.T
	dir string
}

func newCertsD(t *testing.T) *certsD { return &certsD{t, filepath.Join(t.TempDir(), "certs.d")} }

// put writes a file, and makes its folder.
func (d *certsD) put(name, text string, mode fs.FileMode) {
	d.Helper()
	path := filepath.Join(d.dir, name)
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		d.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		d.Fatal(err)
	}
	if err := os.Chmod(path, mode); err != nil {
		d.Fatal(err)
	}
}

func (d *certsD) containerd() Containerd {
	return Containerd{Dir: d.dir, Mirror: "http://127.0.0.1:5000", Existing: ExistingRefuse,
		Registries: map[string]string{"docker.io": "https://registry-1.docker.io", "quay.io": "https://quay.io"}}
}

// tree is all that is there: type, mode, links, inode, time of change and content by name.
func (d *certsD) tree() map[string]string {
	d.Helper()
	tree := map[string]string{}
	err := filepath.WalkDir(d.dir, func(path string, entry fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := entry.Info()
		if err != nil {
			return err
		}
		stat := info.Sys().(*syscall.Stat_t)
		text := fmt.Sprintf("%v", info.Mode())
		switch info.Mode().Type() {
		case 0:
			raw, err := os.ReadFile(path)
			if err != nil {
				return err
			}
			text += fmt.Sprintf(" inode %d links %d owner %d:%d %v %q", stat.Ino, stat.Nlink, stat.Uid, stat.Gid, info.ModTime(), raw)
		case fs.ModeSymlink:
			target, err := os.Readlink(path)
			if err != nil {
				return err
			}
			text += target
		}
		name, _ := filepath.Rel(d.dir, path)
		tree[name] = text
		return nil
	})
	if err != nil {
		d.Fatal(err)
	}
	return tree
}

// must returns what a call has done, as words: the registry, or another file than its hosts.toml, and the act.
func (d *certsD) must(done []Change, err error) []string {
	d.Helper()
	if err != nil {
		d.Fatal(err)
	}
	return d.words(done)
}

func (d *certsD) words(done []Change) (words []string) {
	d.Helper()
	for _, change := range done {
		name, err := filepath.Rel(d.dir, change.Path)
		if err != nil || !slices.Contains(fileNames, filepath.Base(name)) {
			d.Fatalf("a change of %s", change.Path)
		}
		words = append(words, strings.TrimSuffix(name, "/"+hostsFile)+" "+string(change.Act))
	}
	return words
}

func (d *certsD) same(what string, got, want any) {
	d.Helper()
	if diff := cmp.Diff(want, got); diff != "" {
		d.Errorf("%s (-want +got):\n%s", what, diff)
	}
}

func TestFile(t *testing.T) {
	for _, row := range []struct {
		name   string
		change func(*Containerd)
		server string
		files  int
		mode   fs.FileMode
		want   string
	}{
		{"plain", func(*Containerd) {}, "https://quay.io", 1, 0o644,
			"server = \"https://quay.io\"\n\n[host.\"http://127.0.0.1:5000\"]\n  capabilities = [\"pull\", \"resolve\"]\n"},
		{"of no registry", func(*Containerd) {}, "", 1, 0o644,
			"\n[host.\"http://127.0.0.1:5000\"]\n  capabilities = [\"pull\", \"resolve\"]\n"},
		{"referrers", func(c *Containerd) { c.Referrers = true }, "https://quay.io", 1, 0o644,
			"server = \"https://quay.io\"\n\n[host.\"http://127.0.0.1:5000\"]\n  capabilities = [\"pull\", \"resolve\", \"referrers\"]\n"},
		{"certificates", func(c *Containerd) { c.CA, c.Client = "x", "y" }, "", 3, 0o644,
			"\n[host.\"http://127.0.0.1:5000\"]\n  capabilities = [\"pull\", \"resolve\"]\n  ca = \"breakwater-ca.pem\"\n  client = \"breakwater-client.pem\"\n"},
		{"secret", func(c *Containerd) { c.Authorization = `Basic "a\b"` }, "https://quay.io", 1, 0o600,
			"server = \"https://quay.io\"\n\n[host.\"http://127.0.0.1:5000\"]\n  capabilities = [\"pull\", \"resolve\"]\n" +
				"  [host.\"http://127.0.0.1:5000\".header]\n    Authorization = \"Basic \\\"a\\\\b\\\"\"\n"},
	} {
		t.Run(row.name, func(t *testing.T) {
			c := newCertsD(t).containerd()
			row.change(&c)
			all := c.files(row.server)
			got := all[len(all)-1]
			first, rest, _ := strings.Cut(got.text, "\n")
			if len(all) != row.files || got.name != hostsFile || !strings.HasPrefix(first, mark) || rest != row.want || got.mode != row.mode {
				t.Errorf("of %d: %v %s\nwant of %d: %v %s", len(all), got.mode, got.text, row.files, row.mode, row.want)
			}
			if strings.Contains(got.shown, "Basic") || len(got.shown) < len(row.want)-len(c.Authorization) {
				t.Errorf("shown: %s", got.shown)
			}
			var read struct {
				Server string
				Host   map[string]struct {
					Capabilities []string
					Header       map[string]string
				}
			}
			if err := toml.Unmarshal([]byte(got.text), &read); err != nil {
				t.Fatal(err)
			}
			if host := read.Host[c.Mirror]; read.Server != row.server || host.Header["Authorization"] != c.Authorization || len(host.Capabilities) < 2 {
				t.Errorf("read as %+v", read)
			}
		})
	}
}

func TestWriteAndUndo(t *testing.T) {
	d := newCertsD(t)
	c := d.containerd()
	d.same("undo of nothing", d.must(Undo(d.dir)), []string(nil))
	plan := d.must(c.Plan())
	if _, err := os.Stat(d.dir); err == nil {
		t.Error("a plan has made the folder")
	}
	d.same("plan", plan, []string{"docker.io write", "quay.io write"})
	d.same("write", d.must(c.Write()), plan)
	written := d.tree()
	if !strings.HasPrefix(written["quay.io/hosts.toml"], "-rw-r--r--") || !strings.HasPrefix(written["quay.io"], "drwxr-xr-x") {
		t.Errorf("modes: %v", written)
	}
	d.same("write again", d.must(c.Write()), []string{"docker.io unchanged", "quay.io unchanged"})
	d.same("what is right", d.tree(), written)
	if err := os.Chmod(filepath.Join(d.dir, "quay.io/hosts.toml"), 0o666); err != nil {
		t.Fatal(err)
	}
	d.same("write of what others may write", d.must(c.Write()), []string{"docker.io unchanged", "quay.io update"})
	c.Authorization, c.Others = "Basic c2VjcmV0", true
	delete(c.Registries, "docker.io")
	changes, err := c.Plan()
	d.same("plan of a change", d.must(changes, err), []string{"_default write", "docker.io remove", "quay.io update"})
	if strings.Contains(fmt.Sprint(changes), "c2VjcmV0") {
		t.Errorf("the plan tells the secret: %v", changes)
	}
	d.same("write of a change", d.must(c.Write()), []string{"_default write", "docker.io remove", "quay.io update"})
	if tree := d.tree(); !strings.HasPrefix(tree["quay.io/hosts.toml"], "-rw-------") || len(tree) != 5 {
		t.Errorf("with a secret: %v", tree)
	}
	d.same("undo", d.must(Undo(d.dir)), []string{"_default remove", "quay.io remove"})
	if tree := d.tree(); len(tree) != 1 {
		t.Errorf("left: %v", tree)
	}
}

func TestForeign(t *testing.T) {
	for _, row := range []struct {
		name     string
		make     func(d *certsD)
		existing Existing
		want     string // of quay.io: an act
		said     string // of the error or the note
	}{
		{"refused", func(d *certsD) { d.put("quay.io/hosts.toml", "server = \"x\"\n", 0o640) }, ExistingRefuse, "refuse", "--existing replace"},
		{"kept", func(d *certsD) { d.put("quay.io/hosts.toml", "server = \"x\"\n", 0o640) }, ExistingKeep, "keep", "is not breakwater's"},
		{"replaced", func(d *certsD) { d.put("quay.io/hosts.toml", "server = \"x\"\n", 0o640) }, ExistingReplace, "replace", ""},
		{"empty", func(d *certsD) { d.put("quay.io/hosts.toml", "", 0o640) }, ExistingReplace, "replace", ""},
		{"symlink", func(d *certsD) {
			d.put("elsewhere.toml", mark, 0o644)
			d.put("quay.io/x", "", 0o644)
			d.link("../elsewhere.toml", "quay.io/hosts.toml")
		}, ExistingReplace, "refuse", "is not a file"},
		{"folder of that name", func(d *certsD) { d.put("quay.io/hosts.toml/x", "", 0o644) }, ExistingReplace, "refuse", "is not a file"},
		{"pipe", func(d *certsD) {
			d.put("quay.io/x", "", 0o644)
			if err := syscall.Mkfifo(filepath.Join(d.dir, "quay.io/hosts.toml"), 0o644); err != nil {
				d.Fatal(err)
			}
		}, ExistingReplace, "refuse", "is not a file"},
		{"registry is a file", func(d *certsD) { d.put("quay.io", "", 0o644) }, ExistingReplace, "refuse", "folder is not one"},
		{"registry is a symlink", func(d *certsD) {
			d.put("real/hosts.toml", "", 0o644)
			d.link("real", "quay.io")
		}, ExistingReplace, "refuse", "folder is not one"},
		{"registry is a symlink, kept", func(d *certsD) {
			d.put("real/hosts.toml", "", 0o644)
			d.link("real", "quay.io")
		}, ExistingKeep, "keep", "folder is not one"},
		{"replaced before", func(d *certsD) {
			d.put("quay.io/hosts.toml", "two", 0o640)
			d.put("quay.io/"+hostsFile+keptSuffix, "one", 0o640)
		}, ExistingReplace, "refuse", "move away one"},
		{"certificates", func(d *certsD) { d.put("quay.io/ca.crt", "", 0o640) }, ExistingRefuse, "write", "no longer reads ca.crt"},
		{"ours in the past", func(d *certsD) { d.put("quay.io/hosts.toml", mark+", an older one\n", 0o640) }, ExistingRefuse, "update", ""},
	} {
		t.Run(row.name, func(t *testing.T) {
			d := newCertsD(t)
			row.make(d)
			before := d.tree()
			c := d.containerd()
			c.Existing = row.existing
			plan, err := c.Plan()
			d.must(plan, err)
			change := plan[1]
			if filepath.Base(filepath.Dir(change.Path)) != "quay.io" || string(change.Act) != row.want || !strings.Contains(change.Note, row.said) {
				t.Fatalf("plan: %+v, want %s, with %q", change, row.want, row.said)
			}
			d.same("after the plan", d.tree(), before)
			done, err := c.Write()
			if row.want == "refuse" {
				if err == nil || !strings.Contains(err.Error(), change.Path) || !strings.Contains(err.Error(), row.said) {
					t.Errorf("write: %v", err)
				}
				d.same("after a refusal", d.tree(), before)
				return
			}
			d.must(done, err)
			if written := d.tree(); written["docker.io/hosts.toml"] == "" || strings.Contains(written["quay.io/hosts.toml"], mark) == (row.want == "keep") {
				t.Errorf("written: %v", written)
			}
			d.must(c.Write())
			d.must(Undo(d.dir))
			if row.want != "update" {
				d.same("after undo", d.tree(), before)
			}
		})
	}
}

func (d *certsD) link(target, name string) {
	d.Helper()
	if err := os.Symlink(target, filepath.Join(d.dir, name)); err != nil {
		d.Fatal(err)
	}
}

// TestRegistriesWithPorts: containerd takes the first of two folders that exists.
func TestRegistriesWithPorts(t *testing.T) {
	d := newCertsD(t)
	c := d.containerd()
	c.Registries = map[string]string{"a.test:5000": "https://a.test:5000", "b.test:5000": "https://b.test:5000", "[::1]:5000": "https://[::1]:5000"}
	c.Existing = ExistingReplace
	d.put("b.test:5000/hosts.toml", "mine", 0o644)
	before := d.tree()
	d.same("write", d.must(c.Write()), []string{"[::1]_5000_ write", "a.test_5000_ write", "b.test:5000 replace"})
	d.same("again", d.must(c.Write()), []string{"[::1]_5000_ unchanged", "a.test_5000_ unchanged", "b.test:5000 unchanged"})
	d.put("b.test_5000_/hosts.toml", "newer", 0o644)
	d.same("another", d.must(c.Write()), []string{"[::1]_5000_ unchanged", "a.test_5000_ unchanged", "b.test:5000 restore", "b.test_5000_ replace"})
	d.must(Undo(d.dir))
	if err := os.RemoveAll(filepath.Join(d.dir, "b.test_5000_")); err != nil {
		t.Fatal(err)
	}
	d.same("after undo", d.tree(), before)
}

// TestChangedAfterwards: what somebody does to our files is theirs.
func TestChangedAfterwards(t *testing.T) {
	for _, replaced := range []string{"", "newer"} {
		d := newCertsD(t)
		d.put("quay.io/hosts.toml", "older", 0o600)
		c := d.containerd()
		c.Existing = ExistingReplace
		d.must(c.Write())
		if err := os.Remove(filepath.Join(d.dir, "quay.io/hosts.toml")); err != nil {
			t.Fatal(err)
		}
		if replaced != "" {
			d.put("quay.io/hosts.toml", replaced, 0o644)
		}
		nothing := c
		nothing.Registries = nil
		d.same("plan of nothing", d.must(nothing.Plan()), []string{"docker.io remove"})
		before := d.tree()
		delete(before, "docker.io")
		delete(before, "docker.io/hosts.toml")
		done, err := Undo(d.dir)
		d.same("undo", d.must(done, err), []string{"docker.io remove", "quay.io keep"})
		if !strings.Contains(done[1].Note, hostsFile+keptSuffix) {
			t.Errorf("note: %q", done[1].Note)
		}
		d.same("after undo", d.tree(), before)
	}
}

// TestNeverWithout looks all the time whether the file is there, while it is replaced and restored.
func TestNeverWithout(t *testing.T) {
	d := newCertsD(t)
	d.put("quay.io/hosts.toml", "mine", 0o640)
	c := d.containerd()
	c.Existing = ExistingReplace
	stop := make(chan struct{})
	var looking sync.WaitGroup
	looking.Go(func() {
		for {
			select {
			case <-stop:
				return
			default:
				if text, err := os.ReadFile(filepath.Join(d.dir, "quay.io/hosts.toml")); err != nil || len(text) == 0 {
					t.Errorf("%q, %v", text, err)
					return
				}
			}
		}
	})
	for range 30 {
		d.must(c.Write())
		d.must(Undo(d.dir))
	}
	close(stop)
	looking.Wait()
}

// TestKilled builds what a process leaves that is killed at each step, and wants the next call to end well.
func TestKilled(t *testing.T) {
	const foreign = "server = \"https://mine\"\n"
	c := newCertsD(t).containerd()
	ours := c.hosts("https://quay.io")
	link := func(d *certsD, from, to string) {
		if err := os.Link(filepath.Join(d.dir, from), filepath.Join(d.dir, to)); err != nil {
			d.Fatal(err)
		}
	}
	for _, row := range []struct {
		name   string
		left   func(d *certsD)
		before string // what was in quay.io/hosts.toml at first, "" for no file
	}{
		{"the folder is made", func(d *certsD) { d.put("quay.io"+newFolder+"/x", "", 0o644) }, ""},
		{"the folder's file is half written", func(d *certsD) { d.put("quay.io"+newFolder+"/hosts.toml", ours[:9], 0o600) }, ""},
		{"the folder is in place", func(d *certsD) { d.put("quay.io/hosts.toml", ours, 0o644) }, ""},
		{"a file is half written", func(d *certsD) {
			d.put("quay.io/hosts.toml", foreign, 0o640)
			d.put("quay.io/"+hostsFile+newSuffix, ours[:9], 0o600)
		}, foreign},
		{"the foreign one is put aside", func(d *certsD) {
			d.put("quay.io/hosts.toml", foreign, 0o640)
			d.put("quay.io/"+hostsFile+newSuffix, ours, 0o644)
			link(d, "quay.io/hosts.toml", "quay.io/"+hostsFile+keptSuffix)
		}, foreign},
		{"the foreign one is put aside, swept", func(d *certsD) {
			d.put("quay.io/hosts.toml", foreign, 0o640)
			link(d, "quay.io/hosts.toml", "quay.io/"+hostsFile+keptSuffix)
		}, foreign},
		{"it is replaced", func(d *certsD) {
			d.put("quay.io/"+hostsFile+keptSuffix, foreign, 0o640)
			d.put("quay.io/hosts.toml", ours, 0o644)
		}, foreign},
		{"a file is in place under both names", func(d *certsD) {
			d.put("quay.io/"+hostsFile+newSuffix, ours, 0o644)
			link(d, "quay.io/"+hostsFile+newSuffix, "quay.io/hosts.toml")
		}, ""},
		{"ours is removed, and its folder is not", func(d *certsD) {
			if err := os.MkdirAll(filepath.Join(d.dir, "quay.io"), 0o755); err != nil {
				d.Fatal(err)
			}
		}, ""},
	} {
		t.Run(row.name, func(t *testing.T) {
			for _, next := range []string{"undo", "write"} {
				d := newCertsD(t)
				row.left(d)
				c := d.containerd()
				c.Existing = ExistingReplace
				if next == "write" {
					d.must(c.Write())
					tree := d.tree()
					if text, err := os.ReadFile(filepath.Join(d.dir, "quay.io/hosts.toml")); err != nil || string(text) != ours {
						t.Errorf("written: %q, %v", text, err)
					}
					want := 5 // the folder, two folders in it, and two files
					if row.before != "" {
						want++
					}
					if len(tree) != want || !strings.Contains(tree["quay.io/hosts.toml"], "links 1 ") {
						t.Errorf("written: %v", tree)
					}
				}
				d.must(Undo(d.dir))
				tree := d.tree()
				switch info, err := os.Stat(filepath.Join(d.dir, "quay.io/hosts.toml")); {
				case row.before == "" && (len(tree) > 2 || len(tree) == 2 && tree["quay.io"] == ""):
					t.Errorf("after %s: %v", next, tree)
				case row.before != "" && (err != nil || len(tree) != 3 || info.Mode() != 0o640 || !strings.Contains(tree["quay.io/hosts.toml"], "links 1 ") ||
					!strings.HasSuffix(tree["quay.io/hosts.toml"], fmt.Sprintf("%q", foreign))):
					t.Errorf("after %s: %v", next, tree)
				}
			}
		})
	}
}

// TestUnwantedNames: what the files are made of may not break out of them.
func TestUnwantedNames(t *testing.T) {
	for name, change := range map[string]func(*Containerd){
		"no scheme":         func(c *Containerd) { c.Mirror = "127.0.0.1:5000" },
		"another scheme":    func(c *Containerd) { c.Mirror = "unix:///x" },
		"no host":           func(c *Containerd) { c.Mirror = "http:///x" },
		"account":           func(c *Containerd) { c.Mirror = "http://a:secret@x" },
		"query":             func(c *Containerd) { c.Mirror = "http://x?y" },
		"control character": func(c *Containerd) { c.Mirror = "http://x/\u0085" },
		"line end":          func(c *Containerd) { c.Authorization = "secret\nx" },
		"way up":            func(c *Containerd) { c.Registries = map[string]string{"..": "https://x"} },
		"way down":          func(c *Containerd) { c.Registries = map[string]string{"a/b": "https://x"} },
		"server":            func(c *Containerd) { c.Registries = map[string]string{"a": "https://x\n"} },
	} {
		t.Run(name, func(t *testing.T) {
			d := newCertsD(t)
			c := d.containerd()
			change(&c)
			_, err := c.Write()
			if err == nil || strings.Contains(err.Error(), "secret") {
				t.Errorf("write: %v", err)
			}
			if _, err := c.Plan(); err == nil {
				t.Error("planned")
			}
			if _, err := os.Stat(d.dir); err == nil {
				t.Error("something is written")
			}
		})
	}
}

// TestUndoGoesOn: a file that somebody removes at the same moment, and one that cannot be restored, keep nobody from
// having the others back; only the latter is an error.
func TestUndoGoesOn(t *testing.T) {
	d := newCertsD(t)
	c := d.containerd()
	c.Registries = map[string]string{}
	for _, name := range []string{"a.test", "b.test", "c.test", "d.test"} {
		d.put(name+"/hosts.toml", "mine", 0o644)
		c.Registries[name] = "https://" + name
	}
	c.Existing = ExistingReplace
	if _, err := c.Write(); err != nil {
		t.Fatal(err)
	}
	root, err := os.OpenRoot(d.dir)
	if err != nil {
		t.Fatal(err)
	}
	defer root.Close()
	var todo []task
	for _, name := range []string{"a.test", "b.test", "c.test", "d.test"} {
		f, err := look(root, name)
		if err != nil {
			t.Fatal(err)
		}
		todo = append(todo, task{f, f.undo("", func(place) bool { return true })})
	}
	if err := os.RemoveAll(filepath.Join(d.dir, "a.test")); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(os.Remove(filepath.Join(d.dir, "c.test/hosts.toml")), os.Mkdir(filepath.Join(d.dir, "c.test/hosts.toml"), 0o755)); err != nil {
		t.Fatal(err)
	}
	done, err := carryOut(root, todo)
	if err == nil || !strings.Contains(err.Error(), "c.test") || strings.Contains(err.Error(), "a.test") || len(done) != 3 {
		t.Errorf("%v, %+v", err, done)
	}
	for _, name := range []string{"b.test", "d.test"} {
		if text, err := os.ReadFile(filepath.Join(d.dir, name, "hosts.toml")); string(text) != "mine" {
			t.Errorf("%s: %q, %v", name, text, err)
		}
	}
}
