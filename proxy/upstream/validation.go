package upstream

import (
	"net/http"
	"strconv"
	"strings"
	"time"
)

// Validation is what an answer says of its own age. Other registries answer for themselves, now; an
// upstream that is a Breakwater too says when it was last told so (DESIGN 8).
type Validation struct {
	ValidatedAt time.Time // when a registry last said this
	Stale       bool      // and could not be asked again: the answer confirms nothing
}

// validation reads the headers of RFC 9211 (Cache-Status) and RFC 9111 (Age, Warning) as Breakwater
// writes them.
func validation(h http.Header) Validation {
	now := time.Now()
	params, ok := breakwaterStatus(h)
	if !ok {
		return Validation{ValidatedAt: now}
	}
	at := now
	if date, err := http.ParseTime(h.Get("Date")); err == nil && date.Before(now) {
		at = date
	}
	if age, err := strconv.ParseInt(h.Get("Age"), 10, 32); err == nil && age > 0 {
		at = at.Add(-time.Duration(age) * time.Second)
	}
	v := Validation{ValidatedAt: at}
	for _, warning := range h.Values("Warning") {
		v.Stale = v.Stale || strings.HasPrefix(warning, "299 ")
	}
	answered := params["fwd-status"] == "200" || params["detail"] == "confirmed" // it asked, and was told
	v.Stale = v.Stale || params["fwd"] == "stale" && !answered || strings.HasPrefix(params["ttl"], "-")
	return v
}

// breakwaterStatus is the parameters that the nearest Breakwater has put into Cache-Status.
func breakwaterStatus(h http.Header) (params map[string]string, ok bool) {
	for member := range strings.SplitSeq(strings.Join(h.Values("Cache-Status"), ","), ",") {
		name, rest, _ := strings.Cut(member, ";")
		if strings.TrimSpace(name) != "breakwater" {
			continue
		}
		ok, params = true, map[string]string{}
		for param := range strings.SplitSeq(rest, ";") {
			key, value, _ := strings.Cut(strings.TrimSpace(param), "=")
			params[key] = strings.Trim(value, `"`)
		}
	}
	return params, ok
}
