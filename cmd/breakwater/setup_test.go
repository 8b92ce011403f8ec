//go:build linux

package main_test

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

// prepared is a folder of registries and a configuration of a mirror, for setup.
type prepared struct {
	*testing.T
	certs, config, containerd string
}

func newPrepared(t *testing.T, config string) *prepared {
	t.Helper()
	dir := t.TempDir()
	p := &prepared{t, filepath.Join(dir, "certs.d"), filepath.Join(dir, "config.yaml"), filepath.Join(dir, "config.toml")}
	p.put(p.config, config)
	return p
}

func (p *prepared) put(file, text string) {
	p.Helper()
	if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
		p.Fatal(err)
	}
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		p.Fatal(err)
	}
}

// run runs setup containerd, wants that exit code, and returns both outputs.
func (p *prepared) run(code int, args ...string) (out, said string) {
	p.Helper()
	args = append([]string{"setup", "containerd", "--config", p.config, "--certs-d", p.certs, "--containerd-config", p.containerd}, args...)
	got, out, said := runAs(p.T, nil, binary(p.T), args...)
	if got != code {
		p.Fatalf("%v: exit %d, want %d\nout %s\nsaid %s", args, got, code, out, said)
	}
	return out, said
}

func (p *prepared) read(registry string) string {
	p.Helper()
	text, err := os.ReadFile(filepath.Join(p.certs, registry, "hosts.toml"))
	if err != nil {
		p.Fatal(err)
	}
	_, rest, _ := strings.Cut(string(text), "\n") // the mark
	return rest
}

func (p *prepared) holds(what, got string, want ...string) {
	p.Helper()
	for _, want := range want {
		if !strings.Contains(got, want) {
			p.Errorf("%s: no %q in\n%s", what, want, got)
		}
	}
}

const setupRegistries = `
registries:
  docker.io: {}
  quay.io: {upstreams: [{url: "https://mirror.test"}]}
  registry.test:5000: {upstreams: [{url: "http://registry.test:5000"}]}
`

func TestSetupContainerd(t *testing.T) {
	p := newPrepared(t, "listen: 0.0.0.0:5555\naccess: {anonymous: true}\nany_registry: true\n"+setupRegistries)
	out, said := p.run(0)
	p.holds("shown", out, "would write "+p.certs+"/quay.io/hosts.toml\n", `    server = "https://quay.io"`, "--write does it")
	if _, err := os.Stat(p.certs); err == nil || said != "" {
		t.Errorf("showing has made the folder, or said %q", said)
	}
	out, _ = p.run(0, "--write")
	p.holds("written", out, "wrote "+p.certs+"/registry.test_5000_/hosts.toml\n")
	const host = "\n[host.\"http://127.0.0.1:5555\"]\n  capabilities = [\"pull\", \"resolve\"]\n"
	for registry, want := range map[string]string{
		"docker.io":           "server = \"https://registry-1.docker.io\"\n" + host,
		"quay.io":             "server = \"https://quay.io\"\n" + host,
		"registry.test_5000_": "server = \"http://registry.test:5000\"\n" + host,
		"_default":            host,
	} {
		if got := p.read(registry); got != want {
			t.Errorf("%s:\n%s, want\n%s", registry, got, want)
		}
	}
	out, _ = p.run(0, "--check")
	p.holds("checked", out, "all is as it should be\n")
	out, _ = p.run(0, "--write")
	p.holds("written again", out, "all is as it should be already")
	p.put(p.config, "broken: [")
	out, _ = p.run(0, "--undo") // which needs no configuration
	p.holds("undone", out, "removed "+p.certs+"/quay.io/hosts.toml\n")
	if left, err := os.ReadDir(p.certs); err != nil || len(left) > 0 {
		t.Errorf("left: %v, %v", left, err)
	}
	out, _ = p.run(0, "--undo")
	p.holds("undone again", out, "nothing to undo in "+p.certs)
}

