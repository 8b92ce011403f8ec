package config

import (
	_ "embed" // schema.json, example.yaml
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/agnivade/levenshtein"
	"go.yaml.in/yaml/v4"
)

//go:embed schema.json
var schemaJSON string

//go:embed example.yaml
var exampleYAML string

// Schema is the JSON Schema (draft 2020-12) of the configuration file, for editors.
func Schema() []byte { return []byte(schemaJSON) }

// Example is a configuration file that explains every key. As it stands it says what the defaults
// say; what else could be said is in its comments.
func Example() []byte { return []byte(exampleYAML) }

// schema is as much of a JSON Schema as it takes to know which keys a file may have, and where.
type schema struct {
	Type       any                `json:"type"` // a name, or several
	Ref        string             `json:"$ref"`
	Defs       map[string]*schema `json:"$defs"`
	Properties map[string]*schema `json:"properties"`           // a mapping with these keys
	Named      *schema            `json:"additionalProperties"` // without properties: a mapping with the user's own keys
	Items      *schema            `json:"items"`                // a list
}

// UnmarshalJSON also takes the schema false, which allows nothing.
func (s *schema) UnmarshalJSON(text []byte) error {
	if string(text) == "false" {
		return nil
	}
	type object schema // without this method
	return json.Unmarshal(text, (*object)(s))
}

// keys are those that a mapping may have, in order.
func (s *schema) keys() []string { return slices.Sorted(maps.Keys(s.Properties)) }

// nearest is the name that was meant by a misspelt one, "" if none comes near.
func nearest(name string, known []string) string {
	best, least := "", max(1, len(name)/3)+1
	for _, candidate := range known {
		if d := levenshtein.ComputeDistance(strings.ReplaceAll(strings.ToLower(name), "-", "_"), candidate); d < least {
			best, least = candidate, d
		}
	}
	if best != "" || len(name) < 3 {
		return best
	}
	for _, candidate := range known {
		if strings.Contains(candidate, name) { // user, prefix, fresh
			return candidate
		}
	}
	return ""
}

// checker holds a file's tree against the schema, and notes the place of each field. What it refuses
// it takes out of the tree, so that the rest can still be read and its mistakes be told.
type checker struct {
	*problems
	schema *schema
	file   string
}

// secretKeys are where people who do not know of password_file put a secret.
var secretKeys = []string{"password", "passwd", "pass", "secret", "token", "auth", "identity_token", "identitytoken"}

// Where people put the fleet's key, and what the AWS SDK finds by itself.
var (
	keyKeys = []string{"key", "keys", "hmac", "hmac_key", "secret"}
	awsKeys = []string{"access_key", "access_key_id", "secret", "secret_key", "secret_access_key", "token", "session_token", "credentials", "profile", "role", "username", "password"}
)

// check makes n, the value at path, one that can be decoded: null if it has the wrong form.
func (c *checker) check(n *yaml.Node, s *schema, path string) {
	if def, ok := strings.CutPrefix(s.Ref, "#/$defs/"); ok {
		s = c.schema.Defs[def]
	}
	wrong := ""
	switch {
	case n.Kind == yaml.AliasNode:
		wrong = "an alias; write the value itself"
	case isNull(n):
	case s.Properties != nil && n.Kind == yaml.MappingNode:
		c.checkKeys(n, s, path)
	case s.Properties != nil:
		wrong = "wants keys below it: " + strings.Join(s.keys(), ", ")
	case s.Named != nil && n.Kind == yaml.MappingNode:
		c.checkKeys(n, s, path)
	case s.Named != nil:
		wrong = "wants names below it, each with what holds for it"
	case s.Items != nil && n.Kind == yaml.SequenceNode:
		for i, item := range n.Content {
			at := fmt.Sprintf("%s[%d]", path, i)
			c.places[at] = c.place(item)
			c.check(item, s.Items, at)
		}
	case s.Items != nil:
		wrong = "wants a list; begin each entry with a dash"
	case n.Kind != yaml.ScalarNode:
		wrong = "wants a single value"
	case s.Type == "boolean" && n.ShortTag() != "!!bool":
		wrong = "wants true or false"
	}
	if wrong != "" {
		c.add(path, "%s", wrong)
		c.refuse(path)
		*n = yaml.Node{Kind: yaml.ScalarNode, Tag: "!!null", Line: n.Line, Column: n.Column}
	}
}

// checkKeys checks a mapping's pairs and takes out those that cannot be decoded. A key without a
// value says nothing, unless it is a name: then the name itself says something.
func (c *checker) checkKeys(n *yaml.Node, s *schema, path string) {
	var kept []*yaml.Node
	lines := map[string]int{}
	for pair := range slices.Chunk(n.Content, 2) {
		key, value := pair[0], pair[1]
		at, place := join(path, key.Value), c.place(key)
		child := s.Named
		if s.Properties != nil {
			child = s.Properties[key.Value]
		}
		switch {
		case key.Kind != yaml.ScalarNode || key.ShortTag() == "!!merge":
			c.addAt(place, path, "wants plain words as keys")
			continue
		case lines[key.Value] > 0:
			c.addAt(place, at, "a duplicate of line %d; keep one of the two", lines[key.Value])
			continue
		case child == nil:
			c.unknown(n, s, path, key)
			continue
		}
		lines[key.Value] = key.Line
		if value.Kind == yaml.ScalarNode && !isNull(value) {
			place = c.place(value)
		}
		c.places[at] = place
		c.check(value, child, at)
		if s.Properties == nil || !isNull(value) {
			kept = append(kept, key, value)
		} else {
			delete(c.places, at)
		}
	}
	n.Content = kept
}

// unknown refuses a key of the mapping n and says what to write instead.
func (c *checker) unknown(n *yaml.Node, s *schema, path string, key *yaml.Node) {
	at, meant := join(path, key.Value), nearest(key.Value, s.keys())
	switch lower := strings.ReplaceAll(strings.ToLower(key.Value), "-", "_"); {
	case path == "shared" && slices.Contains(keyKeys, lower):
		meant = "key_file"
		c.addAt(c.place(key), at, "unknown key; write the fleet's keys to a file that its owner alone can read, and name it as key_file")
	case path == "shared.s3" && slices.Contains(awsKeys, lower):
		meant = ""
		c.addAt(c.place(key), at, "unknown key; the AWS SDK finds credentials in its variables, such as AWS_ACCESS_KEY_ID and AWS_PROFILE, in ~/.aws, or in the host's role")
	case slices.Contains(secretKeys, lower):
		meant = "password_file"
		c.addAt(c.place(key), at, "a secret in the clear; write it to a file that its owner alone can read, and name that file in the upstream's credentials, as password_file")
	case meant != "":
		c.addAt(c.place(key), at, "unknown key; write %s", meant)
	default:
		c.addAt(c.place(key), at, "unknown key; those known here are %s", strings.Join(s.keys(), ", "))
	}
	isMeant := func(other *yaml.Node) bool { return other.Value == meant }
	if !slices.ContainsFunc(n.Content, isMeant) {
		c.refuse(join(path, meant)) // do not also say that it is missing
	}
}

func (c *checker) place(n *yaml.Node) place { return place{c.file, n.Line, n.Column} }

func isNull(n *yaml.Node) bool { return n.Kind == yaml.ScalarNode && n.ShortTag() == "!!null" }

// join is the path of a key below path.
func join(path, key string) string {
	if path == "" {
		return key
	}
	return path + "." + key
}
