package config

import (
	"bytes"
	"flag"
	"os"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"breakwater/pkg/oci"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
)

var update = flag.Bool("update", false, "write golden files")

// same compares configurations; an empty list says what none says.
var same = cmp.Options{cmpopts.EquateEmpty(), cmp.Comparer(func(a, b Duration) bool { return a == b })}

// folder is a copy of testdata with secrets of several modes beside it, which git would not keep.
func folder(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	if err := os.CopyFS(dir, os.DirFS("testdata")); err != nil {
		t.Fatal(err)
	}
	for name, mode := range map[string]os.FileMode{"good.pw": 0o600, "config.json": 0o600, "world.pw": 0o604, "group.pw": 0o640, "tls.crt": 0o644, "tls.key": 0o400, "empty.pw": 0o600, "fleet.key": 0o600} {
		file := filepath.Join(dir, name)
		if err := os.WriteFile(file, []byte("hunter2"), 0o600); err != nil {
			t.Fatal(err)
		}
		if name == "empty.pw" {
			if err := os.Truncate(file, 0); err != nil {
				t.Fatal(err)
			}
		}
		if err := os.Chmod(file, mode); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

// TestH42Mistakes holds the whole text that a user sees for each file of mistakes.
func TestH42Mistakes(t *testing.T) {
	dir := folder(t)
	files, err := filepath.Glob("testdata/*.yaml")
	if err != nil || len(files) == 0 {
		t.Fatal(files, err)
	}
	for _, file := range files {
		name := filepath.Base(file)
		t.Run(name, func(t *testing.T) {
			_, err := Load(filepath.Join(dir, name), nil, nil)
			if err == nil {
				t.Fatal("accepted")
			}
			got := strings.ReplaceAll(err.Error(), dir, "/etc/breakwater") + "\n"
			golden := strings.TrimSuffix(file, ".yaml") + ".golden"
			if *update {
				if err := os.WriteFile(golden, []byte(got), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			want, err := os.ReadFile(golden)
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(string(want), got); diff != "" {
				t.Errorf("-want +got\n%s", diff)
			}
			if strings.Contains(got, "hunter2") {
				t.Error("the error tells a secret")
			}
		})
	}
}

func TestH42EnvironmentAndFlags(t *testing.T) {
	dir := folder(t)
	_, err := Load(filepath.Join(dir, "later.yaml"),
		[]string{"BREAKWATER_LISTEN=0.0.0.0:5000", "BREAKWATER_ANY_REGISTRY=maybe", "BREAKWATER_KEEP=all", "BREAKWATER_LISTEN_PORT=5000", "BREAKWATER_CAPACITY=lots"},
		map[string]string{"admin": "5001", "log-level": "loud", "upstream": "x"})
	if err == nil {
		t.Fatal("accepted")
	}
	for _, want := range []string{
		"BREAKWATER_LISTEN: listen: ", "BREAKWATER_ANY_REGISTRY: any_registry: ", "BREAKWATER_KEEP: unknown", "BREAKWATER_LISTEN_PORT: unknown", "BREAKWATER_CAPACITY: capacity: ",
		"--admin: admin: ", "--log-level: log.level: ", "--upstream: unknown", "later.yaml:",
	} {
		if !strings.Contains(err.Error(), want) {
			t.Errorf("no %q in\n%v", want, err)
		}
	}
}

// settled is what holds when nobody says anything, with what follows from it.
func settled() *Config {
	c := defaults()
	c.Control = filepath.Join(c.Data, "control.sock")
	return c
}

func TestNoFile(t *testing.T) {
	c, err := Load("", nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(settled(), c, same); diff != "" {
		t.Error(diff)
	}
	for _, text := range []string{"", "# nothing\n", "---\n", "registries:\n", "tags: {}\nlisten:\nlog:\n  level:\n"} {
		c, err := load("breakwater.yaml", []byte(text), nil, nil)
		if err != nil {
			t.Fatalf("%q: %v", text, err)
		}
		if diff := cmp.Diff(settled(), c, same); diff != "" {
			t.Errorf("%q: %s", text, diff)
		}
	}
	if _, err := Load(filepath.Join(t.TempDir(), "missing.yaml"), nil, nil); err == nil || !strings.Contains(err.Error(), "missing.yaml") {
		t.Errorf("missing file: %v", err)
	}
}

func TestOverrides(t *testing.T) {
	text := "listen: 127.0.0.1:1\nadmin: 127.0.0.1:2\ncapacity: 1GiB\nlog: {format: text, level: warn}\ndata: store\n"
	environ := []string{"BREAKWATER_LISTEN=127.0.0.1:3", "BREAKWATER_CAPACITY=2GiB", "BREAKWATER_LOG_LEVEL=debug", "BREAKWATER_ANY_REGISTRY=true", "BREAKWATER_ADMIN=",
		"BREAKWATER_SERVICE_HOST=10.0.0.1", "BREAKWATER_PORT=tcp://10.0.0.1:5000", "BREAKWATER_ADMIN_PORT_5001_TCP_ADDR=10.0.0.1", "PATH=/bin"}
	c, err := load("/etc/breakwater/config.yaml", []byte(text), environ, map[string]string{"listen": "127.0.0.1:5", "log-format": "json"})
	if err != nil {
		t.Fatal(err)
	}
	want := defaults()
	want.Listen, want.Admin, want.Data, want.Capacity = "127.0.0.1:5", "127.0.0.1:2", "/etc/breakwater/store", Size{Bytes: 2 << 30}
	want.Control = "/etc/breakwater/store/control.sock"
	want.Log, want.AnyRegistry = Log{Format: LogJSON, Level: "debug"}, true
	if diff := cmp.Diff(want, c, same); diff != "" {
		t.Error(diff)
	}
	if c, err = load("", nil, nil, map[string]string{"data": "here"}); err != nil || !filepath.IsAbs(c.Data) {
		t.Errorf("%v, %v", c, err)
	}
}

func TestDefaultData(t *testing.T) {
	usual := defaults().Data
	itself := strconv.Itoa(os.Getpid())
	for _, tt := range []struct {
		environ []string
		want    string
	}{
		{nil, usual},
		{[]string{"STATE_DIRECTORY="}, usual},
		{[]string{"STATE_DIRECTORY=/var/lib/bw"}, "/var/lib/bw"},
		{[]string{"STATE_DIRECTORY=/var/lib/bw:/var/lib/more", "SYSTEMD_EXEC_PID=" + itself}, "/var/lib/bw"},
		// Of the service that has started us, such as a build agent.
		{[]string{"STATE_DIRECTORY=/var/lib/agent", "SYSTEMD_EXEC_PID=" + itself + "0"}, usual},
		{[]string{"STATE_DIRECTORY=/var/lib/bw", "BREAKWATER_DATA=/srv/bw"}, "/srv/bw"},
	} {
		c, err := load("", nil, tt.environ, nil)
		if err != nil || c.Data != tt.want || c.Control != filepath.Join(tt.want, "control.sock") {
			t.Errorf("%v: %v %v, want %s", tt.environ, c, err, tt.want)
		}
	}
	if c, err := load("c.yaml", []byte("data: /srv/bw\n"), []string{"STATE_DIRECTORY=/var/lib/bw"}, nil); err != nil || c.Data != "/srv/bw" {
		t.Errorf("over a file: %v, %v", c, err)
	}
	if c, err := load("", nil, []string{"STATE_DIRECTORY=bw"}, nil); err != nil || !filepath.IsAbs(c.Data) || filepath.Base(c.Data) != "bw" {
		t.Errorf("a relative one: %v, %v", c, err)
	}
}

func TestControl(t *testing.T) {
	dir := t.TempDir()
	open := filepath.Join(dir, "open")
	if err := os.Mkdir(open, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(open, 0o777); err != nil {
		t.Fatal(err)
	}
	long := filepath.Join("/run", strings.Repeat("x", maxControl-len("/run/")))
	for _, tt := range []struct {
		text  string
		flags map[string]string
		want  string // the path, or words of the error
	}{
		{"data: store\n", nil, dir + "/store/control.sock"},
		{"data: store\ncontrol: c.sock\n", nil, dir + "/c.sock"},
		{"control: c.sock\n", map[string]string{"control": "/run/bw/c.sock"}, "/run/bw/c.sock"},
		{"", map[string]string{"data": "/srv/bw"}, "/srv/bw/control.sock"},
		{"control: " + long + "\n", nil, long},
		{"control: " + long + "x\n", nil, "c.yaml:1:10: control: is 108 bytes long, and the name of a socket can have 107; write a shorter one, such as /run/breakwater/control.sock"},
		{"data: /srv/" + long + "\n", nil, "control: is 124 bytes long"},
		{"control: open/c.sock\n", nil, "control: everybody may write to " + open},
		{"control: /srv/bw\ndata: /srv/bw\n", nil, "control: is the data folder; write the name of a socket, such as /srv/bw/control.sock"},
	} {
		c, err := load(filepath.Join(dir, "c.yaml"), []byte(tt.text), nil, tt.flags)
		if err != nil && !strings.Contains(err.Error(), tt.want) || err == nil && c.Control != tt.want {
			t.Errorf("%q %v: %v %v, want %s", tt.text, tt.flags, c, err, tt.want)
		}
	}
	if c, err := load("", nil, []string{"BREAKWATER_CONTROL=/run/bw/e.sock"}, nil); err != nil || c.Control != "/run/bw/e.sock" {
		t.Errorf("by a variable: %v, %v", c, err)
	}
}

func TestImagesAsPeopleTypeThem(t *testing.T) {
	c := &Config{DefaultRegistry: "docker.io", Registries: map[string]Registry{"quay": {}}}
	dgst := "sha256:" + strings.Repeat("ab", 32)
	for s, want := range map[string]string{
		"alpine":                 "docker.io/library/alpine:latest",
		"alpine:3":               "docker.io/library/alpine:3",
		"org/app@" + dgst:        "docker.io/org/app@" + dgst,
		"org/app:v1":             "docker.io/org/app:v1",
		"quay/app":               "quay/app:latest",
		"quay.io/org/app":        "quay.io/org/app:latest",
		"quay.io/org/app:v1":     "quay.io/org/app:v1",
		"localhost/app":          "localhost/app:latest",
		"localhost:5000/app":     "localhost:5000/app:latest",
		"[::1]:5000/app@" + dgst: "[::1]:5000/app@" + dgst,
		"":                       "",
		"alpine:3@" + dgst:       "",
		"https://quay.io/app":    "",
		"Alpine":                 "",
		"alpine:":                "",
		"org//app":               "",
		"../app":                 "",
		"a b":                    "",
	} {
		if ref, err := c.Image(s); (err != nil) != (want == "") || err == nil && ref.String() != want {
			t.Errorf("%q: %s, %v; want %s", s, ref, err, want)
		}
	}
	c.DefaultRegistry = "quay.io"
	if ref, err := c.Image("alpine"); err != nil || ref.String() != "quay.io/alpine:latest" {
		t.Errorf("with another default: %s, %v", ref, err)
	}
}

func TestRegistriesReplaceTheDefaultOnes(t *testing.T) {
	c, err := load("c.yaml", []byte("default_registry: quay.io\nregistries:\n  quay.io:\n  docker.io: {}\n  localhost:5050: {upstreams: [{url: 'http://localhost:5050/'}]}\n"), nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	want := map[string]Registry{
		"quay.io":        {Upstreams: []Upstream{{URL: "https://quay.io"}}},
		"docker.io":      {Upstreams: []Upstream{{URL: "https://registry-1.docker.io"}}},
		"localhost:5050": {Upstreams: []Upstream{{URL: "http://localhost:5050"}}},
	}
	if diff := cmp.Diff(want, c.Registries, same); diff != "" {
		t.Error(diff)
	}
}

func TestKeepIsCompleted(t *testing.T) {
	c, err := load("c.yaml", []byte("keep:\n  - image: docker.io/alpine:3\n  - {image: quay.io/org/app:v1, platforms: [linux/arm/v7], every: 1h}\n"), nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	want := []Keep{
		{"docker.io/alpine:3", []string{"linux/" + runtime.GOARCH}, Set(time.Minute)},
		{"quay.io/org/app:v1", []string{"linux/arm/v7"}, Set(time.Hour)},
	}
	if diff := cmp.Diff(want, c.Keep, same); diff != "" {
		t.Error(diff)
	}
	if ref, err := c.Keep[0].Reference(); err != nil || ref.String() != "docker.io/library/alpine:3" {
		t.Errorf("%s, %v", ref, err)
	}
}

func TestECRsTellTheirRegion(t *testing.T) {
	for url, want := range map[string]string{
		"https://123456789012.dkr.ecr.us-east-1.amazonaws.com":           "us-east-1",
		"https://123456789012.dkr.ecr-fips.us-gov-west-1.amazonaws.com/": "us-gov-west-1",
		"https://123456789012.dkr.ecr.cn-north-1.amazonaws.com.cn":       "cn-north-1",
		"https://123456789012.dkr-ecr.eu-west-1.on.aws":                  "eu-west-1",
		"https://public.ecr.aws":                                         "",
		"https://dkr.ecr.us-east-1.amazonaws.com":                        "",
		"https://evil.example/123456789012.dkr.ecr.us-east-1.aws.com":    "",
	} {
		if got := ecrRegion(url); got != want {
			t.Errorf("%s: %q, want %q", url, got, want)
		}
	}
	c, err := load("c.yaml", []byte("registries:\n  docker.io:\n    upstreams:\n      - url: https://123456789012.dkr.ecr.us-east-1.amazonaws.com\n        credentials: {ecr: {}}\n"), nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	if ecr := c.Registries["docker.io"].Upstreams[0].Credentials.ECR; ecr == nil || ecr.Region != "us-east-1" {
		t.Errorf("%v", ecr)
	}
}

func TestTagsForTakesTheNearestKeyByKey(t *testing.T) {
	c, err := load("c.yaml", []byte(`
tags: {fresh_for: 10s, max_stale: 7d}
registries:
  docker.io:
    tags: {fresh_for: 20s, on_denied: stale}
    repositories:
      library/alpine: {tags: {fresh_for: 0s, max_stale: 0s}}
      library/busybox: {tags: {max_stale: unlimited}}
`), nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	timeout := Set(1500 * time.Millisecond)
	for name, want := range map[string]Tags{
		"docker.io/library/alpine":  {Set(0), Set(0), timeout, Stale, Refuse},
		"docker.io/library/busybox": {Set(20 * time.Second), Set(Unlimited), timeout, Stale, Refuse},
		"docker.io/other/alpine":    {Set(20 * time.Second), Set(7 * day), timeout, Stale, Refuse},
		"example.com/any":           {Set(10 * time.Second), Set(7 * day), timeout, Refuse, Refuse},
	} {
		registry, rest, _ := strings.Cut(name, "/")
		if got := c.TagsFor(oci.Repository{Registry: registry, Name: rest}); got != want {
			t.Errorf("%s: %v, want %v", name, got, want)
		}
	}
	if got := new(Config).TagsFor(oci.Repository{}); got != defaults().Tags {
		t.Errorf("without anything: %v", got)
	}
}

func TestIsPublic(t *testing.T) {
	c := Config{Public: []string{"docker.io/library/*", "quay.io/*/base", "ghcr.io/org/go*", "gcr.io/one/app", "*.example.com/*"}}
	for name, want := range map[string]bool{
		"docker.io/library/alpine": true, "docker.io/library": false, "docker.io/libraryx/alpine": false, "docker.io/other/library/alpine": false,
		"quay.io/org/base": true, "quay.io/org/sub/base": false, "quay.io/org/base/more": false,
		"ghcr.io/org/golang": true, "ghcr.io/org/golang/cache": true, "ghcr.io/org/rust": false,
		"gcr.io/one/app": true, "gcr.io/one/app/sub": false, "gcr.io/one/apps": false,
		"a.example.com/x/y": true, "example.com/x": false, "": false, "/": false, "docker.io/": false,
	} {
		registry, rest, _ := strings.Cut(name, "/")
		if got := c.IsPublic(oci.Repository{Registry: registry, Name: rest}); got != want {
			t.Errorf("%s: %v", name, got)
		}
	}
}

// everything is a file that sets each key there is.
func everything(t *testing.T) (dir, text string) {
	dir = folder(t)
	text = uncommented()
	for from, to := range map[string]string{"tls/server.crt": "tls.crt", "tls/server.key": "tls.key", "secrets/registry.example.com": "good.pw", "secrets/config.json": "config.json",
		"secrets/fleet.key": "fleet.key", "\n  htpasswd: secrets/htpasswd": "", "tls/token-keys.json": "tls.crt", "tls/clients.crt": "tls.crt", "tls/ca.crt": "tls.crt", "tls/client.crt": "tls.crt", "tls/client.key": "tls.key"} {
		if !strings.Contains(text, from) {
			t.Fatalf("the example does not name %s", from)
		}
		text = strings.ReplaceAll(text, from, to)
	}
	return dir, text
}

// uncommented is the example with all its settings in force.
func uncommented() string {
	return regexp.MustCompile(`(?m)^#(\S| +)`).ReplaceAllStringFunc(string(Example()), func(start string) string {
		if start == "# " {
			return start // prose
		}
		return start[1:]
	})
}

func TestShowIsAFileThatLoads(t *testing.T) {
	dir, text := everything(t)
	for name, text := range map[string]string{"everything": text, "nothing": "", "odd": "capacity: 12.5%\nscrub: off\nlisten: '[::1]:0'\nserver_names: [on, 0x10]\nlog: {level: debug}\n"} {
		c, err := load(filepath.Join(dir, "a.yaml"), []byte(text), nil, nil)
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		shown, err := c.Show()
		if err != nil {
			t.Fatal(err)
		}
		again, err := load("/elsewhere/b.yaml", shown, nil, nil)
		if err != nil {
			t.Fatalf("%s: %v\n%s", name, err, shown)
		}
		if diff := cmp.Diff(c, again, same); diff != "" {
			t.Errorf("%s: %s", name, diff)
		}
		if strings.Contains(string(shown), "hunter2") {
			t.Errorf("a secret is shown:\n%s", shown)
		}
		if err := fits(t, shown); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestExampleSaysWhatHoldsByDefault(t *testing.T) {
	c, err := load("example.yaml", Example(), nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(settled(), c, same); diff != "" {
		t.Error(diff)
	}
	_, text := everything(t)
	for _, text := range []string{string(Example()), text} {
		if err := fits(t, []byte(text)); err != nil {
			t.Error(err)
		}
	}
}

func FuzzLoad(f *testing.F) {
	for _, text := range []string{ // small ones: the engine spends a minute on making a large one small
		"listen: 127.0.0.1:0\ndata: /x\n",
		"capacity: 80%\nlog: {format: json, level: warn}\n",
		"hosts:\n  q: docker.io\nserver_names: [m]\npublic: [docker.io/library/*]\n",
		"tags: {fresh_for: 1.5s, max_stale: 7d, on_denied: stale}\n",
		"default_registry: q.io\nregistries:\n  q.io: {upstreams: [{url: https://q.io, repository_prefix: a/}]}\n",
		"registries: {docker.io: {repositories: {a/b: {tags: {max_stale: unlimited}}}}}\n",
		"any_registry: true\n---\n",
		"completion: {images: kept, bytes_per_day: 1GiB}\nkeep: [{image: docker.io/alpine:3, platforms: [linux/arm/v7], every: 1h}]\n",
		"registries: {q.io: {upstreams: [{url: https://q.io, tags: false, proxy: none, redirect_hosts: [a, 'b:5'], trusted_realms: [c], credentials: {helper: h}}]}}\n",
		"registries: {q.io: {upstreams: [{url: https://q.io, tags: true, credentials: {ecr: {region: us-east-1}}}]}}\n",
		"listen: ':0'\naccess: {anonymous: true, rules: [{repositories: [docker.io/a/*], allow: [anonymous]}]}\n",
		"access: {loopback: asked, htpasswd: KEY, plain_http: true, rules: [{repositories: ['*.io/a'], allow: ['*']}]}\n",
		"access: {loopback: asked, token: {realm: 'https://a/t', service: s, issuer: i, keys_file: KEY}}\n",
		"shared: {s3: {bucket: b-1, prefix: a/b, endpoint: 'http://h:1/', path_style: true, encryption: 'aws:kms', kms_key: k}, key_file: KEY, wait: 1s, read_only: true}\n",
		"a: &a [*a]\n<<: *a\n? {b: c}\n: d\n",
	} {
		f.Add([]byte(text))
	}
	key := filepath.Join(f.TempDir(), "fleet.key")
	if err := os.WriteFile(key, []byte("x"), 0o600); err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, text []byte) {
		c, err := load("fuzz.yaml", bytes.ReplaceAll(text, []byte("KEY"), []byte(key)), nil, nil)
		if err != nil {
			return
		}
		if err := c.Validate(); err != nil {
			t.Fatalf("loaded, and not valid: %v", err)
		}
		shown, err := c.Show()
		if err != nil {
			t.Fatal(err)
		}
		again, err := load("fuzz.yaml", shown, nil, nil)
		if err != nil {
			t.Fatalf("%v\n%s", err, shown)
		}
		if diff := cmp.Diff(c, again, same); diff != "" {
			t.Fatal(diff)
		}
	})
}

func TestRuleFor(t *testing.T) {
	a := Access{Rules: []Rule{
		{Repositories: []string{"quay.io/org/secret"}, Allow: []string{"deploy"}},
		{Repositories: []string{"quay.io/org/*", "*/library/*"}, Allow: []string{AllowKnown}},
		{Repositories: []string{"quay.io/*"}, Allow: []string{AllowAnybody}},
	}}
	for name, want := range map[string][]string{"quay.io/org/secret": {"deploy"}, "quay.io/org/secret/sub": {AllowKnown}, "docker.io/library/alpine": {AllowKnown}, "quay.io/other/app": {AllowAnybody}, "docker.io/org/app": nil} {
		registry, rest, _ := strings.Cut(name, "/")
		if got, ok := a.RuleFor(oci.Repository{Registry: registry, Name: rest}); ok != (want != nil) || !slices.Equal(got, want) {
			t.Errorf("%s: %v %v", name, got, ok)
		}
	}
}

func TestIsPrivate(t *testing.T) {
	c := Config{Public: []string{"a.io/library/*"}, Registries: map[string]Registry{
		"a.io": {Upstreams: []Upstream{{URL: "https://a.io"}, {URL: "https://b.io", Credentials: Credentials{ECR: &ECR{}}}}},
		"b.io": {Upstreams: []Upstream{{URL: "https://b.io", ClientCert: TLS{"c", "k"}}}},
		"c.io": {Upstreams: []Upstream{{URL: "https://c.io"}}},
	}}
	for name, want := range map[string]bool{"a.io/org/app": true, "a.io/library/app": false, "b.io/library/app": true, "c.io/org/app": false, "d.io/org/app": false} {
		registry, rest, _ := strings.Cut(name, "/")
		if got := c.IsPrivate(oci.Repository{Registry: registry, Name: rest}); got != want {
			t.Errorf("%s: %v", name, got)
		}
	}
}

// TestAccessDefaults holds when loopback is trusted: not where something in front may come from there.
func TestAccessDefaults(t *testing.T) {
	file := filepath.Join(folder(t), "good.pw")
	for text, want := range map[string]string{
		"": "",
		"listen: ':5000'\naccess: {anonymous: true}\n":                                            LoopbackOpen,
		"listen: ':5000'\naccess: {htpasswd: " + file + ", plain_http: true}\n":                   LoopbackAsked,
		"listen: ':5000'\naccess: {htpasswd: " + file + ", plain_http: true, loopback: open}\n":   LoopbackOpen,
		"listen: '[::ffff:127.0.0.1]:5000'\naccess: {htpasswd: " + file + ", plain_http: true}\n": LoopbackAsked,
		"listen: 127.0.0.1:5000\naccess: {htpasswd: " + file + ", loopback: asked}\n":             LoopbackAsked,
		"listen: 10.0.0.1:5000\naccess: {anonymous: true}\npublic: [docker.io/*]\nregistries: {docker.io: {upstreams: [{url: https://registry-1.docker.io, credentials: {username: u, password_file: " + file + "}}]}}\n": LoopbackOpen,
	} {
		c, err := load("c.yaml", []byte(text), nil, nil)
		if err != nil || c.Access.Loopback != want {
			t.Errorf("%q: %v, %+v", text, err, c)
		}
	}
}
