package storage

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/opencontainers/go-digest"
)

var errCut = errors.New("the upstream has broken off")

// park takes in the first bytes of a blob, and parks them.
func park(t testing.TB, d *Disk, raw []byte, written int) {
	t.Helper()
	in := begin(t, d, digest.FromBytes(raw), int64(len(raw)))
	write(t, in, raw[in.Written():written])
	in.Park(errCut)
}

// wantResumed takes up what was parked of a blob, and stores the rest.
func wantResumed(t testing.TB, d *Disk, raw []byte, from int) {
	t.Helper()
	in := begin(t, d, digest.FromBytes(raw), int64(len(raw)))
	if got := in.Written(); got != int64(from) {
		t.Fatalf("goes on from %d, want %d", got, from)
	}
	if got, want := in.Released(), int64(max(0, min(from, len(raw)-Withheld))); got != want {
		t.Errorf("%d bytes are readable, want %d", got, want)
	}
	for p := range bytesIn(raw[from:], 100_000) {
		write(t, in, p)
	}
	if err := commit(in, anonymous); err != nil {
		t.Fatal(err)
	}
	wantBlob(t, d, app, raw)
}

// parkedFiles are the paths of what is parked.
func parkedFiles(t testing.TB, d *Disk) []string {
	t.Helper()
	names, err := fs.Glob(d.root.root.FS(), "tmp/parked-*")
	if err != nil {
		t.Fatal(err)
	}
	return names
}

func TestF20ParkedIngestIsResumed(t *testing.T) {
	d := open(t, t.TempDir())
	for _, test := range []struct {
		name                   string
		size, announced, wrote int
		err                    error
		parked                 bool
	}{
		{"the least", 3 << 20, 3 << 20, worthParking, errCut, true},
		{"not worth it", 3 << 20, 3 << 20, worthParking - 1, errCut, false},
		{"into the end", 2 << 20, 2 << 20, 2<<20 - 1000, errCut, true},
		{"all of it", 2 << 20, 2 << 20, 2 << 20, errCut, true},
		{"unknown size", 3 << 20, -1, 2 << 20, errCut, false},
		{"wrong", 3 << 20, 3 << 20, 2 << 20, fmt.Errorf("verify: %w", ErrMismatch), false},
	} {
		t.Run(test.name, func(t *testing.T) {
			raw, dgst := content(test.size)
			in := begin(t, d, dgst, int64(test.announced))
			write(t, in, raw[:test.wrote])
			b, readable := reader(t, in), in.Released()
			in.Park(test.err)
			in.Park(errors.New("a second reason"))
			in.Abort(errors.New("a third reason"))
			if got, err := io.ReadAll(b); !errors.Is(err, test.err) || !bytes.Equal(got, raw[:readable]) {
				t.Errorf("the reader got %d bytes of %d, %v", len(got), readable, err)
			}
			if _, err := in.Open(t.Context()); !errors.Is(err, test.err) {
				t.Errorf("opened afterwards: %v", err)
			}
			if _, err := in.Write(raw[:1]); err == nil {
				t.Error("written afterwards")
			}
			if err := commit(in, anonymous); err == nil {
				t.Error("committed afterwards")
			}
			wantAbsent(t, d, app, dgst)
			if parked := len(parkedFiles(t, d)) > 0; parked != test.parked {
				t.Errorf("parked: %v", parked)
			}
			if test.parked {
				wantResumed(t, d, raw, test.wrote)
			} else {
				wantResumed(t, d, raw, 0)
			}
			wantEmpty(t, d, "tmp")
		})
	}
}

func TestF20ParkedAgainAndAgain(t *testing.T) {
	d := open(t, t.TempDir())
	raw, _ := content(8 << 20)
	for written := worthParking; written < len(raw); written += 700_000 {
		park(t, d, raw, written)
	}
	before := parkedFiles(t, d)
	park(t, d, raw, 8_200_000)
	if after := parkedFiles(t, d); len(after) != 1 || after[0] != before[0] {
		t.Errorf("%v, then %v", before, after)
	}
	wantResumed(t, d, raw, 8_200_000)
	wantEmpty(t, d, "tmp")
	d.parking.Lock()
	defer d.parking.Unlock()
	if len(d.parked) > 0 {
		t.Error("what was taken up is still in memory")
	}
}

