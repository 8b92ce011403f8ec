package access

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"log/slog"
	"math/big"
	"net"
	"net/http"
	"net/url"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// authority signs certificates in tests.
type testAuthority struct {
	testing.TB
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

func newAuthority(t testing.TB) *testAuthority {
	a := &testAuthority{TB: t}
	template := &x509.Certificate{Subject: pkix.Name{CommonName: "authority"}, NotAfter: time.Now().Add(time.Hour), IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign}
	raw, key := a.sign(template, template, nil)
	cert, err := x509.ParseCertificate(raw)
	if err != nil {
		t.Fatal(err)
	}
	a.cert, a.key = cert, key
	return a
}

func (a *testAuthority) sign(template, parent *x509.Certificate, signer *ecdsa.PrivateKey) ([]byte, *ecdsa.PrivateKey) {
	a.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		a.Fatal(err)
	}
	if signer == nil {
		signer = key
	}
	template.SerialNumber = big.NewInt(time.Now().UnixNano())
	raw, err := x509.CreateCertificate(rand.Reader, template, parent, key.Public(), signer)
	if err != nil {
		a.Fatal(err)
	}
	return raw, key
}

// issue returns a certificate, and its files' texts.
func (a *testAuthority) issue(template *x509.Certificate) (pair tls.Certificate, cert, key string) {
	a.Helper()
	if template.NotAfter.IsZero() {
		template.NotAfter = time.Now().Add(time.Hour)
	}
	raw, private := a.sign(template, a.cert, a.key)
	der, err := x509.MarshalPKCS8PrivateKey(private)
	if err != nil {
		a.Fatal(err)
	}
	return tls.Certificate{Certificate: [][]byte{raw}, PrivateKey: private},
		string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: raw})), string(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}))
}

func (a *testAuthority) pem() string {
	return string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: a.cert.Raw}))
}

func (a *testAuthority) server(name string) (cert, key string) {
	_, cert, key = a.issue(&x509.Certificate{Subject: pkix.Name{CommonName: name}, DNSNames: []string{"mirror.test"}})
	return cert, key
}

func (a *testAuthority) client(template *x509.Certificate) tls.Certificate {
	template.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}
	pair, _, _ := a.issue(template)
	return pair
}

// listen serves a handler with a certificate on loopback, and returns its address.
func listen(t *testing.T, config *tls.Config, handler http.HandlerFunc) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	server := &http.Server{Handler: handler, TLSConfig: config, ErrorLog: slog.NewLogLogger(slog.DiscardHandler, slog.LevelDebug)}
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		_ = server.ServeTLS(l, "", "") // ErrServerClosed
	}()
	t.Cleanup(func() {
		_ = server.Close()
		<-ended
	})
	return l.Addr().String()
}

// shown is whose certificate a listener shows.
func shown(t *testing.T, address string) string {
	t.Helper()
	conn, err := tls.Dial("tcp", address, &tls.Config{InsecureSkipVerify: true}) // it is looked at here
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	return conn.ConnectionState().PeerCertificates[0].Subject.CommonName
}

// TestCertificateIsReadAgain replaces a listener's certificate while it serves: by one that does not fit its
// key, by one that has run out, and by a good one.
func TestCertificateIsReadAgain(t *testing.T) {
	a := newAuthority(t)
	dir := t.TempDir()
	certFile, keyFile := filepath.Join(dir, "cert.pem"), filepath.Join(dir, "key.pem")
	put := func(cert, key string) { write(t, certFile, cert); write(t, keyFile, key) }
	put(a.server("one"))
	var log bytes.Buffer
	c, err := NewCertificate(certFile, keyFile, slog.New(slog.NewTextHandler(&log, nil)))
	if err != nil {
		t.Fatal(err)
	}
	address := listen(t, c.TLS(func() *x509.CertPool { return nil }), func(http.ResponseWriter, *http.Request) {})
	want := func(name string) {
		t.Helper()
		c.file.looked.Store(0) // a second has gone by
		if got := shown(t, address); got != name {
			t.Errorf("%s is shown, want %s", got, name)
		}
	}
	want("one")
	two, key := a.server("two")
	write(t, certFile, two) // its key comes later
	want("one")
	if !strings.Contains(log.String(), "stays in force") {
		t.Errorf("nothing is said of it: %s", &log)
	}
	if err := c.Reload(); err == nil {
		t.Error("a certificate without its key was read")
	}
	write(t, keyFile, key)
	want("two")
	_, old, oldKey := a.issue(&x509.Certificate{Subject: pkix.Name{CommonName: "old"}, NotAfter: time.Now().Add(-time.Minute)})
	put(old, oldKey)
	want("two")
	put("-----BEGIN", key)
	want("two")
	log.Reset()
	want("two")
	if log.Len() > 0 {
		t.Errorf("said again: %s", &log)
	}
	put(a.server("three"))
	want("three")
	put(a.server("four"))
	if err := c.Reload(); err != nil || shown(t, address) != "four" {
		t.Errorf("not reloaded: %v", err)
	}
	if _, err := NewCertificate(certFile, filepath.Join(dir, "none"), slog.New(slog.DiscardHandler)); err == nil {
		t.Error("a key that is not there")
	}
}

