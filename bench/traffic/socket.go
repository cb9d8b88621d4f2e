// Package traffic makes and counts the traffic of the benchmarks, one end of a measure at a time: a function gets a socket
// and works on it, so that the other end may be in the same process, in another network namespace or on another host.
// What it counts it returns as values of package result.
//
// Concurrency: functions that are said to work on their own thread lock their goroutine to it and never unlock it: call
// them with a go statement. All of them return soon after their stop flag is set or their context ends.
package traffic

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strconv"
	"time"

	"golang.org/x/sys/unix"
)

// SocketBuffer is the buffer size that is asked for each UDP socket of the generator, in bytes. It is large enough that
// the generator itself loses no packets while it waits for a CPU.
const SocketBuffer = 8 << 20

// ReadTimeout ends a blocking read, so that its loop can check whether to stop.
const ReadTimeout = 50 * time.Millisecond

// Socket creates a blocking socket of the calling thread's network namespace, bound to an address. With port 0 the kernel
// chooses one. typ is unix.SOCK_STREAM or unix.SOCK_DGRAM. A UDP socket shares its port with others that are bound to the
// same address by this function and connected elsewhere. Without root, buffer is what the system allows, in bytes.
func Socket(at netip.AddrPort, typ int) (fd, buffer int, err error) {
	family := unix.AF_INET
	if at.Addr().Is6() {
		family = unix.AF_INET6
	}
	if fd, err = unix.Socket(family, typ|unix.SOCK_CLOEXEC, 0); err != nil {
		return -1, 0, err
	}
	defer func() {
		if err != nil {
			unix.Close(fd)
			fd = -1
		}
	}()
	wait := unix.NsecToTimeval(int64(ReadTimeout))
	if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &wait); err != nil {
		return fd, 0, err
	}
	if typ == unix.SOCK_DGRAM {
		if buffer, err = largeBuffers(fd); err != nil {
			return fd, 0, err
		}
	}
	if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1); err != nil {
		return fd, 0, err
	}
	if err := unix.Bind(fd, Sockaddr(at)); err != nil {
		return fd, 0, fmt.Errorf("bind to %v: %w", at, err)
	}
	return fd, buffer, nil
}

// largeBuffers asks for SocketBuffer, beyond the system's limit if this process may.
func largeBuffers(fd int) (got int, err error) {
	for force, plain := range map[int]int{unix.SO_RCVBUFFORCE: unix.SO_RCVBUF, unix.SO_SNDBUFFORCE: unix.SO_SNDBUF} {
		err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, force, SocketBuffer)
		if errors.Is(err, unix.EPERM) {
			err = unix.SetsockoptInt(fd, unix.SOL_SOCKET, plain, SocketBuffer)
		}
		if err != nil {
			return 0, fmt.Errorf("socket buffer of %d bytes: %w", SocketBuffer, err)
		}
	}
	got, err = unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUF)
	return got / 2, err // the kernel doubles what was asked for (socket(7))
}

// Sockaddr is an address for package unix. The zone of a link-local address is an interface of the calling thread's namespace.
func Sockaddr(a netip.AddrPort) unix.Sockaddr {
	if a.Addr().Is4() {
		return &unix.SockaddrInet4{Port: int(a.Port()), Addr: a.Addr().As4()}
	}
	return &unix.SockaddrInet6{Port: int(a.Port()), Addr: a.Addr().As16(), ZoneId: zoneID(a.Addr().Zone())}
}

// zoneID is the index of an interface, by its name or as a number; 0 if there is none: the kernel refuses it where one is needed.
func zoneID(zone string) uint32 {
	if n, err := strconv.ParseUint(zone, 10, 32); err == nil || zone == "" {
		return uint32(n)
	}
	i, err := net.InterfaceByName(zone)
	if err != nil {
		return 0
	}
	return uint32(i.Index)
}

// Numbered is an address whose zone is a number: Sockaddr asks the kernel for the number of a name, which takes time.
func Numbered(a netip.AddrPort) netip.AddrPort {
	if id := zoneID(a.Addr().Zone()); id != 0 {
		return netip.AddrPortFrom(a.Addr().WithZone(strconv.Itoa(int(id))), a.Port())
	}
	return a
}

// AddrPort is the opposite of Sockaddr. Addresses of other families give the zero value.
func AddrPort(sa unix.Sockaddr) netip.AddrPort {
	switch a := sa.(type) {
	case *unix.SockaddrInet4:
		return netip.AddrPortFrom(netip.AddrFrom4(a.Addr), uint16(a.Port))
	case *unix.SockaddrInet6:
		return netip.AddrPortFrom(netip.AddrFrom16(a.Addr).Unmap().WithZone(zoneName(a.ZoneId)), uint16(a.Port))
	}
	return netip.AddrPort{}
}

// zoneName is the name of an interface, as package net writes it.
func zoneName(id uint32) string {
	if id == 0 {
		return ""
	}
	i, err := net.InterfaceByIndex(int(id))
	if err != nil {
		return strconv.Itoa(int(id))
	}
	return i.Name
}

// Connect connects a TCP socket that sends without waiting for more (no Nagle), within patience.
func Connect(fd int, to unix.Sockaddr) error {
	limit := unix.NsecToTimeval(int64(patience)) // of connect and of each write
	if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_SNDTIMEO, &limit); err != nil {
		return err
	}
	if err := unix.SetsockoptInt(fd, unix.SOL_TCP, unix.TCP_NODELAY, 1); err != nil {
		return err
	}
	err := unix.Connect(fd, to)
	if err != unix.EINTR {
		return err
	}
	// A signal ended the wait, and the kernel goes on (connect(2)).
	for deadline := time.Now().Add(patience); ; {
		ready := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLOUT}}
		n, err := unix.Poll(ready, int(max(time.Until(deadline), 0).Milliseconds()))
		switch {
		case err == unix.EINTR:
		case err != nil:
			return err
		case n == 0:
			return unix.ETIMEDOUT
		default:
			failed, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_ERROR)
			if err == nil && failed != 0 {
				err = unix.Errno(failed)
			}
			return err
		}
	}
}

// Dial connects from an address of the calling thread's namespace, as Connect does.
func Dial(from netip.AddrPort, to unix.Sockaddr) (int, error) {
	fd, _, err := Socket(from, unix.SOCK_STREAM)
	if err != nil {
		return -1, err
	}
	if err := Connect(fd, to); err != nil {
		unix.Close(fd)
		return -1, err
	}
	return fd, nil
}

// Passing reports whether an error of a connected socket is transient: a timeout, a signal, an earlier ICMP error.
func Passing(err error) bool {
	switch err {
	case unix.EAGAIN, unix.EINTR, unix.ECONNREFUSED, unix.EHOSTUNREACH, unix.ENETUNREACH, unix.ENOBUFS:
		return true
	}
	return false
}

// Sleep waits for d, or until ctx ends.
func Sleep(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-t.C:
		return nil
	}
}

// Await waits for d, and on until something has come, as [PingPong] does for its first answer: nothing may come for as long where the machine stands
// still. It gives up after patience, which is no error.
func Await(ctx context.Context, d time.Duration, came func() (bool, error)) error {
	err := Sleep(ctx, d)
	for began := time.Now(); err == nil && time.Since(began) < patience; err = Sleep(ctx, 5*time.Millisecond) {
		if is, err := came(); is || err != nil {
			return err
		}
	}
	return err
}
