package bench

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/tulle-net/tulle/bench/result"
	"github.com/tulle-net/tulle/internal/lab"
)

// The modes of [All].
const (
	NoTunnel        = "no-tunnel"
	UDP             = "udp"
	VXLAN           = "vxlan"
	UDPFast         = "udp-fast"
	IPIP            = "ipip"
	IPIPFast        = "ipip-fast"
	WireGuard       = "wireguard"
	KernelVXLAN     = "kernel-vxlan"
	KernelIPIP      = "kernel-ipip"
	KernelFOU       = "kernel-fou"
	KernelWireGuard = "kernel-wireguard"
	WireGuardGo     = "wireguard-go"
	NoTunnelSubnet  = "no-tunnel-subnet"
	Direct          = "direct"
)

// A mode is one way to connect two pods. Each has its own lab, so that nothing is set up between the measures of a round.
type mode struct {
	name, what string
	paths      string // --paths of the agents; "" for a lab without agents
	wiring     string // of the hosts: "" or result.OneSubnet
	setup      func(ctx context.Context, l *lab.Lab, o *AllOptions) (*tunnel, error)
}

// modes are in the order of the first round.
var modes = []mode{
	{NoTunnel, "the hosts and the router have routes to the pods", "", "", setupNoTunnel},
	{UDP, "a Tulle agent on each host, --paths udp", "udp", "", setupTulle},
	{UDPFast, "a Tulle agent on each host, --paths udp --fast-path: the kernel carries packets in its place", "udp", "", setupFast},
	{VXLAN, "a Tulle agent on each host, --paths vxlan", "vxlan", "", setupTulle},
	{IPIP, "a Tulle agent on each host, --paths ipip", "ipip", "", setupTulle},
	{IPIPFast, "a Tulle agent on each host, --paths ipip --fast-path: the kernel carries packets in its place", "ipip", "", setupFast},
	{WireGuard, "Tulle with encryption", "", "", setupWireGuard},
	{KernelVXLAN, "the kernel's VXLAN device on each host", "", "", setupVXLAN},
	{KernelIPIP, "the kernel's ipip device on each host", "", "", setupKernelIPIP},
	{KernelFOU, "the kernel's ipip (IPv6: ip6tnl) device with FOU on each host: IP in UDP", "", "", setupKernelFOU},
	{KernelWireGuard, "the kernel's WireGuard device on each host (encrypts)", "", "", setupKernelWireGuard},
	{WireGuardGo, "wireguard-go on each host, from its own module (encrypts)", "", "", func(ctx context.Context, l *lab.Lab, o *AllOptions) (*tunnel, error) {
		return setupWireguardGo(ctx, l, o.Helper)
	}},
	{NoTunnelSubnet, "both hosts in one subnet, with routes to the pods: what direct is compared with", "", result.OneSubnet, setupNoTunnel},
	{Direct, "a Tulle agent on each host, both in one subnet, --paths direct: no tunnel", "direct", result.OneSubnet, setupTulle},
}

// Modes lists the names of all modes.
func Modes() []string {
	var names []string
	for _, m := range modes {
		names = append(names, m.name)
	}
	return names
}

// tunnel carries packets between the pods of a lab.
type tunnel struct {
	mtu  int   // of the pods
	pids []int // its processes; none for a kernel tunnel
	undo []func() error
}

func (t *tunnel) close() error {
	var err error
	for _, u := range slices.Backward(t.undo) {
		err = errors.Join(err, u())
	}
	t.undo = nil
	return err
}

// lackError means that this machine does not support a mode, and says why.
type lackError string

func (e lackError) Error() string { return string(e) }

func setupNoTunnel(ctx context.Context, l *lab.Lab, _ *AllOptions) (*tunnel, error) {
	_, err := l.DirectRoutes(ctx)
	return &tunnel{mtu: l.Options().MTU}, err
}

