package main

import (
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"slices"

	"breakwater/pkg/config"
	"breakwater/proxy"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
)

// usualFile is a host's configuration, which packages bring.
const usualFile = "/etc/breakwater/breakwater.yaml"

// configCommand and the other commands read the file usual where nobody names one, if it is there.
func configCommand(usual string) *cobra.Command {
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
		Long:    "Say what is wrong with a configuration, all of it, with file and line. " + withoutFile(usual),
		Example: "  breakwater config check breakwater.yaml",
		Args:    oneFile,
		RunE: func(cmd *cobra.Command, args []string) error {
			file := fileOf(args, usual)
			cfg, err := config.Load(file, os.Environ(), nil)
			if err == nil {
				_, err = openCertificate(cfg, slog.New(slog.DiscardHandler))
			}
			if err == nil {
				err = proxy.CheckAccess(cfg)
			}
			if err != nil {
				return err
			}
			_, err = fmt.Fprintf(cmd.OutOrStdout(), "the configuration is good (%s)\n", orNone(file))
			return err
		},
	}, &cobra.Command{
		Use:     "show [FILE]",
		Short:   "Print the configuration in force: file and environment over defaults, no secrets",
		Long:    "Print the configuration in force: file and environment over defaults, no secrets. " + withoutFile(usual),
		Example: "  BREAKWATER_LISTEN=127.0.0.1:6000 breakwater config show breakwater.yaml",
		Args:    oneFile,
		RunE: func(cmd *cobra.Command, args []string) error {
			cfg, err := config.Load(fileOf(args, usual), os.Environ(), nil)
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

// configurable adds the flags that every command needs which deals with a mirror or its store.
func configurable(cmd *cobra.Command, usual string) *source {
	dataFlag(cmd)
	cmd.Flags().String("control", "", "`PATH` of the control socket (default control.sock in the data folder)")
	return configFlag(cmd, usual)
}

func dataFlag(cmd *cobra.Command) {
	cmd.Flags().String("data", "", "`FOLDER` of the store (default $STATE_DIRECTORY, which systemd and the image set, else /var/lib/breakwater for root, and one in the user's cache for others)")
}

// overrides are the flags that override the configuration.
var overrides = []string{"listen", "admin", "control", "data", "capacity", "log-format", "log-level"}

// source is where a command's configuration comes from.
type source struct {
	cmd  *cobra.Command
	file string // named by --config, or the usual one
	read string // the file that was read last; "" is none
}

// configFlag adds the flag that names a configuration, which the command's other flags may override.
func configFlag(cmd *cobra.Command, usual string) *source {
	s := &source{cmd: cmd}
	cmd.Flags().StringVar(&s.file, "config", usual, "configuration `FILE`, '' for none; the default one need not be there")
	return s
}

// load reads the configuration, again if it has before. The usual file is read if it is there, and has to
// stay there once it has been read: it does not vanish from a mirror that runs.
func (s *source) load() (*config.Config, error) {
	flags := map[string]string{}
	s.cmd.Flags().Visit(func(f *pflag.Flag) {
		if slices.Contains(overrides, f.Name) {
			flags[f.Name] = f.Value.String()
		}
	})
	file := s.file
	if !s.cmd.Flags().Changed("config") && s.read == "" {
		file = ifThere(file)
	}
	cfg, err := config.Load(file, os.Environ(), flags)
	if errors.Is(err, fs.ErrPermission) {
		return nil, fmt.Errorf("%w; run this as a user who may read it, or name another file with --config, and none with --config ''", err)
	}
	if err == nil {
		s.read = file
	}
	return cfg, err
}

// ifThere is the file, or "" if there is none.
func ifThere(file string) string {
	if _, err := os.Lstat(file); errors.Is(err, fs.ErrNotExist) {
		return ""
	}
	return file
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

func fileOf(args []string, usual string) string {
	if len(args) == 0 {
		return ifThere(usual)
	}
	return args[0]
}

// withoutFile says what a command of the configuration reads that is given no file.
func withoutFile(usual string) string {
	return "Without FILE it is " + usual + " if that is there, else no file, as with ''."
}

// orNone is what people are told of a file that may be none.
func orNone(file string) string {
	if file == "" {
		return "no file"
	}
	return file
}
