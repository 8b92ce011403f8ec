package main

import (
	"archive/tar"
	"bytes"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"time"

	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/crypto/x509roots/fallback/bundle"
)

// uid is the user, and the group, that the mirror runs as in a container: the one that distroless images
// have made the custom.
const uid = 65532

// dataFolder is the store's place in a container.
const dataFolder = "/var/lib/breakwater"

// spdxMediaType is that of an SBOM.
const spdxMediaType = "application/spdx+json"

// image writes an image for all architectures, in an OCI layout, where it has the version for a name. The
// SBOM of each architecture's image refers to it.
func (r *release) image() error {
	modules, err := r.licences()
	if err != nil {
		return err
	}
	dir := filepath.Join(r.dist, "image")
	if err := os.RemoveAll(dir); err != nil {
		return err
	}
	l := layout{filepath.Join(dir, "blobs", "sha256")}
	if err := os.MkdirAll(l.blobs, 0o755); err != nil {
		return err
	}
	var images, top []v1.Descriptor
	for _, arch := range architectures {
		image, err := r.imageFor(l, arch)
		if err != nil {
			return err
		}
		sbom, err := r.sbom(arch, modules)
		if err != nil {
			return err
		}
		attached, err := l.attach(sbom, image)
		if err != nil {
			return err
		}
		images, top = append(images, image), append(top, attached)
	}
	index, err := l.putJSON(v1.MediaTypeImageIndex, v1.Index{
		Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: v1.MediaTypeImageIndex, Manifests: images, Annotations: r.labels(),
	})
	if err != nil {
		return err
	}
	index.Annotations = map[string]string{v1.AnnotationRefName: r.version}
	return writeJSONs(dir, map[string]any{
		v1.ImageLayoutFile: v1.ImageLayout{Version: v1.ImageLayoutVersion},
		v1.ImageIndexFile: v1.Index{
			Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: v1.MediaTypeImageIndex, Manifests: append([]v1.Descriptor{index}, top...),
		},
	})
}

// labels are those of image and index. There is no source: a mirror of this repository is as good as another.
func (r *release) labels() map[string]string {
	labels := map[string]string{
		v1.AnnotationTitle:       "breakwater",
		v1.AnnotationDescription: "A pull-through registry mirror that outlives its registries",
		v1.AnnotationVersion:     r.version,
		v1.AnnotationCreated:     r.time.Format(time.RFC3339),
		v1.AnnotationLicenses:    "Apache-2.0",
	}
	if r.commit != "" {
		labels[v1.AnnotationRevision] = r.commit
	}
	return labels
}

func (r *release) imageFor(l layout, arch string) (v1.Descriptor, error) {
	program, err := r.binary(arch)
	if err != nil {
		return v1.Descriptor{}, err
	}
	layer, diffID, err := r.layer(program)
	if err != nil {
		return v1.Descriptor{}, err
	}
	layerDesc, err := l.put(v1.MediaTypeImageLayerGzip, layer)
	if err != nil {
		return v1.Descriptor{}, err
	}
	config, err := l.putJSON(v1.MediaTypeImageConfig, v1.Image{
		Created:  &r.time,
		Platform: v1.Platform{OS: "linux", Architecture: arch},
		Config: v1.ImageConfig{
			User:       fmt.Sprintf("%d:%[1]d", uid),
			Env:        []string{"PATH=/usr/bin", "STATE_DIRECTORY=" + dataFolder},
			Entrypoint: []string{"/usr/bin/breakwater"},
			Cmd:        []string{"serve"},
			Volumes:    map[string]struct{}{dataFolder: {}},
			WorkingDir: "/",
			Labels:     r.labels(),
		},
		RootFS:  v1.RootFS{Type: "layers", DiffIDs: []digest.Digest{diffID}},
		History: []v1.History{{Created: &r.time, CreatedBy: "go run ./cmd/pack image"}},
	})
	if err != nil {
		return v1.Descriptor{}, err
	}
	image, err := l.putJSON(v1.MediaTypeImageManifest, v1.Manifest{
		Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: v1.MediaTypeImageManifest,
		Config: config, Layers: []v1.Descriptor{layerDesc}, Annotations: r.labels(),
	})
	image.Platform = &v1.Platform{OS: "linux", Architecture: arch}
	return image, err
}

