package buckettest

import (
	"errors"
	"fmt"
	"io"
	"net/http"
	"strconv"
	"strings"
	"time"

	"breakwater/pkg/registrytest"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/service/s3"
	smithyhttp "github.com/aws/smithy-go/transport/http"
)

// Requests that faults are often for. All others: [registrytest.Match].
var (
	All    = registrytest.Match{}
	Reads  = registrytest.Match{Func: func(r *http.Request) bool { return r.Method == http.MethodGet || r.Method == http.MethodHead }}
	Writes = registrytest.Match{Func: func(r *http.Request) bool { return r.Method != http.MethodGet && r.Method != http.MethodHead }}
	Blobs  = registrytest.Match{Path: "/blobs/"}
	Tags   = registrytest.Match{Path: "/_tags/"}
	Leases = registrytest.Match{Path: "/leases/"}
)

// SlowDown answers as S3 does when there are too many requests.
func SlowDown() registrytest.Fault {
	return failure(http.StatusServiceUnavailable, "SlowDown", "Please reduce your request rate.")
}

// Forbidden answers as S3 does to somebody who may not.
func Forbidden() registrytest.Fault {
	return failure(http.StatusForbidden, "AccessDenied", "Access Denied")
}

// Full answers as a store does that has no space left.
func Full() registrytest.Fault {
	return failure(http.StatusInsufficientStorage, "XMinioStorageFull", "Storage backend has reached its minimum free drive threshold.")
}

func failure(status int, code, message string) registrytest.Fault {
	return func(w http.ResponseWriter, r *http.Request, _ http.Handler) {
		w.Header().Set("Content-Type", "application/xml")
		w.WriteHeader(status)
		if r.Method != http.MethodHead {
			fmt.Fprintf(w, "<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n<Error><Code>%s</Code><Message>%s</Message></Error>", code, message)
		}
	}
}

// Swap answers a GET with another object's bytes, as they are when it is asked.
func (b *Bucket) Swap(name string) registrytest.Fault {
	return func(w http.ResponseWriter, r *http.Request, _ http.Handler) {
		in := &s3.GetObjectInput{Bucket: aws.String(Name), Key: &name}
		if span := r.Header.Get("Range"); span != "" {
			in.Range = &span
		}
		if etag := r.Header.Get("If-Match"); etag != "" {
			in.IfMatch = &etag
		}
		out, err := b.client.GetObject(r.Context(), in)
		var refused *smithyhttp.ResponseError
		if errors.As(err, &refused) {
			w.WriteHeader(refused.HTTPStatusCode())
			return
		}
		if err != nil {
			panic(http.ErrAbortHandler)
		}
		defer out.Body.Close()
		w.Header().Set("ETag", *out.ETag)
		w.Header().Set("Last-Modified", out.LastModified.UTC().Format(http.TimeFormat))
		w.Header().Set("Content-Length", strconv.FormatInt(*out.ContentLength, 10))
		if out.ContentRange != nil {
			w.Header().Set("Content-Range", *out.ContentRange)
			w.WriteHeader(http.StatusPartialContent)
		}
		if _, err := io.Copy(w, out.Body); err != nil {
			panic(http.ErrAbortHandler)
		}
	}
}

// Skew sets the bucket's clock, as it is seen in the header of its answers, off by d.
func Skew(d time.Duration) registrytest.Fault {
	return func(w http.ResponseWriter, r *http.Request, next http.Handler) {
		next.ServeHTTP(&skewed{ResponseWriter: w, by: d}, r)
	}
}

type skewed struct {
	http.ResponseWriter
	by   time.Duration
	done bool
}

func (s *skewed) WriteHeader(status int) {
	if !s.done && status >= 200 {
		s.done = true
		for _, name := range []string{"Date", "Last-Modified"} {
			if at, err := http.ParseTime(s.Header().Get(name)); err == nil {
				s.Header().Set(name, at.Add(s.by).Format(http.TimeFormat))
			}
		}
	}
	s.ResponseWriter.WriteHeader(status)
}

func (s *skewed) Write(p []byte) (int, error) {
	if !s.done {
		s.WriteHeader(http.StatusOK)
	}
	return s.ResponseWriter.Write(p)
}

// Unwrap is for http.ResponseController.
func (s *skewed) Unwrap() http.ResponseWriter { return s.ResponseWriter }

// Object selects the requests for one object.
func Object(name string) registrytest.Match {
	return registrytest.Match{Func: func(r *http.Request) bool { return strings.HasSuffix(r.URL.Path, "/"+Name+"/"+name) }}
}
