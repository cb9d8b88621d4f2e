package main

import (
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
)

// nearestFlag returns the flag of cmd that is spelt most like name, or "".
func nearestFlag(cmd *cobra.Command, name string) string {
	// cobra suggests among commands only: lend it the flags as commands.
	words := &cobra.Command{SuggestionsMinimumDistance: maxDistance}
	cmd.Flags().VisitAll(func(f *pflag.Flag) {
		words.AddCommand(&cobra.Command{Use: f.Name, Run: func(*cobra.Command, []string) {}})
	})
	if s := words.SuggestionsFor(strings.ReplaceAll(name, "_", "-")); len(s) > 0 {
		return s[0]
	}
	return ""
}
