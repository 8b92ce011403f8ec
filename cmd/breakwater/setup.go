package main

import (
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"net/url"
	"os"
	"os/signal"
	"strings"
	"syscall"

	"breakwater/pkg/clients"
	"breakwater/pkg/config"
	"breakwater/pkg/oci"

	"github.com/spf13/cobra"
)

func setupCommand(usual string) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "setup",
		Short: "Point clients at the mirror, and prepare its data folder",
		Args:  noArguments,
		RunE:  func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	cmd.AddCommand(setupContainerdCommand(usual), setupDataCommand(usual))
	return cmd
}

// containerdFlags are those of setup containerd.
type containerdFlags struct {
	mirror, dir, existing, authorization, config string
	ca, clientCert, clientKey                    string
	referrers, write, undo, hold, checks         bool
}

func setupContainerdCommand(usual string) *cobra.Command {
	var f containerdFlags
	cmd := &cobra.Command{
		Use:   "containerd",
		Short: "Point containerd at the mirror, or show what that would change",
		Long: `Write DIR/REGISTRY/hosts.toml for each registry of the mirror's configuration, with the mirror first and the
registry itself behind it; with any_registry also DIR/_default/hosts.toml. Kubernetes, k3s, nerdctl and
Docker 28 or later (--certs-d /etc/docker/certs.d) read the same files; none of them needs a restart.

It shows what would change. --write does it, --undo restores byte for byte what was there before, and --hold
does both: it writes, waits for SIGTERM or SIGINT, and undoes; meanwhile, each 30 s, it writes again what vanishes,
and takes over what --authorization, --ca, --client-cert and --client-key say by then. What --write has written it
leaves. One process holds a folder; a second one waits 10 s for it, and then fails.

--check changes nothing, and ends with 0 if all files are as they should be for these flags, else with 1 and a list
of them. Beside a --hold that runs it asks the same of the held ones: for a probe.

--ca names the authority of the mirror's certificate where the host does not trust it: its certificates are
written beside each hosts.toml, which names them for the mirror alone. --client-cert and --client-key are shown
to a mirror that knows its clients by certificates.

A file that is not breakwater's is never lost. By --existing it makes the command fail before anything
is written (refuse), it is kept beside the new one until --undo (replace), or it stays and only the others are
written (keep). What is not a file, such as a symbolic link, is never touched.

--referrers names the mirror for referrers too, which containerd 2.2 and Docker 29.1 or later ask for and then
find in an outage. Older ones do not know the word and ignore a file that has it, without a word to the user.

Warnings say what in containerd's own configuration would have it ignore these files.`,
		Example: `  breakwater setup containerd                       # shows what would be written
  breakwater setup containerd --write
  breakwater setup containerd --undo
  breakwater setup containerd --write --referrers --existing replace
  breakwater setup containerd --write --mirror https://mirror.internal:5000 --ca mirror-ca.crt --authorization authorization
  breakwater setup containerd --check || echo "containerd is not pointed at the mirror"
  breakwater setup containerd --hold --certs-d /var/lib/rancher/k3s/agent/etc/containerd/certs.d`,
		Args: noArguments,
	}
	load, output := configFlag(cmd, usual).load, outputFlag(cmd.Flags())
	flags := cmd.Flags()
	flags.StringVar(&f.mirror, "mirror", "", "`URL` of the mirror (default: as the configuration's listen and tls say)")
	flags.StringVar(&f.dir, "certs-d", "/etc/containerd/certs.d", "`DIR` of the registries' folders: containerd's config_path")
	flags.StringVar(&f.existing, "existing", string(clients.ExistingRefuse), "`WHAT` happens to a file that is not breakwater's: refuse, replace or keep")
	flags.BoolVar(&f.referrers, "referrers", false, "name the mirror for referrers too: containerd 2.2 or later only")
	flags.StringVar(&f.authorization, "authorization", "", "`FILE` with the value of the header Authorization that the mirror wants")
	flags.StringVar(&f.ca, "ca", "", "`FILE` with the certificates of the mirror's authority in PEM, for containerd to trust")
	flags.StringVar(&f.clientCert, "client-cert", "", "`FILE` with the certificate that the mirror is shown, in PEM")
	flags.StringVar(&f.clientKey, "client-key", "", "`FILE` with its key, in PEM")
	flags.StringVar(&f.config, "containerd-config", "/etc/containerd/config.toml", "containerd's configuration `FILE`, for warnings")
	flags.BoolVar(&f.write, "write", false, "do it")
	flags.BoolVar(&f.undo, "undo", false, "restore what was there before")
	flags.BoolVar(&f.hold, "hold", false, "do it, wait for SIGTERM or SIGINT, and undo it")
	flags.BoolVar(&f.checks, "check", false, "only say whether all is as it should be: exit code 0 or 1")
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		if err := f.check(); err != nil {
			return err
		}
		if f.undo {
			done, err := clients.Undo(f.dir)
			return errors.Join(err, printChanges(cmd.OutOrStdout(), *output, done, "nothing to undo in "+f.dir))
		}
		cfg, err := load()
		if err != nil {
			return err
		}
		c, err := f.containerd(cfg)
		if err != nil {
			return err
		}
		for _, warning := range c.Warnings(f.config) {
			fmt.Fprintln(cmd.ErrOrStderr(), "breakwater: warning:", plain(warning))
		}
		switch {
		case f.hold:
			ctx, stop := signal.NotifyContext(cmd.Context(), syscall.SIGTERM, syscall.SIGINT)
			defer stop()
			return clients.Hold(ctx, func() (clients.Containerd, error) { return f.containerd(cfg) }, newLogger(cfg.Log, cmd.ErrOrStderr()))
		case f.checks:
			todo, err := c.Check()
			if err != nil {
				return err
			}
			return printCheck(cmd.OutOrStdout(), *output, todo)
		case f.write:
			done, err := c.Write()
			return errors.Join(err, printChanges(cmd.OutOrStdout(), *output, done, "nothing is written"))
		}
		todo, err := c.Plan()
		if err != nil {
			return err
		}
		return printPlan(cmd.OutOrStdout(), *output, todo)
	}
	return cmd
}

