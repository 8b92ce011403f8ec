package storage

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"runtime/debug"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/opencontainers/go-digest"
)

// rot flips a bit of a stored file at rest: nothing else tells of it.
func (d *Disk) rot(t testing.TB, dgst digest.Digest, at int64) {
	t.Helper()
	name := filepath.Join(d.root.root.Name(), d.blobName(dgst))
	info, err := os.Stat(name)
	if err != nil {
		t.Fatal(err)
	}
	file, err := os.OpenFile(name, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	b := make([]byte, 1)
	_, err = file.ReadAt(b, at)
	if err == nil {
		_, err = file.WriteAt([]byte{b[0] ^ 1}, at)
	}
	if err = errors.Join(err, file.Close(), os.Chtimes(name, time.Now(), info.ModTime())); err != nil {
		t.Fatal(err)
	}
}

// killed closes the store as if its process had been killed.
func (d *Disk) killed(t testing.TB) {
	t.Helper()
	if err := errors.Join(d.Close(), os.WriteFile(filepath.Join(d.root.root.Name(), "LOCK"), []byte("1\n"), 0o600)); err != nil {
		t.Fatal(err)
	}
}

// later lets a millisecond pass, to which the times of verifications are rounded.
func later() {
	for begun := time.Now(); time.Since(begun) < 2*verifiedUnit; time.Sleep(verifiedUnit) {
	}
}

// hashing reports whether a read of that name is a verification's of this file: others are the readers' own.
func hashing(file, name string) bool {
	return strings.HasSuffix(name, file) && bytes.Contains(debug.Stack(), []byte("(*Disk).hash("))
}

// quarantined is how many files are.
func (d *Disk) quarantined(t testing.TB) int {
	t.Helper()
	names, err := fs.Glob(d.root.root.FS(), "quarantine/*")
	if err != nil {
		t.Fatal(err)
	}
	return len(names)
}

// After an unclean stop wrong bytes' last 64 KiB never leave, and the next one to ask finds nothing.
func TestF54FirstReadAfterAnUncleanStop(t *testing.T) {
	for _, size := range []int{1, Withheld, Withheld + 1, 3 * Withheld, 2<<20 + 7} {
		for name, at := range map[string]int{"first byte": 0, "last byte": size - 1, "none": -1} {
			t.Run(fmt.Sprintf("%d bytes, %s", size, name), func(t *testing.T) {
				dir := t.TempDir()
				d := open(t, dir)
				raw, _ := content(size)
				dgst := store(t, d, app, raw, anonymous)
				if at >= 0 {
					d.rot(t, dgst, int64(at))
				}
				d.killed(t)
				later()
				d = open(t, dir)
				if at < 0 {
					wantBlob(t, d, app, raw)
					if n := d.Usage().Verified; n != int64(size) {
						t.Errorf("%d bytes were hashed", n)
					}
					wantBlob(t, d, app, raw)
					if n := d.Usage().Verified; n != int64(size) {
						t.Errorf("%d bytes were hashed though it was verified", n)
					}
					return
				}
				b, err := d.Blob(app, dgst)
				if size <= Withheld {
					if !errors.Is(err, fs.ErrNotExist) {
						t.Fatalf("%v, want a miss", err)
					}
				} else {
					if err != nil || b.Size() != int64(size) {
						t.Fatal(err)
					}
					got, err := io.ReadAll(b)
					if !errors.Is(err, ErrMismatch) || len(got) > size-Withheld || !bytes.Equal(got[min(1, len(got)):], raw[min(1, len(got)):len(got)]) {
						t.Errorf("%d bytes, %v", len(got), err)
					}
					if err := b.Close(); err != nil {
						t.Error(err)
					}
				}
				wantAbsent(t, d, app, dgst)
				if d.quarantined(t) != 1 || d.Usage().Wrong != 1 {
					t.Errorf("%d files are quarantined, %+v", d.quarantined(t), d.Usage())
				}
				if blobs, manifests := d.TakeDamaged(); fmt.Sprint(blobs) != "[quay.io/org/app@"+dgst.String()+"]" || manifests != nil {
					t.Errorf("damaged are %v and %v", blobs, manifests)
				}
				if blobs, _ := d.TakeDamaged(); blobs != nil {
					t.Errorf("damaged again: %v", blobs)
				}
				hashed := d.Usage().Verified
				store(t, d, app, raw, anonymous)
				wantBlob(t, d, app, raw)
				if n := d.Usage().Verified; n != hashed {
					t.Error("what was just stored was hashed again")
				}
			})
		}
	}
}

// What nobody has read between an unclean stop and a clean one is not trusted after that either; what was
// verified is. A note that cannot be true makes nothing trusted.
func TestDoubtOutlivesACleanStop(t *testing.T) {
	for name, note := range map[string]string{"": "", "garbage": "garbage", "empty": "\n", "from the future": "2999-01-01T00:00:00Z"} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			d := open(t, dir)
			var blobs [][]byte
			for range 2 {
				raw, _ := content(100)
				store(t, d, app, raw, anonymous)
				blobs = append(blobs, raw)
			}
			d.killed(t)
			later()
			d = open(t, dir)
			wantBlob(t, d, app, blobs[0])
			if err := d.Close(); err != nil {
				t.Fatal(err)
			}
			want := int64(100)
			if note != "" {
				later()
				if err := os.WriteFile(filepath.Join(dir, uncleanFile), []byte(note), 0o600); err != nil {
					t.Fatal(err)
				}
				want = 200
			}
			for range 2 {
				d = open(t, dir)
				later() // or what is verified now could be from before
				wantBlob(t, d, app, blobs[0])
				wantBlob(t, d, app, blobs[1])
				if n := d.Usage().Verified; n != want {
					t.Errorf("%d bytes were hashed, want %d", n, want)
				}
				want = 0
				if err := d.Close(); err != nil {
					t.Fatal(err)
				}
			}
		})
	}
}

