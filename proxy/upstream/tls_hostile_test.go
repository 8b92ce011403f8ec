package upstream

import (
	"bytes"
	"crypto/aes"
	"crypto/cipher"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/hkdf"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"math/big"
	"net"
	"strings"
	"testing"
	"time"

	"breakwater/pkg/registrytest"
)

// An upstream's connection may be hostile before its first byte of HTTP is (CVE-2026-33814, CVE-2026-32283).
// Whatever it is, the request is over in time, and no HTTP but 1.1 has been spoken.
func TestH39HostileConnections(t *testing.T) {
	ca := registrytest.NewCA()
	good, err := ca.Certificate("evil.test", time.Time{})
	if err != nil {
		t.Fatal(err)
	}
	frames := func(conn *tls.Conn, _ net.Conn, _ string) { // SETTINGS_MAX_FRAME_SIZE 0
		for {
			if _, err := conn.Write([]byte{0, 0, 6, 4, 0, 0, 0, 0, 0, 0, 5, 0, 0, 0, 0}); err != nil {
				return
			}
		}
	}
	updates := func(n int, asks byte) func(*tls.Conn, net.Conn, string) {
		return func(conn *tls.Conn, raw net.Conn, keys string) { flood(t, conn, raw, keys, n, asks) }
	}
	for _, tt := range []struct {
		name        string
		certificate tls.Certificate
		protocols   []string
		speak       func(conn *tls.Conn, raw net.Conn, keys string) // once it has read a request
		reason      string
	}{
		{"HTTP/2 only", good, []string{"h2"}, frames, "failed"},
		{"frames of HTTP/2, whatever was agreed", good, []string{"h2", "http/1.1"}, frames, "failed"},
		{"frames of HTTP/2, nothing agreed", good, nil, frames, "failed"},
		{"key updates", good, nil, updates(1, 0), "failed"},
		{"key updates that want one back", good, nil, updates(1, 1), "failed"},
		{"1,000 key updates in a record", good, nil, updates(1000, 1), "failed"},
		{"64 KB of certificates", chain(t, 64<<10), nil, frames, "tls failed"},
		{"300 KB of certificates", chain(t, 300<<10), nil, frames, "tls failed"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			guard(t, registrytest.Auth{}, func(g *guarded) {
				g.pool = NewPool(Settings{Lookup: g.network.Lookup, Dial: g.network.DialContext, TLS: &tls.Config{RootCAs: ca.Pool()}})
				defer g.pool.Close()
				g.use(Config{Registry: "evil", URL: "https://evil.test"})
				listener, err := g.network.Listen("evil.test:443")
				if err != nil {
					g.Fatal(err)
				}
				var asked bytes.Buffer
				ended := make(chan struct{})
				go func() {
					defer close(ended)
					for {
						raw, err := listener.Accept()
						if err != nil {
							return
						}
						var keys bytes.Buffer
						conn := tls.Server(raw, &tls.Config{Certificates: []tls.Certificate{tt.certificate}, NextProtos: tt.protocols, KeyLogWriter: &keys, SessionTicketsDisabled: true})
						request := make([]byte, 4096)
						if n, err := conn.Read(request); err == nil {
							asked.Write(request[:n])
							tt.speak(conn, raw, keys.String())
						}
						raw.Close()
					}
				}()
				began := time.Now()
				err = g.ask("evil", "org/a")
				if e := new(Error); !errors.As(err, &e) || e.Reason != tt.reason || e.verdict == excluded || e.verdict == success {
					g.Errorf("%v, want %s", err, tt.reason)
				}
				if took := time.Since(began); took > headerTimeout {
					g.Errorf("took %v", took)
				}
				listener.Close()
				g.network.Reset("evil.test:443")
				<-ended
				if said := asked.String(); (said == "") != (tt.reason == "tls failed") || said != "" && !strings.HasPrefix(said, "GET /v2/org/a/manifests/latest HTTP/1.1\r\n") {
					g.Errorf("it was asked with %.40q", said)
				}
			})
		})
	}
}

// flood writes records of n KeyUpdate messages (RFC 8446, section 4.6.3) for as long as somebody reads.
func flood(t *testing.T, conn *tls.Conn, raw net.Conn, keys string, n int, asks byte) {
	if suite := conn.ConnectionState().CipherSuite; suite != tls.TLS_AES_128_GCM_SHA256 {
		t.Errorf("the cipher suite is %s", tls.CipherSuiteName(suite))
		return
	}
	_, line, _ := strings.Cut(keys, "SERVER_TRAFFIC_SECRET_0 ")
	secret := make([]byte, 0, sha256.Size)
	if fields := strings.Fields(line); len(fields) > 1 {
		secret, _ = hex.DecodeString(fields[1])
	}
	messages := append(bytes.Repeat([]byte{24, 0, 0, 1, asks}, n), 22) // of the handshake, they are
	for range 100_000 {
		header := binary.BigEndian.AppendUint16([]byte{23, 3, 3}, uint16(len(messages)+16))
		block, err := aes.NewCipher(expand(t, secret, "key", 16))
		if err != nil {
			t.Error(err)
			return
		}
		sealer, err := cipher.NewGCM(block)
		if err != nil {
			t.Error(err)
			return
		}
		if _, err := raw.Write(sealer.Seal(header, expand(t, secret, "iv", 12), messages, header)); err != nil { // the first record under each key
			return
		}
		for range n {
			secret = expand(t, secret, "traffic upd", sha256.Size)
		}
	}
	t.Error("100,000 records were taken in")
}

// expand is HKDF-Expand-Label without a context (RFC 8446, section 7.1).
func expand(t *testing.T, secret []byte, label string, length int) []byte {
	info := binary.BigEndian.AppendUint16(nil, uint16(length))
	info = append(info, byte(len("tls13 "+label)))
	info = append(info, "tls13 "+label+"\x00"...)
	key, err := hkdf.Expand(sha256.New, secret, string(info), length)
	if err != nil {
		t.Error(err)
	}
	return key
}

// chain is a certificate for evil.test behind so many bytes of authorities, each of which could be the
// one that issued it, and none of which leads to a root.
func chain(t *testing.T, size int) tls.Certificate {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	made := func(serial int64, subject, issuer string) []byte {
		template := &x509.Certificate{SerialNumber: big.NewInt(serial), Subject: pkix.Name{CommonName: subject}, NotBefore: time.Unix(0, 0), NotAfter: time.Unix(1<<32, 0)}
		if serial > 0 {
			template.IsCA, template.BasicConstraintsValid, template.KeyUsage = true, true, x509.KeyUsageCertSign
			template.DNSNames = []string{strings.Repeat("x", 60) + fmt.Sprint(serial)}
		} else {
			template.SerialNumber, template.DNSNames = big.NewInt(1<<40), []string{"evil.test"}
		}
		raw, err := x509.CreateCertificate(rand.Reader, template, &x509.Certificate{Subject: pkix.Name{CommonName: issuer}}, &key.PublicKey, key)
		if err != nil {
			t.Fatal(err)
		}
		return raw
	}
	certificate := tls.Certificate{Certificate: [][]byte{made(0, "evil.test", "authority")}, PrivateKey: key}
	for i := int64(1); size > 0; i++ {
		raw := made(i, "authority", "authority")
		certificate.Certificate = append(certificate.Certificate, raw)
		size -= len(raw)
	}
	return certificate
}
