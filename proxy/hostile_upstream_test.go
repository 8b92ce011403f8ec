package proxy

import (
	"bytes"
	"compress/gzip"
	"fmt"
	"net/http"
	"runtime"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"breakwater/pkg/oci"
	"breakwater/pkg/registrytest"

	"github.com/opencontainers/go-digest"
	ispec "github.com/opencontainers/image-spec/specs-go/v1"
)

var (
	manifestGets = registrytest.Match{Kind: registrytest.KindManifest, Method: http.MethodGet}
	blobGets     = registrytest.Match{Kind: registrytest.KindBlob, Method: http.MethodGet}
)

// header is a fault that gives an answer more headers: names and values in turn.
func header(pairs ...string) registrytest.Fault {
	return func(w http.ResponseWriter, r *http.Request, next http.Handler) {
		for i := 0; i < len(pairs); i += 2 {
			w.Header().Add(pairs[i], pairs[i+1])
		}
		next.ServeHTTP(w, r)
	}
}

// unusable fails the test unless the answer is the one for an upstream that cannot be used, and nothing
// was stored of what it said.
func (r *rig) unusable(path string) {
	r.Helper()
	got := r.get(path).want(r, http.StatusServiceUnavailable)
	if got.code() != "UNAVAILABLE" || got.Header.Get("Retry-After") == "" || !strings.Contains(string(got.body), "quay.test") || got.took > 10*time.Second {
		r.Errorf("%s: after %v, Retry-After %q: %s", path, got.took, got.Header.Get("Retry-After"), got.body)
	}
	r.do(http.MethodHead, path).want(r, http.StatusServiceUnavailable)
	synctest.Wait()
	if files := r.files(); len(files) > 0 {
		r.Errorf("%s: the store holds %v", path, files)
	}
}

// failures is how many requests for manifests the mirror has held against quay.test.
func (r *rig) failures() int64 {
	for _, h := range r.mirror.pool.Clients("quay.test")[0].Health() {
		if h.Class == "manifest" {
			return h.Failed
		}
	}
	return 0
}

// padded is a good manifest of exactly that many bytes.
func padded(size int) []byte {
	image := registrytest.NewImage(registrytest.Layer(1, 10))
	image = image.Annotated("padding", strings.Repeat("x", size-len(image.Annotated("padding", "").Raw)))
	return image.Raw
}

func TestH22ManifestsWithoutEnd(t *testing.T) {
	over := padded(oci.MaxManifest + 1)
	tests := map[string]struct {
		raw   []byte
		fault registrytest.Fault
	}{
		"one byte over":          {over, header()},
		"one byte over, chunked": {over, registrytest.Header("Content-Length", "")},
		"endless":                {storedImage.Raw, registrytest.Endless()},
		"1 TB":                   {storedImage.Raw, registrytest.Header("Content-Length", "1099511627776")},
		"shorter than it says":   {storedImage.Raw, registrytest.Truncate(100)},
		"1 MB of headers":        {storedImage.Raw, header("X-A", strings.Repeat("x", 1<<20))},
		"10,000 headers": {storedImage.Raw, func(w http.ResponseWriter, r *http.Request, next http.Handler) {
			manyHeaders(w, 10_000)
			next.ServeHTTP(w, r)
		}},
		"early hints without end": {storedImage.Raw, func(w http.ResponseWriter, r *http.Request, _ http.Handler) { earlyHints(w, r) }},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			bubble(t, oneUpstream, func(r *rig) {
				dgst := r.quay.PutManifest("org/app", "latest", storedImage.MediaType, tt.raw)
				r.quay.Fault(manifestGets, tt.fault)
				r.unusable(app + latest)
				r.unusable(app + "/manifests/" + dgst.String())
				if r.failures() == 0 {
					t.Error("it was not held against the upstream")
				}
				for _, asked := range r.quay.Requests(manifestGets) {
					if asked.Sent > oci.MaxManifest+256<<10 {
						t.Errorf("%d bytes were taken in", asked.Sent)
					}
				}
			})
		})
	}
	bubble(t, oneUpstream, func(r *rig) {
		raw := padded(oci.MaxManifest)
		r.quay.PutManifest("org/app", "latest", storedImage.MediaType, raw)
		r.get(app+latest).want(r, http.StatusOK).is(r, raw)
	})
}

