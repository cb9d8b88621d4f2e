package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"os/exec"
	"os/signal"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/spf13/cobra"

	"github.com/tulle-net/tulle/internal/api"
	"github.com/tulle-net/tulle/tunnel/capture"
)

// captureFlags are the flags of `tulle capture`.
type captureFlags struct {
	socket, output, write, pod string
	req                        api.CaptureRequest
	all                        bool
	count                      int
	duration                   time.Duration
}

func captureCommand() *cobra.Command {
	var f captureFlags
	cmd := &cobra.Command{
		Use:   "capture [BPF EXPRESSION]",
		Short: "Show dropped packets with the reason, or all; writes pcapng",
		Long: "Show packets as the data path handles them, one line each, until Ctrl-C; then how many were captured and missed. Without\n" +
			"other flags it shows the packets that are dropped, with the reason; with --all also those that pass, before and after\n" +
			"encapsulation.\n\n" +
			"What the source checks of pods count (pod_source, pod_neighbour, pod_dhcp, pod_protocol and pod_multicast in tulle status) is not\n" +
			"shown: the kernel drops it before the data path. tulle pod list counts it for each pod.\n\n" +
			"The points where a packet is seen:\n" +
			"  from-pods  read from tun0, before encapsulation\n" +
			"  to-peer    encapsulated, handed to the underlay\n" +
			"  from-peer  received from the underlay, still encapsulated\n" +
			"  to-pods    decapsulated and accepted, on the way to tun0\n\n" +
			"A BPF expression (see pcap-filter(7)) selects by the packet of the pods, also at the outer points; tcpdump, which must\n" +
			"be installed, compiles it. Packets above the limits (--rate) are counted as missed; traffic is never held up.\n" +
			"Outer headers are shown as the kernel sends them, except the IPv4 identification (0) and the TTL (64).",
		Example: "  tulle capture\n" +
			"  tulle capture --all --pod 10.244.1.7 icmp or icmp6\n" +
			"  tulle capture --all --peer node-b -w trace.pcapng\n" +
			"  tulle capture --all -w - | wireshark -k -i -",
		Args: cobra.ArbitraryArgs,
		RunE: func(cmd *cobra.Command, args []string) error {
			ctx, stop := interruptible(cmd)
			defer stop()
			context.AfterFunc(ctx, stop) // a second signal ends the program at once
			if err := f.prepare(ctx, args); err != nil {
				return err
			}
			signal.Ignore(syscall.SIGPIPE) // a reader that goes makes writes fail instead
			return f.run(ctx, cmd.OutOrStdout(), cmd.ErrOrStderr())
		},
	}
	fl := cmd.Flags()
	fl.StringVar(&f.socket, "socket", api.DefaultSocket, "control socket of the agent")
	fl.StringVarP(&f.output, "output", "o", "table", "`FORM` of the output: table or json (an object a line)")
	fl.StringVarP(&f.write, "write", "w", "", "write pcapng to `FILE` instead; - is standard output")
	fl.BoolVar(&f.all, "all", false, "also packets that are not dropped")
	fl.StringSliceVar(&f.req.Points, "point", nil, "only packets at these `POINTS`")
	fl.StringSliceVar(&f.req.Reasons, "reason", nil, "only packets dropped for these `REASONS`, as in tulle status, except those of pods' source checks")
	fl.StringVar(&f.req.Peer, "peer", "", "only packets to or from this `NODE`")
	fl.StringVar(&f.pod, "pod", "", "only packets from or to this `ADDRESS` of a pod")
	fl.IntVar(&f.req.Snap, "snap", 0, "capture only so many `BYTES` of each packet; 0 captures all")
	fl.IntVar(&f.req.Rate, "rate", capture.DefaultRate, "capture at most so many packets a second")
	fl.IntVarP(&f.count, "count", "c", 0, "end after so many packets; 0 is without limit")
	fl.DurationVar(&f.duration, "duration", 0, "end after this time; 0 is without limit")
	c := &client{socket: api.DefaultSocket}
	_ = cmd.RegisterFlagCompletionFunc("peer", c.nodeNames)
	_ = cmd.RegisterFlagCompletionFunc("point", cobra.FixedCompletions(pointNames(), cobra.ShellCompDirectiveNoFileComp))
	_ = cmd.RegisterFlagCompletionFunc("output", cobra.FixedCompletions([]string{"table", "json"}, cobra.ShellCompDirectiveNoFileComp))
	return cmd
}

func pointNames() (out []string) {
	for _, p := range capture.Points() {
		out = append(out, string(p))
	}
	return out
}

// prepare checks the flags and makes the request of them.
func (f *captureFlags) prepare(ctx context.Context, expression []string) error {
	switch {
	case f.output != "table" && f.output != "json":
		return usagef("--output %q: want table or json", f.output)
	case f.write != "" && f.output != "table":
		return usagef("--write and --output exclude each other: a file is always pcapng")
	case f.count < 0:
		return usagef("--count %d: want 0 or more", f.count)
	case f.duration < 0:
		return usagef("--duration %v: want 0 or more", f.duration)
	case f.req.Rate < 1 || f.req.Rate > capture.MaxRate:
		return usagef("--rate %d: want 1 to %d packets a second", f.req.Rate, capture.MaxRate)
	case f.all && len(f.req.Reasons) > 0:
		return usagef("--all and --reason exclude each other: a packet that passes has no reason")
	}
	if f.pod != "" {
		addr, err := netip.ParseAddr(f.pod)
		if err != nil || addr.Zone() != "" {
			return usagef("--pod %q is not an IPv4 or IPv6 address", f.pod)
		}
		f.req.Pod = addr.Unmap()
	}
	f.req.Drops = !f.all
	if len(expression) > 0 {
		program, err := compileBPF(ctx, strings.Join(expression, " "))
		if err != nil {
			return err
		}
		f.req.Program = program
	}
	return nil
}

