package oci

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"mime"
	"strings"

	"github.com/opencontainers/go-digest"
	ispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// Media types of Docker's own, older than OCI's and still on every registry.
const (
	MediaTypeDockerManifest = "application/vnd.docker.distribution.manifest.v2+json"
	MediaTypeDockerList     = "application/vnd.docker.distribution.manifest.list.v2+json"
)

// ManifestTypes are the types to ask a registry for: without them, some hand out schema 1 or pick
// a platform by themselves.
var ManifestTypes = []string{ispec.MediaTypeImageIndex, ispec.MediaTypeImageManifest, MediaTypeDockerList, MediaTypeDockerManifest}

// Bounds of the decoder. The largest manifests in use have some thousand descriptors, four deep.
const (
	// MaxManifest is what every registry accepts and no client reads beyond (CVE-2017-11468 is why
	// there is a limit at all).
	MaxManifest    = 4 << 20
	maxDepth       = 32
	maxDescriptors = 10_000
	maxElements    = 4 * maxDescriptors // of all arrays, since two bytes can decode to a whole descriptor
)

// Manifest is an image manifest or an index, with the bytes that its digest is the hash of. They
// are never rewritten.
type Manifest struct {
	Digest    digest.Digest
	MediaType string
	Raw       []byte
	Manifests []ispec.Descriptor // of an index
	Blobs     []ispec.Descriptor // config and layers of an image manifest
	Subject   *ispec.Descriptor  // what this is a referrer of
}

// IsIndex reports whether the manifest lists other manifests, one a platform.
func (m Manifest) IsIndex() bool { return isIndex(m.MediaType) }

func isIndex(mediaType string) bool {
	return mediaType == ispec.MediaTypeImageIndex || mediaType == MediaTypeDockerList
}

// ParseManifest decodes what was sent as contentType ("" when it comes from storage) and hashes it
// with algorithm. The media type follows from the bytes alone: their mediaType or, without that,
// OCI's type of their shape; a contentType that says otherwise is refused, as are bytes that can be
// read in two ways (GHSA-qq97-vm5h-rrhg, GHSA-5j5w-g665-5m35).
func ParseManifest(contentType string, raw []byte, algorithm digest.Algorithm) (Manifest, error) {
	if len(raw) > MaxManifest {
		return Manifest{}, fmt.Errorf("manifest of %d bytes is over the limit of %d", len(raw), MaxManifest)
	}
	if err := checkJSON(raw); err != nil {
		return Manifest{}, fmt.Errorf("manifest: %w", err)
	}
	var body struct {
		MediaType string             `json:"mediaType"`
		Manifests []ispec.Descriptor `json:"manifests"`
		Config    *ispec.Descriptor  `json:"config"`
		Layers    []ispec.Descriptor `json:"layers"`
		Blobs     []ispec.Descriptor `json:"blobs"` // OCI artifact manifests, withdrawn but in use
		Subject   *ispec.Descriptor  `json:"subject"`
	}
	if err := json.Unmarshal(raw, &body); err != nil {
		return Manifest{}, fmt.Errorf("manifest: %w", err)
	}
	m := Manifest{
		Digest:    algorithm.FromBytes(raw),
		MediaType: body.MediaType,
		Raw:       raw,
		Manifests: body.Manifests,
		Blobs:     append(body.Layers, body.Blobs...),
		Subject:   body.Subject,
	}
	if body.Config != nil {
		m.Blobs = append([]ispec.Descriptor{*body.Config}, m.Blobs...)
	}
	if err := m.checkShape(body.Manifests != nil, body.Config != nil || body.Layers != nil); err != nil {
		return Manifest{}, fmt.Errorf("manifest: %w", err)
	}
	if sent := mediaTypeOf(contentType); sent != "" && sent != m.MediaType {
		return Manifest{}, fmt.Errorf("manifest: sent as %.100q but is %.100q", sent, m.MediaType)
	}
	return m, nil
}