func manyHeaders(w http.ResponseWriter, n int) {
	for i := range n {
		w.Header().Set(fmt.Sprintf("X-%d", i), "x")
	}
}

func earlyHints(w http.ResponseWriter, r *http.Request) {
	w.Header().Set("X-A", strings.Repeat("x", 1000))
	for r.Context().Err() == nil {
		w.WriteHeader(http.StatusEarlyHints)
	}
}

// Bytes whose digest is right, and which are no manifest all the same.
func TestH23H24HostileManifests(t *testing.T) {
	desc := func(size string) string { return `{"mediaType":"x","digest":"` + unknown + `","size":` + size + `}` }
	layers := func(s string) string { return `{"schemaVersion":2,"config":` + desc("1") + `,"layers":[` + s + `]}` }
	const image, index = ispec.MediaTypeImageManifest, ispec.MediaTypeImageIndex
	tests := map[string]struct{ mediaType, body string }{
		"100,000 deep":           {image, layers(strings.Repeat("[", 100_000) + strings.Repeat("]", 100_000))},
		"100,000 deep objects":   {image, layers(strings.Repeat(`{"a":`, 100_000) + "1" + strings.Repeat("}", 100_000))},
		"many descriptors":       {image, layers(strings.TrimSuffix(strings.Repeat(desc("1")+",", 30_000), ","))},
		"10^6 empty descriptors": {image, layers(strings.TrimSuffix(strings.Repeat("{},", 1_000_000), ","))},
		"duplicate keys":         {image, `{"schemaVersion":2,"layers":[],"layers":[` + desc("1") + `]}`},
		"keys in another case":   {image, `{"schemaVersion":2,"layers":[],"Layers":[` + desc("1") + `]}`},
		"negative size":          {image, layers(desc("-1"))},
		"size 2^63":              {image, layers(desc("9223372036854775808"))},
		"size 1e999":             {image, layers(desc("1e999"))},
		"size NaN":               {image, layers(desc("NaN"))},
		"size of a half":         {image, layers(desc("0.5"))},
		"path as digest":         {image, layers(`{"digest":"sha256:../../../../etc/passwd","size":1}`)},
		"algorithm not linked":   {index, `{"manifests":[{"digest":"md5:` + nothing[:32] + `","size":1}]}`},
		"bad subject":            {image, `{"layers":[],"subject":{"digest":"x","size":1}}`},
		"image and index":        {image, `{"schemaVersion":2,"layers":[],"manifests":[]}`},
		"index and image":        {index, `{"schemaVersion":2,"layers":[],"manifests":[]}`},
		"image sent as index":    {index, layers("")},
		"index sent as image":    {image, `{"schemaVersion":2,"manifests":[]}`},
		"two types":              {image, `{"mediaType":"` + oci.MediaTypeDockerManifest + `","layers":[]}`},
		"blob sent as image":     {image, `{"architecture":"amd64","rootfs":{"type":"layers"}}`},
		"two values":             {image, layers("") + layers("")},
		"a page":                 {image, "<!DOCTYPE html><html></html>"},
		"type of a page":         {"text/html", layers("")},
		"nothing":                {image, ""},
		"null":                   {image, "null"},
		"signed schema 1":        {"application/vnd.docker.distribution.manifest.v1+prettyjws", `{"schemaVersion":1,"fsLayers":[]}`},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			bubble(t, oneUpstream, func(r *rig) {
				dgst := r.quay.PutManifest("org/app", "latest", tt.mediaType, []byte(tt.body))
				r.unusable(app + latest)
				r.unusable(app + "/manifests/" + dgst.String())
			})
			bubble(t, oneUpstream, func(r *rig) {
				r.quay.Push("org/app", "latest", storedImage)
				r.get(app+latest).want(r, http.StatusOK).fresh(r)
				before := r.files()
				r.quay.PutManifest("org/app", "latest", tt.mediaType, []byte(tt.body))
				r.get(app+latest).want(r, http.StatusOK).stale(r, "0").is(r, storedImage.Raw)
				if after := r.files(); !slices.Equal(before, after) {
					t.Errorf("the store held %v, and now %v", before, after)
				}
			})
		})
	}
}

