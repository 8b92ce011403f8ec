package storage

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

func TestF22ParkedContentHasRotted(t *testing.T) {
	for name, spoil := range map[string]struct {
		act  func(path string) error
		from int // where the next one goes on
	}{
		"flipped bit": {func(path string) error {
			return changeFile(path, func(f *os.File) error { _, err := f.WriteAt([]byte("x"), 1000); return err })
		}, 2 << 20},
		"longer":    {func(path string) error { return os.Truncate(path, 2<<20+10) }, 2<<20 + 10},
		"shorter":   {func(path string) error { return os.Truncate(path, 2<<20-10) }, 2<<20 - 10},
		"too long":  {func(path string) error { return os.Truncate(path, 4<<20) }, 0},
		"too short": {func(path string) error { return os.Truncate(path, 10) }, 0},
		"other file": {func(path string) error {
			return errors.Join(os.Remove(path), os.WriteFile(path, make([]byte, 2<<20), 0o600))
		}, 2 << 20},
	} {
		for _, restart := range []bool{false, true} {
			t.Run(fmt.Sprint(name, ", restart: ", restart), func(t *testing.T) {
				dir := t.TempDir()
				d := open(t, dir)
				raw, dgst := content(3 << 20)
				park(t, d, raw, 2<<20)
				if restart {
					if err := d.Close(); err != nil {
						t.Fatal(err)
					}
				}
				if err := spoil.act(filepath.Join(dir, parkedFiles(t, mustDisk(t, dir))[0])); err != nil {
					t.Fatal(err)
				}
				if restart {
					d = open(t, dir)
				}
				in := begin(t, d, dgst, int64(len(raw)))
				if in.Written() != int64(spoil.from) {
					t.Fatalf("goes on from %d, want %d", in.Written(), spoil.from)
				}
				b := reader(t, in)
				write(t, in, raw[in.Written():])
				err := commit(in, anonymous)
				if spoil.from == 0 || name == "shorter" { // a shorter prefix is still right
					if err != nil {
						t.Fatal(err)
					}
					wantBlob(t, d, app, raw)
					return
				}
				if !errors.Is(err, ErrMismatch) {
					t.Fatalf("%v, want ErrMismatch", err)
				}
				if got, err := io.ReadAll(b); !errors.Is(err, ErrMismatch) || len(got) > len(raw)-Withheld {
					t.Errorf("the reader got %d bytes, %v", len(got), err)
				}
				in.Park(err)
				wantAbsent(t, d, app, dgst)
				wantEmpty(t, d, "tmp")
				wantResumed(t, d, raw, 0)
			})
		}
	}
}

func changeFile(path string, change func(*os.File) error) error {
	file, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	return errors.Join(change(file), file.Close())
}

// A file that is cut while its ingest goes on is the disk's fault, and not parked again.
func TestParkedIsCutWhileItIsReadBack(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		dir := t.TempDir()
		d := open(t, dir)
		synctest.Wait() // nothing else hashes any more
		raw, dgst := content(9 << 20)
		park(t, d, raw, 8<<20)
		clear(d.parked)
		in := begin(t, d, dgst, int64(len(raw)))
		if err := os.Truncate(filepath.Join(dir, "tmp", in.name), 10); err != nil {
			t.Fatal(err)
		}
		if _, err := in.file.Seek(0, io.SeekEnd); err != nil {
			t.Fatal(err)
		}
		_, err := in.Write(raw[8<<20:][:1000])
		if !errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, ErrMismatch) {
			t.Errorf("%v, want io.ErrUnexpectedEOF", err)
		}
		in.Park(errCut)
		wantEmpty(t, d, "tmp")
		wantResumed(t, d, raw, 0)
		if err := d.Close(); err != nil {
			t.Fatal(err)
		}
	})
}

func TestH43HostileParked(t *testing.T) {
	raw, _ := content(3 << 20)
	for kind, plant := range plants {
		for _, restart := range []bool{false, true} {
			t.Run(fmt.Sprint(kind, ", restart: ", restart), func(t *testing.T) {
				dir := t.TempDir()
				d := open(t, dir)
				park(t, d, raw, 2<<20)
				at := filepath.Join(dir, parkedFiles(t, d)[0])
				decoys := []string{filepath.Join(dir, "decoy"), filepath.Join(dir, "tmp", "decoy")}
				for _, decoy := range decoys {
					if err := os.WriteFile(decoy, raw[:2<<20], 0o600); err != nil {
						t.Fatal(err)
					}
				}
				if restart {
					if err := d.Close(); err != nil {
						t.Fatal(err)
					}
				}
				if err := errors.Join(plant(dir, filepath.Join(dir, "tmp", "x")), os.RemoveAll(at), os.Rename(filepath.Join(dir, "tmp", "x"), at)); err != nil {
					t.Fatal(err)
				}
				if restart {
					d = open(t, dir)
				}
				wantResumed(t, d, raw, 0)
				if got, err := os.ReadFile(decoys[0]); err != nil || !bytes.Equal(got, raw[:2<<20]) {
					t.Errorf("the decoy was written to: %v", err)
				}
				if left := parkedFiles(t, d); len(left) > 0 {
					t.Errorf("%v is still there", left)
				}
			})
		}
	}
}

func TestMalformedParkedIsSwept(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		dir := t.TempDir()
		d := open(t, dir)
		raw, dgst := content(3 << 20)
		park(t, d, raw, 2<<20)
		good := parkedFiles(t, d)[0]
		if err := d.Close(); err != nil {
			t.Fatal(err)
		}
		hex, repo := dgst.Encoded(), good[strings.LastIndex(good, "-"):]
		for _, name := range []string{
			"parked-",
			"parked-sha256-" + hex,
			"parked-sha256-" + hex + "-3145728",
			"parked-sha256-" + hex + "--1" + repo,
			"parked-sha256-" + hex + "-x" + repo,
			"parked-sha256-" + hex + "-1000" + repo,                     // shorter than the file
			"parked-sha256-" + hex + "-99999999999999999999999" + repo,  // no int64
			"parked-sha256-" + hex + "-" + strconv.Itoa(1<<40) + repo,   // over the capacity
			"parked-sha256-" + hex[1:] + "-3145728" + repo,              // no digest
			"parked-sha384-" + hex + hex[:32] + "-3145728" + repo,       // not stored
			"parked-md5-" + hex[:32] + "-3145728" + repo,                //
			"parked-sha256-" + strings.ToUpper(hex) + "-3145728" + repo, //
		} {
			at := filepath.Join(dir, "tmp", name)
			if err := errors.Join(os.WriteFile(at, raw[:2<<20], 0o600), os.Chtimes(at, time.Now(), time.Now())); err != nil {
				t.Fatal(err)
			}
		}
		d = open(t, dir)
		synctest.Wait()
		if left := parkedFiles(t, d); len(left) != 1 || left[0] != good {
			t.Errorf("left are %q", left)
		}
		wantResumed(t, d, raw, 2<<20)
		wantEmpty(t, d, "quarantine")
		if err := d.Close(); err != nil {
			t.Fatal(err)
		}
	})
}
