package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"strings"
	"time"

	"breakwater/pkg/config"
	"breakwater/proxy"
	"breakwater/storage"

	"github.com/spf13/cobra"
	"github.com/vbauerster/mpb/v8"
	"github.com/vbauerster/mpb/v8/decor"
	"golang.org/x/sys/unix"
)

// sayEvery is how often a long command says how far it is where there is no terminal.
const sayEvery = 10 * time.Second

func verifyCommand(usual string) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "verify",
		Short: "Hash all that is stored, and take what is wrong out of service",
		Long: `Read all that is stored and compare it with its digests: through the mirror that runs, else directly.
What is wrong goes to the folder quarantine in the data folder, and is fetched again at the next pull that
needs it. Exit code 1 if anything was wrong or could not be read.`,
		Example: `  breakwater verify
  breakwater verify --config breakwater.yaml
  breakwater verify --output json`,
		Args: noArguments,
	}
	load, output := configurable(cmd, usual).load, outputFlag(cmd.Flags())
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		cfg, err := load()
		if err != nil {
			return err
		}
		begun := time.Now()
		say := progressOn(cmd.ErrOrStderr(), *output)
		report, err := verify(cmd.Context(), cfg, say.show)
		say.done()
		if err != nil {
			return err
		}
		if *output == outputJSON {
			err = printJSON(cmd.OutOrStdout(), struct {
				storage.Report
				Seconds float64 `json:"seconds"`
			}{report, time.Since(begun).Seconds()})
		} else {
			printReport(cmd.OutOrStdout(), report, time.Since(begun))
		}
		if n := len(report.Wrong) + len(report.Unreadable); err == nil && n > 0 {
			err = fmt.Errorf("%d of %d files were wrong or unreadable", n, report.Files)
		}
		return err
	}
	return cmd
}

// verify lets the mirror do it that runs, since the store is its own, or does it.
func verify(ctx context.Context, cfg *config.Config, progress func(storage.Progress)) (storage.Report, error) {
	body, err := dialControl(cfg.Control).ask(ctx, http.MethodPost, "/v1/verify")
	if err == nil {
		defer body.Close()
		return readReport(body, progress)
	}
	if !errors.Is(err, errNoMirror) {
		return storage.Report{}, err
	}
	store, err := openStore(ctx, cfg)
	if err != nil {
		return storage.Report{}, err
	}
	report, err := store.Verify(ctx, progress)
	return report, errors.Join(err, store.Close())
}

// readReport follows the mirror's answer to its end.
func readReport(body io.Reader, progress func(storage.Progress)) (storage.Report, error) {
	for lines := json.NewDecoder(body); ; {
		var line proxy.VerifyLine
		if err := lines.Decode(&line); err != nil {
			return storage.Report{}, errors.New("the mirror has stopped before all was verified")
		}
		switch {
		case line.Report != nil:
			return *line.Report, nil
		case line.Error != "":
			return storage.Report{}, errors.New(plain(line.Error))
		case line.Progress != nil:
			progress(*line.Progress)
		}
	}
}

func printReport(w io.Writer, r storage.Report, took time.Duration) {
	for _, list := range []struct {
		found []storage.Wrong
		what  string
	}{{r.Wrong, "quarantined"}, {r.Unreadable, "cannot be read"}} {
		for _, wrong := range list.found {
			fmt.Fprintf(w, "%s %s: %s\n", wrong.Digest, list.what, plain(wrong.Reason))
			if len(wrong.Images) > 0 {
				fmt.Fprintf(w, "  needed by %s\n", plain(strings.Join(wrong.Images, ", ")))
			}
		}
	}
	fmt.Fprintf(w, "files: %d, %s, in %s: ", r.Files, size(r.Bytes), took.Round(time.Millisecond))
	switch {
	case len(r.Wrong)+len(r.Unreadable) == 0:
		fmt.Fprintln(w, "all is as it should be")
	case len(r.Unreadable) == 0:
		fmt.Fprintf(w, "%d wrong; the next pull that needs them fetches them again\n", len(r.Wrong))
	default:
		fmt.Fprintf(w, "%d wrong, which the next pull that needs them fetches again; %d unreadable, which is for you to look at\n", len(r.Wrong), len(r.Unreadable))
	}
}

// shown is where a long command's progress is shown.
type shown struct {
	show func(storage.Progress)
	done func()
}

// progressOn is a bar on a terminal, a line now and then elsewhere, and nothing where a program reads.
func progressOn(w io.Writer, output format) shown {
	if output == outputJSON {
		return shown{func(storage.Progress) {}, func() {}}
	}
	if file, ok := terminal(w); ok {
		return bar(file, "verifying")
	}
	said := time.Now()
	return shown{func(p storage.Progress) {
		if time.Since(said) >= sayEvery {
			said = time.Now()
			fmt.Fprintf(w, "%d of %d files, %s of %s\n", p.Files, p.AllFiles, size(p.Bytes), size(p.AllBytes))
		}
	}, func() {}}
}

func terminal(w io.Writer) (file *os.File, ok bool) {
	if file, ok = w.(*os.File); ok {
		_, err := unix.IoctlGetWinsize(int(file.Fd()), unix.TIOCGWINSZ)
		ok = err == nil
	}
	return file, ok
}

func bar(w io.Writer, what string) shown {
	all := mpb.New(mpb.WithOutput(w), mpb.WithAutoRefresh(), mpb.WithWidth(80))
	b := all.AddBar(0, mpb.BarRemoveOnComplete(),
		mpb.PrependDecorators(decor.Name(what), decor.CountersKibiByte(" % .1f of % .1f")),
		mpb.AppendDecorators(decor.Percentage(), decor.Name(" "), decor.AverageETA(decor.ET_STYLE_GO)))
	return shown{func(p storage.Progress) {
		b.SetTotal(p.AllBytes, false)
		b.SetCurrent(p.Bytes)
	}, func() {
		b.SetTotal(-1, true)
		all.Wait()
	}}
}
