//go:build linux

package main_test

import (
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"testing"

	v1 "github.com/opencontainers/image-spec/specs-go/v1"
)

// userInImage is the user and group of the image's process.
const userInImage = 65532

// TestImage runs the image as tightly as an engine can: it serves, stores in a volume, and finds that there again.
func TestImage(t *testing.T) {
	for _, row := range []struct {
		name  string
		start func(*testing.T, *host) engine
		user  []string
		data  string // in the volume, as the configuration says, which is silent if that is ""
	}{{"podman", podmanEngine, nil, ""}, {"docker", dockerEngine, []string{"--user=65532"}, "moved"}} {
		t.Run(row.name, func(t *testing.T) {
			t.Parallel()
			dist, _ := packed(t)
			h := newHost(t, row.name, "skopeo")
			up := h.upstream(t)
			images := up.push(t, "org/image", "latest", greeter(t, 1))
			text := mirrored
			if row.data != "" {
				text += "data: /var/lib/breakwater/" + row.data + "\n"
			}
			config := h.write(t, "breakwater.yaml", text)
			if err := os.Chmod(config, 0o644); err != nil {
				t.Fatal(err)
			}
			e := row.start(t, h)
			image := e.load(t, filepath.Join(dist, "image")+":"+packVersion)
			for _, outage := range []bool{false, true} {
				if outage {
					up.kill()
				}
				cmd := e.command(t, slices.Concat([]string{"run"}, row.user, []string{"--rm", "--read-only", "--cap-drop=ALL", "--security-opt=no-new-privileges", "--network=host",
					"--volume=store:/var/lib/breakwater", "--volume=" + config + ":/etc/breakwater/breakwater.yaml:ro", image})...)
				log, err := os.Create(filepath.Join(h.dir, "run.log"))
				if err != nil {
					t.Fatal(err)
				}
				cmd.Stdout, cmd.Stderr = log, log
				if err := h.start(cmd); err != nil {
					t.Fatal(err)
				}
				t.Cleanup(func() { _ = cmd.Process.Kill(); _ = log.Close(); showLog(t, log.Name()) })
				within(t, patience, func() error {
					_, err := h.ask(http.MethodGet, "http://"+mirrorAddr+"/v2/")
					return err
				})
				for _, image := range images {
					if _, err := (&crane{h}).pull(t, mirrorAddr+"/quay.io/"+image); err != nil {
						t.Fatal(err)
					}
				}
				if err := cmd.Process.Signal(syscall.SIGTERM); err != nil {
					t.Fatal(err)
				}
				if err := cmd.Wait(); err != nil {
					t.Errorf("ended: %v", err)
				}
			}
			stored, err := os.Stat(filepath.Join(e.volumes(), "store", "_data", row.data, "oci-layout"))
			if err != nil {
				t.Fatal(err)
			}
			if owner := stored.Sys().(*syscall.Stat_t).Uid; owner != userInImage {
				t.Errorf("what it has stored is of user %d, want %d", owner, userInImage)
			}
		})
	}
}

// engine runs containers.
type engine interface {
	// load takes an image from an OCI layout, FOLDER:NAME, and returns what it is called.
	load(t *testing.T, layout string) string
	command(t *testing.T, args ...string) *exec.Cmd
	// volumes is the folder that volumes are in.
	volumes() string
}

func podmanEngine(t *testing.T, h *host) engine {
	t.Helper()
	return &podman{host: h, cgroup: newCgroup(t), storage: filepath.Join(h.dir, "podman")}
}

func (p *podman) load(t *testing.T, layout string) string {
	t.Helper()
	said, err := p.podman(t, "pull", "--quiet", "oci:"+layout)
	if err != nil {
		t.Fatal(err)
	}
	lines := strings.Fields(said)
	return lines[len(lines)-1]
}

func (p *podman) command(t *testing.T, args ...string) *exec.Cmd {
	t.Helper()
	args = slices.Insert(args, 1, "--cgroup-parent=/"+p.cgroup)
	return contain(p.host.command(t.Context(), nil, append([]string{"podman", "--root", p.storage, "--runroot=/run/podman", "--tmpdir=/run/libpod",
		"--cgroup-manager=cgroupfs", "--events-backend=file"}, args...)...))
}

func (p *podman) volumes() string { return filepath.Join(p.storage, "volumes") }

func dockerEngine(t *testing.T, h *host) engine {
	t.Helper()
	return startDocker(t, h).(*docker)
}

func (d *docker) load(t *testing.T, layout string) string {
	t.Helper()
	const name = "breakwater:test"
	if _, err := d.host.output(d.host.command(t.Context(), nil, "skopeo", "copy", "--quiet", "--dest-daemon-host=unix://"+d.socket, "oci:"+layout, "docker-daemon:"+name)); err != nil {
		t.Fatal(err)
	}
	return name
}

func (d *docker) command(t *testing.T, args ...string) *exec.Cmd {
	t.Helper()
	return d.host.command(t.Context(), nil, append([]string{"docker", "--host", "unix://" + d.socket}, args...)...)
}

func (d *docker) volumes() string { return filepath.Join(d.host.dir, "docker", "volumes") }

