package agent

import (
	"fmt"
	"net/netip"
	"slices"

	"github.com/tulle-net/tulle/internal/api"
	"github.com/tulle-net/tulle/internal/hostnet"
	"github.com/tulle-net/tulle/ipam"
	"github.com/tulle-net/tulle/tunnel/encap"
	"github.com/tulle-net/tulle/tunnel/mtu"
)

// sizes are what the underlay's links carry at the moment, and what is left of it for pods. They follow the links while
// the session goes on.
type sizes struct {
	link   mtu.Link // the least of the links by which packets leave
	links  []string // their names
	narrow string   // whose MTU that is
	tun    mtu.TUN  // the TUN device's
}

// linkMTU is the largest outer packet that the underlay's own links carry.
func (s *session) linkMTU() mtu.Link { return s.sizes.Load().link }

// tunMTU is the TUN device's MTU.
func (s *session) tunMTU() mtu.TUN { return s.sizes.Load().tun }

// outerSix reports whether the outer packets are IPv6 by preference.
func (s *session) outerSix() bool { return s.link.Addrs[0].Is6() }

// overhead is that of the encapsulation that is preferred.
func (s *session) overhead() mtu.Overhead { return encap.Overhead(s.first, s.outerSix()) }

// resize takes over what the links of an underlay carry: as much of it as is configured, or all. Pods' packets go on meanwhile.
func (s *session) resize(link hostnet.Underlay) {
	z := &sizes{link: mtu.Link(link.MTU), links: link.Uplinks, narrow: link.Narrowest}
	z.tun = z.link.TUN(s.overhead())
	if s.cfg.MTU != 0 {
		z.tun = min(z.tun, mtu.TUN(s.cfg.MTU))
	}
	if was := s.sizes.Swap(z); was != nil && was.link != z.link {
		s.log.Info("the underlay's MTU has changed", "of", z.narrow, "from", int(was.link), "to", int(z.link), "mtu", int(z.tun))
	}
}

// sizeProblems are MTUs with which a part of the cluster's traffic cannot pass.
func (s *session) sizeProblems(families []ipam.Family) []api.Problem {
	var out []api.Problem
	if p := s.no6(families); p.What != "" {
		out = append(out, p)
	}
	if z := s.sizes.Load(); s.cfg.MTU != 0 && z.tun < mtu.TUN(s.cfg.MTU) {
		out = append(out, api.Problem{
			What: fmt.Sprintf("--mtu %d is more than %s carries now: of its %d bytes %s takes %d, and %d are used",
				s.cfg.MTU, z.narrow, int(z.link), s.first, int(s.overhead()), int(z.tun)),
			Remedy: fmt.Sprintf("raise the MTU of %s to %d, or set --mtu %d", z.narrow, int(mtu.TUN(s.cfg.MTU).Link(s.overhead())), int(z.tun)),
		})
	}
	return out
}

// no6 says why pods of this host have no IPv6, in a cluster that has it; it is the zero Problem if they have.
func (s *session) no6(families []ipam.Family) api.Problem {
	if !s.only4 || !slices.ContainsFunc(families, is6) {
		return s.tooSmallFor6(families)
	}
	got := "its pods get IPv4 addresses only"
	if len(families) == 1 {
		got = "it can have no pods"
	}
	return api.Problem{What: "this host's kernel has no IPv6, and the cluster has: " + got,
		Remedy: "start the host without ipv6.disable=1 on the kernel's command line (/proc/cmdline), or use a cluster without an IPv6 --cluster-cidr"}
}

// noPods says why this host can have no pods though it has addresses for them; it is the zero Problem if it can. A kernel without IPv6 is no
// reason as long as there is IPv4.
func (s *session) noPods(families []ipam.Family) api.Problem {
	if s.only4 && len(families) > 1 {
		return api.Problem{}
	}
	return s.no6(families)
}

func is6(f ipam.Family) bool { return f.CIDR.Addr().Is6() }

