package registrytest

import (
	"bytes"
	"errors"
	"io"
	"net/http"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/opencontainers/go-digest"
)

// Each fault is run over a real socket and over the Network: what the client sees is the same.
func TestBodyFaults(t *testing.T) {
	content := Layer(1, 200_000)
	flipped := bytes.Clone(content)
	flipped[100_000] ^= 1
	for _, test := range []struct {
		name   string
		fault  Fault
		length int64 // Content-Length, -1 for none
		body   []byte
		err    error
	}{
		{"truncate", Truncate(70_000), 200_000, content[:70_000], io.ErrUnexpectedEOF},
		{"truncate at once", Truncate(0), 200_000, nil, io.ErrUnexpectedEOF},
		{"truncate beyond", Truncate(200_000), 200_000, content, nil},
		{"truncate chunked", chain([]Fault{Truncate(70_000), Header("Content-Length", "")}), -1, content[:70_000], io.ErrUnexpectedEOF},
		{"reset", Reset(70_000), 200_000, content[:70_000], syscall.ECONNRESET},
		{"flip", FlipBit(100_000), 200_000, flipped, nil},
		{"longer", Resize(1), 200_001, append(bytes.Clone(content), 0), nil},
		{"shorter", Resize(-1), 199_999, content[:199_999], nil},
		{"chunked", Header("Content-Length", ""), -1, content, nil},
		{"drip", Drip(100_000, time.Millisecond), 200_000, content, nil},
	} {
		check := func(t *testing.T, c *http.Client, url string) {
			resp, err := c.Get(url)
			if err != nil {
				t.Fatalf("%s: %v", test.name, err)
			}
			defer resp.Body.Close()
			body, err := io.ReadAll(resp.Body)
			if resp.StatusCode != 200 || resp.ContentLength != test.length || !errors.Is(err, test.err) || !bytes.Equal(body, test.body) {
				t.Errorf("%s: %d, length %d, %d bytes, %v", test.name, resp.StatusCode, resp.ContentLength, len(body), err)
			}
		}
		reg := New(Config{})
		path := "/v2/org/app/blobs/" + reg.PutBlob("org/app", content).String()
		reg.Fault(Match{Kind: KindBlob}, test.fault)
		transport := &http.Transport{}
		check(t, &http.Client{Transport: transport}, reg.Start(t).URL+path)
		transport.CloseIdleConnections()

		synctest.Test(t, func(t *testing.T) {
			n := NewNetwork()
			reg := New(Config{})
			reg.PutBlob("org/app", content)
			reg.Fault(Match{Kind: KindBlob}, test.fault)
			reg.Serve(t, n, "quay.test:443")
			check(t, client(t, n), "https://quay.test"+path)
		})
	}
}

func TestEndless(t *testing.T) {
	reg := New(Config{})
	path := "/v2/org/app/blobs/" + reg.PutBlob("org/app", []byte("content")).String()
	reg.Fault(Match{}, Endless())
	resp, err := http.Get(reg.Start(t).URL + path)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	if n, err := io.CopyN(io.Discard, resp.Body, 10<<20); err != nil || resp.ContentLength != -1 {
		t.Errorf("%d bytes, %v, length %d", n, err, resp.ContentLength)
	}
}

func TestAnswerFaults(t *testing.T) {
	reg := New(Config{})
	image := NewImage()
	reg.Push("org/app", "latest", image)
	url := reg.Start(t).URL + "/v2/org/app/manifests/latest"
	get := func(method string) (status int, header http.Header, body string) {
		resp, raw, err := ask(t, method, url)
		if err != nil {
			t.Fatal(err)
		}
		return resp.StatusCode, resp.Header, string(raw)
	}
	reg.Fault(Match{Kind: KindManifest}, Status(503, "Retry-After", "120"))
	if status, h, body := get("GET"); status != 503 || h.Get("Retry-After") != "120" || body == "" {
		t.Errorf("%d %v %s", status, h, body)
	}
	reg.Fault(Match{Path: "org/app"}, Portal())
	if status, h, _ := get("GET"); status != 200 || h.Get("Content-Type") != "text/html; charset=utf-8" {
		t.Errorf("the newest rule is not outermost: %d %v", status, h)
	}
	reg.Heal()
	remove := reg.Fault(Match{Method: "HEAD"}, Status(405))
	if status, _, _ := get("HEAD"); status != 405 {
		t.Errorf("%d", status)
	}
	if status, _, body := get("GET"); status != 200 || body != string(image.Raw) {
		t.Errorf("%d %s", status, body)
	}
	remove()
	remove() // twice does no harm
	reg.Fault(Match{}, Header("Docker-Content-Digest", ""), Header("Content-Type", ""), Header("X-Other", "1"))
	if status, h, _ := get("HEAD"); status != 200 || h["Docker-Content-Digest"] != nil || h["Content-Type"] != nil || h.Get("X-Other") != "1" {
		t.Errorf("%d %v", status, h)
	}
	reg.Heal()
	reg.Fault(Match{}, Header("Docker-Content-Digest", digest.FromString("other").String()))
	if _, h, _ := get("HEAD"); h.Get("Docker-Content-Digest") != digest.FromString("other").String() {
		t.Errorf("%v", h)
	}
}

