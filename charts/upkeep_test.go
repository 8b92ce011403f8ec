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
	var values, config map[string]any
	if err := json.Unmarshal(old, &values); err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal(run(t, breakwater(t), "config", "schema"), &config); err != nil {
		t.Fatal(err)
	}
	values["$defs"] = config["$defs"] // references begin at the top
	delete(config, "$defs")
	delete(config, "$schema")
	values["properties"].(map[string]any)["config"] = config
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
	copied := filepath.Join(t.TempDir(), chart)
	if err := os.CopyFS(copied, os.DirFS(chart)); err != nil {
		t.Fatal(err)
	}
	run(t, cache(t, "bin/helm-docs"), "--chart-search-root", copied, "--sort-values-order", "file", "--log-level", "error")
	made, err := os.ReadFile(filepath.Join(copied, "README.md"))
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
