package namespace

import (
	"net"
	"net/netip"
	"time"

	"github.com/tulle-net/tulle/internal/sys"
)

// SeenAs connects by TCP from the network namespace at one path to an address in another, and returns the source address that was
// seen there. It fails within half a minute if nothing comes through.
func SeenAs(from, at string, to netip.Addr) (netip.Addr, error) {
	const patience = 30 * time.Second // of a busy machine, which may lose the first packets, too
	var l *net.TCPListener
	if err := sys.WithNetns(at, func() (err error) {
		l, err = net.ListenTCP("tcp", net.TCPAddrFromAddrPort(netip.AddrPortFrom(to, 0)))
		return err
	}); err != nil {
		return netip.Addr{}, err
	}
	defer l.Close()
	if err := sys.WithNetns(from, func() error {
		c, err := net.DialTimeout("tcp", l.Addr().String(), patience)
		if err == nil {
			err = c.Close()
		}
		return err
	}); err != nil {
		return netip.Addr{}, err
	}
	_ = l.SetDeadline(time.Now().Add(patience))
	c, err := l.Accept()
	if err != nil {
		return netip.Addr{}, err
	}
	defer c.Close()
	return c.RemoteAddr().(*net.TCPAddr).AddrPort().Addr().Unmap(), nil
}
