// Fleet lets hundreds of mirrors that share a bucket pull from one upstream while that is well, slow and
// half failing, dead, and well again. It counts what they ask the upstream and the bucket, checks every
// answer as it comes, and prints by phase how much they asked and whether they agreed. The mirrors are in
// this process, each with a disk of its own; the bucket is versitygw, a real S3 server. Then it starts
// hosts on an image that nobody has. It exits with 1 if anything did not hold.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"

	"breakwater/pkg/buckettest"
	"breakwater/pkg/config"
)

// registryName is what clients ask for.
const registryName = "registry.example"

// memoryFolder is where Linux has files in memory.
const memoryFolder = "/dev/shm"

// freshFor is how long a tag needs no question.
const freshFor = time.Minute

// The phases, in order, and how long each is at -scale 1.
const (
	start = iota
	up
	brownOut
	outage
	recovery
	coldStart // lasts as long as it takes
)

var phases = [...]struct {
	name   string
	length time.Duration
}{
	{"start", time.Minute},
	{"up", 3 * time.Minute},
	{"brown-out", 90 * time.Second},
	{"outage", 2 * time.Minute},
	{"recovery", 90 * time.Second},
	{"cold start", 0},
}

func main() {
	var f fleet
	flag.IntVar(&f.size, "hosts", 200, "mirrors; a tenth as many are new in the outage")
	flag.Float64Var(&f.scale, "scale", 1, "makes the phases longer or shorter: 0.1 is a quick look")
	flag.DurationVar(&f.pause, "pause", 4*time.Second, "of a host between two pulls, on average")
	flag.StringVar(&f.only, "only", "", "only the `part` of it: phases or cold")
	flag.StringVar(&f.logFile, "log", "", "write what the mirrors log to this `file`")
	flag.Uint64Var(&f.seed, "seed", rand.Uint64N(1e6), "repeats the content, the faults and the clients of a run, if not their timing")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	err := f.run(ctx)
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "fleet:", err)
		os.Exit(1)
	}
}

// fleet is one run.
type fleet struct {
	size    int
	scale   float64
	pause   time.Duration
	only    string
	logFile string
	seed    uint64

	dir      string         // all that is written
	disks    string         // of the hosts and the bucket
	cfg      *config.Config // all mirrors'
	log      *logger
	tally    *tally
	library  *library
	upstream *upstream
	bucket   *bucket
	hosts    []*host
}

func (f *fleet) run(ctx context.Context) (err error) {
	if f.size < 1 || f.scale <= 0 || f.pause <= 0 {
		return errors.New("-hosts must be at least 1, -scale and -pause more than 0")
	}
	for name, value := range buckettest.Environment() { // where the SDK looks for credentials
		if err := os.Setenv(name, value); err != nil {
			return err
		}
	}
	if f.dir, err = os.MkdirTemp("", "breakwater-fleet-"); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(f.dir)) }()
	// Each host has a disk of its own, as the bucket has; this machine has one, which cannot sync for all.
	if f.disks, err = os.MkdirTemp(memoryFolder, "breakwater-fleet-"); err != nil {
		f.disks = f.dir
	}
	defer func() { err = errors.Join(err, os.RemoveAll(f.disks)) }()
	f.tally, f.library = newTally(), newLibrary(f.seed)
	if f.log, err = newLogger(f.logFile, f.tally); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.log.close()) }()
	if f.upstream, err = newUpstream(f.seed, f.library, f.tally); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.upstream.close()) }()
	if f.bucket, err = newBucket(f.disks, f.library, f.tally); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.bucket.close()) }()
	if f.cfg, err = f.config(); err != nil {
		return err
	}
	if f.bucket.observer, err = f.bucket.open(f.cfg, f.bucket.gateway.URL); err != nil {
		return err
	}
	if f.only != "cold" {
		fmt.Printf("seed %d: %d hosts, %d tags, fresh_for %s, a pull each %s, upstream %s away\n", f.seed, f.size, len(f.library.tags), freshFor, f.pause, latency)
		if err := f.storm(ctx); err != nil {
			return err
		}
		f.tally.print(len(f.hosts))
		f.tally.judge()
	}
	for _, over := range []time.Duration{time.Minute, time.Second} {
		if f.only == "phases" {
			break
		}
		if err := f.cold(ctx, over); err != nil {
			return err
		}
	}
	return f.tally.verdict()
}

