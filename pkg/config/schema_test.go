package config

import (
	"encoding"
	"encoding/json"
	"path/filepath"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/santhosh-tekuri/jsonschema/v6"
	"go.yaml.in/yaml/v4"
)

// fits holds a YAML file against the schema, as an editor would.
func fits(t *testing.T, text []byte) error {
	t.Helper()
	doc, err := jsonschema.UnmarshalJSON(strings.NewReader(string(Schema())))
	if err != nil {
		t.Fatal(err)
	}
	compiler := jsonschema.NewCompiler()
	if err := compiler.AddResource("schema.json", doc); err != nil {
		t.Fatal(err)
	}
	compiled, err := compiler.Compile("schema.json")
	if err != nil {
		t.Fatal(err)
	}
	var value any
	if err := yaml.Load(text, &value); err != nil {
		t.Fatal(err)
	}
	return compiled.Validate(value)
}

func TestSchemaRefusesWhatLoadRefuses(t *testing.T) {
	key := filepath.Join(folder(t), "fleet.key")
	for _, text := range []string{"access: []", "access: {loopback: asked}", "access: {anonymous: true, htpasswd: KEY, loopback: asked}", "access: {anonymous: true, loopback: shut}", "access: {htpasswd: KEY, loopback: asked, token: {realm: 'https://a/t', service: s, issuer: i, keys_file: KEY}}",
		"access: {loopback: asked, token: {realm: 'https://a/t', service: s, issuer: i}}", "access: {loopback: asked, token: {realm: 'https://u:p@a/t', service: s, issuer: i, keys_file: KEY}}", "access: {loopback: asked, token: {realm: 'https://a/t', service: 'a b', issuer: i, keys_file: KEY}}",
		"access: {htpasswd: KEY, loopback: asked, rules: [{repositories: [docker.io/library/*]}]}", "access: {htpasswd: KEY, loopback: asked, rules: [{repositories: [x], allow: [ci]}]}", "access: {htpasswd: KEY, loopback: asked, rules: [{repositories: [docker.io/library/*], allow: []}]}",
		"shared: []", "shared: {key_file: /dev/null}", "shared: {wait: 1s}", "shared: {s3: {bucket: builds, region: us-east-1}}", "shared: {s3: {region: us-east-1}, key_file: /dev/null}", "completion: {images: some}", "completion: {bytes_per_day: auto}", "completion: {bytes_per_day: 10%}", "keep: [{platforms: [linux/amd64]}]",
		"keep: [{image: docker.io/alpine}]", "keep: [{image: 'docker.io/alpine:3', platforms: []}]", "keep: [{image: 'docker.io/alpine:3', platforms: [amd64]}]", "capacity: lots", "capacity: 5", "scrub: 8MiB", "scrub: true", "log: {level: loud}", "tags: {max_stale: -1s}", "tags: {max_stale: 5}", "any_registry: 'yes'",
		"shared: {s3: {bucket: builds}, key_file: KEY}", "shared: {s3: {bucket: Builds, region: us-east-1}, key_file: KEY}", "shared: {s3: {bucket: a..b, region: us-east-1}, key_file: KEY}", "shared: {s3: {bucket: 10.0.0.1, region: us-east-1}, key_file: KEY}",
		"shared: {s3: {bucket: builds, region: us-east-1, prefix: /a}, key_file: KEY}", "shared: {s3: {bucket: builds, region: us-east-1, prefix: a/../b}, key_file: KEY}", "shared: {s3: {bucket: builds, region: 'us east'}, key_file: KEY}",
		"shared: {s3: {bucket: builds, endpoint: s3.internal}, key_file: KEY}", "shared: {s3: {bucket: builds, endpoint: https://s3.internal/builds}, key_file: KEY}", "shared: {s3: {bucket: builds, region: us-east-1, encryption: aes}, key_file: KEY}",
		"shared: {s3: {bucket: builds, region: us-east-1, encryption: AES256, kms_key: k}, key_file: KEY}", "shared: {s3: {bucket: builds, region: us-east-1, kms_key: k}, key_file: KEY}", "shared: {s3: {bucket: builds, region: us-east-1}, key_file: KEY, wait: 6}",
		"registries: {q.io: {upstreams: [{url: ftp://q.io}]}}", "registries: {q.io: {upstreams: [{url: https://q.io/x}]}}", "registries: {Q.io: {}}", "registries: {q.io: {upstreams: []}}",
		"registries: {q.io: {upstreams: [{url: https://q.io, credentials: {username: x}}]}}", "registries: {q.io: {upstreams: [{url: https://q.io, proxy: 'socks5://p'}]}}",
		"registries: {q.io: {upstreams: [{url: https://q.io, credentials: {helper: ../x}}]}}", "registries: {q.io: {upstreams: [{url: https://q.io, redirect_hosts: [https://x]}]}}",
		"registries: {q.io: {upstreams: [{url: https://q.io, tags: 'no'}]}}", "registries: {q.io: {upstreams: [{url: https://q.io, client_cert: {cert_file: x}}]}}", "tls: {cert_file: x}", "server_names: [a, a]", "hosts: {a:5: docker.io}", "public: [x]"} {
		if _, err := load("c.yaml", []byte(strings.ReplaceAll(text, "KEY", key)), nil, nil); err == nil {
			t.Errorf("Load accepts %q", text)
		}
		if fits(t, []byte(text)) == nil {
			t.Errorf("the schema accepts %q", text)
		}
	}
}

