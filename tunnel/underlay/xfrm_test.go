package underlay

import (
	"net"
	"net/netip"

	"github.com/vishvananda/netlink"
)

func netipPort(a netip.Addr, port uint16) netip.AddrPort { return netip.AddrPortFrom(a, port) }

func mustAddr(s string) netip.Addr { return netip.MustParseAddr(s) }

// espBetween makes both hosts of the link encrypt what A sends to B (IPsec ESP
// in transport mode), which makes the kernel refuse trains with EIO.
func (l *link) espBetween(six bool) (failed error) {
	src, dst := addrA[six], addrB[six]
	host := func(a netip.Addr) *net.IPNet {
		return &net.IPNet{IP: a.AsSlice(), Mask: net.CIDRMask(a.BitLen(), a.BitLen())}
	}
	for _, h := range []*espEnd{{l.a, netlink.XFRM_DIR_OUT}, {l.b, netlink.XFRM_DIR_IN}} {
		h.host.Do(func() error {
			nl, err := netlink.NewHandle()
			if err != nil {
				return err
			}
			defer nl.Close()
			failed = nl.XfrmStateAdd(&netlink.XfrmState{
				Src: src.AsSlice(), Dst: dst.AsSlice(), Proto: netlink.XFRM_PROTO_ESP, Mode: netlink.XFRM_MODE_TRANSPORT, Spi: 0x100,
				Aead: &netlink.XfrmStateAlgo{Name: "rfc4106(gcm(aes))", Key: make([]byte, 20), ICVLen: 128},
			})
			if failed != nil {
				return nil
			}
			failed = nl.XfrmPolicyAdd(&netlink.XfrmPolicy{
				Src: host(src), Dst: host(dst), Dir: h.dir,
				Tmpls: []netlink.XfrmPolicyTmpl{{Src: src.AsSlice(), Dst: dst.AsSlice(), Proto: netlink.XFRM_PROTO_ESP, Mode: netlink.XFRM_MODE_TRANSPORT}},
			})
			return nil
		})
		if failed != nil {
			return failed
		}
	}
	return nil
}

type espEnd struct {
	host *host
	dir  netlink.Dir
}
