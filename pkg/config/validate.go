package config

import (
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"breakwater/pkg/oci"

	"go.yaml.in/yaml/v4"
)

const (
	minCapacity          = 1 << 20          // less holds no image: somebody forgot the unit
	minScrub             = 1 << 10          // the same
	maxControl           = 107              // bytes that the kernel has room for (unix(7))
	maxRevalidateTimeout = 10 * time.Second // within which the mirror answers, whatever upstreams do
	minEvery             = 10 * time.Second // a registry is asked for each kept tag so often
	defaultEvery         = time.Minute
)

// Validate joins all that is wrong with a configuration, each with the path of its field. Load has
// called it on what it returns; it is for configurations that a program made itself. It looks at the
// files that are named, and reads none.
func (c *Config) Validate() error {
	p := newProblems()
	c.validate(p)
	return p.err()
}

func (c *Config) validate(p *problems) {
	c.validateListeners(p)
	c.validateNames(p)
	if c.Data == "" {
		p.add("data", "empty, and without a home there is no default; write the store's folder")
	}
	if b := c.Capacity.Bytes; b != 0 && b < minCapacity {
		p.add("capacity", "%d bytes hold no image; write it with its unit, such as 50GiB", b)
	}
	if c.Scrub != 0 && c.Scrub < minScrub {
		p.add("scrub", "%s would take years; write it with its unit, such as 8MiB/s, or off", c.Scrub)
	}
	p.oneOf("log.format", c.Log.Format, LogAuto, LogText, LogJSON)
	p.oneOf("log.level", c.Log.Level, "debug", "info", "warn", "error")
	c.patterns(p, "public", c.Public)
	c.Tags.validate(p, "tags")
	for _, name := range slices.Sorted(maps.Keys(c.Registries)) {
		c.Registries[name].validate(p, name)
	}
	c.validateCompletion(p)
	c.Shared.validate(p)
}

// validateCompletion checks what the mirror fetches by itself.
func (c *Config) validateCompletion(p *problems) {
	p.oneOf("completion.images", c.Completion.Images, CompleteAll, CompleteKept, CompleteNone)
	if c.Completion.BytesPerDay.Bytes == 0 {
		p.add("completion.bytes_per_day", "%s is no number of bytes; write them with their unit, such as 20GiB, or images: none", c.Completion.BytesPerDay)
	}
	seen := map[oci.Reference]int{}
	for i, keep := range c.Keep {
		at := fmt.Sprintf("keep[%d]", i)
		ref, err := keep.Reference()
		first, again := seen[ref]
		switch {
		case keep.Image == "":
			p.add(at+".image", "missing; write a registry, a repository and a tag, such as quay.io/org/app:latest")
		case err != nil:
			p.add(at+".image", "%q is not an image; write it with its registry and one tag or digest, such as quay.io/org/app:latest", keep.Image)
		case again:
			p.add(at+".image", "a duplicate of keep[%d]; keep one of the two", first)
		case !c.AnyRegistry:
			p.configured(at+".image", ref.Registry, c.Registries)
		}
		if err == nil && !again {
			seen[ref] = i
		}
		for j, platform := range keep.Platforms {
			if !platformName.MatchString(platform) {
				p.add(fmt.Sprintf("%s.platforms[%d]", at, j), "%q is not a platform; write it as linux/amd64, or linux/arm/v7", platform)
			}
		}
		p.unique(at+".platforms", keep.Platforms)
		if len(keep.Platforms) == 0 {
			p.add(at+".platforms", "empty; write one, such as linux/amd64, or leave the key out for the host's")
		}
		if keep.Every.Duration < minEvery {
			p.add(at+".every", "%s is too often for the registry; write %s or more", keep.Every, Set(minEvery))
		}
	}
	if len(c.Keep) > 0 && c.Completion.Images == CompleteNone {
		p.add("completion.images", "none, but images of keep are held complete; write kept, or take keep away")
	}
}

// platformName is how image indexes name platforms: OS, architecture, and variant where there is one.
var platformName = regexp.MustCompile(`^[a-z0-9]+/[a-z0-9_]+(/[a-z0-9.]+)?$`)

// validateListeners checks where the mirror is to be reached, and by whom.
func (c *Config) validateListeners(p *problems) {
	p.address("listen", c.Listen)
	c.validateAccess(p)
	p.address("admin", c.Admin)
	if _, port, err := net.SplitHostPort(c.Admin); err == nil && port != "0" && c.Admin == c.Listen {
		p.add("admin", "the same address as listen; write another port")
	}
	p.keyPair("tls", c.TLS)
	c.validateControl(p)
}

