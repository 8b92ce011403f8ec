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
	whole   bool // it is known that all of the image is stored
}

// What Cache-Status says of answers that are as good as upstream's own.
const (
	cacheHit        = "breakwater; hit"                                             // nobody was asked
	cacheTold       = cacheHit + "; detail=fleet"                                   // another host of the fleet has asked
	cacheFetched    = "breakwater; fwd=uri-miss; fwd-status=200"                    // it was not stored
	cacheShared     = cacheFetched + "; detail=shared"                              // it came from the shared store
	cacheUnverified = "breakwater; fwd=uri-miss; fwd-status=206; detail=unverified" // a part, not stored either
	cacheMoved      = "breakwater; fwd=stale; fwd-status=200"                       // upstream had a newer one
	cacheNotStored  = cacheFetched + "; detail=not-stored"                          // nor is it now
	cacheConfirmed  = cacheMoved + "; detail=confirmed"                             // upstream named the stored one
)

// found is what was not stored, and what Cache-Status says of it.
type found[T any] struct {
	content T
	cache   string
}

// ageUnknown is the age of what was confirmed in the future.
const ageUnknown = -1

// hit is an answer that needed no question, since upstream gave it then.
func hit(cache string, at time.Time) provenance {
	return provenance{cache: cache, age: max(0, time.Since(at))}
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
		if age == ageUnknown {
			p.cache = "breakwater; hit; detail=" + detail
		}
	default:
		p.cache = "breakwater; fwd=stale; detail=" + detail
	}
	p.warning = fmt.Sprintf("stale by %s: %s", age.Truncate(time.Second), reason)
	if age == ageUnknown {
		p.warning = "stale by nobody knows how much: " + reason
	}
	return p
}

// unpublished is a stale answer of which the fleet has not been told yet: other hosts may give an older one.
func (p provenance) unpublished() provenance {
	before, _, _ := strings.Cut(p.cache, "; detail=")
	p.cache = before + "; detail=unpublished"
	return p
}

// incomplete is how the last complete image is answered, of that age, in the place of one that was come
// by so.
func incomplete(how provenance, why error, age, freshFor time.Duration) provenance {
	reason := why.Error()
	if up := new(upstream.Error); errors.As(why, &up) {
		reason = fmt.Sprintf("upstream %s: %s", up.Upstream, up.Reason)
	}
	cache, _, _ := strings.Cut(strings.Replace(how.cache, "uri-miss", "stale", 1), "; detail=")
	if strings.HasPrefix(cache, cacheHit) {
		cache = fmt.Sprintf("%s; ttl=%d", cacheHit, int64((freshFor - age).Seconds()))
	}
	return provenance{
		cache:   cache + "; detail=incomplete",
		warning: fmt.Sprintf("stale by %s: the newer image cannot be had: %s", age.Truncate(time.Second), reason),
		age:     age,
		whole:   true,
	}
}

// mark writes the headers, if the request may be answered: what it has waited for may be what a configuration of
// since then does not let it have.
func (p provenance) mark(w *response) error {
	if w.refusal != nil {
		if _, err := w.refusal(); err != nil {
			return err
		}
	}
	w.setCache(p.cache)
	if p.warning != "" {
		w.Header().Set("Warning", `299 - "`+quotable(p.warning)+`"`)
	}
	if p.age > 0 || p.warning != "" && p.age != ageUnknown {
		w.Header().Set("Age", strconv.FormatInt(int64(p.age.Seconds()), 10))
	}
	return nil
}

func (w *response) setCache(status string) {
	w.cache = status
	w.Header()["Cache-Status"] = []string{status}
}

// maxWarning is well below the 4096 bytes of a Warning that clients show.
const maxWarning = 1024

// quotable keeps what an upstream said inside a quoted string, on one line, and short.
func quotable(s string) string {
	s = s[:min(len(s), maxWarning)]
	return strings.Map(func(r rune) rune {
		if r < ' ' || r > '~' || r == '"' || r == '\\' {
			return '\''
		}
		return r
	}, s)
}
