package main

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"strings"
	"time"

	"breakwater/pkg/oci"

	"github.com/opencontainers/go-digest"
)

// pull is what a client has seen.
type pull struct {
	status int
	header http.Header   // of the answer to the tag
	digest digest.Digest // of the manifest
	bytes  int64         // of all blobs
	body   string        // of an answer that is an error
	took   time.Duration
}

// stale reports whether the answer said so.
func (p pull) stale() bool { return p.header.Get("Warning") != "" }

// pullImage pulls a tag as a client with an empty store does: the manifest, then each blob, every
// digest checked.
func pullImage(ctx context.Context, base, tag string) (pull, error) {
	client := &http.Client{Transport: &http.Transport{}} // of its own: the connections are new
	defer client.CloseIdleConnections()
	start := time.Now()
	resp, err := get(ctx, client, base+"/manifests/"+tag)
	if err != nil {
		return pull{}, err
	}
	defer resp.Body.Close()
	p := pull{status: resp.StatusCode, header: resp.Header}
	raw, err := io.ReadAll(io.LimitReader(resp.Body, oci.MaxManifest))
	if err != nil {
		return pull{}, fmt.Errorf("read manifest %s: %w", tag, err)
	}
	if p.status != http.StatusOK {
		p.body, p.took = string(raw), time.Since(start)
		return p, nil
	}
	manifest, err := oci.ParseManifest(resp.Header.Get("Content-Type"), raw, digest.SHA256)
	if err != nil {
		return pull{}, err
	}
	p.digest = manifest.Digest
	for _, blob := range manifest.Blobs {
		if err := getBlob(ctx, client, base, blob.Digest); err != nil {
			return pull{}, err
		}
		p.bytes += blob.Size
	}
	p.took = time.Since(start)
	return p, nil
}

func getBlob(ctx context.Context, client *http.Client, base string, dgst digest.Digest) error {
	resp, err := get(ctx, client, base+"/blobs/"+dgst.String())
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return fmt.Errorf("blob %s: %w", dgst, oci.ReadError(resp))
	}
	verifier := dgst.Verifier()
	if _, err := io.Copy(verifier, resp.Body); err != nil {
		return fmt.Errorf("read blob %s: %w", dgst, err)
	}
	if !verifier.Verified() {
		return fmt.Errorf("blob %s has another digest", dgst)
	}
	return nil
}

func get(ctx context.Context, client *http.Client, url string) (*http.Response, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return nil, err
	}
	req.Header.Set("Accept", strings.Join(oci.ManifestTypes, ", "))
	return client.Do(req)
}
