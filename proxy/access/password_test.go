package access

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/crypto/bcrypt"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// secret is no part of what anybody is told.
const secret = "canary-hunter2"

func hash(t testing.TB, password string) string {
	t.Helper()
	h, err := bcrypt.GenerateFromPassword([]byte(password), bcrypt.MinCost)
	if err != nil {
		t.Fatal(err)
	}
	return string(h)
}

// write puts a file in the place of another one, as editors and Kubernetes do.
func write(t testing.TB, name, text string) string {
	t.Helper()
	if err := os.WriteFile(name+".new", []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(name+".new", name); err != nil {
		t.Fatal(err)
	}
	return name
}

func TestHTPasswdMistakes(t *testing.T) {
	good := hash(t, secret)
	name := filepath.Join(t.TempDir(), "htpasswd")
	for text, want := range map[string]string{
		"ci:" + good + "\nmd5:$apr1$r31.....$HqJZimcKQFAMYayBlzkrA/\n": ":2: not a bcrypt hash",
		"ci:{SHA}5baa61e4c9b93f3f0682250b6cf8331b7ee68fd8\n":           ":1: not a bcrypt hash",
		"# names\n\nci:" + secret + "\n":                               ":3: not a bcrypt hash",
		"ci:rqXexS6ZhobKA\n":                                           ":1: not a bcrypt hash",
		"ci:$6$salt$IxDD3jeSOb5eB1CX5LBsqZFVkJdido3OUILO5Ifz5iwMuTS4XMS130MTSuDDl3aCI6WouIL9AjRbLCelDCy.g.\n": ":1: not a bcrypt hash",
		"ci:" + good[:20] + "\n":                         ":1: not a bcrypt hash",
		"ci:" + good + "\nci:" + good + "\n":             ":2: the name of line 1 again",
		":" + good + "\n":                                ":1: not a name",
		secret + "\n":                                    ":1: not a name",
		"ci:" + strings.Replace(good, "$04$", "$31$", 1): ":1: a bcrypt hash of cost 31",
		"# nobody\n":                                     ": no names in it",
		"":                                               ": no names in it",
		strings.Repeat("#", maxFile+1):                   "too large",
	} {
		_, err := New(Config{HTPasswd: write(t, name, text), Logger: slog.New(slog.DiscardHandler)})
		if err == nil || !strings.HasPrefix(err.Error(), "access.htpasswd: "+name) || !strings.Contains(err.Error(), want) {
			t.Errorf("%.60q: %v, want %s", text, err, want)
		}
		if err != nil && (strings.Contains(err.Error(), secret) || strings.Contains(err.Error(), "$2")) {
			t.Errorf("a secret is told: %v", err)
		}
	}
	if _, err := New(Config{HTPasswd: filepath.Join(t.TempDir(), "none")}); !errors.Is(err, os.ErrNotExist) {
		t.Error(err)
	}
}

// guests is a Gate with the passwords of ci and deploy.
func guests(t *testing.T) *Gate {
	t.Helper()
	name := write(t, filepath.Join(t.TempDir(), "htpasswd"), "# who may pull\nci:"+hash(t, secret)+"\r\ndeploy:"+strings.Replace(hash(t, "deploy-"+secret), "$2a$", "$2y$", 1)+":comment\n")
	g, err := New(Config{HTPasswd: name, Logger: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	return g
}

// shows is a request with a name and a password, from that address.
func shows(from, name, password string) *http.Request {
	r := httptest.NewRequest(http.MethodGet, "/v2/", nil)
	r.RemoteAddr = netip.AddrPortFrom(netip.MustParseAddr(from), 40000).String()
	r.SetBasicAuth(name, password)
	return r
}

const here = "192.0.2.1"

// is means the repository of that name.
func is(name string) func(string) bool { return func(s string) bool { return s == name } }

func TestPasswords(t *testing.T) {
	g := guests(t)
	for _, tt := range []struct {
		name, password, known string
		err                   error
	}{
		{"ci", secret, "ci", nil},
		{"ci", secret, "ci", nil}, // from memory
		{"deploy", "deploy-" + secret, "deploy", nil},
		{"ci", "deploy-" + secret, "", ErrWrong},
		{"deploy", secret, "", ErrWrong},
		{"ci", "", "", ErrWrong},
		{"ci", "", "", ErrWrong},
		{"", secret, "", ErrWrong},
		{"nobody", secret, "", ErrWrong},
		{"CI", secret, "", ErrWrong},
		{"", "", "", nil}, // what podman says that has none
	} {
		who, err := g.Caller(shows(here, tt.name, tt.password))
		if !errors.Is(err, tt.err) || strings.Join(who.Names, " ") != tt.known || who.MayPull(is("x")) != (tt.known != "") || who.Vouched() != who.Known() {
			t.Errorf("%q %q: %+v %v", tt.name, tt.password, who, err)
		}
	}
	for shown, want := range map[string]error{"Bearer x": ErrWrong, "Basic !": ErrWrong, "Basic": ErrWrong, "Negotiate x": ErrWrong, "": ErrWrong} {
		r := httptest.NewRequest(http.MethodGet, "/v2/", nil)
		r.Header.Set("Authorization", shown)
		if who, err := g.Caller(r); !errors.Is(err, want) || who.Vouched() {
			t.Errorf("%q: %+v %v", shown, who, err)
		}
	}
	twice := shows(here, "ci", secret)
	twice.Header.Add("Authorization", twice.Header.Get("Authorization"))
	if who, err := g.Caller(twice); !errors.Is(err, ErrWrong) || who.Vouched() {
		t.Errorf("shown twice: %+v %v", who, err)
	}
	if who, err := g.Caller(httptest.NewRequest(http.MethodGet, "/v2/", nil)); err != nil || who.Vouched() {
		t.Errorf("nothing shown: %+v %v", who, err)
	}
	if got := g.Challenge("quay.io/org/app", nil); got != `Basic realm="Breakwater"` {
		t.Error(got)
	}
}

// A password that is taken out of the file is no longer good, whatever is remembered; a file that is broken
// changes nothing.
func TestPasswordsAreReadAgain(t *testing.T) {
	g := guests(t)
	name := g.passwords.file.names[0]
	synctest.Test(t, func(t *testing.T) {
		g.passwords.file.looked.Store(0)
		want := func(password string, want error) {
			t.Helper()
			if _, err := g.Caller(shows(here, "ci", password)); !errors.Is(err, want) {
				t.Errorf("%s: %v, want %v", password, err, want)
			}
		}
		want(secret, nil)
		write(t, name, "ci:"+hash(t, "new-"+secret)+"\n")
		time.Sleep(lookEvery)
		want(secret, ErrWrong)
		want("new-"+secret, nil)
		write(t, name, "ci:"+secret+"\n")
		time.Sleep(lookEvery)
		want("new-"+secret, nil)
		if err := g.Reload(); err == nil || !strings.Contains(err.Error(), ":1: not a bcrypt hash") {
			t.Error(err)
		}
		if err := os.Remove(name); err != nil {
			t.Fatal(err)
		}
		time.Sleep(lookEvery)
		want("new-"+secret, nil)
		write(t, name, "ci:"+hash(t, secret)+"\n")
		if err := g.Reload(); err != nil {
			t.Error(err)
		}
		want(secret, nil)
		want("new-"+secret, ErrWrong)
	})
}

// An address has ten wrong passwords for a name, and then one each two seconds; others are not disturbed, nor is
// a password that is known.
func TestGuessingIsSlow(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := guests(t)
		took := func(from, name, password string, want error) time.Duration {
			t.Helper()
			began := time.Now()
			if _, err := g.Caller(shows(from, name, password)); !errors.Is(err, want) {
				t.Errorf("%s from %s: %v, want %v", name, from, err, want)
			}
			return time.Since(began)
		}
		took(here, "ci", secret, nil)
		for i := range guesses + 5 {
			want := max(0, min(1, time.Duration(i-guesses+1))) * guessEvery
			if got := took(here, "ci", fmt.Sprint(i), ErrWrong); got != want {
				t.Errorf("guess %d took %v, want %v", i, got, want)
			}
		}
		if got := took(here, "ci", "3", ErrWrong); got > 0 {
			t.Errorf("a wrong password that is known took %v", got)
		}
		if got := took(here, "ci", secret, nil); got > 0 {
			t.Errorf("a right password that is known took %v", got)
		}
		if got := took("192.0.2.2", "deploy", "deploy-"+secret, nil); got > 0 {
			t.Errorf("another address waited %v", got)
		}
		var all sync.WaitGroup
		var mu sync.Mutex
		busy, wrong := 0, 0
		for i := range 50 { // at the same moment
			all.Go(func() {
				_, err := g.Caller(shows(here, "ci", fmt.Sprint("x", i)))
				mu.Lock()
				defer mu.Unlock()
				if errors.Is(err, ErrBusy) {
					busy++
				} else if errors.Is(err, ErrWrong) {
					wrong++
				}
			})
		}
		all.Wait()
		if want := int(brakeTime / guessEvery); wrong != want || busy != 50-want {
			t.Errorf("%d looked at, %d not; want %d", wrong, busy, want)
		}
		time.Sleep(time.Hour)
		for range 3 * guesses { // what is right costs nothing
			g.passwords.file.get().entries["ci"].right.Store(nil)
			if got := took(here, "ci", secret, nil); got > 0 {
				t.Errorf("a right password took %v", got)
			}
		}
		for i := range guesses {
			took(fmt.Sprintf("2001:db8::%d", i), "ci", fmt.Sprint("y", i), ErrWrong)
		}
		if got := took("2001:db8::99", "ci", "yy", ErrWrong); got != guessEvery {
			t.Errorf("another address of the same /64 waited %v", got)
		}
		if got := took("2001:db8:0:1::1", "ci", "yyy", ErrWrong); got > 0 {
			t.Errorf("another /64 waited %v", got)
		}
	})
}

// An address has ten names' guesses in all.
func TestGuessingAtManyNames(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := guests(t)
		var looked atomic.Int64
		began := time.Now()
		for i := range 2000 { // a hundred a second
			go func() {
				if _, err := g.Caller(shows(here, fmt.Sprint("name", i), "x")); errors.Is(err, ErrWrong) {
					looked.Add(1)
				}
			}()
			time.Sleep(10 * time.Millisecond)
			synctest.Wait()
		}
		if n, most := looked.Load(), int64(guessedNames*(guesses+int(time.Since(began)/guessEvery))); n < most/2 || n > most {
			t.Errorf("%d guesses, want at most %d", n, most)
		}
		time.Sleep(brakeTime)
		synctest.Wait()
	})
}

