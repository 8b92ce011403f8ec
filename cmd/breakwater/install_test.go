//go:build linux

package main_test

import (
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.yaml.in/yaml/v4"
)

// exposed is how open to attack systemd may call the service, in tenths of 0 to 10. It was 12 when this
// was written; what is left is the network and its own files.
const exposed = "15"

// TestPackage installs the deb in a Debian that runs systemd, pulls through the service that it brings,
// restarts, hangs, breaks, upgrades, removes and purges it, and looks at what is left each time.
func TestPackage(t *testing.T) {
	t.Parallel()
	dist, _ := packed(t)
	h := newHost(t)
	up := h.upstream(t)
	images := up.push(t, "org/image", "latest", greeter(t, 1))
	m := boot(t, h)
	deb := filepath.Join(dist, "breakwater_0.0.1~test_"+runtime.GOARCH+".deb")
	raw, err := os.ReadFile(deb)
	if err != nil {
		t.Fatal(err)
	}
	m.put(t, "/root/breakwater.deb", string(raw))
	clients := []string{"/etc/docker/daemon.json", "/etc/containerd/config.toml", "/etc/containers/registries.conf"}
	for _, file := range clients {
		m.put(t, file, "untouched")
	}

	said := m.run(t, "apt-get", "install", "--yes", "/root/breakwater.deb")
	if n := strings.Count(said, "\nbreakwater: "); n != 3 || !strings.Contains(said, "systemctl enable --now") {
		t.Errorf("said %d lines, want 3:\n%s", n, said)
	}
	if state, _ := m.try("systemctl", "is-enabled", "breakwater.socket", "breakwater.service"); strings.Contains(state, "enabled") {
		t.Errorf("enabled without having been asked for: %s", state)
	}
	if said := m.run(t, "breakwater", "config", "check"); !strings.Contains(said, "/etc/breakwater/breakwater.yaml") {
		t.Errorf("checked: %s", said)
	}
	m.run(t, "systemd-analyze", "verify", "--man=no", "/usr/lib/systemd/system/breakwater.service", "/usr/lib/systemd/system/breakwater.socket")
	m.run(t, "systemd-analyze", "security", "--offline=yes", "--threshold="+exposed, "/usr/lib/systemd/system/breakwater.service")

	m.put(t, "/etc/breakwater/breakwater.yaml", mirrored)
	m.put(t, "/etc/breakwater/hub-password", "somebody's")
	m.run(t, "systemctl", "enable", "--now", "breakwater.socket", "breakwater.service")
	m.pull(t, images)
	m.checkConfined(t)
	if status := m.run(t, "breakwater", "status"); !strings.Contains(status, "quay.io") {
		t.Errorf("status says\n%s", status)
	}
	t.Run("commands", m.testCommands)
	up.kill()
	t.Run("restart", func(t *testing.T) {
		m.whileAsking(t, func() { m.run(t, "systemctl", "restart", "breakwater.service") })
	})
	t.Run("upgrade", func(t *testing.T) {
		m.whileAsking(t, func() { m.run(t, "dpkg", "--install", "/root/breakwater.deb") })
		if config := m.run(t, "cat", "/etc/breakwater/breakwater.yaml"); config != strings.TrimSpace(mirrored) {
			t.Errorf("the configuration is now %q", config)
		}
	})
	t.Run("reload", func(t *testing.T) {
		m.put(t, "/etc/breakwater/breakwater.yaml", mirrored+"server_names: [mirror.internal]\n")
		m.run(t, "systemctl", "reload", "breakwater.service")
		within(t, patience, func() error {
			if status := m.run(t, "systemctl", "show", "--property=StatusText,ActiveState", "breakwater.service"); !strings.Contains(status, "configuration reloaded") || !strings.Contains(status, "=active") {
				return errors.New(status)
			}
			return nil
		})
	})
	m.pull(t, images) // stale
	t.Run("moved", m.testMoved)
	t.Run("with docker", m.testWithDocker)
	t.Run("hung", m.testHung)
	t.Run("broken", m.testBroken)

	m.run(t, "dpkg", "--remove", "breakwater")
	if _, err := h.dial(mirrorAddr); err == nil {
		t.Error("the port is open after the removal")
	}
	for file, want := range map[string]bool{
		"/usr/bin/breakwater": false, "/usr/lib/systemd/system/breakwater.socket": false,
		"/etc/systemd/system/sockets.target.wants/breakwater.socket": false, "/etc/systemd/system/multi-user.target.wants/breakwater.service": false,
		"/etc/breakwater/breakwater.yaml": true, "/var/lib/breakwater/oci-layout": true,
	} {
		if m.has(file) != want {
			t.Errorf("after the removal there is %s: %v", file, !want)
		}
	}
	m.run(t, "dpkg", "--purge", "breakwater")
	for file, want := range map[string]bool{"/etc/breakwater/breakwater.yaml": false, "/var/lib/breakwater": false, "/etc/breakwater/hub-password": true} {
		if m.has(file) != want {
			t.Errorf("after the purge there is %s: %v", file, !want)
		}
	}
	t.Run("disk", m.testDiskPurged)
	for _, file := range clients {
		if text := m.run(t, "cat", file); text != "untouched" {
			t.Errorf("%s is now %q", file, text)
		}
	}
}

