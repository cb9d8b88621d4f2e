package main

import (
	"encoding/json"
	"fmt"
	"os"
	"strings"

	"github.com/spf13/cobra"

	"github.com/tulle-net/tulle/bench"
)

const benchAllLong = `Compares the ways to connect two pods: no tunnel, the kernel's VXLAN, wireguard-go, and Tulle with udp and with ipip. Each mode
has its own lab (two hosts in two subnets, a router, one pod per host). Modes are measured in interleaved rounds. The output
has medians, extremes, and ratios to the kernel's VXLAN and to wireguard-go. A mode that this kernel does not support is
listed with the reason. Needs root, and no other programs.`

func benchAll() *cobra.Command {
	o := bench.AllOptions{}
	output := "table"
	cmd := &cobra.Command{
		Use:   "all",
		Short: "Compare Tulle with no tunnel, kernel VXLAN and wireguard-go: throughput, latency, rate, CPU, memory",
		Long:  benchAllLong,
		Example: "  tulle bench all\n" +
			"  tulle bench all --rounds 9 -o json > result.json\n" +
			"  tulle bench all --modes kernel-vxlan,tulle-udp --rounds 1 --profile /tmp/profile",
		Args: exactly(),
		RunE: func(cmd *cobra.Command, _ []string) error {
			if output != "table" && output != "json" {
				return usagef("--output %q: want table or json", output)
			}
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
			if output == "json" {
				enc := json.NewEncoder(cmd.OutOrStdout())
				enc.SetIndent("", "  ")
				enc.SetEscapeHTML(false)
				err = enc.Encode(r)
			} else {
				fmt.Fprintln(cmd.ErrOrStderr())
				err = r.Print(cmd.OutOrStdout())
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
	f.StringVar(&o.Profile, "profile", "", "after the rounds, record a CPU profile of each mode into `DIR` with perf")
	f.StringVar(&o.Name, "name", "bench", "`NAME`: the prefix of the labs' names")
	f.DurationVar(&o.Timeout, "timeout", o.Timeout, "how long to wait until agents are ready (default 1m0s)")
	f.StringVarP(&output, "output", "o", output, "`FORM` of the output: table or json")
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