func TestSetupContainerdFlags(t *testing.T) {
	p := newPrepared(t, setupRegistries)
	mine := filepath.Join(p.certs, "quay.io/hosts.toml")
	secret := filepath.Join(t.TempDir(), "authorization")
	p.put(secret, "Basic c2VjcmV0\n")
	p.put(mine, "mine")
	_, said := p.run(1, "--write")
	p.holds("refused", said, "nothing is written", mine, "--existing replace")
	out, _ := p.run(0)
	p.holds("shown", out, "would refuse", mine)
	out, _ = p.run(0, "--existing", "replace", "--authorization", secret, "--referrers", "--output", "json")
	var changes []struct{ Path, Act, Content string }
	if err := json.Unmarshal([]byte(out), &changes); err != nil || len(changes) != 3 || changes[1].Path != mine || changes[1].Act != "replace" {
		t.Errorf("as JSON: %v\n%s", err, out)
	}
	checked, said := p.run(1, "--check", "--existing", "replace", "--authorization", secret, "--referrers", "--output", "json")
	if checked != out || strings.Contains(out, "c2VjcmV0") {
		t.Errorf("it tells the secret, or checks what it does not show:\n%s\n%s", out, checked)
	}
	p.holds("checked", said, "3 of 3 files")
	out, _ = p.run(0, "--write", "--existing", "replace", "--authorization", secret, "--referrers", "--mirror", "https://mirror.test:5000/")
	if strings.Contains(out, "c2VjcmV0") {
		t.Errorf("it tells the secret:\n%s", out)
	}
	const want = "server = \"https://quay.io\"\n\n[host.\"https://mirror.test:5000\"]\n  capabilities = [\"pull\", \"resolve\", \"referrers\"]\n" +
		"  [host.\"https://mirror.test:5000\".header]\n    Authorization = \"Basic c2VjcmV0\"\n"
	if got := p.read("quay.io"); got != want {
		t.Errorf("written:\n%s, want\n%s", got, want)
	}
	out, _ = p.run(0, "--undo")
	p.holds("undone", out, "restored "+mine)
	if text, err := os.ReadFile(mine); err != nil || string(text) != "mine" {
		t.Errorf("restored: %q, %v", text, err)
	}
	p.put(p.containerd, "version = 2\n")
	_, said = p.run(0, "--write", "--existing", "keep")
	p.holds("warned", said, "breakwater: warning: "+p.containerd+" has no config_path")

	_, said = p.run(2, "--write", "--undo")
	p.run(2, "--check", "--hold")
	p.holds("two of them", said, "exclude each other")
	_, said = p.run(2, "--existing", "burn")
	p.holds("another word", said, "write refuse, replace or keep")
	_, said = p.run(1, "--mirror", "127.0.0.1:5000")
	p.holds("no URL", said, "such as http://127.0.0.1:5000")
	_, said = p.run(1, "--ca", secret, "--mirror", "https://mirror.test")
	p.holds("no certificate", said, "ca: there is no certificate in PEM")
	_, said = p.run(2, "--client-cert", secret)
	p.holds("half a pair", said, "--client-cert and --client-key belong together")
	_, said = p.run(1, "--authorization", secret+"x")
	p.holds("no file", said, "no such file")
	p.put(secret, "\n")
	_, said = p.run(1, "--authorization", secret)
	p.holds("empty", said, "is empty")
	p.put(p.config, "listen: 127.0.0.1:0\n")
	_, said = p.run(2)
	p.holds("no port", said, "use --mirror")
	p.put(p.config, "listen: [\n")
	p.run(1)
}

// TestSetupContainerdHold is what a sidecar does.
func TestSetupContainerdHold(t *testing.T) {
	p := newPrepared(t, setupRegistries)
	mine := filepath.Join(p.certs, "quay.io/hosts.toml")
	p.put(mine, "mine")
	_, said := p.run(1, "--hold")
	p.holds("refused", said, "nothing is written")
	p.run(1, "--check", "--existing", "replace")
	held := p.hold("--existing", "replace")
	out, _ := p.run(0, "--check", "--existing", "replace")
	p.holds("checked", out, "all is as it should be\n")
	_, said = p.run(1, "--check", "--mirror", "http://127.0.0.1:9")
	p.holds("checked for another mirror", said, "3 of 3 files of containerd's are not as they should be")
	_, said = p.run(1, "--hold", "--mirror", "http://127.0.0.1:9")
	p.holds("held by another", said, "holds it, for the mirror http://127.0.0.1:5000")
	if !strings.Contains(p.read("quay.io"), "127.0.0.1:5000") {
		t.Error("held, and not written")
	}
	held.end(t)
	if text, err := os.ReadFile(mine); err != nil || string(text) != "mine" {
		t.Errorf("restored: %q, %v", text, err)
	}
	if left, err := os.ReadDir(p.certs); err != nil || len(left) != 1 {
		t.Errorf("left: %v, %v", left, err)
	}
}

