//go:build linux

package main_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"
)

// packed is the folder with what `make packages image` makes, and its version.
func packed(t *testing.T) (dist, version string) {
	t.Helper()
	dist, err := pack()
	if err != nil {
		t.Fatal(err)
	}
	return dist, packVersion
}

// packVersion is none that anybody releases.
const packVersion = "0.0.1-test"

var pack = sync.OnceValues(func() (string, error) {
	dist, err := filepath.Abs("../../dist/test")
	if err != nil {
		return "", err
	}
	return dist, packIn("../..", dist)
})

// packIn makes packages and image of the tree at root.
func packIn(root, dist string) error {
	cmd := exec.Command("go", "run", "./cmd/pack", "-o", dist, "packages", "image")
	cmd.Dir = root
	cmd.Env = append(os.Environ(), "VERSION="+packVersion, "COMMIT=test", "SOURCE_DATE_EPOCH=1501027200")
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("pack: %w\n%s", err, out)
	}
	return nil
}

// machine is a Debian with systemd that has booted in a container of its own, in the network of a host.
type machine struct {
	*host
	root string // its files, as seen from here
	pid  string // its systemd
}

// overlay is a command that puts a fresh copy of the Debian whose folder is $1 at root.
const overlay = `mount -t overlay overlay -o "lowerdir=$1,upperdir=upper,workdir=work" root`

// debian returns the folder of the Debian that testdata/install.sh makes, with those that overlay needs made.
func (h *host) debian(t *testing.T) string {
	t.Helper()
	debian := filepath.Join(filepath.Dir(cached("")), "debian") // beside the folder of programs
	if _, err := os.Stat(filepath.Join(debian, "etc/breakwater-test")); err != nil {
		cannot(t, "%v; testdata/install.sh makes it", err)
	}
	for _, folder := range []string{"upper", "work", "root"} {
		if err := os.Mkdir(filepath.Join(h.dir, folder), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	return debian
}

// boot starts a machine with a Debian of its own.
func boot(t *testing.T, h *host) *machine {
	t.Helper()
	need(t, "systemd-nspawn", "nsenter")
	debian := h.debian(t)
	cgroup := newCgroup(t)
	h.write(t, "upper/etc/cloud/cloud-init.disabled", "")
	if err := os.Chmod(filepath.Join(h.dir, "upper/etc"), 0o755); err != nil {
		t.Fatal(err)
	}
	script := `for c in /sys/fs/cgroup /sys/fs/cgroup/systemd /sys/fs/cgroup/unified; do
	if [ -e $c/cgroup.procs ]; then mkdir $c/` + cgroup + ` && echo 0 >$c/` + cgroup + `/cgroup.procs || exit; fi
done
` + overlay + ` &&
exec systemd-nspawn --directory=root --boot --register=no --keep-unit --console=pipe`
	cmd := contain(h.command(t.Context(), nil, "sh", "-c", script, "sh", debian))
	log, err := os.Create(filepath.Join(h.dir, "boot.log"))
	if err != nil {
		t.Fatal(err)
	}
	cmd.Stdout, cmd.Stderr = log, log
	if err := h.start(cmd); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
		_ = log.Close()
		showLog(t, log.Name())
	})
	m := &machine{host: h}
	within(t, time.Minute, func() error {
		children, err := os.ReadFile(fmt.Sprintf("/proc/%[1]d/task/%[1]d/children", cmd.Process.Pid))
		if err != nil {
			return err
		}
		pids := strings.Fields(string(children))
		if len(pids) == 0 {
			return errors.New("no container yet")
		}
		m.pid = pids[len(pids)-1]
		m.root = "/proc/" + m.pid + "/root"
		if state, err := m.try("systemctl", "is-system-running"); !strings.Contains(state, "running") && !strings.Contains(state, "degraded") {
			return fmt.Errorf("%s %w", state, err)
		}
		return nil
	})
	t.Cleanup(func() {
		if t.Failed() {
			journal, _ := m.try("journalctl", "--no-pager", "--lines=100")
			t.Log(journal)
		}
	})
	return m
}

// try runs a program in the machine, as root, and returns what it has printed.
func (m *machine) try(args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	return m.output(m.command(ctx, nil, append([]string{"nsenter", "--target", m.pid, "--all", "--wdns=/"}, args...)...))
}

// run is try of what has to succeed.
func (m *machine) run(t *testing.T, args ...string) string {
	t.Helper()
	out, err := m.try(args...)
	if err != nil {
		t.Fatal(err)
	}
	return strings.TrimSpace(out)
}

// has reports whether the machine has a file.
func (m *machine) has(name string) bool {
	_, err := os.Lstat(m.root + name)
	return err == nil
}

// put writes a file in the machine, for all to read.
func (m *machine) put(t *testing.T, name, text string) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(m.root+name), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(m.root+name, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
}
