package storage

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"os"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"

	"github.com/opencontainers/go-digest"
)

func begin(t testing.TB, d *Disk, dgst digest.Digest, size int64) *Ingest {
	t.Helper()
	in, err := d.Ingest(app, dgst, size)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { in.Abort(errors.New("end of the test")) })
	return in
}

func write(t testing.TB, in *Ingest, p []byte) {
	t.Helper()
	if n, err := in.Write(p); err != nil || n != len(p) {
		t.Fatal(n, err)
	}
}

func reader(t testing.TB, in *Ingest) *Blob {
	t.Helper()
	b, err := in.Open(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = b.Close() })
	return b
}

func commit(in *Ingest, c Confirmation) error {
	if err := in.Verify(); err != nil {
		return err
	}
	return in.Commit(c)
}

func wantEmpty(t *testing.T, d *Disk, folder string) {
	t.Helper()
	names, err := fs.Glob(d.root.root.FS(), folder+"/*")
	if err != nil || len(names) > 0 {
		t.Errorf("%s holds %v, %v", folder, names, err)
	}
}

func TestWatermark(t *testing.T) {
	const held = Withheld
	d := open(t, t.TempDir())
	for _, test := range []struct{ size, announced, written, want int }{
		{3 * held, 3 * held, held, held},
		{3 * held, 3 * held, 2 * held, 2 * held},
		{3 * held, 3 * held, 2*held + 1, 2 * held},
		{3 * held, 3 * held, 3 * held, 2 * held},
		{100, 100, 100, 0},
		{0, 0, 0, 0},
		{3 * held, -1, held, 0},
		{3 * held, -1, 2*held + 5, held + 5},
		{3 * held, -1, 3 * held, 2 * held},
	} {
		t.Run(fmt.Sprint(test), func(t *testing.T) {
			raw, dgst := content(test.size)
			in := begin(t, d, dgst, int64(test.announced))
			write(t, in, raw[:test.written])
			b := reader(t, in)
			if got := in.Released(); got != int64(test.want) {
				t.Errorf("%d bytes are readable, want %d", got, test.want)
			}
			if b.Size() != int64(test.announced) || in.Written() != int64(test.written) {
				t.Errorf("size %d, written %d", b.Size(), in.Written())
			}
			if _, err := b.Seek(0, io.SeekEnd); (err != nil) != (test.announced < 0) {
				t.Error(err)
			}
			_, _ = b.Seek(0, io.SeekStart)
			write(t, in, raw[test.written:])
			if err := commit(in, anonymous); err != nil {
				t.Fatal(err)
			}
			if got, err := io.ReadAll(b); err != nil || !bytes.Equal(got, raw) || b.Size() != int64(test.size) {
				t.Errorf("%d bytes, %v", len(got), err)
			}
			wantBlob(t, d, app, raw)
			wantBlob(t, d, other, raw)
			late := reader(t, in)
			if got, err := io.ReadAll(late); err != nil || !bytes.Equal(got, raw) {
				t.Errorf("opened after the commit: %d bytes, %v", len(got), err)
			}
		})
	}
	wantEmpty(t, d, "tmp")
}

func TestF22WrongContentIsNeitherReleasedNorStored(t *testing.T) {
	raw, dgst := content(4 * Withheld)
	flipped := bytes.Clone(raw)
	flipped[len(raw)-1] ^= 1
	for name, test := range map[string]struct {
		announced int64
		sent      []byte
	}{
		"flipped bit":          {int64(len(raw)), flipped},
		"short":                {int64(len(raw)), raw[:len(raw)-1]},
		"long":                 {int64(len(raw)), append(bytes.Clone(raw), 0)},
		"other size":           {int64(len(raw)) + 1, raw},
		"nothing":              {int64(len(raw)), nil},
		"unknown size, wrong":  {-1, flipped},
		"unknown size, short":  {-1, raw[:3*Withheld]},
		"unknown size, none":   {-1, nil},
		"smaller than the end": {100, flipped[:100]},
	} {
		t.Run(name, func(t *testing.T) {
			d := open(t, t.TempDir())
			in := begin(t, d, dgst, test.announced)
			b := reader(t, in)
			var err error
			for p := range bytesIn(test.sent, 10_000) {
				if _, err = in.Write(p); err != nil {
					break
				}
			}
			if err == nil {
				err = commit(in, anonymous)
			} else {
				in.Abort(err)
			}
			if !errors.Is(err, ErrMismatch) {
				t.Fatalf("%v, want ErrMismatch", err)
			}
			got, rerr := io.ReadAll(b)
			if !errors.Is(rerr, ErrMismatch) || len(got) > max(len(raw), int(test.announced))-Withheld {
				t.Errorf("the reader got %d bytes and %v", len(got), rerr)
			}
			if _, err := in.Open(t.Context()); !errors.Is(err, ErrMismatch) {
				t.Errorf("opened afterwards: %v", err)
			}
			wantAbsent(t, d, app, dgst)
			if d.holds(dgst) {
				t.Error("it is stored")
			}
			wantEmpty(t, d, "tmp")
			wantEmpty(t, d, "records/_public")
		})
	}
}