// TestPackedTwice makes everything again, from a copy of the tree in another folder: the same bytes come out.
func TestPackedTwice(t *testing.T) {
	t.Parallel()
	first, _ := packed(t)
	root, second := t.TempDir(), filepath.Join(t.TempDir(), "again")
	list := exec.Command("git", "ls-files", "--cached", "--others", "--exclude-standard", "-z")
	list.Dir = "../.."
	files, err := list.Output()
	if err != nil {
		t.Fatal(err)
	}
	for name := range strings.SplitSeq(strings.Trim(string(files), "\x00"), "\x00") {
		copyFile(t, filepath.Join("../..", name), filepath.Join(root, name))
	}
	if err := packIn(root, second); err != nil {
		t.Fatal(err)
	}
	one, two := sums(t, first), sums(t, second)
	for _, name := range slices.Sorted(maps.Keys(one)) {
		if one[name] != two[name] {
			t.Errorf("%s differs", name)
		}
	}
	if len(one) != len(two) || len(one) < 10 {
		t.Errorf("%d files, then %d", len(one), len(two))
	}
}

// copyFile copies a file, its mode too, if it is there.
func copyFile(t *testing.T, from, to string) {
	t.Helper()
	info, err := os.Stat(from)
	if errors.Is(err, fs.ErrNotExist) {
		return // deleted, but not yet for git
	}
	var content []byte
	if err == nil {
		content, err = os.ReadFile(from)
	}
	if err == nil {
		err = os.MkdirAll(filepath.Dir(to), 0o755)
	}
	if err == nil {
		err = os.WriteFile(to, content, info.Mode().Perm())
	}
	if err != nil {
		t.Fatal(err)
	}
}

// sums are those of all files below a folder.
func sums(t *testing.T, dir string) map[string][32]byte {
	t.Helper()
	sums := map[string][32]byte{}
	err := filepath.WalkDir(dir, func(path string, entry fs.DirEntry, err error) error {
		if err != nil || entry.IsDir() {
			return err
		}
		content, err := os.ReadFile(path)
		name, _ := filepath.Rel(dir, path)
		sums[name] = sha256.Sum256(content)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return sums
}

// TestImageLayout reads the layout as registries and scanners do.
func TestImageLayout(t *testing.T) {
	t.Parallel()
	dist, _ := packed(t)
	dir := filepath.Join(dist, "image")
	read := func(file string, v any) {
		t.Helper()
		content, err := os.ReadFile(filepath.Join(dir, file))
		if err == nil {
			err = json.Unmarshal(content, v)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	blob := func(d v1.Descriptor, v any) { t.Helper(); read("blobs/sha256/"+d.Digest.Encoded(), v) }
	var top, index v1.Index
	read("index.json", &top)
	blob(top.Manifests[0], &index)
	platforms := map[string]v1.Descriptor{}
	for _, d := range index.Manifests {
		platforms[d.Platform.OS+"/"+d.Platform.Architecture] = d
		var manifest v1.Manifest
		var config v1.Image
		blob(d, &manifest)
		blob(manifest.Config, &config)
		if config.Config.User != fmt.Sprintf("%d:%[1]d", userInImage) || config.Architecture != d.Platform.Architecture ||
			config.Config.Labels[v1.AnnotationVersion] != packVersion || config.Config.Labels[v1.AnnotationLicenses] != "Apache-2.0" {
			t.Errorf("%v: %+v", d.Platform, config)
		}
	}
	if len(platforms) != 2 || platforms["linux/amd64"].Digest == "" || platforms["linux/arm64"].Digest == "" {
		t.Errorf("platforms %v", platforms)
	}
	for _, d := range top.Manifests[1:] {
		var manifest v1.Manifest
		blob(d, &manifest)
		subject := manifest.Subject.Digest
		if subject != platforms["linux/amd64"].Digest && subject != platforms["linux/arm64"].Digest {
			t.Errorf("an SBOM of nothing: %+v", manifest)
		}
		var sbom struct {
			SPDXVersion string `json:"spdxVersion"`
			Packages    []struct {
				ID      string `json:"SPDXID"`
				Name    string `json:"name"`
				Version string `json:"versionInfo"`
				Licence string `json:"licenseConcluded"`
			} `json:"packages"`
			Relationships []struct {
				From string `json:"spdxElementId"`
				Type string `json:"relationshipType"`
				To   string `json:"relatedSpdxElement"`
			} `json:"relationships"`
		}
		blob(manifest.Layers[0], &sbom)
		ids := map[string]bool{"SPDXRef-DOCUMENT": true}
		names := map[string]string{}
		for _, p := range sbom.Packages {
			if ids[p.ID] || p.Licence == "" || p.Version == "" {
				t.Errorf("package %+v", p)
			}
			ids[p.ID], names[p.Name] = true, p.Version
		}
		for _, r := range sbom.Relationships {
			if !ids[r.From] || !ids[r.To] {
				t.Errorf("relationship %+v leads nowhere", r)
			}
		}
		if names["breakwater"] != packVersion || names["std"] != runtime.Version() || names["github.com/sony/gobreaker/v2"] == "" || sbom.SPDXVersion != "SPDX-2.3" || len(sbom.Relationships) != len(sbom.Packages) {
			t.Errorf("an SBOM with %v", names)
		}
	}
	if len(top.Manifests) != 3 {
		t.Errorf("%d manifests, want an index and two SBOMs", len(top.Manifests))
	}
}
