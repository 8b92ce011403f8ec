// Package warm hides what a pull is made of: it pulls images through a mirror as clients do, reads and
// verifies all of each, keeps nothing, and says how the mirror came by what it answered.
package warm

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"breakwater/pkg/oci"

	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/remote/transport"
	"github.com/opencontainers/go-digest"
	ispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sync/errgroup"
)

const (
	// blobsAtOnce is what Docker and containerd do.
	blobsAtOnce = 3
	// answerWithin is three times what the mirror takes at most for the first byte.
	answerWithin = 30 * time.Second
	// maxIndexes is how deep an index may lie in indexes.
	maxIndexes = 4
)

// What Answered may be.
const (
	Stored  = "stored"  // nothing had to be fetched
	Fetched = "fetched" // something had to be
	Stale   = "stale"   // upstream did not confirm it
)

// Image is how one image fared.
type Image struct {
	Name     string   `json:"image"`
	Digest   string   `json:"digest,omitempty"`
	Bytes    int64    `json:"bytes"` // of blobs
	Seconds  float64  `json:"seconds"`
	Answered string   `json:"answered,omitempty"`
	Warning  string   `json:"warning,omitempty"` // why it is stale
	Fetched  []string `json:"fetched,omitempty"` // what was not stored before: manifests/TAG, blobs/DIGEST
	Error    string   `json:"error,omitempty"`
}

// Progress is how many bytes of an image's blobs are read, of how many.
type Progress func(read, all int64)

// Mirror is one that images are pulled through.
type Mirror struct {
	url       string
	registry  name.Registry
	platforms []string
	transport *http.Transport
}

// New is the mirror at a URL, which has nothing behind its port. Of an image with several platforms those
// are pulled that are named, as linux/amd64 or linux/arm64/v8.
func New(mirror string, platforms []string) (*Mirror, error) {
	u, err := url.Parse(mirror)
	if err != nil || u.Host == "" || u.Scheme != "http" && u.Scheme != "https" || u.Path != "" || u.RawQuery != "" || u.User != nil {
		return nil, errors.New("mirror: write scheme, host and port, such as http://127.0.0.1:5000")
	}
	var options []name.Option
	if u.Scheme == "http" {
		options = append(options, name.Insecure)
	}
	registry, err := name.NewRegistry(u.Host, options...)
	if err != nil {
		return nil, fmt.Errorf("mirror: %w", err)
	}
	t := http.DefaultTransport.(*http.Transport).Clone()
	t.ResponseHeaderTimeout = answerWithin
	t.DisableCompression = true // lengths are those of blobs
	return &Mirror{mirror, registry, platforms, t}, nil
}

// Close leaves no connection behind.
func (m *Mirror) Close() { m.transport.CloseIdleConnections() }

// Pull reads all of an image. Its error is the mirror's own reason, and what is known by then is returned
// with it.
func (m *Mirror) Pull(ctx context.Context, ref oci.Reference, progress Progress) (Image, error) {
	begun, seen := time.Now(), &answers{next: m.transport}
	image := Image{Name: ref.String()}
	p, err := m.in(ref, seen)
	if err == nil {
		image.Digest, image.Bytes, err = p.all(ctx, ref.Identifier(), progress)
	}
	image.Seconds = time.Since(begun).Seconds()
	image.Answered, image.Warning, image.Fetched = seen.sum()
	if err == nil && seen.stranger != "" {
		err = fmt.Errorf("%s was not answered by a breakwater: it has no Cache-Status of one", seen.stranger)
	}
	if err != nil {
		err = fmt.Errorf("%s: %w", ref, m.explain(err))
		image.Error = err.Error()
	}
	return image, err
}

// explain says what the mirror says of a failure, and in its words alone.
func (m *Mirror) explain(err error) error {
	answer := new(transport.Error)
	switch {
	case errors.As(err, &answer) && len(answer.Errors) > 0:
		return fmt.Errorf("%s: %s", answer.Errors[0].Code, answer.Errors[0].Message)
	case errors.Is(err, syscall.ECONNREFUSED):
		return fmt.Errorf("nobody listens at %s: start the mirror with breakwater serve, or use --mirror", m.url)
	}
	return err
}

// puller pulls what is in one repository.
type puller struct {
	*remote.Puller
	repository name.Repository
	platforms  []string
}

// in asks for the repository as people write it: its registry's name comes first. Each request is made
// once: the mirror itself has tried what can be tried.
func (m *Mirror) in(ref oci.Reference, seen *answers) (*puller, error) {
	client, err := remote.NewPuller(remote.WithTransport(seen), remote.WithAuthFromKeychain(authn.DefaultKeychain),
		remote.WithUserAgent("breakwater-warm"), remote.WithRetryBackoff(remote.Backoff{Steps: 1}))
	if err != nil {
		return nil, err
	}
	return &puller{client, m.registry.Repo(ref.Registry, ref.Name), m.platforms}, nil
}