// bytesIn cuts p into pieces.
func bytesIn(p []byte, size int) func(func([]byte) bool) {
	return func(yield func([]byte) bool) {
		for len(p) > 0 {
			n := min(size, len(p))
			if !yield(p[:n]) {
				return
			}
			p = p[n:]
		}
	}
}

func TestReaderWaitsAndEndsAlone(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := open(t, t.TempDir())
		raw, dgst := content(3 * Withheld)
		in := begin(t, d, dgst, int64(len(raw)))
		left := errors.New("the client has left")
		ctx, leave := context.WithCancelCause(t.Context())
		results := make(chan error, 2)
		read := func(ctx context.Context, want []byte, wantErr error) {
			b, err := in.Open(ctx)
			if err != nil {
				results <- err
				return
			}
			defer b.Close()
			got, err := io.ReadAll(b)
			if errors.Is(err, wantErr) && bytes.Equal(got, want) {
				results <- nil
				return
			}
			results <- fmt.Errorf("%d bytes of %d, %w", len(got), len(want), err)
		}
		write(t, in, raw[:1000])
		go read(ctx, raw[:1000], left)
		go read(t.Context(), raw, nil)
		synctest.Wait() // both have read 1000 bytes and wait
		if len(results) > 0 {
			t.Fatal(<-results)
		}
		leave(left)
		if err := <-results; err != nil {
			t.Fatal(err)
		}
		early := make(chan error)
		b := reader(t, in)
		go func() {
			_, err := io.ReadFull(b, make([]byte, 2*Withheld))
			early <- err
		}()
		synctest.Wait()
		write(t, in, raw[1000:])
		if err := <-early; err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		if len(results) > 0 {
			t.Fatal("the end was released before it was verified", <-results)
		}
		if err := commit(in, anonymous); err != nil {
			t.Fatal(err)
		}
		if err := <-results; err != nil {
			t.Fatal(err)
		}
		if err := d.Close(); err != nil {
			t.Fatal(err)
		}
	})
}

func TestAbortWakesAllReaders(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := open(t, t.TempDir())
		raw, dgst := content(3 * Withheld)
		in := begin(t, d, dgst, int64(len(raw)))
		write(t, in, raw[:1000])
		gone := errors.New("no source is left")
		results := make(chan error)
		for range 8 {
			go func() {
				b, err := in.Open(t.Context())
				if err == nil {
					defer b.Close()
					_, err = io.ReadAll(b)
				}
				results <- err
			}()
		}
		synctest.Wait()
		in.Abort(gone)
		in.Abort(errors.New("a second reason"))
		for range 8 {
			if err := <-results; !errors.Is(err, gone) {
				t.Error(err)
			}
		}
		if _, err := in.Write(raw[:1]); err == nil {
			t.Error("written after the abort")
		}
		if err := commit(in, anonymous); !errors.Is(err, gone) && err == nil {
			t.Error("committed after the abort")
		}
		wantEmpty(t, d, "tmp")
		if err := d.Close(); err != nil {
			t.Fatal(err)
		}
	})
}

