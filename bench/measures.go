package bench

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/tulle-net/tulle/bench/machine"
	"github.com/tulle-net/tulle/bench/result"
	"github.com/tulle-net/tulle/bench/traffic"
)

// The groups of measures of [AllOptions.Measures].
const (
	Throughput = "throughput" // TCP with one and four streams, CPU; UDP with one and four flows, loss
	Rate       = "rate"       // UDP datagrams a second without loss, goodput, CPU per packet
	Delay      = "latency"    // ping-pong and fixed rate, TCP transactions
	Memory     = "memory"
	Time       = "breakdown" // where the time of packets goes in Tulle's agents
	InParts    = "in-parts"  // TCP requests in two writes without TCP_NODELAY; only when asked for
)

// Measures lists the groups of measures.
func Measures() []string { return []string{Throughput, Delay, Rate, Memory, Time, InParts} }

// measure is one measure of a round. take fills in a part of the round.
type measure struct {
	group, what string
	main        string // key of its main metric in a result; "" if it only explains others
	awake       bool   // threads that spin keep CPUs awake, where that is chosen
	take        func(ctx context.Context, o *AllOptions, s *stand, d *result.Round) error
}

// openRate is the rate of the open loop, in datagrams per second: what every mode carries, so that none is overloaded.
const openRate = 1000

// measures are those that the options ask for, in the order of a round.
func (o *AllOptions) measures() []measure {
	out := []measure{
		{Throughput, "TCP, one stream", "tcp1_gbps", false, takeTCP(1)},
		{Throughput, "TCP, four streams", "tcp4_gbps", false, takeTCP(4)},
	}
	pinned, open := canPin(), "open%d_p50_us"
	if pinned {
		open = "open%d_pinned_p50_us"
	}
	for i, n := range o.Sizes {
		out = append(out, measure{Delay, fmt.Sprintf("latency at %d bytes", n), fmt.Sprintf("rtt%d_p50_us", n), true, takeLatency(result.PingPong, n, false)})
		if i > 0 {
			continue
		}
		if pinned {
			out = append(out, measure{Delay, fmt.Sprintf("latency at %d bytes, pinned", n), fmt.Sprintf("rtt%d_pinned_p50_us", n), true, takeLatency(result.PingPong, n, true)})
		}
		out = append(out, measure{Delay, fmt.Sprintf("latency at %d bytes, fixed rate", n), fmt.Sprintf(open, n), true, takeLatency(result.OpenLoop, n, true)})
	}
	out = append(out,
		measure{Delay, "latency beside four TCP streams", "loaded_p50_us", false, takeLoaded},
		measure{Delay, "TCP requests on one connection", "rr_p50_us", true, takeLatency(result.RR, 0, false)},
		measure{Delay, "TCP connections with a request", "crr_p50_us", true, takeLatency(result.CRR, 0, false)},
		measure{Time, "time in the agents, ping-pong", "", true, takeBreakdown(result.TracePing)},
		measure{Throughput, "UDP throughput, one flow", "udp_flood1_gbps", false, takeFlood(1)},
		measure{Throughput, "UDP throughput, four flows", "udp_flood4_gbps", false, takeFlood(4)},
		measure{Rate, "UDP rate at 64 bytes", "udp64_kpps", false, takeUDP(64)},
		measure{Rate, "UDP rate of full packets", "udp_full_kpps", false, takeUDP(fullPackets)},
		measure{Time, "time in the agents, TCP", "", false, takeBreakdown(result.TraceTCP)},
		measure{Time, "time in the agents, UDP", "", false, takeBreakdown(result.TraceUDP)},
		measure{Memory, "memory", "rss_mb", false, takeMemory},
	)
	if len(o.Measures) == 0 {
		return out
	}
	out = append(out, measure{InParts, "TCP requests in two writes", "nagle_p50_us", true, takeLatency(result.Nagle, 0, false)})
	picked := out[:0]
	for _, m := range out {
		if slices.Contains(o.Measures, m.group) {
			picked = append(picked, m)
		}
	}
	return picked
}

func takeTCP(streams int) func(context.Context, *AllOptions, *stand, *result.Round) error {
	return func(ctx context.Context, o *AllOptions, s *stand, d *result.Round) error {
		before, err := s.crossed()
		if err != nil {
			return err
		}
		t, err := measureTCP(ctx, &s.ends, streams, o.warm(), o.Duration, s.tunnel.pids)
		if err != nil {
			return err
		}
		d.TCP = append(d.TCP, t)
		after, err := s.crossed()
		d.Crossing = d.Crossing.Plus(result.Crossing(after.Minus(before)))
		return err
	}
}

func takeLatency(kind string, payload int, pinned bool) func(context.Context, *AllOptions, *stand, *result.Round) error {
	return func(ctx context.Context, o *AllOptions, s *stand, d *result.Round) error {
		l, err := placed(s.tunnel.pids, pinned, func(cpus Sides) (*result.Latency, error) {
			switch kind {
			case result.PingPong:
				return overUDP(&s.ends, cpus, func(fd int) (*result.Latency, error) {
					return traffic.PingPong(ctx, fd, payload, o.warm(), o.Duration, 0)
				})
			case result.OpenLoop:
				return overUDP(&s.ends, cpus, func(fd int) (*result.Latency, error) {
					return traffic.Paced(ctx, fd, payload, openRate, o.warm(), o.Duration, 0)
				})
			}
			return overTCP(ctx, &s.ends, kind, cpus, o.warm(), o.Duration)
		})
		if err == nil {
			d.Latency = append(d.Latency, *l)
		}
		return err
	}
}

