//go:build linux && cluster

package charts_test

import (
	"archive/tar"
	"bufio"
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/big"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	v1 "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/crypto/bcrypt"
)

const (
	bucketAccount, bucketSecret = "breakwater", "bucket-secret"
	// webSize is more than sockets and pipes between the mirror and its client hold.
	webSize = 64 << 20
	// secondSelf tells this program, run on the node's network, what to ask there; with holdDownload it
	// stops after the first MiB until it reads a line.
	secondSelf, holdDownload = "CLUSTER_TEST_GET", "CLUSTER_TEST_HOLD"
)

func TestMain(m *testing.M) {
	if url := os.Getenv(secondSelf); url != "" {
		if err := askOnNode(url); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

func askOnNode(url string) error {
	resp, err := ask(url)
	if err != nil {
		return err
	}
	if os.Getenv(holdDownload) == "" {
		_, err = io.Copy(os.Stdout, resp.Body)
		return err
	}
	hash := sha256.New()
	if _, err := io.CopyN(hash, resp.Body, 1<<20); err != nil {
		return err
	}
	fmt.Println("begun")
	if _, err := bufio.NewReader(os.Stdin).ReadString('\n'); err != nil {
		return err
	}
	if _, err := io.Copy(hash, resp.Body); err != nil {
		return err
	}
	fmt.Printf("sha256:%x\n", hash.Sum(nil))
	return nil
}

// cluster is the one of cluster.sh.
type cluster struct {
	script, dir string
	content     map[string]bool // what containerd stores without our registry's images
}

// startCluster starts the cluster, and ends it with the test if it was not there before.
func startCluster(t *testing.T) *cluster {
	t.Helper()
	if os.Getuid() != 0 {
		cannot(t, "a cluster takes root")
	}
	script := os.Getenv("CLUSTER_SH")
	if script == "" {
		script = "../../shared/cluster/cluster.sh"
	}
	script, err := filepath.Abs(script)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(script); err != nil {
		cannot(t, "%v: say by CLUSTER_SH where it is", err)
	}
	c := &cluster{script: script, dir: t.TempDir()}
	if exec.Command(script, "status").Run() != nil {
		t.Cleanup(func() { run(t, script, "down") })
		run(t, script, "up")
	}
	for line := range strings.Lines(string(run(t, "bash", "-c", `eval "$("$0" env)" && printf 'KUBECONFIG=%s\nPATH=%s\n' "$KUBECONFIG" "$PATH"`, script))) {
		name, value, _ := strings.Cut(strings.TrimSpace(line), "=")
		t.Setenv(name, value)
	}
	// Pods on the node's network, with its folders, are refused at any other level.
	feed(t, []byte(`{apiVersion: v1, kind: Namespace, metadata: {name: `+namespace+`, labels: {pod-security.kubernetes.io/enforce: privileged}}}`), "kubectl", "apply", "--filename", "-")
	t.Cleanup(func() { c.kubectl(t, "delete", "namespace", namespace, "--timeout=120s") })
	within(t, patience, func() error {
		_, err := c.try("kubectl", "--namespace", namespace, "get", "serviceaccount", "default")
		return err
	})
	return c
}

// try runs a program, kubectl for example.
func (c *cluster) try(program string, args ...string) ([]byte, error) {
	out, err := exec.Command(program, args...).CombinedOutput()
	if err != nil {
		err = fmt.Errorf("%s %q: %w\n%s", filepath.Base(program), args, err, out)
	}
	return out, err
}

func (c *cluster) kubectl(t *testing.T, args ...string) []byte {
	t.Helper()
	out, err := c.try("kubectl", append([]string{"--namespace", namespace}, args...)...)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// helm runs one of the two, with these values.
func (c *cluster) helm(t *testing.T, helm, values string, args ...string) {
	t.Helper()
	args = append(args, "--namespace", namespace)
	if values != "" {
		file := filepath.Join(t.TempDir(), "values.yaml")
		if err := os.WriteFile(file, []byte(values), 0o600); err != nil {
			t.Fatal(err)
		}
		args = append(args, "--values", file)
	}
	out, err := c.try(cache(t, helm), args...)
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("helm %s: %s", args[0], out)
}

// exec runs a program on the node.
func (c *cluster) exec(t *testing.T, input []byte, args ...string) []byte {
	t.Helper()
	return feed(t, input, c.script, append([]string{"exec"}, args...)...)
}

// net is a program of this machine on the node's network.
func (c *cluster) net(args ...string) *exec.Cmd {
	return exec.Command(c.script, append([]string{"net"}, args...)...)
}

func (c *cluster) write(t *testing.T, file, content, mode string) {
	t.Helper()
	c.exec(t, []byte(content), "sh", "-c", `mkdir -p "${0%/*}" && cat >"$0" && chmod "$1" "$0"`, file, mode)
}

// entry is a file or a folder, but for its time.
type entry struct {
	Kind    byte
	Mode    int64
	Owner   [2]int
	To      string
	Content string
}

// certsD is all that is in containerd's folder.
func (c *cluster) certsD(t *testing.T) map[string]entry {
	t.Helper()
	found := map[string]entry{}
	for r := tar.NewReader(bytes.NewReader(c.exec(t, nil, "tar", "-C", "/etc/containerd", "-cf", "-", "certs.d"))); ; {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			return found
		}
		if err != nil {
			t.Fatal(err)
		}
		content, err := io.ReadAll(r)
		if err != nil {
			t.Fatal(err)
		}
		found[h.Name] = entry{h.Typeflag, h.Mode, [2]int{h.Uid, h.Gid}, h.Linkname, string(content)}
	}
}

// get asks on the node's network, and writes the answer to out, if that is not nil. Variables are "NAME=value".
func (c *cluster) get(url string, out io.Writer, variables ...string) error {
	cmd := c.net(slices.Concat([]string{"env", secondSelf + "=" + url}, variables, []string{os.Args[0]})...)
	var said bytes.Buffer
	cmd.Stdout, cmd.Stderr = out, &said
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("%w: %s", err, said.Bytes())
	}
	return nil
}

// download is one that has begun, and waits.
type download struct {
	cmd *exec.Cmd
	in  io.WriteCloser
	out *bufio.Reader
	err *bytes.Buffer
}

func (c *cluster) download(t *testing.T, url string) *download {
	t.Helper()
	d := &download{cmd: c.net("env", secondSelf+"="+url, holdDownload+"=1", os.Args[0]), err: &bytes.Buffer{}}
	in, err := d.cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := d.cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	d.in, d.out, d.cmd.Stderr = in, bufio.NewReader(out), d.err
	if err := d.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = d.cmd.Process.Kill(); _ = d.cmd.Wait() })
	if line, err := d.out.ReadString('\n'); line != "begun\n" {
		t.Fatalf("the download has not begun: %q %v %s", line, err, d.err)
	}
	return d
}

