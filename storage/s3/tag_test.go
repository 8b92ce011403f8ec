package s3

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net/http"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"breakwater/pkg/buckettest"

	"github.com/opencontainers/go-digest"
	"pgregory.net/rapid"
)

func TestTagIsRemembered(t *testing.T) {
	credentials(t)
	synctest.Test(t, func(t *testing.T) {
		m := &memory{}
		b, other := m.connect(t), m.connect(t)
		defer b.Close()
		defer other.Close()
		ask := func(want digest.Digest) {
			t.Helper()
			got, err := b.Tag(t.Context(), latest)
			if want == "" && !errors.Is(err, fs.ErrNotExist) || want != "" && (err != nil || got.Digest != want) {
				t.Errorf("%+v, %v", got, err)
			}
		}
		put := func(b *Bucket, dgst digest.Digest) {
			t.Helper()
			if got, err := b.PutTag(t.Context(), latest, Tag{Digest: dgst, ValidatedAt: time.Now()}); err != nil || got.Digest != dgst {
				t.Fatalf("%+v, %v", got, err)
			}
		}
		ask("")
		put(other, someDigest)
		ask("") // absence is remembered too
		time.Sleep(tagMemorized)
		ask(someDigest)
		put(other, otherDigest)
		ask(someDigest)
		b.Forget(latest)
		ask(otherDigest)
		if n := m.count("GET", tagsFolder); n != 5 { // two of them by PutTag
			t.Errorf("%d questions", n)
		}
		time.Sleep(time.Second)
		put(b, someDigest)
		ask(someDigest) // its own is known at once
		if n := m.count("GET", tagsFolder); n != 6 {
			t.Errorf("%d questions", n)
		}
	})
}

func TestTagIsAskedOnce(t *testing.T) {
	credentials(t)
	synctest.Test(t, func(t *testing.T) {
		m := &memory{}
		b := m.connect(t)
		defer b.Close()
		if _, err := b.PutTag(t.Context(), latest, Tag{Digest: someDigest, ValidatedAt: time.Now()}); err != nil {
			t.Fatal(err)
		}
		b.Forget(latest)
		asked := m.count("GET", "")
		m.set(func() {
			m.fault = func(*http.Request) (*http.Response, error) {
				time.Sleep(time.Second)
				return nil, nil
			}
		})
		var wg sync.WaitGroup
		for i := range 100 {
			ctx, cancel := context.WithCancel(t.Context())
			wg.Go(func() {
				defer cancel()
				got, err := b.Tag(ctx, latest)
				if i == 0 {
					if !errors.Is(err, context.Canceled) {
						t.Error(err)
					}
				} else if err != nil || got.Digest != someDigest {
					t.Errorf("%+v, %v", got, err)
				}
			})
			if i == 0 {
				time.Sleep(time.Millisecond) // it is the first, who asks …
				cancel()                     // … and it leaves
			}
		}
		wg.Wait()
		if n := m.count("GET", "") - asked; n != 1 {
			t.Errorf("%d questions", n)
		}
	})
}

// A question that is older than a Forget is not the answer to what is asked after it.
func TestForgetDuringAQuestion(t *testing.T) {
	credentials(t)
	synctest.Test(t, func(t *testing.T) {
		m := &memory{}
		b, other := m.connect(t), m.connect(t)
		defer b.Close()
		defer other.Close()
		gate := make(chan struct{})
		m.set(func() {
			m.fault = func(r *http.Request) (*http.Response, error) {
				resp, _ := m.refuse(404, "NoSuchKey")(r) // what is true now
				<-gate
				return resp, nil
			}
		})
		first := make(chan error)
		go func() {
			_, err := b.Tag(t.Context(), latest)
			first <- err
		}()
		synctest.Wait()
		m.set(func() { m.fault = nil })
		if _, err := other.PutTag(t.Context(), latest, Tag{Digest: someDigest, ValidatedAt: time.Now()}); err != nil {
			t.Fatal(err)
		}
		b.Forget(latest)
		if got, err := b.Tag(t.Context(), latest); err != nil || got.Digest != someDigest {
			t.Errorf("%+v, %v", got, err)
		}
		close(gate)
		if err := <-first; err != nil && !errors.Is(err, fs.ErrNotExist) {
			t.Error(err)
		}
		if got, err := b.Tag(t.Context(), latest); err != nil || got.Digest != someDigest {
			t.Errorf("a late answer has overwritten a newer one: %+v, %v", got, err)
		}
		if n := b.Health().Ignored; n != 0 {
			t.Errorf("%d are taken for replays", n)
		}
	})
}

