package config

import (
	"bufio"
	"encoding/hex"
	"fmt"
	"net/url"
	"os"
	"regexp"
	"slices"
	"strings"
	"time"

	"breakwater/pkg/oci"
)

// Shared is the store that a fleet of mirrors shares. The zero value is none.
type Shared struct {
	S3       S3       `yaml:"s3,omitempty"`
	KeyFile  string   `yaml:"key_file,omitempty"`  // ask Keys for what is in it; absolute once loaded
	Wait     Duration `yaml:"wait,omitempty"`      // for another host's upload of what a client wants
	ReadOnly bool     `yaml:"read_only,omitempty"` // this host publishes nothing
}

// S3 is a folder of a bucket. Whom the AWS SDK finds us to be may use it.
type S3 struct {
	Bucket     string `yaml:"bucket,omitempty"`
	Prefix     string `yaml:"prefix,omitempty"`     // of all names in it; empty, or it ends in a slash
	Region     string `yaml:"region,omitempty"`     // Load fills it in for an Endpoint
	Endpoint   string `yaml:"endpoint,omitempty"`   // scheme and host of another server than Amazon's
	PathStyle  bool   `yaml:"path_style,omitempty"` // the bucket stands in URLs' paths, not in front of the host
	Encryption string `yaml:"encryption,omitempty"` // EncryptAES256, EncryptKMS, or as the bucket has it
	KMSKey     string `yaml:"kms_key,omitempty"`    // for EncryptKMS, instead of the account's own
}

// What S3's Encryption, done by the server, may be.
const (
	EncryptAES256 = "AES256"
	EncryptKMS    = "aws:kms"
)

const (
	defaultWait           = 2 * time.Second
	maxWait               = 5 * time.Second // half of the time within which every request is answered
	defaultEndpointRegion = "us-east-1"     // what stores that have no regions want to be signed for
	maxPrefix             = 256             // bytes: a key has 1024, and the longest tag's record takes over 600
	maxKeys               = 16
	keySize               = 32 // bytes of HMAC-SHA-256's own strength (RFC 2104, section 3)
)

// Enabled reports whether there is a shared store.
func (s Shared) Enabled() bool { return s.S3.Bucket != "" }

// Keys are the fleet's, read from KeyFile now: the first signs, all verify. The file has one a line, as 64
// hex digits; empty lines and those that begin with # say nothing. Its errors name the line, and hold
// nothing of what stands there.
func (s Shared) Keys() ([][]byte, error) {
	if err := checkSecret(s.KeyFile); err != nil {
		return nil, fmt.Errorf("shared.key_file: %w", err)
	}
	file, err := os.Open(s.KeyFile)
	if err != nil {
		return nil, fmt.Errorf("shared.key_file: %w", err)
	}
	defer file.Close()
	var keys [][]byte
	lines := map[string]int{} // of keys
	scanner := bufio.NewScanner(file)
	for n := 1; scanner.Scan(); n++ {
		line := strings.TrimSpace(scanner.Text())
		if line == "" || line[0] == '#' {
			continue
		}
		key, err := hex.DecodeString(line)
		first := lines[string(key)]
		switch {
		case err != nil || len(key) != keySize:
			return nil, fmt.Errorf("shared.key_file: %s:%d: not a key; write %d hex digits and nothing else, as openssl rand -hex %d prints them", s.KeyFile, n, 2*keySize, keySize)
		case first > 0:
			return nil, fmt.Errorf("shared.key_file: %s:%d: the key of line %d again; keep one of the two", s.KeyFile, n, first)
		case len(keys) == maxKeys:
			return nil, fmt.Errorf("shared.key_file: %s:%d: more than %d keys; keep the first, which signs, and those that hosts still sign with", s.KeyFile, n, maxKeys)
		}
		lines[string(key)] = n
		keys = append(keys, key)
	}
	if err := scanner.Err(); err != nil {
		return nil, fmt.Errorf("shared.key_file: %s: %w", s.KeyFile, err)
	}
	if len(keys) == 0 {
		return nil, fmt.Errorf("shared.key_file: %s holds no key; write one to it, as openssl rand -hex %d prints them", s.KeyFile, keySize)
	}
	return keys, nil
}

// settle completes what was left out of a shared store that there is.
func (s *Shared) settle() {
	if !s.Enabled() {
		return
	}
	if s.Wait.IsZero() {
		s.Wait = Set(defaultWait)
	}
	if folder := s.S3.Prefix + "/"; prefixName.MatchString(folder) {
		s.S3.Prefix = folder
	}
	s.S3.Endpoint = strings.TrimSuffix(s.S3.Endpoint, "/")
	if s.S3.Region == "" && s.S3.Endpoint != "" {
		s.S3.Region = defaultEndpointRegion
	}
}

