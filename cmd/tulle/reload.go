package main

import (
	"context"
	"fmt"

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
					t.row(x.Key, orNone(x.Old), orNone(x.New), effect(x))
				}
				p.table(&t)
			}, nil),
	}, quickTimeout)
}

// effect says when a key that is not live counts. The address space is fixed when its cluster starts, the TUN device of an agent stays when it ends,
// and without its state a node is another one.
func effect(c api.ConfigChange) string {
	switch c.Key {
	case "cluster_cidr", "node_prefix_len":
		return "in a new cluster only"
	case "tun":
		return fmt.Sprintf("after `systemctl stop tulle`, `tulle cleanup --tun %s` and `systemctl start tulle`", c.Old)
	case "state_dir":
		return fmt.Sprintf("after `systemctl stop tulle`, `mv -T %[1]s %[2]s`, ReadWritePaths=%[2]s below [Service] in `systemctl edit tulle`, and `systemctl start tulle`; without its state the node would join as a new one", c.Old, c.New)
	}
	return "after `systemctl restart tulle`"
}
