package offload

import (
	"bytes"
	"errors"
	"slices"
	"testing"

	"pgregory.net/rapid"
)

func TestSplitIsWhatTheFlowSays(t *testing.T) {
	s := NewSplitter(8 << 10)
	rapid.Check(t, func(t *rapid.T) {
		f := drawFlow(t, false)
		pkt, h := f.super()
		before := slices.Clone(pkt)
		h.HdrLen = rapid.Uint16().Draw(t, "hdr_len") // says nothing
		pkt = append(pkt, rapid.SliceOfN(rapid.Byte(), 0, 3).Draw(t, "trailing")...)
		s.Reset()
		segs, err := s.Split(pkt, h)
		if err != nil {
			t.Fatal(err)
		}
		if d := differ(flat(segs), f.segments()); d != "" {
			t.Fatal(d)
		}
		if !slices.Equal(pkt[:len(before)], before) {
			t.Fatal("the super-packet was changed")
		}
	})
}

// UDP checksums that come out as zero are rare: search a payload that has one.
func TestSplitUDPChecksumZero(t *testing.T) {
	for _, v6 := range []bool{false, true} {
		n := 4
		if v6 {
			n = 16
		}
		f := &flow{v6: v6, src: fill(n, 7), dst: fill(n, 9), ttl: 64, sport: 1, dport: 2, payload: make([]byte, 6), mss: 3}
		found := false
		for i := range 1 << 16 {
			f.payload[0], f.payload[1] = byte(i>>8), byte(i)
			segs := f.segments()
			if at := len(segs[0]) - 3 - 2; segs[0][at] != 0xff || segs[0][at+1] != 0xff {
				continue
			}
			found = true
			got, err := NewSplitter(1024).Split(f.super())
			if err != nil {
				t.Fatal(err)
			}
			if d := differ(flat(got), segs); d != "" {
				t.Fatal(d)
			}
			j := NewJoiner(true, true)
			if !j.Add(segs[0]) || !j.Add(segs[1]) {
				t.Fatal("a checksum of 0xffff does not join")
			}
		}
		if !found {
			t.Fatal("no payload makes a zero checksum")
		}
	}
}

func TestSplitKeepsSegmentsUntilReset(t *testing.T) {
	s := NewSplitter(4 << 10)
	var all []Segment
	var want [][]byte
	for i := 0; ; i++ {
		f := &flow{tcp: true, src: fill(4, 2), dst: fill(4, 3), ttl: 64, seq: uint32(i), flags: 0x18,
			options: timestamps, payload: fill(14000+i, uint64(i+2)), mss: 1388}
		segs, err := s.Split(f.super())
		if errors.Is(err, ErrArenaFull) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, segs...)
		want = append(want, f.segments()...)
	}
	if len(want) < 22 {
		t.Fatalf("4 KiB of arena held %d segments only", len(want))
	}
	if d := differ(flat(all), want); d != "" {
		t.Fatal(d)
	}
}

func TestSplitGrowsForOnePacketWithinBounds(t *testing.T) {
	s := NewSplitter(64)
	f := &flow{tcp: true, src: fill(4, 2), dst: fill(4, 3), ttl: 64, payload: fill(60000, 5), mss: 8}
	segs, err := s.Split(f.super())
	if err != nil {
		t.Fatal(err)
	}
	if d := differ(flat(segs), f.segments()); d != "" {
		t.Fatal(d)
	}
	s.Reset()
	f.mss = 1
	if _, err := s.Split(f.super()); !errors.Is(err, ErrHeader) {
		t.Fatalf("60,000 segments of one byte: %v, want ErrHeader", err)
	}
}

