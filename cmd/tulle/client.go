package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/tulle-net/tulle/internal/api"
)

// client has the flags of all commands that talk to the agent.
type client struct {
	socket  string
	output  string
	timeout time.Duration
}

// flags gives cmd and its subcommands --socket, -o and --timeout.
func (c *client) flags(cmd *cobra.Command, timeout time.Duration) *cobra.Command {
	f := cmd.PersistentFlags()
	f.StringVar(&c.socket, "socket", api.DefaultSocket, "control socket of the agent")
	f.StringVarP(&c.output, "output", "o", "table", "`FORM` of the output: table or json")
	f.DurationVar(&c.timeout, "timeout", timeout, "how long to wait for the agent")
	_ = cmd.RegisterFlagCompletionFunc("output", cobra.FixedCompletions([]string{"table", "json"}, cobra.ShellCompDirectiveNoFileComp))
	return cmd
}

// ask returns the RunE of a command that sends one request to the agent and prints the answer: as JSON, or by table. healthy
// decides between exit codes 0 and 1; nil means that any answer is healthy.
func ask[T any](c *client, call func(ctx context.Context, a *api.Client, args []string) (T, error),
	table func(p *printer, v T), healthy func(v T) bool) func(*cobra.Command, []string) error {
	return func(cmd *cobra.Command, args []string) error {
		if c.output != "table" && c.output != "json" {
			return usagef("--output %q: want table or json", c.output)
		}
		if c.timeout <= 0 {
			return usagef("--timeout %v: want more than 0, such as 10s", c.timeout)
		}
		ctx, cancel := context.WithTimeout(cmd.Context(), c.timeout)
		defer cancel()
		if c.timeout > quickTimeout && !cmd.Flags().Changed("timeout") {
			ctx = c.whileItAnswers(ctx)
		}
		v, err := call(ctx, api.NewClient(c.socket), args)
		if err != nil {
			return err
		}
		if err := c.print(cmd.OutOrStdout(), v, func(p *printer) { table(p, v) }); err != nil {
			return err
		}
		if healthy != nil && !healthy(v) {
			return errUnhealthy
		}
		return nil
	}
}

// whileItAnswers returns a context that ends early if the agent is stuck: if it does not answer a question that needs no work, while a request that may take
// minutes is under way.
func (c *client) whileItAnswers(ctx context.Context) context.Context {
	out, end := context.WithCancelCause(ctx)
	go func() { // ends with ctx, if not before
		ctx, cancel := context.WithTimeout(ctx, quickTimeout)
		defer cancel()
		if _, err := api.NewClient(c.socket).LogLevel(ctx, api.LogLevelRequest{}); errors.Is(err, context.DeadlineExceeded) {
			end(context.DeadlineExceeded)
		}
	}()
	return out
}

func (c *client) print(out io.Writer, v any, table func(*printer)) error {
	if c.output == "json" {
		enc := json.NewEncoder(out)
		enc.SetIndent("", "  ")
		enc.SetEscapeHTML(false)
		return enc.Encode(v)
	}
	p := &printer{width: width(out), now: time.Now()}
	table(p)
	_, err := io.WriteString(out, p.String())
	return err
}

// width is the number of columns of the terminal, or of $COLUMNS; 0 means no limit: out is a pipe or a file.
func width(out io.Writer) int {
	if n, err := strconv.Atoi(os.Getenv("COLUMNS")); err == nil && n > 0 {
		return n
	}
	if f, ok := out.(*os.File); ok {
		if ws, err := unix.IoctlGetWinsize(int(f.Fd()), unix.TIOCGWINSZ); err == nil {
			return int(ws.Col)
		}
	}
	return 0
}

// nodeNames completes the names of peers.
func (c *client) nodeNames(cmd *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
	if len(args) > 0 {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	ctx, cancel := context.WithTimeout(cmd.Context(), time.Second)
	defer cancel()
	peers, err := api.NewClient(c.socket).Peers(ctx)
	if err != nil {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	var names []string
	for _, p := range peers {
		names = append(names, fmt.Sprintf("%s\t%s", p.Name, p.State))
	}
	return names, cobra.ShellCompDirectiveNoFileComp
}
