package proxy

import (
	"bufio"
	"errors"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"breakwater/pkg/config"
	"breakwater/pkg/oci"
)

// loaded is the configuration that yaml is.
func loaded(t testing.TB, yaml string) *config.Config {
	file := filepath.Join(t.TempDir(), "config.yaml")
	if err := os.WriteFile(file, []byte(yaml), 0o600); err != nil {
		t.Fatal(err)
	}
	cfg, err := config.Load(file, nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	return cfg
}

// Whatever a request says, what it names is valid and configured, or an error of the client's.
func FuzzParse(f *testing.F) {
	known, anyOther := loaded(f, knows), loaded(f, "any_registry: true"+knows)
	for _, seed := range [][3]string{
		{"/v2/", "", "localhost:5000"},
		{"/v2/library/alpine/manifests/latest", "docker.io", "localhost"},
		{"/v2/quay.test/org/app/blobs/sha256:" + nothing, "", "127.0.0.1:5000"},
		{"/v2/alpine/tags/list?n=5&last=x", "quay.test", "quay.mirror.test"},
		{"/v2/org/blobs/manifests/referrers/sha512:" + nothing + nothing, "evil.example:443", "[::1]:5000"},
		{"/v2/org/%2e%2e/%2e%2e/manifests/x", "quay.test", "localhost"},
		{"/v2/%2e%2e/blobs/manifests/..%2f", "localhost:1", "mirror.test"},
		{"http://169.254.169.254/v2/a/manifests/b", "", "evil.example"},
	} {
		f.Add(seed[0], seed[1], seed[2])
	}
	f.Fuzz(func(t *testing.T, path, ns, host string) {
		if ns != "" {
			path += "?ns=" + ns
		}
		r, err := http.ReadRequest(bufio.NewReader(strings.NewReader("GET " + path + " HTTP/1.1\r\nHost: " + host + "\r\n\r\n")))
		if err != nil {
			return // net/http refuses it
		}
		for _, cfg := range []*config.Config{known, anyOther} {
			if err := checkHost(cfg, r); err != nil {
				wantRefusal(t, err)
				continue
			}
			target, err := parse(cfg, r)
			if err != nil {
				wantRefusal(t, err)
				continue
			}
			target.check(t, cfg)
		}
	})
}

// wantRefusal fails the test unless err says that the client is at fault.
func wantRefusal(t *testing.T, err error) {
	t.Helper()
	if e := new(oci.Error); !errors.As(err, &e) || e.Status < 400 || e.Status >= 500 || e.Message == "" {
		t.Errorf("%v is no refusal", err)
	}
}

// check fails the test unless the target can be asked for and stored.
func (t target) check(tb *testing.T, cfg *config.Config) {
	tb.Helper()
	if t.kind == kindBase {
		return
	}
	repo := t.ref.Repository
	if again, err := oci.ParseRepository(repo.Registry, repo.Name); err != nil || again != repo {
		tb.Errorf("%q is not valid: %v", repo, err)
	}
	if !filepath.IsLocal(repo.String()) || filepath.Clean(repo.String()) != repo.String() {
		tb.Errorf("%q is no path below the store", repo)
	}
	if _, ok := cfg.Registries[repo.Registry]; !ok && !cfg.AnyRegistry {
		tb.Errorf("%q is not configured", repo.Registry)
	}
	hasDigest, hasTag := t.ref.Digest != "", t.ref.Tag != ""
	if _, err := oci.ParseDigest(t.ref.Digest.String()); hasDigest && err != nil {
		tb.Errorf("%q is no digest: %v", t.ref.Digest, err)
	}
	if hasTag && !oci.ValidTag(t.ref.Tag) {
		tb.Errorf("%q is no tag", t.ref.Tag)
	}
	switch {
	case t.kind == kindManifest && hasDigest == hasTag, t.kind == kindTags && (hasDigest || hasTag),
		(t.kind == kindBlob || t.kind == kindReferrers) && (!hasDigest || hasTag):
		tb.Errorf("%s with digest %q and tag %q", t.kind, t.ref.Digest, t.ref.Tag)
	}
	if t.ns != "" && t.ns != repo.Registry || strings.ContainsAny(t.ns, "\r\n") {
		tb.Errorf("ns %q is echoed for %s", t.ns, repo)
	}
}
