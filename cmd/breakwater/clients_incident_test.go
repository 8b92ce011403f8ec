//go:build linux

package main_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"testing"
	"time"

	"breakwater/pkg/registrytest"
)

const supervisorImage = "docker.io/" + supervisor + ":latest"

// TestF44IncidentNewHost is what this program is for. One host of a fleet has pulled an image; then
// every upstream is gone, in one way after the other; and a host that has never seen the image, whose
// mirror and whose engine hold nothing, pulls it by its tag and runs it.
func TestF44IncidentNewHost(t *testing.T) {
	for _, row := range []struct {
		name   string
		gone   func(t *testing.T, upstream *door)
		detail string
	}{
		{"killed", func(_ *testing.T, upstream *door) { upstream.shut() }, "outage"},
		{"hanging", func(_ *testing.T, upstream *door) { upstream.hang() }, "timeout"},
		{"black hole", func(t *testing.T, upstream *door) { upstream.swallow(t) }, "timeout"},
	} {
		t.Run(row.name, func(t *testing.T) {
			f := newFleet(t)
			a, b := f.host(t, "dockerd", "docker", "iptables"), f.host(t)
			image := greeter(t, 1)
			f.push(t, supervisor, image)
			engines := []client{startDocker(t, a.host), startDocker(t, b.host)}
			a.serve(t, sharing)
			confirmed := span{begin: time.Now()}
			pullAll(t, engines[0], []string{supervisorImage})
			f.published(t, supervisor, image)
			confirmed.end = time.Now()
			before := time.Now()
			pullAll(t, engines[0], []string{supervisorImage})
			alone := a.sentWithin(t, before) // with a store that has it, and upstream up
			fetched := f.registry.Count(blobGETs)

			row.gone(t, a.upstream)
			row.gone(t, b.upstream)
			b.serve(t, sharing)
			before = time.Now()
			pullAll(t, engines[1], []string{supervisorImage}) // and runs it
			whole, took := time.Since(before), b.sentWithin(t, before)
			if took > alone+2*time.Second+scheduling {
				t.Errorf("the new host's engine had all after %v, want 2s more than %v at most", took, alone)
			}
			t.Logf("F44: the new host's engine had all after %v, with everything in place after %v; pulled and run in %v", took, alone, whole.Round(time.Millisecond))
			if n := f.registry.Count(blobGETs); n != fetched {
				t.Errorf("upstream was asked for %d blobs more", n-fetched)
			}
			got := b.pull(t, supervisor, image)
			confirmed.stale(t, got, detailOf(got, row.detail))
			a.pull(t, supervisor, image)
			if _, err := b.line(t, `"msg":"request"`, `"reference":"latest"`, `"status":200`, "; detail="); err != nil {
				t.Error(err)
			}
		})
	}
}

// sentWithin is how long after the engine's first request since then the mirror had sent it all that it
// asked for. What the engine does with it is not the mirror's.
func (h *host) sentWithin(t *testing.T, since time.Time) time.Duration {
	t.Helper()
	log, err := os.ReadFile(filepath.Join(h.dir, "mirror.log"))
	if err != nil {
		t.Fatal(err)
	}
	var first, last time.Time
	for raw := range bytes.Lines(log) {
		var line struct {
			Time      time.Time
			Msg, Kind string
		}
		if err := json.Unmarshal(raw, &line); err != nil {
			t.Fatalf("%s: %v", raw, err)
		}
		if line.Msg != "request" || line.Time.Before(since) {
			continue
		}
		if first.IsZero() {
			first = line.Time
		}
		if line.Kind == "blob" {
			last = line.Time
		}
	}
	if last.IsZero() {
		t.Fatal("nobody has asked for a blob")
	}
	return last.Sub(first).Round(time.Millisecond)
}

