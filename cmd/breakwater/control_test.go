//go:build linux

package main_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"breakwater/pkg/registrytest"

	"github.com/opencontainers/go-digest"
)

// controlled is a store that commands deal with, and the configuration of its mirror.
type controlled struct {
	*testing.T
	program      string
	config, data string
	reg          *registrytest.Registry
}

func newControlled(t *testing.T) *controlled {
	t.Helper()
	dir := t.TempDir()
	c := &controlled{t, binary(t), filepath.Join(dir, "config.yaml"), filepath.Join(dir, "data"), registrytest.New(registrytest.Config{})}
	text := fmt.Sprintf("data: %s\ndefault_registry: quay.test\nregistries: {quay.test: {upstreams: [{url: %q}]}}\n", c.data, c.reg.Start(t).URL)
	if err := os.WriteFile(c.config, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return c
}

func (c *controlled) socket() string { return filepath.Join(c.data, "control.sock") }

// start runs the mirror.
func (c *controlled) start() *crashing {
	c.Helper()
	return startMirror(c.T, c.program, c.config, c.data)
}

// stop ends it as a service manager does.
func (c *controlled) stop(m *crashing) {
	c.Helper()
	_ = m.cmd.Process.Signal(syscall.SIGTERM)
	if err := m.cmd.Wait(); err != nil {
		c.Fatal(err)
	}
}

// pull fetches an image of one layer, until it is stored, and returns its layer.
func (c *controlled) pull(m *crashing, tag string, seed uint64, size int) digest.Digest {
	c.Helper()
	image := registrytest.NewImage(registrytest.Layer(seed, size))
	c.reg.Push("org/app", tag, image)
	m.get("/v2/org/app/manifests/" + tag)
	for _, blob := range image.Blobs {
		within(c.T, 20*time.Second, func() error {
			if status, cache, _ := m.get("/v2/org/app/blobs/" + blob.Digest.String()); status != http.StatusOK || !strings.Contains(cache, "; hit") {
				return fmt.Errorf("%d, %s", status, cache)
			}
			return nil
		})
	}
	return image.Blobs[1].Digest
}

func (c *controlled) stored(dgst digest.Digest) bool {
	_, err := os.Stat(filepath.Join(c.data, "blobs", "sha256", dgst.Encoded()))
	return err == nil
}

// run runs a command on the store. --config is added.
func (c *controlled) run(args ...string) (code int, out, said string) {
	c.Helper()
	return runAs(c.T, nil, c.program, append(args, "--config", c.config)...)
}

func runAs(t *testing.T, who *syscall.Credential, program string, args ...string) (code int, out, said string) {
	t.Helper()
	var stdout, stderr bytes.Buffer
	cmd := exec.CommandContext(t.Context(), program, args...)
	cmd.Stdout, cmd.Stderr, cmd.Dir = &stdout, &stderr, "/"
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: who, Pdeathsig: syscall.SIGKILL}
	err := cmd.Run()
	if ended := new(exec.ExitError); err != nil && !errors.As(err, &ended) {
		t.Fatal(err)
	}
	return cmd.ProcessState.ExitCode(), stdout.String(), stderr.String()
}

// want fails the test unless a command ended so, and its two outputs hold these words, "" none at all.
func (c *controlled) want(code int, out, said string, args ...string) {
	c.Helper()
	gotCode, gotOut, gotSaid := c.run(args...)
	holds := func(got, want string) bool { return got == want || want != "" && strings.Contains(got, want) }
	if gotCode != code || !holds(gotOut, out) || !holds(gotSaid, said) {
		c.Errorf("%v: exit %d, want %d\nout %q, want %q\nsaid %q, want %q", args, gotCode, code, gotOut, out, gotSaid, said)
	}
}

func TestRm(t *testing.T) {
	c := newControlled(t)
	m := c.start()
	v1 := c.pull(m, "v1", 1, 100<<10)
	v2 := c.pull(m, "v2", 2, 100<<10)
	c.want(0, "removed quay.test/org/app:v1: 1", "", "rm", "org/app:v1")
	if c.stored(v1) || !c.stored(v2) {
		t.Error("the wrong files went")
	}
	c.want(1, "", "quay.test/org/app:v1 is not stored", "rm", "quay.test/org/app:v1")
	c.want(2, "", `"Org/App" is not an image`, "rm", "Org/App")
	c.want(2, "", "which image?", "rm")
	c.want(2, "", "--output", "rm", "org/app:v2", "--output", "xml")
	code, out, said := c.run("rm", "org/app:v1", "org/app:v2", "--output", "json")
	var all []struct {
		Image, Error string
		Freed        int64
	}
	if err := json.Unmarshal([]byte(out), &all); err != nil || code != 1 || len(all) != 2 || all[0].Error == "" ||
		all[1].Image != "quay.test/org/app:v2" || all[1].Freed < 100<<10 || !strings.Contains(said, "org/app:v1 is not stored") {
		t.Errorf("%d %s %s: %v", code, out, said, err)
	}
	c.reg.Fault(registrytest.Match{}, registrytest.Status(http.StatusServiceUnavailable))
	if status, _, _ := m.get("/v2/org/app/manifests/v2"); status != http.StatusServiceUnavailable {
		t.Errorf("what is removed, in an outage: %d", status)
	}
}

