//go:build linux

package main_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"breakwater/pkg/buckettest"
	"breakwater/pkg/registrytest"

	"github.com/opencontainers/go-digest"
)

// bucketAddr is where each host of a fleet finds the bucket.
const bucketAddr = "127.0.0.1:9000"

// sharedPrefix is the fleet's folder in the bucket.
const sharedPrefix = "breakwater/"

// sharing is mirrored with a shared store.
const sharing = mirrored + `
shared:
  s3: {bucket: ` + buckettest.Name + `, prefix: ` + sharedPrefix + `, endpoint: http://` + bucketAddr + `, path_style: true}
  key_file: fleet.key
`

// supervisor is the image of the incident.
const supervisor = "org/supervisor"

// A fleet is hosts that have an upstream and a bucket in common, and no way to each other.
type fleet struct {
	registry *registrytest.Real // the upstream
	bucket   *buckettest.Bucket
}

func newFleet(t *testing.T) *fleet {
	t.Helper()
	need(t, "ip", "mount")
	binary(t) // built by now: starts are timed
	registry, err := registrytest.NewReal(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = registry.Close() })
	return &fleet{registry, buckettest.Start(t)}
}

// push makes the upstream's tag latest name an image.
func (f *fleet) push(t *testing.T, repository string, image registrytest.Image) {
	t.Helper()
	if err := registrytest.Push(t.Context(), f.registry.URL, repository, "latest", image); err != nil {
		t.Fatal(err)
	}
}

// named is what the fleet's record says that a repository's tag latest names. It is fs.ErrNotExist if
// there is no record.
func (f *fleet) named(t *testing.T, repository string) (digest.Digest, error) {
	t.Helper()
	name := sharedPrefix + "records/docker.io/" + repository + "/_tags/latest"
	if !slices.Contains(f.bucket.Names(name), name) {
		return "", fmt.Errorf("%s: %w", name, fs.ErrNotExist)
	}
	_, body, _ := bytes.Cut(f.bucket.Get(name), []byte("\n"))
	var record struct{ Digest digest.Digest }
	err := json.Unmarshal(body, &record)
	return record.Digest, err
}

// published waits until the fleet's record of a repository's tag latest names that image.
func (f *fleet) published(t *testing.T, repository string, image registrytest.Image) {
	t.Helper()
	within(t, 30*time.Second, func() error {
		named, err := f.named(t, repository)
		if err == nil && named != image.Digest() {
			err = fmt.Errorf("the record names %s, want %s", named, image.Digest())
		}
		return err
	})
}

// records are all that the fleet has published, by their names.
func (f *fleet) records(t *testing.T) map[string]string {
	t.Helper()
	records := map[string]string{}
	for _, name := range f.bucket.Names(sharedPrefix + "records/") {
		records[name] = string(f.bucket.Get(name))
	}
	return records
}

// A member is a host of a fleet. It has ways of its own to the upstream and to the bucket.
type member struct {
	*host
	upstream, bucket *door
}

// host adds a host whose disk is empty. Both ways are open.
func (f *fleet) host(t *testing.T, programs ...string) *member {
	t.Helper()
	h := newHost(t, programs...)
	for name, value := range buckettest.Environment() {
		h.variables = append(h.variables, name+"="+value)
	}
	h.write(t, "fleet.key", strings.Repeat("5a", 32)+"\n")
	return &member{h, h.door(t, upstreamAddr, f.registry), h.door(t, bucketAddr, f.bucket)}
}

// A door is a server as one host finds it: what ails it there ails no other host.
type door struct {
	*registrytest.Scripted
	host   *host
	addr   string
	server *registrytest.Server // nil while it is shut
}

func (h *host) door(t *testing.T, addr string, to http.Handler) *door {
	t.Helper()
	d := &door{Scripted: registrytest.NewScripted(to), host: h, addr: addr}
	t.Cleanup(d.shut)
	d.open(t)
	return d
}

func (d *door) open(t *testing.T) {
	t.Helper()
	l, err := d.host.listen(d.addr)
	if err != nil {
		t.Fatal(err)
	}
	d.server = registrytest.Serve(l, d)
}

// shut cuts all connections; new ones are refused.
func (d *door) shut() {
	if d.server != nil {
		_ = d.server.Close()
		d.server = nil
	}
}

// hang accepts connections and requests, and never answers.
func (d *door) hang() { d.Fault(registrytest.Match{}, registrytest.Hang()) }