func TestParkedIsOnlyForTheSame(t *testing.T) {
	d := open(t, t.TempDir())
	raw, dgst := content(3 << 20)
	park(t, d, raw, 2<<20)
	for _, size := range []int64{-1, 3<<20 - 1, 3<<20 + 1, 1000} {
		if in := begin(t, d, dgst, size); in.Written() != 0 {
			t.Errorf("resumed with size %d", size)
		}
	}
	// A registry could announce what it knows only the digest of, to be sent what is private elsewhere.
	in, err := d.Ingest(other, dgst, 3<<20)
	if err != nil || in.Written() != 0 {
		t.Errorf("resumed in another repository: %v", err)
	}
	in.Abort(errCut)
	wantResumed(t, d, raw, 2<<20)
}

func TestParkedHasOneOwner(t *testing.T) {
	d := open(t, t.TempDir())
	raw, dgst := content(3 << 20)
	park(t, d, raw, 2<<20)
	var all sync.WaitGroup
	resumed := make(chan *Ingest, 16)
	for range 16 {
		all.Go(func() {
			in, err := d.Ingest(app, dgst, int64(len(raw)))
			if err != nil {
				t.Error(err)
				return
			}
			if in.Written() > 0 {
				resumed <- in
				return
			}
			_, err = in.Write(raw[:worthParking])
			if err != nil {
				t.Error(err)
			}
			in.Park(errCut)
		})
	}
	all.Wait()
	owners := len(resumed)
	// One that was parked by another of them may have been taken up too; the same bytes never are.
	files := map[string]bool{}
	for range owners {
		in := <-resumed
		info, err := in.file.Stat()
		if err != nil || files[in.name] {
			t.Error(in.name, err)
		}
		files[in.name] = true
		if info.Size() != in.Written() {
			t.Errorf("%d bytes of %d", info.Size(), in.Written())
		}
		in.Park(errCut)
	}
	if owners == 0 {
		t.Error("nobody went on")
	}
	wantResumed(t, d, raw, 2<<20) // the longest of all is kept
	wantEmpty(t, d, "tmp")
}

func TestF63ParkedSurvivesRestart(t *testing.T) {
	for _, hashed := range []bool{true, false} {
		t.Run(fmt.Sprint("hashed behind: ", hashed), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				dir := t.TempDir()
				d := open(t, dir)
				raw, dgst := content(8<<20 + 1)
				park(t, d, raw, 7<<20)
				if err := d.Close(); err != nil {
					t.Fatal(err)
				}
				d = open(t, dir)
				synctest.Wait()
				if !hashed { // it was asked for earlier
					clear(d.parked)
				}
				in := begin(t, d, dgst, int64(len(raw)))
				if hashed != (in.hashed == 7<<20) || in.Written() != 7<<20 {
					t.Errorf("%d of %d are hashed", in.hashed, in.Written())
				}
				write(t, in, raw[7<<20:][:100_000])
				if want := int64(100_000 * catchUpRate); !hashed && in.hashed != want {
					t.Errorf("%d bytes are hashed, want %d", in.hashed, want)
				}
				in.Park(errCut)
				if err := d.Close(); err != nil {
					t.Fatal(err)
				}
				d = open(t, dir)
				wantResumed(t, d, raw, 7<<20+100_000)
				if err := d.Close(); err != nil {
					t.Fatal(err)
				}
			})
		})
	}
}

// interrupt is a context that somebody is at work in while it is asked for the first time.
type interrupt struct {
	context.Context
	work func()
}

func (i *interrupt) Err() error {
	if i.work != nil {
		i.work()
		i.work = nil
	}
	return nil
}

func TestHashOfParkedHasOneOwner(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := open(t, t.TempDir())
		synctest.Wait() // nothing else hashes any more
		raw, dgst := content(3 << 20)
		park(t, d, raw, 2<<20)
		name := filepath.Base(parkedFiles(t, d)[0])
		known := d.parked[name]
		d.rehash(t.Context())
		if d.parked[name] != known || known.hashed != 2<<20 {
			t.Error("what this process has hashed was hashed again")
		}
		clear(d.parked)
		var in *Ingest
		d.rehash(&interrupt{t.Context(), func() { in = begin(t, d, dgst, int64(len(raw))) }})
		if in.hashed == 0 || in.hashed == in.Written() {
			t.Errorf("%d of %d bytes were hashed", in.hashed, in.Written())
		}
		write(t, in, raw[in.Written():])
		if err := commit(in, anonymous); err != nil {
			t.Error(err)
		}
		if err := d.Close(); err != nil {
			t.Fatal(err)
		}
	})
}

