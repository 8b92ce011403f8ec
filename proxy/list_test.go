package proxy

import (
	"encoding/json"
	"fmt"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"testing"
	"time"

	"breakwater/pkg/registrytest"

	ispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// pushTags gives a repository the tags v1 to v5.
func (r *rig) pushTags(repo string) {
	for i := range 5 {
		r.quay.Push(repo, fmt.Sprint("v", i+1), storedImage)
	}
}

// tags are those in the answer.
func (a answer) tags(r *rig) []string {
	r.Helper()
	var list struct {
		Name string
		Tags []string
	}
	if err := json.Unmarshal(a.body, &list); err != nil {
		r.Errorf("%s: %v", a.body, err)
	}
	return list.Tags
}

// An hour after the tags were listed, or never, something happens, and somebody asks for them.
func TestTagList(t *testing.T) {
	five := []byte(`{"name":"org/app","tags":["v1","v2","v3","v4","v5"]}`)
	const list = "/tags/list"
	s := time.Second
	asked := func(then func(*rig)) func(*rig) {
		return func(r *rig) {
			r.pushTags("org/app")
			r.get(app+list).want(r, 200)
			time.Sleep(age)
			if then != nil {
				then(r)
			}
		}
	}
	never := func(then func(*rig)) func(*rig) {
		return func(r *rig) {
			r.pushTags("org/app")
			then(r)
		}
	}
	for _, tt := range []listRow{
		{name: "up", given: never(func(*rig) {}), status: 200, body: five, cache: "breakwater; fwd=uri-miss; fwd-status=200", asked: 1},
		{name: "asked before", given: asked(nil), status: 200, body: five, cache: "breakwater; fwd=stale; fwd-status=200", asked: 1},
		{name: "fresh", tags: "fresh_for: 11m", given: asked(hangs), status: 200, body: five, cache: "breakwater; hit"},
		{name: "refuses", given: asked(refuses), status: 200, body: five, cache: "breakwater; fwd=stale; detail=outage", stale: true},
		{name: "hangs", given: asked(hangs), status: 200, body: five, cache: "breakwater; fwd=stale; detail=timeout", stale: true, asked: 1, took: 1500 * time.Millisecond},
		{name: "429", given: asked(suffers(all, registrytest.Status(429))), status: 200, body: five, cache: "breakwater; fwd=stale; fwd-status=429; detail=throttled", stale: true, asked: 1},
		{name: "no JSON", given: asked(suffers(all, registrytest.Truncate(10))), status: 200, body: five, cache: "breakwater; fwd=stale", stale: true, asked: 2, took: retryPause},
		{name: "too old", tags: "max_stale: 9m", given: asked(refuses), status: 503, code: "UNAVAILABLE"},
		{name: "404", given: asked(suffers(all, registrytest.Status(404))), status: 404, code: "NAME_UNKNOWN", asked: 1},
		{name: "404, on_not_found stale", tags: "on_not_found: stale", given: asked(suffers(all, registrytest.Status(404))), status: 200, body: five, cache: "breakwater; fwd=stale; fwd-status=404; detail=not-found", stale: true, asked: 1},
		{name: "403", given: asked(suffers(all, registrytest.Status(403))), status: 403, code: "DENIED", asked: 1},
		{name: "never asked, refuses", given: never(refuses), status: 503, code: "UNAVAILABLE"},
		{name: "never asked, hangs", given: never(hangs), status: 503, code: "UNAVAILABLE", asked: 1, took: 10 * s},
		{name: "never asked, 403", given: never(suffers(all, registrytest.Status(403))), status: 403, code: "DENIED", asked: 1},
		{name: "unknown repository", given: func(*rig) {}, status: 404, code: "NAME_UNKNOWN", asked: 1},
	} {
		tt.path, tt.mediaType = list, "application/json"
		tt.check(t)
	}
}

// listRow is a row of the contract for lists: what was asked before, and what happens, is given.
type listRow struct {
	name, tags, path string
	given            func(*rig)

	status          int
	code, mediaType string
	body            []byte
	cache           string
	stale           bool
	unknown         bool // answered, with a warning, but not stored
	asked           int
	took            time.Duration
}

func (tt listRow) check(t *testing.T) {
	for _, method := range []string{http.MethodGet, http.MethodHead} {
		t.Run(tt.name+" "+method, func(t *testing.T) {
			t.Parallel()
			bubble(t, withTags(tt.tags), func(r *rig) {
				tt.given(r)
				r.quay.Forget()
				got := r.do(method, app+tt.path).want(r, tt.status)
				if r.asked() != tt.asked || got.took > tt.took {
					r.Errorf("%d requests upstream, want %d; %v, want %v", r.asked(), tt.asked, got.took, tt.took)
				}
				if cache := got.Header.Get("Cache-Status"); !strings.HasPrefix(cache, tt.cache) {
					r.Errorf("Cache-Status %q, want %q", cache, tt.cache)
				}
				if tt.stale {
					got.stale(r, fmt.Sprint(int((age + got.took).Seconds())))
				} else if (got.Header.Get("Warning") != "") != tt.unknown {
					r.Errorf("Warning %q", got.Header.Get("Warning"))
				}
				if _, err := r.store.Answer(r.repository("org/app"), tt.path); tt.unknown && err == nil {
					r.Error("what is not known was stored")
				}
				if tt.status != http.StatusOK {
					if method == http.MethodGet && got.code() != tt.code {
						r.Errorf("code %q, want %s: %s", got.code(), tt.code, got.body)
					}
					return
				}
				if got.Header.Get("Content-Type") != tt.mediaType || got.ContentLength != int64(len(tt.body)) {
					r.Errorf("%v, want %s of %d bytes", got.Header, tt.mediaType, len(tt.body))
				}
				if method == http.MethodGet {
					got.is(r, tt.body)
				}
			})
		})
	}
}

func TestTagListPages(t *testing.T) {
	yaml := "default_registry: quay.test\nhosts: {mirror.test: quay.test}" + oneUpstream
	for name, tt := range map[string]struct{ path, host string }{
		"bare":   {"/v2/org/app/tags/list?n=2", "localhost"},
		"ns":     {"/v2/org/app/tags/list?ns=quay.test&n=2", "localhost"},
		"prefix": {"/v2/quay.test/org/app/tags/list?n=2", "localhost"},
		"host":   {"/v2/org/app/tags/list?n=2", "mirror.test"},
		"both":   {"/v2/quay.test/org/app/tags/list?n=2&ns=quay.test", "localhost"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			bubble(t, yaml, func(r *rig) {
				r.pushTags("org/app")
				for _, state := range []string{"up", "out"} {
					var tags []string
					pages := 0
					for next := tt.path; next != ""; pages++ {
						got := r.get(next, "Host: "+tt.host).want(r, 200)
						tags = append(tags, got.tags(r)...)
						if (got.Header.Get("Warning") != "") != (state == "out") {
							r.Errorf("%s: Warning %q", state, got.Header.Get("Warning"))
						}
						if strings.Contains(tt.path, "ns=") && got.Header.Get("OCI-Namespace") != "quay.test" {
							r.Errorf("OCI-Namespace %q", got.Header.Get("OCI-Namespace"))
						}
						link := got.Header.Get("Link")
						if next = ""; link != "" {
							target, ok := strings.CutSuffix(strings.TrimPrefix(link, "<"), `>; rel="next"`)
							u, err := url.Parse(target)
							if !ok || err != nil || u.Host != "" || u.Path != strings.Split(tt.path, "?")[0] || u.Query().Has("ns") != strings.Contains(tt.path, "ns=") {
								r.Fatalf("Link %q", link)
							}
							next = target
						}
					}
					if want := []string{"v1", "v2", "v3", "v4", "v5"}; pages != 3 || !slices.Equal(tags, want) {
						r.Errorf("%s: %v on %d pages", state, tags, pages)
					}
					r.network.Reset("quay.test:80")
					r.network.SetLink("quay.test:80", registrytest.Link{Refuse: true})
				}
				for _, request := range r.quay.Requests(all) {
					if request.URL.Query().Has("ns") || !strings.HasPrefix(request.URL.Path, "/v2/org/app/") {
						r.Errorf("upstream was asked for %s", request.URL)
					}
				}
			})
		})
	}
}

