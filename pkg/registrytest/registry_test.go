package registrytest

import (
	"archive/tar"
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"net/http"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"breakwater/pkg/oci"

	"github.com/opencontainers/go-digest"
	ispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// answer is a response whose body has been read and closed.
type answer struct {
	StatusCode    int
	Header        http.Header
	ContentLength int64
}

// ask sends one request on a connection of its own and reads the answer whole.
func ask(t *testing.T, method, url string, header ...string) (answer, []byte, error) {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), method, url, nil)
	if err != nil {
		t.Fatal(err)
	}
	for i := 0; i+1 < len(header); i += 2 {
		if header[i] != "" {
			req.Header.Add(header[i], header[i+1])
		}
	}
	transport := &http.Transport{DisableKeepAlives: true, DisableCompression: true}
	resp, err := transport.RoundTrip(req)
	if err != nil {
		return answer{}, nil, err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	return answer{resp.StatusCode, resp.Header, resp.ContentLength}, body, err
}

func TestImagesAreWhatTheySay(t *testing.T) {
	amd64 := NewImage(Layer(1, 4096), Layer(2, 100))
	index := NewIndex(amd64, amd64.For("linux/arm64"))
	signature := NewImage(Layer(3, 10)).Referring(index, "application/vnd.example.signature")
	for _, image := range []Image{amd64, index, signature, amd64.Docker(), index.Docker(), index.Annotated("a", "b")} {
		m, err := oci.ParseManifest(image.MediaType, image.Raw, digest.SHA256)
		if err != nil || m.Digest != image.Digest() || m.IsIndex() != (len(image.Images) > 0) {
			t.Errorf("%s: %v", image.Raw, err)
		}
		for i, blob := range image.Blobs {
			if m.Blobs[i].Digest != digest.FromBytes(blob.Bytes) || m.Blobs[i].Size != int64(len(blob.Bytes)) {
				t.Errorf("blob %d of %s", i, image.Raw)
			}
		}
	}
	if index.Images[0].Digest() == index.Images[1].Digest() || index.Digest() == index.Annotated("a", "b").Digest() || signature.Raw == nil {
		t.Error("images that differ have one digest")
	}
	if !bytes.Contains(amd64.Docker().Raw, []byte("rootfs.diff.tar")) || bytes.Contains(amd64.Docker().Raw, []byte("oci")) {
		t.Errorf("%s", amd64.Docker().Raw)
	}
	for _, size := range []int{2048, 4096, 5000, 1 << 20} {
		files := tar.NewReader(bytes.NewReader(Layer(7, size)))
		header, err := files.Next()
		if err != nil || header.Size > int64(size)-2048 || header.Size < int64(size)-3*1024 {
			t.Fatalf("%d bytes: %+v, %v", size, header, err)
		}
		if n, err := io.Copy(io.Discard, files); err != nil || n != header.Size {
			t.Errorf("%d bytes: %d, %v", size, n, err)
		}
		if _, err := files.Next(); !errors.Is(err, io.EOF) {
			t.Errorf("%d bytes: %v after the file", size, err)
		}
	}
}

func TestContent(t *testing.T) {
	reg := New(Config{})
	image := NewImage(Layer(1, 10_000))
	index := NewIndex(image)
	reg.Push("org/app", "latest", index)
	server := reg.Start(t)
	layer := image.Blobs[1]
	blob := "/v2/org/app/blobs/" + layer.Digest.String()
	for _, test := range []struct {
		path, name, value string
		status            int
		mediaType         string
		body              []byte
	}{
		{"/v2/", "", "", 200, "application/json", []byte("{}")},
		{"/v2/org/app/manifests/latest", "", "", 200, ispec.MediaTypeImageIndex, index.Raw},
		{"/v2/org/app/manifests/" + image.Digest().String(), "", "", 200, ispec.MediaTypeImageManifest, image.Raw},
		{"/v2/org/app/manifests/none", "", "", 404, "application/json", nil},
		{blob, "", "", 200, "application/octet-stream", layer.Bytes},
		{blob, "Range", "bytes=9000-", 206, "application/octet-stream", layer.Bytes[9000:]},
		{blob, "Range", "bytes=10000-", 416, "", nil},
		{blob, "If-None-Match", `"` + layer.Digest.String() + `"`, 304, "", nil},
		{"/v2/org/app/blobs/" + image.Digest().String(), "", "", 404, "application/json", nil},
		{strings.Replace(blob, "org/app", "other", 1), "", "", 404, "application/json", nil},
		{"/v2/org/app/tags/list", "", "", 200, "application/json", []byte(`{"name":"org/app","tags":["latest"]}`)},
		{"/elsewhere", "", "", 404, "", nil},
	} {
		for _, method := range []string{"GET", "HEAD"} {
			resp, body, err := ask(t, method, server.URL+test.path, test.name, test.value)
			if err != nil || resp.StatusCode != test.status || test.mediaType != "" && resp.Header.Get("Content-Type") != test.mediaType {
				t.Errorf("%s %s: %v, %v", method, test.path, resp, err)
				continue
			}
			if method == "GET" && test.body != nil && !bytes.Equal(body, test.body) {
				t.Errorf("%s: %d bytes", test.path, len(body))
			}
			if test.body != nil && resp.ContentLength != int64(len(test.body)) {
				t.Errorf("%s %s: a length of %d", method, test.path, resp.ContentLength)
			}
			if test.status == 200 && strings.Contains(test.path, "/manifests/") && resp.Header.Get("Docker-Content-Digest") != digest.FromBytes(test.body).String() {
				t.Errorf("%s %s: %v", method, test.path, resp.Header)
			}
		}
	}
	if n := reg.Count(Match{Kind: KindManifest, Method: "HEAD", Path: "org/app"}); n != 3 {
		t.Errorf("%d HEAD of manifests", n)
	}
	ranges := reg.Requests(Match{Func: func(r *http.Request) bool { return r.Header.Get("Range") == "bytes=9000-" && r.Method == "GET" }})
	if len(ranges) != 1 || ranges[0].Sent != 1000 || ranges[0].Status != 206 || ranges[0].End.Before(ranges[0].Start) {
		t.Errorf("%+v", ranges)
	}
}

