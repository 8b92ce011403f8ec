package s3

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	awshttp "github.com/aws/aws-sdk-go-v2/aws/transport/http"
	"github.com/aws/aws-sdk-go-v2/config"
	"github.com/aws/aws-sdk-go-v2/service/s3"
	"github.com/aws/smithy-go"
	"github.com/aws/smithy-go/logging"
	smithyhttp "github.com/aws/smithy-go/transport/http"
)

const (
	// headerLimit is how long a read, or a lease, may take until its header has come: what a bucket
	// that is out costs, once (FAULTS F41).
	headerLimit = 2 * time.Second
	// recordLimit and assembleLimit are for writes, with which nobody waits.
	recordLimit   = 5 * time.Second
	assembleLimit = 2 * time.Minute
	// listLimit is for a page of a listing.
	listLimit = 15 * time.Second
	// credentialsLimit is for the look-up of credentials, which may ask other services.
	credentialsLimit = 10 * time.Second
	writeTries       = 3
	writeBackOff     = 200 * time.Millisecond
)

// errSlow is the cause of the end of a request that took too long.
var errSlow = errors.New("no answer in time")

// once makes one request, within a limit that its turn is waited for in too.
func once[T any](ctx context.Context, g *gate, limit time.Duration, ask func(context.Context) (T, error)) (T, error) {
	ctx, cancel := g.b.bounded(ctx, limit)
	defer cancel()
	var zero T
	p, err := g.enter(ctx)
	if err != nil {
		return zero, err
	}
	defer p.leave()
	out, err := ask(ctx)
	if err != nil {
		err = p.unhurried(explain(ctx, err))
	}
	p.settle(judge(err), err)
	return out, err
}

// often makes a write again that a server has failed.
func often[T any](ctx context.Context, g *gate, limit time.Duration, ask func(context.Context) (T, error)) (T, error) {
	for try := 1; ; try++ {
		out, err := once(ctx, g, limit, ask)
		if err == nil || try == writeTries || !transient(err) || !pause(ctx, jitter(writeBackOff<<try)) {
			return out, err
		}
	}
}

// bounded ends with ctx, at Close, and after the limit.
func (b *Bucket) bounded(ctx context.Context, limit time.Duration) (context.Context, context.CancelFunc) {
	ctx, timeout := context.WithTimeoutCause(ctx, limit, errSlow)
	ctx, cancel := context.WithCancelCause(ctx)
	unhook := context.AfterFunc(b.ctx, func() { cancel(errClosed) })
	return ctx, func() {
		unhook()
		cancel(context.Canceled)
		timeout()
	}
}

// ownError is an error that the bucket has no part in: the caller has left, or its data is not what
// it should be.
type ownError struct{ err error }

func (e *ownError) Error() string { return e.err.Error() }
func (e *ownError) Unwrap() error { return e.err }

// explain says why a request has ended that its context has ended.
func explain(ctx context.Context, err error) error {
	switch cause := context.Cause(ctx); {
	case cause == nil || status(err) != 0:
		return err
	case errors.Is(cause, errSlow):
		return cause
	default:
		return &ownError{cause}
	}
}

// status is that of the answer, 0 if there was none.
func status(err error) int {
	var answer *smithyhttp.ResponseError
	if errors.As(err, &answer) {
		return answer.HTTPStatusCode()
	}
	return 0
}

// notThere is how a server names what is not there, in a bucket that is.
var notThere = []string{"NoSuchKey", "NoSuchUpload"}

// headed reports whether it is the answer to a HEAD, which cannot name what is not there.
func headed(err error) bool {
	var answer *smithyhttp.ResponseError
	return errors.As(err, &answer) && answer.HTTPResponse() != nil && answer.HTTPResponse().Request != nil &&
		answer.HTTPResponse().Request.Method == http.MethodHead
}

// judge says what a request's error says of the bucket. The caller's own leaving is none of its faults.
func judge(err error) verdict {
	var dial *net.OpError
	var api smithy.APIError
	switch code := status(err); {
	case err == nil:
		return good
	case errors.As(err, new(*ownError)):
		return none
	case errors.Is(err, errSlow):
		return hopeless
	case code == http.StatusNotFound && !headed(err) && (!errors.As(err, &api) || !slices.Contains(notThere, api.ErrorCode())):
		return bad // NoSuchBucket, an unknown account, or no S3 server at all
	case code == http.StatusNotModified, code == http.StatusNotFound, code == http.StatusConflict,
		code == http.StatusPreconditionFailed, code == http.StatusRequestedRangeNotSatisfiable:
		return good
	case code != 0:
		return bad
	case errors.As(err, &dial) && dial.Op == "dial", errors.As(err, new(*net.DNSError)):
		return hopeless
	}
	return bad
}

// transient reports whether the same request may succeed when it is made again.
func transient(err error) bool {
	if errors.Is(err, ErrOut) || judge(err) != bad {
		return false
	}
	code := status(err)
	return code == 0 || code >= 500 && code != http.StatusNotImplemented && code != http.StatusInsufficientStorage
}

// absent reports whether the answer was that there is no such object.
func absent(err error) bool { return status(err) == http.StatusNotFound && judge(err) == good }

// lost reports whether a conditional write has come too late. Amazon answers 409 to one of two that
// come at once, and 404 to an If-Match on an object that is gone.
func lost(err error) bool {
	switch status(err) {
	case http.StatusPreconditionFailed, http.StatusConflict:
		return true
	}
	return absent(err)
}

