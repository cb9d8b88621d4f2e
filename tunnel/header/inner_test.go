package header

import (
	"bytes"
	"encoding/binary"
	"net/netip"
	"testing"
)

func TestParseInner(t *testing.T) {
	ports := []byte{0x03, 0xe8, 0x07, 0xd0, 0, 8, 0, 0}
	base4 := Inner{Src: src4, Dst: dst4, HeaderLen: 20, Length: 28, Version: 4, Proto: ProtoUDP, TTL: 63, TOS: 0xb9}
	base6 := Inner{Src: src6, Dst: dst6, HeaderLen: 40, Length: 48, Version: 6, Proto: ProtoUDP, TTL: 63, TOS: 0xb9, DF: true}
	with := func(in Inner, f func(*Inner)) Inner { f(&in); return in }
	hasPorts := func(in *Inner) { in.SrcPort, in.DstPort, in.HasPorts = 1000, 2000, true }
	options := join(ip4(ProtoUDP, 0, nil), []byte{1, 1, 1, 0}, ports)
	options[0] = 0x46
	binary.BigEndian.PutUint16(options[2:], uint16(len(options)))
	ah := make([]byte, 24) // RFC 4302: length in 32-bit words minus 2
	ah[0], ah[1] = ProtoUDP, 4
	for _, tt := range []struct {
		name string
		b    []byte
		want Inner
	}{
		{"v4 UDP", ip4(ProtoUDP, 0, ports), with(base4, hasPorts)},
		{"v4 DF", ip4(ProtoUDP, IPv4FlagDF, ports), with(base4, func(in *Inner) { hasPorts(in); in.DF = true })},
		{"v4 options", options, with(base4, func(in *Inner) { hasPorts(in); in.HeaderLen, in.Length = 24, 32 })},
		{"v4 trailing bytes", append(ip4(ProtoUDP, 0, ports), "padding"...), with(base4, hasPorts)},
		{"v4 first fragment", ip4(ProtoUDP, IPv4FlagMF, ports), with(base4, func(in *Inner) { hasPorts(in); in.Fragment, in.FirstFragment = true, true })},
		{"v4 middle fragment", ip4(ProtoUDP, IPv4FlagMF|1, ports), with(base4, func(in *Inner) { in.Fragment = true })},
		{"v4 last fragment", ip4(ProtoUDP, 185, ports), with(base4, func(in *Inner) { in.Fragment = true })},
		{"v4 ICMP has no ports", ip4(ProtoICMP, 0, ports), with(base4, func(in *Inner) { in.Proto = ProtoICMP })},
		{"v4 SCTP", ip4(ProtoSCTP, 0, ports), with(base4, func(in *Inner) { hasPorts(in); in.Proto = ProtoSCTP })},
		{"v4 UDP of three bytes", ip4(ProtoUDP, 0, ports[:3]), with(base4, func(in *Inner) { in.Length = 23 })},
		{"v4 without payload", ip4(ProtoUDP, 0, nil), with(base4, func(in *Inner) { in.Length = 20 })},
		{"v4 in v4", ip4(ProtoIPv4, 0, ports), with(base4, func(in *Inner) { in.Proto = ProtoIPv4 })},

		{"v6 UDP", ip6(ProtoUDP, ports), with(base6, hasPorts)},
		{"v6 trailing bytes", append(ip6(ProtoUDP, ports), 0), with(base6, hasPorts)},
		{"v6 without payload", ip6(ProtoUDP, nil), with(base6, func(in *Inner) { in.Length = 40 })},
		{"v6 no next header", ip6(ProtoNoNext, nil), with(base6, func(in *Inner) { in.Length, in.Proto = 40, ProtoNoNext })},
		{"v6 hop-by-hop, routing, destination", ip6(ProtoHopByHop, join(ext(ProtoRouting), ext(ProtoDestOpts), ext(ProtoUDP), ports)),
			with(base6, func(in *Inner) { hasPorts(in); in.HeaderLen, in.Length = 64, 72 })},
		{"v6 authentication", ip6(ProtoAH, join(ah, ports)), with(base6, func(in *Inner) { hasPorts(in); in.HeaderLen, in.Length = 64, 72 })},
		{"v6 mobility at the end", ip6(ProtoMobility, ext(ProtoNoNext)), with(base6, func(in *Inner) { in.HeaderLen, in.Proto = 48, ProtoNoNext })},
		{"v6 ESP hides the rest", ip6(ProtoESP, ports), with(base6, func(in *Inner) { in.Proto = ProtoESP })},
		{"v6 hides v4 behind options", ip6(ProtoDestOpts, join(ext(ProtoIPv4), ports)),
			with(base6, func(in *Inner) { in.HeaderLen, in.Length, in.Proto = 48, 56, ProtoIPv4 })},
		{"v6 first fragment", ip6(ProtoFragment, join(AppendIPv6Fragment(nil, ProtoUDP, 0, true, 9), ports)),
			with(base6, func(in *Inner) {
				hasPorts(in)
				in.HeaderLen, in.Length, in.Fragment, in.FirstFragment = 48, 56, true, true
			})},
		{"v6 later fragment", ip6(ProtoFragment, join(AppendIPv6Fragment(nil, ProtoUDP, 1448, true, 9), ports)),
			with(base6, func(in *Inner) { in.HeaderLen, in.Length, in.Fragment = 48, 56, true })},
		{"v6 later fragment of options", ip6(ProtoFragment, join(AppendIPv6Fragment(nil, ProtoDestOpts, 8, false, 9), ports)),
			with(base6, func(in *Inner) { in.HeaderLen, in.Length, in.Fragment, in.Proto = 48, 56, true, ProtoDestOpts })},
		{"v6 atomic fragment", ip6(ProtoFragment, join(AppendIPv6Fragment(nil, ProtoUDP, 0, false, 9), ports)),
			with(base6, func(in *Inner) { hasPorts(in); in.HeaderLen, in.Length = 48, 56 })},
	} {
		t.Run(tt.name, func(t *testing.T) {
			// What an earlier packet left must not shine through.
			got := Inner{Fragment: true, FirstFragment: true, HasPorts: true, SrcPort: 9, DstPort: 9, DF: true, fragProto: 99}
			if err := ParseInner(tt.b, &got); err != nil {
				t.Fatal(err)
			}
			got.fragProto = 0
			if got != tt.want {
				t.Errorf("got  %+v\nwant %+v", got, tt.want)
			}
			srcBytes, dstBytes := got.SrcBytes(tt.b), got.DstBytes(tt.b)
			if !bytes.Equal(srcBytes, got.Src.AsSlice()) || !bytes.Equal(dstBytes, got.Dst.AsSlice()) {
				t.Errorf("SrcBytes %x DstBytes %x", srcBytes, dstBytes)
			}
			if len(got.Payload(tt.b)) != got.Length-got.HeaderLen {
				t.Error("payload is not what is between header and length")
			}
			if got.LaterFragment() != (got.Fragment && !got.FirstFragment) {
				t.Error("LaterFragment")
			}
			for n := range got.Length { // no prefix of a packet is a packet
				if ParseInner(tt.b[:n], new(Inner)) == nil {
					t.Errorf("%d of %d bytes accepted", n, got.Length)
				}
			}
		})
	}
}

