package main

import (
	"bytes"
	"context"
	"errors"
	"os"
	"strings"
	"testing"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/tulle-net/tulle/bench/result"
)

// What was measured is printed, whatever came after it; without a round an interruption is said in words.
func TestBenchMeasure(t *testing.T) {
	r := &result.Run{Kind: result.Pair, Modes: []result.Mode{{Name: "net", Rounds: []result.Round{{TCP: []result.TCP{{Streams: 1, Gbps: 5}}}}}}}
	r.Summarise()
	for name, tc := range map[string]struct {
		r           *result.Run
		interrupt   bool
		err         error
		want, print string // "" for none
	}{
		"a result":                 {r, false, nil, "", "net: 5.00 Gb/s"},
		"an error":                 {nil, false, errors.New("no answer"), "no answer", ""},
		"interrupted":              {nil, true, context.Canceled, "interrupted before the first round was complete: there is no result", ""},
		"a lab stays":              {r, false, errors.New("lab bench-0: busy"), "lab bench-0: busy", "net: 5.00 Gb/s"},
		"a profile is interrupted": {r, true, context.Canceled, "context canceled", "net: 5.00 Gb/s"},
	} {
		var out bytes.Buffer
		ctx, cancel := context.WithCancel(t.Context())
		cmd := &cobra.Command{}
		cmd.SetContext(ctx)
		cmd.SetOut(&out)
		cmd.SetErr(new(bytes.Buffer))
		if tc.interrupt {
			cancel()
		}
		o := benchOutput{form: "table"}
		err := o.measure(cmd, func(context.Context) (*result.Run, error) { return tc.r, tc.err })
		cancel()
		if (err == nil) != (tc.want == "") || err != nil && err.Error() != tc.want {
			t.Errorf("%s: got %v, want %q", name, err, tc.want)
		}
		if !strings.HasPrefix(out.String(), tc.print) || tc.print == "" && out.Len() > 0 {
			t.Errorf("%s: printed\n%s", name, out.String())
		}
	}
}

// A terminal that is closed ends what runs in it as Ctrl-C does, so that nothing stays behind.
func TestInterruptedByTerminal(t *testing.T) {
	cmd := &cobra.Command{}
	cmd.SetContext(t.Context())
	ctx, stop := interruptible(cmd)
	defer stop()
	if err := unix.Kill(os.Getpid(), unix.SIGHUP); err != nil {
		t.Fatal(err)
	}
	<-ctx.Done()
}

func TestCheckListen(t *testing.T) {
	for listen, ok := range map[string]bool{
		":17979": true, "10.0.0.7": true, "10.0.0.7:1": true, "fd00::7": true, "[fd00::7]": true, "[fe80::7%eth0]:1": true, "node-a:1": true, ":0": true,
		"node-a": false, "": false, "10.0.0.7:": false, "10.0.0.7:65536": false, ":http": false,
	} {
		if err := checkListen(listen); (err == nil) != ok {
			t.Errorf("%q: %v", listen, err)
		}
	}
}
