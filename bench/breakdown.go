package bench

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/tulle-net/tulle/bench/result"
	"github.com/tulle-net/tulle/bench/traffic"
	"github.com/tulle-net/tulle/internal/api"
)

const (
	// traceMargin is how much longer than a trace its traffic runs.
	traceMargin = 200 * time.Millisecond
	// traceLeast is how long a trace is at least, and traceTimes how often it is tried: on a machine that is busy with other
	// work, the sample of a short one may be empty, and an agent may begin when the traffic has ended. Each time takes twice as long as the one before.
	traceLeast = 300 * time.Millisecond
	traceTimes = 5
)

// takeBreakdown lets the agents of a mode trace a sample of packets while traffic of a kind runs. Where no agent carries
// packets nothing is measured: what the kernel's tunnels and wireguard-go do inside is not known.
func takeBreakdown(kind string) func(context.Context, *AllOptions, *stand, *result.Round) error {
	return func(ctx context.Context, o *AllOptions, s *stand, d *result.Round) error {
		if s.paths == "" || s.paths == Direct || s.fast() {
			return nil
		}
		length, margin := min(max(o.Duration, traceLeast), api.MaxTrace), traceMargin
		for range traceTimes {
			moved := make(chan error, 1)
			go func() { moved <- s.move(ctx, kind, o.warm()+length+margin) }()
			err := traffic.Sleep(ctx, o.warm())
			var b result.Breakdown
			if err == nil {
				b, err = s.traceAgents(ctx, length)
			}
			if err := errors.Join(err, <-moved); err != nil {
				return err
			}
			if b.Sent > 0 && b.Received > 0 {
				b.Traffic = kind
				d.Breakdown = append(d.Breakdown, b)
				return nil
			}
			length, margin = min(2*length, api.MaxTrace), 2*margin
		}
		return fmt.Errorf("the agents have sampled no packets in %d traces, each longer than the one before: none passed through them", traceTimes)
	}
}

// move runs traffic of a kind of Breakdown for d.
func (s *stand) move(ctx context.Context, kind string, d time.Duration) error {
	var err error
	switch kind {
	case result.TraceTCP:
		_, err = measureTCP(ctx, &s.ends, 1, 0, d, s.tunnel.pids)
	case result.TraceUDP:
		_, err = udpTrial(ctx, &s.ends, 64, 1, 0, d, s.tunnel.pids)
	default:
		_, err = placed(s.tunnel.pids, true, func(cpus Sides) (*result.Latency, error) {
			return overUDP(&s.ends, cpus, func(fd int) (*result.Latency, error) { return traffic.PingPong(ctx, fd, 64, 0, d, 0) })
		})
	}
	return err
}

// traceAgents traces both agents at once. Of the agent that sends it takes the stages until the packet is sent, of the other
// one those after that.
func (s *stand) traceAgents(ctx context.Context, d time.Duration) (result.Breakdown, error) {
	type outcome struct {
		api.Trace
		err error
	}
	var found [2]outcome
	ended := make(chan int, 2)
	for i, h := range s.lab.Hosts() {
		go func() {
			c, err := s.lab.Client(h.Name)
			if err == nil {
				found[i].Trace, err = c.Trace(ctx, api.TraceRequest{Duration: d})
			}
			found[i].err = err
			ended <- i
		}()
	}
	var b result.Breakdown
	var err error
	for range found {
		if i := <-ended; found[i].err != nil {
			err = errors.Join(err, fmt.Errorf("trace the agent on %s: %w", s.lab.Hosts()[i].Name, found[i].err))
		}
	}
	if err != nil {
		return b, err
	}
	b.Sent, b.Received = found[0].Sent, found[1].Received
	b.Interrupted = found[0].Interrupted + found[1].Interrupted
	for i, stage := range found[0].Stages {
		if stage.Name == result.FirstReceiving {
			b.Stages = append(b.Stages, stagesOf(found[1].Stages[i:])...)
			break
		}
		b.Stages = append(b.Stages, stagesOf(found[0].Stages[i:i+1])...)
	}
	return b, nil
}

func stagesOf(in []api.TraceStage) (out []result.StageTime) {
	for _, s := range in {
		out = append(out, result.StageTime{Name: s.Name, Nanoseconds: s.PerPacket})
	}
	return out
}
