package proxy

import (
	"net/http"
	"testing"
	"time"

	"breakwater/pkg/registrytest"

	"github.com/opencontainers/go-digest"
)

// F20: what ran out of sources is parked; the next request fetches only the rest, also after a restart.
func TestF20ParkedAndResumed(t *testing.T) {
	for name, restart := range map[string]func(*rig){
		"same process":    func(*rig) {},
		"after a restart": func(r *rig) { r.stop(); r.start(oneUpstream) },
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, oneUpstream, func(r *rig) {
				const cut = 3 << 20
				raw := registrytest.Layer(1, 4<<20)
				dgst := r.quay.PutBlob("org/app", raw)
				path := "/v2/quay.test/org/app/blobs/" + dgst.String()
				r.quay.Fault(registrytest.Match{Kind: registrytest.KindBlob}, registrytest.First(1, registrytest.Truncate(cut)), registrytest.After(1, registrytest.Status(http.StatusServiceUnavailable)))
				if got := r.get(path); got.err == nil {
					t.Fatalf("%d, whole: %d bytes", got.StatusCode, len(got.body))
				}
				r.quay.Heal()
				restart(r)
				r.quay.Forget()
				time.Sleep(time.Minute) // the breaker has forgiven
				got := r.get(path).want(r, http.StatusOK)
				if digest.FromBytes(got.body) != dgst {
					t.Error("wrong bytes")
				}
				var sent int64
				for _, req := range r.quay.Requests(registrytest.Match{Kind: registrytest.KindBlob, Method: http.MethodGet, Func: func(req *http.Request) bool { return req.Header.Get("Range") != "" }}) {
					sent += req.Sent
				}
				if sent != int64(len(raw))-cut {
					t.Errorf("fetched %d bytes by Range, want the last %d", sent, len(raw)-cut)
				}
			})
		})
	}
}