// Whoever asks while what is parked is hashed goes on at once.
func TestParkedIsTakenUpWhileItIsHashed(t *testing.T) {
	dir := t.TempDir()
	d := open(t, dir)
	var blobs [][]byte
	for range 4 {
		raw, _ := content(8 << 20)
		park(t, d, raw, 7<<20)
		blobs = append(blobs, raw)
	}
	for round := range 5 {
		if err := d.Close(); err != nil {
			t.Fatal(err)
		}
		d = open(t, dir)
		for n, raw := range blobs {
			time.Sleep(time.Duration(rand.IntN(3000)) * time.Microsecond)
			if round < 4 {
				park(t, d, raw, 7<<20+round*1000+n)
			} else {
				wantResumed(t, d, raw, 7<<20+3000+n)
			}
		}
	}
	wantEmpty(t, d, "tmp")
}

func TestParkedExpires(t *testing.T) {
	for _, test := range []struct {
		name    string
		unused  time.Duration
		restart bool
		kept    bool
	}{
		{"within the hour", 58 * time.Minute, false, true},
		{"after it", 62 * time.Minute, false, false},
		{"restart within the hour", 58 * time.Minute, true, true},
		{"restart after it", 62 * time.Minute, true, false},
		{"a clock that was wrong", -62 * time.Minute, true, false},
	} {
		t.Run(test.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				dir := t.TempDir()
				d := open(t, dir)
				raw, _ := content(3 << 20)
				time.Sleep(30 * time.Minute)
				park(t, d, raw, 2<<20)
				if test.restart {
					if err := d.Close(); err != nil {
						t.Fatal(err)
					}
				}
				if test.unused > 0 {
					time.Sleep(test.unused)
				} else {
					at := time.Now().Add(-test.unused)
					if err := os.Chtimes(filepath.Join(dir, parkedFiles(t, mustDisk(t, dir))[0]), at, at); err != nil {
						t.Fatal(err)
					}
				}
				if test.restart {
					d = open(t, dir)
				}
				synctest.Wait()
				if kept := len(parkedFiles(t, d)) > 0; kept != test.kept || kept != (len(d.parked) > 0) {
					t.Errorf("parked: %v, in memory: %d", kept, len(d.parked))
				}
				if test.kept {
					wantResumed(t, d, raw, 2<<20)
				} else {
					wantResumed(t, d, raw, 0)
				}
				if err := d.Close(); err != nil {
					t.Fatal(err)
				}
			})
		})
	}
	t.Run("before anybody has looked", func(t *testing.T) {
		dir := t.TempDir()
		d := open(t, dir)
		raw, _ := content(3 << 20)
		park(t, d, raw, 2<<20)
		at := time.Now().Add(-2 * time.Hour)
		if err := os.Chtimes(filepath.Join(dir, parkedFiles(t, d)[0]), at, at); err != nil {
			t.Fatal(err)
		}
		wantResumed(t, d, raw, 0)
		wantEmpty(t, d, "tmp")
	})
}

// mustDisk shows a folder without taking it.
func mustDisk(t *testing.T, dir string) *Disk {
	return &Disk{root: folder{&volume{}, mustRoot(t, dir), "."}}
}

func TestParkedGivesWay(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := open(t, t.TempDir())
		blobs := make([][]byte, 3)
		for n := range blobs {
			blobs[n], _ = content(2 << 20)
			park(t, d, blobs[n], worthParking)
			time.Sleep(time.Second)
		}
		park(t, d, blobs[0], worthParking+1) // used: now the last
		room := func(most int) {
			d.on(callAllocate, func(string) error {
				if len(parkedFiles(t, d)) > most {
					return os.NewSyscallError("fallocate", syscall.ENOSPC)
				}
				return nil
			})
		}
		raw, dgst := content(2 << 20)
		room(3)
		begin(t, d, dgst, 2<<20)
		if left := parkedFiles(t, d); len(left) != 3 {
			t.Errorf("%d are left though there is room", len(left))
		}
		room(2)
		begin(t, d, dgst, 2<<20)
		if left := parkedFiles(t, d); len(left) != 2 || strings.Contains(fmt.Sprint(left), digest.FromBytes(blobs[1]).Encoded()) {
			t.Errorf("the oldest was not dropped: %v", left)
		}
		room(1)
		in := begin(t, d, dgst, -1)
		write(t, in, raw)
		if left := parkedFiles(t, d); len(left) != 1 || !strings.Contains(left[0], digest.FromBytes(blobs[0]).Encoded()) {
			t.Errorf("the oldest was not dropped: %v", left)
		}
		room(-1)
		if _, err := d.Ingest(app, dgst, 2<<20); !errors.Is(err, syscall.ENOSPC) {
			t.Errorf("%v, want ENOSPC", err)
		}
		if left := parkedFiles(t, d); len(left) > 0 || len(d.parked) > 0 {
			t.Errorf("%v are left, %d in memory", left, len(d.parked))
		}
		// A disk that fails, and what cannot be stored at all, are no reason.
		room(99)
		park(t, d, blobs[2], worthParking)
		d.on(callAllocate, func(string) error { return syscall.EIO })
		if _, err := d.Ingest(app, dgst, 2<<20); !errors.Is(err, syscall.EIO) || len(parkedFiles(t, d)) != 1 {
			t.Error(err, parkedFiles(t, d))
		}
		if _, err := d.Ingest(app, dgst, 1<<40); !errors.Is(err, ErrTooLarge) || len(parkedFiles(t, d)) != 1 {
			t.Error(err, parkedFiles(t, d))
		}
		// Records need room too.
		syncs := 0
		d.on(callSync, func(name string) error {
			if syncs++; len(parkedFiles(t, d)) > 0 {
				return &fs.PathError{Op: "sync", Path: name, Err: syscall.ENOSPC}
			}
			return nil
		})
		if err := d.put("note", []byte("x")); err != nil || syncs != 3 || len(parkedFiles(t, d)) > 0 {
			t.Error(err, syncs, parkedFiles(t, d))
		}
		if err := d.Close(); err != nil {
			t.Fatal(err)
		}
	})
}

