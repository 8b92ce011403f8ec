package proxy

import (
	"context"
	"errors"
	"io/fs"
	"time"

	"breakwater/pkg/oci"
	"breakwater/proxy/upstream"
)

const (
	// repairEvery is how often is looked for what the store has found wrong.
	repairEvery = 10 * time.Second
	// repairPause is between two tries to fetch one of it again.
	repairPause = time.Minute
	// maxRepairs bounds what waits. The rest is fetched when somebody asks for it.
	maxRepairs = 4096
)

// errOnItsWay is no failure, but who says that what comes is right?
var errOnItsWay = errors.New("on its way")

// repairs are what was stored and found wrong, and when it is next tried to be fetched again.
type repairs map[oci.Reference]repair

type repair struct {
	next time.Time
	ask  func(context.Context, oci.Reference) error
}

// repairLoop fetches again what the store has found wrong, one at a time, for as long as an upstream may
// still have it.
func (m *Mirror) repairLoop(ctx context.Context) {
	ticker := time.NewTicker(repairEvery)
	defer ticker.Stop()
	waiting := repairs{}
	for {
		select {
		case <-ctx.Done():
			return
		case <-ticker.C:
		}
		blobs, manifests := m.store.TakeDamaged()
		waiting.add(blobs, m.repairBlob)
		waiting.add(manifests, m.repairManifest)
		m.repair(ctx, waiting)
	}
}

// repair tries what is due.
func (m *Mirror) repair(ctx context.Context, waiting repairs) {
	for ref, r := range waiting {
		if time.Now().Before(r.next) || ctx.Err() != nil {
			continue
		}
		err := r.ask(ctx, ref)
		switch up := new(upstream.Error); {
		case err == nil:
			delete(waiting, ref)
			m.logger.Info("fetched again what was damaged", "repository", ref.Repository, "digest", ref.Digest)
		case errors.As(err, &up) && !up.Outage():
			delete(waiting, ref)
			m.logger.Error("what was damaged is nowhere to be had", "repository", ref.Repository, "digest", ref.Digest, "err", err)
		default:
			r.next = time.Now().Add(repairPause)
			waiting[ref] = r
		}
	}
}

func (rs repairs) add(refs []oci.Reference, ask func(context.Context, oci.Reference) error) {
	for _, ref := range refs {
		if _, waits := rs[ref]; !waits && len(rs) < maxRepairs {
			rs[ref] = repair{ask: ask}
		}
	}
}

// repairBlob sees to it that the blob is stored: it is not yet if this has to fetch it.
func (m *Mirror) repairBlob(ctx context.Context, ref oci.Reference) error {
	blob, err := m.store.Blob(ref.Repository, ref.Digest)
	if err == nil {
		return blob.Close()
	}
	if !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	patience, cancel := context.WithTimeout(ctx, headerBudget)
	defer cancel()
	if blob, _, err = m.missBlob(ctx, patience, ref); err != nil {
		return err
	}
	return errors.Join(errOnItsWay, blob.Close())
}

func (m *Mirror) repairManifest(ctx context.Context, ref oci.Reference) error {
	_, err := m.store.Manifest(ref.Repository, ref.Digest)
	if errors.Is(err, fs.ErrNotExist) {
		_, err = m.askManifest(ref).wait(ctx, 0)
	}
	return err
}
