package s3

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net/http"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"breakwater/pkg/buckettest"
	"breakwater/pkg/oci"
	"breakwater/pkg/registrytest"

	"github.com/google/go-cmp/cmp"
	"github.com/opencontainers/go-digest"
)

// publish stores an image with its records, as the proxy does: blobs, manifests, then the tag's record.
func publish(ctx context.Context, b *Bucket, ref oci.Reference, image registrytest.Image) error {
	put := func(dgst digest.Digest, mediaType string, raw []byte) error {
		if err := b.PutBlob(ctx, dgst, int64(len(raw)), bytes.NewReader(raw)); err != nil {
			return err
		}
		return b.PutContent(ctx, ref.Repository, dgst, Content{Size: int64(len(raw)), MediaType: mediaType, Public: true}, nil)
	}
	var all func(registrytest.Image) error
	all = func(image registrytest.Image) error {
		for _, blob := range image.Blobs {
			if err := put(blob.Digest, "", blob.Bytes); err != nil {
				return err
			}
		}
		for _, child := range image.Images {
			if err := all(child); err != nil {
				return err
			}
		}
		return put(image.Digest(), image.MediaType, image.Raw)
	}
	if err := all(image); err != nil || ref.Tag == "" {
		return err
	}
	_, err := b.PutTag(ctx, ref, Tag{Digest: image.Digest(), ValidatedAt: time.Now()})
	return err
}

// names are the image's objects, without the tag's record.
func names(image registrytest.Image) []string {
	own := func(dgst digest.Digest) []string { return []string{prefix + blobName(dgst), prefix + publicName(dgst)} }
	all := own(image.Digest())
	for _, blob := range image.Blobs {
		all = append(all, own(blob.Digest)...)
	}
	for _, child := range image.Images {
		all = append(all, names(child)...)
	}
	return all
}

func sorted(lists ...[]string) []string {
	all := slices.Concat(lists...)
	slices.Sort(all)
	return slices.Compact(all)
}

func tagged(tag string) oci.Reference { return oci.Reference{Repository: app, Tag: tag} }