// validateControl keeps the control socket where nobody can put another one in its place.
func (c *Config) validateControl(p *problems) {
	if n := len(c.Control); n > maxControl {
		p.add("control", "is %d bytes long, and the name of a socket can have %d; write a shorter one, such as /run/breakwater/control.sock", n, maxControl)
		return
	}
	if c.Control == c.Data && c.Data != "" {
		p.add("control", "is the data folder; write the name of a socket, such as %s", filepath.Join(c.Data, "control.sock"))
	}
	dir := filepath.Dir(c.Control)
	if info, err := os.Stat(dir); err == nil && dir != c.Data && info.Mode().Perm()&0o002 != 0 {
		p.add("control", "everybody may write to %s (%s), and put another socket there; write one in a folder of its own, such as /run/breakwater/control.sock", dir, info.Mode())
	}
}

// validateNames checks what clients may call the mirror, and what that means.
func (c *Config) validateNames(p *problems) {
	for i, name := range c.ServerNames {
		p.hostName(fmt.Sprintf("server_names[%d]", i), name)
	}
	p.unique("server_names", c.ServerNames)
	for _, name := range slices.Sorted(maps.Keys(c.Hosts)) {
		p.hostName("hosts."+name, name)
		p.configured("hosts."+name, c.Hosts[name], c.Registries)
	}
	p.configured("default_registry", c.DefaultRegistry, c.Registries)
}

func (r Registry) validate(p *problems, name string) {
	at := "registries." + name
	switch lower := strings.ToLower(name); {
	case !oci.ValidRegistry(name):
		p.add(at, "%q is not the name of a registry; write its host, such as quay.io, with a port if it has one", name)
	case lower != name:
		p.add(at, "write it in lower case: %s", lower)
	}
	if len(r.Upstreams) == 0 && oci.ValidRegistry(name) {
		p.add(at+".upstreams", "empty; name one, such as %s", home(name))
	}
	for i, up := range r.Upstreams {
		upstream := fmt.Sprintf("%s.upstreams[%d]", at, i)
		up.validate(p, upstream, name)
		if first := slices.IndexFunc(r.Upstreams, up.equal); first < i {
			p.add(upstream, "a duplicate of upstreams[%d]; keep one of the two", first)
		}
	}
	r.Tags.validate(p, at+".tags")
	for _, repository := range slices.Sorted(maps.Keys(r.Repositories)) {
		at := at + ".repositories." + repository
		switch repo, err := oci.ParseRepository(name, repository); {
		case err != nil && oci.ValidRegistry(name) || strings.HasPrefix(repository, name+"/"):
			p.add(at, "%q is not the name of a repository; write it without its registry, such as org/app", repository)
		case err == nil && repo.Name != repository:
			p.add(at, "names no repository; write %s", repo.Name)
		}
		r.Repositories[repository].Tags.validate(p, at+".tags")
	}
}

func (t Tags) validate(p *problems, at string) {
	for key, d := range map[string]Duration{"fresh_for": t.FreshFor, "max_stale": t.MaxStale, "revalidate_timeout": t.RevalidateTimeout} {
		if d.Duration < 0 {
			p.add(at+"."+key, "%s is negative; write 0s for no time at all", d)
		}
	}
	if t.RevalidateTimeout.Duration > maxRevalidateTimeout {
		p.add(at+".revalidate_timeout", "%s is longer than the %s within which every request is answered; write less", t.RevalidateTimeout, Set(maxRevalidateTimeout))
	}
	for key, word := range map[string]string{"on_denied": t.OnDenied, "on_not_found": t.OnNotFound} {
		if word != "" {
			p.oneOf(at+"."+key, word, Refuse, Stale)
		}
	}
}

// validate checks one upstream of a registry. It repeats no part of a URL that may hold a secret.
func (up Upstream) validate(p *problems, at, registry string) {
	u, err := url.Parse(up.URL)
	switch {
	case up.URL == "":
		p.add(at+".url", "missing; write %s", home(registry))
		u = new(url.URL)
	case err != nil || u.Scheme != "https" && u.Scheme != "http" || !oci.ValidRegistry(u.Host) || !validPort(u.Port()):
		p.add(at+".url", "is not the URL of a server; write https:// and a host, such as %s", home(registry))
		u = new(url.URL)
	}
	if u.User != nil {
		p.add(at+".url", "credentials inside a URL; write %s://%s and put them under credentials, as username and password_file", u.Scheme, u.Host)
	}
	switch rest := strings.Trim(u.Path, "/"); {
	case strings.ContainsAny(up.URL, "?#"):
		p.add(at+".url", "a query or fragment; write %s://%s", u.Scheme, u.Host)
	case rest == "v2":
		p.add(at+".url", "/v2 follows by itself; write %s://%s", u.Scheme, u.Host)
	case rest != "":
		p.add(at+".url", "a path; write %s://%s, and what stands before the repositories' names as repository_prefix", u.Scheme, u.Host)
	}
	if prefix := up.RepositoryPrefix; prefix != "" {
		_, err := oci.ParseRepository("localhost", strings.TrimSuffix(prefix, "/"))
		switch {
		case err != nil:
			p.add(at+".repository_prefix", "%q cannot begin a repository's name; write it as quay/", prefix)
		case !strings.HasSuffix(prefix, "/"):
			p.add(at+".repository_prefix", "would run into the name behind it; write %s/", prefix)
		}
	}
	up.validateNetwork(p, at, u)
	up.Credentials.validate(p, at, u)
}

