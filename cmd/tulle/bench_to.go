package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"slices"
	"strings"
	"sync"

	"github.com/spf13/cobra"

	"github.com/tulle-net/tulle/bench"
	"github.com/tulle-net/tulle/bench/pair"
	"github.com/tulle-net/tulle/bench/result"
	"github.com/tulle-net/tulle/internal/api"
)

// benchTo are the flags that make a benchmark measure the paths to another member, over the live network.
type benchTo struct {
	node, socket string
	modes        []string
	mbps         float64 // 0: what the agents allow

	only []string // flags that are of use with --to only
	none []string // flags that are of no use with --to
}

// flags adds them to a command. Its RunE must be set.
func (b *benchTo) flags(cmd *cobra.Command, instead string) {
	f := cmd.Flags()
	f.StringVar(&b.node, "to", "", "`NODE`: a member of the cluster, by name, ID or address, to measure instead of "+instead)
	f.Float64Var(&b.mbps, "max-mbps", 0, "with --to: the most to send, in Mb/s (default what both agents allow, bench_mbps)")
	f.StringVar(&b.socket, "socket", api.DefaultSocket, "with --to: control socket of the agent")
	b.only = append(b.only, "max-mbps", "socket")
	c := &client{socket: api.DefaultSocket}
	_ = cmd.RegisterFlagCompletionFunc("to", c.nodeNames)
	run := cmd.RunE
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		if err := b.check(cmd); err != nil {
			return err
		}
		return run(cmd, args)
	}
}

func (b *benchTo) check(cmd *cobra.Command) error {
	names, text := b.only, "is of use with --to only"
	if b.node != "" {
		names, text = b.none, "is of no use with --to"
	}
	for _, name := range names {
		if cmd.Flags().Changed(name) {
			return usagef("--%s %s", name, text)
		}
	}
	if !(b.mbps >= 0) { // nor what is no number
		return usagef("--max-mbps %v: want 0 (what the agents allow) or more", b.mbps)
	}
	return nil
}

// choose takes the paths to measure, by name; none means all.
func (b *benchTo) choose(modes []string) error {
	for _, m := range modes {
		if !slices.Contains(api.BenchModes, m) {
			return usagef("--modes: no path %q; with --to there are %s", m, strings.Join(api.BenchModes, ", "))
		}
	}
	b.modes = modes
	return nil
}

// instead measures the paths to the member, with what applies of the options of a benchmark in labs.
func (b *benchTo) instead(cmd *cobra.Command, o bench.AllOptions, out *benchOutput) error {
	if err := b.choose(o.Modes); err != nil {
		return err
	}
	p := pair.RunOptions{Host: b.node, Gentle: true, Rounds: o.Rounds, Duration: o.Duration, Rate: pair.DefaultRate, Only: o.Measures, Six: o.Six, Version: o.Version}
	if cmd.Flags().Changed("sizes") {
		p.Sizes = o.Sizes
	}
	if err := p.Validate(); err != nil {
		return usageError{err}
	}
	p.Progress = stopwatch(cmd.ErrOrStderr())
	return out.measure(cmd, func(ctx context.Context) (*result.Run, error) { return b.run(ctx, p, cmd.ErrOrStderr()) })
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
