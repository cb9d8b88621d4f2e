package pair

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"runtime"
	"slices"
	"time"

	"github.com/tulle-net/tulle/bench/machine"
	"github.com/tulle-net/tulle/bench/result"
	"github.com/tulle-net/tulle/bench/traffic"
)

// RunOptions configure a run. The zero value of each field except Host means its default.
type RunOptions struct {
	Host     string        // of the server, with or without port
	Token    string        // that the server wants
	Label    string        // name of the path in the result; default "path"
	Rounds   int           // default 5
	Duration time.Duration // counted time of each measure; a warm-up of a third comes first; default 1 s
	Sizes    []int         // payloads whose latency is measured, in bytes; default 64 and 1,200
	Streams  int           // "several", of TCP and UDP; default 4
	Rate     float64       // of the open loop, in datagrams a second; default DefaultRate
	Only     []string      // groups of measures: Latency, Throughput, Limits; default all
	// Gentle keeps to Rate in all latency measures, and leaves out those that look for a limit: what the server's rate limit
	// lets through is sent and no more. It is for networks that others use.
	Gentle   bool
	MaxRate  float64      // in bits of payload a second, below the server's own limit; 0: none
	Six      bool         // IPv6 only
	Version  string       // of the program
	Progress func(string) // may be nil
}

// DefaultRate is the default of RunOptions.Rate.
const DefaultRate = 1000

// The groups of measures, by the names that they have in the lab, too.
const (
	Latency    = "latency"    // datagrams one by one and at a fixed rate, TCP requests and connections
	Throughput = "throughput" // TCP and UDP as fast as they go
	Limits     = "rate"       // the highest rate of UDP without loss
)

const shortest = 50 * time.Millisecond

// Validate returns an error if an option is invalid.
func (o RunOptions) Validate() error {
	_, err := o.withDefaults()
	return err
}

func (o RunOptions) withDefaults() (RunOptions, error) {
	if o.Label == "" {
		o.Label = "path"
	}
	if o.Rounds == 0 {
		o.Rounds = 5
	}
	if o.Duration == 0 {
		o.Duration = time.Second
	}
	if len(o.Sizes) == 0 {
		o.Sizes = []int{64, 1200}
	}
	if o.Streams == 0 {
		o.Streams = 4
	}
	if o.Rate == 0 {
		o.Rate = DefaultRate
	}
	if o.Progress == nil {
		o.Progress = func(string) {}
	}
	switch {
	case o.Host == "":
		return o, errors.New("no host: name the one where `tulle bench serve` runs")
	case o.Rounds < 1 || o.Rounds > 1000:
		return o, fmt.Errorf("%d rounds: want 1 to 1000", o.Rounds)
	case o.Duration < shortest || o.Duration > time.Minute:
		return o, fmt.Errorf("a duration of %v: want %v to 1m", o.Duration, shortest)
	case o.Streams < 2 || o.Streams > maxFlows:
		return o, fmt.Errorf("%d streams: want 2 to %d", o.Streams, maxFlows)
	case !(o.Rate >= 1 && o.Rate <= 100_000): // nor what is no number
		return o, fmt.Errorf("a rate of %v datagrams a second: want 1 to 100000", o.Rate)
	}
	if o.Gentle && slices.Contains(o.Only, Limits) {
		return o, fmt.Errorf("no measures %q where others use the network: they look for its limit", Limits)
	}
	for _, group := range o.Only {
		if all := []string{Latency, Throughput, Limits}; !slices.Contains(all, group) {
			return o, fmt.Errorf("no measures %q; there are %v", group, all)
		}
	}
	if !o.Gentle { // then it is the name of a member
		if err := checkHost(o.Host); err != nil {
			return o, err
		}
	}
	for i, n := range o.Sizes {
		if slices.Contains(o.Sizes[:i], n) {
			return o, fmt.Errorf("a payload of %d bytes is named twice", n)
		}
		if n < traffic.Least || n > 65507 {
			return o, fmt.Errorf("a payload of %d bytes: want %d to 65507", n, traffic.Least)
		}
	}
	return o, nil
}

func (o *RunOptions) warm() time.Duration { return o.Duration / 3 }

// TCP takes some ten round trips until it sends what a path carries, and then as long to drain what it sent too much: streams warm up for
// warmTrips of them, but for no longer than mostWarm.
const (
	warmTrips = 20
	mostWarm  = 10 * time.Second
)

// warmTCP is the warm-up of measures with TCP streams.
func (rn *runner) warmTCP() time.Duration {
	return max(rn.o.warm(), min(warmTrips*rn.c.trip, mostWarm))
}

// runner is a running Run.
type runner struct {
	o    RunOptions
	c    *client
	r    *result.Run
	full int   // payload of a datagram that fills the path MTU, in bytes
	one  bool  // both ends are on one machine
	deaf error // no datagram is answered, and why that may be: TCP alone is measured; nil: they are
	// label goes before what is measured, where several paths are.
	label string
	most  int // the largest packet to try, in bytes of IP; 0: the link's MTU
	used  []float64
}

