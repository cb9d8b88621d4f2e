package main

import (
	"context"

	"github.com/spf13/cobra"

	"github.com/tulle-net/tulle/internal/api"
)

func reloadCommand() *cobra.Command {
	c := new(client)
	return c.flags(&cobra.Command{
		Use:   "reload",
		Short: "Read the configuration again, and say what needs a restart",
		Args:  exactly(),
		RunE: ask(c, func(ctx context.Context, a *api.Client, _ []string) (api.ReloadResult, error) { return a.Reload(ctx) },
			func(p *printer, r api.ReloadResult) {
				if len(r.Changed)+len(r.NeedsRestart) == 0 {
					p.line("nothing has changed")
					return
				}
				t := table{head: []string{"KEY", "OLD", "NEW", "EFFECT"}}
				for _, x := range r.Changed {
					t.row(x.Key, orNone(x.Old), orNone(x.New), "now")
				}
				for _, x := range r.NeedsRestart {
					t.row(x.Key, orNone(x.Old), orNone(x.New), effect(x.Key))
				}
				p.table(&t)
			}, nil),
	}, quickTimeout)
}

// effect says when a key that is not live counts. The address space is fixed when its cluster starts.
func effect(key string) string {
	if key == "cluster_cidr" || key == "node_prefix_len" {
		return "in a new cluster only"
	}
	return "after `systemctl restart tulle`"
}
