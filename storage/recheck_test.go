package storage

import (
	"bytes"
	"context"
	"errors"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"breakwater/pkg/oci"

	"github.com/opencontainers/go-digest"
)

// What was verified long ago is hashed behind its next whole read, and only then.
func TestF54RecheckAfterAWholeRead(t *testing.T) {
	for name, test := range map[string]struct {
		age   time.Duration
		read  int64 // how much of it
		found bool
	}{
		"whole":          {25 * time.Hour, 1 << 20, true},
		"not yet due":    {23 * time.Hour, 1 << 20, false},
		"not to its end": {25 * time.Hour, 1<<20 - 1, false},
		"only looked at": {25 * time.Hour, 0, false},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			synctest.Test(t, func(t *testing.T) {
				d := open(t, dir)
				raw, _ := content(1 << 20)
				good, _ := content(1 << 20)
				dgst := store(t, d, app, raw, anonymous)
				store(t, d, app, good, anonymous)
				time.Sleep(test.age)
				d.rot(t, dgst, 5)
				for range 2 { // what is right is hashed once
					b, err := d.Blob(app, digest.FromBytes(good))
					if err != nil {
						t.Fatal(err)
					}
					_, err = io.CopyN(io.Discard, b, test.read)
					if err = errors.Join(err, b.Close()); err != nil {
						t.Fatal(err)
					}
					time.Sleep(time.Minute)
				}
				if n := d.Usage().Verified; test.found != (n > 0) || n > 1<<20 {
					t.Errorf("%d bytes were hashed", n)
				}
				b, err := d.Blob(app, dgst)
				if err != nil {
					t.Fatal(err)
				}
				if (b.whole != nil) != (test.age > recheckAge) {
					t.Errorf("its reading is watched: %v", b.whole != nil)
				}
				if _, err := io.CopyN(io.Discard, b, test.read); err != nil {
					t.Fatal(err)
				}
				if time.Sleep(time.Minute); !d.holds(dgst) {
					t.Error("it was hashed while it was read")
				}
				if err := b.Close(); err != nil {
					t.Fatal(err)
				}
				if time.Sleep(time.Minute); d.holds(dgst) == test.found {
					t.Errorf("it is still there: %v", d.holds(dgst))
				}
				if blobs, _ := d.TakeDamaged(); (len(blobs) == 1) != test.found {
					t.Errorf("damaged are %v", blobs)
				}
				if err := d.Close(); err != nil {
					t.Error(err)
				}
			})
		})
	}
}

// A verification touches only the file that it has read: not what was stored again meanwhile, and an
// evicted one does not come back.
func TestVerifyingWhatIsEvictedOrReplaced(t *testing.T) {
	for _, rotten := range []string{"", "rotten"} {
		for _, then := range []string{"evicted", "replaced"} {
			t.Run(rotten+" "+then, func(t *testing.T) {
				dir := t.TempDir()
				synctest.Test(t, func(t *testing.T) {
					d := open(t, dir)
					raw, dgst := content(1 << 20)
					layers(t, d, app, "latest", raw)
					if rotten != "" {
						d.rot(t, dgst, 0)
					}
					d.killed(t)
					time.Sleep(time.Hour)
					d = open(t, dir)
					synctest.Wait() // the index is built
					release := d.gateOn(dgst)
					defer release()
					b, err := d.Blob(app, dgst)
					if err != nil {
						t.Fatal(err)
					}
					defer b.Close()
					verified := make(chan error)
					go func() {
						_, err := d.verifyFile(dgst, 0, func(int64) error { return nil })
						verified <- err
					}()
					synctest.Wait()
					if d.evict(1, "test"); d.holds(dgst) {
						t.Fatal("not evicted")
					}
					var before fs.FileInfo
					if then == "replaced" {
						layers(t, d, app, "latest", raw)
						if before, err = d.root.lstat(d.blobName(dgst)); err != nil {
							t.Fatal(err)
						}
						time.Sleep(time.Minute)
					}
					release()
					got, err := io.ReadAll(b)
					if rotten == "" && (err != nil || !bytes.Equal(got, raw)) || rotten != "" && (!errors.Is(err, ErrMismatch) || len(got) > len(raw)-Withheld) {
						t.Errorf("the reader got %d bytes, %v", len(got), err)
					}
					if err := <-verified; errors.Is(err, ErrMismatch) != (rotten != "") {
						t.Error(err)
					}
					if d.quarantined(t) > 0 {
						t.Error("a file was quarantined that nobody has read")
					}
					now, err := d.root.lstat(d.blobName(dgst))
					if then == "evicted" && !errors.Is(err, fs.ErrNotExist) {
						t.Errorf("it is back: %v", err)
					}
					if then == "replaced" && (err != nil || !unchanged(before, now)) {
						t.Errorf("the new file was touched: %v", err)
					}
					if err := errors.Join(b.Close(), d.Close()); err != nil {
						t.Error(err)
					}
				})
			})
		}
	}
}

