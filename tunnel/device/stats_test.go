package device

import (
	"net"
	"net/netip"
	"testing"

	"github.com/vishvananda/netlink"

	"github.com/tulle-net/tulle/internal/sys"
)

// What the kernel has dropped before a device was opened, for want of a reader, found no full queue of this one.
func TestDropsBeforeOpen(t *testing.T) {
	h := newHost(t)
	d := h.open(Options{Name: "tulle0"})
	if err := d.Persist(true); err != nil {
		t.Fatal(err)
	}
	pod := netip.MustParseAddrPort("10.7.1.1:9")
	h.Netlink(func(nl *sys.Netlink) error {
		return nl.RouteReplace(&netlink.Route{LinkIndex: d.Index(), Scope: netlink.SCOPE_LINK, Dst: &net.IPNet{IP: pod.Addr().AsSlice(), Mask: net.CIDRMask(32, 32)}})
	})
	d.Close()
	var out *net.UDPConn
	h.Do(func() (err error) { out, err = net.ListenUDP("udp4", nil); return err })
	defer out.Close()
	for range 44 {
		if _, err := out.WriteToUDPAddrPort([]byte("x"), pod); err != nil {
			t.Fatal(err)
		}
	}
	if l, err := h.link("tulle0"); err != nil || l.Attrs().Statistics.TxDropped < 44 {
		t.Fatalf("the kernel has dropped nothing: %+v, %v", l.Attrs().Statistics, err)
	}
	d = h.open(Options{Name: "tulle0"})
	if s, err := d.Stats(); err != nil || s.TxDropped != 0 {
		t.Errorf("%d dropped since it is open, %v", s.TxDropped, err)
	}
	if err := d.Persist(false); err != nil {
		t.Fatal(err)
	}
}