// testDiskPurged purges it where a disk is mounted at the data folder, with another one in that.
func (m *machine) testDiskPurged(t *testing.T) {
	const data = "/var/lib/breakwater"
	m.run(t, "dpkg", "--install", "/root/breakwater.deb")
	m.run(t, "mkdir", data)
	m.run(t, "mount", "-t", "tmpfs", "tmpfs", data)
	m.put(t, data+"/blobs/sha256/one", "pulled")
	m.put(t, data+"/.hidden", "pulled")
	m.run(t, "mkdir", data+"/other")
	m.run(t, "mount", "-t", "tmpfs", "tmpfs", data+"/other")
	m.put(t, data+"/other/file", "somebody's")
	m.run(t, "dpkg", "--purge", "breakwater")
	if left := m.run(t, "find", data, "-mindepth", "1"); left != data+"/other\n"+data+"/other/file" {
		t.Errorf("of what it has stored is left:\n%s", left)
	}
	if state, _ := m.try("dpkg-query", "--show", "--showformat=${db:Status-Status}", "breakwater"); strings.HasSuffix(state, "installed") || strings.HasSuffix(state, "config-files") {
		t.Errorf("the package is %s", state)
	}
	m.run(t, "umount", data+"/other", data)
}

// pull has images pulled from the machine's mirror.
func (m *machine) pull(t *testing.T, images []string) {
	t.Helper()
	for _, image := range images {
		if _, err := (&crane{m.host}).pull(t, mirrorAddr+"/quay.io/"+image); err != nil {
			t.Fatal(err)
		}
	}
}

// checkConfined looks at the process, not at what the unit says.
func (m *machine) checkConfined(t *testing.T) {
	t.Helper()
	pid := m.run(t, "systemctl", "show", "--property=MainPID", "--value", "breakwater.service")
	user := m.run(t, "id", "--user", "breakwater")
	status := strings.Join(strings.Fields(m.run(t, "cat", "/proc/"+pid+"/status")), " ")
	for _, want := range []string{"Uid: " + user + " " + user + " ", "CapEff: 0000000000000000", "CapBnd: 0000000000000000", "NoNewPrivs: 1", "Seccomp: 2"} {
		if !strings.Contains(status, want) {
			t.Errorf("the process has no %q: %s", want, status)
		}
	}
	if user == "0" {
		t.Error("it runs as root")
	}
	if mode := m.run(t, "stat", "--format=%U %a", "/var/lib/breakwater"); mode != "breakwater 700" {
		t.Errorf("its data folder is %s", mode)
	}
	if out, err := m.try("nsenter", "--target", pid, "--mount", "sh", "-c", "touch /etc/breakwater/x /usr/bin/x /var/lib/x"); err == nil || strings.Count(out, "Read-only file system") != 3 {
		t.Errorf("it could write: %v %s", err, out)
	}
}