// held answers the next question with what is true now, but only when it is told to.
func (m *memory) held() (answer func()) {
	release := make(chan struct{})
	var once sync.Once
	m.set(func() {
		m.fault = func(r *http.Request) (resp *http.Response, err error) {
			once.Do(func() {
				m.set(func() { m.fault = nil })
				resp, err = m.RoundTrip(r)
				<-release
			})
			return resp, err
		}
	})
	return func() {
		close(release)
		synctest.Wait()
	}
}

// An answer that was overtaken by what this host has published is neither taken for what is published,
// nor for a replay.
func TestAnswerIsOvertaken(t *testing.T) {
	credentials(t)
	synctest.Test(t, func(t *testing.T) {
		m := &memory{}
		a, b := m.connect(t), m.connect(t)
		defer a.Close()
		defer b.Close()
		put := func(b *Bucket, dgst digest.Digest) {
			t.Helper()
			if _, err := b.PutTag(t.Context(), latest, Tag{Digest: dgst, ValidatedAt: time.Now()}); err != nil {
				t.Fatal(err)
			}
			time.Sleep(time.Second)
		}
		ask := func() { _, _ = b.Tag(context.Background(), latest) }
		put(a, someDigest)
		answer := m.held()
		go ask()
		synctest.Wait()
		put(b, otherDigest)
		answer()
		if got, err := b.Tag(t.Context(), latest); err != nil || got.Digest != otherDigest {
			t.Errorf("%+v, %v", got, err)
		}
		b.Forget(latest)
		answer = m.held()
		go ask()
		synctest.Wait()
		put(a, someDigest)
		b.Forget(latest)
		answer()
		if got, err := b.Tag(t.Context(), latest); err != nil || got.Digest != someDigest {
			t.Errorf("what was asked before it was forgotten: %+v, %v", got, err)
		}
		if n := b.Health().Ignored; n != 0 {
			t.Errorf("%d are taken for replays", n)
		}
	})
}

func TestUnchangedTagIsPublishedOnceAMinute(t *testing.T) {
	credentials(t)
	synctest.Test(t, func(t *testing.T) {
		m := &memory{}
		var hosts []*Bucket
		for range 5 {
			hosts = append(hosts, m.connect(t))
			defer hosts[len(hosts)-1].Close()
		}
		var last Tag
		for i := range 10 * 60 { // ten minutes, each second by another host
			got, err := hosts[i%len(hosts)].PutTag(t.Context(), latest, Tag{Digest: someDigest, ValidatedAt: time.Now(), Generation: last.Generation})
			if err != nil || got.Generation < last.Generation || time.Since(got.ValidatedAt) > tagInterval+2*time.Second {
				t.Fatalf("%d: %+v after %+v, %v", i, got, last, err)
			}
			last = got
			time.Sleep(time.Second)
		}
		if n := m.count("PUT", tagsFolder); n < 9 || n > 11 {
			t.Errorf("published %d times", n)
		}
		// What was published long after it was validated is renewed a minute after that was.
		validated := time.Now().Add(time.Minute)
		time.Sleep(time.Minute + 20*time.Second)
		for _, at := range []time.Time{validated, validated.Add(time.Minute)} {
			time.Sleep(time.Until(at))
			got, err := hosts[0].PutTag(t.Context(), latest, Tag{Digest: someDigest, ValidatedAt: at})
			if err != nil || got.ValidatedAt.Sub(at).Abs() > clockSlip {
				t.Fatalf("validated at %s, and published is %+v, %v", at, got, err)
			}
			last = got
		}
		// Another digest does not wait, and what was validated earlier does not come back.
		got, err := hosts[0].PutTag(t.Context(), latest, Tag{Digest: otherDigest, ValidatedAt: time.Now()})
		if err != nil || got.Digest != otherDigest || got.Generation != last.Generation+1 {
			t.Errorf("%+v, %v", got, err)
		}
		got, err = hosts[1].PutTag(t.Context(), latest, Tag{Digest: someDigest, ValidatedAt: time.Now().Add(-10 * time.Second)})
		if err != nil || got.Digest != otherDigest {
			t.Errorf("%+v, %v", got, err)
		}
	})
}

