package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/signal"
	"path/filepath"
	"runtime/debug"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"breakwater/pkg/config"
	"breakwater/proxy"
	"breakwater/proxy/access"
	"breakwater/storage"

	"github.com/coreos/go-systemd/v22/daemon"
	"github.com/spf13/cobra"
)

const (
	// gcPercent lets garbage grow to three times what is live, which is some megabytes: a collection
	// each hundred requests costs more than it frees.
	gcPercent = 300
	// stopTimeout is how long downloads may go on after SIGTERM.
	stopTimeout = 30 * time.Second
)

func serveCommand(usual string) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "serve",
		Short: "Run the mirror",
		Long: `Run the mirror until SIGTERM or SIGINT, which let running downloads finish for 30 s. SIGHUP reads the
configuration and the certificate again; a mistake in them is logged and changes nothing.

Started by systemd it takes the sockets that a socket unit has opened (FileDescriptorName=listen or admin),
if they are where the configuration says, and tells when it is ready, reloads, stops, and that it still
answers (Type=notify, WatchdogSec=).`,
		Example: `  breakwater serve
  breakwater serve --config breakwater.yaml
  breakwater serve --config ''                      # the defaults, whatever this host has in /etc
  breakwater serve --listen 127.0.0.1:6000 --data /var/cache/breakwater`,
		Args: noArguments,
	}
	source := configurable(cmd, usual)
	cmd.RunE = func(cmd *cobra.Command, _ []string) error { return serve(cmd.Context(), source, cmd.ErrOrStderr()) }
	cmd.Flags().String("listen", "", "`ADDRESS` of the registry API (default 127.0.0.1:5000)")
	cmd.Flags().String("admin", "", "`ADDRESS` of health and metrics (default 127.0.0.1:5001)")
	cmd.Flags().String("capacity", "", "`SIZE` of the store: 50GiB, 80%, auto")
	cmd.Flags().String("log-format", "", "text, json, or auto: text on a terminal")
	cmd.Flags().String("log-level", "", "debug, info, warn or error")
	return cmd
}

// serve runs the mirror until a signal ends it.
func serve(ctx context.Context, source *source, out io.Writer) error {
	cfg, err := source.load()
	if err != nil {
		return err
	}
	logger := newLogger(cfg.Log, out)
	logger.Info("starting", "version", buildVersion(), "config", orNone(source.read))
	certificate, err := openCertificate(cfg, logger)
	if err != nil {
		return err
	}
	signals := make(chan os.Signal, 1) // before anybody can think that it runs
	signal.Notify(signals, syscall.SIGTERM, syscall.SIGINT, syscall.SIGHUP)
	defer signal.Stop(signals)
	api, admin, err := listen(cfg) // first of all: clients may come while the rest opens
	if err != nil {
		return err
	}
	defer api.Close()
	defer admin.Close()
	capacity, err := capacityOf(cfg)
	if err != nil {
		return fmt.Errorf("capacity: %w", err)
	}
	if os.Getenv("GOGC") == "" {
		debug.SetGCPercent(gcPercent)
	}
	minFree, err := cfg.MinFree.Free(cfg.Data)
	if err != nil {
		return fmt.Errorf("min_free: %w", err)
	}
	store, err := storage.Open(storage.Config{Dir: cfg.Data, Capacity: capacity, MinFree: minFree, Scrub: int64(cfg.Scrub), Logger: logger})
	if err != nil {
		return fmt.Errorf("data folder: %w", err)
	}
	defer func() {
		if err := store.Close(); err != nil {
			logger.Error("store not closed cleanly", "err", err)
		}
	}()
	shared, err := openShared(cfg, logger)
	if err != nil {
		return err
	}
	if shared != nil {
		defer shared.Close()
	}
	mirror, err := proxy.New(proxy.Config{Config: cfg, Store: store, Shared: shared, Logger: logger})
	if err != nil {
		return err
	}
	servers := []*server{newControlServer(mirror, logger), newServer(mirror, logger), newServer(mirror.Admin(), logger)}
	if certificate != nil {
		servers[1].TLSConfig = certificate.TLS(mirror.ClientCAs)
	}
	failed := make(chan error, len(servers))
	servers[1].start(api, failed)
	servers[2].start(admin, failed)
	if control, err := listenControl(cfg.Control, logger); err != nil { // such as a full disk: pulls go on
		logger.Error("no control socket: commands cannot reach this mirror", "err", err)
	} else {
		servers[0].start(control, failed)
	}
	logger.Info("serving", "listen", api.Addr().String(), "admin", admin.Addr().String(), "control", cfg.Control, "data", cfg.Data, "capacity", capacity)
	running := &running{cfg, cfg, mirror, certificate, logger}
	systemd := manager{logger}
	systemd.tell(daemon.SdNotifyReady, "STATUS=serving at "+api.Addr().String())
	watched, unwatch := context.WithCancel(ctx)
	var watchdog sync.WaitGroup
	watchdog.Go(func() {
		systemd.watch(watched, map[string]string{api.Addr().String(): "/v2/", admin.Addr().String(): "/readyz"})
	})
	err = untilStopped(ctx, signals, failed, func() {
		systemd.reload(func() string { return running.reload(source.load) })
	})
	systemd.tell(daemon.SdNotifyStopping, "STATUS=stopping, downloads may go on for "+stopTimeout.String())
	unwatch()
	watchdog.Wait()
	stop(servers, mirror, logger)
	return err
}

