package s3

import (
	"bytes"
	"context"
	"errors"
	"io"
	"io/fs"
	"net/http"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"breakwater/pkg/buckettest"
	"breakwater/pkg/registrytest"

	"github.com/opencontainers/go-digest"
)

// The same as TestF41OneWaitThenNone, on sockets.
func TestF41RealBucketIsOut(t *testing.T) {
	server := buckettest.Start(t)
	raw := noise(100_000, 1)
	dgst := digest.FromBytes(raw)
	if err := open(t, server).PutBlob(t.Context(), dgst, int64(len(raw)), bytes.NewReader(raw)); err != nil {
		t.Fatal(err)
	}
	for name, row := range map[string]struct {
		begin, end func()
		asks       int
		wait       time.Duration
	}{
		"down":     {server.Down, server.Up, 1, 0},
		"slow":     {func() { server.Fault(buckettest.All, registrytest.Delay(10*time.Second)) }, server.Heal, 1, headerLimit},
		"SlowDown": {func() { server.Fault(buckettest.All, buckettest.SlowDown()) }, server.Heal, 3, 0},
	} {
		t.Run(name, func(t *testing.T) {
			b := open(t, server)
			if _, err := readBlob(t.Context(), b, dgst, 0); err != nil {
				t.Fatal(err)
			}
			row.begin()
			defer row.end()
			waited := took(func() {
				for range row.asks {
					if _, err := b.Blob(t.Context(), dgst, 0); err == nil || errors.Is(err, ErrOut) {
						t.Error(err)
					}
				}
			})
			if waited < row.wait || waited > row.wait+time.Second {
				t.Errorf("waited %v", waited)
			}
			waited = took(func() {
				for range 1000 {
					if _, err := b.Blob(t.Context(), dgst, 0); !errors.Is(err, ErrOut) {
						t.Fatal(err)
					}
				}
			})
			if waited > 500*time.Millisecond {
				t.Errorf("waited %v more", waited)
			}
			row.end()
			within(t, func() bool {
				got, err := readBlob(t.Context(), b, dgst, 0)
				return err == nil && bytes.Equal(got, raw)
			})
		})
	}
}

func TestBodiesThatBreak(t *testing.T) {
	server := buckettest.Start(t)
	raw, other := noise(firstRange+3*rangeSize, 1), noise(firstRange+3*rangeSize, 2)
	dgst, otherDgst := digest.FromBytes(raw), digest.FromBytes(other)
	server.Put(prefix+blobName(dgst), raw)
	server.Put(prefix+blobName(otherDgst), other)
	first := registrytest.Match{Func: func(r *http.Request) bool { return strings.HasPrefix(r.Header.Get("Range"), "bytes=0-") }}
	later := registrytest.Match{Func: func(r *http.Request) bool {
		return r.Header.Get("Range") != "" && !strings.HasPrefix(r.Header.Get("Range"), "bytes=0-")
	}}
	for name, row := range map[string]struct {
		match  registrytest.Match
		fault  registrytest.Fault
		want   error
		blamed uint64
	}{
		"cut":             {first, registrytest.Truncate(5 << 20), io.ErrUnexpectedEOF, 1},
		"cut later":       {later, registrytest.Truncate(5 << 20), io.ErrUnexpectedEOF, 1},
		"stalls":          {first, registrytest.Stall(5 << 20), errStalled, 1},
		"stalls later":    {later, registrytest.Stall(5 << 20), errStalled, 1},
		"hangs later":     {later, registrytest.Hang(), errSlow, 1},
		"swapped":         {later, server.Swap(prefix + blobName(otherDgst)), errChanged, 0},
		"range of others": {later, registrytest.Header("Content-Range", "bytes 5-8388612/33554432"), nil, 1},
	} {
		t.Run(name, func(t *testing.T) {
			b := open(t, server)
			defer server.Fault(row.match, row.fault)()
			body, err := b.Blob(t.Context(), dgst, 0)
			if err != nil {
				t.Fatal(err)
			}
			defer body.Close()
			got, err := io.ReadAll(body)
			if err == nil || row.want != nil && !errors.Is(err, row.want) || !bytes.HasPrefix(raw, got) {
				t.Errorf("%d bytes, %v", len(got), err)
			}
			if _, again := body.Read(make([]byte, 1)); !errors.Is(again, err) {
				t.Errorf("%v, and then %v", err, again)
			}
			if n := b.Health().Failures; n != row.blamed {
				t.Errorf("%d failures", n)
			}
		})
	}
}

