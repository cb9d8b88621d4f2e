package lab

import (
	"context"
	"encoding/binary"
	"fmt"
	"net/netip"
	"slices"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// Latency is the round-trip times of 64-byte UDP echoes, each sent when the one before had its answer.
type Latency struct {
	Rounds, Lost          int
	Min, Median, P90, P99 time.Duration
}

const (
	latencyPort    = 7007
	latencyPayload = 64
	latencyWarmup  = 200 // rounds that are not counted
)

// Latency measures the round trip between a pod and an address of another pod. Both ends are blocking sockets on threads
// of their own in this process; the CPUs are not kept awake, so that on an idle machine the wake-ups are part of the result.
func (l *Lab) Latency(ctx context.Context, from, to string, addr netip.Addr, rounds int) (Latency, error) {
	server, err := l.udpSocket(to, addr)
	if err != nil {
		return Latency{}, err
	}
	var stop atomic.Bool
	served := make(chan error, 1)
	go func() {
		defer unix.Close(server)
		served <- serveEchoes(server, &stop)
	}()
	defer func() {
		stop.Store(true)
		<-served
	}()
	client, err := l.udpSocket(from, zeroOf(addr))
	if err != nil {
		return Latency{}, err
	}
	defer unix.Close(client)
	if err := unix.Connect(client, sockaddr(netip.AddrPortFrom(addr, latencyPort))); err != nil {
		return Latency{}, fmt.Errorf("connect to %v: %w", addr, err)
	}
	return measure(ctx, client, rounds)
}

// udpSocket makes a bound blocking UDP socket in target's namespace whose reads give up after a moment. The unspecified
// address gets a port of the kernel's choice.
func (l *Lab) udpSocket(target string, addr netip.Addr) (fd int, err error) {
	err = l.Do(target, func() error {
		family, port := unix.AF_INET, uint16(latencyPort)
		if addr.Is6() {
			family = unix.AF_INET6
		}
		if addr.IsUnspecified() {
			port = 0
		}
		if fd, err = unix.Socket(family, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0); err != nil {
			return err
		}
		wait := unix.NsecToTimeval(int64(100 * time.Millisecond))
		if err = unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &wait); err == nil {
			err = unix.Bind(fd, sockaddr(netip.AddrPortFrom(addr, port)))
		}
		if err != nil {
			unix.Close(fd)
		}
		return err
	})
	if err != nil {
		return -1, fmt.Errorf("UDP socket in %s: %w", target, err)
	}
	return fd, nil
}

func sockaddr(a netip.AddrPort) unix.Sockaddr {
	if a.Addr().Is4() {
		return &unix.SockaddrInet4{Port: int(a.Port()), Addr: a.Addr().As4()}
	}
	return &unix.SockaddrInet6{Port: int(a.Port()), Addr: a.Addr().As16()}
}

// serveEchoes sends back what comes, to the first who sent something, until stop.
func serveEchoes(fd int, stop *atomic.Bool) error {
	buf := make([]byte, 2048)
	connected := false
	for !stop.Load() {
		n, from, err := unix.Recvfrom(fd, buf, 0)
		if err == unix.EAGAIN || err == unix.EINTR || err == unix.ECONNREFUSED {
			continue
		} else if err != nil {
			return err
		}
		if !connected { // from now on, reads and writes carry no address
			if err := unix.Connect(fd, from); err != nil {
				return err
			}
			connected = true
		}
		_, _ = unix.Write(fd, buf[:n]) // a lost answer is the client's to count
	}
	return nil
}

// measure runs the rounds over a connected socket.
func measure(ctx context.Context, fd, rounds int) (Latency, error) {
	var out, in [latencyPayload]byte
	took := make([]time.Duration, 0, rounds)
	res := Latency{Rounds: rounds}
	for i := -latencyWarmup; i < rounds; i++ {
		if err := ctx.Err(); err != nil {
			return res, err
		}
		binary.BigEndian.PutUint64(out[:], uint64(i+latencyWarmup)) // tells a late answer from the awaited one
		start := time.Now()
		if _, err := unix.Write(fd, out[:]); err != nil {
			return res, fmt.Errorf("send: %w", err)
		}
		ok := false
		for !ok {
			n, err := unix.Read(fd, in[:])
			if err == unix.EINTR {
				continue
			}
			if err == unix.EAGAIN {
				break
			} else if err != nil {
				return res, fmt.Errorf("receive: %w", err)
			}
			ok = n == len(out) && in == out
		}
		switch {
		case i < 0:
		case ok:
			took = append(took, time.Since(start))
		default:
			res.Lost++
		}
	}
	if len(took) == 0 {
		return res, fmt.Errorf("none of %d datagrams was answered", rounds)
	}
	slices.Sort(took)
	at := func(share float64) time.Duration { return took[min(int(share*float64(len(took))), len(took)-1)] }
	res.Min, res.Median, res.P90, res.P99 = took[0], at(0.5), at(0.9), at(0.99)
	return res, nil
}
