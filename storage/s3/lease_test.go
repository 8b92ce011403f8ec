package s3

import (
	"bytes"
	"context"
	"errors"
	"net/http"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"breakwater/pkg/buckettest"
)

func TestLeaseHasOneHolder(t *testing.T) {
	server := buckettest.Start(t)
	var hosts []*Bucket
	for range 50 {
		host := open(t, server)
		if _, err := host.held(t.Context(), "x"); err != nil { // so that none looks for its credentials below
			t.Fatal(err)
		}
		hosts = append(hosts, host)
	}
	object := prefix + leaseName("fill sha256:1")
	race := func() (winner *Lease) {
		t.Helper()
		var mu sync.Mutex // guards winner
		var wg sync.WaitGroup
		for _, host := range hosts {
			wg.Go(func() {
				l, err := host.Lease(context.Background(), "fill sha256:1")
				if err != nil && !errors.Is(err, ErrHeld) {
					t.Error(err)
				}
				mu.Lock()
				defer mu.Unlock()
				if l != nil && winner != nil {
					t.Error("two hold it")
				}
				if l != nil {
					winner = l
				}
			})
		}
		wg.Wait()
		if winner == nil {
			t.Fatal("nobody has it")
		}
		return winner
	}
	first := race()
	if other, err := hosts[0].Lease(t.Context(), "fill sha256:2"); err != nil {
		t.Error(err)
	} else {
		other.Release(t.Context())
	}
	server.Age(object, leaseLife-5*time.Second)
	if _, err := hosts[0].Lease(t.Context(), "fill sha256:1"); !errors.Is(err, ErrHeld) {
		t.Errorf("ahead of its time: %v", err)
	}
	server.Age(object, leaseLife+2*time.Second)
	second := race()
	first.Release(t.Context()) // it is not his any more
	if _, err := hosts[1].Lease(t.Context(), "fill sha256:1"); !errors.Is(err, ErrHeld) {
		t.Errorf("released by somebody else: %v", err)
	}
	second.Release(t.Context())
	if names := server.Names(prefix + leasesFolder); len(names) != 0 {
		t.Errorf("left: %v", names)
	}
	race().Release(t.Context())
}

func TestLeaseIsRenewed(t *testing.T) {
	credentials(t)
	synctest.Test(t, func(t *testing.T) {
		m := &memory{}
		a, b := m.connect(t), m.connect(t)
		defer a.Close()
		defer b.Close()
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		l, err := a.Lease(ctx, "x")
		if err != nil {
			t.Fatal(err)
		}
		contents := map[string]bool{}
		for range 100 {
			time.Sleep(3 * time.Second)
			if _, err := b.Lease(t.Context(), "x"); !errors.Is(err, ErrHeld) {
				t.Fatal(err)
			}
			m.set(func() { contents[string(m.objects[leaseName("x")].raw)] = true })
		}
		if len(contents) < 55 || len(contents) > 61 {
			t.Errorf("%d different objects in 300 s", len(contents))
		}
		cancel() // its holder goes without a word
		<-l.Lost()
		time.Sleep(9 * time.Second)
		if _, err := b.Lease(t.Context(), "x"); !errors.Is(err, ErrHeld) {
			t.Error(err)
		}
		time.Sleep(8 * time.Second)
		next, err := b.Lease(t.Context(), "x")
		if err != nil {
			t.Fatal(err)
		}
		l.Release(t.Context())
		select {
		case <-next.Lost():
			t.Error("lost")
		default:
		}
		next.Release(t.Context())
	})
}

func TestLeaseIsLost(t *testing.T) {
	credentials(t)
	for name, lose := range map[string]func(m *memory){
		"bucket out": func(m *memory) { m.set(func() { m.fault = hang }) },
		"taken": func(m *memory) {
			m.set(func() { m.objects[leaseName("x")] = stored{[]byte("another's"), `"other"`, time.Now()} })
		},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				m := &memory{}
				b := m.connect(t)
				defer b.Close()
				l, err := b.Lease(t.Context(), "x")
				if err != nil {
					t.Fatal(err)
				}
				time.Sleep(time.Minute)
				lose(m)
				if waited := took(func() { <-l.Lost() }); waited > leaseLife {
					t.Errorf("noticed after %v", waited)
				}
				l.Release(t.Context())
				if !bytes.HasPrefix(m.objects[leaseName("x")].raw, []byte("another's")) && name == "taken" {
					t.Error("somebody else's was deleted")
				}
			})
		})
	}
}

func TestLeaseOfASlowBucket(t *testing.T) {
	credentials(t)
	synctest.Test(t, func(t *testing.T) {
		m := &memory{fault: hang}
		b := m.connect(t)
		defer b.Close()
		if waited := took(func() {
			if _, err := b.Lease(t.Context(), "x"); err == nil {
				t.Error("taken")
			}
		}); waited != headerLimit {
			t.Errorf("waited %v", waited)
		}
		if _, err := b.Lease(t.Context(), "x"); !errors.Is(err, ErrOut) {
			t.Error(err)
		}
	})
}

// A store that knows no conditions for DELETE still deletes.
func TestDeleteWithoutConditions(t *testing.T) {
	credentials(t)
	synctest.Test(t, func(t *testing.T) {
		m := &memory{}
		m.fault = func(r *http.Request) (*http.Response, error) {
			if r.Method == http.MethodDelete && r.Header.Get("If-Match") != "" {
				return m.refuse(501, "NotImplemented")(r)
			}
			return nil, nil
		}
		b := m.connect(t)
		defer b.Close()
		l, err := b.Lease(t.Context(), "x")
		if err != nil {
			t.Fatal(err)
		}
		l.Release(t.Context())
		if len(m.objects) != 0 || m.count(http.MethodDelete, strings.TrimSuffix(leasesFolder, "/")) != 2 {
			t.Errorf("%v", m.asked)
		}
	})
}
