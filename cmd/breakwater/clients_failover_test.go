//go:build linux

package main_test

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"breakwater/pkg/registrytest"
)

// secondAddr is where an upstream's content can be had too, without what ails the upstream itself.
const secondAddr = "127.0.0.1:8082"

// mirroredTwice is mirrored with two upstreams for each registry.
var mirroredTwice = strings.ReplaceAll(mirrored,
	"      - url: http://"+upstreamAddr+"\n", "      - url: http://"+upstreamAddr+"\n      - url: http://"+secondAddr+"\n")

// second serves the upstream's content at secondAddr.
func (u *upstream) second(t *testing.T) {
	t.Helper()
	l, err := u.host.listen(secondAddr)
	if err != nil {
		t.Fatal(err)
	}
	server := registrytest.Serve(l, u.Real)
	t.Cleanup(func() { _ = server.Close() })
}

// beside is another folder on the same network, for clients that would write the same files.
func (h *host) beside(t *testing.T) *host {
	t.Helper()
	return &host{dir: t.TempDir(), work: h.work}
}

const (
	largeLayer = 32 << 20
	middle     = largeLayer / 2
)

// heavy is an image with a large layer that prints the greeting.
func heavy(t *testing.T, seed uint64) registrytest.Image {
	t.Helper()
	program, err := programLayer()
	if err != nil {
		t.Fatal(err)
	}
	return registrytest.NewImage(registrytest.Layer(seed, largeLayer), program).For("linux/" + runtime.GOARCH)
}

// TestF04UpstreamDiesInALayer has engines pull an image each, whose first upstream dies in the middle
// of the large layer. The second is asked for the rest, and the engines notice nothing. One more
// client, which does nothing but read a layer, sees what an engine does not tell.
func TestF04UpstreamDiesInALayer(t *testing.T) {
	inTheMiddle := registrytest.Match{Kind: registrytest.KindBlob, Host: upstreamAddr}
	for _, row := range []struct {
		name  string
		begin func(t *testing.T, up *upstream)
		die   func(t *testing.T, up *upstream, layers []registrytest.Blob)
	}{
		{"killed", func(_ *testing.T, up *upstream) {
			up.Fault(inTheMiddle, registrytest.Stall(middle))
		}, func(t *testing.T, up *upstream, layers []registrytest.Blob) {
			up.awaitMiddle(t, layers)
			up.kill()
		}},
		{"black hole", func(t *testing.T, up *upstream) {
			up.host.filter(t, "--append INPUT -p tcp --sport 8080 -m connbytes --connbytes "+strconv.Itoa(middle)+": --connbytes-dir reply --connbytes-mode bytes -j DROP")
		}, func(*testing.T, *upstream, []registrytest.Blob) {}},
		{"hanging", func(_ *testing.T, up *upstream) {
			up.Fault(inTheMiddle, registrytest.Stall(middle))
		}, func(t *testing.T, up *upstream, layers []registrytest.Blob) {
			up.awaitMiddle(t, layers)
			up.Fault(registrytest.Match{Host: upstreamAddr}, registrytest.Hang())
		}},
	} {
		t.Run(row.name, func(t *testing.T) {
			t.Parallel()
			h := newHost(t, "iptables")
			up := h.upstream(t)
			up.second(t)
			row.begin(t, up)
			var pulling sync.WaitGroup
			defer pulling.Wait()
			var layers []registrytest.Blob
			var pulls []func()
			for i, engine := range clients {
				if !engine.runs {
					continue
				}
				need(t, engine.programs...)
				image := heavy(t, uint64(i))
				layers = append(layers, image.Blobs[1])
				name := engine.registry + "/" + up.push(t, "org/"+engine.name, "latest", image)[0]
				c := engine.start(t, h.beside(t))
				pulls = append(pulls, func() { pullUnaware(t, c, name) })
			}
			image := heavy(t, 100)
			layers = append(layers, image.Blobs[1])
			up.push(t, "org/image", "latest", image)
			var seen pauses
			pulls = append(pulls, func() { seen = h.watch(t, image.Blobs[1]) })
			m := h.serve(t, mirroredTwice)
			for _, pull := range pulls {
				pulling.Go(pull)
			}
			row.die(t, up, layers)
			pulling.Wait()
			for _, layer := range layers {
				up.wantOneResume(t, layer)
				h.wantOneGET(t, layer)
			}
			if seen.longest > 20*time.Second+scheduling {
				t.Errorf("nothing came for %v, want 20s at most", seen.longest)
			}
			if from := up.resumedAt(t, image.Blobs[1]); from != seen.at {
				t.Errorf("went on from %d, want %d, which is what had come", from, seen.at)
			}
			t.Logf("the longest pause was %v, after %d bytes", seen.longest.Round(time.Millisecond), seen.at)
			m.stop(t)
		})
	}
}

