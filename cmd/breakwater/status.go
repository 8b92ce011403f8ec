package main

import (
	"errors"
	"fmt"
	"io"
	"net/http"
	"slices"
	"text/tabwriter"
	"time"

	"breakwater/proxy"

	"github.com/spf13/cobra"
)

func statusCommand(usual string) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "status",
		Short: "Say what the mirror that runs holds, and which upstreams are out",
		Example: `  breakwater status
  breakwater status --control /run/breakwater/control.sock
  breakwater status --output json`,
		Args: noArguments,
	}
	load, output := configurable(cmd, usual).load, outputFlag(cmd.Flags())
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		cfg, err := load()
		if err != nil {
			return err
		}
		body, err := dialControl(cfg.Control).ask(cmd.Context(), http.MethodGet, "/v1/status")
		if errors.Is(err, errNoMirror) {
			return fmt.Errorf("%w: start it with breakwater serve", err)
		}
		if err != nil {
			return err
		}
		s, err := decode[proxy.Status](body)
		if err != nil {
			return err
		}
		if *output == outputJSON {
			return printJSON(cmd.OutOrStdout(), s)
		}
		return printStatus(cmd.OutOrStdout(), s)
	}
	return cmd
}

func printStatus(out io.Writer, s proxy.Status) error {
	w := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	line := func(key, format string, args ...any) { fmt.Fprintf(w, key+"\t"+format+"\n", args...) }
	line("mirror", "%s, process %d, up %s", plain(s.Version), s.Process, ago(s.Started))
	line("data", "%s", plain(s.Data))
	if s.Store.Built {
		line("images", "%d, %d of them complete; %d evicted since the start", s.Store.Images, s.Store.Complete, s.Store.Evicted)
	} else {
		line("images", "still being counted after the start")
	}
	capacity := "no bound"
	if s.Store.Capacity > 0 {
		capacity = size(s.Store.Capacity)
	}
	line("space", "%s of %s, %s reserved for downloads", size(s.Store.Bytes), capacity, size(s.Store.Reserved))
	if s.Shared != nil {
		line("shared store", "%s, %d tags and manifests to be published", gates(*s.Shared), s.Shared.Unpublished)
	}
	fmt.Fprintln(w)
	if err := w.Flush(); err != nil {
		return err
	}
	fmt.Fprintln(w, "REGISTRY\tUPSTREAM\tSTATE\tGOOD\tFAILED")
	for rest := s.Upstreams; len(rest) > 0; {
		first := rest[0]
		n := slices.IndexFunc(rest, func(u proxy.UpstreamStatus) bool { return u.Registry != first.Registry || u.Upstream != first.Upstream })
		if n < 0 {
			n = len(rest)
		}
		printUpstream(w, rest[:n])
		rest = rest[n:]
	}
	return w.Flush()
}

// gates is how the shared store does.
func gates(s proxy.SharedStatus) string {
	text := "up"
	for access, gate := range map[string]proxy.GateStatus{"not written to": s.Writes, "out": s.Reads} {
		if gate.State != "up" && (text == "up" || access == "out") {
			text = access + " since " + gate.Since.UTC().Format(time.RFC3339) + ": " + plain(gate.Reason)
		}
	}
	if s.Clock != "" {
		text += ", nothing published since this host's clock is " + plain(s.Clock)
	}
	return text
}

// printUpstream writes one line for an upstream that is well, else one for each class of its requests.
func printUpstream(w io.Writer, classes []proxy.UpstreamStatus) {
	row := func(u proxy.UpstreamStatus, state string) {
		fmt.Fprintf(w, "%s\t%s\t%s\t%d\t%d\n", u.Registry, u.Upstream, state, u.Succeeded, u.Failed)
	}
	if !slices.ContainsFunc(classes, func(u proxy.UpstreamStatus) bool { return state(u) != "closed" }) {
		all := classes[0]
		for _, u := range classes[1:] {
			all.Succeeded += u.Succeeded
			all.Failed += u.Failed
		}
		row(all, "closed")
		return
	}
	for _, u := range classes {
		row(u, u.Class+" "+state(u))
	}
}

// state is how the breaker stands, and what is the matter.
func state(u proxy.UpstreamStatus) string {
	switch {
	case u.State != "closed":
		return u.State + " since " + u.Since.UTC().Format(time.RFC3339) + ": " + plain(u.Reason)
	case !u.HeldUntil.IsZero():
		return "not asked until " + u.HeldUntil.UTC().Format(time.RFC3339) + ": it answered 429"
	}
	return u.State
}

func ago(t time.Time) time.Duration { return time.Since(t).Round(time.Second) }