// As long as the disk cannot hold that the last stop was unclean, LOCK says so.
func TestDoubtThatCannotBeNoted(t *testing.T) {
	dir := t.TempDir()
	d := open(t, dir)
	raw, _ := content(100)
	store(t, d, app, raw, anonymous)
	d.killed(t)
	later()
	d, err := Open(Config{Dir: dir, Fault: func(c, _ string) error {
		if c == string(callRename) {
			return syscall.EIO
		}
		return nil
	}})
	if err != nil {
		t.Fatal(err)
	}
	d.fault.Store(nil)
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	d = open(t, dir)
	wantBlob(t, d, app, raw)
	if n := d.Usage().Verified; n != 100 {
		t.Errorf("%d bytes were hashed", n)
	}
}

// A file that somebody else has written to is not trusted, however well the last stop went.
func TestFilesThatOthersWroteTo(t *testing.T) {
	d := open(t, t.TempDir())
	raw, _ := content(3 * Withheld)
	dgst := store(t, d, app, raw, anonymous)
	if err := os.WriteFile(filepath.Join(d.root.root.Name(), d.blobName(dgst)), make([]byte, len(raw)), 0o600); err != nil {
		t.Fatal(err)
	}
	b, err := d.Blob(app, dgst)
	if err != nil {
		t.Fatal(err)
	}
	defer b.Close()
	if got, err := io.ReadAll(b); !errors.Is(err, ErrMismatch) || len(got) > len(raw)-Withheld {
		t.Errorf("%d bytes, %v", len(got), err)
	}
	wantAbsent(t, d, app, dgst)
}

