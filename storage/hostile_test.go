package storage

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path"
	"path/filepath"
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"
)

// plants puts something at a path that is not a file of the store.
var plants = map[string]func(dir, at string) error{
	"symlink inside":  func(dir, at string) error { return os.Symlink(filepath.Join(dir, "decoy"), at) },
	"relative link":   func(_, at string) error { return os.Symlink("decoy", at) },
	"symlink outside": func(_, at string) error { return os.Symlink("/etc/passwd", at) },
	"hard link":       func(dir, at string) error { return os.Link(filepath.Join(dir, "decoy"), at) },
	"FIFO":            func(_, at string) error { return unix.Mkfifo(at, 0o600) },
	"folder":          func(_, at string) error { return os.Mkdir(at, 0o700) },
	"socket": func(_, at string) error {
		dir, err := os.Open(filepath.Dir(at)) // its name may be too long for a socket's
		if err != nil {
			return err
		}
		defer dir.Close()
		l, err := net.ListenUnix("unix", &net.UnixAddr{Net: "unix", Name: fmt.Sprintf("/proc/self/fd/%d/%s", dir.Fd(), filepath.Base(at))})
		if err == nil {
			l.SetUnlinkOnClose(false)
			err = l.Close()
		}
		return err
	},
}

func TestH43HostileFiles(t *testing.T) {
	raw, dgst := content(100)
	for kind, plant := range plants {
		for _, name := range []string{
			"blobs/sha256/" + dgst.Encoded(),
			"records/_public/" + dgst.Encoded(),
			"records/quay.io/org/app/_tags/latest",
		} {
			t.Run(kind+" as "+path.Dir(name), func(t *testing.T) {
				dir := t.TempDir()
				d := open(t, dir)
				m, _ := image(t)
				tag := Tag{Current: Validated{m.Digest, anonymous.At, "u"}}
				if err := errors.Join(d.PutManifest(app, m, anonymous), d.PutTag(app, "latest", tag)); err != nil {
					t.Fatal(err)
				}
				store(t, d, app, raw, anonymous)
				at := filepath.Join(dir, name)
				decoys := []string{filepath.Join(dir, "decoy"), filepath.Join(filepath.Dir(at), "decoy")}
				good, err := os.ReadFile(at)
				if err != nil {
					t.Fatal(err)
				}
				for _, decoy := range decoys {
					if err := os.WriteFile(decoy, good, 0o600); err != nil {
						t.Fatal(err)
					}
				}
				d.tags.entries.Purge()
				if err := errors.Join(os.Remove(at), plant(dir, at)); err != nil {
					t.Fatal(err)
				}
				if strings.HasSuffix(name, "latest") {
					if got, err := d.Tag(app, "latest"); !errors.Is(err, fs.ErrNotExist) {
						t.Errorf("%+v, %v", got, err)
					}
				} else {
					wantAbsent(t, d, app, dgst)
				}
				if _, err := os.Lstat(at); err == nil {
					t.Error("it is still there")
				}
				// What is stored anew takes its place, and what it pointed to is as it was.
				store(t, d, app, raw, anonymous)
				wantBlob(t, d, app, raw)
				if err := d.PutTag(app, "latest", tag); err != nil {
					t.Error(err)
				}
				for _, decoy := range decoys {
					if now, err := os.ReadFile(decoy); err != nil || string(now) != string(good) {
						t.Errorf("%s was written to: %v", decoy, err)
					}
				}
			})
		}
	}
}

func TestH43HostileRoots(t *testing.T) {
	for name, spoil := range map[string]func(dir string) error{
		"other-writable": func(dir string) error { return os.Chmod(dir, 0o777) },
		"like /tmp":      func(dir string) error { return os.Chmod(dir, 0o777|os.ModeSticky) },
		"other-writable blobs": func(dir string) error {
			return errors.Join(os.Mkdir(filepath.Join(dir, "blobs"), 0o700), os.Chmod(filepath.Join(dir, "blobs"), 0o702))
		},
		"blobs is a link":   func(dir string) error { return os.Symlink("/etc", filepath.Join(dir, "blobs")) },
		"records is a link": func(dir string) error { return os.Symlink("tmp", filepath.Join(dir, "records")) },
		"tmp is a FIFO":     func(dir string) error { return unix.Mkfifo(filepath.Join(dir, "tmp"), 0o700) },
		"LOCK is a FIFO":    func(dir string) error { return unix.Mkfifo(filepath.Join(dir, "LOCK"), 0o700) },
		"VERSION is a FIFO": func(dir string) error { return unix.Mkfifo(filepath.Join(dir, "VERSION"), 0o700) },
		"LOCK is a hard link": func(dir string) error {
			return os.Link(filepath.Join(filepath.Dir(dir), "shadow"), filepath.Join(dir, "LOCK"))
		},
		"LOCK is a link": func(dir string) error {
			return errors.Join(os.WriteFile(filepath.Join(dir, "notes"), nil, 0o600), os.Symlink("notes", filepath.Join(dir, "LOCK")))
		},
		"a file": func(dir string) error { return errors.Join(os.Remove(dir), os.WriteFile(dir, nil, 0o600)) },
	} {
		t.Run(name, func(t *testing.T) {
			dir := filepath.Join(t.TempDir(), "data")
			shadow := filepath.Join(filepath.Dir(dir), "shadow")
			if err := errors.Join(os.Mkdir(dir, 0o700), os.WriteFile(shadow, []byte("root:x"), 0o600), spoil(dir)); err != nil {
				t.Fatal(err)
			}
			d, err := Open(Config{Dir: dir})
			if err == nil {
				_ = d.Close()
			}
			if err == nil || !strings.Contains(err.Error(), dir) {
				t.Errorf("%v, want an error that names the folder", err)
			}
			if raw, err := os.ReadFile(shadow); err != nil || string(raw) != "root:x" {
				t.Errorf("the file behind the link is now %q, %v", raw, err)
			}
		})
	}
	t.Run("a link that the operator named", func(t *testing.T) {
		dir, link := t.TempDir(), filepath.Join(t.TempDir(), "link")
		if err := errors.Join(os.Chmod(dir, 0o755), os.Symlink(dir, link)); err != nil {
			t.Fatal(err)
		}
		raw, _ := content(10)
		d := open(t, link)
		store(t, d, app, raw, anonymous)
		wantBlob(t, d, app, raw)
	})
}

// A path component that a client chose must never lead out of its folder. Names are checked at the
// edge; this is what stands behind it.
func TestPathsStayInside(t *testing.T) {
	d := open(t, t.TempDir())
	if _, err := d.Tag(app, "../../../../../../../../etc/passwd"); err == nil {
		t.Error("a tag led out of the folder")
	}
	if _, err := d.Blob(app, digest.Digest("sha256:../../../../../../etc/passwd")); err == nil {
		t.Error("a digest led out of the folder")
	}
}
