package warm

import (
	"net/http"
	"slices"
	"strings"
	"sync"
)

// answers sees how the mirror came by what it answers (RFC 9211), for one image.
type answers struct {
	next http.RoundTripper

	mu       sync.Mutex // guards all below
	fetched  []string   // manifests/TAG, blobs/DIGEST
	warning  string
	stranger string // what was answered by somebody who is no breakwater
}

// RoundTrip is for http.RoundTripper.
func (a *answers) RoundTrip(r *http.Request) (*http.Response, error) {
	resp, err := a.next.RoundTrip(r)
	if err == nil && resp.StatusCode == http.StatusOK {
		parts := strings.Split(r.URL.Path, "/")
		if kind := len(parts) - 2; kind > 0 && (parts[kind] == "manifests" || parts[kind] == "blobs") {
			a.note(strings.Join(parts[kind:], "/"), resp.Header)
		}
	}
	return resp, err
}

// note takes what a later answer says for the image too: its stale tag names what is pulled.
func (a *answers) note(what string, header http.Header) {
	a.mu.Lock()
	defer a.mu.Unlock()
	status := header.Get("Cache-Status")
	if !strings.HasPrefix(status, "breakwater;") {
		a.stranger = what
	}
	// A tag that upstream had moved, and whose new image had to be fetched.
	moved := strings.Contains(status, "fwd=stale; fwd-status=200") && !strings.Contains(status, "detail=")
	if strings.Contains(status, "fwd=uri-miss") || moved {
		a.fetched = append(a.fetched, what)
	}
	if _, text, ok := strings.Cut(header.Get("Warning"), `"`); ok && a.warning == "" {
		a.warning = strings.TrimSuffix(text, `"`)
	}
}

func (a *answers) sum() (answered, warning string, fetched []string) {
	a.mu.Lock()
	defer a.mu.Unlock()
	slices.Sort(a.fetched)
	switch {
	case a.warning != "":
		answered = Stale
	case a.fetched != nil:
		answered = Fetched
	default:
		answered = Stored
	}
	return answered, a.warning, a.fetched
}
