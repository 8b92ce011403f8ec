package main

import (
	"bytes"
	"context"
	"fmt"
	"net/http"
	"slices"
	"syscall"
	"time"
)

// attempts is how often a stored tag is asked for in an outage, one request after the other.
const attempts = 20

// enough is when a client in an outage gives up; after so many in vain, nobody tries again.
const (
	enough = 3 * time.Second
	inVain = 3
)

// outage is how a program has answered in one.
type outage struct {
	answered int
	first    time.Duration // until the first request was over, answered or not
	median   time.Duration // of those answered
}

// endure asks for a stored tag as often as attempts says, each time on a new connection.
func (m *mirror) endure(ctx context.Context, img Image) outage {
	var o outage
	var took []time.Duration
	for i := range attempts {
		start := time.Now()
		if m.has(ctx, img) {
			took = append(took, time.Since(start))
		}
		if i == 0 {
			o.first = time.Since(start)
		}
		if i+1 == inVain && len(took) == 0 {
			break
		}
	}
	if o.answered = len(took); o.answered > 0 {
		slices.Sort(took)
		o.median = took[len(took)/2]
	}
	return o
}

// has reports whether the program answers the image's tag, rightly and before a client gives up.
func (m *mirror) has(ctx context.Context, img Image) bool {
	ctx, cancel := context.WithTimeout(ctx, enough)
	defer cancel()
	var manifest bytes.Buffer
	c, err := dial(ctx, m.Listen)
	if err != nil {
		return false
	}
	defer c.Close()
	c.patience = enough
	err = c.get(request(http.MethodGet, "manifests/"+img.Tag), int64(len(img.Manifest)), &manifest)
	return err == nil && bytes.Equal(manifest.Bytes(), img.Manifest)
}

// endured starts the programs with tags that are never fresh, warms them with one image, and asks
// for its tag while the upstream has a fault.
func (b *bench) endured(ctx context.Context, s *samples, fault Fault) ([]*mirror, error) {
	img, err := b.publish(1 << 20)
	if err != nil {
		return nil, err
	}
	mirrors, err := b.install(ctx, place{})
	if err != nil {
		return nil, err
	}
	mirrors = s.warm(ctx, mirrors, img)
	if err := b.upstream.behave(Behaviour{Fault: fault}); err != nil {
		return nil, err
	}
	s.rounds(1, mirrors, func(_ int, m *mirror) error {
		o := m.endure(ctx, img)
		s.add("answered", m, float64(o.answered))
		if o.answered > 0 {
			s.add("first", m, milliseconds(o.first))
			s.add("median", m, milliseconds(o.median))
		}
		return nil
	})
	return mirrors, nil
}

func (b *bench) hangs(ctx context.Context, s *samples) ([]row, error) {
	_, err := b.endured(ctx, s, Hangs)
	return []row{
		s.row("answered", "upstream hangs: stored tag answered", "of 20").goal(exactly, attempts),
		s.row("first", "  first", "ms").goal(atMost, 1600),
		s.row("median", "  median", "ms").goal(atMost, 5),
	}, err
}

func (b *bench) throttles(ctx context.Context, s *samples) ([]row, error) {
	_, err := b.endured(ctx, s, Throttles)
	return []row{
		s.row("answered", "upstream answers 429: stored tag answered", "of 20").goal(exactly, attempts),
		s.row("median", "  median", "ms"),
	}, err
}

func (b *bench) refuses(ctx context.Context, s *samples) ([]row, error) {
	mirrors, err := b.endured(ctx, s, Refuses)
	if err != nil {
		return nil, err
	}
	s.rounds(1, mirrors, func(_ int, m *mirror) error {
		c, err := dial(ctx, m.Listen)
		if err != nil {
			return err
		}
		defer c.Close()
		a, err := c.ask(request(http.MethodGet, "manifests/never-seen"))
		if err == nil {
			s.add("status", m, float64(a.status))
		}
		return err
	})
	return []row{
		s.row("answered", "upstream refuses: stored tag answered", "of 20").goal(exactly, attempts),
		s.row("median", "  median", "ms").goal(atMost, 50),
		s.row("status", "  a tag never seen", unitStatus).goal(exactly, 503),
	}, nil
}

// restart measures how soon a program that was killed in an outage serves a stored tag again.
func (b *bench) restart(ctx context.Context, s *samples) ([]row, error) {
	img, err := b.publish(1 << 20)
	if err != nil {
		return nil, err
	}
	mirrors, err := b.install(ctx, place{})
	if err != nil {
		return nil, err
	}
	mirrors = s.warm(ctx, mirrors, img)
	if err := b.upstream.behave(Behaviour{Fault: Refuses}); err != nil {
		return nil, err
	}
	s.rounds(b.n, mirrors, func(_ int, m *mirror) error {
		how := syscall.SIGKILL
		if m.name == nginx {
			how = syscall.SIGTERM // its workers would outlive a killed master
		}
		if err := m.stop(how); err != nil {
			return err
		}
		start := time.Now()
		if err := m.start(ctx); err != nil {
			return err
		}
		for !m.has(ctx, img) {
			if time.Since(start) > startTime || !wait(ctx, time.Millisecond) {
				return fmt.Errorf("tag not served %s after a restart", startTime)
			}
		}
		s.add("serves", m, milliseconds(time.Since(start)))
		return nil
	})
	return []row{s.row("serves", "restart while upstream refuses: stored tag", "ms").goal(atMost, 1000)}, nil
}
