package main

import (
	"os"
	"strconv"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/cobra/doc"

	"github.com/tulle-net/tulle/internal/api"
)

// manCommand writes the manual pages that packages install. People read them with man(1), so help does not list it.
func manCommand() *cobra.Command {
	return &cobra.Command{
		Use:    "man DIRECTORY",
		Short:  "Write the manual pages of all commands into a directory",
		Hidden: true,
		Args:   exactly("DIRECTORY"),
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := os.MkdirAll(args[0], 0o755); err != nil {
				return err
			}
			root := cmd.Root()
			root.DisableAutoGenTag = true
			eachCommand(root, func(c *cobra.Command) { c.Long = indented(c.Long) })
			date, err := sourceDate()
			if err != nil {
				return err
			}
			return doc.GenManTree(root, &doc.GenManHeader{Section: "8", Date: &date, Source: "tulle " + api.Version(), Manual: "Tulle"}, args[0])
		},
	}
}

// sourceDate is the date of generated files: SOURCE_DATE_EPOCH, so that two builds of one source are the same
// (reproducible-builds.org), else today.
func sourceDate() (time.Time, error) {
	text := os.Getenv("SOURCE_DATE_EPOCH")
	if text == "" {
		return time.Now(), nil
	}
	seconds, err := strconv.ParseInt(text, 10, 64)
	if err != nil {
		return time.Time{}, usagef("SOURCE_DATE_EPOCH=%q is not a number of seconds since 1970", text)
	}
	return time.Unix(seconds, 0).UTC(), nil
}