func TestTagListQuery(t *testing.T) {
	bubble(t, oneUpstream, func(r *rig) {
		r.pushTags("org/app")
		for query, want := range map[string]string{"n=0": "0", "n=5000": "1000", "n=1000000000": "1000"} {
			r.quay.Forget()
			r.get(app+"/tags/list?"+query).want(r, 200)
			if got := r.quay.Requests(all)[0].URL.Query().Get("n"); got != want {
				r.Errorf("%s was passed on as n=%s, want %s", query, got, want)
			}
		}
		r.quay.Forget()
		for _, query := range []string{"n=-1", "n=x", "n=1e9", "n=99999999999999999999"} {
			if got := r.get(app+"/tags/list?"+query).want(r, 400); got.code() != "PAGINATION_NUMBER_INVALID" {
				r.Errorf("%s: %s", query, got.body)
			}
		}
		r.get(app+"/tags/list?last="+strings.Repeat("x", 1<<13)).want(r, 400)
		r.get("/v2/_catalog").want(r, 404)
		if r.asked() > 0 {
			r.Errorf("%v", r.quay.Requests(all))
		}
	})
}

// Of an upstream's Link only the query is believed: it cannot lead clients, or us, elsewhere.
func TestTagListHostileLink(t *testing.T) {
	for link, want := range map[string]string{
		`<http://evil.test/v2/x/tags/list?last=b>; rel="next"`:   "<" + app + `/tags/list?last=b>; rel="next"`,
		`<//evil.test/?last=b&ns=evil.test>; rel="next"`:         "<" + app + `/tags/list?last=b>; rel="next"`,
		`<?last=a%0d%0aSet-Cookie:%20x>; rel=next`:               "<" + app + `/tags/list?last=a%0D%0ASet-Cookie%3A+x>; rel="next"`,
		`</v2/org/app/tags/list?last=b>; rel="prev"`:             "",
		`javascript:alert(1)`:                                    "",
		`<?last=` + strings.Repeat("x", 1<<13) + `>; rel="next"`: "",
	} {
		bubble(t, oneUpstream, func(r *rig) {
			r.pushTags("org/app")
			r.quay.Fault(all, registrytest.Header("Link", link))
			if got := r.get(app+"/tags/list").want(r, 200).Header.Get("Link"); got != want {
				r.Errorf("Link %.100q became %.200q, want %q", link, got, want)
			}
		})
	}
}

