package interop

import (
	"fmt"
	"net"
	"net/netip"
	"time"

	"golang.org/x/net/icmp"
	"golang.org/x/net/ipv4"
	"golang.org/x/net/ipv6"
	"golang.org/x/sys/unix"

	"github.com/tulle-net/tulle/internal/sys"
)

// marks makes the switch mark all ECN-capable outer packets of one direction "congestion experienced". A kernel answers an
// echo request with the TOS that the request arrived with, so the answer shows both directions' marks.
func (x *trial) marks(f int, to netip.Addr) {
	x.t.Helper()
	for _, port := range []string{"", "port1", "tap0"} {
		want := byte(0xb8 | 3)
		if port == "" {
			want = 0xb8 | 2
		} else {
			x.sw.Run("nft", fmt.Sprintf(`table netdev congested { chain in { type filter hook ingress device %s priority 0
				ip ecn != not-ect ip ecn set ce
				ip6 ecn != not-ect ip6 ecn set ce
			}; }`, port))
		}
		for _, tos := range [][2]byte{{0xb8, 0xb8}, {0xb8 | 2, want}} {
			got, err := x.echoTOS(f, to, tos[0])
			if err != nil || got != tos[1] {
				x.t.Errorf("IPv%d, marked at %q: TOS %#x came back as %#x, want %#x (%v)", 4+2*f, port, tos[0], got, tos[1], err)
			}
		}
		if port != "" {
			x.sw.Run("nft", "delete table netdev congested")
		}
	}
}

// echoTOS sends an echo request from the pod with the TOS, and returns that of the answer.
func (x *trial) echoTOS(f int, to netip.Addr, tos byte) (byte, error) {
	kind := []icmp.Type{ipv4.ICMPTypeEcho, ipv6.ICMPTypeEchoRequest}[f]
	request, err := (&icmp.Message{Type: kind, Body: &icmp.Echo{ID: 0x7e57, Data: []byte("marks")}}).Marshal(nil)
	if err != nil {
		return 0, err
	}
	var c *net.IPConn
	if err := x.pod.Do(func() (err error) {
		c, err = net.DialIP([]string{"ip4:icmp", "ip6:ipv6-icmp"}[f], nil, &net.IPAddr{IP: to.AsSlice()})
		return err
	}); err != nil {
		return 0, err
	}
	defer c.Close()
	if err := c.SetDeadline(time.Now().Add(5 * time.Second)); err != nil {
		return 0, err
	}
	raw, err := c.SyscallConn()
	if err != nil {
		return 0, err
	}
	level := []int{unix.SOL_IP, unix.SOL_IPV6}[f]
	for option, value := range map[int]int{[]int{unix.IP_TOS, unix.IPV6_TCLASS}[f]: int(tos), []int{unix.IP_RECVTOS, unix.IPV6_RECVTCLASS}[f]: 1} {
		var set error
		if err := raw.Control(func(fd uintptr) { set = unix.SetsockoptInt(int(fd), level, option, value) }); err != nil || set != nil {
			return 0, fmt.Errorf("option %d: %w %w", option, err, set)
		}
	}
	if _, err := c.Write(request); err != nil {
		return 0, err
	}
	body, control := make([]byte, 200), make([]byte, 100)
	for {
		n, k, _, _, err := c.ReadMsgIP(body, control)
		if err != nil {
			return 0, err
		}
		at := []int{20, 0}[f] // a raw IPv4 socket reads the IP header, too
		if n < at+8 || body[at] != []byte{0, 129}[f] {
			continue // neighbour discovery
		}
		msg, _, ok := sys.NextControl(control[:k])
		if !ok || len(msg.Data) == 0 {
			return 0, fmt.Errorf("no TOS with the answer")
		}
		return msg.Data[0], nil
	}
}
