package oci

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strconv"
	"time"

	"github.com/distribution/distribution/v3/registry/api/errcode"
)

// maxErrorBody bounds what is read of another registry's error body: its texts are for people.
const maxErrorBody = 8 << 10

// Error is an answer that is an error: a status, one of the specification's codes, and words for
// the person who reads it. UNAVAILABLE and UNKNOWN are not among the specification's fourteen
// codes and appear on 5xx only (distribution-spec, "Error Codes").
type Error struct {
	Status     int
	Code       errcode.ErrorCode
	Message    string
	Detail     any           // marshalled as it is; nil for none
	RetryAfter time.Duration // sent rounded up to seconds; 0 for none
	Challenge  string        // WWW-Authenticate of a 401; "" for none
}

// NewError returns the error of that code with the status that belongs to it.
func NewError(code errcode.ErrorCode, format string, args ...any) *Error {
	return &Error{Status: code.Descriptor().HTTPStatusCode, Code: code, Message: fmt.Sprintf(format, args...)}
}

// Error is the code and the message.
func (e *Error) Error() string { return e.Code.Descriptor().Value + ": " + e.Message }

type errorBody struct {
	Errors []errorEntry `json:"errors"`
}

type errorEntry struct {
	Code    string `json:"code"`
	Message string `json:"message,omitempty"`
	Detail  any    `json:"detail,omitempty"`
}

// WriteError answers with err as the specification's JSON. An error that is not an *Error is our
// own fault: 500 UNKNOWN, its text kept for the log.
func WriteError(w http.ResponseWriter, err error) {
	e := AsError(err)
	body, err := json.Marshal(errorBody{[]errorEntry{{e.Code.Descriptor().Value, e.Message, e.Detail}}})
	if err != nil {
		body = []byte(`{"errors":[{"code":"UNKNOWN"}]}`)
	}
	h := w.Header()
	for _, name := range []string{"Content-Encoding", "Etag", "Accept-Ranges", "Docker-Content-Digest"} {
		h.Del(name) // they describe a body that is not sent
	}
	if e.Status != http.StatusRequestedRangeNotSatisfiable || h.Get("Content-Range") == "" {
		h.Del("Content-Range") // with a 416 it tells the size (RFC 9110, 15.5.17)
	}
	h.Set("Content-Type", "application/json")
	h.Set("Content-Length", strconv.Itoa(len(body)))
	if e.RetryAfter > 0 {
		h.Set("Retry-After", strconv.FormatInt(int64((e.RetryAfter+time.Second-1)/time.Second), 10))
	}
	if e.Challenge != "" {
		h.Set("Www-Authenticate", e.Challenge)
	}
	w.WriteHeader(e.Status)
	_, _ = w.Write(body)
}

// AsError is the answer that err stands for.
func AsError(err error) *Error {
	var e *Error
	if errors.As(err, &e) {
		return e
	}
	return &Error{Status: http.StatusInternalServerError, Code: errcode.ErrorCodeUnknown, Message: "internal error; the mirror's log says more"}
}

// ReadError reads the first error of another registry's answer, whatever form it has: a body that
// is not the specification's JSON becomes an UNKNOWN with that status.
func ReadError(resp *http.Response) *Error {
	e := &Error{Status: resp.StatusCode, Code: errcode.ErrorCodeUnknown, Message: http.StatusText(resp.StatusCode)}
	raw, err := io.ReadAll(io.LimitReader(resp.Body, maxErrorBody))
	if err != nil {
		return e
	}
	var body errorBody
	if json.Unmarshal(raw, &body) != nil || len(body.Errors) == 0 {
		return e
	}
	e.Code, e.Message = errcode.ParseErrorCode(body.Errors[0].Code), body.Errors[0].Message
	return e
}
