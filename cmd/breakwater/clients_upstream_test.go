//go:build linux

package main_test

import (
	"archive/tar"
	"bytes"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"testing"

	"breakwater/pkg/registrytest"

	v1 "github.com/opencontainers/image-spec/specs-go/v1"
)

const upstreamAddr = "127.0.0.1:8080"

// An upstream is distribution's registry on a host. It has two ways in: clients and the mirror come
// by upstreamAddr, the test itself by its URL, which is outside of the host's network.
type upstream struct {
	*registrytest.Real
	host   *host
	server *registrytest.Server // at upstreamAddr, nil while it is killed
}

// upstream starts a registry on the host. It is up.
func (h *host) upstream(t *testing.T) *upstream {
	t.Helper()
	// Not in memory, where it would copy all of an upload again with every piece of it.
	registry, err := registrytest.NewReal(filepath.Join(h.dir, "upstream"))
	if err != nil {
		t.Fatal(err)
	}
	u := &upstream{Real: registry, host: h}
	t.Cleanup(func() {
		u.kill()
		_ = registry.Close()
	})
	u.up(t)
	return u
}

// up ends whatever ails the upstream.
func (u *upstream) up(t *testing.T) {
	t.Helper()
	u.Heal()
	if u.server != nil {
		return
	}
	l, err := u.host.listen(upstreamAddr)
	if err != nil {
		t.Fatal(err)
	}
	u.server = registrytest.Serve(l, u.Real)
}

// kill cuts all connections; new ones are refused.
func (u *upstream) kill() {
	if u.server != nil {
		_ = u.server.Close()
		u.server = nil
	}
}

// hang accepts connections and requests, and never answers.
func (u *upstream) hang() { u.Fault(registrytest.Match{}, registrytest.Hang()) }

// refuse answers every request with a status.
func (u *upstream) refuse(status int) {
	u.Fault(registrytest.Match{}, registrytest.Status(status, "Retry-After", "60"))
}

// push stores an image and returns the two names that it can be pulled by: with a tag, and with a digest.
func (u *upstream) push(t *testing.T, repository, tag string, image registrytest.Image) []string {
	t.Helper()
	if err := registrytest.Push(t.Context(), u.URL, repository, tag, image); err != nil {
		t.Fatal(err)
	}
	return []string{repository + ":" + tag, repository + "@" + image.Digest().String()}
}

const greeting = "hello from behind the breakwater"

// greeter is an image of several layers for this machine, of which no two seeds have one but the
// last in common. It runs the program that prints the greeting.
func greeter(t *testing.T, seed uint64) registrytest.Image {
	t.Helper()
	program, err := programLayer()
	if err != nil {
		t.Fatal(err)
	}
	return registrytest.NewImage(registrytest.Layer(2*seed, 1<<20), registrytest.Layer(2*seed+1, 3<<20), program).For("linux/" + runtime.GOARCH)
}

// pushBuild pushes what BuildKit makes: an index of two architectures with an attestation, and, for
// the registry has no referrers API, a signature of the attestation in a list under a tag.
func (u *upstream) pushBuild(t *testing.T, repository, tag string) []string {
	t.Helper()
	attestation := registrytest.NewImage(registrytest.Layer(101, 4<<10)).For("unknown/unknown")
	signature := registrytest.NewImage(registrytest.Layer(102, 4<<10)).Referring(attestation, "application/vnd.dev.sigstore.bundle.v0.3+json")
	u.push(t, repository, strings.Replace(attestation.Digest().String(), ":", "-", 1), registrytest.NewIndex(signature))
	return u.push(t, repository, tag, registrytest.NewIndex(greeter(t, 51).For("linux/s390x"), greeter(t, 52), attestation))
}

// programLayer is a layer with a static executable that prints the greeting, where an image of
// registrytest starts one.
var programLayer = sync.OnceValues(func() ([]byte, error) {
	dir, err := os.MkdirTemp("", "")
	if err != nil {
		return nil, err
	}
	defer func() { _ = os.RemoveAll(dir) }()
	source, data := filepath.Join(dir, "hello.go"), filepath.Join(dir, "data")
	text := "package main\n\nimport \"os\"\n\nfunc main() { os.Stdout.WriteString(\"" + greeting + "\\n\") }\n"
	if err := os.WriteFile(source, []byte(text), 0o600); err != nil {
		return nil, err
	}
	cmd := exec.Command("go", "build", "-ldflags=-s -w", "-o", data, source)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return nil, fmt.Errorf("build: %w\n%s", err, out)
	}
	executable, err := os.ReadFile(data)
	if err != nil {
		return nil, err
	}
	var layer bytes.Buffer
	w := tar.NewWriter(&layer)
	if err := w.WriteHeader(&tar.Header{Name: "data", Mode: 0o755, Size: int64(len(executable))}); err != nil {
		return nil, err
	}
	if _, err := w.Write(executable); err != nil {
		return nil, err
	}
	err = w.Close()
	return layer.Bytes(), err
})

// answer is a response with its whole body.
type answer struct {
	status int
	header http.Header
	body   string
}

// ask sends one request from the host.
func (h *host) ask(method, url string) (answer, error) {
	r, err := http.NewRequest(method, url, nil)
	if err != nil {
		return answer{}, err
	}
	r.Header.Set("Accept", strings.Join([]string{v1.MediaTypeImageManifest, v1.MediaTypeImageIndex}, ", "))
	res, err := h.client().Do(r)
	if err != nil {
		return answer{}, err
	}
	defer func() { _ = res.Body.Close() }()
	body, err := io.ReadAll(res.Body)
	return answer{res.StatusCode, res.Header, string(body)}, err
}
