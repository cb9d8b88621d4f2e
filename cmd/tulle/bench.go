package main

import (
	"encoding/json"
	"fmt"
	"time"

	"github.com/spf13/cobra"

	"github.com/tulle-net/tulle/bench"
)

func benchCommand() *cobra.Command {
	return group("bench", "Measure latency, throughput and CPU time", benchAll(), benchLatency(), benchThroughput(), benchServe(), benchRun(), benchShow(), benchDiff(), benchGossip(), benchHelper())
}

func benchGossip() *cobra.Command {
	o := bench.GossipOptions{}
	output := "table"
	cmd := &cobra.Command{
		Use:   "gossip",
		Short: "Measure how fast gossip spreads an entry, and what it costs",
		Long: "Runs many gossip members in this process, over loopback, and prints how long a new table entry takes until all members\n" +
			"know it (median, largest), idle traffic per node and second, memory per node, and the cost of a lookup.",
		Example: "  tulle bench gossip --nodes 100\n  tulle bench gossip --nodes 1000 --prefixes 10000 -o json",
		Args:    exactly(),
		RunE: func(cmd *cobra.Command, _ []string) error {
			if output != "table" && output != "json" {
				return usagef("--output %q: want table or json", output)
			}
			for _, f := range []struct {
				name     string
				n, least int
			}{{"nodes", o.Nodes, 2}, {"prefixes", o.Prefixes, 0}, {"rounds", o.Rounds, 1}} {
				if f.n < f.least {
					return usagef("--%s %d: want at least %d", f.name, f.n, f.least)
				}
			}
			o.Progress = func(s string) { fmt.Fprintln(cmd.ErrOrStderr(), s) }
			r, err := bench.Gossip(cmd.Context(), o)
			if err != nil {
				return err
			}
			if output == "json" {
				enc := json.NewEncoder(cmd.OutOrStdout())
				enc.SetIndent("", "  ")
				return enc.Encode(r)
			}
			return r.Print(cmd.OutOrStdout())
		},
	}
	f := cmd.Flags()
	f.SortFlags = false
	f.IntVar(&o.Nodes, "nodes", 100, "members in this process")
	f.IntVar(&o.Prefixes, "prefixes", 0, "entries in the table (default: one per node)")
	f.IntVar(&o.Rounds, "rounds", 20, "number of new entries to time")
	f.IntVar(&o.Port, "port", 17947, "port of the members, on addresses from 127.128.0.0 up")
	f.DurationVar(&o.Rest, "rest", 0*time.Second, "how long idle traffic is counted (default: one push/pull period)")
	f.StringVarP(&output, "output", "o", output, "`FORM` of the output: table or json")
	return cmd
}
