package proxy

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"math"
	"net/http"
	"os"
	"slices"
	"sync"
	"time"

	"breakwater/proxy/upstream"
	"breakwater/storage"
	"breakwater/storage/s3"
)

const (
	// lineEvery is how often a caller hears how far a long task is.
	lineEvery = 200 * time.Millisecond
	// lineTimeout is how long a caller may take for a line before the task ends.
	lineTimeout = 30 * time.Second
)

// Status is the answer of GET /v1/status.
type Status struct {
	Version   string           `json:"version"`
	Process   int              `json:"process"`
	Started   time.Time        `json:"started"`
	Data      string           `json:"data"`
	Store     StoreStatus      `json:"store"`
	Shared    *SharedStatus    `json:"shared,omitempty"` // nil if there is no shared store
	Upstreams []UpstreamStatus `json:"upstreams"`
}

// StoreStatus is what the store holds.
type StoreStatus struct {
	Images   int   `json:"images"`   // an index with its platforms is one
	Complete int   `json:"complete"` // of them: all of their blobs are stored
	Contents int   `json:"contents"` // blobs and manifests
	Bytes    int64 `json:"bytes"`    // on the disk
	Reserved int64 `json:"reserved"` // bytes of what is on its way
	Capacity int64 `json:"capacity"` // bytes; 0 is no bound
	Evicted  int64 `json:"evicted"`  // images, since the start
	Built    bool  `json:"built"`    // false soon after a start: the figures are not whole yet
}

// SharedStatus is how the shared store does.
type SharedStatus struct {
	Reads       GateStatus `json:"reads"`
	Writes      GateStatus `json:"writes"`
	Unpublished int        `json:"unpublished"`     // tags and manifests that wait to be written
	Ignored     uint64     `json:"ignored"`         // records that were not believed, since the start
	Offset      float64    `json:"offset"`          // seconds that its clock is ahead of this host's
	Clock       string     `json:"clock,omitempty"` // how wrong this host's clock is, if it is too wrong to publish anything
}

// GateStatus tells if the shared store is asked to read, or to write.
type GateStatus struct {
	State  string    `json:"state"` // up or out
	Since  time.Time `json:"since,omitzero"`
	Reason string    `json:"reason,omitempty"`
}

// UpstreamStatus is how an upstream does in one class of requests.
type UpstreamStatus struct {
	Registry  string    `json:"registry"`
	Upstream  string    `json:"upstream"`
	Class     string    `json:"class"` // token, manifest or blob
	State     string    `json:"state"` // closed, half-open or open
	Since     time.Time `json:"since,omitzero"`
	Reason    string    `json:"reason,omitempty"`    // of the latest failure, while not closed
	HeldUntil time.Time `json:"held_until,omitzero"` // a 429 has asked for it
	Succeeded int64     `json:"succeeded"`           // requests so far
	Failed    int64     `json:"failed"`              //
	Excluded  int64     `json:"excluded"`            // those that say nothing of it
}

// Removed is the answer of DELETE /v1/images/IMAGE.
type Removed struct {
	Image string `json:"image"` // its full name
	Freed int64  `json:"freed"` // bytes; 0 if other tags name the same image
}

// VerifyLine is a line of the answer of POST /v1/verify. Each has one of the three; the last line is a
// report or an error, and if it is neither, the answer is not whole.
type VerifyLine struct {
	Progress *storage.Progress `json:"progress,omitempty"`
	Report   *storage.Report   `json:"report,omitempty"`
	Error    string            `json:"error,omitempty"`
}

// ControlError is the body of any other answer.
type ControlError struct {
	Error string `json:"error"`
}

// control is the API of the control socket: all that changes something, and what is not everybody's
// business. It is a handler of its own, so that no other listener can serve it.
type control struct {
	*Mirror
	version string
	started time.Time
	data    string
	verify  sync.Mutex // one at a time: two would take twice as long
}

// refusal is an error with a status of HTTP.
type refusal struct {
	status int
	error
}

// Control is the handler of the control socket. Whoever reaches it may use it: the listener sees to that,
// and its connections' remote addresses say who it is.
func (m *Mirror) Control(version string) http.Handler {
	c := &control{Mirror: m, version: version, started: time.Now(), data: m.cfg.Load().Data}
	mux := http.NewServeMux()
	mux.HandleFunc("GET /v1/status", c.handle(c.serveStatus))
	mux.HandleFunc("DELETE /v1/images/{image...}", c.handle(c.serveRemove))
	mux.HandleFunc("POST /v1/verify", c.handle(c.serveVerify))
	mux.HandleFunc("/", c.handle(func(_ http.ResponseWriter, r *http.Request) error {
		return refusal{http.StatusNotFound, fmt.Errorf("there is no %s %.100q; there are GET /v1/status, DELETE /v1/images/IMAGE and POST /v1/verify", r.Method, r.URL.Path)}
	}))
	return mux
}