// openCertificate is the registry API's; nil if it speaks plain HTTP.
func openCertificate(cfg *config.Config, logger *slog.Logger) (*access.Certificate, error) {
	if cfg.TLS.CertFile == "" {
		return nil, nil
	}
	return access.NewCertificate(cfg.TLS.CertFile, cfg.TLS.KeyFile, logger)
}

// capacityOf is the store's capacity in bytes. Automatic, it stays what it was at the first start: what
// is free later depends on what the store holds by then.
func capacityOf(cfg *config.Config) (int64, error) {
	if cfg.Capacity != (config.Size{}) {
		return cfg.Capacity.In(cfg.Data)
	}
	file := filepath.Join(cfg.Data, "CAPACITY")
	if raw, err := os.ReadFile(file); err == nil {
		if n, err := strconv.ParseInt(strings.TrimSpace(string(raw)), 10, 64); err == nil && n > 0 {
			return n, nil
		}
	}
	n, err := cfg.Capacity.In(cfg.Data)
	if err != nil {
		return 0, err
	}
	if err := os.MkdirAll(cfg.Data, 0o700); err != nil {
		return 0, err
	}
	return n, os.WriteFile(file, []byte(strconv.FormatInt(n, 10)+"\n"), 0o600)
}

// untilStopped returns nil on a signal to stop, or what a listener failed with.
func untilStopped(ctx context.Context, signals <-chan os.Signal, failed <-chan error, hangup func()) error {
	for {
		select {
		case s := <-signals:
			if s != syscall.SIGHUP {
				return nil
			}
			hangup()
		case err := <-failed:
			return fmt.Errorf("serve: %w", err)
		case <-ctx.Done():
			return nil
		}
	}
}

// stop stops accepting, and lets responses and the downloads behind them go on for stopTimeout.
func stop(servers []*server, mirror *proxy.Mirror, logger *slog.Logger) {
	logger.Info("stopping", "within", stopTimeout)
	ctx, cancel := context.WithTimeout(context.Background(), stopTimeout)
	defer cancel()
	for until, i := time.Now().Add(unusedTimeout), 0; i < len(servers); i++ {
		servers[i].settle(until)
	}
	for _, server := range servers {
		if err := server.Shutdown(ctx); errors.Is(err, context.DeadlineExceeded) {
			logger.Warn("downloads cut by the stop")
			_ = server.Close()
		}
	}
	mirror.Close(ctx)
	logger.Info("stopped")
}

// running is what a SIGHUP reaches.
type running struct {
	started     *config.Config
	inForce     *config.Config
	mirror      *proxy.Mirror
	certificate *access.Certificate // nil if there is none
	logger      *slog.Logger
}

// reload makes a changed configuration the one in force, as far as it can change while running, and
// returns what it has logged of that.
func (r *running) reload(load func() (*config.Config, error)) (status string) {
	if r.certificate != nil {
		if err := r.certificate.Reload(); err != nil {
			r.logger.Error("certificate not reloaded; the old one stays in force", "err", err)
		}
	}
	cfg, err := load()
	if err == nil {
		err = r.guards(cfg)
	}
	if err == nil {
		err = r.mirror.Use(cfg)
	}
	if err != nil {
		status = "configuration not reloaded; the old one stays in force"
		r.logger.Error(status, "err", err)
		return status
	}
	r.inForce = cfg
	started := r.started
	status = "configuration reloaded"
	if cfg.Listen != started.Listen || cfg.Admin != started.Admin || cfg.Control != started.Control || cfg.Data != started.Data ||
		cfg.Capacity != started.Capacity || cfg.MinFree != started.MinFree || cfg.Scrub != started.Scrub || cfg.TLS != started.TLS || cfg.Log != started.Log || cfg.Shared != started.Shared {
		status += "; listen, admin, control, data, capacity, min_free, scrub, tls, log and shared change at the next start"
		r.logger.Warn(status)
		return status
	}
	r.logger.Info(status)
	return status
}

// guards refuses a policy that is good for the next start, but would open the listener that there is.
func (r *running) guards(cfg *config.Config) error {
	if r.started.BeyondLoopback() {
		here := *cfg
		here.Listen, here.TLS = r.started.Listen, r.started.TLS
		if err := here.Validate(); err != nil {
			return err
		}
	}
	if was, will := r.inForce.Access, cfg.Access; was.Loopback == config.LoopbackAsked && will.Loopback != config.LoopbackAsked {
		at := "access.loopback: " + will.Loopback
		if will.IsZero() {
			at = "access: none"
		}
		return fmt.Errorf("%s, where those who come by loopback are asked who they are; restart for that, or write loopback: asked", at)
	}
	return nil
}

// newLogger writes text for people and JSON for machines.
func newLogger(cfg config.Log, out io.Writer) *slog.Logger {
	var level slog.Level
	_ = level.UnmarshalText([]byte(cfg.Level)) // config has checked it
	options := &slog.HandlerOptions{Level: level}
	format := cfg.Format
	if file, ok := out.(*os.File); format == config.LogAuto && ok {
		if info, err := file.Stat(); err == nil && info.Mode()&os.ModeCharDevice != 0 {
			format = config.LogText
		}
	}
	if format == config.LogText {
		return slog.New(slog.NewTextHandler(out, options))
	}
	return slog.New(slog.NewJSONHandler(out, options))
}
