package proxy

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"time"

	"breakwater/pkg/config"
	"breakwater/pkg/oci"
	"breakwater/proxy/upstream"
	"breakwater/storage"
	"breakwater/storage/s3"
)

// resolution is upstream's word on a tag, with the manifest that it names.
type resolution struct {
	manifest    oci.Manifest
	at          time.Time       // when upstream said so
	unconfirmed *upstream.Error // upstream is a mirror too and said that nobody confirmed it; else nil
	told        bool            // another host of the fleet was told so; nobody was asked for this one
	fetched     bool            // the manifest was not stored before
	durable     bool            // it is stored now
}

// freshness is what a resolution that somebody has already must have for no upstream to be asked.
type freshness struct {
	within time.Duration // how old it is at most; 0: upstreams are asked
	after  time.Time     // it is newer than this one, which is known
}

// met reports whether an answer that upstream gave then will do. One from the future, by a clock since set back,
// never does.
func (f freshness) met(at time.Time) bool {
	age := time.Since(at)
	return age >= -storage.ClockTolerance && age < f.within && at.After(f.after)
}

// freshFor is how long an answer needs no question, by the configuration.
func (m *Mirror) freshFor(ref oci.Reference) time.Duration {
	return m.cfg.Load().TagsFor(ref.Repository).FreshFor.Duration
}

// fresh reports whether an answer that upstream gave then needs no question now.
func (m *Mirror) fresh(ref oci.Reference, validatedAt time.Time) bool {
	return freshness{within: m.freshFor(ref)}.met(validatedAt)
}

// manifestByTag answers a tag: from the record while it is fresh, else by asking the fleet and the upstreams.
func (m *Mirror) manifestByTag(ctx context.Context, t target) (oci.Manifest, provenance, error) {
	ctx, cancel := context.WithTimeout(ctx, headerBudget) // for all that is waited for
	defer cancel()
	stored, tag := m.storedTagFor(t)
	if m.fresh(t.ref, tag.Current.ValidatedAt) {
		manifest, how := m.pullable(t, tag, stored, hit(cacheHit, tag.Current.ValidatedAt))
		return manifest, how, nil
	}
	unseen := tag.Current.ValidatedAt.IsZero()
	q := m.questionTag(t.ref, freshness{within: m.freshFor(t.ref)})
	if m.fleet != nil {
		m.fleet.hear(ctx, t.ref, q)
		stored, tag = m.storedTagFor(t)
	}
	have := m.standby(t, tag.Current.ValidatedAt)
	answer, how, err := revalidate(ctx, m, t, have, q)
	if err == nil && answer.told && m.withheld(t, answer.manifest.Digest) { // it is upstream's to say whom it is for
		answer, how, err = revalidate(ctx, m, t, have, m.questionTag(t.ref, freshness{}))
	}
	switch {
	case errors.Is(err, errUseStored):
		answer.manifest = stored
		if m.fleet != nil && tag.Published.Digest != tag.Current.Digest {
			how = how.unpublished()
		}
	case err != nil:
		return oci.Manifest{}, how, err
	case answer.unconfirmed != nil:
		how = stale(answer.unconfirmed, max(0, time.Since(answer.at)), m.freshFor(t.ref))
	case answer.told:
		how = hit(cacheTold, answer.at)
	case !answer.fetched:
		how = provenance{cache: cacheConfirmed}
	case unseen: // what is stored by now is upstream's answer
		how.cache = cacheFetched
	}
	if err == nil {
		_, tag = m.storedTagFor(t) // what upstream said has been noted
	}
	manifest, how := m.pullable(t, tag, answer.manifest, how)
	return manifest, how, nil
}

// questionTag is the one question about a tag that is open, for all who want to know, if nobody of the fleet can
// tell what is fresh enough.
func (m *Mirror) questionTag(ref oci.Reference, want freshness) *question[resolution] {
	key := ref.String()
	if m.fleet != nil {
		key += " " + want.within.String() // who wants it fresher is not answered by what another one was content with
	}
	return m.tags.join(m.asking, key, func(ctx context.Context) (resolution, error) { return m.askTag(ctx, ref, want) })
}

// pullable is the answer to a tag: what it names or, if that cannot be had whole, the last complete image
// that it named, stale by its own age (DESIGN 2, "Complete").
func (m *Mirror) pullable(t target, tag storage.Tag, named oci.Manifest, how provenance) (oci.Manifest, provenance) {
	last := tag.LastComplete
	if last.Digest == named.Digest {
		how.whole = true
		return named, how
	}
	rules := m.cfg.Load().TagsFor(t.ref.Repository)
	age := max(0, time.Since(last.ValidatedAt))
	if last.Digest == "" || age >= rules.MaxStale.Duration || m.withheld(t, last.Digest) {
		return named, how
	}
	why := m.completions.outOfReach(t.ref, named)
	if why == nil || m.store.Complete(t.ref.Repository, named.Digest) || !m.store.Complete(t.ref.Repository, last.Digest) {
		return named, how
	}
	manifest, err := m.store.Manifest(t.ref.Repository, last.Digest)
	if err != nil {
		return named, how
	}
	m.metrics.staleAnswers.WithLabelValues(t.ref.Registry).Inc()
	return manifest, incomplete(how, why, age, rules.FreshFor.Duration)
}

