package registrytest

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"io"
	"log"
	"math/big"
	"net"
	"net/http"
	"sync"
	"time"
)

// Server serves one handler on one listener, over HTTP/1.1.
type Server struct {
	URL string // without a slash at its end

	http    *http.Server
	stop    context.CancelFunc
	serving sync.WaitGroup // the accept loop, connections, handlers
}

// Serve serves h on l until Close: with TLS if a certificate is given.
func Serve(l net.Listener, h http.Handler, certificates ...tls.Certificate) *Server {
	ctx, stop := context.WithCancel(context.Background())
	s := &Server{URL: "http://" + l.Addr().String(), stop: stop}
	if named, ok := l.(*listener); ok {
		s.URL = "http://" + named.address
	}
	if len(certificates) > 0 {
		s.URL = "https" + s.URL[len("http"):]
		l = tls.NewListener(l, &tls.Config{Certificates: certificates, NextProtos: []string{"http/1.1"}})
	}
	s.http = &http.Server{
		Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			s.serving.Add(1)
			defer s.serving.Done()
			h.ServeHTTP(w, r)
		}),
		BaseContext: func(net.Listener) context.Context { return ctx },
		ConnState: func(c net.Conn, state http.ConnState) {
			switch state {
			case http.StateNew:
				if s.serving.Add(1); ctx.Err() != nil {
					_ = c.Close() // http.Server.Close may have missed it
				}
			case http.StateClosed, http.StateHijacked:
				s.serving.Done()
			}
		},
		ErrorLog: log.New(io.Discard, "", 0), // TLS handshakes fail on purpose here
	}
	s.serving.Add(1)
	go func() {
		defer s.serving.Done()
		_ = s.http.Serve(l) // ErrServerClosed
	}()
	return s
}

// Close stops listening, cuts every connection, and waits for all that it started.
func (s *Server) Close() error {
	s.stop()
	err := s.http.Close()
	s.serving.Wait()
	return err
}

// CA is a certificate authority that nobody trusts but who has its Pool.
type CA struct {
	certificate *x509.Certificate
	key         *ecdsa.PrivateKey
}

// lifetime of certificates: the clock of a synctest bubble starts in 2000.
var (
	notBefore = time.Date(1990, 1, 1, 0, 0, 0, 0, time.UTC)
	notAfter  = time.Date(2090, 1, 1, 0, 0, 0, 0, time.UTC)
)

// NewCA makes a certificate authority.
func NewCA() *CA {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		panic(err) // crypto/rand does not fail, nor does what follows
	}
	template := &x509.Certificate{
		SerialNumber:          big.NewInt(1),
		Subject:               pkix.Name{CommonName: "registrytest"},
		NotBefore:             notBefore,
		NotAfter:              notAfter,
		KeyUsage:              x509.KeyUsageCertSign,
		IsCA:                  true,
		BasicConstraintsValid: true,
	}
	raw, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	if err != nil {
		panic(err)
	}
	certificate, err := x509.ParseCertificate(raw)
	if err != nil {
		panic(err)
	}
	return &CA{certificate, key}
}

// Pool trusts this authority and no other.
func (c *CA) Pool() *x509.CertPool {
	pool := x509.NewCertPool()
	pool.AddCert(c.certificate)
	return pool
}

// PEM is the authority's certificate, for a file of those that are trusted.
func (c *CA) PEM() []byte {
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.certificate.Raw})
}

// Certificate is a server's, for a host name or an IP address; the zero expiry is far away. Give one
// of another authority, for another host, or expired to [Serve] to see it refused.
func (c *CA) Certificate(host string, expiry time.Time) (tls.Certificate, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return tls.Certificate{}, fmt.Errorf("certificate of %s: %w", host, err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(2),
		Subject:      pkix.Name{CommonName: host},
		NotBefore:    notBefore,
		NotAfter:     notAfter,
		KeyUsage:     x509.KeyUsageDigitalSignature,
		ExtKeyUsage:  []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	}
	if !expiry.IsZero() {
		template.NotAfter = expiry
	}
	if ip := net.ParseIP(host); ip != nil {
		template.IPAddresses = []net.IP{ip}
	} else {
		template.DNSNames = []string{host}
	}
	raw, err := x509.CreateCertificate(rand.Reader, template, c.certificate, &key.PublicKey, c.key)
	if err != nil {
		return tls.Certificate{}, fmt.Errorf("certificate of %s: %w", host, err)
	}
	return tls.Certificate{Certificate: [][]byte{raw}, PrivateKey: key}, nil
}