// All who read meanwhile share one hashing, wherever they begin; nobody is ahead of it.
func TestFirstReadersShareOneHashing(t *testing.T) {
	for _, wrong := range []string{"", "wrong"} {
		dir := t.TempDir() // outside: its removal must come after everything in the bubble
		synctest.Test(t, func(t *testing.T) {
			d := open(t, dir)
			raw, _ := content(4 << 20)
			dgst := store(t, d, app, raw, anonymous)
			if wrong != "" {
				d.rot(t, dgst, 0)
			}
			d.killed(t)
			time.Sleep(time.Second)
			d = open(t, dir)
			step := make(chan struct{})
			d.on(callRead, func(name string) error {
				if hashing(d.blobName(dgst), name) {
					<-step
				}
				return nil
			})
			type result struct {
				from int64
				got  []byte
				err  error
			}
			var readers sync.WaitGroup
			var mu sync.Mutex
			var results []result
			for n := range 40 {
				from := int64(n) * 100_000
				readers.Go(func() {
					b, err := d.Blob(app, dgst)
					if err != nil {
						t.Error(err)
						return
					}
					defer b.Close()
					_, _ = b.Seek(from, io.SeekStart)
					var got []byte
					for err == nil {
						var file *os.File
						var n int64
						if file, n, err = b.Await(1 << 20); err == nil { // as sendfile does: not by the seam
							p := make([]byte, n)
							_, err = io.ReadFull(file, p)
							got = append(got, p...)
						}
					}
					mu.Lock()
					defer mu.Unlock()
					results = append(results, result{from, got, err})
				})
			}
			synctest.Wait()
			if len(results) > 0 || len(d.checks.first) != 1 {
				t.Errorf("%d readers have ended before anything was hashed, by %d", len(results), len(d.checks.first))
			}
			close(step)
			readers.Wait()
			if n := d.Usage().Verified; n != int64(len(raw)) || len(d.checks.first) != 0 {
				t.Errorf("%d bytes were hashed for all, %d still hash", n, len(d.checks.first))
			}
			for _, r := range results {
				whole := errors.Is(r.err, io.EOF) && bytes.Equal(r.got, raw[r.from:])
				cut := errors.Is(r.err, ErrMismatch) && r.from+int64(len(r.got)) <= max(r.from, int64(len(raw))-Withheld)
				if wrong == "" && !whole || wrong != "" && !cut {
					t.Errorf("from %d: %d bytes, %v", r.from, len(r.got), r.err)
				}
			}
			if err := d.Close(); err != nil {
				t.Error(err)
			}
		})
	}
}

// A range near the end waits for all that is before it.
func TestRangeWaitsForTheFirstHashing(t *testing.T) {
	dir := t.TempDir()
	synctest.Test(t, func(t *testing.T) {
		d := open(t, dir)
		raw, _ := content(1 << 20)
		dgst := store(t, d, app, raw, anonymous)
		d.killed(t)
		time.Sleep(time.Second)
		d = open(t, dir)
		allowed := make(chan struct{}, 10)
		d.on(callRead, func(name string) error {
			if hashing(d.blobName(dgst), name) {
				<-allowed
			}
			return nil
		})
		b, err := d.Blob(app, dgst)
		if err != nil {
			t.Fatal(err)
		}
		defer b.Close()
		_, _ = b.Seek(-Withheld-10, io.SeekEnd)
		var n atomic.Int64
		go func() {
			_, released, _ := b.Await(1000)
			n.Store(released)
		}()
		for range 3 { // of four pieces
			allowed <- struct{}{}
			synctest.Wait()
			if n.Load() != 0 {
				t.Error("it was served ahead of the hashing")
			}
		}
		allowed <- struct{}{}
		synctest.Wait()
		if n.Load() != 10 {
			t.Errorf("%d bytes can be read, want those before the last %d", n.Load(), Withheld)
		}
		close(allowed)
		synctest.Wait()
		if err := d.Close(); err != nil {
			t.Error(err)
		}
	})
}

// Close does not wait for what is being hashed, and readers are told.
func TestCloseEndsAFirstHashing(t *testing.T) {
	dir := t.TempDir()
	synctest.Test(t, func(t *testing.T) {
		d := open(t, dir)
		raw, _ := content(4 << 20)
		dgst := store(t, d, app, raw, anonymous)
		d.killed(t)
		time.Sleep(time.Second)
		d = open(t, dir)
		hold := d.gateOn(dgst)
		b, err := d.Blob(app, dgst)
		if err != nil {
			t.Fatal(err)
		}
		defer b.Close()
		closed := make(chan error, 1)
		go func() { closed <- d.Close() }()
		synctest.Wait()
		hold()
		if err := <-closed; err != nil {
			t.Error(err)
		}
		if got, err := io.ReadAll(b); !errors.Is(err, errClosing) {
			t.Errorf("%d bytes, %v", len(got), err)
		}
		d = open(t, dir)
		wantBlob(t, d, app, raw)
		if d.quarantined(t) > 0 {
			t.Error("what was not hashed to its end was taken for wrong")
		}
		if err := d.Close(); err != nil {
			t.Error(err)
		}
	})
}

