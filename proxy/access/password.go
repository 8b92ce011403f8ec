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
	"time"

	"golang.org/x/crypto/bcrypt"
)

const (
	// rememberFor is how long a password that was looked at, right or wrong, is not looked at again: to hash
	// it takes a core as long as a thousand pulls.
	rememberFor = time.Minute
	// maxRemembered bounds them; they are begun anew beyond it.
	maxRemembered = 10_000
	// maxCost is the bcrypt cost whose hashes take a core for about a second.
	maxCost = 14
	// turnTime is how long a password may wait for a core.
	turnTime = 5 * time.Second
)

// passwords are the names of an htpasswd file.
type passwords struct {
	file  *file[htpasswd]
	brake brake
	turns chan struct{} // of those whose passwords are being hashed

	mu         sync.Mutex // guards what follows
	remembered map[mac]remembered
	looking    map[mac]*look
}

// mac stands for a name with a password, of one reading of the file.
type mac [sha256.Size]byte

type remembered struct {
	right bool
	until time.Time
}

// look is at one password, for all who show it at the same moment.
type look struct {
	done chan struct{}
	err  error // set when done
}

// htpasswd is what the file says.
type htpasswd struct {
	hashes map[string][]byte
	dear   []byte // the hash that costs most: who has none is not told apart by how long it takes
	key    []byte // of this reading: what was remembered of an earlier one means nothing
}

func newPasswords(name string, logger *slog.Logger) (*passwords, error) {
	file, err := open(logger, func() (*htpasswd, error) { return readHTPasswd(name) }, name)
	if err != nil {
		return nil, err
	}
	cores := max(1, runtime.GOMAXPROCS(0)/2) // pulls need the others
	return &passwords{file: file, turns: make(chan struct{}, cores), remembered: map[mac]remembered{}, looking: map[mac]*look{}}, nil
}

// readHTPasswd reads lines of name:hash. It repeats nothing of them: people write passwords in the clear.
func readHTPasswd(name string) (*htpasswd, error) {
	raw, err := readFile(name)
	if err != nil {
		return nil, err
	}
	h := &htpasswd{hashes: map[string][]byte{}, key: make([]byte, sha256.Size)}
	if _, err := rand.Read(h.key); err != nil {
		return nil, err
	}
	lines := map[string]int{}
	n, dearest := 0, 0
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
		lines[who], h.hashes[who] = n, hash
		if cost > dearest {
			dearest, h.dear = cost, hash
		}
	}
	if len(h.hashes) == 0 {
		return nil, fmt.Errorf("%s: no names in it; write to it what `htpasswd -nB NAME` prints", name)
	}
	return h, nil
}

// mac has the key of the reading in it, and the name's length, so that no other pair has the same.
func (h *htpasswd) mac(name, password string) (m mac) {
	hash := hmac.New(sha256.New, h.key)
	_ = binary.Write(hash, binary.BigEndian, int64(len(name)))
	hash.Write([]byte(name + password))
	hash.Sum(m[:0])
	return m
}

// check returns nil if that is the password of that name. The addresses of those who guess are slowed down.
func (p *passwords) check(ctx context.Context, from netip.Addr, name, password string) error {
	h := p.file.get()
	key := h.mac(name, password)
	for {
		p.mu.Lock()
		if known, ok := p.remembered[key]; ok && time.Now().Before(known.until) {
			p.mu.Unlock()
			if known.right {
				return nil
			}
			return ErrWrong
		}
		l := p.looking[key]
		if l == nil {
			l = &look{done: make(chan struct{}), err: ErrBusy}
			p.looking[key] = l
			p.mu.Unlock()
			return p.look(ctx, l, key, from, h, name, password)
		}
		p.mu.Unlock()
		select {
		case <-l.done:
			if l.err == nil || errors.Is(l.err, ErrWrong) || errors.Is(l.err, ErrBusy) {
				return l.err
			} // whoever looked has left
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

// look hashes the password, in turn, and remembers what came of it.
func (p *passwords) look(ctx context.Context, l *look, key mac, from netip.Addr, h *htpasswd, name, password string) error {
	defer func() {
		p.mu.Lock()
		defer p.mu.Unlock()
		delete(p.looking, key)
		close(l.done)
	}()
	l.err = p.hash(ctx, from, h, name, password)
	if l.err == nil || errors.Is(l.err, ErrWrong) {
		p.remember(key, l.err == nil)
	}
	return l.err
}

func (p *passwords) hash(ctx context.Context, from netip.Addr, h *htpasswd, name, password string) error {
	giveBack, err := p.brake.take(ctx, from)
	if err != nil {
		return err
	}
	timer := time.NewTimer(turnTime)
	defer timer.Stop()
	select {
	case p.turns <- struct{}{}:
		defer func() { <-p.turns }()
	case <-timer.C:
		return ErrBusy
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	hash, known := h.hashes[name]
	if !known {
		hash = h.dear
	}
	if err := bcrypt.CompareHashAndPassword(hash, []byte(password)); err != nil || !known { // in constant time
		return ErrWrong
	}
	giveBack()
	return nil
}

func (p *passwords) remember(key mac, right bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if len(p.remembered) >= maxRemembered {
		clear(p.remembered)
	}
	p.remembered[key] = remembered{right, time.Now().Add(rememberFor)}
}