// detailOf is the detail of an outage that is known by now, or else that of its first moments.
func detailOf(a answer, first string) string {
	if strings.HasPrefix(a.header.Get("Cache-Status"), "breakwater; hit; ttl=-") {
		return "outage"
	}
	return first
}

var blobGETs = registrytest.Match{Kind: registrytest.KindBlob, Method: http.MethodGet}

// TestF44IncidentCutOff has the upstream come back, with a newer image, for a host that cannot publish
// it. In the next outage that host gives the newer one, and says that nobody else may know of it; all
// others agree on what was published.
func TestF44IncidentCutOff(t *testing.T) {
	f := newFleet(t)
	a, b := f.host(t), f.host(t)
	first, second := greeter(t, 1), greeter(t, 2)
	f.push(t, supervisor, first)
	a.serve(t, sharing)
	published := span{begin: time.Now()}
	a.pull(t, supervisor, first).fresh(t)
	f.published(t, supervisor, first)
	published.end = time.Now()

	a.upstream.shut()
	b.upstream.shut()
	a.bucket.shut()
	f.push(t, supervisor, second)
	a.pull(t, supervisor, first)
	a.upstream.open(t)
	newer := span{begin: time.Now()}
	a.awaitFresh(t, second)
	a.pull(t, supervisor, second).fresh(t)
	newer.end = time.Now()

	a.upstream.shut()
	b.serve(t, sharing)
	published.stale(t, b.pull(t, supervisor, first), "outage")
	newer.stale(t, a.pull(t, supervisor, second), "unpublished")
	c := f.host(t)
	c.upstream.shut()
	c.serve(t, sharing)
	published.stale(t, c.pull(t, supervisor, first), "outage")

	a.bucket.open(t)
	f.published(t, supervisor, second)
	for _, m := range []*member{a, b, c} {
		m.awaitStale(t, second)
		newer.stale(t, m.pull(t, supervisor, second), "outage")
	}
}

// awaitFresh waits until the host's mirror has heard of the upstream's return.
func (m *member) awaitFresh(t *testing.T, image registrytest.Image) {
	t.Helper()
	m.await(t, image, func(a answer) bool { return a.header.Get("Warning") == "" })
}

// awaitStale waits until the host agrees with the fleet, which it may do up to 5 s late.
func (m *member) awaitStale(t *testing.T, image registrytest.Image) {
	t.Helper()
	m.await(t, image, func(a answer) bool { return strings.HasSuffix(a.header.Get("Cache-Status"), "; detail=outage") })
}

func (m *member) await(t *testing.T, image registrytest.Image, good func(answer) bool) {
	t.Helper()
	within(t, 20*time.Second, func() error {
		got, err := m.ask(http.MethodHead, "http://"+mirrorAddr+"/v2/"+supervisor+"/manifests/latest")
		if err == nil && (got.header.Get("Docker-Content-Digest") != image.Digest().String() || !good(got)) {
			err = fmt.Errorf("%d %v", got.status, got.header)
		}
		return err
	})
}

