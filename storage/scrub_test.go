package storage

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/opencontainers/go-digest"
)

// scrubbing opens a store that is scrubbed at a MiB a second.
func scrubbing(t *testing.T, dir string) *Disk {
	t.Helper()
	d, err := Open(Config{Dir: dir, Scrub: 1 << 20})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := d.Close(); err != nil && !errors.Is(err, os.ErrClosed) {
			t.Error(err)
		}
	})
	return d
}

// A flipped bit is found within a cycle, though nobody reads the blob, at the rate that was set, and what was
// verified is left alone for a week, over restarts too.
func TestF54ScrubFindsRot(t *testing.T) {
	dir := t.TempDir()
	synctest.Test(t, func(t *testing.T) {
		d := scrubbing(t, dir)
		var blobs [][]byte
		for range 8 {
			raw, _ := content(1 << 20)
			blobs = append(blobs, raw)
			store(t, d, app, raw, anonymous)
		}
		rotten := digest.FromBytes(blobs[3])
		m, _ := image(t)
		if err := d.PutManifest(app, m, anonymous); err != nil {
			t.Fatal(err)
		}
		d.rot(t, rotten, 1<<19)
		time.Sleep(scrubAge)
		if u := d.Usage(); u.Verified > 0 || !d.holds(rotten) {
			t.Errorf("%+v before anything is due", u)
		}
		begun := time.Now()
		for d.Usage().Verified == 0 {
			time.Sleep(time.Second)
		}
		if waited := time.Since(begun); waited > scrubPause+time.Minute {
			t.Errorf("began after %s", waited)
		}
		hashed := d.Usage().Verified
		time.Sleep(3 * time.Second)
		if n := d.Usage().Verified - hashed; n < 3<<20-checkBuffer || n > 3<<20+checkBuffer {
			t.Errorf("%d bytes in three seconds", n)
		}
		if err := d.Close(); err != nil { // in the middle
			t.Fatal(err)
		}
		hashed = d.Usage().Verified
		if hashed >= 8<<20 {
			t.Fatalf("%d bytes were hashed: it is not in the middle", hashed)
		}
		d = scrubbing(t, dir)
		time.Sleep(2 * scrubPause)
		if n := d.Usage().Verified; n < 8<<20-hashed || n > 8<<20-hashed+1<<20+int64(len(m.Raw)) {
			t.Errorf("%d bytes were hashed after %d before the restart", n, hashed)
		}
		if d.holds(rotten) || d.quarantined(t) != 1 {
			t.Errorf("it is still there; %d files are quarantined", d.quarantined(t))
		}
		for n, raw := range blobs {
			if n != 3 {
				wantBlob(t, d, app, raw)
			}
		}
		if m, err := d.Manifest(app, m.Digest); err != nil {
			t.Error(m, err)
		}
		hashed = d.Usage().Verified
		if time.Sleep(3 * 24 * time.Hour); d.Usage().Verified != hashed {
			t.Error("what was just verified was hashed again")
		}
		if err := d.Close(); err != nil {
			t.Error(err)
		}
	})
}

// What somebody has written to is hashed without waiting for a week, and what is in doubt too.
func TestScrubBeginsWithWhatIsNotTrusted(t *testing.T) {
	for _, why := range []string{"written to", "unclean stop"} {
		dir := t.TempDir()
		synctest.Test(t, func(t *testing.T) {
			d := open(t, dir)
			raw, _ := content(1 << 20)
			dgst := store(t, d, app, raw, anonymous)
			name := filepath.Join(dir, "blobs", "sha256", dgst.Encoded())
			if why == "unclean stop" {
				d.rot(t, dgst, 0)
				d.killed(t)
			} else if err := errors.Join(os.WriteFile(name, bytes.ToLower(raw), 0o600), d.Close()); err != nil {
				t.Fatal(err)
			}
			time.Sleep(time.Second)
			d = scrubbing(t, dir)
			if time.Sleep(scrubDelay + 3*time.Second); d.holds(dgst) {
				t.Errorf("%s: it is still there", why)
			}
			if err := d.Close(); err != nil {
				t.Error(err)
			}
		})
	}
}

// A disk that does not read for a moment loses nothing; a file that does not read twice is out of service.
func TestF53ScrubOfWhatCannotBeRead(t *testing.T) {
	for _, fails := range []int64{1, 2} {
		dir := t.TempDir()
		synctest.Test(t, func(t *testing.T) {
			d := scrubbing(t, dir)
			raw, _ := content(1 << 20)
			dgst := store(t, d, app, raw, anonymous)
			time.Sleep(scrubAge)
			var n atomic.Int64
			d.on(callRead, func(name string) error {
				if strings.HasSuffix(name, d.blobName(dgst)) {
					if n.Add(1) <= fails {
						return syscall.EIO
					}
				}
				return nil
			})
			time.Sleep(scrubPause)
			if n.Load() == 0 || d.holds(dgst) != (fails == 1) {
				t.Errorf("read %d times, %d failed: it is there: %v", n.Load(), fails, d.holds(dgst))
			}
			if err := d.Close(); err != nil {
				t.Error(err)
			}
		})
	}
}

// Close ends a scrub wherever it is.
func TestCloseEndsTheScrub(t *testing.T) {
	for _, at := range []string{"before", "in a file", "in trouble", "between"} {
		dir := t.TempDir()
		synctest.Test(t, func(t *testing.T) {
			d := scrubbing(t, dir)
			raw, _ := content(10 << 20)
			dgst := store(t, d, app, raw, anonymous)
			var hashed bool
			switch at {
			case "in a file":
				time.Sleep(scrubAge + scrubDelay + 3*time.Second)
				hashed = true
			case "in trouble":
				d.on(callRead, func(string) error { return syscall.EIO })
				time.Sleep(scrubAge + scrubDelay + scrubTrouble/2)
			case "between":
				time.Sleep(scrubAge + scrubDelay + scrubPause/2)
				hashed = true
			}
			if n := d.Usage().Verified; hashed != (n > 0) || at == "in a file" && n >= 10<<20 {
				t.Errorf("%s: %d bytes were hashed", at, n)
			}
			begun := time.Now()
			if err := d.Close(); err != nil || time.Since(begun) > 0 {
				t.Errorf("%s: took %s, %v", at, time.Since(begun), err)
			}
			if _, err := os.Stat(filepath.Join(dir, "blobs", "sha256", dgst.Encoded())); err != nil {
				t.Errorf("%s: %v", at, err)
			}
		})
	}
}

// A disk in trouble is left alone.
func TestScrubRestsInTrouble(t *testing.T) {
	dir := t.TempDir()
	synctest.Test(t, func(t *testing.T) {
		d := scrubbing(t, dir)
		raw, _ := content(1000)
		store(t, d, app, raw, anonymous)
		time.Sleep(scrubAge)
		_ = d.wrote("write", 0, syscall.EIO)
		if time.Sleep(2 * scrubPause); d.Usage().Verified > 0 {
			t.Error("it was hashed")
		}
		_ = d.wrote("write", 0, nil)
		if time.Sleep(2 * scrubTrouble); d.Usage().Verified != 1000 {
			t.Errorf("%d bytes were hashed after the trouble", d.Usage().Verified)
		}
		if err := d.Close(); err != nil {
			t.Error(err)
		}
	})
}