// tooSmallFor6 says that IPv6 pods get less than the 1,280 bytes that every IPv6 link has to carry (RFC 8200 §5); it is
// the zero Problem if they do not. Then the kernel has no IPv6 on the TUN, and what is there of IPv4 goes on.
func (s *session) tooSmallFor6(families []ipam.Family) api.Problem {
	z := s.sizes.Load()
	var six netip.Prefix
	for _, f := range families {
		if f.CIDR.Addr().Is6() {
			six = f.CIDR
		}
	}
	if !six.IsValid() || z.tun >= mtu.Min6 {
		return api.Problem{}
	}
	need := int(mtu.TUN(mtu.Min6).Link(s.overhead()))
	outer := "IPv4"
	if s.outerSix() {
		outer = "IPv6"
	}
	if int(z.link) >= need { // then --mtu is what is too small
		return api.Problem{What: fmt.Sprintf("--mtu %d is too small for this cluster's IPv6 pods (%v): they need 1280", s.cfg.MTU, six),
			Remedy: "set --mtu to 1280 or more, or leave it out"}
	}
	return api.Problem{
		What: fmt.Sprintf("underlay MTU %d of %s is too small for this cluster's IPv6 pods (%v): %s over %s leaves %d bytes and IPv6 needs 1280, so it must be at least %d",
			int(z.link), z.narrow, six, s.first, outer, int(z.tun), need),
		Remedy: fmt.Sprintf("raise the MTU of %s to at least %d, or use a cluster without an IPv6 --cluster-cidr; IPv4 pods are not affected", z.narrow, need),
	}
}

// pathsTooSmallFor6 are paths that carry less than IPv6 pods need, as probes have found, though this host's links carry enough. A pod
// need not send smaller packets than 1,280 bytes (RFC 8200 §5), whatever it is told: those that do not pass are lost.
func (s *session) pathsTooSmallFor6(v *view) (out []api.Problem) {
	if s.tunMTU() < mtu.Min6 {
		return nil // all of them: tooSmallFor6 has said it
	}
	for i := range v.peers {
		p := &v.peers[i]
		if !slices.ContainsFunc(p.prefixes, func(prefix netip.Prefix) bool { return prefix.Addr().Is6() }) {
			continue
		}
		m := p.goes(1)
		path, ok := s.probes.info(p.id, m)
		if !ok || !path.Up || path.First || path.MTU >= mtu.Min6 {
			continue
		}
		carries, lost := fmt.Sprintf("packets of %d bytes at most", path.MTU), fmt.Sprintf("IPv6 packets of %d to %d bytes", path.MTU+1, mtu.Min6)
		if path.MTU == 0 {
			carries, lost = fmt.Sprintf("no packets of %d bytes or more", mtu.Min4), "larger IPv6 packets"
		}
		from, to := s.link.Addrs[0], p.endpoint
		if w := p.directOf(m); w != nil {
			to = w.via
		}
		for _, a := range s.link.Addrs {
			if a.Is6() == to.Is6() {
				from = a
				break
			}
		}
		out = append(out, api.Problem{
			What: fmt.Sprintf("the path to %s by %s carries %s, and IPv6 pods need %d: %s are lost", v.label(p), m, carries, mtu.Min6, lost),
			Remedy: fmt.Sprintf("the network between %v and %v must carry packets of %d bytes: raise the MTU of the links on the way. IPv4 pods are not affected",
				from, to, int(mtu.TUN(mtu.Min6).Link(encap.Overhead(m, to.Is6())))),
		})
	}
	return out
}

// without6 leaves of a host's state what does not need IPv6 on the TUN. The kernel takes that away below 1,280 bytes, or has none at all.
func without6(h hostnet.State) hostnet.State {
	keep := func(in []netip.Prefix) (out []netip.Prefix) {
		for _, p := range in {
			if p.Addr().Is4() {
				out = append(out, p)
			}
		}
		return out
	}
	h.ClusterCIDRs, h.Own = keep(h.ClusterCIDRs), keep(h.Own)
	var addrs []netip.Addr
	for _, a := range h.TunAddrs {
		if a.Is4() {
			addrs = append(addrs, a)
		}
	}
	var peers []hostnet.PeerRoute
	for _, p := range h.Peers {
		if p.Prefix.Addr().Is4() {
			peers = append(peers, p)
		}
	}
	h.TunAddrs, h.Peers = addrs, peers
	h.ProbeAddrs = slices.DeleteFunc(slices.Clone(h.ProbeAddrs), netip.Addr.Is6)
	h.Hosts = slices.DeleteFunc(h.Hosts, func(r hostnet.HostRoute) bool { return !r.Addr.Is4() })
	return h
}
