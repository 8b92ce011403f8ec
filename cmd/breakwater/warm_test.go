//go:build linux

package main_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"net/http"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"time"

	"breakwater/pkg/registrytest"
)

// warmed is what --output json prints of an image.
type warmed struct {
	Image, Digest, Answered, Warning, Error string
	Bytes                                   int64
	Fetched                                 []string
}

func TestWarm(t *testing.T) {
	c := newControlled(t)
	m := c.start()
	at := "--mirror=" + m.url
	first := registrytest.NewImage(registrytest.Layer(1, 300<<10), registrytest.Layer(2, 40<<10))
	c.reg.Push("org/app", "v1", first)
	index := registrytest.NewIndex(registrytest.NewImage(registrytest.Layer(3, 1000)).For("linux/s390x"), registrytest.NewImage(registrytest.Layer(4, 1000)).For("linux/arm64"))
	c.reg.Push("org/index", "v1", index)
	c.want(1, "", "quay.test/org/app:v1: was not stored: ", "warm", at, "--stored", "org/app:v1")
	awaitStored(c, m, "/v2/org/app/", first)
	c.want(0, "quay.test/org/app:v1 "+first.Digest().String()+": 34", "", "warm", at, "org/app:v1")
	c.want(0, ", from the store\n", "", "warm", at, "--stored", "quay.test/org/app:v1", "quay.test/org/app@"+first.Digest().String())
	c.want(1, "", "quay.test/org/index:v1: is not for linux/mips, but for linux/s390x, linux/arm64", "warm", at, "--platform", "linux/mips", "org/index:v1")
	c.want(0, ", fetched\n", "", "warm", at, "--platform", "linux/s390x", "--platform", "linux/arm64", "org/index:v1")
	awaitStored(c, m, "/v2/org/index/", index.Images...)
	c.want(0, ", from the store\n", "", "warm", at, "--stored", "--platform", "linux/s390x,linux/arm64", "org/index:v1")

	moved := registrytest.NewImage(registrytest.Layer(5, 1000), registrytest.Layer(1, 300<<10))
	c.reg.Push("org/app", "v1", moved)
	c.want(1, "", "manifests/v1\n", "warm", at, "--stored", "org/app:v1")
	awaitStored(c, m, "/v2/org/app/", moved)
	c.want(0, ", from the store\n", "", "warm", at, "--stored", "org/app:v1")

	c.want(1, "", "quay.test/org/none:v1: MANIFEST_UNKNOWN: ", "warm", at, "org/none:v1")
	c.want(1, "", "other.test/org/app:v1: NAME_UNKNOWN: ", "warm", at, "other.test/org/app:v1")
	c.reg.Fault(registrytest.Match{}, registrytest.Status(http.StatusServiceUnavailable))
	c.want(0, ", STALE: stale by ", "", "warm", at, "--stored", "org/app:v1")
	code, out, said := c.run("warm", at, "--output", "json", "org/unseen:v1", "org/app:v1")
	var all []warmed
	if err := json.Unmarshal([]byte(out), &all); err != nil || code != 1 || len(all) != 2 {
		t.Fatalf("exit %d, %v\n%s%s", code, err, out, said)
	}
	if unseen := all[0]; unseen.Image != "quay.test/org/unseen:v1" || !strings.Contains(unseen.Error, ": UNAVAILABLE: ") || !strings.Contains(said, unseen.Error) {
		t.Errorf("never seen: %+v\nsaid %s", unseen, said)
	}
	if app := all[1]; app.Digest != moved.Digest().String() || app.Answered != "stale" || !strings.Contains(app.Warning, "answered 503") || app.Error != "" || app.Bytes < 300<<10 {
		t.Errorf("stale: %+v", app)
	}
	c.want(1, "", "quay.test/org/app:latest: UNAVAILABLE: ", "warm", at, "org/app")
}

// awaitStored waits until the mirror answers all of the images from its disk.
func awaitStored(c *controlled, m *crashing, path string, images ...registrytest.Image) {
	c.Helper()
	for _, image := range images {
		for _, blob := range image.Blobs {
			within(c.T, 20*time.Second, func() error {
				if _, cache, _ := m.get(path + "blobs/" + blob.Digest.String()); !strings.Contains(cache, "; hit") {
					return errors.New("not stored: " + cache)
				}
				return nil
			})
		}
	}
}

func TestWarmMistakes(t *testing.T) {
	c := newControlled(t)
	c.want(2, "", "which image?", "warm")
	c.want(2, "", `"Org/App" is not an image`, "warm", "org/app:v1", "Org/App")
	c.want(2, "", "--platform", "warm", "--platform", "amd64", "org/app:v1")
	c.want(2, "", "such as http://127.0.0.1:5000", "warm", "--mirror", "127.0.0.1:5000", "org/app:v1")
	c.want(2, "", "such as http://127.0.0.1:5000", "warm", "--mirror", "http://127.0.0.1:5000/x", "org/app:v1")
	c.want(1, "", "nobody listens at http://127.0.0.1:9: start the mirror with breakwater serve, or use --mirror", "warm", "--mirror", "http://127.0.0.1:9", "org/app:v1")
	// Another registry, which has the image by that very name.
	stranger := registrytest.New(registrytest.Config{})
	stranger.Push("quay.test/org/app", "v1", registrytest.NewImage(registrytest.Layer(1, 1000)))
	c.want(1, "", "was not answered by a breakwater", "warm", "--mirror", stranger.Start(t).URL, "org/app:v1")
}

func TestWarmStops(t *testing.T) {
	c := newControlled(t)
	m := c.start()
	image := registrytest.NewImage(registrytest.Layer(1, 1<<20))
	c.reg.Push("org/app", "v1", image)
	c.reg.Fault(registrytest.Match{Kind: registrytest.KindBlob}, registrytest.Stall(1000))
	var said bytes.Buffer
	cmd := exec.CommandContext(t.Context(), c.program, "warm", "--config", c.config, "--mirror", m.url, "org/app:v1")
	cmd.Stdout, cmd.Stderr = &said, &said
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	within(t, 20*time.Second, func() error {
		if c.reg.Count(registrytest.Match{Kind: registrytest.KindBlob}) == 0 {
			return errors.New("no blob is asked for")
		}
		return nil
	})
	_ = cmd.Process.Signal(syscall.SIGINT)
	err := cmd.Wait()
	if cmd.ProcessState.ExitCode() != 1 || !strings.Contains(said.String(), "quay.test/org/app:v1: stopped by a signal") {
		t.Errorf("%v\n%s", err, &said)
	}
}
