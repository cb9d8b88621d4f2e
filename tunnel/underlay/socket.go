package underlay

import (
	"errors"
	"fmt"
	"net/netip"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tulle-net/tulle/internal/sys"
)

// The inner protocols of raw sockets.
const (
	ProtoIPv4 = 4  // RFC 2003, RFC 2473
	ProtoIPv6 = 41 // RFC 4213, RFC 2473
)

// DefaultBuffer is the default size of a socket's receive and send buffer, in bytes. It
// holds 64 full trains, or about ten thousand small packets, for each of which the
// kernel accounts at least 768 bytes.
const DefaultBuffer = 8 << 20

// Options of a UDP socket. The zero value of a field means its default.
type Options struct {
	Bind      netip.AddrPort // address and port; required, the address may be unspecified, the port 0
	RecvBuf   int            // bytes; DefaultBuffer
	SendBuf   int            // bytes; DefaultBuffer
	Bare      bool           // send datagrams without UDP checksum; for IPv4, and no trains
	ReusePort bool           // share the port with other sockets (one per queue); the kernel spreads flows over them
	Mark      uint32         // SO_MARK of sent packets
	Kept      *Kept          // if such a socket is there, it is taken instead of a new one
}

// A Socket is a UDP or raw socket of the underlay.
type Socket struct {
	fd     int
	local  netip.AddrPort
	proto  int // raw: 4 or 41; UDP: 0
	recv   int // actual buffer sizes, in bytes as the kernel counts them
	send   int
	poller *sys.Poller

	pending   bool // Recv met an ICMP error, which the error queue has; of the goroutine that receives
	overflows atomic.Uint64
	truncated atomic.Uint64
	closed    atomic.Bool
}

// ListenUDP opens the socket on which packets of peers arrive.
func ListenUDP(o Options) (*Socket, error) {
	s, err := openUDP(o)
	if errors.Is(err, unix.EADDRINUSE) {
		return nil, fmt.Errorf("UDP port %d on %v is in use: %w", o.Bind.Port(), o.Bind.Addr(), err)
	}
	return s, err
}

// senderRecvBuf limits the error queue of a send-only socket, in bytes.
const senderRecvBuf = 64 << 10

// OpenSender opens a UDP socket that only sends, from the given address and source
// port. Packets that arrive on it are dropped before they use memory. Its error queue
// works and must be drained.
func OpenSender(o Options) (*Socket, error) {
	if o.RecvBuf == 0 {
		o.RecvBuf = senderRecvBuf
	}
	s, err := openUDP(o)
	if errors.Is(err, unix.EADDRINUSE) {
		return nil, fmt.Errorf("UDP source port %d on %v is in use: %w", o.Bind.Port(), o.Bind.Addr(), err)
	}
	if err != nil {
		return nil, err
	}
	if err := sys.DropAllInput(s.fd); err != nil {
		s.Close()
		return nil, err
	}
	return s, nil
}

// ListenRaw opens a raw socket of the IP protocol proto (4 or 41), bound to the local
// address bind. It sends inner packets; the kernel adds the outer header. On IPv4 it
// receives packets with their outer IP header, on IPv6 without.
func ListenRaw(bind netip.Addr, proto int, o Options) (*Socket, error) {
	if proto != ProtoIPv4 && proto != ProtoIPv6 {
		return nil, fmt.Errorf("raw socket: protocol %d is neither 4 nor 41", proto)
	}
	o.Bind = netip.AddrPortFrom(bind, 0)
	s, err := open(o, unix.SOCK_RAW, proto)
	if errors.Is(err, unix.EPERM) || errors.Is(err, unix.EACCES) {
		return nil, fmt.Errorf("raw socket of protocol %d: not permitted: run as root, or with the capability CAP_NET_RAW: %w", proto, err)
	}
	return s, err
}

func openUDP(o Options) (*Socket, error) { return open(o, unix.SOCK_DGRAM, 0) }

func open(o Options, typ, proto int) (*Socket, error) {
	bind := netip.AddrPortFrom(o.Bind.Addr().Unmap(), o.Bind.Port())
	if !bind.Addr().IsValid() {
		return nil, errors.New("underlay socket: no address to bind to")
	}
	domain := unix.AF_INET
	if bind.Addr().Is6() {
		domain = unix.AF_INET6
	}
	fd := o.Kept.take(bind, typ, proto, o.ReusePort)
	bound := fd >= 0
	if !bound {
		var err error
		if fd, err = sys.Socket(domain, typ, proto); err != nil {
			return nil, fmt.Errorf("underlay socket: %w", err)
		}
	}
	s := &Socket{fd: fd, proto: proto}
	err := s.configure(o, domain, bound)
	if err != nil {
		sys.Close(fd)
		return nil, fmt.Errorf("underlay socket: %w", err)
	}
	if !bound {
		err = sys.Bind(fd, bind)
	}
	if err != nil {
		sys.Close(fd)
		if errors.Is(err, unix.EADDRNOTAVAIL) {
			return nil, fmt.Errorf("underlay socket: %v is not an address of this host: %w", bind.Addr(), err)
		}
		return nil, fmt.Errorf("bind %v: %w", bind, err)
	}
	if s.local, err = sys.LocalAddr(fd); err != nil {
		sys.Close(fd)
		return nil, err
	}
	if proto != 0 {
		s.local = netip.AddrPortFrom(s.local.Addr(), 0)
	}
	if s.poller, err = sys.NewPoller(fd); err != nil {
		sys.Close(fd)
		return nil, err
	}
	return s, nil
}

