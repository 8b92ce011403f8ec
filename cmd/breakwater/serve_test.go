package main

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"breakwater/pkg/registrytest"
)

// served is serve running in this process.
type served struct {
	*testing.T
	file          string
	listen, admin string
	log           <-chan map[string]any
}

// startServe runs serve with the configuration, which is the host's, until the test ends.
func startServe(t *testing.T, yaml string) *served {
	t.Helper()
	dir := t.TempDir()
	s := &served{T: t, file: filepath.Join(dir, "config.yaml")}
	s.write(yaml)
	out, in := io.Pipe()
	lines := make(chan map[string]any, 1000)
	s.log = lines
	go func() {
		defer close(lines)
		for dec := json.NewDecoder(out); ; {
			var line map[string]any
			if dec.Decode(&line) != nil {
				return
			}
			lines <- line
		}
	}()
	ctx, cancel := context.WithCancel(context.Background())
	cmd := rootCommand(s.file)
	cmd.SetArgs([]string{"serve", "--listen", "127.0.0.1:0", "--admin", "127.0.0.1:0", "--data", filepath.Join(dir, "data"), "--log-format", "json"})
	cmd.SetErr(io.MultiWriter(registrytest.Watch(t), in))
	ended := make(chan error, 1)
	go func() {
		ended <- cmd.ExecuteContext(ctx)
		_ = in.Close()
	}()
	t.Cleanup(func() {
		cancel()
		if err := <-ended; err != nil {
			t.Error(err)
		}
	})
	if first := <-s.log; first["msg"] != "starting" || first["config"] != s.file {
		t.Errorf("the first line does not say which file is read: %v", first)
	}
	line := s.await("serving")
	s.listen, _ = line["listen"].(string)
	s.admin, _ = line["admin"].(string)
	return s
}

func (s *served) write(yaml string) {
	s.Helper()
	if err := os.WriteFile(s.file, []byte(yaml), 0o600); err != nil {
		s.Fatal(err)
	}
}

// await returns the next log line whose message begins so.
func (s *served) await(message string) map[string]any {
	s.Helper()
	timeout := time.After(20 * time.Second)
	for {
		select {
		case line, ok := <-s.log:
			if !ok {
				s.Fatalf("the log ended before %q", message)
			}
			if msg, _ := line["msg"].(string); strings.HasPrefix(msg, message) {
				return line
			}
		case <-timeout:
			s.Fatalf("no %q in the log", message)
		}
	}
}

