package main

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/tulle-net/tulle/internal/config"
	"github.com/tulle-net/tulle/internal/doctor"
)

// doctorFlags are the keys of the agent's configuration that the doctor needs to know.
var doctorFlags = []string{"config", "node-name", "join", "cluster-cidr", "pod-cidr", "gossip-port", "udp-port", "vxlan-port", "paths", "tun", "cni-dir", "underlay", "gossip-key-file", "metrics", "state-dir"}

// doctorTimeout leaves time for an agent and a name server that hang.
const doctorTimeout = 20 * time.Second

func doctorCommand() *cobra.Command {
	c := new(client)
	fix := false
	cmd := &cobra.Command{
		Use:   "doctor [CHECK…]",
		Short: "Check host and cluster: what is wrong, and what mends it",
		Long: "Check this host and, through the agent, the cluster. Each check is ok, warning, failed or skipped, and shows what was seen.\n" +
			"What is wrong comes with its remedy and, where there is one, the command that does it. Without a running agent only\n" +
			"the host is checked, by the configuration file and the flags. That no agent runs is a failure where one has run before\n" +
			"and has not left its cluster, and a warning elsewhere.\n\n" +
			"Without --fix nothing is changed. With it, sysctls get the values that the agent sets while it runs, and leaked pod\n" +
			"addresses are released; what was changed is shown.\n\n" +
			"The exit code is 0 if no check failed (warnings do not count), 1 if one did, and 2 for wrong usage.\n\nChecks:\n" + checkList(),
		Example: "  tulle doctor                   # all checks\n  tulle doctor paths ports mtu   # some of them\n  tulle doctor -o json | jq -r '.results[].findings[].command // empty'",
		ValidArgsFunction: func(_ *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
			var names []string
			for _, n := range doctor.Names() {
				if !slices.Contains(args, n[0]) {
					names = append(names, n[0]+"\t"+n[1])
				}
			}
			return names, cobra.ShellCompDirectiveNoFileComp
		},
	}
	all := pflag.NewFlagSet("agent", pflag.ContinueOnError)
	config.AddFlags(all)
	for _, name := range doctorFlags {
		cmd.Flags().AddFlag(all.Lookup(name))
	}
	c.flags(cmd, doctorTimeout)
	cmd.Flags().BoolVar(&fix, "fix", false, "mend what is safe to mend")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		if c.output != "table" && c.output != "json" {
			return usagef("--output %q: want table or json", c.output)
		}
		o := doctorOptions(cmd.Flags())
		o.Checks, o.Fix = args, fix
		if cmd.Flags().Changed("socket") || o.Socket == "" {
			o.Socket = c.socket
		}
		if c.timeout <= 0 {
			return usagef("--timeout %v: want more than 0, such as 10s", c.timeout)
		}
		ctx, cancel := context.WithTimeout(cmd.Context(), c.timeout)
		defer cancel()
		r, err := doctor.Run(ctx, o)
		if err != nil {
			return usageError{err}
		}
		if err := c.print(cmd.OutOrStdout(), r, func(p *printer) { printDoctor(p, r) }); err != nil {
			return err
		}
		if !r.Healthy() {
			return errUnhealthy
		}
		return nil
	}
	return cmd
}

// doctorOptions reads the configuration. One that cannot be read is a finding, and the defaults are used.
func doctorOptions(flags *pflag.FlagSet) doctor.Options {
	cfg, err := config.Load(flags, "")
	o := doctor.Options{ConfigErr: err, ConfigFile: config.DefaultFile}
	if f := flags.Lookup("config"); f != nil {
		o.ConfigFile = f.Value.String()
	}
	if err != nil {
		none := pflag.NewFlagSet("defaults", pflag.ContinueOnError)
		config.AddFlags(none)
		if cfg, err = config.Load(none, "/dev/null"); err != nil {
			return o
		}
	}
	o.Tun, o.NodeName, o.ClusterCIDRs, o.PodCIDRs, o.Join = cfg.Tun, cfg.NodeName, cfg.ClusterCIDRs, cfg.PodCIDRs, cfg.Join
	o.GossipPort, o.UDPPort, o.VXLANPort, o.Paths, o.CNIDir, o.CNIBinDir = cfg.GossipPort, cfg.UDPPort, cfg.VXLANPort, cfg.Paths, cfg.CNIDir, cfg.CNIBinDir
	o.KeyFile, o.Metrics, o.Underlay, o.UnderlayAddrs = cfg.GossipKeyFile, cfg.Metrics, cfg.Underlay.Interface, cfg.Underlay.Addresses
	if cfg.Bootstrap {
		o.ClusterCIDRs = cfg.BootstrapCIDRs()
	}
	o.Socket, o.StateDir = cfg.Socket, cfg.StateDir
	return o
}

func checkList() string {
	var b strings.Builder
	for _, n := range doctor.Names() {
		fmt.Fprintf(&b, "  %-13s %s\n", n[0], n[1])
	}
	return strings.TrimRight(b.String(), "\n")
}

// printDoctor shows the checks in a table, and below it what they found. Commands are not wrapped, so that they can be pasted.
func printDoctor(p *printer, r doctor.Report) {
	t := table{head: []string{"CHECK", "STATE", "SEEN"}}
	for _, x := range r.Results {
		t.row(x.Check, stateWord(x.State), x.Seen)
	}
	p.table(&t)
	for _, x := range r.Results {
		n := shown(len(x.Findings))
		for _, f := range x.Findings[:n] {
			p.line("\n%s %s: %s", stateWord(f.State), x.Check, f.What)
			if f.Remedy != f.Command {
				p.line("  → %s", f.Remedy)
			}
			if f.Command != "" {
				p.WriteString("  $ " + f.Command + "\n")
			}
		}
		if more := len(x.Findings) - n; more > 0 {
			p.line("\n%s: and %d more like these: `tulle doctor %[1]s -o json` has all", x.Check, more)
		}
		for _, f := range x.Fixed {
			p.line("\nfixed %s: %s", x.Check, f)
		}
	}
	p.line("\n%d ok, %s, %d failed, %d skipped", r.OK, plural(r.Warnings, "warning"), r.Failed, r.Skipped)
}

// stateWord makes a failure easy to see.
func stateWord(s doctor.State) string {
	if s == doctor.Failed {
		return "FAILED"
	}
	return string(s)
}
