package agent

import (
	"fmt"
	"net"
	"net/netip"
	"slices"

	"github.com/tulle-net/tulle/internal/api"
	"github.com/tulle-net/tulle/membership"
	"github.com/tulle-net/tulle/tunnel/encap"
	"github.com/tulle-net/tulle/tunnel/header"
)

// vtepMAC is the MAC of a node's VTEP where none is configured: out of its ID, which is random, as a locally administered
// address of one station (IEEE 802 §8.2). It stays the same for the life of the node.
func vtepMAC(id membership.NodeID) header.MAC {
	m := header.MAC(id[:])
	m[0] = m[0]&^0x01 | 0x02
	return m
}

// vtepMAC is the MAC of this node's VTEP.
func (s *session) vtepMAC() header.MAC {
	if m := header.MAC(s.cfg.VTEPMAC); !m.IsZero() {
		return m
	}
	return vtepMAC(s.ownership.Node())
}

// unfit says why a mode that this version sends cannot be used toward a peer; "" if it can.
func (s *session) unfit(p *peerView, m encap.Mode) string {
	w := p.directOf(m)
	switch {
	case w != nil:
		return w.why
	case !slices.Contains(sendable, m):
		return "this version does not send it"
	case s.engine.Unavailable(m) != nil:
		return s.engine.Unavailable(m).Error()
	case m == encap.VXLAN && p.vxlanPort == 0:
		return "the peer does not take it: its port for vxlan is in use there by something else"
	case m == encap.VXLAN && p.vni != s.cfg.VNI:
		return fmt.Sprintf("its --vni is %d, and this node's %d: give both the same", p.vni, s.cfg.VNI)
	}
	return ""
}

// vxlanPort is what this node tells the others: 0 where it has no socket.
func (s *session) vxlanPort() uint16 {
	if s.engine.Unavailable(encap.VXLAN) != nil {
		return 0
	}
	return s.cfg.VXLANPort
}

// checkVXLAN looks whether the engine has got the port of vxlan. Without it the other encapsulations work, unless the
// configuration wants vxlan alone.
func (s *session) checkVXLAN() error {
	err := s.engine.Unavailable(encap.VXLAN)
	if err == nil {
		return nil
	}
	if slices.Equal(s.prefer.Load().modes, []encap.Mode{encap.VXLAN}) {
		return fmt.Errorf("--paths %s: %w", encap.VXLAN, err)
	}
	s.log.Warn("vxlan is off, the other encapsulations work", "reason", err)
	return nil
}

// vxlanProblem tells an operator that vxlan is off.
func (s *session) vxlanProblem() []api.Problem {
	if err := s.engine.Unavailable(encap.VXLAN); err != nil {
		return []api.Problem{{
			What:   "vxlan is off, the other encapsulations work: " + err.Error(),
			Remedy: "free the port, or choose another with --vxlan-port, and restart the agent",
		}}
	}
	return nil
}

// externalVTEP says how packets to an external peer by vxlan find its VTEP.
func (s *session) externalVTEP(p *peerView) string {
	mac, known := s.engine.VTEPMAC(p.id)
	switch {
	case p.mac != header.MAC{}:
		return fmt.Sprintf("external peers are not probed; its VTEP is %v", mac)
	case known:
		return fmt.Sprintf("external peers are not probed; its VTEP is %v, learned from what it sends", mac)
	}
	return "external peers are not probed; the MAC of its VTEP is not known yet: it is learned when the peer sends something, or tell it with tulle external add --mac"
}

// externalOf reads a request; the encapsulation is m.
func externalOf(req api.ExternalRequest, m encap.Mode) (membership.External, error) {
	x := membership.External{Endpoint: req.Endpoint, Encap: m.String(), Port: req.Port}
	if req.MAC != "" {
		mac, err := net.ParseMAC(req.MAC)
		if err != nil || len(mac) != len(x.MAC) || !header.MAC(mac).Station() {
			return x, fmt.Errorf("MAC %q: want the address of one station, such as 02:00:5e:10:00:01", req.MAC)
		}
		x.MAC = [6]byte(mac)
	}
	switch {
	case req.MAC != "" && m != encap.VXLAN:
		return x, fmt.Errorf("a MAC is for vxlan only, %s has none", m)
	case req.Port != 0 && m != encap.VXLAN && m != encap.UDP:
		return x, fmt.Errorf("a port is for udp and vxlan only, %s has none", m)
	}
	return x, nil
}

// external is an entry as the control socket shows it.
func (s *session) external(e membership.Entry) api.External {
	x := e.External
	out := api.External{Prefix: e.Prefix, Endpoint: x.Endpoint, Encapsulation: x.Encap, Port: x.Port, Owner: s.ref(e.Owner), Version: e.Version}
	if mac := header.MAC(x.MAC); !mac.IsZero() {
		out.MAC = mac.String()
	}
	return out
}

// outer is where packets of a mode go.
func (s *session) outer(p *peerView, m encap.Mode) netip.AddrPort {
	switch {
	case m.IsDirect():
		return netip.AddrPortFrom(p.directOf(m).via, 0)
	case !p.endpoint.IsValid():
		return netip.AddrPort{}
	case m == encap.UDP:
		return netip.AddrPortFrom(p.endpoint, p.udpPort)
	case m == encap.VXLAN:
		return netip.AddrPortFrom(p.endpoint, p.vxlanPort)
	}
	return netip.AddrPortFrom(p.endpoint, 0)
}
