package lab

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"

	"github.com/vishvananda/netlink"

	"github.com/tulle-net/tulle/internal/sys"
)

// Wire says what the links between hosts carry.
type Wire string

const (
	// WireCut carries frames of the MTU and no larger, as between NICs: super-packets are segmented before they leave a
	// host, and what arrives may be joined (GRO).
	WireCut Wire = "cut"
	// WireWhole hands super-packets of up to 64 KiB from host to host, as no NIC does.
	WireWhole Wire = "whole"
)

// Wires lists the values of Wire.
func Wires() []string { return []string{string(WireCut), string(WireWhole)} }

func (w Wire) validate() error {
	if !slices.Contains(Wires(), string(w)) {
		return fmt.Errorf("wire %q: use %s or %s", w, WireCut, WireWhole)
	}
	return nil
}

// fit makes a link's end in the namespace at path such a wire. Frames that arrive at a host are joined, at a router or switch not.
//
// The router and the switches queue what a host does not take at once, as real ones do: a veth without a queue drops what its
// peer's ring of 256 frames has no room for. From Linux 6.16 on, a veth with a queue stops it instead (drivers/net/veth.c, veth_xmit).
func (w Wire) fit(path, dev string, host bool) error {
	if w == WireWhole {
		return nil
	}
	h, err := sys.OpenNetlink(path)
	if err != nil {
		return err
	}
	defer h.Close()
	link, err := h.LinkByName(dev)
	if err != nil {
		return fmt.Errorf("find %s: %w", dev, err)
	}
	if err := h.LinkSetGSOMaxSegs(link, 1); err != nil { // what has more is cut, whatever it is
		return fmt.Errorf("set gso_max_segs of %s: %w", dev, err)
	}
	if !host {
		queue := &netlink.GenericQdisc{ // as long as the device's txqueuelen says: 1,000 frames
			QdiscAttrs: netlink.QdiscAttrs{LinkIndex: link.Attrs().Index, Handle: netlink.MakeHandle(1, 0), Parent: netlink.HANDLE_ROOT},
			QdiscType:  "pfifo",
		}
		if err := h.QdiscReplace(queue); err != nil {
			return fmt.Errorf("give %s a queue: %w", dev, err)
		}
	}
	return sys.WithNetns(path, func() error {
		for _, o := range []sys.Offload{sys.TSO, sys.GSO} { // a veth joins only what comes from one without TSO
			if err := sys.SetOffload(dev, o, false); err != nil {
				return err
			}
		}
		return sys.SetOffload(dev, sys.GRO, host)
	})
}

// gatewayName is the router's interface in a subnet.
func gatewayName(subnet int) string { return fmt.Sprintf("gw%d", subnet) }

// switchName is a subnet's switch: a bridge in the router's namespace that knows nothing of IP. It is apart from the router's
// interface because what leaves through a bridge device itself has its tunnels' super-packets cut and their inner checksums
// computed (the device has no hw_enc_features), and trains of UDP not: kernel tunnels would look slower than they are.
func switchName(subnet int) string { return fmt.Sprintf("br%d", subnet) }

func uplinkName(subnet int) string { return fmt.Sprintf("up%d", subnet) }

// buildSubnet makes a subnet's switch and the router's interface in it.
func (l *Lab) buildSubnet(ctx context.Context, h *sys.Netlink, subnet int) error {
	o := &l.st.Options
	path := sys.NetnsPath(l.netnsName(Router))
	br := &netlink.Bridge{LinkAttrs: sys.LinkAttrs(switchName(subnet))}
	br.MTU = o.MTU
	// A multicast snooping bridge without a querier may drop neighbour solicitations for a while.
	br.MulticastSnooping = new(bool)
	if err := h.LinkAdd(br); err != nil {
		return fmt.Errorf("make bridge %s: %w", br.Name, err)
	}
	if err := Veth(h, gatewayName(subnet), uplinkName(subnet), path, o.MTU, routerMAC(subnet), nil); err != nil {
		return err
	}
	for _, dev := range []string{switchName(subnet), uplinkName(subnet)} {
		// An interface answers ARP for all addresses of its namespace otherwise, and so for the router's.
		if err := sysctl(path, [2]string{"ipv4/conf/" + dev + "/arp_ignore", "8"}, [2]string{"ipv6/conf/" + dev + "/disable_ipv6", "1"}); err != nil {
			return err
		}
	}
	if err := l.plugIn(h, uplinkName(subnet), subnet); err != nil {
		return err
	}
	if _, err := h.LinkUp(switchName(subnet)); err != nil {
		return err
	}
	return l.addressRouter(ctx, h, subnet)
}

