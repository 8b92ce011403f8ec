//go:build linux

package main_test

import (
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"breakwater/pkg/buckettest"
	"breakwater/pkg/registrytest"
)

// away is a shared store, and upstreams, by names that nobody can look up, as whoever the host's role
// says that we are.
const away = `
default_registry: docker.io
shared:
  s3: {bucket: ` + buckettest.Name + `, prefix: ` + sharedPrefix + `, region: us-east-1}
  key_file: fleet.key
`

// TestF39BootWithSharedStore starts a mirror of a fleet where there is no route and no DNS: neither the
// bucket nor a credential for it can be asked for. What is stored is served as ever, tags too.
func TestF39BootWithSharedStore(t *testing.T) {
	f := newFleet(t)
	h := f.host(t, "containerd", "ctr")
	image := greeter(t, 1)
	f.push(t, supervisor, image)
	m := h.serve(t, sharing)
	h.pull(t, supervisor, image).fresh(t)
	m.stop(t)

	h.upstream.shut()
	h.bucket.shut()
	h.variables = nil
	begin := time.Now()
	m = h.serve(t, away)
	if took := time.Since(begin); took > time.Second+scheduling {
		t.Errorf("listening after %v, want 1s", took)
	}
	h.healthy(t)
	begin = time.Now()
	h.pull(t, supervisor, image)
	if took := time.Since(begin); took > 2*time.Second+scheduling {
		t.Errorf("what is stored took %v, want 2s", took)
	}
	name := "docker.io/" + supervisor
	pullAll(t, startDebianContainerd(t, h.host), []string{name + ":latest", name + "@" + image.Digest().String()})
	h.degraded(t, "")
	m.stop(t)
}

// healthy wants the mirror to be live and ready, and returns what it says of that.
func (h *host) healthy(t *testing.T) string {
	t.Helper()
	said := ""
	for _, path := range []string{"/healthz", "/readyz"} {
		got, err := h.ask(http.MethodGet, "http://"+adminAddr+path)
		if err != nil || got.status != http.StatusOK || !strings.HasPrefix(got.body, "ok") {
			t.Errorf("%s: %d %s, %v, want ok", path, got.status, got.body, err)
		}
		said = got.body
	}
	return said
}

// degraded waits until the mirror says that the shared store is out, and why, to who asks whether it is
// ready and to who asks for its status.
func (m *member) degraded(t *testing.T, reason string) {
	t.Helper()
	said := ""
	within(t, 10*time.Second, func() error {
		if said = m.healthy(t); !strings.Contains(said, "\nshared store: out since ") {
			return fmt.Errorf("/readyz does not say that the shared store is out: %s", said)
		}
		return nil
	})
	status, err := m.output(m.command(t.Context(), nil, m.breakwater(t), "status", "--config", "", "--data", m.data()))
	if err != nil || !strings.Contains(status, "out since ") {
		t.Errorf("status: %s, %v, want to be told that the shared store is out", status, err)
	}
	for _, text := range []string{said, status} {
		if !strings.Contains(text, reason) {
			t.Errorf("no word of %q in\n%s", reason, text)
		}
		if strings.Contains(text, buckettest.SecretKey) {
			t.Errorf("tells the secret key:\n%s", text)
		}
	}
}

// metadataAddr is where a host without credentials asks for its role's. It has none.
const metadataAddr = "127.0.0.1:9001"

