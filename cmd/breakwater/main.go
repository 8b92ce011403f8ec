// Command breakwater is a pull-through registry mirror that goes on serving when the registries
// behind it do not. See README.md.
package main

import (
	"errors"
	"fmt"
	"os"
	"runtime"
	"runtime/debug"

	"github.com/spf13/cobra"
)

// version is set by the linker for releases.
var version = "devel"

// usageError is a mistake on the command line: exit code 2.
type usageError struct{ error }

func main() {
	err := rootCommand(usualFile).Execute()
	if err == nil {
		return
	}
	fmt.Fprintln(os.Stderr, "breakwater:", err)
	if errors.As(err, new(usageError)) {
		os.Exit(2)
	}
	os.Exit(1)
}

func rootCommand(usual string) *cobra.Command {
	root := &cobra.Command{
		Use:   "breakwater",
		Short: "A pull-through registry mirror that outlives its registries",
		Long: `Breakwater sits on a build host or cluster node, answers pulls from its own disk, and fetches what it
lacks from upstream registries behind circuit breakers: an upstream's outage touches only images that
nobody has ever pulled.`,
		Example: `  breakwater serve                                  # Docker Hub, quay.io, ghcr.io and more on 127.0.0.1:5000
  breakwater serve --config breakwater.yaml
  breakwater status                                 # what it holds, and which upstreams are out
  breakwater setup containerd --write               # points containerd at it; --undo restores what was there
  breakwater warm alpine quay.io/org/app:v1         # so that it holds them
  breakwater config example > breakwater.yaml       # a commented configuration to begin with`,
		Version:       version,
		Args:          noArguments,
		RunE:          func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
		SilenceUsage:  true,
		SilenceErrors: true,
	}
	root.SetFlagErrorFunc(func(_ *cobra.Command, err error) error { return usageError{err} })
	root.AddCommand(serveCommand(usual), setupCommand(usual), warmCommand(usual), rmCommand(usual), verifyCommand(usual), statusCommand(usual), sharedCommand(usual), configCommand(usual), manCommand(), versionCommand())
	return root
}

func versionCommand() *cobra.Command {
	return &cobra.Command{
		Use:     "version",
		Short:   "Print the version",
		Example: "  breakwater version",
		Args:    noArguments,
		RunE: func(cmd *cobra.Command, _ []string) error {
			_, err := fmt.Fprintf(cmd.OutOrStdout(), "breakwater %s (%s)\n", buildVersion(), runtime.Version())
			return err
		},
	}
}

// buildVersion is the release's, or which commit it is.
func buildVersion() string {
	if info, ok := debug.ReadBuildInfo(); ok && version == "devel" {
		for _, s := range info.Settings {
			if s.Key == "vcs.revision" {
				return version + " " + s.Value
			}
		}
	}
	return version
}

func noArguments(cmd *cobra.Command, args []string) error {
	if err := cobra.NoArgs(cmd, args); err != nil {
		return usageError{err}
	}
	return nil
}

func oneFile(cmd *cobra.Command, args []string) error {
	if err := cobra.MaximumNArgs(1)(cmd, args); err != nil {
		return usageError{err}
	}
	return nil
}
