package oci

import (
	"errors"
	"fmt"
	"net/http/httptest"
	"regexp"
	"strings"
	"testing"

	"github.com/distribution/reference"
	"github.com/opencontainers/go-digest"
)

const emptyBlob = `{"mediaType":"application/vnd.oci.empty.v1+json","digest":"sha256:44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a","size":2}`

func TestH04DigestForms(t *testing.T) {
	hex := strings.Repeat("ab", 32)
	good := []string{"sha256:" + hex, "sha512:" + hex + hex}
	bad := []string{"", "sha256", "sha256:", "sha256:" + hex[1:], "sha256:" + hex + "a", "sha256:" + strings.ToUpper(hex),
		"sha256:../../x", "SHA256:" + hex, "md5:" + hex[:32], "sha256+b64:" + hex, "sha384:" + hex + hex[:32], "blake3:" + hex}
	for _, s := range good {
		if d, err := ParseDigest(s); err != nil || d.String() != s {
			t.Errorf("ParseDigest(%q) = %v, %v", s, d, err)
		}
	}
	for _, s := range bad {
		_, err := ParseDigest(s)
		if e := new(Error); !errors.As(err, &e) || e.Status != 400 || !strings.HasPrefix(e.Error(), "DIGEST_INVALID") {
			t.Errorf("ParseDigest(%q): %v, want 400 DIGEST_INVALID", s, err)
		}
	}
}

func TestH02NameForms(t *testing.T) {
	for _, name := range []string{"a", "a/b/c", "a.b/c_d/e__f/g--h", "0/1"} {
		if _, err := ParseRepository("quay.io", name); err != nil {
			t.Errorf("%q: %v", name, err)
		}
	}
	for _, name := range []string{"", "A/b", "a__ _b", "a//b", "/a", "a/", "a/../b", "..", "a\x00", "a\n", "a\xff", "a___b", strings.Repeat("a", 300)} {
		if _, err := ParseRepository("quay.io", name); err == nil {
			t.Errorf("%q was accepted", name)
		}
	}
	if r, _ := ParseRepository("docker.io", "alpine"); r.String() != "docker.io/library/alpine" {
		t.Errorf("docker.io/alpine is %s", r)
	}
}

func TestH03TagForms(t *testing.T) {
	for tag, want := range map[string]bool{"latest": true, "_a.b-c": true, strings.Repeat("x", 128): true,
		strings.Repeat("x", 129): false, ".a": false, "-a": false, "latest?ns=x": false, "": false} {
		if ValidTag(tag) != want {
			t.Errorf("ValidTag(%q) = %v", tag, !want)
		}
	}
}

func TestManifestTypeFollowsFromBytes(t *testing.T) {
	image := `{"schemaVersion":2,"config":` + emptyBlob + `,"layers":[` + emptyBlob + `],"annotations":{"Digest":"mine"}}`
	m, err := ParseManifest("application/vnd.oci.image.manifest.v1+json; charset=utf-8", []byte(image), digest.SHA256)
	if err != nil || m.MediaType != "application/vnd.oci.image.manifest.v1+json" || len(m.Blobs) != 2 || m.Digest != digest.FromString(image) {
		t.Fatalf("%+v, %v", m, err)
	}
	if m, err := ParseManifest("", []byte(`{"schemaVersion":2,"manifests":[]}`), digest.SHA512); err != nil || !m.IsIndex() || m.Digest.Algorithm() != digest.SHA512 {
		t.Fatalf("%+v, %v", m, err)
	}
}

func TestH23H24HostileManifests(t *testing.T) {
	layers := func(s string) string { return `{"schemaVersion":2,"layers":[` + s + `]}` }
	tests := map[string][2]string{
		"not JSON":            {"", `<html>`},
		"truncated":           {"", layers(emptyBlob)[:60]},
		"two values":          {"", layers(emptyBlob) + `{}`},
		"neither":             {"", `{"schemaVersion":2}`},
		"array":               {"", `[]`},
		"deep":                {"", layers(strings.Repeat("[", 100_000) + strings.Repeat("]", 100_000))},
		"many":                {"", layers(strings.TrimSuffix(strings.Repeat(emptyBlob+",", 10_001), ","))},
		"duplicate":           {"", `{"layers":[],"layers":[` + emptyBlob + `]}`},
		"misspelt":            {"", `{"layers":[],"Manifests":[]}`},
		"negative size":       {"", layers(strings.Replace(emptyBlob, `"size":2`, `"size":-2`, 1))},
		"size over int64":     {"", layers(strings.Replace(emptyBlob, `"size":2`, `"size":9223372036854775808`, 1))},
		"size NaN":            {"", layers(strings.Replace(emptyBlob, `"size":2`, `"size":NaN`, 1))},
		"bad digest":          {"", layers(strings.Replace(emptyBlob, `sha256:`, `md5:`, 1))},
		"both":                {"", `{"manifests":[],"layers":[]}`},
		"index with layers":   {"", `{"mediaType":"application/vnd.oci.image.index.v1+json","layers":[]}`},
		"another type":        {"application/vnd.oci.image.index.v1+json", layers(emptyBlob)},
		"a portal's page":     {"text/html; charset=utf-8", layers(emptyBlob)},
		"types that disagree": {"application/vnd.oci.image.manifest.v1+json", `{"mediaType":"` + MediaTypeDockerManifest + `","layers":[]}`},
	}
	for name, test := range tests {
		if m, err := ParseManifest(test[0], []byte(test[1]), digest.SHA256); err == nil {
			t.Errorf("%s: accepted as %s", name, m.MediaType)
		}
	}
}