func TestRmWithTheMirrorDown(t *testing.T) {
	c := newControlled(t)
	c.want(1, "", "no store", "rm", "--offline", "org/app:v1") // and none is made
	if _, err := os.Stat(c.data); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the data folder: %v", err)
	}
	m := c.start()
	v1 := c.pull(m, "v1", 1, 100<<10)
	c.want(1, "", "in use by process", "rm", "--offline", "org/app:v1")
	c.stop(m)
	if _, err := os.Lstat(c.socket()); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the socket is left: %v", err)
	}
	c.want(1, "", "no mirror runs: nobody listens at "+c.socket()+": start it with breakwater serve, or use --offline", "rm", "org/app:v1")
	c.want(2, "", "is not an image", "rm", "--offline", "org/app:")
	c.want(0, "removed quay.test/org/app:v1: 1", "", "rm", "--offline", "org/app:v1")
	if c.stored(v1) {
		t.Error("it is still there")
	}
	c.want(1, "", "is not stored", "rm", "--offline", "org/app:v1")
}

// Whoever downloads an image while it is removed gets all of it.
func TestRmLeavesReadersAlone(t *testing.T) {
	c := newControlled(t)
	m := c.start()
	const size = 64 << 20 // more than any socket takes
	layer := c.pull(m, "big", 3, size)
	resp, err := m.client.Get(m.url + "/v2/org/app/blobs/" + layer.String())
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	hash := digest.SHA256.Digester()
	if _, err := io.CopyN(hash.Hash(), resp.Body, 1<<20); err != nil {
		t.Fatal(err)
	}
	c.want(0, "removed quay.test/org/app:big: 6", "", "rm", "org/app:big")
	if c.stored(layer) {
		t.Error("it is still there")
	}
	n, err := io.Copy(hash.Hash(), resp.Body)
	if err != nil || n != size-1<<20 || hash.Digest() != layer {
		t.Errorf("the reader got %d more bytes, %v", n, err)
	}
}

