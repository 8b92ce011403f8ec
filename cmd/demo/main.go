// Demo tells what breakwater is for, with nothing but this machine: a real registry, breakwater in
// front of it, a client behind it, and an outage. It exits with 1 if the story does not go as told.
package main

import (
	"context"
	"fmt"
	"os"
	"os/signal"
	"syscall"

	"breakwater/pkg/registrytest"
)

// The image of the story: every build begins by pulling its tag.
const (
	registryName = "registry.example"
	repository   = "builds/supervisor"
	tag          = "latest"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	err := run(ctx)
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "demo:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context) error {
	dir, err := os.MkdirTemp("", "breakwater-demo-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	registry, err := registrytest.NewReal("")
	if err != nil {
		return err
	}
	defer registry.Close()
	image := registrytest.NewImage(registrytest.Layer(1, 8<<20), registrytest.Layer(2, 4<<20))
	if err := registrytest.Push(ctx, registry.URL, repository, tag, image); err != nil {
		return err
	}
	mirror, err := startBreakwater(ctx, dir, registryName, registry.URL)
	if err != nil {
		return err
	}
	defer mirror.stop()
	fmt.Printf("A registry at %s, breakwater in front of it at http://%s. A build host, its own store empty,\n"+
		"pulls %s/%s:%s through breakwater and checks every digest.\n\n", registry.URL, mirror.addr, registryName, repository, tag)
	s := &story{registry: registry, base: fmt.Sprintf("http://%s/v2/%s/%s", mirror.addr, registryName, repository), image: image}
	return s.tell(ctx)
}
