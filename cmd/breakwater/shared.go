package main

import (
	"errors"
	"fmt"
	"io"
	"log/slog"
	"time"

	"breakwater/pkg/config"
	"breakwater/storage/s3"

	"github.com/spf13/cobra"
)

// defaultGrace is how long what no tag names stays in the shared store.
const defaultGrace = 30 * 24 * time.Hour

func sharedCommand(usual string) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "shared",
		Short: "Look after the shared store of a fleet",
		Args:  noArguments,
		RunE:  func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	cmd.AddCommand(sharedGCCommand(usual))
	return cmd
}

func sharedGCCommand(usual string) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "gc",
		Short: "Remove from the shared store what no tag names any more",
		Long: `Remove from the shared store what no tag's record names, nor an image that was published within the grace
period, and that is older than that itself. Without --delete it only says what would go. Mirrors may run and
publish meanwhile. One host of the fleet is enough, once a week or so; it needs the configuration of a mirror.`,
		Example: `  breakwater shared gc                       # says what would go
  breakwater shared gc --delete
  breakwater shared gc --delete --grace 168h --output json`,
		Args: noArguments,
	}
	load, output := configurable(cmd, usual).load, outputFlag(cmd.Flags())
	remove := cmd.Flags().Bool("delete", false, "really remove it")
	grace := cmd.Flags().Duration("grace", defaultGrace, "how long what no tag names stays; at least 24h")
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		cfg, err := load()
		if err != nil {
			return err
		}
		if !cfg.Shared.Enabled() {
			return errors.New("the configuration has no shared store: set shared.s3.bucket")
		}
		bucket, err := openShared(cfg, slog.New(slog.DiscardHandler))
		if err != nil {
			return err
		}
		defer bucket.Close()
		options := s3.CollectOptions{Grace: *grace}
		if *remove {
			options.Delete = s3.Delete
		}
		if *output != outputJSON {
			options.Progress = func(c s3.Collected) {
				fmt.Fprintf(cmd.ErrOrStderr(), "%d objects looked at, %s\n", c.Objects, size(c.Bytes))
			}
		}
		found, err := bucket.Collect(cmd.Context(), options)
		if err != nil {
			return fmt.Errorf("shared store: %w", err)
		}
		if *output == outputJSON {
			return printJSON(cmd.OutOrStdout(), found)
		}
		return printCollected(cmd.OutOrStdout(), found, options.Delete)
	}
	return cmd
}

func printCollected(out io.Writer, c s3.Collected, d s3.Deletion) error {
	verb, hint := "would be removed", "; --delete removes it"
	if d == s3.Delete {
		verb, hint = "removed", ""
	}
	_, err := fmt.Fprintf(out, "%d objects, %s: %d of %s and %d unfinished uploads %s%s\n", c.Objects, size(c.Bytes), c.Removed, size(c.RemovedBytes), c.Uploads, verb, hint)
	if c.Unknown > 0 {
		_, err = fmt.Fprintf(out, "%d objects of names that no mirror gives were left alone\n", c.Unknown)
	}
	if c.Unsigned > 0 {
		_, err = fmt.Fprintf(out, "%d records that this host's keys do not verify: what they name was left alone too\n", c.Unsigned)
	}
	return err
}

// openShared is the configuration's shared store; nil if it has none. Nobody is asked anything yet.
func openShared(cfg *config.Config, logger *slog.Logger) (*s3.Bucket, error) {
	if !cfg.Shared.Enabled() {
		return nil, nil
	}
	keys, err := cfg.Shared.Keys()
	if err != nil {
		return nil, err
	}
	s := cfg.Shared.S3
	bucket, err := s3.New(s3.Config{Bucket: s.Bucket, Prefix: s.Prefix, Region: s.Region, Endpoint: s.Endpoint, PathStyle: s.PathStyle,
		Encryption: s.Encryption, KMSKey: s.KMSKey, Keys: keys, ReadOnly: cfg.Shared.ReadOnly, Logger: logger})
	if err != nil {
		return nil, fmt.Errorf("shared store: %w", err)
	}
	return bucket, nil
}