// equal reports whether two upstreams are one.
func (up Upstream) equal(other Upstream) bool {
	ours, err := yaml.Dump(up)
	theirs, also := yaml.Dump(other)
	return err == nil && also == nil && string(ours) == string(theirs)
}

// validateNetwork checks how an upstream is connected to.
func (up Upstream) validateNetwork(p *problems, at string, u *url.URL) {
	if up.Proxy != "" && up.Proxy != ProxyEnv && up.Proxy != ProxyNone {
		proxy, err := url.Parse(up.Proxy)
		switch {
		case err != nil || proxy.Scheme != "http" && proxy.Scheme != "https" || !oci.ValidRegistry(proxy.Host) || !validPort(proxy.Port()):
			p.add(at+".proxy", "is neither env, none nor the URL of an HTTP proxy; write it as http://proxy.internal:3128")
		case proxy.User != nil:
			p.add(at+".proxy", "a secret in the clear; write env, and the URL with its password into the variable HTTPS_PROXY")
		case strings.Trim(proxy.Path, "/") != "" || strings.ContainsAny(up.Proxy, "?#"):
			p.add(at+".proxy", "something behind the host; write %s://%s", proxy.Scheme, proxy.Host)
		}
	}
	if up.CAFile != "" {
		if _, err := os.Stat(up.CAFile); err != nil {
			p.add(at+".ca_file", "%v", err)
		}
	}
	p.keyPair(at+".client_cert", up.ClientCert)
	if up.ClientCert != (TLS{}) && u.Scheme == "http" {
		p.add(at+".client_cert", "http:// shows no certificates; write https://%s", u.Host)
	}
	for key, hosts := range map[string][]string{"redirect_hosts": up.RedirectHosts, "trusted_realms": up.TrustedRealms} {
		for i, host := range hosts {
			switch at, lower := fmt.Sprintf("%s.%s[%d]", at, key, i), strings.ToLower(host); {
			case !oci.ValidRegistry(host):
				p.add(at, "%q is not a host; write it without scheme, such as cdn.internal or cdn.internal:8443", host)
			case lower != host:
				p.add(at, "write it in lower case: %s", lower)
			}
		}
		p.unique(at+"."+key, hosts)
	}
}

func (c Credentials) validate(p *problems, upstream string, u *url.URL) {
	if c == (Credentials{}) {
		return
	}
	at := upstream + ".credentials"
	if u.Scheme == "http" {
		p.add(at, "http:// would send them in the clear; write https://%s", u.Host)
	}
	var ways []string
	for _, way := range []struct {
		key string
		set bool
	}{{"username", c.Username != "" || c.PasswordFile != ""}, {"docker_config", c.DockerConfig != ""}, {"helper", c.Helper != ""}, {"ecr", c.ECR != nil}} {
		if way.set {
			ways = append(ways, way.key)
		}
	}
	if len(ways) > 1 {
		p.add(at, "several of them; keep one of %s", strings.Join(ways, ", "))
	}
	if c.DockerConfig != "" {
		p.secretFile(at+".docker_config", c.DockerConfig)
	}
	if c.Helper != "" && !helperName.MatchString(c.Helper) {
		p.add(at+".helper", "%q is not the name of a credential helper; write what stands behind docker-credential- in the name of its program", c.Helper)
	}
	switch {
	case c.ECR != nil && c.ECR.Region == "":
		p.add(at+".ecr.region", "missing, and the URL names none; write the region of the registry, such as us-east-1")
	case c.ECR != nil && !regionName.MatchString(c.ECR.Region):
		p.add(at+".ecr.region", "%q is not a region; write it as us-east-1", c.ECR.Region)
	}
	if slices.Contains(ways, "username") {
		c.validatePassword(p, at)
	}
}