// TestCallersByCertificate: names are those of a certificate of an authority that is taken now, for clients.
func TestCallersByCertificate(t *testing.T) {
	a, other, server := newAuthority(t), newAuthority(t), newAuthority(t)
	dir := t.TempDir()
	cas := write(t, filepath.Join(dir, "clients.pem"), a.pem())
	g, err := New(Config{ClientCAFile: cas, Logger: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	cert, key := server.server("mirror")
	c, err := NewCertificate(write(t, filepath.Join(dir, "cert.pem"), cert), write(t, filepath.Join(dir, "key.pem"), key), slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	address := listen(t, c.TLS(g.ClientCAs), func(w http.ResponseWriter, r *http.Request) {
		who, err := g.Caller(r)
		if err != nil || who.Known() != who.MayPull(is("x")) {
			t.Errorf("%+v %v", who, err)
		}
		_, _ = w.Write([]byte(strings.Join(who.Names, " ")))
	})
	uri := &url.URL{Scheme: "spiffe", Host: "test", Path: "/ci"}
	ci := a.client(&x509.Certificate{Subject: pkix.Name{CommonName: "ci"}, DNSNames: []string{"ci.test"}, EmailAddresses: []string{"ci@test"}, URIs: []*url.URL{uri}})
	foreign := other.client(&x509.Certificate{Subject: pkix.Name{CommonName: "ci"}})
	noClient, _, _ := a.issue(&x509.Certificate{Subject: pkix.Name{CommonName: "ci"}, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}})
	old := a.client(&x509.Certificate{Subject: pkix.Name{CommonName: "ci"}, NotAfter: time.Now().Add(-time.Minute)})
	ask := func(client *http.Client) (string, error) {
		resp, err := client.Get("https://" + address + "/")
		if err != nil {
			return "", err
		}
		defer resp.Body.Close()
		var body bytes.Buffer
		_, err = body.ReadFrom(resp.Body)
		return body.String(), err
	}
	by := func(certificates ...tls.Certificate) *http.Client {
		config := &tls.Config{InsecureSkipVerify: true, ClientSessionCache: tls.NewLRUClientSessionCache(1),
			GetClientCertificate: func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { // also one that is not wanted
				if len(certificates) == 0 {
					return new(tls.Certificate), nil
				}
				return &certificates[0], nil
			}}
		client := &http.Client{Transport: &http.Transport{TLSClientConfig: config, DialContext: func(ctx context.Context, network, address string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, network, address)
		}}}
		t.Cleanup(client.CloseIdleConnections)
		return client
	}
	known := by(ci)
	if got, err := ask(known); err != nil || got != "ci ci.test ci@test spiffe://test/ci" {
		t.Errorf("ci: %q %v", got, err)
	}
	if got, err := ask(by()); err != nil || got != "" {
		t.Errorf("nobody: %q %v", got, err)
	}
	for name, pair := range map[string]tls.Certificate{"another authority": foreign, "not a client's": noClient, "run out": old} {
		if got, err := ask(by(pair)); err == nil || got != "" {
			t.Errorf("%s: %q %v", name, got, err)
		}
	}
	write(t, cas, other.pem())
	if err := g.Reload(); err != nil {
		t.Fatal(err)
	}
	if got, err := ask(known); err != nil || got != "" {
		t.Errorf("of an authority that is none any more, on the same connection: %q %v", got, err)
	}
	known.CloseIdleConnections()
	if got, err := ask(known); err == nil || got != "" {
		t.Errorf("of an authority that is none any more, on a new connection: %q %v", got, err)
	}
	if got, err := ask(by(foreign)); err != nil || got != "ci" {
		t.Errorf("of the authority that is one now: %q %v", got, err)
	}
	for what, text := range map[string]string{"nothing": "", "a key": key, "broken": "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"} {
		if _, err := New(Config{ClientCAFile: write(t, cas, text)}); err == nil || !strings.Contains(err.Error(), cas) {
			t.Errorf("%s: %v", what, err)
		}
	}
}