// checkShape settles the media type and refuses descriptors that nothing could be fetched by.
func (m *Manifest) checkShape(hasManifests, hasLayers bool) error {
	switch {
	case hasManifests && hasLayers:
		return errors.New("is an index and an image at once")
	case m.MediaType == "" && hasManifests:
		m.MediaType = ispec.MediaTypeImageIndex
	case m.MediaType == "" && hasLayers:
		m.MediaType = ispec.MediaTypeImageManifest
	case m.MediaType == "":
		return errors.New("is neither an image nor an index")
	case isIndex(m.MediaType) && hasLayers, !isIndex(m.MediaType) && hasManifests:
		return fmt.Errorf("does not have the shape of %.100q", m.MediaType)
	}
	all := len(m.Manifests) + len(m.Blobs)
	if all > maxDescriptors {
		return fmt.Errorf("%d descriptors are over the limit of %d", all, maxDescriptors)
	}
	check := func(d ispec.Descriptor) error {
		if _, err := ParseDigest(d.Digest.String()); err != nil {
			return err
		}
		if d.Size < 0 {
			return fmt.Errorf("descriptor %s has a size of %d", d.Digest, d.Size)
		}
		return nil
	}
	for _, list := range [][]ispec.Descriptor{m.Manifests, m.Blobs} {
		for _, d := range list {
			if err := check(d); err != nil {
				return err
			}
		}
	}
	if m.Subject != nil {
		return check(*m.Subject)
	}
	return nil
}

// mediaTypeOf is the type that a Content-Type names, or "" for one that says nothing of the body.
func mediaTypeOf(contentType string) string {
	mediaType, _, err := mime.ParseMediaType(contentType)
	if err != nil || mediaType == "application/octet-stream" || mediaType == "application/json" {
		return ""
	}
	return mediaType
}

// structural are the names that decide what a manifest is. encoding/json ignores case and keeps the
// last of two, other clients do not: a manifest that uses that is read in two ways.
var structural = []string{"schemaVersion", "mediaType", "manifests", "config", "layers", "blobs", "subject", "digest", "size", "urls"}

// checkJSON walks the tokens once, bounded in depth and in elements, and refuses duplicate and misspelt
// names.
func checkJSON(raw []byte) error {
	type level struct {
		names map[string]bool // nil in an array
		free  bool            // inside annotations, where names are the user's
		key   string          // the member whose value comes next
	}
	var stack []level
	elements := 0
	dec := json.NewDecoder(bytes.NewReader(raw))
	for {
		token, err := dec.Token()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		top := len(stack) - 1
		delim, _ := token.(json.Delim)
		if top >= 0 && stack[top].names == nil && delim != ']' {
			if elements++; elements > maxElements {
				return fmt.Errorf("more than %d elements", maxElements)
			}
		}
		switch {
		case delim == '{' || delim == '[':
			if len(stack) == maxDepth {
				return fmt.Errorf("nested deeper than %d", maxDepth)
			}
			next := level{}
			if top >= 0 {
				next.free = stack[top].free || stack[top].key == "annotations"
				stack[top].key = ""
			}
			if delim == '{' {
				next.names = map[string]bool{}
			}
			stack = append(stack, next)
		case delim != 0:
			stack = stack[:top]
		case top >= 0 && stack[top].names != nil && stack[top].key == "":
			name, _ := token.(string)
			if err := checkName(name, stack[top].names, stack[top].free); err != nil {
				return err
			}
			stack[top].names[name], stack[top].key = true, name
		case top >= 0:
			stack[top].key = ""
		}
	}
}

func checkName(name string, seen map[string]bool, free bool) error {
	if name == "" {
		return errors.New("has a member without a name")
	}
	if seen[name] {
		return fmt.Errorf("member %.64q appears twice", name)
	}
	if free {
		return nil
	}
	for _, s := range structural {
		if name != s && strings.EqualFold(name, s) {
			return fmt.Errorf("member %.64q is not spelt %q", name, s)
		}
	}
	return nil
}
