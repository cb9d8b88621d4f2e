package underlay

import (
	"errors"
	"net/netip"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/tulle-net/tulle/internal/sys"
)

// Kept are sockets that an earlier run of the program has left open, with the packets that wait in them. A socket that is opened
// with [Options.Kept] is one of them if address, protocol and sharing of the port are the same. A nil Kept has none.
type Kept struct{ fds []int }

// NewKept owns the descriptors from then on. Close closes those that no socket has taken.
func NewKept(fds []int) *Kept { return &Kept{slices.Clone(fds)} }

// Len returns how many sockets nobody has taken.
func (k *Kept) Len() int {
	if k == nil {
		return 0
	}
	return len(k.fds)
}

// Close closes the sockets that nobody has taken.
func (k *Kept) Close() error {
	if k == nil {
		return nil
	}
	var errs []error
	for _, fd := range k.fds {
		errs = append(errs, sys.Close(fd))
	}
	k.fds = nil
	return errors.Join(errs...)
}

// take returns a socket that is what open would make; -1 if there is none.
func (k *Kept) take(bind netip.AddrPort, typ, proto int, shared bool) int {
	if k == nil {
		return -1
	}
	i := slices.IndexFunc(k.fds, func(fd int) bool { return isSocket(fd, bind, typ, proto, shared) })
	if i < 0 {
		return -1
	}
	fd := k.fds[i]
	k.fds = slices.Delete(k.fds, i, i+1)
	return fd
}

// isSocket reports whether fd is a bound socket with these properties. The port of a raw socket does not count.
func isSocket(fd int, bind netip.AddrPort, typ, proto int, shared bool) bool {
	if typ == unix.SOCK_DGRAM {
		proto = unix.IPPROTO_UDP
	}
	for _, o := range []struct{ opt, want int }{{unix.SO_TYPE, typ}, {unix.SO_PROTOCOL, proto}} {
		if v, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, o.opt); err != nil || v != o.want {
			return false
		}
	}
	if v, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEPORT); err != nil || (v != 0) != shared {
		return false
	}
	at, err := sys.LocalAddr(fd)
	return err == nil && at.Addr() == bind.Addr() && (typ == unix.SOCK_RAW || at.Port() == bind.Port())
}
