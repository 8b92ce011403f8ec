//go:build linux

package main_test

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

// patience is how long one command of a client may take.
const patience = time.Minute

// docker is a dockerd of the test's own, with the mirror as its registry-mirror. Its fallback, the
// Hub, cannot be reached from a host.
type docker struct {
	host   *host
	socket string
}

func startDocker(t *testing.T, h *host) client {
	t.Helper()
	return startDockerWith(t, h)
}

func startDockerWith(t *testing.T, h *host, variables ...string) *docker {
	t.Helper()
	d := &docker{h, filepath.Join(h.dir, "docker.sock")}
	h.daemon(t, h.command(t.Context(), variables, "dockerd",
		"--data-root", filepath.Join(h.dir, "docker"), "--exec-root", filepath.Join(h.dir, "docker-exec"),
		"--host", "unix://"+d.socket, "--pidfile", filepath.Join(h.dir, "docker.pid"),
		"--cgroup-parent", "/"+newCgroup(t),
		"--iptables=false", "--ip6tables=false", "--bridge=none",
		"--registry-mirror", "http://"+mirrorAddr), d.socket)
	return d
}

// newCgroup returns a name for the parent of containers' control groups. Engines make it and leave
// it behind, in each hierarchy.
func newCgroup(t *testing.T) string {
	t.Helper()
	name := fmt.Sprintf("breakwater-%d", time.Now().UnixNano())
	t.Cleanup(func() {
		for _, pattern := range []string{"/sys/fs/cgroup/" + name, "/sys/fs/cgroup/*/" + name} {
			found, _ := filepath.Glob(pattern) // the pattern is good
			for _, root := range found {
				removeFolders(t, root)
			}
		}
	})
	return name
}

// removeFolders removes a tree whose files vanish with their folders.
func removeFolders(t *testing.T, root string) {
	t.Helper()
	var folders []string
	err := filepath.WalkDir(root, func(path string, entry fs.DirEntry, err error) error {
		if err == nil && entry.IsDir() {
			folders = append(folders, path)
		}
		return err
	})
	slices.Reverse(folders)
	for _, folder := range folders {
		err = errors.Join(err, os.Remove(folder))
	}
	if err != nil {
		t.Error(err)
	}
}

func (d *docker) docker(t *testing.T, args ...string) (string, error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	return d.host.output(d.host.command(ctx, nil, append([]string{"docker", "--host", "unix://" + d.socket}, args...)...))
}

func (d *docker) pull(t *testing.T, image string) (string, error) {
	t.Helper()
	if out, err := d.docker(t, "image", "prune", "--all", "--force"); err != nil {
		return out, err
	}
	left, err := d.docker(t, "images", "--all", "--quiet")
	if err == nil && left != "" {
		err = fmt.Errorf("docker keeps images:\n%s", left)
	}
	if err != nil {
		return left, err
	}
	return d.docker(t, "pull", image)
}

func (d *docker) run(t *testing.T, image string) (string, error) {
	t.Helper()
	return d.docker(t, "run", "--rm", "--network=none", image)
}

// containerd is a containerd of the test's own, with ctr, and hosts.toml files that name the mirror.
type containerd struct {
	host *host
	ctr  string
	bin  string // the folder that its shim is in, "" for the usual
}

func startDebianContainerd(t *testing.T, h *host) client {
	t.Helper()
	c := &containerd{host: h, ctr: "ctr"}
	c.start(t, "containerd", `"pull", "resolve"`)
	return c
}

func startContainerd(t *testing.T, h *host) client {
	t.Helper()
	c := &containerd{host: h, ctr: cached("ctr"), bin: filepath.Dir(cached("ctr"))}
	c.start(t, cached("containerd"), `"pull", "resolve", "referrers"`)
	return c
}

func (c *containerd) start(t *testing.T, program, capabilities string) {
	t.Helper()
	h := c.host
	writeHosts(t, h, capabilities)
	config := h.write(t, "containerd.toml", fmt.Sprintf(
		"version = 2\nroot = %q\nstate = %q\ndisabled_plugins = [\"io.containerd.grpc.v1.cri\"]\n[grpc]\n  address = %q\n",
		filepath.Join(h.dir, "containerd"), filepath.Join(h.dir, "containerd-state"), c.socket()))
	var variables []string
	if c.bin != "" {
		variables = append(variables, "PATH="+c.bin+":"+os.Getenv("PATH"))
	}
	h.daemon(t, h.command(t.Context(), variables, program, "--config", config), c.socket())
}

// writeHosts names the mirror for every registry, as containerd and what is made of it read it. It
// is the server too: there is nowhere else to go.
func writeHosts(t *testing.T, h *host, capabilities string) {
	t.Helper()
	h.write(t, "certs.d/_default/hosts.toml", fmt.Sprintf(
		"server = %[1]q\n[host.%[1]q]\n  capabilities = [%[2]s]\n", "http://"+mirrorAddr, capabilities))
}

func (c *containerd) socket() string { return filepath.Join(c.host.dir, "containerd.sock") }

func (c *containerd) do(t *testing.T, args ...string) (string, error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	return c.host.output(c.host.command(ctx, []string{"CONTAINERD_SUPPRESS_DEPRECATION_WARNINGS=1"}, append([]string{c.ctr, "--address", c.socket()}, args...)...))
}

func (c *containerd) pull(t *testing.T, image string) (string, error) {
	t.Helper()
	images, err := c.do(t, "images", "ls", "--quiet")
	if err != nil {
		return images, err
	}
	for _, image := range strings.Fields(images) {
		if out, err := c.do(t, "images", "rm", "--sync", image); err != nil {
			return out, err
		}
	}
	left, err := c.do(t, "content", "ls", "--quiet")
	if err == nil && strings.Contains(left, "sha256:") {
		err = fmt.Errorf("containerd keeps content:\n%s", left)
	}
	if err != nil {
		return left, err
	}
	return c.do(t, "images", "pull", "--hosts-dir", filepath.Join(c.host.dir, "certs.d"), image)
}

// run has the shim write what the container prints: ctr itself loses it if the container is quick.
func (c *containerd) run(t *testing.T, image string) (string, error) {
	t.Helper()
	id := fmt.Sprintf("run-%d", time.Now().UnixNano())
	log := filepath.Join(c.host.dir, id+".log")
	if out, err := c.do(t, "run", "--rm", "--cgroup=", "--log-uri", "file://"+log, image, id); err != nil {
		return out, err
	}
	printed, err := os.ReadFile(log)
	return string(printed), err
}
