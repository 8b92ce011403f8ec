package config

import (
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"strings"

	"breakwater/pkg/oci"

	"go.yaml.in/yaml/v4"
)

// Load is the configuration that follows from the file at path, none if that is "", then from the
// variables of environ (NAME=value, as os.Environ has them) that begin with BREAKWATER_, then from
// flags by their names (log-format). STATE_DIRECTORY of environ is the data folder where none of these names
// one. Its error joins all problems, one a line.
func Load(path string, environ []string, flags map[string]string) (*Config, error) {
	var text []byte
	if path != "" {
		var err error
		if text, err = os.ReadFile(path); err != nil {
			return nil, fmt.Errorf("configuration: %w", err)
		}
	}
	return load(path, text, environ, flags)
}

// load is Load with the file already read.
func load(path string, text []byte, environ []string, flags map[string]string) (*Config, error) {
	c, p := defaults(), newProblems()
	if state := stateFolder(environ); state != "" {
		c.Data = state
	}
	if path != "" {
		p.places[""] = place{source: path}
		c.readFile(path, text, p)
	}
	c.readEnviron(environ, p)
	c.readFlags(flags, p)
	c.settle()
	c.validate(p)
	if err := p.err(); err != nil {
		return nil, err
	}
	return c, nil
}

// readFile sets what the file says. Relative paths in it start at its own folder.
func (c *Config) readFile(path string, text []byte, p *problems) {
	var documents []yaml.Node
	if err := yaml.Load(text, &documents, yaml.WithAllDocuments()); err != nil {
		p.addYAML(path, err)
		return
	}
	if len(documents) == 0 {
		return
	}
	form := checker{problems: p, schema: new(schema), file: path}
	if len(documents) > 1 {
		p.addAt(form.place(&documents[1]), "", "a second document; keep one")
	}
	if err := json.Unmarshal(Schema(), form.schema); err != nil {
		p.add("", "schema: %v", err)
		return
	}
	root := documents[0].Content[0]
	form.check(root, form.schema, "")
	if p.places["registries"] != (place{}) {
		c.Registries = nil // decoding into a map would add to the default list
	}
	if isNull(root) {
		return
	}
	if err := root.Load(c); err != nil {
		p.addYAML(path, err)
	}
	if dir, err := filepath.Abs(filepath.Dir(path)); err == nil {
		c.resolve(dir)
	}
}

// addYAML notes what the YAML library found wrong in the file, with the paths of the fields.
func (p *problems) addYAML(file string, err error) {
	var found *yaml.LoadErrors
	if !errors.As(err, &found) {
		found = &yaml.LoadErrors{Errors: []*yaml.LoadError{{Message: err.Error()}}}
		if one := new(yaml.LoadError); errors.As(err, &one) {
			found.Errors[0] = one
		}
	}
	for _, e := range found.Errors {
		at := place{file, e.Mark.Line, e.Mark.Column}
		path := ""
		for field, place := range p.places {
			if place == at {
				path = field
			}
		}
		text := e.Message
		if e.ContextMsg != "" {
			text = e.ContextMsg + ": " + text
		}
		p.addAt(at, path, "%s", text)
		p.refuse(path)
	}
}

// resolve makes relative paths start at dir.
func (c *Config) resolve(dir string) {
	files := []*string{&c.Data, &c.Control, &c.TLS.CertFile, &c.TLS.KeyFile, &c.Shared.KeyFile, &c.Access.HTPasswd, &c.Access.Token.KeysFile, &c.Access.ClientCAFile}
	for _, registry := range c.Registries {
		for i := range registry.Upstreams {
			up := &registry.Upstreams[i]
			files = append(files, &up.Credentials.PasswordFile, &up.Credentials.DockerConfig, &up.CAFile, &up.ClientCert.CertFile, &up.ClientCert.KeyFile)
		}
	}
	for _, file := range files {
		if *file != "" && !filepath.IsAbs(*file) {
			*file = filepath.Join(dir, *file)
		}
	}
}

// overridable is what variables and flags can set, by path.
func (c *Config) overridable() map[string]any {
	return map[string]any{
		"listen":           &c.Listen,
		"admin":            &c.Admin,
		"control":          &c.Control,
		"data":             &c.Data,
		"capacity":         &c.Capacity,
		"min_free":         &c.MinFree,
		"default_registry": &c.DefaultRegistry,
		"any_registry":     &c.AnyRegistry,
		"log.format":       &c.Log.Format,
		"log.level":        &c.Log.Level,

		"shared.s3.bucket":     &c.Shared.S3.Bucket,
		"shared.s3.prefix":     &c.Shared.S3.Prefix,
		"shared.s3.region":     &c.Shared.S3.Region,
		"shared.s3.endpoint":   &c.Shared.S3.Endpoint,
		"shared.s3.path_style": &c.Shared.S3.PathStyle,
		"shared.s3.encryption": &c.Shared.S3.Encryption,
		"shared.s3.kms_key":    &c.Shared.S3.KMSKey,
		"shared.key_file":      &c.Shared.KeyFile,
		"shared.wait":          &c.Shared.Wait,
		"shared.read_only":     &c.Shared.ReadOnly,
	}
}