func TestSchemaIsInStepWithTheStruct(t *testing.T) {
	root := new(schema)
	if err := json.Unmarshal(Schema(), root); err != nil {
		t.Fatal(err)
	}
	compare(t, reflect.TypeFor[Config](), root, root, "")
}

// compare walks a type and its schema side by side.
func compare(t *testing.T, typ reflect.Type, s, root *schema, path string) {
	if def, ok := strings.CutPrefix(s.Ref, "#/$defs/"); ok {
		s = root.Defs[def]
	}
	if typ.Kind() == reflect.Pointer {
		typ = typ.Elem()
	}
	switch isText := typ.Implements(reflect.TypeFor[encoding.TextMarshaler]()); {
	case !isText && typ.Kind() == reflect.Struct:
		var keys []string
		for field := range typ.Fields() {
			key, _, _ := strings.Cut(field.Tag.Get("yaml"), ",")
			keys = append(keys, key)
			if child := s.Properties[key]; child != nil {
				compare(t, field.Type, child, root, join(path, key))
			}
		}
		slices.Sort(keys)
		if diff := cmp.Diff(s.keys(), keys); diff != "" {
			t.Errorf("%s: -schema +struct\n%s", path, diff)
		}
	case typ.Kind() == reflect.Map && s.Named != nil:
		compare(t, typ.Elem(), s.Named, root, path+".*")
	case typ.Kind() == reflect.Slice && s.Items != nil:
		compare(t, typ.Elem(), s.Items, root, path+"[]")
	case typ.Kind() == reflect.Map || typ.Kind() == reflect.Slice || s.Properties != nil || s.Named != nil || s.Items != nil:
		t.Errorf("%s: %v in the struct, another form in the schema", path, typ)
	}
}

// TestSchemaAndExampleExplainEveryKey is for those who write a file with an editor and those who copy.
func TestSchemaAndExampleExplainEveryKey(t *testing.T) {
	var all func(v any, path string)
	all = func(v any, path string) {
		node, _ := v.(map[string]any)
		for group, children := range node {
			children, _ := children.(map[string]any)
			for key, child := range children {
				all(child, path+"."+key)
				if group != "properties" {
					continue
				}
				if child.(map[string]any)["description"] == nil {
					t.Errorf("the schema does not describe %s.%s", path, key)
				}
				if !regexp.MustCompile(`(?m)^[ -]*` + key + `:`).MatchString(uncommented()) {
					t.Errorf("the example does not show %s.%s", path, key)
				}
			}
		}
	}
	var root any
	if err := json.Unmarshal(Schema(), &root); err != nil {
		t.Fatal(err)
	}
	all(root, "")
}

// TestSchemaDefaults compares the schema's defaults with those in force.
func TestSchemaDefaults(t *testing.T) {
	c := defaults()
	c.Shared.S3.Bucket = "builds" // without one there are no defaults of shared
	c.Shared.settle()
	shown, err := c.Show()
	if err != nil {
		t.Fatal(err)
	}
	var schema, config map[string]any
	if err := json.Unmarshal(Schema(), &schema); err != nil {
		t.Fatal(err)
	}
	if err := yaml.Load(shown, &config); err != nil {
		t.Fatal(err)
	}
	n := 0
	for properties, values := range map[*map[string]any]map[string]any{
		child(schema, "properties"):                      config,
		child(schema, "properties", "log", "properties"): config["log"].(map[string]any),
		child(schema, "$defs", "tags", "properties"):     config["tags"].(map[string]any),

		child(schema, "properties", "completion", "properties"): config["completion"].(map[string]any),
		child(schema, "properties", "shared", "properties"):     config["shared"].(map[string]any),
	} {
		for key, property := range *properties {
			if want, ok := property.(map[string]any)["default"]; ok {
				n++
				if values[key] != want {
					t.Errorf("%s: %v by default, the schema says %v", key, values[key], want)
				}
			}
		}
	}
	if n != 17 {
		t.Errorf("%d defaults", n)
	}
}

func child(v map[string]any, path ...string) *map[string]any {
	for _, key := range path {
		v = v[key].(map[string]any)
	}
	return &v
}
