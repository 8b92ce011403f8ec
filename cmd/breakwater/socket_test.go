package main

import (
	"bytes"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"breakwater/storage"
)

// control makes a socket until the test ends.
func control(t *testing.T, path string) (*socket, error) {
	t.Helper()
	s, err := listenControl(path, slog.New(slog.DiscardHandler))
	if err == nil {
		t.Cleanup(func() { _ = s.Close() })
	}
	return s, err
}

// TestSocketIsNeverOpenToOthers looks at its mode all the time, with a umask that takes nothing away.
func TestSocketIsNeverOpenToOthers(t *testing.T) {
	defer syscall.Umask(syscall.Umask(0))
	path := filepath.Join(t.TempDir(), "c.sock")
	stop := make(chan struct{})
	var looking sync.WaitGroup
	looking.Go(func() {
		for {
			select {
			case <-stop:
				return
			default:
			}
			if info, err := os.Lstat(path); err == nil && info.Mode().Perm()&^socketMode != 0 {
				t.Errorf("%v", info.Mode())
				return
			}
		}
	})
	for range 500 {
		s, err := listenControl(path, slog.New(slog.DiscardHandler))
		if err != nil {
			t.Error(err)
			break
		}
		_ = s.Close()
	}
	close(stop)
	looking.Wait()
	syscall.Umask(0o177)
	if _, err := control(t, path); err != nil {
		t.Fatal(err)
	}
	if info, err := os.Lstat(path); err != nil || info.Mode() != fs.ModeSocket|socketMode {
		t.Errorf("with a narrow umask: %v, %v", info, err)
	}
}

func TestSocketTakesNobodysPlace(t *testing.T) {
	dir := t.TempDir()
	file, taken := filepath.Join(dir, "file"), filepath.Join(dir, "taken.sock")
	if err := os.WriteFile(file, []byte("x"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := control(t, taken); err != nil {
		t.Fatal(err)
	}
	stale, err := net.ListenUnix("unix", &net.UnixAddr{Name: filepath.Join(dir, "stale.sock")})
	if err != nil {
		t.Fatal(err)
	}
	stale.SetUnlinkOnClose(false)
	stale.Close()
	for path, want := range map[string]string{
		file:                    "is not a socket",
		taken:                   "another mirror listens there",
		stale.Addr().String():   "",
		dir + "/missing/c.sock": "no such file",
	} {
		_, err := control(t, path)
		if (err == nil) != (want == "") || err != nil && !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want %q", path, err, want)
		}
	}
	if raw, err := os.ReadFile(file); err != nil || string(raw) != "x" {
		t.Errorf("the file: %q, %v", raw, err)
	}
	if conn, err := net.Dial("unix", taken); err != nil {
		t.Error(err)
	} else {
		conn.Close()
	}
}

// A mirror that cannot have its socket serves all the same.
func TestServesWithoutASocket(t *testing.T) {
	s := startServe(t, "control: missing/control.sock\n")
	if status, _ := s.get("http://" + s.listen + "/v2/"); status != 200 {
		t.Error(status)
	}
}

// What a caller waits for long, such as a verification, does not hold up the stop.
func TestStopEndsWhatTheSocketDoes(t *testing.T) {
	server := newControlServer(newMirror(t, t.TempDir()), slog.New(slog.DiscardHandler))
	ctx := server.BaseContext(nil)
	if ctx.Err() != nil {
		t.Fatal(ctx.Err())
	}
	if err := server.Shutdown(t.Context()); err != nil {
		t.Fatal(err)
	}
	select {
	case <-ctx.Done():
	case <-time.After(5 * time.Second):
		t.Error("it goes on")
	}
}

func TestH44ReportIsPlain(t *testing.T) {
	var out bytes.Buffer
	printReport(&out, storage.Report{Files: 2, Bytes: 3 << 20, Wrong: []storage.Wrong{{Digest: "sha256:ab", Images: []string{"a\x1b[2Jb"}, Reason: "is\r\x1b]0;x\a"}}}, time.Second)
	if said := out.String(); strings.ContainsAny(said, "\x1b\r\a") || !strings.Contains(said, "files: 2, 3.0 MiB, in 1s: 1 wrong") {
		t.Errorf("%q", said)
	}
}

func TestProgressWhereThereIsNoTerminal(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		for output, want := range map[format]string{outputJSON: "", outputText: "2 of 9 files, 2.0 KiB of 9.0 KiB\n"} {
			var out bytes.Buffer
			say := progressOn(&out, output)
			say.show(storage.Progress{Files: 1, AllFiles: 9, Bytes: 1 << 10, AllBytes: 9 << 10})
			time.Sleep(sayEvery)
			say.show(storage.Progress{Files: 2, AllFiles: 9, Bytes: 2 << 10, AllBytes: 9 << 10})
			say.show(storage.Progress{Files: 3, AllFiles: 9, Bytes: 3 << 10, AllBytes: 9 << 10})
			say.done()
			if out.String() != want {
				t.Errorf("%s: %q, want %q", output, &out, want)
			}
		}
	})
}
