package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/spf13/cobra"

	"github.com/tulle-net/tulle/bench"
	"github.com/tulle-net/tulle/internal/lab"
)

func labDemo(name *string) *cobra.Command {
	var f labFlags
	cmd := &cobra.Command{
		Use:   "demo",
		Short: "Build a lab, show its pods at work, remove it; takes half a minute",
		Args:  exactly(),
		RunE: func(cmd *cobra.Command, _ []string) error {
			if !cmd.Flags().Changed("name") {
				*name = "tulle-demo" // beside a lab that is up
			}
			o, err := f.options(*name)
			if err != nil {
				return err
			}
			o.Replace = true // a killed demo leaves its lab behind
			ctx, stop := interruptible(cmd)
			defer stop()
			d := demo{w: cmd.OutOrStdout(), start: time.Now()}
			if err := d.run(ctx, o); err != nil {
				return details(cmd, err)
			}
			return nil
		},
	}
	f.add(cmd)
	return cmd
}

// demo is one run of `tulle lab demo`.
type demo struct {
	w     io.Writer
	start time.Time
	l     *lab.Lab
}

// title prints the title of a section.
func (d *demo) title(format string, args ...any) {
	s := fmt.Sprintf(format, args...)
	fmt.Fprintf(d.w, "\n%s\n%s\n", s, strings.Repeat("─", utf8.RuneCountInString(s)))
}

func (d *demo) run(ctx context.Context, o lab.Options) (err error) {
	d.title("1. Up: %d hosts in %d subnets behind a router, a real agent on each", o.Nodes, o.Subnets)
	if d.l, err = lab.Up(ctx, o, stopwatch(d.w)); err != nil {
		return err
	}
	defer func() {
		// Also after Ctrl-C: nothing stays.
		if derr := d.l.Down(context.WithoutCancel(ctx)); derr != nil {
			err = errors.Join(err, derr)
		} else if err == nil {
			d.title("5. Down: agents, namespaces and files are gone")
			fmt.Fprintf(d.w, "%.1f s in total. To try it yourself: %s lab up\n", time.Since(d.start).Seconds(), os.Args[0])
		}
	}()
	fmt.Fprintln(d.w)
	show(d.w, func(p *printer) { printTopology(p, d.l) })
	for _, step := range []func(context.Context) error{d.pings, d.status, d.latency} {
		if err := step(ctx); err != nil {
			return err
		}
	}
	return nil
}

// pings shows that every pod reaches every pod, and which source address arrives.
func (d *demo) pings(ctx context.Context) error {
	d.title("2. Every pod pings every pod. SEEN AS is the source address that arrived: there is no NAT")
	pongs, err := d.l.PingAll(ctx, false)
	if err != nil {
		return err
	}
	t := table{head: []string{"FROM", "TO", "ADDRESS", "RTT", "SEEN AS", "WHICH IS"}, right: []bool{3: true}}
	own := map[string]string{}
	for _, p := range d.l.Pods() {
		for _, a := range p.Addresses {
			own[a.String()] = p.Name
		}
	}
	bad := 0
	for _, p := range pongs {
		verdict := "the pod's own address"
		switch {
		case p.Err != nil:
			verdict = p.Err.Error()
			bad++
		case own[p.Source.String()] != p.From:
			verdict = "NOT THE POD'S OWN ADDRESS"
			bad++
		}
		source := none
		if p.Source.IsValid() {
			source = p.Source.String()
		}
		t.row(p.From, p.To, p.Addr.String(), micros(p.RTT), source, verdict)
	}
	show(d.w, func(p *printer) { p.table(&t) })
	if bad > 0 {
		return fmt.Errorf("%d of %d pings failed; `%s lab up`, then `%[3]s lab status`, shows the status of the agents", bad, len(pongs), os.Args[0])
	}
	return nil
}

// status shows the status screen of an agent.
func (d *demo) status(ctx context.Context) error {
	h := d.l.Hosts()[0]
	d.title("3. The agent on %s: tulle status", h.Name)
	c, err := d.l.Client(h.Name)
	if err != nil {
		return err
	}
	st, err := c.Status(ctx)
	if err != nil {
		return err
	}
	show(d.w, func(p *printer) { printStatus(p, st) })
	return nil
}

