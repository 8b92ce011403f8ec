// Containerd-client pulls an image as Docker Engine 29 does with its containerd store: by containerd's
// resolver and hosts.toml files, and with a question for the referrers of each manifest, of which an
// error fails the whole pull. It prints the warnings that it gets and the referrers that it finds.
//
//	containerd-client HOSTS-DIR IMAGE
//
// It is a module of its own, for containerd's many dependencies are nothing that Breakwater needs.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"

	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/core/remotes"
	"github.com/containerd/containerd/v2/core/remotes/docker"
	"github.com/containerd/containerd/v2/core/remotes/docker/config"
	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
)

func main() {
	if len(os.Args) != 3 {
		fmt.Fprintln(os.Stderr, "usage: containerd-client HOSTS-DIR IMAGE")
		os.Exit(2)
	}
	if err := pull(context.Background(), os.Args[1], os.Args[2]); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func pull(ctx context.Context, hostsDir, image string) error {
	resolver := docker.NewResolver(docker.ResolverOptions{
		Hosts:          config.ConfigureHosts(ctx, config.HostOptions{HostDir: config.HostDirFromRoot(hostsDir)}),
		WarningHandler: printer{},
	})
	name, desc, err := resolver.Resolve(ctx, image)
	if err != nil {
		return fmt.Errorf("resolve %s: %w", image, err)
	}
	fetcher, err := resolver.Fetcher(ctx, name)
	if err != nil {
		return fmt.Errorf("fetcher of %s: %w", name, err)
	}
	return fetchAll(ctx, fetcher, desc)
}

// printer prints warnings.
type printer struct{}

func (printer) Warn(_ context.Context, _ docker.WarningSource, warning string) {
	fmt.Println("warning:", warning)
}

// fetchAll fetches what desc names, what that names, and what refers to it.
func fetchAll(ctx context.Context, fetcher remotes.Fetcher, desc v1.Descriptor) error {
	body, err := fetch(ctx, fetcher, desc)
	if err != nil {
		return err
	}
	if !images.IsManifestType(desc.MediaType) && !images.IsIndexType(desc.MediaType) {
		return nil
	}
	var manifest struct {
		Manifests []v1.Descriptor
		Config    *v1.Descriptor
		Layers    []v1.Descriptor
	}
	if err := json.Unmarshal(body, &manifest); err != nil {
		return fmt.Errorf("manifest %s: %w", desc.Digest, err)
	}
	children := slices.Concat(manifest.Manifests, manifest.Layers)
	if manifest.Config != nil {
		children = append(children, *manifest.Config)
	}
	asker, ok := fetcher.(remotes.ReferrersFetcher)
	if !ok {
		return errors.New("the fetcher asks for no referrers")
	}
	referrers, err := asker.FetchReferrers(ctx, desc.Digest)
	if err != nil {
		return fmt.Errorf("referrers of %s: %w", desc.Digest, err)
	}
	for _, referrer := range referrers {
		fmt.Println("referrer:", referrer.Digest)
	}
	for _, child := range append(children, referrers...) {
		if err := fetchAll(ctx, fetcher, child); err != nil {
			return err
		}
	}
	return nil
}

func fetch(ctx context.Context, fetcher remotes.Fetcher, desc v1.Descriptor) ([]byte, error) {
	r, err := fetcher.Fetch(ctx, desc)
	if err != nil {
		return nil, fmt.Errorf("fetch %s: %w", desc.Digest, err)
	}
	defer r.Close()
	body, err := io.ReadAll(r)
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", desc.Digest, err)
	}
	if got := digest.FromBytes(body); got != desc.Digest {
		return nil, fmt.Errorf("fetch %s: got %s", desc.Digest, got)
	}
	return body, nil
}
