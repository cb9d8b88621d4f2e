package main

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"os"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/tulle-net/tulle/bench/pair"
	"github.com/tulle-net/tulle/bench/result"
	"github.com/tulle-net/tulle/internal/api"
)

const benchServeLong = `Answers ` + "`tulle bench run`" + ` from another pod, container or host, over any network. Needs no root and no agent. It serves one run at a
time, sends only answers, and only to the address of the client. It uses one TCP port and the UDP port of the same number.`

const mostGbps = 1_000_000 // of a limit: more than any network

func benchServe() *cobra.Command {
	o := pair.ServeOptions{Version: api.Version()}
	var gbps float64
	tokenFile := ""
	cmd := &cobra.Command{
		Use:     "serve",
		Short:   "Be the other end of `tulle bench run`, anywhere, without root",
		Long:    benchServeLong,
		Example: "  tulle bench serve\n  tulle bench serve --listen 10.0.0.7:17979 --token-file token --max-gbps 1",
		Args:    exactly(),
		RunE: func(cmd *cobra.Command, _ []string) (err error) {
			if o.MaxTime <= 0 {
				return usagef("--max-time %v: want more than 0", o.MaxTime)
			}
			if !(gbps >= 0 && gbps <= mostGbps) { // nor what is no number
				return usagef("--max-gbps %v: want 0 (no limit) to %d", gbps, mostGbps)
			}
			if err := checkListen(o.Address); err != nil {
				return err
			}
			o.MaxRate = gbps * 1e9
			if o.Token, err = token(tokenFile); err != nil {
				return err
			}
			out := cmd.ErrOrStderr()
			o.Log = func(s string) { fmt.Fprintf(out, "%s %s\n", time.Now().Format(time.TimeOnly), s) }
			o.Listening = func(at netip.AddrPort) { fmt.Fprintf(out, "listening on %v, TCP and UDP\n", at) }
			defer deafToPipes()() // whoever reads the log may end
			ctx, stop := interruptible(cmd)
			defer stop()
			return pair.Serve(ctx, o)
		},
	}
	f := cmd.Flags()
	f.SortFlags = false
	f.StringVar(&o.Address, "listen", fmt.Sprintf(":%d", pair.DefaultPort), "`ADDRESS`:PORT to listen on, or one of them")
	f.StringVar(&tokenFile, "token-file", "", "`FILE` with a token that clients must have")
	f.DurationVar(&o.MaxTime, "max-time", 10*time.Minute, "how long one run may take")
	f.Float64Var(&gbps, "max-gbps", 0, "how many Gb/s of payload a run may send; 0: no limit")
	return cmd
}

// checkListen refuses what is no address to listen on: an address, a port, or both.
func checkListen(listen string) error {
	if _, err := netip.ParseAddr(strings.Trim(listen, "[]")); err == nil {
		return nil
	}
	_, port, err := net.SplitHostPort(listen)
	if err != nil {
		return usagef("--listen %q: want ADDRESS, ADDRESS:PORT or :PORT, such as :%d", listen, pair.DefaultPort)
	}
	if _, err := strconv.ParseUint(port, 10, 16); err != nil {
		return usagef("--listen %q: want a port from 0 (any) to 65535", listen)
	}
	return nil
}

// token reads a token from a file; "" is for no file.
func token(file string) (string, error) {
	if file == "" {
		return "", nil
	}
	b, err := os.ReadFile(file)
	if err != nil {
		return "", fmt.Errorf("--token-file: %w", err)
	}
	t := strings.TrimSpace(string(b))
	if t == "" {
		return "", fmt.Errorf("--token-file %s has no token in it: any line of text does, the same at both ends", file)
	}
	return t, nil
}

const benchRunLong = `Measures the path to a host where ` + "`tulle bench serve`" + ` runs, over any network: latency, TCP requests and connections, TCP and UDP
throughput, packet rate without loss, CPU time, path MTU. Needs no root and no agent. Takes less than three minutes over a path that is
not long, and says after the first round how much longer. To compare two networks, store a result of each with -o json and use
` + "`tulle bench diff`" + `. Ctrl-C keeps the rounds that are complete.

With --to it measures the paths from this member of the cluster to another one over the live network: through each encapsulation, and
directly where that is proven. It asks this node's agent (root), and that the other's, for addresses of their own for each path, so pods'
packets keep the way they had. It keeps to a rate (--max-mbps, and bench_mbps of both agents) and to --rate exchanges a second, so
throughput is what the limit lets through. When it ends or is killed, both agents take back what they added.`