func TestCollect(t *testing.T) {
	server := buckettest.Start(t)
	b := open(t, server)
	layer := registrytest.Layer(100, 4000) // of several images
	kept := registrytest.NewImage(layer, registrytest.Layer(1, 5000))
	index := registrytest.NewIndex(registrytest.NewImage(layer, registrytest.Layer(2, 5000)), registrytest.NewImage(registrytest.Layer(3, 5000)).For("linux/arm64"))
	untagged := registrytest.NewImage(layer, registrytest.Layer(4, 5000))
	young := registrytest.NewImage(registrytest.Layer(5, 5000))      // its manifest's record is, and nothing else of it
	unsigned := registrytest.NewImage(registrytest.Layer(6, 5000))   // by its tag's record
	unfinished := registrytest.NewImage(registrytest.Layer(7, 5000)) // one manifest of the index is not in the bucket
	partial := registrytest.NewIndex(unfinished, registrytest.NewImage(registrytest.Layer(8, 5000)))
	for tag, image := range map[string]registrytest.Image{"v1": kept, "v2": index, "": untagged, "v3": unsigned} {
		if err := publish(t.Context(), b, tagged(tag), image); err != nil {
			t.Fatal(err)
		}
	}
	if err := publish(t.Context(), b, tagged(""), young); err != nil {
		t.Fatal(err)
	}
	partial.Images = partial.Images[:1]
	if err := publish(t.Context(), b, tagged("v4"), partial); err != nil {
		t.Fatal(err)
	}
	private := prefix + privateName(app, untagged.Digest())
	if err := b.PutContent(t.Context(), app, untagged.Digest(), Content{Size: 1, MediaType: untagged.MediaType, Credential: "u"}, nil); err != nil {
		t.Fatal(err)
	}
	server.Put(prefix+tagName(tagged("v3")), bytes.Replace(server.Get(prefix+tagName(tagged("v3"))), []byte("breakwater-record 1 "), []byte("breakwater-record 1 f"), 1))
	strangers := []string{prefix + "README", prefix + "blobs/sha256/short", prefix + "records/quay.io/org/app/_other/" + someDigest.Encoded(), "elsewhere"}
	for _, name := range strangers {
		server.Put(name, []byte("not ours"))
	}
	server.Put(prefix+versionName, []byte("1\n"))
	server.Put(prefix+leaseName("left"), []byte("x"))
	for _, name := range server.Names("") {
		server.Age(name, 3*minGrace)
	}
	server.Age(prefix+publicName(young.Digest()), time.Minute)
	fresh := []string{prefix + blobName(someDigest)} // of a publication that goes on
	server.Put(fresh[0], []byte("some"))

	before := server.Names("")
	removable := sorted([]string{prefix + leaseName("left"), private}, names(untagged))
	removable = slices.DeleteFunc(removable, func(name string) bool { return slices.Contains(names(kept), name) })
	for _, opts := range []CollectOptions{{Grace: 2 * minGrace}, {Grace: 2 * minGrace, Delete: Delete}} {
		calls := 0
		opts.Progress = func(Collected) { calls++ }
		got, err := b.Collect(t.Context(), opts)
		if err != nil || got.Removed != len(removable) || got.Unknown != 2 || got.Unsigned != 1 || got.RemovedBytes < 5000 || calls == 0 {
			t.Errorf("%+v, %v, %d to be removed, %d calls", got, err, len(removable), calls)
		}
		want := before
		if opts.Delete == Delete {
			want = slices.DeleteFunc(slices.Clone(before), func(name string) bool { return slices.Contains(removable, name) })
		}
		if diff := cmp.Diff(want, server.Names("")); diff != "" {
			t.Errorf("delete %v: %s", opts.Delete, diff)
		}
	}
	for _, name := range sorted(names(kept), names(index), names(young), names(unsigned), names(partial), strangers, fresh) {
		if !slices.Contains(server.Names(""), name) {
			t.Errorf("%s is gone", name)
		}
	}
	if got, err := b.Collect(t.Context(), CollectOptions{Grace: 2 * minGrace, Delete: Delete}); err != nil || got.Removed != 0 {
		t.Errorf("again: %+v, %v", got, err)
	}
}

func TestCollectRefuses(t *testing.T) {
	server := buckettest.Start(t)
	b := open(t, server)
	if _, err := b.Collect(t.Context(), CollectOptions{Grace: minGrace - 1}); err == nil {
		t.Error("a grace below a day")
	}
	image := registrytest.NewImage(registrytest.Layer(1, 1000))
	if err := publish(t.Context(), b, tagged(""), image); err != nil {
		t.Fatal(err)
	}
	kept := registrytest.NewImage(registrytest.Layer(2, 1000))
	if err := publish(t.Context(), b, tagged("v1"), kept); err != nil {
		t.Fatal(err)
	}
	for _, name := range server.Names("") {
		server.Age(name, 3*minGrace)
	}
	before := server.Names("")
	opts := CollectOptions{Grace: minGrace, Delete: Delete}
	lists := registrytest.Match{Func: func(r *http.Request) bool {
		return r.Method == http.MethodGet && strings.HasPrefix(r.URL.Query().Get("prefix"), prefix+blobsFolder)
	}}
	for name, match := range map[string]registrytest.Match{
		"record":   buckettest.Tags,
		"manifest": {Method: http.MethodGet, Path: blobName(kept.Digest())},
		"list":     lists,
	} {
		heal := server.Fault(match, buckettest.SlowDown())
		if got, err := open(t, server).Collect(t.Context(), opts); err == nil || got.Removed != 0 {
			t.Errorf("%s cannot be read: %+v, %v", name, got, err)
		}
		heal()
	}
	if diff := cmp.Diff(before, server.Names("")); diff != "" {
		t.Error(diff)
	}
	reader := open(t, server, func(c *Config) { c.ReadOnly = true })
	if _, err := reader.Collect(t.Context(), opts); !errors.Is(err, ErrReadOnly) {
		t.Error(err)
	}
	if got, err := reader.Collect(t.Context(), CollectOptions{Grace: minGrace}); err != nil || got.Removed != 6 {
		t.Errorf("a dry run: %+v, %v", got, err)
	}
	lease, err := b.Lease(t.Context(), collectLease)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := open(t, server).Collect(t.Context(), opts); !errors.Is(err, ErrHeld) {
		t.Errorf("two at once: %v", err)
	}
	lease.Release(t.Context())
}