// Two bytes can decode to a descriptor, so they are counted before they are made.
func TestH23ElementsAreCountedFirst(t *testing.T) {
	for _, element := range []string{"{}", "1", "null", "[]"} {
		raw := []byte(`{"layers":[` + strings.Repeat(element+",", oci.MaxManifest/(len(element)+1)-100) + element + "]}")
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		if _, err := oci.ParseManifest("", raw, digest.SHA256); err == nil {
			t.Errorf("%s: accepted", element)
		}
		runtime.ReadMemStats(&after)
		if took := after.TotalAlloc - before.TotalAlloc; took > 16<<20 {
			t.Errorf("%s: %d MiB were allocated for a manifest of %d bytes", element, took>>20, len(raw))
		}
	}
}

// A pinned digest is what is asked for, whatever else is a manifest too (GHSA-qv35-3gw6-8q4j).
func TestPinnedDigestGetsNothingElse(t *testing.T) {
	bubble(t, oneUpstream, func(r *rig) {
		r.quay.Push("org/app", "latest", storedImage)
		r.quay.Fault(manifestGets, func(w http.ResponseWriter, _ *http.Request, _ http.Handler) {
			w.Header().Set("Content-Type", newerImage.MediaType)
			w.Header().Set("Docker-Content-Digest", storedImage.Digest().String())
			_, _ = w.Write(newerImage.Raw)
		})
		r.unusable(app + "/manifests/" + storedImage.Digest().String())
		r.unusable(app + latest)
	})
}

// What an upstream says that a digest is does not matter where bytes come with it.
func TestH26DigestHeader(t *testing.T) {
	for _, value := range []string{"", "garbage", "sha256:", "sha256:../../x", "md5:" + nothing[:32], "sha256:" + strings.ToUpper(unknown[7:]), unknown} {
		t.Run(value, func(t *testing.T) {
			t.Parallel()
			bubble(t, oneUpstream, func(r *rig) {
				r.quay.Push("org/app", "latest", storedImage)
				match := registrytest.Match{}
				if value == unknown { // HEAD of a tag has nothing else to go by
					match.Method = http.MethodGet
				}
				r.quay.Fault(match, registrytest.Header("Docker-Content-Digest", value))
				for _, path := range []string{latest, "/manifests/" + storedImage.Digest().String()} {
					got := r.get(app+path).want(r, http.StatusOK).fresh(r).is(r, storedImage.Raw)
					if dgst := got.Header.Get("Docker-Content-Digest"); dgst != storedImage.Digest().String() {
						t.Errorf("%s: Docker-Content-Digest is %s", path, dgst)
					}
				}
				blob := storedImage.Blobs[1]
				r.get(app+"/blobs/"+blob.Digest.String()).want(r, http.StatusOK).is(r, blob.Bytes)
			})
		})
	}
	t.Run("of nothing that there is", func(t *testing.T) {
		t.Parallel()
		bubble(t, oneUpstream, func(r *rig) {
			r.quay.Push("org/app", "latest", storedImage)
			r.quay.Fault(registrytest.Match{Method: http.MethodHead}, registrytest.Header("Docker-Content-Digest", unknown))
			r.unusable(app + latest) // and not "not found"
		})
	})
}