func TestVerify(t *testing.T) {
	c := newControlled(t)
	m := c.start()
	layer := c.pull(m, "v1", 1, 100<<10)
	c.want(0, "files: 3, 1", "", "verify")
	flip := func() {
		t.Helper()
		name := filepath.Join(c.data, "blobs", "sha256", layer.Encoded())
		raw, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		raw[len(raw)/2] ^= 4
		if err := os.WriteFile(name, raw, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	flip()
	code, out, said := c.run("verify")
	for _, want := range []string{layer.String() + " quarantined: is sha256:", "needed by quay.test/org/app:v1", "1 wrong; the next pull that needs them fetches them again"} {
		if code != 1 || !strings.Contains(out, want) {
			t.Errorf("exit %d, no %q in\n%s%s", code, want, out, said)
		}
	}
	kept, err := filepath.Glob(filepath.Join(c.data, "quarantine", layer.Encoded()+"*"))
	if c.stored(layer) || err != nil || len(kept) != 1 {
		t.Errorf("in quarantine: %v %v", kept, err)
	}
	c.want(0, "files: 2, ", "", "verify")
	if got := c.pull(m, "v1", 1, 100<<10); got != layer { // fetched again
		t.Error(got)
	}
	c.stop(m)
	flip()
	code, out, said = c.run("verify", "--output", "json")
	var report struct {
		Files   int
		Seconds float64
		Wrong   []struct {
			Digest digest.Digest
			Images []string
		}
	}
	if err := json.Unmarshal([]byte(out), &report); err != nil || code != 1 || report.Files != 3 || report.Seconds <= 0 || len(report.Wrong) != 1 ||
		report.Wrong[0].Digest != layer || !slices.Equal(report.Wrong[0].Images, []string{"quay.test/org/app:v1"}) || c.stored(layer) {
		t.Errorf("without a mirror: exit %d, %v\n%s%s", code, err, out, said)
	}
	c.want(0, "all is as it should be", "", "verify")
}

func TestStatus(t *testing.T) {
	c := newControlled(t)
	c.want(1, "", "no mirror runs", "status")
	m := c.start()
	c.pull(m, "v1", 1, 100<<10)
	c.want(0, "1, 1 of them complete; 0 evicted", "", "status")
	c.reg.Fault(registrytest.Match{}, registrytest.Status(http.StatusServiceUnavailable))
	for _, tag := range []string{"a", "b", "c"} {
		m.get("/v2/org/app/manifests/" + tag)
	}
	within(t, 5*time.Second, func() error {
		code, out, said := c.run("status")
		if code != 0 || !strings.Contains(out, "manifest open since") || !strings.Contains(out, "answered 503") {
			return fmt.Errorf("exit %d\n%s%s", code, out, said)
		}
		return nil
	})
	code, out, _ := c.run("status", "--output", "json")
	var s struct {
		Process   int
		Store     struct{ Images int }
		Upstreams []struct{ Registry, State string }
	}
	if err := json.Unmarshal([]byte(out), &s); err != nil || code != 0 || s.Process != m.cmd.Process.Pid || s.Store.Images != 1 || len(s.Upstreams) != 3 {
		t.Errorf("exit %d, %v\n%s", code, err, out)
	}
}

func TestSocketAfterKill(t *testing.T) {
	c := newControlled(t)
	m := c.start()
	if err := m.cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = m.cmd.Wait() // killed
	if _, err := os.Lstat(c.socket()); err != nil {
		t.Fatalf("the socket of a killed mirror: %v", err)
	}
	c.want(1, "", "no mirror runs", "status")
	c.start()
	c.want(0, "complete", "", "status")
	info, err := os.Lstat(c.socket())
	if err != nil || info.Mode() != fs.ModeSocket|0o660 {
		t.Errorf("%v %v", info.Mode(), err)
	}
}

// TestSocketPeers lets in whom the socket's mode would, and nobody else, whatever its mode is.
func TestSocketPeers(t *testing.T) {
	need(t)
	c := newControlled(t)
	dir, err := os.MkdirTemp("", "control")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	const group = 4242
	for _, err := range []error{os.Chown(dir, -1, group), os.Chmod(dir, 0o755|fs.ModeSetgid)} {
		if err != nil {
			t.Fatal(err)
		}
	}
	program := filepath.Join(dir, "breakwater") // where others can run it
	raw, err := os.ReadFile(c.program)
	if err == nil {
		err = os.WriteFile(program, raw, 0o755)
	}
	if err != nil {
		t.Fatal(err)
	}
	socket := filepath.Join(dir, "control.sock")
	text, err := os.ReadFile(c.config)
	if err == nil {
		err = os.WriteFile(c.config, append(text, "control: "+socket+"\n"...), 0o600)
	}
	if err != nil {
		t.Fatal(err)
	}
	startMirror(t, c.program, c.config, c.data)
	stranger := syscall.Credential{Uid: 65534, Gid: 65534}
	ask := func(who *syscall.Credential) (int, string) {
		t.Helper()
		code, _, said := runAs(t, who, program, "status", "--config", "", "--data", "/nonexistent", "--control", socket)
		return code, said
	}
	if code, said := ask(&stranger); code != 1 || !strings.Contains(said, "permission denied: run this as root") {
		t.Errorf("stopped by the mode: exit %d, %s", code, said)
	}
	if err := os.Chmod(socket, 0o666); err != nil {
		t.Fatal(err)
	}
	if code, said := ask(&stranger); code != 1 || !strings.Contains(said, "no answer (") {
		t.Errorf("another user: exit %d, %s", code, said)
	}
	if err := os.Chmod(socket, 0o660); err != nil {
		t.Fatal(err)
	}
	many := []uint32{group}
	for i := range uint32(100) {
		many = append(many, 5000+i)
	}
	for name, who := range map[string]*syscall.Credential{
		"root":                    {},
		"whose first group it is": {Uid: stranger.Uid, Gid: group},
		"a member":                {Uid: stranger.Uid, Gid: stranger.Gid, Groups: []uint32{group}},
		"a member of many groups": {Uid: stranger.Uid, Gid: stranger.Gid, Groups: many},
	} {
		if code, said := ask(who); code != 0 {
			t.Errorf("%s: exit %d, %s", name, code, said)
		}
	}
}

// Another user's store would hold files afterwards that its mirror cannot read.
func TestOfflineIsForTheStoresOwner(t *testing.T) {
	need(t)
	c := newControlled(t)
	c.stop(c.start())
	if err := os.Chown(c.data, 65534, 65534); err != nil {
		t.Fatal(err)
	}
	c.want(1, "", "is of user 65534", "rm", "--offline", "org/app:v1")
	c.want(1, "", "is of user 65534", "verify")
}