// apiError is what the bucket has said, "" if it has not.
func apiError(err error) string {
	code := status(err)
	if code == 0 {
		return ""
	}
	text := fmt.Sprintf("%d %s", code, http.StatusText(code))
	var api smithy.APIError
	if errors.As(err, &api) && api.ErrorCode() != "" && api.ErrorCode() != "UnknownError" {
		message := api.ErrorMessage()
		text = fmt.Sprintf("%d %s: %s", code, api.ErrorCode(), message[:min(len(message), 200)])
	}
	return strings.TrimSuffix(text, ": ")
}

// isSDK reports whether the error is an envelope of the SDK's.
func isSDK(err any) bool {
	switch err.(type) {
	case *smithy.OperationError, *smithyhttp.RequestSendError, *awshttp.ResponseError, *smithyhttp.ResponseError, *smithy.CanceledError:
		return true
	}
	return false
}

// wire counts requests and reads the clock off their answers.
type wire struct {
	next  http.RoundTripper
	clock *clock
	count [6]atomic.Uint64 // in the order of requestKinds
}

var requestKinds = [...]string{"get", "head", "put", "post", "delete", "list"}

// RoundTrip makes one request.
func (w *wire) RoundTrip(r *http.Request) (*http.Response, error) {
	w.count[requestKind(r)].Add(1)
	sent := time.Now()
	resp, err := w.next.RoundTrip(r)
	if err != nil {
		return nil, err
	}
	if date, err := http.ParseTime(resp.Header.Get("Date")); err == nil {
		w.clock.observe(sent, time.Now(), date)
	}
	return resp, nil
}

func requestKind(r *http.Request) int {
	query := r.URL.Query()
	switch {
	case r.Method == http.MethodGet && (query.Has("list-type") || query.Has("uploads")):
		return 5
	case r.Method == http.MethodHead:
		return 1
	case r.Method == http.MethodPut:
		return 2
	case r.Method == http.MethodPost:
		return 3
	case r.Method == http.MethodDelete:
		return 4
	}
	return 0
}

func (w *wire) close() {
	if t, ok := w.next.(interface{ CloseIdleConnections() }); ok {
		t.CloseIdleConnections()
	}
}

// chain finds credentials where the SDK does: environment, files, and the services of Amazon's
// machines. Each time anew, since files change; the cache round it asks when they expire.
type chain struct {
	ctx    context.Context // until Close: the cache's own never ends
	region string
}

// Retrieve looks credentials up.
func (c *chain) Retrieve(context.Context) (aws.Credentials, error) {
	ctx, cancel := context.WithTimeout(c.ctx, credentialsLimit)
	defer cancel()
	client := awshttp.NewBuildableClient().WithTransportOptions(func(t *http.Transport) { t.DisableKeepAlives = true })
	cfg, err := config.LoadDefaultConfig(ctx, config.WithRegion(c.region), config.WithHTTPClient(client), config.WithLogger(logging.Nop{}))
	if err != nil {
		return aws.Credentials{}, errors.New("credentials: " + err.Error())
	}
	found, err := cfg.Credentials.Retrieve(ctx)
	if err != nil { // not wrapped: the answer of whom it was asked of is none of the bucket's
		return aws.Credentials{}, errors.New("credentials: " + err.Error())
	}
	return found, nil
}

// Probe asks the bucket, until it has answered or is known to be out: so that what keeps it from being
// used, a wrong clock too, is known before it is needed.
func (b *Bucket) Probe(ctx context.Context) {
	for range failuresToOpen {
		_, err := once(ctx, b.reads, headerLimit, func(ctx context.Context) (struct{}, error) { return struct{}{}, b.probeReads(ctx) })
		if judge(err) <= good {
			return
		}
	}
}

// probeReads asks for an object that may be there or not.
func (b *Bucket) probeReads(ctx context.Context) error {
	out, err := b.client.GetObject(ctx, &s3.GetObjectInput{Bucket: &b.cfg.Bucket, Key: b.key(versionName)})
	if err != nil {
		return err
	}
	return out.Body.Close()
}

// probeWrites stores a lease that nobody asks for: Collect removes it.
func (b *Bucket) probeWrites(ctx context.Context) error {
	in := b.putInput(leaseName("probe"), []byte("probe\n"))
	_, err := b.client.PutObject(ctx, in)
	return err
}

// Health is what is known of the bucket's state.
type Health struct {
	Reads, Writes Gate
	Requests      map[string]uint64 // by kind: get, head, put, post, delete, list
	Failures      uint64            // of requests
	Ignored       uint64            // records that are not the fleet's, malformed, or replayed
	Offset        time.Duration     // of the bucket's clock from this host's
	ClockKnown    bool              // the bucket has answered
	ClockWrong    bool              // by over 5 minutes: no record is published
}

// Health returns the state as it is now.
func (b *Bucket) Health() Health {
	h := Health{
		Reads: b.reads.state(), Writes: b.writes.state(),
		Requests: map[string]uint64{},
		Failures: b.reads.failed.Load() + b.writes.failed.Load(),
		Ignored:  b.keys.ignored.Load(),
	}
	for i, kind := range requestKinds {
		h.Requests[kind] = b.wire.count[i].Load()
	}
	h.Offset, h.ClockKnown = b.clock.offset()
	h.ClockWrong = b.clock.wrong()
	return h
}