func TestCollectAbortsUploads(t *testing.T) {
	server := buckettest.Start(t)
	b := open(t, server)
	r := &upload{b: b, name: blobName(someDigest), dgst: someDigest}
	if err := r.create(t.Context()); err != nil {
		t.Fatal(err)
	}
	opts := CollectOptions{Grace: minGrace, Delete: Delete}
	if got, err := b.Collect(t.Context(), opts); err != nil || got.Uploads != 0 || server.Uploads() != 1 {
		t.Errorf("%+v, %v: a young one", got, err)
	}
	server.AgeUploads(max(uploadGrace, minGrace) + time.Minute)
	if got, err := b.Collect(t.Context(), CollectOptions{Grace: minGrace}); err != nil || got.Uploads != 1 || server.Uploads() != 1 {
		t.Errorf("%+v, %v: a dry run", got, err)
	}
	if got, err := b.Collect(t.Context(), opts); err != nil || got.Uploads != 1 || server.Uploads() != 0 {
		t.Errorf("%+v, %v", got, err)
	}
}

// Collect has looked at an old blob, somebody renews it since he is about to publish what needs it, and
// only then it is deleted: the one who renews it notices.
func TestCollectAgainstARenewal(t *testing.T) {
	server := buckettest.Start(t)
	collector, b := open(t, server), open(t, server)
	raw := noise(1000, 1)
	dgst := digest.FromBytes(raw)
	server.Put(prefix+blobName(dgst), raw)
	server.Age(prefix+blobName(dgst), 3*minGrace)
	deleting := registrytest.Match{Method: http.MethodDelete, Path: blobsFolder}
	go2 := make(chan struct{})
	server.Fault(deleting, func(w http.ResponseWriter, r *http.Request, next http.Handler) {
		<-go2
		next.ServeHTTP(w, r)
	})
	collected := make(chan error, 1)
	go func() {
		_, err := collector.Collect(context.Background(), CollectOptions{Grace: minGrace, Delete: Delete})
		collected <- err
	}()
	within(t, func() bool { return server.Count(deleting) == 1 })
	put := make(chan error, 1)
	go func() { put <- b.PutBlob(context.Background(), dgst, int64(len(raw)), bytes.NewReader(raw)) }()
	within(t, func() bool { // it is renewed
		return server.Count(registrytest.Match{Method: http.MethodPut, Path: blobsFolder, Func: func(r *http.Request) bool { return r.Header.Get("X-Amz-Copy-Source") == "" }}) == 1
	})
	within(t, func() bool {
		return server.Count(registrytest.Match{Method: http.MethodHead, Path: leaseName(collectLease)}) > 0
	})
	close(go2)
	if err := <-collected; err != nil {
		t.Fatal(err)
	}
	if err := <-put; err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(server.Get(prefix+blobName(dgst)), raw) {
		t.Error("it is gone")
	}
}

