package upstream

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"syscall"
	"time"
)

// Kind is what an upstream's failure to give something means for whoever asked.
type Kind int

// The four ways of not getting what was asked for.
const (
	Unavailable Kind = iota // no answer, or one that cannot be used: an outage
	Throttled               // 429: an outage too, but the upstream is not to blame
	NotFound                // it answered that it has no such thing
	Denied                  // it answered that we may not have it
)

// Error says why an upstream did not give what it was asked for.
type Error struct {
	Upstream   string        // host of its URL
	Kind       Kind          //
	Class      string        // token, manifest or blob: what failed
	Status     int           // of its answer; 0 if there was none
	Reason     string        // a few words for people, without secrets
	State      string        // of the breaker: closed, open or half-open
	Since      time.Time     // when the outage began; zero if it has not been seen to
	RetryAfter time.Duration // when to come back; 0 if unknown
	Err        error         // what lies beneath; may be nil

	verdict verdict
}

// Error names the upstream and the reason.
func (e *Error) Error() string {
	if e.Err != nil {
		return fmt.Sprintf("upstream %s: %s: %v", e.Upstream, e.Reason, e.Err)
	}
	return fmt.Sprintf("upstream %s: %s", e.Upstream, e.Reason)
}

// Unwrap returns what lies beneath.
func (e *Error) Unwrap() error { return e.Err }

// at names the host that failed, where that is a CDN or a token service and not the upstream itself.
func (e *Error) at(host string) {
	if host != e.Upstream {
		e.Reason = host + ": " + e.Reason
	}
}

// Outage reports whether the error leaves open if the thing exists.
func (e *Error) Outage() bool { return e.Kind == Unavailable || e.Kind == Throttled }

// Fleeting reports whether a second try may end otherwise: the upstream was reached, and failed.
func (e *Error) Fleeting() bool {
	return e.verdict == failure && (e.Status >= 500 || e.Status == 0 && unanswered(e.Err))
}

// Why contexts of this package end; never seen by callers.
var (
	errNoHeader = errors.New("no answer within the time allowed")
	errStalled  = errors.New("body stalled")
)

// failed makes an Error of what a request ended with when no response came, and decides who is to
// blame (DESIGN 8, "What counts").
func (c *Client) failed(ctx context.Context, class class, err error) *Error {
	e := &Error{Upstream: c.base.Host, Class: class.String(), Err: err, verdict: failure, Reason: "failed"}
	var dial *DialError
	var network net.Error
	var alert tls.AlertError
	switch {
	case errors.Is(context.Cause(ctx), errNoHeader), errors.Is(context.Cause(ctx), errStalled):
		e.Reason = context.Cause(ctx).Error()
	case errors.As(err, &dial) && dial.Phase == "guard":
		e.Reason = "named an address that may not be reached"
	case errors.As(err, &dial) && dial.Phase == "setup":
		e.Reason, e.verdict = "its connections are not set up rightly here", excluded
	case ctx.Err() != nil:
		e.Reason, e.verdict = "not waited for", excluded // the client's hurry is not the upstream's fault
	case errors.As(err, &dial):
		e.Reason, e.verdict = dial.Phase+" failed", hostFailure
		if errno := syscall.Errno(0); errors.As(err, &errno) {
			e.Reason += ": " + errno.Error()
		}
	case errors.As(err, &alert):
		e.Reason, e.verdict = "tls failed", hostFailure
	case errors.As(err, &network) && network.Timeout():
		e.Reason = "no answer within the time allowed"
	}
	return e
}

// malformed is the Error of an answer that came and cannot be used.
func (c *Client) malformed(class class, status int, err error) *Error {
	return &Error{Upstream: c.base.Host, Class: class.String(), Status: status, Reason: "sent an answer that cannot be used", Err: err, verdict: failure}
}
