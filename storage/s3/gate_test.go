package s3

import (
	"bytes"
	"context"
	"errors"
	"io/fs"
	"net"
	"net/http"
	"strings"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/opencontainers/go-digest"
)

var refused = func(*http.Request) (*http.Response, error) {
	return nil, &net.OpError{Op: "dial", Net: "tcp", Err: syscall.ECONNREFUSED}
}

// took is how long f takes.
func took(f func()) time.Duration {
	begun := time.Now()
	f()
	return time.Since(begun)
}

func TestF41OneWaitThenNone(t *testing.T) {
	credentials(t)
	m := &memory{}
	for name, row := range map[string]struct {
		fault func(*http.Request) (*http.Response, error)
		asks  int           // until the gate opens
		wait  time.Duration // for all of them
		says  string
	}{
		"down":       {refused, 1, 0, "connection refused"},
		"slow":       {hang, 1, 2 * time.Second, "no answer in time"},
		"throttling": {m.refuse(503, "SlowDown"), 3, 0, "503 SlowDown"},
		"forbidden":  {m.refuse(403, "AccessDenied"), 3, 0, "403 AccessDenied"},
		"missing":    {m.refuse(404, "NoSuchBucket"), 3, 0, "404 NoSuchBucket"},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				*m = memory{}
				b := m.connect(t)
				defer b.Close()
				ask := func() error {
					_, err := b.Tag(t.Context(), latest)
					return err
				}
				if err := ask(); !errors.Is(err, fs.ErrNotExist) {
					t.Fatal(err)
				}
				b.Forget(latest)
				m.set(func() { m.fault = row.fault })
				waited := took(func() {
					for range row.asks {
						if err := ask(); err == nil || errors.Is(err, ErrOut) {
							t.Error(err)
						}
					}
				})
				if waited != row.wait {
					t.Errorf("waited %v", waited)
				}
				since := time.Now()
				asked := m.count("", "")
				waited = took(func() {
					for range 100 {
						if err := ask(); !errors.Is(err, ErrOut) || !strings.Contains(err.Error(), row.says) || !strings.Contains(err.Error(), since.UTC().Format(time.RFC3339)) {
							t.Fatal(err)
						}
					}
				})
				if waited != 0 || m.count("", "") != asked {
					t.Errorf("waited %v, asked %d times", waited, m.count("", "")-asked)
				}
				if h := b.Health(); !h.Reads.Open || h.Writes.Open || h.Failures != uint64(row.asks) {
					t.Errorf("%+v", h)
				}
				time.Sleep(30 * time.Minute)
				probes := m.count("GET", versionName)
				if probes < 25 || probes > 45 { // 1, 2, 4 … 60 s
					t.Errorf("%d probes in half an hour", probes)
				}
				m.set(func() { m.fault = nil })
				time.Sleep(73 * time.Second)
				if err := ask(); !errors.Is(err, fs.ErrNotExist) {
					t.Errorf("after its end: %v", err)
				}
			})
		})
	}
}

// What was asked before the gate opened says nothing of the bucket after it has closed again.
func TestLateFailuresDoNotCount(t *testing.T) {
	credentials(t)
	synctest.Test(t, func(t *testing.T) {
		m := &memory{}
		b := m.connect(t)
		defer b.Close()
		slow, down := latest, latest
		slow.Tag, down.Tag = "slow", "down"
		m.set(func() {
			m.fault = func(r *http.Request) (*http.Response, error) {
				switch {
				case strings.HasSuffix(r.URL.Path, "slow"):
					return hang(r)
				case strings.HasSuffix(r.URL.Path, "down"):
					return refused(r)
				}
				return nil, nil
			}
		})
		go func() { _, _ = b.Tag(t.Context(), slow) }()
		time.Sleep(100 * time.Millisecond)
		if _, err := b.Tag(t.Context(), down); err == nil || !b.Health().Reads.Open {
			t.Error(err)
		}
		time.Sleep(headerLimit - 200*time.Millisecond)
		if h := b.Health(); h.Reads.Open {
			t.Errorf("not closed yet: %+v", h)
		}
		time.Sleep(time.Second)
		if h := b.Health(); h.Reads.Open || h.Failures != 2 {
			t.Errorf("%+v", h)
		}
	})
}

