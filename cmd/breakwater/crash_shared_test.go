//go:build linux

package main_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/http"
	"os"
	"path"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"breakwater/pkg/buckettest"
	"breakwater/pkg/oci"
	"breakwater/pkg/registrytest"

	"github.com/opencontainers/go-digest"
)

// TestF45KilledWhilePublishing kills the real binary while it writes to the shared store, again and
// again. No record of the fleet may ever name what the bucket does not have, and what was whole when
// the process was killed is published by the next one, with every upstream out and no client asking.
func TestF45KilledWhilePublishing(t *testing.T) {
	rounds := sized(5, 100)
	program := binary(t)
	c := &publishing{T: t, bucket: buckettest.Start(t), reg: registrytest.New(registrytest.Config{}), contents: map[digest.Digest][]byte{}}
	c.bucket.Fault(buckettest.Writes, registrytest.Delay(10*time.Millisecond)) // so that a kill is in the middle of something
	dir := t.TempDir()
	config, data := filepath.Join(dir, "config.yaml"), filepath.Join(dir, "data")
	for file, text := range map[string]string{
		config: fmt.Sprintf("registries: {quay.test: {upstreams: [{url: %q}]}}\ndefault_registry: quay.test\n"+
			"shared: {s3: {bucket: %s, prefix: %s, endpoint: %q, path_style: true}, key_file: fleet.key}\n", c.reg.Start(t).URL, buckettest.Name, sharedPrefix, c.bucket.URL),
		filepath.Join(dir, "fleet.key"): strings.Repeat("5a", 32),
	} {
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	total, left := 0, 0
	for round := range rounds {
		m := startMirror(t, program, config, data)
		whole := c.pullUntilKilled(m, round)
		published := c.check()
		for tag, dgst := range whole {
			if published[tag] != dgst {
				left++
			}
		}
		total += len(whole)

		healed := c.reg.Fault(registrytest.Match{}, registrytest.Status(http.StatusServiceUnavailable))
		m = startMirror(t, program, config, data)
		within(t, 2*patience, func() error {
			published := c.check()
			for tag, dgst := range whole {
				if published[tag] != dgst {
					return fmt.Errorf("round %d: %s is %q for the fleet, want %s", round, tag, published[tag], dgst)
				}
			}
			return nil
		})
		_ = m.cmd.Process.Kill()
		_ = m.cmd.Wait() // killed
		healed()
		c.check()
	}
	m := startMirror(t, program, config, data)
	signed := registrytest.NewImage(registrytest.Layer(1, 20<<10))
	c.reg.Push("org/app", "signed", signed)
	c.reg.Push("org/app", "", registrytest.NewImage(registrytest.Layer(2, 1<<10)).Referring(signed, "application/signature"))
	m.stores("signed", signed)
	within(t, 2*patience, func() error {
		if c.check(); c.referring == 0 {
			return errors.New("no record says what refers to an image")
		}
		return nil
	})
	t.Logf("F45: %d rounds, %d images whole, %d of them not published when the mirror was killed", rounds, total, left)
	if left == 0 {
		t.Error("all was published by then, so nothing was tested")
	}
}

// publishing is a mirror's upstream, and the bucket that it writes to.
type publishing struct {
	*testing.T
	bucket    *buckettest.Bucket
	reg       *registrytest.Registry
	contents  map[digest.Digest][]byte // of the bucket's, what was looked at: nothing is written twice
	referring int                      // how many manifests were found that refer to another
}

// pullUntilKilled pulls new images by many clients, kills the mirror at some moment, and returns what it
// had called stored by then: the tags whose manifest and blobs were hits.
func (c *publishing) pullUntilKilled(m *crashing, round int) map[string]digest.Digest {
	random := rand.New(rand.NewPCG(uint64(round), 45))
	var mu sync.Mutex // guards whole
	whole := map[string]digest.Digest{}
	var clients sync.WaitGroup
	for client := range 8 {
		clients.Go(func() {
			for i := 0; ; i++ {
				seed := uint64(round<<16 | client<<10 | i<<2)
				image := registrytest.NewImage(registrytest.Layer(seed, 20<<10), registrytest.Layer(seed+1, 200<<10))
				tag := fmt.Sprintf("v%d-%d-%d", round, client, i)
				c.reg.Push("org/app", tag, image)
				if !m.stores(tag, image) {
					return
				}
				mu.Lock()
				whole[tag] = image.Digest()
				mu.Unlock()
			}
		})
	}
	kill := time.NewTimer(time.Duration(300+random.IntN(1500)) * time.Millisecond)
	<-kill.C
	if err := m.cmd.Process.Kill(); err != nil {
		c.Fatal(err)
	}
	_ = m.cmd.Wait() // killed
	clients.Wait()
	return whole
}

// stores pulls an image until all of it is stored. It returns false if the mirror is killed meanwhile.
func (m *crashing) stores(tag string, image registrytest.Image) bool {
	if status, _, body := m.get("/v2/quay.test/org/app/manifests/" + tag); status == 0 {
		return false
	} else if digest.FromBytes(body) != image.Digest() {
		m.Errorf("%s: %d, wrong bytes", tag, status)
		return false
	}
	for _, blob := range image.Blobs {
		for hit := false; !hit; {
			status, cache, body := m.get("/v2/quay.test/org/app/blobs/" + blob.Digest.String())
			if status == 0 {
				return false
			}
			if digest.FromBytes(body) != blob.Digest {
				m.Errorf("%s: %d, wrong bytes", blob.Digest, status)
				return false
			}
			hit = strings.Contains(cache, "; hit")
		}
	}
	return true
}

// check walks the bucket: what a record names is there, with the right bytes, and all that it reaches.
// It returns what the tags name.
func (c *publishing) check() map[string]digest.Digest {
	c.Helper()
	referring := 0
	defer func() { c.referring = max(c.referring, referring) }()
	tags, reached := map[string]digest.Digest{}, map[digest.Digest]bool{}
	records := c.bucket.Names(sharedPrefix + "records/") // before the blobs: more may come meanwhile
	c.list()
	for _, name := range records {
		_, body, _ := bytes.Cut(c.bucket.Get(name), []byte("\n"))
		var record struct {
			Digest    digest.Digest
			MediaType string `json:"media_type"`
			Size      int64
			Index     []byte // of who refers to it
		}
		if err := json.Unmarshal(body, &record); err != nil {
			c.Fatalf("%s: %v", name, err)
		}
		switch folder, last := path.Split(name); path.Base(folder) {
		case "_tags":
			tags[last] = record.Digest
			c.image(record.Digest, name, reached)
		case "_public":
			dgst := digest.NewDigestFromEncoded(digest.SHA256, last)
			if raw := c.content(dgst, name); int64(len(raw)) != record.Size {
				c.Fatalf("%s says %d bytes, the bucket has %d", name, record.Size, len(raw))
			}
			if record.MediaType != "" {
				c.image(dgst, name, reached)
			}
		case "_referrers":
			index, err := oci.ParseManifest("", record.Index, digest.SHA256)
			if err != nil {
				c.Fatalf("%s: %v", name, err)
			}
			c.image(digest.NewDigestFromEncoded(digest.SHA256, last), name, reached)
			for _, desc := range index.Manifests {
				c.image(desc.Digest, name, reached)
				referring++
			}
		default:
			c.Fatalf("%s: a record of what nobody has pulled", name)
		}
	}
	return tags
}

// list looks for blobs that were not there before, and at their bytes.
func (c *publishing) list() {
	c.Helper()
	for _, name := range c.bucket.Names(sharedPrefix + "blobs/sha256/") {
		dgst := digest.NewDigestFromEncoded(digest.SHA256, path.Base(name))
		if c.contents[dgst] == nil {
			if c.contents[dgst] = c.bucket.Get(name); digest.FromBytes(c.contents[dgst]) != dgst {
				c.Fatalf("%s has other bytes", name)
			}
		}
	}
}

// content is a blob that a record, or what it names, relies on.
func (c *publishing) content(dgst digest.Digest, record string) []byte {
	c.Helper()
	if c.contents[dgst] == nil {
		c.Fatalf("%s needs %s, which the bucket does not have", record, dgst)
	}
	return c.contents[dgst]
}

// image wants all of an image to be in the bucket.
func (c *publishing) image(dgst digest.Digest, record string, reached map[digest.Digest]bool) {
	c.Helper()
	if reached[dgst] {
		return
	}
	reached[dgst] = true
	manifest, err := oci.ParseManifest("", c.content(dgst, record), digest.SHA256)
	if err != nil {
		c.Fatalf("%s: %v", dgst, err)
	}
	for _, desc := range manifest.Blobs {
		c.content(desc.Digest, record)
	}
}