var (
	helperName = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._-]*$`)
	regionName = regexp.MustCompile(`^[a-z0-9]+(-[a-z0-9]+)+$`)
)

func (c Credentials) validatePassword(p *problems, at string) {
	switch {
	case c.Username == "":
		p.add(at+".username", "missing; write the account's name")
	case strings.Contains(c.Username, ":"):
		p.add(at+".username", "holds a colon, as no user's name can; a password goes to the file that password_file names")
	}
	if c.PasswordFile == "" {
		p.add(at+".password_file", "missing; write the password to a file that its owner alone can read, and name it here")
	} else {
		p.secretFile(at+".password_file", c.PasswordFile)
	}
}

// address checks host:port, and returns the host if it has that form.
func (p *problems) address(at, address string) (host string, ok bool) {
	host, port, err := net.SplitHostPort(address)
	if err != nil || port == "" || !validPort(port) {
		p.add(at, "%q is not an address; write host:port, such as 127.0.0.1:5000", address)
		return "", false
	}
	return host, true
}

// validPort also takes a port that is not given.
func validPort(port string) bool {
	_, err := strconv.ParseUint(port, 10, 16)
	return port == "" || err == nil
}

// keyPair checks the files of a certificate.
func (p *problems) keyPair(at string, files TLS) {
	if (files.CertFile == "") != (files.KeyFile == "") {
		p.add(at, "needs both cert_file and key_file")
	}
	if files.CertFile != "" {
		if _, err := os.Stat(files.CertFile); err != nil {
			p.add(at+".cert_file", "%v", err)
		}
	}
	if files.KeyFile != "" {
		p.secretFile(at+".key_file", files.KeyFile)
	}
}

// hostName checks what may stand in a Host header, without its port.
func (p *problems) hostName(at, name string) {
	switch lower := strings.ToLower(name); {
	case !oci.ValidRegistry(name) || strings.Contains(name, ":"):
		p.add(at, "%q is not a host name; write it without scheme and port, such as mirror.internal", name)
	case lower != name:
		p.add(at, "write it in lower case: %s", lower)
	}
}

// configured checks that a registry is one of those that are mirrored.
func (p *problems) configured(at, name string, registries map[string]Registry) {
	if _, ok := registries[name]; ok {
		return
	}
	names := slices.Sorted(maps.Keys(registries))
	if meant := nearest(name, names); meant != "" {
		p.add(at, "%q is not one of registries; write %s", name, meant)
		return
	}
	p.add(at, "%q is not one of registries; add it there, or write one of %s", name, strings.Join(names, ", "))
}

// oneOf checks a word.
func (p *problems) oneOf(at, word string, words ...string) {
	if !slices.Contains(words, word) {
		p.add(at, "%q is unknown; write one of %s", word, strings.Join(words, ", "))
	}
}

// unique checks that a list says nothing twice.
func (p *problems) unique(at string, list []string) {
	for i, item := range list {
		if first := slices.Index(list, item); first < i {
			p.add(fmt.Sprintf("%s[%d]", at, i), "a duplicate of %s[%d]; keep one of the two", at, first)
		}
	}
}

// secretFile checks that a file is there for its owner alone.
func (p *problems) secretFile(at, file string) {
	if err := checkSecret(file); err != nil {
		p.add(at, "%v", err)
	}
}

// checkSecret is what is wrong with a file that has to be there for its owner alone. It does not repeat
// the name of one that is not there: that may be the secret itself.
func checkSecret(file string) error {
	info, err := os.Stat(file)
	if unnamed := new(fs.PathError); errors.As(err, &unnamed) {
		err = unnamed.Err
	}
	switch {
	case err != nil:
		return fmt.Errorf("%w; write the name of a file that holds the secret", err)
	case !info.Mode().IsRegular():
		return fmt.Errorf("%s is not a file", file)
	case info.Mode().Perm()&0o077 != 0 && !isLent(info):
		return fmt.Errorf("%s is open to others than its owner (mode %04o); run chmod 600 %s", file, info.Mode().Perm(), file)
	case info.Size() == 0:
		return fmt.Errorf("%s is empty; write the secret to it", file)
	}
	return nil
}

// isLent reports whether a file is root's, who lets the members of a group of ours read it: so a kubelet
// mounts a Secret for a pod's fsGroup, whose files it can make nobody's own.
func isLent(info fs.FileInfo) bool {
	stat, ok := info.Sys().(*syscall.Stat_t)
	if !ok || stat.Uid != 0 || stat.Gid == 0 || info.Mode().Perm()&0o037 != 0 {
		return false
	}
	groups, err := os.Getgroups()
	return err == nil && slices.Contains(append(groups, os.Getegid()), int(stat.Gid))
}