// errUseStored says that the stored answer is to be given, marked stale.
var errUseStored = errors.New("use what is stored")

// standby is a stored answer that can be given if upstream does not give its own.
type standby struct {
	validatedAt time.Time
	patience    time.Duration // how long upstream may make no progress
}

// standby is what is stored of t, last confirmed then: zero is never.
func (m *Mirror) standby(t target, validatedAt time.Time) standby {
	if validatedAt.IsZero() {
		return standby{}
	}
	return standby{validatedAt, max(m.cfg.Load().TagsFor(t.ref.Repository).RevalidateTimeout.Duration, 1)} // 0 s: asked, not waited for
}

// age is how long ago it was confirmed; ageUnknown if that was in the future.
func (s standby) age() time.Duration {
	age := time.Since(s.validatedAt)
	if age < -storage.ClockTolerance {
		return ageUnknown
	}
	return max(0, age)
}

// revalidate is the contract for all that can change upstream (DESIGN 2). It returns upstream's
// answer, or errUseStored with how to mark the stored one, or the error to answer with.
func revalidate[T any](ctx context.Context, m *Mirror, t target, have standby, q *question[T]) (T, provenance, error) {
	rules := m.cfg.Load().TagsFor(t.ref.Repository)
	stored, patience := !have.validatedAt.IsZero(), have.patience
	tooOld := stored && (have.age() >= rules.MaxStale.Duration || have.age() == ageUnknown && rules.MaxStale.Duration != config.Unlimited)
	if tooOld {
		patience = 0 // it cannot be given
	}
	answer, err := q.wait(ctx, patience)
	if err == nil && stored {
		return answer, provenance{cache: cacheMoved}, nil
	}
	if err == nil {
		return answer, provenance{cache: cacheFetched}, nil
	}
	refusal := t.answerFor(ctx, err)
	if !stored || errors.Is(refusal, errClientGone) {
		return answer, provenance{}, refusal
	}
	if up := new(upstream.Error); errors.As(err, &up) {
		denied := up.Kind == upstream.Denied && rules.OnDenied == config.Refuse
		gone := up.Kind == upstream.NotFound && rules.OnNotFound == config.Refuse
		if denied || gone || (tooOld && !up.Outage()) {
			return answer, provenance{}, refusal
		}
	}
	if tooOld {
		return answer, provenance{}, t.tooStale(err, have.age())
	}
	m.metrics.staleAnswers.WithLabelValues(t.ref.Registry).Inc()
	return answer, stale(err, have.age(), rules.FreshFor.Duration), errUseStored
}

// storedTagFor is storedTag, unless what is stored is not for this request.
func (m *Mirror) storedTagFor(t target) (oci.Manifest, storage.Tag) {
	manifest, tag := m.storedTag(t.ref)
	if tag.Current.Digest != "" && m.withheld(t, tag.Current.Digest) {
		return oci.Manifest{}, storage.Tag{}
	}
	return manifest, tag
}

// storedTag is what the record names, and the record: zero unless both are stored.
func (m *Mirror) storedTag(ref oci.Reference) (oci.Manifest, storage.Tag) {
	tag, err := m.store.Tag(ref.Repository, ref.Tag)
	var manifest oci.Manifest
	if err == nil {
		manifest, err = m.store.Manifest(ref.Repository, tag.Current.Digest)
	}
	if err == nil {
		return manifest, tag
	}
	if !errors.Is(err, fs.ErrNotExist) {
		m.logger.Error("stored tag cannot be read", "repository", ref.Repository, "reference", ref.Tag, "err", err)
	}
	return oci.Manifest{}, storage.Tag{}
}

// tooStale is the 503 for a tag whose stored answer is older than the user allows.
func (t target) tooStale(err error, age time.Duration) error {
	e := t.unavailable(err)
	confirmed := age.Truncate(time.Second).String() + " ago, which is over max_stale"
	if age == ageUnknown {
		confirmed = "in the future, so that nobody can tell if it is over max_stale"
	}
	e.Message = fmt.Sprintf("%s: stored, but last confirmed %s, and upstream does not answer: %s", t.ref, confirmed, e.Detail.(outageDetail).Reason)
	return e
}

