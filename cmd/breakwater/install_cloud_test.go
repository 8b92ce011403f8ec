//go:build linux

package main_test

import (
	"encoding/json"
	"net/http"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"

	"go.yaml.in/yaml/v4"
)

// TestCloudInit checks the example as cloud-init does, and what is in it as we do.
func TestCloudInit(t *testing.T) {
	t.Parallel()
	h := newHost(t)
	raw, err := os.ReadFile("../../packaging/cloud-init.yaml")
	if err != nil {
		t.Fatal(err)
	}
	m := boot(t, h)
	m.put(t, "/root/user-data", string(raw))
	if said := m.run(t, "cloud-init", "schema", "--config-file", "/root/user-data"); !strings.Contains(said, "Valid cloud-config") {
		t.Errorf("cloud-init says %s", said)
	}
	var data struct {
		Files []struct{ Path, Content string } `yaml:"write_files"`
	}
	if err := yaml.Unmarshal(raw, &data); err != nil {
		t.Fatal(err)
	}
	for _, file := range data.Files {
		switch filepath.Ext(file.Path) {
		case ".json":
			if !json.Valid([]byte(file.Content)) {
				t.Errorf("%s is no JSON", file.Path)
			}
		case ".yaml":
			config := h.write(t, "breakwater.yaml", strings.Replace(file.Content, "/etc/breakwater/fleet.key", h.write(t, "fleet.key", strings.Repeat("5a", 32)+"\n"), 1))
			if out, err := h.output(h.command(t.Context(), nil, binary(t), "config", "check", config)); err != nil {
				t.Error(out)
			}
		default:
			t.Errorf("what is %s?", file.Path)
		}
	}
	if len(data.Files) != 2 {
		t.Errorf("%d files", len(data.Files))
	}
	m.testFirstBoot(t, raw)
}

// repository is a script that makes one for apt, with a docker.io that notes how it was installed, and leaves
// the machine with no list of any repository, as cloud images come.
const repository = `set -e
mkdir -p /srv/repository/docker/DEBIAN
cd /srv/repository
cat >docker/DEBIAN/control <<'EOF'
Package: docker.io
Version: 1
Architecture: all
Maintainer: nobody
Description: stands for Docker
EOF
cat >docker/DEBIAN/postinst <<'EOF'
#!/bin/sh
systemctl is-active breakwater.socket >/root/docker
cat /etc/docker/daemon.json >>/root/docker
EOF
chmod 755 docker/DEBIAN/postinst
dpkg-deb --build docker docker.deb
{ cat docker/DEBIAN/control; echo "Filename: ./docker.deb"; stat --format='Size: %s' docker.deb; echo "SHA256: $(sha256sum docker.deb | cut -d' ' -f1)"; } >Packages
echo 'deb [trusted=yes] file:/srv/repository ./' >/etc/apt/sources.list
rm -rf /var/lib/apt/lists/*
`

// download stands for curl. Meanwhile the machine's own upgrades begin, and hold dpkg's lock for a while.
const download = `#!/bin/sh
set -e
[ "$1" = -fsSLo ]
cp /root/breakwater.deb "$2"
systemd-run --quiet python3 -c 'import fcntl, time
lock = open("/var/lib/dpkg/lock-frontend", "w")
fcntl.lockf(lock, fcntl.LOCK_EX)
open("/run/locked", "w")
time.sleep(2)'
until [ -e /run/locked ]; do sleep 0.1; done
`

// testFirstBoot has cloud-init do all that the example says. What would come from elsewhere comes from the
// machine itself: the package, Docker, and the fleet's key.
func (m *machine) testFirstBoot(t *testing.T, data []byte) {
	dist, _ := packed(t)
	deb, err := os.ReadFile(filepath.Join(dist, "breakwater_0.0.1~test_"+runtime.GOARCH+".deb"))
	if err != nil {
		t.Fatal(err)
	}
	m.put(t, "/root/breakwater.deb", string(deb))
	m.put(t, "/usr/local/bin/curl", download)
	m.put(t, "/usr/local/bin/get-fleet-key", "#!/bin/sh\necho "+strings.Repeat("5a", 32)+"\n")
	m.run(t, "chmod", "755", "/usr/local/bin/curl", "/usr/local/bin/get-fleet-key")
	m.put(t, "/root/repository.sh", repository)
	m.run(t, "sh", "/root/repository.sh")
	m.put(t, "/etc/cloud/cloud.cfg.d/99-test.cfg", `datasource_list: [NoCloud]
network: {config: disabled}
# Of Debian's, in their order, those that have to do with the example.
cloud_init_modules: [write-files]
cloud_config_modules: [runcmd]
cloud_final_modules: [package-update-upgrade-install, scripts-user]
`)
	m.put(t, "/var/lib/cloud/seed/nocloud/meta-data", "instance-id: test\n")
	m.put(t, "/var/lib/cloud/seed/nocloud/user-data", string(data)+"    umask >/root/end # a command of somebody's own\n")
	for _, stage := range []string{"init --local", "init", "modules --mode=config", "modules --mode=final"} {
		if said, err := m.try(append([]string{"cloud-init"}, strings.Fields(stage)...)...); err != nil {
			log, _ := m.try("tail", "--lines=60", "/var/log/cloud-init-output.log", "/var/log/cloud-init.log")
			t.Fatalf("cloud-init %s: %v\n%s\n%s", stage, err, said, log)
		}
	}
	if found := m.run(t, "cat", "/root/docker"); !strings.HasPrefix(found, "active\n") || !strings.Contains(found, mirrorAddr) {
		t.Errorf("Docker found at its installation\n%s", found)
	}
	if umask := m.run(t, "cat", "/root/end"); umask != "0022" {
		t.Errorf("what follows has umask %s", umask)
	}
	if mode := m.run(t, "stat", "--format=%U %a", "/etc/breakwater/fleet.key"); mode != "breakwater 600" {
		t.Errorf("the fleet's key is %s", mode)
	}
	if got, err := m.ask(http.MethodGet, "http://"+mirrorAddr+"/v2/"); err != nil || got.status != http.StatusOK {
		t.Errorf("the mirror: %d %v", got.status, err)
	}
}