// latency compares the encapsulations between two pods of different subnets.
func (d *demo) latency(ctx context.Context) error {
	const each = 400 * time.Millisecond
	from, to, ok := d.distantPods()
	if !ok {
		return nil
	}
	ends := bench.Ends{From: from.Name, To: to.Name, FromAddr: from.Addresses[0], ToAddr: to.Addresses[0], Do: d.l.Do}
	d.title("4. Latency from %s to %s, over the router: round trip of 64-byte UDP packets", from.Name, to.Name)
	self, err := os.Executable()
	if err != nil {
		return err
	}
	var awake string
	if how, sleep, err := bench.StartAwake(ctx, []string{self, "bench", "helper"}); err == nil {
		defer sleep()
		awake = how
	} else { // where /proc/sys/kernel cannot be written, for example
		awake = fmt.Sprintf("CPUs may halt in between (%v)", err)
	}
	t := table{head: []string{"", "MEDIAN", "99 %", "LOST", "TIMES NO TUNNEL"}, right: []bool{1: true, 2: true, 3: true}}
	var base float64
	pinned := false
	whole := func(half float64) string { return micros(time.Duration(2e3 * half)) }
	measure := func(name string, pids []int) error {
		r, err := bench.RoundTrips(ctx, &ends, pids, each)
		if err != nil {
			return fmt.Errorf("latency, %s: %w", name, err)
		}
		if base == 0 {
			base, pinned = r.At(50), r.Pinned
		}
		t.row(name, whole(r.At(50)), whole(r.At(99)), fmt.Sprint(r.Lost), fmt.Sprintf("%.1f", r.At(50)/base))
		return nil
	}
	for _, b := range []struct {
		name   string
		set    func(context.Context) (func() error, error)
		agents bool // carry it
	}{
		{"no tunnel", d.l.DirectRoutes, false},
		{"kernel VXLAN", d.l.KernelVXLAN, false},
		{"tulle udp", d.pin("udp"), true},
		{"tulle vxlan", d.pin("vxlan"), true},
		{"tulle ipip", d.pin("ipip"), true},
	} {
		undo, err := b.set(ctx)
		if err != nil {
			return fmt.Errorf("set up %s: %w", b.name, err)
		}
		var pids []int
		if b.agents {
			pids = d.agents(from.Host, to.Host)
		}
		if err := errors.Join(measure(b.name, pids), undo()); err != nil {
			return err
		}
	}
	show(d.w, func(p *printer) { p.table(&t) })
	where := "Each side runs on its own CPUs"
	if !pinned {
		where = "Both sides share this machine's CPUs"
	}
	fmt.Fprintf(d.w, "%s; %s. `tulle bench all` takes more measures, in interleaved rounds.\n", where, awake)
	return nil
}

// agents are the process IDs of the agents on these hosts.
func (d *demo) agents(hosts ...string) (pids []int) {
	for _, name := range hosts {
		for _, h := range d.l.Hosts() {
			if h.Name == name {
				pids = append(pids, h.PID)
			}
		}
	}
	return pids
}

// pin restarts the agents with one encapsulation.
func (d *demo) pin(mode string) func(context.Context) (func() error, error) {
	return func(ctx context.Context) (func() error, error) {
		if err := d.l.RestartAgents(ctx, "--paths", mode); err != nil {
			return nil, err
		}
		return func() error { return nil }, nil
	}
}

// distantPods finds two pods on hosts of different subnets, or at least of different hosts.
func (d *demo) distantPods() (from, to lab.Pod, ok bool) {
	pods := d.l.Pods()
	subnet := map[string]int{}
	for _, h := range d.l.Hosts() {
		subnet[h.Name] = h.Subnet
	}
	for _, p := range pods {
		if subnet[p.Host] != subnet[pods[0].Host] {
			return pods[0], p, true
		}
		if p.Host != pods[0].Host {
			from, to, ok = pods[0], p, true
		}
	}
	return from, to, ok
}

func micros(t time.Duration) string {
	if t == 0 {
		return none
	}
	return fmt.Sprintf("%.1f µs", float64(t.Nanoseconds())/1e3)
}
