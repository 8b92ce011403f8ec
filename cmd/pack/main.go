// Command pack makes what is installed: the packages, the container image, and the list of licences that
// both carry. It fetches nothing but modules, needs no daemon, and makes the same bytes of the same tree
// whenever and wherever it is run, by the same Go. It runs at the root of the repository:
//
//	go run ./cmd/pack packages|image|licences
package main

import (
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"time"
)

// architectures are those that everything is made for.
var architectures = []string{"amd64", "arm64"}

func main() {
	dist := flag.String("o", "dist", "`FOLDER` that is written to")
	flag.Parse()
	if err := pack(*dist, flag.Args()); err != nil {
		fmt.Fprintln(os.Stderr, "pack:", err)
		os.Exit(1)
	}
}

func pack(dist string, what []string) error {
	if len(what) == 0 {
		return errors.New("what? packages, image or licences")
	}
	r, err := newRelease(dist)
	if err != nil {
		return err
	}
	for _, w := range what {
		switch w {
		case "packages":
			err = r.packages()
		case "image":
			err = r.image()
		case "licences":
			_, err = r.licences()
		default:
			err = fmt.Errorf("%s is nothing that is made here", w)
		}
		if err != nil {
			return fmt.Errorf("%s: %w", w, err)
		}
	}
	return nil
}

// release is what is made, and of what.
type release struct {
	dist    string
	version string // semver, without a v
	commit  string // "" outside of a checkout
	time    time.Time
}

// newRelease reads from git what is being released. VERSION, COMMIT and SOURCE_DATE_EPOCH override that.
func newRelease(dist string) (*release, error) {
	r := &release{dist: dist, version: os.Getenv("VERSION"), commit: os.Getenv("COMMIT")}
	if r.commit == "" {
		r.commit = git("rev-parse", "HEAD")
	}
	epoch := os.Getenv("SOURCE_DATE_EPOCH")
	if epoch == "" {
		epoch = git("log", "-1", "--format=%ct")
	}
	seconds, err := strconv.ParseInt(epoch, 10, 64)
	if err != nil {
		return nil, fmt.Errorf("neither in a checkout nor with SOURCE_DATE_EPOCH: %w", err)
	}
	r.time = time.Unix(seconds, 0).UTC()
	if r.version == "" {
		r.version = strings.TrimPrefix(git("describe", "--exact-match", "--tags", "--match", "v*"), "v")
	}
	if r.version == "" { // between releases
		r.version = "0.0.0-" + r.time.Format("20060102150405") + "." + r.commit[:min(12, len(r.commit))]
	}
	return r, os.MkdirAll(dist, 0o755)
}

// git is what git prints, "" if it does not.
func git(args ...string) string {
	out, _ := exec.Command("git", args...).Output()
	return strings.TrimSpace(string(out))
}

// binary builds the program for an architecture and returns its path.
func (r *release) binary(arch string) (string, error) {
	path := filepath.Join(r.dist, "linux-"+arch, "breakwater")
	return path, r.run([]string{"CGO_ENABLED=0", "GOOS=linux", "GOARCH=" + arch, "GOFLAGS=", "GOAMD64=v1", "GOARM64=v8.0"},
		"go", "build", "-trimpath", "-buildvcs=false", "-ldflags", "-s -w -X main.version="+r.version, "-o", path, "./cmd/breakwater")
}

// run runs a program that prints only what is wrong.
func (r *release) run(variables []string, args ...string) error {
	cmd := exec.Command(args[0], args[1:]...)
	cmd.Env = append(append(os.Environ(), "SOURCE_DATE_EPOCH="+strconv.FormatInt(r.time.Unix(), 10)), variables...)
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("%s: %w\n%s", strings.Join(args, " "), err, out)
	}
	return nil
}
