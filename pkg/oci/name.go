// Package oci is the grammar of the field: names, references, digests, manifests, and the error
// JSON in both directions. Everything is parsed at the edge, so that an invalid name, tag or digest
// cannot exist further in.
package oci

import (
	_ "crypto/sha256" // the two digest algorithms of the OCI image specification
	_ "crypto/sha512"
	"log/slog"
	"net/netip"
	"strings"

	"github.com/distribution/distribution/v3/registry/api/errcode"
	"github.com/opencontainers/go-digest"
)

// maxName is the longest repository name with its registry, the limit that clients keep to
// (distribution-spec, "Pulling manifests").
const maxName = 255

// DockerHub is the registry whose one-part repository names live under "library/".
const DockerHub = "docker.io"

// Repository names a repository of a registry: quay.io and org/app.
type Repository struct{ Registry, Name string }

// String is the name as people write it: quay.io/org/app.
func (r Repository) String() string { return r.Registry + "/" + r.Name }

// LogValue is String.
func (r Repository) LogValue() slog.Value { return slog.StringValue(r.String()) }

// Reference names one manifest or blob of a repository. A tag and a digest exclude each other;
// blobs are always named by digest.
type Reference struct {
	Repository
	Tag    string
	Digest digest.Digest
}

// String is the reference as people write it: quay.io/org/app:tag or quay.io/org/app@sha256:….
func (r Reference) String() string {
	switch {
	case r.Digest != "":
		return r.Repository.String() + "@" + r.Digest.String()
	case r.Tag != "":
		return r.Repository.String() + ":" + r.Tag
	}
	return r.Repository.String()
}

// Identifier is the last part of the reference: its digest, or else its tag.
func (r Reference) Identifier() string {
	if r.Digest != "" {
		return r.Digest.String()
	}
	return r.Tag
}

// ParseRepository checks both names and writes Docker Hub's short ones out: docker.io/alpine is
// docker.io/library/alpine. Its error is a NAME_INVALID.
func ParseRepository(registry, name string) (Repository, error) {
	if !ValidRegistry(registry) {
		return Repository{}, NewError(errcode.ErrorCodeNameInvalid, "%.64q is not the name of a registry", registry)
	}
	if len(registry)+1+len(name) > maxName || !validName(name) {
		return Repository{}, NewError(errcode.ErrorCodeNameInvalid, "%.64q is not the name of a repository", name)
	}
	if registry == DockerHub && !strings.Contains(name, "/") {
		name = "library/" + name
	}
	return Repository{registry, name}, nil
}

// ValidRegistry reports whether s has the form of a registry's name: host or host:port.
func ValidRegistry(s string) bool {
	if strings.HasPrefix(s, "[") {
		address, err := netip.ParseAddrPort(s)
		if err != nil {
			bare, ok := strings.CutSuffix(s[1:], "]")
			ip, err := netip.ParseAddr(bare)
			return ok && err == nil && ip.Is6() && ip.Zone() == ""
		}
		return address.Addr().Is6() && address.Addr().Zone() == ""
	}
	host, port, found := strings.Cut(s, ":")
	if len(s) > maxName || found && (port == "" || strings.Trim(port, "0123456789") != "") {
		return false
	}
	for label := range strings.SplitSeq(host, ".") {
		if label == "" || label[0] == '-' || label[len(label)-1] == '-' {
			return false
		}
		for i := range len(label) {
			if c := label[i]; !isLowerAlnum(c) && (c < 'A' || c > 'Z') && c != '-' {
				return false
			}
		}
	}
	return true
}

// ValidTag reports whether s has the form of a tag (distribution-spec, "Pulling manifests").
func ValidTag(s string) bool {
	if s == "" || len(s) > 128 || s[0] == '.' || s[0] == '-' {
		return false
	}
	for i := range len(s) {
		if c := s[i]; !isLowerAlnum(c) && (c < 'A' || c > 'Z') && c != '_' && c != '.' && c != '-' {
			return false
		}
	}
	return true
}