func TestParseInnerRefuses(t *testing.T) {
	set := func(b []byte, off int, v ...byte) []byte { copy(b[off:], v); return b }
	for _, tt := range []struct {
		name string
		b    []byte
		want error
	}{
		{"nothing", nil, ErrTruncated},
		{"one byte", []byte{0x45}, ErrTruncated},
		{"version 0", set(udp4("x"), 0, 0x05), ErrVersion},
		{"version 5", set(udp4("x"), 0, 0x55), ErrVersion},
		{"version 15", set(udp4("x"), 0, 0xf5), ErrVersion},
		{"v4 IHL 4", set(udp4("x"), 0, 0x44), ErrHeaderLen},
		{"v4 IHL beyond total", set(ip4(ProtoUDP, 0, nil), 0, 0x46), ErrTotalLen},
		{"v4 total below IHL", set(udp4("x"), 2, 0, 19), ErrTotalLen},
		{"v4 total 0", set(udp4("x"), 2, 0, 0), ErrTotalLen},
		{"v4 total beyond buffer", set(udp4("x"), 2, 0, 30), ErrTruncated},
		{"v4 fragment beyond 65535", ip4(ProtoUDP, 0x1fff, make([]byte, 16)), ErrFragment},
		{"v6 short", udp6("x")[:39], ErrTruncated},
		{"v6 payload beyond buffer", set(udp6("x"), 4, 0xff, 0xff), ErrTruncated},
		{"v6 extension beyond packet", ip6(ProtoDestOpts, []byte{ProtoUDP, 1, 0, 0, 0, 0, 0, 0}), ErrExtensions},
		{"v6 extension of four bytes", ip6(ProtoDestOpts, []byte{ProtoUDP, 0, 0, 0}), ErrExtensions},
		{"v6 extension missing", ip6(ProtoHopByHop, nil), ErrExtensions},
		{"v6 fragment header cut", ip6(ProtoFragment, AppendIPv6Fragment(nil, ProtoUDP, 0, true, 1)[:7]), ErrExtensions},
		{"v6 first fragment without its chain", ip6(ProtoFragment, AppendIPv6Fragment(nil, ProtoDestOpts, 0, true, 1)), ErrExtensions},
		{"v6 fragment beyond 65535", ip6(ProtoFragment, append(AppendIPv6Fragment(nil, ProtoUDP, 65528, false, 1), make([]byte, 16)...)), ErrFragment},
		{"v6 too many extensions", ip6(ProtoDestOpts, bytes.Repeat(ext(ProtoDestOpts), 20)), ErrExtensions},
		{"v6 AH beyond packet", ip6(ProtoAH, []byte{ProtoUDP, 4, 0, 0, 0, 0, 0, 0}), ErrExtensions},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if err := ParseInner(tt.b, new(Inner)); err != tt.want {
				t.Errorf("got %v, want %v", err, tt.want)
			}
		})
	}
}