// layer is the only one, compressed, and the digest of what is in it.
func (r *release) layer(program string) (layer []byte, diffID digest.Digest, err error) {
	copyright, err := os.ReadFile(filepath.Join(r.dist, "copyright"))
	if err != nil {
		return nil, "", err
	}
	binary, err := os.ReadFile(program)
	if err != nil {
		return nil, "", err
	}
	var plain bytes.Buffer
	w := tar.NewWriter(&plain)
	for _, f := range []struct {
		name    string // a folder's ends in /
		mode    fs.FileMode
		owner   int
		content []byte
	}{
		{"etc/", 0o755, 0, nil},
		{"etc/group", 0o644, 0, fmt.Appendf(nil, "root:x:0:\nbreakwater:x:%d:\n", uid)},
		{"etc/passwd", 0o644, 0, fmt.Appendf(nil, "root:x:0:0:root:/:/sbin/nologin\nbreakwater:x:%d:%[1]d:Breakwater:%s:/sbin/nologin\n", uid, dataFolder)},
		{"etc/ssl/", 0o755, 0, nil},
		{"etc/ssl/certs/", 0o755, 0, nil},
		{"etc/ssl/certs/ca-certificates.crt", 0o644, 0, certificates()},
		{"usr/", 0o755, 0, nil},
		{"usr/bin/", 0o755, 0, nil},
		{"usr/bin/breakwater", 0o755, 0, binary},
		{"usr/share/", 0o755, 0, nil},
		{"usr/share/doc/", 0o755, 0, nil},
		{"usr/share/doc/breakwater/", 0o755, 0, nil},
		{"usr/share/doc/breakwater/copyright", 0o644, 0, copyright},
		{"var/", 0o755, 0, nil},
		{"var/lib/", 0o755, 0, nil},
		{dataFolder[1:] + "/", 0o700, uid, nil}, // a new volume gets its owner from here
	} {
		header := &tar.Header{Name: f.name, Mode: int64(f.mode), Uid: f.owner, Gid: f.owner, Size: int64(len(f.content)), ModTime: r.time, Format: tar.FormatPAX}
		if f.content == nil {
			header.Typeflag = tar.TypeDir
		}
		if err := w.WriteHeader(header); err != nil {
			return nil, "", err
		}
		if _, err := w.Write(f.content); err != nil {
			return nil, "", err
		}
	}
	if err := w.Close(); err != nil {
		return nil, "", err
	}
	compressed, err := compress(plain.Bytes())
	return compressed, digest.FromBytes(plain.Bytes()), err
}

// certificates are the authorities that Mozilla trusts, as the module golang.org/x/crypto/x509roots has
// them: of a version that go.sum knows, not whatever this machine has. Those that are trusted with
// reservations, which a file cannot say, are left out.
func certificates() []byte {
	var out bytes.Buffer
	for root := range bundle.Roots() {
		if root.Constraint == nil {
			_ = pem.Encode(&out, &pem.Block{Type: "CERTIFICATE", Bytes: root.Certificate}) // a buffer takes all
		}
	}
	return out.Bytes()
}

// layout is an OCI image layout.
type layout struct{ blobs string }

func (l layout) put(mediaType string, content []byte) (v1.Descriptor, error) {
	d := v1.Descriptor{MediaType: mediaType, Digest: digest.FromBytes(content), Size: int64(len(content))}
	return d, os.WriteFile(filepath.Join(l.blobs, d.Digest.Encoded()), content, 0o644)
}

func (l layout) putJSON(mediaType string, v any) (v1.Descriptor, error) {
	content, err := json.Marshal(v)
	if err != nil {
		return v1.Descriptor{}, err
	}
	return l.put(mediaType, content)
}

// attach adds a file that refers to an image (image-spec, Guidelines for Artifact Usage).
func (l layout) attach(file string, subject v1.Descriptor) (v1.Descriptor, error) {
	content, err := os.ReadFile(file)
	if err != nil {
		return v1.Descriptor{}, err
	}
	layer, err := l.put(spdxMediaType, content)
	if err != nil {
		return v1.Descriptor{}, err
	}
	layer.Annotations = map[string]string{v1.AnnotationTitle: path.Base(file)}
	if _, err := l.put(v1.MediaTypeEmptyJSON, v1.DescriptorEmptyJSON.Data); err != nil {
		return v1.Descriptor{}, err
	}
	subject.Platform = nil
	manifest, err := l.putJSON(v1.MediaTypeImageManifest, v1.Manifest{
		Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: v1.MediaTypeImageManifest, ArtifactType: spdxMediaType,
		Config: v1.DescriptorEmptyJSON, Layers: []v1.Descriptor{layer}, Subject: &subject,
	})
	manifest.ArtifactType = spdxMediaType
	return manifest, err
}

func writeJSONs(dir string, files map[string]any) error {
	for name, v := range files {
		content, err := json.Marshal(v)
		if err != nil {
			return err
		}
		if err := os.WriteFile(filepath.Join(dir, name), content, 0o644); err != nil {
			return err
		}
	}
	return nil
}
