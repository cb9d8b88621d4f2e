package tunnel

import (
	"bytes"
	"net/netip"

	"github.com/tulle-net/tulle/tunnel/capture"
	"github.com/tulle-net/tulle/tunnel/encap"
	"github.com/tulle-net/tulle/tunnel/header"
	"github.com/tulle-net/tulle/tunnel/offload"
	"github.com/tulle-net/tulle/tunnel/underlay"
)

// Here the loops feed captures. But for drops, which are rare, they call these functions only while somebody listens.

// Tap returns the tap on the data path.
func (e *Engine) Tap() *capture.Tap { return &e.tap }

// drop counts a packet from the TUN that goes nowhere; t is the peer that it was for, nil if that is not known.
func (w *txWorker) drop(pkt []byte, t *target, d encap.Drop) {
	w.e.drop(d)
	if w.e.tap.On() {
		w.e.tap.Offer(tapped(capture.FromPods, t, d, pkt))
	}
}

// tapped is a packet of the pods.
func tapped(at capture.Point, t *target, d encap.Drop, pkt []byte) *capture.Packet {
	p := &capture.Packet{Point: at, Inner: pkt, Data: [][]byte{pkt}}
	if d != encap.DropNone {
		p.Reason = d.String()
	}
	if t != nil && !t.local {
		p.Peer, p.Path = t.id, t.mode.String()
	}
	return p
}

// tapSegments captures what packet hands to a sender: the packet or super-packet of the pods, and each packet for the
// underlay. It runs before the packet's checksum is complete where the kernel left that to the device.
func (w *txWorker) tapSegments(t *target, s *sender, to *underlay.Dest, tos byte, prefix, pkt []byte, segs []offload.Segment) {
	outer := outerOf(t, s, to, tos, pkt)
	if len(segs) == 0 {
		p := tapped(capture.ToPeer, t, encap.DropNone, pkt)
		p.Data, p.Outer = [][]byte{prefix, pkt}, outer
		w.e.tap.Offer(p)
		return
	}
	for _, seg := range segs {
		p := tapped(capture.ToPeer, t, encap.DropNone, nil)
		p.Inner = append(append([]byte(nil), seg.Header[len(prefix):]...), seg.Payload...)
		p.Data, p.Outer = [][]byte{seg.Header, seg.Payload}, outer
		w.e.tap.Offer(p)
	}
}

// outerOf is the outer header of a packet of the pods.
func outerOf(t *target, s *sender, to *underlay.Dest, tos byte, pkt []byte) *capture.Outer {
	outer := &capture.Outer{Src: localOf(s.sock, to), Dst: to.Addr(), Proto: header.ProtoUDP, TOS: tos}
	if t.mode == encap.IPIP {
		outer.Proto = header.ProtoIPv4
		if pkt[0]>>4 == 6 {
			outer.Proto = header.ProtoIPv6
		}
	}
	return outer
}

// tapRefused captures what the kernel did not take of what tapSegments has captured as handed to it.
func (w *txWorker) tapRefused(s *sender, r underlay.Refused) {
	for _, t := range w.fwd.peers {
		mode, ok := t.modeTo(r.To)
		if !ok {
			continue
		}
		by := *t
		by.mode = mode
		for _, d := range r.Datagrams() {
			p := tapped(capture.ToPeer, &by, encap.DropSendError, d)
			if mode == encap.VXLAN {
				p.Inner = d[header.VXLANFrameLen:]
			}
			p.Outer = outerOf(&by, s, r.To, r.TOS, p.Inner)
			w.e.tap.Offer(p)
		}
		return
	}
}

// modeTo is the encapsulation of what goes to a destination of the peer, which is not the peer's on a detour; ok is false for a
// destination of others.
func (t *target) modeTo(to *underlay.Dest) (m encap.Mode, ok bool) {
	switch to {
	case nil:
		return 0, false
	case t.udp:
		return encap.UDP, true
	case t.vxlan:
		return encap.VXLAN, true
	case t.raw:
		return encap.IPIP, true
	}
	return 0, false
}

// drop counts a packet that the TUN did not take, which is in parts.
func (t *tunWriter) drop(e *Engine, parts [][]byte) {
	e.drop(encap.DropTunWrite)
	if !e.tap.On() {
		return
	}
	pkt := bytes.Join(parts, nil)
	p := tapped(capture.ToPods, nil, encap.DropTunWrite, pkt)
	var in header.Inner
	if header.ParseInner(pkt, &in) == nil {
		if from, _ := e.fwd.Load().table.Lookup(in.Src); from != nil && !from.local {
			p.Peer = from.id
		}
	}
	e.tap.Offer(p)
}

// localOf is the address that a socket is bound to; a test's socket has none.
func localOf(s any, to *underlay.Dest) netip.AddrPort {
	if l, ok := s.(interface{ Local() netip.AddrPort }); ok {
		return l.Local()
	}
	if to.Addr().Addr().Is4() {
		return netip.AddrPortFrom(netip.IPv4Unspecified(), 0)
	}
	return netip.AddrPortFrom(netip.IPv6Unspecified(), 0)
}

// tapReceived captures an outer payload as it arrived, with the outcome of its checks, and the packet of the pods that was in
// it. payload is a copy from before decapsulation; inner is nil if there is none.
func (w *rxWorker) tapReceived(from netip.AddrPort, tos byte, payload, inner []byte, d encap.Drop) {
	p := tapped(capture.FromPeer, w.from, d, inner)
	if p.Peer != "" {
		p.Path = w.mode.String()
	}
	p.Data = [][]byte{payload}
	if w.carrier != overRaw4 { // there the socket delivers the outer header
		to := underlay.NewDest(from)
		p.Outer = &capture.Outer{Src: from, Dst: localOf(w.sock, to), Proto: header.ProtoUDP, TOS: tos}
		if w.carrier == overRaw6 {
			p.Outer.Proto = w.proto
		}
	}
	w.e.tap.Offer(p)
}

// tapDelivered captures a packet that goes to the pods.
func (w *rxWorker) tapDelivered(inner []byte) {
	p := tapped(capture.ToPods, w.from, encap.DropNone, inner)
	p.Path = w.mode.String()
	w.e.tap.Offer(p)
}