func TestFlowHash(t *testing.T) {
	hash := func(b []byte) uint32 {
		var in Inner
		if err := ParseInner(b, &in); err != nil {
			t.Fatal(err)
		}
		return FlowHash(b, &in)
	}
	edit := func(b []byte, off int) []byte { b = bytes.Clone(b); b[off] ^= 1; return b }
	frag6 := func(next uint8, off int, more bool, rest ...[]byte) []byte {
		return ip6(ProtoFragment, join(AppendIPv6Fragment(nil, next, off, more, 1), join(rest...)))
	}
	ports := []byte{1, 2, 3, 4, 0, 8, 0, 0}
	for _, tt := range []struct {
		name string
		a, b []byte
		same bool
	}{
		{"same packet", udp4("x"), udp4("x"), true},
		{"payload does not matter", udp4("x"), udp4("y"), true},
		{"TTL does not matter", udp4("x"), edit(udp4("x"), 8), true},
		{"v4 source", udp4("x"), edit(udp4("x"), 15), false},
		{"v4 destination", udp4("x"), edit(udp4("x"), 19), false},
		{"v4 source port", udp4("x"), edit(udp4("x"), 21), false},
		{"v4 destination port", udp4("x"), edit(udp4("x"), 23), false},
		{"v4 protocol", ip4(ProtoUDP, 0, ports), ip4(ProtoTCP, 0, ports), false},
		{"v4 fragments of one packet", ip4(ProtoUDP, IPv4FlagMF, ports), ip4(ProtoUDP, 1, []byte("different")), true},
		{"v4 fragments by protocol", ip4(ProtoUDP, 1, ports), ip4(ProtoTCP, 1, ports), false},
		{"v6 source, low", udp6("x"), edit(udp6("x"), 23), false},
		{"v6 source, high", udp6("x"), edit(udp6("x"), 9), false},
		{"v6 destination, low", udp6("x"), edit(udp6("x"), 39), false},
		{"v6 destination, high", udp6("x"), edit(udp6("x"), 25), false},
		{"v6 source port", udp6("x"), edit(udp6("x"), 41), false},
		{"v6 flow label does not matter", udp6("x"), edit(udp6("x"), 3), true},
		{"v6 extension headers do not matter", ip6(ProtoUDP, ports), ip6(ProtoDestOpts, join(ext(ProtoUDP), ports)), true},
		{"v6 fragments of one packet", frag6(ProtoUDP, 0, true, ports), frag6(ProtoUDP, 8, false, []byte("different")), true},
		{"v6 fragments with options inside", frag6(ProtoDestOpts, 0, true, ext(ProtoUDP), ports), frag6(ProtoDestOpts, 16, false, ports), true},
		{"v6 atomic fragment is whole", frag6(ProtoUDP, 0, false, ports), ip6(ProtoUDP, ports), true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if a, b := hash(tt.a), hash(tt.b); (a == b) != tt.same {
				t.Errorf("%08x and %08x, want same %v", a, b, tt.same)
			}
		})
	}
	t.Run("spreads", func(t *testing.T) {
		// 16,384 flows of one pair of hosts over 1,024 bins by their upper bits.
		var bins [1024]int
		p := udp4("x")
		for port := range 1 << 14 {
			binary.BigEndian.PutUint16(p[20:], uint16(port))
			bins[hash(p)>>22]++
		}
		for i, n := range bins {
			if n > 50 { // mean 16, standard deviation 4
				t.Errorf("bin %d holds %d flows", i, n)
			}
		}
	})
}

