package hostnet

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
)

// Protocol is the routing protocol number (rtm_protocol, rtnetlink(7)) that marks
// Tulle's routes: 84 is 'T', free in iproute2's rt_protos. `ip route show proto 84`
// lists them.
const Protocol = 84

// Table is the name of Tulle's own nftables table, of family inet.
const Table = "tulle"

// Default ports of the encapsulations (wire.md, Encapsulations).
const (
	DefaultUDPPort   = 6080
	DefaultVXLANPort = 4789
)

// PeerRoute is a prefix that another node owns. It is routed into the TUN device,
// with this node's TUN address of that family as preferred source.
type PeerRoute struct {
	Prefix netip.Prefix
	// MTU is the proven path MTU to the peer, in bytes of the inner packet. With it
	// the kernel itself answers packets that are too large. 0 means the device's MTU.
	MTU int
	// Via and Device are the next hop and the underlay device of a prefix that is routed directly, without the tunnel. The
	// zero Addr: into the TUN device.
	Via    netip.Addr
	Device string
}

// State is the desired state of the host's network. The zero value of a field means
// none of its kind. Both address families may be used at the same time.
type State struct {
	// Tun is the TUN device's name. Empty means Options.Tun.
	Tun string
	// MTU of the TUN device in bytes; 0 leaves the device as it is.
	MTU int
	// TunAddrs are the device's addresses, at most one per family, as /32 and /128.
	TunAddrs []netip.Addr
	// Extra are more addresses of the device, any number of each family. None is the preferred source of a route.
	Extra []netip.Addr
	// ClusterCIDRs are routed into the TUN device as a whole, so that the agent answers
	// packets to addresses that nobody owns.
	ClusterCIDRs []netip.Prefix
	// Peers are the other nodes' prefixes.
	Peers []PeerRoute
	// Hosts are the other members' underlay addresses that pods reach through the tunnel, each once.
	Hosts []HostRoute
	// Direct is the device of the probes for direct paths; empty means none, and without one the next two fields have no
	// effect. ProbeAddrs are routed into it, at most one per family. What comes from it goes to NextHops only.
	Direct     string
	ProbeAddrs []netip.Addr
	NextHops   []NextHop
	// Own is this node's space. It gets an unreachable route with the highest metric,
	// so that any other route to the same prefix wins. Masquerading applies to sources
	// in Own.
	Own []netip.Prefix
	// Strays are addresses of this node's pods outside Own, in order: routes to them are the pods', too.
	Strays []netip.Addr
	// Masquerade enables source NAT from Own to destinations outside the cluster.
	Masquerade bool
	// NoMasquerade are destinations outside the cluster that see the sources as they are.
	NoMasquerade []netip.Prefix
	// Members are the underlay addresses of all members and external peers, with this
	// node's. Packets to them are never masqueraded, and tunnel packets between them are
	// not tracked.
	Members []netip.Addr
	// Uplinks are the devices by which the tunnel's packets leave, and their MTUs as the caller knows them: Watch tells when one
	// has another MTU, goes, or comes back.
	Uplinks map[string]int
	// TunnelPorts are the UDP destination ports of the tunnel's outer packets.
	// Empty means DefaultUDPPort and DefaultVXLANPort.
	TunnelPorts []uint16
}

// Report lists what one Reconcile did, one line per object, for example
// "route 10.244.1.0/24 dev tun0 mtu 1472".
type Report struct {
	// Added are objects that are new in the State, or missing at a first run.
	Added []string
	// Changed are objects that matched an earlier State of this Reconciler.
	Changed []string
	// Removed are objects of ours that are not wanted any more.
	Removed []string
	// Repaired are objects that another program removed or changed, or that an
	// earlier run left with wrong attributes.
	Repaired []string
	// Conflicts are objects of others that conflict with the State and were not
	// changed. The agent shows them to the operator until they are gone.
	Conflicts []Problem
}

// Empty reports whether nothing on the host was changed. It ignores conflicts.
func (r *Report) Empty() bool {
	return len(r.Added)+len(r.Changed)+len(r.Removed)+len(r.Repaired) == 0
}

// Problem is a problem of the host that an operator has to fix.
type Problem struct {
	What   string
	Remedy string
	// Command is the shell command that does what Remedy says; empty if an operator has to choose.
	Command string
}

func (p Problem) String() string { return p.What + "; " + p.Remedy }