// whileAsking wants each of many requests, on connections of their own, to be answered while something is done.
func (m *machine) whileAsking(t *testing.T, do func()) {
	t.Helper()
	ended := make(chan struct{})
	go func() { defer close(ended); do() }()
	for asked := 1; ; asked++ {
		if got, err := m.ask(http.MethodGet, "http://"+mirrorAddr+"/v2/"); err != nil || got.status != http.StatusOK {
			t.Errorf("request %d: %d %v", asked, got.status, err)
		}
		select {
		case <-ended:
			t.Logf("%d requests", asked)
			return
		default:
		}
	}
}

// testCommands has commands find the service's configuration by themselves, or say why they cannot read it.
func (m *machine) testCommands(t *testing.T) {
	if said := m.run(t, "breakwater", "setup", "containerd"); !strings.Contains(said, "/quay.io/") || strings.Contains(said, "/ghcr.io/") {
		t.Errorf("not the registries of the configuration:\n%s", said)
	}
	const file = "/etc/breakwater/breakwater.yaml"
	m.run(t, "chmod", "600", file)
	defer m.run(t, "chmod", "644", file)
	for args, want := range map[string]string{
		"status": file + ": permission denied; run this as a user who may read it, or name another file with --config",
		"status --config= --control=/var/lib/breakwater/control.sock": "control socket /var/lib/breakwater/control.sock: permission denied",
	} {
		if said, err := m.try(append([]string{"runuser", "--user=nobody", "--", "breakwater"}, strings.Fields(args)...)...); err == nil || !strings.Contains(said, want) {
			t.Errorf("%s: %v, want %q:\n%s", args, err, want, said)
		}
	}
}

// testMoved gives it another data folder by its configuration, and a control socket for its group.
func (m *machine) testMoved(t *testing.T) {
	const data = "/var/lib/breakwater/moved"
	m.put(t, "/etc/breakwater/breakwater.yaml", mirrored+"data: "+data+"\ncontrol: /run/breakwater/control.sock\n")
	m.run(t, "systemctl", "restart", "breakwater.service")
	if !m.has(data + "/oci-layout") {
		t.Errorf("it stores nothing in %s", data)
	}
	m.run(t, "useradd", "--groups=breakwater", "member")
	m.run(t, "useradd", "stranger")
	if said := m.run(t, "runuser", "--user=member", "--", "breakwater", "status"); !strings.Contains(said, "quay.io") {
		t.Errorf("a member of the group is told\n%s", said)
	}
	if said, err := m.try("runuser", "--user=stranger", "--", "breakwater", "status"); err == nil || !strings.Contains(said, "socket's group") {
		t.Errorf("somebody else is told %v\n%s", err, said)
	}
}

// testWithDocker starts it together with what stands for Docker, which asks once and never again.
func (m *machine) testWithDocker(t *testing.T) {
	m.put(t, "/etc/systemd/system/docker.service", `[Service]
Type=oneshot
ExecStart=/bin/bash -c 'exec 3<>/dev/tcp/127.0.0.1/5000 && printf "GET /v2/ HTTP/1.1\r\nHost: localhost\r\n\r\n" >&3 && read -r answer <&3 && [[ $answer == *200* ]]'
`)
	m.put(t, "/etc/systemd/system/again.target", "[Unit]\nRequires=docker.service\nWants=breakwater.socket breakwater.service\n")
	m.run(t, "systemctl", "daemon-reload")
	m.run(t, "systemctl", "stop", "breakwater.socket", "breakwater.service")
	m.run(t, "systemctl", "start", "again.target") // at once, as at boot: start A B is one after the other
}