// compileBPF compiles a pcap-filter(7) expression for packets that begin with their IP header. libpcap's compiler is the one
// that people know the expressions of, and tcpdump has it.
func compileBPF(ctx context.Context, expression string) ([]api.BPFInstruction, error) {
	var errs bytes.Buffer
	cmd := exec.CommandContext(ctx, "tcpdump", "-y", "RAW", "-ddd", "--", expression)
	cmd.Stderr = &errs
	out, err := cmd.Output()
	if errors.Is(err, exec.ErrNotFound) {
		return nil, errors.New("a BPF expression needs tcpdump, which compiles it: install tcpdump, or select by --pod, --peer, --point or --reason")
	}
	if err != nil {
		text := strings.TrimSpace(errs.String())
		if i := strings.LastIndexByte(text, '\n'); i >= 0 {
			text = text[i+1:]
		}
		return nil, usagef("BPF expression %q: %s; see pcap-filter(7)", expression, strings.TrimPrefix(text, "tcpdump: "))
	}
	fields := strings.Fields(string(out))
	var numbers []uint64
	for _, s := range fields {
		n, err := strconv.ParseUint(s, 10, 32)
		if err != nil {
			return nil, fmt.Errorf("tcpdump -ddd printed %q, which is no program", s)
		}
		numbers = append(numbers, n)
	}
	if len(numbers) == 0 || uint64(len(numbers)-1) != 4*numbers[0] {
		return nil, fmt.Errorf("tcpdump -ddd printed %d numbers, which is no program", len(numbers))
	}
	var program []api.BPFInstruction
	for n := range slices.Chunk(numbers[1:], 4) {
		program = append(program, api.BPFInstruction{Op: uint16(n[0]), Jt: uint8(n[1]), Jf: uint8(n[2]), K: uint32(n[3])})
	}
	return program, nil
}

// errEnough ends a capture that has its --count, or whose output nobody reads any more.
var errEnough = errors.New("enough packets")

// run captures until ctx or the limits end it, and then says on errOut how much it was.
func (f *captureFlags) run(ctx context.Context, out, errOut io.Writer) error {
	if f.duration > 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, f.duration)
		defer cancel()
	}
	show, finish, err := f.sink(out)
	if err != nil {
		return err
	}
	n, missed, started := 0, uint64(0), false
	err = api.NewClient(f.socket).Capture(ctx, f.req, func(e api.CaptureEvent) error {
		if !started {
			started = true
			fmt.Fprintln(errOut, "tulle: capturing; Ctrl-C ends it")
		}
		missed = max(missed, e.Missed)
		if e.Point == "" {
			return nil
		}
		if err := show(e); errors.Is(err, syscall.EPIPE) {
			return errEnough
		} else if err != nil {
			return err
		}
		if n++; n == f.count {
			return errEnough
		}
		return nil
	})
	if errors.Is(err, errEnough) {
		err = nil
	}
	if started {
		fmt.Fprintf(errOut, "tulle: %d packets captured, %d missed\n", n, missed)
	}
	if missed > 0 {
		fmt.Fprintln(errOut, "tulle: packets are missed above the limits: select fewer (--peer, --pod, a BPF expression), or raise --rate")
	}
	return errors.Join(err, finish())
}

// sink returns what handles each packet, and what to call in the end.
func (f *captureFlags) sink(out io.Writer) (show func(api.CaptureEvent) error, finish func() error, err error) {
	nothing := func() error { return nil }
	switch {
	case f.write == "" && f.output == "json":
		enc := json.NewEncoder(out)
		return func(e api.CaptureEvent) error { return enc.Encode(e) }, nothing, nil
	case f.write == "":
		return func(e api.CaptureEvent) error {
			_, err := fmt.Fprintln(out, captureLine(e))
			return err
		}, nothing, nil
	case f.write != "-":
		file, err := os.Create(f.write)
		if err != nil {
			return nil, nil, fmt.Errorf("--write: %w", err)
		}
		out, finish = file, file.Close
	default:
		finish = nothing
	}
	w, err := capture.NewWriter(out, "tulle "+api.Version())
	if err != nil {
		return nil, nil, errors.Join(fmt.Errorf("--write %s: %w", f.write, err), finish())
	}
	return func(e api.CaptureEvent) error {
		if err := w.Write(captured(e), outcome(e)); err != nil {
			return fmt.Errorf("--write %s: %w", f.write, err)
		}
		return nil
	}, finish, nil
}

func captured(e api.CaptureEvent) capture.Event {
	return capture.Event{Time: e.Time, Point: capture.Point(e.Point), Reason: e.Reason, Path: e.Path, Length: e.Length, Data: e.Data}
}

// captureLine is one packet for people.
func captureLine(e api.CaptureEvent) string {
	return fmt.Sprintf("%s  %-9s  %s  [%s]", e.Time.Local().Format("15:04:05.000000"), e.Point, capture.Summary(e.Data, e.Length), outcome(e))
}

// outcome says what became of a packet, and on which path.
func outcome(e api.CaptureEvent) string {
	what := "passed"
	if e.Reason != "" {
		what = "dropped: " + e.Reason
	}
	if e.Peer.ID == "" {
		return what
	}
	name := e.Peer.Name
	if name == "" {
		name = e.Peer.ID
	}
	return fmt.Sprintf("%s, peer %s, path %s", what, name, e.Path)
}
