package access

import (
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"log/slog"
	"time"
)

// authorities are those whose client certificates are taken.
type authorities struct{ file *file[authority] }

type authority struct {
	pool  *x509.CertPool
	known map[string]bool // the certificates, by their bytes
}

func newAuthorities(name string, logger *slog.Logger) (*authorities, error) {
	file, err := open(logger, func() (*authority, error) { return readAuthority(name) }, name)
	return &authorities{file}, err
}

func readAuthority(name string) (*authority, error) {
	raw, err := readFile(name)
	if err != nil {
		return nil, err
	}
	a := &authority{x509.NewCertPool(), map[string]bool{}}
	for block, rest := pem.Decode(raw); block != nil; block, rest = pem.Decode(rest) {
		if block.Type != "CERTIFICATE" {
			return nil, fmt.Errorf("%s: a %.30q, where certificates belong", name, block.Type)
		}
		cert, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", name, err)
		}
		a.pool.AddCert(cert)
		a.known[string(cert.Raw)] = true
	}
	if len(a.known) == 0 {
		return nil, fmt.Errorf("%s: no certificate in it; write those of the authorities, as PEM", name)
	}
	return a, nil
}

// names are the caller's, as the certificate has them that was verified when the connection began: none if it
// has run out since, or its authority is none of ours any more.
func (a *authorities) names(state *tls.ConnectionState) []string {
	if state == nil || len(state.VerifiedChains) == 0 {
		return nil
	}
	known := a.file.get().known
	for _, chain := range state.VerifiedChains {
		now, leaf := time.Now(), chain[0]
		if !known[string(chain[len(chain)-1].Raw)] || now.After(leaf.NotAfter) {
			continue
		}
		var names []string
		if leaf.Subject.CommonName != "" {
			names = append(names, leaf.Subject.CommonName)
		}
		names = append(append(names, leaf.DNSNames...), leaf.EmailAddresses...)
		for _, uri := range leaf.URIs {
			names = append(names, uri.String())
		}
		return names
	}
	return nil
}

// Certificate is a listener's own, which is read again when its files change.
type Certificate struct{ file *file[tls.Certificate] }

// NewCertificate reads a certificate with its chain and its key, from PEM files.
func NewCertificate(certFile, keyFile string, logger *slog.Logger) (*Certificate, error) {
	first := true
	file, err := open(logger, func() (*tls.Certificate, error) {
		pair, err := readPair(certFile, keyFile)
		if err == nil && time.Now().After(pair.Leaf.NotAfter) {
			err = fmt.Errorf("%s: has run out at %s", certFile, pair.Leaf.NotAfter.Format(time.RFC3339))
			if first { // there is no other one, and some clients do not look
				logger.Error("certificate is no longer good", "err", err)
				err = nil
			}
		}
		first = false
		return pair, err
	}, certFile, keyFile)
	if err != nil {
		return nil, fmt.Errorf("tls: %w", err)
	}
	return &Certificate{file}, nil
}

func readPair(certFile, keyFile string) (*tls.Certificate, error) {
	cert, err := readFile(certFile)
	if err != nil {
		return nil, err
	}
	key, err := readFile(keyFile)
	if err != nil {
		return nil, err
	}
	pair, err := tls.X509KeyPair(cert, key)
	if err == nil && pair.Leaf == nil {
		err = errors.New("no certificate")
	}
	if err != nil {
		return nil, fmt.Errorf("%s and %s: %w", certFile, keyFile, err)
	}
	return &pair, nil
}

// Reload reads the files now. If that fails, the certificate is as it was.
func (c *Certificate) Reload() error { return c.file.reload() }

// TLS is the configuration of a listener with this certificate. Clients are asked for one of the authorities
// that clientCAs returns when they connect, if it is not nil, and need not have one: that is for the handler
// to judge, which can say more than an alert.
func (c *Certificate) TLS(clientCAs func() *x509.CertPool) *tls.Config {
	base := &tls.Config{
		NextProtos:     []string{"h2", "http/1.1"},
		GetCertificate: func(*tls.ClientHelloInfo) (*tls.Certificate, error) { return c.file.get(), nil },
	}
	asking := base.Clone()
	asking.ClientAuth = tls.VerifyClientCertIfGiven
	base.GetConfigForClient = func(*tls.ClientHelloInfo) (*tls.Config, error) {
		pool := clientCAs()
		if pool == nil {
			return nil, nil
		}
		config := asking.Clone() // a session that is resumed has its old chain, which names looks at
		config.ClientCAs = pool
		return config, nil
	}
	return base
}
