package proxy

import (
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"

	"breakwater/proxy/upstream"
)

// provenance says how an answer was come by, in the headers that tell it (RFC 9211 for Cache-Status,
// RFC 9111 for Age and, now obsolete but shown by clients, Warning).
type provenance struct {
	cache   string
	warning string
	age     time.Duration
}

// hit is an answer that nobody was asked about.
func hit() provenance { return provenance{cache: "breakwater; hit"} }

// forwarded is an answer that upstream gave or confirmed.
func forwarded(why string, status int, detail string) provenance {
	cache := "breakwater; fwd=" + why + "; fwd-status=" + strconv.Itoa(status)
	if detail != "" {
		cache += "; detail=" + detail
	}
	return provenance{cache: cache}
}

// stale is a stored answer given because upstream did not confirm it: err says why.
func stale(err error, age, freshFor time.Duration) provenance {
	p := provenance{age: age}
	up := new(upstream.Error)
	reason, detail := "upstream did not answer in time", "timeout"
	if errors.As(err, &up) {
		reason, detail = fmt.Sprintf("upstream %s: %s", up.Upstream, up.Reason), "outage"
		if up.Kind != upstream.Unavailable {
			detail = [...]string{upstream.Throttled: "throttled", upstream.NotFound: "not-found", upstream.Denied: "denied"}[up.Kind]
		}
	}
	switch {
	case up.Status != 0:
		p.cache = fmt.Sprintf("breakwater; fwd=stale; fwd-status=%d; detail=%s", up.Status, detail)
	case up.State == "open" || up.State == "held off":
		p.cache = fmt.Sprintf("breakwater; hit; ttl=%d; detail=%s", int64((freshFor - age).Seconds()), detail)
	default:
		p.cache = "breakwater; fwd=stale; detail=" + detail
	}
	p.warning = fmt.Sprintf("stale by %s: %s", age.Round(time.Second), reason)
	return p
}

// mark writes the headers.
func (p provenance) mark(w *response) {
	w.setCache(p.cache)
	if p.warning != "" {
		w.Header().Set("Warning", `299 - "`+quotable(p.warning)+`"`)
		w.Header().Set("Age", strconv.FormatInt(int64(p.age.Seconds()), 10))
	}
}

func (w *response) setCache(status string) {
	w.cache = status
	w.Header()["Cache-Status"] = []string{status}
}

// quotable keeps what an upstream said inside a quoted string and on one line.
func quotable(s string) string {
	return strings.Map(func(r rune) rune {
		if r < ' ' || r > '~' || r == '"' || r == '\\' {
			return '\''
		}
		return r
	}, s)
}
