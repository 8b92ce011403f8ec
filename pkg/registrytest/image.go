package registrytest

import (
	"archive/tar"
	"bytes"
	"encoding/json"
	"io"
	"math/rand/v2"
	"strings"

	"breakwater/pkg/oci"

	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// Image is an image manifest with its blobs, or an index with its images. It is a value: the
// methods that change something return another image.
type Image struct {
	MediaType string
	Raw       []byte          // the manifest, byte by byte
	Blobs     []Blob          // the config, then the layers
	Images    []Image         // of an index
	Platform  *ispec.Platform // nil for an index

	layers   [][]byte
	manifest ispec.Manifest // what Raw is made of
}

// Blob is a blob and its descriptor.
type Blob struct {
	ispec.Descriptor
	Bytes []byte
}

// dockerTypes are what Docker's schema 2 calls OCI's types.
var dockerTypes = map[string]string{
	ispec.MediaTypeImageIndex:    oci.MediaTypeDockerList,
	ispec.MediaTypeImageManifest: oci.MediaTypeDockerManifest,
	ispec.MediaTypeImageConfig:   "application/vnd.docker.container.image.v1+json",
	ispec.MediaTypeImageLayer:    "application/vnd.docker.image.rootfs.diff.tar",
}

// NewImage makes an OCI image for linux/amd64 of uncompressed layers: use [Layer] for layers that
// clients can unpack.
func NewImage(layers ...[]byte) Image {
	image := Image{MediaType: ispec.MediaTypeImageManifest, layers: layers}
	return image.For("linux/amd64")
}

// NewIndex makes an OCI index of images.
func NewIndex(images ...Image) Image {
	index := Image{MediaType: ispec.MediaTypeImageIndex, Images: images}
	return index.build()
}

// Layer is size bytes that depend on seed: a tar archive with one file, if they are enough for one.
func Layer(seed uint64, size int) []byte {
	raw := make([]byte, size)
	_, _ = io.ReadFull(rand.NewChaCha8([32]byte{byte(seed), byte(seed >> 8), byte(seed >> 16), byte(seed >> 24), byte(seed >> 32)}), raw)
	const block = 512 // a header, then the file, then two of zeros: after them, tar's readers read no more
	content := size - 4*block
	if content < 0 {
		return raw
	}
	content -= content % block
	var header bytes.Buffer
	// An error is not possible: the buffer takes all, and the header fits in one block.
	_ = tar.NewWriter(&header).WriteHeader(&tar.Header{Name: "data", Mode: 0o644, Size: int64(content), Format: tar.FormatUSTAR})
	copy(raw, header.Bytes())
	clear(raw[block+content : block+content+2*block])
	return raw
}

// For is the image for another platform, such as linux/arm64.
func (i Image) For(platform string) Image {
	os, arch, _ := strings.Cut(platform, "/")
	i.Platform = &ispec.Platform{OS: os, Architecture: arch}
	return i.build()
}

// Docker is the image or index as Docker's schema 2, with all its images.
func (i Image) Docker() Image {
	i.MediaType = dockerTypes[i.MediaType]
	images := i.Images
	i.Images = nil
	for _, image := range images {
		i.Images = append(i.Images, image.Docker())
	}
	return i.build()
}

// Annotated is the image with an annotation, and so with another digest.
func (i Image) Annotated(key, value string) Image {
	annotations := map[string]string{key: value}
	for k, v := range i.manifest.Annotations {
		if k != key {
			annotations[k] = v
		}
	}
	i.manifest.Annotations = annotations
	return i.build()
}

// Referring is the image as a referrer of subject: a signature, say, or an attestation.
func (i Image) Referring(subject Image, artifactType string) Image {
	desc := subject.Descriptor()
	i.manifest.Subject, i.manifest.ArtifactType = &desc, artifactType
	return i.build()
}

// Digest is that of the manifest.
func (i Image) Digest() digest.Digest { return digest.FromBytes(i.Raw) }

// Descriptor is that of the manifest.
func (i Image) Descriptor() ispec.Descriptor {
	return ispec.Descriptor{MediaType: i.MediaType, Digest: i.Digest(), Size: int64(len(i.Raw)), Platform: i.Platform}
}

func (i Image) build() Image {
	if i.Platform == nil {
		index := ispec.Index{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: i.MediaType, Manifests: []ispec.Descriptor{},
			Annotations: i.manifest.Annotations, Subject: i.manifest.Subject, ArtifactType: i.manifest.ArtifactType}
		for _, image := range i.Images {
			index.Manifests = append(index.Manifests, image.Descriptor())
		}
		i.Raw = marshal(index)
		return i
	}
	config := ispec.Image{Platform: *i.Platform, RootFS: ispec.RootFS{Type: "layers", DiffIDs: []digest.Digest{}}}
	config.Config.Cmd = []string{"/data"}
	for _, layer := range i.layers {
		config.RootFS.DiffIDs = append(config.RootFS.DiffIDs, digest.FromBytes(layer))
	}
	i.Blobs = []Blob{i.blob(ispec.MediaTypeImageConfig, marshal(config))}
	i.manifest.Layers = []ispec.Descriptor{}
	for _, layer := range i.layers {
		blob := i.blob(ispec.MediaTypeImageLayer, layer)
		i.Blobs = append(i.Blobs, blob)
		i.manifest.Layers = append(i.manifest.Layers, blob.Descriptor)
	}
	i.manifest.SchemaVersion, i.manifest.MediaType, i.manifest.Config = 2, i.MediaType, i.Blobs[0].Descriptor
	i.Raw = marshal(i.manifest)
	return i
}

func (i Image) blob(mediaType string, raw []byte) Blob {
	if i.MediaType == oci.MediaTypeDockerManifest {
		mediaType = dockerTypes[mediaType]
	}
	return Blob{ispec.Descriptor{MediaType: mediaType, Digest: digest.FromBytes(raw), Size: int64(len(raw))}, raw}
}

func marshal(v any) []byte {
	raw, err := json.Marshal(v)
	if err != nil {
		panic(err) // none of these types can fail
	}
	return raw
}
