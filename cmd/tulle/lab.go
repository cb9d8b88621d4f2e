package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/tulle-net/tulle/internal/config"
	"github.com/tulle-net/tulle/internal/lab"
)

const labLong = `Builds a small data centre on this one machine: hosts in subnets, a router between them and pods on the hosts, all of
them network namespaces, with a real agent for every host. It needs root and nothing but the kernel.

      subnet 1                                   subnet 2
  h1 ──┐                                            ┌── h2
  h3 ──┴── bridge ────────── router ────────── bridge ──┴── h4
  │
  p1a  pod a of h1

Nothing is made in the machine's own network namespace, so labs of different --name live side by side and leave nothing
behind. If a lab's maker is killed halfway, the next "tulle lab up" of that name cleans up after it.`

// labCommand is `tulle lab`.
func labCommand() *cobra.Command {
	name := new(string)
	cmd := group("lab", "Build hosts, a router and pods on this machine, to try things",
		labUp(name), labStatus(name), labExec(name), labDown(name), labList(), labDemo(name))
	cmd.Long = labLong
	cmd.Example = `  tulle lab demo
  tulle lab up --nodes 4
  tulle lab exec h1 -- tulle status
  tulle lab down`
	cmd.PersistentFlags().StringVar(name, "name", lab.DefaultName, "`NAME` of the lab, the prefix of everything that it creates")
	_ = cmd.RegisterFlagCompletionFunc("name", func(*cobra.Command, []string, string) ([]string, cobra.ShellCompDirective) {
		names, _ := lab.List()
		return names, cobra.ShellCompDirectiveNoFileComp
	})
	return cmd
}

// labFlags are the flags that describe a lab.
type labFlags struct {
	nodes, subnets, pods, mtu int
	underlay, overlay, paths  string
	wire                      string
	agentArgs                 []string
	timeout                   time.Duration
}

func (f *labFlags) add(cmd *cobra.Command) {
	fl := cmd.Flags()
	fl.SortFlags = false
	fl.IntVar(&f.nodes, "nodes", 3, "number of hosts, spread over the subnets in turn")
	fl.IntVar(&f.subnets, "subnets", 2, "number of subnets behind the router")
	fl.IntVar(&f.pods, "pods", 1, "number of pods on each host")
	fl.IntVar(&f.mtu, "mtu", 1500, "MTU of the links between hosts, bytes")
	addWire(cmd, &f.wire)
	fl.StringVar(&f.underlay, "underlay", "4,6", "IP families between hosts: 4, 6 or both")
	fl.StringVar(&f.overlay, "overlay", "4,6", "IP families of pods: 4, 6 or both")
	fl.StringVar(&f.paths, "paths", "", "the agents' --paths: encapsulations in order of preference; one name pins it")
	fl.StringArrayVar(&f.agentArgs, "agent-arg", nil, "additional argument for every agent, such as --agent-arg=--log-level=debug; repeatable")
	fl.DurationVar(&f.timeout, "timeout", time.Minute, "how long to wait for agents and pods")
}

// addWire adds --wire.
func addWire(cmd *cobra.Command, wire *string) {
	cmd.Flags().StringVar(wire, "wire", string(lab.WireCut),
		"what the links between hosts carry: frames of the MTU, as between NICs (cut), or super-packets of 64 KiB (whole)")
	_ = cmd.RegisterFlagCompletionFunc("wire", cobra.FixedCompletions(lab.Wires(), cobra.ShellCompDirectiveNoFileComp))
}

func (f *labFlags) options(name string) (lab.Options, error) {
	for _, v := range []struct { // in the lab's options, 0 means the default; who writes 0 does not mean that
		flag       string
		has, least int
	}{{"--nodes", f.nodes, 1}, {"--subnets", f.subnets, 1}, {"--pods", f.pods, 0}, {"--mtu", f.mtu, 1280}} {
		if v.has < v.least {
			return lab.Options{}, usagef("%s %d: want at least %d", v.flag, v.has, v.least)
		}
	}
	if f.timeout <= 0 {
		return lab.Options{}, usagef("--timeout %v: want more than 0", f.timeout)
	}
	if err := f.checkAgents(); err != nil {
		return lab.Options{}, err
	}
	under, err := families("--underlay", f.underlay)
	if err != nil {
		return lab.Options{}, err
	}
	over, err := families("--overlay", f.overlay)
	if err != nil {
		return lab.Options{}, err
	}
	pods := f.pods
	if pods == 0 {
		pods = -1
	}
	o := lab.Options{
		Name: name, Nodes: f.nodes, Subnets: f.subnets, Pods: pods, MTU: f.mtu, Underlay: under, Overlay: over,
		Paths: f.paths, Wire: lab.Wire(f.wire), ExtraAgentArgs: f.agentArgs, Timeout: f.timeout,
	}
	if err := o.Validate(); err != nil {
		return o, usageError{err}
	}
	return o, nil
}

