package main

import (
	"context"
	"os"

	"github.com/spf13/cobra"

	"github.com/tulle-net/tulle/bench"
	"github.com/tulle-net/tulle/bench/result"
	"github.com/tulle-net/tulle/internal/api"
	"github.com/tulle-net/tulle/internal/lab"
)

const benchAllLong = `Compares the ways to connect two pods, each in a lab of its own: two hosts with a router between them, one pod per host, real agents
and the kernel's real devices.

  no-tunnel                                   routes only
  udp, vxlan, ipip                            Tulle, by encapsulation
  udp-fast, ipip-fast                         Tulle with fast_path
  kernel-vxlan, kernel-ipip, kernel-fou       the kernel's own tunnels
  kernel-wireguard, wireguard-go              encrypted, for comparison
  no-tunnel-subnet, direct                    in one subnet: routes, and Tulle's
  wireguard                                   listed as lacking: Tulle has none

Modes are measured in interleaved rounds. The output begins with the result in one sentence, reasons not to trust it if there are any,
and one table of medians and ratios. -v shows everything. A mode that this kernel does not support is listed with the reason.
Ctrl-C ends the run after what it is measuring; the complete rounds are kept. Labs need root, and no other programs.

With --to it measures the paths from this member of the cluster to another one instead, over the live network and held to a rate: direct,
udp, vxlan and ipip, as ` + "`tulle bench run --to`" + ` does.`

func benchAll() *cobra.Command {
	return benchLab("all", "Compare Tulle with no tunnel, kernel VXLAN and wireguard-go",
		"  tulle bench all\n"+
			"  tulle bench all --rounds 9 -o json > result.json\n"+
			"  tulle bench all --modes kernel-vxlan,udp --rounds 1 --profile /tmp/profile")
}

func benchLatency() *cobra.Command {
	return benchLab("latency", "The same for latency alone: datagrams, TCP requests, connections",
		"  tulle bench latency --modes no-tunnel,udp --sizes 64,1400 --rounds 5\n  tulle bench latency --to node-b", bench.Delay)
}

func benchThroughput() *cobra.Command {
	return benchLab("throughput", "The same for throughput alone: TCP and UDP, CPU time, UDP loss",
		"  tulle bench throughput --six --rounds 5\n  tulle bench throughput --to node-b --modes direct,udp", bench.Throughput)
}

// benchLab makes a command that measures modes in labs. Without measures it takes all.
func benchLab(use, short, example string, measures ...string) *cobra.Command {
	o := bench.AllOptions{Measures: measures, Version: api.Version()}
	out, wire, parts := benchOutput{form: "table"}, "", false
	to := benchTo{none: []string{"mtu", "congestion", "wire", "name", "timeout"}}
	switch use {
	case "all":
		to.none = append(to.none, "profile")
	case "latency":
		to.none = append(to.none, "in-parts")
	}
	cmd := &cobra.Command{
		Use:     use,
		Short:   short,
		Long:    benchAllLong,
		Example: example,
		Args:    exactly(),
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := out.check(); err != nil {
				return err
			}
			o.Wire = lab.Wire(wire)
			if parts {
				o.Measures = append(o.Measures, bench.InParts)
			}
			if o.Rounds < 1 {
				return usagef("--rounds %d: want at least 1", o.Rounds)
			}
			if o.Duration == 0 || o.MTU == 0 {
				return usagef("--duration and --mtu: want more than 0")
			}
			if to.node != "" {
				return to.instead(cmd, o, &out)
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
			return out.measure(cmd, func(ctx context.Context) (*result.Run, error) { return bench.All(ctx, o) })
		},
	}
	f := cmd.Flags()
	f.SortFlags = false
	f.IntVar(&o.Rounds, "rounds", 5, "number of rounds: how often each measure is taken for each mode")
	f.DurationVar(&o.Duration, "duration", bench.DefaultDuration, "counted time of each measure, after a warm-up of a third of it")
	f.StringSliceVar(&o.Modes, "modes", nil, "modes to measure (default all), of those above; Tulle's may have \"tulle-\" in front; with --to of direct, udp, vxlan, ipip")
	if use != "throughput" {
		f.IntSliceVar(&o.Sizes, "sizes", []int{64, 1400}, "payloads of the datagrams whose latency is measured, in `BYTES`")
	}
	if use == "latency" {
		f.BoolVar(&parts, "in-parts", false, "also TCP requests that are written in two parts without TCP_NODELAY, which delayed acknowledgements slow down")
	}
	f.BoolVar(&o.Six, "six", false, "IPv6, for pods and hosts")
	f.IntVar(&o.MTU, "mtu", 1500, "MTU of the underlay, in `BYTES`")
	f.StringVar(&o.Congestion, "congestion", bench.DefaultCongestion, "TCP congestion control of the pods")
	addWire(cmd, &wire)
	if use == "all" {
		f.StringVar(&o.Profile, "profile", "", "after the rounds, record a CPU profile of each mode into `DIR` with perf")
	}
	f.StringVar(&o.Name, "name", "bench", "`NAME`: the prefix of the labs' names")
	f.DurationVar(&o.Timeout, "timeout", o.Timeout, "how long to wait until agents are ready (default 1m0s)")
	to.flags(cmd, "labs")
	out.flags(cmd)
	_ = cmd.RegisterFlagCompletionFunc("modes", func(*cobra.Command, []string, string) ([]cobra.Completion, cobra.ShellCompDirective) {
		if to.node != "" {
			return api.BenchModes, cobra.ShellCompDirectiveNoFileComp
		}
		return bench.Modes(), cobra.ShellCompDirectiveNoFileComp
	})
	return cmd
}

// benchHelper is the hidden command that `tulle bench all` and an agent run as a child process.
func benchHelper() *cobra.Command {
	return &cobra.Command{
		Use:    "helper NAME",
		Short:  "A process that a benchmark needs",
		Hidden: true,
		Args:   exactly("NAME"),
		RunE: func(cmd *cobra.Command, args []string) error {
			if args[0] == "serve" {
				return benchHelperServe(cmd.Context(), cmd.InOrStdin(), cmd.OutOrStdout())
			}
			return bench.Helper(args[0], cmd.InOrStdin(), cmd.OutOrStdout())
		},
	}
}
