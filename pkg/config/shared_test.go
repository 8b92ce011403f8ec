package config

import (
	"encoding/hex"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

func TestSharedIsCompleted(t *testing.T) {
	dir := folder(t)
	s3 := S3{Bucket: "example-builds", Prefix: "breakwater/", Region: "eu-central-1"}
	key := filepath.Join(dir, "fleet.key")
	elsewhere := S3{Bucket: "b.1", Region: "us-east-1", Endpoint: "http://10.0.0.5:9000", PathStyle: true}
	for name, tt := range map[string]struct {
		text    string
		environ []string
		want    Shared
	}{
		"none":        {"shared:\n", nil, Shared{}},
		"empty":       {"shared: {s3: {}}\n", nil, Shared{}},
		"little":      {"shared: {s3: {bucket: example-builds, prefix: breakwater, region: eu-central-1}, key_file: fleet.key}\n", nil, Shared{S3: s3, KeyFile: key, Wait: Set(2 * time.Second)}},
		"no waiting":  {"shared: {s3: {bucket: example-builds, prefix: breakwater/, region: eu-central-1}, key_file: fleet.key, wait: 0s}\n", nil, Shared{S3: s3, KeyFile: key, Wait: Set(0)}},
		"longest":     {"shared: {s3: {bucket: example-builds, prefix: breakwater/, region: eu-central-1}, key_file: fleet.key, wait: 5s, read_only: true}\n", nil, Shared{S3: s3, KeyFile: key, Wait: Set(5 * time.Second), ReadOnly: true}},
		"no Amazon":   {"shared: {s3: {bucket: b.1, endpoint: 'http://10.0.0.5:9000/', path_style: true}, key_file: fleet.key}\n", nil, Shared{S3: elsewhere, KeyFile: key, Wait: Set(2 * time.Second)}},
		"by variable": {"", []string{"BREAKWATER_SHARED_S3_BUCKET=example-builds", "BREAKWATER_SHARED_S3_PREFIX=breakwater", "BREAKWATER_SHARED_S3_REGION=eu-central-1", "BREAKWATER_SHARED_KEY_FILE=" + key, "BREAKWATER_SHARED_WAIT=1s", "BREAKWATER_SHARED_READ_ONLY=true"}, Shared{S3: s3, KeyFile: key, Wait: Set(time.Second), ReadOnly: true}},
		"mixed":       {"shared: {s3: {bucket: builds, region: eu-central-1, prefix: breakwater}, key_file: fleet.key}\n", []string{"BREAKWATER_SHARED_S3_BUCKET=example-builds"}, Shared{S3: s3, KeyFile: key, Wait: Set(2 * time.Second)}},
	} {
		c, err := load(filepath.Join(dir, "c.yaml"), []byte(tt.text), tt.environ, nil)
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		if diff := cmp.Diff(tt.want, c.Shared, same); diff != "" || c.Shared.Enabled() != (tt.want != Shared{}) {
			t.Errorf("%s: enabled %t, %s", name, c.Shared.Enabled(), diff)
		}
	}
}

// TestSharedDocsLoad takes the configurations and policies out of the text, as who follows it would.
func TestSharedDocsLoad(t *testing.T) {
	text, err := os.ReadFile("../../docs/shared-store.md")
	if err != nil {
		t.Fatal(err)
	}
	configurations, policies := 0, 0
	for _, block := range regexp.MustCompile(`(?m)(^    .*\n)+`).FindAllString(string(text), -1) {
		switch first := strings.Fields(block)[0]; first {
		case "registries:", "shared:":
			configurations++
			block = strings.ReplaceAll(block, "/etc/breakwater/fleet.key", filepath.Join(folder(t), "fleet.key"))
			if c, err := load("c.yaml", []byte(block), nil, nil); err != nil || !c.Shared.Enabled() {
				t.Errorf("%v\n%s", err, block)
			}
		case "{":
			policies++
			if !json.Valid([]byte(block)) {
				t.Errorf("not JSON:\n%s", block)
			}
		}
	}
	if configurations != 2 || policies != 2 {
		t.Errorf("%d configurations and %d policies", configurations, policies)
	}
}

// TestSharedMistakes has those of which a file of testdata can show one only.
func TestSharedMistakes(t *testing.T) {
	key := filepath.Join(folder(t), "fleet.key")
	for text, want := range map[string]string{
		"bucket: ab, region: us-east-1": "shared.s3.bucket: ", "bucket: " + strings.Repeat("a", 64) + ", region: us-east-1": "shared.s3.bucket: ", "bucket: -ab, region: us-east-1": "shared.s3.bucket: ",
		"bucket: ab., region: us-east-1": "shared.s3.bucket: ", "bucket: a..b, region: us-east-1": "shared.s3.bucket: ", "bucket: 192.168.5.4, region: us-east-1": "shared.s3.bucket: ",
		"bucket: a_b, region: us-east-1": "shared.s3.bucket: ", "bucket: Builds, region: us-east-1": "shared.s3.bucket: ", "bucket: builds/breakwater, region: us-east-1": "shared.s3.bucket: ",
		"bucket: " + strings.Repeat("a", 63) + ", region: us-east-1": "", "bucket: 1-a.b, region: us-gov-west-1": "",
		"bucket: builds, region: useast1": "shared.s3.region: ", "bucket: builds, region: us-east-1/": "shared.s3.region: ",
		"bucket: builds, endpoint: https://r2.example, region: auto": "", "bucket: builds, endpoint: https://r2.example, region: a b": "shared.s3.region: ",
		"bucket: builds, region: us-east-1, prefix: a/b.c/d-e_f": "", "bucket: builds, region: us-east-1, prefix: /": "shared.s3.prefix: ", "bucket: builds, region: us-east-1, prefix: a//b": "shared.s3.prefix: ",
		"bucket: builds, region: us-east-1, prefix: ../a": "shared.s3.prefix: ", "bucket: builds, region: us-east-1, prefix: a/..": "shared.s3.prefix: ", "bucket: builds, region: us-east-1, prefix: ./a": "shared.s3.prefix: ",
		"bucket: builds, region: us-east-1, prefix: a*": "shared.s3.prefix: ", "bucket: builds, region: us-east-1, prefix: " + strings.Repeat("a", 255): "", "bucket: builds, region: us-east-1, prefix: " + strings.Repeat("a", 256): "shared.s3.prefix: is 257 bytes long",
		"bucket: builds, endpoint: 's3.internal:9000'": "shared.s3.endpoint: ", "bucket: builds, endpoint: 'ftp://s3.internal'": "shared.s3.endpoint: ", "bucket: builds, endpoint: 'https://'": "shared.s3.endpoint: ",
		"bucket: builds, endpoint: 'https://s3.internal:99999'": "shared.s3.endpoint: ", "bucket: builds, endpoint: 'https://s3.internal/builds'": "shared.s3.endpoint: something behind the host; write https://s3.internal,", "bucket: builds, endpoint: 'https://s3.internal?x'": "shared.s3.endpoint: ",
		"bucket: builds, endpoint: 'http://[fd00::5]:9000'": "", "bucket: builds, endpoint: 'http://s3.example.com'": "",
		"bucket: builds, region: us-east-1, encryption: AES256": "", "bucket: builds, region: us-east-1, encryption: 'aws:kms'": "", "bucket: builds, region: us-east-1, encryption: 'aws:kms', kms_key: 'arn:aws:kms:us-east-1:123456789012:key/0-a'": "",
		"bucket: builds, region: us-east-1, encryption: AES256, kms_key: alias/a": "shared.s3.kms_key: ", "bucket: builds, region: us-east-1, encryption: 'aws:kms', kms_key: a b": "shared.s3.kms_key: ",
	} {
		_, err := load("c.yaml", []byte("shared: {s3: {"+text+"}, key_file: "+key+"}\n"), nil, nil)
		if (err == nil) != (want == "") || err != nil && (!strings.Contains(err.Error(), want) || strings.Contains(err.Error(), "\n")) {
			t.Errorf("%s: %v, want %q", text, err, want)
		}
	}
	for _, environ := range []string{"BREAKWATER_SHARED_WAIT=5", "BREAKWATER_SHARED_READ_ONLY=perhaps", "BREAKWATER_SHARED_S3_BUCKET=B"} {
		name, _, _ := strings.Cut(environ, "=")
		if _, err := load("c.yaml", []byte("shared: {s3: {bucket: builds, region: us-east-1}, key_file: "+key+"}\n"), []string{environ}, nil); err == nil || !strings.Contains(err.Error(), name+": shared.") {
			t.Errorf("%s: %v", environ, err)
		}
	}
}

// TestH42FleetKeys reads files of keys, and looks for each line of a bad one in what is said of it.
func TestH42FleetKeys(t *testing.T) {
	key := func(n int) string { return fmt.Sprintf("%064x", n+0xa000) }
	many := func(n int) (text string) {
		for i := range n {
			text += key(i) + "\n"
		}
		return text
	}
	const write = "not a key; write 64 hex digits and nothing else, as openssl rand -hex 32 prints them"
	for name, tt := range map[string]struct {
		text string
		mode os.FileMode
		want []string
		err  string
	}{
		"one":                  {key(1) + "\n", 0o600, []string{key(1)}, ""},
		"read only":            {key(1) + "\n", 0o400, []string{key(1)}, ""},
		"no newline":           {key(1), 0o600, []string{key(1)}, ""},
		"in order":             {"# the new one\n\n" + key(2) + "\r\n  # and\n\t" + strings.ToUpper(key(1)) + " \n", 0o600, []string{key(2), key(1)}, ""},
		"most":                 {many(16), 0o600, strings.Fields(many(16)), ""},
		"too many":             {"\n" + many(17), 0o600, nil, ":18: more than 16 keys"},
		"short":                {key(1)[2:] + "\n", 0o600, nil, ":1: " + write},
		"long":                 {"# k\n" + key(1) + "ab\n", 0o600, nil, ":2: " + write},
		"odd":                  {key(1)[1:] + "\n", 0o600, nil, ":1: " + write},
		"no hex":               {key(1) + "\n" + strings.Repeat("correct-", 8) + "\n", 0o600, nil, ":2: " + write},
		"base64":               {"oAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=\n", 0o600, nil, ":1: " + write},
		"comment behind":       {key(1) + " # new\n", 0o600, nil, ":1: " + write},
		"longest line":         {key(1) + "\n" + strings.Repeat(key(2), 2000) + "\n", 0o600, nil, "token too long"},
		"twice":                {key(1) + "\n" + key(2) + "\n" + strings.ToUpper(key(1)) + "\n", 0o600, nil, ":3: the key of line 1 again; keep one of the two"},
		"empty":                {"", 0o600, nil, " is empty"},
		"nothing but comments": {"# " + key(1) + "\n", 0o600, nil, " holds no key; write one to it, as openssl rand -hex 32 prints them"},
		"group":                {key(1) + "\n", 0o640, nil, " is open to others than its owner (mode 0640); run chmod 600 "},
		"world":                {key(1) + "\n", 0o604, nil, " is open to others than its owner (mode 0604); run chmod 600 "},
	} {
		t.Run(name, func(t *testing.T) {
			file := filepath.Join(t.TempDir(), "fleet.key")
			if err := os.WriteFile(file, []byte(tt.text), 0o600); err != nil {
				t.Fatal(err)
			}
			if err := os.Chmod(file, tt.mode); err != nil {
				t.Fatal(err)
			}
			keys, err := Shared{KeyFile: file}.Keys()
			var got []string
			for _, key := range keys {
				got = append(got, hex.EncodeToString(key))
			}
			if diff := cmp.Diff(tt.want, got); diff != "" || (err == nil) != (tt.err == "") {
				t.Fatalf("%v, -want +got\n%s", err, diff)
			}
			if err == nil {
				return
			}
			if !strings.HasPrefix(err.Error(), "shared.key_file: "+file) || !strings.Contains(err.Error(), tt.err) {
				t.Errorf("%v, want %q", err, tt.err)
			}
			for _, word := range strings.Fields(tt.text) {
				if len(word) > 30 && strings.Contains(strings.ToLower(err.Error()), strings.ToLower(word[:30])) {
					t.Errorf("the error tells a key: %v", err)
				}
			}
		})
	}
	for _, file := range []string{"", "hunter2", filepath.Join(t.TempDir(), "hunter2")} {
		if keys, err := (Shared{KeyFile: file}).Keys(); err == nil || strings.Contains(err.Error(), "hunter2") || keys != nil {
			t.Errorf("%q: %v, %v", file, keys, err)
		}
	}
	if _, err := (Shared{KeyFile: t.TempDir()}).Keys(); err == nil || !strings.Contains(err.Error(), " is not a file") {
		t.Errorf("a folder: %v", err)
	}
}