func TestParkedKeepsItsSpace(t *testing.T) {
	dir := t.TempDir()
	d := open(t, dir)
	raw, dgst := content(64 << 20)
	blocks := func(name string) int64 {
		var stat syscall.Stat_t
		if err := syscall.Stat(filepath.Join(dir, name), &stat); err != nil {
			t.Fatal(err)
		}
		return stat.Blocks * 512
	}
	in := begin(t, d, dgst, int64(len(raw)))
	if blocks("tmp/"+in.name) < int64(len(raw)) {
		t.Skip("this file system reserves nothing")
	}
	write(t, in, raw[:worthParking])
	in.Park(errCut)
	if got := blocks(parkedFiles(t, d)[0]); got < int64(len(raw)) {
		t.Errorf("%d bytes are reserved of %d", got, len(raw))
	}
}

func TestReadersOfAResumedIngest(t *testing.T) {
	d := open(t, t.TempDir())
	raw, dgst := content(8 << 20)
	first := begin(t, d, dgst, int64(len(raw)))
	write(t, first, raw[:5<<20])
	old := reader(t, first)
	first.Park(errCut)
	in := begin(t, d, dgst, int64(len(raw)))
	var readers sync.WaitGroup
	for seed := range uint64(32) {
		b := reader(t, in)
		readers.Go(func() {
			random := rand.New(rand.NewPCG(seed, 1))
			p := make([]byte, 100_000)
			for n := range 20 {
				offset := random.Int64N(int64(len(raw)))
				if n == 0 {
					offset = random.Int64N(5 << 20) // what was parked is there at once
				}
				if _, err := b.Seek(offset, io.SeekStart); err != nil {
					t.Error(err)
					return
				}
				got, err := b.Read(p)
				if err != nil || got == 0 || !bytes.Equal(p[:got], raw[offset:offset+int64(got)]) {
					t.Errorf("%d bytes at %d: %v", got, offset, err)
					return
				}
			}
		})
	}
	for p := range bytesIn(raw[5<<20:], 32<<10) {
		write(t, in, p)
	}
	if err := commit(in, anonymous); err != nil {
		t.Error(err)
	}
	readers.Wait()
	// A reader of the first gets what it had, and no more: it does not see the second's bytes.
	if got, err := io.ReadAll(old); !errors.Is(err, errCut) || !bytes.Equal(got, raw[:5<<20]) {
		t.Errorf("%d bytes, %v", len(got), err)
	}
}

func TestParkWakesAllReaders(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := open(t, t.TempDir())
		raw, dgst := content(3 << 20)
		in := begin(t, d, dgst, int64(len(raw)))
		write(t, in, raw[:2<<20])
		results := make(chan error)
		for range 8 {
			go func() {
				b, err := in.Open(context.WithoutCancel(t.Context()))
				if err == nil {
					defer b.Close()
					_, err = io.ReadAll(b)
				}
				results <- err
			}()
		}
		synctest.Wait()
		in.Park(errCut)
		for range 8 {
			if err := <-results; !errors.Is(err, errCut) {
				t.Error(err)
			}
		}
		if err := d.Close(); err != nil {
			t.Fatal(err)
		}
	})
}