// The same, but it is renewed between the listing and the last look.
func TestCollectLooksOnceMore(t *testing.T) {
	server := buckettest.Start(t)
	b := open(t, server)
	raw := noise(1000, 1)
	name := prefix + blobName(digest.FromBytes(raw))
	server.Put(name, raw)
	server.Age(name, 3*minGrace)
	server.Fault(registrytest.Match{Method: http.MethodHead, Path: name}, func(w http.ResponseWriter, r *http.Request, next http.Handler) {
		server.Age(name, 0)
		next.ServeHTTP(w, r)
	})
	got, err := b.Collect(t.Context(), CollectOptions{Grace: minGrace, Delete: Delete})
	if err != nil || got.Removed != 0 || server.Count(registrytest.Match{Method: http.MethodDelete, Path: name}) != 0 {
		t.Errorf("%+v, %v", got, err)
	}
}

// While hosts publish images whose blobs are there, old, and needed by nobody, Collect removes what it
// can. Whatever has a tag in the end is whole.
func TestCollectAgainstPublishers(t *testing.T) {
	server := buckettest.Start(t)
	var images []registrytest.Image
	seed := open(t, server)
	for i := range 12 {
		images = append(images, registrytest.NewImage(registrytest.Layer(uint64(i/2), 3000), registrytest.Layer(uint64(100+i), 3000)))
		if err := publish(t.Context(), seed, tagged(""), images[i]); err != nil {
			t.Fatal(err)
		}
	}
	for _, name := range server.Names("") {
		server.Age(name, 3*minGrace)
	}
	server.Fault(registrytest.Match{Method: http.MethodDelete}, registrytest.Delay(50*time.Millisecond))
	var wg sync.WaitGroup
	published := make(chan int, len(images))
	for host := range 4 {
		b := open(t, server)
		wg.Go(func() {
			for i := host; i < len(images)-3; i += 4 { // three are left to be collected
				if err := publish(context.Background(), b, tagged(fmt.Sprint("v", i)), images[i]); err != nil {
					t.Error(err)
					continue
				}
				published <- i
			}
		})
	}
	collector := open(t, server)
	var removed int
	done := make(chan struct{})
	go func() {
		wg.Wait()
		close(published)
		close(done)
	}()
	for running := true; running; {
		select {
		case <-done:
			running = false // and once more
		default:
		}
		got, err := collector.Collect(t.Context(), CollectOptions{Grace: minGrace, Delete: Delete})
		if err != nil {
			t.Error(err)
		}
		removed += got.Removed
	}
	if removed < 3*3*2 { // manifest, config and layer of their own, with a record each
		t.Errorf("only %d objects were removed", removed)
	}
	n := 0
	for i := range published {
		n++
		reader := open(t, server)
		tag, err := reader.Tag(t.Context(), tagged(fmt.Sprint("v", i)))
		if err != nil || tag.Digest != images[i].Digest() {
			t.Errorf("v%d: %+v, %v", i, tag, err)
		}
		for _, dgst := range []digest.Digest{images[i].Digest(), images[i].Blobs[0].Digest, images[i].Blobs[1].Digest, images[i].Blobs[2].Digest} {
			if _, err := reader.Content(t.Context(), app, dgst, PublicFirst); err != nil {
				t.Errorf("v%d: record of %s: %v", i, dgst, err)
			}
			if raw, err := readBlob(t.Context(), reader, dgst, 0); err != nil || digest.FromBytes(raw) != dgst {
				t.Errorf("v%d: %s: %v", i, dgst, err)
			}
		}
	}
	if n != len(images)-3 {
		t.Errorf("%d images were published", n)
	}
	for _, image := range images[len(images)-3:] {
		if _, err := seed.Blob(t.Context(), image.Digest(), 0); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("nobody needs %s: %v", image.Digest(), err)
		}
	}
}

