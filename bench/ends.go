package bench

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tulle-net/tulle/bench/result"
	"github.com/tulle-net/tulle/bench/traffic"
)

// Ends are the two ends of a measurement, each with an address. Traffic goes from From to To. They are pods of a lab, but
// the measuring code does not depend on labs.
type Ends struct {
	From, To         string
	FromAddr, ToAddr netip.Addr
	// Do runs fn on a thread in the network namespace of From or To. Sockets that fn makes stay there.
	Do func(place string, fn func() error) error
}

// socket creates a blocking socket at a place, bound to a port that the kernel chooses.
func (e *Ends) socket(place string, addr netip.Addr, typ int) (fd int, err error) {
	err = e.Do(place, func() error {
		fd, _, err = traffic.Socket(netip.AddrPortFrom(addr, 0), typ)
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

// udpTrial sends datagrams of payload bytes at a rate for d, and counts those that arrive. Sender and receiver run on their
// own threads.
func udpTrial(ctx context.Context, e *Ends, payload int, rate float64, d time.Duration) (result.Trial, error) {
	from, to, err := e.udpPair()
	if err != nil {
		return result.Trial{}, err
	}
	source, err := traffic.PacketConn(from)
	if err != nil {
		unix.Close(to)
		return result.Trial{}, err
	}
	defer source.Close()
	in, err := traffic.PacketConn(to)
	if err != nil {
		return result.Trial{}, err
	}
	t := result.Trial{Offered: rate}
	var sink traffic.Sink
	ended, sent := make(chan error, 1), make(chan error, 1)
	go func() { ended <- sink.Run(in) }() // ends when in is closed
	go func() { sent <- traffic.UDPSource(ctx, source, payload, d, &t) }()
	err = <-sent
	if err == nil {
		err = traffic.Settle(ctx, t.Sent, traffic.Silence, func() (uint64, error) {
			n, _, _ := sink.Count()
			return n, nil
		})
	}
	in.Close()
	err = errors.Join(err, <-ended)
	t.Received, t.Reordered, t.Arriving = sink.Count()
	return t, err
}
