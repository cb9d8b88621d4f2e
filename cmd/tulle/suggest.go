package main

import (
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/tulle-net/tulle/internal/config"
)

// nearestFlag returns the flag of cmd with the smallest edit distance to name, or "".
func nearestFlag(cmd *cobra.Command, name string) string {
	name, _, _ = strings.Cut(name, "=")
	return config.Nearest(strings.ReplaceAll(name, "_", "-"), func(yield func(string) bool) {
		more := true
		cmd.Flags().VisitAll(func(f *pflag.Flag) { more = more && yield(f.Name) })
	})
}
