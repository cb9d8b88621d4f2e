package tunnel

import (
	"errors"
	"fmt"
	"math/rand/v2"
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

// prober sends probes, one at a time, through the sockets that pods' packets to a peer go through. Those of udp and vxlan have a source
// port each, and a network may treat some of them otherwise than the rest: probes go through all of them in turn. Those to a peer whose udp
// packets have no checksum (Peer.Bare) have none either, and sockets of their own.
type prober struct {
	mu     sync.Mutex
	closed bool
	buf    []byte
	out    [2]struct { // by the outer family
		udp   []*sender
		vxlan bool       // this node has vxlan
		raw   [2]*sender // by the inner family
	}
	bare []*sender // of udp over IPv4, without checksum
}

// turns is whose turn it is among n sockets, of one peer and encapsulation.
type turns struct {
	at    int // the socket of the last probe
	left  int // of this round
	train int // the socket of the last train
}

// next is the socket of the next probe. Each round begins up to n/2 sockets further on. Without that, probes of one kind that come at each
// second or fourth turn would never meet some of the sockets. No socket comes again within n/2 turns: so where one of them
// is cut off, no three probes in a row are lost, by which a path fails.
func (t *turns) next(n int) int {
	if t.left == 0 {
		t.left, t.at = n, t.at+rand.IntN(n/2+1)
	}
	t.left--
	t.at = (t.at + 1) % n
	return t.at
}

// of is the socket of the next probe or train. The packets of a train that go one by one take the way of the train that they are compared with.
func (t *turns) of(n int, train, apart bool) int {
	switch {
	case apart:
		return t.train % n
	case train:
		t.train = t.next(n)
		return t.train
	}
	return t.next(n)
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
// through the given encapsulation, whatever the peer's Mode is. The inner packet is IPv6 if six, else IPv4 where both sides
// have that. The packet is padded with zeros behind payload.
func (e *Engine) Probe(peer string, mode encap.Mode, six bool, payload []byte, size int) error {
	return e.probe(peer, netip.Addr{}, mode, six, []ProbePacket{{payload, size}}, false, false)
}

// ProbeAt is [Engine.Probe] to another of the peer's underlay addresses than the one that its packets go to.
func (e *Engine) ProbeAt(peer string, at netip.Addr, mode encap.Mode, six bool, payload []byte, size int) error {
	return e.probe(peer, at, mode, six, []ProbePacket{{payload, size}}, false, false)
}

// ProbeTrain sends probes of one size, the last of which may be smaller, in one message that the kernel or the network card
// cuts (UDP_SEGMENT): by udp or vxlan, at most 64 of them and 65,507 bytes. If apart, each is a message of its own.
func (e *Engine) ProbeTrain(peer string, mode encap.Mode, packets []ProbePacket, apart bool) error {
	return e.probe(peer, netip.Addr{}, mode, false, packets, !apart, apart)
}

// probe sends packets to the peer's endpoint, or at another of its addresses.
func (e *Engine) probe(peer string, at netip.Addr, mode encap.Mode, six bool, packets []ProbePacket, train, apart bool) error {
	f := e.fwd.Load()
	t := f.peers[peer]
	if t == nil {
		return fmt.Errorf("probe %s: %w", peer, ErrNoPeer)
	}
	src, dst, ok := f.probeAddrs(t, six)
	if !ok {
		return fmt.Errorf("probe %s: %w", peer, ErrNoAddress)
	}
	p := &e.prober
	p.mu.Lock()
	defer p.mu.Unlock()
	if !at.IsValid() {
		at = t.endpoint
	}
	out := &p.out[outer(at.Is6())]
	var s *sender
	var dest *underlay.Dest
	var front []byte // between the outer headers and the inner packet
	switch mode {
	case encap.UDP:
		dest = t.udp
	case encap.VXLAN:
		mac, ok := t.vtep()
		if !ok {
			return fmt.Errorf("probe %s: %w", peer, ErrNoMAC)
		}
		if out.vxlan {
			dest = t.vxlan
		}
		front = header.AppendVXLAN(nil, e.cfg.VNI, mac, f.mac, encap.EtherType(dst.Is6()))
	case encap.IPIP:
		s, dest = out.raw[family(dst)], t.raw
	}
	udp := out.udp
	if mode == encap.UDP && t.bare && at.Is4() && !train && !apart { // trains are the agent's own, and have checksums
		udp = p.bare
	}
	if mode != encap.IPIP && len(udp) > 0 && dest != nil {
		s = udp[t.state.probes[mode].of(len(udp), train, apart)]
	}
	if s == nil || dest == nil || p.closed {
		return fmt.Errorf("probe %s by %s: %w", peer, mode, ErrNoSocket)
	}
	if train || at != t.endpoint { // whatever is known of trains there
		dest = underlay.NewDest(netip.AddrPortFrom(at, dest.Addr().Port()))
	}
	send := func(segment int) error {
		r, err := s.single(dest, p.buf, segment)
		e.sends()
		if r.Retried > 0 || r.TooBig > 0 { // a socket that only sends tells of errors by the next send
			e.drainErrors(s.sock)
		}
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

// probeAddrs are the addresses of the first family that both sides have, or of IPv6 if six.
func (f *forwarding) probeAddrs(t *target, six bool) (src, dst netip.Addr, ok bool) {
	for i := outer(six); i < len(f.tun); i++ {
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
		e.cfg.Probed(from.id, mode, in.Version == 6, body[header.UDPLen:], in.Length)
	}
}