// A bucket that answers probes and nothing else costs less and less.
func TestF41SickButForProbes(t *testing.T) {
	credentials(t)
	synctest.Test(t, func(t *testing.T) {
		m := &memory{fault: func(r *http.Request) (*http.Response, error) {
			if strings.HasSuffix(r.URL.Path, versionName) {
				return nil, nil
			}
			return hang(r)
		}}
		b := m.connect(t)
		defer b.Close()
		var waited time.Duration
		for range 60 * 10 {
			waited += took(func() { _, _ = b.Tag(t.Context(), latest) })
			time.Sleep(time.Second)
		}
		if waited > 40*time.Second {
			t.Errorf("%v of ten minutes were spent waiting", waited)
		}
	})
}

func TestReadsGoOnWithoutWrites(t *testing.T) {
	credentials(t)
	m := &memory{}
	for name, refuse := range map[string]func(*http.Request) (*http.Response, error){
		"full": m.refuse(507, "XMinioStorageFull"), "forbidden": m.refuse(403, "AccessDenied"), "slow": hang,
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				*m = memory{}
				b := m.connect(t)
				defer b.Close()
				m.set(func() {
					m.fault = func(r *http.Request) (*http.Response, error) {
						if r.Method == http.MethodPut {
							return refuse(r)
						}
						return nil, nil
					}
				})
				put := func() error {
					_, err := b.PutTag(t.Context(), latest, Tag{Digest: someDigest, ValidatedAt: time.Now()})
					return err
				}
				for range failuresToOpen {
					if err := put(); err == nil {
						t.Fatal("it was written")
					}
				}
				asked := m.count("", "")
				if err := put(); !errors.Is(err, ErrOut) || m.count("", "") != asked {
					t.Errorf("%v after %d requests", err, m.count("", "")-asked)
				}
				if _, err := b.Tag(t.Context(), latest); !errors.Is(err, fs.ErrNotExist) {
					t.Error(err)
				}
				if _, err := b.Lease(t.Context(), "x"); !errors.Is(err, ErrOut) {
					t.Error(err)
				}
				m.set(func() { m.fault = nil })
				time.Sleep(10 * time.Second)
				if err := put(); err != nil {
					t.Errorf("after its end: %v", err)
				}
			})
		})
	}
}

// What the caller does says nothing of the bucket.
func TestCallersLeavingIsNoFailure(t *testing.T) {
	credentials(t)
	synctest.Test(t, func(t *testing.T) {
		m := &memory{fault: hang}
		b := m.connect(t)
		defer b.Close()
		for range 10 {
			ctx, cancel := context.WithTimeout(t.Context(), time.Second)
			_, err := b.Content(ctx, app, someDigest, PublicFirst)
			cancel()
			if !errors.Is(err, context.DeadlineExceeded) {
				t.Fatal(err)
			}
		}
		if h := b.Health(); h.Reads.Open || h.Failures != 0 {
			t.Errorf("%+v", h)
		}
	})
}

// A flood of requests that wait for a bucket that hangs ends after 2 s for all of them, and those that
// find no slot are not the bucket's fault.
func TestTooManyReads(t *testing.T) {
	credentials(t)
	synctest.Test(t, func(t *testing.T) {
		m := &memory{fault: hang}
		b := m.connect(t)
		defer b.Close()
		done := make(chan error, 2*maxReads)
		waited := took(func() {
			for range cap(done) {
				go func() {
					_, err := b.Content(t.Context(), app, someDigest, PublicFirst)
					done <- err
				}()
			}
			for range cap(done) {
				if err := <-done; err == nil {
					t.Error("an answer")
				}
			}
		})
		if waited != headerLimit {
			t.Errorf("waited %v", waited)
		}
		if h := b.Health(); h.Failures != maxReads {
			t.Errorf("%+v", h)
		}
	})
}