// TestCollectReferring: what refers to an image that is needed stays, with what refers to that, and goes with it.
func TestCollectReferring(t *testing.T) {
	server := buckettest.Start(t)
	b := open(t, server)
	image := registrytest.NewImage(registrytest.Layer(1, 5000))
	signature := registrytest.NewImage(registrytest.Layer(2, 500)).Referring(image, "application/signature")
	timestamp := registrytest.NewImage(registrytest.Layer(3, 500)).Referring(signature, "application/timestamp")
	for tag, image := range map[string]registrytest.Image{"v1": image, "a": signature, "b": timestamp} {
		ref := tagged(tag)
		if tag != "v1" {
			ref.Tag = ""
		}
		if err := publish(t.Context(), b, ref, image); err != nil {
			t.Fatal(err)
		}
	}
	var records []string
	for subject, by := range map[digest.Digest]registrytest.Image{image.Digest(): signature, signature.Digest(): timestamp} {
		index := registrytest.NewIndex(by)
		if err := b.PutReferring(t.Context(), app, subject, Referring{Index: index.Raw, ValidatedAt: time.Now()}); err != nil {
			t.Fatal(err)
		}
		records = append(records, prefix+referringName(app, subject))
	}
	server.Put(prefix+versionName, []byte("1\n"))
	collect := func() []string {
		t.Helper()
		for _, name := range server.Names("") {
			server.Age(name, 3*minGrace)
		}
		if _, err := b.Collect(t.Context(), CollectOptions{Grace: 2 * minGrace, Delete: Delete}); err != nil {
			t.Fatal(err)
		}
		return server.Names("")
	}
	tag := prefix + tagName(tagged("v1"))
	want := sorted(names(image), names(signature), names(timestamp), records, []string{tag, prefix + versionName})
	if diff := cmp.Diff(want, collect()); diff != "" {
		t.Errorf("needed: %s", diff)
	}
	other := open(t, server, func(c *Config) { c.Keys = [][]byte{secondKey} }) // whose word is not taken for less
	if _, err := other.Collect(t.Context(), CollectOptions{Grace: 2 * minGrace, Delete: Delete}); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(want, server.Names("")); diff != "" {
		t.Errorf("by a host with another key: %s", diff)
	}
	server.Remove(tag)
	if diff := cmp.Diff([]string{prefix + versionName}, collect()); diff != "" {
		t.Errorf("not needed any more: %s", diff)
	}
}

// TestCollectSignatures: what a tag names by which signatures are found stays as long as their subject, and goes with
// it, its own record too. One that names its subject is a tag as any other.
func TestCollectSignatures(t *testing.T) {
	server := buckettest.Start(t)
	b := open(t, server)
	at := func(subject registrytest.Image, suffix string) oci.Reference {
		return tagged("sha256-" + subject.Digest().Encoded() + suffix)
	}
	image, pinned := registrytest.NewImage(registrytest.Layer(1, 500)), registrytest.NewImage(registrytest.Layer(2, 500))
	signature := registrytest.NewImage(registrytest.Layer(3, 500))
	statement := registrytest.NewImage(registrytest.Layer(4, 500)) // of the signature
	young := registrytest.NewImage(registrytest.Layer(5, 500))     // its subject is not in the bucket
	elsewhere := registrytest.NewImage(registrytest.Layer(6, 500))
	for ref, image := range map[oci.Reference]registrytest.Image{
		tagged("v1"): image, at(pinned, ""): pinned, at(image, ".sig"): signature, at(signature, ".att"): statement, at(elsewhere, ".sig"): young,
	} {
		if err := publish(t.Context(), b, ref, image); err != nil {
			t.Fatal(err)
		}
	}
	server.Put(prefix+versionName, []byte("1\n"))
	collect := func() []string {
		t.Helper()
		for _, name := range server.Names("") {
			server.Age(name, 3*minGrace)
		}
		server.Age(prefix+tagName(at(elsewhere, ".sig")), time.Minute)
		if got, err := b.Collect(t.Context(), CollectOptions{Grace: minGrace, Delete: Delete}); err != nil {
			t.Fatal(got, err)
		}
		return server.Names("")
	}
	record := func(ref oci.Reference) string { return prefix + tagName(ref) }
	stay := sorted(names(pinned), names(young), []string{prefix + versionName, record(at(pinned, "")), record(at(elsewhere, ".sig"))})
	want := sorted(stay, names(image), names(signature), names(statement), []string{record(tagged("v1")), record(at(image, ".sig")), record(at(signature, ".att"))})
	if diff := cmp.Diff(want, collect()); diff != "" {
		t.Errorf("needed: %s", diff)
	}
	server.Remove(record(tagged("v1")))
	if diff := cmp.Diff(stay, collect()); diff != "" {
		t.Errorf("not needed any more: %s", diff)
	}
}

