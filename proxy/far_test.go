package proxy

import (
	"bytes"
	"net/http"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"breakwater/pkg/registrytest"
)

// A range far beyond what has arrived does not wait for the fill; one that is near does. Neither costs
// a second download of the whole.
func TestFarRangeIsFetchedOnItsOwn(t *testing.T) {
	bubble(t, oneUpstream, func(r *rig) {
		raw := registrytest.Layer(1, 12<<20)
		dgst := r.quay.PutBlob("org/app", raw)
		path := "/v2/quay.test/org/app/blobs/" + dgst.String()
		whole := func(req *http.Request) bool { return req.Header.Get("Range") == "" }
		r.quay.Fault(registrytest.Match{Kind: registrytest.KindBlob, Func: whole}, registrytest.Stall(1<<20))
		done := make(chan struct{})
		go func() { // the fill goes on without it
			defer close(done)
			r.get(path)
		}()
		synctest.Wait()
		got := r.get(path, "Range: bytes=11534336-11534345").want(r, http.StatusPartialContent)
		if !bytes.Equal(got.body, raw[11534336:11534346]) || got.took > time.Second ||
			got.Header.Get("Content-Range") != "bytes 11534336-11534345/12582912" || !strings.Contains(got.Header.Get("Cache-Status"), "detail=unverified") {
			t.Errorf("%d bytes after %v, %q, %q", len(got.body), got.took, got.Header.Get("Content-Range"), got.Header.Get("Cache-Status"))
		}
		asked := time.Now()
		got = r.get(path, "Range: bytes=2000000-2000009").want(r, http.StatusPartialContent)
		if !bytes.Equal(got.body, raw[2000000:2000010]) || time.Since(asked) < 10*time.Second || strings.Contains(got.Header.Get("Cache-Status"), "unverified") {
			t.Errorf("near: after %v, %q", time.Since(asked), got.Header.Get("Cache-Status"))
		}
		<-done
	})
}
