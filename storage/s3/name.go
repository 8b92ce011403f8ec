package s3

import (
	"crypto/sha256"
	"encoding/hex"
	"path"
	"strings"

	"breakwater/pkg/oci"

	"github.com/opencontainers/go-digest"
)

// The layout of the bucket, below the prefix. It is that of the data folder (DESIGN.md, section 7),
// but private content has one kind of record:
//
//	blobs/<algorithm>/<hex>
//	records/_public/<hex>
//	records/<registry>/<repository>/_blobs/<hex>
//	records/<registry>/<repository>/_tags/<tag>
//	records/<registry>/<repository>/_referrers/<hex>
//	leases/<sha256 of the lease's name>
//	VERSION
const (
	blobsFolder     = "blobs/"
	recordsFolder   = "records/"
	leasesFolder    = "leases/"
	publicFolder    = "_public"
	privateFolder   = "_blobs"
	tagsFolder      = "_tags"
	referrersFolder = "_referrers"
	versionName     = "VERSION"
)

func blobName(dgst digest.Digest) string {
	return blobsFolder + dgst.Algorithm().String() + "/" + dgst.Encoded()
}

func publicName(dgst digest.Digest) string {
	return recordsFolder + publicFolder + "/" + dgst.Encoded()
}

func privateName(repo oci.Repository, dgst digest.Digest) string {
	return recordsFolder + path.Join(repo.Registry, repo.Name, privateFolder, dgst.Encoded())
}

func tagName(ref oci.Reference) string {
	return recordsFolder + path.Join(ref.Registry, ref.Name, tagsFolder, ref.Tag)
}

func referringName(repo oci.Repository, subject digest.Digest) string {
	return recordsFolder + path.Join(repo.Registry, repo.Name, referrersFolder, subject.Encoded())
}

func leaseName(name string) string {
	sum := sha256.Sum256([]byte(name))
	return leasesFolder + hex.EncodeToString(sum[:])
}

// object is what an object is by its name.
type object struct {
	kind kind
	dgst digest.Digest // of blobs, of records of content, and of who is referred to, by a record or by a tag
}

type kind int

const (
	unknownObject kind = iota
	blobObject
	contentRecord
	tagRecord
	referringRecord
	leaseObject
	versionObject
)

// parseName tells what this package has stored under a name, relative to the prefix.
func parseName(name string) object {
	if name == versionName {
		return object{kind: versionObject}
	}
	folder, last := path.Split(name)
	switch {
	case folder == leasesFolder && digestOf(last) != "":
		return object{kind: leaseObject}
	case strings.HasPrefix(folder, blobsFolder):
		algorithm := strings.TrimSuffix(strings.TrimPrefix(folder, blobsFolder), "/")
		if dgst, err := oci.ParseDigest(algorithm + ":" + last); err == nil {
			return object{blobObject, dgst}
		}
	case strings.HasPrefix(folder, recordsFolder):
		repo, what := path.Split(strings.TrimSuffix(strings.TrimPrefix(folder, recordsFolder), "/"))
		if repo == "" && what == publicFolder && digestOf(last) != "" {
			return object{contentRecord, digestOf(last)}
		}
		registry, repository, _ := strings.Cut(strings.TrimSuffix(repo, "/"), "/")
		if _, err := oci.ParseRepository(registry, repository); err != nil {
			return object{}
		}
		if what == privateFolder && digestOf(last) != "" {
			return object{contentRecord, digestOf(last)}
		}
		if what == referrersFolder && digestOf(last) != "" {
			return object{referringRecord, digestOf(last)}
		}
		if what == tagsFolder && oci.ValidTag(last) {
			subject, _ := oci.SubjectOf(last)
			return object{tagRecord, subject}
		}
	}
	return object{}
}

// digestOf finds the algorithm by the length of what it has made; "" if there is none.
func digestOf(encoded string) digest.Digest {
	for _, algorithm := range []string{"sha256:", "sha512:"} {
		if dgst, err := oci.ParseDigest(algorithm + encoded); err == nil {
			return dgst
		}
	}
	return ""
}