// config is the mirrors' configuration.
func (f *fleet) config() (*config.Config, error) {
	keyFile, file := filepath.Join(f.dir, "fleet.key"), filepath.Join(f.dir, "config.yaml")
	yaml := fmt.Sprintf(`default_registry: %s
tags: {fresh_for: %s}
registries:
  %[1]s:
    upstreams: [{url: %[3]q}]
shared:
  s3: {bucket: %[4]s, endpoint: %[5]q, path_style: true}
  key_file: %[6]s
`, registryName, freshFor, f.upstream.url, buckettest.Name, f.bucket.url, keyFile)
	for name, text := range map[string]string{keyFile: strings.Repeat("5", 64) + "\n", file: yaml} {
		if err := os.WriteFile(name, []byte(text), 0o600); err != nil {
			return nil, err
		}
	}
	return config.Load(file, nil, nil)
}

// storm are the phases, with clients that pull all the time, and the tag that moves while all is well.
func (f *fleet) storm(ctx context.Context) (err error) {
	started := time.Now()
	defer func() { err = errors.Join(err, f.disband()) }()
	stormy, cancel := context.WithCancel(ctx)
	defer cancel()
	var clients sync.WaitGroup
	defer clients.Wait()
	defer cancel() // before it waits
	join := func(n int, over time.Duration) error {
		for range n {
			h, err := f.muster()
			if err != nil {
				return err
			}
			clients.Go(func() { h.live(stormy, f.pause) })
			if !wait(ctx, over/time.Duration(n)) {
				break
			}
		}
		return nil
	}
	clients.Go(func() { f.progress(stormy, started) })
	for i := range coldStart {
		f.tally.begin(i)
		if err := f.upstream.become(i); err != nil {
			return err
		}
		length := time.Duration(f.scale * float64(phases[i].length))
		switch i {
		case start:
			if err := join(f.size, length); err != nil {
				return err
			}
		case up:
			f.library.move(ctx, f.upstream, length)
		case outage:
			wait(ctx, length/4)
			if err := join(max(1, f.size/10), length/4); err != nil {
				return err
			}
			if err := f.upstream.hang(); err != nil {
				return err
			}
			wait(ctx, length/2)
			f.poll(ctx)
		default:
			wait(ctx, length)
		}
		if ctx.Err() != nil {
			return ctx.Err()
		}
	}
	f.tally.end()
	return nil
}

// muster starts one host more.
func (f *fleet) muster() (*host, error) {
	h, err := f.host(len(f.hosts))
	if err != nil {
		return nil, err
	}
	f.hosts = append(f.hosts, h)
	f.tally.join(h)
	return h, nil
}

// disband ends all hosts, and removes what they have stored.
func (f *fleet) disband() error {
	var err error
	for _, h := range f.hosts {
		err = errors.Join(err, h.close())
	}
	return err
}

// poll asks every host at once for every tag, and tells what part of them name the same digest.
func (f *fleet) poll(ctx context.Context) {
	var asking sync.WaitGroup
	turns := make(chan struct{}, 64) // this machine is not two hundred
	for _, tag := range f.library.tags {
		var mu sync.Mutex
		named := map[string]int{}
		for _, h := range f.hosts {
			turns <- struct{}{}
			asking.Go(func() {
				defer func() { <-turns }()
				said := h.tag(ctx, tag)
				mu.Lock()
				defer mu.Unlock()
				named[said]++
			})
		}
		asking.Wait()
		most := 0
		for digest, n := range named {
			if digest != "" {
				most = max(most, n)
			}
		}
		f.tally.polled(tag, most, len(f.hosts))
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