// A bucket whose headers come and whose bodies stall is out as well.
func TestStallingBodiesOpenTheGate(t *testing.T) {
	server := buckettest.Start(t)
	raw := noise(proven+1, 1)
	dgst := digest.FromBytes(raw)
	server.Put(prefix+blobName(dgst), raw)
	server.Fault(buckettest.Blobs, registrytest.Truncate(1000))
	b := open(t, server)
	for range failuresToOpen {
		if _, err := readBlob(t.Context(), b, dgst, 0); !errors.Is(err, io.ErrUnexpectedEOF) {
			t.Error(err)
		}
	}
	if _, err := readBlob(t.Context(), b, dgst, 0); !errors.Is(err, ErrOut) {
		t.Error(err)
	}
}

// The object is replaced, by a copy of itself even, while its ranges are read: no range of the new one
// is given out as one of the old one's.
func TestReplacedWhileRead(t *testing.T) {
	server := buckettest.Start(t)
	b := open(t, server)
	raw, other := noise(firstRange+5*rangeSize, 1), noise(firstRange+5*rangeSize, 2)
	dgst := digest.FromBytes(raw)
	server.Put(prefix+blobName(dgst), raw)
	body, err := b.Blob(t.Context(), dgst, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer body.Close()
	half := make([]byte, firstRange/2)
	if _, err := io.ReadFull(body, half); err != nil {
		t.Fatal(err)
	}
	server.Put(prefix+blobName(dgst), other)
	rest, err := io.ReadAll(body)
	if !errors.Is(err, errChanged) || !bytes.HasPrefix(raw, append(half, rest...)) {
		t.Errorf("%d bytes, %v", len(rest), err)
	}
}

// Ranges are fetched at the same time, in bounded memory, also for many readers at once.
func TestRangesAreParallel(t *testing.T) {
	server := buckettest.Start(t)
	raw := noise(firstRange+8*rangeSize, 1)
	dgst := digest.FromBytes(raw)
	server.Put(prefix+blobName(dgst), raw)
	b := open(t, server)
	var mu sync.Mutex // guards now, most
	now, most := 0, 0
	server.Fault(buckettest.Blobs, func(w http.ResponseWriter, r *http.Request, next http.Handler) {
		mu.Lock()
		now++
		most = max(most, now)
		mu.Unlock()
		defer func() {
			mu.Lock()
			defer mu.Unlock()
			now--
		}()
		next.ServeHTTP(w, r)
	})
	body, err := b.Blob(t.Context(), dgst, 0)
	if err != nil {
		t.Fatal(err)
	}
	within(t, func() bool { return server.Count(buckettest.Blobs) == 1+rangesAhead }) // though nobody reads
	if got, err := io.ReadAll(body); err != nil || !bytes.Equal(got, raw) {
		t.Errorf("%d bytes, %v", len(got), err)
	}
	body.Close()
	if most > 1+rangesAhead {
		t.Errorf("%d at a time", most)
	}
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	var bodies []*Body
	for range 20 {
		body, err := b.Blob(t.Context(), dgst, 0)
		if err != nil {
			t.Fatal(err)
		}
		bodies = append(bodies, body)
	}
	within(t, func() bool { return len(b.chunks.slots) == readAhead })
	runtime.ReadMemStats(&after)
	if grown := int64(after.HeapInuse) - int64(before.HeapInuse); grown > (readAhead+4)*rangeSize {
		t.Errorf("%d readers take %d MiB", len(bodies), grown>>20)
	}
	for _, body := range bodies[:10] {
		body.Close()
	}
	var wg sync.WaitGroup
	for _, body := range bodies[10:] {
		wg.Go(func() {
			defer body.Close()
			hash := digest.SHA256.Digester()
			if n, err := io.Copy(hash.Hash(), body); err != nil || hash.Digest() != dgst {
				t.Errorf("%d bytes, %v", n, err)
			}
		})
	}
	wg.Wait()
	if n := len(b.chunks.slots); n != 0 {
		t.Errorf("%d ranges are still in memory", n)
	}
	if n := len(b.reads.slots); n != 0 {
		t.Errorf("%d slots are still taken", n)
	}
}

// Close does not wait for the bucket, nor for readers that have forgotten to close.
func TestCloseEndsAll(t *testing.T) {
	server := buckettest.Start(t)
	raw := noise(firstRange+5*rangeSize, 1)
	dgst := digest.FromBytes(raw)
	server.Put(prefix+blobName(dgst), raw)
	b := open(t, server)
	lease, err := b.Lease(t.Context(), "x")
	if err != nil {
		t.Fatal(err)
	}
	server.Fault(buckettest.All, registrytest.Stall(1000))
	body, err := b.Blob(t.Context(), dgst, 0)
	if err != nil {
		t.Fatal(err)
	}
	go func() { _, _ = b.Tag(context.Background(), latest) }()
	if waited := took(b.Close); waited > time.Second {
		t.Errorf("took %v", waited)
	}
	<-lease.Lost()
	if _, err := io.ReadAll(body); err == nil {
		t.Error("read to its end")
	}
	if _, err := b.Lease(t.Context(), "y"); err == nil {
		t.Error("a lease from a closed bucket")
	}
}

// A write is made again that the server has failed once, and its parts are aborted if it is in vain.
func TestWritesAreTriedAgain(t *testing.T) {
	server := buckettest.Start(t)
	for _, size := range []int{1000, maxSingle + 1000} {
		raw := noise(size, uint64(size))
		dgst := digest.FromBytes(raw)
		b := open(t, server)
		server.Fault(buckettest.Writes, registrytest.First(1, buckettest.SlowDown()))
		if err := b.PutBlob(t.Context(), dgst, int64(size), bytes.NewReader(raw)); err != nil {
			t.Error(err)
		}
		server.Heal()
		if got, err := readBlob(t.Context(), b, dgst, 0); err != nil || !bytes.Equal(got, raw) {
			t.Errorf("%d bytes, %v", len(got), err)
		}
	}
	raw := noise(maxSingle+1000, 9)
	b := open(t, server)
	parts := registrytest.Match{Func: func(r *http.Request) bool { return r.URL.Query().Get("partNumber") == "3" }}
	server.Fault(parts, buckettest.Full())
	if err := b.PutBlob(t.Context(), digest.FromBytes(raw), int64(len(raw)), bytes.NewReader(raw)); err == nil {
		t.Error("stored")
	}
	if n := server.Uploads(); n != 0 {
		t.Errorf("%d uploads are left", n)
	}
	if n := len(b.parts.slots); n != 0 {
		t.Errorf("%d parts are still in memory", n)
	}
}

// Two hosts that upload the same blob at once both succeed, and one object is there.
func TestUploadedTwiceAtOnce(t *testing.T) {
	server := buckettest.Start(t)
	raw := noise(maxSingle+partSize, 1)
	dgst := digest.FromBytes(raw)
	var wg sync.WaitGroup
	for range 3 {
		b := open(t, server)
		wg.Go(func() {
			if err := b.PutBlob(context.Background(), dgst, int64(len(raw)), bytes.NewReader(raw)); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if got := server.Get(prefix + blobName(dgst)); !bytes.Equal(got, raw) {
		t.Errorf("%d bytes", len(got))
	}
	if n := server.Uploads(); n != 0 {
		t.Errorf("%d uploads are left", n)
	}
}

// Without credentials the bucket is out, and says why. It looks for them again.
func TestF40WithoutCredentials(t *testing.T) {
	server := buckettest.Start(t)
	t.Setenv("AWS_ACCESS_KEY_ID", "")
	t.Setenv("AWS_SECRET_ACCESS_KEY", "")
	var b *Bucket
	if waited := took(func() { b = open(t, server) }); waited > 100*time.Millisecond {
		t.Errorf("New took %v", waited)
	}
	for range failuresToOpen {
		if _, err := b.Tag(t.Context(), latest); err == nil || errors.Is(err, ErrOut) {
			t.Error(err)
		}
	}
	if _, err := b.Tag(t.Context(), latest); !errors.Is(err, ErrOut) || !strings.Contains(err.Error(), "credentials") {
		t.Error(err)
	}
	t.Setenv("AWS_ACCESS_KEY_ID", buckettest.AccessKey)
	t.Setenv("AWS_SECRET_ACCESS_KEY", buckettest.SecretKey)
	within(t, func() bool { return !b.Health().Reads.Open })
}

// TestF40OtherNotFound: an answer that nothing is there counts only from a bucket, and of an object. Some
// servers tell an unknown account so, and what is no S3 server at all says it of everything.
func TestF40OtherNotFound(t *testing.T) {
	for name, text := range map[string]string{
		"account":   "<Error><Code>XAdminUserNotFound</Code><Message>No user exists with the provided access key ID.</Message></Error>",
		"no bucket": "<Error><Code>NoSuchBucket</Code><Message>The specified bucket does not exist</Message></Error>",
		"web page":  "<html><body><h1>Not Found</h1></body></html>",
		"nothing":   "",
	} {
		t.Run(name, func(t *testing.T) {
			server := buckettest.Start(t)
			b := open(t, server)
			server.Fault(buckettest.All, func(w http.ResponseWriter, _ *http.Request, _ http.Handler) {
				w.WriteHeader(http.StatusNotFound)
				_, _ = io.WriteString(w, text)
			})
			for range failuresToOpen {
				if _, err := b.Content(t.Context(), app, digest.FromString(name), PublicFirst); err == nil || errors.Is(err, fs.ErrNotExist) {
					t.Errorf("read: %v", err)
				}
				if _, err := b.Lease(t.Context(), name); err == nil || errors.Is(err, ErrHeld) {
					t.Errorf("lease: %v", err)
				}
			}
			if h := b.Health(); !h.Reads.Open || !h.Writes.Open {
				t.Errorf("reads are out: %t, writes: %t", h.Reads.Open, h.Writes.Open)
			}
		})
	}
}
