//go:build linux

// Package charts_test renders, checks and installs the Helm chart.
package charts_test

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"testing"

	// What the program that is built below says of a configuration comes from these: with them go test knows
	// when it has to be asked again.
	_ "breakwater/pkg/config"
	_ "breakwater/proxy/access"
)

const (
	chart = "breakwater" // its name and its folder
	// kubernetes is the version whose documents testdata/install.sh has fetched. A Helm that was built from
	// its module believes in a much older one unless it is told.
	kubernetes = "1.35.4"
	// release and namespace are those that the files in ci are written for.
	release, namespace = "mirror", "mirrors"
)

// helms are the two that are in use.
var helms = []string{"helm3/helm", "helm4/helm"}

// cache is what testdata/install.sh has installed under a name: programs, and documents of Kubernetes'.
func cache(t *testing.T, name string) string {
	t.Helper()
	dir, err := os.UserCacheDir()
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(dir, "breakwater-test", name)
	if _, err := os.Stat(file); err != nil {
		cannot(t, "%v: run testdata/install.sh", err)
	}
	return file
}

// copied is a copy of the chart. What this process reads itself, go test knows, and runs again when it changes.
func copied(t *testing.T) string {
	t.Helper()
	dir := filepath.Join(t.TempDir(), chart)
	if err := os.CopyFS(dir, os.DirFS(chart)); err != nil {
		t.Fatal(err)
	}
	return dir
}

// cannot skips a test, saying why. In CI nothing may be skipped.
func cannot(t *testing.T, format string, args ...any) {
	t.Helper()
	if os.Getenv("CI") == "true" {
		t.Fatalf(format, args...)
	}
	t.Skipf(format, args...)
}

// run returns what a program says on its standard output, and fails the test if it fails.
func run(t *testing.T, program string, args ...string) []byte {
	t.Helper()
	return feed(t, nil, program, args...)
}

// feed is run with something on the standard input.
func feed(t *testing.T, input []byte, program string, args ...string) []byte {
	t.Helper()
	cmd := exec.Command(program, args...)
	cmd.Stdin = bytes.NewReader(input)
	var out, errors bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errors
	if err := cmd.Run(); err != nil {
		t.Fatalf("%s %q: %v\n%s%s", filepath.Base(program), args, err, out.Bytes(), errors.Bytes())
	}
	return out.Bytes()
}

// breakwater is the program, built once.
func breakwater(t *testing.T) string {
	t.Helper()
	program, err := build()
	if err != nil {
		t.Fatal(err)
	}
	return program
}

var build = sync.OnceValues(func() (string, error) {
	program, err := filepath.Abs("../bin/charts/breakwater") // not where other packages of tests build theirs
	if err != nil {
		return "", err
	}
	cmd := exec.Command("go", "build", "-trimpath", "-o", program, "../cmd/breakwater")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("build: %w\n%s", err, out)
	}
	return program, nil
})
