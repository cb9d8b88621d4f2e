package main

import (
	"context"

	"github.com/spf13/cobra"

	"github.com/tulle-net/tulle/internal/api"
)

func logLevelCommand() *cobra.Command {
	c := new(client)
	cmd := &cobra.Command{
		Use:   "log-level [LEVEL]",
		Short: "Show the level of the agent's log, or set it until a restart",
		Args: func(cmd *cobra.Command, args []string) error {
			if len(args) == 0 {
				return nil
			}
			return exactly("one level")(cmd, args)
		},
		RunE: ask(c, func(ctx context.Context, a *api.Client, args []string) (api.LogLevel, error) {
			var req api.LogLevelRequest
			if len(args) == 1 {
				req.Level = args[0]
			}
			return a.LogLevel(ctx, req)
		}, func(p *printer, l api.LogLevel) {
			if l.Old == l.New {
				p.line("%s", l.New)
				return
			}
			p.line("%s, was %s; `log_level` in the configuration decides again after a restart or `tulle reload`", l.New, l.Old)
		}, nil),
		ValidArgsFunction: cobra.FixedCompletions(api.LogLevels, cobra.ShellCompDirectiveNoFileComp),
	}
	return c.flags(cmd, quickTimeout)
}
