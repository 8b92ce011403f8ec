package proxy

import (
	"context"
	"errors"
	"io/fs"
	"net/http"

	"breakwater/pkg/oci"
	"breakwater/proxy/upstream"
	"breakwater/storage"
)

// serveManifest sends a manifest, by tag or by digest. It returns an error only if it has written
// nothing.
func (m *Mirror) serveManifest(w *response, r *http.Request, t target) error {
	var manifest oci.Manifest
	var how provenance
	var err error
	if t.ref.Digest != "" {
		manifest, how, err = m.manifestByDigest(r.Context(), t)
	} else {
		manifest, how, err = m.manifestByTag(r.Context(), t)
	}
	if err != nil {
		return err
	}
	if !how.whole {
		m.completions.served(r.Method, t.ref, manifest)
	}
	if m.fleet != nil && r.Method == http.MethodGet && t.ref.Tag == "" {
		m.fleet.publish.image(t.ref)
	}
	if err := how.mark(w); err != nil {
		return err
	}
	setContent(w.Header(), manifest.MediaType, manifest.Digest)
	w.sendBytes(r, manifest.Raw)
	return nil
}

// manifestByDigest is the stored manifest if this repository reaches it, without asking anybody;
// otherwise upstream's.
func (m *Mirror) manifestByDigest(ctx context.Context, t target) (oci.Manifest, provenance, error) {
	manifest, err := m.store.Manifest(t.ref.Repository, t.ref.Digest)
	if err == nil && !m.withheld(t, t.ref.Digest) {
		return manifest, provenance{cache: cacheHit}, nil
	}
	if errors.Is(err, storage.ErrBusy) {
		return manifest, provenance{}, t.busy(err)
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		m.logger.Error("stored manifest cannot be read", "digest", t.ref.Digest, "err", err)
	}
	fetched, err := m.askManifest(t.ref).wait(ctx, 0)
	if err != nil {
		return manifest, provenance{}, t.answerFor(ctx, err)
	}
	return fetched.content, provenance{cache: fetched.cache}, nil
}

// askManifest fetches and stores a manifest by its digest, once for all who want it: what the fleet has, no
// upstream is asked for.
func (m *Mirror) askManifest(ref oci.Reference) *question[found[oci.Manifest]] {
	return m.manifests.join(m.asking, ref.String(), func(ctx context.Context) (found[oci.Manifest], error) {
		if m.fleet != nil {
			if manifest, err := m.fleet.manifest(ctx, ref); err == nil {
				return found[oci.Manifest]{manifest, cacheShared}, nil
			}
		}
		manifest, err := first(ctx, m, ref, func(ctx context.Context, client *upstream.Client) (oci.Manifest, error) {
			return m.fetchManifest(ctx, client, ref)
		})
		m.completions.tried(ref, err)
		return found[oci.Manifest]{manifest, cacheFetched}, err
	})
}

// fetchManifest has upstream confirm a manifest that it gave to another of its repositories, or fetches
// and stores it. Trouble with the disk is logged, not the client's.
func (m *Mirror) fetchManifest(ctx context.Context, client *upstream.Client, ref oci.Reference) (oci.Manifest, error) {
	if m.store.StoredFrom(ref.Digest, client.Upstream()) {
		resolved, err := client.Resolve(ctx, ref)
		if err == nil && resolved.Manifest != nil {
			m.keepManifest(confirmation(client), ref.Repository, *resolved.Manifest)
			return *resolved.Manifest, nil
		}
		if err == nil {
			m.confirm(client, ref)
			if manifest, err := m.store.Manifest(ref.Repository, ref.Digest); err == nil {
				return manifest, nil
			}
		}
	}
	manifest, err := m.getManifest(ctx, client, ref)
	if err != nil {
		return manifest, err
	}
	m.keepManifest(confirmation(client), ref.Repository, manifest)
	return manifest, nil
}

// getManifest is a manifest from upstream, unless the disk would not have it when it was got before: then
// upstream, which counts GETs, is only asked whether it still has it.
func (m *Mirror) getManifest(ctx context.Context, client *upstream.Client, ref oci.Reference) (oci.Manifest, error) {
	if manifest, ok := m.unstored.get(ref); ok {
		if resolved, err := client.Resolve(ctx, ref); err == nil && resolved.Manifest == nil {
			return manifest, nil
		}
	}
	return client.Manifest(ctx, ref)
}

// keepManifest stores a manifest, or remembers it, and reports which.
func (m *Mirror) keepManifest(c storage.Confirmation, repo oci.Repository, manifest oci.Manifest) bool {
	m.expected.note(repo, manifest)
	err := m.store.PutManifest(repo, manifest, c)
	m.unstored.note(oci.Reference{Repository: repo, Digest: manifest.Digest}, manifest, err)
	if err != nil {
		m.logNotStored("manifest not stored", err, "repository", repo, "digest", manifest.Digest)
	}
	return err == nil
}
