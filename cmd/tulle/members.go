package main

import (
	"context"
	"fmt"
	"net/netip"
	"time"

	"github.com/spf13/cobra"

	"github.com/tulle-net/tulle/internal/api"
)

// changeTimeout is the timeout of changes for which other nodes have to answer.
const changeTimeout = 2 * time.Minute

func leaveCommand() *cobra.Command {
	c := new(client)
	return c.flags(&cobra.Command{
		Use:   "leave",
		Short: "Give this node's address space to others, and leave the cluster",
		Long: "Give all of this node's address space to another member, and leave the cluster for good. A stop of the agent is not a\n" +
			"leave: a stopped node keeps its space, and its pods keep their routes.",
		Args: exactly(),
		RunE: ask(c, func(ctx context.Context, a *api.Client, _ []string) (api.LeaveResult, error) { return a.Leave(ctx) },
			func(p *printer, r api.LeaveResult) {
				p.line("left the cluster")
				printTransfers(p, r.Transfers)
			}, nil),
	}, changeTimeout)
}

func forgetCommand() *cobra.Command {
	c := new(client)
	var force bool
	var cmd *cobra.Command
	cmd = &cobra.Command{
		Use:   "forget NODE",
		Short: "Take over the address space of a node that is gone for good",
		Long: "Take over the address space of a node that is dead and will not come back. A node that owns none stops to count as a\n" +
			"member. It is refused while the node is alive or its tunnel answers, and while this node does not reach a majority of the\n" +
			"members. It waits until the node has not been seen for half a minute. --force skips the majority and the wait: use it if\n" +
			"the others are dead too. If the node comes back, it gives up its space and reports that.\n\n" +
			"Forget no node while the network is split: a node on the other side looks dead, but lives, and goes on giving its\n" +
			"addresses to pods.",
		Args: exactly("a node"), ValidArgsFunction: c.nodeNames,
		RunE: ask(c, func(ctx context.Context, a *api.Client, args []string) (api.ForgetResult, error) {
			defer time.AfterFunc(3*time.Second, func() {
				fmt.Fprintf(cmd.ErrOrStderr(), "waits until %s has not been seen for half a minute\n", args[0])
			}).Stop()
			return a.Forget(ctx, api.ForgetRequest{Node: args[0], Force: force})
		}, func(p *printer, r api.ForgetResult) {
			if len(r.Transfers) == 0 {
				p.line("forgot %s: it owned no space, and is no member any more", nodeRef(r.Node))
				return
			}
			p.line("forgot %s", nodeRef(r.Node))
			printTransfers(p, r.Transfers)
		}, nil),
	}
	cmd.Flags().BoolVar(&force, "force", false, "even if this node does not reach a majority of the members, and without the wait")
	return c.flags(cmd, changeTimeout)
}

func printTransfers(p *printer, ts []api.Transfer) {
	t := table{head: []string{"PREFIX", "FROM", "TO"}}
	for _, x := range ts {
		t.row(x.Prefix.String(), nodeRef(x.From), nodeRef(x.To))
	}
	p.table(&t)
}

// externalWay is how packets go to an external peer.
func externalWay(e api.External) string {
	way := e.Encapsulation
	if e.Port != 0 {
		way += fmt.Sprintf(" port %d", e.Port)
	}
	if e.MAC != "" {
		way += " MAC " + e.MAC
	}
	return way
}

func externalCommand() *cobra.Command {
	c := new(client)
	req := api.ExternalRequest{Encapsulation: "ipip"}
	prefix := func(s string) (netip.Prefix, error) {
		p, err := netip.ParsePrefix(s)
		if err != nil {
			return p, usagef("%q is not a prefix such as 10.244.200.0/24", s)
		}
		if m := p.Masked(); m != p {
			return p, usagef("%s has bits set after its prefix length; write %s", p, m)
		}
		return p, nil
	}
	show := func(word string) func(p *printer, e api.External) {
		return func(p *printer, e api.External) {
			p.line("%s %s at %s by %s, kept by %s", word, e.Prefix, e.Endpoint, externalWay(e), nodeRef(e.Owner))
		}
	}
	var port int
	var add *cobra.Command
	add = &cobra.Command{
		Use:   "add PREFIX ENDPOINT",
		Short: "Give a prefix of this node's space to a host without an agent",
		Long: "Give a prefix of this node's space to a router or host without an agent that has a plain tunnel: a Linux ipip, sit or\n" +
			"ip6tnl device (ipip), a gue or fou port (udp), or a vxlan device (vxlan). ENDPOINT is its underlay address, outside the\n" +
			"cluster's address space. The agents learn the MAC of a vxlan device from its packets, or request it; give --mac if\n" +
			"neither is possible.",
		Example: "  tulle external add 10.244.200.0/24 192.0.2.9 --encap ipip\n" +
			"  tulle external add 10.244.201.0/24 192.0.2.10 --encap vxlan",
		Args: exactly("a prefix", "the address of its endpoint"),
		RunE: ask(c, func(ctx context.Context, a *api.Client, args []string) (e api.External, err error) {
			if add.Flags().Changed("port") && (port < 1 || port > 65535) {
				return e, usagef("--port %d: want 1 to 65535", port)
			}
			req.Port = uint16(port)
			p, err := prefix(args[0])
			if err != nil {
				return e, err
			}
			ep, err := netip.ParseAddr(args[1])
			if err != nil {
				return e, usagef("%q is not the address of an endpoint", args[1])
			}
			req.Prefix, req.Endpoint = p, ep
			return a.ExternalAdd(ctx, req)
		}, show("added"), nil),
	}
	add.Flags().StringVar(&req.Encapsulation, "encap", req.Encapsulation, "encapsulation: udp, ipip, vxlan or direct")
	add.Flags().IntVar(&port, "port", 0, "its UDP `PORT` for udp or vxlan (default: this cluster's)")
	add.Flags().StringVar(&req.MAC, "mac", "", "`MAC` of its vxlan device (default: learned from its packets)")
	remove := &cobra.Command{
		Use:   "remove PREFIX",
		Short: "Take back the prefix of an external peer",
		Args:  exactly("a prefix"),
		RunE: ask(c, func(ctx context.Context, a *api.Client, args []string) (e api.External, err error) {
			p, err := prefix(args[0])
			if err != nil {
				return e, err
			}
			return a.ExternalRemove(ctx, p)
		}, show("removed"), nil),
	}
	ls := &cobra.Command{
		Use:   "list",
		Short: "List all external peers of the cluster",
		Args:  exactly(),
		RunE: ask(c, func(ctx context.Context, a *api.Client, _ []string) ([]api.External, error) { return a.Externals(ctx) },
			func(p *printer, es []api.External) {
				if len(es) == 0 {
					p.line("no external peers")
				}
				t := table{head: []string{"PREFIX", "ENDPOINT", "PATH", "KEPT BY"}}
				for _, e := range es {
					t.row(e.Prefix.String(), e.Endpoint.String(), externalWay(e), nodeRef(e.Owner))
				}
				p.table(&t)
			}, nil),
	}
	return c.flags(group("external", "Manage external peers: routers and hosts without an agent", add, remove, ls), changeTimeout)
}
