package agent

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"
	"time"

	"github.com/tulle-net/tulle/internal/api"
	"github.com/tulle-net/tulle/internal/ownership"
	"github.com/tulle-net/tulle/ipam"
	"github.com/tulle-net/tulle/tunnel/encap"
)

// addExternal adds a prefix to the external peer at its endpoint.
func (s *session) addExternal(now time.Time, v *view, peers map[netip.Addr]*peerView, prefix netip.Prefix, r ownership.Route) {
	p := peers[r.External.Endpoint]
	if p == nil {
		p = &peerView{
			id: "external " + r.External.Endpoint.String(), name: r.External.Endpoint.String(), state: api.PeerExternal,
			since: s.externals.since(r.External.Endpoint, now), underlay: []netip.Addr{r.External.Endpoint},
			udpPort: cmp.Or(r.External.Port, s.cfg.UDPPort), vxlanPort: cmp.Or(r.External.Port, s.cfg.VXLANPort), vni: s.cfg.VNI, mac: r.External.MAC,
		}
		var err error
		p.mode, err = encap.ParseMode(r.External.Encap)
		if bad := unfitEndpoint(r.External.Endpoint, v.status.Params.Families); bad != "" {
			p.replaced, p.gone, p.why = true, true, "its endpoint "+bad+": packets to it are answered with host unreachable"
		} else if err != nil || !slices.Contains(sendable, p.mode) {
			p.why = fmt.Sprintf("this version cannot send %q packets", r.External.Encap)
		} else {
			p.endpoint, p.why = s.endpoint(p.underlay)
		}
		if p.mode == encap.Direct && r.External.Endpoint.Is6() {
			p.mode = encap.Direct6
		}
		s.findWay(p)
		p.mtu = s.limit(p.mode, p)
		peers[r.External.Endpoint] = p
	}
	p.prefixes = append(p.prefixes, prefix)
}

// externalTimes are since when this node has had each external peer, by endpoint. The table does not tell when an entry was made, so
// the time is not known of those that come with the table itself, at a start.
type externalTimes struct {
	had   map[netip.Addr]time.Time // zero: not known
	ready bool                     // the table has come
}

func (x *externalTimes) since(endpoint netip.Addr, now time.Time) time.Time {
	at, ok := x.had[endpoint]
	if !ok && x.ready {
		return now
	}
	return at
}

// keep takes over the external peers of a view.
func (x *externalTimes) keep(v *view, peers map[netip.Addr]*peerView) {
	x.had = make(map[netip.Addr]time.Time, len(peers))
	for endpoint, p := range peers {
		x.had[endpoint] = p.since
	}
	x.ready = x.ready || v.status.Phase == ownership.Ready
}

// unfitEndpoint says why an address cannot be the endpoint of an external peer; "" if it can. The cluster's own space is routed
// into the tunnel, so an endpoint inside would send the tunnel's packets into the tunnel. An entry with such an endpoint may come
// from a member that does not check it.
func unfitEndpoint(a netip.Addr, families []ipam.Family) string {
	for _, f := range families {
		if f.CIDR.Contains(a) {
			return fmt.Sprintf("%v lies inside the cluster's address space %v, which the tunnel itself carries", a, f.CIDR)
		}
	}
	if !a.IsGlobalUnicast() {
		return fmt.Sprintf("%v is not the unicast address of a host", a)
	}
	return ""
}

// refused reports whether an address is the endpoint of an external peer to which nothing is sent.
func (v *view) refused(a netip.Addr) bool {
	return slices.ContainsFunc(v.peers, func(p peerView) bool { return p.node.IsZero() && p.replaced && slices.Contains(p.underlay, a) })
}
