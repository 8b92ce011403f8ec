package registrytest

import (
	"context"
	"crypto/tls"
	"math/rand/v2"
	"net/http"
	"slices"
	"strconv"
	"sync"
	"time"

	"breakwater/pkg/oci"

	"github.com/distribution/distribution/v3/registry/api/errcode"
)

// Fault answers a request badly. next is the answer without this fault; a Fault may call it, with
// another ResponseWriter or later, or not at all. It is called by many goroutines at once.
//
// Offsets are in the body of one response, which for a Range is not the blob.
type Fault func(w http.ResponseWriter, r *http.Request, next http.Handler)

// rule is what Fault was called with.
type rule struct {
	match  Match
	fault  Fault
	healed chan struct{} // closed when the rule is taken away
}

type healedKey struct{}

// Fault makes the requests that match suffer these faults, the first outermost, until the rule is
// taken away: by the function that is returned, or by Heal. What a fault holds back then goes on.
// Of several rules that match, the newest is outermost.
func (s *script) Fault(m Match, faults ...Fault) (remove func()) {
	added := &rule{m, chain(faults), make(chan struct{})}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.rules = append(s.rules, added)
	return func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		if i := slices.Index(s.rules, added); i >= 0 {
			s.rules = slices.Delete(s.rules, i, i+1)
			close(added.healed)
		}
	}
}

// Heal takes all rules away.
func (s *script) Heal() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, r := range s.rules {
		close(r.healed)
	}
	s.rules = nil
}

// wrap is next with the rule's fault.
func (u *rule) wrap(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		u.fault(w, r.WithContext(context.WithValue(r.Context(), healedKey{}, u.healed)), next)
	})
}

func chain(faults []Fault) Fault {
	return func(w http.ResponseWriter, r *http.Request, next http.Handler) {
		for _, fault := range slices.Backward(faults) {
			inner := next
			next = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { fault(w, r, inner) })
		}
		next.ServeHTTP(w, r)
	}
}

// pause waits for d, or until the fault is healed; it aborts the answer if the client is gone.
func pause(r *http.Request, d time.Duration) {
	var passed <-chan time.Time
	if d < forever { // no timer, or a synctest bubble in which all else waits would jump to it
		timer := time.NewTimer(d)
		defer timer.Stop()
		passed = timer.C
	}
	healed, _ := r.Context().Value(healedKey{}).(chan struct{})
	select {
	case <-passed:
	case <-healed:
	case <-r.Context().Done():
		panic(http.ErrAbortHandler)
	}
}

const forever = 1<<63 - 1

// First limits faults to the first n requests.
func First(n int, faults ...Fault) Fault { return nth(func(i int) bool { return i < n }, faults) }

// After spares the first n requests.
func After(n int, faults ...Fault) Fault { return nth(func(i int) bool { return i >= n }, faults) }

// Chance limits faults to a part p of the requests, chosen by seed.
func Chance(p float64, seed uint64, faults ...Fault) Fault {
	random := rand.New(rand.NewPCG(seed, seed))
	return nth(func(int) bool { return random.Float64() < p }, faults)
}

// nth limits faults to the requests that chosen says, asked with 0, 1, 2, …
func nth(chosen func(i int) bool, faults []Fault) Fault {
	var mu sync.Mutex // guards i, and what chosen uses
	i := 0
	fault := chain(faults)
	return func(w http.ResponseWriter, r *http.Request, next http.Handler) {
		mu.Lock()
		hit := chosen(i)
		i++
		mu.Unlock()
		if !hit {
			next.ServeHTTP(w, r)
			return
		}
		fault(w, r, next)
	}
}

// Delay waits before it answers.
func Delay(d time.Duration) Fault {
	return func(w http.ResponseWriter, r *http.Request, next http.Handler) {
		pause(r, d)
		next.ServeHTTP(w, r)
	}
}

// Hang does not answer until it is healed.
func Hang() Fault { return Delay(forever) }

// Status answers with that status and the error JSON that belongs to it; header is names and values
// in turn, such as "Retry-After", "120".
func Status(status int, header ...string) Fault {
	codes := map[int]errcode.ErrorCode{
		http.StatusUnauthorized:       errcode.ErrorCodeUnauthorized,
		http.StatusForbidden:          errcode.ErrorCodeDenied,
		http.StatusNotFound:           errcode.ErrorCodeManifestUnknown,
		http.StatusMethodNotAllowed:   errcode.ErrorCodeUnsupported,
		http.StatusTooManyRequests:    errcode.ErrorCodeTooManyRequests,
		http.StatusServiceUnavailable: errcode.ErrorCodeUnavailable,
	}
	code, known := codes[status]
	if !known {
		code = errcode.ErrorCodeUnknown
	}
	return func(w http.ResponseWriter, _ *http.Request, _ http.Handler) {
		for i := 0; i+1 < len(header); i += 2 {
			w.Header().Add(header[i], header[i+1])
		}
		if status < 400 {
			w.WriteHeader(status)
			return
		}
		oci.WriteError(w, &oci.Error{Status: status, Code: code, Message: "scripted"})
	}
}

// Portal answers with 200 and a page, as a captive portal does.
func Portal() Fault {
	return func(w http.ResponseWriter, _ *http.Request, _ http.Handler) {
		w.Header().Set("Content-Type", "text/html; charset=utf-8")
		_, _ = w.Write([]byte("<!DOCTYPE html><html><body>Please accept our terms</body></html>"))
	}
}