// testHung stops the process, as what hangs cannot be told from: systemd ends it and starts another one.
func (m *machine) testHung(t *testing.T) {
	m.put(t, "/etc/systemd/system/breakwater.service.d/soon.conf", "[Service]\nWatchdogSec=2s\n")
	m.run(t, "systemctl", "daemon-reload")
	m.run(t, "systemctl", "restart", "breakwater.service")
	m.run(t, "systemctl", "kill", "--signal=STOP", "breakwater.service")
	begin := time.Now()
	got, err := m.ask(http.MethodGet, "http://"+mirrorAddr+"/v2/") // of the one that hangs, which hangs up, or of the next
	if err != nil {
		got, err = m.ask(http.MethodGet, "http://"+mirrorAddr+"/v2/")
	}
	if err != nil || got.status != http.StatusOK {
		t.Errorf("%d %v", got.status, err)
	}
	t.Logf("answered after %v", time.Since(begin))
	if journal := m.run(t, "journalctl", "--unit=breakwater.service", "--no-pager"); !strings.Contains(journal, "Watchdog timeout") {
		t.Errorf("no watchdog in\n%s", journal)
	}
	if err := os.RemoveAll(m.root + "/etc/systemd/system/breakwater.service.d"); err != nil {
		t.Fatal(err)
	}
}

// testBroken restarts it with a mistake in its configuration: in the end the port is closed, so that
// clients do not wait for it.
func (m *machine) testBroken(t *testing.T) {
	m.put(t, "/etc/systemd/system/breakwater.service.d/soon.conf", "[Service]\nRestartSec=0\n")
	m.run(t, "systemctl", "daemon-reload")
	m.put(t, "/etc/breakwater/breakwater.yaml", "lisen: 127.0.0.1:5000\n")
	if out, err := m.try("systemctl", "restart", "breakwater.service"); err == nil {
		t.Errorf("restarted: %s", out)
	}
	within(t, patience, func() error {
		conn, err := m.dial(mirrorAddr)
		if errors.Is(err, syscall.ECONNREFUSED) {
			return nil
		}
		if err == nil {
			_, err = io.Copy(io.Discard, conn)
			_ = conn.Close()
		}
		return fmt.Errorf("the port is open, %w", err)
	})
	if journal := m.run(t, "journalctl", "--unit=breakwater.service", "--no-pager"); !strings.Contains(journal, "breakwater.yaml:1") {
		t.Errorf("the mistake is not told:\n%s", journal)
	}
}

// TestRPM installs and removes the rpm where no systemd runs.
func TestRPM(t *testing.T) {
	t.Parallel()
	dist, _ := packed(t)
	h := newHost(t, "rpm")
	arch := map[string]string{"amd64": "x86_64", "arm64": "aarch64"}[runtime.GOARCH]
	script := overlay + `
rpm="rpm --root=$PWD/root --nodeps --force-debian"
echo 'registries: {}' >config &&
$rpm --install "$2" && test -x root/usr/bin/breakwater && test -s root/usr/lib/systemd/system/breakwater.socket &&
chroot root id breakwater && cp config root/etc/breakwater/breakwater.yaml && mkdir root/var/lib/breakwater &&
$rpm --erase breakwater && ! test -e root/usr/bin/breakwater && cmp config root/etc/breakwater/breakwater.yaml.rpmsave && test -d root/var/lib/breakwater`
	said, err := h.output(contain(h.command(t.Context(), nil, "sh", "-c", script, "sh", h.debian(t), filepath.Join(dist, "breakwater-0.0.1~test-1."+arch+".rpm"))))
	if n := strings.Count("\n"+said, "\nbreakwater: "); err != nil || n != 3 {
		t.Errorf("%v, said %d lines, want 3:\n%s", err, n, said)
	}
}

