package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"time"
)

// bench is one run.
type bench struct {
	dir      string // all that it writes
	profiles string // a folder, "" for none
	n        int    // rounds
	programs []program
	maker    *maker
	upstream *registry
	running  []*mirror
	figure   string // the one being measured
	places   int    // that were used
}

// figure is a measurement, and the name to ask for it by.
type figure struct {
	name    string
	measure func(*bench, context.Context, *samples) ([]row, error)
}

func figures() []figure {
	return []figure{
		{"stored-blob", (*bench).storedBlob},
		{"stored-tag", (*bench).storedByTag},
		{"stored-digest", (*bench).storedByDigest},
		{"cold", (*bench).coldPull},
		{"held", (*bench).heldPull},
		{"distant", (*bench).distantPull},
		{"shared", (*bench).sharedPull},
		{"herd", (*bench).herd},
		{"hangs", (*bench).hangs},
		{"refuses", (*bench).refuses},
		{"throttles", (*bench).throttles},
		{"restart", (*bench).restart},
		{"scale", (*bench).scale},
		{"cut", (*bench).cut},
		{"takeover", (*bench).takeover},
		{"comeback", (*bench).comeback},
	}
}

// gather finds the programs; of one of the others that is not to be had it returns a note.
func (b *bench) gather(ctx context.Context, only *regexp.Regexp) (notes []string, err error) {
	for _, p := range []struct {
		name string
		find func() (program, error)
	}{
		{breakwater, func() (program, error) { return buildBreakwater(ctx, b.dir, b.profiles) }},
		{nginx, func() (program, error) { return findNginx(ctx) }},
		{distribution, ownDistribution},
	} {
		if !only.MatchString(p.name) {
			continue
		}
		found, err := p.find()
		switch {
		case err == nil:
			b.programs = append(b.programs, found)
		case p.name == breakwater:
			return nil, err
		default:
			notes = append(notes, fmt.Sprintf("%s is missing: %v", p.name, err))
		}
	}
	return notes, nil
}

// machine describes what the absolute figures depend on.
func (b *bench) machine() map[string]string {
	facts := map[string]string{
		"cores": fmt.Sprint(runtime.NumCPU()),
		"go":    runtime.Version(),
	}
	if kernel, err := os.ReadFile("/proc/sys/kernel/osrelease"); err == nil {
		facts["kernel"] = strings.TrimSpace(string(kernel))
	}
	if load, err := os.ReadFile("/proc/loadavg"); err == nil {
		facts["load"], _, _ = strings.Cut(string(load), " ") // what others do here, for a minute past
	}
	if cpus, err := os.ReadFile("/proc/cpuinfo"); err == nil {
		_, model, _ := strings.Cut(string(cpus), "model name\t: ")
		facts["processor"], _, _ = strings.Cut(model, "\n")
	}
	for _, p := range b.programs {
		if p.version != "" {
			facts[p.name] = p.version
		}
	}
	return facts
}

// measure runs the figures that only matches and adds what they find to the report.
func (b *bench) measure(ctx context.Context, only *regexp.Regexp, found *report) (err error) {
	if b.upstream, err = startRegistry(ctx); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, b.clear(), b.upstream.close()) }()
	for _, f := range figures() {
		if !only.MatchString(f.name) {
			continue
		}
		if err := touch(); err != nil {
			return err
		}
		b.figure = f.name
		start := time.Now()
		s := newSamples()
		rows, err := f.measure(b, ctx, s)
		if err == nil {
			err = ctx.Err()
		}
		if err != nil {
			return fmt.Errorf("%s: %w", f.name, err)
		}
		fmt.Fprintf(os.Stderr, "%-13s %s\n", f.name, time.Since(start).Round(100*time.Millisecond))
		found.Rows = append(found.Rows, rows...)
		for _, note := range s.notes {
			found.Notes = append(found.Notes, f.name+": "+note)
		}
	}
	return nil
}

// publish puts a new image on the upstream.
func (b *bench) publish(layers ...int64) (Image, error) {
	img, err := b.maker.image(layers...)
	if err != nil {
		return Image{}, err
	}
	return img, b.upstream.publish(img)
}

// install ends whatever runs, heals the upstream, and starts every program with an empty store, as at
// says: the rest of it is filled in here.
func (b *bench) install(ctx context.Context, at place) ([]*mirror, error) {
	if err := b.clear(); err != nil {
		return nil, err
	}
	for _, p := range b.programs {
		b.places++
		at.Dir, at.Upstream = filepath.Join(b.dir, fmt.Sprintf("%s-%d", p.name, b.places)), b.upstream.addr
		if b.profiles != "" {
			at.Profile = filepath.Join(b.profiles, b.figure+".pprof")
		}
		m, err := p.install(ctx, at)
		if err != nil {
			return nil, err
		}
		b.running = append(b.running, m)
	}
	return slices.Clone(b.running), nil
}

// clear ends what install has started and removes what it has written.
func (b *bench) clear() error {
	err := b.upstream.behave(Behaviour{})
	for _, m := range b.running {
		err = errors.Join(err, m.stop(m.quit), os.RemoveAll(m.Dir))
	}
	b.running = nil
	return err
}

// direct is the upstream in the mirrors' place: a pull with nothing in between.
func (b *bench) direct() *mirror {
	return &mirror{program: program{name: direct}, place: place{Listen: b.upstream.addr}}
}

// touch takes memory and gives it back, so that the page cache finds pages that the machine really
// has: a virtual one pays for the first use of each, and whoever fills a new page would be charged.
func touch() error {
	const want = 2 << 30 // what one figure leaves in all stores
	meminfo, err := os.ReadFile("/proc/meminfo")
	if err != nil {
		return err
	}
	var available int
	for line := range strings.Lines(string(meminfo)) {
		_, _ = fmt.Sscanf(line, "MemAvailable: %d kB", &available) // other lines do not match
	}
	memory, err := syscall.Mmap(-1, 0, min(want, available<<10/2), syscall.PROT_READ|syscall.PROT_WRITE,
		syscall.MAP_PRIVATE|syscall.MAP_ANONYMOUS|syscall.MAP_POPULATE)
	if err != nil {
		return fmt.Errorf("take memory: %w", err)
	}
	return syscall.Munmap(memory)
}
