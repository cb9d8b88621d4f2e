package offload

import (
	"bytes"
	"encoding/binary"
	"slices"
	"testing"

	"pgregory.net/rapid"
)

// written is one packet as a TUN device would get it.
type written struct {
	h   VnetHdr
	pkt []byte
}

// joinAll feeds copies of packets to j as the engine does, and returns what it writes. Every
// run is also undone, to see that its packets come back as they were.
func joinAll(t interface{ Fatalf(string, ...any) }, j *Joiner, packets [][]byte) []written {
	var out []written
	var held [][]byte
	flush := func() {
		h, iov, ok := j.Flush()
		if ok != (len(held) > 0) {
			t.Fatalf("Flush says %v with %d packets held", ok, len(held))
		}
		if !ok {
			return
		}
		out = append(out, written{h, slices.Concat(iov...)})
		if d := differ(j.Undo(), held); d != "" {
			t.Fatalf("Undo: %s", d)
		}
		held = held[:0]
	}
	for _, p := range packets {
		c := slices.Clone(p)
		if !j.Add(c) {
			flush()
			if !j.Add(c) {
				t.Fatalf("an empty Joiner refuses a packet")
			}
		}
		held = append(held, p)
	}
	flush()
	return out
}

// splitAll takes apart what joinAll has made.
func splitAll(t interface{ Fatalf(string, ...any) }, in []written) [][]byte {
	var out [][]byte
	s := NewSplitter(4096)
	for _, w := range in {
		if w.h.GSOType == GSONone {
			if w.h != (VnetHdr{}) {
				t.Fatalf("a lone packet has the header %+v", w.h)
			}
			out = append(out, w.pkt)
			continue
		}
		s.Reset()
		segs, err := s.Split(w.pkt, w.h)
		if err != nil {
			t.Fatalf("what was joined cannot be split: %v", err)
		}
		if len(segs) < 2 {
			t.Fatalf("%d segment was written as a super-packet", len(segs))
		}
		out = append(out, flat(segs)...)
	}
	return out
}

// join(split(x)) = x, header and bytes, for all that may be joined.
func TestJoinSplit(t *testing.T) {
	j := NewJoiner(true, true)
	rapid.Check(t, func(t *rapid.T) {
		f := drawFlow(t, true)
		limit := maxUSOSegments
		if f.tcp {
			limit = maxTSOSegments
		}
		f.payload = f.payload[:min(len(f.payload), limit*f.mss)]
		pkt, h := f.super()
		segs := f.segments()
		got := joinAll(t, j, segs)
		if len(segs) == 1 {
			if len(got) != 1 || got[0].h != (VnetHdr{}) || !bytes.Equal(got[0].pkt, segs[0]) {
				t.Fatalf("a lone packet was changed")
			}
			return
		}
		// Rarely a TCP checksum of ours has the other form of zero; never does Split write it.
		if len(got) != 1 {
			t.Fatalf("%d packets became %d, want 1", len(segs), len(got))
		}
		if got[0].h != h {
			t.Fatalf("header %+v, want %+v", got[0].h, h)
		}
		if d := differ([][]byte{got[0].pkt}, [][]byte{pkt}); d != "" {
			t.Fatal(d)
		}
	})
}

// drawStream draws packets of a few flows, most of them continuing one another, some
// spoilt in one bit, doubled, swapped, cut or lengthened.
func drawStream(t *rapid.T) [][]byte {
	var out [][]byte
	for range rapid.IntRange(1, 4).Draw(t, "flows") {
		f := drawFlow(t, rapid.IntRange(0, 4).Draw(t, "plain") > 0)
		f.payload = f.payload[:min(len(f.payload), 20*f.mss)]
		segs := f.segments()
		for range rapid.IntRange(0, 3).Draw(t, "hurts") {
			i := rapid.IntRange(0, len(segs)-1).Draw(t, "which")
			p := segs[i]
			switch rapid.IntRange(0, 6).Draw(t, "how") {
			case 0, 1:
				at := rapid.IntRange(0, min(len(p), 80)-1).Draw(t, "at")
				p[at] ^= 1 << rapid.IntRange(0, 7).Draw(t, "bit")
			case 2:
				at := rapid.IntRange(0, len(p)-1).Draw(t, "at")
				p[at] ^= 1 << rapid.IntRange(0, 7).Draw(t, "bit")
			case 3:
				segs = slices.Insert(segs, i, slices.Clone(p))
			case 4:
				k := rapid.IntRange(0, len(segs)-1).Draw(t, "with")
				segs[i], segs[k] = segs[k], segs[i]
			case 5:
				segs[i] = p[:rapid.IntRange(0, len(p)).Draw(t, "cut")]
			case 6:
				segs[i] = append(p, 0)
			}
			segs = slices.DeleteFunc(segs, func(p []byte) bool { return len(p) == 0 })
			if len(segs) == 0 {
				break
			}
		}
		out = append(out, segs...)
	}
	return out
}

