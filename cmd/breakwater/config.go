package main

import (
	"fmt"
	"log/slog"
	"os"
	"slices"

	"breakwater/pkg/config"
	"breakwater/proxy"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
)

func configCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "config",
		Short: "Check, show and describe the configuration",
		Example: `  breakwater config check breakwater.yaml
  breakwater config show breakwater.yaml`,
		Args: noArguments,
		RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	cmd.AddCommand(&cobra.Command{
		Use:     "check [FILE]",
		Short:   "Say what is wrong with a configuration, all of it, with file and line",
		Example: "  breakwater config check breakwater.yaml",
		Args:    oneFile,
		RunE: func(cmd *cobra.Command, args []string) error {
			cfg, err := config.Load(fileOf(args), os.Environ(), nil)
			if err == nil {
				_, err = openCertificate(cfg, slog.New(slog.DiscardHandler))
			}
			if err == nil {
				err = proxy.CheckAccess(cfg)
			}
			if err != nil {
				return err
			}
			_, err = fmt.Fprintln(cmd.OutOrStdout(), "the configuration is good")
			return err
		},
	}, &cobra.Command{
		Use:     "show [FILE]",
		Short:   "Print the configuration in force: file and environment over defaults, no secrets",
		Example: "  BREAKWATER_LISTEN=127.0.0.1:6000 breakwater config show breakwater.yaml",
		Args:    oneFile,
		RunE: func(cmd *cobra.Command, args []string) error {
			cfg, err := config.Load(fileOf(args), os.Environ(), nil)
			if err != nil {
				return err
			}
			text, err := cfg.Show()
			if err != nil {
				return err
			}
			_, err = cmd.OutOrStdout().Write(text)
			return err
		},
	}, printCommand("schema", "Print the JSON Schema of the configuration, for editors", config.Schema),
		printCommand("example", "Print a commented configuration to begin with", config.Example))
	return cmd
}

// configurable adds the flags that every command needs which deals with a mirror or its store. load is to
// be called when the command runs.
func configurable(cmd *cobra.Command) (load func() (*config.Config, error)) {
	dataFlag(cmd)
	cmd.Flags().String("control", "", "`PATH` of the control socket (default control.sock in the data folder)")
	return configFlag(cmd)
}

func dataFlag(cmd *cobra.Command) {
	cmd.Flags().String("data", "", "`FOLDER` of the store (default $STATE_DIRECTORY, which systemd and the image set, else /var/lib/breakwater for root, and one in the user's cache for others)")
}

// overrides are the flags that override the configuration.
var overrides = []string{"listen", "admin", "control", "data", "capacity", "log-format", "log-level"}

// configFlag adds the flag that names a configuration, which the command's other flags may override.
func configFlag(cmd *cobra.Command) (load func() (*config.Config, error)) {
	file := cmd.Flags().String("config", "", "configuration `FILE` (default: none, which is a good configuration)")
	return func() (*config.Config, error) {
		flags := map[string]string{}
		cmd.Flags().Visit(func(f *pflag.Flag) {
			if slices.Contains(overrides, f.Name) {
				flags[f.Name] = f.Value.String()
			}
		})
		return config.Load(*file, os.Environ(), flags)
	}
}

func printCommand(use, short string, text func() []byte) *cobra.Command {
	return &cobra.Command{
		Use:     use,
		Short:   short,
		Example: "  breakwater config " + use,
		Args:    noArguments,
		RunE: func(cmd *cobra.Command, _ []string) error {
			_, err := cmd.OutOrStdout().Write(text())
			return err
		},
	}
}

func fileOf(args []string) string {
	if len(args) == 0 {
		return ""
	}
	return args[0]
}
