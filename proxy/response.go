package proxy

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"net"
	"net/http"
	"os"
	"strconv"
	"syscall"
	"time"

	"breakwater/pkg/oci"

	"github.com/distribution/distribution/v3/registry/api/errcode"
)

const (
	// sendChunk is how much is sent between two looks at the deadline and the watermark.
	sendChunk = 1 << 20
	// sendTimeout is how long a client may take nothing. One on this machine that takes a kilobyte a second
	// is seen to take something each 64 s: loopback's segments are that large.
	sendTimeout = 150 * time.Second
)

// window is a body that is a file, of which a part can be sent already: all of a stored blob, and
// of a fill what is released.
type window interface {
	// Await waits until bytes can be sent, and returns a file that stands where they begin and how many
	// they are, at most limit. At the end it returns io.EOF.
	Await(limit int64) (*os.File, int64, error)
}

// response is the one ResponseWriter of a request. It owns the body: it hands files to the kernel a
// chunk at a time, keeps the write deadline ahead of clients that make progress, and gives
// ServeContent's plain 416 the specification's form.
type response struct {
	http.ResponseWriter
	control *http.ResponseController
	status  int
	sent    int64 // bytes of body
	plain   bool  // the connection is the kernel's: no TLS
	paced   bool  // the deadline moves with what the client takes, and not only with what the kernel does
	silent  bool  // the body that ServeContent writes is not the one to send
	cache   string
	broken  error // why the body ended short
	// refusal is why the request, which was let in, may not be answered after all, and in a word.
	refusal func() (reason string, err error)
}

// errCut is the error of a file that is shorter than it was when it was opened.
var errCut = fmt.Errorf("the file has been cut: %w", io.ErrUnexpectedEOF)

// unreadable reports whether a body ended short because its file cannot be read, and not for the client's
// sake: the kernel gives both errors for the same sendfile, but these never for a connection.
func unreadable(err error) bool {
	for _, disk := range [...]error{errCut, syscall.EIO, syscall.EBADMSG, syscall.EUCLEAN, syscall.ENODATA} {
		if errors.Is(err, disk) {
			return true
		}
	}
	return false
}

// hungUp reports whether a body ended short because its client has left.
func hungUp(err error) bool {
	return errors.Is(err, syscall.EPIPE) || errors.Is(err, syscall.ECONNRESET) || errors.Is(err, net.ErrClosed) || errors.Is(err, context.Canceled)
}

func newResponse(w http.ResponseWriter, r *http.Request) *response {
	return &response{ResponseWriter: w, control: http.NewResponseController(w), plain: r.TLS == nil}
}

// Unwrap is for http.ResponseController.
func (w *response) Unwrap() http.ResponseWriter { return w.ResponseWriter }

func (w *response) WriteHeader(status int) {
	if w.status != 0 {
		return
	}
	w.status = status
	switch {
	case w.silent:
	case status == http.StatusRequestedRangeNotSatisfiable:
		w.replace(oci.NewError(errcode.ErrorCodeRangeInvalid, "the range is malformed or outside the content %s", w.Header().Get("Content-Range")))
		return
	case status == http.StatusPreconditionFailed:
		w.replace(&oci.Error{Status: status, Code: errcode.ErrorCodeUnsupported, Message: "the request's precondition does not hold"})
		return
	}
	w.ResponseWriter.WriteHeader(status)
}

// replace sends e in the place of ServeContent's own words.
func (w *response) replace(e *oci.Error) {
	w.status, w.silent = 0, true
	oci.WriteError(struct{ http.ResponseWriter }{w.ResponseWriter}, e)
	w.status = e.Status
}

func (w *response) Write(p []byte) (int, error) {
	if w.status == 0 {
		w.WriteHeader(http.StatusOK)
	}
	if w.silent {
		return len(p), nil
	}
	n, err := w.ResponseWriter.Write(p)
	w.sent += int64(n)
	return n, err
}

// sendBytes sends what is in memory. Only a request with conditions or ranges needs ServeContent.
func (w *response) sendBytes(r *http.Request, body []byte) {
	for _, name := range [...]string{"Range", "If-None-Match", "If-Match", "If-Modified-Since", "If-Unmodified-Since"} {
		if r.Header[name] != nil {
			http.ServeContent(w, r, "", time.Time{}, bytes.NewReader(body))
			return
		}
	}
	w.Header()["Accept-Ranges"] = []string{"bytes"}
	w.Header()["Content-Length"] = []string{strconv.Itoa(len(body))}
	w.WriteHeader(http.StatusOK)
	if r.Method != http.MethodHead {
		_, _ = w.Write(body) // an error is the client's leaving
	}
}

// ReadFrom sends src. A file is sent by the kernel, up to what is released of it, and nothing else
// is ever handed over that the kernel could read by itself.
func (w *response) ReadFrom(src io.Reader) (int64, error) {
	if w.status == 0 {
		w.WriteHeader(http.StatusOK)
	}
	left, inner := int64(math.MaxInt64), src
	if limited, ok := src.(*io.LimitedReader); ok {
		left, inner = limited.N, limited.R
	}
	body, ok := inner.(window)
	if !ok {
		_ = w.control.Flush() // before it waits: the header is the client's
		return io.Copy(patient{w}, src)
	}
	var total int64
	for total < left {
		_ = w.control.Flush() // and so is what has come
		file, n, err := body.Await(min(sendChunk, left-total))
		if errors.Is(err, io.EOF) && left == math.MaxInt64 {
			return total, nil // of unknown size: that was all
		}
		if err != nil {
			w.broken = err
			return total, err
		}
		sent, err := w.send(file, n)
		total += sent
		if err == nil && sent == 0 {
			err = errCut
		}
		if err != nil {
			w.broken = err
			return total, err
		}
	}
	return total, nil
}

// send hands n bytes of file to the connection. A deadline that passes while bytes go out is moved;
// through TLS that would be too late, so that it is moved with every small piece.
func (w *response) send(file *os.File, n int64) (sent int64, err error) {
	if !w.plain {
		return io.Copy(patient{w}, io.LimitReader(file, n))
	}
	for sent < n {
		_ = w.control.SetWriteDeadline(time.Now().Add(sendTimeout)) // in-memory connections have none
		m, err := io.Copy(w.ResponseWriter, io.LimitReader(file, n-sent))
		sent += m
		w.sent += m
		if err != nil && (m == 0 || w.paced || !errors.Is(err, os.ErrDeadlineExceeded)) {
			return sent, err
		}
		if err == nil && m == 0 {
			return sent, errCut
		}
	}
	return sent, nil
}

// patient moves the deadline with each Write, and hides ReadFrom, so that io.Copy does not come back
// to it.
type patient struct{ w *response }

func (p patient) Write(b []byte) (int, error) {
	_ = p.w.control.SetWriteDeadline(time.Now().Add(sendTimeout))
	n, err := p.w.Write(b)
	if err == nil {
		_ = p.w.control.Flush()
	}
	return n, err
}
