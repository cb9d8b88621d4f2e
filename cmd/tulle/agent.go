package main

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"os"
	"os/signal"
	"sync"
	"syscall"

	"github.com/spf13/cobra"

	"github.com/tulle-net/tulle/internal/agent"
	"github.com/tulle-net/tulle/internal/api"
	"github.com/tulle-net/tulle/internal/config"
)

// runAgent runs the agent. It returns when ctx has ended and everything that it started has ended.
var runAgent = agent.Run

func agentCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "agent",
		Short: "Run the agent of this host",
		Long: "Run the agent of this host. Each flag is also a key of " + config.DefaultFile + ", written with \"_\"; a flag overrides the file.\n" +
			"docs/configuration.md describes them (a package has docs/ in /usr/share/doc/tulle). SIGTERM and SIGINT stop it; routes, pods and their addresses stay.\n" +
			"SIGHUP reads the configuration again, like `tulle reload`.",
		Example: "  tulle agent --bootstrap                    # on one host\n" +
			"  tulle agent --join host-a --join host-b    # on the others",
		Args: exactly(),
	}
	config.AddFlags(cmd.Flags())
	_ = cmd.RegisterFlagCompletionFunc("paths", completeList(config.Modes))
	_ = cmd.RegisterFlagCompletionFunc("log-level", cobra.FixedCompletions(api.LogLevels, cobra.ShellCompDirectiveNoFileComp))
	_ = cmd.RegisterFlagCompletionFunc("log-format", cobra.FixedCompletions([]string{"text", "json"}, cobra.ShellCompDirectiveNoFileComp))
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		cfg, err := config.Load(cmd.Flags(), "")
		if err != nil {
			return usageError{err}
		}
		return serve(cmd.Context(), cfg, newLogger(cmd.ErrOrStderr(), cfg))
	}
	return cmd
}

// serve runs the agent until a signal stops it. A second signal ends the process at once.
func serve(parent context.Context, cfg config.Config, log *slog.Logger) error {
	ctx, stop := signal.NotifyContext(parent, syscall.SIGTERM, syscall.SIGINT)
	defer stop()
	pipes := make(chan os.Signal, 1)
	signal.Notify(pipes, syscall.SIGPIPE) // whoever reads the log may end; the agent does not
	defer signal.Stop(pipes)
	hups := make(chan os.Signal, 1)
	signal.Notify(hups, syscall.SIGHUP)
	defer signal.Stop(hups)

	var wg sync.WaitGroup
	defer wg.Wait()
	context.AfterFunc(ctx, stop)
	live, cancel := context.WithCancel(ctx)
	defer cancel()
	wg.Go(func() { reloadOnHangup(live, hups, cfg.Socket, log) })

	err := runAgent(ctx, cfg, log)
	if ctx.Err() != nil && errors.Is(err, context.Canceled) {
		return nil
	}
	return err
}

// reloadOnHangup does for each SIGHUP what `tulle reload` does.
func reloadOnHangup(ctx context.Context, hups <-chan os.Signal, socket string, log *slog.Logger) {
	for {
		select {
		case <-ctx.Done():
			return
		case <-hups:
		}
		call, cancel := context.WithTimeout(ctx, quickTimeout)
		r, err := api.NewClient(socket).Reload(call)
		cancel()
		if err != nil {
			log.Error("reload failed", "error", err)
			continue
		}
		for _, c := range r.Changed {
			log.Info("reload", "key", c.Key, "old", c.Old, "new", c.New)
		}
		for _, c := range r.NeedsRestart {
			log.Warn("reload: this key does not change while the agent runs", "key", c.Key, "old", c.Old, "new", c.New, "remedy", "it counts "+effect(c))
		}
		log.Info("reloaded", "changed", len(r.Changed), "needs_restart", len(r.NeedsRestart))
	}
}

// newLogger returns a logger that writes to out. Its level may change while the agent runs.
func newLogger(out io.Writer, cfg config.Config) *slog.Logger {
	if f, ok := out.(*os.File); ok {
		out = &logFile{f: f, tell: slog.New(logHandler(f, cfg))}
	}
	return slog.New(logHandler(out, cfg))
}

// logHandler omits the time in the journal, which has its own.
func logHandler(out io.Writer, cfg config.Config) slog.Handler {
	o := &slog.HandlerOptions{Level: cfg.LevelVar()}
	if os.Getenv("JOURNAL_STREAM") != "" {
		o.ReplaceAttr = func(groups []string, a slog.Attr) slog.Attr {
			if len(groups) == 0 && a.Key == slog.TimeKey {
				return slog.Attr{}
			}
			return a
		}
	}
	if cfg.LogFormat == "json" {
		return slog.NewJSONHandler(out, o)
	}
	return slog.NewTextHandler(out, o)
}
