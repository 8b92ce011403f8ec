package registrytest

import "net/http"

// Scripted is a handler of any kind that suffers the faults, and keeps the log, of a [Registry]. The
// kinds are those of a registry's paths; tell other requests apart by [Match]'s Path and Func.
type Scripted struct {
	script
	handler http.Handler
}

// NewScripted puts a script before h.
func NewScripted(h http.Handler) *Scripted { return &Scripted{handler: h} }

// ServeHTTP answers one request, as the rules want it or as the handler does.
func (s *Scripted) ServeHTTP(w http.ResponseWriter, r *http.Request) { s.play(w, r, s.handler) }