func (s Shared) validate(p *problems) {
	if s == (Shared{}) {
		return
	}
	s.S3.validate(p)
	switch {
	case s.KeyFile != "":
		p.secretFile("shared.key_file", s.KeyFile)
	case s.Enabled():
		p.add("shared.key_file", "missing; write the output of openssl rand -hex %d to a file that its owner alone can read, the same on all hosts, and name it here", keySize)
	}
	switch {
	case s.Wait.Duration < 0:
		p.add("shared.wait", "%s is negative; write 0s for no waiting at all", s.Wait)
	case s.Wait.Duration > maxWait:
		p.add("shared.wait", "%s is too long for clients, who get no byte meanwhile; write %s or less", s.Wait, Set(maxWait))
	}
}

var (
	bucketName = regexp.MustCompile(`^[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]$`)
	bucketIP   = regexp.MustCompile(`^[0-9]+\.[0-9]+\.[0-9]+\.[0-9]+$`)
	// prefixName has nothing that would be encoded in a URL, or a wildcard in a policy.
	prefixName  = regexp.MustCompile(`^([A-Za-z0-9._-]+/)*$`)
	storeRegion = regexp.MustCompile(`^[A-Za-z0-9]+([_-][A-Za-z0-9]+)*$`) // such as auto, at other servers than Amazon's
	kmsKey      = regexp.MustCompile(`^[A-Za-z0-9:/_-]+$`)
)

func (s S3) validate(p *problems) {
	const at = "shared.s3."
	switch {
	case s.Bucket == "":
		p.add(at+"bucket", "missing; write the name of the bucket, such as example-builds, or take shared away")
	case !bucketName.MatchString(s.Bucket) || strings.Contains(s.Bucket, "..") || bucketIP.MatchString(s.Bucket):
		p.add(at+"bucket", "%q is not the name of a bucket; write 3 to 63 small letters, digits, dots and hyphens, such as example-builds, and what follows a slash as prefix", s.Bucket)
	}
	steps := strings.Split(s.Prefix, "/")
	switch {
	case !prefixName.MatchString(s.Prefix) || slices.Contains(steps, ".") || slices.Contains(steps, ".."):
		p.add(at+"prefix", "%q is not a folder in a bucket; write letters, digits, dots, hyphens and underscores, with slashes between and one at the end, such as breakwater/", s.Prefix)
	case len(s.Prefix) > maxPrefix:
		p.add(at+"prefix", "is %d bytes long, and names in the bucket need the room; write %d or fewer", len(s.Prefix), maxPrefix)
	}
	switch {
	case s.Region == "" && s.Endpoint == "":
		p.add(at+"region", "missing; write the region of the bucket, such as us-east-1")
	case s.Region != "" && !regionName.MatchString(s.Region) && (s.Endpoint == "" || !storeRegion.MatchString(s.Region)):
		p.add(at+"region", "%q is not a region; write it as us-east-1", s.Region)
	}
	s.validateEndpoint(p, at+"endpoint")
	if s.Encryption != "" {
		p.oneOf(at+"encryption", s.Encryption, EncryptAES256, EncryptKMS)
	}
	switch {
	case s.KMSKey != "" && s.Encryption != EncryptKMS:
		p.add(at+"kms_key", "encrypts nothing unless encryption is %s; write that too, or take kms_key away", EncryptKMS)
	case s.KMSKey != "" && !kmsKey.MatchString(s.KMSKey):
		p.add(at+"kms_key", "is not the name of a key; write its ARN, such as arn:aws:kms:us-east-1:123456789012:key/…, its ID, or alias/ and its alias")
	}
}

// validateEndpoint lets http:// pass: requests are signed, and hold no secret. It repeats no part of the
// URL that may hold one.
func (s S3) validateEndpoint(p *problems, at string) {
	if s.Endpoint == "" {
		return
	}
	u, err := url.Parse(s.Endpoint)
	switch {
	case err != nil || u.Scheme != "https" && u.Scheme != "http" || !oci.ValidRegistry(u.Host) || !validPort(u.Port()):
		p.add(at, "is not the URL of a server; write https:// and a host, such as https://s3.internal:9000")
	case u.User != nil:
		p.add(at, "credentials inside a URL; write %s://%s, and leave them to the AWS SDK: in the variables AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, in ~/.aws, or in the host's role", u.Scheme, u.Host)
	case strings.Trim(u.Path, "/") != "" || strings.ContainsAny(s.Endpoint, "?#"):
		p.add(at, "something behind the host; write %s://%s, and the bucket under bucket", u.Scheme, u.Host)
	}
}