// checkAgents refuses what the agents would refuse, before anything is made.
func (f *labFlags) checkAgents() error {
	fl := pflag.NewFlagSet("agent", pflag.ContinueOnError)
	fl.Usage = func() {}
	config.AddFlags(fl)
	args := f.agentArgs
	if f.paths != "" {
		args = append([]string{"--paths=" + f.paths}, args...)
	}
	err := fl.Parse(args)
	if err == nil {
		_, err = config.Load(fl, "/dev/null")
	}
	if err != nil {
		return usagef("the agents would refuse this: %w", err)
	}
	return nil
}

func families(flag, s string) (lab.Families, error) {
	var f lab.Families
	for part := range strings.SplitSeq(s, ",") {
		switch strings.TrimSpace(part) {
		case "4":
			f.V4 = true
		case "6":
			f.V6 = true
		default:
			return f, usagef("%s %q: write 4, 6 or 4,6", flag, s)
		}
	}
	return f, nil
}

func labUp(name *string) *cobra.Command {
	var f labFlags
	cmd := &cobra.Command{
		Use:   "up",
		Short: "Build a lab and wait until all its pods reach each other",
		Args:  exactly(),
		RunE: func(cmd *cobra.Command, _ []string) error {
			o, err := f.options(*name)
			if err != nil {
				return err
			}
			o.KeepFailed = true
			ctx, stop := interruptible(cmd)
			defer stop()
			out := cmd.OutOrStdout()
			l, err := lab.Up(ctx, o, stopwatch(out))
			if err != nil {
				return details(cmd, err)
			}
			fmt.Fprintln(out)
			show(out, func(p *printer) { printTopology(p, l) })
			fmt.Fprintln(out, "\nAll pods reach each other. Try:")
			for _, line := range suggestions(l) {
				fmt.Fprintln(out, "  "+line)
			}
			return nil
		},
	}
	f.add(cmd)
	return cmd
}

// interruptible returns the command's context, cancelled by Ctrl-C, so that the command can clean up.
func interruptible(cmd *cobra.Command) (context.Context, context.CancelFunc) {
	signals := []os.Signal{os.Interrupt, syscall.SIGTERM}
	if !signal.Ignored(syscall.SIGHUP) { // as nohup has it
		signals = append(signals, syscall.SIGHUP)
	}
	return signal.NotifyContext(cmd.Context(), signals...)
}

// details prints an error's text after its first line, such as the end of an agent's log, and returns the first line as the
// error of the command.
func details(cmd *cobra.Command, err error) error {
	first, rest, ok := strings.Cut(err.Error(), "\n")
	if !ok {
		return err
	}
	fmt.Fprintln(cmd.ErrOrStderr(), rest)
	return errors.New(first)
}

// show prints what fn writes, wrapped to the width of out.
func show(out io.Writer, fn func(*printer)) {
	p := &printer{width: width(out), now: time.Now()}
	fn(p)
	_, _ = io.WriteString(out, p.String())
}

// stopwatch prints each step with the time since the start.
func stopwatch(w io.Writer) lab.Progress {
	start := time.Now()
	return func(step string) { fmt.Fprintf(w, "%5.1f s  %s\n", time.Since(start).Seconds(), step) }
}

// suggestions returns commands to try in this lab.
func suggestions(l *lab.Lab) []string {
	flag := ""
	if l.Name() != lab.DefaultName {
		flag = " --name " + l.Name()
	}
	tulle, hosts, pods := os.Args[0], l.Hosts(), l.Pods()
	exec := tulle + " lab exec" + flag + " "
	out := []string{tulle + " lab status" + flag}
	if last := hosts[len(hosts)-1]; len(hosts) > 1 {
		out = append(out,
			exec+hosts[0].Name+" -- tulle peers",
			exec+hosts[0].Name+" -- tulle ping "+last.Name)
		if len(pods) > 1 {
			out = append(out, fmt.Sprintf("%s%s -- ping -c3 %s", exec, pods[0].Name, pods[len(pods)-1].Addresses[0]))
		}
	}
	return append(out, tulle+" lab down"+flag)
}

// printTopology shows the hosts and pods with their subnets and addresses.
func printTopology(p *printer, l *lab.Lab) {
	t := table{head: []string{"HOST", "SUBNET", "UNDERLAY", "POD", "ADDRESSES"}}
	pods := l.Pods()
	for _, h := range l.Hosts() {
		row := []string{h.Name, fmt.Sprint(h.Subnet), list(h.Underlay, " ")}
		none := true
		for _, pod := range pods {
			if pod.Host == h.Name {
				t.row(append(row, pod.Name, list(pod.Addresses, " "))...)
				row, none = []string{"", "", ""}, false
			}
		}
		if none {
			t.row(append(row, "", "")...)
		}
	}
	p.table(&t)
}

