package hosts

import (
	"context"
	"encoding/binary"
	"errors"
	"net"
	"net/netip"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// Advertise sends router advertisements (RFC 4861 §4.2) out of an interface of the host, twice a second: hosts there make
// themselves an address of the prefix (a /64), and for lifetime, in whole seconds, a default route. 0 is no default route. It
// ends with the test, or when stop is called; what the hosts have stays then until it expires.
func (h *Host) Advertise(dev, prefix string, lifetime time.Duration) (stop func()) {
	t := h.net.t
	t.Helper()
	var conn *net.IPConn
	h.net.check(h.Do(func() (err error) {
		if conn, err = net.ListenIP("ip6:ipv6-icmp", nil); err != nil {
			return err
		}
		raw, err := conn.SyscallConn()
		if err != nil {
			return err
		}
		ifi, err := net.InterfaceByName(dev)
		if err != nil {
			return err
		}
		cerr := raw.Control(func(fd uintptr) {
			err = errors.Join(
				unix.SetsockoptInt(int(fd), unix.IPPROTO_IPV6, unix.IPV6_MULTICAST_HOPS, 255), // hosts take no other
				unix.SetsockoptInt(int(fd), unix.IPPROTO_IPV6, unix.IPV6_MULTICAST_IF, ifi.Index))
		})
		return errors.Join(cerr, err)
	}))
	message := advertisement(netip.MustParsePrefix(prefix), lifetime)
	ctx, cancel := context.WithCancel(context.Background())
	var sending sync.WaitGroup
	sending.Go(func() {
		tick := time.NewTicker(500 * time.Millisecond)
		defer tick.Stop()
		for {
			// Without a carrier it fails; the next one may not.
			_, _ = conn.WriteToIP(message, &net.IPAddr{IP: net.IPv6linklocalallnodes})
			select {
			case <-ctx.Done():
				return
			case <-tick.C:
			}
		}
	})
	stop = sync.OnceFunc(func() {
		cancel()
		sending.Wait()
		conn.Close()
	})
	t.Cleanup(stop)
	return stop
}

// advertisement is the ICMPv6 message; the kernel fills in its checksum.
func advertisement(prefix netip.Prefix, lifetime time.Duration) []byte {
	const valid, preferred = 3600, 1800 // seconds, of the address
	b := []byte{134, 0, 0, 0, 64, 0}    // type, code, checksum, hop limit, flags
	b = binary.BigEndian.AppendUint16(b, uint16(lifetime/time.Second))
	b = append(b, make([]byte, 8)...)                   // reachable time, retransmission timer
	b = append(b, 3, 4, byte(prefix.Bits()), 0x80|0x40) // prefix information (RFC 4861 §4.6.2): on the link, autonomous
	b = binary.BigEndian.AppendUint32(b, valid)
	b = binary.BigEndian.AppendUint32(b, preferred)
	b = append(b, 0, 0, 0, 0)
	return append(b, prefix.Masked().Addr().AsSlice()...)
}
