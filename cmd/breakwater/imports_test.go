package main

import (
	"os/exec"
	"slices"
	"strings"
	"testing"
)

// TestImportsPointDown holds the layout: which of our packages may import which, and that a
// third-party library has one home.
func TestImportsPointDown(t *testing.T) {
	allowed := map[string][]string{
		"breakwater/pkg/oci":        {},
		"breakwater/pkg/config":     {"breakwater/pkg/oci"},
		"breakwater/pkg/clients":    {},
		"breakwater/pkg/warm":       {"breakwater/pkg/oci"},
		"breakwater/storage":        {"breakwater/pkg/oci"},
		"breakwater/storage/s3":     {"breakwater/pkg/oci"},
		"breakwater/proxy/upstream": {"breakwater/pkg/oci"},
		"breakwater/proxy/access":   {},
		"breakwater/proxy":          {"breakwater/pkg/oci", "breakwater/pkg/config", "breakwater/proxy/upstream", "breakwater/proxy/access", "breakwater/storage", "breakwater/storage/s3"},
		"breakwater/cmd/breakwater": {"breakwater/pkg/oci", "breakwater/pkg/config", "breakwater/pkg/clients", "breakwater/pkg/warm", "breakwater/proxy", "breakwater/proxy/access", "breakwater/storage", "breakwater/storage/s3"},
		// For tests, the demo, the bench and the long runs only.
		"breakwater/pkg/registrytest": {"breakwater/pkg/oci"},
		"breakwater/pkg/buckettest":   {"breakwater/pkg/registrytest"},
		"breakwater/cmd/demo":         {"breakwater/pkg/oci", "breakwater/pkg/registrytest"},
		"breakwater/cmd/bench":        {"breakwater/pkg/oci", "breakwater/pkg/registrytest", "breakwater/pkg/buckettest", "breakwater/storage", "breakwater/storage/s3"},
		"breakwater/cmd/fleet": {"breakwater/pkg/oci", "breakwater/pkg/config", "breakwater/pkg/registrytest", "breakwater/pkg/buckettest",
			"breakwater/proxy", "breakwater/storage", "breakwater/storage/s3"},
		"breakwater/cmd/pack": {},
		"breakwater/cmd/soak": {"breakwater/pkg/oci", "breakwater/pkg/registrytest"},
		"breakwater/charts":   {}, // nothing but tests
	}
	homes := map[string]string{
		"github.com/sony/gobreaker/":              "breakwater/proxy/upstream",
		"golang.org/x/crypto/bcrypt":              "breakwater/proxy/access",
		"github.com/go-jose/":                     "breakwater/proxy/access",
		"golang.org/x/net/publicsuffix":           "breakwater/proxy/upstream",
		"golang.org/x/sync/singleflight":          "breakwater/proxy/upstream",
		"github.com/prometheus/":                  "breakwater/proxy",
		"github.com/hashicorp/golang-lru/":        "breakwater/storage",
		"github.com/aws/aws-sdk-go-v2/service/s3": "breakwater/storage/s3",
		"go.yaml.in/":                             "breakwater/pkg/config",
		"github.com/pelletier/go-toml/":           "breakwater/pkg/clients",
		"github.com/dustin/go-humanize":           "breakwater/pkg/config",
		"github.com/spf13/":                       "breakwater/cmd/breakwater",
		"github.com/coreos/go-systemd/":           "breakwater/cmd/breakwater",
		"golang.org/x/crypto/x509roots/":          "breakwater/cmd/pack",
		"github.com/google/go-containerregistry/": "breakwater/pkg/warm",
		"github.com/vbauerster/mpb/":              "breakwater/cmd/breakwater",
		"github.com/distribution/reference/":      "breakwater/pkg/oci",
	}
	out, err := exec.Command("go", "list", "-f", `{{.ImportPath}} {{join .Imports " "}}`, "breakwater/...").CombinedOutput()
	if err != nil {
		t.Fatalf("go list: %v\n%s", err, out)
	}
	for line := range strings.Lines(string(out)) {
		importer, imports, _ := strings.Cut(strings.TrimSpace(line), " ")
		below, known := allowed[importer]
		if !known {
			t.Errorf("%s is a new package: what does it hide? Give it a place in this list", importer)
		}
		for imported := range strings.FieldsSeq(imports) {
			if strings.HasPrefix(imported, "breakwater/") && !slices.Contains(below, imported) {
				t.Errorf("%s imports %s, which is not below it", importer, imported)
			}
			for library, home := range homes {
				if strings.HasPrefix(imported, library) && importer != home && !strings.HasPrefix(importer, "breakwater/cmd/bench") && importer != "breakwater/pkg/buckettest" {
					t.Errorf("%s imports %s, whose home is %s", importer, imported, home)
				}
			}
		}
	}
}
