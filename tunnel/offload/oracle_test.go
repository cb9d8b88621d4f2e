package offload

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"slices"

	"pgregory.net/rapid"
)

// flow describes one run of a flow in the words of a person. From it the tests build, one field
// after the other and without any code of this package, the super-packet and the packets that it
// stands for.
type flow struct {
	v6, tcp      bool
	ext          []byte // IPv6 extension headers, chained by chain
	ipOptions    []byte // IPv4, a multiple of 4 bytes
	src, dst     []byte
	sport, dport uint16
	tos, ttl     uint8
	label        uint32 // IPv6 flow label
	id           uint16
	df           bool
	seq, ack     uint32
	flags        uint8
	window, urg  uint16
	options      []byte // TCP, a multiple of 4 bytes
	payload      []byte
	mss          int
}

func (f *flow) proto() uint8 {
	if f.tcp {
		return protoTCP
	}
	return protoUDP
}

func (f *flow) l4() int {
	if f.v6 {
		return 40 + len(f.ext)
	}
	return 20 + len(f.ipOptions)
}

// l4Headers returns the length of the TCP or UDP header.
func (f *flow) l4Headers() int {
	if f.tcp {
		return 20 + len(f.options)
	}
	return 8
}

// slowFold is RFC 1071 on big-endian words.
func slowFold(b []byte) uint16 {
	var s uint64
	for i, c := range b {
		if i%2 == 0 {
			s += uint64(c) << 8
		} else {
			s += uint64(c)
		}
	}
	for s > 0xffff {
		s = s&0xffff + s>>16
	}
	return uint16(s)
}

func (f *flow) pseudo(length int) []byte {
	b := slices.Concat(f.src, f.dst)
	b = binary.BigEndian.AppendUint32(b, uint32(length))
	return append(b, 0, 0, 0, f.proto())
}

// packet builds one packet. With partial, its transport checksum is the
// pseudo-header's sum alone.
func (f *flow) packet(id uint16, seq uint32, flags uint8, payload []byte, partial bool) []byte {
	var l4 []byte
	l4 = binary.BigEndian.AppendUint16(l4, f.sport)
	l4 = binary.BigEndian.AppendUint16(l4, f.dport)
	field := 6
	if f.tcp {
		field = 16
		l4 = binary.BigEndian.AppendUint32(l4, seq)
		l4 = binary.BigEndian.AppendUint32(l4, f.ack)
		l4 = append(l4, uint8(f.l4Headers()/4)<<4, flags)
		l4 = binary.BigEndian.AppendUint16(l4, f.window)
		l4 = append(l4, 0, 0)
		l4 = binary.BigEndian.AppendUint16(l4, f.urg)
		l4 = append(l4, f.options...)
	} else {
		l4 = binary.BigEndian.AppendUint16(l4, uint16(8+len(payload)))
		l4 = append(l4, 0, 0)
	}
	l4 = append(l4, payload...)
	pseudo := f.pseudo(len(l4))
	c := slowFold(pseudo)
	if !partial {
		c = ^slowFold(append(pseudo, l4...))
		if c == 0 && !f.tcp {
			c = 0xffff
		}
	}
	binary.BigEndian.PutUint16(l4[field:], c)

	var ip []byte
	if f.v6 {
		ip = binary.BigEndian.AppendUint32(ip, 6<<28|uint32(f.tos)<<20|f.label)
		ip = binary.BigEndian.AppendUint16(ip, uint16(len(f.ext)+len(l4)))
		next := f.proto()
		if len(f.ext) > 0 {
			next = 60 // chain makes destination options only
		}
		ip = append(ip, next, f.ttl)
		ip = slices.Concat(ip, f.src, f.dst, f.ext)
	} else {
		ip = append(ip, 0x45+uint8(len(f.ipOptions)/4), f.tos)
		ip = binary.BigEndian.AppendUint16(ip, uint16(20+len(f.ipOptions)+len(l4)))
		ip = binary.BigEndian.AppendUint16(ip, id)
		frag := uint16(0)
		if f.df {
			frag = 0x4000
		}
		ip = binary.BigEndian.AppendUint16(ip, frag)
		ip = append(ip, f.ttl, f.proto(), 0, 0)
		ip = slices.Concat(ip, f.src, f.dst, f.ipOptions)
		binary.BigEndian.PutUint16(ip[10:], ^slowFold(ip))
	}
	return append(ip, l4...)
}

// super returns the super-packet as a TUN device hands it out.
func (f *flow) super() ([]byte, VnetHdr) {
	pkt := f.packet(f.id, f.seq, f.flags, f.payload, true)
	h := VnetHdr{
		Flags:      NeedsCsum,
		GSOType:    GSOUDPL4,
		HdrLen:     uint16(f.l4() + f.l4Headers()),
		GSOSize:    uint16(f.mss),
		CsumStart:  uint16(f.l4()),
		CsumOffset: 6,
	}
	if f.tcp {
		h.CsumOffset = 16
		h.GSOType = GSOTCPv4
		if f.v6 {
			h.GSOType = GSOTCPv6
		}
		if f.flags&tcpCWR != 0 {
			h.GSOType |= GSOECN
		}
	}
	return pkt, h
}

