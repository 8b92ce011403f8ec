package storage

import (
	"cmp"
	"encoding/hex"
	"maps"
	"math"
	"slices"
	"sync"
	"time"

	"breakwater/pkg/oci"

	"github.com/hashicorp/golang-lru/v2/simplelru"
	"github.com/opencontainers/go-digest"
)

// recordSpace is what a record takes on the disk: a block. Each content is counted with one.
const recordSpace = 4 << 10

// index is what is stored, in memory: how much space it takes, what each image needs, and in which order
// they go when that is too much. It is built from the disk behind a start; until then it says nothing, and
// nothing goes. The disk is the truth: a look-up never asks the index.
//
// A million blobs take about 120 MB: 32 bytes of digest twice, and little else.
type index struct {
	mu    sync.Mutex // guards all; no I/O under it
	ids   map[sum]id
	nodes []node // by id
	freed []id   // to be used again

	manifests map[id]*manifest
	repos     []oci.Repository // interned
	repoIDs   map[oci.Repository]repoID
	private   map[id][]repoID   // repositories with a record of private content
	long      map[id][32]byte   // the second half of a sha512
	order     *ordered          // by last pull: images that no other needs, and content that no image does
	tags      map[tagKey]tagged // what each record names

	used     int64 // allocated bytes of what is stored, and of what is evicted but still open
	leaving  int64 // those of what was taken out, while its files are there
	reserved int64 // bytes of what is on its way, or parked
	built    bool

	counting sync.Mutex // guards counted; taken before mu
	counted  counted
}

type (
	ordered = simplelru.LRU[id, struct{}]
	id      uint32
	repoID  uint32
	// sum identifies content: the first half of a sha512 does that as well as a whole sha256.
	sum [32]byte
)

// node is content: stored, or needed by something stored.
type node struct {
	sum    sum
	bytes  int64   // allocated; 0 if it is not stored
	needed int32   // by so many stored manifests
	open   *handle // nil if nobody reads it
}

// manifest is a stored manifest.
type manifest struct {
	needs     []id // distinct: manifests of an index, config and layers of an image
	referrers []id // signatures and the like: they go with it, but it is whole without them
	index     bool
	repos     []repoID
	tags      []tagKey
	subject   sum // of a referrer
	mediaType string
	size      int64
	pulled    int64 // Unix nanoseconds
}

type tagged struct{ current, lastComplete id }

// none is the id of nothing.
const none = id(math.MaxUint32)

// handle counts the readers of a file, which takes its space until the last of them closes it.
type handle struct {
	readers  int
	unlinked int64 // its bytes, once it has no name any more
}

func newIndex() *index {
	order, _ := simplelru.NewLRU[id, struct{}](math.MaxInt32, nil) // fails on a size of 0
	return &index{
		ids: map[sum]id{}, manifests: map[id]*manifest{}, repoIDs: map[oci.Repository]repoID{},
		private: map[id][]repoID{}, long: map[id][32]byte{}, tags: map[tagKey]tagged{}, order: order,
	}
}

// sumOf returns the second half of a sha512 too.
func sumOf(dgst digest.Digest) (first sum, second [32]byte) {
	var raw [64]byte
	_, _ = hex.Decode(raw[:], []byte(dgst.Encoded())) // digests here are well-formed
	return sum(raw[:32]), [32]byte(raw[32:])
}

// at returns the id of content, a new one if it has none. The lock is held, as by all that follows in
// small letters.
func (x *index) at(dgst digest.Digest) id {
	first, second := sumOf(dgst)
	if i, ok := x.ids[first]; ok {
		return i
	}
	var i id
	if n := len(x.freed); n > 0 {
		i, x.freed = x.freed[n-1], x.freed[:n-1]
		x.nodes[i] = node{sum: first}
	} else {
		i = id(len(x.nodes))
		x.nodes = append(x.nodes, node{sum: first})
	}
	x.ids[first] = i
	if dgst.Algorithm() == digest.SHA512 {
		x.long[i] = second
	}
	return i
}

func (x *index) find(dgst digest.Digest) (id, bool) {
	if dgst == "" {
		return none, false
	}
	first, _ := sumOf(dgst)
	i, ok := x.ids[first]
	return i, ok
}

func (x *index) digest(i id) digest.Digest {
	first := x.nodes[i].sum
	if second, ok := x.long[i]; ok {
		return digest.NewDigestFromEncoded(digest.SHA512, hex.EncodeToString(first[:])+hex.EncodeToString(second[:]))
	}
	return digest.NewDigestFromEncoded(digest.SHA256, hex.EncodeToString(first[:]))
}

func (x *index) repo(repo oci.Repository) repoID {
	r, ok := x.repoIDs[repo]
	if !ok {
		r = repoID(len(x.repos))
		x.repos = append(x.repos, repo)
		x.repoIDs[repo] = r
	}
	return r
}

// forget drops a node that nothing tells of any more.
func (x *index) forget(i id) {
	if x.nodes[i].bytes > 0 || x.nodes[i].needed > 0 || x.manifests[i] != nil {
		return
	}
	delete(x.ids, x.nodes[i].sum)
	delete(x.long, i)
	delete(x.private, i)
	x.order.Remove(i)
	x.nodes[i] = node{}
	x.freed = append(x.freed, i)
}

