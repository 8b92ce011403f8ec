//go:build linux && cluster

package charts_test

import (
	"bytes"
	"errors"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

const (
	// patience is for what a busy machine does at last.
	patience = 3 * time.Minute
	// mirrorAt, adminAt are where the node reaches its mirror.
	// Its mirror and everything else on it reach each other at 127.0.0.1; pods have nodeAddress.
	nodeAddress       = "10.99.0.1"
	mirrorAt, adminAt = "http://127.0.0.1:5000", "http://127.0.0.1:5001"
	// webImage is large: its download takes longer than it takes to delete a pod.
	webImage, helloImage = "registry.test/team/web:1", "registry.test/team/hello:1"
	workload             = "daemonset/" + release + "-" + chart
)

// onLoopback are the values of a mirror on the node's own network. One of its registries has a hosts.toml
// already.
const onLoopback = `
config:
  default_registry: registry.test
  registries:
    registry.test: {upstreams: [{url: "http://127.0.0.1:5050"}]}
    replaced.test: {upstreams: [{url: "http://127.0.0.1:5050"}]}
containerd: {existing: replace}
test: {image: "` + helloImage + `"}
`

// TestCluster installs the chart in a real cluster of one node, in each of its modes, and pulls through it,
// also with the registry gone. Each time the node has to be afterwards as it was before.
func TestCluster(t *testing.T) {
	c := startCluster(t)
	c.loadMirror(t)
	c.content = c.stored(t)
	c.write(t, "/etc/containerd/certs.d/other.test/hosts.toml", "server = \"https://other.test\"\n", "0640")
	c.write(t, "/etc/containerd/certs.d/replaced.test/hosts.toml", "# by hand\nserver = \"https://replaced.test\"\n", "0600")
	c.write(t, "/etc/containerd/certs.d/registry.test/ca.crt", "somebody's\n", "0644")
	c.write(t, "/etc/containerd/certs.d/README", "somebody's too\n", "0444")
	before := c.certsD(t)
	for _, section := range []struct {
		name string
		test func(*testing.T)
	}{{"node", c.testNode}, {"host port", c.testHostPort}, {"node port", c.testNodePort}, {"TLS and passwords", c.testAccess}, {"regional", c.testRegional}, {"F70 a new node with the registry gone", c.testNewNode}} {
		t.Run(section.name, func(t *testing.T) {
			t.Cleanup(func() {
				if t.Failed() {
					c.explain(t)
				}
				c.helm(t, helms[0], "", "uninstall", release, "--ignore-not-found")
				c.isGone(t)
			})
			c.exec(t, nil, "rm", "-rf", "/var/lib/breakwater")
			c.wipeImages(t)
			section.test(t)
			c.isAsBefore(t, before)
		})
	}
}

// testNode goes through a whole life on the node's own network, the second half of it by Helm 4.
func (c *cluster) testNode(t *testing.T) {
	up, before := c.serveImages(t), c.certsD(t)
	for _, step := range []struct {
		name string
		do   func(*testing.T)
	}{
		{"dry run", func(t *testing.T) {
			for _, helm := range helms {
				c.helm(t, helm, onLoopback, "install", "--dry-run=server", release, chart)
			}
			c.isAsBefore(t, before)
		}},
		{"install", func(t *testing.T) { c.install(t, helms[0], onLoopback) }},
		{"pull through the mirror", func(t *testing.T) {
			c.runPod(t, "web", webImage)
			c.hasServed(t, "registry.test")
		}},
		{"helm test", func(t *testing.T) { c.test(t, helms[0]) }},
		{"pull with the registry gone and containerd's store wiped", func(t *testing.T) {
			up.kill()
			c.wipeImages(t)
			c.runPod(t, "web-again", webImage)
		}},
		{"helm test in the outage", func(t *testing.T) { c.test(t, helms[0]) }},
		{"F63 the pod is deleted during downloads", func(t *testing.T) { c.deletePodDuringDownloads(t, webImage) }},
		{"uninstall restores the node and leaves what was pulled", func(t *testing.T) {
			c.uninstall(t, helms[0])
			c.isAsBefore(t, before)
			c.exec(t, nil, "test", "-e", "/var/lib/breakwater/oci-layout")
		}},
		{"Helm 4 finds the store again", func(t *testing.T) {
			c.wipeImages(t)
			c.install(t, helms[1], onLoopback)
			c.runPod(t, "web-helm4", webImage) // the registry is still gone
			c.test(t, helms[1])
			c.uninstall(t, helms[1])
		}},
	} {
		if !t.Run(step.name, step.do) {
			return // the next one builds on it
		}
	}
}

func (c *cluster) testHostPort(t *testing.T) {
	c.testForwarded(t, "expose: hostPort\n")
}

func (c *cluster) testNodePort(t *testing.T) {
	c.testForwarded(t, "expose: nodePort\n", "--set", "config.server_names={127.0.0.1}")
}

// testForwarded has a mirror in a network of its own, which the node reaches by a port of its loopback.
func (c *cluster) testForwarded(t *testing.T, expose string, args ...string) {
	c.serveImages(t)
	values := strings.ReplaceAll(onLoopback, "127.0.0.1:5050", nodeAddress+":5050") + "data: {type: emptyDir}\n" + expose
	c.install(t, helms[0], values, append(args, "--set", "config.access.anonymous=true")...)
	c.runPod(t, "web-forwarded", webImage)
	c.test(t, helms[0])
	c.uninstall(t, helms[0])
}

// testAccess has a mirror that the network reaches, with a certificate of an authority that nobody on the node trusts
// but containerd, as it is told beside the mirror, and with passwords.
func (c *cluster) testAccess(t *testing.T) {
	up, before := c.serveImages(t), c.certsD(t)
	authority := c.putAccess(t)
	c.install(t, helms[0], strings.ReplaceAll(onLoopback, "127.0.0.1:5050", nodeAddress+":5050")+`
data: {type: emptyDir}
expose: hostPort
hostPort: {ip: 0.0.0.0}
secrets: [{name: tls, secret: mirror-tls}, {name: passwords, secret: mirror-passwords}]
ca: {secret: mirror-tls}
`, "--set", "config.server_names={"+nodeAddress+",127.0.0.1}", "--set", "config.access.loopback=asked",
		"--set", "config.access.htpasswd=/etc/breakwater/secrets/passwords/htpasswd",
		"--set", "config.tls.cert_file=/etc/breakwater/secrets/tls/tls.crt", "--set", "config.tls.key_file=/etc/breakwater/secrets/tls/tls.key",
		"--set", "containerd.authorization.secret=mirror-passwords", "--set", "containerd.authorization.key=header",
		"--set", "test.env[0].name=DOCKER_CONFIG", "--set", "test.env[0].value=/etc/breakwater/secrets/passwords")
	c.runPod(t, "web-access", webImage)
	c.test(t, helms[0])
	up.kill()
	c.wipeImages(t)
	c.runPod(t, "web-access-again", webImage)
	for _, at := range []string{"127.0.0.1", nodeAddress} {
		url := "https://" + at + ":5000/v2/registry.test/team/web/manifests/1"
		if err := c.get(url, nil, "SSL_CERT_FILE="+authority); err == nil || !strings.Contains(err.Error(), "401") {
			t.Errorf("anonymously from %s: %v, want 401", at, err)
		}
	}
	c.uninstall(t, helms[0])
	c.isAsBefore(t, before)
}

// testRegional has the store in a claim. The cluster makes no volumes by itself: this one is a folder of the node.
func (c *cluster) testRegional(t *testing.T) {
	c.serveImages(t)
	const volume = "/var/lib/regional"
	c.exec(t, nil, "mkdir", "-p", volume)
	feed(t, []byte(`
apiVersion: v1
kind: PersistentVolume
metadata: {name: regional}
spec:
  capacity: {storage: 10Gi}
  accessModes: [ReadWriteOnce]
  storageClassName: folders
  local: {path: `+volume+`}
  nodeAffinity: {required: {nodeSelectorTerms: [{matchExpressions: [{key: kubernetes.io/os, operator: In, values: [linux]}]}]}}
`), "kubectl", "apply", "--filename", "-")
	t.Cleanup(func() {
		c.kubectl(t, "delete", "persistentvolumeclaim", release+"-"+chart, "--ignore-not-found")
		c.kubectl(t, "delete", "persistentvolume", "regional")
	})
	install := func() {
		t.Helper()
		c.helm(t, helms[0], `
mode: regional
config:
  default_registry: registry.test
  registries: {registry.test: {upstreams: [{url: "http://`+nodeAddress+`:5050"}]}}
  server_names: [`+release+"-"+chart+"."+namespace+`.svc]
  access: {anonymous: true}
data: {size: 10Gi, storageClass: folders}
test: {image: "`+webImage+`"}
`, "install", release, chart)
		c.kubectl(t, "rollout", "status", "deployment/"+release+"-"+chart, "--timeout=180s")
		c.test(t, helms[0])
		c.uninstall(t, helms[0])
	}
	install()
	c.exec(t, nil, "test", "-e", volume+"/oci-layout")
	install() // and the claim that has stayed is taken again
}

// testNewNode fills a bucket by one mirror, takes its folder and the registry away, and pulls by another.
func (c *cluster) testNewNode(t *testing.T) {
	up, bucket := c.serveImages(t), c.serveBucket(t)
	shared := onLoopback + `
secrets: [{name: fleet, secret: fleet-key}]
envFrom: [{secretRef: {name: bucket-account}}]
`
	set := []string{"--set", "config.shared.s3.bucket=builds", "--set", "config.shared.s3.region=us-east-1", "--set", "config.shared.s3.path_style=true",
		"--set", "config.shared.s3.endpoint=http://127.0.0.1:7070", "--set", "config.shared.key_file=/etc/breakwater/secrets/fleet/fleet.key"}
	c.kubectl(t, "create", "secret", "generic", "fleet-key", "--from-literal=fleet.key="+strings.Repeat("0f", 32))
	c.kubectl(t, "create", "secret", "generic", "bucket-account", "--from-literal=AWS_ACCESS_KEY_ID="+bucketAccount, "--from-literal=AWS_SECRET_ACCESS_KEY="+bucketSecret)
	c.install(t, helms[0], shared, set...)
	c.runPod(t, "web-shared", webImage)
	within(t, patience, func() error { // it is published behind
		tag, err := filepath.Glob(filepath.Join(bucket, "builds/records/registry.test/team/web/_tags/*"))
		if err == nil && len(tag) == 0 {
			err = errors.New("the tag is not in the bucket")
		}
		return err
	})
	c.uninstall(t, helms[0])
	c.exec(t, nil, "rm", "-rf", "/var/lib/breakwater")
	up.kill()
	c.wipeImages(t)
	c.install(t, helms[0], shared, set...)
	c.runPod(t, "web-new-node", webImage)
	c.uninstall(t, helms[0])
}

// deletePodDuringDownloads holds eight downloads of an image's largest blob, has the mirror's pod deleted,
// and finishes them: each gets all of it, and the next pod serves.
func (c *cluster) deletePodDuringDownloads(t *testing.T, image string) {
	blob := c.largestBlob(t, image)
	repository, _, _ := strings.Cut(image, ":")
	url := mirrorAt + "/v2/" + repository + "/blobs/" + blob
	var downloads []*download
	for range 8 {
		downloads = append(downloads, c.download(t, url))
	}
	pod := strings.TrimSpace(string(c.kubectl(t, "get", "pod", "-l", "app.kubernetes.io/component=mirror", "-o", "jsonpath={.items[0].metadata.name}")))
	begin := time.Now()
	c.kubectl(t, "delete", "pod", pod, "--wait=false")
	within(t, patience, func() error {
		if err := c.get(mirrorAt+"/v2/", nil); err == nil {
			return errors.New("the mirror still accepts")
		}
		return nil
	})
	for _, d := range downloads {
		if got := d.finish(t); got != blob {
			t.Errorf("downloaded %s, want %s", got, blob)
		}
	}
	c.kubectl(t, "wait", "--for=delete", "pod/"+pod, "--timeout=60s")
	if took := time.Since(begin); took > 40*time.Second {
		t.Errorf("the pod ended after %v, want 30 s", took)
	}
	c.kubectl(t, "rollout", "status", workload, "--timeout=120s")
	within(t, patience, func() error { return c.get(mirrorAt+"/v2/", nil) })
	if got := c.download(t, url).finish(t); got != blob {
		t.Errorf("the next pod gave %s, want %s", got, blob)
	}
}

// install returns when the mirror is ready on the node.
func (c *cluster) install(t *testing.T, helm, values string, args ...string) {
	t.Helper()
	c.helm(t, helm, values, append([]string{"install", release, chart}, args...)...)
	c.kubectl(t, "rollout", "status", workload, "--timeout=180s")
	// Ready is the pod with its mirror; the container beside it has written when it has.
	within(t, patience, func() error {
		hosts, err := c.try(c.script, "exec", "cat", "/etc/containerd/certs.d/registry.test/hosts.toml")
		if err == nil && !strings.Contains(string(hosts), "Managed by breakwater") {
			err = fmt.Errorf("hosts.toml says %s", hosts)
		}
		return err
	})
}

// uninstall returns when nothing of the release is left but what it leaves.
func (c *cluster) uninstall(t *testing.T, helm string) {
	t.Helper()
	c.helm(t, helm, "", "uninstall", release, "--wait", "--timeout", "120s")
	c.isGone(t)
}

// isGone waits for the last of the mirror's pods, which ends when the node is restored.
func (c *cluster) isGone(t *testing.T) {
	t.Helper()
	within(t, patience, func() error {
		pods, err := c.try("kubectl", "--namespace", namespace, "get", "pods", "-l", "app.kubernetes.io/component=mirror", "-o", "name")
		if err == nil && len(bytes.TrimSpace(pods)) > 0 {
			err = fmt.Errorf("still there: %s", pods)
		}
		return err
	})
}

// test runs the chart's own test.
func (c *cluster) test(t *testing.T, helm string) {
	t.Helper()
	c.helm(t, helm, "", "test", release, "--timeout", "180s")
}

// isAsBefore compares containerd's folder with what it was: names, kinds, modes, owners and contents.
func (c *cluster) isAsBefore(t *testing.T, before map[string]entry) {
	t.Helper()
	if diff := cmp.Diff(before, c.certsD(t)); diff != "" {
		t.Errorf("certs.d, -before +after\n%s", diff)
	}
}

// hasServed looks for a registry's manifests and blobs among what the mirror has asked for.
func (c *cluster) hasServed(t *testing.T, registry string) {
	t.Helper()
	var metrics bytes.Buffer
	if err := c.get(adminAt+"/metrics", &metrics); err != nil {
		t.Fatal(err)
	}
	for _, class := range []string{"manifest", "blob"} {
		want := fmt.Sprintf(`breakwater_upstream_requests_total{class=%q,registry=%q,`, class, registry)
		if !strings.Contains(metrics.String(), want) {
			t.Errorf("no %s in\n%s", want, metrics.Bytes())
		}
	}
}

// within waits until check passes, in real time: only for what processes outside this one do, which tell nobody.
func within(t *testing.T, limit time.Duration, check func() error) {
	t.Helper()
	err := errors.New("not tried")
	for end := time.Now().Add(limit); time.Now().Before(end); time.Sleep(100 * time.Millisecond) {
		if err = check(); err == nil {
			return
		}
	}
	t.Fatalf("not within %v: %v", limit, err)
}

// ask is what the test's second self does on the node's network.
func ask(url string) (*http.Response, error) {
	resp, err := (&http.Client{Timeout: patience}).Get(url)
	if err == nil && resp.StatusCode != http.StatusOK {
		err = fmt.Errorf("GET %s: %s", url, resp.Status)
	}
	return resp, err
}

// process is one that the test has started and ends.
type process struct{ cmd *exec.Cmd }

func (p *process) kill() {
	_ = p.cmd.Process.Kill()
	_ = p.cmd.Wait()
}

func start(t *testing.T, cmd *exec.Cmd) *process {
	t.Helper()
	log, err := os.Create(filepath.Join(t.TempDir(), "log"))
	if err != nil {
		t.Fatal(err)
	}
	cmd.Stdout, cmd.Stderr = log, log
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	p := &process{cmd}
	t.Cleanup(func() {
		p.kill()
		if said, _ := os.ReadFile(log.Name()); t.Failed() {
			t.Logf("%q said\n%s", cmd.Args, said)
		}
		_ = log.Close()
	})
	return p
}
