package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"slices"
	"sync"

	"github.com/spf13/cobra"

	"github.com/tulle-net/tulle/bench/pair"
	"github.com/tulle-net/tulle/bench/result"
	"github.com/tulle-net/tulle/internal/api"
)

// benchTo are the flags of `tulle bench run` that make it measure the paths to another member.
type benchTo struct {
	node, socket string
	modes        []string
	mbps         float64 // 0: what the agents allow
}

// toFlags are of use with --to only, and the others without it only.
var toFlags, notToFlags = []string{"modes", "max-mbps", "socket"}, []string{"label", "token-file", "streams"}

func (b *benchTo) flags(cmd *cobra.Command) {
	f := cmd.Flags()
	f.StringVar(&b.node, "to", "", "`NODE`: a member of the cluster, by name, ID or address, to measure instead of HOST")
	f.StringSliceVar(&b.modes, "modes", nil, "with --to: paths to measure, of direct, udp, vxlan, ipip (default all)")
	f.Float64Var(&b.mbps, "max-mbps", 0, "with --to: the most to send, in Mb/s (default what both agents allow, bench_mbps)")
	f.StringVar(&b.socket, "socket", api.DefaultSocket, "with --to: control socket of the agent")
	c := &client{socket: api.DefaultSocket}
	_ = cmd.RegisterFlagCompletionFunc("to", c.nodeNames)
	_ = cmd.RegisterFlagCompletionFunc("modes", cobra.FixedCompletions(api.BenchModes, cobra.ShellCompDirectiveNoFileComp))
	run := cmd.RunE
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		for _, name := range toFlags {
			if b.node == "" && cmd.Flags().Changed(name) {
				return usagef("--%s is of use with --to only", name)
			}
		}
		return run(cmd, args)
	}
}

func (b *benchTo) check(cmd *cobra.Command) error {
	for _, name := range notToFlags {
		if cmd.Flags().Changed(name) {
			return usagef("--%s is of no use with --to", name)
		}
	}
	for _, m := range b.modes {
		if !slices.Contains(api.BenchModes, m) {
			return usagef("--modes: no path %q; there are %v", m, api.BenchModes)
		}
	}
	if b.mbps < 0 {
		return usagef("--max-mbps %v: want 0 (what the agents allow) or more", b.mbps)
	}
	return nil
}

// run opens the paths by the agent, and measures them while its answer lasts.
func (b *benchTo) run(ctx context.Context, o pair.RunOptions, notes io.Writer) (*result.Run, error) {
	o.Progress("asking the agents for paths to " + b.node)
	asked, hangUp := context.WithCancel(context.WithoutCancel(ctx)) // Ctrl-C ends the measuring first
	defer hangUp()
	measuring, stop := context.WithCancelCause(ctx)
	defer stop(nil)
	first, over := make(chan api.BenchEvent, 1), make(chan struct{})
	var once sync.Once
	var failed error
	go func() { // ends with asked
		defer close(over)
		failed = api.NewClient(b.socket).Bench(asked, api.BenchRequest{Node: b.node, Modes: b.modes, Six: o.Six}, func(e api.BenchEvent) error {
			once.Do(func() { first <- e })
			if e.Ended != "" {
				stop(errors.New(e.Ended))
			}
			return nil
		})
		if failed != nil {
			stop(failed)
		}
	}()
	var e api.BenchEvent
	select {
	case e = <-first:
	case <-over:
		return nil, failed
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	o.Token, o.MaxRate = e.Token, float64(e.Mbps)*1e6
	if b.mbps > 0 {
		o.MaxRate = min(o.MaxRate, b.mbps*1e6)
	}
	fmt.Fprintf(notes, "\nmeasuring to %s, held to %s Mb/s and %s exchanges a second\n", e.Node.Name, result.Digits(o.MaxRate/1e6), result.Digits(o.Rate))
	r, err := pair.RunPaths(measuring, o, benchPaths(e))
	hangUp()
	<-over
	if why := context.Cause(measuring); ctx.Err() == nil && why != nil && measuring.Err() != nil && !errors.Is(why, context.Canceled) {
		if err != nil {
			return nil, fmt.Errorf("the benchmark ended early: %w", why)
		}
		r.Warnings = append(r.Warnings, fmt.Sprintf("The run ended early: %v.", why))
	}
	return r, err
}

// benchPaths are the paths of an answer.
func benchPaths(e api.BenchEvent) []pair.Path {
	var out []pair.Path
	for _, w := range e.Ways {
		p := pair.Path{Name: w.Mode, What: "between this member and " + e.Node.Name, From: w.From, To: w.To, MTU: w.MTU, Missing: w.Missing}
		if w.Active {
			p.What += "; pods' packets take it"
		}
		out = append(out, p)
	}
	return out
}

// benchHelperServe answers the measuring traffic of another member, as the agent tells it on in, until in ends.
func benchHelperServe(ctx context.Context, in io.Reader, out io.Writer) error {
	var want api.BenchServe
	dec := json.NewDecoder(in)
	if err := dec.Decode(&want); err != nil {
		return fmt.Errorf("helper serve: %w", err)
	}
	ctx, stop := context.WithTimeout(ctx, want.MaxTime)
	defer stop()
	go func() { // ends with the process
		_, _ = io.Copy(io.Discard, in)
		stop()
	}()
	var work sync.WaitGroup
	listening := make(chan struct{}, len(want.Addresses))
	ports := make([]uint16, len(want.Addresses)) // each is written before listening has its value
	failed := make(chan error, len(want.Addresses))
	for i, a := range want.Addresses {
		work.Go(func() {
			err := pair.Serve(ctx, pair.ServeOptions{
				Address: netip.AddrPortFrom(a, 0).String(), Token: want.Token, MaxTime: want.MaxTime, MaxRate: float64(want.Mbps) * 1e6, Version: api.Version(),
				Listening: func(at netip.AddrPort) { ports[i] = at.Port(); listening <- struct{}{} },
			})
			if err != nil {
				failed <- err
			}
		})
	}
	is := api.BenchServing{Ports: ports}
	var err error
	for range want.Addresses {
		select {
		case <-listening:
		case err = <-failed:
		}
		if err != nil {
			stop()
			is = api.BenchServing{Error: err.Error()}
			break
		}
	}
	err = errors.Join(err, json.NewEncoder(out).Encode(is))
	if err == nil {
		<-ctx.Done()
	}
	work.Wait()
	return err
}