// swallow has every packet on its way there vanish.
func (d *door) swallow(t *testing.T) {
	t.Helper()
	_, port, _ := strings.Cut(d.addr, ":")
	d.host.filter(t, "--append OUTPUT -p tcp --dport "+port+" -j DROP")
}

// pull gets what a repository's tag latest names, with all that belongs to it, and wants it to be that
// image. It returns the answer to the tag.
func (m *member) pull(t *testing.T, repository string, image registrytest.Image) answer {
	t.Helper()
	return m.pullReference(t, repository, "latest", image)
}

func (m *member) pullReference(t *testing.T, repository, reference string, image registrytest.Image) answer {
	t.Helper()
	base := "http://" + mirrorAddr + "/v2/" + repository
	got, err := m.ask(http.MethodGet, base+"/manifests/"+reference)
	if err == nil && (got.status != http.StatusOK || digest.FromString(got.body) != image.Digest()) {
		err = fmt.Errorf("%d %v %.300s, want %s", got.status, got.header, got.body, image.Digest())
	}
	for _, blob := range image.Blobs {
		var part answer
		if err == nil {
			part, err = m.ask(http.MethodGet, base+"/blobs/"+blob.Digest.String())
		}
		if err == nil && (part.status != http.StatusOK || part.body != string(blob.Bytes)) {
			err = fmt.Errorf("%s: %d with %d bytes, want %d", blob.Digest, part.status, len(part.body), len(blob.Bytes))
		}
	}
	if err != nil {
		t.Fatalf("pull %s of %s: %v", reference, repository, err)
	}
	return got
}

// idle waits until the mirror has published all that it knows.
func (m *member) idle(t *testing.T) {
	t.Helper()
	within(t, 30*time.Second, func() error {
		for _, name := range []string{"breakwater_completion_images", "breakwater_shared_unpublished"} { // the former has the latter grow
			waiting, err := m.metric(name)
			if err == nil && waiting != "0" {
				err = fmt.Errorf("%s is %s", name, waiting)
			}
			if err != nil {
				return err
			}
		}
		return nil
	})
}

// span is when something happened: not before begin, and not after end.
type span struct{ begin, end time.Time }

// stale wants an answer that says that nobody has confirmed it since then, and why by a detail.
func (s span) stale(t *testing.T, got answer, detail string) {
	t.Helper()
	age, err := strconv.Atoi(got.header.Get("Age"))
	// The bucket's clock tells seconds only.
	least, most := time.Since(s.end)-2*time.Second, time.Since(s.begin)+2*time.Second
	if d := time.Duration(age) * time.Second; err != nil || d < least || d > most {
		t.Errorf("Age is %q, want between %v and %v", got.header.Get("Age"), least, most)
	}
	if w := got.header.Get("Warning"); !strings.HasPrefix(w, fmt.Sprintf(`299 - "stale by %s: upstream`, time.Duration(age)*time.Second)) {
		t.Errorf("Warning is %q, want the age, and the upstream", w)
	}
	if c := got.header.Get("Cache-Status"); !strings.HasPrefix(c, "breakwater; ") || !strings.HasSuffix(c, "; detail="+detail) {
		t.Errorf("Cache-Status is %q, want detail=%s", c, detail)
	}
}

// fresh wants an answer that the upstream has confirmed.
func (a answer) fresh(t *testing.T) {
	t.Helper()
	if a.status != http.StatusOK || a.header.Get("Warning") != "" {
		t.Errorf("%d %v, want a fresh 200", a.status, a.header)
	}
}

// line is the latest line of the mirror's log in which all of these are.
func (h *host) line(t *testing.T, parts ...string) (string, error) {
	t.Helper()
	log, err := os.ReadFile(filepath.Join(h.dir, "mirror.log"))
	if err != nil {
		t.Fatal(err)
	}
	for _, line := range slices.Backward(strings.Split(string(log), "\n")) {
		if !slices.ContainsFunc(parts, func(part string) bool { return !strings.Contains(line, part) }) {
			return line, nil
		}
	}
	return "", fmt.Errorf("no line of the log has all of %q", parts)
}

// data is the folder of what the mirror has stored.
func (h *host) data() string { return filepath.Join(h.dir, "data") }

// metric is the value of a metric, as it is written.
func (h *host) metric(name string) (string, error) {
	got, err := h.ask(http.MethodGet, "http://"+adminAddr+"/metrics")
	if err != nil {
		return "", err
	}
	for line := range strings.Lines(got.body) {
		if value, ok := strings.CutPrefix(line, name+" "); ok {
			return strings.TrimSpace(value), nil
		}
	}
	return "", errors.New("there is no metric " + name)
}
