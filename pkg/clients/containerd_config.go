package clients

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/pelletier/go-toml/v2"
)

// Names of what pulls for the kubelet, in the versions of containerd's configuration.
const (
	criImages = "io.containerd.cri.v1.images" // 3 and later: containerd 2
	criPlugin = "io.containerd.grpc.v1.cri"   // 2
	criShort  = "cri"                         // 1, and in lists of disabled plugins
)

// dockerCerts is read by Docker itself, whatever containerd's configuration says.
const dockerCerts = "/etc/docker/certs.d"

// maxImports is how many files of containerd's are read, which may import each other.
const maxImports = 100

// criRegistry is what containerd's configuration says of registries.
type criRegistry struct {
	version  int64
	path     string // config_path
	mirrors  bool   // in the configuration itself, which excludes config_path
	local    bool   // use_local_image_pull: the CRI plugin pulls by itself, as before containerd 2.1
	disabled bool
}

// Warnings say why containerd, with that configuration file, would not read what is written, in words for
// people. A file that is not there says nothing.
func (c Containerd) Warnings(config string) []string {
	var r criRegistry
	seen, warnings := map[string]bool{}, []string(nil)
	r.read(config, seen, func(format string, args ...any) { warnings = append(warnings, fmt.Sprintf(format, args...)) })
	if len(seen) == 0 || c.isDir(dockerCerts) {
		return warnings
	}
	section := criImages
	if r.version < 3 {
		section = criPlugin
	}
	remedy := fmt.Sprintf("write config_path = %q below [plugins.%q.registry], and restart containerd", c.Dir, section)
	folders := filepath.SplitList(r.path)
	switch {
	case r.disabled:
		warnings = append(warnings, config+": the CRI plugin is disabled: no kubelet pulls through this containerd, and Docker reads "+dockerCerts+" (--certs-d)")
	case r.mirrors:
		warnings = append(warnings, config+" has registry.mirrors, with which containerd ignores hosts.toml files: take that away, and "+remedy)
	case r.path == "":
		warnings = append(warnings, config+" has no config_path: containerd 1 then ignores hosts.toml files, and so does containerd 2.1 and later, whose default are two folders: "+remedy)
	case !slices.ContainsFunc(folders, c.isDir):
		warnings = append(warnings, fmt.Sprintf("%s: containerd reads %s, not %s: use --certs-d, or %s", config, r.path, c.Dir, remedy))
	case len(folders) > 1 && !r.local:
		warnings = append(warnings, fmt.Sprintf("%s: config_path names %d folders, and containerd 2.1 and later then ignores hosts.toml files without a word: %s", config, len(folders), remedy))
	}
	return warnings
}

func (c Containerd) isDir(path string) bool { return filepath.Clean(path) == filepath.Clean(c.Dir) }

// read takes over what a file says, and what the files say that it imports, which override it.
func (r *criRegistry) read(file string, seen map[string]bool, warn func(format string, args ...any)) {
	if seen[file] || len(seen) == maxImports {
		return
	}
	text, err := os.ReadFile(file)
	if errors.Is(err, fs.ErrNotExist) {
		return
	}
	seen[file] = true
	var config struct {
		Version  int64          `toml:"version"`
		Imports  []string       `toml:"imports"`
		Disabled []string       `toml:"disabled_plugins"`
		Plugins  map[string]any `toml:"plugins"`
	}
	if err == nil {
		err = toml.Unmarshal(text, &config)
	}
	if err != nil {
		warn("%s: not known whether containerd reads hosts.toml files: %v", file, err)
		return
	}
	r.version = max(r.version, config.Version)
	r.disabled = r.disabled || slices.ContainsFunc(config.Disabled, func(name string) bool { return name == criShort || name == criPlugin || name == criImages })
	for _, name := range []string{criShort, criPlugin, criImages} {
		if config.Version < 3 || name == criImages { // the older names say nothing to a newer version
			r.take(config.Plugins[name])
		}
	}
	for _, pattern := range config.Imports {
		if !filepath.IsAbs(pattern) {
			pattern = filepath.Join(filepath.Dir(file), pattern)
		}
		imported, err := filepath.Glob(pattern)
		if err != nil {
			warn("%s: imports %s: %v", file, strings.TrimSpace(pattern), err)
		}
		for _, file := range imported {
			r.read(file, seen, warn)
		}
	}
}

// take takes over what one plugin's table says.
func (r *criRegistry) take(plugin any) {
	table, _ := plugin.(map[string]any)
	if local, ok := table["use_local_image_pull"].(bool); ok {
		r.local = local
	}
	registry, _ := table["registry"].(map[string]any)
	if path, ok := registry["config_path"].(string); ok && path != "" {
		r.path = path
	}
	if mirrors, _ := registry["mirrors"].(map[string]any); len(mirrors) > 0 {
		r.mirrors = true
	}
}