func TestSplitRefuses(t *testing.T) {
	v4 := &flow{tcp: true, src: fill(4, 2), dst: fill(4, 3), ttl: 64, payload: fill(3000, 5), mss: 1000}
	v6 := &flow{v6: true, tcp: true, src: fill(16, 2), dst: fill(16, 3), ttl: 64, payload: fill(3000, 5), mss: 1000}
	udp := &flow{src: fill(4, 2), dst: fill(4, 3), ttl: 64, payload: fill(3000, 5), mss: 1000}
	for _, c := range []struct {
		name string
		f    *flow
		edit func(pkt []byte, h *VnetHdr) []byte
	}{
		{"empty", v4, func(p []byte, h *VnetHdr) []byte { return nil }},
		{"half a header", v4, func(p []byte, h *VnetHdr) []byte { return p[:19] }},
		{"half an IPv6 header", v6, func(p []byte, h *VnetHdr) []byte { return p[:39] }},
		{"half a TCP header", v4, func(p []byte, h *VnetHdr) []byte { return p[:39] }},
		{"cut", v4, func(p []byte, h *VnetHdr) []byte { return p[:len(p)-1] }},
		{"version", v4, func(p []byte, h *VnetHdr) []byte { p[0] = 0x55; return p }},
		{"IHL", v4, func(p []byte, h *VnetHdr) []byte { p[0] = 0x44; return p }},
		{"first fragment", v4, func(p []byte, h *VnetHdr) []byte { p[6] = 0x20; return p }},
		{"later fragment", v4, func(p []byte, h *VnetHdr) []byte { p[7] = 1; return p }},
		{"protocol", v4, func(p []byte, h *VnetHdr) []byte { p[9] = 132; return p }},
		{"next header fragment", v6, func(p []byte, h *VnetHdr) []byte { p[6] = 44; return p }},
		{"extension past the end", v6, func(p []byte, h *VnetHdr) []byte { p[6] = 60; p[41] = 255; return p[:60] }},
		{"data offset short", v4, func(p []byte, h *VnetHdr) []byte { p[32] = 0x40; return p }},
		{"data offset long", v4, func(p []byte, h *VnetHdr) []byte { p[2], p[3] = 0, 41; p[32] = 0xf0; return p[:41] }},
		{"type none", v4, func(p []byte, h *VnetHdr) []byte { h.GSOType = GSONone; return p }},
		{"type of the other version", v4, func(p []byte, h *VnetHdr) []byte { h.GSOType = GSOTCPv6; return p }},
		{"type of the other protocol", udp, func(p []byte, h *VnetHdr) []byte { h.GSOType = GSOTCPv4; return p }},
		{"fragmentation offload", udp, func(p []byte, h *VnetHdr) []byte { h.GSOType = 3; return p }},
		{"size 0", v4, func(p []byte, h *VnetHdr) []byte { h.GSOSize = 0; return p }},
		{"no checksum asked", v4, func(p []byte, h *VnetHdr) []byte { h.Flags = 0; return p }},
		{"checksum start", v4, func(p []byte, h *VnetHdr) []byte { h.CsumStart++; return p }},
		{"checksum offset", v4, func(p []byte, h *VnetHdr) []byte { h.CsumOffset = 65535; return p }},
	} {
		t.Run(c.name, func(t *testing.T) {
			pkt, h := c.f.super()
			pkt = c.edit(pkt, &h)
			if segs, err := NewSplitter(4096).Split(pkt, h); !errors.Is(err, ErrHeader) || segs != nil {
				t.Fatalf("%d segments, error %v, want ErrHeader", len(segs), err)
			}
		})
	}
}

func TestCompleteChecksum(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		f := drawFlow(t, false)
		f.mss = len(f.payload) + 1
		pkt, h := f.super()
		h.GSOType, h.GSOSize = GSONone, 0
		if err := CompleteChecksum(pkt, h); err != nil {
			t.Fatal(err)
		}
		if d := differ([][]byte{pkt}, f.segments()); d != "" {
			t.Fatal(d)
		}
	})
	for _, h := range []VnetHdr{
		{Flags: NeedsCsum, CsumStart: 20, CsumOffset: 16},
		{Flags: NeedsCsum, CsumStart: 65535, CsumOffset: 65535},
		{Flags: NeedsCsum, GSOType: GSOTCPv4, CsumStart: 0, CsumOffset: 6},
	} {
		if err := CompleteChecksum(make([]byte, 37), h); !errors.Is(err, ErrHeader) {
			t.Errorf("%+v: %v, want ErrHeader", h, err)
		}
	}
	if err := CompleteChecksum(nil, VnetHdr{}); err != nil {
		t.Error(err)
	}
}

func TestVnetHdr(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		b := rapid.SliceOfN(rapid.Byte(), VnetHdrLen, VnetHdrLen).Draw(t, "b")
		var h VnetHdr
		if err := h.Decode(b); err != nil {
			t.Fatal(err)
		}
		out := make([]byte, VnetHdrLen)
		if err := h.Encode(out); err != nil || !slices.Equal(out, b) {
			t.Fatalf("%x came back as %x, %v", b, out, err)
		}
	})
	var h VnetHdr
	if h.Decode(make([]byte, 9)) != ErrShort || h.Encode(make([]byte, 9)) != ErrShort {
		t.Error("9 bytes are taken for a header")
	}
}

// SplitBehind puts its prefix in front of each segment, and changes nothing else.
func TestSplitBehind(t *testing.T) {
	s := NewSplitter(8 << 10)
	rapid.Check(t, func(t *rapid.T) {
		f := drawFlow(t, false)
		pkt, h := f.super()
		prefix := rapid.SliceOfN(rapid.Byte(), 0, 22).Draw(t, "prefix")
		s.Reset()
		segs, err := s.SplitBehind(prefix, pkt, h)
		if err != nil {
			t.Fatal(err)
		}
		got := flat(segs)
		for i := range got {
			rest, ok := bytes.CutPrefix(got[i], prefix)
			if !ok {
				t.Fatalf("segment %d begins with % x", i, got[i])
			}
			got[i] = rest
		}
		if d := differ(got, f.segments()); d != "" {
			t.Fatal(d)
		}
	})
}