// split(join(x)) = x, byte for byte, whatever x is.
func TestSplitJoin(t *testing.T) {
	j := NewJoiner(true, true)
	joined := 0
	rapid.Check(t, func(t *rapid.T) {
		in := drawStream(t)
		got := joinAll(t, j, in)
		joined += len(in) - len(got)
		out := splitAll(t, got)
		for i := range min(len(in), len(out)) {
			maskStandingID(in, out, i) // a datagram and its double
		}
		if d := differ(out, in); d != "" {
			t.Fatal(d)
		}
	})
	if joined < 100 {
		t.Errorf("only %d packets were ever joined", joined)
	}
}

func TestJoinSwitches(t *testing.T) {
	tcp := &flow{tcp: true, src: fill(4, 2), dst: fill(4, 3), ttl: 64, flags: 0x10, payload: fill(3000, 5), mss: 1000}
	udp := &flow{src: fill(4, 2), dst: fill(4, 3), ttl: 64, payload: fill(3000, 5), mss: 1000}
	for _, c := range []struct {
		tso, uso bool
		tcp, udp int // packets written
	}{{false, false, 3, 3}, {true, false, 1, 3}, {false, true, 3, 1}, {true, true, 1, 1}} {
		j := NewJoiner(c.tso, c.uso)
		if n := len(joinAll(t, j, tcp.segments())); n != c.tcp {
			t.Errorf("tso %v: 3 TCP packets became %d, want %d", c.tso, n, c.tcp)
		}
		if n := len(joinAll(t, j, udp.segments())); n != c.udp {
			t.Errorf("uso %v: 3 UDP packets became %d, want %d", c.uso, n, c.udp)
		}
	}
}