// No client ever has all of the wrong bytes, or none of them for a blob that is not empty.
func TestH27BlobsOfAnotherSize(t *testing.T) {
	faults := map[string]registrytest.Fault{
		"one byte longer":         registrytest.Resize(1),
		"one byte shorter":        registrytest.Resize(-1),
		"empty":                   registrytest.Resize(-1 << 40),
		"endless":                 registrytest.Endless(),
		"longer, size not said":   func(w http.ResponseWriter, r *http.Request, next http.Handler) { sizeless(w, r, next, 1) },
		"shorter, size not said":  func(w http.ResponseWriter, r *http.Request, next http.Handler) { sizeless(w, r, next, -1) },
		"empty, size not said":    func(w http.ResponseWriter, r *http.Request, next http.Handler) { sizeless(w, r, next, -1<<40) },
		"nothing but a 204":       registrytest.Status(http.StatusNoContent),
		"a part nobody asked for": partial,
		"another's bytes": func(w http.ResponseWriter, _ *http.Request, _ http.Handler) {
			_, _ = w.Write(registrytest.Layer(7, 300<<10))
		},
		"another's bytes, as large": registrytest.FlipBit(0),
	}
	for _, size := range []int{1000, 300 << 10} {
		for name, fault := range faults {
			for _, known := range []string{"unknown", "known"} { // by a manifest
				t.Run(fmt.Sprintf("%s/%d/%s", name, size, known), func(t *testing.T) {
					t.Parallel()
					bubble(t, oneUpstream, func(r *rig) {
						image := registrytest.NewImage(registrytest.Layer(1, size))
						r.quay.Push("org/app", "latest", image)
						if known == "known" {
							r.get(app+latest).want(r, http.StatusOK)
						}
						r.quay.Fault(registrytest.Match{Kind: registrytest.KindBlob}, fault)
						r.wrong(image.Blobs[1])
					})
				})
			}
		}
	}
}

func sizeless(w http.ResponseWriter, r *http.Request, next http.Handler, delta int64) {
	registrytest.Header("Content-Length", "")(w, r, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		registrytest.Resize(delta)(w, r, next)
	}))
}

func partial(w http.ResponseWriter, r *http.Request, next http.Handler) {
	r = r.Clone(r.Context())
	r.Header.Set("Range", "bytes=0-99")
	next.ServeHTTP(w, r)
}

// wrong asks for a blob that upstream sends wrong bytes for.
func (r *rig) wrong(blob registrytest.Blob) {
	r.Helper()
	got := r.get(app + "/blobs/" + blob.Digest.String())
	switch {
	case got.StatusCode == http.StatusOK && got.err == nil:
		r.Errorf("%d bytes passed for the whole blob", len(got.body))
	case got.StatusCode == http.StatusOK && got.ContentLength >= 0 && int64(len(got.body)) > got.ContentLength-64<<10:
		r.Errorf("%d wrong bytes of %d were sent", len(got.body), got.ContentLength)
	case got.StatusCode != http.StatusOK && (got.StatusCode != http.StatusServiceUnavailable || got.code() != "UNAVAILABLE"):
		r.Errorf("%d %s", got.StatusCode, got.body)
	}
	synctest.Wait()
	for _, file := range r.files() {
		if strings.HasPrefix(file, "tmp/") || strings.HasPrefix(file, "quarantine/") || strings.Contains(file, blob.Digest.Encoded()) {
			r.Errorf("the store holds %s", file)
		}
	}
	for _, asked := range r.quay.Requests(blobGets) {
		if asked.Sent > max(capacity/10, int64(len(blob.Bytes)))+1<<20 {
			r.Errorf("%d bytes of a blob of %d were taken in", asked.Sent, len(blob.Bytes))
		}
	}
	r.quay.Heal()
	time.Sleep(11 * time.Minute) // what lied is asked again then
	r.get(app+"/blobs/"+blob.Digest.String()).want(r, http.StatusOK).is(r, blob.Bytes)
}

