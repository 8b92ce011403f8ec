//go:build linux

package charts_test

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"go.yaml.in/yaml/v4"
)

// schemas is a folder of JSON schemas for kubeconform, closed to unknown fields: made of the OpenAPI
// document of Kubernetes and of the Prometheus operator's definitions.
func schemas(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	var api struct {
		Definitions map[string]map[string]any
	}
	raw, err := os.ReadFile(cache(t, "kubernetes/swagger.json"))
	if err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal(raw, &api); err != nil {
		t.Fatal(err)
	}
	for name, schema := range api.Definitions {
		kinds, _ := schema["x-kubernetes-group-version-kind"].([]any)
		for _, k := range kinds {
			kind := k.(map[string]any)
			writeJSON(t, filepath.Join(dir, schemaName(kind["kind"], kind["group"], kind["version"])),
				map[string]any{"$ref": "_definitions.json#/definitions/" + name})
		}
		closeSchema(schema)
	}
	api.Definitions["io.k8s.apimachinery.pkg.util.intstr.IntOrString"] = map[string]any{"type": []string{"string", "integer"}}
	api.Definitions["io.k8s.apimachinery.pkg.api.resource.Quantity"] = map[string]any{"type": []string{"string", "number"}}
	writeJSON(t, filepath.Join(dir, "_definitions.json"), map[string]any{"definitions": api.Definitions})

	for _, name := range []string{"podmonitors", "servicemonitors"} {
		raw, err := os.ReadFile(cache(t, "kubernetes/monitoring.coreos.com_"+name+".yaml"))
		if err != nil {
			t.Fatal(err)
		}
		var crd struct {
			Spec struct {
				Group    string
				Names    struct{ Kind string }
				Versions []struct {
					Name   string
					Schema struct {
						OpenAPIV3Schema map[string]any `yaml:"openAPIV3Schema"`
					}
				}
			}
		}
		if err := yaml.Unmarshal(raw, &crd); err != nil {
			t.Fatal(err)
		}
		for _, version := range crd.Spec.Versions {
			closeSchema(version.Schema.OpenAPIV3Schema)
			writeJSON(t, filepath.Join(dir, schemaName(crd.Spec.Names.Kind, crd.Spec.Group, version.Name)), version.Schema.OpenAPIV3Schema)
		}
	}
	return dir
}

// schemaName is what kubeconform asks for.
func schemaName(kind, group, version any) string {
	name := strings.ToLower(kind.(string)) + "-"
	if first, _, _ := strings.Cut(group.(string), "."); first != "" {
		name += first + "-"
	}
	return name + version.(string) + ".json"
}

// closeSchema has a schema, and all in it, refuse fields that it does not name.
func closeSchema(schema any) {
	switch s := schema.(type) {
	case []any:
		for _, item := range s {
			closeSchema(item)
		}
	case map[string]any:
		_, open := s["x-kubernetes-preserve-unknown-fields"]
		_, named := s["additionalProperties"]
		if properties, ok := s["properties"].(map[string]any); ok && len(properties) > 0 && !open && !named {
			s["additionalProperties"] = false
		}
		if s["x-kubernetes-int-or-string"] == true {
			delete(s, "format")
			s["type"] = []string{"string", "integer"}
		}
		for _, child := range s {
			closeSchema(child)
		}
	}
}

func writeJSON(t *testing.T, file string, content any) {
	t.Helper()
	raw, err := json.Marshal(content)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(file, raw, 0o644); err != nil {
		t.Fatal(err)
	}
}