// The rules one by one: two packets that would join, and one thing changed in the second (with its
// checksums right again) that forbids it.
func TestJoinRules(t *testing.T) {
	type two = [2]*flow
	base := func(v6, tcp bool) two {
		var fs two
		for i := range fs {
			fs[i] = &flow{v6: v6, tcp: tcp, src: fill(4, 2), dst: fill(4, 3), ttl: 64, tos: 2, df: true, sport: 1000, dport: 80,
				id: uint16(i), seq: uint32(i) * 1000, ack: 7, flags: 0x10, window: 500, payload: fill(1000, uint64(i+2)), mss: 1000}
			if v6 {
				fs[i].src, fs[i].dst = fill(16, 2), fill(16, 3)
			}
			if tcp {
				fs[i].options = slices.Clone(timestamps)
			}
		}
		return fs
	}
	const (
		v4, v6   = 1, 2
		tcp, udp = 4, 8
		all      = v4 | v6 | tcp | udp
	)
	for _, c := range []struct {
		name string
		on   int
		join bool
		edit func(fs two)
	}{
		{"nothing", all, true, func(fs two) {}},
		{"shorter", all, true, func(fs two) { fs[1].payload = fs[1].payload[:1] }},
		{"longer", all, false, func(fs two) { fs[1].payload = fill(1001, 4); fs[1].mss = 1001 }},
		{"no payload", all, false, func(fs two) { fs[1].payload = nil }},
		{"neither with payload", all, false, func(fs two) { fs[0].payload, fs[1].payload = nil, nil; fs[1].seq = 0 }},
		{"source", all, false, func(fs two) { fs[1].src[3]++ }},
		{"destination", all, false, func(fs two) { fs[1].dst[0]++ }},
		{"source port", all, false, func(fs two) { fs[1].sport++ }},
		{"destination port", all, false, func(fs two) { fs[1].dport++ }},
		{"TTL", all, false, func(fs two) { fs[1].ttl-- }},
		{"TOS", all, false, func(fs two) { fs[1].tos = 3 }},
		{"flow label", v6 | tcp | udp, false, func(fs two) { fs[1].label++ }},
		{"DF", v4 | tcp | udp, false, func(fs two) { fs[1].df = false }},
		{"ID back", v4 | tcp | udp, false, func(fs two) { fs[1].id = 65535 }},
		{"ID jumps", v4 | tcp | udp, false, func(fs two) { fs[1].id = 2 }},
		{"ID stands, DF", v4 | tcp | udp, true, func(fs two) { fs[1].id = 0 }},
		{"ID stands, no DF", v4 | tcp | udp, false, func(fs two) { fs[1].id = 0; fs[0].df, fs[1].df = false, false }},
		{"IP options", v4 | tcp | udp, false, func(fs two) { fs[0].ipOptions = []byte{1, 1, 1, 0}; fs[1].ipOptions = fs[0].ipOptions }},
		{"extension headers", v6 | tcp | udp, false, func(fs two) { fs[0].ext = chain(fs[0].proto(), 8); fs[1].ext = fs[0].ext }},
		{"sequence ahead", v4 | v6 | tcp, false, func(fs two) { fs[1].seq++ }},
		{"sequence behind", v4 | v6 | tcp, false, func(fs two) { fs[1].seq-- }},
		{"acknowledgement", v4 | v6 | tcp, false, func(fs two) { fs[1].ack++ }},
		{"window", v4 | v6 | tcp, false, func(fs two) { fs[1].window++ }},
		{"urgent pointer", v4 | v6 | tcp, false, func(fs two) { fs[1].urg++ }},
		{"timestamp", v4 | v6 | tcp, false, func(fs two) { fs[1].options[11]++ }},
		{"other options", v4 | v6 | tcp, false, func(fs two) { fs[1].options = sack }},
		{"no options", v4 | v6 | tcp, false, func(fs two) { fs[1].options = nil }},
		{"second has PSH", v4 | v6 | tcp, true, func(fs two) { fs[1].flags |= tcpPSH }},
		{"second has FIN", v4 | v6 | tcp, true, func(fs two) { fs[1].flags |= tcpFIN }},
		{"first has PSH", v4 | v6 | tcp, false, func(fs two) { fs[0].flags |= tcpPSH }},
		{"first has FIN", v4 | v6 | tcp, false, func(fs two) { fs[0].flags |= tcpFIN }},
		{"SYN", v4 | v6 | tcp, false, func(fs two) { fs[0].flags |= tcpSYN; fs[1].flags |= tcpSYN }},
		{"RST", v4 | v6 | tcp, false, func(fs two) { fs[0].flags |= tcpRST; fs[1].flags |= tcpRST }},
		{"URG", v4 | v6 | tcp, false, func(fs two) { fs[0].flags |= tcpURG; fs[1].flags |= tcpURG }},
		{"second has RST", v4 | v6 | tcp, false, func(fs two) { fs[1].flags |= tcpRST }},
		{"ACK gone", v4 | v6 | tcp, false, func(fs two) { fs[1].flags = 0 }},
		{"ECE in both", v4 | v6 | tcp, true, func(fs two) { fs[0].flags |= 0x40; fs[1].flags |= 0x40 }},
		{"ECE in the second", v4 | v6 | tcp, false, func(fs two) { fs[1].flags |= 0x40 }},
		{"CWR in the first", v4 | v6 | tcp, true, func(fs two) { fs[0].flags |= tcpCWR }},
		{"CWR in the second", v4 | v6 | tcp, false, func(fs two) { fs[1].flags |= tcpCWR }},
		{"CWR in both", v4 | v6 | tcp, false, func(fs two) { fs[0].flags |= tcpCWR; fs[1].flags |= tcpCWR }},
	} {
		for _, is6 := range []bool{false, true} {
			for _, isTCP := range []bool{false, true} {
				if is6 && c.on&v6 == 0 || !is6 && c.on&v4 == 0 || isTCP && c.on&tcp == 0 || !isTCP && c.on&udp == 0 {
					continue
				}
				fs := base(is6, isTCP)
				c.edit(fs)
				in := [][]byte{fs[0].segments()[0], fs[1].segments()[0]}
				got := joinAll(t, NewJoiner(true, true), in)
				if joined := len(got) == 1; joined != c.join {
					t.Errorf("%s (v6 %v, tcp %v): joined %v, want %v", c.name, is6, isTCP, joined, c.join)
				}
			}
		}
	}
}

