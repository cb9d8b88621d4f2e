package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"

	"github.com/spf13/cobra"

	"github.com/tulle-net/tulle/internal/api"
)

// Exit codes, a stable part of the command line interface.
const (
	exitOK     = 0
	exitFailed = 1
	exitUsage  = 2

	exitNoCommand = 127 // of `pod exec` and `lab exec`, as of shells
	maxDistance   = 3   // edit distance between a mistyped word and a suggestion
)

// errUnhealthy ends a command with exit code 1 without an error line: the command has printed its result.
var errUnhealthy = errors.New("unhealthy")

// usageError ends a command with exit code 2.
type usageError struct{ error }

func (e usageError) Unwrap() error { return e.error }

// exitCode ends a command silently with the exit code of another program that it ran.
type exitCode int

func (e exitCode) Error() string { return fmt.Sprintf("exit code %d", int(e)) }

func usagef(format string, args ...any) error { return usageError{fmt.Errorf(format, args...)} }

// run is the whole program: it returns the exit code.
func run(ctx context.Context, args []string, in io.Reader, out, errOut io.Writer) int {
	root := rootCommand()
	if len(args) > 0 && (args[0] == cobra.ShellCompRequestCmd || args[0] == cobra.ShellCompNoDescRequestCmd) {
		plainUsage(root)
	}
	root.SetArgs(args)
	root.SetIn(in)
	root.SetOut(out)
	root.SetErr(errOut)
	err := root.ExecuteContext(ctx)
	if err == nil {
		return exitOK
	}
	if code, ok := errors.AsType[exitCode](err); ok {
		return int(code)
	}
	if !errors.Is(err, errUnhealthy) {
		fmt.Fprintf(errOut, "tulle: %s\n", oneLine(err.Error()))
	}
	if _, ok := errors.AsType[usageError](err); ok || api.CodeOf(err) == api.CodeUsage {
		return exitUsage
	}
	return exitFailed
}

// oneLine makes an error one line, even if a library put line breaks into it.
func oneLine(s string) string { return strings.Join(strings.Fields(s), " ") }

func rootCommand() *cobra.Command {
	root := &cobra.Command{
		Use:   "tulle",
		Short: "A pod network for Linux hosts: pods on all hosts reach each other, without NAT",
		Long: "A pod network for Linux hosts: pods on all hosts reach each other by their own addresses, without NAT. Each host runs `tulle agent`; " +
			"the other commands ask or change it over its control socket, or work on this host alone.\n\n" +
			"Exit codes: 0 all is well, 1 something failed or is unhealthy, 2 wrong usage. `tulle pod exec` and `tulle lab exec` end with the code of " +
			"the command that they run. Commands that print a table take -o json.\n\n" +
			"Files:\n" +
			"  /etc/tulle/tulle.yaml   the configuration of the agent (optional)\n" +
			"  /run/tulle/tulle.sock   the control socket\n" +
			"  /var/lib/tulle          this node's identity, address space and allocations\n" +
			"  /usr/share/doc/tulle    the documentation of the package",
		Example: "  tulle lab demo                             # see it work on this machine\n" +
			"  tulle agent --bootstrap                    # on the first host\n" +
			"  tulle agent --join host-a                  # on each other host\n" +
			"  tulle status                               # how it is, what is wrong\n" +
			"  tulle pod add web --new                    # a pod",
		Version:       api.Version(),
		SilenceErrors: true,
		SilenceUsage:  true,
		Args:          subcommandArgs,
		RunE:          needSubcommand,
	}
	root.SetVersionTemplate("tulle {{.Version}}\n")
	root.SetFlagErrorFunc(flagError)
	root.AddGroup(
		&cobra.Group{ID: "look", Title: "Inspect:"},
		&cobra.Group{ID: "change", Title: "Change:"},
		&cobra.Group{ID: "run", Title: "Run:"},
	)
	add := func(group string, cmds ...*cobra.Command) {
		for _, c := range cmds {
			c.GroupID = group
			root.AddCommand(c)
		}
	}
	add("look", statusCommand(), doctorCommand(), peersCommand(), routeCommand(), pingCommand(), captureCommand(), ipamCommand(), reportCommand(), versionCommand())
	add("change", keysCommand(), externalCommand(), podCommand(), forgetCommand(), leaveCommand(), reloadCommand(), logLevelCommand(), cleanupCommand())
	add("run", agentCommand(), labCommand(), benchCommand())
	root.AddCommand(manCommand())
	setHelp(root)
	argsAreUsage(root)
	return root
}

// argsAreUsage turns argument errors of all commands into usage errors.
func argsAreUsage(c *cobra.Command) {
	if check := c.Args; check != nil {
		c.Args = func(cmd *cobra.Command, args []string) error {
			if err := check(cmd, args); err != nil {
				return usageError{err}
			}
			return nil
		}
	}
	for _, sub := range c.Commands() {
		argsAreUsage(sub)
	}
}

// group makes a command that has only subcommands.
func group(use, short string, subs ...*cobra.Command) *cobra.Command {
	c := &cobra.Command{Use: use, Short: short, Args: subcommandArgs, RunE: needSubcommand}
	c.AddCommand(subs...)
	return c
}

// subcommandArgs refuses unknown subcommands, and suggests a known one.
func subcommandArgs(cmd *cobra.Command, args []string) error {
	if len(args) == 0 {
		return nil
	}
	remedy := ""
	cmd.SuggestionsMinimumDistance = min(maxDistance, (len(args[0])+1)/2)
	if s := cmd.SuggestionsFor(args[0]); len(s) > 0 {
		remedy = fmt.Sprintf("did you mean %q? ", s[0])
	}
	return fmt.Errorf("unknown command %q for %q; %ssee `%s --help`", args[0], cmd.CommandPath(), remedy, cmd.CommandPath())
}

func needSubcommand(cmd *cobra.Command, _ []string) error {
	var names []string
	for _, c := range cmd.Commands() {
		if c.IsAvailableCommand() {
			names = append(names, c.Name())
		}
	}
	return usagef("%s needs a command: one of %s; see `%s --help`", cmd.CommandPath(), strings.Join(names, ", "), cmd.CommandPath())
}

// exactly requires one argument for each name. The names describe the arguments in errors.
func exactly(names ...string) cobra.PositionalArgs {
	return func(cmd *cobra.Command, args []string) error {
		switch {
		case len(args) == len(names):
			return nil
		case len(names) == 0:
			return fmt.Errorf("%s takes no arguments, not %q; see `%s --help`", cmd.CommandPath(), args, cmd.CommandPath())
		case len(args) < len(names):
			return fmt.Errorf("%s needs %s; see `%s --help`", cmd.CommandPath(), strings.Join(names[len(args):], " and "), cmd.CommandPath())
		}
		return fmt.Errorf("%s takes only %s, not %q as well; see `%s --help`", cmd.CommandPath(), strings.Join(names, " and "),
			args[len(names):], cmd.CommandPath())
	}
}

// flagError adds the flag that was probably meant, and points to --help.
func flagError(cmd *cobra.Command, err error) error {
	remedy := ""
	if _, name, ok := strings.Cut(err.Error(), "unknown flag: --"); ok {
		if s := nearestFlag(cmd, name); s != "" {
			remedy = fmt.Sprintf("did you mean --%s? ", s)
		}
	}
	return usagef("%w; %ssee `%s --help`", err, remedy, cmd.CommandPath())
}
