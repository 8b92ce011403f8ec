package main

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"breakwater/pkg/oci"
)

// What new hosts pull that nobody has, at the rate of a connection to a registry that is far away.
const (
	coldHosts = 50
	coldRate  = 4 << 20 // bytes a second
	coldGoal  = 3       // fetches of a blob, when the hosts start over a minute
)

var coldLayers = []int{4 << 20, 2 << 20, 1 << 20}

// cold starts hosts, spread over a time, on an image that nobody has, and prints how often the upstream was
// asked for each blob.
func (f *fleet) cold(ctx context.Context, over time.Duration) (err error) {
	if err := f.upstream.become(recovery); err != nil {
		return err
	}
	defer f.upstream.limit(coldRate)()
	f.size, f.hosts = 0, nil // all are new
	defer func() { err = errors.Join(err, f.disband()) }()
	tag := oci.Reference{Repository: oci.Repository{Registry: registryName, Name: "fleet/cold"}, Tag: over.String()}
	image := f.library.push(f.upstream, tag, coldLayers...)
	f.tally.begin(coldStart)
	for range coldHosts {
		if _, err := f.muster(); err != nil {
			return err
		}
	}
	var pulling sync.WaitGroup
	var mu sync.Mutex // guards what follows
	var slowest time.Duration
	whole := 0
	for i, h := range f.hosts {
		pulling.Go(func() {
			if !wait(ctx, over*time.Duration(i)/coldHosts) {
				return
			}
			begun := time.Now()
			came := h.pull(ctx, tag, true)
			mu.Lock()
			defer mu.Unlock()
			slowest = max(slowest, time.Since(begun))
			if came {
				whole++
			}
		})
	}
	pulling.Wait()
	f.tally.end()
	if ctx.Err() != nil {
		return ctx.Err()
	}
	fmt.Printf("\n%d hosts start over %s on an image that nobody has; %d have pulled it, the slowest in %s\n", coldHosts, over, whole, slowest.Round(100*time.Millisecond))
	if whole < coldHosts {
		f.tally.violate("%d of %d cold hosts have not pulled the image", coldHosts-whole, coldHosts)
	}
	n := f.tally.last()
	fmt.Printf("  the tag: %d HEAD upstream; the manifest: %d GET\n", len(n.tagHeads[tag.String()]), n.upstream["GET of a manifest"])
	for _, blob := range image.Blobs {
		fetches := n.blobGets[blob.Digest.String()]
		fmt.Printf("  a blob of %9d bytes: %d fetches upstream\n", blob.Size, fetches)
		if over >= time.Minute && fetches > coldGoal {
			f.tally.violate("%d fetches upstream of a blob of %d bytes by hosts that start over %s, goal %d", fetches, blob.Size, over, coldGoal)
		}
	}
	return nil
}
