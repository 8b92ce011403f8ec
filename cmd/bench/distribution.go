package main

import (
	"context"
	"fmt"
	"net/http"
	"os"

	"github.com/distribution/distribution/v3/configuration"
	"github.com/distribution/distribution/v3/registry/handlers"
	_ "github.com/distribution/distribution/v3/registry/storage/driver/filesystem" // the driver that its configuration names
)

// distributionRole is the argument, before a configuration file, that makes this program
// distribution's registry: its memory and processor time are then its own.
const distributionRole = "distribution"

// serveDistribution serves as distribution's registry does, but for its access log.
func serveDistribution(ctx context.Context, configFile string) error {
	f, err := os.Open(configFile)
	if err != nil {
		return err
	}
	defer f.Close()
	config, err := configuration.Parse(f)
	if err != nil {
		return fmt.Errorf("configuration %s: %w", configFile, err)
	}
	return http.ListenAndServe(config.HTTP.Addr, handlers.NewApp(ctx, config))
}