// segments returns the packets that the super-packet stands for.
func (f *flow) segments() [][]byte {
	var out [][]byte
	for at := 0; at == 0 || at < len(f.payload); at += f.mss {
		end := min(at+f.mss, len(f.payload))
		flags := f.flags
		if at > 0 {
			flags &^= tcpCWR
		}
		if end < len(f.payload) {
			flags &^= tcpFIN | tcpPSH
		}
		out = append(out, f.packet(f.id+uint16(len(out)), f.seq+uint32(at), flags, f.payload[at:end], false))
	}
	return out
}

// chain returns n destination options headers of 8 bytes or more, full of padding,
// the last of which says that proto follows.
func chain(proto uint8, sizes ...int) []byte {
	var b []byte
	for i, size := range sizes {
		next := uint8(60)
		if i == len(sizes)-1 {
			next = proto
		}
		pad := size - 2 // PadN: RFC 8200 §4.2
		h := append([]byte{next, uint8(size/8 - 1), 1, uint8(pad - 2)}, make([]byte, pad-2)...)
		b = append(b, h...)
	}
	return b
}

// timestamps and sack are the TCP options that travel with data (RFC 7323 §3, RFC 2018 §3).
var (
	timestamps = []byte{1, 1, 8, 10, 1, 2, 3, 4, 5, 6, 7, 8}
	sack       = []byte{1, 1, 5, 10, 0, 0, 1, 0, 0, 0, 2, 0}
)

// drawFlow draws a flow whose super-packet has at most 64 KiB. A plain one has neither IP
// options nor extension headers, and may be joined again.
func drawFlow(t *rapid.T, plain bool) *flow {
	f := &flow{
		v6:     rapid.Bool().Draw(t, "v6"),
		tcp:    rapid.Bool().Draw(t, "tcp"),
		sport:  rapid.Uint16().Draw(t, "sport"),
		dport:  rapid.Uint16().Draw(t, "dport"),
		tos:    rapid.Byte().Draw(t, "tos"),
		ttl:    rapid.Byte().Draw(t, "ttl"),
		id:     rapid.Uint16().Draw(t, "id"),
		df:     rapid.Bool().Draw(t, "df"),
		seq:    rapid.Uint32().Draw(t, "seq"),
		ack:    rapid.Uint32().Draw(t, "ack"),
		flags:  0x10 | rapid.Byte().Draw(t, "flags")&(tcpFIN|tcpPSH|tcpCWR|0x40),
		window: rapid.Uint16().Draw(t, "window"),
		urg:    rapid.Uint16().Draw(t, "urg"),
	}
	n := 4
	if f.v6 {
		n = 16
		f.label = rapid.Uint32Max(1<<20-1).Draw(t, "label")
	}
	f.src = rapid.SliceOfN(rapid.Byte(), n, n).Draw(t, "src")
	f.dst = rapid.SliceOfN(rapid.Byte(), n, n).Draw(t, "dst")
	if f.tcp {
		f.options = rapid.SampledFrom([][]byte{nil, timestamps, sack, slices.Concat(timestamps, sack)}).Draw(t, "options")
	}
	if !plain && f.v6 {
		f.ext = rapid.SampledFrom([][]byte{nil, chain(f.proto(), 8), chain(f.proto(), 16, 8)}).Draw(t, "ext")
	}
	if !plain && !f.v6 {
		f.ipOptions = rapid.SampledFrom([][]byte{nil, {1, 1, 1, 0}, {148, 4, 0, 0, 1, 1, 1, 0}}).Draw(t, "ip options")
	}
	f.mss = rapid.OneOf(rapid.IntRange(1, 64), rapid.IntRange(500, 1460), rapid.IntRange(1, 9000)).Draw(t, "mss")
	count := rapid.IntRange(0, 50).Draw(t, "full segments")
	size := count*f.mss + rapid.IntRange(0, f.mss).Draw(t, "rest")
	size = min(size, maxTotal-f.l4()-f.l4Headers())
	f.payload = fill(size, rapid.Uint64().Draw(t, "payload"))
	return f
}

// fill returns n bytes made from seed; seeds 0 and 1 give all zeros and all ones.
func fill(n int, seed uint64) []byte {
	b := make([]byte, n)
	for i := range b {
		switch seed {
		case 0:
		case 1:
			b[i] = 0xff
		default:
			seed ^= seed << 13
			seed ^= seed >> 7
			seed ^= seed << 17
			b[i] = byte(seed)
		}
	}
	return b
}

// flat returns segments as packets.
func flat(segs []Segment) [][]byte {
	var out [][]byte
	for _, s := range segs {
		out = append(out, slices.Concat(s.Header, s.Payload))
	}
	return out
}

// differ says where two lists of packets differ, or "".
func differ(got, want [][]byte) string {
	for i := range min(len(got), len(want)) {
		if bytes.Equal(got[i], want[i]) {
			continue
		}
		for at := range min(len(got[i]), len(want[i])) {
			if got[i][at] != want[i][at] {
				return fmt.Sprintf("packet %d of %d differs at byte %d\n got %x\nwant %x", i, len(want), at,
					got[i][:min(len(got[i]), 120)], want[i][:min(len(want[i]), 120)])
			}
		}
		return fmt.Sprintf("packet %d has %d bytes, want %d", i, len(got[i]), len(want[i]))
	}
	if len(got) != len(want) {
		return fmt.Sprintf("%d packets, want %d", len(got), len(want))
	}
	return ""
}