func benchRun() *cobra.Command {
	o := pair.RunOptions{Version: api.Version()}
	out, tokenFile, modes := benchOutput{form: "table"}, "", []string(nil)
	to := benchTo{only: []string{"modes"}, none: []string{"label", "token-file", "streams"}}
	cmd := &cobra.Command{
		Use:   "run HOST | run --to NODE",
		Short: "Measure the path to `tulle bench serve`, or those to a member",
		Long:  benchRunLong,
		Example: "  tulle bench run 10.0.0.7\n  tulle bench run server.example --label flannel -o json > flannel.json\n" +
			"  tulle bench run --to node-b\n  tulle bench run --to node-b --modes direct,udp --max-mbps 20 --report out",
		Args: func(cmd *cobra.Command, args []string) error {
			if to.node != "" && len(args) == 0 {
				return nil
			}
			if to.node != "" {
				return usagef("%s and --to %s exclude each other: HOST is where `tulle bench serve` runs, --to names a member of the cluster", args[0], to.node)
			}
			return exactly("HOST")(cmd, args)
		},
		RunE: func(cmd *cobra.Command, args []string) (err error) {
			if err := out.check(); err != nil {
				return err
			}
			if to.node != "" {
				o.Host, o.Gentle = to.node, true
				if err := to.choose(modes); err != nil {
					return err
				}
			} else {
				o.Host = args[0]
			}
			if o.Rounds < 1 {
				return usagef("--rounds %d: want at least 1", o.Rounds)
			}
			switch { // in the options, 0 means the default
			case o.Duration == 0:
				return usagef("--duration 0s: want more than 0")
			case o.Rate == 0:
				return usagef("--rate 0: want more than 0")
			case o.Streams == 0:
				return usagef("--streams 0: want more than 0")
			}
			if err := o.Validate(); err != nil {
				return usageError{err}
			}
			if o.Token, err = token(tokenFile); err != nil {
				return err
			}
			o.Progress = stopwatch(cmd.ErrOrStderr())
			if to.node != "" {
				return out.measure(cmd, func(ctx context.Context) (*result.Run, error) { return to.run(ctx, o, cmd.ErrOrStderr()) })
			}
			return out.measure(cmd, func(ctx context.Context) (*result.Run, error) { return pair.Run(ctx, o) })
		},
	}
	f := cmd.Flags()
	f.SortFlags = false
	f.StringVar(&o.Label, "label", "path", "`NAME` of what is measured, for the result")
	f.StringVar(&tokenFile, "token-file", "", "`FILE` with the token that the server wants")
	f.IntVar(&o.Rounds, "rounds", 5, "number of rounds: how often each measure is taken")
	f.DurationVar(&o.Duration, "duration", time.Second, "counted time of each measure, after a warm-up of a third of it")
	f.IntSliceVar(&o.Sizes, "sizes", []int{64, 1200}, "payloads of the datagrams whose latency is measured, in `BYTES`")
	f.StringSliceVar(&o.Only, "measures", nil, "what to measure, of latency, throughput, rate (the highest without loss; not with --to) (default all)")
	f.IntVar(&o.Streams, "streams", 4, "how many TCP streams and UDP flows run at a time where several do")
	f.Float64Var(&o.Rate, "rate", pair.DefaultRate, "datagrams per second where latency is measured at a fixed rate")
	f.BoolVar(&o.Six, "six", false, "IPv6 only, if HOST is a name with addresses of both families; IPv6 packets of pods with --to")
	f.StringSliceVar(&modes, "modes", nil, "with --to: paths to measure, of direct, udp, vxlan, ipip (default all)")
	_ = cmd.RegisterFlagCompletionFunc("modes", cobra.FixedCompletions(api.BenchModes, cobra.ShellCompDirectiveNoFileComp))
	to.flags(cmd, "HOST")
	out.flags(cmd)
	return cmd
}