func TestLimits(t *testing.T) {
	statuses := func(fault Fault, requests int) (bad []int) {
		reg := New(Config{})
		url := reg.Start(t).URL + "/v2/"
		reg.Fault(Match{}, fault)
		for i := range requests {
			resp, _, err := ask(t, "GET", url)
			if err != nil {
				t.Fatal(err)
			}
			if resp.StatusCode != 200 {
				bad = append(bad, i)
			}
		}
		return bad
	}
	if bad := statuses(First(2, Status(500)), 4); len(bad) != 2 || bad[1] != 1 {
		t.Errorf("first: %v", bad)
	}
	if bad := statuses(After(1, First(2, Status(500))), 5); len(bad) != 2 || bad[0] != 1 || bad[1] != 2 {
		t.Errorf("after, then first: %v", bad)
	}
	some := statuses(Chance(0.2, 1, Status(500)), 100)
	if len(some) < 10 || len(some) > 30 {
		t.Errorf("chance: %v", some)
	}
	if again := statuses(Chance(0.2, 1, Status(500)), 100); len(again) != len(some) {
		t.Errorf("another chance for the same seed: %v, then %v", some, again)
	}
}

func TestTimeInABubble(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := NewNetwork()
		reg := New(Config{})
		content := Layer(1, 100_000)
		reg.PutBlob("org/app", content)
		reg.Serve(t, n, "quay.test:80")
		c := client(t, n)
		get := func(timeout time.Duration) (header, whole time.Duration, read int, err error) {
			c.Timeout = timeout
			start := time.Now()
			resp, err := c.Get("http://quay.test/v2/org/app/blobs/" + digest.FromBytes(content).String())
			if err != nil {
				return 0, time.Since(start), 0, err
			}
			defer resp.Body.Close()
			header = time.Since(start)
			body, err := io.ReadAll(resp.Body)
			return header, time.Since(start), len(body), err
		}
		remove := reg.Fault(Match{}, Delay(4900*time.Millisecond))
		if header, _, _, err := get(5 * time.Second); err != nil || header != 4900*time.Millisecond {
			t.Errorf("delay: %v, %v", header, err)
		}
		remove()
		remove = reg.Fault(Match{}, Drip(10_000, 10*time.Second))
		if header, whole, read, err := get(0); err != nil || header != 0 || whole != 90*time.Second || read != 100_000 {
			t.Errorf("drip: header after %v, %d bytes after %v, %v", header, read, whole, err)
		}
		remove()
		remove = reg.Fault(Match{}, Stall(50_000))
		if _, whole, read, err := get(15 * time.Second); err == nil || whole != 15*time.Second || read != 50_000 {
			t.Errorf("stall: %d bytes after %v, %v", read, whole, err)
		}
		remove()
		reg.Fault(Match{}, Hang())
		if _, whole, _, err := get(30 * time.Second); err == nil || whole != 30*time.Second {
			t.Errorf("hang: %v after %v", err, whole)
		}
		time.AfterFunc(time.Hour, reg.Heal)
		if _, whole, read, err := get(0); err != nil || whole != time.Hour || read != 100_000 {
			t.Errorf("healed: %d bytes after %v, %v", read, whole, err)
		}
		log := reg.Requests(Match{Kind: KindBlob})
		if len(log) != 5 || log[2].Sent != 50_000 || log[4].End.Sub(log[4].Start) != time.Hour {
			t.Errorf("%+v", log)
		}
	})
}
