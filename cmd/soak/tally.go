package main

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"slices"
	"strings"
	"sync"
	"time"
)

// shown is how many violations are printed in full; a broken promise is mostly broken often.
const shown = 20

// tally is what a run has counted.
type tally struct {
	stored        sync.Map // of query.key: breakwater has said that it has it
	recovered     time.Duration
	before, after vitals
	started       time.Time

	mu         sync.Mutex // guards what follows
	n          counts
	violations int
}

// counts are the clients', but for the breakers that opened.
type counts struct {
	pulls, whole    int
	requests, stale int
	statuses        map[int]int
	bytes           int64
	headers         []time.Duration // time to each
	short           int             // bodies that ended before their end
	wrongParts      int             // of blobs that turned out wrong, passed on before
	hungUp          int
	retries, ranges int
	opened          map[string]int // by class
	resumes         int            // breakwater's
}

func newTally() *tally {
	return &tally{started: time.Now(), n: counts{statuses: map[int]int{}, opened: map[string]int{}}}
}

func (t *tally) note(add func(*counts)) {
	t.mu.Lock()
	defer t.mu.Unlock()
	add(&t.n)
}

// violate notes that a promise was broken.
func (t *tally) violate(format string, args ...any) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.violations++; t.violations <= shown {
		fmt.Printf("VIOLATION at %s: %s\n", time.Now().Format("15:04:05.000"), fmt.Sprintf(format, args...))
	}
}

func (t *tally) verdict() error {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.violations > 0 {
		return fmt.Errorf("%d violations", t.violations)
	}
	return nil
}

// What may be there at the end that was not at the start: the runtime's own comings and goings, and on
// the heap what breakwater knows of the images that it has met since.
const (
	moreGoroutines = 3
	moreFiles      = 3
	moreLive       = 16.0 // MiB
)

func (t *tally) compare() {
	before, after := t.before, t.after
	if after.goroutines > before.goroutines+moreGoroutines {
		t.violate("%d goroutines at rest, %d before", after.goroutines, before.goroutines)
	}
	if after.files > before.files+moreFiles {
		t.violate("%d open files at rest, %d before", after.files, before.files)
	}
	if after.live > before.live+moreLive {
		t.violate("%.1f MiB live at rest, %.1f before", after.live, before.live)
	}
}

// progress prints a line every ten seconds.
func (s *soak) progress(ctx context.Context) error {
	for started := time.Now(); wait(ctx, 10*time.Second); {
		v, err := s.mirror.vitals()
		if err != nil {
			return errors.Join(err, errors.New("breakwater does not tell how it is"))
		}
		weather := make([]string, upstreamCount)
		for i, u := range s.upstreams {
			weather[i] = u.present()
		}
		s.tally.note(func(n *counts) {
			fmt.Printf("%4.0f s  %-28s %6d requests  %5d stale  %5d x 503  %4d x 404  %3d short  worst %.2f s  %3.0f MiB  %d goroutines  %d files\n",
				time.Since(started).Seconds(), strings.Join(weather, " "), n.requests, n.stale, n.statuses[http.StatusServiceUnavailable], n.statuses[http.StatusNotFound], n.short,
				slices.Max(append(n.headers, 0)).Seconds(), v.rss, v.goroutines, v.files)
		})
	}
	return nil
}

// print tells all that was counted.
func (s *soak) print() {
	t, n := s.tally, &s.tally.n
	t.mu.Lock()
	defer t.mu.Unlock()
	slices.Sort(n.headers)
	line := func(what, format string, args ...any) { fmt.Printf("%-26s %s\n", what, fmt.Sprintf(format, args...)) }
	fmt.Println()
	line("pulls", "%d, %d of them whole", n.pulls, n.whole)
	line("requests", "%d, of them", n.requests)
	for _, status := range slices.Sorted(maps.Keys(n.statuses)) {
		what := fmt.Sprintf("  %d", status)
		if status == http.StatusNotFound {
			what += ", blobs as Docker asks" // any other one is a violation
		}
		line(what, "%d", n.statuses[status])
	}
	line("  stale", "%d", n.stale)
	line("bodies", "%d MiB; %d ended short, %d were left by their client", n.bytes>>20, n.short, n.hungUp)
	line("parts passed on wrong", "%d, of blobs that were not called complete", n.wrongParts)
	line("clients tried again", "%d after a refusal, %d from where a body ended", n.retries, n.ranges)
	requests := map[string]int{}
	for _, u := range s.upstreams {
		for weather, n := range u.requests() {
			requests[weather] += n
		}
	}
	for _, weather := range slices.Sorted(maps.Keys(requests)) {
		line("upstream requests, "+weather, "%d", requests[weather])
	}
	line("breakers opened", "token %d, manifest %d, blob %d", n.opened["token"], n.opened["manifest"], n.opened["blob"])
	line("downloads resumed", "%d", n.resumes)
	line("time to header", "worst %s, p99 %s, median %s", at(n.headers, 1), at(n.headers, 0.99), at(n.headers, 0.5))
	line("recovered after", "%s", t.recovered.Round(100*time.Millisecond))
	line("peak memory", "%.0f MiB, with the race detector's", t.after.peak)
	line("at rest, before and after", "goroutines %d, %d; files %d, %d; live heap %.1f, %.1f MiB; RSS %.0f, %.0f MiB",
		t.before.goroutines, t.after.goroutines, t.before.files, t.after.files, t.before.live, t.after.live, t.before.rss, t.after.rss)
	line("violations", "%d", t.violations)
	line("took", "%s", time.Since(t.started).Round(time.Second))
}

// at is the value below which that part of the sorted lies.
func at(sorted []time.Duration, part float64) time.Duration {
	if len(sorted) == 0 {
		return 0
	}
	return sorted[int(part*float64(len(sorted)-1))].Round(100 * time.Microsecond)
}
