package upstream

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"io"
	"net"
	"net/http"
	"net/http/httputil"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"breakwater/pkg/oci"
	"breakwater/pkg/registrytest"

	"github.com/opencontainers/go-digest"
)

// httpProxy is an HTTP proxy on a network.
type httpProxy struct {
	network *registrytest.Network

	mu     sync.Mutex
	asked  []string // "CONNECT host:port" and "GET http://host"
	users  []string
	status int // 0 for one that works
}

func (p *httpProxy) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	p.mu.Lock()
	target := r.Method + " " + r.Host
	p.asked = append(p.asked, target)
	p.users = append(p.users, r.Header.Get("Proxy-Authorization"))
	status := p.status
	p.mu.Unlock()
	switch {
	case status != 0:
		w.WriteHeader(status)
		return
	case r.Method != http.MethodConnect:
		transport := &http.Transport{DialContext: p.network.DialContext, DisableKeepAlives: true}
		(&httputil.ReverseProxy{Rewrite: func(*httputil.ProxyRequest) {}, Transport: transport}).ServeHTTP(w, r)
		return
	}
	there, err := p.network.DialContext(r.Context(), "tcp", r.Host)
	if err != nil {
		w.WriteHeader(http.StatusBadGateway)
		return
	}
	defer there.Close()
	here, _, err := http.NewResponseController(w).Hijack()
	if err != nil {
		return
	}
	defer here.Close()
	_, _ = io.WriteString(here, "HTTP/1.1 200 OK\r\n\r\n")
	done := make(chan struct{})
	go func() {
		defer close(done)
		_, _ = io.Copy(there, here)
		there.Close()
	}()
	_, _ = io.Copy(here, there)
	here.Close()
	<-done
}

func (p *httpProxy) targets() []string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return slices.Compact(slices.Sorted(slices.Values(p.asked)))
}

// proxied is guard with a proxy at proxy.test:3128, which alone can be looked up, at a private address.
func proxied(t *testing.T, scheme string, f func(*guarded, *httpProxy)) {
	t.Helper()
	guard(t, registrytest.Auth{}, func(g *guarded) {
		proxy := &httpProxy{network: g.network}
		listener, err := g.network.Listen("proxy.test:3128")
		if err != nil {
			g.Fatal(err)
		}
		var certificates []tls.Certificate
		if scheme == "https" {
			certificate, err := g.network.CA.Certificate("proxy.test", time.Time{})
			if err != nil {
				g.Fatal(err)
			}
			certificates = append(certificates, certificate)
		}
		server := registrytest.Serve(listener, proxy, certificates...)
		g.Cleanup(func() { _ = server.Close() })
		g.network.SetHost("proxy.test", registrytest.Host{Addresses: []netip.Addr{netip.MustParseAddr("10.0.0.9")}})
		g.pool = NewPool(Settings{Dial: g.network.DialContext, TLS: &tls.Config{RootCAs: g.network.CA.Pool()},
			Lookup: func(ctx context.Context, host string) ([]netip.Addr, error) {
				if host != "proxy.test" {
					return nil, &net.DNSError{Err: "no such host", Name: host, IsNotFound: true}
				}
				return g.network.Lookup(ctx, host)
			}})
		g.Cleanup(g.pool.Close)
		f(g, proxy)
	})
}

