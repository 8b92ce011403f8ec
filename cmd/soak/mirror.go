package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/opencontainers/go-digest"
)

// mirror is breakwater, in a process of its own.
type mirror struct {
	url    string
	admin  string // URL
	data   string
	cmd    *exec.Cmd
	exited chan error // that its end has, once its log is read
	tally  *tally
}

// collector is added to breakwater's main package: what is garbage is not to be taken for a leak.
const collector = `package main

import (
	"os"
	"os/signal"
	"runtime/debug"
	"syscall"
)

func init() {
	collect := make(chan os.Signal, 1)
	signal.Notify(collect, syscall.SIGUSR2)
	go func() {
		for range collect {
			debug.FreeOSMemory()
		}
	}()
}
`

const breakwaterPackage = "breakwater/cmd/breakwater"

// startTime is how long breakwater may take to listen, with the race detector in it.
const startTime = 10 * time.Second

// startMirror builds breakwater, with the race detector and the collector, and starts it on top of the
// upstreams. Its capacity is never reached.
func startMirror(ctx context.Context, dir string, upstreams []*upstream, t *tally) (*mirror, error) {
	binary, err := build(ctx, dir)
	if err != nil {
		return nil, err
	}
	m := &mirror{data: filepath.Join(dir, "data"), exited: make(chan error, 1), tally: t}
	config := fmt.Sprintf("listen: 127.0.0.1:0\nadmin: 127.0.0.1:0\ndata: %s\ncapacity: 10GiB\ndefault_registry: %s\nregistries:\n  %[2]s:\n    upstreams:\n", m.data, registryName)
	for _, u := range upstreams {
		config += fmt.Sprintf("      - url: %s\n", u.url)
		if u.cdn != "" {
			config += fmt.Sprintf("        redirect_hosts: [%q]\n", u.cdn)
		}
	}
	file := filepath.Join(dir, "config.yaml")
	if err := os.WriteFile(file, []byte(config), 0o600); err != nil {
		return nil, err
	}
	log, err := os.Create(filepath.Join(dir, "log"))
	if err != nil {
		return nil, err
	}
	m.cmd = exec.CommandContext(ctx, binary, "serve", "--config", file, "--log-format", "json")
	m.cmd.Cancel = func() error { return m.cmd.Process.Signal(syscall.SIGTERM) }
	m.cmd.Stdout = os.Stdout
	output, err := m.cmd.StderrPipe()
	if err != nil {
		return nil, err
	}
	if err := m.cmd.Start(); err != nil {
		return nil, fmt.Errorf("start breakwater: %w", err)
	}
	serving := make(chan [2]string, 1)
	go func() { // ends with the process; stop waits for it
		defer log.Close()
		m.readLog(io.TeeReader(output, log), serving)
		m.exited <- m.cmd.Wait()
	}()
	select {
	case at := <-serving:
		m.url, m.admin = "http://"+at[0], "http://"+at[1]
		return m, nil
	case err := <-m.exited:
		return nil, fmt.Errorf("breakwater ended at once: %w", err)
	case <-time.After(startTime):
		return nil, errors.Join(fmt.Errorf("breakwater does not serve after %s", startTime), m.stop())
	}
}

// build returns the path of the program.
func build(ctx context.Context, dir string) (string, error) {
	sources, err := exec.CommandContext(ctx, "go", "list", "-f", "{{.Dir}}", breakwaterPackage).Output()
	if err != nil {
		return "", fmt.Errorf("find breakwater's sources: %w", err)
	}
	source, overlay, binary := filepath.Join(dir, "collector.go"), filepath.Join(dir, "overlay.json"), filepath.Join(dir, "breakwater")
	raw, err := json.Marshal(map[string]any{"Replace": map[string]string{filepath.Join(strings.TrimSpace(string(sources)), "collector.go"): source}})
	if err := errors.Join(err, os.WriteFile(source, []byte(collector), 0o600), os.WriteFile(overlay, raw, 0o600)); err != nil {
		return "", err
	}
	cmd := exec.CommandContext(ctx, "go", "build", "-race", "-overlay", overlay, "-o", binary, breakwaterPackage)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=1") // the race detector needs it
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("build breakwater: %w\n%s", err, out)
	}
	return binary, nil
}

// readLog reads the log to its end: where breakwater listens, which breakers open, and what should
// never be there, errors of its own and what is no log line, such as a data race.
func (m *mirror) readLog(log io.Reader, serving chan<- [2]string) {
	spoke := false
	for lines := bufio.NewReader(log); ; {
		raw, err := lines.ReadBytes('\n')
		if err != nil {
			return
		}
		if bytes.Contains(raw, []byte(`"msg":"request"`)) && bytes.Contains(raw, []byte(`"level":"INFO"`)) {
			continue // nearly all of them
		}
		var line struct{ Level, Msg, Listen, Admin, Upstream, Class string }
		switch err := json.Unmarshal(raw, &line); {
		case err != nil:
			if !spoke {
				m.tally.violate("breakwater writes what is no log line")
			}
			spoke = true
			_, _ = os.Stderr.Write(raw)
		case line.Level == "ERROR":
			m.tally.violate("breakwater logged: %s", bytes.TrimSpace(raw))
		case line.Msg == "serving":
			serving <- [2]string{line.Listen, line.Admin}
		case line.Msg == "breaker opened":
			m.tally.note(func(n *counts) { n.opened[line.Class]++ })
		}
	}
}

