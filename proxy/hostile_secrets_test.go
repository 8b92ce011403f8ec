package proxy

import (
	"net/http"
	"testing"
	"time"

	"breakwater/pkg/registrytest"
)

// asRobot makes quay.test let nobody in but robot, who must get a token first.
func (r *rig) asRobot() {
	r.quay.Serve(r, r.network, "quay.test:443")
	r.quay.Configure(registrytest.Config{Auth: registrytest.Auth{Scheme: "Bearer", Users: map[string]string{"robot": registrytest.Canary}}})
	r.quay.Push("org/app", "latest", storedImage)
}

// A token service is not asked about what the store answers by itself.
func TestTokensAreNotAskedForWhatIsStored(t *testing.T) {
	bubble(t, withPassword(t), func(r *rig) {
		r.asRobot()
		r.pull("latest", storedImage)
		time.Sleep(time.Hour) // no token lives that long
		r.quay.Forget()
		for _, blob := range storedImage.Blobs {
			r.get(app+"/blobs/"+blob.Digest.String()).want(r, http.StatusOK)
		}
		r.get(app+"/manifests/"+storedImage.Digest().String()).want(r, http.StatusOK)
		if n := r.asked(); n > 0 {
			t.Errorf("%d requests for stored content", n)
		}
	})
}

// Secrets end up where logs and metrics end up (CVE-2025-48374, GHSA-prh4-vhfh-24mj). The rig searches
// what comes out; here is what goes wrong round a secret.
func TestSecretsAreNotLogged(t *testing.T) {
	const secret = registrytest.Canary
	bubble(t, withPassword(t), func(r *rig) {
		r.asRobot()
		ask := func(path string) { r.get(path, "Authorization: Basic "+secret, "Cookie: "+secret) }
		blob := app + "/blobs/" + storedImage.Blobs[1].Digest.String()
		signed := "/" + secret + "?X-Amz-Signature=" + secret
		ask(app + latest)
		ask(app + latest + "?token=" + secret)
		for _, location := range []string{"https://cdn.test" + signed, "https://nowhere.test" + signed, "http://plain.test" + signed, "https://u:" + secret + "@cdn.test/", "https://10.0.0.1" + signed, "https://%zz" + signed} {
			for _, fault := range []registrytest.Fault{registrytest.Status(403), registrytest.Portal(), registrytest.Truncate(10), redirect("ftp://cdn.test" + signed)} {
				remove := r.quay.Fault(registrytest.Match{Kind: registrytest.KindBlob}, redirect(location))
				cdn := registrytest.New(registrytest.Config{})
				cdn.Fault(registrytest.Match{}, fault)
				server := cdn.Serve(r, r.network, "cdn.test:443")
				ask(blob)
				remove()
				_ = server.Close()
				time.Sleep(5 * time.Minute)
			}
		}
		for _, reply := range []string{`{"token":"` + secret + `\u0001"}`, `{"token":"` + secret} {
			r.quay.Fault(registrytest.Match{Kind: registrytest.KindToken}, func(w http.ResponseWriter, _ *http.Request, _ http.Handler) {
				_, _ = w.Write([]byte(reply))
			})
			time.Sleep(time.Hour)
			ask(blob)
			ask(app + latest)
		}
	})
}
