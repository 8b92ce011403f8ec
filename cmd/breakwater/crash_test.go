//go:build linux

package main_test

import (
	"bufio"
	"bytes"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"breakwater/pkg/registrytest"

	"github.com/opencontainers/go-digest"
)

// sized is how much of a fault there is: in CI, or in full, by `make faults-full`. The variable's name
// is none that the program reads.
func sized[T any](ci, full T) T {
	if os.Getenv("FAULTS") == "full" {
		return full
	}
	return ci
}

// TestF45KilledAtAnyTime kills the real binary in the middle of concurrent fetches, again and again.
// Whatever it had called stored must be there after the restart, with every upstream out, and nothing
// else than verified content may be in the store.
func TestF45KilledAtAnyTime(t *testing.T) {
	rounds := sized(20, 500)
	program := binary(t)
	reg := registrytest.New(registrytest.Config{})
	up := reg.Start(t)
	dir := t.TempDir()
	config := filepath.Join(dir, "config.yaml")
	text := fmt.Sprintf("registries: {quay.test: {upstreams: [{url: %q}]}}\ndefault_registry: quay.test\n", up.URL)
	if err := os.WriteFile(config, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	data := filepath.Join(dir, "data")
	acknowledged, total, slowest := map[digest.Digest]bool{}, 0, time.Duration(0)
	looked := map[string]bool{}
	for round := range rounds {
		m := startMirror(t, program, config, data)
		slowest = max(slowest, m.ready)
		healed := reg.Fault(registrytest.Match{}, registrytest.Status(http.StatusServiceUnavailable))
		for dgst := range acknowledged {
			if status, cache, body := m.get("/v2/quay.test/org/app/blobs/" + dgst.String()); status != http.StatusOK || !strings.Contains(cache, "; hit") || digest.FromBytes(body) != dgst {
				t.Fatalf("round %d: %s was stored, now %d, %s, %d bytes", round, dgst, status, cache, len(body))
			}
		}
		healed()
		clear(acknowledged) // checked, and later rounds have enough to check
		for _, dgst := range m.fetchUntilKilled(reg, uint64(round)) {
			acknowledged[dgst] = true
		}
		checkBlobs(t, data, looked)
		reg.Forget() // a long run has no room for the bytes of all rounds
		total += len(acknowledged)
	}
	checkBlobs(t, data, nil)
	t.Logf("F45: %d rounds, %d blobs acknowledged, slowest start %v", rounds, total, slowest)
	if total == 0 {
		t.Error("nothing was acknowledged, so nothing was tested")
	}
	if slowest > 5*time.Second {
		t.Errorf("a start took %v", slowest)
	}
}

// crashing is a mirror that is going to be killed.
type crashing struct {
	*testing.T
	cmd    *exec.Cmd
	url    string
	ready  time.Duration
	client *http.Client
}

func startMirror(t *testing.T, program, config, data string) *crashing {
	t.Helper()
	cmd := exec.Command(program, "serve", "--config", config, "--data", data, "--listen", "127.0.0.1:0", "--admin", "127.0.0.1:0", "--log-format", "text")
	out, err := cmd.StderrPipe()
	if err != nil {
		t.Fatal(err)
	}
	started := time.Now()
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = cmd.Process.Kill() })
	said := io.TeeReader(out, registrytest.Watch(t))
	log := bufio.NewScanner(said)
	for log.Scan() {
		if _, rest, ok := strings.Cut(log.Text(), "msg=serving listen="); ok {
			address, _, _ := strings.Cut(rest, " ")
			go func() { _, _ = io.Copy(io.Discard, said) }() // ends with the process
			transport := &http.Transport{MaxIdleConnsPerHost: 64}
			t.Cleanup(transport.CloseIdleConnections)
			return &crashing{t, cmd, "http://" + address, time.Since(started), &http.Client{Transport: transport, Timeout: 20 * time.Second}}
		}
	}
	t.Fatal("the mirror ended before it served")
	return nil
}

// get returns status 0 if there was no whole answer.
func (m *crashing) get(path string) (status int, cache string, body []byte) {
	resp, err := m.client.Get(m.url + path)
	if err != nil {
		return 0, "", nil
	}
	defer resp.Body.Close()
	body, err = io.ReadAll(resp.Body)
	if err != nil {
		return 0, "", nil
	}
	return resp.StatusCode, resp.Header.Get("Cache-Status"), body
}

// fetchUntilKilled fetches new blobs from many clients, kills the mirror at some moment, and returns
// what it had called stored by then: an answer with Cache-Status hit.
func (m *crashing) fetchUntilKilled(reg *registrytest.Registry, round uint64) []digest.Digest {
	random := rand.New(rand.NewPCG(round, 45))
	var mu sync.Mutex // guards stored
	var stored, all []digest.Digest
	var clients sync.WaitGroup
	for client := range uint64(50) {
		blobs := []digest.Digest{}
		for i := range uint64(6) {
			blobs = append(blobs, reg.PutBlob("org/app", registrytest.Layer(round<<16|client<<8|i, 10<<10+random.IntN(200<<10))))
		}
		all = append(all, blobs...)
		clients.Go(func() {
			for _, dgst := range blobs {
				for range 100 { // until the mirror says that it is stored, not only passed on
					status, cache, body := m.get("/v2/quay.test/org/app/blobs/" + dgst.String())
					if status == 0 {
						return // killed
					}
					if digest.FromBytes(body) != dgst {
						m.Errorf("%s: %d, wrong bytes", dgst, status)
						return
					}
					if strings.Contains(cache, "; hit") {
						mu.Lock()
						stored = append(stored, dgst)
						mu.Unlock()
						break
					}
				}
			}
		})
	}
	kill := time.NewTimer(time.Duration(50+random.IntN(600)) * time.Millisecond)
	<-kill.C
	if err := m.cmd.Process.Kill(); err != nil {
		m.Fatal(err)
	}
	_ = m.cmd.Wait() // killed
	clients.Wait()
	for _, dgst := range all {
		reg.Delete("org/app", dgst.String())
	}
	return stored
}

// checkBlobs hashes everything that is in the store under a digest, but for what was looked at before.
func checkBlobs(t *testing.T, data string, looked map[string]bool) {
	t.Helper()
	root := filepath.Join(data, "blobs", "sha256")
	err := filepath.WalkDir(root, func(path string, e fs.DirEntry, err error) error {
		if err != nil || e.IsDir() || looked[path] {
			return err
		}
		if looked != nil {
			looked[path] = true
		}
		raw, err := os.ReadFile(path)
		if err == nil && digest.FromBytes(raw).Encoded() != e.Name() {
			err = fmt.Errorf("%s: %d bytes with another digest, zeros: %v", path, len(raw), len(bytes.Trim(raw, "\x00")) == 0)
		}
		return err
	})
	if err != nil {
		t.Error(err)
	}
}
