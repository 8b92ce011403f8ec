package proxy

import (
	"net/http"
	"strings"
	"testing"
	"time"

	"breakwater/pkg/registrytest"
)

const (
	openRules = `access: {htpasswd: $HTPASSWD, plain_http: true, rules: [{repositories: [open.test/secret/*], allow: [ci]}, {repositories: [open.test/free/*], allow: [anonymous]}]}`
	secretApp = "/v2/open.test/secret/app"
	freeSame  = "/v2/open.test/free/same" // has the same image
	freeNone  = "/v2/open.test/free/none" // does not exist
)

// openRegistry is a registry that wants no account.
func (r *rig) openRegistry() *registrytest.Registry {
	open := registrytest.New(registrytest.Config{})
	open.Serve(r, r.network, "open.test:80")
	return open
}

// statuses are those of a manifest and a layer, by digest, by every method.
func (r *rig) statuses(who whom, repo string, image registrytest.Image) [4]int {
	var all [4]int
	for i, path := range []string{"/manifests/" + image.Digest().String(), "/blobs/" + image.Blobs[1].Digest.String()} {
		all[2*i] = r.by(who, http.MethodHead, repo+path).StatusCode
		all[2*i+1] = r.by(who, http.MethodGet, repo+path).StatusCode
	}
	return all
}

var (
	allServed = [4]int{200, 200, 200, 200}
)

// TestAccessRulesHoldByDigest: what a rule keeps from somebody they do not get under another repository's name
// either, although it took no account, unless upstream has it there.
func TestAccessRulesHoldByDigest(t *testing.T) {
	i := newIdents(t)
	bubble(t, i.in(guarded+openRules), func(r *rig) {
		r.beyond()
		open := r.openRegistry()
		open.Push("secret/app", "latest", storedImage)
		open.Push("free/same", "latest", storedImage)
		ci, other, nobody := whom{"ci", far, []string{basic("ci", registrytest.Canary)}}, whom{"other", far, []string{basic("other", registrytest.Canary)}}, whom{"nobody", far, nil}
		r.by(ci, http.MethodGet, secretApp+latest).want(r, 200)
		if got := r.statuses(ci, secretApp, storedImage); got != allServed {
			r.Errorf("ci: %v", got)
		}
		time.Sleep(age)
		for repo, callers := range map[string][]whom{freeNone: {nobody, other}, "/v2/quay.test/no/such": {other}} {
			for _, who := range callers {
				if got := r.statuses(who, repo, storedImage); got == allServed || got[1] == 200 || got[3] == 200 {
					r.Errorf("%s by the name %s: %v", who.name, repo, got)
				}
			}
		}
		if got := r.statuses(nobody, secretApp, storedImage); got != [4]int{401, 401, 401, 401} {
			r.Errorf("nobody: %v", got)
		}
		open.Forget()
		if got := r.statuses(nobody, freeSame, storedImage); got != allServed {
			r.Errorf("where upstream has it for everybody: %v", got)
		}
		if n := open.Count(registrytest.Match{Kind: registrytest.KindBlob, Method: http.MethodGet}); n > 0 {
			r.Errorf("%d downloads of what is stored", n)
		}
		time.Sleep(age)
		r.network.SetLink("open.test:80", registrytest.Link{Refuse: true})
		for repo, who := range map[string]whom{secretApp: ci, freeSame: nobody} {
			if got := r.statuses(who, repo, storedImage); got != allServed {
				r.Errorf("%s, upstream is out: %v", repo, got)
			}
		}
	})
}

// TestAccessRulesHoldInFlight is the same for a download on its way.
func TestAccessRulesHoldInFlight(t *testing.T) {
	i := newIdents(t)
	bubble(t, i.in(guarded+openRules), func(r *rig) {
		r.beyond()
		open := r.openRegistry()
		blob := "/blobs/" + open.PutBlob("secret/app", bigLayer.Bytes).String()
		open.Fault(registrytest.Match{Method: http.MethodGet, Path: "/secret/app/blobs/"}, registrytest.Drip(64<<10, time.Second))
		done := make(chan struct{})
		go func() {
			defer close(done)
			r.by(whom{"ci", far, []string{basic("ci", registrytest.Canary)}}, http.MethodGet, secretApp+blob).is(r, bigLayer.Bytes)
		}()
		time.Sleep(time.Second)
		for _, header := range []string{"Accept: */*", "Range: bytes=0-9"} {
			r.by(whom{"nobody", far, []string{header}}, http.MethodGet, freeNone+blob).want(r, 404)
		}
		<-done
	})
}

// TestPublicIsTakenBack: a repository that `public` lists no longer is private from the next request on, also for
// what was stored before, and so is one that a new rule names.
func TestPublicIsTakenBack(t *testing.T) {
	const pattern = "public: [quay.test/org/*]\n"
	for name, later := range map[string]string{
		"the pattern is gone": "",
		"a rule is new":       pattern + "listen: 0.0.0.0:5000\naccess: {htpasswd: $HTPASSWD, plain_http: true, loopback: open, rules: [{repositories: [quay.test/*], allow: [ci]}]}\n",
	} {
		t.Run(name, func(t *testing.T) {
			i := newIdents(t)
			private(t, pattern+withAccount, func(r *rig) {
				r.served(nobody)
				if err := r.mirror.Use(r.config(i.in(later + withAccount))); err != nil {
					r.Fatal(err)
				}
				r.served(theirs)
				r.refused(other, 404, 404)
				r.refused(nobody, 403, 404)
				r.served(copied) // upstream confirms it there
				r.down()
				r.served(theirs)
				r.served(copied)
				r.refused(nobody, 503, 503)
			})
		})
	}
}

// TestSharedPublicIsTakenBack: a host whose configuration has become stricter does not believe what the fleet
// has published before, but for the repository that it was got in.
func TestSharedPublicIsTakenBack(t *testing.T) {
	i := newIdents(t)
	h := newHosts(t)
	h.quay.Push("secret/app", "latest", storedImage)
	config := strings.Replace(guarded, `{url: "https://quay.test", credentials: {username: ci, password_file: PASSWORD}}`, `{url: "http://quay.test:80"}`, 1)
	a := h.host(config + "access: {anonymous: true}")
	a.get("/v2/quay.test/secret/app"+latest).want(a, http.StatusOK)
	for _, blob := range storedImage.Blobs {
		a.get("/v2/quay.test/secret/app/blobs/"+blob.Digest.String()).want(a, http.StatusOK)
	}
	h.eventually("all is published", func() bool { return a.mirror.fleet.publish.count() == 0 })
	h.quay.Fault(everything, outages["dead"])

	loose := h.host(config + "access: {anonymous: true}")
	if got := loose.statuses(whom{"", near, nil}, "/v2/quay.test/other/app", storedImage); got != allServed {
		t.Errorf("without a rule: %v", got)
	}
	strict := h.host(i.in(config + strings.ReplaceAll(openRules, "open.test", "quay.test")))
	strict.beyond()
	if got := strict.statuses(whom{"nobody", far, nil}, "/v2/quay.test/free/none", storedImage); got[1] == 200 || got[3] == 200 {
		t.Errorf("by another name: %v", got)
	}
	if got := strict.statuses(whom{"ci", far, []string{basic("ci", registrytest.Canary)}}, "/v2/quay.test/secret/app", storedImage); got != allServed {
		t.Errorf("by its own: %v", got)
	}
	if got := strict.statuses(whom{"nobody", far, nil}, "/v2/quay.test/free/none", storedImage); got[1] == 200 || got[3] == 200 {
		t.Errorf("by another name, once it is stored: %v", got)
	}
}
