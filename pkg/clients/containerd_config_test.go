package clients

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestWarnings(t *testing.T) {
	const v2, v3 = "version = 2\n[plugins.\"io.containerd.grpc.v1.cri\".registry]\n", "version = 3\n[plugins.'io.containerd.cri.v1.images'.registry]\n"
	const good = "config_path = '/etc/containerd/certs.d'\n"
	const two = "config_path = '/etc/containerd/certs.d:/etc/docker/certs.d'\n"
	for _, row := range []struct {
		name, config, imported string
		want                   string // "" is no warning
	}{
		{"1", "[plugins.cri.registry]\n" + good, "", ""},
		{"2", v2 + good, "", ""},
		{"3", v3 + good, "", ""},
		{"with a slash", v3 + "config_path = '/etc/containerd/certs.d/'\n", "", ""},
		{"nothing at all", "", "", "has no config_path"},
		{"none", v2 + "config_path = ''\n", "", `below [plugins."io.containerd.grpc.v1.cri".registry]`},
		{"none in 3", v3, "", `below [plugins."io.containerd.cri.v1.images".registry]`},
		{"name of another version", strings.Replace(v2, "2", "3", 1) + good, "", "has no config_path"},
		{"two folders", v3 + two, "", "names 2 folders"},
		{"two folders, pulled as before", "version = 3\n[plugins.'io.containerd.cri.v1.images']\nuse_local_image_pull = true\n[plugins.'io.containerd.cri.v1.images'.registry]\n" + two, "", ""},
		{"another folder", v3 + "config_path = '/var/certs.d'\n", "", "reads /var/certs.d, not /etc/containerd/certs.d"},
		{"mirrors", v2 + "[plugins.\"io.containerd.grpc.v1.cri\".registry.mirrors.\"quay.io\"]\nendpoint = ['https://x']\n", "", "has registry.mirrors"},
		{"disabled", "disabled_plugins = ['cri']\n", "", "CRI plugin is disabled"},
		{"import sets it", "imports = ['conf.d/*.toml']\n" + v3, v3 + good, ""},
		{"import spoils it", "imports = ['conf.d/*.toml']\n" + v3 + good, v3 + two, "names 2 folders"},
		{"import says nothing", "imports = ['conf.d/*.toml']\n" + v3 + good, "version = 3\n", ""},
		{"import imports", "imports = ['conf.d/*.toml']\n" + v3 + good, "imports = ['../*.toml', '*']\n", ""},
		{"import is broken", "imports = ['conf.d/*.toml']\n" + v3 + good, "version = [\n", "not known whether"},
		{"broken", "version = [\n", "", "not known whether"},
		{"of odd types", "[plugins]\n'io.containerd.cri.v1.images' = 3\ncri = {registry = 'x'}\n", "", "has no config_path"},
	} {
		t.Run(row.name, func(t *testing.T) {
			dir := t.TempDir()
			for name, text := range map[string]string{"config.toml": row.config, "conf.d/a.toml": row.imported} {
				file := filepath.Join(dir, name)
				if err := os.MkdirAll(filepath.Dir(file), 0o700); err != nil {
					t.Fatal(err)
				}
				if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
					t.Fatal(err)
				}
			}
			got := strings.Join(Containerd{Dir: "/etc/containerd/certs.d"}.Warnings(filepath.Join(dir, "config.toml")), "\n")
			if (got == "") != (row.want == "") || !strings.Contains(got, row.want) {
				t.Errorf("%q, want %q", got, row.want)
			}
		})
	}
	broken := filepath.Join(t.TempDir(), "config.toml")
	if err := os.WriteFile(broken, []byte(v3), 0o600); err != nil {
		t.Fatal(err)
	}
	if got := (Containerd{Dir: dockerCerts}).Warnings(broken); got != nil {
		t.Errorf("of Docker's folder: %q", got)
	}
	if got := (Containerd{}).Warnings(filepath.Join(t.TempDir(), "config.toml")); got != nil {
		t.Errorf("of no file: %q", got)
	}
}
