// Soak lets many clients pull through breakwater for some minutes while each of its three upstreams
// is up, down, hanging, slow, cutting, lying, failing or throttling, at random and without regard to
// the others. It checks every answer as it comes, and afterwards that breakwater has recovered and has
// kept nothing: no goroutine, file or memory. It exits with 1 if anything did not hold.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
	"os/signal"
	"syscall"
	"time"
)

// registryName is what clients ask for; bare paths mean it too.
const registryName = "registry.example"

func main() {
	var s soak
	flag.DurationVar(&s.length, "for", 5*time.Minute, "how `long` the upstreams misbehave")
	flag.IntVar(&s.clients, "clients", 64, "clients that pull at a time")
	flag.IntVar(&s.images, "images", 200, "images that there are to pull, in the end")
	flag.Uint64Var(&s.seed, "seed", rand.Uint64N(1e6), "repeats the faults and the clients of a run, if not their timing")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	err := s.run(ctx)
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "soak:", err)
		os.Exit(1)
	}
}

// soak is one run.
type soak struct {
	length          time.Duration
	clients, images int
	seed            uint64

	tally     *tally
	library   *library
	upstreams []*upstream
	mirror    *mirror
}

func (s *soak) run(ctx context.Context) (err error) {
	if s.length < time.Second || s.clients < 1 || s.images < perRepository {
		return fmt.Errorf("-for must be at least 1s, -clients 1, -images %d", perRepository)
	}
	dir, err := os.MkdirTemp("", "breakwater-soak-")
	if err != nil {
		return err
	}
	s.tally = newTally()
	defer func() {
		if err == nil {
			err = os.RemoveAll(dir)
		} else {
			fmt.Printf("the log is in %s\n", dir)
		}
	}()
	s.library = newLibrary(s.images, s.seed)
	for i := range upstreamCount {
		u, err := newUpstream(i, s.seed)
		if err != nil {
			return err
		}
		defer u.close()
		s.upstreams = append(s.upstreams, u)
	}
	if s.mirror, err = startMirror(ctx, dir, s.upstreams, s.tally); err != nil {
		return err
	}
	fmt.Printf("seed %d: %d clients, %d images, three upstreams, %s; breakwater has the race detector in it\n", s.seed, s.clients, s.images, s.length)
	err = s.phases(ctx)
	if stopped := s.mirror.stop(); err == nil && stopped != nil {
		s.tally.violate("breakwater did not stop cleanly: %v", stopped)
	}
	if err != nil {
		return err
	}
	if err := s.mirror.checkStore(); err != nil {
		s.tally.violate("the store is not sound: %v", err)
	}
	s.print()
	return s.tally.verdict()
}

// phases are the run from breakwater's start to its stop.
func (s *soak) phases(ctx context.Context) error {
	for _, img := range s.library.images[:s.library.first] {
		for _, u := range s.upstreams {
			s.library.publish(u, img)
		}
	}
	s.library.release(s.library.first)
	if err := s.reachEach(ctx, "warm-up", time.Minute); err != nil {
		return err
	}
	before, err := s.mirror.atRest(s.upstreams)
	if err != nil {
		return err
	}
	if err := s.storm(ctx); err != nil {
		return err
	}
	healed := time.Now()
	if err := s.reachEach(ctx, "recovery", recovery); err != nil {
		return err
	}
	s.tally.recovered = time.Since(healed)
	s.pullAll(ctx)
	after, err := s.mirror.atRest(s.upstreams)
	if err != nil {
		return err
	}
	s.tally.before, s.tally.after = before, after
	s.tally.compare()
	metrics, err := s.mirror.metrics()
	if err != nil {
		return err
	}
	s.tally.note(func(n *counts) { n.resumes = int(metrics["breakwater_resumes_total"]) })
	return ctx.Err()
}

// storm is the soak itself: bad weather at the upstreams, clients that pull, images that appear.
func (s *soak) storm(ctx context.Context) error {
	stormy, cancel := context.WithTimeout(ctx, s.length)
	defer cancel()
	var going tasks
	for _, u := range s.upstreams {
		going.Go(func() error { return u.weather(stormy) })
	}
	going.Go(func() error { s.library.appear(stormy, s.upstreams, s.length); return nil })
	for i := range s.clients {
		c := s.client(uint64(i))
		going.Go(func() error { c.live(stormy); return nil })
	}
	going.Go(func() error { return s.progress(stormy) })
	return errors.Join(going.Wait(), ctx.Err())
}

// recovery is how soon every breaker must have closed: a hold-off of at most 72 s, and 5 s (F37), and
// what a busy machine adds.
const recovery = 77*time.Second + slack

// reachEach has one image pulled from each upstream that no other one has, so that each of their
// breakers is tried, and waits until all of them are closed.
func (s *soak) reachEach(ctx context.Context, when string, within time.Duration) error {
	ctx, cancel := context.WithTimeout(ctx, within)
	defer cancel()
	for _, u := range s.upstreams {
		img := s.library.extra(u)
		c := s.client(uint64(s.clients + u.index))
		for !c.pull(ctx, img, img.tag) {
			if !wait(ctx, 250*time.Millisecond) {
				s.tally.violate("%s: an image that only upstream %d has could not be pulled in %s", when, u.index, within)
				break
			}
		}
		c.leave()
	}
	for {
		open, err := s.mirror.breakersOpen()
		if err != nil || open == "" {
			return err
		}
		if !wait(ctx, 250*time.Millisecond) {
			s.tally.violate("%s: not all breakers are closed after %s: %s", when, within, open)
			return nil
		}
	}
}

// pullAll pulls every image, by tag and by digest, now that the upstreams are well.
func (s *soak) pullAll(ctx context.Context) {
	c := s.client(uint64(s.clients + upstreamCount))
	c.thorough = true
	defer c.leave()
	for _, img := range s.library.images[:s.library.released] {
		for _, reference := range []string{img.tag, latest, img.Digest().String()} {
			if !c.pull(ctx, img, reference) && ctx.Err() == nil {
				s.tally.violate("with all upstreams well, %s:%s could not be pulled", img.repo, reference)
			}
		}
	}
}

// wait reports whether it has waited to the end.
func wait(ctx context.Context, d time.Duration) bool {
	select {
	case <-time.After(d):
		return true
	case <-ctx.Done():
		return false
	}
}
