//go:build linux

package main_test

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"breakwater/pkg/registrytest"

	"github.com/opencontainers/go-digest"
)

// diskRig is the real mirror on a disk of its own, which is small, and its upstream quay.test.
type diskRig struct {
	*testing.T
	quay       *registrytest.Registry
	disk       string // where it is mounted; the data folder is in it
	cmd        *exec.Cmd
	url, admin string
	mu         sync.Mutex // guards log
	log        []string
}

// onDisk starts the mirror on a tmpfs with these options. It needs root.
func onDisk(t *testing.T, options string) *diskRig {
	t.Helper()
	need(t, "strace")
	r := &diskRig{T: t, quay: registrytest.New(registrytest.Config{}), disk: t.TempDir()}
	if err := syscall.Mount("tmpfs", r.disk, "tmpfs", 0, options); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := syscall.Unmount(r.disk, syscall.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	config := filepath.Join(t.TempDir(), "config.yaml")
	text := fmt.Sprintf("registries: {quay.test: {upstreams: [{url: %q}]}}\ndefault_registry: quay.test\ncapacity: 1GiB\nmin_free: 1B\ncompletion: {images: none}\n", r.quay.Start(t).URL)
	if err := os.WriteFile(config, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	r.cmd = exec.Command(binary(t), "serve", "--config", config, "--data", filepath.Join(r.disk, "data"), "--listen", "127.0.0.1:0", "--admin", "127.0.0.1:0", "--log-format", "text")
	out, err := r.cmd.StderrPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := r.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	serving, ended := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(ended)
		for lines := bufio.NewScanner(out); lines.Scan(); {
			r.mu.Lock()
			r.log = append(r.log, lines.Text())
			r.mu.Unlock()
			if _, rest, ok := strings.Cut(lines.Text(), "msg=serving listen="); ok {
				words := strings.Fields(rest)
				r.url, r.admin = "http://"+words[0], "http://"+strings.TrimPrefix(words[1], "admin=")
				close(serving)
			}
		}
	}()
	t.Cleanup(func() {
		_ = r.cmd.Process.Signal(syscall.SIGTERM)
		select {
		case <-ended:
		case <-time.After(20 * time.Second):
			t.Error("does not stop")
			_ = r.cmd.Process.Kill()
		}
		_ = r.cmd.Wait()
		if t.Failed() {
			t.Log(strings.Join(r.logged(""), "\n"))
		}
	})
	select {
	case <-serving:
	case <-ended:
		t.Fatal("the mirror ended before it served")
	}
	return r
}

// logged are the lines of the log with this in them.
func (r *diskRig) logged(what string) []string {
	r.mu.Lock()
	defer r.mu.Unlock()
	var found []string
	for _, line := range r.log {
		if strings.Contains(line, what) {
			found = append(found, line)
		}
	}
	return found
}

// pulled is an answer, and its error if it ended short.
type pulled struct {
	status int
	cache  string
	header http.Header
	body   []byte
	err    error
}

func (r *diskRig) get(url string, header ...string) pulled {
	req, err := http.NewRequest(http.MethodGet, url, nil)
	if err != nil {
		return pulled{err: err}
	}
	for _, line := range header {
		name, value, _ := strings.Cut(line, ": ")
		req.Header.Set(name, value)
	}
	client := http.Client{Timeout: time.Minute, Transport: &http.Transport{DisableKeepAlives: true}}
	resp, err := client.Do(req)
	if err != nil {
		return pulled{err: err}
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	return pulled{resp.StatusCode, resp.Header.Get("Cache-Status"), resp.Header, body, err}
}

func (r *diskRig) blob(dgst digest.Digest, header ...string) pulled {
	return r.get(r.url+"/v2/quay.test/org/app/blobs/"+dgst.String(), header...)
}

// wants fails the test unless the blob is answered whole, and by these words of Cache-Status.
func (r *diskRig) wants(dgst digest.Digest, cache string) {
	r.Helper()
	if got := r.blob(dgst); got.err != nil || got.status != http.StatusOK || digest.FromBytes(got.body) != dgst || !strings.Contains(got.cache, cache) {
		r.Errorf("%s: %d, %v, %d bytes, %q, want all of it with %q", dgst, got.status, got.err, len(got.body), got.cache, cache)
	}
}

// eventually pulls the blob until it is stored.
func (r *diskRig) eventually(dgst digest.Digest) {
	r.Helper()
	for deadline := time.Now().Add(30 * time.Second); time.Now().Before(deadline); time.Sleep(100 * time.Millisecond) {
		if got := r.blob(dgst); got.err != nil || got.status != http.StatusOK || digest.FromBytes(got.body) != dgst {
			r.Fatalf("%d, %v, %d bytes", got.status, got.err, len(got.body))
		} else if strings.Contains(got.cache, "; hit") {
			return
		}
	}
	r.Error("it is not stored again")
}

// degraded fails the test unless /readyz and /metrics say that the store cannot write, and why.
func (r *diskRig) degraded(reason string) {
	r.Helper()
	ready := r.get(r.admin + "/readyz")
	if text := string(ready.body); ready.status != http.StatusOK || !strings.HasPrefix(text, "ok\nstore: cannot write since 20") || !strings.Contains(text, "Z: "+reason+"\n") {
		r.Errorf("readyz: %d %s", ready.status, text)
	}
	if metrics := r.get(r.admin + "/metrics"); !strings.Contains(string(metrics.body), "\nbreakwater_store_degraded 1\n") || !strings.Contains(string(metrics.body), "\nbreakwater_store_errors_total{operation=") {
		r.Error("the metrics do not say that the store is degraded")
	}
	if lines := r.logged("store cannot write"); len(lines) != 1 {
		r.Errorf("%d lines say that the store cannot write: %s", len(lines), strings.Join(lines, "\n"))
	}
}

// recovered fails the test unless all is well again, without a restart: some seconds after the last failure
// any write tells.
func (r *diskRig) recovered() {
	r.Helper()
	ready := func() string { return string(r.get(r.admin + "/readyz").body) }
	for n := range uint64(100) {
		if ready() == "ok\n" {
			break
		}
		r.wants(r.quay.PutBlob("org/app", registrytest.Layer(100+n, 100)), "fwd=uri-miss")
		time.Sleep(100 * time.Millisecond)
	}
	if text := ready(); text != "ok\n" {
		r.Errorf("readyz: %s", text)
	}
	if metrics := r.get(r.admin + "/metrics"); !strings.Contains(string(metrics.body), "\nbreakwater_store_degraded 0\n") {
		r.Error("the metrics say that the store is degraded")
	}
	if lines := r.logged("store can write again"); len(lines) != 1 {
		r.Errorf("%d lines say that the store can write again", len(lines))
	}
}

// wantNothingLeft fails the test if anything is in tmp/.
func (r *diskRig) wantNothingLeft() {
	r.Helper()
	if left, err := os.ReadDir(filepath.Join(r.disk, "data", "tmp")); err != nil || len(left) > 0 {
		r.Errorf("left in tmp: %v, %v", left, err)
	}
}

// inject makes system calls of the mirror fail until the function that it returns is called.
func (r *diskRig) inject(options ...string) (stop func()) {
	r.Helper()
	cmd := exec.Command("strace", append([]string{"-f", "-o", "/dev/null", "-p", fmt.Sprint(r.cmd.Process.Pid)}, options...)...)
	out, err := cmd.StderrPipe()
	if err != nil {
		r.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		r.Fatal(err)
	}
	lines := bufio.NewScanner(out)
	if !lines.Scan() || !strings.Contains(lines.Text(), "attached") {
		r.Fatalf("strace: %s", lines.Text())
	}
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		_, _ = io.Copy(io.Discard, out)
	}()
	stop = sync.OnceFunc(func() {
		_ = cmd.Process.Signal(syscall.SIGINT) // it lets go
		<-ended
		_ = cmd.Wait()
	})
	r.Cleanup(stop)
	return stop
}

// F49: a disk that is too small is nobody's trouble but its owner's.
func TestF49DiskFull(t *testing.T) {
	r := onDisk(t, "size=16m")
	small, large := r.quay.PutBlob("org/app", registrytest.Layer(1, 1<<20)), r.quay.PutBlob("org/app", registrytest.Layer(2, 12<<20))
	r.eventually(small)
	spare := filepath.Join(r.disk, "spare")
	if err := os.WriteFile(spare, make([]byte, 8<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	r.quay.Forget()
	var clients sync.WaitGroup
	for range 32 {
		clients.Go(func() { r.wants(large, "detail=not-stored") })
	}
	clients.Wait()
	r.wants(small, "; hit") // all that could go would not have been enough
	r.degraded("no space left on device")
	r.wantNothingLeft()
	if metrics := r.get(r.admin + "/metrics"); !strings.Contains(string(metrics.body), "\nbreakwater_passed_through_total 32\n") {
		t.Error("not counted")
	}
	if err := os.Remove(spare); err != nil {
		t.Fatal(err)
	}
	r.eventually(large)
	r.recovered()
}

// F50: files cannot be created though there is space.
func TestF50NoInodes(t *testing.T) {
	r := onDisk(t, "size=64m,nr_inodes=100")
	stored, wanted := r.quay.PutBlob("org/app", registrytest.Layer(1, 1<<20)), r.quay.PutBlob("org/app", registrytest.Layer(2, 2<<20))
	r.eventually(stored)
	var spare []string
	for {
		name := filepath.Join(r.disk, fmt.Sprint("spare", len(spare)))
		err := os.WriteFile(name, nil, 0o600)
		if errors.Is(err, syscall.ENOSPC) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		spare = append(spare, name)
	}
	var clients sync.WaitGroup
	for range 32 {
		clients.Go(func() { r.wants(wanted, "detail=not-stored") })
	}
	clients.Wait()
	r.wants(stored, "; hit")
	r.degraded("no space left on device")
	r.wantNothingLeft()
	for _, name := range spare {
		if err := os.Remove(name); err != nil {
			t.Fatal(err)
		}
	}
	r.eventually(wanted)
	r.recovered()
}

// F51: a tag whose record cannot be written is answered as upstream says; in an outage, as the old record
// says; and the record is written later.
func TestF51RecordNotWritten(t *testing.T) {
	older, newer := registrytest.NewImage(registrytest.Layer(1, 1000)), registrytest.NewImage(registrytest.Layer(2, 1000))
	for name, fail := range map[string]func(*diskRig) (stop func()){
		"disk full": func(r *diskRig) func() {
			spare := filepath.Join(r.disk, "spare")
			if err := os.WriteFile(spare, make([]byte, 16<<20), 0o600); !errors.Is(err, syscall.ENOSPC) {
				t.Fatal(err)
			}
			return func() { _ = os.Remove(spare) }
		},
		"rename": func(r *diskRig) func() {
			tags := filepath.Join(r.disk, "data", "records", "quay.test", "org", "app", "_tags")
			return r.inject("-P", tags, "-e", "trace=renameat,renameat2", "-e", "inject=renameat,renameat2:error=ENOSPC")
		},
	} {
		t.Run(name, func(t *testing.T) {
			r := onDisk(t, "size=16m")
			tag := r.url + "/v2/quay.test/org/app/manifests/latest"
			names := func(image registrytest.Image, warned bool) {
				t.Helper()
				got := r.get(tag)
				if got.status != http.StatusOK || got.header.Get("Docker-Content-Digest") != image.Digest().String() || (got.header.Get("Warning") != "") != warned {
					t.Errorf("%d, %v, want %s", got.status, got.header, image.Digest())
				}
			}
			r.quay.Push("org/app", "latest", older)
			names(older, false)
			stop := fail(r)
			r.quay.Push("org/app", "latest", newer)
			for range 3 {
				names(newer, false)
			}
			r.degraded("no space left on device")
			heal := r.quay.Fault(registrytest.Match{}, registrytest.Status(http.StatusServiceUnavailable))
			names(older, true)
			heal()
			stop()
			for deadline := time.Now().Add(20 * time.Second); time.Now().Before(deadline) && r.get(tag).header.Get("Warning") != ""; {
				time.Sleep(100 * time.Millisecond) // until the reference is held off no longer
			}
			names(newer, false)
			r.quay.Fault(registrytest.Match{}, registrytest.Status(http.StatusServiceUnavailable))
			names(newer, true)
			r.wantNothingLeft()
		})
	}
}

// F52: a file system that has turned read-only.
func TestF52ReadOnly(t *testing.T) {
	r := onDisk(t, "size=64m")
	stored, wanted := r.quay.PutBlob("org/app", registrytest.Layer(1, 1<<20)), r.quay.PutBlob("org/app", registrytest.Layer(2, 2<<20))
	image := registrytest.NewImage(registrytest.Layer(3, 1000))
	r.quay.Push("org/app", "latest", image)
	r.eventually(stored)
	// All that is written begins in tmp/.
	stop := r.inject("-P", filepath.Join(r.disk, "data", "tmp"), "-e", "trace=openat,renameat,renameat2,unlinkat", "-e", "inject=openat,renameat,renameat2,unlinkat:error=EROFS")
	r.quay.Forget()
	r.wants(stored, "; hit")
	if n := r.quay.Count(registrytest.Match{}); n > 0 {
		t.Errorf("a hit has cost %d requests", n)
	}
	for range 3 {
		r.wants(wanted, "detail=not-stored")
		if got := r.get(r.url + "/v2/quay.test/org/app/manifests/latest"); got.status != http.StatusOK || string(got.body) != string(image.Raw) {
			t.Errorf("manifest: %d %s", got.status, got.body)
		}
	}
	r.degraded("read-only file system")
	stop()
	r.eventually(wanted)
	r.recovered()
}

// F53: a stored blob whose file gives errors.
func TestF53ReadError(t *testing.T) {
	for name, options := range map[string][]string{
		"at once":       {"-e", "trace=pread64", "-e", "inject=pread64:error=EIO"},
		"in mid-body":   {"-e", "trace=sendfile", "-e", "inject=sendfile:error=EIO:when=2+"},
		"at its start":  {"-e", "trace=sendfile", "-e", "inject=sendfile:error=EIO"},
		"and read-only": {"-e", "trace=sendfile", "-e", "inject=sendfile:error=EIO"},
	} {
		t.Run(name, func(t *testing.T) {
			r := onDisk(t, "size=64m")
			dgst := r.quay.PutBlob("org/app", registrytest.Layer(1, 8<<20))
			r.eventually(dgst)
			file := filepath.Join(r.disk, "data", "blobs", "sha256", dgst.Encoded())
			if name == "and read-only" {
				if err := os.Remove(filepath.Join(r.disk, "data", "quarantine")); err != nil { // nowhere to move it to
					t.Fatal(err)
				}
			}
			stop := r.inject(append([]string{"-P", file}, options...)...)
			if name == "at once" {
				r.wants(dgst, "fwd=uri-miss") // found out before its header
			} else {
				got := r.blob(dgst)
				if got.status != http.StatusOK || got.err == nil || !strings.Contains(got.cache, "; hit") {
					t.Fatalf("%d, %v, %d bytes, %s", got.status, got.err, len(got.body), got.cache)
				}
				stop() // or the one that takes its place would fail too
				// The client comes back for the rest.
				rest := r.blob(dgst, fmt.Sprintf("Range: bytes=%d-", len(got.body)))
				if rest.status != http.StatusPartialContent || digest.FromBytes(append(got.body, rest.body...)) != dgst || strings.Contains(rest.cache, "; hit") {
					t.Errorf("the rest: %d, %v, %d bytes, %s", rest.status, rest.err, len(rest.body), rest.cache)
				}
			}
			stop()
			r.eventually(dgst)
			if kept, err := os.ReadDir(filepath.Join(r.disk, "data", "quarantine")); name != "and read-only" && (err != nil || len(kept) == 0) /* its successor may have failed too */ {
				t.Errorf("in quarantine: %v, %v", kept, err)
			}
		})
	}
}