// gateOn holds reads of one content until it is opened.
func (d *Disk) gateOn(dgst digest.Digest) (open func()) {
	gate := make(chan struct{})
	d.on(callRead, func(name string) error {
		if hashing(d.blobName(dgst), name) {
			<-gate
		}
		return nil
	})
	return sync.OnceFunc(func() { close(gate) })
}

// What the disk does not read is quarantined as wrong content is.
func TestF53FirstReadOfWhatCannotBeRead(t *testing.T) {
	dir := t.TempDir()
	d := open(t, dir)
	raw, _ := content(1 << 20)
	dgst := store(t, d, app, raw, anonymous)
	d.killed(t)
	later()
	d = open(t, dir)
	reads := 0
	d.on(callRead, func(name string) error {
		if hashing(d.blobName(dgst), name) {
			if reads++; reads == 2 {
				return syscall.EIO
			}
		}
		return nil
	})
	b, err := d.Blob(app, dgst)
	if err != nil {
		t.Fatal(err)
	}
	defer b.Close()
	for err == nil {
		var n int64
		if _, n, err = b.Await(1 << 20); err == nil {
			_, err = b.Seek(n, io.SeekCurrent)
		}
	}
	if at, _ := b.Seek(0, io.SeekCurrent); !errors.Is(err, syscall.EIO) || at != checkBuffer {
		t.Errorf("%v after %d bytes", err, at)
	}
	wantAbsent(t, d, app, dgst)
}

// A disk that does not take dates makes nothing be hashed twice.
func TestVerifiedWithoutADate(t *testing.T) {
	dir := t.TempDir()
	d := open(t, dir)
	raw, _ := content(3 * Withheld)
	dgst := store(t, d, app, raw, anonymous)
	d.killed(t)
	later()
	d = open(t, dir)
	d.on(callTouch, func(string) error { return syscall.EROFS })
	for range 3 {
		wantBlob(t, d, app, raw)
		if n := d.Usage().Verified; n != int64(len(raw)) {
			t.Errorf("%d bytes were hashed", n)
		}
	}
	d.rot(t, dgst, 0)
	name := filepath.Join(dir, "blobs", "sha256", dgst.Encoded())
	if err := os.Chtimes(name, time.Now(), time.Now().Add(time.Nanosecond)); err != nil { // and that shows
		t.Fatal(err)
	}
	b, err := d.Blob(app, dgst)
	if err != nil {
		t.Fatal(err)
	}
	defer b.Close()
	if got, err := io.ReadAll(b); !errors.Is(err, ErrMismatch) {
		t.Errorf("%d bytes, %v", len(got), err)
	}
}

// A clock that was ahead makes nothing trusted, and nothing be hashed at each read.
func TestVerifiedByAWrongClock(t *testing.T) {
	d := open(t, t.TempDir())
	raw, _ := content(100)
	dgst := store(t, d, app, raw, anonymous)
	ahead := time.Now().Add(time.Hour).Truncate(verifiedUnit)
	if err := d.root.touch(d.blobName(dgst), ahead); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if wantBlob(t, d, app, raw); d.Usage().Verified != 100 {
			t.Errorf("%d bytes were hashed", d.Usage().Verified)
		}
	}
	d.checks.unclean = ahead
	for range 2 {
		if wantBlob(t, d, app, raw); d.Usage().Verified != 200 {
			t.Errorf("%d bytes were hashed", d.Usage().Verified)
		}
	}
}

// A blob that is known to be right costs what it cost when nothing was ever verified.
func TestCallsOfAHit(t *testing.T) {
	d := open(t, t.TempDir())
	raw, _ := content(1000)
	store(t, d, app, raw, anonymous)
	built(t, d) // whose calls are not the hit's
	calls := map[call]int{}
	before := func(c, _ string) error {
		calls[call(c)]++
		return nil
	}
	d.fault.Store(&before)
	wantBlob(t, d, app, raw)
	d.fault.Store(nil)
	if want := (map[call]int{callOpen: 2, callStat: 2, callRead: 5}); !maps.Equal(calls, want) {
		t.Errorf("%v, want %v", calls, want)
	}
}