func (f containerdFlags) check() error {
	n := 0
	for _, set := range []bool{f.write, f.undo, f.hold, f.checks} {
		if set {
			n++
		}
	}
	if n > 1 {
		return usageError{errors.New("--write, --undo, --hold and --check exclude each other")}
	}
	if (f.clientCert == "") != (f.clientKey == "") {
		return usageError{errors.New("--client-cert and --client-key belong together")}
	}
	switch clients.Existing(f.existing) {
	case clients.ExistingRefuse, clients.ExistingReplace, clients.ExistingKeep:
		return nil
	}
	return usageError{fmt.Errorf("--existing %q: write refuse, replace or keep", f.existing)}
}

// containerd is what containerd is to be told.
func (f containerdFlags) containerd(cfg *config.Config) (clients.Containerd, error) {
	mirror, err := mirrorURL(f.mirror, cfg)
	if err != nil {
		return clients.Containerd{}, err
	}
	c := clients.Containerd{Dir: f.dir, Mirror: mirror, Registries: map[string]string{}, Others: clients.Others(cfg.AnyRegistry),
		Referrers: clients.Referrers(f.referrers), Existing: clients.Existing(f.existing)}
	for name, registry := range cfg.Registries {
		c.Registries[name] = ownServer(name, registry)
	}
	var certificate, key string
	for _, from := range []struct {
		what, file string
		to         *string
	}{{"authorization", f.authorization, &c.Authorization}, {"ca", f.ca, &c.CA}, {"client-cert", f.clientCert, &certificate}, {"client-key", f.clientKey, &key}} {
		if from.file == "" {
			continue
		}
		raw, err := os.ReadFile(from.file)
		if err != nil {
			return clients.Containerd{}, fmt.Errorf("%s: %w", from.what, err)
		}
		if *from.to = string(raw); strings.TrimSpace(*from.to) == "" {
			return clients.Containerd{}, fmt.Errorf("%s: %s is empty", from.what, from.file)
		}
	}
	c.Authorization = strings.TrimSpace(c.Authorization)
	if f.clientCert != "" {
		c.Client = certificate + "\n" + key // the first may have no end of a line
	}
	return c, nil
}