// TestCollectWrongBit: one wrong bit of what says what is needed deletes nothing: on its way it is asked for once
// more, and in the bucket it ends the run, naming the object.
func TestCollectWrongBit(t *testing.T) {
	image := registrytest.NewImage(registrytest.Layer(2, 1000))
	sbom := registrytest.NewImage(registrytest.Layer(3, 1000)).Referring(image, "application/sbom")
	timestamp := registrytest.NewImage(registrytest.Layer(4, 1000)).Referring(sbom, "application/timestamp")
	young := registrytest.NewImage(registrytest.Layer(5, 1000))
	foreign := registrytest.NewImage(registrytest.Layer(6, 1000))
	for what, name := range map[string]string{
		"a manifest":              blobName(image.Digest()),
		"a tag's record":          tagName(tagged("v1")),
		"a record of referrers":   referringName(app, image.Digest()),
		"a young manifest's one":  publicName(young.Digest()),
		"another key's tag":       tagName(tagged("v2")),
		"another key's referrers": referringName(app, sbom.Digest()),
	} {
		server := buckettest.Start(t)
		b := open(t, server)
		other := open(t, server, func(c *Config) { c.Keys = [][]byte{secondKey} })
		for i, image := range []registrytest.Image{image, sbom, timestamp, young, foreign} {
			if err := publish(t.Context(), b, tagged([]string{"v1", "", "", "", ""}[i]), image); err != nil {
				t.Fatal(err)
			}
		}
		if _, err := other.PutTag(t.Context(), tagged("v2"), Tag{Digest: foreign.Digest(), ValidatedAt: time.Now()}); err != nil {
			t.Fatal(err)
		}
		if err := b.PutReferring(t.Context(), app, image.Digest(), Referring{Index: registrytest.NewIndex(sbom).Raw, ValidatedAt: time.Now()}); err != nil {
			t.Fatal(err)
		}
		if err := other.PutReferring(t.Context(), app, sbom.Digest(), Referring{Index: registrytest.NewIndex(timestamp).Raw, ValidatedAt: time.Now()}); err != nil {
			t.Fatal(err)
		}
		for _, name := range server.Names("") {
			server.Age(name, 3*minGrace)
		}
		server.Age(prefix+publicName(young.Digest()), time.Minute)
		before := server.Names("")
		raw := server.Get(prefix + name)
		for _, at := range []int{0, 25, 40, 120, len(raw) - 40} {
			once := true
			heal := server.Fault(registrytest.Match{Method: http.MethodGet, Path: name}, func(w http.ResponseWriter, r *http.Request, next http.Handler) {
				if !once {
					next.ServeHTTP(w, r)
					return
				}
				once = false
				registrytest.FlipBit(int64(at))(w, r, next)
			})
			_, err := open(t, server).Collect(t.Context(), CollectOptions{Grace: minGrace, Delete: Delete})
			heal()
			if diff := cmp.Diff(before, server.Names("")); err != nil || once || diff != "" {
				t.Errorf("%s, bit %d, on its way: %v, asked %v: %s", what, 8*at, err, !once, diff)
			}
			if what == "another key's referrers" {
				continue // where no key tells, what is named is what is needed
			}
			flipped := bytes.Clone(raw)
			flipped[at] ^= 1
			server.Put(prefix+name, flipped)
			_, err = open(t, server).Collect(t.Context(), CollectOptions{Grace: minGrace, Delete: Delete})
			if diff := cmp.Diff(before, server.Names("")); diff != "" || err != nil && !strings.Contains(err.Error(), prefix+name) {
				t.Errorf("%s, bit %d, in the bucket: %v: %s", what, 8*at, err, diff)
			}
			if what == "a manifest" && err == nil {
				t.Errorf("%s, bit %d, in the bucket: no error", what, 8*at)
			}
			server.Put(prefix+name, raw)
			server.Age(prefix+name, 3*minGrace)
			server.Age(prefix+publicName(young.Digest()), time.Minute)
		}
	}
}