// A neighbour who guesses, twenty times a second, keeps nobody out: not with a password that was right once, were
// it for the same name; not with one that is shown for the first time, of another name than those that the
// neighbour tries.
func TestNeighbours(t *testing.T) {
	for _, tt := range []struct {
		what   string
		known  bool
		names  []string // that the neighbour tries
		others string   // of the file
	}{
		{"known", true, []string{"ci"}, ""},
		{"known, of a file that has changed elsewhere", true, []string{"ci", "deploy"}, "new"},
		{"new", false, []string{"deploy", "root", "admin", "nobody"}, ""},
	} {
		t.Run(tt.what, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				g := guests(t)
				file := g.passwords.file
				file.looked.Store(0)
				ask := func(want error, within time.Duration) {
					t.Helper()
					began := time.Now()
					if _, err := g.Caller(shows(here, "ci", secret)); !errors.Is(err, want) || time.Since(began) > within {
						t.Errorf("%v after %v, want %v within %v", err, time.Since(began), want, within)
					}
				}
				if tt.known {
					ask(nil, 0)
				}
				for second := range 40 {
					for i := range 20 {
						go func() { _, _ = g.Caller(shows(here, tt.names[i%len(tt.names)], fmt.Sprint(second, i))) }()
					}
					time.Sleep(time.Second)
					if tt.others != "" && second == 20 {
						write(t, file.names[0], "ci:"+string(file.get().entries["ci"].hash)+"\n"+tt.others+":"+hash(t, secret)+"\n")
					}
					if tt.known {
						ask(nil, 0)
					}
				}
				ask(nil, 0)
				if tt.others != "" && file.get().entries[tt.others] == nil {
					t.Error("the file was not read again")
				}
				write(t, file.names[0], "new:"+hash(t, secret)+"\n")
				time.Sleep(lookEvery)
				if _, err := g.Caller(shows(here, "ci", secret)); err == nil {
					t.Error("let in by a name that the file has no more")
				}
				time.Sleep(brakeTime) // until the last guess is over
			})
		})
	}
}

