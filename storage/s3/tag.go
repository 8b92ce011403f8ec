package s3

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"breakwater/pkg/oci"

	"github.com/opencontainers/go-digest"
)

const (
	// tagMemorized is how long an answer of the bucket's is good, and so how far behind the fleet a
	// host's answer may be (DESIGN.md, section 9).
	tagMemorized = 5 * time.Second
	// tagInterval is how often a tag is published that names what it has named before, give or take clockSlip,
	// by which what two hosts know of the bucket's clock may differ: it tells seconds. What counts is when it
	// was validated: a record that was written later would otherwise be too old for hosts that take a minute
	// for fresh, and too young to be renewed.
	tagInterval = time.Minute
	clockSlip   = 2 * time.Second
	// tagEntries bounds the tags in memory, at about 500 bytes each. Of one that was thrown out, the
	// highest generation is forgotten.
	tagEntries = 8 << 10
)

// Tag is what the fleet knows a tag to name.
type Tag struct {
	Digest      digest.Digest
	ValidatedAt time.Time // by this host's clock
	Upstream    string    // who has said so
	Generation  uint64    // grows with each publication
}

// published is Tag as it is published: its time is the bucket's.
type published struct {
	Digest      digest.Digest `json:"digest"`
	ValidatedAt time.Time     `json:"validated_at"`
	Upstream    string        `json:"upstream,omitempty"`
	Generation  uint64        `json:"generation"`
}

func (p *published) check() error {
	if p.ValidatedAt.IsZero() || p.Generation == 0 {
		return fmt.Errorf("validated at %s, generation %d", p.ValidatedAt, p.Generation)
	}
	_, err := oci.ParseDigest(p.Digest.String())
	return err
}

// tagState is what the bucket has last said of a tag.
type tagState struct {
	signed            // of the object
	tag     published // unless it is not found or ignored
	highest uint64    // of all generations that were seen
}

// good reports whether there is a record that can be believed.
func (s tagState) good() bool { return s.found && s.wrong == nil && s.tag.Generation >= s.highest }

// errReplayed is why a record is ignored that once was the newest.
var errReplayed = errors.New("is older than one that was seen")

// Tag returns what was published last, fs.ErrNotExist if nothing was. What the bucket has said is
// good for 5 s, and those who want to know at the same time ask once. It has an answer within 2 s.
func (b *Bucket) Tag(ctx context.Context, ref oci.Reference) (Tag, error) {
	name := tagName(ref)
	e := b.tags.entry(name)
	state, f, begun := e.recall()
	if begun && !b.start(func(ctx context.Context) { b.fly(ctx, name, e, f) }) {
		e.land(f, tagState{}, errClosed)
	}
	if f != nil {
		select {
		case <-f.done:
		case <-ctx.Done():
			return Tag{}, context.Cause(ctx)
		}
		if f.err != nil {
			return Tag{}, f.err
		}
		state = f.state
	}
	if !state.good() {
		return Tag{}, errNone(name)
	}
	return b.tagOf(state.tag), nil
}

func (b *Bucket) tagOf(p published) Tag {
	return Tag{p.Digest, b.clock.here(p.ValidatedAt), p.Upstream, p.Generation}
}

// Forget has the next Tag ask the bucket.
func (b *Bucket) Forget(ref oci.Reference) { b.tags.entry(tagName(ref)).forget() }

// PutTag publishes what a tag names, and returns what is published then. t.Generation is the highest
// that the caller has seen. Nothing is written if the same digest was validated less than a minute
// before, or another later.
func (b *Bucket) PutTag(ctx context.Context, ref oci.Reference, t Tag) (Tag, error) {
	if err := b.writable(); err != nil {
		return Tag{}, err
	}
	name := tagName(ref)
	e := b.tags.entry(name)
	e.raise(t.Generation)
	var there Tag
	err := b.contend(ctx, name, func() (bool, error) {
		state, err := b.readTag(ctx, name, e)
		if err != nil {
			return false, err
		}
		next := published{t.Digest, b.clock.there(t.ValidatedAt), t.Upstream, state.highest + 1}
		if err := next.check(); err != nil {
			return false, fmt.Errorf("write %s: %w", name, err)
		}
		if b.clock.future(next.ValidatedAt) {
			return false, fmt.Errorf("write %s: %w: it was validated at %s", name, ErrClock, t.ValidatedAt)
		}
		if state.good() && b.stands(state, next) {
			there = b.tagOf(state.tag)
			return true, nil
		}
		version := e.version() // who asks behind the write may learn of it, or of a later one, before it has returned
		etag, err := b.write(ctx, name, &next, condition{state.etag})
		if err != nil {
			return false, err
		}
		e.learn(tagState{signed: signed{found: true, etag: etag, modified: b.clock.now()}, tag: next}, version)
		there = b.tagOf(next)
		return true, nil
	})
	return there, err
}