// mirrorURL is where clients on this host reach the mirror, if nobody says where.
func mirrorURL(said string, cfg *config.Config) (string, error) {
	if said != "" {
		return strings.TrimSuffix(said, "/"), nil
	}
	host, port, err := net.SplitHostPort(cfg.Listen)
	if err != nil {
		return "", err // the configuration is checked
	}
	if port == "0" {
		return "", usageError{errors.New("which port? listen leaves that open; use --mirror")}
	}
	if address, err := netip.ParseAddr(host); host == "" || err == nil && address.IsUnspecified() {
		host = "127.0.0.1"
	}
	scheme := "http"
	if cfg.TLS.CertFile != "" {
		scheme = "https"
	}
	return scheme + "://" + net.JoinHostPort(host, port), nil
}

// ownServer is where a client finds a registry by its name, without any mirror. An upstream that has the
// registry's name says by which scheme.
func ownServer(name string, registry config.Registry) string {
	host := name
	if name == oci.DockerHub {
		host = "registry-1.docker.io"
	}
	for _, up := range registry.Upstreams {
		if u, err := url.Parse(up.URL); err == nil && u.Host == host {
			return up.URL
		}
	}
	return "https://" + host
}

// verbs are what is said of a change that is made, and of one that would be.
var verbs = map[clients.Act][2]string{
	clients.Write:   {"wrote", "would write"},
	clients.Update:  {"updated", "would update"},
	clients.Replace: {"replaced", "would replace, keeping what is there with .before-breakwater behind its name,"},
	clients.Remove:  {"removed", "would remove"},
	clients.Restore: {"restored", "would restore what was there before:"},
	clients.Keep:    {"left alone", "would leave alone"},
	clients.Refuse:  {"refused", "would refuse to write anything:"},
}

// printChanges says what is done.
func printChanges(out io.Writer, output format, done []clients.Change, none string) error {
	if output == outputJSON {
		return printJSON(out, append([]clients.Change{}, done...))
	}
	for _, change := range done {
		if change.Act == clients.Unchanged {
			none = "all is as it should be already"
		}
	}
	for _, change := range done {
		if change.Act != clients.Unchanged {
			none = ""
			sayChange(out, verbs[change.Act][0], change)
		}
	}
	if none != "" {
		fmt.Fprintln(out, none)
	}
	return nil
}

// printPlan says what would be done.
func printPlan(out io.Writer, output format, todo []clients.Change) error {
	if output == outputJSON {
		return printJSON(out, append([]clients.Change{}, todo...))
	}
	hint := "nothing would change"
	for _, change := range todo {
		if change.Act == clients.Unchanged {
			continue
		}
		hint = "--write does it, --undo restores what was there before"
		sayChange(out, verbs[change.Act][1], change)
		for line := range strings.Lines(change.Content) {
			fmt.Fprint(out, "    ", line)
		}
	}
	fmt.Fprintln(out, hint)
	return nil
}

// printCheck says what is not as it should be, which is an error.
func printCheck(out io.Writer, output format, todo []clients.Change) error {
	unsettled := 0
	for _, change := range todo {
		if !change.Settled() {
			unsettled++
		}
		if output != outputJSON && change.Act != clients.Unchanged {
			sayChange(out, verbs[change.Act][1], change)
		}
	}
	var err error
	if unsettled > 0 {
		err = fmt.Errorf("%d of %d files of containerd's are not as they should be", unsettled, len(todo))
	}
	if output == outputJSON {
		return errors.Join(err, printJSON(out, append([]clients.Change{}, todo...)))
	}
	if err == nil {
		fmt.Fprintln(out, "all is as it should be")
	}
	return err
}

func sayChange(out io.Writer, verb string, change clients.Change) {
	fmt.Fprintf(out, "%s %s%s\n", verb, plain(change.Path), strings.TrimSuffix(": "+plain(change.Note), ": "))
}
