package proxy

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"syscall"
	"time"

	"breakwater/pkg/oci"
	"breakwater/proxy/upstream"
	"breakwater/storage"

	"github.com/distribution/distribution/v3/registry/api/errcode"
)

// retryAfter is what clients are told when nobody knows better.
const retryAfter = 10 * time.Second

// errClientGone marks a request that nobody waits for any more.
var errClientGone = errors.New("client gone")

// outageDetail is what a 503 says of the upstream, for people and programs.
type outageDetail struct {
	Registry string     `json:"registry"`
	Upstream string     `json:"upstream,omitempty"`
	Class    string     `json:"class,omitempty"` // token, manifest or blob
	State    string     `json:"state,omitempty"` // of the breaker
	Since    *time.Time `json:"since,omitempty"`
	Reason   string     `json:"reason"`
}

// answerFor turns what an upstream said, or failed to say, about content that is not stored into
// the answer to a client (DESIGN 2). It is the whole policy, in one place:
//
//	                       manifest               blob                   blob on the bare path
//	not found upstream     404 MANIFEST_UNKNOWN   404 BLOB_UNKNOWN       404 BLOB_UNKNOWN
//	401 after token, 403   403 DENIED             404 BLOB_UNKNOWN       404 BLOB_UNKNOWN
//	anything else          503 UNAVAILABLE        503 UNAVAILABLE        404 BLOB_UNKNOWN
//
// A manifest that may exist is never "not found", and nobody is ever told 429. Lists are answered as
// manifests are, but a repository without tags is NAME_UNKNOWN.
func (t target) answerFor(ctx context.Context, err error) error {
	if ctx.Err() != nil && errors.Is(context.Cause(ctx), context.Canceled) {
		return errClientGone
	}
	unknown := errcode.ErrorCodeManifestUnknown
	switch t.kind {
	case kindBlob:
		unknown = errcode.ErrorCodeBlobUnknown
	case kindTags:
		unknown = errcode.ErrorCodeNameUnknown
	}
	up := new(upstream.Error)
	said := errors.As(err, &up)
	waited := errors.Is(err, context.DeadlineExceeded) || errors.Is(err, context.Canceled) || errors.Is(err, errImpatient) || errors.Is(err, errClosed) ||
		errors.Is(err, storage.ErrMismatch)
	switch {
	case !said && !waited:
		return t.ours(err)
	case said && up.Kind == upstream.NotFound:
		return oci.NewError(unknown, "%s: not found at upstream %s", t.ref, up.Upstream)
	case said && up.Kind == upstream.Denied && t.kind == kindBlob:
		return oci.NewError(unknown, "%s: upstream %s refuses it", t.ref, up.Upstream)
	case said && up.Kind == upstream.Denied:
		return oci.NewError(errcode.ErrorCodeDenied, "%s: upstream %s refuses it (%s)", t.ref, up.Upstream, up.Reason)
	}
	e := t.unavailable(err)
	if t.kind == kindBlob && t.bare {
		e.Status, e.Code = http.StatusNotFound, unknown
	}
	return e
}

// ours is the answer where the trouble is the mirror's own: clients go elsewhere, and its log says
// more.
func (t target) ours(err error) error {
	e := oci.AsError(err)
	switch {
	case errors.Is(err, storage.ErrTooLarge):
		e = &oci.Error{Status: http.StatusServiceUnavailable, Code: errcode.ErrorCodeUnavailable, Message: t.ref.String() + " is larger than this mirror's capacity allows"}
	case errors.Is(err, syscall.ENOSPC):
		e = &oci.Error{Status: http.StatusServiceUnavailable, Code: errcode.ErrorCodeUnavailable, Message: "this mirror's disk is full"}
	case !t.bare || t.kind != kindBlob:
		return err
	}
	if t.bare && t.kind == kindBlob {
		e.Status, e.Code = http.StatusNotFound, errcode.ErrorCodeBlobUnknown
	}
	return e
}

// unavailable is the 503 that names the upstream, its state, and since when it is out.
func (t target) unavailable(err error) *oci.Error {
	detail := outageDetail{Registry: t.ref.Registry, Reason: "no answer within the time allowed"}
	e := &oci.Error{Status: http.StatusServiceUnavailable, Code: errcode.ErrorCodeUnavailable, RetryAfter: retryAfter}
	since := ""
	if up := new(upstream.Error); errors.As(err, &up) {
		detail.Upstream, detail.Class, detail.State, detail.Reason = up.Upstream, up.Class, up.State, up.Reason
		if !up.Since.IsZero() {
			utc := up.Since.UTC().Truncate(time.Second)
			detail.Since, since = &utc, ", out since "+utc.Format(time.RFC3339)
		}
		if up.RetryAfter > 0 {
			e.RetryAfter = up.RetryAfter
		}
	} else if errors.Is(err, storage.ErrMismatch) {
		detail.Reason = "upstream sent wrong content"
	} else if errors.Is(err, errClosed) {
		detail.Reason = err.Error()
	}
	e.Detail = detail
	who := "upstream " + detail.Upstream
	if detail.Upstream == "" {
		who = "registry " + t.ref.Registry
	}
	e.Message = fmt.Sprintf("%s is not stored here, and %s is unavailable (%s%s)", t.ref, who, detail.Reason, since)
	return e
}
