package bench

import (
	"fmt"
	"net/netip"
	"time"

	"golang.org/x/sys/unix"
)

// Ends are the two ends of a measurement, each with an address. Traffic goes from From to To. They are pods of a lab, but
// the measuring code does not depend on labs.
type Ends struct {
	From, To         string
	FromAddr, ToAddr netip.Addr
	// Do runs fn on a thread in the network namespace of From or To. Sockets that fn makes stay there.
	Do func(place string, fn func() error) error
}

// socketBuffer is the buffer size of each socket of the generator, in bytes. It is large enough that the generator itself
// loses no packets while it waits for a CPU.
const socketBuffer = 8 << 20

// readTimeout ends a blocking read, so that its loop can check whether to stop.
const readTimeout = 50 * time.Millisecond

// socket creates a blocking socket at a place, bound to a port that the kernel chooses.
func (e *Ends) socket(place string, addr netip.Addr, typ int) (fd int, err error) {
	fd = -1
	err = e.Do(place, func() error {
		family := unix.AF_INET
		if addr.Is6() {
			family = unix.AF_INET6
		}
		if fd, err = unix.Socket(family, typ|unix.SOCK_CLOEXEC, 0); err != nil {
			return err
		}
		wait := unix.NsecToTimeval(int64(readTimeout))
		if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &wait); err != nil {
			return err
		}
		if typ == unix.SOCK_DGRAM {
			for _, opt := range []int{unix.SO_RCVBUFFORCE, unix.SO_SNDBUFFORCE} {
				if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, opt, socketBuffer); err != nil {
					return fmt.Errorf("socket buffer of %d bytes: %w", socketBuffer, err)
				}
			}
		}
		return unix.Bind(fd, sockaddr(netip.AddrPortFrom(addr, 0)))
	})
	if err != nil {
		if fd >= 0 {
			unix.Close(fd)
		}
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

func sockaddr(a netip.AddrPort) unix.Sockaddr {
	if a.Addr().Is4() {
		return &unix.SockaddrInet4{Port: int(a.Port()), Addr: a.Addr().As4()}
	}
	return &unix.SockaddrInet6{Port: int(a.Port()), Addr: a.Addr().As16()}
}

// passing reports whether an error of a connected socket is transient: a timeout, a signal, an earlier ICMP error.
func passing(err error) bool {
	switch err {
	case unix.EAGAIN, unix.EINTR, unix.ECONNREFUSED, unix.EHOSTUNREACH, unix.ENETUNREACH, unix.ENOBUFS:
		return true
	}
	return false
}