// rank gives a node its place in the order, if it is one that goes by itself, or takes it away.
func (x *index) rank(i id) {
	if !x.built {
		return
	}
	if n := &x.nodes[i]; n.bytes == 0 || n.needed > 0 {
		x.order.Remove(i)
	} else if !x.order.Contains(i) {
		x.order.Add(i, struct{}{})
	}
}

// Stored notes content that has its name, and takes so many bytes of the disk.
func (x *index) Stored(dgst digest.Digest, bytes int64) {
	x.mu.Lock()
	defer x.mu.Unlock()
	i := x.at(dgst)
	x.used += bytes + recordSpace - x.nodes[i].bytes
	x.nodes[i].bytes = bytes + recordSpace
	x.rank(i)
}

// Private notes that a repository has a record of private content.
func (x *index) Private(repo oci.Repository, dgst digest.Digest) {
	x.mu.Lock()
	defer x.mu.Unlock()
	i, r := x.at(dgst), x.repo(repo)
	if !slices.Contains(x.private[i], r) {
		x.private[i] = append(x.private[i], r)
	}
}

// Manifest notes a stored manifest that a repository has a record of. Zero pulled is now.
func (x *index) Manifest(repo oci.Repository, m oci.Manifest, pulled time.Time) {
	x.mu.Lock()
	defer x.mu.Unlock()
	i, r := x.at(m.Digest), x.repo(repo)
	if pulled.IsZero() {
		pulled = time.Now()
	}
	known := x.manifests[i]
	if known == nil || known.needs == nil {
		if known == nil {
			known = &manifest{}
			x.manifests[i] = known
		}
		known.index, known.mediaType, known.size = m.IsIndex(), m.MediaType, int64(len(m.Raw))
		for _, desc := range slices.Concat(m.Manifests, m.Blobs) {
			if need := x.at(desc.Digest); need != i && !slices.Contains(known.needs, need) {
				known.needs = append(known.needs, need)
				x.need(need, +1)
			}
		}
	}
	if m.Subject != nil {
		known.subject, _ = sumOf(m.Subject.Digest)
		x.refer(known.subject, i)
	}
	if !slices.Contains(known.repos, r) {
		known.repos = append(known.repos, r)
	}
	known.pulled = max(known.pulled, pulled.UnixNano())
	x.rank(i)
	if x.built && x.order.Contains(i) {
		x.order.Add(i, struct{}{})
	}
}

func (x *index) need(i id, by int32) {
	x.nodes[i].needed += by
	x.rank(i)
}

// refer makes one manifest go with another. If that is not stored, or needs it anyway, it goes by itself.
func (x *index) refer(to sum, referrer id) {
	subject, ok := x.ids[to]
	of := x.manifests[subject]
	if !ok || of == nil || slices.Contains(of.referrers, referrer) || x.reaches(subject, referrer) || x.reaches(referrer, subject) {
		return
	}
	of.referrers = append(of.referrers, referrer)
	x.need(referrer, +1)
}

// reaches reports whether one manifest leads to another.
func (x *index) reaches(from, to id) bool {
	m := x.manifests[from]
	if from == to || m == nil {
		return from == to
	}
	return slices.ContainsFunc(m.needs, func(i id) bool { return x.reaches(i, to) }) ||
		slices.ContainsFunc(m.referrers, func(i id) bool { return x.reaches(i, to) })
}

// Tagged notes what a tag's record names, and reports whether all of that is stored.
func (x *index) Tagged(key tagKey, t Tag) bool {
	x.mu.Lock()
	defer x.mu.Unlock()
	x.untag(key)
	now := tagged{none, none}
	stored := true
	for _, v := range []struct {
		dgst digest.Digest
		to   *id
	}{{t.Current.Digest, &now.current}, {t.LastComplete.Digest, &now.lastComplete}} {
		if v.dgst == "" {
			continue
		}
		i, ok := x.find(v.dgst)
		if !ok || x.nodes[i].bytes == 0 {
			stored = false
			continue
		}
		*v.to = i
		m := x.manifests[i]
		if m == nil { // its own record is read later
			m = &manifest{}
			x.manifests[i] = m
		}
		if !slices.Contains(m.tags, key) {
			m.tags = append(m.tags, key)
		}
	}
	if now != (tagged{none, none}) {
		x.tags[key] = now
	}
	if subject, ok := oci.SubjectOf(key.tag); ok && now.current != none {
		first, _ := sumOf(subject)
		x.refer(first, now.current)
	}
	return stored || !x.built
}

// untag forgets what a tag names.
func (x *index) untag(key tagKey) {
	was, ok := x.tags[key]
	if !ok {
		return
	}
	delete(x.tags, key)
	for _, i := range []id{was.current, was.lastComplete} {
		if m := x.manifests[i]; m != nil {
			m.tags = slices.DeleteFunc(m.tags, func(k tagKey) bool { return k == key })
		}
	}
}

