package proxy

import (
	"context"
	"time"

	"breakwater/pkg/oci"
)

// journal has the disk tell the next process what waits to be published. Whoever changes what waits writes nothing,
// and so is not held up by a disk that hangs: one goroutine after them makes the disk agree with what waits by then,
// whatever the order of the changes was. What a process that is killed had not come to is lost; the next pull has it
// published all the same.
type journal struct {
	wake  chan struct{}
	noted map[oci.Reference]bool // what is on the disk
	stale map[oci.Reference]bool // of what the disk has to be told, and if it is to be noted or forgotten
}

func newJournal() journal {
	return journal{wake: make(chan struct{}, 1), noted: map[oci.Reference]bool{}, stale: map[oci.Reference]bool{}}
}

// readJournal takes up what the last process has left. Nothing is written to the journal yet.
func (p *publisher) readJournal() {
	err := p.m.store.Unpublished(func(ref oci.Reference) {
		p.mu.Lock()
		p.journal.noted[ref] = true
		p.mu.Unlock()
		p.addLasting(ref, nil)
	})
	if err != nil {
		p.m.logger.Warn("what an earlier process has not published is not known", "err", err)
	}
}

// compare has the journal written if it does not agree with what waits of ref. The lock is held.
func (p *publisher) compare(ref oci.Reference) {
	w := p.waiting[ref]
	noted := p.journal.noted[ref]
	wanted := w != nil && (w.lasting || noted)
	if wanted == noted {
		delete(p.journal.stale, ref)
		return
	}
	p.journal.stale[ref] = wanted
	select {
	case p.journal.wake <- struct{}{}:
	default:
	}
}

// runJournal writes the journal until ctx ends.
func (p *publisher) runJournal(ctx context.Context) {
	for ctx.Err() == nil {
		p.writeJournal()
		await(ctx, time.Hour, p.journal.wake)
	}
}

// writeJournal returns once the journal agrees with what waits. Only one goroutine at a time may call it.
func (p *publisher) writeJournal() {
	for {
		ref, wanted, ok := p.nextStale()
		if !ok {
			return
		}
		write := p.m.store.ForgetUnpublished
		if wanted {
			write = p.m.store.NoteUnpublished
		}
		if err := write(ref); err != nil { // nobody is worse off than after a kill
			p.m.logNotStored("the journal of what has to be published is not written", err, "repository", ref.Repository, "reference", ref.Identifier())
			continue
		}
		p.wrote(ref, wanted)
	}
}

func (p *publisher) nextStale() (ref oci.Reference, wanted, ok bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for ref, wanted := range p.journal.stale {
		delete(p.journal.stale, ref)
		return ref, wanted, true
	}
	return ref, false, false
}

// wrote looks again, as what waits may have changed meanwhile.
func (p *publisher) wrote(ref oci.Reference, wanted bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if wanted {
		p.journal.noted[ref] = true
	} else {
		delete(p.journal.noted, ref)
	}
	p.compare(ref)
}