// addressRouter brings the router's interface in a subnet up, with its addresses.
func (l *Lab) addressRouter(ctx context.Context, h *sys.Netlink, subnet int) error {
	o := &l.st.Options
	if err := o.Wire.fit(sys.NetnsPath(l.netnsName(Router)), gatewayName(subnet), false); err != nil {
		return err
	}
	link, err := h.LinkUp(gatewayName(subnet))
	if err != nil {
		return err
	}
	for _, a := range underlayAddrs(subnet, routerHost, o.Underlay) {
		if err := h.AddAddress(ctx, link, netip.PrefixFrom(a, underlayBits(a))); err != nil {
			return err
		}
	}
	return nil
}

// errStraight refuses what a lab without switches cannot do.
func (l *Lab) errStraight() error {
	if !l.st.Options.Straight {
		return nil
	}
	return fmt.Errorf("lab %s has no switches: its hosts stay as they are", l.Name())
}

// portName is the router's end of a host's link.
func (l *Lab) portName(host *Host) string {
	if l.st.Options.Straight {
		return gatewayName(host.Subnet)
	}
	return host.Name
}

// wireHost makes a host's link: its eth0, and at the other end a port of its subnet's switch, or the router itself.
func (l *Lab) wireHost(router *sys.Netlink, host *Host) error {
	o := &l.st.Options
	var mac net.HardwareAddr
	if o.Straight {
		mac = routerMAC(host.Subnet)
	}
	if err := Veth(router, l.portName(host), "eth0", host.Netns, o.MTU, mac, nil); err != nil {
		return err
	}
	if err := o.Wire.fit(host.Netns, "eth0", true); err != nil || o.Straight {
		return err
	}
	return l.plugIn(router, host.Name, host.Subnet)
}

// plugIn brings a port up and plugs it into a subnet's switch.
func (l *Lab) plugIn(router *sys.Netlink, dev string, subnet int) error {
	if err := l.st.Options.Wire.fit(sys.NetnsPath(l.netnsName(Router)), dev, false); err != nil {
		return err
	}
	port, err := router.LinkUp(dev)
	if err != nil {
		return err
	}
	bridge, err := router.LinkByName(switchName(subnet))
	if err != nil {
		return fmt.Errorf("find %s: %w", switchName(subnet), err)
	}
	if err := router.LinkSetMaster(port, bridge); err != nil {
		return fmt.Errorf("plug %s into %s: %w", dev, switchName(subnet), err)
	}
	return nil
}

// Crossing is what has gone through the router from one host toward another one since they were plugged in, in frames as
// the links count them: a super-packet is one.
type Crossing struct {
	InFrames  uint64 `json:"in_frames"` // as they came from the one
	InBytes   uint64 `json:"in_bytes"`
	OutFrames uint64 `json:"out_frames"` // as they went to the other
	OutBytes  uint64 `json:"out_bytes"`
}

// Minus is what has gone through since an earlier Crossing.
func (c Crossing) Minus(before Crossing) Crossing {
	return Crossing{c.InFrames - before.InFrames, c.InBytes - before.InBytes, c.OutFrames - before.OutFrames, c.OutBytes - before.OutBytes}
}

// Plus is what has gone through in two spans of time.
func (c Crossing) Plus(d Crossing) Crossing {
	return Crossing{c.InFrames + d.InFrames, c.InBytes + d.InBytes, c.OutFrames + d.OutFrames, c.OutBytes + d.OutBytes}
}

// Cut is how many frames went out for one that came in: 1 on a wire that treats them alike, whatever they are.
func (c Crossing) Cut() float64 { return float64(c.OutFrames) / float64(max(c.InFrames, 1)) }

// FrameBytes is the mean length of the frames that came in.
func (c Crossing) FrameBytes() float64 { return float64(c.InBytes) / float64(max(c.InFrames, 1)) }

// Crossed reads the counters of two hosts' ports.
func (l *Lab) Crossed(from, to string) (c Crossing, err error) {
	read := func(rx, tx *[2]uint64) func(*sys.Netlink, netlink.Link) error {
		return func(_ *sys.Netlink, link netlink.Link) error {
			s := link.Attrs().Statistics
			*rx, *tx = [2]uint64{s.RxPackets, s.RxBytes}, [2]uint64{s.TxPackets, s.TxBytes}
			return nil
		}
	}
	var in, out, unused [2]uint64
	if err := errors.Join(l.port(from, read(&in, &unused)), l.port(to, read(&unused, &out))); err != nil {
		return c, err
	}
	return Crossing{in[0], in[1], out[0], out[1]}, nil
}