func TestWriteErrorIsReadBack(t *testing.T) {
	w := httptest.NewRecorder()
	w.Header().Set("Content-Range", "bytes */7")
	_, err := ParseDigest("md5:x")
	WriteError(w, fmt.Errorf("wrapped: %w", err))
	resp := w.Result()
	got := ReadError(resp)
	if resp.Header.Get("Content-Range") != "" || resp.StatusCode != 400 || got.Error() != err.Error() {
		t.Errorf("%d %v, want %v", resp.StatusCode, got, err)
	}
	w = httptest.NewRecorder()
	WriteError(w, errors.New("secret path"))
	if w.Code != 500 || strings.Contains(w.Body.String(), "secret") {
		t.Errorf("%d %s", w.Code, w.Body)
	}
}

func FuzzParseManifest(f *testing.F) {
	f.Add("", []byte(`{"schemaVersion":2,"layers":[`+emptyBlob+`]}`))
	f.Add("application/vnd.oci.image.index.v1+json", []byte(`{"manifests":[`+emptyBlob+`],"subject":`+emptyBlob+`}`))
	f.Fuzz(func(t *testing.T, contentType string, raw []byte) {
		m, err := ParseManifest(contentType, raw, digest.SHA256)
		if err != nil {
			return
		}
		again, err := ParseManifest(m.MediaType, raw, digest.SHA256)
		if err != nil || again.MediaType != m.MediaType {
			t.Errorf("%q read twice: %q, %v", m.MediaType, again.MediaType, err)
		}
		for _, d := range append(m.Manifests, m.Blobs...) {
			_ = d.Digest.Algorithm() // panics if a malformed one came through
		}
	})
}

// The specification gives the forms as regular expressions (distribution-spec, "Pulling manifests");
// that of a registry's name is Docker's.
func FuzzForms(f *testing.F) {
	name := regexp.MustCompile(`^[a-z0-9]+((\.|_|__|-+)[a-z0-9]+)*(/[a-z0-9]+((\.|_|__|-+)[a-z0-9]+)*)*$`)
	tag := regexp.MustCompile(`^[a-zA-Z0-9_][a-zA-Z0-9._-]{0,127}$`)
	registry := regexp.MustCompile(`^(` + reference.DomainRegexp.String() + `)$`)
	for _, s := range []string{"a", "a/b", "a..b", "a__b", "a___b", "a---b", "quay.io:443", "sha256:" + strings.Repeat("a", 64), "-a", "localhost:", "[::1]:5000", "a.-b", "Quay.io", "_x"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		if got, want := validName(s), name.MatchString(s); got != want {
			t.Errorf("name %q: %v, want %v", s, got, want)
		}
		if got, want := ValidTag(s), tag.MatchString(s); got != want {
			t.Errorf("tag %q: %v, want %v", s, got, want)
		}
		d := digest.Digest(s)
		valid := d.Validate() == nil && d.Algorithm() != digest.SHA384
		if _, err := ParseDigest(s); (err == nil) != valid {
			t.Errorf("digest %q: %v", s, err)
		}
		if strings.HasPrefix(s, "[") || len(s) > maxName {
			return // ours must be an address, and bounded
		}
		if got, want := ValidRegistry(s), registry.MatchString(s); got != want {
			t.Errorf("registry %q: %v, want %v", s, got, want)
		}
	})
}

func FuzzParseReference(f *testing.F) {
	f.Add("quay.io", "org/app", "latest")
	f.Add("docker.io", "alpine", "sha256:"+strings.Repeat("a", 64))
	f.Fuzz(func(t *testing.T, registry, name, s string) {
		repo, err := ParseRepository(registry, name)
		if err != nil {
			return
		}
		if strings.Contains(repo.String(), "..") || strings.Contains(repo.String(), "//") {
			t.Errorf("%q, %q gives %s", registry, name, repo)
		}
		if ref, err := ParseReference(repo, s); err == nil && ref.Identifier() != s {
			t.Errorf("%q gives %s", s, ref)
		}
	})
}

func TestParseImage(t *testing.T) {
	dgst := "sha256:" + strings.Repeat("ab", 32)
	for s, want := range map[string]string{
		"quay.io/org/app:latest":          "quay.io/org/app:latest",
		"quay.io/org/app@" + dgst:         "quay.io/org/app@" + dgst,
		"docker.io/alpine:3":              "docker.io/library/alpine:3",
		"localhost:5000/app:v1":           "localhost:5000/app:v1",
		"quay.io/org/app":                 "",
		"quay.io/org/app:":                "",
		"quay.io/org/app@latest":          "",
		"quay.io/org/app:" + dgst:         "",
		"quay.io/org/app:latest@" + dgst:  "",
		"quay.io/Org/app:latest":          "",
		"quay.io:latest":                  "",
		"https://quay.io/org/app:latest":  "",
		"quay.io/org/app@sha256:deadbeef": "",
		"":                                "",
	} {
		ref, err := ParseImage(s)
		if (err == nil) != (want != "") || err == nil && ref.String() != want {
			t.Errorf("%q: %s, %v; want %q", s, ref, err, want)
		}
	}
}
