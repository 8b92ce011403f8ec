package proxy

import (
	"net/http"
	"strings"
	"testing"
	"time"

	"breakwater/pkg/registrytest"
)

// One failure of an only upstream is hidden by a second try, whatever is asked for; what refuses, is slow
// or asks us to wait is not asked again.
func TestSecondTry(t *testing.T) {
	for _, tt := range []struct {
		name           string
		times          int
		fault          registrytest.Fault
		manifest, blob int
		tries          int
	}{
		{"500 once", 1, registrytest.Status(500), 200, 200, 2},
		{"503 once", 1, registrytest.Status(503), 200, 200, 2},
		{"page of HTML once", 1, registrytest.Portal(), 503, 503, 1},
		{"503 twice", 2, registrytest.Status(503), 503, 503, 2},
		{"404", 1, registrytest.Status(404), 404, 404, 1},
		{"403", 1, registrytest.Status(403), 403, 404, 1},
		{"429", 1, registrytest.Status(429), 503, 503, 1},
		{"too slow", 1, registrytest.Delay(8 * time.Second), 503, 503, 1},
	} {
		for _, ask := range asks {
			want := tt.manifest
			if strings.HasPrefix(ask.path, "/blobs/") {
				if ask.method == http.MethodHead {
					continue // is asked by GET if it fails, which is no second try
				}
				want = tt.blob
			}
			t.Run(tt.name+" "+ask.method+ask.path, func(t *testing.T) {
				t.Parallel()
				bubble(t, oneUpstream, func(r *rig) {
					r.quay.Push("org/app", "latest", storedImage)
					r.quay.Fault(all, registrytest.First(tt.times, tt.fault))
					if got := r.do(ask.method, app+ask.path).want(r, want); got.took > retryPause && tt.name != "too slow" {
						r.Errorf("took %v", got.took)
					}
					first := r.quay.Requests(all)[0]
					same := registrytest.Match{Method: first.Method, Path: first.URL.Path}
					if tries := r.quay.Count(same); tries != tt.tries {
						r.Errorf("asked %d times, want %d", tries, tt.tries)
					}
				})
			})
		}
	}
}