// referrer is an image that says of storedImage that it is its signature, say.
func referrer(kind string) registrytest.Image {
	return registrytest.NewImage(registrytest.Layer(8, 100)).Referring(storedImage, "application/vnd.example."+kind)
}

// referring is the index of referrers.
func referring(images ...registrytest.Image) []byte {
	descs := []ispec.Descriptor{}
	for _, image := range images {
		desc := image.Descriptor()
		var body ispec.Manifest
		if err := json.Unmarshal(image.Raw, &body); err != nil {
			panic(err) // made by referrer
		}
		desc.Platform, desc.ArtifactType = nil, body.ArtifactType
		descs = append(descs, desc)
	}
	slices.SortFunc(descs, func(a, b ispec.Descriptor) int { return strings.Compare(string(a.Digest), string(b.Digest)) })
	return marshalIndex(descs)
}

func TestReferrers(t *testing.T) {
	two := []registrytest.Image{referrer("signature"), referrer("sbom")}
	none, both := marshalIndex(nil), referring(two...)
	path := "/referrers/" + storedImage.Digest().String()
	s := time.Second

	// The manifest was pulled, with these referrers or without, and then this happens.
	pulled := func(referrers []registrytest.Image, then ...func(*rig)) func(*rig) {
		return func(r *rig) {
			r.quay.Push("org/app", "latest", storedImage)
			for _, image := range referrers {
				r.quay.Push("org/app", "", image)
			}
			r.pull("latest", storedImage)
			for _, f := range then {
				f(r)
			}
		}
	}
	asked := func(r *rig) {
		r.get(app+path).want(r, 200).fresh(r)
		time.Sleep(age)
	}
	later := func(*rig) { time.Sleep(age) }
	noAPI := func(r *rig) { r.quay.Configure(registrytest.Config{ReferrersTag: true}) }
	api := registrytest.Match{Kind: registrytest.KindReferrers}
	const uriMiss, unknown = "breakwater; fwd=uri-miss; fwd-status=200", "breakwater; fwd=uri-miss; detail=unknown"
	for _, tt := range []listRow{
		{name: "two", given: pulled(two), body: both, cache: uriMiss, asked: 1},
		{name: "none", given: pulled(nil), body: none, cache: uriMiss, asked: 1},
		{name: "no API, two", given: pulled(two, noAPI), body: both, cache: uriMiss, asked: 2},
		{name: "no API, none", given: pulled(nil, noAPI), body: none, cache: uriMiss, asked: 2},
		{name: "API is 400", given: pulled(two, noAPI, suffers(api, registrytest.Status(400))), body: both, cache: uriMiss, asked: 2},
		{name: "API is 405", given: pulled(two, noAPI, suffers(api, registrytest.Status(405))), body: both, cache: uriMiss, asked: 2},
		{name: "API is 501", given: pulled(two, noAPI, suffers(api, registrytest.Status(501))), body: both, cache: uriMiss, asked: 2},
		{name: "stored, refuses", given: pulled(two, asked, refuses), body: both, cache: "breakwater; fwd=stale; detail=outage", stale: true},
		{name: "stored, hangs", given: pulled(two, asked, hangs), body: both, cache: "breakwater; fwd=stale; detail=timeout", stale: true, asked: 1, took: 1500 * time.Millisecond},
		{name: "stored none, refuses", given: pulled(nil, asked, refuses), body: none, cache: "breakwater; fwd=stale; detail=outage", stale: true},
		{name: "stored by tag, refuses", given: pulled(two, noAPI, asked, refuses), body: both, cache: "breakwater; fwd=stale; detail=outage", stale: true},
		{name: "stored by tag, tag is 500", given: pulled(two, noAPI, asked, suffers(manifests, registrytest.Status(500))), body: both, cache: "breakwater; fwd=stale; fwd-status=500; detail=outage", stale: true, asked: 4, took: retryPause},
		{name: "unknown, refuses", given: pulled(two, later, refuses), body: none, cache: unknown},
		{name: "unknown, hangs", given: pulled(two, later, hangs), body: none, cache: unknown, asked: 1, took: 10 * s},
		{name: "unknown, 500", given: pulled(two, suffers(all, registrytest.Status(500))), body: none, cache: unknown, asked: 2, took: retryPause},
		{name: "unknown, 429", given: pulled(two, suffers(all, registrytest.Status(429))), body: none, cache: unknown, asked: 1},
		{name: "unknown, portal", given: pulled(two, suffers(all, registrytest.Portal())), body: none, cache: unknown, asked: 1},
		{name: "unknown, no index", given: pulled(two, suffers(api, registrytest.Header("Content-Type", ispec.MediaTypeImageManifest))), body: none, cache: unknown, asked: 1},
		{name: "unknown, 403", given: pulled(two, suffers(all, registrytest.Status(403))), body: none, cache: unknown, asked: 2},
		{name: "not stored", given: func(r *rig) { r.quay.Push("org/app", "latest", storedImage) }, body: none, cache: uriMiss, asked: 1},
	} {
		tt.path, tt.status, tt.mediaType = path, 200, ispec.MediaTypeImageIndex
		tt.unknown = tt.cache == unknown
		tt.check(t)
	}
}