// A run ends with its short packet, its PSH, its size and its count.
func TestJoinCloses(t *testing.T) {
	f := &flow{tcp: true, src: fill(4, 2), dst: fill(4, 3), ttl: 64, flags: 0x18, payload: fill(3000, 5), mss: 1000}
	next := *f
	next.id, next.seq = 3, 3000
	if n := len(joinAll(t, NewJoiner(true, true), append(f.segments(), next.segments()...))); n != 2 {
		t.Errorf("PSH in between: %d writes, want 2", n)
	}
	f.flags, next.flags = 0x10, 0x10
	if n := len(joinAll(t, NewJoiner(true, true), append(f.segments(), next.segments()...))); n != 1 {
		t.Errorf("nothing in between: %d writes, want 1", n)
	}
	f.payload, next.seq = f.payload[:2999], 2999
	if n := len(joinAll(t, NewJoiner(true, true), append(f.segments(), next.segments()...))); n != 2 {
		t.Errorf("short packet in between: %d writes, want 2", n)
	}
	long := &flow{tcp: true, src: fill(4, 2), dst: fill(4, 3), ttl: 64, flags: 0x10, mss: 1400, payload: fill(maxTotal-40, 3)}
	segs := long.segments()
	long.payload = fill(70000, 3)
	for at := maxTotal - 40; at < 70000; at += 1400 {
		segs = append(segs, long.packet(uint16(at), uint32(at), 0x10, long.payload[at:min(at+1400, 70000)], false))
	}
	for _, w := range joinAll(t, NewJoiner(true, true), segs) {
		if len(w.pkt) > maxTotal {
			t.Errorf("a super-packet of %d bytes", len(w.pkt))
		}
	}
	small := &flow{src: fill(4, 2), dst: fill(4, 3), ttl: 64, mss: 36, payload: fill(36*150, 3)}
	got := joinAll(t, NewJoiner(true, true), small.segments())
	if len(got) != 3 {
		t.Errorf("150 datagrams became %d writes, want 64 + 64 + 22", len(got))
	}
}

// What fails its checksum is passed on alone and as it is, wherever it stands in the run.
func TestJoinBadChecksum(t *testing.T) {
	for _, isTCP := range []bool{false, true} {
		f := &flow{tcp: isTCP, src: fill(4, 2), dst: fill(4, 3), ttl: 64, flags: 0x10, payload: fill(5000, 5), mss: 1000}
		for bad, want := range []int{2, 3, 3, 3, 2} {
			segs := f.segments()
			segs[bad][500] ^= 4
			got := joinAll(t, NewJoiner(true, true), segs)
			if len(got) != want {
				t.Errorf("tcp %v, packet %d of 5 bad: %d writes, want %d", isTCP, bad, len(got), want)
			}
			if !slices.ContainsFunc(got, func(w written) bool { return bytes.Equal(w.pkt, segs[bad]) && w.h == VnetHdr{} }) {
				t.Errorf("tcp %v: bad packet %d was not passed on alone", isTCP, bad)
			}
			trusting := NewJoiner(true, true)
			trusting.TrustChecksums = true
			if n := len(joinAll(t, trusting, segs)); n != 1 {
				t.Errorf("tcp %v, trusting: %d writes, want 1", isTCP, n)
			}
		}
	}
	f := &flow{src: fill(4, 2), dst: fill(4, 3), ttl: 64, payload: fill(2000, 5), mss: 1000}
	segs := f.segments()
	for _, p := range segs {
		p[26], p[27] = 0, 0
	}
	if n := len(joinAll(t, NewJoiner(true, true), segs)); n != 2 {
		t.Errorf("UDP without checksum: %d writes, want 2", n)
	}
}

// Where the ID stands still, all that Split changes is the ID.
func TestJoinStandingID(t *testing.T) {
	f := &flow{src: fill(4, 2), dst: fill(4, 3), ttl: 64, df: true, payload: fill(5000, 5), mss: 1000}
	var in [][]byte
	for at := 0; at < 5000; at += 1000 {
		in = append(in, f.packet(9, 0, 0, f.payload[at:at+1000], false))
	}
	got := joinAll(t, NewJoiner(true, true), in)
	if len(got) != 1 {
		t.Fatalf("%d writes, want 1", len(got))
	}
	for i, p := range splitAll(t, got) {
		if id := binary.BigEndian.Uint16(p[4:]); int(id) != 9+i || slowFold(p[:20]) != 0xffff {
			t.Errorf("packet %d: ID %d, header sum %#x", i, id, slowFold(p[:20]))
		}
		copy(p[4:6], in[i][4:6])
		copy(p[10:12], in[i][10:12])
		if !bytes.Equal(p, in[i]) {
			t.Errorf("packet %d differs in more than its ID", i)
		}
	}
	// A third packet keeps the step of the first two.
	in[2] = f.packet(10, 0, 0, f.payload[2000:3000], false)
	if n := len(joinAll(t, NewJoiner(true, true), in[:3])); n != 2 {
		t.Errorf("IDs 9, 9, 10: %d writes, want 2", n)
	}
}