// finish returns the digest of all that was downloaded, or what went wrong.
func (d *download) finish(t *testing.T) string {
	t.Helper()
	if _, err := io.WriteString(d.in, "\n"); err != nil {
		return err.Error()
	}
	line, err := d.out.ReadString('\n')
	if err != nil {
		_ = d.cmd.Wait()
		return fmt.Sprint(err, d.err)
	}
	return strings.TrimSpace(line)
}

// loadMirror makes the mirror's image as it is released, and gives it to the node.
func (c *cluster) loadMirror(t *testing.T) {
	t.Helper()
	const version = "0.1.0" // the chart's appVersion
	dist := t.TempDir()
	cmd := exec.Command("go", "run", "./cmd/pack", "-o", dist, "image")
	cmd.Dir, cmd.Env = "..", append(os.Environ(), "VERSION="+version, "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("pack: %v\n%s", err, out)
	}
	layout := filepath.Join(dist, "image")
	file := filepath.Join(layout, v1.ImageIndexFile)
	raw, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	var index v1.Index
	if err := json.Unmarshal(raw, &index); err != nil {
		t.Fatal(err)
	}
	index.Manifests = slices.DeleteFunc(index.Manifests, func(d v1.Descriptor) bool { return d.Annotations[v1.AnnotationRefName] != version })
	if len(index.Manifests) != 1 {
		t.Fatalf("%d images are called %s", len(index.Manifests), version)
	}
	index.Manifests[0].Annotations[v1.AnnotationRefName] = "localhost/breakwater:" + version // with a name of its own it needs no prefix
	if raw, err = json.Marshal(index); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(file, raw, 0o644); err != nil {
		t.Fatal(err)
	}
	archive := filepath.Join(c.dir, "mirror.tar")
	run(t, "tar", "-C", layout, "-cf", archive, ".")
	run(t, c.script, "load", archive)
}