// Twenty hosts publish a history of a tag at once, each a part of it, in any order, on a real server.
// Whoever watches sees generations and validations that only grow.
func TestPublishersNeverGoBack(t *testing.T) {
	server := buckettest.Start(t)
	const publishers = 20
	var hosts []*Bucket
	for range publishers {
		hosts = append(hosts, open(t, server))
	}
	watcher := open(t, server)
	round := 0
	rapid.Check(t, func(t *rapid.T) {
		round++
		ref := latest
		ref.Tag = fmt.Sprint("round-", round)
		base := time.Now().Add(-time.Hour)
		history := rapid.SliceOfN(rapid.IntRange(0, 100), publishers, 2*publishers).Draw(t, "seconds")
		var wg sync.WaitGroup
		publishing := make(chan struct{})
		for i, host := range hosts {
			wg.Go(func() {
				var last Tag
				for j := i; j < len(history); j += publishers {
					next := Tag{Digest: digest.FromString(fmt.Sprint(history[j])), ValidatedAt: base.Add(time.Duration(history[j]) * time.Second)}
					got, err := host.PutTag(context.Background(), ref, next)
					if err != nil {
						continue // others write it all the time
					}
					if got.Generation < last.Generation || got.ValidatedAt.Before(last.ValidatedAt.Add(-2*time.Second)) || got.ValidatedAt.Before(next.ValidatedAt.Add(-2*time.Second)) {
						t.Errorf("%+v was published, and then is %+v", last, got)
					}
					last = got
				}
			})
		}
		go func() {
			wg.Wait()
			close(publishing)
		}()
		var last Tag
		for done := false; !done; {
			select {
			case <-publishing:
				done = true
			default:
			}
			watcher.Forget(ref)
			got, err := watcher.Tag(context.Background(), ref)
			if errors.Is(err, fs.ErrNotExist) && last.Generation == 0 {
				continue
			}
			if err != nil || got.Generation < last.Generation || got.Generation == last.Generation && got.Digest != last.Digest ||
				got.ValidatedAt.Before(last.ValidatedAt.Add(-2*time.Second)) {
				t.Fatalf("%+v, then %+v, %v", last, got, err)
			}
			last = got
		}
	})
	for i, host := range append(hosts, watcher) {
		if h := host.Health(); h.Ignored != 0 || h.Reads.Open || h.Writes.Open {
			t.Errorf("host %d: %+v", i, h)
		}
	}
}

func TestTagMemoryIsBounded(t *testing.T) {
	m := newTagMemory(100)
	keep := m.entry("kept")
	for i := range 1000 {
		m.entry(fmt.Sprint(i))
		if m.entry("kept") != keep {
			t.Fatal("what is in use was thrown out")
		}
		if n := len(m.young) + len(m.old); n > 100 {
			t.Fatalf("%d entries", n)
		}
	}
}

// after is a way to the bucket on which something happens behind the first write.
type after struct {
	*memory
	then func()
}

func (a *after) RoundTrip(r *http.Request) (*http.Response, error) {
	resp, err := a.memory.RoundTrip(r)
	if then := a.then; r.Method == http.MethodPut && then != nil {
		a.then = nil
		then()
	}
	return resp, err
}

// TestOvertakenPut: another host publishes behind this host's write, and this host learns of that first: its own
// record, when it hears of it, is not the newest, and no replay either.
func TestOvertakenPut(t *testing.T) {
	credentials(t)
	way := &after{memory: &memory{}}
	a, err := newBucket(Config{Bucket: "fleet", Prefix: prefix, Endpoint: "http://bucket.test", PathStyle: true, Keys: [][]byte{fleetKey}}, way)
	if err != nil {
		t.Fatal(err)
	}
	defer a.Close()
	b := way.connect(t)
	one, two := digest.FromString("1"), digest.FromString("2")
	way.then = func() {
		if _, err := b.PutTag(t.Context(), latest, Tag{Digest: two, ValidatedAt: time.Now().Add(time.Second)}); err != nil {
			t.Error(err)
		}
		a.Forget(latest)
		if got, err := a.Tag(t.Context(), latest); err != nil || got.Digest != two {
			t.Errorf("meanwhile: %+v, %v", got, err)
		}
	}
	if _, err := a.PutTag(t.Context(), latest, Tag{Digest: one, ValidatedAt: time.Now()}); err != nil {
		t.Fatal(err)
	}
	if got, err := a.Tag(t.Context(), latest); err != nil || got.Digest != two {
		t.Errorf("after: %+v, %v", got, err)
	}
}