func labStatus(name *string) *cobra.Command {
	c := new(client)
	cmd := &cobra.Command{
		Use:   "status",
		Short: "Show hosts, pods and the status of each agent",
		Args:  exactly(),
		RunE: func(cmd *cobra.Command, _ []string) error {
			if c.output != "table" && c.output != "json" {
				return usagef("--output %q: want table or json", c.output)
			}
			l, err := lab.Open(*name)
			if err != nil {
				return err
			}
			ctx, cancel := context.WithTimeout(cmd.Context(), quickTimeout)
			defer cancel()
			st := l.Status(ctx)
			if err := c.print(cmd.OutOrStdout(), st, func(p *printer) { printLabStatus(p, l, &st) }); err != nil {
				return err
			}
			if !st.Healthy() {
				return errUnhealthy
			}
			return nil
		},
	}
	cmd.Flags().StringVarP(&c.output, "output", "o", "table", "`FORM` of the output: table or json")
	return cmd
}

func printLabStatus(p *printer, l *lab.Lab, st *lab.Status) {
	p.line("lab %s: %s, %s, %s\n", st.Name, plural(len(st.Hosts), "host"), plural(st.Subnets, "subnet"), plural(len(st.Pods), "pod"))
	printTopology(p, l)
	p.line("")
	t := table{head: []string{"AGENT", "PID", "STATE", "ALIVE", "SPACE", "PATHS", "PROBLEMS"}}
	var notes []string
	for _, h := range st.Hosts {
		state := map[bool]string{true: "no answer", false: "stopped"}[h.Runs]
		if h.Agent == nil {
			if h.Error == "" {
				continue // a bare lab
			}
			t.row(h.Name, fmt.Sprint(h.PID), state, none, none, none, "1")
			notes = append(notes, fmt.Sprintf("%s: %s; its log: %s", h.Name, h.Error, h.Log))
			continue
		}
		a := h.Agent
		if state = "ready"; !a.Ready {
			state = "not ready"
		}
		var paths []string
		for _, peer := range a.Peers {
			paths = append(paths, peer.Name+":"+orNone(peer.Path.Mode))
		}
		t.row(h.Name, fmt.Sprint(h.PID), state, fmt.Sprintf("%d/%d", a.Cluster.Alive, a.Cluster.Members), list(a.Node.Prefixes, "\n"),
			strings.Join(paths, "\n"), fmt.Sprint(len(a.Problems)))
		for _, pr := range a.Problems {
			notes = append(notes, fmt.Sprintf("%s: %s\n→ %s", h.Name, pr.What, pr.Remedy))
		}
	}
	p.table(&t)
	for _, n := range notes {
		p.line("\n%s", n)
	}
}

func labExec(name *string) *cobra.Command {
	return &cobra.Command{
		Use:   "exec HOST|POD -- COMMAND [ARGUMENT…]",
		Short: "Run a command on a host, in a pod or on the router (r)",
		Long: `Runs a command in the network namespace of a host (h1), a pod (p1a) or the router (r). On a host, and in its pods, the other
tulle commands talk to that host's agent; "tulle" is this very program even if it is not in the PATH. The exit code is
the command's, and 127 if this machine has no such command.`,
		Example: `  tulle lab exec h1 -- tulle status
  tulle lab exec p1a`,
		Args: func(cmd *cobra.Command, args []string) error {
			if len(args) == 0 {
				return fmt.Errorf("%s needs a host (h1), a pod (p1a) or the router (r); see `%[1]s --help`", cmd.CommandPath())
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			l, err := lab.Open(*name)
			if err != nil {
				return err
			}
			argv := args[1:]
			if len(argv) == 0 {
				argv = []string{cmp.Or(os.Getenv("SHELL"), "/bin/sh")}
			}
			if argv[0] == "tulle" {
				if argv[0], err = os.Executable(); err != nil {
					return err
				}
			}
			// Ctrl-C goes to the command; it must not end this process first.
			caught := make(chan os.Signal, 1)
			signal.Notify(caught, os.Interrupt, syscall.SIGQUIT)
			defer signal.Stop(caught)
			code, err := l.Exec(cmd.Context(), args[0], argv, lab.Stdio{In: cmd.InOrStdin(), Out: cmd.OutOrStdout(), Err: cmd.ErrOrStderr()})
			return ended(cmd, argv[0], code, err)
		},
	}
}

func labDown(name *string) *cobra.Command {
	return &cobra.Command{
		Use:   "down",
		Short: "Remove a lab: agents, namespaces, files",
		Args:  exactly(),
		RunE: func(cmd *cobra.Command, _ []string) error {
			names, err := lab.List()
			if err != nil {
				return err
			}
			existed := slices.Contains(names, *name)
			if err := lab.Down(cmd.Context(), *name); err != nil {
				return err
			}
			what := map[bool]string{true: "lab %s is gone\n", false: "there was no lab %s\n"}[existed]
			fmt.Fprintf(cmd.OutOrStdout(), what, *name)
			return nil
		},
	}
}

func labList() *cobra.Command {
	return &cobra.Command{
		Use:   "list",
		Short: "List the labs on this machine",
		Args:  exactly(),
		RunE: func(cmd *cobra.Command, _ []string) error {
			names, err := lab.List()
			for _, n := range names {
				fmt.Fprintln(cmd.OutOrStdout(), n)
			}
			return err
		},
	}
}
