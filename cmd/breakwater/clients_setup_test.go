//go:build linux

package main_test

import (
	"crypto/x509"
	"encoding/base64"
	"fmt"
	"maps"
	"path/filepath"
	"strings"
	"testing"

	"breakwater/pkg/registrytest"

	"golang.org/x/crypto/bcrypt"
)

// setupContainerds are an old containerd and a new one.
var setupContainerds = []struct {
	name     string
	programs []string
	flags    []string
}{
	{"containerd-1.6", []string{"containerd", "ctr"}, nil},
	{"containerd-2.4", []string{cached("containerd"), cached("ctr")}, []string{"--referrers"}},
}

// setup runs setup containerd on the host's folder.
func (h *host) setup(t *testing.T, args ...string) string {
	t.Helper()
	args = append([]string{h.breakwater(t), "setup", "containerd", "--certs-d", filepath.Join(h.dir, "certs.d"), "--containerd-config", filepath.Join(h.dir, "none.toml")}, args...)
	out, err := h.output(h.command(t.Context(), nil, args...))
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// TestClientsSetup has containerd, an old one and a new one, pull by the files that the command writes, over
// some that were there, with the registry dead; and wants those back, byte for byte.
func TestClientsSetup(t *testing.T) {
	for _, row := range setupContainerds {
		t.Run(row.name, func(t *testing.T) {
			t.Parallel()
			h := newHost(t, row.programs...)
			up := h.upstream(t)
			const tag = "org/image:latest"
			up.push(t, "org/image", "latest", greeter(t, 1))
			up.push(t, "org/unseen", "latest", greeter(t, 2))
			c := &containerd{host: h, ctr: row.programs[1]}
			if len(row.flags) > 0 {
				c.bin = filepath.Dir(row.programs[1])
			}
			c.start(t, row.programs[0], `"pull", "resolve"`) // names the mirror in _default; that goes
			h.write(t, "certs.d/_default/hosts.toml", "server = \"http://127.0.0.1:9\"\n")
			h.write(t, "certs.d/quay.io/hosts.toml", "# mine\nserver = \"http://127.0.0.1:9\"\n")
			certs := filepath.Join(h.dir, "certs.d")
			before := sums(t, certs)
			if out, err := c.pull(t, "quay.io/"+tag); err == nil {
				t.Fatalf("pulled without a mirror:\n%s", out)
			}
			// A port has another form in the folder's name, and an account of the mirror's its own header.
			config := mirrored + "  registry.test:5000:\n    upstreams:\n      - url: http://" + upstreamAddr + "\n"
			m := h.serve(t, config)
			flags := append([]string{"--write", "--existing", "replace", "--config", h.write(t, "config.yaml", config),
				"--authorization", h.write(t, "authorization", "Basic Y2k6cGFzc3dvcmQ=")}, row.flags...)
			if out := h.setup(t, flags...); !strings.Contains(out, "replaced "+certs+"/quay.io/hosts.toml") {
				t.Errorf("written:\n%s", out)
			}
			names := []string{"quay.io/" + tag, "docker.io/" + tag, "registry.test:5000/" + tag}
			pullAll(t, c, names)
			up.kill()
			pullAll(t, c, names)
			if out, err := c.pull(t, "quay.io/org/unseen:latest"); err == nil {
				t.Errorf("pulled what the mirror does not have:\n%s", out)
			}
			m.stop(t)
			h.setup(t, "--undo")
			if after := sums(t, certs); !maps.Equal(after, before) {
				t.Errorf("restored %v, was %v", after, before)
			}
		})
	}
}

// TestClientsSetupTLS has both pull through a mirror beyond loopback, whose authority nobody on the host knows, by a
// password and by a certificate.
func TestClientsSetupTLS(t *testing.T) {
	for _, row := range setupContainerds {
		t.Run(row.name, func(t *testing.T) {
			t.Parallel()
			h := newHost(t, row.programs...)
			h.beyond(t)
			a := newAuthority(t, h)
			a.issue("mirror", x509.ExtKeyUsageServerAuth)
			cert, key, _ := a.issue("ci", x509.ExtKeyUsageClientAuth)
			hash, err := bcrypt.GenerateFromPassword([]byte(registrytest.Canary), bcrypt.MinCost)
			if err != nil {
				t.Fatal(err)
			}
			h.write(t, "htpasswd", fmt.Sprintf("ci:%s\n", hash))
			up := h.upstream(t)
			up.push(t, "org/secret", "latest", greeter(t, 3))
			c := &containerd{host: h, ctr: row.programs[1]}
			if len(row.flags) > 0 {
				c.bin = filepath.Dir(row.programs[1])
			}
			c.start(t, row.programs[0], `"pull", "resolve"`)
			h.write(t, "certs.d/_default/hosts.toml", "server = \"http://127.0.0.1:9\"\n")
			certs := filepath.Join(h.dir, "certs.d")
			before := sums(t, certs)
			ca := []string{"--ca", filepath.Join(h.dir, "ca.crt")}
			password := []string{"--authorization", h.write(t, "authorization", "Basic "+base64.StdEncoding.EncodeToString([]byte("ci:"+registrytest.Canary)))}
			certificate := []string{"--client-cert", cert, "--client-key", key}
			for _, way := range []struct {
				name, access string
				with         [][]string
				refused      [][][]string // without one of them
			}{
				{"htpasswd", "htpasswd: htpasswd", [][]string{ca, password}, [][][]string{{ca}, {password}}},
				{"certificate", "client_ca_file: ca.crt", [][]string{ca, certificate}, [][][]string{{ca}, {certificate}}},
			} {
				t.Run(way.name, func(t *testing.T) {
					m := h.serve(t, fmt.Sprintf(secretly, way.access))
					setup := func(what ...[]string) {
						t.Helper()
						flags := append([]string{"--write", "--config", filepath.Join(h.dir, "config.yaml")}, row.flags...)
						for _, flag := range what {
							flags = append(flags, flag...)
						}
						h.setup(t, flags...)
					}
					for _, what := range way.refused {
						setup(what...)
						if out, err := c.pull(t, "quay.io/org/secret:latest"); err == nil {
							t.Errorf("pulled with %q only: %s", what, out)
						}
					}
					setup(way.with...)
					pullAll(t, c, []string{"quay.io/org/secret:latest"})
					m.stop(t)
				})
			}
			h.setup(t, "--undo")
			if after := sums(t, certs); !maps.Equal(after, before) {
				t.Errorf("restored %v, was %v", after, before)
			}
		})
	}
}