func TestProxy(t *testing.T) {
	t.Setenv("HTTPS_PROXY", "http://user:word@proxy.test:3128")
	t.Setenv("HTTP_PROXY", "http://proxy.test:3128")
	t.Setenv("NO_PROXY", "direct.test")
	for _, tt := range []struct{ proxy, scheme, url, asked string }{
		{"", "http", "https://quay.test", "CONNECT quay.test:443"},
		{"env", "http", "https://quay.test", "CONNECT quay.test:443"},
		{"env", "http", "http://quay.test", "GET quay.test"},
		{"http://proxy.test:3128", "http", "https://quay.test", "CONNECT quay.test:443"},
		{"http://proxy.test:3128", "http", "http://quay.test", "GET quay.test"},
		{"https://proxy.test:3128", "https", "https://quay.test", "CONNECT quay.test:443"},
		{"https://proxy.test:3128", "https", "http://quay.test", "GET quay.test"},
	} {
		proxied(t, tt.scheme, func(g *guarded, proxy *httpProxy) {
			g.Serve(g, g.network, "quay.test:80")
			g.use(Config{Registry: "quay.io", URL: tt.url, Proxy: tt.proxy})
			if err := g.ask("quay.io", "org/a"); err != nil {
				g.Errorf("%+v: %v", tt, err)
			}
			if got := proxy.targets(); !slices.Equal(got, []string{tt.asked}) {
				g.Errorf("%+v: asked for %v", tt, got)
			}
			if want := map[bool]string{true: "Basic dXNlcjp3b3Jk"}[strings.HasPrefix(tt.asked, "CONNECT") && !strings.Contains(tt.proxy, ":")]; proxy.users[0] != want {
				g.Errorf("%+v: the proxy was told %q, want %q", tt, proxy.users[0], want)
			}
		})
	}
	proxied(t, "http", func(g *guarded, proxy *httpProxy) {
		g.use(Config{Registry: "quay.io", URL: "https://quay.test", Proxy: "none"}, Config{Registry: "direct", URL: "https://direct.test"})
		for _, registry := range []string{"quay.io", "direct"} {
			if err := g.ask(registry, "org/a"); err == nil {
				g.Error("reached without a proxy or a resolver")
			}
		}
		if got := proxy.targets(); len(got) > 0 {
			g.Errorf("asked for %v", got)
		}
	})
}

func TestProxyThatRefuses(t *testing.T) {
	proxied(t, "http", func(g *guarded, proxy *httpProxy) {
		proxy.status = http.StatusProxyAuthRequired
		g.use(Config{Registry: "quay.io", URL: "https://quay.test", Proxy: "http://proxy.test:3128"})
		err := g.ask("quay.io", "org/a")
		if dial := new(DialError); !errors.As(err, &dial) || dial.Phase != "proxy" || !strings.Contains(err.Error(), "proxy.test:3128: answered 407") {
			g.Errorf("%v", err)
		}
		g.network.SetLink("proxy.test:3128", registrytest.Link{Silent: true})
		began := time.Now()
		if err := g.ask("quay.io", "org/a"); err == nil || time.Since(began) > connectTimeout {
			g.Errorf("%v after %v", err, time.Since(began))
		}
	})
}

// A proxy looks names up by itself, so that the guard has only the name to go by.
func TestH29ProxyIsNotAskedForPrivateHosts(t *testing.T) {
	blob := []byte("content")
	ref := oci.Reference{Repository: oci.Repository{Registry: "quay.io", Name: "org/a"}, Digest: digest.FromBytes(blob)}
	for location, reached := range map[string]bool{
		"https://cdn.example.com/": true, "https://s3.us-east-1.amazonaws.com/": true, "https://named.test/": true, "https://10.1.2.3/": true,
		"https://10.0.0.5/": false, "https://198.51.100.77/": false, "https://[::1]/": false, "https://127.1/": false, "https://2130706433/": false, "https://0x7f000001/": false,
		"https://[::ffff:169.254.169.254]/": false, "https://169.254.169.254/": false, "https://metadata.google.internal/": false, "https://localhost/": false, "https://router/": false,
		"https://cdn.test/": false, "https://printer.local/": false, "https://named.test:8443/": false, "https://com/": false,
	} {
		proxied(t, "http", func(g *guarded, proxy *httpProxy) {
			target := strings.TrimSuffix(strings.TrimPrefix(location, "https://"), "/")
			if !strings.HasSuffix(target, "8443") {
				target += ":443"
			}
			var mu sync.Mutex
			got := 0
			g.Fault(registrytest.Match{Kind: registrytest.KindBlob}, registrytest.Status(http.StatusTemporaryRedirect, "Location", location+"blob"))
			if reached {
				g.listen(target, http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
					mu.Lock()
					defer mu.Unlock()
					got++
					_, _ = w.Write(blob)
				}))
			}
			g.use(Config{Registry: "quay.io", URL: "https://quay.test", Proxy: "http://proxy.test:3128", RedirectHosts: []string{"named.test", "10.1.2.3"}})
			body, err := g.pool.Clients("quay.io")[0].Blob(context.Background(), ref, 0)
			if err == nil {
				_, _ = io.ReadAll(body)
				body.Close()
			}
			if (err == nil) != reached || got > 0 != reached {
				g.Errorf("%s: %v, reached %d times", location, err, got)
			}
			if asked := slices.Contains(proxy.targets(), "CONNECT "+target); asked != reached {
				g.Errorf("%s: the proxy was asked for %v", location, proxy.targets())
			}
			if n := g.pool.Refused(); n > 0 == reached {
				g.Errorf("%s: %d refused", location, n)
			}
		})
	}
}