// configure sets all options before bind, so that they apply to the first packet. A socket that is bound already has those that
// cannot be changed any more.
func (s *Socket) configure(o Options, domain int, bound bool) error {
	recv, send := o.RecvBuf, o.SendBuf
	if recv == 0 {
		recv = DefaultBuffer
	}
	if send == 0 {
		send = DefaultBuffer
	}
	var err error
	if s.recv, s.send, err = sys.SetBuffers(s.fd, recv, send); err != nil {
		return err
	}
	if err := sys.SetRecvTimeout(s.fd, sys.HotWait); err != nil {
		return err
	}
	type option struct {
		level, opt, value int
		name              string
	}
	opts := []option{{unix.SOL_SOCKET, unix.SO_RXQ_OVFL, 1, "SO_RXQ_OVFL"}}
	if domain == unix.AF_INET {
		opts = append(opts,
			option{unix.SOL_IP, unix.IP_MTU_DISCOVER, unix.IP_PMTUDISC_PROBE, "IP_MTU_DISCOVER"},
			option{unix.SOL_IP, unix.IP_RECVTOS, 1, "IP_RECVTOS"},
			option{unix.SOL_IP, unix.IP_RECVERR, 1, "IP_RECVERR"},
			option{unix.SOL_IP, unix.IP_TTL, 64, "IP_TTL"})
	} else {
		opts = append(opts,
			option{unix.SOL_IPV6, unix.IPV6_MTU_DISCOVER, unix.IPV6_PMTUDISC_PROBE, "IPV6_MTU_DISCOVER"},
			option{unix.SOL_IPV6, unix.IPV6_RECVTCLASS, 1, "IPV6_RECVTCLASS"},
			option{unix.SOL_IPV6, unix.IPV6_RECVERR, 1, "IPV6_RECVERR"},
			option{unix.SOL_IPV6, unix.IPV6_UNICAST_HOPS, 64, "IPV6_UNICAST_HOPS"})
	}
	if domain == unix.AF_INET6 && s.proto == 0 && !bound { // raw IPv6 sockets never receive IPv4, and refuse the option
		opts = append(opts, option{unix.SOL_IPV6, unix.IPV6_V6ONLY, 1, "IPV6_V6ONLY"})
	}
	if o.ReusePort {
		opts = append(opts, option{unix.SOL_SOCKET, unix.SO_REUSEPORT, 1, "SO_REUSEPORT"})
	}
	if o.Bare {
		opts = append(opts, option{unix.SOL_SOCKET, unix.SO_NO_CHECK, 1, "SO_NO_CHECK"})
	}
	if o.Mark != 0 {
		opts = append(opts, option{unix.SOL_SOCKET, unix.SO_MARK, int(o.Mark), "SO_MARK"})
	}
	for _, o := range opts {
		if err := sys.SetInt(s.fd, o.level, o.opt, o.value, o.name); err != nil {
			return err
		}
	}
	if s.proto == 0 {
		// Linux 5.0. Without it datagrams arrive one by one.
		err := sys.SetInt(s.fd, unix.SOL_UDP, unix.UDP_GRO, 1, "UDP_GRO")
		if err != nil && !errors.Is(err, unix.ENOPROTOOPT) {
			return err
		}
	}
	return nil
}

// Local returns the address that the socket is bound to; port 0 for raw sockets.
func (s *Socket) Local() netip.AddrPort { return s.local }

// Is6 reports whether the outer header is IPv6.
func (s *Socket) Is6() bool { return s.local.Addr().Is6() }

// Proto returns the IP protocol of a raw socket, 4 or 41; 0 for UDP.
func (s *Socket) Proto() int { return s.proto }

// Buffers returns the actual buffer sizes, in bytes as the kernel counts them (twice
// the requested size, if it was granted).
func (s *Socket) Buffers() (recv, send int) { return s.recv, s.send }

// Wait blocks until a message can be received (nil), the error queue is not empty
// (sys.ErrErrQueue), or Wake is called (sys.ErrWoken), and returns how long it waited. One goroutine at a time.
func (s *Socket) Wait() (time.Duration, error) { return s.poller.WaitRead() }

// Pause sleeps for d, or until Wake is called, so that messages gather in the receive buffer.
func (s *Socket) Pause(d time.Duration) { s.poller.Pause(d) }

// Wake ends the current Wait or Pause, or else the next one: at once, or within some 40 ms if packets came shortly before.
func (s *Socket) Wake() { s.poller.Wake() }

// FD returns the socket's descriptor, for a service manager to keep (see [Kept]). It is valid until Close.
func (s *Socket) FD() int { return s.fd }

// Close closes the socket. Goroutines that use it must have returned; Wake ends a
// Wait.
func (s *Socket) Close() error {
	if s.closed.Swap(true) {
		return nil
	}
	return errors.Join(sys.Close(s.fd), s.poller.Close())
}