func (s *served) get(url string) (int, string) {
	s.Helper()
	resp, err := http.Get(url)
	if err != nil {
		s.Fatal(err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		s.Fatal(err)
	}
	return resp.StatusCode, string(body)
}

func TestReloadByHangup(t *testing.T) {
	reg := registrytest.New(registrytest.Config{})
	reg.Push("org/app", "latest", registrytest.NewImage(registrytest.Layer(1, 100)))
	one := "registries: {docker.io: {upstreams: [{url: \"" + reg.Start(t).URL + "\"}]}"
	s := startServe(t, one+"}\n")
	manifest := "http://" + s.listen + "/v2/quay.test/org/app/manifests/latest"
	if status, body := s.get(manifest); status != http.StatusNotFound || !strings.Contains(body, "NAME_UNKNOWN") {
		t.Errorf("before: %d %s", status, body)
	}
	s.write("registries: [\n")
	hangup(t)
	s.await("configuration not reloaded")
	if err := os.Remove(s.file); err != nil {
		t.Fatal(err)
	}
	hangup(t)
	if line := s.await("configuration"); line["msg"] != "configuration not reloaded; the old one stays in force" {
		t.Errorf("without the file that was read: %v", line)
	}
	s.write(one + ", quay.test: {upstreams: [{url: \"" + reg.Start(t).URL + "\"}]}}\n")
	hangup(t)
	s.await("configuration reloaded")
	if status, body := s.get(manifest); status != http.StatusOK {
		t.Errorf("after: %d %s", status, body)
	}
	s.write(one + "}\nshared: {s3: {bucket: builds, region: us-east-1}, key_file: fleet.key}\n")
	if err := os.WriteFile(filepath.Join(filepath.Dir(s.file), "fleet.key"), []byte(strings.Repeat("5a", 32)+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	hangup(t)
	if msg := s.await("configuration reloaded")["msg"].(string); !strings.Contains(msg, "shared change at the next start") {
		t.Errorf("with a shared store: %s", msg)
	}
}

func TestStopDoesNotWaitForUnusedConnections(t *testing.T) {
	s := startServe(t, "")
	conn, err := net.Dial("tcp", s.listen)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	s.get("http://" + s.listen + "/v2/") // by now the server has accepted both
	started := time.Now()
	if err := syscall.Kill(os.Getpid(), syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	s.await("stopped")
	if took := time.Since(started); took > 4*time.Second {
		t.Errorf("stopped after %v", took)
	}
}

func hangup(t *testing.T) {
	t.Helper()
	if err := syscall.Kill(os.Getpid(), syscall.SIGHUP); err != nil {
		t.Fatal(err)
	}
}

func TestAdminAndH45(t *testing.T) {
	reg := registrytest.New(registrytest.Config{})
	reg.Push("org/app", "latest", registrytest.NewImage(registrytest.Layer(1, 100)))
	s := startServe(t, "registries: {docker.io: {upstreams: [{url: \""+reg.Start(t).URL+"\"}]}}\n")
	s.get("http://" + s.listen + "/v2/org/app/manifests/latest")
	reg.Fault(registrytest.Match{}, registrytest.Status(http.StatusServiceUnavailable))
	for _, tag := range []string{"a", "b", "c", "latest"} {
		s.get("http://" + s.listen + "/v2/org/app/manifests/" + tag)
	}
	for path, want := range map[string][]string{
		"/healthz": {"ok"},
		"/readyz":  {"ok", "docker.io: upstream 127.0.0.1", "manifest open since", "answered 503"},
		"/metrics": {
			`breakwater_breaker_state{class="manifest",registry="docker.io",state="open",`,
			`breakwater_stale_answers_total{registry="docker.io"} 1`,
			`breakwater_requests_total{cache="hit",kind="manifest",method="GET",status="200"} 1`,
			`breakwater_upstream_requests_total{class="manifest",registry="docker.io",`,
			"\nbreakwater_fills ",
		},
	} {
		status, body := s.get("http://" + s.admin + path)
		for _, w := range want {
			if status != http.StatusOK || !strings.Contains(body, w) {
				t.Errorf("admin %s: %d, no %q in\n%s", path, status, w, body)
			}
		}
		if status, _ := s.get("http://" + s.listen + path); status != http.StatusNotFound {
			t.Errorf("%s is on the registry's port: %d", path, status)
		}
	}
	if status, _ := s.get("http://" + s.admin + "/debug/pprof/"); status != http.StatusNotFound {
		t.Errorf("pprof is on: %d", status)
	}
	resp, err := http.Post("http://"+s.admin+"/metrics", "text/plain", nil)
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
	if resp.StatusCode != http.StatusMethodNotAllowed {
		t.Errorf("POST to admin: %d", resp.StatusCode)
	}
}

func TestTLS(t *testing.T) {
	ca := registrytest.NewCA()
	cert, err := ca.Certificate("127.0.0.1", time.Time{})
	if err != nil {
		t.Fatal(err)
	}
	key, err := x509.MarshalPKCS8PrivateKey(cert.PrivateKey)
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	for name, block := range map[string]*pem.Block{
		"cert.pem": {Type: "CERTIFICATE", Bytes: cert.Certificate[0]},
		"key.pem":  {Type: "PRIVATE KEY", Bytes: key},
	} {
		if err := os.WriteFile(filepath.Join(dir, name), pem.EncodeToMemory(block), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	s := startServe(t, "tls: {cert_file: "+dir+"/cert.pem, key_file: "+dir+"/key.pem}\n")
	client := &http.Client{Transport: &http.Transport{TLSClientConfig: &tls.Config{RootCAs: ca.Pool()}, ForceAttemptHTTP2: true}}
	defer client.CloseIdleConnections()
	resp, err := client.Get("https://" + s.listen + "/v2/")
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
	if resp.StatusCode != http.StatusOK || resp.ProtoMajor != 2 {
		t.Errorf("%d over HTTP/%d", resp.StatusCode, resp.ProtoMajor)
	}
}

// TestUsualFile holds which file commands read: the host's, if it is there, unless they are told of another.
func TestUsualFile(t *testing.T) {
	dir := t.TempDir()
	usual, other, missing := filepath.Join(dir, "usual.yaml"), filepath.Join(dir, "other.yaml"), filepath.Join(dir, "missing.yaml")
	for file, text := range map[string]string{usual: "lisen: x\n", other: "lisen: y\n"} {
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	run := func(host string, args ...string) string {
		var out bytes.Buffer
		cmd := rootCommand(host)
		cmd.SetArgs(args)
		cmd.SetOut(&out)
		cmd.SetErr(&out)
		if err := cmd.Execute(); err != nil {
			out.WriteString(err.Error())
		}
		return out.String()
	}
	nowhere := " --data " + dir + "/usual.yaml/data" // below a file: nothing is made
	for _, command := range []string{"status" + nowhere, "verify" + nowhere, "rm org/app" + nowhere, "warm org/app --mirror http://127.0.0.1:9", "shared gc", "setup containerd --certs-d " + dir,
		"setup data --owner 0:0" + nowhere, "serve --listen 127.0.0.1:0 --admin 127.0.0.1:0" + nowhere, "config check", "config show"} {
		args := strings.Fields(command)
		reading := func(file string) []string {
			if args[0] == "config" {
				return append(slices.Clone(args), file)
			}
			return append(slices.Clone(args), "--config", file)
		}
		const wrong = "lisen: unknown"
		for _, row := range []struct {
			what, said, want string
			wrong            bool
		}{
			{"usual", run(usual, args...), usual + ":1", true},
			{"other", run(usual, reading(other)...), other + ":1", true},
			{"named and missing", run(usual, reading(missing)...), missing + ": no such file", false},
			{"none", run(usual, reading("")...), "", false},
			{"no usual one", run(missing, args...), "", false},
		} {
			if !strings.Contains(row.said, row.want) || strings.Contains(row.said, wrong) != row.wrong || strings.Contains(row.said, missing) != strings.Contains(row.want, missing) {
				t.Errorf("%s, %s: said\n%s", command, row.what, row.said)
			}
		}
	}
	if said := run(usual, "config", "check", ""); !strings.Contains(said, "the configuration is good (no file)") {
		t.Errorf("config check '': %s", said)
	}
}

func TestCommands(t *testing.T) {
	dir := t.TempDir()
	write := func(name, text string) string {
		file := filepath.Join(dir, name)
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		return file
	}
	bad := write("bad.yaml", "listen: 0.0.0.0:5000\nlisen: x\n")
	account := func(how string) string {
		return "default_registry: quay.io\nregistries: {quay.io: {upstreams: [{url: https://quay.io, credentials: {" + how + "}}]}}\n"
	}
	good := write("good.yaml", account("username: robot, password_file: "+write("password", registrytest.Canary)))
	clear := write("clear.yaml", account("username: robot, password: "+registrytest.Canary))
	inURL := write("url.yaml", "registries: {quay.io: {upstreams: [{url: https://robot:"+registrytest.Canary+"@quay.io}]}}\n")
	guarded := write("guarded.yaml", "access: {htpasswd: "+write("htpasswd", "# names\nci:$apr1$r31.....$HqJZimcKQFAMYayBlzkrA/\n")+", loopback: asked}\n")
	certified := write("certified.yaml", "tls: {cert_file: "+good+", key_file: "+good+"}\n")
	open := write("open.yaml", "listen: ':5000'\naccess: {anonymous: true}\n"+account("username: robot, password_file: "+write("password", registrytest.Canary)))
	tests := []struct {
		args  []string
		want  []string // of output or error
		fails bool
	}{
		{args: []string{"version"}, want: []string{"breakwater devel"}},
		{args: []string{"config", "check"}, want: []string{"the configuration is good"}},
		{args: []string{"config", "check", bad}, want: []string{bad + ":1", "access", bad + ":2", "listen"}, fails: true},
		{args: []string{"config", "show"}, want: []string{"quay.io", "fresh_for: 0s"}},
		{args: []string{"config", "show", good}, want: []string{"robot", "password_file:"}},
		{args: []string{"config", "check", clear}, want: []string{"clear.yaml:2", "password"}, fails: true},
		{args: []string{"config", "check", inURL}, want: []string{"url.yaml:1", "url"}, fails: true},
		{args: []string{"serve", "--config", inURL}, want: []string{"url.yaml:1"}, fails: true},
		{args: []string{"config", "check", guarded}, want: []string{"access.htpasswd: " + filepath.Join(dir, "htpasswd") + ":2: not a bcrypt hash", "`htpasswd -nB NAME`"}, fails: true},
		{args: []string{"serve", "--config", guarded, "--data", filepath.Join(dir, "data"), "--listen", "127.0.0.1:0", "--admin", "127.0.0.1:0"}, want: []string{"htpasswd:2: not a bcrypt hash"}, fails: true},
		{args: []string{"config", "check", certified}, want: []string{"tls: ", "good.yaml"}, fails: true},
		{args: []string{"config", "check", open}, want: []string{"open.yaml:4", "registries.quay.io", "public", "htpasswd"}, fails: true},
		{args: []string{"serve", "--config", open}, want: []string{"open.yaml:4"}, fails: true},
		{args: []string{"config", "schema"}, want: []string{"json-schema.org"}},
		{args: []string{"config", "example"}, want: []string{"registries:"}},
		{args: []string{"serve", "--config", bad}, want: []string{bad + ":2"}, fails: true},
		{args: []string{"serve", "--colour"}, want: []string{"--colour"}, fails: true},
		{args: []string{"serve", "--help"}, want: []string{"Examples:", "--config FILE", "SIGHUP"}},
		{args: []string{"completion", "bash"}, want: []string{"complete"}},
	}
	for _, test := range tests {
		var out bytes.Buffer
		cmd := rootCommand(filepath.Join(dir, "none.yaml"))
		cmd.SetArgs(test.args)
		cmd.SetOut(&out)
		cmd.SetErr(&out)
		err := cmd.Execute()
		if (err != nil) != test.fails {
			t.Errorf("%v: %v", test.args, err)
		}
		said := out.String()
		if err != nil {
			said += err.Error()
		}
		if leak := registrytest.Leak(said); leak != "" {
			t.Errorf("%v tells a secret: %s", test.args, leak)
		}
		for _, want := range test.want {
			if !strings.Contains(said, want) {
				t.Errorf("%v: no %q in\n%s", test.args, want, said)
			}
		}
	}
}
