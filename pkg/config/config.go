// Package config hides where Breakwater's configuration comes from: defaults, a YAML file, the
// environment and flags, in that order. It promises that what Load returns is complete, keeps every
// rule that Validate knows, and is all that the program needs to be told; and that what it refuses
// is refused with every mistake at once, each with its place and what to write instead.
package config

import (
	"cmp"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"breakwater/pkg/oci"

	"go.yaml.in/yaml/v4"
)

// Config is the whole configuration. Its comments are short: schema.json describes each key to those
// who write a file.
type Config struct {
	Listen          string              `yaml:"listen"`                 // host:port of the registry API; beyond loopback Access must say who may pull
	Admin           string              `yaml:"admin"`                  // host:port of health and metrics
	Control         string              `yaml:"control"`                // path of the unix socket for all that changes something; absolute once loaded
	ServerNames     []string            `yaml:"server_names,omitempty"` // further names that clients may use as Host
	TLS             TLS                 `yaml:"tls,omitempty"`          // the zero value serves plain HTTP
	Access          Access              `yaml:"access,omitempty"`       // beyond loopback; the zero value lets nobody in there
	Data            string              `yaml:"data"`                   // the store's folder; absolute once loaded
	Capacity        Size                `yaml:"capacity"`               // of the store
	MinFree         Size                `yaml:"min_free"`               // of the disk that the store leaves free; auto is 5 %, at most 5 GiB
	Scrub           Rate                `yaml:"scrub"`                  // at which the store is verified
	Log             Log                 `yaml:"log"`
	DefaultRegistry string              `yaml:"default_registry"` // what a bare path means; a key of Registries
	AnyRegistry     bool                `yaml:"any_registry"`     // also ask registries that are not configured
	Hosts           map[string]string   `yaml:"hosts,omitempty"`  // host name that a client uses -> key of Registries
	Public          []string            `yaml:"public,omitempty"` // patterns of repositories, see IsPublic
	Tags            Tags                `yaml:"tags"`             // for all registries; ask TagsFor
	Registries      map[string]Registry `yaml:"registries"`       // by the name that clients ask for
	Completion      Completion          `yaml:"completion"`
	Keep            []Keep              `yaml:"keep,omitempty"`   // held complete and fresh, always
	Shared          Shared              `yaml:"shared,omitempty"` // of the fleet; the zero value is none
}

// Completion says which images the mirror completes by itself, with what clients did not ask for.
type Completion struct {
	Images      string `yaml:"images"`        // CompleteAll, CompleteKept or CompleteNone
	BytesPerDay Size   `yaml:"bytes_per_day"` // fetched while no client is about to need it; neither auto nor a share
}

// What Completion's Images may be.
const (
	CompleteAll  = "all"  // those that a client has begun to pull
	CompleteKept = "kept" // those of Keep
	CompleteNone = "none" // only what clients ask for is fetched
)

// Keep is an image that is held complete and fresh. Load fills in what is not said.
type Keep struct {
	Image     string   `yaml:"image"`               // with its registry, and a tag or a digest
	Platforms []string `yaml:"platforms,omitempty"` // of an index: linux/amd64, linux/arm64/v8; by default the host's
	Every     Duration `yaml:"every,omitempty"`     // how often its tag is asked for upstream
}

// Reference is the image, understood. Its error is an *oci.Error.
func (k Keep) Reference() (oci.Reference, error) { return oci.ParseImage(k.Image) }

// TLS names the files of the listener's certificate.
type TLS struct {
	CertFile string `yaml:"cert_file,omitempty"`
	KeyFile  string `yaml:"key_file,omitempty"`
}

// Log says how the log is written.
type Log struct {
	Format string `yaml:"format"` // LogAuto, LogText or LogJSON
	Level  string `yaml:"level"`  // debug, info, warn or error, as slog.Level reads them
}

// The formats of the log. LogAuto is text on a terminal and JSON elsewhere.
const (
	LogAuto = "auto"
	LogText = "text"
	LogJSON = "json"
)

// Registry is how one registry is reached. Load gives one that names no upstreams its own address.
type Registry struct {
	Upstreams    []Upstream            `yaml:"upstreams"`              // asked in this order
	Tags         Tags                  `yaml:"tags,omitempty"`         // ask TagsFor
	Repositories map[string]Repository `yaml:"repositories,omitempty"` // by full name: library/alpine
}

