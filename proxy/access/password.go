package access

import (
	"bytes"
	"context"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"runtime"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/crypto/bcrypt"
)

const (
	// wrongFor is how long a wrong password is not looked at again: to hash it takes a core as long as a
	// thousand pulls.
	wrongFor = time.Minute
	// maxWrong bounds them; they are begun anew beyond it.
	maxWrong = 10_000
	// maxCost is the bcrypt cost whose hashes take a core for about a second.
	maxCost = 14
)

// passwords are the names of an htpasswd file.
type passwords struct {
	file  *file[htpasswd]
	key   []byte // of macs: they mean nothing outside this process
	brake *brake
	cores *cores

	mu       sync.Mutex // guards what follows
	wrong    map[mac]time.Time
	underway map[attempt]*comparison
}

// mac stands for a line of the file, and a password that was shown for it.
type mac [sha256.Size]byte

// attempt is a password that a host shows: how long one host has to wait is no other's concern.
type attempt struct {
	mac
	from netip.Prefix
}

// comparison is one attempt being looked at, for all who make it at the same moment.
type comparison struct {
	done chan struct{}
	err  error // set when done
}

// htpasswd is what the file says.
type htpasswd struct {
	entries   map[string]*entry
	costliest []byte // hash: who has none is not told apart by how long it takes
}

// entry is the line of a name. The password that was right for it is so for as long as the file has that line:
// those who have it need no guess, however many others have spent.
type entry struct {
	hash  []byte
	right atomic.Pointer[mac] // what was last found to be; nil before
}

// has reports whether that password was found to be right.
func (e *entry) has(shown mac) bool {
	if e == nil {
		return false
	}
	right := e.right.Load()
	return right != nil && *right == shown
}

func newPasswords(name string, logger *slog.Logger) (*passwords, error) {
	p := &passwords{key: make([]byte, sha256.Size), brake: newBrake(), cores: newCores(max(1, runtime.GOMAXPROCS(0)/2)), wrong: map[mac]time.Time{}, underway: map[attempt]*comparison{}}
	if _, err := rand.Read(p.key); err != nil {
		return nil, err
	}
	last := new(htpasswd) // of the readings, which never run at the same time
	var err error
	p.file, err = open(logger, func() (*htpasswd, error) {
		h, err := readHTPasswd(name, last)
		if err == nil {
			last = h
		}
		return h, err
	}, name)
	if err != nil {
		return nil, err
	}
	return p, nil
}

// readHTPasswd reads lines of name:hash. It repeats nothing of them: people write passwords in the clear. A line
// that before has too stays the one that it was.
func readHTPasswd(name string, before *htpasswd) (*htpasswd, error) {
	raw, err := readFile(name)
	if err != nil {
		return nil, err
	}
	h := &htpasswd{entries: map[string]*entry{}}
	lines := map[string]int{}
	n, costliest := 0, 0
	for line := range bytes.Lines(raw) {
		n++
		line = bytes.TrimSpace(line)
		if len(line) == 0 || line[0] == '#' {
			continue
		}
		user, hash, found := bytes.Cut(line, []byte(":"))
		hash, _, _ = bytes.Cut(hash, []byte(":")) // some programs append fields
		cost, err := bcrypt.Cost(hash)
		who := string(user)
		const write = "write the line that `htpasswd -nB NAME` prints"
		switch {
		case !found || who == "":
			return nil, fmt.Errorf("%s:%d: not a name and the hash of a password; %s", name, n, write)
		case lines[who] > 0:
			return nil, fmt.Errorf("%s:%d: the name of line %d again; keep one of the two", name, n, lines[who])
		case err != nil || !bytes.HasPrefix(hash, []byte("$2")):
			return nil, fmt.Errorf("%s:%d: not a bcrypt hash, and others are guessed too fast; %s", name, n, write)
		case cost > maxCost:
			return nil, fmt.Errorf("%s:%d: a bcrypt hash of cost %d, which takes a core for too long; write the line that `htpasswd -nB -C 10 NAME` prints", name, n, cost)
		}
		e := before.entries[who]
		if e == nil || !bytes.Equal(e.hash, hash) {
			e = &entry{hash: bytes.Clone(hash)} // without the rest of the file
		}
		lines[who], h.entries[who] = n, e
		if cost > costliest {
			costliest, h.costliest = cost, e.hash
		}
	}
	if len(h.entries) == 0 {
		return nil, fmt.Errorf("%s: no names in it; write to it what `htpasswd -nB NAME` prints", name)
	}
	return h, nil
}

// mac has the lengths of what is in it, so that no others have the same, and the hash: of a line that has changed,
// nothing is known.
func (p *passwords) mac(name string, e *entry, password string) (m mac) {
	var hash []byte
	if e != nil {
		hash = e.hash
	}
	sum := hmac.New(sha256.New, p.key)
	for _, part := range [][]byte{[]byte(name), hash, []byte(password)} {
		_ = binary.Write(sum, binary.BigEndian, int64(len(part)))
		sum.Write(part)
	}
	sum.Sum(m[:0])
	return m
}

// check returns nil if that is the password of that name. The addresses of those who guess are slowed down.
func (p *passwords) check(ctx context.Context, from netip.Addr, name, password string) error {
	h := p.file.get()
	shown := p.mac(name, h.entries[name], password)
	a := attempt{shown, host(from)}
	for {
		p.mu.Lock()
		if h.entries[name].has(shown) { // under the lock, which whoever has found out takes after that
			p.mu.Unlock()
			return nil
		}
		if until, ok := p.wrong[shown]; ok && time.Now().Before(until) {
			p.mu.Unlock()
			return ErrWrong
		}
		c := p.underway[a]
		if c == nil {
			c = &comparison{done: make(chan struct{}), err: ErrBusy}
			p.underway[a] = c
			p.mu.Unlock()
			return p.lead(ctx, c, a, h, name, password)
		}
		p.mu.Unlock()
		select {
		case <-c.done:
			if c.err == nil || errors.Is(c.err, ErrWrong) || errors.Is(c.err, ErrBusy) {
				return c.err
			} // whoever led has left
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

// lead compares the password for all who wait for that, and remembers what came of it.
func (p *passwords) lead(ctx context.Context, c *comparison, a attempt, h *htpasswd, name, password string) error {
	defer func() {
		p.mu.Lock()
		defer p.mu.Unlock()
		delete(p.underway, a)
		if errors.Is(c.err, ErrWrong) {
			if len(p.wrong) >= maxWrong {
				clear(p.wrong)
			}
			p.wrong[a.mac] = time.Now().Add(wrongFor)
		}
		close(c.done)
	}()
	if c.err = p.brake.take(ctx, a.from, name); c.err != nil {
		return c.err
	}
	if c.err = p.compare(ctx, a, h, name, password); !errors.Is(c.err, ErrWrong) {
		p.brake.giveBack(a.from, name)
	}
	return c.err
}

// compare hashes the password, once there is a core for that.
func (p *passwords) compare(ctx context.Context, a attempt, h *htpasswd, name, password string) error {
	leave, err := p.cores.take(ctx, a.from)
	if err != nil {
		return err
	}
	defer leave()
	e := h.entries[name]
	if e.has(a.mac) { // by now, from elsewhere
		return nil
	}
	hash := h.costliest
	if e != nil {
		hash = e.hash
	}
	if err := bcrypt.CompareHashAndPassword(hash, []byte(password)); err != nil || e == nil { // in constant time
		return ErrWrong
	}
	e.right.Store(&a.mac)
	return nil
}
