package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os/signal"
	"regexp"
	"runtime"
	"strings"
	"syscall"
	"time"

	"breakwater/pkg/config"
	"breakwater/pkg/oci"
	"breakwater/pkg/warm"
	"breakwater/storage"

	"github.com/spf13/cobra"
)

func warmCommand(usual string) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "warm IMAGE…",
		Short: "Pull images through the mirror, so that it holds them",
		Long: `Pull images through the mirror that runs, as a client does, and keep nothing of them: afterwards the mirror
holds them, and they can be pulled through it whatever becomes of their registry. An image is written as in a
pull, and of one with several platforms the host's is pulled, or those that are named. Every byte is read and
verified. What clients do not ask for, such as signatures, the mirror completes by itself a little later.

It says how each image was answered: from the store, fetched, or STALE, if its registry did not confirm it.
With --stored it fails if anything had to be fetched: proof that the mirror has what was pulled through it.

It needs the registry port only. An account for a mirror that asks for one is taken from docker's config.json
(docker login). Exit code 1 if an image cannot be pulled; the others are pulled all the same.`,
		Example: `  breakwater warm alpine quay.io/org/app:v1
  breakwater warm --platform linux/amd64 --platform linux/arm64 quay.io/org/app:v1
  breakwater warm --mirror https://mirror.internal:5000 quay.io/org/app@sha256:2c26b46b68ffc68ff99b453c1d30413413422d706483bfa0f98a5e886266e7ae
  breakwater warm --stored quay.io/org/app:v1     # fails if that was not stored yet`,
		Args: someImages,
	}
	load, output := configFlag(cmd, usual).load, outputFlag(cmd.Flags())
	mirror := cmd.Flags().String("mirror", "", "`URL` of the mirror (default: as the configuration's listen and tls say)")
	platforms := cmd.Flags().StringSlice("platform", []string{"linux/" + runtime.GOARCH}, "`PLATFORM` to pull of an image that has several")
	stored := cmd.Flags().Bool("stored", false, "fail if anything had to be fetched")
	cmd.RunE = func(cmd *cobra.Command, images []string) error {
		cfg, err := load()
		if err != nil {
			return err
		}
		refs, err := warmable(cfg, images, *platforms)
		if err != nil {
			return err
		}
		at, err := mirrorURL(*mirror, cfg)
		if err != nil {
			return err
		}
		through, err := warm.New(at, *platforms)
		if err != nil {
			return usageError{err}
		}
		defer through.Close()
		ctx, stop := signal.NotifyContext(cmd.Context(), syscall.SIGTERM, syscall.SIGINT)
		defer stop()
		pulled, err := warmAll(ctx, through, refs, func(ref oci.Reference) shown {
			return warmProgress(cmd.ErrOrStderr(), *output, ref.String())
		}, func(image *warm.Image) error {
			if *stored && image.Fetched != nil {
				return fmt.Errorf("%s: was not stored: %s", image.Name, strings.Join(image.Fetched, ", "))
			}
			if *output == outputText {
				printWarmed(cmd.OutOrStdout(), *image)
			}
			return nil
		})
		if *output == outputJSON {
			return errors.Join(printJSON(cmd.OutOrStdout(), pulled), err)
		}
		return err
	}
	return cmd
}

// warmAll goes on past an image that cannot be pulled, or that judge finds wanting, unless a signal ends it.
func warmAll(ctx context.Context, through *warm.Mirror, refs []oci.Reference, progress func(oci.Reference) shown, judge func(*warm.Image) error) ([]warm.Image, error) {
	pulled, failed := []warm.Image{}, []error(nil)
	for _, ref := range refs {
		shown := progress(ref)
		image, err := through.Pull(ctx, ref, func(read, all int64) { shown.show(storage.Progress{Bytes: read, AllBytes: all}) })
		shown.done()
		if ctx.Err() != nil {
			return pulled, errors.Join(append(failed, fmt.Errorf("%s: stopped by a signal", ref))...)
		}
		if err == nil {
			err = judge(&image)
		}
		if err != nil {
			image.Error = err.Error()
			failed = append(failed, errors.New(plain(err.Error())))
		}
		pulled = append(pulled, image)
	}
	return pulled, errors.Join(failed...)
}

// platformName is OS/ARCHITECTURE or OS/ARCHITECTURE/VARIANT.
var platformName = regexp.MustCompile(`^[a-z0-9]+/[a-z0-9_]+(/[a-z0-9.]+)?$`)

// warmable finds mistakes before anything is pulled.
func warmable(cfg *config.Config, images, platforms []string) (refs []oci.Reference, err error) {
	for _, image := range images {
		ref, err := cfg.Image(image)
		if err != nil {
			return nil, usageError{err}
		}
		refs = append(refs, ref)
	}
	for _, platform := range platforms {
		if !platformName.MatchString(platform) {
			return nil, usageError{fmt.Errorf("--platform %q: write it as linux/amd64 or linux/arm64/v8", platform)}
		}
	}
	return refs, nil
}

func printWarmed(out io.Writer, image warm.Image) {
	how := map[string]string{warm.Stored: "from the store", warm.Fetched: "fetched", warm.Stale: "STALE: " + plain(image.Warning)}[image.Answered]
	took := time.Duration(image.Seconds * float64(time.Second)).Round(time.Millisecond)
	fmt.Fprintf(out, "%s %s: %s in %s, %s\n", image.Name, image.Digest, size(image.Bytes), took, how)
}

// warmProgress is a bar on a terminal, and nothing elsewhere: there each image's line says it.
func warmProgress(w io.Writer, output format, image string) shown {
	if file, ok := terminal(w); ok && output == outputText {
		return bar(file, image)
	}
	return shown{func(storage.Progress) {}, func() {}}
}