// awaitMiddle waits until upstream has sent what it will of each layer.
func (u *upstream) awaitMiddle(t *testing.T, layers []registrytest.Blob) {
	t.Helper()
	within(t, patience, func() error {
		for _, layer := range layers {
			gets := u.gets(upstreamAddr, layer)
			if len(gets) == 0 || gets[0].Sent < middle {
				return fmt.Errorf("%s: not in the middle: %d requests", layer.Digest, len(gets))
			}
		}
		return nil
	})
}

// gets are the requests for a blob's bytes at one of upstream's addresses.
func (u *upstream) gets(addr string, blob registrytest.Blob) []registrytest.Request {
	return u.Requests(registrytest.Match{Kind: registrytest.KindBlob, Method: http.MethodGet, Host: addr, Path: blob.Digest.String()})
}

// wantOneResume wants the layer to have been begun at the first address, once, and ended at the other.
func (u *upstream) wantOneResume(t *testing.T, layer registrytest.Blob) {
	t.Helper()
	if first := u.gets(upstreamAddr, layer); len(first) != 1 || first[0].Header.Get("Range") != "" {
		t.Errorf("the first upstream was asked %d times for %s, want once", len(first), layer.Digest)
	}
	if from := u.resumedAt(t, layer); from <= 0 || from > middle {
		t.Errorf("%s went on from %d of %d bytes", layer.Digest, from, largeLayer)
	}
}

// resumedAt is where the second upstream was asked to begin, the only time that it was asked.
func (u *upstream) resumedAt(t *testing.T, layer registrytest.Blob) int {
	t.Helper()
	second := u.gets(secondAddr, layer)
	if len(second) != 1 {
		t.Errorf("the second upstream was asked %d times for %s, want once", len(second), layer.Digest)
		return -1
	}
	var from int
	if _, err := fmt.Sscanf(second[0].Header.Get("Range"), "bytes=%d-", &from); err != nil {
		t.Errorf("the second upstream was asked for Range %q", second[0].Header.Get("Range"))
	}
	return from
}

// wantOneGET wants the mirror to have been asked for a layer once: nobody tried again.
func (h *host) wantOneGET(t *testing.T, layer registrytest.Blob) {
	t.Helper()
	within(t, 10*time.Second, func() error {
		log, err := os.ReadFile(filepath.Join(h.dir, "mirror.log"))
		asked := regexp.MustCompile(`"msg":"request","method":"GET",.*"`+layer.Digest.String()+`".*"status":200`).FindAll(log, -1)
		if err == nil && len(asked) != 1 {
			err = fmt.Errorf("%d whole answers with %s, want 1:\n%s", len(asked), layer.Digest, bytes.Join(asked, []byte("\n")))
		}
		return err
	})
}

var troubled = regexp.MustCompile(`(?i)error|retry|fail|reset|timeout|warn|unexpected`)

// pullUnaware pulls and runs an image, and wants the client to have had nothing to tell.
func pullUnaware(t *testing.T, c client, image string) {
	t.Helper()
	said, err := c.pull(t, image)
	if err != nil {
		t.Error(err)
		return
	}
	if troubled.MatchString(said) {
		t.Errorf("%s: the client noticed:\n%s", image, said)
	}
	if out, err := c.run(t, image); err != nil || strings.TrimSpace(out) != greeting {
		t.Errorf("%s printed %q, %v, want %q", image, out, err, greeting)
	}
}

// pauses is how evenly a body came.
type pauses struct {
	longest time.Duration
	at      int // bytes that had come before the longest
}

// watch gets a blob of the repository org/image and wants it whole.
func (h *host) watch(t *testing.T, blob registrytest.Blob) pauses {
	t.Helper()
	var seen pauses
	res, err := h.client().Get("http://" + mirrorAddr + "/v2/org/image/blobs/" + blob.Digest.String())
	if err != nil {
		t.Error(err)
		return seen
	}
	defer func() { _ = res.Body.Close() }()
	body := make([]byte, 0, blob.Size+1) // room for the end
	for last := time.Now(); err == nil; last = time.Now() {
		var n int
		n, err = res.Body.Read(body[len(body):cap(body)])
		if pause := time.Since(last); pause > seen.longest {
			seen = pauses{pause, len(body)}
		}
		body = body[:len(body)+n]
	}
	if !errors.Is(err, io.EOF) || !bytes.Equal(body, blob.Bytes) {
		t.Errorf("%d with %d bytes, want the blob's %d: %v", res.StatusCode, len(body), len(blob.Bytes), err)
	}
	return seen
}
