package clients

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"io/fs"
	"log/slog"
	"math/big"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/pelletier/go-toml/v2"
)

// newPair is a certificate and its key in PEM.
func newPair(t *testing.T) (certificate, key string) {
	t.Helper()
	private, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1)}
	public, err := x509.CreateCertificate(rand.Reader, template, template, private.Public(), private)
	if err != nil {
		t.Fatal(err)
	}
	secret, err := x509.MarshalPKCS8PrivateKey(private)
	if err != nil {
		t.Fatal(err)
	}
	return string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: public})), string(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: secret}))
}

// certified is a mirror whose authority and whose client are named.
func (d *certsD) certified() Containerd {
	d.Helper()
	c := d.containerd()
	c.Mirror, c.Registries = "https://127.0.0.1:5000", map[string]string{"quay.io": "https://quay.io"}
	certificate, key := newPair(d.T)
	c.CA, c.Client = certificate, certificate+key
	return c
}

// works reads a registry's folder as containerd does, which pulls from nowhere if it cannot read what
// hosts.toml names.
func (d *certsD) works(folder string) error {
	d.Helper()
	text, err := os.ReadFile(filepath.Join(d.dir, folder, hostsFile))
	if errors.Is(err, fs.ErrNotExist) {
		return nil // and it looks no further
	}
	if err != nil {
		return err
	}
	var hosts struct {
		Host map[string]struct{ CA, Client string }
	}
	if err := toml.Unmarshal(text, &hosts); err != nil {
		return err
	}
	for _, host := range hosts.Host {
		if host.CA != "" {
			text, err := os.ReadFile(filepath.Join(d.dir, folder, host.CA))
			if err != nil {
				return err
			}
			if !x509.NewCertPool().AppendCertsFromPEM(text) {
				d.Errorf("no certificate in %s", text)
			}
		}
		if host.Client != "" {
			client := filepath.Join(d.dir, folder, host.Client)
			if _, err := tls.LoadX509KeyPair(client, client); err != nil {
				return err
			}
		}
	}
	return nil
}

func TestCertificates(t *testing.T) {
	d := newCertsD(t)
	c := d.certified()
	plain, trusting := c, c
	plain.CA, plain.Client, plain.Mirror = "", "", "http://127.0.0.1:5000"
	trusting.Client = ""
	another := trusting
	another.CA += c.CA
	for _, row := range []struct {
		name string
		do   func() ([]Change, error)
		want []string
	}{
		{"new", c.Write, []string{"quay.io/breakwater-ca.pem write", "quay.io/breakwater-client.pem write", "quay.io write"}},
		{"again", c.Write, []string{"quay.io/breakwater-ca.pem unchanged", "quay.io/breakwater-client.pem unchanged", "quay.io unchanged"}},
		{"without a client", trusting.Write, []string{"quay.io/breakwater-ca.pem unchanged", "quay.io update", "quay.io/breakwater-client.pem remove"}},
		{"another authority", another.Write, []string{"quay.io/breakwater-ca.pem update", "quay.io unchanged"}},
		{"without any", plain.Write, []string{"quay.io update", "quay.io/breakwater-ca.pem remove"}},
		{"with both", c.Write, []string{"quay.io/breakwater-ca.pem write", "quay.io/breakwater-client.pem write", "quay.io update"}},
		{"undo", func() ([]Change, error) { return Undo(d.dir) }, []string{"quay.io remove", "quay.io/breakwater-client.pem remove", "quay.io/breakwater-ca.pem remove"}},
	} {
		d.same(row.name, d.must(row.do()), row.want)
		if err := d.works("quay.io"); err != nil {
			t.Errorf("%s: %v", row.name, err)
		}
		tree := d.tree()
		if ca := tree["quay.io/"+caFile]; ca != "" && !strings.HasPrefix(ca, "-rw-r--r--") {
			t.Errorf("%s: %s", row.name, ca)
		}
		if client := tree["quay.io/"+clientFile]; client != "" && !strings.HasPrefix(client, "-rw-------") {
			t.Errorf("%s: who may read the key: %.10s", row.name, client)
		}
		if row.name == "undo" && len(tree) != 1 {
			t.Errorf("left: %v", tree)
		}
	}
	plan, err := c.Plan()
	d.must(plan, err)
	for _, change := range plan {
		if strings.Contains(change.Content, "PRIVATE KEY") {
			t.Errorf("the plan tells the key: %+v", change)
		}
	}
}