// Who waits for a guess of their own address is not waited for by others with the same password.
func TestOthersWithTheSamePassword(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := guests(t)
		for i := range guesses {
			_, _ = g.Caller(shows(here, "ci", fmt.Sprint(i)))
		}
		var all sync.WaitGroup
		all.Go(func() {
			if _, err := g.Caller(shows(here, "ci", secret)); err != nil {
				t.Error(err)
			}
		})
		synctest.Wait()
		began := time.Now()
		if _, err := g.Caller(shows("192.0.2.2", "ci", secret)); err != nil || time.Since(began) > 0 {
			t.Errorf("%v after %v", err, time.Since(began))
		}
		all.Wait()
	})
}

// However many addresses guess, in bounded memory, few others are taken for one of them.
func TestGuessingFromEverywhere(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBrake()
		address := func(net, i int) netip.Prefix {
			return host(netip.AddrFrom4([4]byte{byte(net), 0, byte(i >> 8), byte(i)}))
		}
		waiting := func(net int) (n int) {
			for i := range 100 {
				if b.spend(address(net, i), "ci") > 0 {
					n++
				}
			}
			return n
		}
		for i := range 16_000 {
			for range guesses {
				b.spend(address(10, i), "ci")
			}
		}
		if n := waiting(10); n != 100 {
			t.Errorf("%d of 100 that have spent theirs wait", n)
		}
		if n := waiting(11); n > 60 { // 22 more or less
			t.Errorf("%d of 100 others wait", n)
		}
		time.Sleep(time.Hour)
		if n := waiting(10); n > 0 {
			t.Errorf("%d of 100 wait after an hour", n)
		}
	})
}