// A descriptor's size is a claim. Taken for a length to allocate, it is a panic (GHSA-f36w-mj3v-6jqv).
func TestDescriptorSizeAllocatesNothing(t *testing.T) {
	for _, size := range []string{"9223372036854775807", "9223372036854775000", "1099511627776", "0"} {
		bubble(t, oneUpstream, func(r *rig) {
			blob := storedImage.Blobs[1]
			raw := fmt.Sprintf(`{"schemaVersion":2,"config":{"digest":"%s","size":1},"layers":[{"digest":"%s","size":%s}]}`, unknown, blob.Digest, size)
			r.quay.Push("org/app", "", storedImage)
			r.quay.PutManifest("org/app", "evil", ispec.MediaTypeImageManifest, []byte(raw))
			r.get(app+"/manifests/evil").want(r, http.StatusOK)
			r.quay.Fault(registrytest.Match{Kind: registrytest.KindBlob}, registrytest.Header("Content-Length", ""))
			got := r.get(app + "/blobs/" + blob.Digest.String())
			whole := got.StatusCode == http.StatusOK && got.err == nil && bytes.Equal(got.body, blob.Bytes)
			refused := got.StatusCode == http.StatusServiceUnavailable && got.code() == "UNAVAILABLE" && !strings.Contains(string(got.body), "panic")
			short := got.StatusCode == http.StatusOK && got.err != nil && fmt.Sprint(got.ContentLength) == size // over the capacity: passed through
			if !whole && !refused && !short {
				t.Errorf("size %s: %d %v, %d bytes", size, got.StatusCode, got.err, len(got.body))
			}
		})
	}
}

// Digests are of the bytes as sent: what is decoded is not what was asked for, and may be endless.
func TestH28EncodedBodies(t *testing.T) {
	for _, encoding := range []string{"gzip", "zstd", "deflate", "br", "x", "gzip, gzip"} {
		bubble(t, oneUpstream, func(r *rig) {
			r.quay.Push("org/app", "latest", storedImage)
			layer := gzipped(t, registrytest.Layer(1, 100<<10))
			r.quay.PutBlob("org/app", layer)
			remove := r.quay.Fault(manifestGets, func(w http.ResponseWriter, _ *http.Request, _ http.Handler) {
				w.Header().Set("Content-Type", storedImage.MediaType)
				w.Header().Set("Content-Encoding", encoding)
				_, _ = w.Write(gzipped(t, storedImage.Raw))
			})
			r.unusable(app + latest)
			r.unusable(app + "/manifests/" + storedImage.Digest().String())
			remove()
			r.quay.Fault(registrytest.Match{}, header("Content-Encoding", encoding)) // some object stores say it of every .gz
			got := r.get(app+"/blobs/"+digest.FromBytes(layer).String()).want(r, http.StatusOK).is(r, layer)
			if said := got.Header.Get("Content-Encoding"); said != "" {
				t.Errorf("passed on: Content-Encoding: %s", said)
			}
			for _, asked := range r.quay.Requests(registrytest.Match{}) {
				if accept := asked.Header.Get("Accept-Encoding"); accept != "" && accept != "identity" {
					t.Errorf("upstream was asked for %s", accept)
				}
			}
		})
	}
}

func gzipped(t *testing.T, raw []byte) []byte {
	var b bytes.Buffer
	w := gzip.NewWriter(&b)
	if _, err := w.Write(raw); err != nil {
		t.Error(err)
	}
	if err := w.Close(); err != nil {
		t.Error(err)
	}
	return b.Bytes()
}

