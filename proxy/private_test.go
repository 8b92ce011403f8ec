package proxy

import (
	"fmt"
	"net/http"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"breakwater/pkg/registrytest"
)

// quay.test is asked with an account, open.test, which is the same host, without one.
const withAccount = `
registries:
  quay.test: {upstreams: [{url: "https://quay.test", credentials: {username: ci, password_file: PASSWORD}}]}
  open.test: {upstreams: [{url: "https://quay.test"}]}
  docker.io: {upstreams: [{url: "http://hub.test:80"}]}
`

// The repositories of a registry of which the public may see nothing. upstream has the image in the
// first two.
const (
	theirs = "/v2/quay.test/org/app"
	copied = "/v2/quay.test/org/copied"
	other  = "/v2/quay.test/org/other"
	nobody = "/v2/open.test/org/app"
)

// private runs f with storedImage stored, for each way of showing an account.
func private(t *testing.T, yaml string, f func(*rig)) {
	for _, scheme := range []string{"Basic", "Bearer"} {
		t.Run(scheme, func(t *testing.T) {
			t.Parallel()
			bubble(t, yaml, func(r *rig) {
				r.quay.Configure(registrytest.Config{Auth: registrytest.Auth{Scheme: scheme, Users: map[string]string{"ci": registrytest.Canary}}})
				r.quay.Serve(r, r.network, "quay.test:443")
				r.quay.Push("org/app", "latest", storedImage)
				r.quay.Push("org/copied", "latest", storedImage)
				r.quay.Push("org/other", "latest", unseenImage)
				r.pull("latest", storedImage)
				time.Sleep(age)
				r.quay.Forget()
				f(r)
			})
		})
	}
}

// down takes the upstream away, once no connection to it is left.
func (r *rig) down() {
	time.Sleep(age)
	r.network.SetLink("quay.test:443", registrytest.Link{Refuse: true})
}

// refused fails the test unless a repository gets nothing of storedImage.
func (r *rig) refused(repo string, manifest, blob int) {
	r.Helper()
	layer := "/blobs/" + storedImage.Blobs[1].Digest.String()
	for _, method := range []string{http.MethodGet, http.MethodHead} {
		for _, got := range []answer{
			r.do(method, repo+"/manifests/"+storedImage.Digest().String()).want(r, manifest),
			r.do(method, repo+layer).want(r, blob),
			r.do(method, repo+layer, "Range: bytes=0-9").want(r, blob),
			r.do(method, repo+layer, `If-None-Match: "`+storedImage.Blobs[1].Digest.String()+`"`).want(r, blob),
		} {
			if got.Header.Get("Www-Authenticate") != "" || got.Header.Get("Docker-Content-Digest") != "" || got.Header.Get("Content-Range") != "" {
				r.Errorf("%s %s: %v", method, got.Request.URL, got.Header)
			}
		}
	}
}

// served fails the test unless a repository gets all of storedImage, fresh.
func (r *rig) served(repo string) {
	r.Helper()
	layer := storedImage.Blobs[1]
	for _, method := range []string{http.MethodHead, http.MethodGet} {
		manifest := r.do(method, repo+"/manifests/"+storedImage.Digest().String()).want(r, 200).fresh(r)
		blob := r.do(method, repo+"/blobs/"+layer.Digest.String()).want(r, 200)
		part := r.do(method, repo+"/blobs/"+layer.Digest.String(), "Range: bytes=10-19")
		if method == http.MethodGet {
			manifest.is(r, storedImage.Raw)
			blob.is(r, layer.Bytes)
			part.want(r, 206).is(r, layer.Bytes[10:20])
		}
	}
}

func TestPrivateIsServedOnlyWhereConfirmed(t *testing.T) {
	private(t, withAccount, func(r *rig) {
		r.served(theirs)
		if r.asked() > 0 {
			r.Errorf("%d requests upstream for what is confirmed", r.asked())
		}
		r.refused(other, 404, 404)
		r.get(other+"/manifests/latest").want(r, 200).is(r, unseenImage.Raw)
		r.refused(nobody, 403, 404)
		r.get(nobody+"/manifests/latest").want(r, 403)

		r.quay.Forget()
		r.served(copied) // by one HEAD each
		if n := r.quay.Count(gets); n > r.quay.Count(registrytest.Match{Kind: registrytest.KindToken}) {
			r.Errorf("%d GETs upstream for what is stored: %v", n, r.quay.Requests(gets))
		}
		r.network.SetLink("quay.test:443", registrytest.Link{BlackHole: true})
		r.quay.Forget()
		r.served(copied)
		r.served(theirs)
		if r.asked() > 0 {
			r.Errorf("%d requests upstream for what is confirmed", r.asked())
		}
	})
}

// A tag of another repository may name the same manifest: that confirms the manifest there, and
// nothing that it lists.
func TestPrivateManifestConfirmsNoBlob(t *testing.T) {
	private(t, withAccount, func(r *rig) {
		r.quay.PutManifest("org/other", "same", storedImage.MediaType, storedImage.Raw)
		r.get(other+"/manifests/same").want(r, 200).is(r, storedImage.Raw)
		r.get(other+"/manifests/"+storedImage.Digest().String()).want(r, 200).is(r, storedImage.Raw)
		layer := "/blobs/" + storedImage.Blobs[1].Digest.String()
		for _, method := range []string{http.MethodGet, http.MethodHead} {
			r.do(method, other+layer).want(r, 404)
		}
		r.down()
		for _, method := range []string{http.MethodGet, http.MethodHead} {
			r.do(method, other+layer).want(r, 503)
		}
	})
}

