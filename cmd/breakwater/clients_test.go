//go:build linux

package main_test

import (
	"errors"
	"net/http"
	"strings"
	"testing"
	"time"
)

// A client pulls images through the mirror, on a host.
type client interface {
	// pull pulls an image into an empty store of the client's own, and returns what the client printed.
	pull(t *testing.T, image string) (string, error)
	// run runs the image that was pulled last and returns what it printed, or errors.ErrUnsupported.
	run(t *testing.T, image string) (string, error)
}

// clients are the rows of the table; outages are its columns.
var clients = []struct {
	name     string
	programs []string
	start    func(t *testing.T, h *host) client
	// registry is what the names of the client's images begin with.
	registry string
	// warns: the client prints the Warning of a stale answer.
	warns bool
	// refusal is what the client prints of the 503 for an image that is not stored.
	refusal string
	// runs: the client runs what it has pulled.
	runs bool
}{
	// Docker asks the Hub in its mirror's place and tells of the Hub's error only.
	{"docker", []string{"dockerd", "docker"}, startDocker, "docker.io", false, "registry-1.docker.io", true},
	{"containerd-1.6", []string{"containerd", "ctr"}, startDebianContainerd, "quay.io", false, "503 Service Unavailable", true},
	{"containerd-2.4", []string{cached("containerd"), cached("ctr")}, startContainerd, "quay.io", false, "503 Service Unavailable", true},
	{"containerd-client", []string{cached("containerd-client")}, startLibrary, "docker.io", true, "503 Service Unavailable", false},
	{"podman", []string{"podman"}, startPodman, "quay.io", false, "503 Service Unavailable", true},
	{"skopeo", []string{"skopeo"}, startSkopeo, "quay.io", false, "503 Service Unavailable", false},
	{"crane", []string{cached("crane")}, startCrane, mirrorAddr + "/quay.io", true, upstreamAddr, false},
}

var outages = []struct {
	name  string
	begin func(u *upstream)
}{
	{"killed", (*upstream).kill},
	{"hanging", (*upstream).hang},
	{"503", func(u *upstream) { u.refuse(http.StatusServiceUnavailable) }},
	{"429", func(u *upstream) { u.refuse(http.StatusTooManyRequests) }},
}

// mirrored is a mirror's configuration with two registries, both of them on the test's upstream.
const mirrored = `
listen: ` + mirrorAddr + `
admin: ` + adminAddr + `
registries:
  docker.io:
    upstreams:
      - url: http://` + upstreamAddr + `
  quay.io:
    upstreams:
      - url: http://` + upstreamAddr + `
`

// TestClients has each client pull everything once while upstream is up, and again, with an empty
// store, in each kind of outage.
func TestClients(t *testing.T) {
	for _, row := range clients {
		t.Run(row.name, func(t *testing.T) {
			t.Parallel()
			h := newHost(t, row.programs...)
			up := h.upstream(t)
			images := append(up.push(t, "org/image", "latest", greeter(t, 1).Docker()), up.pushBuild(t, "org/build", "latest")...)
			for i, name := range images {
				images[i] = row.registry + "/" + name
			}
			up.push(t, "org/unseen", "latest", greeter(t, 2))
			c := row.start(t, h)
			t.Run("up", func(t *testing.T) {
				m := h.serve(t, mirrored)
				if said := pullAll(t, c, images); strings.Contains(said, "stale") {
					t.Errorf("an image was stale:\n%s", said)
				}
				m.stop(t)
			})
			for _, outage := range outages {
				t.Run(outage.name, func(t *testing.T) {
					up.up(t)
					m := h.serve(t, mirrored)
					freshly(t, h, images[0])
					outage.begin(up)
					said := pullAll(t, c, images)
					if warned := strings.Contains(said, "stale"); warned != row.warns {
						t.Errorf("a warning was printed: %v, want %v:\n%s", warned, row.warns, said)
					}
					said, err := c.pull(t, row.registry+"/org/unseen:latest")
					if err == nil || !strings.Contains(said, row.refusal) {
						t.Errorf("an image that was never pulled: %v, want an error with %q:\n%s", err, row.refusal, said)
					}
					m.stop(t)
				})
			}
		})
	}
}

// pullAll pulls and runs each image, and returns all that the client printed while pulling.
func pullAll(t *testing.T, c client, images []string) string {
	t.Helper()
	var said strings.Builder
	for _, image := range images {
		begin := time.Now()
		out, err := c.pull(t, image)
		if err != nil {
			t.Fatal(err)
		}
		t.Logf("pulled %s in %v", image, time.Since(begin).Round(time.Millisecond))
		said.WriteString(out)
		out, err = c.run(t, image)
		if errors.Is(err, errors.ErrUnsupported) {
			continue
		}
		if err != nil {
			t.Fatal(err)
		}
		if strings.TrimSpace(out) != greeting {
			t.Errorf("%s printed %q, want %q", image, out, greeting)
		}
	}
	return said.String()
}

// freshly asks for an image by tag and wants an answer that upstream has just confirmed.
func freshly(t *testing.T, h *host, image string) {
	t.Helper()
	name, tag, _ := strings.Cut(strings.TrimPrefix(image, mirrorAddr+"/"), ":")
	got, err := h.ask(http.MethodHead, "http://"+mirrorAddr+"/v2/"+name+"/manifests/"+tag)
	if err != nil {
		t.Fatal(err)
	}
	if got.status != http.StatusOK || got.header.Get("Warning") != "" {
		t.Fatalf("HEAD %s: %d %v, want a fresh 200", image, got.status, got.header)
	}
}
