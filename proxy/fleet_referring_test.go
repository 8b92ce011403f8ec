package proxy

import (
	"net/http"
	"path"
	"strings"
	"sync"
	"testing"
	"time"

	"breakwater/pkg/registrytest"
)

// signed is an image with what refers to it: by the referrers API, and by cosign's tag.
type signed struct {
	image, signature, cosign registrytest.Image
	tag                      string // of cosign
}

func (h *hosts) pushSigned(seed uint64) signed {
	h.Helper()
	s := signed{image: h.push("v1", seed, 100<<10), cosign: registrytest.NewImage(registrytest.Layer(seed+1, 700))}
	s.signature = registrytest.NewImage(registrytest.Layer(seed+2, 600)).Referring(s.image, "application/signature")
	s.tag = strings.Replace(s.image.Digest().String(), ":", "-", 1) + ".sig"
	h.quay.Push("org/app", "", s.signature)
	h.quay.Push("org/app", s.tag, s.cosign)
	return s
}

// told waits until the fleet knows what refers to the image, and has it.
func (h *hosts) told(r *rig, s signed) {
	h.Helper()
	h.eventually("what refers to it is published", func() bool {
		got, err := r.shared.Referring(h.Context(), r.repository("org/app"), s.image.Digest())
		return err == nil && strings.Contains(string(got.Index), s.signature.Digest().String()) && len(got.Tags) == 1
	})
	h.published(r, s.tag, s.cosign.Digest())
}

// asksForReferring is whoever asks who refers to something.
var asksForReferring = registrytest.Match{Func: func(r *http.Request) bool {
	return strings.Contains(r.URL.Path, "/referrers/") || strings.HasPrefix(path.Base(r.URL.Path), "sha256-")
}}

// TestSharedReferring: one host of the fleet asks the upstreams what refers to an image; the others have that,
// and what it names, from it.
func TestSharedReferring(t *testing.T) {
	for name, config := range map[string]registrytest.Config{"API": {}, "tags": {ReferrersTag: true}} {
		t.Run(name, func(t *testing.T) {
			h := newHosts(t)
			h.quay.Configure(config)
			s := h.pushSigned(610)
			a := h.host(shared)
			h.pulls(a, "v1", s.image)
			h.told(a, s)
			asked := h.quay.Count(asksForReferring)
			if asked < 4 {
				t.Fatalf("asked %d times", asked)
			}
			b := h.host(shared)
			h.pulls(b, "v1", s.image)
			h.eventually("the other host has what refers to it", func() bool {
				repo := b.repository("org/app")
				return b.store.Complete(repo, s.signature.Digest()) && b.store.Complete(repo, s.cosign.Digest()) && b.mirror.completions.count() == 0
			})
			if more := h.quay.Count(asksForReferring) - asked; more != 0 {
				t.Errorf("the other host has asked %d times itself", more)
			}
		})
	}
}

// TestF44Referring: a new host says what refers to an image, and has it, though every upstream is gone: what
// verifies signatures goes on.
func TestF44Referring(t *testing.T) {
	for name, fault := range outages {
		t.Run(name, func(t *testing.T) {
			h := newHosts(t)
			s := h.pushSigned(620)
			a := h.host(shared)
			h.pulls(a, "v1", s.image)
			h.told(a, s)
			h.quay.Fault(everything, fault)
			b := h.host(shared)
			b.get(app+"/manifests/v1").want(b, http.StatusOK) // and at once, as Docker 29 does, before it pulls on
			begun := time.Now()
			got := b.get(app+"/referrers/"+s.image.Digest().String()).want(b, http.StatusOK)
			if took := time.Since(begun); took > 4*time.Second {
				t.Errorf("took %v", took)
			}
			if w := got.Header.Get("Warning"); !strings.Contains(string(got.body), s.signature.Digest().String()) || !strings.HasPrefix(w, `299 - "stale by `) {
				t.Errorf("Warning %q: %s", w, got.body)
			}
			b.get(app+"/manifests/"+s.tag).want(b, http.StatusOK).is(b, s.cosign.Raw)
			for _, image := range []registrytest.Image{s.signature, s.cosign} {
				b.get(app+"/manifests/"+image.Digest().String()).want(b, http.StatusOK).is(b, image.Raw)
				for _, blob := range image.Blobs {
					b.get(app+"/blobs/"+blob.Digest.String()).want(b, http.StatusOK).is(b, blob.Bytes)
				}
			}
		})
	}
}

// TestSharedReferringPrivate: what an account was told is for hosts that have one.
func TestSharedReferringPrivate(t *testing.T) {
	h := newHosts(t)
	h.quay.Configure(registrytest.Config{Auth: registrytest.Auth{Scheme: "Basic", Users: map[string]string{"ci": registrytest.Canary}}})
	s := h.pushSigned(630)
	yaml := "completion: {images: all}" + withAccount
	a := h.host(yaml)
	h.pulls(a, "v1", s.image)
	h.told(a, s)
	h.quay.Fault(everything, outages["dead"])
	stranger, friend := h.host(shared), h.host(yaml)
	path := app + "/referrers/" + s.image.Digest().String()
	if got := stranger.get(path); got.StatusCode != http.StatusServiceUnavailable || strings.Contains(string(got.body), s.signature.Digest().String()) {
		t.Errorf("a host without the account: %d %s", got.StatusCode, got.body)
	}
	h.pulls(friend, "v1", s.image)
	if got := friend.get(path).want(friend, http.StatusOK); !strings.Contains(string(got.body), s.signature.Digest().String()) {
		t.Errorf("a host with the account: %s", got.body)
	}
}

// TestSharedReferringTogether: of hosts that complete an image at the same time one asks, and the others wait.
func TestSharedReferringTogether(t *testing.T) {
	h := newHosts(t)
	s := h.pushSigned(640)
	h.quay.Fault(asksForReferring, registrytest.Delay(200*time.Millisecond)) // so that they meet
	var all []*rig
	for range 4 {
		all = append(all, h.host(shared))
	}
	var pulls sync.WaitGroup
	for _, r := range all {
		pulls.Go(func() { r.get(app + "/manifests/v1") })
	}
	pulls.Wait()
	for _, r := range all {
		h.eventually("it is complete", func() bool {
			return r.store.Complete(r.repository("org/app"), s.cosign.Digest()) && r.mirror.completions.count() == 0
		})
	}
	if n := h.quay.Count(asksForReferring); n > 5 { // the API, three tags, and what one of them names
		t.Errorf("asked %d times", n)
	}
}
