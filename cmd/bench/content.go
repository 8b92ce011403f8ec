package main

import (
	"encoding/binary"
	"encoding/json"
	"fmt"
	"io"
	"math/rand/v2"

	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// repository is what every request asks for. Its name has no dot, so that the same path means the
// same image to all programs.
const repository = "bench/app"

// registryName is breakwater's default registry, whose repository that is.
const registryName = "registry.example"

// patternSize is small enough for a processor's cache: making content must cost the upstream
// nothing that the programs would have to share the machine with.
const patternSize = 1 << 20

// maker makes content that no program has seen before. Of two makers, each makes the bytes that the
// other describes, so that gigabytes need be neither kept nor sent to the upstream's process.
type maker struct {
	pattern []byte
	seed    uint64
}

func newMaker() *maker {
	pattern := make([]byte, patternSize)
	_, _ = rand.NewChaCha8([32]byte{}).Read(pattern) // never fails
	return &maker{pattern: pattern}
}

// Blob describes one blob: eight bytes of its own, then the pattern over and over.
type Blob struct {
	Digest digest.Digest
	Seed   uint64
	Size   int64
}

// blob is a new blob of size bytes.
func (m *maker) blob(size int64) (Blob, error) {
	m.seed++
	b := Blob{Seed: m.seed, Size: size}
	dgst, err := digest.FromReader(m.open(b))
	if err != nil {
		return Blob{}, fmt.Errorf("hash blob %d: %w", b.Seed, err)
	}
	b.Digest = dgst
	return b, nil
}

// open reads the blob's bytes.
func (m *maker) open(b Blob) *io.SectionReader {
	return io.NewSectionReader(bytesOf{m.pattern, b.Seed}, 0, b.Size)
}

type bytesOf struct {
	pattern []byte
	seed    uint64
}

// ReadAt has no end: the section round it has.
func (b bytesOf) ReadAt(p []byte, off int64) (int, error) {
	n := 0
	var own [8]byte
	if off < int64(len(own)) {
		binary.BigEndian.PutUint64(own[:], b.seed)
		n = copy(p, own[off:])
	}
	for n < len(p) {
		n += copy(p[n:], b.pattern[(off+int64(n))%int64(len(b.pattern)):])
	}
	return n, nil
}

// Image describes an image of one platform.
type Image struct {
	Tag      string
	Digest   digest.Digest // of the manifest
	Manifest []byte
	Blobs    []Blob // the configuration, then the layers
}

// image is a new image with layers of these sizes.
func (m *maker) image(layers ...int64) (Image, error) {
	var img Image
	for _, size := range append([]int64{2 << 10}, layers...) {
		b, err := m.blob(size)
		if err != nil {
			return Image{}, err
		}
		img.Blobs = append(img.Blobs, b)
	}
	manifest := ispec.Manifest{
		Versioned: specs.Versioned{SchemaVersion: 2},
		MediaType: ispec.MediaTypeImageManifest,
		Config:    ispec.Descriptor{MediaType: ispec.MediaTypeImageConfig, Digest: img.Blobs[0].Digest, Size: img.Blobs[0].Size},
	}
	for _, b := range img.Blobs[1:] {
		manifest.Layers = append(manifest.Layers, ispec.Descriptor{MediaType: ispec.MediaTypeImageLayerGzip, Digest: b.Digest, Size: b.Size})
	}
	raw, err := json.Marshal(manifest)
	if err != nil {
		return Image{}, fmt.Errorf("encode manifest: %w", err)
	}
	img.Tag, img.Digest, img.Manifest = fmt.Sprintf("v%d", m.seed), digest.FromBytes(raw), raw
	return img, nil
}
