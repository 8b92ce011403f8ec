package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"os"
	"strings"
	"syscall"
	"time"
	"unicode"

	"breakwater/pkg/config"
	"breakwater/proxy"
	"breakwater/storage"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
)

// What --output may be.
const (
	outputText = "text"
	outputJSON = "json"
)

// format is the value of --output.
type format string

// Set is for pflag.Value.
func (f *format) Set(s string) error {
	if s != outputText && s != outputJSON {
		return fmt.Errorf("write %s or %s", outputText, outputJSON)
	}
	*f = format(s)
	return nil
}

func (f *format) String() string { return string(*f) }

// Type is for pflag.Value.
func (*format) Type() string { return "string" }

func outputFlag(flags *pflag.FlagSet) *format {
	f := format(outputText)
	flags.Var(&f, "output", "`FORMAT` of what is printed: text or json")
	return &f
}

// errNoMirror is that nobody listens at the control socket.
var errNoMirror = errors.New("no mirror runs")

// remote is the mirror behind a control socket.
type remote struct {
	path   string
	client *http.Client
}

func dialControl(path string) *remote {
	dial := func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", path)
	}
	return &remote{path, &http.Client{Transport: &http.Transport{DialContext: dial, DisableKeepAlives: true}}}
}

// ask returns the body of an answer that is good. Whoever calls it closes that.
func (r *remote) ask(ctx context.Context, method, path string) (io.ReadCloser, error) {
	req, err := http.NewRequestWithContext(ctx, method, "http://control"+path, nil)
	if err != nil {
		return nil, err
	}
	resp, err := r.client.Do(req)
	switch {
	case err == nil && resp.StatusCode == http.StatusOK:
		return resp.Body, nil
	case err == nil:
		defer resp.Body.Close()
		said := proxy.ControlError{Error: "the mirror answered " + resp.Status}
		_ = json.NewDecoder(io.LimitReader(resp.Body, 64<<10)).Decode(&said)
		err = errors.New(plain(said.Error))
		if resp.StatusCode == http.StatusBadRequest {
			err = usageError{err}
		}
		return nil, err
	case nobodyListens(err):
		return nil, fmt.Errorf("%w: nobody listens at %s", errNoMirror, r.path)
	case errors.Is(err, fs.ErrPermission):
		return nil, fmt.Errorf("control socket %s: permission denied: run this as root, as the mirror's user, or as a member of the socket's group", r.path)
	}
	return nil, fmt.Errorf("control socket %s: no answer (%w); the mirror gives one to root, to its own user, and to members of the socket's group", r.path, errors.Unwrap(err))
}

// decode reads an answer that is one JSON value.
func decode[T any](body io.ReadCloser) (v T, err error) {
	defer body.Close()
	return v, json.NewDecoder(body).Decode(&v)
}

// openStore opens the store of a mirror that does not run, and returns when it knows all that is in it.
func openStore(ctx context.Context, cfg *config.Config) (*storage.Disk, error) {
	info, err := os.Stat(cfg.Data)
	if err != nil {
		return nil, fmt.Errorf("no store: %w", err) // opening would make one
	}
	if stat, ok := info.Sys().(*syscall.Stat_t); ok && int(stat.Uid) != os.Geteuid() {
		return nil, fmt.Errorf("the store %s is of user %d, who could not read what user %d writes there: run this as that user", cfg.Data, stat.Uid, os.Geteuid())
	}
	store, err := storage.Open(storage.Config{Dir: cfg.Data})
	if err != nil {
		return nil, err
	}
	ticker := time.NewTicker(10 * time.Millisecond)
	defer ticker.Stop()
	for !store.Usage().Built {
		select {
		case <-ticker.C:
		case <-ctx.Done():
			return nil, errors.Join(ctx.Err(), store.Close())
		}
	}
	return store, nil
}

// printJSON is what --output json prints.
func printJSON(w io.Writer, v any) error {
	e := json.NewEncoder(w)
	e.SetIndent("", "  ")
	return e.Encode(v)
}

// plain is text that came from elsewhere, with nothing in it that a terminal obeys.
func plain(s string) string {
	return strings.Map(func(r rune) rune {
		if unicode.IsPrint(r) {
			return r
		}
		return unicode.ReplacementChar
	}, s)
}

func someImages(cmd *cobra.Command, args []string) error {
	if err := cobra.MinimumNArgs(1)(cmd, args); err != nil {
		return usageError{errors.New("which image? write it as quay.io/org/app:tag, or see --help")}
	}
	return nil
}