// Repository overrides its registry's settings.
type Repository struct {
	Tags Tags `yaml:"tags,omitempty"` // ask TagsFor
}

// Upstream is one server that can answer for a registry.
type Upstream struct {
	URL              string      `yaml:"url"`                         // scheme and host, nothing behind them
	RepositoryPrefix string      `yaml:"repository_prefix,omitempty"` // "quay/": org/app is quay/org/app there
	Credentials      Credentials `yaml:"credentials,omitempty"`       // the zero value is anonymous
	DigestsOnly      DigestsOnly `yaml:"tags,omitempty"`              // it is not asked what a tag names
	Proxy            string      `yaml:"proxy,omitempty"`             // ProxyEnv, as "" is too, ProxyNone, or the URL of an HTTP proxy
	CAFile           string      `yaml:"ca_file,omitempty"`           // trusted beside the system's authorities
	ClientCert       TLS         `yaml:"client_cert,omitempty"`       // shown to the upstream; the zero value is none
	RedirectHosts    []string    `yaml:"redirect_hosts,omitempty"`    // host or host:port, at whatever address
	TrustedRealms    []string    `yaml:"trusted_realms,omitempty"`    // those may be given the credentials too
}

// What Proxy may be, besides a URL.
const (
	ProxyEnv  = "env"  // as HTTPS_PROXY, HTTP_PROXY and NO_PROXY say
	ProxyNone = "none" // connect straight
)

// DigestsOnly is the opposite of its key in a file, which is true by default.
type DigestsOnly bool

// MarshalYAML writes the key.
func (d DigestsOnly) MarshalYAML() (any, error) { return !bool(d), nil }

// UnmarshalYAML reads the key.
func (d *DigestsOnly) UnmarshalYAML(n *yaml.Node) error {
	var tags bool
	err := n.Load(&tags)
	*d = DigestsOnly(!tags)
	return err
}

// Credentials are where that is found which an upstream is told when it asks who we are; only one way
// of finding it is set. The secret itself is read when it is needed, and never kept here.
type Credentials struct {
	Username     string `yaml:"username,omitempty"` // with PasswordFile
	PasswordFile string `yaml:"password_file,omitempty"`
	DockerConfig string `yaml:"docker_config,omitempty"` // file: docker's config.json
	Helper       string `yaml:"helper,omitempty"`        // docker-credential-HELPER is a program
	ECR          *ECR   `yaml:"ecr,omitempty"`           // nil if the upstream is none
}

// ECR is a private registry at Amazon, where whom the AWS SDK finds us to be gets a token.
type ECR struct {
	Region string `yaml:"region,omitempty"` // Load takes it from the upstream's URL if it is not set
}

// Tags is how long a stored tag is answered, and when an upstream's refusal is obeyed. What is not
// set, a zero value, is as the level above says.
type Tags struct {
	FreshFor          Duration `yaml:"fresh_for,omitempty"`          // since it was confirmed: answered without asking
	MaxStale          Duration `yaml:"max_stale,omitempty"`          // since it was confirmed: answered while upstream is out; 0s never, Unlimited always
	RevalidateTimeout Duration `yaml:"revalidate_timeout,omitempty"` // without progress upstream, before the stored tag is answered
	OnDenied          string   `yaml:"on_denied,omitempty"`          // 401 after a token, 403: Refuse or Stale
	OnNotFound        string   `yaml:"on_not_found,omitempty"`       // 404: Refuse or Stale
}

// What Tags does when an upstream that is well refuses a tag that is stored.
const (
	Refuse = "refuse" // pass the refusal on
	Stale  = "stale"  // answer the stored tag, marked stale
)

// defaults is the configuration that holds when nobody says anything.
func defaults() *Config {
	return &Config{
		Listen:          "127.0.0.1:5000",
		Admin:           "127.0.0.1:5001",
		Control:         "", // in Data
		Data:            defaultData(),
		Capacity:        Size{}, // auto
		MinFree:         Size{}, // auto
		Scrub:           8 << 20,
		Log:             Log{Format: LogAuto, Level: "info"},
		DefaultRegistry: oci.DockerHub,
		Tags:            defaultTags(),
		Completion:      Completion{Images: CompleteAll, BytesPerDay: Size{Bytes: 20 << 30}},
		Registries: map[string]Registry{
			oci.DockerHub:         {Upstreams: []Upstream{{URL: "https://registry-1.docker.io"}}},
			"gcr.io":              {Upstreams: []Upstream{{URL: "https://gcr.io"}}},
			"ghcr.io":             {Upstreams: []Upstream{{URL: "https://ghcr.io"}}},
			"mcr.microsoft.com":   {Upstreams: []Upstream{{URL: "https://mcr.microsoft.com"}}},
			"public.ecr.aws":      {Upstreams: []Upstream{{URL: "https://public.ecr.aws"}}},
			"quay.io":             {Upstreams: []Upstream{{URL: "https://quay.io"}}},
			"registry.gitlab.com": {Upstreams: []Upstream{{URL: "https://registry.gitlab.com"}}},
			"registry.k8s.io":     {Upstreams: []Upstream{{URL: "https://registry.k8s.io"}}},
		},
	}
}