// TestCollectGoesOn: who deletes the broken object that a run has named is not stuck.
func TestCollectGoesOn(t *testing.T) {
	server := buckettest.Start(t)
	b := open(t, server)
	image := registrytest.NewImage(registrytest.Layer(1, 1000))
	if err := publish(t.Context(), b, tagged("v1"), image); err != nil {
		t.Fatal(err)
	}
	broken := []string{prefix + blobName(image.Digest()), prefix + tagName(tagged("v2"))}
	for _, name := range broken {
		server.Put(name, []byte("broken"))
	}
	for _, name := range server.Names("") {
		server.Age(name, 3*minGrace)
	}
	opts := CollectOptions{Grace: minGrace, Delete: Delete}
	got, err := b.Collect(t.Context(), opts)
	for _, name := range broken {
		if err == nil || got.Removed != 0 || !strings.Contains(err.Error(), name) {
			t.Errorf("%+v, %v", got, err)
		}
		server.Remove(name)
	}
	if got, err := b.Collect(t.Context(), opts); err != nil || got.Removed == 0 {
		t.Errorf("%+v, %v", got, err)
	}
}

func TestNamesAreParsed(t *testing.T) {
	long := digest.SHA512.FromString("x")
	hub := oci.Repository{Registry: "docker.io", Name: "library/alpine"}
	port := oci.Repository{Registry: "localhost:5000", Name: "a/b"}
	for name, want := range map[string]object{
		blobName(someDigest):         {blobObject, someDigest},
		blobName(long):               {blobObject, long},
		publicName(long):             {contentRecord, long},
		privateName(hub, someDigest): {contentRecord, someDigest},
		referringName(port, long):    {referringRecord, long},
		tagName(oci.Reference{Repository: port, Tag: "v1"}):                                      {kind: tagRecord},
		tagName(oci.Reference{Repository: port, Tag: "sha256-" + someDigest.Encoded() + ".sig"}): {tagRecord, someDigest},
		tagName(oci.Reference{Repository: port, Tag: "sha256-" + someDigest.Encoded()}):          {tagRecord, someDigest},
		tagName(oci.Reference{Repository: port, Tag: "sha256-abc"}):                              {kind: tagRecord},
		leaseName("x"):                                         {kind: leaseObject},
		versionName:                                            {kind: versionObject},
		"blobs/md5/" + someDigest.Encoded():                    {},
		"blobs/sha256/" + long.Encoded():                       {},
		"blobs/sha256/x/" + someDigest.Encoded():               {},
		"records/_public/x":                                    {},
		"records/_public/_tags/v1":                             {},
		"records/quay.io/_tags/v1":                             {},
		"records/quay.io/org/app/_tags/.v1":                    {},
		"records/quay.io/org/app/_manifests/" + long.Encoded(): {},
		"records/quay.io/Org/app/_tags/v1":                     {},
		"records/quay.io/../app/_tags/v1":                      {},
		"leases/x":                                             {},
		"VERSION/":                                             {},
		"":                                                     {},
	} {
		if got := parseName(name); got != want {
			t.Errorf("%s: %+v, want %+v", name, got, want)
		}
	}
}
