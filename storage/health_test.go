package storage

import (
	"bytes"
	"errors"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"testing/synctest"
	"time"
)

// The trouble begins with a write that fails and ends with one that succeeds, and each is one line of the log
// however many there are.
func TestTrouble(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := open(t, t.TempDir())
		synctest.Wait() // for what begins with the store
		var lines bytes.Buffer
		d.log = slog.New(slog.NewTextHandler(&lines, nil))
		raw, dgst := content(1000)
		small, _ := content(10)
		fail := func() {
			t.Helper()
			d.on(callAllocate, func(string) error { return os.NewSyscallError("fallocate", syscall.ENOSPC) })
			defer d.on(callAllocate, func(string) error { return nil })
			if _, err := d.Ingest(app, dgst, 1000); !errors.Is(err, syscall.ENOSPC) {
				t.Fatal(err)
			}
		}
		fail()
		since := time.Now()
		for range 100 {
			time.Sleep(10 * time.Millisecond)
			fail()
			store(t, d, app, small, anonymous) // that there is room for little is no news
		}
		if got := d.Trouble(); got == nil || !got.Since.Equal(since) || got.Reason() != "no space left on device" {
			t.Errorf("%+v", got)
		}
		if n := d.Errors()["reserve"]; n != 101 {
			t.Errorf("%v", d.Errors())
		}
		if n := strings.Count(lines.String(), "store cannot write"); n != 1 || strings.Contains(lines.String(), "can write again") {
			t.Errorf("log:\n%s", &lines)
		}
		store(t, d, app, raw, anonymous)
		if got := d.Trouble(); got != nil {
			t.Errorf("after what had failed could be stored: %+v", got)
		}
		if n := strings.Count(lines.String(), "store can write again"); n != 1 {
			t.Errorf("log:\n%s", &lines)
		}
		fail()
		time.Sleep(troubleFor)
		store(t, d, app, small, secret)
		if got := d.Trouble(); got != nil {
			t.Errorf("nothing has failed for a while: %+v", got)
		}
		d.on(callSync, func(string) error { return &fs.PathError{Op: "fsync", Err: syscall.EIO} })
		for range 100 {
			if err := d.PutAnswer(app, "/tags/list", Answer{Body: small}); !errors.Is(err, syscall.EIO) {
				t.Fatal(err)
			}
		}
		if got := d.Trouble(); got == nil || got.Reason() != "input/output error" || strings.Count(lines.String(), "msg=\"store can") != 5 {
			t.Errorf("%+v, log:\n%s", got, &lines)
		}
		// What is wrong with the content is no trouble of the disk.
		d.on(callSync, func(string) error { return nil })
		time.Sleep(troubleFor)
		if err := d.PutAnswer(app, "/tags/list", Answer{Body: small}); err != nil || d.Trouble() != nil {
			t.Fatal(err, d.Trouble())
		}
		if _, err := d.Ingest(app, dgst, 1<<50); !errors.Is(err, ErrTooLarge) || d.Trouble() != nil {
			t.Error(err, d.Trouble())
		}
		d.capacity = 9
		if _, err := begin(t, d, dgst, -1).Write(small); !errors.Is(err, ErrTooLarge) || d.Trouble() != nil {
			t.Error(err, d.Trouble())
		}
		d.capacity = 1 << 30
		in := begin(t, d, dgst, 10)
		write(t, in, small)
		if err := commit(in, anonymous); !errors.Is(err, ErrMismatch) || d.Trouble() != nil {
			t.Error(err, d.Trouble())
		}
		if err := d.Close(); err != nil {
			t.Fatal(err)
		}
	})
}

// What is to be written behind stays there while the disk fails, without a line for each.
func TestTagsStayBehindInTrouble(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := open(t, t.TempDir())
		m, _ := image(t)
		if err := d.PutManifest(app, m, anonymous); err != nil {
			t.Fatal(err)
		}
		tags := []string{"a", "b", "c", "d"}
		confirm := func(at time.Time) {
			t.Helper()
			for _, tag := range tags {
				if err := d.PutTag(app, tag, Tag{Current: Validated{Digest: m.Digest, ValidatedAt: at}}); err != nil {
					t.Fatal(err)
				}
			}
		}
		confirm(time.Now())
		synctest.Wait() // the index is built, and has said so
		var lines bytes.Buffer
		d.log = slog.New(slog.NewTextHandler(&lines, nil))
		d.on(callSync, func(string) error { return syscall.EIO })
		later := time.Now().Add(time.Hour)
		confirm(later)
		d.flushTags()
		d.flushPulls()
		if n := strings.Count(lines.String(), "\n"); n != 1 {
			t.Errorf("log:\n%s", &lines)
		}
		d.on(callSync, func(string) error { return nil })
		d.flushTags()
		d.tags.entries.Purge()
		for _, tag := range tags {
			if got, err := d.Tag(app, tag); err != nil || !got.Current.ValidatedAt.Equal(later) {
				t.Errorf("%s: %+v, %v", tag, got, err)
			}
		}
		if err := d.Close(); err != nil {
			t.Fatal(err)
		}
	})
}

// F53: a blob that cannot be read is absent from then on, even if it cannot be moved out of the way, until
// it is stored anew.
func TestF53UnreadableIsAbsent(t *testing.T) {
	for _, stuck := range []bool{false, true} {
		dir := t.TempDir()
		d := open(t, dir)
		raw, dgst := content(1000)
		store(t, d, app, raw, anonymous)
		if stuck { // nowhere to move it to
			if err := os.Remove(filepath.Join(dir, "quarantine")); err != nil {
				t.Fatal(err)
			}
		}
		d.Quarantine(dgst, syscall.EIO)
		if _, err := os.Lstat(filepath.Join(dir, "blobs", "sha256", dgst.Encoded())); (err == nil) != stuck {
			t.Fatal(err)
		}
		wantAbsent(t, d, app, dgst)
		if n := d.Errors()["read"]; n != 1 {
			t.Errorf("%v", d.Errors())
		}
		store(t, d, app, raw, anonymous)
		wantBlob(t, d, app, raw)
		m, _ := image(t)
		for range 2 {
			if err := d.PutManifest(app, m, anonymous); err != nil {
				t.Fatal(err)
			}
			if got, err := d.Manifest(app, m.Digest); err != nil || !bytes.Equal(got.Raw, m.Raw) {
				t.Fatal(err)
			}
			d.Quarantine(m.Digest, syscall.EIO)
			if _, err := d.Manifest(app, m.Digest); !errors.Is(err, fs.ErrNotExist) {
				t.Errorf("%v", err)
			}
		}
	}
}

// F58: those who wait for the disk are not more than it has threads for, and do not wait for ever.
func TestF58LookUpsWait(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := open(t, t.TempDir())
		raw, dgst := content(1000)
		store(t, d, app, raw, anonymous)
		for range maxReading {
			if err := d.enter(); err != nil {
				t.Fatal(err)
			}
		}
		began := time.Now()
		if _, err := d.Blob(app, dgst); !errors.Is(err, ErrBusy) || time.Since(began) != readPatience {
			t.Errorf("%v after %v", err, time.Since(began))
		}
		time.AfterFunc(readPatience/2, d.leave)
		wantBlob(t, d, app, raw)
		if took := time.Since(began) - readPatience; took != readPatience/2 {
			t.Errorf("after %v", took)
		}
		for range maxReading - 1 {
			d.leave()
		}
		if len(d.reading) != 0 {
			t.Errorf("%d are left inside", len(d.reading))
		}
		if err := d.Close(); err != nil {
			t.Fatal(err)
		}
	})
}
