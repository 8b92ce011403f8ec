//go:build linux

package main_test

import (
	"bufio"
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"breakwater/pkg/registrytest"
)

// TestProgramTellsNoSecrets runs the real binary with an account, lets go wrong what can, and searches
// all that it says, at debug level.
func TestProgramTellsNoSecrets(t *testing.T) {
	ca := registrytest.NewCA()
	certificate, err := ca.Certificate("127.0.0.1", time.Time{})
	if err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	url := "https://" + l.Addr().String()
	reg := registrytest.New(registrytest.Config{CDN: url, Auth: registrytest.Auth{Scheme: "Bearer", Users: map[string]string{"robot": registrytest.Canary}}})
	up := registrytest.Serve(l, reg, certificate)
	defer up.Close()
	image := registrytest.NewImage(registrytest.Layer(1, 1000), registrytest.Layer(2, 1000), registrytest.Layer(3, 1000), registrytest.Layer(4, 1000))
	reg.Push("org/app", "latest", image)

	dir := t.TempDir()
	write := func(name string, text []byte) string {
		file := filepath.Join(dir, name)
		if err := os.WriteFile(file, text, 0o600); err != nil {
			t.Fatal(err)
		}
		return file
	}
	config := write("config.yaml", fmt.Appendf(nil, "log: {level: debug}\ndefault_registry: quay.test\nregistries: {quay.test: {upstreams: [{url: %q, ca_file: %q, credentials: {username: robot, password_file: %q}}]}}\n",
		url, write("ca.pem", ca.PEM()), write("password", []byte(registrytest.Canary))))
	program := binary(t)
	var said bytes.Buffer
	for _, args := range [][]string{{"config", "show", config}, {"config", "check", config}} {
		out, err := exec.Command(program, args...).CombinedOutput()
		if err != nil {
			t.Errorf("%v: %v", args, err)
		}
		said.Write(out)
	}

	cmd := exec.Command(program, "serve", "--config", config, "--data", filepath.Join(dir, "data"), "--listen", "127.0.0.1:0", "--admin", "127.0.0.1:0", "--log-format", "json")
	out, in, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer out.Close()
	cmd.Stdout, cmd.Stderr = in, in
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = cmd.Process.Kill() }()
	_ = in.Close()
	var serving struct{ Msg, Listen, Admin string }
	lines := bufio.NewReader(io.TeeReader(out, &said))
	for serving.Msg != "serving" {
		line, err := lines.ReadBytes('\n')
		if err != nil || json.Unmarshal(line, &serving) != nil {
			t.Fatalf("%v: %s", err, said.Bytes())
		}
	}
	ended := make(chan error, 1)
	go func() {
		_, err := io.Copy(io.Discard, lines)
		ended <- err
	}()

	var told bytes.Buffer // said is the log's, until the end
	get := func(address, path string) int {
		req, err := http.NewRequest(http.MethodGet, "http://"+address+path, nil)
		if err != nil {
			t.Fatal(err)
		}
		req.Header.Set("Authorization", "Bearer "+registrytest.Canary) // a client's own
		resp, err := http.DefaultClient.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		_ = resp.Header.Write(&told)
		_, _ = io.Copy(&told, resp.Body)
		return resp.StatusCode
	}
	manifest, blob := "/v2/quay.test/org/app/manifests/latest", func(i int) string { return "/v2/quay.test/org/app/blobs/" + image.Blobs[i].Digest.String() }
	if status := get(serving.Listen, manifest) + get(serving.Listen, blob(0)); status != 400 {
		t.Fatalf("the account does not work: %s%s", told.Bytes(), said.Bytes())
	}
	for i, fault := range []registrytest.Fault{registrytest.Status(403), registrytest.Truncate(10), registrytest.Portal(), registrytest.Status(307, "Location", "ftp://cdn.test/"+registrytest.Canary)} {
		remove := reg.Fault(registrytest.Match{Kind: registrytest.KindCDN}, fault)
		get(serving.Listen, blob(i+1))
		remove()
	}
	write("password", []byte(registrytest.Canary+"-new"))
	reg.Revoke()
	get(serving.Listen, manifest)
	get(serving.Listen, manifest+"?token="+registrytest.Canary)
	write("config.yaml", []byte("registries: {quay.test: {upstreams: [{url: https://robot:"+registrytest.Canary+"@127.0.0.1}]}}\n"))
	if err := cmd.Process.Signal(syscall.SIGHUP); err != nil {
		t.Fatal(err)
	}
	for _, path := range []string{"/readyz", "/metrics", "/healthz", "/"} {
		get(serving.Admin, path)
	}
	if err := cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	if err := <-ended; err != nil {
		t.Fatal(err)
	}
	if err := cmd.Wait(); err != nil {
		t.Error(err)
	}
	for what, text := range map[string]string{"the log": said.String(), "an answer": told.String()} {
		if leak := registrytest.Leak(text); leak != "" || text == "" {
			t.Errorf("%s tells a secret: %s", what, leak)
		}
	}
	if !bytes.Contains(said.Bytes(), []byte(`"level":"DEBUG"`)) || !bytes.Contains(said.Bytes(), []byte("configuration not reloaded")) {
		t.Errorf("not much was said:\n%s", said.Bytes())
	}
}