// Run measures the path to a server. When ctx ends, or the server, the result has the rounds that were complete; an error
// means that there is none.
func Run(ctx context.Context, o RunOptions) (*result.Run, error) {
	o, err := o.withDefaults()
	if err != nil {
		return nil, err
	}
	was := runtime.GOMAXPROCS(max(16, 4*runtime.NumCPU())) // threads that return from system calls wait for no processor
	defer runtime.GOMAXPROCS(was)
	c, err := dial(ctx, &o, netip.Addr{})
	if err != nil {
		return nil, errors.Join(ctx.Err(), err)
	}
	defer c.conn.Close()
	stop := context.AfterFunc(ctx, func() { c.conn.Close() })
	defer stop()
	rn := &runner{o: o, c: c}
	if err := rn.prepare(ctx); err != nil {
		return nil, errors.Join(ctx.Err(), err)
	}
	if err := fits(&o, rn); err != nil {
		return nil, err
	}
	var ended error
	begin := time.Now()
	for i := range o.Rounds {
		if ended = rn.round(ctx, i); ended != nil {
			break
		}
		if took := time.Since(begin); i == 0 && o.Rounds > 1 {
			o.Progress(fmt.Sprintf("a round takes %v here: %v to go", took.Round(time.Second), (took * time.Duration(o.Rounds-1)).Round(time.Second)))
		}
	}
	if len(rn.r.Modes[0].Rounds) == 0 {
		return nil, errors.Join(ctx.Err(), ended)
	}
	rn.finish(ctx, ended)
	return rn.r, nil
}

// prepare finds the path MTU and describes the run.
func (rn *runner) prepare(ctx context.Context) error {
	o, c := &rn.o, rn.c
	from := machine.Facts(c.from.Addr())
	from.End, from.Tulle = "from", o.Version
	link := from.LinkMTU
	if link = cmp.Or(rn.most, link); link == 0 {
		link = 65535
	}
	o.Progress(rn.label + "finding the path MTU")
	if _, err := c.order(jobEcho, 1); err != nil {
		return err
	}
	mtu, err := c.pathMTU(ctx, link)
	if _, deaf := errors.AsType[deafError](err); deaf && !o.Gentle {
		rn.deaf = err
	} else if err != nil {
		return err
	}
	family, headers := "IPv4", 28
	if c.to.Addr().Is6() {
		family, headers = "IPv6", 48
	}
	rn.full = mtu - headers
	rn.one = c.welcome.Boot != "" && c.welcome.Boot == machine.BootID()
	to := c.welcome.Machine
	for _, m := range []*result.Machine{&from, &to} {
		m.Affinity, m.Awake = "threads not pinned", "CPUs may halt"
	}
	rn.r = &result.Run{
		Format: result.Format, Version: result.Version, Kind: result.Pair, Tulle: o.Version, Started: time.Now(), Machines: []result.Machine{from, to},
		Rounds: o.Rounds, Duration: o.Duration.Seconds(), Warm: o.warm().Seconds(), Trial: (o.Duration / 4).Seconds(), MTU: mtu, Family: family,
		Modes: []result.Mode{{Name: o.Label, What: "from this end to `tulle bench serve`", MTU: mtu}},
	}
	some := false
	for _, m := range rn.measures() {
		rn.r.Asked = append(rn.r.Asked, m.main)
		some = some || rn.can(m)
	}
	if rn.deaf == nil {
		return nil
	}
	if !some {
		return rn.deaf
	}
	rn.r.Modes[0].Errors = []string{fmt.Sprintf("all of UDP, and the path MTU: %v", rn.deaf)}
	o.Progress(rn.label + "datagrams are not answered: TCP alone is measured")
	return nil
}

// can reports whether a measure can be taken on this path.
func (rn *runner) can(m measure) bool { return rn.deaf == nil || !m.udp }

// measure is one measure of a round.
type measure struct {
	group, what string
	main        string        // key of its main metric in a result
	least       time.Duration // that it takes
	udp         bool          // it needs datagrams
	take        func(ctx context.Context, d *result.Round) error
}

func (rn *runner) measures() []measure {
	var out []measure
	counted, warmed, streamed := rn.o.Duration, rn.o.Duration+rn.o.warm(), rn.o.Duration+rn.warmTCP()
	for _, n := range rn.o.Sizes {
		out = append(out, measure{Latency, fmt.Sprintf("latency at %d bytes", n), fmt.Sprintf("rtt%d_p50_us", n), warmed, true, rn.pingPong(n)})
	}
	several := rn.o.Streams
	out = append(out,
		measure{Latency, fmt.Sprintf("latency at %d bytes, fixed rate", rn.o.Sizes[0]), fmt.Sprintf("open%d_p50_us", rn.o.Sizes[0]), warmed, true, rn.openLoop(rn.o.Sizes[0])},
		measure{Latency, "TCP requests on one connection", "rr_p50_us", warmed, false, rn.requests},
		measure{Latency, "TCP connections with a request", "crr_p50_us", warmed, false, rn.connections},
		measure{Throughput, "TCP, one stream", "tcp1_gbps", streamed, false, rn.tcp(1)},
		measure{Throughput, "UDP, one flow", "udp_flood1_gbps", counted, true, rn.flood(1)},
	)
	if !rn.o.Gentle {
		if rn.c.welcome.Loaded {
			out = append(out, measure{Latency, fmt.Sprintf("latency beside %d TCP streams", several), "loaded_p50_us", streamed, true, rn.loaded})
		}
		out = append(out,
			measure{Throughput, fmt.Sprintf("TCP, %d streams", several), fmt.Sprintf("tcp%d_gbps", several), streamed, false, rn.tcp(several)},
			measure{Throughput, fmt.Sprintf("UDP, %d flows", several), fmt.Sprintf("udp_flood%d_gbps", several), counted, true, rn.flood(several)},
			measure{Limits, "UDP rate at 64 bytes", "udp64_kpps", counted, true, rn.search(64, false)},
			measure{Limits, "UDP rate of full packets", "udp_full_kpps", counted, true, rn.search(rn.full, true)},
		)
	}
	return slices.DeleteFunc(out, func(m measure) bool { return len(rn.o.Only) > 0 && !slices.Contains(rn.o.Only, m.group) })
}

