package registrytest

import (
	"bytes"
	"testing"
)

func TestReal(t *testing.T) {
	for _, dir := range []string{"", t.TempDir()} {
		r, err := NewReal(dir)
		if err != nil {
			t.Fatal(err)
		}
		image := NewImage(Layer(1, 100_000))
		for _, pushed := range []Image{NewIndex(image, image.For("linux/arm64")), image.Docker()} {
			if err := Push(t.Context(), r.URL, "org/app", "latest", pushed); err != nil {
				t.Fatal(err)
			}
			resp, body, err := ask(t, "GET", r.URL+"/v2/org/app/manifests/latest", "Accept", pushed.MediaType)
			if err != nil || resp.StatusCode != 200 || !bytes.Equal(body, pushed.Raw) {
				t.Fatal(resp, string(body), err)
			}
		}
		blob := r.URL + "/v2/org/app/blobs/" + image.Blobs[1].Digest.String()
		r.Forget()
		if _, body, err := ask(t, "GET", blob); err != nil || !bytes.Equal(body, image.Blobs[1].Bytes) {
			t.Errorf("%d bytes, %v", len(body), err)
		}
		if n := r.Count(Match{Kind: KindBlob, Method: "GET"}); n != 1 {
			t.Errorf("%d pulls", n)
		}
		if err := r.Close(); err != nil {
			t.Fatal(err)
		}
		if _, _, err := ask(t, "GET", blob); err == nil {
			t.Error("an answer from a stopped registry")
		}
		if err := r.Restart(); err != nil {
			t.Fatal(err)
		}
		if resp, _, err := ask(t, "GET", blob); err != nil || resp.StatusCode != 200 {
			t.Errorf("after a restart: %v, %v", resp, err)
		}
		r.Fault(Match{}, Status(503))
		if resp, _, err := ask(t, "GET", blob); err != nil || resp.StatusCode != 503 {
			t.Errorf("with a fault: %v, %v", resp, err)
		}
		if err := r.Close(); err != nil {
			t.Fatal(err)
		}
	}
}
