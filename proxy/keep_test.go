package proxy

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"breakwater/pkg/config"
	"breakwater/pkg/registrytest"

	ispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// keeping is oneUpstream with these entries of keep, such as "{image: …}".
func keeping(entries ...string) string {
	return "completion: {images: kept}\nkeep: [" + strings.Join(entries, ", ") + "]" + oneUpstream
}

const keepLatest = `{image: "quay.test/org/app:latest", platforms: [linux/amd64]}`

// Nobody ever pulls it; then upstream dies, and somebody does.
func TestKeptImageSurvivesItsUpstream(t *testing.T) {
	for name, image := range map[string]registrytest.Image{"image": newerImage, "index": registrytest.NewIndex(unseenImage.For("linux/arm64"), newerImage)} {
		for _, restart := range []bool{false, true} {
			t.Run(fmt.Sprint(name, " ", restart), func(t *testing.T) {
				t.Parallel()
				bubble(t, keeping(keepLatest), func(r *rig) {
					r.quay.Push("org/app", "latest", storedImage)
					time.Sleep(keepSpread + time.Second)
					if !r.holdsAll(storedImage) {
						r.Fatal("not complete after the start")
					}
					r.quay.Push("org/app", "latest", image)
					time.Sleep(66 * time.Second)
					if !r.holdsAll(newerImage) || r.holds(unseenImage.Blobs[1].Digest) {
						r.Error("the newer image is not complete for the host's platform, and for no other")
					}
					r.cutOff()
					if restart {
						r.stop()
						r.start(keeping(keepLatest))
					}
					time.Sleep(10 * time.Minute)
					if got := r.metric(`breakwater_keep_complete{image="quay.test/org/app:latest"}`); got != "1" {
						r.Errorf("complete: %q", got)
					}
					got := r.get(app+"/manifests/latest").want(r, 200).is(r, image.Raw)
					got.stale(r, got.Header.Get("Age"))
					r.get(app+"/manifests/"+newerImage.Digest().String()).want(r, 200)
					for _, blob := range newerImage.Blobs {
						r.get(blobPath(blob)).want(r, 200).is(r, blob.Bytes)
					}
				})
			})
		}
	}
}

func TestKeptTagIsRefreshed(t *testing.T) {
	heads := registrytest.Match{Kind: registrytest.KindManifest, Method: http.MethodHead, Path: "/latest"}
	for every, want := range map[string]int{"1m": 60, "10s": 360, "1h": 1} {
		bubble(t, keeping(strings.Replace(keepLatest, "}", ", every: "+every+"}", 1)), func(r *rig) {
			r.quay.Push("org/app", "latest", storedImage)
			time.Sleep(time.Minute)
			r.quay.Forget()
			var gaps []time.Duration
			time.Sleep(time.Hour + 6*time.Minute)
			requests := r.quay.Requests(heads)
			for i := range requests[1:] {
				gaps = append(gaps, requests[i+1].Start.Sub(requests[i].Start))
			}
			if n := len(requests); n < want || n > want*12/10+1 {
				r.Errorf("every %s: asked %d times in 66 minutes", every, n)
			}
			if len(gaps) > 10 && slices.Max(gaps)-slices.Min(gaps) < slices.Max(gaps)/20 {
				r.Errorf("every %s: like a clock, from %v to %v", every, slices.Min(gaps), slices.Max(gaps))
			}
			if n := r.quay.Count(registrytest.Match{Method: http.MethodGet, Kind: registrytest.KindBlob}); n > 0 {
				r.Errorf("every %s: %d blobs fetched again", every, n)
			}
		})
	}
}

// A kept digest can be nothing else: once it is complete, nobody is asked.
func TestKeptDigest(t *testing.T) {
	bubble(t, keeping(`{image: "quay.test/org/app@`+storedImage.Digest().String()+`"}`), func(r *rig) {
		time.Sleep(10 * time.Second)
		r.quay.Push("org/app", "", storedImage)
		time.Sleep(3 * time.Minute)
		if !r.holdsAll(storedImage) {
			r.Error("not complete")
		}
		r.quay.Forget()
		time.Sleep(time.Hour)
		if n := r.asked(); n > 0 {
			r.Errorf("%d requests for what is complete", n)
		}
		if got := r.metric(`breakwater_keep_age_seconds{image="quay.test/org/app@` + storedImage.Digest().String() + `"}`); got != "0" {
			r.Errorf("age %q", got)
		}
	})
}

