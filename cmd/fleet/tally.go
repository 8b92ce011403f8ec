package main

import (
	"context"
	"fmt"
	"maps"
	"net/http"
	"os"
	"regexp"
	"slices"
	"strings"
	"sync"
	"text/tabwriter"
	"time"

	"breakwater/pkg/oci"
)

// shown is how many violations are printed in full; a broken promise is mostly broken often.
const shown = 20

// What the fleet may ask of a tag within a minute while all is well.
const (
	maxHeads = 2
	maxPuts  = 1
	// minute is short by what may be late of what goes on behind.
	minute = time.Minute - slack
)

// tally is what a run has counted.
type tally struct {
	mu         sync.Mutex // guards what follows
	now        *counts
	counts     []*counts // by phase
	hosts      []*host
	violations int
	refusals   map[string]int // by what was said
}

// counts are those of a phase.
type counts struct {
	phase      int
	begun      time.Time
	lasted     time.Duration
	pulls      int
	whole      int // of which all blobs were wanted and came
	requests   int
	statuses   map[int]int
	short      int
	slowest    time.Duration
	tags       []time.Duration // time to each answer to a tag
	fresh      [3]int          // answers to tags, by word
	stale      [3]int
	upstream   map[string]int // by what was asked for
	bucket     map[string]int
	busiest    float64 // requests of the host that has asked the bucket most
	before     map[*host]uint64
	failures   map[string]int // of the bucket, by what was asked for
	bucketTime time.Duration  // the longest
	tagHeads   map[string][]time.Time
	tagPuts    map[string][]time.Time
	blobGets   map[string]int
	warnings   map[string]int
	polls      []string
}

func newTally() *tally {
	t := &tally{refusals: map[string]int{}}
	t.now = newCounts(start)
	return t
}

func newCounts(phase int) *counts {
	return &counts{phase: phase, begun: time.Now(), statuses: map[int]int{}, upstream: map[string]int{}, bucket: map[string]int{},
		before: map[*host]uint64{}, failures: map[string]int{}, tagHeads: map[string][]time.Time{}, tagPuts: map[string][]time.Time{},
		blobGets: map[string]int{}, warnings: map[string]int{}}
}

// begin ends the phase before.
func (t *tally) begin(phase int) {
	t.end()
	next := newCounts(phase)
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, h := range t.hosts {
		next.before[h] = asked(h)
	}
	t.now = next
	t.counts = append(t.counts, next)
}

// end notes what is known at the end of a phase only.
func (t *tally) end() {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.now.lasted = time.Since(t.now.begun)
	for h, before := range t.now.before {
		t.now.busiest = max(t.now.busiest, float64(asked(h)-before))
	}
}

// asked is how many requests a host has made to the bucket.
func asked(h *host) uint64 {
	var sum uint64
	for _, n := range h.shared.Health().Requests {
		sum += n
	}
	return sum
}

// join has a host counted.
func (t *tally) join(h *host) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.hosts = append(t.hosts, h)
	t.now.before[h] = 0
}

func (t *tally) phase() int {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.now.phase
}

// last are the counts of the phase that has ended.
func (t *tally) last() *counts {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.now
}

func (t *tally) note(add func(*counts)) {
	t.mu.Lock()
	defer t.mu.Unlock()
	add(t.now)
}

func (t *tally) tagAsked(method, tag string) {
	if method == http.MethodHead {
		t.note(func(n *counts) { n.tagHeads[tag] = append(n.tagHeads[tag], time.Now()) })
	}
}

func (t *tally) blobAsked(method, digest string) {
	if method == http.MethodGet {
		t.note(func(n *counts) { n.blobGets[digest]++ })
	}
}

func (t *tally) tagPublished(tag string) {
	t.note(func(n *counts) { n.tagPuts[tag] = append(n.tagPuts[tag], time.Now()) })
}

// bucketAnswered notes how long it took, and what is no answer: 404, 304, 409 and 412 are ones.
func (t *tally) bucketAnswered(kind string, status int, took time.Duration) {
	t.note(func(n *counts) {
		n.bucketTime = max(n.bucketTime, took)
		if status == 0 || status >= 500 || status == http.StatusForbidden {
			n.failures[fmt.Sprintf("%s: %d", kind, status)]++
		}
	})
}

// bucketInTime reports whether no answer of the bucket has taken longer in this phase than hosts wait for it: one
// that is too slow is out, and then so is what only the bucket has.
func (t *tally) bucketInTime() bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.now.bucketTime < bucketWait
}