// Pulled makes images the last to go.
func (x *index) Pulled(pulls map[manifestKey]time.Time) {
	keys := slices.SortedFunc(maps.Keys(pulls), func(a, b manifestKey) int { return pulls[a].Compare(pulls[b]) })
	x.mu.Lock()
	defer x.mu.Unlock()
	for _, key := range keys {
		i, ok := x.find(key.dgst)
		if m := x.manifests[i]; ok && m != nil && m.pulled <= pulls[key].UnixNano() {
			m.pulled = pulls[key].UnixNano()
			if x.order.Contains(i) {
				x.order.Add(i, struct{}{})
			}
		}
	}
}

// Gone notes that content is not there any more, though nobody has evicted it.
func (x *index) Gone(dgst digest.Digest) {
	x.mu.Lock()
	defer x.mu.Unlock()
	if i, ok := x.find(dgst); ok && x.nodes[i].bytes > 0 {
		x.vanish(i)
		x.forget(i)
	}
}

// vanish takes a node's space away, at once or when the last reader closes it, and returns what was at once.
func (x *index) vanish(i id) (free int64) {
	n := &x.nodes[i]
	if n.open != nil {
		n.open.unlinked, n.open = n.bytes, nil
	} else {
		free = n.bytes
		x.used -= free
	}
	n.bytes = 0
	x.order.Remove(i)
	return free
}

// Open counts a reader of stored content; it calls Close on what is returned.
func (x *index) Open(dgst digest.Digest) *handle {
	x.mu.Lock()
	defer x.mu.Unlock()
	i, ok := x.find(dgst)
	if !ok || x.nodes[i].bytes == 0 {
		return nil
	}
	if x.nodes[i].open == nil {
		x.nodes[i].open = &handle{}
	}
	x.nodes[i].open.readers++
	return x.nodes[i].open
}

// Close ends what Open began.
func (x *index) Close(dgst digest.Digest, o *handle) {
	if o == nil {
		return
	}
	x.mu.Lock()
	defer x.mu.Unlock()
	if o.readers--; o.readers > 0 {
		return
	}
	x.used -= o.unlinked
	if i, ok := x.find(dgst); ok && x.nodes[i].open == o {
		x.nodes[i].open = nil
	}
}

// complete reports whether a stored image has all of its blobs, an index at least one image and all
// blobs of those that it has.
func (x *index) complete(i id) bool {
	m := x.manifests[i]
	if m == nil || x.nodes[i].bytes == 0 {
		return false
	}
	some := !m.index
	for _, need := range m.needs {
		stored := x.nodes[need].bytes > 0
		if !stored && m.index {
			continue // a platform that nobody has asked for
		}
		if !stored || x.manifests[need] != nil && !x.complete(need) {
			return false
		}
		some = true
	}
	return some
}

// Complete is complete for a digest. ok is false while the index is not built.
func (x *index) Complete(dgst digest.Digest) (complete, ok bool) {
	x.mu.Lock()
	defer x.mu.Unlock()
	i, known := x.find(dgst)
	return known && x.complete(i), x.built
}

// named is a tag, and what it names.
type named struct {
	key       tagKey
	dgst      digest.Digest
	mediaType string
	size      int64
}

// Named calls do for each tag whose image is stored, in no order, and without the lock.
func (x *index) Named(do func(named) error) error {
	const atATime = 512
	x.mu.Lock()
	all := slices.Collect(maps.Keys(x.tags))
	x.mu.Unlock()
	for keys := range slices.Chunk(all, atATime) {
		some := make([]named, 0, len(keys))
		x.mu.Lock()
		for _, key := range keys {
			t, ok := x.tags[key]
			if m := x.manifests[t.current]; ok && m != nil && m.size > 0 {
				some = append(some, named{key, x.digest(t.current), m.mediaType, m.size})
			}
		}
		x.mu.Unlock()
		for _, n := range some {
			if err := do(n); err != nil {
				return err
			}
		}
	}
	return nil
}

// Built reports whether all that is on the disk has been noted.
func (x *index) Built() bool {
	x.mu.Lock()
	defer x.mu.Unlock()
	return x.built
}

// Finish gives everything its place once all that is on the disk has been noted.
func (x *index) Finish() {
	x.mu.Lock()
	defer x.mu.Unlock()
	for i, m := range x.manifests {
		if m.subject != (sum{}) {
			x.refer(m.subject, i)
		}
	}
	for key, t := range x.tags {
		if subject, ok := oci.SubjectOf(key.tag); ok && t.current != none {
			first, _ := sumOf(subject)
			x.refer(first, t.current)
		}
	}
	x.built = true
	type root struct {
		id     id
		pulled int64 // 0 if nobody has asked for it by an image
	}
	var roots []root
	for i, n := range x.nodes {
		if n.bytes == 0 || n.needed > 0 {
			continue
		}
		x.refresh(id(i))
		r := root{id: id(i)}
		if m := x.manifests[r.id]; m != nil {
			r.pulled = m.pulled
		}
		roots = append(roots, r)
	}
	slices.SortFunc(roots, func(a, b root) int { return cmp.Compare(a.pulled, b.pulled) })
	for _, r := range roots {
		x.order.Add(r.id, struct{}{})
	}
}
