package clients

import (
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"strings"
)

// checkTLS finds mistakes in what containerd would find only when it pulls: it then does not pull at all, or passes
// the mirror by.
func (c Containerd) checkTLS(scheme string) error {
	if c.CA != "" {
		if err := checkCA(c.CA, maxFile-len(c.heading())); err != nil {
			return fmt.Errorf("ca: %w", err)
		}
	}
	if c.Client != "" {
		if err := checkClient(c.Client, maxFile-len(c.heading())); err != nil {
			return fmt.Errorf("client certificate: %w", err)
		}
	}
	if scheme != "https" && c.CA+c.Client != "" { // containerd would try https all the same
		return fmt.Errorf("mirror %s is asked without TLS, where certificates have no place: write its URL with https, or leave them out", c.Mirror)
	}
	return nil
}

// checkCA wants certificates that containerd reads, and nothing that everybody on the host must not read.
func checkCA(text string, size int) error {
	if strings.Contains(text, "PRIVATE KEY-----") {
		return errors.New("there is a private key in it, which everybody on the host could read: give the authority's certificates alone")
	}
	if len(text) > size {
		return fmt.Errorf("%d bytes are too many: give the certificates of the mirror's authority alone", len(text))
	}
	found := 0
	for block, rest := pem.Decode([]byte(text)); block != nil; block, rest = pem.Decode(rest) {
		if block.Type != "CERTIFICATE" || len(block.Headers) > 0 {
			return fmt.Errorf("there is a %s in it, which containerd does not read: give certificates alone", strings.ToLower(block.Type))
		}
		found++
		if _, err := x509.ParseCertificate(block.Bytes); err != nil {
			return fmt.Errorf("certificate %d: %w", found, err)
		}
	}
	// What is cut or damaged is passed over, by containerd too.
	switch begun := strings.Count(text, "-----BEGIN "); {
	case begun != found:
		return fmt.Errorf("%d certificates begin in it, and %d can be read: is it whole?", begun, found)
	case found == 0:
		return errors.New("there is no certificate in PEM in it (`-----BEGIN CERTIFICATE-----`): of one in DER, `openssl x509 -inform DER -in FILE` makes it")
	}
	return nil
}

// checkClient reads it as containerd does, which looks for the key where the certificate is.
func checkClient(text string, size int) error {
	if len(text) > size {
		return fmt.Errorf("%d bytes are too many", len(text))
	}
	_, err := tls.X509KeyPair([]byte(text), []byte(text))
	return err
}