// validate returns an error for an invalid State, and otherwise a canonical copy:
// prefixes masked, sorted and unique.
func (s State) validate() (State, error) {
	var errs []error
	if s.Tun == "" || len(s.Tun) > 15 {
		errs = append(errs, fmt.Errorf("hostnet: TUN device name %q must have 1 to 15 bytes", s.Tun))
	}
	if s.MTU != 0 && (s.MTU < minMTU || s.MTU > maxMTU) {
		errs = append(errs, fmt.Errorf("hostnet: TUN MTU %d is outside %d–%d", s.MTU, minMTU, maxMTU))
	}
	s.TunAddrs = slices.Clone(s.TunAddrs)
	seen := map[bool]netip.Addr{}
	for i, a := range s.TunAddrs {
		a = a.Unmap()
		s.TunAddrs[i] = a
		if !a.IsValid() || a.IsUnspecified() || a.IsLoopback() || a.IsMulticast() || a.IsLinkLocalUnicast() {
			errs = append(errs, fmt.Errorf("hostnet: %v cannot be a TUN address", a))
			continue
		}
		if b, ok := seen[a.Is4()]; ok {
			errs = append(errs, fmt.Errorf("hostnet: two TUN addresses of one family: %v and %v", b, a))
		}
		seen[a.Is4()] = a
	}
	s.Extra = slices.Clone(s.Extra)
	for i, a := range s.Extra {
		if a = a.Unmap(); !a.IsGlobalUnicast() {
			errs = append(errs, fmt.Errorf("hostnet: %v cannot be an address of the TUN device", a))
		}
		s.Extra[i] = a
	}
	var err error
	if s.ClusterCIDRs, err = canonical("cluster CIDR", s.ClusterCIDRs); err != nil {
		errs = append(errs, err)
	}
	if s.Own, err = canonical("own prefix", s.Own); err != nil {
		errs = append(errs, err)
	}
	if s.NoMasquerade, err = canonical("prefix that is not masqueraded to", s.NoMasquerade); err != nil {
		errs = append(errs, err)
	}
	s.Peers = slices.Clone(s.Peers)
	prefixes := make(map[netip.Prefix]bool, len(s.Peers))
	for i := range s.Peers {
		p := &s.Peers[i]
		if p.Prefix, err = canonicalPrefix("peer prefix", p.Prefix); err != nil {
			errs = append(errs, err)
			continue
		}
		if prefixes[p.Prefix] {
			errs = append(errs, fmt.Errorf("hostnet: peer prefix %v twice", p.Prefix))
		}
		prefixes[p.Prefix] = true
		if p.MTU != 0 && (p.MTU < minMTU || p.MTU > maxMTU) {
			errs = append(errs, fmt.Errorf("hostnet: MTU %d of peer prefix %v is outside %d–%d", p.MTU, p.Prefix, minMTU, maxMTU))
		}
	}
	members := make([]netip.Addr, 0, len(s.Members))
	for _, a := range s.Members {
		if a = a.Unmap().WithZone(""); a.IsValid() {
			members = append(members, a)
		}
	}
	slices.SortFunc(members, netip.Addr.Compare)
	s.Members = slices.Compact(members)
	s.TunnelPorts = slices.Clone(s.TunnelPorts)
	if len(s.TunnelPorts) == 0 {
		s.TunnelPorts = []uint16{DefaultUDPPort, DefaultVXLANPort}
	}
	slices.Sort(s.TunnelPorts)
	s.TunnelPorts = slices.Compact(s.TunnelPorts)
	return s, errors.Join(errs...)
}

// Limits of the MTU of a route or device, in bytes: 68 (RFC 791), and the maximum
// IPv4 total length.
const (
	minMTU = 68
	maxMTU = 65535
)

func canonicalPrefix(what string, p netip.Prefix) (netip.Prefix, error) {
	if !p.IsValid() || p.Addr().Is4In6() || p.Bits() == 0 {
		return p, fmt.Errorf("hostnet: %s %v is not a prefix of one family longer than /0", what, p)
	}
	return p.Masked(), nil
}

func canonical(what string, in []netip.Prefix) ([]netip.Prefix, error) {
	out := make([]netip.Prefix, 0, len(in))
	for _, p := range in {
		p, err := canonicalPrefix(what, p)
		if err != nil {
			return nil, err
		}
		out = append(out, p)
	}
	slices.SortFunc(out, netip.Prefix.Compare)
	return slices.Compact(out), nil
}

// deviceAddrs are all addresses of the TUN device.
func (s *State) deviceAddrs() []netip.Addr { return slices.Concat(s.TunAddrs, s.Extra) }

// uses reports whether the state has anything of the family.
func (s *State) uses(v4 bool) bool {
	for _, a := range s.TunAddrs {
		if a.Is4() == v4 {
			return true
		}
	}
	for _, p := range s.ClusterCIDRs {
		if p.Addr().Is4() == v4 {
			return true
		}
	}
	for _, p := range s.Own {
		if p.Addr().Is4() == v4 {
			return true
		}
	}
	for _, p := range s.Peers {
		if p.Prefix.Addr().Is4() == v4 {
			return true
		}
	}
	return false
}

// tunAddr returns the TUN address of the family; the zero Addr if there is none.
func (s *State) tunAddr(v4 bool) netip.Addr {
	for _, a := range s.TunAddrs {
		if a.Is4() == v4 {
			return a
		}
	}
	return netip.Addr{}
}
