package proxy

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"net/http"
	"reflect"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"breakwater/pkg/config"
	"breakwater/pkg/oci"

	"github.com/opencontainers/go-digest"
	ispec "github.com/opencontainers/image-spec/specs-go/v1"
)

const (
	// keepSpread is within which kept images are first asked for, not all at once and not before clients.
	keepSpread = 5 * time.Second
	// An attestation says what it is about in its descriptor, where its platform is unknown
	// (BuildKit, "Image attestation storage").
	attestationDigest = "vnd.docker.reference.digest"
	unknownPlatform   = "unknown/unknown"
)

// keepers hold the images of the configuration, each by a task of its own.
type keepers struct {
	mu   sync.Mutex // guards what follows
	list []*keeper
	cfg  *config.Config // that the list is of
}

// keeper holds one image complete and fresh.
type keeper struct {
	m        *Mirror
	cfg      config.Keep
	ref      oci.Reference
	stop     chan struct{} // closed when the configuration has it no more
	complete atomic.Bool

	// These are the task's.
	state string // what was said of it last
	held  []oci.Reference
}

// use keeps what the configuration says, and lets go of the rest. What has not changed goes on.
func (ks *keepers) use(m *Mirror, cfg *config.Config) {
	ks.mu.Lock()
	defer ks.mu.Unlock()
	before := ks.list
	ks.list, ks.cfg = nil, cfg
	for _, cfg := range cfg.Keep {
		if i := slices.IndexFunc(before, func(k *keeper) bool { return reflect.DeepEqual(k.cfg, cfg) }); i >= 0 {
			ks.list = append(ks.list, before[i])
			before = slices.Delete(before, i, i+1)
			continue
		}
		ref, err := cfg.Reference()
		if err != nil {
			continue // Validate has refused it
		}
		k := &keeper{m: m, cfg: cfg, ref: ref, stop: make(chan struct{})}
		if m.asking.start(k.run) {
			ks.list = append(ks.list, k)
		}
	}
	for _, k := range before {
		close(k.stop)
	}
}

// labels are what metrics call all of them, in the same order: by its place in the configuration, as its mistakes
// are, if the image's repository is private. Everybody on the host may read metrics (DESIGN 10).
func (ks *keepers) labels() ([]*keeper, []string) {
	ks.mu.Lock()
	defer ks.mu.Unlock()
	var labels []string
	for i, k := range ks.list {
		label := k.ref.String()
		if ks.cfg.IsPrivate(k.ref.Repository) {
			label = fmt.Sprintf("keep[%d]", i)
		}
		labels = append(labels, label)
	}
	return slices.Clone(ks.list), labels
}

func (ks *keepers) all() []*keeper {
	ks.mu.Lock()
	defer ks.mu.Unlock()
	return slices.Clone(ks.list)
}

// Kept are the references that the configuration keeps: what they name is never evicted.
func (m *Mirror) Kept() []oci.Reference {
	var refs []oci.Reference
	for _, k := range m.keepers.all() {
		refs = append(refs, k.ref)
	}
	return refs
}

// run holds the image until the mirror closes or the configuration has it no more.
func (k *keeper) run(ctx context.Context) {
	defer func() {
		for _, image := range k.held {
			k.m.completions.release(image)
		}
	}()
	next := time.NewTimer(rand.N(keepSpread))
	defer next.Stop()
	var completed []<-chan struct{}
	for {
		select {
		case <-next.C:
			completed = k.refresh(ctx)
			next.Reset(k.pause())
		case <-firstOf(completed):
			completed = completed[1:]
			k.look(nil)
		case <-k.stop:
			return
		case <-ctx.Done():
			return
		}
	}
}

// firstOf is the channel to wait for; nil, which blocks, if there is none.
func firstOf(channels []<-chan struct{}) <-chan struct{} {
	if len(channels) == 0 {
		return nil
	}
	return channels[0]
}

// pause is until the next question: every, more or less a tenth, so that a fleet does not ask as one.
func (k *keeper) pause() time.Duration {
	const longest = 365 * 24 * time.Hour
	return time.Duration(float64(min(k.cfg.Every.Duration, longest)) * (0.9 + 0.2*rand.Float64()))
}

// refresh asks what the tag names and has that completed. It returns what is closed as its images
// become complete.
func (k *keeper) refresh(ctx context.Context) []<-chan struct{} {
	dgst, err := k.resolve(ctx)
	if dgst != "" {
		if images, missing := k.images(ctx, dgst); missing != nil {
			err = missing
		} else {
			var completed []<-chan struct{}
			for _, image := range images {
				if c := k.m.completions.hold(image); c != nil {
					completed = append(completed, c)
				}
			}
			for _, image := range k.held {
				if !slices.Contains(images, image) {
					k.m.completions.release(image)
				}
			}
			k.held = images
			k.look(err)
			return completed
		}
	}
	if ctx.Err() == nil {
		k.look(err)
	}
	return nil
}