// What had to wait for others' requests has less than its time left: if that is not enough, the bucket is not out.
func TestQueueIsNotTheBuckets(t *testing.T) {
	credentials(t)
	synctest.Test(t, func(t *testing.T) {
		m := &memory{fault: func(r *http.Request) (*http.Response, error) {
			select {
			case <-time.After(300 * time.Millisecond):
				return nil, nil
			case <-r.Context().Done():
				return nil, r.Context().Err()
			}
		}}
		b := m.connect(t)
		defer b.Close()
		for range maxReads {
			p, err := b.reads.enter(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			time.AfterFunc(headerLimit-200*time.Millisecond, p.leave)
		}
		if _, err := b.Content(t.Context(), app, someDigest, PublicFirst); !errors.Is(err, errSlow) {
			t.Errorf("%v", err)
		}
		if h := b.Health(); h.Reads.Open || h.Failures > 0 {
			t.Errorf("a bucket that answers in 300 ms is out: %+v", h)
		}
	})
}

// Downloads take no turns from records and manifests, and wait for one another as long as it takes.
func TestDownloadsLeaveRecordsAlone(t *testing.T) {
	credentials(t)
	synctest.Test(t, func(t *testing.T) {
		m := &memory{objects: map[string]stored{}}
		b := m.connect(t)
		defer b.Close()
		raw := []byte("a blob")
		dgst := digest.FromBytes(raw)
		if err := b.PutBlob(t.Context(), dgst, int64(len(raw)), bytes.NewReader(raw)); err != nil {
			t.Fatal(err)
		}
		var open []*Body
		for range maxBodies {
			body, err := b.Blob(t.Context(), dgst, 0)
			if err != nil {
				t.Fatal(err)
			}
			open = append(open, body)
		}
		waited := took(func() {
			if _, err := b.Content(t.Context(), app, dgst, PublicFirst); !errors.Is(err, fs.ErrNotExist) {
				t.Error(err)
			}
			body, err := b.Manifest(t.Context(), dgst)
			if err != nil {
				t.Fatal(err)
			}
			_ = body.Close()
		})
		if waited > 0 {
			t.Errorf("a record and a manifest waited %v for downloads", waited)
		}
		time.AfterFunc(time.Minute, func() { _ = open[0].Close() })
		waited = took(func() {
			body, err := b.Blob(t.Context(), dgst, 0)
			if err != nil {
				t.Fatal(err)
			}
			open = append(open, body)
		})
		if waited != time.Minute {
			t.Errorf("a download waited %v for its turn", waited)
		}
		for _, body := range open[1:] {
			_ = body.Close()
		}
	})
}

func TestClock(t *testing.T) {
	var c clock
	at := time.Date(2026, 7, 26, 12, 0, 0, 0, time.UTC)
	if _, known := c.offset(); known {
		t.Error("known before the first answer")
	}
	// The bucket is 10.25 s ahead; its Date has whole seconds.
	ahead := 10*time.Second + 250*time.Millisecond
	for i := range 50 {
		sent := at.Add(time.Duration(i) * 1037 * time.Millisecond)
		received := sent.Add(40 * time.Millisecond)
		c.observe(sent, received, sent.Add(20*time.Millisecond).Add(ahead).Truncate(time.Second))
		by, known := c.offset()
		if limit := 1050 * time.Millisecond; !known || (by-ahead).Abs() > limit {
			t.Fatalf("after %d answers: %v, %v", i+1, by, known)
		}
	}
	if by, _ := c.offset(); (by - ahead).Abs() > 550*time.Millisecond { // its Date might have been a second older
		t.Errorf("no better after 50 answers: %v", by)
	}
	var same clock
	for i := range 50 { // a clock that may be right is, also if the server renews its Date once a second
		sent := at.Add(time.Duration(i) * 1037 * time.Millisecond)
		same.observe(sent, sent.Add(40*time.Millisecond), sent.Add(-time.Duration(i)*19*time.Millisecond).Truncate(time.Second))
		if by, _ := same.offset(); by != 0 {
			t.Fatalf("after %d answers: %v", i+1, by)
		}
	}
	c.observe(at, at.Add(time.Second), at.Add(-time.Hour)) // somebody has set a clock
	if by, _ := c.offset(); (by+time.Hour).Abs() > time.Second || !c.wrong() {
		t.Errorf("after a clock was set: %v", by)
	}
	c.observe(at.Add(time.Minute), at, at) // set between request and answer
	if by, _ := c.offset(); (by + time.Hour).Abs() > time.Second {
		t.Errorf("an answer ahead of its request counts: %v", by)
	}
}