// answered notes an answer to a tag.
func (t *tally) answered(stale bool, said word, took time.Duration) {
	t.note(func(n *counts) {
		n.tags = append(n.tags, took)
		if stale {
			n.stale[said]++
		} else {
			n.fresh[said]++
		}
	})
}

func (t *tally) polled(tag oci.Reference, agree, of int) {
	t.note(func(n *counts) { n.polls = append(n.polls, fmt.Sprintf("%s: %d of %d", tag.Name, agree, of)) })
	if agree < of {
		t.violate("at the end of the outage %d of %d hosts name the same digest by %s", agree, of, tag)
	}
}

// reason is why something is refused, as the body says: in brackets, and since when behind that.
var reason = regexp.MustCompile(`\(([^)]*?)(, out since [^)]*)?\)`)

// refused notes what a client was told.
func (t *tally) refused(code int, kind, body string) {
	why := body
	if part := reason.FindStringSubmatch(body); part != nil {
		why = part[1]
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	t.refusals[fmt.Sprintf("%-9s  %s: %d, %s", phases[t.now.phase].name, kind, code, strings.TrimSpace(why))]++
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

// worst is the most that any tag has of within a minute, whenever that begins, and which.
func worst(at map[string][]time.Time) (most int, which string) {
	for tag, times := range at {
		slices.SortFunc(times, time.Time.Compare)
		first := 0
		for i := range times {
			for times[i].Sub(times[first]) >= minute {
				first++
			}
			if n := i - first + 1; n > most {
				most, which = n, tag
			}
		}
	}
	return most, which
}

// judge holds what the fleet has asked against what it may.
func (t *tally) judge() {
	n := t.counts[up]
	if most, tag := worst(n.tagHeads); most > maxHeads {
		t.violate("%d HEADs upstream of %s within a minute while all is well, goal %d: %s", most, tag, maxHeads, n.when(n.tagHeads[tag]))
	}
	if most, tag := worst(n.tagPuts); most > maxPuts {
		t.violate("%d publications of %s within a minute while all is well, goal %d: %s", most, tag, maxPuts, n.when(n.tagPuts[tag]))
	}
	if len(n.tagHeads) == 0 || len(n.tagPuts) == 0 || t.counts[outage].stale[agrees] == 0 {
		t.violate("nobody was asked, nothing was published, or no answer was stale: this was no run")
	}
}

// when tells at which seconds of the phase.
func (n *counts) when(times []time.Time) string {
	var seconds []string
	for _, at := range times {
		seconds = append(seconds, fmt.Sprintf("%.1f", at.Sub(n.begun).Seconds()))
	}
	return "at " + strings.Join(seconds, ", ") + " s"
}

// progress prints a line every ten seconds.
func (f *fleet) progress(ctx context.Context, started time.Time) {
	for wait(ctx, 10*time.Second) {
		f.tally.note(func(n *counts) {
			fmt.Printf("%4.0f s  %-9s %6d pulls  %5d stale  %4d refused  upstream %5d  bucket %6d  slowest %.1f s  %d MiB\n",
				time.Since(started).Seconds(), phases[n.phase].name, n.pulls, all(n.stale), n.requests-n.statuses[http.StatusOK],
				sum(n.upstream), sum(n.bucket), n.slowest.Seconds(), memory("VmRSS"))
		})
		f.upstream.registry.Forget() // ten minutes of requests are much to remember
	}
}

func all(words [3]int) int { return words[agrees] + words[ahead] + words[disagrees] }

func sum(of map[string]int) (all int) {
	for _, n := range of {
		all += n
	}
	return all
}

// memory is this process's, in MiB.
func memory(name string) (mib int) {
	status, _ := os.ReadFile("/proc/self/status") // without it, 0
	for line := range strings.Lines(string(status)) {
		if value, found := strings.CutPrefix(line, name+":"); found {
			_, _ = fmt.Sscanf(value, "%d kB", &mib)
		}
	}
	return mib / 1024
}

// print tells all that was counted, a column for each phase.
func (t *tally) print(hosts int) {
	t.mu.Lock()
	defer t.mu.Unlock()
	w := tabwriter.NewWriter(os.Stdout, 0, 0, 2, ' ', tabwriter.AlignRight)
	line := func(what string, value func(*counts) string) {
		fmt.Fprintf(w, "%-50s\t", what)
		for _, n := range t.counts {
			fmt.Fprintf(w, "%s\t", value(n))
		}
		fmt.Fprintln(w)
	}
	number := func(value func(*counts) int) func(*counts) string {
		return func(n *counts) string { return fmt.Sprint(value(n)) }
	}
	part := func(of, all int) string {
		if all == 0 {
			return "-"
		}
		return fmt.Sprintf("%.2f %%", 100*float64(of)/float64(all))
	}
	fmt.Println()
	line("", func(n *counts) string { return phases[n.phase].name })
	line("seconds", func(n *counts) string { return fmt.Sprintf("%.0f", n.lasted.Seconds()) })
	line("pulls", number(func(n *counts) int { return n.pulls }))
	line("requests to the mirrors", number(func(n *counts) int { return n.requests }))
	line("  refused", number(func(n *counts) int { return n.requests - n.statuses[http.StatusOK] }))
	line("  bodies cut", number(func(n *counts) int { return n.short }))
	line("answers to tags", number(func(n *counts) int { return len(n.tags) }))
	line("  slowest, s", func(n *counts) string { return at(n.tags, 1) })
	line("  p99, s", func(n *counts) string { return at(n.tags, 0.99) })
	line("  median, s", func(n *counts) string { return at(n.tags, 0.5) })
	for _, kind := range []struct {
		name  string
		words func(*counts) [3]int
	}{{"fresh", func(n *counts) [3]int { return n.fresh }}, {"stale", func(n *counts) [3]int { return n.stale }}} {
		line("  "+kind.name, number(func(n *counts) int { return all(kind.words(n)) }))
		line("    newer than what is published", number(func(n *counts) int { return kind.words(n)[ahead] }))
		line("    others that agree with the fleet's record", func(n *counts) string {
			words := kind.words(n)
			return part(words[agrees], words[agrees]+words[disagrees])
		})
	}
	line("upstream requests", number(func(n *counts) int { return sum(n.upstream) }))
	for _, kind := range t.kinds(func(n *counts) map[string]int { return n.upstream }) {
		line("  "+kind, number(func(n *counts) int { return n.upstream[kind] }))
	}
	line("  HEAD of a tag, per tag and minute", func(n *counts) string { return perTag(n, n.tagHeads) })
	line("    worst minute of a tag", number(func(n *counts) int { most, _ := worst(n.tagHeads); return most }))
	line("bucket requests", number(func(n *counts) int { return sum(n.bucket) }))
	line("  per host and minute", func(n *counts) string {
		return fmt.Sprintf("%.1f", float64(sum(n.bucket))/float64(len(n.before))/n.lasted.Minutes())
	})
	line("    of the busiest host", func(n *counts) string { return fmt.Sprintf("%.1f", n.busiest/n.lasted.Minutes()) })
	for _, kind := range t.kinds(func(n *counts) map[string]int { return n.bucket }) {
		line("  "+kind, number(func(n *counts) int { return n.bucket[kind] }))
	}
	line("  records published, per tag and minute", func(n *counts) string { return perTag(n, n.tagPuts) })
	line("    worst minute of a tag", number(func(n *counts) int { most, _ := worst(n.tagPuts); return most }))
	line("  slowest answer, s", func(n *counts) string { return fmt.Sprintf("%.2f", n.bucketTime.Seconds()) })
	for _, kind := range t.kinds(func(n *counts) map[string]int { return n.failures }) {
		line("  failed: "+kind, number(func(n *counts) int { return n.failures[kind] }))
	}
	for _, kind := range t.kinds(func(n *counts) map[string]int { return n.warnings }) {
		line("warnings: "+kind, number(func(n *counts) int { return n.warnings[kind] }))
	}
	_ = w.Flush()
	fmt.Printf("at the end of the outage so many of %d hosts name the same digest:\n", hosts)
	for _, n := range t.counts {
		for _, poll := range n.polls {
			fmt.Println("  " + poll)
		}
	}
	for _, what := range slices.Sorted(maps.Keys(t.refusals)) {
		fmt.Printf("refused %4d x in %s\n", t.refusals[what], what)
	}
	fmt.Printf("peak memory %d MiB, violations so far %d\n", memory("VmHWM"), t.violations)
}

// kinds are those of which there is anything in any phase.
func (t *tally) kinds(of func(*counts) map[string]int) []string {
	all := map[string]bool{}
	for _, n := range t.counts {
		for kind := range of(n) {
			all[kind] = true
		}
	}
	return slices.Sorted(maps.Keys(all))
}

// perTag is the average of those that clients pull.
func perTag(n *counts, times map[string][]time.Time) string {
	all := 0
	for _, at := range times {
		all += len(at)
	}
	return fmt.Sprintf("%.2f", float64(all)/tagCount/n.lasted.Minutes())
}

// at is the value below which that part lies, in seconds.
func at(of []time.Duration, part float64) string {
	if len(of) == 0 {
		return "-"
	}
	slices.Sort(of)
	return fmt.Sprintf("%.3f", of[int(part*float64(len(of)-1))].Seconds())
}
