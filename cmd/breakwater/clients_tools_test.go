//go:build linux

package main_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// configureContainers names the mirror for one registry, where podman, skopeo and their kin read it.
func configureContainers(t *testing.T, h *host) {
	t.Helper()
	h.write(t, ".config/containers/registries.conf", fmt.Sprintf(
		"[[registry]]\nprefix = \"quay.io\"\nlocation = \"quay.io\"\n[[registry.mirror]]\nlocation = %q\ninsecure = true\n", mirrorAddr+"/quay.io"))
}

// podman has a new storage for each pull.
type podman struct {
	host    *host
	cgroup  string
	storage string
}

func startPodman(t *testing.T, h *host) client {
	t.Helper()
	configureContainers(t, h)
	return &podman{host: h, cgroup: newCgroup(t)}
}

func (p *podman) podman(t *testing.T, args ...string) (string, error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	args = append([]string{"podman", "--root", p.storage, "--runroot=/run/podman", "--tmpdir=/run/libpod",
		"--cgroup-manager=cgroupfs", "--events-backend=file"}, args...)
	return p.host.output(contain(p.host.command(ctx, nil, args...)))
}

func (p *podman) pull(t *testing.T, image string) (string, error) {
	t.Helper()
	var err error
	if p.storage, err = os.MkdirTemp(p.host.dir, "podman"); err != nil {
		return "", err
	}
	return p.podman(t, "pull", image)
}

func (p *podman) run(t *testing.T, image string) (string, error) {
	t.Helper()
	return p.podman(t, "run", "--rm", "--network=none", "--cgroup-parent", "/"+p.cgroup, image)
}

// skopeo copies an image into an OCI layout. It runs nothing.
type skopeo struct{ host *host }

func startSkopeo(t *testing.T, h *host) client {
	t.Helper()
	configureContainers(t, h)
	return &skopeo{h}
}

func (s *skopeo) pull(t *testing.T, image string) (string, error) {
	t.Helper()
	dir, err := os.MkdirTemp(s.host.dir, "skopeo")
	if err != nil {
		return "", err
	}
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	return s.host.output(s.host.command(ctx, nil, "skopeo", "copy", "docker://"+image, "oci:"+dir))
}

func (s *skopeo) run(*testing.T, string) (string, error) { return "", errors.ErrUnsupported }

// crane pulls all platforms of an image into an OCI layout. It runs nothing.
type crane struct{ host *host }

func startCrane(_ *testing.T, h *host) client { return &crane{h} }

func (c *crane) pull(t *testing.T, image string) (string, error) {
	t.Helper()
	dir := filepath.Join(c.host.dir, "crane")
	if err := os.RemoveAll(dir); err != nil {
		return "", err
	}
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	return c.host.output(c.host.command(ctx, nil, cached("crane"), "pull", "--format=oci", image, dir))
}

func (c *crane) run(*testing.T, string) (string, error) { return "", errors.ErrUnsupported }

// library is containerd's resolver and fetcher, used as Docker Engine 29 uses them: it asks for the
// referrers of each manifest too, and an error there fails the pull. It runs nothing.
type library struct{ host *host }

func startLibrary(t *testing.T, h *host) client {
	t.Helper()
	writeHosts(t, h, `"pull", "resolve", "referrers"`)
	return &library{h}
}

// pull wants an index's attestation to come with its signature.
func (l *library) pull(t *testing.T, image string) (string, error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	out, err := l.host.output(l.host.command(ctx, nil, cached("containerd-client"), filepath.Join(l.host.dir, "certs.d"), image))
	if err == nil && strings.Contains(image, "/build") && !strings.Contains(out, "referrer: ") {
		err = fmt.Errorf("%s came without its signature:\n%s", image, out)
	}
	return out, err
}

func (l *library) run(*testing.T, string) (string, error) { return "", errors.ErrUnsupported }