func TestKeptPlatforms(t *testing.T) {
	amd64, arm64, riscv := storedImage, unseenImage.For("linux/arm64"), newerImage.For("linux/riscv64")
	attestation := func(of registrytest.Image, seed uint64) (registrytest.Image, ispec.Descriptor) {
		image := registrytest.NewImage(registrytest.Layer(seed, 500))
		desc := image.Descriptor()
		desc.Platform = &ispec.Platform{OS: "unknown", Architecture: "unknown"}
		desc.Annotations = map[string]string{"vnd.docker.reference.type": "attestation-manifest", attestationDigest: of.Digest().String()}
		return image, desc
	}
	ofAMD64, first := attestation(amd64, 91)
	ofRISCV, second := attestation(riscv, 92)
	v8 := arm64.Descriptor()
	v8.Platform = &ispec.Platform{OS: "linux", Architecture: "arm64", Variant: "v8"}
	raw, err := json.Marshal(ispec.Index{MediaType: ispec.MediaTypeImageIndex, Manifests: []ispec.Descriptor{first, amd64.Descriptor(), v8, riscv.Descriptor(), second}})
	if err != nil {
		t.Fatal(err)
	}
	for platforms, want := range map[string]string{
		"linux/amd64":                 "true false false true false",
		"linux/arm64":                 "false true false false false",
		"linux/arm64/v8, linux/amd64": "true true false true false",
		"linux/riscv64":               "false false true false true",
		"windows/amd64":               "false false false false false",
	} {
		bubble(t, keeping(`{image: "quay.test/org/app:latest", platforms: [`+platforms+`]}`), func(r *rig) {
			images := []registrytest.Image{amd64, arm64, riscv, ofAMD64, ofRISCV}
			for _, image := range images {
				r.quay.Push("org/app", "", image)
			}
			r.quay.PutManifest("org/app", "latest", ispec.MediaTypeImageIndex, raw)
			time.Sleep(3 * time.Minute)
			var got []string
			for _, image := range images {
				got = append(got, fmt.Sprint(r.holdsAll(image)))
			}
			if strings.Join(got, " ") != want {
				r.Errorf("%s: %v, want %s", platforms, got, want)
			}
			complete := map[bool]string{true: "1", false: "0"}[strings.Contains(want, "true")]
			if got := r.metric(`breakwater_keep_complete{image="quay.test/org/app:latest"}`); got != complete {
				r.Errorf("%s: complete is %q, want %s", platforms, got, complete)
			}
		})
	}
}

// An upstream that has asked to wait is not asked for what is kept either.
func TestKeepingWaitsWhenAsked(t *testing.T) {
	bubble(t, keeping(keepLatest), func(r *rig) {
		r.quay.Push("org/app", "latest", storedImage)
		time.Sleep(10 * time.Second)
		r.quay.Fault(all, registrytest.Status(429, "Retry-After", "3600"))
		time.Sleep(2 * time.Minute)
		r.quay.Forget()
		time.Sleep(50 * time.Minute)
		if n := r.asked(); n > 0 {
			r.Errorf("%d requests within the time that it asked for", n)
		}
		if got := r.metric(`breakwater_keep_age_seconds{image="quay.test/org/app:latest"}`); !strings.HasPrefix(got, "31") {
			r.Errorf("age is %q after 52 minutes", got)
		}
		time.Sleep(15 * time.Minute)
		if n := r.asked(); n == 0 {
			r.Error("not asked when the time was over")
		}
	})
}