// The whole store, with all that can be wrong in it.
func TestVerify(t *testing.T) {
	for _, clean := range []string{"clean", "damaged"} {
		t.Run(clean, func(t *testing.T) {
			dir := t.TempDir()
			d := bounded(t, dir, 1<<30)
			var blobs [][]byte
			for range 5 {
				raw, _ := content(checkBuffer + 10)
				blobs = append(blobs, raw)
			}
			p := layers(t, d, app, "latest", blobs...)
			q := layers(t, d, app, "", blobs[4])
			at := time.Now().Add(-time.Hour).Truncate(verifiedUnit)
			if err := d.root.touch(d.blobName(digest.FromBytes(blobs[4])), at); err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(filepath.Join(dir, "blobs", "sha256", "README"), []byte("keep me"), 0o600); err != nil {
				t.Fatal(err)
			}
			wrong, unreadable := map[digest.Digest]string{}, digest.FromBytes(blobs[2])
			if clean == "damaged" {
				d.rot(t, digest.FromBytes(blobs[0]), checkBuffer)
				d.rot(t, q.m.Digest, 5)
				link := filepath.Join(dir, "blobs", "sha256", digest.FromBytes(blobs[1]).Encoded())
				if err := errors.Join(os.Remove(link), os.Symlink("README", link)); err != nil {
					t.Fatal(err)
				}
				d.on(callRead, func(name string) error {
					if strings.HasSuffix(name, unreadable.Encoded()) {
						return syscall.EIO
					}
					return nil
				})
				wrong = map[digest.Digest]string{
					digest.FromBytes(blobs[0]): "quay.io/org/app:latest",
					digest.FromBytes(blobs[1]): "quay.io/org/app:latest",
					q.m.Digest:                 "quay.io/org/app@" + q.m.Digest.String(),
				}
			}
			var last Progress
			report, err := d.Verify(t.Context(), func(p Progress) {
				if p.Files < last.Files || p.Bytes < last.Bytes || p.AllFiles != 7 || p.AllBytes < 4*checkBuffer {
					t.Errorf("%+v after %+v", p, last)
				}
				last = p
			})
			if err != nil {
				t.Fatal(err)
			}
			if report.Files != 7 || last.Files != 7 || last.Bytes != report.Bytes || clean == "clean" && last.Bytes != last.AllBytes {
				t.Errorf("%+v, last %+v", report, last)
			}
			for _, w := range report.Wrong {
				if want, ok := wrong[w.Digest]; !ok || w.Reason == "" || len(w.Images) != 1 || w.Images[0] != want {
					t.Errorf("%+v, want %q", w, want)
				}
				if d.holds(w.Digest) {
					t.Errorf("%s is still there", w.Digest)
				}
			}
			if len(report.Wrong) != len(wrong) || d.quarantined(t) != len(wrong) {
				t.Errorf("%d are wrong, %d quarantined, want %d", len(report.Wrong), d.quarantined(t), len(wrong))
			}
			if clean == "damaged" && (len(report.Unreadable) != 1 || report.Unreadable[0].Digest != unreadable || !d.holds(unreadable)) ||
				clean == "clean" && report.Unreadable != nil {
				t.Errorf("unreadable: %+v", report.Unreadable)
			}
			if info, err := d.root.lstat(d.blobName(digest.FromBytes(blobs[4]))); err != nil || !verifiedAt(info).After(at) {
				t.Errorf("what was verified is not dated: %v", err)
			}
			blobsLost, manifestsLost := d.TakeDamaged()
			var lost []oci.Reference
			lost = append(append(lost, blobsLost...), manifestsLost...)
			for _, ref := range lost {
				if _, ok := wrong[ref.Digest]; !ok || ref.Repository != app {
					t.Errorf("damaged is %s", ref)
				}
			}
			if clean == "damaged" && (len(manifestsLost) != 1 || manifestsLost[0].Digest != q.m.Digest || !slices.ContainsFunc(blobsLost, func(r oci.Reference) bool { return r.Digest == digest.FromBytes(blobs[0]) })) {
				t.Errorf("damaged are %v and %v", blobsLost, manifestsLost)
			}
			_ = p
			ctx, cancel := context.WithCancel(t.Context())
			cancel()
			if report, err := d.Verify(ctx, func(Progress) {}); !errors.Is(err, context.Canceled) || report.Files > 0 {
				t.Errorf("%+v, %v", report, err)
			}
		})
	}
}
