//go:build linux

package charts_test

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"io"
	"math/big"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"

	"github.com/google/go-cmp/cmp"
	"go.yaml.in/yaml/v4"
	"golang.org/x/crypto/bcrypt"
)

// mirrorUser is the user and group of the mirror in its pod.
const mirrorUser = 65532

// TestChart lints and renders the chart with each file of values, by both Helms; what comes out has to
// agree with Kubernetes' own schemas, and the configuration in it to please the mirror.
func TestChart(t *testing.T) {
	chart := copied(t)
	files, err := filepath.Glob(chart + "/ci/*-values.yaml")
	if err != nil || len(files) == 0 {
		t.Fatal(files, err)
	}
	schemas := schemas(t)
	for _, file := range files {
		t.Run(strings.TrimSuffix(filepath.Base(file), "-values.yaml"), func(t *testing.T) {
			var rendered [][]byte
			for _, helm := range helms {
				helm := cache(t, helm)
				run(t, helm, "lint", "--strict", "--kube-version", kubernetes, "--namespace", namespace, "--values", file, chart)
				out := run(t, helm, "template", release, chart, "--kube-version", kubernetes, "--namespace", namespace, "--values", file)
				feed(t, out, cache(t, "bin/kubeconform"), "-strict", "-summary", "-schema-location", schemas+"/{{.ResourceKind}}{{.KindSuffix}}.json")
				rendered = append(rendered, out)
			}
			if diff := cmp.Diff(objects(t, rendered[0]), objects(t, rendered[1])); diff != "" {
				t.Errorf("by Helm 3 and 4, -3 +4\n%s", diff)
			}
			checkConfig(t, objects(t, rendered[0]))
		})
	}
}

// object is one of Kubernetes', as far as it is looked at here.
type object struct {
	Kind string
	Data map[string]string
	Spec struct{ Template struct{ Spec pod } }
}

type pod struct {
	InitContainers []container `yaml:"initContainers"`
	Containers     []container
}

type container struct {
	Name string
	Env  []struct{ Name, Value string }
}

// objects are those in a rendered chart.
func objects(t *testing.T, text []byte) map[string]any {
	t.Helper()
	found := map[string]any{}
	for d := yaml.NewDecoder(bytes.NewReader(text)); ; {
		var o map[string]any
		err := d.Decode(&o)
		if errors.Is(err, io.EOF) {
			return found
		}
		if err != nil {
			t.Fatal(err)
		}
		if o != nil {
			found[o["kind"].(string)+" "+o["metadata"].(map[string]any)["name"].(string)] = o
		}
	}
}

// secretFile is one that a configuration may name.
var secretFile = regexp.MustCompile(`/etc/breakwater/secrets/[a-z]+/[a-z.]+`)

// checkConfig lays the pod's files as a kubelet would, and has the program check its configuration, with the
// environment and as the user and the groups of each container that reads it.
func checkConfig(t *testing.T, rendered map[string]any) {
	t.Helper()
	var text string
	daemons := false
	containers := map[string][]string{} // name: environment
	for _, o := range rendered {
		raw, err := yaml.Marshal(o)
		if err != nil {
			t.Fatal(err)
		}
		var seen object
		if err := yaml.Unmarshal(raw, &seen); err != nil {
			t.Fatal(err)
		}
		text += seen.Data["breakwater.yaml"]
		daemons = daemons || seen.Kind == "DaemonSet"
		for _, c := range append(seen.Spec.Template.Spec.Containers, seen.Spec.Template.Spec.InitContainers...) {
			environ := []string{"STATE_DIRECTORY=/var/lib/breakwater"} // the image's own
			for _, v := range c.Env {
				environ = append(environ, v.Name+"="+v.Value)
			}
			containers[c.Name] = environ
		}
	}
	if os.Getuid() != 0 {
		cannot(t, "only root can lay files as a kubelet does")
	}
	dir := kubeletFiles(t, text)
	config := filepath.Join(dir, "breakwater.yaml")
	if err := os.WriteFile(config, []byte(strings.ReplaceAll(text, "/etc/breakwater", dir)), 0o644); err != nil {
		t.Fatal(err)
	}
	program, err := os.ReadFile(breakwater(t))
	if err != nil {
		t.Fatal(err)
	}
	reachable := filepath.Join(dir, "breakwater") // by the mirror's user
	if err := os.WriteFile(reachable, program, 0o755); err != nil {
		t.Fatal(err)
	}
	readers := map[string]uint32{"mirror": mirrorUser}
	if daemons {
		readers["containerd"] = 0
	}
	for name, user := range readers {
		environ, ok := containers[name]
		if !ok {
			t.Errorf("there is no container %s", name)
		}
		cmd := exec.Command(reachable, "config", "check", config)
		cmd.Env = environ
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: user, Gid: user, Groups: []uint32{mirrorUser}}}
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Errorf("config check in %s: %v\n%s\n%s", name, err, out, text)
		}
	}
}

// kubeletFiles is a folder with the files that a configuration names, as a kubelet mounts Secrets for an fsGroup:
// root's, behind two links, for the group to read.
func kubeletFiles(t *testing.T, config string) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "chart")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	certificate, key := keyPair(t)
	hash, err := bcrypt.GenerateFromPassword([]byte("ci"), bcrypt.DefaultCost)
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range secretFile.FindAllString(config, -1) {
		file := filepath.Join(dir, strings.TrimPrefix(name, "/etc/breakwater"))
		volume, base := filepath.Split(file)
		mounted := filepath.Join(volume, "..2026_11_26", base)
		if _, err := os.Lstat(file); err == nil {
			continue
		}
		if err := os.MkdirAll(filepath.Dir(mounted), 0o755); err != nil {
			t.Fatal(err)
		}
		_ = os.Symlink("..2026_11_26", filepath.Join(volume, "..data"))
		content := []byte(strings.Repeat("0f", 32)) // as good a password as a fleet's key
		switch base {
		case "tls.crt":
			content = certificate
		case "tls.key":
			content = key
		case "htpasswd":
			content = append([]byte("ci:"), hash...)
		}
		for _, err := range []error{
			os.WriteFile(mounted, content, 0o600), os.Chown(mounted, 0, mirrorUser), os.Chmod(mounted, 0o440),
			os.Symlink(filepath.Join("..data", base), file),
		} {
			if err != nil {
				t.Fatal(err)
			}
		}
	}
	return dir
}

// keyPair is a certificate and its key in PEM.
func keyPair(t *testing.T) (certificate, key []byte) {
	t.Helper()
	private, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), DNSNames: []string{"mirror.internal"}}
	public, err := x509.CreateCertificate(rand.Reader, template, template, private.Public(), private)
	if err != nil {
		t.Fatal(err)
	}
	secret, err := x509.MarshalPKCS8PrivateKey(private)
	if err != nil {
		t.Fatal(err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: public}), pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: secret})
}

// TestChartUnits runs the suites of helm-unittest: what the chart says, and what it refuses.
func TestChartUnits(t *testing.T) {
	t.Log(string(run(t, cache(t, "bin/helm-unittest"), "--strict", copied(t))))
}