// resolve is what the tag names by upstream's word now. With an error it is what the fleet knows, if it has
// that: a new host must not wait for the end of an outage.
func (k *keeper) resolve(ctx context.Context) (digest.Digest, error) {
	if k.ref.Digest != "" {
		return k.ref.Digest, nil
	}
	tag, _ := k.m.store.Tag(k.ref.Repository, k.ref.Tag) // what this host has by itself is no news
	want := freshness{within: min(k.cfg.Every.Duration, k.m.freshFor(k.ref)), after: tag.Current.ValidatedAt}
	resolved, err := k.m.questionTag(k.ref, want).wait(ctx, 0)
	if err != nil {
		if k.m.fleet == nil {
			return "", err
		}
		_, _ = k.m.fleet.word(k.ref).wait(ctx, 0)
		if stored, _ := k.m.storedTag(k.ref); k.m.fleet.offers(k.ref, stored) {
			return stored.Digest, err
		}
		return "", err
	}
	k.m.completions.served(http.MethodHead, k.ref, resolved.manifest)
	if resolved.unconfirmed != nil {
		return "", resolved.unconfirmed
	}
	return resolved.manifest.Digest, nil
}

// images are those of the manifest for the platforms that are kept, attestations of them included.
func (k *keeper) images(ctx context.Context, dgst digest.Digest) ([]oci.Reference, error) {
	ref := oci.Reference{Repository: k.ref.Repository, Digest: dgst}
	manifest, err := k.m.completions.manifest(ctx, ref)
	if err != nil {
		return nil, err
	}
	if !manifest.IsIndex() {
		return []oci.Reference{ref}, nil
	}
	chosen := k.choose(manifest.Manifests)
	if len(chosen) == 0 {
		return nil, fmt.Errorf("%s has no image for %s", ref, strings.Join(k.cfg.Platforms, ", "))
	}
	var images []oci.Reference
	for _, dgst := range chosen {
		images = append(images, oci.Reference{Repository: k.ref.Repository, Digest: dgst})
	}
	return images, nil
}

// choose picks from an index.
func (k *keeper) choose(manifests []ispec.Descriptor) []digest.Digest {
	var chosen []digest.Digest
	for _, desc := range manifests {
		name := platform(desc)
		if slices.ContainsFunc(k.cfg.Platforms, func(p string) bool { return name == p || strings.HasPrefix(name, p+"/") }) {
			chosen = append(chosen, desc.Digest)
		}
	}
	for _, desc := range manifests {
		if platform(desc) == unknownPlatform && slices.Contains(chosen, digest.Digest(desc.Annotations[attestationDigest])) {
			chosen = append(chosen, desc.Digest)
		}
	}
	return chosen
}

// platform is a descriptor's, as people write it: linux/arm64/v8.
func platform(desc ispec.Descriptor) string {
	if desc.Platform == nil {
		return ""
	}
	name := desc.Platform.OS + "/" + desc.Platform.Architecture
	if desc.Platform.Variant != "" {
		name += "/" + desc.Platform.Variant
	}
	return name
}

// whole is nil if what is stored of the image can be pulled for its platforms.
func (k *keeper) whole() error {
	dgst := k.ref.Digest
	if dgst == "" {
		tag, err := k.m.store.Tag(k.ref.Repository, k.ref.Tag)
		if err != nil {
			return err
		}
		dgst = tag.Current.Digest
	}
	manifest, err := k.m.store.Peek(k.ref.Repository, dgst)
	if err != nil {
		return err
	}
	wanted := []digest.Digest{dgst}
	if manifest.IsIndex() {
		if wanted = k.choose(manifest.Manifests); len(wanted) == 0 {
			return fs.ErrNotExist
		}
	}
	for _, dgst := range wanted {
		image, err := k.m.store.Peek(k.ref.Repository, dgst)
		if err != nil {
			return err
		}
		if missing := k.m.store.Missing(k.ref.Repository, image); len(missing) > 0 {
			return fmt.Errorf("%d blobs of %s are missing", len(missing), dgst)
		}
	}
	return nil
}

// age is how long ago an upstream confirmed what is stored; false if nothing is.
func (k *keeper) age() (time.Duration, bool) {
	if k.ref.Digest != "" {
		_, err := k.m.store.Peek(k.ref.Repository, k.ref.Digest)
		return 0, err == nil
	}
	tag, err := k.m.store.Tag(k.ref.Repository, k.ref.Tag)
	return max(0, time.Since(tag.Current.ValidatedAt)), err == nil
}

// look settles whether the image is complete, and says so if that, or how its tag does, has changed.
func (k *keeper) look(failed error) {
	lacking := k.whole()
	k.complete.Store(lacking == nil)
	state := fmt.Sprint(failed == nil, lacking == nil)
	if state == k.state {
		return
	}
	k.state = state
	switch {
	case failed != nil:
		k.m.logger.Warn("kept image cannot be refreshed", "image", k.ref.String(), "complete", lacking == nil, "err", failed)
	case lacking == nil:
		k.m.logger.Info("kept image complete and fresh", "image", k.ref.String())
	case !errors.Is(lacking, fs.ErrNotExist):
		k.m.logger.Info("kept image being completed", "image", k.ref.String(), "err", lacking)
	}
}