func TestFlushVnet(t *testing.T) {
	j := NewJoiner(true, true)
	if iov, ok := j.FlushVnet(); ok || iov != nil {
		t.Fatal("an empty Joiner flushes something")
	}
	f := &flow{tcp: true, src: fill(4, 2), dst: fill(4, 3), ttl: 64, flags: 0x10, payload: fill(5000, 5), mss: 1000}
	for _, p := range f.segments() {
		if !j.Add(p) {
			t.Fatal("not joined")
		}
	}
	iov, ok := j.FlushVnet()
	if !ok || len(iov) != 6 {
		t.Fatalf("%d pieces, %v, want 6", len(iov), ok)
	}
	pkt, h := f.super()
	want := make([]byte, VnetHdrLen)
	h.Encode(want)
	if !bytes.Equal(slices.Concat(iov...), append(want, pkt...)) {
		t.Fatal("not the super-packet behind its virtio-net header")
	}
}

func TestRawVnetHdr(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		f := drawFlow(t, false)
		pkt, want := f.super()
		limit := rapid.IntRange(200, 9000).Draw(t, "max packet")
		h, ok := RawVnetHdr(pkt, limit, NotTold)
		switch {
		case len(pkt) <= limit:
			want.GSOType, want.GSOSize = GSONone, 0
		case f.tcp:
			want.GSOSize = uint16(min(limit, len(pkt)) - f.l4() - f.l4Headers())
		default:
			if ok {
				t.Fatalf("a UDP packet of %d bytes is given %+v", len(pkt), h)
			}
			return
		}
		if !ok || h != want {
			t.Fatalf("%+v, %v, want %+v", h, ok, want)
		}
	})
	// Of UDP the socket has told the segment size, or that it is one datagram, however long.
	rapid.Check(t, func(t *rapid.T) {
		f := drawFlow(t, false)
		if f.tcp {
			return
		}
		pkt, want := f.super()
		if rapid.Bool().Draw(t, "one datagram") || len(f.payload) <= f.mss {
			want.GSOType, want.GSOSize = GSONone, 0
		}
		if h, ok := RawVnetHdr(pkt, rapid.IntRange(200, 9000).Draw(t, "max packet"), int(want.GSOSize)); !ok || h != want {
			t.Fatalf("%+v, %v, want %+v", h, ok, want)
		}
	})
	// Packets with a complete checksum are not touched, even one which equals the pseudo-header's sum.
	hits := 0
	for i := range 1 << 16 {
		f := &flow{src: fill(4, 2), dst: fill(4, 3), ttl: 64, payload: []byte{byte(i >> 8), byte(i)}, mss: 2}
		pkt := f.segments()[0]
		if h, ok := RawVnetHdr(pkt, 1500, NotTold); ok {
			t.Fatalf("a complete checksum is taken for a partial one: %x, %+v", pkt, h)
		}
		if binary.BigEndian.Uint16(pkt[26:]) == slowFold(f.pseudo(10)) {
			hits++
		}
	}
	if hits == 0 {
		t.Error("no payload made both sums equal")
	}
}

// What CutFirst makes of a super-packet are the segments of that, in two parts.
func TestCutFirst(t *testing.T) {
	s := NewSplitter(8 << 10)
	rapid.Check(t, func(t *rapid.T) {
		f := drawFlow(t, false)
		pkt, h := f.super()
		want := f.segments()
		first, rest := CutFirst(slices.Clone(pkt), h)
		if !f.tcp || len(want) == 1 {
			if rest != nil || !slices.Equal(first, pkt) {
				t.Fatalf("of one that is none, or has one segment, a rest of %d bytes", len(rest))
			}
			return
		}
		single := h
		single.GSOType, single.GSOSize = GSONone, 0
		if err := CompleteChecksum(first, single); err != nil {
			t.Fatal(err)
		}
		if d := differ([][]byte{first}, want[:1]); d != "" {
			t.Fatal(d)
		}
		if got, ok := RawVnetHdr(rest, len(want[0]), NotTold); !ok || got.CsumStart != h.CsumStart || got.CsumOffset != h.CsumOffset || (got.GSOType == GSONone) != (len(want) == 2) {
			t.Fatalf("the rest is recognised as %+v, %v", got, ok)
		}
		h.GSOType &^= GSOECN
		s.Reset()
		segs, err := s.Split(rest, h)
		if err != nil {
			t.Fatal(err)
		}
		if d := differ(flat(segs), want[1:]); d != "" {
			t.Fatal(d)
		}
	})
}