// One host has half of the cores, and others theirs; who waits too long is told.
func TestCoresAreShared(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCores(4)
		var hosts []netip.Prefix // that share nothing
		for i := byte(0); len(hosts) < 3; i++ {
			h := host(netip.AddrFrom4([4]byte{192, 0, 2, i}))
			if !slices.ContainsFunc(hosts, func(other netip.Prefix) bool { return c.lane(h) == c.lane(other) }) {
				hosts = append(hosts, h)
			}
		}
		take := func(i int, want error, wait time.Duration) (leave func()) {
			t.Helper()
			began := time.Now()
			leave, err := c.take(t.Context(), hosts[i])
			if !errors.Is(err, want) || time.Since(began) != wait {
				t.Errorf("host %d: %v after %v, want %v after %v", i, err, time.Since(began), want, wait)
			}
			return leave
		}
		take(0, nil, 0)
		leave := take(0, nil, 0)
		take(0, ErrBusy, coreTime)
		leaveToo := take(1, nil, 0)
		take(1, nil, 0)
		take(2, ErrBusy, coreTime)
		gone, cancel := context.WithCancel(t.Context())
		cancel()
		if _, err := c.take(gone, hosts[2]); !errors.Is(err, context.Canceled) {
			t.Error(err)
		}
		leave()
		take(2, nil, 0)
		take(0, ErrBusy, coreTime)
		leaveToo()
		take(2, nil, 0)
		take(2, ErrBusy, coreTime)
	})
}

// Passwords are looked at by half of the cores at most, and each once for all who show it at the same moment.
func TestFewCores(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := guests(t)
		p := g.passwords
		if _, err := g.Caller(shows(here, "deploy", "deploy-"+secret)); err != nil {
			t.Fatal(err)
		}
		for range cap(p.cores.all) { // all are at work
			p.cores.all <- struct{}{}
		}
		began := time.Now()
		if _, err := g.Caller(shows(here, "ci", "x")); !errors.Is(err, ErrBusy) || time.Since(began) != coreTime {
			t.Errorf("%v after %v", err, time.Since(began))
		}
		if _, err := g.Caller(shows(here, "deploy", "deploy-"+secret)); err != nil {
			t.Errorf("a known password: %v", err)
		}
		leader, leave := context.WithCancel(t.Context())
		var all sync.WaitGroup
		all.Go(func() {
			if _, err := g.Caller(shows(here, "ci", secret).WithContext(leader)); !errors.Is(err, context.Canceled) {
				t.Errorf("who left: %v", err)
			}
		})
		synctest.Wait()
		for i := range 50 {
			all.Go(func() {
				if _, err := g.Caller(shows(here, "ci", secret)); err != nil {
					t.Errorf("follower %d: %v", i, err)
				}
			})
		}
		synctest.Wait()
		leave()
		synctest.Wait()
		spent, _ := p.brake.of(netip.MustParsePrefix(here+"/32"), "ci")
		if spent.guesses != 1 { // the one that nobody looked at costs nothing
			t.Errorf("%d guesses spent for one password", spent.guesses)
		}
		<-p.cores.all
		all.Wait()
	})
}