func FuzzParseInner(f *testing.F) {
	f.Add(udp4("x"))
	f.Add(udp6("x"))
	f.Add(tcp(false, TCPSyn, []byte{2, 4, 5, 180}, nil))
	f.Add(tcp(true, TCPSyn, []byte{2, 4, 5, 180}, nil))
	f.Add(ip4(ProtoUDP, IPv4FlagMF|3, []byte("12345678")))
	f.Add(ip6(ProtoHopByHop, join(ext(ProtoFragment), AppendIPv6Fragment(nil, ProtoTCP, 0, true, 1), make([]byte, 20))))
	f.Add(ip6(ProtoAH, make([]byte, 40)))
	f.Fuzz(func(t *testing.T, b []byte) {
		b = b[:len(b):len(b)]
		var in Inner
		if ParseInner(b, &in) != nil {
			if MayAnswer(b) {
				t.Fatal("would answer a broken packet")
			}
			return
		}
		if in.HeaderLen < IPv4MinLen || in.HeaderLen > in.Length || in.Length > len(b) {
			t.Fatalf("header %d, length %d of %d", in.HeaderLen, in.Length, len(b))
		}
		var want int
		if in.Version == 4 {
			p, err := ParseIPv4(b)
			if err != nil {
				t.Fatal(err)
			}
			want = p.TotalLen()
			if len(p) != want || p.Src() != in.Src || p.Dst() != in.Dst || p.HeaderLen() != in.HeaderLen {
				t.Fatal("ParseIPv4 sees another packet")
			}
		} else {
			p, err := ParseIPv6(b)
			if err != nil {
				t.Fatal(err)
			}
			want = IPv6Len + p.PayloadLen()
			if len(p) != want || p.Src() != in.Src || p.Dst() != in.Dst {
				t.Fatal("ParseIPv6 sees another packet")
			}
		}
		if in.Length != want {
			t.Fatalf("length %d, header says %d", in.Length, want)
		}
		var cut Inner
		if err := ParseInner(b[:in.Length:in.Length], &cut); err != nil || cut != in {
			t.Fatalf("the cut packet differs: %v %+v %+v", err, cut, in)
		}
		if FlowHash(b, &in) != FlowHash(b[:in.Length], &in) {
			t.Fatal("padding changes the flow")
		}
		MayAnswer(b)
		c := bytes.Clone(b[:in.Length])
		ClampMSS(c, &in, 1400)
		for _, kind := range []ICMPKind{NetUnreachable, HostUnreachable, TooBig} {
			for _, src := range []netip.Addr{src4, src6} {
				e := AppendICMPError(nil, b, src, kind, 1400)
				if len(e) == 0 {
					continue
				}
				var out Inner
				if err := ParseInner(e, &out); err != nil || out.Length != len(e) || len(e) > ICMPErrorMaxLen || MayAnswer(e) {
					t.Fatalf("bad error packet %x: %v", e, err)
				}
			}
		}
	})
}

func BenchmarkParseInner(b *testing.B) {
	for _, bb := range []struct {
		name string
		p    []byte
	}{
		{"udp4", udp4("payload")},
		{"tcp4", tcp(false, TCPAck, nil, make([]byte, 1400))},
		{"udp6", udp6("payload")},
		{"tcp6", tcp(true, TCPAck, nil, make([]byte, 1400))},
		{"frag6", ip6(ProtoFragment, join(AppendIPv6Fragment(nil, ProtoUDP, 1448, true, 9), make([]byte, 64)))},
	} {
		b.Run(bb.name, func(b *testing.B) {
			b.ReportAllocs()
			in := new(Inner)
			for b.Loop() {
				if ParseInner(bb.p, in) != nil {
					b.Fatal("refused")
				}
			}
		})
	}
}

func BenchmarkFlowHash(b *testing.B) {
	for _, p := range [][]byte{udp4("x"), udp6("x")} {
		var in Inner
		if err := ParseInner(p, &in); err != nil {
			b.Fatal(err)
		}
		b.Run(map[uint8]string{4: "v4", 6: "v6"}[in.Version], func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				FlowHash(p, &in)
			}
		})
	}
}

func TestNoAllocations(t *testing.T) {
	var in Inner
	buf := make([]byte, 0, ICMPErrorMaxLen)
	syn := tcp(false, TCPSyn, []byte{2, 4, 5, 180}, nil)
	for _, p := range [][]byte{udp4("x"), udp6("x"), syn, tcp(true, TCPAck, nil, nil), {0}, nil,
		ip6(ProtoHopByHop, join(ext(ProtoUDP), make([]byte, 8)))} {
		if n := testing.AllocsPerRun(100, func() {
			if ParseInner(p, &in) == nil {
				FlowHash(p, &in)
				ClampMSS(p, &in, 1400)
			}
			if MayAnswer(p) {
				AppendICMPError(buf, p, src4, TooBig, 1400)
				AppendICMPError(buf, p, src6, TooBig, 1400)
			}
		}); n != 0 {
			t.Errorf("%v allocations for %x", n, p)
		}
	}
}
