package main

import (
	"context"
	"fmt"
	"net/http"
	"strconv"
	"time"

	"breakwater/pkg/registrytest"
)

// outcome is what a client is to see.
type outcome string

const (
	fresh   outcome = "fresh"
	stale   outcome = "stale"
	refused outcome = "refused"
)

// step is one thing that happens, and the pull that follows.
type step struct {
	what   string
	happen func(context.Context) error // nil for nothing
	tag    string
	want   outcome
	within time.Duration
}

// story is the demo as it goes.
type story struct {
	registry *registrytest.Real
	base     string // URL of the repository at breakwater
	image    registrytest.Image
	out      time.Time     // when the registry was killed
	served   int           // pulls of the stored image since then
	longest  time.Duration // that one of them took
}

// recovery is how long breakwater may take to see that the registry is back: a hold-off of at most
// 24 s at the second failed probe, and the probe.
const recovery = 40 * time.Second

func (s *story) tell(ctx context.Context) error {
	fmt.Printf(line, "what happened", "status", "pulled", "took")
	fmt.Println()
	for _, step := range []step{
		{what: "The registry is up: the first pull", tag: tag, want: fresh, within: 5 * time.Second},
		{what: "Again: the tag is asked for, the blobs are stored", tag: tag, want: fresh, within: 2 * time.Second},
		{what: "The registry was killed two seconds ago", happen: s.kill, tag: tag, want: stale, within: 3 * time.Second},
		{what: "An image that nobody has pulled before", tag: "never-pulled", want: refused, within: 10 * time.Second},
		{what: "The registry answers 429 to everything", happen: s.throttle, tag: tag, want: stale, within: 3 * time.Second},
		{what: "The registry accepts connections and never answers", happen: s.hang, tag: tag, want: stale, within: 3 * time.Second},
		{what: "Again", tag: tag, want: stale, within: 3 * time.Second},
	} {
		if step.happen != nil {
			if err := step.happen(ctx); err != nil {
				return err
			}
		}
		p, err := pullImage(ctx, s.base, step.tag)
		if err != nil {
			return fmt.Errorf("%s: %w", step.what, err)
		}
		show(step.what, p)
		if err := s.check(step, p); err != nil {
			return fmt.Errorf("%s: %w", step.what, err)
		}
	}
	outage := time.Since(s.out)
	back, err := s.comeBack(ctx)
	if err != nil {
		return err
	}
	fmt.Printf("In an outage of %s all %d pulls of the stored image worked, the slowest in %s, each marked stale; "+
		"the new image was served %s after it.\n", short(outage), s.served, short(s.longest), short(back))
	return nil
}

func (s *story) kill(ctx context.Context) error {
	s.out = time.Now()
	if err := s.registry.Close(); err != nil {
		return err
	}
	return pause(ctx, 2*time.Second) // so that there is an age to be seen
}

func (s *story) throttle(context.Context) error {
	s.registry.Fault(registrytest.Match{}, registrytest.Status(http.StatusTooManyRequests, "Retry-After", "1"))
	return s.registry.Restart()
}

func (s *story) hang(ctx context.Context) error {
	s.registry.Heal()
	s.registry.Fault(registrytest.Match{}, registrytest.Hang())
	return pause(ctx, time.Second) // until then nobody asks: the 429 said so
}

func pause(ctx context.Context, d time.Duration) error {
	select {
	case <-time.After(d):
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// check compares a pull with what was to be seen.
func (s *story) check(want step, p pull) error {
	got, status := fresh, http.StatusOK
	switch {
	case p.status != http.StatusOK:
		got = refused
	case p.stale():
		got = stale
	}
	if want.want == refused {
		status = http.StatusServiceUnavailable
	}
	if got != want.want || p.status != status {
		return fmt.Errorf("the client saw %d, %s; it should have been %d, %s", p.status, got, status, want.want)
	}
	if p.took > want.within {
		return fmt.Errorf("it took %s; it should have been at most %s", short(p.took), want.within)
	}
	if got == refused {
		return nil
	}
	if p.digest != s.image.Digest() {
		return fmt.Errorf("the client got manifest %s, which is not the image", p.digest)
	}
	if got == stale {
		s.served++
		s.longest = max(s.longest, p.took)
	}
	return nil
}

// comeBack heals the registry, pushes a new image under the tag, and pulls until that is what a
// client gets. It returns how long that took.
func (s *story) comeBack(ctx context.Context) (time.Duration, error) {
	const what = "The registry is back, with a new image under the tag"
	s.registry.Heal()
	start := time.Now()
	image := registrytest.NewImage(registrytest.Layer(1, 8<<20), registrytest.Layer(3, 4<<20))
	if err := registrytest.Push(ctx, s.registry.URL, repository, tag, image); err != nil {
		return 0, err
	}
	for time.Since(start) < recovery {
		p, err := pullImage(ctx, s.base, tag)
		if err != nil {
			return 0, fmt.Errorf("%s: %w", what, err)
		}
		if p.digest == image.Digest() && !p.stale() {
			show(what, p)
			return time.Since(start), nil
		}
		if err := pause(ctx, 100*time.Millisecond); err != nil {
			return 0, err
		}
	}
	return 0, fmt.Errorf("%s: breakwater has not seen it after %s", what, recovery)
}

// line is one pull: what happened, and the client's view of it in three words.
const line = "%-53s %6s %9s %8s\n"

// show prints what a client saw of one pull.
func show(what string, p pull) {
	size := "-"
	if p.bytes > 0 {
		size = fmt.Sprintf("%.1f MiB", float64(p.bytes)/(1<<20))
	}
	fmt.Printf(line, what, strconv.Itoa(p.status), size, short(p.took))
	for _, name := range []string{"Cache-Status", "Age", "Warning", "Retry-After"} {
		if value := p.header.Get(name); value != "" {
			fmt.Printf("  %-13s %s\n", name+":", value)
		}
	}
	if p.body != "" {
		fmt.Printf("  %-13s %s\n", "body:", p.body)
	}
	fmt.Println()
}

// short is a duration as people say it.
func short(d time.Duration) string {
	if d < time.Second {
		return fmt.Sprintf("%d ms", d.Milliseconds())
	}
	return fmt.Sprintf("%.1f s", d.Seconds())
}