func setupVXLAN(ctx context.Context, l *lab.Lab, _ *AllOptions) (*tunnel, error) {
	_, err := l.KernelVXLAN(ctx)
	if errors.Is(err, unix.EOPNOTSUPP) {
		err = lackError("this kernel has no VXLAN device (CONFIG_VXLAN)")
	}
	overhead := 50
	if !l.Options().Underlay.V4 {
		overhead = 70
	}
	return &tunnel{mtu: l.Options().MTU - overhead}, err
}

// lack replaces the kernel's error for an unknown kind of device by a lackError.
func lack(err error, reason string) error {
	if errors.Is(err, unix.EOPNOTSUPP) {
		return lackError(reason)
	}
	return err
}

// setupWireGuard is for a mode that people look for.
func setupWireGuard(context.Context, *lab.Lab, *AllOptions) (*tunnel, error) {
	return nil, lackError("Tulle has no encapsulation that encrypts; " + KernelWireGuard + " and " + WireGuardGo + " do")
}

// setupTulle finds the agents that the lab has started, and checks that they use the encapsulation of the mode.
func setupTulle(ctx context.Context, l *lab.Lab, _ *AllOptions) (*tunnel, error) {
	t := &tunnel{mtu: l.Pods()[0].MTU}
	want := l.Options().Paths
	for _, h := range l.Status(ctx).Hosts {
		if h.Agent == nil {
			return nil, fmt.Errorf("the agent on %s: %s", h.Name, h.Error)
		}
		for _, p := range h.Agent.Peers {
			if p.Path.Mode != want {
				return nil, fmt.Errorf("the agent on %s sends to %s by %q, not %q: %s", h.Name, p.Name, p.Path.Mode, want, p.Path.Reason)
			}
		}
		t.pids = append(t.pids, h.PID)
	}
	return t, nil
}

// setupFast is setupTulle for agents that let the kernel carry packets, and checks that it does.
func setupFast(ctx context.Context, l *lab.Lab, o *AllOptions) (*tunnel, error) {
	t, err := setupTulle(ctx, l, o)
	if err != nil {
		return nil, err
	}
	for _, h := range l.Status(ctx).Hosts {
		if f := h.Agent.FastPath; !f.On {
			return nil, fmt.Errorf("the fast path of %s is not on: %s", h.Name, f.Reason)
		}
	}
	return t, nil
}

// fast reports whether the kernel carries a mode's packets in place of the agents.
func (m mode) fast() bool { return m.name == UDPFast || m.name == IPIPFast }

// podsOf are the addresses of a host's pods.
func podsOf(l *lab.Lab, host string) []netip.Prefix {
	var out []netip.Prefix
	for _, p := range l.Pods() {
		if p.Host == host {
			a := p.Addr(!l.Options().Overlay.V4)
			out = append(out, netip.PrefixFrom(a, a.BitLen()))
		}
	}
	return out
}

// setPodMTU sets the MTU of the pods' own devices.
func setPodMTU(l *lab.Lab, mtu int) error {
	for _, p := range l.Pods() {
		err := l.Do(p.Name, func() error {
			link, err := netlink.LinkByName("eth0")
			if err != nil {
				return err
			}
			return netlink.LinkSetMTU(link, mtu)
		})
		if err != nil {
			return fmt.Errorf("MTU %d of %s: %w", mtu, p.Name, err)
		}
	}
	return nil
}

func ipNet(p netip.Prefix) *net.IPNet {
	return &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}

// stand is a mode that is set up and ready to measure.
type stand struct {
	mode
	lab    *lab.Lab
	tunnel *tunnel
	ends   Ends
}

// families are those of underlay and pods: one, so that each mode carries the same.
func (o *AllOptions) families() lab.Families {
	if o.Six {
		return lab.IPv6Only
	}
	return lab.IPv4Only
}