// TestForeignCertificates: what somebody else has where our certificates should be is as much theirs as hosts.toml,
// and a folder is never ours in part.
func TestForeignCertificates(t *testing.T) {
	for _, row := range []struct {
		name     string
		foreign  []string
		existing Existing
		want     []string // nil for a refusal
	}{
		{"refused", []string{caFile}, ExistingRefuse, nil},
		{"key refused", []string{clientFile}, ExistingRefuse, nil},
		{"kept", []string{caFile}, ExistingKeep, []string{"quay.io/breakwater-ca.pem keep"}},
		{"hosts.toml kept", []string{hostsFile}, ExistingKeep, []string{"quay.io keep"}},
		{"replaced", []string{caFile, hostsFile}, ExistingReplace, []string{"quay.io/breakwater-ca.pem replace", "quay.io/breakwater-client.pem write", "quay.io replace"}},
		{"replaced before", []string{caFile, caFile + keptSuffix}, ExistingReplace, nil},
	} {
		t.Run(row.name, func(t *testing.T) {
			d := newCertsD(t)
			for _, name := range row.foreign {
				d.put("quay.io/"+name, "# "+name+"\n", 0o640)
			}
			before := d.tree()
			c := d.certified()
			c.Existing = row.existing
			done, err := c.Write()
			if row.want == nil {
				if err == nil || !strings.Contains(err.Error(), filepath.Join(d.dir, "quay.io", row.foreign[0])) {
					t.Errorf("write: %v", err)
				}
				d.same("after a refusal", d.tree(), before)
				return
			}
			d.same("write", d.must(done, err), row.want)
			if row.existing == ExistingKeep {
				d.same("after it", d.tree(), before)
			} else if err := d.works("quay.io"); err != nil {
				t.Error(err)
			}
			d.must(Undo(d.dir))
			d.same("after undo", d.tree(), before)
		})
	}
}

// TestKilledAmongCertificates stops between any two files: at each moment hosts.toml names only what is there, and
// what comes then ends well.
func TestKilledAmongCertificates(t *testing.T) {
	d := newCertsD(t)
	c := d.certified()
	c.Existing = ExistingReplace
	plain := c
	plain.CA, plain.Client = "", ""
	undo := Containerd{Mirror: c.Mirror} // of nothing
	for _, row := range []struct {
		name     string
		from, to Containerd
		foreign  string
	}{
		{"certificates come", plain, c, ""},
		{"certificates go", c, plain, ""},
		{"all goes", c, undo, ""},
		{"a foreign file is replaced", undo, c, "server = \"https://quay.io\"\n"},
		{"a foreign file is restored", c, undo, "server = \"https://quay.io\"\n"},
	} {
		t.Run(row.name, func(t *testing.T) {
			for n, all := 0, 1; n <= all; n++ {
				d := newCertsD(t)
				row.from.Dir, row.to.Dir = d.dir, d.dir
				d.put("quay.io/x", "somebody's", 0o644)
				if row.foreign != "" {
					d.put("quay.io/hosts.toml", row.foreign, 0o640)
				}
				before := d.tree()
				d.must(row.from.Write())
				root, err := os.OpenRoot(d.dir)
				if err != nil {
					t.Fatal(err)
				}
				defer root.Close()
				todo, err := row.to.todo(root)
				if err != nil || len(todo) != 1 {
					t.Fatal(todo, err)
				}
				if all = len(todo[0].steps); all < 3 {
					t.Fatalf("%d steps", all)
				}
				todo[0].steps = todo[0].steps[:n]
				d.must(carryOut(root, todo))
				if err := d.works("quay.io"); err != nil {
					t.Errorf("after %d of %d: %v", n, all, err)
				}
				d.must(row.to.Write())
				if err := d.works("quay.io"); err != nil {
					t.Errorf("after the next: %v", err)
				}
				d.must(Undo(d.dir))
				d.same("after undo", d.tree(), before)
			}
		})
	}
}

