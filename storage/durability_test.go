package storage

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"path/filepath"
	"testing"
	"testing/synctest"
)

func TestF48FailedSyncIsNotRepeated(t *testing.T) {
	broken := errors.New("input/output error")
	done := false
	for fails := 1; !done; fails++ { // the first sync, then the second …, until none fails
		synctest.Test(t, func(t *testing.T) { // where no time passes, and so nothing else is synced
			d := open(t, t.TempDir())
			calls := map[string]int{}
			n := 0
			d.on(callSync, func(name string) error {
				calls[name]++
				if n++; n == fails {
					return broken
				}
				return nil
			})
			raw, dgst := content(3 * Withheld)
			in := begin(t, d, dgst, int64(len(raw)))
			b := reader(t, in)
			write(t, in, raw)
			err := commit(in, secret)
			if n < fails {
				if err != nil || fails < 4 {
					t.Fatalf("%v after %d syncs", err, n)
				}
				wantBlob(t, d, app, raw)
				done = true
				return
			}
			if !errors.Is(err, broken) || errors.Is(err, ErrMismatch) {
				t.Fatalf("sync %d: %v", fails, err)
			}
			if got, err := io.ReadAll(b); err != nil || !bytes.Equal(got, raw) {
				t.Errorf("sync %d: the reader got %d bytes, %v", fails, len(got), err)
			}
			for name, count := range calls {
				if count > 1 && filepath.Base(name) == in.name {
					t.Errorf("sync %d: %s was synced %d times", fails, name, count)
				}
			}
			if fails <= 2 && d.holds(dgst) {
				t.Errorf("sync %d: stored", fails)
			}
			wantEmpty(t, d, "tmp")
		})
	}
}

// What Commit has acknowledged survives a power cut only if the bytes were durable before they had
// their name, their name before it returned, and no record came first.
func TestF46OrderOfSyncs(t *testing.T) {
	dir := t.TempDir()
	d := open(t, dir)
	raw, dgst := content(100)
	in := begin(t, d, dgst, 100)
	write(t, in, raw)
	var steps []string
	d.on(callSync, func(name string) error {
		public, _ := fs.Glob(d.root.root.FS(), "records/_public/*")
		name, err := filepath.Rel(dir, name)
		steps = append(steps, fmt.Sprint(filepath.Dir(name), " ", filepath.Base(name) == in.name, d.holds(dgst), len(public)))
		return err
	})
	if err := commit(in, anonymous); err != nil {
		t.Fatal(err)
	}
	want := []string{
		"tmp true false 0",     // the bytes
		"blobs false true 0",   // their name
		"tmp false true 0",     // the record
		"records false true 1", // its name
	}
	if fmt.Sprint(steps) != fmt.Sprint(want) {
		t.Errorf("%q, want %q", steps, want)
	}
}

func TestF60ReaderOutlivesItsFile(t *testing.T) {
	d := open(t, t.TempDir())
	raw, _ := content(300_000)
	dgst := store(t, d, app, raw, anonymous)
	b, err := d.Blob(app, dgst)
	if err != nil {
		t.Fatal(err)
	}
	defer b.Close()
	head := make([]byte, 1000)
	if _, err := io.ReadFull(b, head); err != nil {
		t.Fatal(err)
	}
	if err := d.root.remove(d.blobName(dgst)); err != nil {
		t.Fatal(err)
	}
	wantAbsent(t, d, app, dgst)
	if rest, err := io.ReadAll(b); err != nil || !bytes.Equal(append(head, rest...), raw) {
		t.Errorf("%d bytes, %v", len(rest), err)
	}
}