// A host that an upstream may redirect to is so for that upstream alone.
func TestH29RedirectHostsMayBePrivate(t *testing.T) {
	blob := []byte("content")
	for _, tt := range []struct {
		hosts []string
		port  string
		want  bool
	}{{nil, "443", false}, {[]string{"cdn.test"}, "443", true}, {[]string{"cdn.test:443"}, "443", true}, {[]string{"cdn.test:8443"}, "443", false}, {[]string{"cdn.test"}, "8443", false},
		{[]string{"cdn.test:8443"}, "8443", true}, {[]string{"other.test"}, "443", false}, {[]string{"10.0.0.7"}, "443", false}} {
		guard(t, registrytest.Auth{}, func(g *guarded) {
			g.listen("cdn.test:"+tt.port, http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write(blob) }))
			g.network.SetHost("cdn.test", registrytest.Host{Addresses: []netip.Addr{netip.MustParseAddr("10.0.0.7")}})
			g.Fault(registrytest.Match{Kind: registrytest.KindBlob}, registrytest.Status(http.StatusTemporaryRedirect, "Location", "https://cdn.test:"+tt.port+"/blob"))
			g.use(Config{Registry: "quay.io", URL: "https://quay.test", RedirectHosts: tt.hosts}, Config{Registry: "other", URL: "https://quay.test"})
			for registry, want := range map[string]bool{"quay.io": tt.want, "other": false} {
				body, err := g.pool.Clients(registry)[0].Blob(context.Background(), oci.Reference{Repository: oci.Repository{Registry: registry, Name: "org/a"}, Digest: digest.FromBytes(blob)}, 0)
				if err == nil {
					body.Close()
				}
				if (err == nil) != want {
					g.Errorf("%v at port %s for %s: %v", tt.hosts, tt.port, registry, err)
				}
			}
		})
	}
}

// A registry that nobody has configured is reached at public addresses only, also through a proxy.
func TestH29AnyRegistryIsPublic(t *testing.T) {
	guard(t, registrytest.Auth{}, func(g *guarded) {
		g.listen("inside.test:443", g.Registry)
		g.network.SetHost("inside.test", registrytest.Host{Addresses: []netip.Addr{netip.MustParseAddr("10.0.0.7")}})
		if err := use(g.pool, nil, true); err != nil {
			g.Fatal(err)
		}
		for registry, want := range map[string]bool{"quay.test": true, "inside.test": false} {
			if err := g.ask(registry, "org/a"); (err == nil) != want {
				g.Errorf("%s: %v", registry, err)
			}
			if n := len(g.network.Dials(registry + ":443")); n > 0 != want {
				g.Errorf("%s: dialled %d times", registry, n)
			}
		}
	})
	t.Setenv("HTTPS_PROXY", "http://proxy.test:3128")
	proxied(t, "http", func(g *guarded, proxy *httpProxy) {
		if err := use(g.pool, nil, true); err != nil {
			g.Fatal(err)
		}
		if err := g.ask("inside.test", "org/a"); err == nil || len(proxy.targets()) > 0 {
			g.Errorf("%v, and the proxy was asked for %v", err, proxy.targets())
		}
	})
}

func TestH34TrustedRealms(t *testing.T) {
	const realm = "https://login.internal/token"
	for _, trusted := range [][]string{nil, {"login.internal"}, {"login.internal:443"}, {"login.internal:8443"}, {"internal"}} {
		guard(t, registrytest.Auth{Scheme: "Bearer", Realm: realm, Service: "quay", Users: robots}, func(g *guarded) {
			g.listen("login.internal:443", g.Registry)
			g.network.SetHost("login.internal", registrytest.Host{Addresses: []netip.Addr{netip.MustParseAddr("10.0.0.8")}})
			file := filepath.Join(g.folder, "robot")
			if err := os.WriteFile(file, []byte(robots["robot"]), 0o600); err != nil {
				g.Fatal(err)
			}
			g.use(Config{Registry: "quay.io", URL: "https://quay.test", Account: Account{Username: "robot", PasswordFile: file}, TrustedRealms: trusted})
			want := slices.Contains(trusted, "login.internal") || slices.Contains(trusted, "login.internal:443")
			if err := g.ask("quay.io", "org/a"); (err == nil) != want {
				g.Errorf("%v: %v", trusted, err)
			}
			if n := len(g.network.Dials("login.internal:443")); n > 0 != want {
				g.Errorf("%v: dialled %d times", trusted, n)
			}
		})
	}
}