// TestPackagesAgree compares what goreleaser would package with what `make packages` does, and the rpm
// with the deb.
func TestPackagesAgree(t *testing.T) {
	t.Parallel()
	var ours, theirs map[string]any
	var releaser struct {
		NFPMs []map[string]any `yaml:"nfpms"`
	}
	for file, v := range map[string]any{"../../packaging/nfpm.yaml": &ours, "../../.goreleaser.yaml": &releaser} {
		raw, err := os.ReadFile(file)
		if err == nil {
			raw = []byte(strings.ReplaceAll(string(raw), "${DIST}", "dist"))
			err = yaml.Unmarshal(raw, v)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	theirs = releaser.NFPMs[0]
	program := ours["contents"].([]any)[0] // goreleaser adds the program by itself
	if dst := program.(map[string]any)["dst"]; dst != "/usr/bin/breakwater" {
		t.Errorf("the first is %v", dst)
	}
	ours["contents"] = ours["contents"].([]any)[1:]
	theirs["dependencies"], theirs["depends"] = nil, theirs["dependencies"]
	for _, key := range []string{"contents", "scripts", "depends", "license", "maintainer", "description", "section", "priority"} {
		if diff := cmp.Diff(ours[key], theirs[key]); diff != "" || ours[key] == nil {
			t.Errorf("%s differs: %s", key, diff)
		}
	}

	need(t, "rpm", "dpkg-deb")
	dist, _ := packed(t)
	h := newHost(t)
	for deb, rpm := range map[string]string{"amd64": "x86_64", "arm64": "aarch64"} {
		in := func(args ...string) string {
			out, err := h.output(h.command(t.Context(), nil, args...))
			if err != nil {
				t.Fatal(err)
			}
			var files []string
			for line := range strings.Lines(out) {
				name := strings.TrimPrefix(line[strings.LastIndex(line, " ")+1:], ".")
				if !strings.HasSuffix(name, "/\n") {
					files = append(files, strings.Replace(name, "zsh/site-functions", "zsh/vendor-completions", 1))
				}
			}
			slices.Sort(files)
			return strings.Join(files, "")
		}
		file := filepath.Join(dist, "breakwater-0.0.1~test-1."+rpm+".rpm")
		if diff := cmp.Diff(in("dpkg-deb", "-c", filepath.Join(dist, "breakwater_0.0.1~test_"+deb+".deb")), in("rpm", "-qpl", file)); diff != "" {
			t.Errorf("%s: rpm and deb differ: %s", deb, diff)
		}
		if config, err := h.output(h.command(t.Context(), nil, "rpm", "-qpc", file)); err != nil || strings.TrimSpace(config) != "/etc/breakwater/breakwater.yaml" {
			t.Errorf("the rpm's configuration files: %v %s", err, config)
		}
	}
}

// TestPackagedConfiguration holds that the file in the packages changes nothing, and that what it
// suggests is right.
func TestPackagedConfiguration(t *testing.T) {
	t.Parallel()
	h := newHost(t)
	raw, err := os.ReadFile("../../packaging/breakwater.yaml")
	if err != nil {
		t.Fatal(err)
	}
	show := func(args ...string) string {
		out, err := h.output(h.command(t.Context(), nil, append([]string{binary(t), "config", "show"}, args...)...))
		if err != nil {
			t.Fatal(err)
		}
		return out
	}
	if diff := cmp.Diff(show(""), show(h.write(t, "as-is.yaml", string(raw)))); diff != "" {
		t.Errorf("it is not the default: %s", diff)
	}
	_, suggested, _ := strings.Cut(string(raw), "\n\n") // what is above tells about the file
	suggested = strings.ReplaceAll("\n"+suggested, "\n#", "\n")
	suggested = strings.Replace(suggested, "/etc/breakwater/hub-password", h.write(t, "hub-password", "x"), 1)
	if said := show(h.write(t, "suggested.yaml", suggested)); !strings.Contains(said, "username: builds") || !strings.Contains(said, "org/supervisor") {
		t.Errorf("it suggests\n%s", said)
	}
}
