package storage

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"
)

// If the store cannot be looked through, that is tried again: something has to be able to go.
func TestLooksThroughTheStoreAgain(t *testing.T) {
	for name, fail := range map[string]func() error{
		"error": func() error { return syscall.EIO },
		"panic": func() error { panic("scripted") },
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				dir := t.TempDir()
				d, err := Open(Config{Dir: dir})
				if err != nil {
					t.Fatal(err)
				}
				raw, _ := content(1000)
				layers(t, d, app, "latest", raw)
				if err := d.Close(); err != nil {
					t.Fatal(err)
				}
				var failed atomic.Int64
				fault := func(c, name string) error {
					if c == string(callOpen) && strings.HasSuffix(name, "_manifests") && failed.Add(1) <= 2 {
						return fail()
					}
					return nil
				}
				if d, err = Open(Config{Dir: dir, Fault: fault}); err != nil {
					t.Fatal(err)
				}
				time.Sleep(90 * time.Second)
				synctest.Wait()
				if failed.Load() != 2 || d.Usage().Built || d.evict(1, "test") != 0 {
					t.Errorf("failed %d times; %+v", failed.Load(), d.Usage())
				}
				time.Sleep(time.Minute)
				synctest.Wait()
				if u := d.Usage(); failed.Load() != 3 || !u.Built || u.Images != 1 || u.Complete != 1 || u.Contents != 2 || u.Bytes != onDisk(t, d) {
					t.Errorf("failed %d times; %+v", failed.Load(), u)
				}
				if err := d.Close(); err != nil {
					t.Error(err)
				}
			})
		})
	}
}

// A start waits for nothing: hits are right while the store is looked through, nothing is evicted before that
// is done, and files that it has not written are left alone.
func TestF62ColdBoot(t *testing.T) {
	const files = 10_000
	dir := t.TempDir()
	d := bounded(t, dir, 1<<30)
	raw, dgst := content(100_000)
	p := layers(t, d, app, "latest", raw)
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	blobs := filepath.Join(dir, "blobs", "sha256")
	for n := range uint64(files) {
		var seed [8]byte
		binary.BigEndian.PutUint64(seed[:], n)
		sum := sha256.Sum256(seed[:])
		if err := os.WriteFile(filepath.Join(blobs, hex.EncodeToString(sum[:])), nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	foreign := filepath.Join(blobs, "README")
	if err := os.WriteFile(foreign, []byte("mine"), 0o600); err != nil {
		t.Fatal(err)
	}
	proceed := make(chan struct{})
	looking := func(call, name string) error {
		if call == string(callList) && name == "." {
			<-proceed // until the hits were had
		}
		return nil
	}
	begun := time.Now()
	d, err := Open(Config{Dir: dir, Capacity: 1 << 30, Fault: looking})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = d.Close() }()
	took := time.Since(begun)
	b, err := d.Blob(app, dgst)
	if err != nil {
		t.Fatal(err)
	}
	if got, err := io.ReadAll(b); err != nil || !bytes.Equal(got, raw) {
		t.Errorf("%d bytes, %v", len(got), err)
	}
	_ = b.Close()
	if m, err := d.Manifest(app, p.m.Digest); err != nil || !bytes.Equal(m.Raw, p.m.Raw) {
		t.Error(err)
	}
	if d.Usage().Built || d.evict(1, "test") != 0 {
		t.Error("something could be evicted before it was known what there is")
	}
	close(proceed)
	built(t, d)
	u := d.Usage()
	t.Logf("F62: open after %v; looked through after %v", took, time.Since(begun))
	if u.Contents != files+2 || u.Images != 1 || u.Complete != 1 || u.Bytes != onDisk(t, d)-recordSpace-4096 {
		t.Errorf("%+v, on the disk are %d bytes", u, onDisk(t, d))
	}
	d.evict(1<<40, "test")
	if left, err := os.ReadFile(foreign); err != nil || string(left) != "mine" {
		t.Errorf("a file that is not ours: %q, %v", left, err)
	}
	if _, err := os.Stat(filepath.Join(blobs, dgst.Encoded())); !errors.Is(err, os.ErrNotExist) {
		t.Error(err)
	}
}
