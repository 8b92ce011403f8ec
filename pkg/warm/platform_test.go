package warm

import (
	"testing"

	ispec "github.com/opencontainers/image-spec/specs-go/v1"
)

func TestIsFor(t *testing.T) {
	v8 := &ispec.Platform{OS: "linux", Architecture: "arm64", Variant: "v8"}
	for _, row := range []struct {
		of       *ispec.Platform
		platform string
		want     bool
	}{
		{v8, "linux/arm64", true},
		{v8, "linux/arm64/v8", true},
		{v8, "linux/arm64/v9", false},
		{v8, "linux/amd64", false},
		{v8, "windows/arm64", false},
		{&ispec.Platform{OS: "linux", Architecture: "arm64"}, "linux/arm64/v8", false},
		{nil, "linux/arm64", false},
	} {
		if got := isFor(ispec.Descriptor{Platform: row.of}, row.platform); got != row.want {
			t.Errorf("%+v for %s: %v", row.of, row.platform, got)
		}
	}
}

func TestForeign(t *testing.T) {
	for mediaType, want := range map[string]bool{
		ispec.MediaTypeImageLayerGzip:                                  false,
		"application/vnd.oci.image.layer.nondistributable.v1.tar+gzip": true,
		"application/vnd.docker.image.rootfs.foreign.diff.tar.gzip":    true,
		"application/vnd.docker.image.rootfs.diff.tar.gzip":            false,
	} {
		if got := foreign(ispec.Descriptor{MediaType: mediaType}); got != want {
			t.Errorf("%s: %v", mediaType, got)
		}
	}
}