// serveImages starts a registry on the node's network and pushes two images.
func (c *cluster) serveImages(t *testing.T) *process {
	t.Helper()
	crane := cache(t, "bin/crane")
	p := start(t, c.net(crane, "registry", "serve", "--address", "0.0.0.0:5050"))
	within(t, patience, func() error { return c.get("http://127.0.0.1:5050/v2/", nil) })
	for _, image := range []struct {
		name string
		size int64
	}{{"web", webSize}, {"hello", 0}} {
		archive := filepath.Join(c.dir, image.name+".tar")
		if _, err := os.Stat(archive); errors.Is(err, fs.ErrNotExist) { // the same bytes each time
			run(t, c.script, "image", image.name+":1", c.program(t, image.name, image.size), archive)
		}
		out, err := c.net(crane, "push", "--insecure", archive, "127.0.0.1:5050/team/"+image.name+":1").CombinedOutput()
		if err != nil {
			t.Fatalf("push: %v\n%s", err, out)
		}
	}
	return p
}

// program says something and ends; it has size random bytes behind it.
func (c *cluster) program(t *testing.T, name string, size int64) string {
	t.Helper()
	dir := filepath.Join(c.dir, "src-"+name)
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	source, program := filepath.Join(dir, "main.go"), filepath.Join(dir, name)
	if err := os.WriteFile(source, []byte("package main\n\nfunc main() { println(\"here I am\") }\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("go", "build", "-o", program, source)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("build: %v\n%s", err, out)
	}
	f, err := os.OpenFile(program, os.O_APPEND|os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := io.CopyN(f, rand.Reader, size); err != nil {
		t.Fatal(err)
	}
	return program
}

// serveBucket starts an S3 server on the node's network, with a bucket in the folder that it returns.
func (c *cluster) serveBucket(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	if err := os.Mkdir(filepath.Join(dir, "builds"), 0o755); err != nil {
		t.Fatal(err)
	}
	start(t, c.net(cache(t, "bin/versitygw"), "--port", "0.0.0.0:7070", "--access", bucketAccount, "--secret", bucketSecret, "--health", "/health", "--quiet", "posix", dir))
	within(t, patience, func() error { return c.get("http://127.0.0.1:7070/health", nil) })
	return dir
}

// putAccess makes an authority, a certificate of it for the node's addresses, and a password, and puts them into
// Secrets. It returns the file with the authority's certificate.
func (c *cluster) putAccess(t *testing.T) string {
	t.Helper()
	issue := func(template, parent *x509.Certificate, signer *ecdsa.PrivateKey) ([]byte, *ecdsa.PrivateKey) {
		t.Helper()
		key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		if signer == nil {
			signer = key
		}
		template.SerialNumber, template.NotBefore, template.NotAfter = big.NewInt(time.Now().UnixNano()), time.Now().Add(-time.Hour), time.Now().Add(24*time.Hour)
		public, err := x509.CreateCertificate(rand.Reader, template, parent, key.Public(), signer)
		if err != nil {
			t.Fatal(err)
		}
		return public, key
	}
	authority := &x509.Certificate{Subject: pkix.Name{CommonName: "authority"}, IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign}
	root, signer := issue(authority, authority, nil)
	leaf, key := issue(&x509.Certificate{IPAddresses: []net.IP{net.ParseIP("127.0.0.1"), net.ParseIP(nodeAddress)}}, authority, signer)
	private, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	hash, err := bcrypt.GenerateFromPassword([]byte("password"), bcrypt.MinCost)
	if err != nil {
		t.Fatal(err)
	}
	login := base64.StdEncoding.EncodeToString([]byte("ci:password"))
	dir := t.TempDir()
	for secret, files := range map[string]map[string]string{
		"mirror-tls": {
			"ca.crt":  string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: root})),
			"tls.crt": string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: leaf})),
			"tls.key": string(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: private})),
		},
		"mirror-passwords": {"htpasswd": "ci:" + string(hash) + "\n", "header": "Basic " + login,
			"config.json": fmt.Sprintf(`{"auths": {"127.0.0.1:5000": {"auth": %q}}}`, login)},
	} {
		args := []string{"create", "secret", "generic", secret}
		for name, content := range files {
			file := filepath.Join(dir, name)
			if err := os.WriteFile(file, []byte(content), 0o600); err != nil {
				t.Fatal(err)
			}
			args = append(args, "--from-file="+file)
		}
		c.kubectl(t, args...)
	}
	return filepath.Join(dir, "ca.crt")
}