func TestTagsInPages(t *testing.T) {
	reg := New(Config{})
	for _, tag := range []string{"c", "a", "d", "b", "e"} {
		reg.Push("org/app", tag, NewImage())
	}
	server := reg.Start(t)
	var tags, links []string
	for next := "/v2/org/app/tags/list?n=2"; next != ""; {
		resp, body, err := ask(t, "GET", server.URL+next)
		var page struct{ Tags []string }
		if err != nil || json.Unmarshal(body, &page) != nil {
			t.Fatal(string(body), err)
		}
		tags = append(tags, page.Tags...)
		next = ""
		if link := resp.Header.Get("Link"); link != "" {
			links = append(links, link)
			next = strings.TrimSuffix(strings.TrimPrefix(link, "<"), `>; rel="next"`)
		}
	}
	if !slices.Equal(tags, []string{"a", "b", "c", "d", "e"}) || len(links) != 2 {
		t.Errorf("%v by %v", tags, links)
	}
}

func TestReferrers(t *testing.T) {
	reg := New(Config{})
	image := NewImage(Layer(1, 100))
	signature := NewImage(Layer(2, 100)).Referring(image, "example/signature")
	reg.Push("org/app", "latest", image)
	reg.Push("org/app", "", signature)
	reg.Push("org/app", "", NewImage(Layer(3, 100)).Referring(image, "example/sbom"))
	server := reg.Start(t)
	api := server.URL + "/v2/org/app/referrers/" + image.Digest().String()
	tag := server.URL + "/v2/org/app/manifests/sha256-" + image.Digest().Encoded()
	list := func(url string) (int, []ispec.Descriptor) {
		resp, body, err := ask(t, "GET", url)
		if err != nil {
			t.Fatal(err)
		}
		var index ispec.Index
		_ = json.Unmarshal(body, &index)
		return resp.StatusCode, index.Manifests
	}
	if status, all := list(api); status != 200 || len(all) != 2 {
		t.Errorf("%d %v", status, all)
	}
	if _, some := list(api + "?artifactType=example/signature"); len(some) != 1 || some[0].Digest != signature.Digest() {
		t.Errorf("%v", some)
	}
	if status, none := list(server.URL + "/v2/org/app/referrers/" + signature.Digest().String()); status != 200 || len(none) != 0 {
		t.Errorf("%d %v", status, none)
	}
	if status, _ := list(tag); status != 404 {
		t.Errorf("the tag beside the API: %d", status)
	}
	reg.Configure(Config{ReferrersTag: true})
	if status, _ := list(api); status != 404 {
		t.Errorf("the API is still there: %d", status)
	}
	if status, all := list(tag); status != 200 || len(all) != 2 {
		t.Errorf("%d %v", status, all)
	}
}