// validName is, by hand since it is on every request's way,
// [a-z0-9]+((\.|_|__|-+)[a-z0-9]+)*(\/[a-z0-9]+((\.|_|__|-+)[a-z0-9]+)*)*
func validName(s string) bool {
	for i := 0; ; {
		word := i
		for i < len(s) && isLowerAlnum(s[i]) {
			i++
		}
		if i == word {
			return false
		}
		if i == len(s) {
			return true
		}
		separator := i
		for i < len(s) && s[i] == s[separator] {
			i++
		}
		switch n := i - separator; s[separator] {
		case '/', '.':
			if n > 1 {
				return false
			}
		case '_':
			if n > 2 {
				return false
			}
		case '-':
		default:
			return false
		}
	}
}

func isLowerAlnum(c byte) bool { return 'a' <= c && c <= 'z' || '0' <= c && c <= '9' }

// SubjectOf is what a tag like sha256-<hex>.sig is a signature of: how signatures were kept before
// registries knew referrers (distribution-spec, "Referrers Tag Schema"; cosign).
func SubjectOf(tag string) (digest.Digest, bool) {
	algorithm, rest, ok := strings.Cut(tag, "-")
	if !ok {
		return "", false
	}
	encoded, _, _ := strings.Cut(rest, ".")
	dgst, err := ParseDigest(algorithm + ":" + encoded)
	return dgst, err == nil
}

// ParseDigest accepts sha256 and sha512 in their one canonical form, lower-case hex of the full
// length. go-digest panics on what was not checked so; behind this, nothing is left to check.
// Its error is a DIGEST_INVALID.
func ParseDigest(s string) (digest.Digest, error) {
	algorithm, encoded, _ := strings.Cut(s, ":")
	length := map[string]int{"sha256": 64, "sha512": 128}[algorithm]
	if length == 0 || len(encoded) != length || !isHex(encoded) {
		return "", NewError(errcode.ErrorCodeDigestInvalid, "%.64q is not a sha256 or sha512 digest", s)
	}
	return digest.Digest(s), nil
}

func isHex(s string) bool {
	for i := range len(s) {
		if c := s[i]; (c < '0' || c > '9') && (c < 'a' || c > 'f') {
			return false
		}
	}
	return true
}

// ParseReference takes what stands behind /manifests/: a tag, or a digest if it holds a colon.
// A malformed tag names nothing, so its error is a MANIFEST_UNKNOWN; a malformed digest's is a
// DIGEST_INVALID.
func ParseReference(repo Repository, s string) (Reference, error) {
	if strings.Contains(s, ":") {
		d, err := ParseDigest(s)
		return Reference{Repository: repo, Digest: d}, err
	}
	if !ValidTag(s) {
		return Reference{}, NewError(errcode.ErrorCodeManifestUnknown, "%.64q is not a tag", s)
	}
	return Reference{Repository: repo, Tag: s}, nil
}

// ParseImage takes an image as people write it, with its registry and a tag or a digest:
// quay.io/org/app:latest. Its error is a NAME_INVALID, or ParseReference's.
func ParseImage(s string) (Reference, error) {
	registry, rest, _ := strings.Cut(s, "/")
	name, identifier, found := strings.Cut(rest, "@")
	if found && !strings.Contains(identifier, ":") {
		identifier += ":" // no digest, and no tag either
	}
	if !found {
		name, identifier, found = strings.Cut(rest, ":")
		if strings.Contains(identifier, ":") {
			found = false // a digest stands behind an @
		}
	}
	if !found {
		return Reference{}, NewError(errcode.ErrorCodeNameInvalid, "%.255q has neither a tag nor a digest", s)
	}
	repo, err := ParseRepository(registry, name)
	if err != nil {
		return Reference{}, err
	}
	return ParseReference(repo, identifier)
}