// lab is the lab of a mode: the least that a packet can cross between two hosts, in two subnets or in one. The links have
// the same wire in both; hosts in one subnet have a switch between them in place of the router.
func (o *AllOptions) lab(name, wiring string) lab.Options {
	lo := lab.Options{
		Name: name, Nodes: 2, Subnets: 2, Pods: 1, Straight: true, Wire: o.Wire, MTU: o.MTU, Underlay: o.families(), Overlay: o.families(),
		Binary: o.Binary, Replace: true, Timeout: o.Timeout,
	}
	if wiring == result.OneSubnet {
		lo.Subnets, lo.Straight = 1, false
	}
	return lo
}

// crossed is what has gone through the router so far, from the sender's host to the receiver's.
func (s *stand) crossed() (lab.Crossing, error) {
	hosts := s.lab.Hosts()
	return s.lab.Crossed(hosts[0].Name, hosts[1].Name)
}

// build creates a mode's lab and tunnel, and checks that the pods reach each other. If it fails it removes everything.
func (m mode) build(ctx context.Context, o *AllOptions, name string) (*stand, error) {
	lo := o.lab(name, m.wiring)
	lo.Bare, lo.Paths = m.paths == "", m.paths
	if m.fast() {
		lo.ExtraAgentArgs = []string{"--fast-path"}
	}
	l, err := lab.Up(ctx, lo, nil)
	if err != nil {
		return nil, err
	}
	s := &stand{mode: m, lab: l}
	if s.tunnel, err = m.setup(ctx, l, o); err == nil {
		err = s.reach(ctx, o.Congestion)
	}
	if err == nil {
		return s, nil
	}
	if derr := s.down(ctx); derr != nil { // worse than a mode that this machine lacks
		err = fmt.Errorf("%s; and removing its lab: %w", err, derr)
	}
	return nil, err
}

// reach fills in the ends, whose connections get that congestion control, and pings in both directions.
func (s *stand) reach(ctx context.Context, congestion string) error {
	pods := s.lab.Pods()
	a, b, six := pods[0], pods[1], !s.lab.Options().Overlay.V4
	s.ends = Ends{From: a.Name, To: b.Name, FromAddr: a.Addr(six), ToAddr: b.Addr(six), Congestion: congestion, Do: s.lab.Do}
	var last error
	for range 5 { // the first packet waits for neighbours, or for a handshake
		there, back := s.lab.Ping(ctx, a.Name, b.Name, s.ends.ToAddr), s.lab.Ping(ctx, b.Name, a.Name, s.ends.FromAddr)
		if last = errors.Join(there.Err, back.Err, ctx.Err()); last == nil {
			if there.Source != s.ends.FromAddr {
				return fmt.Errorf("%s sees pings of %s from %v, not %v: something translates addresses (NAT)", b.Name, a.Name, there.Source, s.ends.FromAddr)
			}
			return nil
		}
	}
	return fmt.Errorf("the pods do not reach each other: %w", last)
}

func (s *stand) down(ctx context.Context) error {
	var err error
	if s.tunnel != nil {
		err = s.tunnel.close()
	}
	return errors.Join(err, s.lab.Down(context.WithoutCancel(ctx)))
}

// needs returns an error if no mode can run on this machine.
func needs() error {
	if os.Geteuid() != 0 {
		return errors.New("this benchmark needs root: it makes network namespaces; run it with sudo")
	}
	return nil
}

// Canonical is a mode's name as [Modes] has it: names of Tulle's modes may begin with "tulle-", as they once did.
func Canonical(name string) string { return strings.TrimPrefix(name, "tulle-") }

// chosen are the modes of those names, and those that they are compared with where nothing else is.
func chosen(names []string) ([]mode, error) {
	if len(names) == 0 {
		return modes, nil
	}
	var picked []string
	for _, n := range names {
		if !slices.Contains(Modes(), Canonical(n)) {
			return nil, fmt.Errorf("no mode %q; there are %s", n, strings.Join(Modes(), ", "))
		}
		picked = append(picked, Canonical(n))
	}
	if slices.Contains(picked, Direct) {
		picked = append(picked, NoTunnelSubnet)
	}
	var out []mode
	for _, m := range modes {
		if slices.Contains(picked, m.name) {
			out = append(out, m)
		}
	}
	return out, nil
}
