package tunnel

import (
	"github.com/tulle-net/tulle/tunnel/encap"
	"github.com/tulle-net/tulle/tunnel/header"
	"github.com/tulle-net/tulle/tunnel/offload"
	"github.com/tulle-net/tulle/tunnel/trace"
	"github.com/tulle-net/tulle/tunnel/underlay"
)

// senderSet has the senders of a worker for one outer family. Each UDP sender has its own source port. A flow keeps its port, so
// that ECMP and NIC queues, which hash ports, spread flows and never reorder one.
type senderSet struct {
	udp   []*sender
	raw   [2]*sender // protocols 4 and 41, by the inner family
	dirty []*sender
}

// sender returns the sender for a packet; nil if this node cannot send the peer's encapsulation.
func (o *senderSet) sender(t *target, in *header.Inner, pkt []byte) (s *sender, to *underlay.Dest) {
	switch t.mode {
	case encap.UDP, encap.VXLAN:
		to = t.udp
		if t.mode == encap.VXLAN {
			to = t.vxlan
		}
		s = o.udp[0]
		if len(o.udp) > 1 {
			s = o.udp[header.FlowHash(pkt, in)%uint32(len(o.udp))]
		}
	case encap.IPIP:
		s, to = o.raw[outer(in.Version == 6)], t.raw
	}
	if s == nil || to == nil {
		return nil, nil
	}
	return s, to
}

// sender collects messages for one socket. On a UDP socket, consecutive packets of equal length to one peer (of any inner
// flow) become a train: one message that the kernel splits by UDP_SEGMENT.
type sender struct {
	set   *senderSet // that it belongs to; nil if it sends single messages only
	sock  outSocket
	batch *underlay.SendBatch
	gso   bool // trains and super-packets are sent as one message
	dirty bool // has unsent messages, and is in set.dirty

	// The open train. count 0: none is open.
	to     *underlay.Dest
	size   int // of each packet but perhaps the last
	tos    byte
	count  int
	bytes  int
	closed bool // a shorter packet ended it
}

// newSender makes a sender of the set for a worker.
func (o *senderSet) newSender(w *txWorker, sock outSocket, gso bool) *sender {
	s := &sender{set: o, sock: sock, batch: underlay.NewSendBatch(txMessages, txIovecs), gso: gso}
	s.batch.Refused = func(r underlay.Refused) {
		if w.e.tap.On() {
			w.tapRefused(s, r)
		}
	}
	return s
}

// packet adds one packet, which stays referenced until flush.
func (s *sender) packet(w *txWorker, to *underlay.Dest, pkt []byte, tos byte) {
	if s.count > 0 && s.gso && s.to == to && s.tos == tos && !s.closed && len(pkt) <= s.size &&
		s.count < maxSegments && s.bytes+len(pkt) <= maxGSOBytes && !s.batch.Full(1) {
		s.batch.Append(pkt)
		s.count++
		s.bytes += len(pkt)
		s.closed = len(pkt) < s.size
		return
	}
	s.begin(w, to, tos, 1)
	s.to, s.size, s.tos, s.closed = to, len(pkt), tos, false
	s.count, s.bytes = 1, len(pkt)
	s.batch.Append(pkt)
}

// segments adds the segments of a super-packet.
func (s *sender) segments(w *txWorker, to *underlay.Dest, segs []offload.Segment, tos byte) {
	s.end()
	for len(segs) > 0 {
		n := 1
		size := len(segs[0].Header) + len(segs[0].Payload)
		if s.gso {
			n = min(len(segs), maxSegments, maxGSOBytes/size)
		}
		s.begin(w, to, tos, 2*n)
		for _, seg := range segs[:n] {
			s.batch.Append(seg.Header)
			s.batch.Append(seg.Payload)
		}
		if n > 1 {
			s.batch.End(size)
		} else {
			s.batch.End(0)
		}
		segs = segs[n:]
	}
}

// begin ends the open train and starts a message of up to iovecs slices; it sends first if there is no room.
func (s *sender) begin(w *txWorker, to *underlay.Dest, tos byte, iovecs int) {
	s.end()
	if s.batch.Full(iovecs) {
		s.transmit(w)
	}
	if !s.dirty {
		s.dirty = true
		s.set.dirty = append(s.set.dirty, s)
	}
	s.batch.Begin(to, tos)
}

// end closes the open train.
func (s *sender) end() {
	switch {
	case s.count > 1:
		s.batch.End(s.size)
	case s.count == 1:
		s.batch.End(0)
	}
	s.count = 0
}

func (s *sender) flush(w *txWorker) {
	s.end()
	s.transmit(w)
}

// transmit sends the batch.
func (s *sender) transmit(w *txWorker) {
	was := w.span.To(trace.Send)
	r, err := s.sock.Send(s.batch)
	if w.span.On() {
		w.span.To(was)
		w.span.Sent(r.Sent)
	}
	w.e.sent(s.sock, r, err)
}

// single sends one message at once, for whoever has a sender of its own; a train of packets of segment bytes unless that is 0.
func (s *sender) single(to *underlay.Dest, msg []byte, segment int) (underlay.SendResult, error) {
	s.batch.Begin(to, 0)
	s.batch.Append(msg)
	s.batch.End(segment)
	return s.sock.Send(s.batch)
}