// defaultTags is apart from defaults because TagsFor asks for it at each request.
func defaultTags() Tags {
	return Tags{
		FreshFor:          Set(0),
		MaxStale:          Set(Unlimited),
		RevalidateTimeout: Set(1500 * time.Millisecond),
		OnDenied:          Refuse,
		OnNotFound:        Refuse,
	}
}

// defaultData is the system's folder for root and the user's cache folder for others; "" if there is
// none, which Validate refuses. One that systemd has made goes before it (stateFolder).
func defaultData() string {
	if os.Geteuid() == 0 {
		return "/var/lib/breakwater"
	}
	cache, err := os.UserCacheDir()
	if err != nil {
		return ""
	}
	return filepath.Join(cache, "breakwater")
}

// stateFolder is the folder that systemd has made for us (StateDirectory=, systemd.exec(5)), the first of
// several, and that the image names in the same way; "" if there is none. What a build agent hands down to
// the commands that it runs is a folder of its own: systemd says for whose process the variable is meant.
func stateFolder(environ []string) string {
	values := map[string]string{}
	for _, entry := range environ {
		name, value, _ := strings.Cut(entry, "=")
		values[name] = value
	}
	if pid := values["SYSTEMD_EXEC_PID"]; pid != "" && pid != strconv.Itoa(os.Getpid()) {
		return ""
	}
	first, _, _ := strings.Cut(values["STATE_DIRECTORY"], ":")
	return first
}

// NamesRegistry tells quay.io/org from a user of the Hub, by what stands before the first slash: a dot, a
// colon, localhost, or configured.
func (c *Config) NamesRegistry(first string) bool {
	_, configured := c.Registries[first]
	return configured || first == "localhost" || strings.ContainsAny(first, ".:")
}

// Image is the image that people mean: without a registry's name it is one of DefaultRegistry, and with
// neither a tag nor a digest it is latest.
func (c *Config) Image(s string) (oci.Reference, error) {
	typed := s
	if first, _, more := strings.Cut(s, "/"); !more || !c.NamesRegistry(first) {
		s = c.DefaultRegistry + "/" + s
	}
	if !strings.ContainsAny(s[strings.LastIndexByte(s, '/'):], ":@") {
		s += ":latest"
	}
	ref, err := oci.ParseImage(s)
	if err != nil {
		return oci.Reference{}, fmt.Errorf("%.255q is not an image; write it as quay.io/org/app:tag, or with its digest as quay.io/org/app@sha256:…", typed)
	}
	return ref, nil
}

// TagsFor is what holds for the tags of a repository: key by key, what its own entry says, else its
// registry's, else the general one, else the default. Nothing in it is unset.
func (c *Config) TagsFor(repo oci.Repository) Tags {
	registry := c.Registries[repo.Registry]
	return registry.Repositories[repo.Name].Tags.over(registry.Tags).over(c.Tags).over(defaultTags())
}

// over is t, with the keys that it does not set from u.
func (t Tags) over(u Tags) Tags {
	return Tags{
		FreshFor:          cmp.Or(t.FreshFor, u.FreshFor),
		MaxStale:          cmp.Or(t.MaxStale, u.MaxStale),
		RevalidateTimeout: cmp.Or(t.RevalidateTimeout, u.RevalidateTimeout),
		OnDenied:          cmp.Or(t.OnDenied, u.OnDenied),
		OnNotFound:        cmp.Or(t.OnNotFound, u.OnNotFound),
	}
}

// Show is the configuration in force as a file that Load accepts. It names the files of secrets, and
// holds nothing of what is in them.
func (c *Config) Show() ([]byte, error) { return yaml.Dump(c) }