// variable is the environment variable of the field at path, as flagName is its flag.
func variable(path string) string {
	return "BREAKWATER_" + strings.ToUpper(strings.ReplaceAll(path, ".", "_"))
}

func flagName(path string) string { return strings.NewReplacer(".", "-", "_", "-").Replace(path) }

// serviceLink is what Kubernetes tells every container of a Service whose name begins with
// breakwater, such as BREAKWATER_SERVICE_HOST or BREAKWATER_PORT_5000_TCP_ADDR. It is not said to us.
var serviceLink = regexp.MustCompile(`^BREAKWATER_(\w+_)?(SERVICE_HOST=|SERVICE_PORT(_\w+)?=|PORT=\w+://|PORT_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?=)`)

// readEnviron sets what variables say. An empty one says nothing.
func (c *Config) readEnviron(environ []string, p *problems) {
	values := map[string]string{}
	for _, entry := range environ {
		name, value, _ := strings.Cut(entry, "=")
		if strings.HasPrefix(name, "BREAKWATER_") && value != "" && !serviceLink.MatchString(entry) {
			values[name] = value
		}
	}
	c.override(values, variable, p)
}

// readFlags sets what flags say.
func (c *Config) readFlags(flags map[string]string, p *problems) {
	values := map[string]string{}
	for name, value := range flags {
		values["--"+name] = value
	}
	c.override(values, func(path string) string { return "--" + flagName(path) }, p)
}

// override sets the fields whose names, as name makes them of paths, have values.
func (c *Config) override(values map[string]string, name func(path string) string, p *problems) {
	fields := c.overridable()
	var known []string
	for _, path := range slices.Sorted(maps.Keys(fields)) {
		known = append(known, name(path))
		value, ok := values[name(path)]
		if !ok {
			continue
		}
		delete(values, name(path))
		delete(p.refused, path) // that was the file's value
		p.places[path] = place{source: name(path)}
		if err := set(fields[path], value); err != nil {
			p.add(path, "%v", err)
			p.refuse(path)
		}
	}
	for _, unknown := range slices.Sorted(maps.Keys(values)) {
		p.addAt(place{source: unknown}, "", "unknown; those known are %s", strings.Join(known, ", "))
	}
}

// set reads text into a field of overridable.
func set(field any, text string) (err error) {
	switch f := field.(type) {
	case *string:
		*f = text
	case *Duration:
		err = f.UnmarshalText([]byte(text))
	case *Size:
		err = f.UnmarshalText([]byte(text))
	case *bool:
		if *f, err = strconv.ParseBool(text); err != nil {
			err = fmt.Errorf("%q is neither true nor false", text)
		}
	}
	return err
}

// settle completes what was left out and makes paths absolute.
func (c *Config) settle() {
	if here, err := filepath.Abs(""); err == nil {
		c.resolve(here)
	}
	if c.Control == "" && c.Data != "" {
		c.Control = filepath.Join(c.Data, "control.sock")
	}
	for name, registry := range c.Registries {
		if registry.Upstreams == nil && oci.ValidRegistry(name) {
			registry.Upstreams = []Upstream{{URL: home(name)}}
		}
		for i, up := range registry.Upstreams {
			registry.Upstreams[i].URL = strings.TrimSuffix(up.URL, "/")
			if ecr := up.Credentials.ECR; ecr != nil && ecr.Region == "" {
				ecr.Region = ecrRegion(up.URL)
			}
		}
		c.Registries[name] = registry
	}
	for i := range c.Keep {
		keep := &c.Keep[i]
		if keep.Platforms == nil {
			keep.Platforms = []string{"linux/" + runtime.GOARCH}
		}
		if keep.Every.IsZero() {
			keep.Every = Set(defaultEvery)
		}
	}
	c.Shared.settle()
	c.settleAccess()
}

// ecrURL is how Amazon names private registries, in all its partitions.
var ecrURL = regexp.MustCompile(`^https://[0-9]{12}\.dkr[.-]ecr(?:-fips)?\.([a-z0-9-]+)\.[a-z0-9.-]+/?$`)

// ecrRegion is the region in the URL of an ECR, "" if there is none.
func ecrRegion(url string) string {
	if m := ecrURL.FindStringSubmatch(url); m != nil {
		return m[1]
	}
	return ""
}

// home is the URL of a registry itself.
func home(registry string) string {
	if known := defaults().Registries[registry].Upstreams; known != nil {
		return known[0].URL
	}
	return "https://" + registry
}
