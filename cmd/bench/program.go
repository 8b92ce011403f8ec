package main

import (
	"context"
	"embed"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime/debug"
	"strings"
	"syscall"
)

// configs are what the programs are asked to do: files, so that a reader can judge them.
//
//go:embed breakwater.yaml nginx.conf distribution.yaml
var configs embed.FS

// program is something that can stand between clients and the upstream.
type program struct {
	name    string
	version string
	config  string         // the template of its configuration, in configs
	quit    syscall.Signal // ends it in good order
	command func(context.Context, place) *exec.Cmd
}

// profiler is added to breakwater's main package when a profile is wanted: the program itself need
// not know that it is measured.
const profiler = `package main

import (
	"os"
	"os/signal"
	"runtime/pprof"
	"syscall"
)

func init() {
	f, err := os.Create(os.Getenv("` + profileVariable + `"))
	if err != nil {
		panic(err)
	}
	if err := pprof.StartCPUProfile(f); err != nil {
		panic(err)
	}
	quit := make(chan os.Signal, 1)
	signal.Notify(quit, syscall.SIGUSR1)
	go func() {
		<-quit
		pprof.StopCPUProfile()
		f.Close()
		os.Exit(0)
	}()
}
`

const (
	profileVariable   = "BENCH_CPUPROFILE"
	breakwaterPackage = "breakwater/cmd/breakwater"
)

// buildBreakwater builds the program as users get it (no race detector) into dir, with the profiler
// if profiles names a folder for what that writes.
func buildBreakwater(ctx context.Context, dir, profiles string) (program, error) {
	binary := filepath.Join(dir, breakwater)
	args, quit := []string{"build", "-o", binary}, syscall.SIGTERM
	if profiles != "" {
		overlay, err := overlayProfiler(ctx, dir)
		if err := errors.Join(err, os.MkdirAll(profiles, 0o755)); err != nil {
			return program{}, err
		}
		args, quit = append(args, "-overlay", overlay), syscall.SIGUSR1
	}
	if _, err := output(ctx, "go", append(args, breakwaterPackage)...); err != nil {
		return program{}, err
	}
	return program{
		name:   breakwater,
		config: "breakwater.yaml",
		quit:   quit,
		command: func(ctx context.Context, at place) *exec.Cmd {
			cmd := exec.CommandContext(ctx, binary, "serve", "--config", at.configFile())
			cmd.Env = append(os.Environ(), profileVariable+"="+at.Profile)
			return cmd
		},
	}, nil
}

// overlayProfiler writes what go build needs to see the profiler among breakwater's sources.
func overlayProfiler(ctx context.Context, dir string) (overlay string, err error) {
	sources, err := output(ctx, "go", "list", "-f", "{{.Dir}}", breakwaterPackage)
	if err != nil {
		return "", err
	}
	source := filepath.Join(dir, "profiler.go")
	raw, err := json.Marshal(map[string]any{"Replace": map[string]string{filepath.Join(sources, "profiler.go"): source}})
	if err != nil {
		return "", fmt.Errorf("encode overlay: %w", err)
	}
	overlay = filepath.Join(dir, "overlay.json")
	return overlay, errors.Join(os.WriteFile(source, []byte(profiler), 0o644), os.WriteFile(overlay, raw, 0o644))
}

// findNginx finds Debian's nginx, or installs it as the tests do.
func findNginx(ctx context.Context) (program, error) {
	binary, err := lookNginx()
	if err != nil && os.Geteuid() == 0 {
		var root string
		if root, err = output(ctx, "go", "list", "-m", "-f", "{{.Dir}}", "breakwater"); err == nil {
			_, err = output(ctx, "sh", filepath.Join(root, "testdata", "install.sh"))
		}
		if err == nil {
			binary, err = lookNginx()
		}
	}
	if err != nil {
		return program{}, err
	}
	version, err := output(ctx, binary, "-v")
	if err != nil {
		return program{}, err
	}
	_, version, _ = strings.Cut(version, "/")
	return program{
		name:    nginx,
		version: version,
		config:  "nginx.conf",
		quit:    syscall.SIGTERM,
		command: func(ctx context.Context, at place) *exec.Cmd {
			return exec.CommandContext(ctx, binary, "-e", "stderr", "-c", at.configFile())
		},
	}, nil
}

func lookNginx() (string, error) {
	if binary, err := exec.LookPath("nginx"); err == nil {
		return binary, nil
	}
	return exec.LookPath("/usr/sbin/nginx") // where Debian has it, off the path of who is not root
}

// ownDistribution is the registry that this program itself can be.
func ownDistribution() (program, error) {
	self, err := os.Executable()
	if err != nil {
		return program{}, fmt.Errorf("find the bench's own program: %w", err)
	}
	p := program{
		name:   distribution,
		config: "distribution.yaml",
		quit:   syscall.SIGTERM,
		command: func(ctx context.Context, at place) *exec.Cmd {
			return exec.CommandContext(ctx, self, distributionRole, at.configFile())
		},
	}
	if info, ok := debug.ReadBuildInfo(); ok {
		for _, module := range info.Deps {
			if module.Path == "github.com/distribution/distribution/v3" {
				p.version = module.Version
			}
		}
	}
	return p, nil
}

// output runs a command and returns what it prints, without the space around it.
func output(ctx context.Context, name string, args ...string) (string, error) {
	out, err := exec.CommandContext(ctx, name, args...).CombinedOutput()
	text := strings.TrimSpace(string(out))
	if err != nil {
		return "", fmt.Errorf("run %s: %w: %s", name, err, text)
	}
	return text, nil
}
