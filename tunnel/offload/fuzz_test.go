package offload

import (
	"encoding/binary"
	"slices"
	"testing"
)

// seeds are super-packets of every kind.
func seeds() []*flow {
	var fs []*flow
	for _, v6 := range []bool{false, true} {
		n := 4
		if v6 {
			n = 16
		}
		for _, tcp := range []bool{false, true} {
			f := &flow{v6: v6, tcp: tcp, src: fill(n, 2), dst: fill(n, 3), ttl: 64, df: true, sport: 1000, dport: 80,
				id: 65535, seq: 1<<32 - 100, flags: 0x98, payload: fill(250, 2), mss: 99}
			if tcp {
				f.options = timestamps
			}
			fs = append(fs, f)
			g := *f
			if v6 {
				g.ext = chain(f.proto(), 8, 16)
			} else {
				g.ipOptions = []byte{1, 1, 1, 0}
			}
			fs = append(fs, &g)
		}
	}
	return fs
}

// FuzzSplit takes a virtio-net header and a packet. Whatever they are, nothing panics; what
// is split consists of right packets that hold the payload; nothing but the checksum
// field is ever written by CompleteChecksum.
func FuzzSplit(f *testing.F) {
	for _, s := range seeds() {
		pkt, h := s.super()
		b := make([]byte, VnetHdrLen)
		h.Encode(b)
		f.Add(append(b, pkt...))
	}
	s := NewSplitter(1024)
	f.Fuzz(func(t *testing.T, b []byte) {
		var h VnetHdr
		if h.Decode(b) != nil {
			return
		}
		pkt := slices.Clone(b[VnetHdrLen:])
		RawVnetHdr(pkt, int(h.GSOSize), int(h.HdrLen)-1)
		if CompleteChecksum(pkt, h) == nil && h.Flags&NeedsCsum != 0 {
			at := int(h.CsumStart) + int(h.CsumOffset)
			copy(pkt[at:at+2], b[VnetHdrLen+at:])
		}
		if !slices.Equal(pkt, b[VnetHdrLen:]) {
			t.Fatal("changed outside of the checksum field")
		}
		s.Reset()
		segs, err := s.Split(pkt, h)
		if err != nil {
			return
		}
		var l layout
		if !l.parse(pkt) {
			t.Fatal("split what cannot be parsed")
		}
		var payload []byte
		for i, seg := range segs {
			p := slices.Concat(seg.Header, seg.Payload)
			var m layout
			if !m.parse(p) || m.total != len(p) || m.hdr != len(seg.Header) {
				t.Fatalf("segment %d cannot be parsed: %x", i, p)
			}
			if i < len(segs)-1 && len(seg.Payload) != int(h.GSOSize) {
				t.Fatalf("segment %d has %d bytes, want %d", i, len(seg.Payload), h.GSOSize)
			}
			src, dst := m.addrs(p)
			check := flow{v6: m.v6, tcp: m.proto == protoTCP, src: src, dst: dst}
			if slowFold(append(check.pseudo(len(p)-m.l4), p[m.l4:]...)) != 0xffff {
				t.Fatalf("segment %d has a bad checksum: %x", i, p)
			}
			if !m.v6 && slowFold(p[:m.l4]) != 0xffff {
				t.Fatalf("segment %d has a bad header checksum: %x", i, p)
			}
			payload = append(payload, seg.Payload...)
		}
		if !slices.Equal(payload, pkt[l.hdr:l.total]) {
			t.Fatal("payload lost or invented")
		}
	})
}

// FuzzJoin takes a stream of packets, each behind two bytes of length and one of wishes: to
// continue the packet before it, to have right lengths and checksums. Without
// such help random bytes would never join. split(join(x)) = x must hold.
func FuzzJoin(f *testing.F) {
	for _, s := range seeds() {
		var b []byte
		for _, p := range s.segments() {
			b = binary.BigEndian.AppendUint16(b, uint16(len(p)))
			b = append(b, 0)
			b = append(b, p...)
		}
		f.Add(b)
		b = b[:0]
		for _, p := range s.segments() {
			b = binary.BigEndian.AppendUint16(b, uint16(len(p)))
			b = append(b, 3)
			b = append(b, p...)
		}
		f.Add(b)
	}
	j := NewJoiner(true, true)
	f.Fuzz(func(t *testing.T, b []byte) {
		var in [][]byte
		for len(b) >= 3 {
			n, wish := int(binary.BigEndian.Uint16(b)), b[2]
			b = b[3:]
			n = min(n, len(b))
			p := slices.Clone(b[:n])
			b = b[n:]
			if wish&1 != 0 && len(in) > 0 {
				continueFrom(p, in[len(in)-1])
			}
			if wish&2 != 0 {
				mend(p)
			}
			in = append(in, p)
		}
		out := splitAll(t, joinAll(t, j, in))
		for i := range min(len(in), len(out)) {
			maskStandingID(in, out, i)
		}
		if d := differ(out, in); d != "" {
			t.Fatal(d)
		}
	})
}

// continueFrom gives p the headers of before, one step on.
func continueFrom(p, before []byte) {
	var l layout
	if !l.parse(before) || len(p) < l.hdr {
		return
	}
	copy(p, before[:l.hdr])
	if !l.v6 {
		binary.BigEndian.PutUint16(p[4:], binary.BigEndian.Uint16(p[4:])+1)
	}
	if l.proto == protoTCP {
		seq := p[l.l4+4:]
		binary.BigEndian.PutUint32(seq, binary.BigEndian.Uint32(seq)+uint32(l.total-l.hdr))
	}
}

// mend makes the lengths and checksums of p right, if it has any.
func mend(p []byte) {
	if len(p) < 20 {
		return
	}
	if p[0]>>4 == 6 && len(p) >= 40 {
		binary.BigEndian.PutUint16(p[4:], uint16(len(p)-40))
	} else if p[0]>>4 == 4 {
		binary.BigEndian.PutUint16(p[2:], uint16(len(p)))
	}
	var l layout
	if !l.parse(p) {
		return
	}
	if !l.v6 {
		binary.BigEndian.PutUint16(p[10:], 0)
		binary.BigEndian.PutUint16(p[10:], ^slowFold(p[:l.l4]))
	}
	if l.proto == protoUDP {
		binary.BigEndian.PutUint16(p[l.l4+4:], uint16(len(p)-l.l4))
	}
	field := p[l.csumField():]
	binary.BigEndian.PutUint16(field, 0)
	src, dst := l.addrs(p)
	check := flow{v6: l.v6, tcp: l.proto == protoTCP, src: src, dst: dst}
	c := ^slowFold(append(check.pseudo(len(p)-l.l4), p[l.l4:]...))
	if c == 0 && l.proto == protoUDP {
		c = 0xffff
	}
	binary.BigEndian.PutUint16(field, c)
}

// maskStandingID takes the ID and header checksum of in[i] into out[i] where all that
// differs is an ID that stood still beside DF, which joining may set going.
func maskStandingID(in, out [][]byte, i int) {
	a, b := in[i], out[i]
	if i == 0 || len(in[i-1]) < 20 || len(a) != len(b) || len(a) < 20 || a[0] != 0x45 || a[6] != 0x40 || slowFold(b[:20]) != 0xffff ||
		slowFold(a[:20]) != 0xffff || !slices.Equal(a[4:6], in[i-1][4:6]) {
		return
	}
	copy(b[4:6], a[4:6])
	copy(b[10:12], a[10:12])
}