// TestF44IncidentFastClock has a host whose clock is ten minutes fast. It gets what the fleet has, with
// its true age, and publishes nothing; all others notice nothing.
func TestF44IncidentFastClock(t *testing.T) {
	f := newFleet(t)
	a, b, fast := f.host(t), f.host(t), f.host(t)
	fast.program = fastBinary(t)
	first, second := greeter(t, 1), greeter(t, 2)
	f.push(t, supervisor, first)
	a.serve(t, sharing)
	b.serve(t, sharing)
	published := span{begin: time.Now()}
	a.pull(t, supervisor, first).fresh(t)
	f.published(t, supervisor, first)
	published.end = time.Now()
	a.idle(t) // what refers to it is published too
	records := f.records(t)

	for _, m := range []*member{a, b, fast} {
		m.upstream.shut()
	}
	fast.serve(t, sharing+"log: {level: debug}\n")
	published.stale(t, fast.pull(t, supervisor, first), "outage")
	published.stale(t, b.pull(t, supervisor, first), "outage")
	ready, err := fast.ask(http.MethodGet, "http://"+adminAddr+"/readyz")
	if err != nil || ready.status != http.StatusOK || !tenFast.MatchString(ready.body) {
		t.Errorf("/readyz: %d %s, %v, want to be told of the clock", ready.status, ready.body, err)
	}
	if said, err := fast.output(fast.command(t.Context(), nil, binary(t), "status", "--config", "", "--data", fast.data())); err != nil || !tenFast.MatchString(said) {
		t.Errorf("status says %s, %v, want to be told of the clock", said, err)
	}

	f.push(t, supervisor, second)
	fast.upstream.open(t)
	fast.awaitFresh(t, second)
	fast.pull(t, supervisor, second).fresh(t)
	within(t, 20*time.Second, func() error { // until it has tried to publish it
		_, err := fast.line(t, `"msg":"not published yet"`, `"reference":"latest"`, "clock is wrong")
		return err
	})
	if now := f.records(t); !maps.Equal(now, records) {
		t.Errorf("a host with a wrong clock has published something: %d records, before %d", len(now), len(records))
	}
	for _, m := range []*member{a, b} {
		published.stale(t, m.pull(t, supervisor, first), "outage")
	}

	a.upstream.open(t)
	f.agree(t, second, a, b)
}

// tenFast tells how far off a clock is, give or take what the bucket's answers leave open.
var tenFast = regexp.MustCompile(`clock is (9m5\ds|10m\ds) fast`)

// agree has a, which the upstream answers, publish the image, and b give it as what it is: confirmed just now.
func (f *fleet) agree(t *testing.T, image registrytest.Image, a, b *member) {
	t.Helper()
	confirmed := span{begin: time.Now()}
	a.awaitFresh(t, image)
	a.pull(t, supervisor, image)
	f.published(t, supervisor, image)
	confirmed.end = time.Now()
	b.awaitStale(t, image)
	confirmed.stale(t, b.pull(t, supervisor, image), "outage")
}

// fastBinary is the program with a clock that is ten minutes fast. A program of Go asks the kernel's
// page for the time, past the C library and everything that could be put in between; so the standard
// library is built anew for it. That takes a minute, once.
func fastBinary(t *testing.T) string {
	t.Helper()
	path, err := buildFastBinary()
	if err != nil {
		t.Fatal(err)
	}
	return path
}

var buildFastBinary = sync.OnceValues(func() (string, error) {
	root, err := exec.Command("go", "env", "GOROOT").Output()
	if err != nil {
		return "", fmt.Errorf("go env: %w", err)
	}
	file := filepath.Join(strings.TrimSpace(string(root)), "src", "time", "time.go")
	source, err := os.ReadFile(file)
	if err != nil {
		return "", err
	}
	now := regexp.MustCompile(`(?m)^func Now\(\) Time \{\n\tsec, nsec, mono := .*\n`)
	if len(now.FindAll(source, -1)) != 1 {
		return "", errors.New(file + ": Now is not what it was: where does it get the time?")
	}
	dir, err := os.MkdirTemp("", "")
	if err != nil {
		return "", err
	}
	defer func() { _ = os.RemoveAll(dir) }()
	changed, overlay := filepath.Join(dir, "time.go"), filepath.Join(dir, "overlay.json")
	if err := os.WriteFile(changed, now.ReplaceAll(source, []byte("${0}\tsec += 10 * 60\n")), 0o600); err != nil {
		return "", err
	}
	raw, err := json.Marshal(map[string]any{"Replace": map[string]string{file: changed}})
	if err != nil {
		return "", err
	}
	if err := os.WriteFile(overlay, raw, 0o600); err != nil {
		return "", err
	}
	path, err := filepath.Abs("../../bin/breakwater-fast")
	if err != nil {
		return "", err
	}
	return path, build("-overlay", overlay, "-o", path, ".")
})