func (p *puller) all(ctx context.Context, identifier string, progress Progress) (dgst string, size int64, err error) {
	top, err := p.manifest(ctx, identifier)
	if err != nil {
		return "", 0, err
	}
	manifests := []oci.Manifest{top}
	if top.IsIndex() {
		if manifests, err = p.chosen(ctx, top, maxIndexes); err != nil {
			return "", 0, err
		}
	}
	blobs := map[digest.Digest]int64{}
	for _, m := range manifests {
		for _, desc := range m.Blobs {
			if !foreign(desc) {
				blobs[desc.Digest] = desc.Size
			}
		}
	}
	size, err = p.blobs(ctx, blobs, progress)
	return top.Digest.String(), size, err
}

func (p *puller) manifest(ctx context.Context, identifier string) (oci.Manifest, error) {
	var ref name.Reference = p.repository.Tag(identifier)
	algorithm := digest.Canonical
	if dgst, err := oci.ParseDigest(identifier); err == nil {
		ref, algorithm = p.repository.Digest(identifier), dgst.Algorithm()
	}
	desc, err := p.Get(ctx, ref)
	if err != nil {
		return oci.Manifest{}, err
	}
	return oci.ParseManifest(string(desc.MediaType), desc.Manifest, algorithm)
}

// chosen are the manifests of an index that are for the platforms.
func (p *puller) chosen(ctx context.Context, index oci.Manifest, depth int) (chosen []oci.Manifest, err error) {
	if depth == 0 {
		return nil, errors.New("indexes within indexes, and no end")
	}
	for _, platform := range p.platforms {
		at := slices.IndexFunc(index.Manifests, func(desc ispec.Descriptor) bool { return isFor(desc, platform) })
		if at < 0 {
			return nil, fmt.Errorf("is not for %s, but for %s", platform, strings.Join(platformsOf(index), ", "))
		}
		m, err := p.manifest(ctx, index.Manifests[at].Digest.String())
		if err != nil {
			return nil, err
		}
		if !m.IsIndex() {
			chosen = append(chosen, m)
			continue
		}
		inner, err := (&puller{p.Puller, p.repository, []string{platform}}).chosen(ctx, m, depth-1)
		if err != nil {
			return nil, err
		}
		chosen = append(chosen, inner...)
	}
	return chosen, nil
}

// isFor compares the variant only if one is wanted.
func isFor(desc ispec.Descriptor, platform string) bool {
	parts := strings.Split(platform, "/")
	return desc.Platform != nil && desc.Platform.OS == parts[0] && desc.Platform.Architecture == parts[1] &&
		(len(parts) == 2 || desc.Platform.Variant == parts[2])
}

func platformsOf(index oci.Manifest) []string {
	names := []string{}
	for _, desc := range index.Manifests {
		if desc.Platform == nil || desc.Platform.OS == "unknown" { // attestations
			continue
		}
		platform := desc.Platform.OS + "/" + desc.Platform.Architecture
		if desc.Platform.Variant != "" {
			platform += "/" + desc.Platform.Variant
		}
		names = append(names, platform)
	}
	if len(names) == 0 {
		names = append(names, "no platform that it names")
	}
	return names
}

// foreign is a layer that registries do not hold: the manifest names other places.
func foreign(desc ispec.Descriptor) bool {
	return strings.Contains(desc.MediaType, ".nondistributable.") || strings.Contains(desc.MediaType, ".foreign.")
}

// blobs reads each of them to its end, where it is verified, and returns how many bytes that were.
func (p *puller) blobs(ctx context.Context, blobs map[digest.Digest]int64, progress Progress) (int64, error) {
	count := &counter{show: progress}
	for _, size := range blobs {
		count.all += size
	}
	group, ctx := errgroup.WithContext(ctx)
	group.SetLimit(blobsAtOnce)
	for dgst := range blobs {
		group.Go(func() error {
			layer, err := p.Layer(ctx, p.repository.Digest(dgst.String()))
			if err != nil {
				return err
			}
			body, err := layer.Compressed()
			if err != nil {
				return err
			}
			defer body.Close()
			if _, err := io.Copy(count, body); err != nil {
				return fmt.Errorf("blob %s: %w", dgst, err)
			}
			return nil
		})
	}
	err := group.Wait()
	return count.read, err
}

// counter counts what is written to it, and keeps nothing.
type counter struct {
	show Progress
	all  int64

	mu   sync.Mutex // guards read, and the calls of show
	read int64
}

func (c *counter) Write(p []byte) (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.read += int64(len(p))
	c.show(c.read, c.all)
	return len(p), nil
}
