package tunnel

import (
	"time"

	"github.com/tulle-net/tulle/tunnel/encap"
	"github.com/tulle-net/tulle/tunnel/header"
)

// What the vxlan encapsulation needs beside its headers: the VTEPs' MACs. Members tell theirs by gossip. A kernel's VTEP
// resolves ours by ARP or neighbour discovery, which frame answers; its own is configured, or learned from whatever it
// sends, or asked for.

// vtep is the MAC of the peer's VTEP; false while it is not known.
func (t *target) vtep() (header.MAC, bool) {
	if !t.mac.IsZero() {
		return t.mac, true
	}
	m := t.state.mac.Load()
	if m == nil {
		return header.MAC{}, false
	}
	return *m, true
}

// learn keeps the MAC that a peer's VTEP sends from, if nobody told it.
func (t *target) learn(mac header.MAC) {
	if !t.mac.IsZero() || !mac.Station() {
		return
	}
	if m := t.state.mac.Load(); m == nil || *m != mac {
		own := mac // only what is kept goes to the heap
		t.state.mac.Store(&own)
	}
}

// VTEPMAC is the MAC of a peer's VTEP, given or learned; false while it is not known.
func (e *Engine) VTEPMAC(peer string) (header.MAC, bool) {
	if t := e.fwd.Load().peers[peer]; t != nil {
		return t.vtep()
	}
	return header.MAC{}, false
}

const (
	askEvery = time.Second // between questions for one peer's MAC
	askTimes = 3           // unanswered questions after which the packets' sources are told
)

// resolve asks a VTEP whose MAC is not known for it: who has the packet's destination? The packet is dropped, as there is
// nothing to queue it in. Its source hears of it only when the questions stay unanswered: a host that hears "unreachable"
// gives a connection up that would have come about with the next attempt.
func (w *txWorker) resolve(t *target, in *header.Inner, s *sender, pkt []byte) {
	sender := w.fwd.tun[outer(in.Version == 6)]
	last, now := t.state.asked.Load(), time.Now().UnixNano()
	due := now-last >= int64(askEvery) || now < last // the host's clock was set back
	if sender.IsValid() && due && t.state.asked.CompareAndSwap(last, now) {
		t.state.questions.Add(1)
		q := header.Solicitation{Sender: sender, Target: in.Dst, SenderMAC: w.fwd.mac}
		s.packet(w, t.vxlan, appendQuestion(nil, w.e.cfg.VNI, q), 0)
	}
	if t.state.questions.Load() > askTimes {
		w.refuse(pkt, t, encap.DropNoPath)
	} else {
		w.drop(pkt, t, encap.DropNoPath)
	}
}

// appendQuestion appends the frame that asks all stations behind a VTEP who has an address.
func appendQuestion(b []byte, vni uint32, q header.Solicitation) []byte {
	if q.Target.Is4() {
		return header.AppendARPRequest(header.AppendVXLAN(b, vni, header.BroadcastMAC, q.SenderMAC, header.EtherTypeARP), q)
	}
	group := header.SolicitedNode(q.Target).As16()
	to := header.MAC{0x33, 0x33, group[12], group[13], group[14], group[15]} // RFC 2464 §7
	return header.AppendNeighborSolicit(header.AppendVXLAN(b, vni, to, q.SenderMAC, header.EtherTypeIPv6), q)
}

// lastFrame is the headers of a frame with an inner packet that passed, from a peer and under tables that are still the same:
// a frame that begins like it passes, too.
type lastFrame struct {
	header  [header.VXLANFrameLen]byte
	version byte // of the inner packet; 0: none has passed
}

// again reports whether a payload is such a frame. Neighbour discovery, which is not for the host, hides in ICMPv6: that is
// looked at.
func (l *lastFrame) again(payload []byte) bool {
	if len(payload) < header.VXLANFrameLen+header.IPv4MinLen || [header.VXLANFrameLen]byte(payload) != l.header {
		return false
	}
	inner := payload[header.VXLANFrameLen:]
	return inner[0]>>4 == l.version && (l.version == 4 || header.IPv6(inner).NextHeader() != header.ProtoICMPv6)
}

// frame takes the inner packet out of a VXLAN frame. Both results are zero for one that is answered or ignored here: it
// concerns the VTEPs themselves.
func (w *rxWorker) frame(payload []byte) (inner []byte, d encap.Drop) {
	v, d := encap.UnwrapVXLAN(payload, w.e.cfg.VNI, w.fwd.mac)
	if d != encap.DropNone {
		return nil, d
	}
	w.from.learn(v.SrcMAC())
	if v.EtherType() == header.EtherTypeARP {
		if q, ok := header.ParseARPRequest(v.Payload()); ok {
			w.answer(v.SrcMAC(), q)
		}
		return nil, encap.DropNone
	}
	if q, ok := header.ParseNeighborSolicit(v.Payload()); ok {
		w.answer(v.SrcMAC(), q)
		return nil, encap.DropNone
	}
	if v.DstMAC().Group() {
		return nil, encap.DropLocalMulticast
	}
	inner, d = encap.InnerVXLAN(v)
	if d == encap.DropNone {
		w.lastFrame = lastFrame{[header.VXLANFrameLen]byte(payload), inner[0] >> 4}
	}
	return inner, d
}

// answer tells a VTEP our MAC, for every address in this node's own space: its tun addresses, which a route of the kernel
// there may have as gateway, and its pods' addresses, where such a route has none. Whoever only looks whether an address
// is free gets no answer.
func (w *rxWorker) answer(to header.MAC, q header.Solicitation) {
	t, ok := w.fwd.table.Lookup(q.Target)
	if !ok || !t.local || q.Sender.IsUnspecified() || w.from.vxlan == nil {
		return
	}
	vni, mac := w.e.cfg.VNI, w.fwd.mac
	if q.SenderMAC.IsZero() {
		q.SenderMAC = to
	}
	b := w.reply[:0]
	if q.Target.Is4() {
		b = header.AppendARPReply(header.AppendVXLAN(b, vni, to, mac, header.EtherTypeARP), q, mac)
	} else {
		b = header.AppendNeighborAdvert(header.AppendVXLAN(b, vni, to, mac, header.EtherTypeIPv6), q, mac)
	}
	w.reply = b
	r, err := w.replies.single(w.from.vxlan, b, 0)
	w.e.sent(w.replies.sock, r, err)
}
