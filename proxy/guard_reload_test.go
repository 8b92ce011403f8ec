package proxy

import (
	"context"
	"errors"
	"net/http"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"breakwater/pkg/buckettest"
	"breakwater/pkg/registrytest"
)

// withoutAccount is guarded where quay.test is asked without one.
var withoutAccount = strings.Replace(guarded, ", credentials: {username: ci, password_file: PASSWORD}", "", 1)

// TestAccessIsReloadedMeanwhile: who still waits for an answer when the policy changes gets nothing by the one
// before, and is not told what there is. Those whom the new one allows have their answer.
func TestAccessIsReloadedMeanwhile(t *testing.T) {
	i := newIdents(t)
	layer, manifest := "/blobs/"+storedImage.Blobs[1].Digest.String(), "/manifests/"+storedImage.Digest().String()
	for path, method := range map[string]string{latest: "GET", manifest: "GET", layer: "GET", manifest + "?": "HEAD", layer + "?": "HEAD", "/tags/list": "GET", "/referrers/" + storedImage.Digest().String(): "GET",
		"/manifests/none": "GET", "/blobs/" + storedImage.Blobs[0].Digest.String(): "GET"} {
		for _, reloads := range [][]string{{withoutAccount + policies[0].access}, {withoutAccount + policies[0].access, withoutAccount + "access: {anonymous: true}"}} {
			bubble(t, i.in(withoutAccount+"access: {anonymous: true}"), func(r *rig) {
				r.quay.Serve(r, r.network, "quay.test:443")
				r.quay.Push("org/app", "latest", storedImage)
				r.beyond()
				r.mirror.untaken.note(storedImage.Blobs[0].Digest, &storeError{errors.New("full")}, time.Hour) // passed through
				r.network.SetLink("quay.test:443", registrytest.Link{Latency: 200 * time.Millisecond})
				answers := map[string]chan answer{}
				for name, header := range map[string][]string{"nobody": nil, "ci": {basic("ci", registrytest.Canary)}, "other": {basic("other", registrytest.Canary)}} {
					to := make(chan answer, 1)
					answers[name] = to
					go func() { to <- r.by(whom{name, far, header}, method, app+path) }()
				}
				time.Sleep(100 * time.Millisecond)
				for _, yaml := range reloads {
					if err := r.mirror.Use(r.config(i.in(yaml))); err != nil {
						r.Fatal(err)
					}
				}
				if got := <-answers["nobody"]; got.StatusCode != 401 || got.took < 300*time.Millisecond || got.Header.Get("Docker-Content-Digest") != "" || len(got.body) > 500 {
					r.Errorf("%s %s, %d reloads: nobody gets %d after %v", method, path, len(reloads), got.StatusCode, got.took)
				}
				denied, good := 403, 200
				if strings.HasPrefix(path, "/blobs/") {
					denied = 404
				}
				if path == "/manifests/none" {
					good = 404
				}
				if got := <-answers["other"]; got.StatusCode != denied || got.Header.Get("Docker-Content-Digest") != "" {
					r.Errorf("%s %s, %d reloads: other gets %d", method, path, len(reloads), got.StatusCode)
				}
				if got := <-answers["ci"]; got.StatusCode != good {
					r.Errorf("%s %s, %d reloads: ci gets %d", method, path, len(reloads), got.StatusCode)
				}
				for reason, want := range map[string]string{"unknown": "1", "denied": "1"} {
					if got := r.metric(`breakwater_access_refusals_total{reason="` + reason + `"}`); got != want {
						r.Errorf("%s: %s, want %s", reason, got, want)
					}
				}
			})
		}
	}
}

