//go:build linux

package charts_test

import (
	"bytes"
	"encoding/json"
	"flag"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"breakwater/pkg/config"

	"github.com/google/go-cmp/cmp"
)

var update = flag.Bool("update", false, "write what is generated anew")

// TestValuesSchema holds that values.schema.json has the configuration's own schema in it.
func TestValuesSchema(t *testing.T) {
	file := filepath.Join(chart, "values.schema.json")
	old, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	var values, own map[string]any
	if err := json.Unmarshal(old, &values); err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal(config.Schema(), &own); err != nil {
		t.Fatal(err)
	}
	values["$defs"] = own["$defs"] // references begin at the top
	delete(own, "$defs")
	delete(own, "$schema")
	values["properties"].(map[string]any)["config"] = own
	var text bytes.Buffer
	e := json.NewEncoder(&text)
	e.SetEscapeHTML(false)
	e.SetIndent("", "  ")
	if err := e.Encode(values); err != nil {
		t.Fatal(err)
	}
	generated(t, file, string(old), text.String())
}

// TestReadme holds that the chart's README is what helm-docs makes of its values.
func TestReadme(t *testing.T) {
	dir := copied(t)
	run(t, cache(t, "bin/helm-docs"), "--chart-search-root", dir, "--sort-values-order", "file", "--log-level", "error")
	made, err := os.ReadFile(filepath.Join(dir, "README.md"))
	if err != nil {
		t.Fatal(err)
	}
	old, _ := os.ReadFile(filepath.Join(chart, "README.md")) // none is as good as an old one
	generated(t, filepath.Join(chart, "README.md"), string(old), strings.TrimRight(string(made), "\n")+"\n")
}

// generated holds that a file is what is made for it, or writes it.
func generated(t *testing.T, file, old, made string) {
	t.Helper()
	if *update {
		if err := os.WriteFile(file, []byte(made), 0o644); err != nil {
			t.Fatal(err)
		}
		return
	}
	if diff := cmp.Diff(old, made); diff != "" {
		t.Errorf("%s is out of date: go test ./charts -update; -is +made\n%s", file, diff)
	}
}
