package main

import (
	"context"
	"fmt"
	"slices"
	"time"

	"github.com/spf13/cobra"

	"github.com/tulle-net/tulle/internal/api"
)

func pingCommand() *cobra.Command {
	c := new(client)
	n := 3
	cmd := &cobra.Command{
		Use:   "ping NODE",
		Short: "Probe a node by each encapsulation: time, loss, largest packet",
		Long: "Probe a node through every encapsulation: round-trip time, loss, and the largest packet that arrives.\n" +
			"NODE is a name, an ID or its first digits, or an address that the node owns.\n" +
			"The exit code is 1 if none of the encapsulations got an answer.",
		Args: exactly("a node"), ValidArgsFunction: c.nodeNames,
		RunE: ask(c, func(ctx context.Context, a *api.Client, args []string) (api.PingResult, error) {
			if n < 1 || n > api.MaxPingCount {
				return api.PingResult{}, usagef("--count %d: want 1 to %d", n, api.MaxPingCount)
			}
			return a.Ping(ctx, api.PingRequest{Node: args[0], Count: n})
		}, printPing, func(r api.PingResult) bool {
			return slices.ContainsFunc(r.Modes, func(m api.PingMode) bool { return m.Received > 0 })
		}),
	}
	cmd.Flags().IntVarP(&n, "count", "c", n, "number of probes through each encapsulation")
	return c.flags(cmd, time.Minute)
}

func printPing(p *printer, r api.PingResult) {
	p.line("%s", nodeRef(r.Node))
	t := table{head: []string{"PATH", "STATE", "LOST", "MIN", "MEAN", "MAX", "LARGEST", "ENDPOINT", "REASON"},
		right: []bool{false, false, true, true, true, true, true}}
	for _, m := range r.Modes {
		mode := m.Mode
		if m.Active {
			mode += " *"
		}
		lost := none
		if m.Sent > 0 {
			lost = fmt.Sprintf("%d of %d", m.Lost, m.Sent)
		}
		t.row(mode, m.State, lost, rtt(m.RTTMinUS), rtt(m.RTTUS), rtt(m.RTTMaxUS), mtu(m.LargestPacket), orNone(endpoint(m.Endpoint)), m.Reason)
	}
	p.table(&t)
	if slices.ContainsFunc(r.Modes, func(m api.PingMode) bool { return m.Active }) {
		p.line("* in use")
	}
}