// handle turns an error into an answer, and logs who has asked for what. serve returns an error only if
// it has written nothing.
func (c *control) handle(serve func(http.ResponseWriter, *http.Request) error) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		begun, status := time.Now(), http.StatusOK
		w.Header().Set("Content-Type", "application/json")
		var err error
		if r.ContentLength != 0 {
			w.Header().Set("Connection", "close") // it is not read
			err = refusal{http.StatusBadRequest, errors.New("nothing here takes a body")}
		} else {
			err = serve(w, r)
		}
		attrs := []any{"method", r.Method, "path", r.URL.Path, "client", r.RemoteAddr}
		if err != nil {
			refused := refusal{status: http.StatusInternalServerError}
			errors.As(err, &refused)
			status = refused.status
			w.WriteHeader(status)
			writeJSON(w, ControlError{err.Error()})
			attrs = append(attrs, "err", err)
		}
		c.logger.Info("control", append(attrs, "status", status, "duration", time.Since(begun).Seconds())...)
	}
}

func writeJSON(w http.ResponseWriter, v any) {
	_ = json.NewEncoder(w).Encode(v) // the caller may be gone
}

func (c *control) serveStatus(w http.ResponseWriter, _ *http.Request) error {
	writeJSON(w, c.status())
	return nil
}

func (c *control) status() Status {
	u := c.store.Usage()
	s := Status{Version: c.version, Process: os.Getpid(), Started: c.started, Data: c.data, Upstreams: []UpstreamStatus{},
		Store: StoreStatus{u.Images, u.Complete, u.Contents, u.Bytes, u.Reserved, u.Capacity, u.Evicted, u.Built}}
	if u.Capacity == math.MaxInt64 {
		s.Store.Capacity = 0
	}
	if c.fleet != nil {
		h := c.fleet.bucket.Health()
		s.Shared = &SharedStatus{gateStatus(h.Reads), gateStatus(h.Writes), c.fleet.publish.count(), h.Ignored, h.Offset.Seconds(), misset(h)}
	}
	for _, client := range c.pool.All() {
		for _, h := range client.Health() {
			s.Upstreams = append(s.Upstreams, upstreamStatus(client, h))
		}
	}
	slices.SortStableFunc(s.Upstreams, func(a, b UpstreamStatus) int { return cmp.Compare(a.Registry, b.Registry) })
	return s
}

func gateStatus(g s3.Gate) GateStatus {
	if !g.Open {
		return GateStatus{State: "up"}
	}
	return GateStatus{State: "out", Since: g.Since, Reason: g.Reason}
}

func upstreamStatus(c *upstream.Client, h upstream.Health) UpstreamStatus {
	s := UpstreamStatus{Registry: c.Registry(), Upstream: c.Upstream(), Class: h.Class, State: h.State, Since: h.Since,
		Reason: h.Reason, HeldUntil: h.HeldUntil, Succeeded: h.Succeeded, Failed: h.Failed, Excluded: h.Excluded}
	if time.Until(h.HeldUntil) <= 0 {
		s.HeldUntil = time.Time{}
	}
	return s
}

func (c *control) serveRemove(w http.ResponseWriter, r *http.Request) error {
	ref, err := c.cfg.Load().Image(r.PathValue("image"))
	if err != nil {
		return refusal{http.StatusBadRequest, err}
	}
	if !c.store.Usage().Built {
		w.Header().Set("Retry-After", "10")
		return refusal{http.StatusServiceUnavailable, errors.New("the store is still being looked through after the start: try again in a minute")}
	}
	freed, err := c.store.Remove(ref)
	if errors.Is(err, fs.ErrNotExist) {
		return refusal{http.StatusNotFound, fmt.Errorf("%s is not stored", ref)}
	}
	if err != nil {
		return fmt.Errorf("%s: %w", ref, err)
	}
	c.logger.Info("removed", "repository", ref.Repository.String(), "reference", ref.Identifier(), "size", freed, "client", r.RemoteAddr)
	writeJSON(w, Removed{ref.String(), freed})
	return nil
}

func (c *control) serveVerify(w http.ResponseWriter, r *http.Request) error {
	if !c.verify.TryLock() {
		return refusal{http.StatusConflict, errors.New("the store is being verified already")}
	}
	defer c.verify.Unlock()
	w.Header().Set("Content-Type", "application/jsonl")
	ctx, cancel := context.WithCancel(r.Context())
	defer cancel()
	l := lines{w: w, control: http.NewResponseController(w), cancel: cancel}
	report, err := c.store.Verify(ctx, func(p storage.Progress) {
		if time.Since(l.sent) >= lineEvery {
			l.send(VerifyLine{Progress: &p})
		}
	})
	if errors.Is(err, context.Canceled) {
		err = errors.New("the mirror stops: not all is verified")
	}
	if err != nil {
		l.send(VerifyLine{Error: err.Error()})
		return nil
	}
	l.send(VerifyLine{Report: &report})
	return nil
}

// lines are an answer that goes on for as long as the task behind it.
type lines struct {
	w       http.ResponseWriter
	control *http.ResponseController
	cancel  context.CancelFunc // ends the task when nobody reads
	sent    time.Time
}

func (l *lines) send(line VerifyLine) {
	l.sent = time.Now()
	_ = l.control.SetWriteDeadline(l.sent.Add(lineTimeout))
	err := json.NewEncoder(l.w).Encode(line)
	if err == nil {
		err = l.control.Flush()
	}
	if err != nil {
		l.cancel()
	}
}