// TestSetupContainerdHoldRenews rotates a Secret, as the kubelet does.
func TestSetupContainerdHoldRenews(t *testing.T) {
	t.Parallel() // it waits until the files are looked at again
	p := newPrepared(t, setupRegistries)
	secret := filepath.Join(t.TempDir(), "authorization")
	p.put(secret, "Basic b2xk\n")
	held := p.hold("--authorization", secret)
	p.holds("held", p.read("quay.io"), "Basic b2xk")
	p.put(secret+".new", "Basic bmV3\n")
	if err := os.Rename(secret+".new", secret); err != nil {
		t.Fatal(err)
	}
	p.holds("the log", held.until(`"act":"update"`), "the authorization has changed")
	p.holds("renewed", p.read("quay.io"), "Basic bmV3")
	held.end(t)
}

// heldBy is a setup containerd --hold that runs.
type heldBy struct {
	cmd *exec.Cmd
	log *bufio.Scanner
}

// hold starts one, and returns once it has written.
func (p *prepared) hold(args ...string) *heldBy {
	p.Helper()
	args = append([]string{"setup", "containerd", "--hold", "--config", p.config, "--certs-d", p.certs, "--containerd-config", p.containerd}, args...)
	ctx, cancel := context.WithTimeout(p.Context(), 2*time.Minute) // or who waits for its log waits for ever
	p.Cleanup(cancel)
	cmd := exec.CommandContext(ctx, binary(p.T), args...)
	out, err := cmd.StderrPipe()
	if err != nil {
		p.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		p.Fatal(err)
	}
	h := &heldBy{cmd, bufio.NewScanner(out)}
	h.until("pointed at the mirror")
	return h
}

// until returns the log up to a line with that in it, or all of it.
func (h *heldBy) until(line string) string {
	var log strings.Builder
	for h.log.Scan() {
		log.WriteString(h.log.Text() + "\n")
		if strings.Contains(h.log.Text(), line) {
			break
		}
	}
	return log.String()
}

func (h *heldBy) end(t *testing.T) {
	t.Helper()
	_ = h.cmd.Process.Signal(syscall.SIGTERM)
	log := h.until("nothing that is said")
	if err := h.cmd.Wait(); err != nil {
		t.Errorf("%v:\n%s", err, log)
	}
}

// TestSetupData runs it with the one capability that an init container is given.
func TestSetupData(t *testing.T) {
	need(t, "setpriv")
	dir := t.TempDir()
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	data := filepath.Join(dir, "data")
	run := func(code int, want string, args ...string) {
		t.Helper()
		args = append([]string{"--bounding-set", "-all,+chown", "--inh-caps", "-all", "--no-new-privs", binary(t), "setup", "data", "--config", "", "--data", data}, args...)
		got, out, said := runAs(t, nil, "setpriv", args...)
		if got != code || !strings.Contains(out+said, want) {
			t.Errorf("%v: exit %d, want %d with %q:\n%s%s", args, got, code, want, out, said)
		}
	}
	is := func(want string) {
		t.Helper()
		info, err := os.Stat(data)
		if err != nil {
			t.Fatal(err)
		}
		stat := info.Sys().(*syscall.Stat_t)
		if got := fmt.Sprintf("%v %d:%d", info.Mode(), stat.Uid, stat.Gid); got != want {
			t.Errorf("%s, want %s", got, want)
		}
	}
	run(0, "is 65532:65532's now", "--owner", "65532:65532")
	is("drwx------ 65532:65532")
	run(0, "is 65532:65532's already", "--owner", "65532:65532")
	run(1, "permission denied", "--owner", "65531:65531") // it is not root's to give
	is("drwx------ 65532:65532")
	if err := os.Remove(data); err != nil {
		t.Fatal(err)
	}
	if err := os.MkdirAll(filepath.Join(data, "blobs"), 0o755); err != nil { // as kubelet makes it
		t.Fatal(err)
	}
	run(1, "--recursive", "--owner", "65532:65532")
	is("drwxr-xr-x 0:0")
	// The first run was killed: what it had given has closed to us.
	given := filepath.Join(data, "blobs", "sha256")
	if err := os.MkdirAll(given, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.Chown(given, 65532, 65532); err != nil {
		t.Fatal(err)
	}
	run(0, "is 65532:65532's now", "--owner", "65532:65532", "--recursive")
	is("drwx------ 65532:65532")
	for _, wrong := range []string{"", "65532", "root:root", "-1:0"} {
		run(2, "--owner", "--owner="+wrong)
	}
}
