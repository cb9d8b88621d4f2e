package main

import (
	"encoding/json"
	"fmt"
	"os"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"github.com/tulle-net/tulle/bench"
	"github.com/tulle-net/tulle/internal/lab"
)

const benchAllLong = `Compares the ways to connect two pods: no tunnel, the kernel's VXLAN, wireguard-go, and Tulle with udp, vxlan and ipip. Each mode
has its own lab (two hosts in two subnets, a router, one pod per host). Modes are measured in interleaved rounds. The output
begins with the result in one sentence, reasons not to trust it if there are any, and one table of medians and ratios. -v shows
everything. A mode that this kernel does not support is listed with the reason. Needs root, and no other programs.`

func benchAll() *cobra.Command {
	o := bench.AllOptions{}
	output, wire, verbose := "table", "", false
	cmd := &cobra.Command{
		Use:   "all",
		Short: "Compare Tulle with no tunnel, kernel VXLAN and wireguard-go: throughput, latency, rate, CPU, memory",
		Long:  benchAllLong,
		Example: "  tulle bench all\n" +
			"  tulle bench all --rounds 9 -o json > result.json\n" +
			"  tulle bench all --modes kernel-vxlan,tulle-udp --rounds 1 --profile /tmp/profile",
		Args: exactly(),
		RunE: func(cmd *cobra.Command, _ []string) error {
			if !slices.Contains([]string{"table", "json", "csv"}, output) {
				return usagef("--output %q: want table, json or csv", output)
			}
			o.Wire = lab.Wire(wire)
			if o.Rounds < 1 {
				return usagef("--rounds %d: want at least 1", o.Rounds)
			}
			self, err := os.Executable()
			if err != nil {
				return err
			}
			o.Helper = []string{self, "bench", "helper"}
			if err := o.Validate(); err != nil {
				return usageError{err}
			}
			o.Progress = stopwatch(cmd.ErrOrStderr())
			ctx, stop := interruptible(cmd)
			defer stop()
			r, err := bench.All(ctx, o)
			if err != nil {
				return details(cmd, err)
			}
			switch output {
			case "json":
				enc := json.NewEncoder(cmd.OutOrStdout())
				enc.SetIndent("", "  ")
				enc.SetEscapeHTML(false)
				err = enc.Encode(r)
			case "csv":
				err = r.WriteCSV(cmd.OutOrStdout())
			default:
				fmt.Fprintln(cmd.ErrOrStderr())
				err = r.Print(cmd.OutOrStdout(), verbose)
			}
			if err == nil && r.Failed() {
				return errUnhealthy
			}
			return err
		},
	}
	f := cmd.Flags()
	f.SortFlags = false
	f.IntVar(&o.Rounds, "rounds", 5, "number of rounds: how often each measure is taken for each mode")
	f.DurationVar(&o.Duration, "duration", bench.DefaultDuration, "counted time of each measure, after a warm-up of a third of it")
	f.StringSliceVar(&o.Modes, "modes", nil, "modes to measure (default all): "+strings.Join(bench.Modes(), ", "))
	f.IntVar(&o.MTU, "mtu", 1500, "MTU of the underlay, in `BYTES`")
	addWire(cmd, &wire)
	f.StringVar(&o.Profile, "profile", "", "after the rounds, record a CPU profile of each mode into `DIR` with perf")
	f.StringVar(&o.Name, "name", "bench", "`NAME`: the prefix of the labs' names")
	f.DurationVar(&o.Timeout, "timeout", o.Timeout, "how long to wait until agents are ready (default 1m0s)")
	f.StringVarP(&output, "output", "o", output, "`FORM` of the output: table, json, or csv with every value of every round")
	f.BoolVarP(&verbose, "verbose", "v", false, "show all measures with their spread, and how it was measured")
	_ = cmd.RegisterFlagCompletionFunc("modes", cobra.FixedCompletions(bench.Modes(), cobra.ShellCompDirectiveNoFileComp))
	return cmd
}

// benchHelper is the hidden command that `tulle bench all` runs as a child process.
func benchHelper() *cobra.Command {
	return &cobra.Command{
		Use:    "helper NAME",
		Short:  "A process that a benchmark needs",
		Hidden: true,
		Args:   exactly("NAME"),
		RunE: func(cmd *cobra.Command, args []string) error {
			return bench.Helper(args[0], cmd.InOrStdin(), cmd.OutOrStdout())
		},
	}
}