// takeLoaded measures latency while four TCP streams run. Its own threads have priority, so that it is not they that wait for a CPU.
func takeLoaded(ctx context.Context, o *AllOptions, s *stand, d *result.Round) error {
	cpus, err := allCPUs()
	if err != nil {
		return err
	}
	loading, stop := context.WithCancel(ctx)
	defer stop()
	loaded := make(chan error, 1)
	go func() {
		_, err := measureTCP(loading, &s.ends, 4, 0, 2*(o.warm()+o.Duration)+loadedPatience, s.tunnel.pids)
		loaded <- err
	}()
	l, err := overUDP(&s.ends, cpus, func(fd int) (*result.Latency, error) {
		return traffic.Loaded(ctx, fd, o.warm(), o.Duration, 0)
	})
	stop()
	if terr := <-loaded; terr != nil && !errors.Is(terr, context.Canceled) {
		err = errors.Join(err, terr)
	}
	if err == nil {
		d.Latency = append(d.Latency, *l)
	}
	return err
}

// loadedPatience is how much longer than the measure beside them the streams may run.
const loadedPatience = 30 * time.Second

// fullPackets stands for the payload that fills the pods' MTU.
const fullPackets = 0

// fullPayload is the UDP payload of a packet that fills the pods' MTU, in bytes.
func (s *stand) fullPayload() int {
	if s.ends.ToAddr.Is6() {
		return s.tunnel.mtu - 48
	}
	return s.tunnel.mtu - 28
}

// takeUDP searches for the highest rate without loss.
func takeUDP(payload int) func(context.Context, *AllOptions, *stand, *result.Round) error {
	return func(ctx context.Context, o *AllOptions, s *stand, d *result.Round) error {
		size := payload
		if payload == fullPackets {
			size = s.fullPayload()
		}
		found, err := traffic.SearchRate(size, 0, func(rate float64) (result.Trial, error) {
			return udpTrial(ctx, &s.ends, size, 1, rate, o.Duration/4, s.tunnel.pids)
		})
		if err == nil {
			found.Full = payload == fullPackets
			d.UDP = append(d.UDP, found)
		}
		return err
	}
}

// takeFlood sends full packets as fast as the senders can.
func takeFlood(flows int) func(context.Context, *AllOptions, *stand, *result.Round) error {
	return func(ctx context.Context, o *AllOptions, s *stand, d *result.Round) error {
		size := s.fullPayload()
		t, err := udpTrial(ctx, &s.ends, size, flows, 0, o.Duration, s.tunnel.pids)
		if err == nil {
			d.Floods = append(d.Floods, result.Flood{Flows: flows, Payload: size, Trial: t})
		}
		return err
	}
}

func takeMemory(_ context.Context, _ *AllOptions, s *stand, d *result.Round) (err error) {
	d.RSS, err = machine.ResidentMemory(s.tunnel.pids)
	return err
}

// round takes each measure for each mode. Round n begins with mode n, so that none is always the first.
func (run *allRun) round(ctx context.Context, n int) error {
	others, err := machine.OthersShare(ctx)
	if err != nil {
		return err
	}
	details := make([]result.Round, len(run.stands))
	if run.idle == polls {
		sleep, err := run.idle.start(ctx, run.o.Helper)
		if err != nil {
			return err
		}
		defer sleep()
	}
	var spinners func() // stops them; nil: there are none
	defer func() {
		if spinners != nil {
			spinners()
		}
	}()
	for _, m := range run.o.measures() {
		run.o.Progress(fmt.Sprintf("round %d of %d: %s", n+1, run.o.Rounds, m.what))
		if spin := m.awake && run.idle == spins; spin && spinners == nil {
			if spinners, err = run.idle.start(ctx, run.o.Helper); err != nil {
				return err
			}
		} else if !spin && spinners != nil {
			spinners()
			spinners = nil
		}
		for k := range run.stands {
			i := (k + n) % len(run.stands)
			details[i].Order = k
			if err := m.take(ctx, &run.o, run.stands[i], &details[i]); err != nil && ctx.Err() == nil {
				res := &run.r.Modes[run.result[i]]
				res.Errors = append(res.Errors, fmt.Sprintf("round %d, %s: %v", n+1, m.what, err))
			}
		}
		if ctx.Err() != nil {
			return ctx.Err()
		}
	}
	run.others = append(run.others, others)
	for i, d := range details {
		res := &run.r.Modes[run.result[i]]
		res.Rounds = append(res.Rounds, d)
		for _, t := range d.TCP {
			run.steal = append(run.steal, t.CPU.Steal/t.Seconds/float64(run.r.Machines[0].CPUs))
		}
	}
	return nil
}

// sumUp computes everything that follows from the rounds.
func (run *allRun) sumUp() {
	r := run.r
	r.Seconds = time.Since(r.Started).Seconds()
	r.Others, r.Steal = result.SpreadOf(run.others), result.SpreadOf(run.steal)
	r.Summarise()
	r.Notes, r.Warnings = append(notes(&run.o, run.idle), r.Sparse()...), warnings(r)
	if run.ended != nil {
		r.Warnings = append(r.Warnings, fmt.Sprintf("The run ended early: %v.", run.ended))
	}
}
