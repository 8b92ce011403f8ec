package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net/http"
	"net/url"
	"strconv"

	"breakwater/pkg/config"
	"breakwater/proxy"
	"breakwater/storage"

	"github.com/spf13/cobra"
	"github.com/vbauerster/mpb/v8/decor"
)

func rmCommand(usual string) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "rm IMAGE…",
		Short: "Delete images from the store",
		Long: `Delete images from the store, through the mirror that runs. An image is written as in a pull. A tag goes
with the image that it names, unless another tag names that too; an image by its digest goes with all of
its tags. Blobs go when no other image needs them. Who is downloading one of them gets all of it.

The next pull fetches the image again: this frees space, and takes back what was pulled by mistake.`,
		Example: `  breakwater rm quay.io/org/app:v1
  breakwater rm alpine:3 docker.io/library/busybox
  breakwater rm quay.io/org/app@sha256:2c26b46b68ffc68ff99b453c1d30413413422d706483bfa0f98a5e886266e7ae
  breakwater rm --config breakwater.yaml --output json alpine:3
  breakwater rm --offline alpine:3                  # without a mirror that runs`,
		Args: someImages,
	}
	load, output := configurable(cmd, usual).load, outputFlag(cmd.Flags())
	offline := cmd.Flags().Bool("offline", false, "open the store itself: no mirror runs on it")
	cmd.RunE = func(cmd *cobra.Command, images []string) error {
		cfg, err := load()
		if err != nil {
			return err
		}
		remove := removeThrough(dialControl(cfg.Control))
		if *offline {
			store, err := openStore(cmd.Context(), cfg)
			if err != nil {
				return err
			}
			defer func() { _ = store.Close() }()
			remove = removeFrom(store, cfg)
		}
		return removeAll(cmd, *output, images, remove)
	}
	return cmd
}

// remover deletes one image.
type remover func(ctx context.Context, image string) (proxy.Removed, error)

func removeThrough(mirror *remote) remover {
	return func(ctx context.Context, image string) (proxy.Removed, error) {
		body, err := mirror.ask(ctx, http.MethodDelete, "/v1/images/"+url.PathEscape(image))
		if errors.Is(err, errNoMirror) {
			return proxy.Removed{}, fmt.Errorf("%w: start it with breakwater serve, or use --offline", err)
		}
		if err != nil {
			return proxy.Removed{}, err
		}
		return decode[proxy.Removed](body)
	}
}

func removeFrom(store *storage.Disk, cfg *config.Config) remover {
	return func(_ context.Context, image string) (proxy.Removed, error) {
		ref, err := cfg.Image(image)
		if err != nil {
			return proxy.Removed{}, usageError{err}
		}
		freed, err := store.Remove(ref)
		if errors.Is(err, fs.ErrNotExist) {
			err = fmt.Errorf("%s is not stored", ref)
		}
		return proxy.Removed{Image: ref.String(), Freed: freed}, err
	}
}

// removal is how one image of a command fared.
type removal struct {
	proxy.Removed
	Error string `json:"error,omitempty"`
}

// removeAll goes on past an image that cannot be deleted, unless there is no mirror to ask.
func removeAll(cmd *cobra.Command, output format, images []string, remove remover) error {
	var failed []error
	var all []removal
	for _, image := range images {
		removed, err := remove(cmd.Context(), image)
		if errors.Is(err, errNoMirror) {
			return err
		}
		r := removal{Removed: removed}
		if err != nil {
			r.Image, r.Error = image, err.Error()
			failed = append(failed, err)
		} else if output == outputText {
			fmt.Fprintln(cmd.OutOrStdout(), "removed "+removed.Image+": "+freed(removed.Freed))
		}
		all = append(all, r)
	}
	err := errors.Join(failed...)
	if output == outputJSON {
		return errors.Join(printJSON(cmd.OutOrStdout(), all), err)
	}
	return err
}

func freed(bytes int64) string {
	if bytes == 0 {
		return "nothing freed, other tags name the same image"
	}
	return size(bytes) + " freed"
}

// size is bytes for people.
func size(bytes int64) string {
	if bytes < 1<<10 {
		return strconv.FormatInt(bytes, 10) + " B"
	}
	return fmt.Sprintf("% .1f", decor.SizeB1024(bytes))
}