// The headers of our answers are ours: no upstream has a say in what a client does next.
func TestH40UpstreamHeaders(t *testing.T) {
	ours := strings.Fields(`Accept-Ranges Age Cache-Status Connection Content-Length Content-Range Content-Type Date Docker-Content-Digest
		Docker-Distribution-Api-Version Etag Link Oci-Filters-Applied Oci-Namespace Retry-After Warning`)
	hostile := []string{"Set-Cookie", "evil=1; Path=/", "Content-Security-Policy", "default-src *", "Strict-Transport-Security", "max-age=1", "Warning", `299 - "evil"`, "Age", "999",
		"Cache-Status", "evil; hit", "Keep-Alive", "timeout=999", "Proxy-Authenticate", "Basic", "Www-Authenticate", `Basic realm="evil"`, "Trailer", "X-Evil", "X-Evil", "1", "Via", "evil",
		"Server", "evil", "Access-Control-Allow-Origin", "*", "Location", "https://evil.test/", "Refresh", "0; url=https://evil.test/", "Alt-Svc", `h3="evil.test:443"`,
		"Clear-Site-Data", `"*"`, "Oci-Subject", unknown, "Oci-Namespace", "evil.test", "Docker-Distribution-Api-Version", "evil/9", "Content-Disposition", "attachment; filename=evil",
		"Etag", `"evil"`, "Last-Modified", "Sat, 01 Jan 2000 00:00:00 GMT", "Retry-After", "evil", "Ratelimit-Limit", "1", "X-Accel-Redirect", "/etc/passwd", "X-Sendfile", "/etc/passwd"}
	bubble(t, oneUpstream, func(r *rig) {
		r.quay.Push("org/app", "latest", storedImage)
		r.quay.Fault(registrytest.Match{}, header(hostile...))
		dgst, blob := storedImage.Digest().String(), storedImage.Blobs[1].Digest.String()
		check := func() {
			for _, path := range []string{latest, "/manifests/" + dgst, "/blobs/" + blob, "/tags/list", "/referrers/" + dgst, "/manifests/none", "/blobs/" + unknown} {
				for _, method := range []string{http.MethodGet, http.MethodHead} {
					for name, values := range r.do(method, app+path).Header {
						if !slices.Contains(ours, name) || strings.Contains(strings.Join(values, " "), "evil") {
							t.Errorf("%s %s: %s: %s", method, path, name, values)
						}
					}
				}
			}
		}
		check()
		time.Sleep(time.Second)
		check() // from the store
		r.quay.Fault(registrytest.Match{}, header(hostile...), registrytest.Status(http.StatusBadGateway))
		check()
		for _, asked := range r.quay.Requests(registrytest.Match{}) {
			if asked.Header.Get("Cookie") != "" || asked.Header.Get("If-Modified-Since") != "" {
				t.Errorf("upstream's words came back to it: %v", asked.Header)
			}
		}
	})
}

// What an upstream writes into its errors is for nobody: it may be a page, a secret, or a command.
func TestUpstreamErrorTextsStayThere(t *testing.T) {
	for _, status := range []int{400, 401, 403, 404, 405, 410, 418, 429, 451, 500, 503, 599, 999, 203, 206, 300, 302, 304} {
		bubble(t, oneUpstream, func(r *rig) {
			r.quay.Fault(registrytest.Match{}, func(w http.ResponseWriter, _ *http.Request, _ http.Handler) {
				w.WriteHeader(status)
				_, _ = w.Write([]byte(`{"errors":[{"code":"EVIL\u001b[31m","message":"<script>evil</script>","detail":{"token":"evil"}}]}`))
			})
			for _, path := range []string{latest, "/manifests/" + unknown, "/blobs/" + unknown, "/tags/list", "/referrers/" + unknown} {
				got := r.get(app + path)
				if said := strings.ToLower(fmt.Sprint(got.Header) + string(got.body)); strings.Contains(said, "evil") {
					t.Errorf("%d %s: passed on: %s", status, path, said)
				}
				none := got.StatusCode == 200 && (status == 404 || status == 410) && strings.HasPrefix(path, "/referrers/") // an empty index
				refused := (got.StatusCode == 404 || got.StatusCode == 403 || got.StatusCode == 503) && got.code() != ""
				if !none && !refused {
					t.Errorf("%d %s: %d %s", status, path, got.StatusCode, got.body)
				}
			}
		})
	}
}
