// Package oci is the grammar of the field: names, references, digests, manifests, and the error
// JSON in both directions. Everything is parsed at the edge, so that an invalid name, tag or digest
// cannot exist further in.
package oci

import (
	_ "crypto/sha256" // the two digest algorithms of the OCI image specification
	_ "crypto/sha512"
	"regexp"
	"strings"

	"github.com/distribution/distribution/v3/registry/api/errcode"
	"github.com/distribution/reference"
	"github.com/opencontainers/go-digest"
)

// maxName is the longest repository name with its registry, the limit that clients keep to
// (distribution-spec, "Pulling manifests").
const maxName = 255

// DockerHub is the registry whose one-part repository names live under "library/".
const DockerHub = "docker.io"

var (
	namePattern     = regexp.MustCompile(`^[a-z0-9]+((\.|_|__|-+)[a-z0-9]+)*(/[a-z0-9]+((\.|_|__|-+)[a-z0-9]+)*)*$`)
	tagPattern      = regexp.MustCompile(`^[a-zA-Z0-9_][a-zA-Z0-9._-]{0,127}$`)
	registryPattern = regexp.MustCompile(`^(` + reference.DomainRegexp.String() + `)$`)
)

// Repository names a repository of a registry: quay.io and org/app.
type Repository struct{ Registry, Name string }

// String is the name as people write it: quay.io/org/app.
func (r Repository) String() string { return r.Registry + "/" + r.Name }

// Reference names one manifest or blob of a repository. A tag and a digest exclude each other;
// blobs are always named by digest.
type Reference struct {
	Repository
	Tag    string
	Digest digest.Digest
}

// String is the reference as people write it: quay.io/org/app:tag or quay.io/org/app@sha256:….
func (r Reference) String() string {
	if r.Digest != "" {
		return r.Repository.String() + "@" + r.Digest.String()
	}
	return r.Repository.String() + ":" + r.Tag
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
	if len(registry)+1+len(name) > maxName || !namePattern.MatchString(name) {
		return Repository{}, NewError(errcode.ErrorCodeNameInvalid, "%.64q is not the name of a repository", name)
	}
	if registry == DockerHub && !strings.Contains(name, "/") {
		name = "library/" + name
	}
	return Repository{registry, name}, nil
}

// ValidRegistry reports whether s has the form of a registry's name: host or host:port.
func ValidRegistry(s string) bool {
	return len(s) <= maxName && registryPattern.MatchString(s)
}

// ValidTag reports whether s has the form of a tag (distribution-spec, "Pulling manifests").
func ValidTag(s string) bool { return tagPattern.MatchString(s) }

// ParseDigest accepts sha256 and sha512 in their one canonical form, lower-case hex of the full
// length. go-digest panics on what was not checked so; behind this, nothing is left to check.
// Its error is a DIGEST_INVALID.
func ParseDigest(s string) (digest.Digest, error) {
	d := digest.Digest(s)
	if err := d.Validate(); err != nil || (d.Algorithm() != digest.SHA256 && d.Algorithm() != digest.SHA512) {
		return "", NewError(errcode.ErrorCodeDigestInvalid, "%.64q is not a sha256 or sha512 digest", s)
	}
	return d, nil
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