// stands reports whether what is published is as good as the next.
func (b *Bucket) stands(state tagState, next published) bool {
	if b.clock.future(state.tag.ValidatedAt) {
		return false
	}
	if state.tag.Digest == next.Digest && next.ValidatedAt.Sub(state.tag.ValidatedAt) < tagInterval-clockSlip {
		return true
	}
	return state.tag.ValidatedAt.After(next.ValidatedAt)
}

// fly asks the bucket for all who wait.
func (b *Bucket) fly(ctx context.Context, name string, e *tagEntry, f *flight) {
	state, err := b.readTag(ctx, name, e)
	e.land(f, state, err)
}

// readTag asks the bucket.
func (b *Bucket) readTag(ctx context.Context, name string, e *tagEntry) (tagState, error) {
	version, etag := e.version(), e.etag()
	var state tagState
	rec, err := b.read(ctx, name, etag, &state.tag)
	if err != nil {
		return tagState{}, err
	}
	if rec.unchanged {
		return e.confirm(), nil
	}
	state.signed = rec
	state = e.learn(state, version)
	if errors.Is(state.wrong, errReplayed) {
		b.ignore(name, state.wrong)
	}
	return state, nil
}

// tagMemory holds what is known of tags. It has room for two halves: when the young one is full, the
// old one is thrown out.
type tagMemory struct {
	half int

	mu         sync.Mutex // guards what follows
	young, old map[string]*tagEntry
}

func newTagMemory(entries int) *tagMemory {
	return &tagMemory{half: entries / 2, young: map[string]*tagEntry{}}
}

func (m *tagMemory) entry(name string) *tagEntry {
	m.mu.Lock()
	defer m.mu.Unlock()
	if e := m.young[name]; e != nil {
		return e
	}
	e := m.old[name]
	if e == nil {
		e = &tagEntry{}
	}
	if len(m.young) >= m.half {
		m.old, m.young = m.young, map[string]*tagEntry{}
	}
	m.young[name] = e
	return e
}

// tagEntry is one tag.
type tagEntry struct {
	mu     sync.Mutex // guards what follows
	state  tagState
	learnt int       // how often
	asked  time.Time // when the state was good; zero if it is not any more
	flight *flight   // in which the bucket is being asked
}

// flight is one question, for all who have it.
type flight struct {
	done  chan struct{}
	state tagState // set when done
	err   error    // set when done
}

// recall returns the state if it is good still, or else the flight in which to wait for it, and
// whether it is to begin.
func (e *tagEntry) recall() (state tagState, f *flight, begun bool) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if !e.asked.IsZero() && time.Since(e.asked) < tagMemorized {
		return e.state, nil, false
	}
	if begun = e.flight == nil; begun {
		e.flight = &flight{done: make(chan struct{})}
	}
	return tagState{}, e.flight, begun
}

// land ends the flight. What was asked before a Forget is not good.
func (e *tagEntry) land(f *flight, state tagState, err error) {
	e.mu.Lock()
	if e.flight == f {
		e.flight = nil
	} else {
		e.asked = time.Time{}
	}
	e.mu.Unlock()
	f.state, f.err = state, err
	close(f.done)
}

func (e *tagEntry) etag() string {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.state.etag
}

// version tells whether anything was learnt meanwhile.
func (e *tagEntry) version() int {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.learnt
}

// learn takes in what the bucket has said to somebody who asked at that version, and returns what to
// make of it. An answer that has been overtaken is not taken for a replay.
func (e *tagEntry) learn(s tagState, version int) tagState {
	e.mu.Lock()
	defer e.mu.Unlock()
	newer := s.found && s.wrong == nil && s.tag.Generation >= e.state.highest
	if e.learnt != version && !newer {
		return e.state
	}
	switch s.highest = e.state.highest; {
	case newer:
		s.highest = s.tag.Generation
	case s.found && s.wrong == nil:
		s.wrong = errReplayed
	}
	e.state, e.asked = s, time.Now()
	e.learnt++
	return s
}

// confirm is for an answer that nothing has changed.
func (e *tagEntry) confirm() tagState {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.asked = time.Now()
	return e.state
}

// raise notes a generation that the caller has seen.
func (e *tagEntry) raise(generation uint64) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.state.highest = max(e.state.highest, generation)
}

func (e *tagEntry) forget() {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.asked, e.flight = time.Time{}, nil
}