// askTag asks the upstreams what a tag names, unless the fleet knows, and makes that the record. The manifest is
// stored before the record names it. What was fetched is answered even if the disk would not have it.
func (m *Mirror) askTag(ctx context.Context, ref oci.Reference, want freshness) (resolution, error) {
	clients, err := m.upstreams(ref)
	if err != nil {
		return resolution{}, err
	}
	var lease *s3.Lease
	if m.fleet != nil && want.within > 0 {
		var answer resolution
		if answer, lease = m.fleet.leadTag(ctx, ref, clients, want); answer.told {
			return answer, nil
		}
	}
	var r *race[resolution]
	r = askAll(m, clients, func(ctx context.Context, client *upstream.Client) (resolution, error) {
		answer, err := m.resolveAt(ctx, client, ref)
		if err == nil && m.turnsBack(ref, answer) && !r.refusedBefore(ctx, slices.Index(clients, client)) {
			err = &upstream.Error{Upstream: client.Upstream(), Class: "manifest", Reason: "names another digest, and who comes first is out"}
		}
		return answer, err
	})
	answer, i, err := r.run(ctx)
	if _, tag := m.storedTag(ref); err == nil && answer.unconfirmed != nil && tag.Current.ValidatedAt.After(answer.at) {
		err = answer.unconfirmed // ours is newer than theirs
	}
	if err != nil || !answer.durable {
		m.fleet.release(lease)
		return answer, err
	}
	m.keepTag(ref, storage.Validated{Digest: answer.manifest.Digest, ValidatedAt: answer.at, Upstream: clients[i].Upstream()})
	if m.fleet != nil {
		m.fleet.publish.tag(ref, lease)
	}
	return answer, nil
}

// turnsBack reports whether an answer may be that of a lagging copy: it is another than the stored
// one, which is not too old to be preferred while those who come first are out.
func (m *Mirror) turnsBack(ref oci.Reference, answer resolution) bool {
	stored, tag := m.storedTag(ref)
	validatedAt := tag.Current.ValidatedAt
	return !validatedAt.IsZero() && stored.Digest != answer.manifest.Digest &&
		time.Since(validatedAt) < m.cfg.Load().TagsFor(ref.Repository).MaxStale.Duration
}

// resolveAt asks one upstream what a tag names, and has its manifest stored.
func (m *Mirror) resolveAt(ctx context.Context, client *upstream.Client, ref oci.Reference) (resolution, error) {
	resolved, err := client.Resolve(ctx, ref)
	if err != nil {
		return resolution{}, err
	}
	answer := resolution{at: resolved.ValidatedAt, durable: true}
	if resolved.Stale {
		answer.unconfirmed = &upstream.Error{Upstream: client.Upstream(), Class: "manifest", Reason: "is a mirror, and answers stale itself"}
	}
	if resolved.Manifest != nil {
		answer.manifest, answer.fetched = *resolved.Manifest, true
		answer.durable = m.keepManifest(confirmation(client), ref.Repository, answer.manifest)
		return answer, nil
	}
	named := oci.Reference{Repository: ref.Repository, Digest: resolved.Digest}
	if answer.manifest, err = m.confirmed(client, named); err == nil {
		return answer, nil
	}
	if manifest, ok := m.unstored.get(named); ok { // upstream has just named it
		answer.manifest, answer.fetched = manifest, true
		answer.durable = m.keepManifest(confirmation(client), ref.Repository, manifest)
		return answer, nil
	}
	if answer.manifest, err = client.Manifest(ctx, named); err != nil {
		if e := new(upstream.Error); errors.As(err, &e) && e.Kind == upstream.NotFound {
			// It has just named the manifest: that it lacks it is trouble, not a word on the tag.
			broken := *e
			broken.Kind, broken.Reason = upstream.Unavailable, "lacks the manifest that it names"
			err = &broken
		}
		return resolution{}, err
	}
	answer.fetched = true
	answer.durable = m.keepManifest(confirmation(client), ref.Repository, answer.manifest)
	return answer, nil
}

// confirmed is the stored manifest that upstream has just named for this repository.
func (m *Mirror) confirmed(client *upstream.Client, named oci.Reference) (oci.Manifest, error) {
	manifest, err := m.store.Manifest(named.Repository, named.Digest)
	if err == nil {
		return manifest, nil
	}
	if err := m.store.Confirm(named.Repository, named.Digest, confirmation(client)); err != nil {
		return manifest, err
	}
	return m.store.Manifest(named.Repository, named.Digest)
}

// keepTag renews the record.
func (m *Mirror) keepTag(ref oci.Reference, current storage.Validated) {
	if err := m.store.RenewTag(ref.Repository, ref.Tag, current); err != nil {
		m.logNotStored("tag record not stored", err, "repository", ref.Repository, "reference", ref.Tag)
	}
}
