package upstream

import (
	"sync/atomic"
	"time"
)

// FirstBytes is how long answers took to begin. What has not begun in time is a failure, and not here.
type FirstBytes struct {
	Count   uint64
	Seconds float64            // of all together
	Within  map[float64]uint64 // how many took at most so many seconds
}

// firstByteBounds are the steps of Within: a fast answer on a kept connection, one from far away, and
// slow ones up to what is allowed.
var firstByteBounds = [...]time.Duration{
	20 * time.Millisecond, 100 * time.Millisecond, 250 * time.Millisecond, 500 * time.Millisecond,
	time.Second, 2 * time.Second, 4 * time.Second, firstByteTimeout,
}

// latency counts how long answers of one class took to begin.
type latency struct {
	nanoseconds atomic.Int64
	steps       [len(firstByteBounds) + 1]atomic.Uint64
}

func (l *latency) observe(d time.Duration) {
	step := 0
	for step < len(firstByteBounds) && d > firstByteBounds[step] {
		step++
	}
	l.steps[step].Add(1)
	l.nanoseconds.Add(int64(d))
}

func (l *latency) firstBytes() FirstBytes {
	f := FirstBytes{Seconds: time.Duration(l.nanoseconds.Load()).Seconds(), Within: map[float64]uint64{}}
	for step := range l.steps {
		f.Count += l.steps[step].Load()
		if step < len(firstByteBounds) {
			f.Within[firstByteBounds[step].Seconds()] = f.Count
		}
	}
	return f
}