// TestF40SharedStoreMisconfigured starts mirrors whose shared store cannot be reached, for a reason that
// does not go away by itself. It is told, and nothing else is different.
func TestF40SharedStoreMisconfigured(t *testing.T) {
	f := newFleet(t)
	configured := func(old, new string) string { return strings.Replace(sharing, old, new, 1) }
	for i, row := range []struct {
		name      string
		config    string
		variables []string
		reason    string
	}{
		{"bad DNS", configured("http://"+bucketAddr, "http://bucket.invalid:9000"), nil, "bucket.invalid"},
		{"nobody listens", configured(bucketAddr, "127.0.0.1:9"), nil, "connection refused"},
		{"bad secret", sharing, []string{"AWS_SECRET_ACCESS_KEY=wrong"}, "SignatureDoesNotMatch"},
		{"unknown account", sharing, []string{"AWS_ACCESS_KEY_ID=nobody"}, "access key"},
		{"no credentials", sharing, []string{"AWS_ACCESS_KEY_ID=", "AWS_SECRET_ACCESS_KEY="}, "credentials"},
		{"no role", sharing, []string{"AWS_ACCESS_KEY_ID=", "AWS_SECRET_ACCESS_KEY=", "AWS_EC2_METADATA_DISABLED=", "AWS_EC2_METADATA_SERVICE_ENDPOINT=http://" + metadataAddr}, "credentials"},
		{"no bucket", configured("bucket: "+buckettest.Name, "bucket: absent"), nil, "NoSuchBucket"},
	} {
		t.Run(row.name, func(t *testing.T) {
			m := f.host(t)
			m.door(t, metadataAddr, http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusNotFound) }))
			m.variables = append(m.variables, row.variables...)
			begin := time.Now()
			running := m.serve(t, row.config)
			if took := time.Since(begin); took > time.Second+scheduling {
				t.Errorf("listening after %v, want 1s", took)
			}
			m.degraded(t, row.reason) // though nobody has pulled anything
			image := greeter(t, uint64(10+i))
			repository := fmt.Sprint("org/app", i)
			f.push(t, repository, image)
			begin = time.Now()
			m.pull(t, repository, image).fresh(t)
			if took := time.Since(begin); took > 2*time.Second+scheduling {
				t.Errorf("the first pull took %v, want 2s more than nothing at most", took)
			}
			begin = time.Now()
			m.pull(t, repository, image).fresh(t)
			if took := time.Since(begin); took > time.Second+scheduling {
				t.Errorf("the second pull took %v", took)
			}
			m.wantJSON(t)
			running.stop(t)
		})
	}
}

// TestF70NewDisk is a node whose disk is new: the data folder of a mirror that has known an image is
// gone, and so is the upstream.
func TestF70NewDisk(t *testing.T) {
	f := newFleet(t)
	m := f.host(t, "containerd", "ctr")
	image := registrytest.NewIndex(greeter(t, 51).For("linux/s390x"), greeter(t, 52))
	f.push(t, supervisor, image)
	running := m.serve(t, sharing)
	engine := startDebianContainerd(t, m.host)
	names := []string{supervisorImage}
	pullAll(t, engine, names)
	f.published(t, supervisor, image)
	running.kill()
	if err := os.RemoveAll(m.data()); err != nil {
		t.Fatal(err)
	}

	m.upstream.shut()
	running = m.serve(t, sharing)
	begin := time.Now()
	pullAll(t, engine, append(names, "docker.io/"+supervisor+"@"+image.Digest().String()))
	t.Logf("F70: pulled and run twice in %v", time.Since(begin).Round(time.Millisecond))
	running.stop(t)
}

// TestSharedKeepOnNewHost starts a mirror that holds nothing while every upstream is gone: what its
// configuration keeps becomes complete from the bucket, though no client asks for it. Then the bucket
// is gone too, and a client comes.
func TestSharedKeepOnNewHost(t *testing.T) {
	f := newFleet(t)
	image := greeter(t, 1)
	f.push(t, supervisor, image)
	a, b := f.host(t), f.host(t, "dockerd", "docker")
	a.serve(t, sharing)
	a.pull(t, supervisor, image)
	f.published(t, supervisor, image)

	a.upstream.shut()
	b.upstream.shut()
	running := b.serve(t, sharing+"keep: [{image: "+supervisorImage+"}]\n")
	begin := time.Now()
	within(t, 30*time.Second, func() error {
		complete, err := b.metric(`breakwater_keep_complete{image="` + supervisorImage + `"}`)
		if err == nil && complete != "1" {
			err = fmt.Errorf("breakwater_keep_complete is %s", complete)
		}
		return err
	})
	t.Logf("complete after %v", time.Since(begin).Round(time.Millisecond))
	b.bucket.shut()
	pullAll(t, startDocker(t, b.host), []string{supervisorImage})
	running.stop(t)
}

// wantJSON wants each line of the mirror's log to be for machines.
func (h *host) wantJSON(t *testing.T) {
	t.Helper()
	log, err := os.ReadFile(filepath.Join(h.dir, "mirror.log"))
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(log)) {
		if !strings.HasPrefix(line, "{") {
			t.Errorf("the log has a line that is not JSON: %s", line)
		}
	}
}