// largestBlob is that of an image of the registry's for one platform.
func (c *cluster) largestBlob(t *testing.T, image string) string {
	t.Helper()
	repository, tag, _ := strings.Cut(image, ":")
	var raw bytes.Buffer
	if err := c.get(mirrorAt+"/v2/"+repository+"/manifests/"+tag, &raw); err != nil {
		t.Fatal(err)
	}
	var manifest v1.Manifest
	if err := json.Unmarshal(raw.Bytes(), &manifest); err != nil || len(manifest.Layers) == 0 {
		t.Fatalf("%v: %s", err, raw.Bytes())
	}
	return slices.MaxFunc(manifest.Layers, func(a, b v1.Descriptor) int { return int(a.Size - b.Size) }).Digest.String()
}

// runPod runs an image to its end. Its manifest is asked for whatever the node has.
func (c *cluster) runPod(t *testing.T, name, image string) {
	t.Helper()
	c.kubectl(t, "run", name, "--image="+image, "--image-pull-policy=Always", "--restart=Never")
	if _, err := c.try("kubectl", "--namespace", namespace, "wait", "--for=jsonpath={.status.phase}=Succeeded", "pod/"+name, "--timeout=180s"); err != nil {
		t.Fatal(err)
	}
	c.kubectl(t, "delete", "pod", name, "--timeout=60s")
}

// wipeImages has containerd forget the images of our registry, with all their content.
func (c *cluster) wipeImages(t *testing.T) {
	t.Helper()
	ctr := func(args ...string) string {
		return string(c.exec(t, nil, append([]string{"ctr", "--namespace", "k8s.io"}, args...)...))
	}
	// An image has several names: by its tag, its digest, and the digest of its configuration.
	mine := map[string]bool{}
	type image struct{ name, target string }
	var images []image
	for line := range strings.Lines(ctr("images", "ls")) {
		if fields := strings.Fields(line); len(fields) > 2 && strings.HasPrefix(fields[2], "sha256:") {
			images = append(images, image{fields[0], fields[2]})
			mine[fields[2]] = mine[fields[2]] || strings.HasPrefix(fields[0], "registry.test/")
		}
	}
	args := []string{"images", "rm", "--sync"}
	for _, i := range images {
		if mine[i.target] {
			args = append(args, i.name)
		}
	}
	if len(args) > 3 {
		ctr(args...)
	}
	within(t, patience, func() error {
		ctr("content", "prune", "references")
		for digest := range c.stored(t) {
			if !c.content[digest] {
				return fmt.Errorf("%s is still there", digest)
			}
		}
		return nil
	})
}

// stored is all content that containerd has.
func (c *cluster) stored(t *testing.T) map[string]bool {
	t.Helper()
	found := map[string]bool{}
	for digest := range strings.FieldsSeq(string(c.exec(t, nil, "ctr", "--namespace", "k8s.io", "content", "ls", "--quiet"))) {
		found[digest] = true
	}
	return found
}

// explain logs what the cluster says of itself.
func (c *cluster) explain(t *testing.T) {
	t.Helper()
	for _, args := range [][]string{
		{"get", "pods,daemonsets,deployments,services", "-o", "wide"}, {"get", "events", "--sort-by=.lastTimestamp"},
		{"logs", "-l", "app.kubernetes.io/component=mirror", "--all-containers", "--prefix", "--tail=200"},
		{"logs", "-l", "app.kubernetes.io/component=test", "--all-containers", "--prefix", "--tail=200"},
	} {
		out, err := c.try("kubectl", append([]string{"--namespace", namespace}, args...)...)
		t.Logf("kubectl %s: %v\n%s", args[0], err, out)
	}
}
