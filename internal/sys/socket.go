package sys

import (
	"errors"
	"fmt"
	"net/netip"
	"runtime"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Socket opens a non-blocking, close-on-exec socket.
func Socket(domain, typ, proto int) (int, error) {
	return unix.Socket(domain, typ|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, proto)
}

// SetRecvTimeout makes a socket a blocking one, whose calls that receive wait at most for d.
func SetRecvTimeout(fd int, d time.Duration) error {
	tv := unix.NsecToTimeval(int64(d))
	if err := errors.Join(unix.SetNonblock(fd, false), unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &tv)); err != nil {
		return fmt.Errorf("setsockopt SO_RCVTIMEO=%v: %w", d, err)
	}
	return nil
}

// Arrived returns when the message that was received last from a socket came into the host, by the wall clock. The first call has
// the kernel keep these times, for all packets of the machine and until the socket is closed; to what came before, it gives the present. (Linux 5.1; sock_gettstamp
// in net/core/sock.c.)
func Arrived(fd int) (time.Time, error) {
	var ts [2]int64 // struct __kernel_timespec
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), unix.SIOCGSTAMPNS_NEW, uintptr(unsafe.Pointer(&ts))); errno != 0 {
		return time.Time{}, fmt.Errorf("ioctl SIOCGSTAMPNS: %w", errno)
	}
	return time.Unix(ts[0], ts[1]), nil
}

// Close closes a descriptor.
func Close(fd int) error { return unix.Close(fd) }

// Dup duplicates a descriptor, close-on-exec.
func Dup(fd int) (int, error) {
	return unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0)
}

// SetInt sets an integer socket option; the name is for the error.
func SetInt(fd, level, opt, value int, name string) error {
	if err := unix.SetsockoptInt(fd, level, opt, value); err != nil {
		return fmt.Errorf("setsockopt %s=%d: %w", name, value, err)
	}
	return nil
}

// GetInt reads an integer socket option; the name is for the error.
func GetInt(fd, level, opt int, name string) (int, error) {
	v, err := unix.GetsockoptInt(fd, level, opt)
	if err != nil {
		return 0, fmt.Errorf("getsockopt %s: %w", name, err)
	}
	return v, nil
}

// SetBuffers requests socket buffers of the given sizes in bytes; 0 keeps the kernel's
// default. With the privilege it exceeds net.core.{r,w}mem_max, otherwise the size is
// limited to that. It returns the actual sizes as the kernel counts them: twice the
// request, because the kernel adds its own overhead (socket(7)).
func SetBuffers(fd, recv, send int) (gotRecv, gotSend int, err error) {
	set := func(size, force, plain int, name string) error {
		if size <= 0 {
			return nil
		}
		if unix.SetsockoptInt(fd, unix.SOL_SOCKET, force, size) == nil {
			return nil
		}
		return SetInt(fd, unix.SOL_SOCKET, plain, size, name)
	}
	if err := set(recv, unix.SO_RCVBUFFORCE, unix.SO_RCVBUF, "SO_RCVBUF"); err != nil {
		return 0, 0, err
	}
	if err := set(send, unix.SO_SNDBUFFORCE, unix.SO_SNDBUF, "SO_SNDBUF"); err != nil {
		return 0, 0, err
	}
	if gotRecv, err = GetInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUF, "SO_RCVBUF"); err != nil {
		return 0, 0, err
	}
	if gotSend, err = GetInt(fd, unix.SOL_SOCKET, unix.SO_SNDBUF, "SO_SNDBUF"); err != nil {
		return 0, 0, err
	}
	return gotRecv, gotSend, nil
}

// Drops returns the number of messages that the socket has dropped since it was
// opened, because its buffer was full or a checksum was bad, modulo 2³²
// (SO_MEMINFO, SK_MEMINFO_DROPS).
func Drops(fd int) (uint32, error) {
	var info [9]uint32 // SK_MEMINFO_VARS
	const drops = 8    // SK_MEMINFO_DROPS
	size := uint32(unsafe.Sizeof(info))
	_, _, errno := unix.Syscall6(unix.SYS_GETSOCKOPT, uintptr(fd), unix.SOL_SOCKET, unix.SO_MEMINFO,
		uintptr(unsafe.Pointer(&info)), uintptr(unsafe.Pointer(&size)), 0)
	if errno != 0 {
		return 0, fmt.Errorf("getsockopt SO_MEMINFO: %w", errno)
	}
	return info[drops], nil
}

// DropAllInput makes a socket drop everything that arrives before it uses any buffer,
// by a classic BPF program of one instruction, "return 0". The error queue still
// works.
func DropAllInput(fd int) error {
	prog := unix.SockFprog{Len: 1, Filter: &unix.SockFilter{Code: unix.BPF_RET | unix.BPF_K, K: 0}}
	if err := unix.SetsockoptSockFprog(fd, unix.SOL_SOCKET, unix.SO_ATTACH_FILTER, &prog); err != nil {
		return fmt.Errorf("setsockopt SO_ATTACH_FILTER: %w", err)
	}
	runtime.KeepAlive(prog.Filter)
	return nil
}