// Header changes one header of the answer; "" takes it away. Without its Content-Length an answer is
// chunked.
func Header(name, value string) Fault {
	return func(w http.ResponseWriter, r *http.Request, next http.Handler) {
		next.ServeHTTP(&shaper{ResponseWriter: w, header: func(h http.Header) {
			if h.Set(name, value); value == "" {
				h[http.CanonicalHeaderKey(name)] = nil // net/http adds no Content-Type or Date of its own
			}
		}}, r)
	}
}

// Truncate ends the connection cleanly after n bytes of body.
func Truncate(n int64) Fault {
	return at(n, func(http.ResponseWriter, *http.Request) { panic(http.ErrAbortHandler) })
}

// Reset resets the connection after n bytes of body.
func Reset(n int64) Fault {
	return at(n, func(w http.ResponseWriter, _ *http.Request) {
		c, _, err := http.NewResponseController(w).Hijack()
		if err != nil {
			panic(http.ErrAbortHandler) // it is gone already
		}
		if secure, ok := c.(*tls.Conn); ok {
			c = secure.NetConn()
		}
		abort(c)
		panic(http.ErrAbortHandler)
	})
}

// Stall sends no more after n bytes of body until it is healed.
func Stall(n int64) Fault {
	return at(n, func(_ http.ResponseWriter, r *http.Request) { pause(r, forever) })
}

// at acts when n bytes of body have been sent and another is to be.
func at(n int64, act func(http.ResponseWriter, *http.Request)) Fault {
	return func(w http.ResponseWriter, r *http.Request, next http.Handler) {
		var sent int64
		acted := false
		next.ServeHTTP(&shaper{ResponseWriter: w, body: func(p []byte) (int, error) {
			head := 0
			if !acted && sent+int64(len(p)) > n {
				acted, head = true, int(n-sent)
				if _, err := w.Write(p[:head]); err != nil {
					return 0, err
				}
				_ = http.NewResponseController(w).Flush()
				act(w, r)
			}
			written, err := w.Write(p[head:])
			sent += int64(head + written)
			return head + written, err
		}}, r)
	}
}

// Drip sends n bytes of body, waits for an interval, sends n more, and so on.
func Drip(n int, interval time.Duration) Fault {
	return func(w http.ResponseWriter, r *http.Request, next http.Handler) {
		sent := 0 // since it waited
		next.ServeHTTP(&shaper{ResponseWriter: w, body: func(p []byte) (written int, err error) {
			for written < len(p) && err == nil {
				if sent == n {
					_ = http.NewResponseController(w).Flush()
					pause(r, interval)
					sent = 0
				}
				var more int
				more, err = w.Write(p[written:min(len(p), written+n-sent)])
				written, sent = written+more, sent+more
			}
			return written, err
		}}, r)
	}
}

// FlipBit changes one bit of the byte at that offset of the body.
func FlipBit(offset int64) Fault {
	return func(w http.ResponseWriter, r *http.Request, next http.Handler) {
		var sent int64
		next.ServeHTTP(&shaper{ResponseWriter: w, body: func(p []byte) (int, error) {
			if i := offset - sent; i >= 0 && i < int64(len(p)) {
				p = slices.Clone(p)
				p[i] ^= 1
			}
			n, err := w.Write(p)
			sent += int64(n)
			return n, err
		}}, r)
	}
}

// Resize makes a body longer by delta zeros, or shorter, and its Content-Length as well.
func Resize(delta int64) Fault {
	return func(w http.ResponseWriter, r *http.Request, next http.Handler) {
		left := int64(forever)
		next.ServeHTTP(&shaper{ResponseWriter: w, header: func(h http.Header) {
			length, err := strconv.ParseInt(h.Get("Content-Length"), 10, 64)
			if err == nil {
				left = max(0, length+delta)
				h.Set("Content-Length", strconv.FormatInt(left, 10))
			}
		}, body: func(p []byte) (int, error) {
			n, err := w.Write(p[:min(int64(len(p)), left)])
			left -= int64(n)
			if err != nil {
				return n, err
			}
			return len(p), nil
		}}, r)
		if delta > 0 && r.Method != http.MethodHead {
			_, _ = w.Write(make([]byte, delta))
		}
	}
}

// Endless takes the Content-Length away and lets zeros follow the body for as long as the client
// reads.
func Endless() Fault {
	return func(w http.ResponseWriter, r *http.Request, next http.Handler) {
		Header("Content-Length", "")(w, r, next)
		zeros := make([]byte, 32<<10)
		for r.Method != http.MethodHead {
			if _, err := w.Write(zeros); err != nil {
				panic(http.ErrAbortHandler)
			}
		}
	}
}

// shaper is a ResponseWriter that changes header and body on their way.
type shaper struct {
	http.ResponseWriter
	header func(http.Header) // before the header is sent; nil for none
	body   func([]byte) (int, error)
	begun  bool
}

func (s *shaper) WriteHeader(status int) {
	if !s.begun && status >= 200 {
		s.begun = true
		if s.header != nil {
			s.header(s.Header())
		}
	}
	s.ResponseWriter.WriteHeader(status)
}

func (s *shaper) Write(p []byte) (int, error) {
	if !s.begun {
		s.WriteHeader(http.StatusOK)
	}
	if s.body == nil {
		return s.ResponseWriter.Write(p)
	}
	return s.body(p)
}

// Unwrap is for http.ResponseController.
func (s *shaper) Unwrap() http.ResponseWriter { return s.ResponseWriter }
