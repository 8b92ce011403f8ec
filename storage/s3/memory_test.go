package s3

import (
	"bytes"
	"crypto/md5"
	"fmt"
	"io"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	"breakwater/pkg/buckettest"
)

// memory is a bucket without a network, for tests in which time passes by testing/synctest. It knows
// what records, leases and probes need.
type memory struct {
	mu      sync.Mutex // guards what follows
	objects map[string]stored
	skew    time.Duration                               // of its clock
	fault   func(*http.Request) (*http.Response, error) // answers instead, unless nil is returned
	asked   []string                                    // method and name
}

type stored struct {
	raw      []byte
	etag     string
	modified time.Time
}

// connect returns a host's view of the bucket, whose clock the host shares unless it is skewed.
func (m *memory) connect(t *testing.T, change ...func(*Config)) *Bucket {
	t.Helper()
	cfg := Config{Bucket: "fleet", Prefix: prefix, Endpoint: "http://bucket.test", PathStyle: true, Keys: [][]byte{fleetKey}}
	for _, f := range change {
		f(&cfg)
	}
	b, err := newBucket(cfg, m)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(b.Close)
	return b
}

// credentials are found in the environment.
func credentials(t *testing.T) {
	for name, value := range buckettest.Environment() {
		t.Setenv(name, value)
	}
}

func (m *memory) set(f func()) {
	m.mu.Lock()
	defer m.mu.Unlock()
	f()
}

// count is how many such requests there were; "" is any.
func (m *memory) count(method, part string) (n int) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, asked := range m.asked {
		if strings.HasPrefix(asked, method) && strings.Contains(asked, part) {
			n++
		}
	}
	return n
}

func (m *memory) RoundTrip(r *http.Request) (*http.Response, error) {
	name := strings.TrimPrefix(r.URL.Path, "/fleet/"+prefix)
	var body []byte
	if r.Body != nil {
		body, _ = io.ReadAll(r.Body)
		_ = r.Body.Close()
	}
	m.mu.Lock()
	m.asked = append(m.asked, r.Method+" "+name)
	fault := m.fault
	m.mu.Unlock()
	if fault != nil {
		if resp, err := fault(r); resp != nil || err != nil {
			return resp, err
		}
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if signed, err := time.Parse("20060102T150405Z", r.Header.Get("X-Amz-Date")); err != nil || signed.Sub(m.now()).Abs() > 15*time.Minute {
		return m.answer(r, 403, "RequestTimeTooSkewed", stored{}), nil
	}
	old, there := m.objects[name]
	match, none := r.Header.Get("If-Match"), r.Header.Get("If-None-Match")
	switch {
	case match != "" && !there:
		return m.answer(r, 404, "NoSuchKey", stored{}), nil
	case match != "" && match != old.etag, r.Method == http.MethodPut && none == "*" && there:
		return m.answer(r, 412, "PreconditionFailed", stored{}), nil
	case r.Method == http.MethodPut:
		next := stored{body, fmt.Sprintf(`"%x"`, md5.Sum(body)), m.now().Truncate(time.Second)}
		if m.objects == nil {
			m.objects = map[string]stored{}
		}
		m.objects[name] = next
		return m.answer(r, 200, "", stored{etag: next.etag}), nil
	case r.Method == http.MethodDelete:
		delete(m.objects, name)
		return m.answer(r, 204, "", stored{}), nil
	case !there:
		return m.answer(r, 404, "NoSuchKey", stored{}), nil
	case none != "" && none == old.etag:
		return m.answer(r, 304, "", stored{}), nil
	}
	return m.answer(r, 200, "", old), nil
}

func (m *memory) now() time.Time { return time.Now().Add(m.skew) }

// answer is called with the lock held.
func (m *memory) answer(r *http.Request, status int, code string, o stored) *http.Response {
	resp := &http.Response{
		StatusCode: status, Status: http.StatusText(status), Request: r, Proto: "HTTP/1.1", ProtoMajor: 1, ProtoMinor: 1,
		Header: http.Header{"Date": {m.now().UTC().Format(http.TimeFormat)}},
	}
	raw := o.raw
	if code != "" {
		raw = []byte("<Error><Code>" + code + "</Code></Error>")
	}
	if o.etag != "" {
		resp.Header.Set("ETag", o.etag)
	}
	if !o.modified.IsZero() {
		resp.Header.Set("Last-Modified", o.modified.UTC().Format(http.TimeFormat))
	}
	if r.Method == http.MethodHead {
		raw = nil
	}
	resp.ContentLength = int64(len(raw))
	resp.Header.Set("Content-Length", fmt.Sprint(len(raw)))
	resp.Body = io.NopCloser(bytes.NewReader(raw))
	return resp
}

// refuse answers with an error.
func (m *memory) refuse(status int, code string) func(*http.Request) (*http.Response, error) {
	return func(r *http.Request) (*http.Response, error) {
		m.mu.Lock()
		defer m.mu.Unlock()
		return m.answer(r, status, code, stored{}), nil
	}
}

// hang does not answer.
func hang(r *http.Request) (*http.Response, error) {
	<-r.Context().Done()
	return nil, r.Context().Err()
}
