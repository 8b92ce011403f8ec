package proxy

import (
	"bytes"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"net/http"
	"strings"
	"testing"
	"time"

	"breakwater/pkg/buckettest"
	"breakwater/pkg/oci"
	"breakwater/pkg/registrytest"
	"breakwater/storage"
	"breakwater/storage/s3"

	"github.com/opencontainers/go-digest"
)

// hosts are the mirrors of a fleet, with one upstream and one bucket, in real time: the bucket is another
// program's.
type hosts struct {
	*testing.T
	bucket *buckettest.Bucket
	quay   *registrytest.Registry
}

func newHosts(t *testing.T) *hosts {
	h := &hosts{t, buckettest.Start(t), registrytest.New(registrytest.Config{})}
	t.Cleanup(func() { h.bucket.Heal() })
	return h
}

var fleetKey = []byte(strings.Repeat("k", 32))

// host is one more mirror.
func (h *hosts) host(yaml string) *rig {
	h.Helper()
	return h.hostIn(h.TempDir(), yaml, h.open(s3.Config{}))
}

// hostIn is a mirror with that data folder, of before or not, and that view of the bucket.
func (h *hosts) hostIn(dir, yaml string, bucket *s3.Bucket) *rig {
	h.Helper()
	return h.hostOn(storage.Config{}, dir, yaml, bucket)
}

// hostOn is hostIn with a disk that may fail.
func (h *hosts) hostOn(disk storage.Config, dir, yaml string, bucket *s3.Bucket) *rig {
	h.Helper()
	r := &rig{T: h.T, network: registrytest.NewNetwork(), quay: h.quay, dir: dir, disk: disk, shared: bucket}
	h.Cleanup(r.shared.Close)
	h.Cleanup(func() { _ = r.network.Close() })
	h.quay.Serve(h.T, r.network, "quay.test:80")
	h.quay.Serve(h.T, r.network, "quay.test:443")
	r.start(yaml)
	h.Cleanup(func() {
		if r.server != nil {
			r.stop()
		}
	})
	return r
}

// kill ends a mirror, and what it had not written to the bucket yet.
func (h *hosts) kill(r *rig) {
	r.stop()
	r.server = nil
	r.shared.Close()
}

// open opens the bucket as one host does.
func (h *hosts) open(cfg s3.Config) *s3.Bucket {
	h.Helper()
	cfg.Bucket, cfg.Endpoint, cfg.Region, cfg.PathStyle = buckettest.Name, h.bucket.URL, "us-east-1", true
	cfg.Keys = [][]byte{fleetKey}
	b, err := s3.New(cfg)
	if err != nil {
		h.Fatal(err)
	}
	return b
}

// eventually waits until something holds that goes on behind.
func (h *hosts) eventually(what string, holds func() bool) {
	h.Helper()
	for deadline := time.Now().Add(20 * time.Second); !holds(); {
		if time.Now().After(deadline) {
			h.Fatalf("not so after 20 s: %s", what)
		}
		<-time.After(10 * time.Millisecond)
	}
}

// pulls gets a tag of app and all of its blobs.
func (h *hosts) pulls(r *rig, tag string, image registrytest.Image) answer {
	h.Helper()
	got := r.get(app+"/manifests/"+tag).want(r, http.StatusOK)
	if dgst := got.Header.Get("Docker-Content-Digest"); dgst != image.Digest().String() {
		h.Fatalf("%s is %s, want %s", tag, dgst, image.Digest())
	}
	for _, blob := range image.Blobs {
		r.get(app+"/blobs/"+blob.Digest.String()).want(r, http.StatusOK).is(r, blob.Bytes)
	}
	return got
}

// published waits until the fleet's record of a tag of app names that.
func (h *hosts) published(r *rig, tag string, dgst digest.Digest) {
	h.Helper()
	ref := reference(r, tag)
	h.eventually(tag+" is published", func() bool {
		r.shared.Forget(ref)
		got, err := r.shared.Tag(h.Context(), ref)
		return err == nil && got.Digest == dgst
	})
}

// reference is a tag of app.
func reference(r *rig, tag string) oci.Reference {
	return oci.Reference{Repository: r.repository("org/app"), Tag: tag}
}

// push has the upstream name a new image by a tag of org/app.
func (h *hosts) push(tag string, seed uint64, sizes ...int) registrytest.Image {
	h.Helper()
	var layers [][]byte
	for i, size := range sizes {
		layers = append(layers, registrytest.Layer(seed+uint64(i), size))
	}
	image := registrytest.NewImage(layers...)
	h.quay.Push("org/app", tag, image)
	return image
}

// everything is every request to the upstream.
var everything = registrytest.Match{}

const shared = "completion: {images: all}" + oneUpstream

// outages are how an upstream is gone.
var outages = map[string]registrytest.Fault{"dead": registrytest.Status(http.StatusBadGateway), "hanging": registrytest.Hang()}

// redate changes when a tag's record was validated and written, as the holder of the fleet's key can.
func (h *hosts) redate(name string, at time.Time) {
	h.Helper()
	var body map[string]any
	if err := json.Unmarshal(bytes.SplitN(h.bucket.Get(name), []byte("\n"), 2)[1], &body); err != nil {
		h.Fatal(err)
	}
	body["validated_at"], body["generation"] = at.UTC(), body["generation"].(float64)+1
	raw, err := json.Marshal(body)
	if err != nil {
		h.Fatal(err)
	}
	raw = append(raw, '\n')
	const mark = "breakwater-record 1"
	mac := hmac.New(sha256.New, fleetKey)
	fmt.Fprintf(mac, "%s\n%s\n%s", mark, name, raw)
	id := sha256.Sum256(append([]byte("breakwater-key-id 1\n"), fleetKey...))
	h.bucket.Put(name, fmt.Appendf(nil, "%s %x %x\n%s", mark, id[:4], mac.Sum(nil), raw))
	h.bucket.Age(name, max(0, time.Since(at)))
}