// Readers jump about in a blob while it grows, by Read and by what sendfile would take.
func TestManyReadersAtAnyOffset(t *testing.T) {
	d := open(t, t.TempDir())
	raw, dgst := content(8 << 20)
	for _, announced := range []int64{int64(len(raw)), -1} {
		in := begin(t, d, dgst, announced)
		var readers sync.WaitGroup
		for seed := range uint64(32) {
			b := reader(t, in)
			readers.Go(func() {
				random := rand.New(rand.NewPCG(seed, 0))
				p := make([]byte, 100_000)
				for range 20 {
					offset := random.Int64N(int64(len(raw)))
					if _, err := b.Seek(offset, io.SeekStart); err != nil {
						t.Error(err)
						return
					}
					n, err := b.Read(p)
					if seed%2 == 0 {
						var file *os.File
						var most int64
						if file, most, err = b.Await(int64(len(p))); errors.Is(err, io.EOF) {
							continue
						}
						if err == nil {
							offset += int64(n)
							n, err = io.ReadFull(file, p[:most])
						}
					}
					if err != nil || n == 0 || !bytes.Equal(p[:n], raw[offset:offset+int64(n)]) {
						t.Errorf("%d bytes at %d: %v", n, offset, err)
						return
					}
				}
			})
		}
		for p := range bytesIn(raw, 32<<10) {
			write(t, in, p)
		}
		if err := commit(in, anonymous); err != nil {
			t.Error(err)
		}
		readers.Wait()
	}
}

// The kernel, given the file of an ingest, would send what is not verified yet.
func TestBlobHidesItsFile(t *testing.T) {
	var b any = new(Blob)
	if _, ok := b.(syscall.Conn); ok {
		t.Error("a Blob shows SyscallConn")
	}
	if _, ok := b.(io.WriterTo); ok {
		t.Error("a Blob writes itself, past its watermark")
	}
	if _, ok := b.(io.ReaderAt); ok {
		t.Error("a Blob can be read anywhere")
	}
}

func TestServeContentFromAnIngest(t *testing.T) {
	d := open(t, t.TempDir())
	raw, dgst := content(5 * Withheld)
	in := begin(t, d, dgst, int64(len(raw)))
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		b, err := in.Open(r.Context())
		if err != nil {
			t.Error(err)
			return
		}
		defer b.Close()
		w.Header().Set("Content-Type", "application/octet-stream")
		http.ServeContent(w, r, "", anonymous.At, b)
	}))
	defer srv.Close()
	defer srv.Client().CloseIdleConnections()
	write(t, in, raw[:Withheld])
	bodies := make(chan []byte, 3)
	for _, span := range []string{"", "bytes=1000-70000", "bytes=-70000"} {
		go func() {
			r, _ := http.NewRequestWithContext(t.Context(), http.MethodGet, srv.URL, nil)
			r.Header.Set("Range", span)
			if span == "" {
				r.Header.Del("Range")
			}
			resp, err := srv.Client().Do(r)
			if err != nil {
				t.Error(err)
				bodies <- nil
				return
			}
			defer resp.Body.Close()
			body, err := io.ReadAll(resp.Body)
			if err != nil {
				t.Error(err)
			}
			bodies <- body
		}()
	}
	for p := range bytesIn(raw[Withheld:], 10_000) {
		write(t, in, p)
	}
	if err := commit(in, anonymous); err != nil {
		t.Fatal(err)
	}
	for range 3 {
		body := <-bodies
		if !bytes.Equal(body, raw) && !bytes.Equal(body, raw[1000:70001]) && !bytes.Equal(body, raw[len(raw)-70000:]) {
			t.Errorf("%d bytes", len(body))
		}
	}
}

func TestReservation(t *testing.T) {
	dir := t.TempDir()
	d, err := Open(Config{Dir: dir, Capacity: 10_000})
	if err != nil {
		t.Fatal(err)
	}
	defer func(d *Disk) { _ = d.Close() }(d)
	raw, dgst := content(10_001)
	if _, err := d.Ingest(app, dgst, int64(len(raw))); !errors.Is(err, ErrTooLarge) {
		t.Errorf("over the capacity: %v", err)
	}
	in := begin(t, d, dgst, -1) // F75: it may never end
	write(t, in, raw[:1000])
	if _, err := in.Write(raw[:1]); !errors.Is(err, ErrTooLarge) {
		t.Errorf("over a tenth of the capacity: %v", err)
	}
	in.Abort(ErrTooLarge)
	d = bounded(t, t.TempDir(), 1<<50)
	if _, err := d.Ingest(app, dgst, 8<<40); err != nil && !errors.Is(err, syscall.ENOSPC) {
		t.Errorf("over the disk: %v", err)
	}
	wantEmpty(t, d, "tmp")
}
