package tunnel

import (
	"errors"
	"fmt"
	"net/netip"
	"sync"

	"github.com/tulle-net/tulle/tunnel/encap"
	"github.com/tulle-net/tulle/tunnel/header"
	"github.com/tulle-net/tulle/tunnel/underlay"
)

// ProbePort is the inner UDP source and destination port of probes between tun addresses. The engine intercepts such packets;
// no process on the host receives them.
const ProbePort = encap.ProbePort

// Errors of Probe.
var (
	ErrNoPeer    = errors.New("no such peer")
	ErrNoAddress = errors.New("no tun address of one family on both sides")
	ErrNoSocket  = errors.New("this node or the peer has no socket for that encapsulation")
	ErrNoMAC     = errors.New("the MAC of its VTEP is not known")
)

// prober sends probes, one at a time, through sockets of the receiving side.
type prober struct {
	mu     sync.Mutex
	closed bool
	buf    []byte
	out    [2]struct { // by the outer family
		udp, vxlan *sender
		raw        [2]*sender // by the inner family
	}
}

// close lets no probe use the sockets from now on.
func (p *prober) close() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.closed = true
}

// ProbePacket is one probe: its payload, and the size in bytes that the inner packet is padded to.
type ProbePacket struct {
	Payload []byte
	Size    int
}

// Probe sends payload to a peer's tun address in an ordinary inner UDP packet of size bytes (or as few as payload needs),
// through the given encapsulation, whatever the peer's Mode is. The packet is padded with zeros behind payload.
func (e *Engine) Probe(peer string, mode encap.Mode, payload []byte, size int) error {
	return e.probe(peer, mode, []ProbePacket{{payload, size}}, false)
}

// ProbeTrain sends probes of one size, the last of which may be smaller, in one message that the kernel or the network card
// cuts (UDP_SEGMENT): by udp or vxlan, at most 64 of them and 65,507 bytes. If apart, each is a message of its own.
func (e *Engine) ProbeTrain(peer string, mode encap.Mode, packets []ProbePacket, apart bool) error {
	return e.probe(peer, mode, packets, !apart)
}

func (e *Engine) probe(peer string, mode encap.Mode, packets []ProbePacket, train bool) error {
	f := e.fwd.Load()
	t := f.peers[peer]
	if t == nil {
		return fmt.Errorf("probe %s: %w", peer, ErrNoPeer)
	}
	src, dst, ok := f.probeAddrs(t)
	if !ok {
		return fmt.Errorf("probe %s: %w", peer, ErrNoAddress)
	}
	p := &e.prober
	p.mu.Lock()
	defer p.mu.Unlock()
	out := &p.out[outer(t.six)]
	var s *sender
	var dest *underlay.Dest
	var front []byte // between the outer headers and the inner packet
	switch mode {
	case encap.UDP:
		s, dest = out.udp, t.udp
	case encap.VXLAN:
		mac, ok := t.vtep()
		if !ok {
			return fmt.Errorf("probe %s: %w", peer, ErrNoMAC)
		}
		s, dest = out.vxlan, t.vxlan
		front = header.AppendVXLAN(nil, e.cfg.VNI, mac, f.mac, encap.EtherType(dst.Is6()))
	case encap.IPIP:
		s, dest = out.raw[family(dst)], t.raw
	}
	if s == nil || dest == nil || p.closed {
		return fmt.Errorf("probe %s by %s: %w", peer, mode, ErrNoSocket)
	}
	if train {
		dest = underlay.NewDest(dest.Addr()) // whatever is known of trains there
	}
	send := func(segment int) error {
		r, err := s.single(dest, p.buf, segment)
		if err == nil && r.Dropped > 0 {
			err = r.LastErr
		}
		if err != nil {
			return fmt.Errorf("probe %s by %s, %d bytes: %w", peer, mode, len(p.buf), err)
		}
		return nil
	}
	segment := 0
	p.buf = p.buf[:0]
	for _, pkt := range packets {
		p.buf = encap.AppendProbe(append(p.buf, front...), src, dst, pkt.Payload, pkt.Size)
		if segment == 0 {
			segment = len(p.buf)
		}
		if !train {
			if err := send(0); err != nil {
				return err
			}
			p.buf = p.buf[:0]
		}
	}
	if train {
		if err := send(segment); err != nil {
			return err
		}
	}
	e.stats.probesSent.Add(uint64(len(packets)))
	return nil
}

// probeAddrs chooses the family that both sides have, IPv4 first.
func (f *forwarding) probeAddrs(t *target) (src, dst netip.Addr, ok bool) {
	for i := range f.tun {
		if f.tun[i].IsValid() && t.tunAddrs[i].IsValid() {
			return f.tun[i], t.tunAddrs[i], true
		}
	}
	return src, dst, false
}

// probed hands a probe from a peer to the agent.
func (e *Engine) probed(from *target, mode encap.Mode, inner []byte, in *header.Inner) {
	e.stats.probesReceived.Add(1)
	body := in.Payload(inner)
	if e.cfg.Probed != nil && len(body) > header.UDPLen {
		e.cfg.Probed(from.id, mode, body[header.UDPLen:], in.Length)
	}
}
