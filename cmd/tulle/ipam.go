package main

import (
	"context"
	"fmt"
	"net/netip"

	"github.com/spf13/cobra"

	"github.com/tulle-net/tulle/internal/api"
)

func ipamCommand() *cobra.Command {
	c := new(client)
	show := ask(c, func(ctx context.Context, a *api.Client, _ []string) (api.IPAM, error) { return a.IPAM(ctx) }, printIPAM, nil)

	var all bool
	release := &cobra.Command{
		Use:   "release (ADDR... | --all)",
		Short: "Free leaked addresses",
		Long: "Free addresses that no pod has any more. An address is only released if a new check still finds it leaked.\n" +
			"The exit code is 1 if an address was refused.",
		RunE: ask(c, func(ctx context.Context, a *api.Client, args []string) (api.ReleaseResult, error) {
			req := api.ReleaseRequest{All: all}
			for _, s := range args {
				addr, err := netip.ParseAddr(s)
				if err != nil {
					return api.ReleaseResult{}, usagef("%q is not an IPv4 or IPv6 address", s)
				}
				req.Addresses = append(req.Addresses, addr)
			}
			if all == (len(args) > 0) {
				return api.ReleaseResult{}, usagef("give the addresses to release, or --all for all that `tulle ipam check` finds")
			}
			return a.IPAMRelease(ctx, req)
		}, printRelease, func(r api.ReleaseResult) bool { return len(r.Refused) == 0 }),
	}
	release.Flags().BoolVar(&all, "all", false, "release all addresses that `tulle ipam check` finds leaked")

	cmd := &cobra.Command{
		Use:   "ipam",
		Short: "Show this node's address space, blocks and pod addresses",
		Args:  subcommandArgs,
		RunE:  show,
	}
	cmd.AddCommand(
		&cobra.Command{Use: "show", Short: "Show this node's space, its blocks, and the pods' addresses", Args: exactly(), RunE: show},
		&cobra.Command{
			Use:   "check",
			Short: "Compare allocations with the pods on this host",
			Long: "Compare allocations with the network namespaces and interfaces of the host.\n" +
				"The exit code is 1 if an address is leaked, stranded (another node owns it now), or in use without being allocated.",
			Args: exactly(),
			RunE: ask(c, func(ctx context.Context, a *api.Client, _ []string) (api.IPAMCheck, error) { return a.IPAMCheck(ctx) },
				printCheck, func(r api.IPAMCheck) bool { return len(r.Leaked) == 0 && len(r.Unknown) == 0 && len(r.Stranded) == 0 }),
		},
		release)
	return c.flags(cmd, quickTimeout)
}

func printIPAM(p *printer, r api.IPAM) {
	p.fields([2]string{"space", orNone(list(r.Prefixes, " "))})
	if len(r.Blocks) > 0 {
		t := table{head: []string{"BLOCK", "USED", "COOLING", "SIZE"}, right: []bool{false, true, true}}
		for _, b := range r.Blocks {
			t.row(b.Prefix.String(), count(b.Used), count(b.Cooling), size(b))
		}
		p.line("")
		p.table(&t)
	}
	if len(r.Allocations) == 0 {
		p.line("\nno addresses are allocated")
		return
	}
	t := table{head: []string{"ADDRESS", "STATE", "SINCE", "POD", "ID"}, right: []bool{false, false, true}}
	for _, a := range r.Allocations {
		state := a.State
		if !a.Until.IsZero() {
			state += " for " + age(a.Until.Sub(p.now))
		}
		t.row(list(a.Addresses, "\n"), state, p.since(a.Since), orNone(a.Name), orNone(a.ID))
	}
	p.line("")
	p.table(&t)
}

func printCheck(p *printer, r api.IPAMCheck) {
	stranded := ""
	if n := len(r.Stranded); n > 0 {
		stranded = fmt.Sprintf(", %d stranded", n)
	}
	p.line("%s checked, %d leaked, %d in use without being allocated%s", plural(r.Checked, "allocation"), len(r.Leaked), len(r.Unknown), stranded)
	if len(r.Leaked) > 0 {
		t := table{head: []string{"LEAKED", "SINCE", "ID", "REASON"}, right: []bool{false, true}}
		for _, l := range r.Leaked {
			t.row(l.Address.String(), p.since(l.Since), l.ID, l.Reason)
		}
		p.line("")
		p.table(&t)
		p.line("→ `tulle ipam release ADDR` or `--all` gives them back")
	}
	if len(r.Unknown) > 0 {
		t := table{head: []string{"NOT ALLOCATED", "WHERE"}}
		for _, u := range r.Unknown {
			t.row(u.Address.String(), u.Where)
		}
		p.line("")
		p.table(&t)
		p.line("→ something beside the agent gave these out: recreate those pods, or stop what made them")
	}
	if len(r.Stranded) > 0 {
		t := table{head: []string{"STRANDED", "SINCE", "ID", "REASON"}, right: []bool{false, true}}
		for _, l := range r.Stranded {
			t.row(l.Address.String(), p.since(l.Since), l.ID, l.Reason)
		}
		p.line("")
		p.table(&t)
		p.line("→ restart these pods: they get addresses of this node's present space")
	}
}

func printRelease(p *printer, r api.ReleaseResult) {
	for _, a := range r.Released {
		p.line("released %s", a)
	}
	for _, x := range r.Refused {
		p.line("refused  %s: %s", x.Address, x.Why)
	}
	if len(r.Released)+len(r.Refused) == 0 {
		p.line("nothing is leaked")
	}
}