// stop ends breakwater in good order. The race detector makes its exit code 66 if it has found something.
func (m *mirror) stop() error {
	if err := m.cmd.Process.Signal(syscall.SIGTERM); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return err
	}
	return <-m.exited
}

// metrics are the sums of breakwater's metrics by name, and by name and labels as they are written.
func (m *mirror) metrics() (map[string]float64, error) {
	resp, err := http.Get(m.admin + "/metrics")
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	found := map[string]float64{}
	for lines := bufio.NewScanner(resp.Body); lines.Scan(); {
		i := strings.LastIndexByte(lines.Text(), ' ')
		if i < 0 || strings.HasPrefix(lines.Text(), "#") {
			continue
		}
		value, err := strconv.ParseFloat(lines.Text()[i+1:], 64)
		if err != nil {
			return nil, fmt.Errorf("metrics: %w", err)
		}
		name, labels, labelled := strings.Cut(lines.Text()[:i], "{")
		found[name] += value
		if labelled {
			found[name+"{"+labels] += value
		}
	}
	return found, nil
}

// breakersOpen says which breakers are not closed; "" for none.
func (m *mirror) breakersOpen() (string, error) {
	metrics, err := m.metrics()
	if err != nil {
		return "", err
	}
	var open []string
	for name, value := range metrics {
		if labels, ok := strings.CutPrefix(name, "breakwater_breaker_state{"); ok && value == 1 && !strings.Contains(labels, `state="closed"`) {
			open = append(open, labels)
		}
	}
	return strings.Join(open, " "), nil
}

// vitals are what a leak would show in.
type vitals struct {
	goroutines, files int
	live              float64 // MiB on the heap, after a collection
	rss, peak         float64 // MiB
	underWay          float64 // fills, and images that are being completed or wait for it
}

func (m *mirror) vitals() (vitals, error) {
	metrics, err := m.metrics()
	if err != nil {
		return vitals{}, err
	}
	v := vitals{goroutines: int(metrics["go_goroutines"]), live: metrics["go_memstats_heap_alloc_bytes"] / (1 << 20),
		underWay: metrics["breakwater_fills"] + metrics["breakwater_completion_images"]}
	proc := fmt.Sprintf("/proc/%d/", m.cmd.Process.Pid)
	files, err := os.ReadDir(proc + "fd")
	if err != nil {
		return vitals{}, err
	}
	v.files = len(files)
	status, err := os.ReadFile(proc + "status")
	if err != nil {
		return vitals{}, err
	}
	for line := range strings.Lines(string(status)) {
		name, value, _ := strings.Cut(line, ":")
		var kib float64
		_, _ = fmt.Sscanf(value, "%f kB", &kib) // other lines do not match
		switch name {
		case "VmRSS":
			v.rss = kib / 1024
		case "VmHWM":
			v.peak = kib / 1024
		}
	}
	return v, nil
}

// restTime is how long it may take until nothing is under way any more: a fill that waits for its
// source, or pauses before it tries again, or images that are completed behind, one fill at a time.
const restTime = 100 * time.Second

// atRest are the vitals once the clients have left and nothing is in flight. Idle connections to the
// upstreams are no leak: they are cut first.
func (m *mirror) atRest(upstreams []*upstream) (vitals, error) {
	deadline := time.Now().Add(restTime)
	for time.Now().Before(deadline) {
		v, err := m.vitals()
		if err != nil {
			return vitals{}, err
		}
		if v.underWay == 0 {
			break
		}
		time.Sleep(time.Second)
	}
	http.DefaultClient.CloseIdleConnections()
	for _, u := range upstreams {
		if err := errors.Join(u.close(), u.listen()); err != nil {
			return vitals{}, err
		}
	}
	var least vitals
	for {
		if err := m.cmd.Process.Signal(syscall.SIGUSR2); err != nil {
			return vitals{}, err
		}
		time.Sleep(time.Second)
		v, err := m.vitals()
		if err != nil {
			return vitals{}, err
		}
		if least.goroutines > 0 && v.goroutines >= least.goroutines && v.files >= least.files || time.Now().After(deadline) {
			return least, nil // it has stopped falling
		}
		least = v
	}
}

// checkStore hashes all that breakwater holds under a digest.
func (m *mirror) checkStore() error {
	return filepath.WalkDir(filepath.Join(m.data, "blobs", "sha256"), func(path string, e fs.DirEntry, err error) error {
		if err != nil || e.IsDir() {
			return err
		}
		f, err := os.Open(path)
		if err != nil {
			return err
		}
		defer f.Close()
		if dgst, err := digest.FromReader(f); err != nil || dgst.Encoded() != e.Name() {
			return fmt.Errorf("blob %s has digest %s, %w", e.Name(), dgst, err)
		}
		return nil
	})
}