func TestBearer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := NewNetwork()
		auth := Auth{Scheme: "Bearer", Realm: "https://auth.test/token", Service: "quay.test", Users: map[string]string{"u": "p"}, Public: []string{"org/open"}, ExpiresIn: time.Minute}
		reg := New(Config{Auth: auth})
		reg.Push("org/open", "latest", NewImage())
		reg.Push("org/app", "latest", NewImage())
		reg.Serve(t, n, "quay.test:443")
		reg.Serve(t, n, "auth.test:443")
		c := client(t, n)
		get := func(url string, prepare func(*http.Request)) (int, string, []byte) {
			req, err := http.NewRequestWithContext(t.Context(), "GET", url, nil)
			if err != nil {
				t.Fatal(err)
			}
			prepare(req)
			resp, err := c.Do(req)
			if err != nil {
				t.Fatal(err)
			}
			defer resp.Body.Close()
			body, err := io.ReadAll(resp.Body)
			if err != nil {
				t.Fatal(err)
			}
			return resp.StatusCode, resp.Header.Get("Www-Authenticate"), body
		}
		token := func(repo, user, password string) string {
			status, _, body := get("https://auth.test/token?service=quay.test&scope=repository:"+repo+":pull", func(r *http.Request) {
				if user != "" {
					r.SetBasicAuth(user, password)
				}
			})
			var answer struct {
				Token     string `json:"token"`
				ExpiresIn int    `json:"expires_in"`
			}
			if err := json.Unmarshal(body, &answer); status == 200 && (err != nil || answer.ExpiresIn != 60) {
				t.Errorf("%s, %v", body, err)
			}
			return answer.Token
		}
		pull := func(repo, token string) (int, string) {
			status, challenge, _ := get("https://quay.test/v2/"+repo+"/manifests/latest", func(r *http.Request) {
				if token != "" {
					r.Header.Set("Authorization", "Bearer "+token)
				}
			})
			return status, challenge
		}
		want := `Bearer realm="https://auth.test/token",service="quay.test",scope="repository:org/app:pull"`
		if status, challenge := pull("org/app", ""); status != 401 || challenge != want {
			t.Errorf("%d %s", status, challenge)
		}
		if status, _ := pull("org/open", token("org/open", "", "")); status != 200 {
			t.Errorf("anonymous, public: %d", status)
		}
		if status, challenge := pull("org/app", token("org/app", "", "")); status != 401 || !strings.HasSuffix(challenge, `error="insufficient_scope"`) {
			t.Errorf("anonymous, private: %d %s", status, challenge)
		}
		if got := token("org/app", "u", "wrong"); got != "" {
			t.Error("a token for a wrong password")
		}
		good := token("org/app", "u", "p")
		if status, _ := pull("org/app", good); status != 200 {
			t.Errorf("with a token: %d", status)
		}
		time.Sleep(time.Minute)
		if status, _ := pull("org/app", good); status != 401 {
			t.Errorf("with an expired token: %d", status)
		}
		good = token("org/app", "u", "p")
		reg.Revoke()
		if status, _ := pull("org/app", good); status != 401 {
			t.Errorf("with a revoked token: %d", status)
		}
		if n := reg.Count(Match{Kind: KindToken, Host: "auth.test"}); n != 5 {
			t.Errorf("%d requests for tokens", n)
		}
	})
}

func TestBasic(t *testing.T) {
	reg := New(Config{Auth: Auth{Scheme: "Basic", Service: "s", Users: map[string]string{"u": "p"}}})
	reg.Push("org/app", "latest", NewImage())
	url := reg.Start(t).URL + "/v2/org/app/manifests/latest"
	for value, want := range map[string]int{"": 401, "Basic dTpw": 200, "Basic dTpx": 401} {
		resp, _, err := ask(t, "GET", url, "Authorization", value)
		if err != nil || resp.StatusCode != want || want == 401 && resp.Header.Get("Www-Authenticate") != `Basic realm="s"` {
			t.Errorf("%q: %v, %v", value, resp, err)
		}
	}
}

func TestCDN(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := NewNetwork()
		reg := New(Config{CDN: "https://cdn.test", CDNLifetime: time.Minute})
		dgst := reg.PutBlob("org/app", []byte("content"))
		reg.Serve(t, n, "quay.test:443")
		reg.Serve(t, n, "cdn.test:443")
		c := client(t, n)
		get := func(url string) (int, string, string) {
			resp, err := c.Get(url)
			if err != nil {
				t.Fatal(err)
			}
			defer resp.Body.Close()
			body, _ := io.ReadAll(resp.Body)
			return resp.StatusCode, string(body), resp.Request.URL.String()
		}
		status, body, signed := get("https://quay.test/v2/org/app/blobs/" + dgst.String())
		if status != 200 || body != "content" || !strings.HasPrefix(signed, "https://cdn.test/") {
			t.Errorf("%d %s from %s", status, body, signed)
		}
		if status, _, _ := get(strings.Replace(signed, "signature=", "signature=0", 1)); status != 403 {
			t.Errorf("a wrong signature: %d", status)
		}
		time.Sleep(time.Minute)
		if status, body, _ := get(signed); status != 403 || !strings.Contains(body, "AccessDenied") {
			t.Errorf("an old signature: %d %s", status, body)
		}
		if reg.Count(Match{Kind: KindCDN, Host: "cdn.test"}) != 3 || reg.Count(Match{Kind: KindBlob}) != 1 {
			t.Errorf("%v", reg.Requests(Match{}))
		}
	})
}
