package pair

import (
	"context"
	"errors"
	"fmt"
	"runtime"
	"sync/atomic"
	"time"

	"golang.org/x/net/ipv4"
	"golang.org/x/sys/unix"

	"github.com/tulle-net/tulle/bench/machine"
	"github.com/tulle-net/tulle/bench/result"
	"github.com/tulle-net/tulle/bench/traffic"
)

// onThread runs fn on a thread of its own.
func onThread(fn func() error) error {
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread ends with its goroutine
		done <- fn()
	}()
	return <-done
}

// overUDP measures over a flow that is echoed.
func (rn *runner) overUDP(ctx context.Context, d *result.Round, measure func(fd int) (*result.Latency, error)) error {
	if _, err := rn.c.order(jobEcho, 1); err != nil {
		return err
	}
	return rn.echoed(ctx, d, measure)
}

// echoed does so while a job runs that echoes.
func (rn *runner) echoed(ctx context.Context, d *result.Round, measure func(fd int) (*result.Latency, error)) error {
	fd, buffer, err := rn.c.flow(ctx, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	rn.r.Machines[0].Buffer = buffer
	return onThread(func() error {
		l, err := measure(fd)
		if err == nil && l.Answers == 0 {
			if _, err := rn.c.order("count", 0); err != nil { // the server says why
				return err
			}
			err = fmt.Errorf("no datagram of %d bytes was answered%s", l.Payload, rn.tooLarge(l.Payload))
		}
		if err == nil {
			d.Latency = append(d.Latency, *l)
		}
		return err
	})
}

// rate is how many exchanges of a number of bytes a second the run may have; 0: any.
func (rn *runner) rate(bytes int) float64 {
	most := rn.c.welcome.MaxRate / 8 / float64(bytes)
	if rn.o.Gentle && (most == 0 || most > rn.o.Rate) {
		most = rn.o.Rate
	}
	return most
}

// every is the least time from one exchange of a number of bytes to the next; 0: none.
func (rn *runner) every(bytes int) (time.Duration, error) {
	rate := rn.rate(bytes)
	if rate == 0 {
		return 0, nil
	}
	if rate*rn.o.Duration.Seconds() < 1 {
		return 0, rn.tooSlow("exchange", bytes, rn.o.Duration)
	}
	return time.Duration(float64(time.Second) / rate), nil
}

// tooSlow says that the limit has no room for anything within the time d.
func (rn *runner) tooSlow(what string, bytes int, d time.Duration) error {
	return fmt.Errorf("the limit of %.0f bit/s allows less than one %s of %d bytes within %v: measure for longer (--duration)", rn.c.welcome.MaxRate, what, bytes, d)
}

// openRate is the rate of the open loop, in datagrams a second.
func (rn *runner) openRate(payload int) float64 {
	if most := rn.rate(payload); most > 0 {
		return min(most, rn.o.Rate)
	}
	return rn.o.Rate
}

func (rn *runner) pingPong(payload int) func(context.Context, *result.Round) error {
	return func(ctx context.Context, d *result.Round) error {
		every, err := rn.every(payload)
		if err != nil {
			return err
		}
		return rn.overUDP(ctx, d, func(fd int) (*result.Latency, error) {
			return traffic.PingPong(ctx, fd, payload, rn.o.warm(), rn.o.Duration, every)
		})
	}
}

func (rn *runner) openLoop(payload int) func(context.Context, *result.Round) error {
	return func(ctx context.Context, d *result.Round) error {
		if _, err := rn.every(payload); err != nil {
			return err
		}
		return rn.overUDP(ctx, d, func(fd int) (*result.Latency, error) {
			return traffic.Paced(ctx, fd, payload, rn.openRate(payload), rn.o.warm(), rn.o.Duration, 4*rn.c.rtt)
		})
	}
}

// requests are requests and responses on one connection.
func (rn *runner) requests(ctx context.Context, d *result.Round) error {
	if _, err := rn.c.order(jobRespond, 1); err != nil {
		return err
	}
	fd, err := rn.c.stream(0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	request, buf := make([]byte, traffic.Request), make([]byte, traffic.Request)
	return rn.transactions(ctx, d, result.RR, func() error { return traffic.Exchange(ctx, fd, request, buf) })
}

// connections are requests on a connection each, which is closed with a reset so that ports do not run out.
func (rn *runner) connections(ctx context.Context, d *result.Round) error {
	if _, err := rn.c.order(jobRespond, maxFlows); err != nil {
		return err
	}
	request, buf := appendPreamble(nil, kindOnce, rn.c.welcome.Secret, 0), make([]byte, preambleSize)
	from, to := traffic.Numbered(rn.c.from), traffic.Sockaddr(rn.c.to)
	return rn.transactions(ctx, d, result.CRR, func() error {
		fd, err := traffic.Dial(from, to)
		if err != nil {
			return fmt.Errorf("connect: %w", err)
		}
		return errors.Join(traffic.Exchange(ctx, fd, request, buf), traffic.Reset(fd), unix.Close(fd))
	})
}

func (rn *runner) transactions(ctx context.Context, d *result.Round, kind string, one func() error) error {
	every, err := rn.every(traffic.Request)
	if err != nil {
		return err
	}
	return onThread(func() error {
		l, err := traffic.Transactions(ctx, kind, rn.o.warm(), rn.o.Duration, every, one)
		if err == nil {
			if rn.o.Gentle {
				l.Offered = rn.rate(traffic.Request)
			}
			d.Latency = append(d.Latency, *l)
		}
		return err
	})
}

// counted is a period in which both ends count.
type counted struct {
	rn  *runner
	cpu *machine.Meter
}

func (rn *runner) begin() (counted, error) {
	c := counted{rn: rn}
	if _, err := rn.c.order("begin", 0); err != nil {
		return c, err
	}
	if m, err := machine.Start(nil); err == nil {
		c.cpu = &m
	}
	return c, nil
}

// end returns what the server counted, with the CPU use of both ends.
func (c counted) end() (report, error) {
	r, err := c.rn.c.order("end", 0)
	if err != nil || c.cpu == nil || r.CPU == nil {
		r.CPU = nil
		return r, err
	}
	own, err := c.cpu.Stop()
	if err != nil {
		r.CPU = nil
		return r, nil
	}
	if c.rn.one { // the other end is among the others
		own.Busy, own.Others = own.Busy+own.Others, 0
		r.CPU = &own
	} else {
		sum := own.Plus(*r.CPU)
		r.CPU = &sum
	}
	return r, nil
}

func (rn *runner) tcp(streams int) func(context.Context, *result.Round) error {
	return func(ctx context.Context, d *result.Round) error {
		t := result.TCP{Streams: streams}
		var err error
		t.Retransmits, err = rn.beside(jobStream, streams, func() error { return rn.countTCP(ctx, &t) })
		if err == nil {
			d.TCP = append(d.TCP, t)
		}
		return err
	}
}

// loaded measures latency beside TCP streams.
func (rn *runner) loaded(ctx context.Context, d *result.Round) error {
	every, err := rn.every(traffic.LoadedPayload)
	if err != nil {
		return err
	}
	_, err = rn.beside(jobLoaded, rn.o.Streams, func() error {
		return rn.echoed(ctx, d, func(fd int) (*result.Latency, error) {
			l, err := traffic.Loaded(ctx, fd, rn.warmTCP(), rn.o.Duration, every)
			if err != nil {
				return nil, err
			}
			// Echoes count, too, those of the warm-up among them.
			got, err := rn.c.order("count", 0)
			if echoes := 2 * traffic.LoadedPayload * (l.Answers + l.Lost + 10); err == nil && got.Bytes < echoes {
				err = fmt.Errorf("the TCP streams carried nothing%s", rn.hole())
			}
			return l, err
		})
	})
	return err
}

// beside calls measure while TCP streams of the job run, and returns how many segments they have retransmitted.
func (rn *runner) beside(job string, streams int, measure func() error) (retransmits uint32, err error) {
	if _, err := rn.c.order(job, streams); err != nil {
		return 0, err
	}
	var stop atomic.Bool
	type outcome struct {
		retransmits uint32
		err         error
	}
	ended := make(chan outcome, streams)
	started := 0
	for i := range streams {
		var fd int
		if fd, err = rn.c.stream(i); err != nil {
			break
		}
		if most := rn.c.welcome.MaxRate; most > 0 {
			err = unix.SetsockoptUint64(fd, unix.SOL_SOCKET, unix.SO_MAX_PACING_RATE, uint64(most/8/float64(streams)))
		}
		started++
		go func() { // on its own thread
			defer unix.Close(fd)
			n, err := traffic.TCPSource(fd, &stop)
			ended <- outcome{n, err}
		}()
	}
	if err == nil {
		err = measure()
	}
	stop.Store(true)
	for range started {
		o := <-ended
		retransmits += o.retransmits
		err = errors.Join(err, o.err)
	}
	return retransmits, err
}

// countTCP counts what arrives while streams run.
func (rn *runner) countTCP(ctx context.Context, t *result.TCP) error {
	if err := traffic.Sleep(ctx, rn.warmTCP()); err != nil {
		return err
	}
	c, err := rn.begin()
	if err != nil {
		return err
	}
	if err := traffic.Await(ctx, rn.o.Duration, func() (bool, error) {
		r, err := rn.c.order("count", 0)
		return r.Bytes > 0, err
	}); err != nil {
		return err
	}
	got, err := c.end()
	if err != nil {
		return err
	}
	if got.Bytes == 0 {
		return fmt.Errorf("no byte arrived within %.1f s%s", got.Seconds, rn.hole())
	}
	t.Bytes, t.Seconds, t.Gbps = got.Bytes, got.Seconds, float64(got.Bytes)*8/1e9/got.Seconds
	if got.CPU != nil {
		t.CPU = *got.CPU
	}
	return nil
}

// tooLarge says why datagrams may get lost that the path MTU has no room for.
func (rn *runner) tooLarge(payload int) string {
	if payload <= rn.full {
		return ""
	}
	return fmt.Sprintf(": with its headers that is a packet of %d bytes, and the path takes %d. What drops larger ones does not say so (ICMP), or fragments get lost: use --sizes of at most %d",
		payload+rn.r.MTU-rn.full, rn.r.MTU, rn.full)
}

// hole says why TCP may stand still where the path takes smaller packets than the link.
func (rn *runner) hole() string {
	if link := rn.r.Machines[0].LinkMTU; rn.r.MTU > 0 && rn.r.MTU < link {
		return fmt.Sprintf(": the path takes packets of %d bytes and the link of %d, and TCP does not learn of it. What drops larger ones has to say so (ICMP), or the link's MTU has to be %[1]d", rn.r.MTU, link)
	}
	return ""
}

func (rn *runner) flood(flows int) func(context.Context, *result.Round) error {
	return func(ctx context.Context, d *result.Round) error {
		conns, closeAll, err := rn.c.sinkFlows(ctx, flows)
		if err != nil {
			return err
		}
		defer closeAll()
		t, err := rn.trial(ctx, conns, rn.full, 0, rn.o.Duration)
		if err == nil {
			d.Floods = append(d.Floods, result.Flood{Flows: flows, Payload: rn.full, Trial: t})
		}
		return err
	}
}

func (rn *runner) search(payload int, full bool) func(context.Context, *result.Round) error {
	return func(ctx context.Context, d *result.Round) error {
		conns, closeAll, err := rn.c.sinkFlows(ctx, 1)
		if err != nil {
			return err
		}
		defer closeAll()
		s, err := traffic.SearchRate(payload, 5*rn.o.Duration, func(rate float64) (result.Trial, error) {
			return rn.trial(ctx, conns, payload, rate, rn.o.Duration/4)
		})
		if err == nil {
			s.Full = full
			d.UDP = append(d.UDP, s)
		}
		return err
	}
}

// trial sends datagrams in all flows at a total rate for d; 0 is as fast as the sender can, or as the server allows.
func (rn *runner) trial(ctx context.Context, flows []*ipv4.PacketConn, payload int, rate float64, d time.Duration) (result.Trial, error) {
	if most := rn.c.welcome.MaxRate / 8 / float64(payload); most > 0 && (rate == 0 || rate > most) {
		rate = most
		if most*d.Seconds() < 1 {
			return result.Trial{}, rn.tooSlow("datagram", payload, d)
		}
	}
	t := result.Trial{Offered: rate}
	c, err := rn.begin()
	if err != nil {
		return t, err
	}
	parts := make([]result.Trial, len(flows))
	errs := make(chan error, len(flows))
	for i, f := range flows {
		parts[i].Offered = rate / float64(len(flows))
		go func() { errs <- traffic.UDPSource(ctx, f, payload, d, &parts[i]) }()
	}
	for range flows {
		err = errors.Join(err, <-errs)
	}
	if err != nil {
		return t, err
	}
	for _, p := range parts {
		t.Sent += p.Sent
		t.Seconds = max(t.Seconds, p.Seconds)
	}
	err = traffic.Settle(ctx, t.Sent, traffic.Silence+2*rn.c.rtt, func() (uint64, error) {
		r, err := rn.c.order("count", 0)
		return r.Received, err
	})
	if err != nil {
		return t, err
	}
	r, err := c.end()
	if err != nil {
		return t, err
	}
	t.Received, t.Reordered, t.Arriving, t.CPU = r.Received, r.Reordered, r.Arriving, r.CPU
	return t, nil
}
