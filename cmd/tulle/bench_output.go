package main

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"syscall"

	"github.com/spf13/cobra"

	benchreport "github.com/tulle-net/tulle/bench/report"
	"github.com/tulle-net/tulle/bench/result"
)

// benchForms are the forms of a benchmark's output.
var benchForms = []string{"table", "json", "csv", "markdown"}

// benchOutput are the flags that say what is done with a result.
type benchOutput struct {
	form    string
	report  string // folder; "" for none
	verbose bool
}

func (o *benchOutput) flags(cmd *cobra.Command) {
	f := cmd.Flags()
	f.StringVarP(&o.form, "output", "o", o.form, "`FORM` of the output: table; json, which has everything; csv with every value of every round; markdown for a README")
	f.StringVar(&o.report, "report", "", "also write a page with plots and all data into `DIR`: index.html, with the plots as SVG and PNG beside it")
	f.BoolVarP(&o.verbose, "verbose", "v", false, "show all measures with their spread, and how it was measured")
}

func (o *benchOutput) check() error {
	if !slices.Contains(benchForms, o.form) {
		return usagef("--output %q: want table, json, csv or markdown", o.form)
	}
	if o.report != "" {
		return benchreport.Prepare(o.report) // not after minutes of measuring
	}
	return nil
}

// measure runs a benchmark until it ends or is interrupted, and writes what was measured. Whoever reads its messages may end; it does not.
func (o *benchOutput) measure(cmd *cobra.Command, run func(context.Context) (*result.Run, error)) error {
	defer deafToPipes()()
	ctx, stop := interruptible(cmd)
	defer stop()
	r, err := run(ctx)
	if r == nil && ctx.Err() != nil && errors.Is(err, ctx.Err()) {
		err = errors.New("interrupted before the first round was complete: there is no result")
	}
	if err != nil {
		err = details(cmd, err)
	}
	if r == nil {
		return err
	}
	fmt.Fprintln(cmd.ErrOrStderr())
	written := o.write(cmd, r)
	if err != nil { // it says more than that something failed
		return err
	}
	return written
}

// deafToPipes makes writes to pipes that nobody reads fail, instead of ending the program, until stop is called.
func deafToPipes() (stop func()) {
	pipes := make(chan os.Signal, 1)
	signal.Notify(pipes, syscall.SIGPIPE) // child processes do not inherit it
	return func() { signal.Stop(pipes) }
}

// write writes the report, if one is wanted, and then prints the result, because the program may end with whoever reads that. Measures that failed are an exit code.
func (o *benchOutput) write(cmd *cobra.Command, r *result.Run) error {
	var reported error
	if o.report != "" {
		reported = benchreport.Write(r, o.report)
	}
	out := cmd.OutOrStdout()
	var err error
	switch o.form {
	case "json":
		err = r.WriteJSON(out)
	case "csv":
		err = r.WriteCSV(out)
	case "markdown":
		err = r.WriteMarkdown(out)
	default:
		err = r.Print(out, o.verbose)
	}
	if err != nil {
		err = fmt.Errorf("write the result: %w", err)
	}
	if o.report != "" && reported == nil {
		fmt.Fprintf(cmd.ErrOrStderr(), "report: %s\n", filepath.Join(o.report, "index.html"))
	}
	switch {
	case err != nil && reported != nil:
		return fmt.Errorf("%w; %w", err, reported)
	case err != nil || reported != nil:
		return cmp.Or(err, reported)
	}
	if r.Failed() || r.Interrupted {
		return errUnhealthy
	}
	return nil
}

// storedRun reads a result that was written with -o json.
func storedRun(name string) (*result.Run, error) {
	f, err := os.Open(name)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	r, err := result.Read(f)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	return r, nil
}

func benchShow() *cobra.Command {
	out := benchOutput{form: "table"}
	cmd := &cobra.Command{
		Use:     "show FILE",
		Short:   "Show a result that was stored with -o json",
		Example: "  tulle bench show result.json -v\n  tulle bench show result.json -o markdown",
		Args:    exactly("FILE"),
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := out.check(); err != nil {
				return err
			}
			r, err := storedRun(args[0])
			if err != nil {
				return err
			}
			return out.write(cmd, r)
		},
	}
	out.flags(cmd)
	return cmd
}

const benchDiffLong = `Compares two results that were stored with -o json, and prints what changed beyond noise. Both need at least five rounds. A change
counts if the interval of the ratio of the medians excludes 1, for all measures together with 95 % confidence, and if it is at least
the threshold. What the first result has and the second was to measure, but could not, or failed to in more of its rounds, counts as worse.
What only one of them was to measure (--modes, --measures, --sizes, --streams) is named, and is no change.

Exit codes: 0 nothing got worse; 1 something got worse, or failed in the second; 2 the results cannot be compared: one has fewer than five
rounds, or they have nothing in common.`

func benchDiff() *cobra.Command {
	threshold, verbose, form := 0.03, false, "table"
	cmd := &cobra.Command{
		Use:     "diff A.json B.json",
		Short:   "Say what changed beyond noise from one result to another",
		Long:    benchDiffLong,
		Example: "  tulle bench diff before.json after.json\n  tulle bench diff flannel.json cilium.json -v",
		Args:    exactly("A.json", "B.json"),
		RunE: func(cmd *cobra.Command, args []string) error {
			if form != "table" && form != "json" {
				return usagef("--output %q: want table or json", form)
			}
			if !(threshold >= 0 && threshold < 1) { // nor what is no number
				return usagef("--threshold %v: want a share from 0 to less than 1", threshold)
			}
			a, err := storedRun(args[0])
			if err != nil {
				return usageError{err}
			}
			b, err := storedRun(args[1])
			if err != nil {
				return usageError{err}
			}
			d, err := result.Compare(a, b, threshold)
			if err != nil {
				return usageError{err}
			}
			if form == "json" {
				enc := json.NewEncoder(cmd.OutOrStdout())
				enc.SetIndent("", "  ")
				err = enc.Encode(d)
			} else {
				err = d.Print(cmd.OutOrStdout(), verbose)
			}
			if err != nil {
				return fmt.Errorf("write the comparison: %w", err)
			}
			if d.Regressed() {
				return errUnhealthy
			}
			return nil
		},
	}
	f := cmd.Flags()
	f.Float64Var(&threshold, "threshold", threshold, "`SHARE`: smaller changes of a median never count")
	f.StringVarP(&form, "output", "o", form, "`FORM` of the output: table or json")
	f.BoolVarP(&verbose, "verbose", "v", false, "show all measures, also those within noise")
	return cmd
}