// writePEM writes a certificate, or its key, to a file.
func writePEM(t *testing.T, file, kind string, der []byte) string {
	t.Helper()
	if err := os.WriteFile(file, pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}), 0o600); err != nil {
		t.Fatal(err)
	}
	return file
}

func TestOwnAuthoritiesAndCertificates(t *testing.T) {
	guard(t, registrytest.Auth{}, func(g *guarded) {
		// A registry of another authority, that wants to see a certificate, and so does its CDN.
		authority := registrytest.NewCA()
		shown := map[string]int{}
		var mu sync.Mutex
		var trust []byte
		serve := func(host string) {
			listener, err := g.network.Listen(host + ":443")
			if err != nil {
				g.Fatal(err)
			}
			certificate, err := authority.Certificate(host, time.Time{})
			if err != nil {
				g.Fatal(err)
			}
			trust = append(trust, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: certificate.Certificate[0]})...)
			secured := tls.NewListener(listener, &tls.Config{Certificates: []tls.Certificate{certificate}, ClientAuth: tls.RequestClientCert,
				VerifyConnection: func(state tls.ConnectionState) error {
					mu.Lock()
					defer mu.Unlock()
					shown[host] += len(state.PeerCertificates)
					return nil
				}})
			server := registrytest.Serve(secured, g.Registry)
			g.Cleanup(func() { _ = server.Close() })
		}
		serve("own.test")
		serve("cdn.example.com")
		own, err := authority.Certificate("builds.test", time.Time{})
		if err != nil {
			g.Fatal(err)
		}
		key, err := x509.MarshalECPrivateKey(own.PrivateKey.(*ecdsa.PrivateKey))
		if err != nil {
			g.Fatal(err)
		}
		cfg := Config{Registry: "own", URL: "https://own.test", CertFile: writePEM(t, filepath.Join(g.folder, "crt"), "CERTIFICATE", own.Certificate[0]),
			KeyFile: writePEM(t, filepath.Join(g.folder, "key"), "EC PRIVATE KEY", key)}
		g.use(cfg)
		if err := g.ask("own", "org/a"); err == nil || !strings.Contains(err.Error(), "certificate") {
			g.Errorf("an authority that nobody trusts: %v", err)
		}
		cfg.CAFile = filepath.Join(g.folder, "ca")
		g.use(cfg)
		err = g.ask("own", "org/a")
		if e := new(Error); !errors.As(err, &e) || e.verdict != excluded || !strings.Contains(err.Error(), "ca_file") || len(g.network.Dials("own.test:443")) > 1 {
			g.Errorf("a ca_file that is not there: %v", err)
		}
		if err := os.WriteFile(cfg.CAFile, trust, 0o600); err != nil {
			g.Fatal(err)
		}
		if err := g.ask("own", "org/a"); err != nil {
			g.Fatal(err)
		}
		if shown["own.test"] == 0 {
			g.Error("no certificate was shown")
		}
		g.Fault(registrytest.Match{Kind: registrytest.KindManifest}, registrytest.First(1, registrytest.Status(http.StatusTemporaryRedirect, "Location", "https://cdn.example.com/v2/org/b/manifests/latest")))
		if err := g.ask("own", "org/b"); err != nil {
			g.Fatal(err)
		}
		if n := shown["cdn.example.com"]; n > 0 {
			g.Error("a host that it redirects to was shown the certificate")
		}
		if err := os.WriteFile(cfg.CAFile, bytes.Repeat([]byte("x"), 10), 0o600); err != nil {
			g.Fatal(err)
		}
		g.pool.All()[0].http.CloseIdleConnections()
		if err := g.ask("own", "org/a"); err == nil || !strings.Contains(err.Error(), "no certificate in") {
			g.Errorf("a ca_file without certificates: %v", err)
		}
	})
}
