package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"slices"
	"strconv"
	"time"

	"golang.org/x/sync/errgroup"
)

// cut measures whether one download of a cold blob comes whole though the upstream breaks it off in the
// middle, once.
func (b *bench) cut(ctx context.Context, s *samples) ([]row, error) {
	const size = 16 << 20
	mirrors, err := b.install(ctx, place{})
	if err != nil {
		return nil, err
	}
	if err := b.upstream.behave(Behaviour{Fault: Cuts}); err != nil {
		return nil, err
	}
	s.rounds(1, mirrors, func(_ int, m *mirror) error {
		whole := 0
		for range attempts {
			img, err := b.publish(size)
			if err != nil {
				return err
			}
			c, err := dial(ctx, m.Listen)
			if err != nil {
				return err
			}
			if _, err := c.getBlob(img.Blobs[1]); err == nil {
				whole++
			}
			c.Close()
		}
		s.add("whole", m, float64(whole))
		return nil
	})
	return []row{s.row("whole", "upstream cuts a cold blob once: came whole", "of 20").goal(exactly, attempts)}, nil
}

// takeover measures a cold pull where the first of two upstreams accepts connections and never answers:
// the first such pull, and one when there have been enough for it to be known. The second upstream is
// the bench's, and direct is a pull from it.
func (b *bench) takeover(ctx context.Context, s *samples) ([]row, error) {
	const known, knownAfter = 3, 6 * time.Second // pulls, and what an answer that never comes is waited for
	hole, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, fmt.Errorf("listen: %w", err)
	}
	defer hole.Close()
	mirrors, err := b.install(ctx, place{Ahead: hole.Addr().String()})
	if err != nil {
		return nil, err
	}
	mirrors = slices.DeleteFunc(mirrors, func(m *mirror) bool {
		if m.name == distribution {
			s.fail(m, errors.New("knows one upstream only"))
		}
		return m.name == distribution
	})
	mirrors = append(mirrors, b.direct())
	for n := range known + 1 {
		img, err := b.publish(16<<20, 16<<20, 16<<20)
		if err != nil {
			return nil, err
		}
		if n == known {
			wait(ctx, knownAfter)
		}
		s.rounds(1, mirrors, func(_ int, m *mirror) error {
			p, err := m.pull(ctx, img)
			if err == nil {
				s.add(fmt.Sprint("first ", n), m, p.firstByte.Seconds())
				s.add(fmt.Sprint("wall ", n), m, p.wall.Seconds())
			}
			return err
		})
	}
	return []row{
		s.row("first 0", "first upstream hangs, second well: first byte", "s").goal(atMost, 2.1), // 1 s for the tag, 1 s for the blob
		s.row("wall 0", "  cold pull of 48 MiB", "s"),
		s.row(fmt.Sprint("first ", known), "  once it is known: first byte", "s"),
		s.row(fmt.Sprint("wall ", known), "  once it is known: cold pull", "s"),
	}, nil
}

// comeback measures how long after the end of an outage an image is pulled that nobody has pulled before.
func (b *bench) comeback(ctx context.Context, s *samples) ([]row, error) {
	const probing = 5 // seconds that breakwater may take beyond its hold-off
	known, err := b.publish(1 << 20)
	if err != nil {
		return nil, err
	}
	img, err := b.publish(1 << 20)
	if err != nil {
		return nil, err
	}
	mirrors, err := b.install(ctx, place{})
	if err != nil {
		return nil, err
	}
	mirrors = s.warm(ctx, mirrors, known)
	if err := b.upstream.behave(Behaviour{Fault: Refuses}); err != nil {
		return nil, err
	}
	holdOff := 0.0
	for _, m := range mirrors {
		left, err := m.despair(ctx)
		if err != nil {
			return nil, err
		}
		if m.name == breakwater {
			holdOff = left
		}
		s.add("left", m, left)
	}
	if err := b.upstream.behave(Behaviour{}); err != nil {
		return nil, err
	}
	back := time.Now()
	took := make([]time.Duration, len(mirrors))
	var group errgroup.Group
	for i, m := range mirrors {
		group.Go(func() error {
			for {
				if _, err := m.pull(ctx, img); err == nil {
					took[i] = time.Since(back)
					return nil
				}
				if time.Since(back) > startTime || !wait(ctx, 20*time.Millisecond) {
					return fmt.Errorf("%s: not pulled %s after the outage", m.name, startTime)
				}
			}
		})
	}
	if err := group.Wait(); err != nil {
		return nil, err
	}
	for i, m := range mirrors {
		s.add("took", m, took[i].Seconds())
	}
	return []row{
		s.row("took", "upstream is back: an image never seen pulled after", "s").goal(atMost, holdOff+probing),
		s.row("left", "  hold-off, as its Retry-After says", "s"),
	}, nil
}

// despair asks for images that are not stored, until the program has given up on the upstream if it ever
// does, and returns for how many seconds it says that it will not ask again.
func (m *mirror) despair(ctx context.Context) (float64, error) {
	left := 0.0
	for i := range 2 * inVain {
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, fmt.Sprintf("http://%s/v2/%s/manifests/never-seen-%d", m.Listen, repository, i), nil)
		if err != nil {
			return 0, err
		}
		resp, err := http.DefaultClient.Do(req)
		if err != nil {
			return 0, err
		}
		resp.Body.Close()
		if resp.StatusCode == http.StatusOK {
			return 0, fmt.Errorf("%s answers what nobody has", m.name)
		}
		left, _ = strconv.ParseFloat(resp.Header.Get("Retry-After"), 64) // 0 without
	}
	return left, nil
}
