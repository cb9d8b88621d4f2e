package main

import (
	"cmp"
	"fmt"
	"slices"
	"strings"
	"unicode/utf8"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
)

// helpWidth is the width of help texts, in columns: what a plain terminal shows without a break.
const helpWidth = 80

// setHelp gives help texts that width, and lets `tulle help` and `tulle completion` refuse words that they do not know, as all other commands do.
func setHelp(root *cobra.Command) {
	root.SetUsageTemplate(strings.ReplaceAll(root.UsageTemplate(), "FlagUsages", fmt.Sprintf("FlagUsagesWrapped %d", helpWidth)))
	eachCommand(root, func(c *cobra.Command) { c.Long = fill(c.Long, helpWidth) })

	root.SetCompletionCommandGroupID("run")
	root.SetHelpCommandGroupID("run")
	root.InitDefaultCompletionCmd()
	root.InitDefaultHelpCmd()
	for _, c := range root.Commands() {
		switch c.Name() {
		case "completion":
			c.Short = "Print the completion script of a shell"
			c.Args, c.RunE = subcommandArgs, needSubcommand
		case "help":
			c.Run = nil
			c.RunE = func(_ *cobra.Command, args []string) error {
				about, rest, err := root.Find(args)
				if err := cmp.Or(err, subcommandArgs(about, rest)); err != nil {
					return usageError{err}
				}
				about.InitDefaultHelpFlag()
				return about.Help()
			}
		}
	}
}

// plainUsage takes the backticks out of the flags' texts, which are for help alone: shells show these texts beside the completions.
func plainUsage(root *cobra.Command) {
	eachCommand(root, func(c *cobra.Command) {
		c.Flags().VisitAll(func(f *pflag.Flag) { _, f.Usage = pflag.UnquoteUsage(f) })
		c.PersistentFlags().VisitAll(func(f *pflag.Flag) { _, f.Usage = pflag.UnquoteUsage(f) })
	})
}

// completeList completes the last of several values, which commas separate, to those that are not there yet.
func completeList(values []string) cobra.CompletionFunc {
	return func(_ *cobra.Command, _ []string, text string) (out []cobra.Completion, _ cobra.ShellCompDirective) {
		before := text[:strings.LastIndexByte(text, ',')+1]
		for _, v := range values {
			if !slices.Contains(strings.Split(before, ","), v) {
				out = append(out, before+v)
			}
		}
		return out, cobra.ShellCompDirectiveNoFileComp | cobra.ShellCompDirectiveNoSpace
	}
}

func eachCommand(c *cobra.Command, f func(*cobra.Command)) {
	f(c)
	for _, sub := range c.Commands() {
		eachCommand(sub, f)
	}
}

// literal says whether a line of a help text stays as it is: part of a list, an example or a drawing.
func literal(line string) bool { return strings.HasPrefix(line, " ") }

// fill breaks the paragraphs of a help text anew, so that lines have at most width columns.
func fill(text string, width int) string {
	var out, line strings.Builder
	flush := func() {
		if line.Len() > 0 {
			out.WriteString(line.String() + "\n")
		}
		line.Reset()
	}
	for l := range strings.Lines(text) {
		if l = strings.TrimRight(l, "\n"); l == "" || literal(l) {
			flush()
			out.WriteString(l + "\n")
			continue
		}
		for word := range strings.FieldsSeq(l) {
			if line.Len() > 0 && utf8.RuneCountInString(line.String())+1+utf8.RuneCountInString(word) > width {
				flush()
			}
			if line.Len() > 0 {
				line.WriteByte(' ')
			}
			line.WriteString(word)
		}
	}
	flush()
	return strings.TrimSuffix(out.String(), "\n")
}

// indented puts the literal lines of a help text apart, as the code blocks of Markdown that manual pages are made of: man(1) would fill them.
func indented(text string) string {
	var out strings.Builder
	last := "" // the line before, of which kind the next one may be without a gap
	for l := range strings.Lines(text) {
		l = strings.TrimRight(l, "\n")
		if last != "" && l != "" && literal(l) != literal(last) {
			out.WriteString("\n")
		}
		if last = l; literal(l) {
			l = "    " + l
		}
		out.WriteString(l + "\n")
	}
	return strings.TrimSuffix(out.String(), "\n")
}