func TestReferrersByType(t *testing.T) {
	bubble(t, oneUpstream, func(r *rig) {
		r.quay.Push("org/app", "latest", storedImage)
		two := []registrytest.Image{referrer("signature"), referrer("sbom")}
		for _, image := range two {
			r.quay.Push("org/app", "", image)
		}
		r.pull("latest", storedImage)
		path := app + "/referrers/" + storedImage.Digest().String()
		for _, state := range []string{"up", "out"} {
			for query, want := range map[string][]byte{
				"":                                  referring(two...),
				"application/vnd.example.signature": referring(two[0]),
				"application/vnd.example.sbom":      referring(two[1]),
				"application/vnd.example.other":     referring(),
			} {
				got := r.get(path+"?artifactType="+query).want(r, 200).is(r, want)
				if filters := got.Header.Get("OCI-Filters-Applied"); (filters == "artifactType") != (query != "") {
					r.Errorf("%s, %q: OCI-Filters-Applied %q", state, query, filters)
				}
			}
			r.network.Reset("quay.test:80")
			r.network.SetLink("quay.test:80", registrytest.Link{Refuse: true})
		}
	})
}

// Pages of referrers are put together; an endless row of them is cut.
func TestReferrersPages(t *testing.T) {
	next := registrytest.Header("Link", `</elsewhere?page=2>; rel="next"`)
	for name, tt := range map[string]struct {
		fault registrytest.Fault
		pages int
	}{"two": {registrytest.First(1, next), 2}, "endless": {next, maxPages}} {
		bubble(t, oneUpstream, func(r *rig) {
			image := referrer("signature")
			r.quay.Push("org/app", "", image)
			r.quay.Fault(all, tt.fault)
			got := r.get(app+"/referrers/"+storedImage.Digest().String()).want(r, 200)
			if n := strings.Count(string(got.body), image.Digest().String()); n != tt.pages || r.asked() != tt.pages {
				r.Errorf("%s: %d referrers by %d requests, want %d", name, n, r.asked(), tt.pages)
			}
			if got := r.quay.Count(registrytest.Match{Path: "elsewhere"}); got > 0 {
				r.Error("the Link's path was followed")
			}
		})
	}
}
