package bench

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"time"

	"golang.org/x/net/ipv4"
	"golang.org/x/sys/unix"

	"github.com/tulle-net/tulle/bench/machine"
	"github.com/tulle-net/tulle/bench/result"
	"github.com/tulle-net/tulle/bench/traffic"
)

// Ends are the two ends of a measurement, each with an address. Traffic goes from From to To. They are pods of a lab, but
// the measuring code does not depend on labs.
type Ends struct {
	From, To         string
	FromAddr, ToAddr netip.Addr
	Congestion       string // TCP congestion control of the sockets; "" for the system's
	// Do runs fn on a thread in the network namespace of From or To. Sockets that fn makes stay there.
	Do func(place string, fn func() error) error
}

// open creates a blocking socket in the calling thread's network namespace, bound to a port that the kernel chooses.
func (e *Ends) open(addr netip.Addr, typ int) (fd int, err error) {
	if fd, _, err = traffic.Socket(netip.AddrPortFrom(addr, 0), typ); err != nil || typ != unix.SOCK_STREAM || e.Congestion == "" {
		return fd, err
	}
	if err := setCongestion(fd, e.Congestion); err != nil {
		unix.Close(fd)
		return -1, err
	}
	return fd, nil
}

// setCongestion sets a TCP socket's congestion control. A socket that listens hands it on to the connections. Root may take any that
// the kernel has; the sysctl of a namespace only takes those that the machine allows to everybody (tcp_allowed_congestion_control).
func setCongestion(fd int, name string) error {
	if err := unix.SetsockoptString(fd, unix.SOL_TCP, unix.TCP_CONGESTION, name); err != nil {
		return fmt.Errorf("TCP congestion control %q (--congestion; sysctl net.ipv4.tcp_available_congestion_control lists those of this kernel): %w", name, err)
	}
	return nil
}

// checkCongestion returns an error if this kernel does not have such a congestion control.
func checkCongestion(name string) error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	return setCongestion(fd, name)
}

// socket creates a socket at a place, as open does.
func (e *Ends) socket(place string, addr netip.Addr, typ int) (fd int, err error) {
	err = e.Do(place, func() error {
		fd, err = e.open(addr, typ)
		return err
	})
	if err != nil {
		return -1, fmt.Errorf("socket in %s: %w", place, err)
	}
	return fd, nil
}

// udpPair creates a UDP socket at each end and connects them, so that reads and writes need no address.
func (e *Ends) udpPair() (from, to int, err error) {
	if from, err = e.socket(e.From, e.FromAddr, unix.SOCK_DGRAM); err != nil {
		return -1, -1, err
	}
	if to, err = e.socket(e.To, e.ToAddr, unix.SOCK_DGRAM); err != nil {
		unix.Close(from)
		return -1, -1, err
	}
	for _, c := range [][2]int{{from, to}, {to, from}} {
		var peer unix.Sockaddr
		if peer, err = unix.Getsockname(c[1]); err == nil {
			err = unix.Connect(c[0], peer)
		}
		if err != nil {
			unix.Close(from)
			unix.Close(to)
			return -1, -1, fmt.Errorf("connect %s and %s: %w", e.From, e.To, err)
		}
	}
	return from, to, nil
}

// udpFlow is a UDP flow from one end to the other, whose arrivals are counted until it is closed.
type udpFlow struct {
	source, in *ipv4.PacketConn
	sink       traffic.Sink
	ended      chan error // of the sink
}

func (e *Ends) udpFlow() (*udpFlow, error) {
	from, to, err := e.udpPair()
	if err != nil {
		return nil, err
	}
	f := &udpFlow{ended: make(chan error, 1)}
	if f.source, err = traffic.PacketConn(from); err != nil {
		unix.Close(to)
		return nil, err
	}
	if f.in, err = traffic.PacketConn(to); err != nil {
		f.source.Close()
		return nil, err
	}
	go func() { f.ended <- f.sink.Run(f.in) }() // ends when in is closed
	return f, nil
}

func (f *udpFlow) close() error {
	f.source.Close()
	f.in.Close()
	return <-f.ended
}

// udpTrial sends datagrams of payload bytes for d, at a total rate over some flows (0: as fast as the senders can), and counts
// those that arrive and the CPU time. Each sender and each receiver runs on its own thread. pids are the tunnel's processes.
func udpTrial(ctx context.Context, e *Ends, payload, flows int, rate float64, d time.Duration, pids []int) (t result.Trial, err error) {
	t.Offered = rate
	var open []*udpFlow
	defer func() {
		for _, f := range open {
			err = errors.Join(err, f.close())
		}
	}()
	for range flows {
		f, err := e.udpFlow()
		if err != nil {
			return t, err
		}
		open = append(open, f)
	}
	cpu, err := machine.Start(pids)
	if err != nil {
		return t, err
	}
	parts, sent := make([]result.Trial, flows), make(chan error, flows)
	for i, f := range open {
		parts[i].Offered = rate / float64(flows)
		go func() { sent <- traffic.UDPSource(ctx, f.source, payload, d, &parts[i]) }()
	}
	for range open {
		err = errors.Join(err, <-sent)
	}
	for _, p := range parts {
		t.Sent, t.Seconds = t.Sent+p.Sent, max(t.Seconds, p.Seconds)
	}
	if err == nil {
		err = traffic.Settle(ctx, t.Sent, traffic.Silence, func() (n uint64, err error) {
			for _, f := range open {
				got, _, _ := f.sink.Count()
				n += got
			}
			return n, nil
		})
	}
	use, cerr := cpu.Stop()
	t.CPU = &use
	for _, f := range open {
		received, reordered, arriving := f.sink.Count()
		t.Received, t.Reordered, t.Arriving = t.Received+received, t.Reordered+reordered, max(t.Arriving, arriving)
	}
	return t, errors.Join(err, cerr)
}