// What is kept of a private repository has no name in metrics, which everybody on the host may read.
func TestKeptImagesThatArePrivateAreNotNamed(t *testing.T) {
	const quay, open = `{image: "quay.test/org/app:latest"}`, `{image: "open.test/org/app:v1"}`
	byDigest := `{image: "quay.test/org/other@` + storedImage.Digest().String() + `"}`
	const free = `{image: "quay.test/free/app:v1"}`
	yaml := func(config string, entries ...string) string {
		return config + "completion: {images: kept}\npublic: [quay.test/free/*]\nkeep: [" + strings.Join(entries, ", ") + "]"
	}
	bubble(t, yaml(guarded+"access: {anonymous: true}\n", open, quay, free, byDigest), func(r *rig) {
		use := func(yaml string) {
			r.Helper()
			if err := r.mirror.Use(r.config(yaml)); err != nil {
				r.Fatal(err)
			}
		}
		want := func(labels string) {
			r.Helper()
			w := httptest.NewRecorder()
			r.mirror.Admin().ServeHTTP(w, httptest.NewRequest(http.MethodGet, "/metrics", nil))
			var got []string
			for line := range strings.Lines(w.Body.String()) {
				if rest, found := strings.CutPrefix(line, `breakwater_keep_complete{image="`); found {
					label, _, _ := strings.Cut(rest, `"`)
					got = append(got, label)
				}
			}
			if strings.Join(got, " ") != labels {
				r.Errorf("%q, want %s", got, labels)
			}
			if !strings.Contains(labels, "quay.test/org/") && strings.Contains(w.Body.String(), "quay.test/org/") {
				r.Error("a private repository is named")
			}
		}
		r.quay.Serve(r, r.network, "quay.test:443")
		r.quay.Push("org/other", "", storedImage)
		time.Sleep(time.Minute)
		want("keep[1] keep[3] open.test/org/app:v1 quay.test/free/app:v1")
		if got := r.metric(`breakwater_keep_age_seconds{image="keep[3]"}`); got != "0" {
			r.Errorf("age is %q", got)
		}
		use(yaml(guarded+"access: {anonymous: true}\n", quay, open))
		want("keep[0] open.test/org/app:v1")
		use(yaml(withoutAccount+"access: {anonymous: true}\n", quay, open))
		want("open.test/org/app:v1 quay.test/org/app:latest")
	})
}

func TestKeepFollowsTheConfiguration(t *testing.T) {
	bubble(t, keeping(keepLatest), func(r *rig) {
		r.quay.Push("org/app", "latest", storedImage)
		r.quay.Push("org/other", "v1", unseenImage)
		time.Sleep(10 * time.Second)
		use := func(yaml string) {
			r.Helper()
			if err := r.mirror.Use(r.config(yaml)); err != nil {
				r.Fatal(err)
			}
		}
		use(keeping(keepLatest, `{image: "quay.test/org/other:v1", platforms: [linux/amd64]}`))
		time.Sleep(10 * time.Second)
		if !r.holdsAll(unseenImage) || fmt.Sprint(r.mirror.Kept()) != "[quay.test/org/app:latest quay.test/org/other:v1]" {
			r.Errorf("complete: %v; kept: %v", r.holdsAll(unseenImage), r.mirror.Kept())
		}
		use(oneUpstream)
		time.Sleep(10 * time.Second)
		r.quay.Forget()
		time.Sleep(time.Hour)
		if n := r.asked(); n > 0 || len(r.mirror.Kept()) > 0 {
			r.Errorf("%d requests for what is not kept any more; kept: %v", n, r.mirror.Kept())
		}
	})
}

// logLines counts what is logged, by requests at the same time too.
type logLines struct {
	slog.Handler
	n *atomic.Int64
}

func (l logLines) Handle(context.Context, slog.Record) error { l.n.Add(1); return nil }

func (logLines) Enabled(context.Context, slog.Level) bool { return true }

func TestKeeperLogsChangesOnly(t *testing.T) {
	bubble(t, oneUpstream, func(r *rig) {
		var n atomic.Int64
		r.mirror.logger = slog.New(logLines{slog.DiscardHandler, &n})
		cfg := config.Keep{Image: "quay.test/org/app:latest", Platforms: []string{"linux/amd64"}}
		ref, err := cfg.Reference()
		if err != nil {
			r.Fatal(err)
		}
		k := &keeper{m: r.mirror, cfg: cfg, ref: ref}
		down := errors.New("down")
		for i, want := range []int64{1, 1, 1} {
			if k.look(down); n.Load() != want {
				r.Errorf("failing for the %d. time: %d lines", i+1, n.Load())
			}
		}
		r.quay.Push("org/app", "latest", storedImage)
		r.pull("latest", storedImage)
		synctest.Wait() // until the access lines are written
		for i, tt := range []struct {
			failed error
			want   int64 // lines
		}{{nil, 1}, {nil, 0}, {down, 1}, {down, 0}, {nil, 1}, {nil, 0}} {
			n.Store(0)
			if k.look(tt.failed); n.Load() != tt.want {
				r.Errorf("%d. %v: %d lines, want %d", i, tt.failed, n.Load(), tt.want)
			}
		}
	})
}