// Bind binds a socket of addr's family. For raw sockets the port is zero.
func Bind(fd int, addr netip.AddrPort) error {
	return unix.Bind(fd, sockaddr(addr))
}

func sockaddr(addr netip.AddrPort) unix.Sockaddr {
	if addr.Addr().Is4() {
		return &unix.SockaddrInet4{Port: int(addr.Port()), Addr: addr.Addr().As4()}
	}
	return &unix.SockaddrInet6{Port: int(addr.Port()), Addr: addr.Addr().As16(), ZoneId: zoneID(addr.Addr())}
}

// LocalAddr returns the address that the socket is bound to.
func LocalAddr(fd int) (netip.AddrPort, error) {
	sa, err := unix.Getsockname(fd)
	if err != nil {
		return netip.AddrPort{}, fmt.Errorf("getsockname: %w", err)
	}
	switch sa := sa.(type) {
	case *unix.SockaddrInet4:
		return netip.AddrPortFrom(netip.AddrFrom4(sa.Addr), uint16(sa.Port)), nil
	case *unix.SockaddrInet6:
		return netip.AddrPortFrom(netip.AddrFrom16(sa.Addr), uint16(sa.Port)), nil
	}
	return netip.AddrPort{}, fmt.Errorf("getsockname: family of %T is not IP", sa)
}

// ErrMsg is one entry of a socket's error queue (ip(7), IP_RECVERR).
type ErrMsg struct {
	Err      unix.SockExtendedErr
	Offender netip.AddrPort // sender of the ICMP message; invalid for local errors
	Dest     netip.AddrPort // destination of the offending packet; invalid if unknown
	Data     []byte         // the quoted part of the offending packet's payload
}

// RecvErr reads one entry of the error queue of fd, with buf for its payload. It
// returns ErrAgain if the queue is empty.
func RecvErr(fd int, buf []byte) (ErrMsg, error) {
	var control [256]byte
	for {
		n, cn, _, from, err := unix.Recvmsg(fd, buf, control[:], unix.MSG_ERRQUEUE|unix.MSG_DONTWAIT)
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return ErrMsg{}, err
		}
		m := ErrMsg{Data: buf[:n]}
		switch from := from.(type) {
		case *unix.SockaddrInet4:
			m.Dest = netip.AddrPortFrom(netip.AddrFrom4(from.Addr), uint16(from.Port))
		case *unix.SockaddrInet6:
			m.Dest = netip.AddrPortFrom(netip.AddrFrom16(from.Addr), uint16(from.Port))
		}
		const size = int(unsafe.Sizeof(unix.SockExtendedErr{}))
		for c, rest, ok := NextControl(control[:cn]); ok; c, rest, ok = NextControl(rest) {
			is4 := c.Level == unix.SOL_IP && c.Type == unix.IP_RECVERR
			is6 := c.Level == unix.SOL_IPV6 && c.Type == unix.IPV6_RECVERR
			if !is4 && !is6 || len(c.Data) < size {
				continue
			}
			copy(unsafe.Slice((*byte)(unsafe.Pointer(&m.Err)), size), c.Data)
			m.Offender, _ = ParseSockaddr(c.Data[size:])
		}
		return m, nil
	}
}

// GetBytes reads a socket option of any layout into b, whose content the kernel may use as the question. It returns the
// number of bytes that the kernel says it has written.
func GetBytes(fd, level, opt int, b []byte) (int, error) {
	size := uint32(len(b))
	_, _, errno := unix.Syscall6(unix.SYS_GETSOCKOPT, uintptr(fd), uintptr(level), uintptr(opt),
		uintptr(unsafe.Pointer(unsafe.SliceData(b))), uintptr(unsafe.Pointer(&size)), 0)
	if errno != 0 {
		return 0, fmt.Errorf("getsockopt %d of level %d: %w", opt, level, errno)
	}
	return int(size), nil
}

// ArrivedAt is when the datagram that was read last from a socket reached this host's kernel, by the wall clock (SIOCGSTAMPNS,
// socket(7)). The first call on a socket makes the kernel note these times, and is an error.
func ArrivedAt(fd int) (time.Time, error) {
	var ts unix.Timespec
	_, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), unix.SIOCGSTAMPNS_OLD, uintptr(unsafe.Pointer(&ts)))
	if errno != 0 {
		return time.Time{}, fmt.Errorf("SIOCGSTAMPNS: %w", errno)
	}
	return time.Unix(ts.Unix()), nil
}
