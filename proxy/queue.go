package proxy

import (
	"container/heap"
	"context"
	"errors"
	"time"

	"breakwater/pkg/oci"
	"breakwater/storage/s3"
)

// publication is a tag, a manifest or a blob on its way to the bucket.
type publication struct {
	ref     oci.Reference
	since   time.Time
	due     time.Time
	tries   int
	leases  []*s3.Lease // to be released once it has been tried
	place   int         // in the queue; -1 if it is not in it
	again   bool        // something has changed while it was being published
	lasting bool        // it outlives the process
}

// publications are a heap by when they are due.
type publications []*publication

func (ps publications) Len() int           { return len(ps) }
func (ps publications) Less(i, j int) bool { return ps[i].due.Before(ps[j].due) }
func (ps publications) Swap(i, j int) {
	ps[i], ps[j] = ps[j], ps[i]
	ps[i].place, ps[j].place = i, j
}

// Push is for heap.
func (ps *publications) Push(p any) {
	p.(*publication).place = len(*ps)
	*ps = append(*ps, p.(*publication))
}

// Pop is for heap.
func (ps *publications) Pop() any {
	last := len(*ps) - 1
	p := (*ps)[last]
	(*ps)[last], *ps = nil, (*ps)[:last]
	p.place = -1
	return p
}

// add puts something into the queue, to be done now.
func (p *publisher) add(ref oci.Reference, lease *s3.Lease) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.enqueue(ref, lease)
}

// addLasting is add for what the next process has to do if this one does not come to it.
func (p *publisher) addLasting(ref oci.Reference, lease *s3.Lease) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.enqueue(ref, lease).lasting = true
	p.compare(ref)
}

// enqueue drops the first of a queue that is full. The lock is held.
func (p *publisher) enqueue(ref oci.Reference, lease *s3.Lease) *publication {
	now := time.Now()
	w := p.waiting[ref]
	if w == nil {
		if len(p.queue) >= maxUnpublished {
			p.leave(p.queue[0])
			p.dropped.Add(1)
		}
		w = &publication{ref: ref, since: now, place: -1}
		p.waiting[ref] = w
		w.due = now
		heap.Push(&p.queue, w)
	} else if w.place >= 0 {
		w.due = now
		heap.Fix(&p.queue, w.place)
	}
	w.again = true
	if lease != nil {
		w.leases = append(w.leases, lease)
	}
	select {
	case p.wake <- struct{}{}:
	default:
	}
	return w
}

// leave has a publication wait no more, here and in the journal. The lock is held.
func (p *publisher) leave(w *publication) {
	if w.place >= 0 {
		heap.Remove(&p.queue, w.place)
	}
	delete(p.waiting, w.ref)
	p.compare(w.ref)
	p.releaseAll(w)
}

func (p *publisher) releaseAll(w *publication) {
	for _, lease := range w.leases {
		p.release(lease)
	}
	w.leases = nil
}

// run publishes one after the other, until ctx ends.
func (p *publisher) run(ctx context.Context) {
	for ctx.Err() == nil {
		w, pause, wake := p.next()
		if w == nil {
			await(ctx, pause, wake)
			continue
		}
		err := errPanicked
		func() {
			defer func() { p.settle(w, err) }()
			err = p.write(ctx, w.ref)
		}()
	}
}

// next takes what is due out of the queue, or says how long there will be nothing, and what may change that.
func (p *publisher) next() (w *publication, pause time.Duration, wake <-chan struct{}) {
	health := p.bucket.Health()
	shut := health.Writes.Open || health.Reads.Open // each is looked at before it is written
	p.mu.Lock()
	defer p.mu.Unlock()
	if len(p.queue) == 0 {
		return nil, time.Hour, p.wake
	}
	if shut {
		for _, w := range p.queue {
			p.releaseAll(w)
		}
		return nil, gatePause, nil
	}
	if left := time.Until(p.queue[0].due); left > 0 {
		return nil, left, p.wake
	}
	w = heap.Pop(&p.queue).(*publication)
	w.again = false
	return w, 0, nil
}

func await(ctx context.Context, pause time.Duration, wake <-chan struct{}) {
	timer := time.NewTimer(pause)
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-wake:
	case <-ctx.Done():
	}
}

// settle puts what has been tried into the queue again, or has it leave.
func (p *publisher) settle(w *publication, err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	now := time.Now()
	if !errors.Is(err, errIncomplete) || now.Sub(w.since) >= publishPause {
		p.releaseAll(w) // not sooner: who asks what the tag names is told as soon as the image is complete
	}
	switch {
	case errors.Is(err, context.Canceled):
		// the next process goes on
	case err != nil && now.Sub(w.since) < publishFor:
		if !errors.Is(err, errIncomplete) {
			p.m.logger.Debug("not published yet", "repository", w.ref.Repository, "reference", w.ref.Identifier(), "err", err)
		}
		switch {
		case errors.Is(err, s3.ErrOut): // nothing is tried before it is back
			w.due = now
		case w.again && errors.Is(err, errIncomplete): // it may be complete by now
			w.due = now
		case w.again:
			w.due, w.tries = now.Add(publishPause), 0
		default:
			w.due = now.Add(min(publishPause<<min(w.tries, 10), maxPublishPause))
			w.tries++
		}
		heap.Push(&p.queue, w)
	case err == nil && w.again:
		w.due, w.tries, w.since = now, 0, now
		heap.Push(&p.queue, w)
	default:
		p.leave(w)
	}
}
