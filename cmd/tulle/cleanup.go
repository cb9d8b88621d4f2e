package main

import (
	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/tulle-net/tulle/internal/agent"
	"github.com/tulle-net/tulle/internal/config"
)

func cleanupCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "cleanup",
		Short: "Remove what a stopped agent left in this host's network",
		Long: "Remove what a stopped agent left in this host's network. It stays there on purpose, so that pods keep their network: the TUN\n" +
			"device, its addresses and routes, the nft tables, and the programs of the fast path. Sysctls that the agent changed get\n" +
			"their old values. Pods and their interfaces stay. Refused while the agent runs.\n\n" +
			"The state directory stays: this node keeps its address space, and uses it again when the agent is started.\n" +
			"To give it back, run `tulle leave` before you stop the agent.",
		Example: "  # remove Tulle from this host\n  tulle leave && systemctl disable --now tulle && tulle cleanup",
		Args:    exactly(),
	}
	all := pflag.NewFlagSet("agent", pflag.ContinueOnError)
	config.AddFlags(all)
	for _, name := range []string{"config", "tun", "socket"} {
		cmd.Flags().AddFlag(all.Lookup(name))
	}
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		cfg, err := config.Load(cmd.Flags(), "")
		if err != nil {
			return usageError{err}
		}
		if err := agent.Cleanup(cmd.Context(), cfg); err != nil {
			return err
		}
		p := &printer{}
		p.line("nothing of tulle is left in this host's network; the state in %s stays", cfg.StateDir)
		_, err = cmd.OutOrStdout().Write([]byte(p.String()))
		return err
	}
	return cmd
}
