package storage

import (
	"maps"
	"slices"
	"time"
)

// Usage is what the store holds.
type Usage struct {
	Images   int   // that go by themselves: an index with all of its platforms is one
	Complete int   // of them; where there are many, both may be half a minute old
	Contents int   // blobs and manifests
	Bytes    int64 // allocated on the disk
	Reserved int64 // for what is on its way, or parked
	Capacity int64 // what it may take; math.MaxInt64 is no bound
	Evicted  int64 // images, since the start
	Verified int64 // bytes that were hashed to see whether the disk still has them, since the start
	Wrong    int64 // files that were quarantined, since the start
	// index.json: how often it was written since the start, how long that took in all, and how long the
	// last one has to be waited for.
	Exports                 int64
	ExportTime, ExportPause time.Duration
	Built                   bool // false soon after a start: the figures are not whole yet
}

// Usage tells what the store holds.
func (d *Disk) Usage() Usage {
	u := d.index.Usage()
	u.Evicted, u.Capacity = d.evicted.Load(), d.capacity
	u.Verified, u.Wrong = d.checks.verified.Load(), d.checks.wrong.Load()
	u.Exports, u.ExportTime, u.ExportPause = d.exporter.count.Load(), time.Duration(d.exporter.took.Load()), time.Duration(d.exporter.pause.Load())
	return u
}

// Usage is what the store holds.
func (x *index) Usage() Usage {
	images := x.count()
	x.mu.Lock()
	defer x.mu.Unlock()
	return Usage{
		Images: images.all, Complete: images.complete, Contents: len(x.nodes) - len(x.freed),
		Bytes: x.used + x.leaving, Reserved: x.reserved, Built: images.built,
	}
}

// manyManifests is how many are counted whenever somebody asks: that takes less than a millisecond.
const manyManifests = 1000

// counted is how many images there were, and what it took to count them.
type counted struct {
	all, complete int
	manifests     int  // that were looked at
	built         bool // so was the index
	at            time.Time
	took          time.Duration
}

// count counts the images that go by themselves, a few at a time: others need the lock too. Where there are
// many, that is done for no more than a hundredth of the time, however often somebody asks.
func (x *index) count() counted {
	const atATime = 512
	x.counting.Lock()
	defer x.counting.Unlock()
	x.mu.Lock()
	now := counted{manifests: len(x.manifests), built: x.built, at: time.Now()}
	if last := x.counted; last.built == now.built && last.manifests > manyManifests && now.at.Sub(last.at) < 100*last.took {
		x.mu.Unlock()
		return last
	}
	all := slices.Collect(maps.Keys(x.manifests))
	x.mu.Unlock()
	for some := range slices.Chunk(all, atATime) {
		x.mu.Lock()
		for _, i := range some {
			if x.manifests[i] == nil || x.nodes[i].needed > 0 {
				continue
			}
			if now.all++; x.complete(i) {
				now.complete++
			}
		}
		x.mu.Unlock()
	}
	now.took = time.Since(now.at)
	x.counted = now
	return now
}