// TestFailedAmongCertificates: a hosts.toml that cannot be taken away keeps what it names.
func TestFailedAmongCertificates(t *testing.T) {
	d := newCertsD(t)
	c := d.certified()
	d.must(c.Write())
	root, err := os.OpenRoot(d.dir)
	if err != nil {
		t.Fatal(err)
	}
	defer root.Close()
	f, err := look(root, "quay.io")
	if err != nil {
		t.Fatal(err)
	}
	hosts := filepath.Join(d.dir, "quay.io", hostsFile)
	if err := os.Remove(hosts); err != nil {
		t.Fatal(err)
	}
	d.put("quay.io/hosts.toml/x", "", 0o644) // which nobody removes as a file
	done, err := f.carryOut(f.undo(d.dir, func(place) bool { return true }))
	if err == nil || len(done) > 0 || d.tree()["quay.io/"+caFile] == "" {
		t.Errorf("%v, %v: %v", done, err, d.tree())
	}
}

// TestHoldCertificates has others take one away.
func TestHoldCertificates(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := newCertsD(t)
		c := d.certified()
		var log said
		ctx, cancel := context.WithCancel(t.Context())
		ended := make(chan error, 1)
		go func() { ended <- Hold(ctx, always(c), slog.New(slog.NewTextHandler(&log, nil))) }()
		synctest.Wait()
		if err := os.Remove(filepath.Join(d.dir, "quay.io", caFile)); err != nil {
			t.Fatal(err)
		}
		time.Sleep(lookAgain)
		synctest.Wait()
		if err := d.works("quay.io"); err != nil || strings.Count(log.String(), "level=WARN") != 1 {
			t.Errorf("%v\n%s", err, &log)
		}
		cancel()
		if err := <-ended; err != nil {
			t.Error(err)
		}
		if tree := d.tree(); len(tree) != 1 {
			t.Errorf("left: %v", tree)
		}
	})
}

func TestUnwantedCertificates(t *testing.T) {
	certificate, key := newPair(t)
	_, other := newPair(t)
	block, _ := pem.Decode([]byte(certificate))
	for name, row := range map[string]struct {
		change func(*Containerd)
		said   string
	}{
		"no TLS":              {func(c *Containerd) { c.Mirror, c.Client = "http://127.0.0.1:5000", "" }, "write its URL with https"},
		"no TLS for a client": {func(c *Containerd) { c.Mirror, c.CA = "http://127.0.0.1:5000", "" }, "write its URL with https"},
		"no certificate":      {func(c *Containerd) { c.CA = "hello" }, "no certificate in PEM"},
		"DER":                 {func(c *Containerd) { c.CA = string(block.Bytes) }, "openssl x509"},
		"key":                 {func(c *Containerd) { c.CA = certificate + key }, "everybody on the host could read"},
		"damaged key":         {func(c *Containerd) { c.CA = certificate + key[:40] + "\n-----END PRIVATE KEY-----\n" }, "everybody on the host could read"},
		"request": {func(c *Containerd) {
			c.CA += string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: []byte("x")}))
		}, "certificate request"},
		"cut":     {func(c *Containerd) { c.CA += certificate[:len(certificate)/2] }, "is it whole"},
		"damaged": {func(c *Containerd) { c.CA = strings.Replace(certificate, "\n", "\n!", 1) + certificate }, "is it whole"},
		"nothing": {func(c *Containerd) {
			c.CA += string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: []byte("x")}))
		}, "certificate 2: "},
		"too large":    {func(c *Containerd) { c.CA += strings.Repeat("#\n", maxFile/2) }, "too many"},
		"another key":  {func(c *Containerd) { c.Client = certificate + other }, "client certificate: "},
		"no key":       {func(c *Containerd) { c.Client = certificate }, "client certificate: "},
		"large client": {func(c *Containerd) { c.Client += strings.Repeat("#\n", maxFile/2) }, "too many"},
	} {
		t.Run(name, func(t *testing.T) {
			d := newCertsD(t)
			c := d.certified()
			row.change(&c)
			if _, err := c.Write(); err == nil || !strings.Contains(err.Error(), row.said) {
				t.Errorf("write: %v, want %q", err, row.said)
			}
			if _, err := c.Plan(); err == nil {
				t.Error("planned")
			}
			if _, err := os.Stat(d.dir); err == nil {
				t.Error("something is written")
			}
		})
	}
	d := newCertsD(t)
	c := d.certified()
	c.CA = "Bag Attributes\n  friendlyName: x\n" + strings.ReplaceAll(c.CA, "\n", "\r\n") + c.CA // as tools write them
	d.must(c.Write())
	if text, err := os.ReadFile(filepath.Join(d.dir, "quay.io", caFile)); err != nil || !bytes.HasSuffix(text, []byte(c.CA)) {
		t.Errorf("written: %s, %v", text, err)
	}
}