// fits returns an error if the server's time is too short for one round of what the runners measure: nothing would be left of it. If it is too
// short for all of them, it says so.
func fits(o *RunOptions, runners ...*runner) error {
	var least, most time.Duration
	for _, rn := range runners {
		most = time.Duration(rn.c.welcome.MaxTime * float64(time.Second))
		for _, m := range rn.measures() {
			if rn.can(m) {
				least += m.least
			}
		}
	}
	if least > most {
		return fmt.Errorf("one round takes %v at least, and the server allows %v (--max-time of `tulle bench serve`): use a shorter --duration, or fewer --measures", least.Round(time.Second), most)
	}
	if all := least * time.Duration(o.Rounds); all > most {
		o.Progress(fmt.Sprintf("%d rounds take %v at least, and the server ends the run after %v: those that are complete then are kept", o.Rounds, all.Round(time.Second), most))
	}
	return nil
}

// round takes each measure. Round n begins with measure n, so that none is always the first.
func (rn *runner) round(ctx context.Context, n int) error {
	used, err := machine.OthersShare(ctx)
	if err != nil && ctx.Err() != nil {
		return err
	}
	all := slices.DeleteFunc(rn.measures(), func(m measure) bool { return !rn.can(m) })
	parts := make([]result.Round, len(all))
	var failed []string
	for k := range all {
		i := (k + n) % len(all)
		m := all[i]
		rn.o.Progress(fmt.Sprintf("round %d of %d: %s%s", n+1, rn.o.Rounds, rn.label, m.what))
		if err := rn.take(ctx, m, &parts[i]); err != nil {
			if ctx.Err() != nil {
				return err
			}
			if err := rn.gone(err); err != nil {
				return err
			}
			failed = append(failed, fmt.Sprintf("round %d, %s: %v", n+1, m.what, err))
		}
		if _, err := rn.c.order("stop", 0); err != nil {
			return err
		}
	}
	var d result.Round
	for _, p := range parts {
		d.TCP = append(d.TCP, p.TCP...)
		d.Latency = append(d.Latency, p.Latency...)
		d.UDP = append(d.UDP, p.UDP...)
		d.Floods = append(d.Floods, p.Floods...)
	}
	m := &rn.r.Modes[0]
	m.Rounds = append(m.Rounds, d)
	m.Errors = append(m.Errors, failed...)
	if err == nil { // /proc/stat is not readable everywhere
		rn.used = append(rn.used, used)
	}
	return nil
}

// take takes a measure, however long it is.
func (rn *runner) take(ctx context.Context, m measure, d *result.Round) error {
	defer rn.c.keepAlive()()
	return m.take(ctx, d)
}

// gone returns why the server has ended the run, if it has when a measure fails with an error.
func (rn *runner) gone(failed error) error {
	_, err := rn.c.order("stop", 0)
	if _, told := errors.AsType[serverError](err); err == nil || told || errors.Is(err, os.ErrDeadlineExceeded) {
		return err
	}
	return failed
}

// finish computes what follows from the rounds.
func (rn *runner) finish(ctx context.Context, ended error) {
	r := rn.r
	r.Seconds = time.Since(r.Started).Seconds()
	r.Others = result.SpreadOf(rn.used)
	r.Steal = result.SpreadOf(rn.steal())
	r.Summarise()
	r.Notes, r.Limits, r.Warnings = append(rn.notes(), r.Sparse()...), rn.limits(), r.Doubts()
	if ended != nil {
		r.Interrupted = true
		if ctx.Err() == nil {
			r.Warnings = append(r.Warnings, fmt.Sprintf("The run ended early: %v.", ended))
		}
	}
}

// steal is the share of the CPU time that a hypervisor took during each measure of TCP.
func (rn *runner) steal() (out []float64) {
	cpus := rn.r.Machines[0].CPUs
	if !rn.one {
		cpus += rn.r.Machines[1].CPUs
	}
	for _, d := range rn.r.Modes[0].Rounds {
		for _, t := range d.TCP {
			out = append(out, t.CPU.Steal/t.Seconds/float64(cpus))
		}
	}
	return out
}
