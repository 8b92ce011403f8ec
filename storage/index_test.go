package storage

import (
	"testing"
	"time"

	"breakwater/pkg/oci"

	"github.com/opencontainers/go-digest"
)

// Who asks for the usage of a large store all the time does not make it count its images all the time; a
// small one is counted whenever somebody asks.
func TestCountsManyImagesForAHundredthOfTheTime(t *testing.T) {
	for _, n := range []int{10, manyManifests + 1} {
		x := newIndex()
		add := func(note string) {
			m := manifestOf(t, note)
			x.Stored(m.Digest, 1000)
			x.Manifest(app, m, time.Now())
		}
		for i := range n - 1 {
			dgst := digest.FromBytes([]byte{byte(i), byte(i >> 8)})
			x.Stored(dgst, 1000)
			x.Manifest(app, oci.Manifest{Digest: dgst}, time.Now())
		}
		add("one")
		x.Finish()
		if u := x.Usage(); !u.Built || u.Images != n || u.Complete != n {
			t.Fatalf("%d images: %+v", n, u)
		}
		x.counted.took = time.Hour // counting is slow
		add("two")
		want := n + 1
		if n > manyManifests {
			want = n
		}
		if u := x.Usage(); u.Images != want || u.Complete != want || u.Contents != n+1 {
			t.Errorf("%d images: %+v", n+1, u)
		}
		x.counted.took = 0
		if u := x.Usage(); u.Images != n+1 || u.Complete != n+1 {
			t.Errorf("%d images: %+v", n+1, u)
		}
	}
}