// TestAccountIsGoneMeanwhile: what is being asked with an account that the configuration has no more is not for
// those who come after.
func TestAccountIsGoneMeanwhile(t *testing.T) {
	i := newIdents(t)
	layer, manifest := "/blobs/"+storedImage.Blobs[1].Digest.String(), "/manifests/"+storedImage.Digest().String()
	for path, method := range map[string]string{latest: "GET", manifest: "GET", layer: "GET", layer + "?": "HEAD", "/tags/list": "GET", "/referrers/" + storedImage.Digest().String(): "GET"} {
		bubble(t, i.in(guarded+"access: {htpasswd: $HTPASSWD, plain_http: true}"), func(r *rig) {
			r.quay.Configure(registrytest.Config{Auth: registrytest.Auth{Scheme: "Basic", Users: map[string]string{"ci": registrytest.Canary}}})
			r.quay.Serve(r, r.network, "quay.test:443")
			r.quay.Push("org/app", "latest", storedImage)
			r.beyond()
			r.network.SetLink("quay.test:443", registrytest.Link{Latency: 200 * time.Millisecond})
			known := make(chan answer, 1)
			go func() { known <- r.by(whom{"ci", far, []string{basic("ci", registrytest.Canary)}}, method, app+path) }()
			time.Sleep(100 * time.Millisecond)
			if err := r.mirror.Use(r.config(i.in(withoutAccount + "access: {anonymous: true}"))); err != nil {
				r.Fatal(err)
			}
			if got := r.by(whom{"nobody", far, nil}, method, app+path); got.StatusCode != 403 && got.StatusCode != 404 {
				r.Errorf("%s %s: nobody gets %d", method, path, got.StatusCode)
			}
			if got := <-known; got.StatusCode != http.StatusOK {
				r.Errorf("%s %s: ci gets %d", method, path, got.StatusCode)
			}
			synctest.Wait()
		})
	}
}

// TestAccountIsNewMeanwhile: who was let in when quay.test had no account, and waits for the fleet's word before it
// is asked, gets nothing by the account that it has by then.
func TestAccountIsNewMeanwhile(t *testing.T) {
	i := newIdents(t)
	h := newHosts(t)
	h.quay.Configure(registrytest.Config{Auth: registrytest.Auth{Scheme: "Basic", Users: map[string]string{"ci": registrytest.Canary}}})
	h.quay.Push("org/app", "latest", storedImage)
	a := h.host(i.in(withoutAccount + "tags: {fresh_for: 1m}\naccess: {anonymous: true}"))
	a.beyond()
	h.bucket.Fault(buckettest.All, registrytest.Hang())
	got := make(chan answer, 1)
	go func() { got <- a.by(whom{"nobody", far, nil}, http.MethodGet, app+latest) }()
	h.eventually("the bucket is asked", func() bool { return h.bucket.Count(buckettest.All) > 0 })
	if err := a.mirror.Use(a.config(i.in(guarded + "tags: {fresh_for: 1m}\n" + policies[0].access))); err != nil {
		t.Fatal(err)
	}
	if got := <-got; got.StatusCode != http.StatusUnauthorized || got.Header.Get("Docker-Content-Digest") != "" {
		t.Errorf("nobody gets %d %s", got.StatusCode, got.body)
	}
	if n := h.quay.Count(registrytest.Match{Kind: registrytest.KindManifest}); n == 0 {
		t.Error("quay.test was not asked")
	}
	h.bucket.Heal()
}

// TestQuestionsPart: a question that newcomers are parted from is answered, and leaves theirs open.
func TestQuestionsPart(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		all := newTasks(func(recovered any) { t.Error(recovered) })
		defer all.stop(t.Context())
		var qs questions[string]
		ask := func(answer string, takes time.Duration) *question[string] {
			return qs.join(all, "tag", func(context.Context) (string, error) {
				time.Sleep(takes)
				return answer, nil
			})
		}
		before := ask("before", time.Second)
		qs.part()
		since := ask("since", 3*time.Second)
		if got, err := before.wait(t.Context(), 0); got != "before" || err != nil {
			t.Error(got, err)
		}
		synctest.Wait()
		if ask("third", 0) != since {
			t.Error("the open question was asked again")
		}
		if got, err := since.wait(t.Context(), 0); got != "since" || err != nil {
			t.Error(got, err)
		}
	})
}