// What confirms nothing: an outage, a portal's 200 for everything, a refusal.
func TestPrivateStaysSoInTrouble(t *testing.T) {
	for name, tt := range map[string]struct {
		given          func(*rig)
		manifest, blob int
	}{
		"refuses": {(*rig).down, 503, 503},
		"hangs":   {hangs, 503, 503},
		"500":     {suffers(all, registrytest.Status(500)), 503, 503},
		"429":     {suffers(all, registrytest.Status(429)), 503, 503},
		"403":     {suffers(all, registrytest.Status(403)), 403, 404},
		"portal":  {suffers(all, registrytest.Portal()), 503, 503},
	} {
		t.Run(name, func(t *testing.T) {
			private(t, withAccount, func(r *rig) {
				tt.given(r)
				r.refused(other, tt.manifest, tt.blob)
				r.refused(copied, tt.manifest, tt.blob)
				r.served(theirs)
				for _, repo := range []string{other, copied} {
					if got := r.get(repo + "/manifests/latest"); got.StatusCode != tt.manifest {
						r.Errorf("%s: %d", repo, got.StatusCode)
					}
				}
			})
		})
	}
}

// The referrers of a private manifest say something about it: they are not to be had either.
func TestPrivateReferrers(t *testing.T) {
	private(t, withAccount, func(r *rig) {
		path := "/referrers/" + storedImage.Digest().String()
		r.get(theirs+path).want(r, 200)
		r.down()
		r.get(theirs+path).want(r, 200)
		r.get(other+path).want(r, 503)
		r.get(nobody+path).want(r, 503)
	})
}

func TestPrivateSurvivesRestart(t *testing.T) {
	private(t, withAccount, func(r *rig) {
		r.served(copied)
		r.stop()
		r.start(withAccount)
		r.down()
		r.served(theirs)
		r.served(copied)
		r.refused(other, 503, 503)
	})
}

// An account that is used for its rate limit makes nothing private.
func TestPublicByPattern(t *testing.T) {
	private(t, "public: [quay.test/org/*]"+withAccount, func(r *rig) {
		r.network.SetLink("quay.test:443", registrytest.Link{BlackHole: true})
		r.served(theirs)
		r.served(other)
		r.served(nobody)
		if r.asked() > 0 {
			r.Errorf("%d requests upstream for what is public", r.asked())
		}
	})
}

func TestAnonymousIsPublic(t *testing.T) {
	bubble(t, oneUpstream, func(r *rig) {
		r.quay.Push("org/app", "latest", storedImage)
		r.pull("latest", storedImage)
		time.Sleep(age)
		r.quay.Forget()
		r.network.SetLink("quay.test:80", registrytest.Link{BlackHole: true})
		r.served(theirs)
		r.served(other)
		r.served("/v2/library/app")
		if r.asked() > 0 {
			r.Errorf("%d requests upstream for what is public", r.asked())
		}
	})
}

// A download on its way is followed by those to whom upstream gives it, and by nobody else.
func TestPrivateInFlight(t *testing.T) {
	private(t, withAccount, func(r *rig) {
		dgst := r.quay.PutBlob("org/app", bigLayer.Bytes)
		r.quay.PutBlob("org/copied", bigLayer.Bytes)
		r.quay.Fault(registrytest.Match{Method: http.MethodGet, Path: "/org/app/blobs/"}, registrytest.Drip(256<<10, time.Second))
		blob := "/blobs/" + dgst.String()
		var clients sync.WaitGroup
		clients.Go(func() { r.get(theirs+blob).want(r, 200).is(r, bigLayer.Bytes) })
		time.Sleep(time.Millisecond)
		for _, method := range []string{http.MethodGet, http.MethodHead} {
			for repo, status := range map[string]int{theirs: 200, copied: 200, other: 404, nobody: 404} {
				for _, header := range []string{"Range: bytes=0-9", "Accept: */*"} {
					clients.Go(func() {
						got := r.do(method, repo+blob, header)
						if got.StatusCode == http.StatusPartialContent {
							got.StatusCode = http.StatusOK
						}
						if got.want(r, status); got.took > 0 {
							r.Errorf("%s %s was answered after %v", method, repo, got.took)
						}
						if len(got.body) > 10 && status == 200 {
							got.is(r, bigLayer.Bytes)
						}
					})
				}
			}
		}
		clients.Wait()
		for _, repo := range []string{theirs, copied} { // what is private is fetched for each repository until it is stored
			path := "/" + strings.SplitN(repo, "/", 4)[3]
			n := 0
			for _, req := range r.quay.Requests(registrytest.Match{Kind: registrytest.KindBlob, Method: http.MethodGet, Path: path}) {
				if req.Status == http.StatusOK {
					n++
				}
			}
			if n != 1 {
				r.Errorf("%d downloads of %s, want 1", n, path)
			}
		}
		synctest.Wait()
		r.get(other+blob).want(r, 404)
		r.get(nobody+blob).want(r, 404)
		r.down()
		r.get(theirs+blob).want(r, 200).is(r, bigLayer.Bytes)
		r.get(copied+blob).want(r, 200).is(r, bigLayer.Bytes)
	})
}

// The first to ask may not have it; that must not fail those who may, nor let it in through them.
func TestPrivateInFlightBehindAnother(t *testing.T) {
	private(t, withAccount, func(r *rig) {
		dgst := r.quay.PutBlob("org/app", bigLayer.Bytes)
		r.quay.Fault(blobs, registrytest.Delay(time.Second))
		var clients sync.WaitGroup
		for i, status := range []int{404, 200, 404} {
			clients.Go(func() {
				time.Sleep(time.Duration(i) * time.Millisecond)
				repo := []string{other, theirs, nobody}[i]
				if got := r.get(fmt.Sprint(repo, "/blobs/", dgst)).want(r, status); status == 200 {
					got.is(r, bigLayer.Bytes)
				}
			})
		}
		clients.Wait()
	})
}
