package storage

import (
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
)

// asRoot skips a test that gives files away. In CI nothing may be skipped.
func asRoot(t *testing.T) {
	t.Helper()
	if os.Geteuid() == 0 {
		return
	}
	if os.Getenv("CI") == "true" {
		t.Fatal("not root")
	}
	t.Skip("not root: only root gives files away")
}

// owners are the modes and owners in a folder, by name.
func owners(t *testing.T, dir string) map[string]string {
	t.Helper()
	all := map[string]string{}
	err := filepath.WalkDir(dir, func(path string, entry fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := entry.Info()
		if err != nil {
			return err
		}
		name, _ := filepath.Rel(dir, path)
		all[name] = info.Mode().String() + " " + ownerOf(info).String()
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return all
}

func TestGive(t *testing.T) {
	asRoot(t)
	const mirror, other = 65532, 65531
	to := Owner{mirror, mirror}
	mkdir := func(t *testing.T, path string, mode fs.FileMode) {
		if err := os.MkdirAll(path, 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.Chmod(path, mode); err != nil {
			t.Fatal(err)
		}
	}
	store := func(t *testing.T, dir string, owner int) {
		mkdir(t, filepath.Join(dir, "blobs", "sha256"), 0o700)
		if err := os.WriteFile(filepath.Join(dir, "blobs", "sha256", "x"), nil, 0o400); err != nil {
			t.Fatal(err)
		}
		if err := os.Symlink("/etc/hostname", filepath.Join(dir, "link")); err != nil {
			t.Fatal(err)
		}
		for _, name := range []string{".", "blobs", "blobs/sha256", "blobs/sha256/x", "link"} {
			if err := os.Lchown(filepath.Join(dir, name), owner, owner); err != nil {
				t.Fatal(err)
			}
		}
	}
	const mine = "drwx------ 65532:65532"
	for _, row := range []struct {
		name   string
		make   func(t *testing.T, dir string)
		giving Giving
		given  bool
		err    string // "" is none
		want   map[string]string
	}{
		{"missing", func(*testing.T, string) {}, GiveEmpty, true, "", map[string]string{".": mine}},
		{"kubelet's", func(t *testing.T, dir string) { mkdir(t, dir, 0o755) }, GiveEmpty, true, "", map[string]string{".": mine}},
		{"root of a disk", func(t *testing.T, dir string) { mkdir(t, filepath.Join(dir, lostAndFound), 0o700) }, GiveEmpty, true, "",
			map[string]string{".": mine, lostAndFound: "drwx------ 0:0"}},
		{"another's, empty", func(t *testing.T, dir string) {
			mkdir(t, dir, 0o750)
			_ = os.Chown(dir, other, other)
		}, GiveEmpty, true, "", map[string]string{".": mine}},
		{"of another group", func(t *testing.T, dir string) {
			mkdir(t, filepath.Join(dir, "blobs"), 0o700)
			_ = os.Chown(dir, mirror, 0)
		}, GiveEmpty, true, "", map[string]string{".": mine, "blobs": "drwx------ 0:0"}},
		{"given before", func(t *testing.T, dir string) { store(t, dir, mirror) }, GiveAll, false, "", map[string]string{
			".": mine, "blobs": mine, "blobs/sha256": mine, "blobs/sha256/x": "-r-------- 65532:65532", "link": "Lrwxrwxrwx 65532:65532"}},
		{"a store", func(t *testing.T, dir string) { store(t, dir, 0) }, GiveEmpty, false, "--recursive", nil},
		{"a store, all of it", func(t *testing.T, dir string) { store(t, dir, 0) }, GiveAll, true, "", map[string]string{
			".": mine, "blobs": mine, "blobs/sha256": mine, "blobs/sha256/x": "-r-------- 65532:65532", "link": "Lrwxrwxrwx 65532:65532"}},
		{"a store, the rest of it", func(t *testing.T, dir string) {
			store(t, dir, 0)
			_ = os.Lchown(filepath.Join(dir, "blobs", "sha256", "x"), mirror, mirror)
			_ = os.Lchown(filepath.Join(dir, "blobs", "sha256"), mirror, mirror)
		}, GiveAll, true, "", map[string]string{
			".": mine, "blobs": mine, "blobs/sha256": mine, "blobs/sha256/x": "-r-------- 65532:65532", "link": "Lrwxrwxrwx 65532:65532"}},
		{"a hard link to what is root's", func(t *testing.T, dir string) {
			store(t, dir, other)
			_ = os.Lchown(filepath.Join(dir, "blobs", "sha256", "x"), 0, 0)
		}, GiveAll, false, "belongs to 0:0", nil},
		{"a file", func(t *testing.T, dir string) {
			if err := os.WriteFile(dir, nil, 0o600); err != nil {
				t.Fatal(err)
			}
		}, GiveAll, false, "is not a folder", nil},
	} {
		t.Run(row.name, func(t *testing.T) {
			dir := filepath.Join(t.TempDir(), "new", "data")
			mkdir(t, filepath.Dir(dir), 0o700)
			row.make(t, dir)
			var before map[string]string
			if _, err := os.Lstat(dir); err == nil {
				before = owners(t, dir)
			}
			target := statOf(t, "/etc/hostname")
			given, err := Give(dir, to, row.giving)
			if given != row.given || (err == nil) != (row.err == "") || err != nil && !strings.Contains(err.Error(), row.err) {
				t.Fatalf("given %v, %v; want %v, %q", given, err, row.given, row.err)
			}
			want := row.want
			if row.err != "" {
				want = before // nothing is changed
			}
			got := owners(t, dir)
			for name := range want {
				if got[name] != want[name] {
					t.Errorf("%s: %s, want %s", name, got[name], want[name])
				}
			}
			if len(got) != len(want) {
				t.Errorf("there is %v, want %v", got, want)
			}
			if now := statOf(t, "/etc/hostname"); now != target {
				t.Errorf("behind the link: %v, was %v", now, target)
			}
			if again, err := Give(dir, to, row.giving); row.err == "" && (again || err != nil) {
				t.Errorf("again: given %v, %v", again, err)
			}
		})
	}
}

func statOf(t *testing.T, path string) Owner {
	t.Helper()
	var stat syscall.Stat_t
	if err := syscall.Stat(path, &stat); err != nil {
		t.Fatal(err)
	}
	return Owner{int(stat.Uid), int(stat.Gid)}
}
