package header

// GUE (draft-ietf-intarea-gue-09 §3 and §4, Linux net/ipv4/fou_core.c). The first
// two bits of the UDP payload are the variant:
//
//	variant 1   01 vvvv…            the inner IP packet itself: its version nibble is 4 or 6
//	variant 0   00 C hlen(5)        control bit, length of the optional fields in 32-bit words
//	            proto/ctype (8)     4 or 41
//	            flags (16)          none are supported here
//
// GUELen is the length of a variant 0 header without optional fields, in bytes.
const GUELen = 4

// Offsets and bits of GUE variant 0.
const (
	gueVersionHlen = 0
	gueProto       = 1
	gueFlags       = 2
	gueControl     = 0x20
	gueHlenMask    = 0x1f
)

// GUE is a view of the payload of a UDP datagram on a GUE port.
type GUE []byte

// ParseGUE checks that b begins with what this package can unwrap: variant 1 with
// an IPv4 or IPv6 packet, or variant 0 without control bit, flags and optional
// fields, and with protocol 4 or 41. It returns ErrTruncated or ErrGUE otherwise.
func ParseGUE(b []byte) (GUE, error) {
	if len(b) == 0 {
		return nil, ErrTruncated
	}
	switch b[0] >> 4 {
	case 4, 6:
		return GUE(b), nil
	}
	if b[gueVersionHlen] != 0 { // another variant, the control bit, or hlen ≠ 0
		return nil, ErrGUE
	}
	if len(b) < GUELen {
		return nil, ErrTruncated
	}
	if b[gueFlags] != 0 || b[gueFlags+1] != 0 {
		return nil, ErrGUE
	}
	if p := b[gueProto]; p != ProtoIPv4 && p != ProtoIPv6 {
		return nil, ErrGUE
	}
	return GUE(b), nil
}

// Variant is 0 or 1.
func (g GUE) Variant() int { return int(g[gueVersionHlen] >> 6) }

// Proto is the protocol of the payload: 4 or 41.
func (g GUE) Proto() uint8 {
	switch g[gueVersionHlen] >> 4 {
	case 4:
		return ProtoIPv4
	case 6:
		return ProtoIPv6
	}
	return g[gueProto]
}

// HeaderLen is the length in bytes of the header before the inner packet: 0 for variant 1, 4 for variant 0.
func (g GUE) HeaderLen() int {
	if g.Variant() == 1 {
		return 0
	}
	return GUELen + int(g[gueVersionHlen]&gueHlenMask)*4
}

// Control reports variant 0's control bit.
func (g GUE) Control() bool { return g.Variant() == 0 && g[gueVersionHlen]&gueControl != 0 }

// Payload is the inner packet.
func (g GUE) Payload() []byte { return g[g.HeaderLen():] }

// AppendGUE appends a variant 0 header for an inner packet of protocol 4 or 41.
// Variant 1 has no header to append.
func AppendGUE(dst []byte, proto uint8) []byte { return append(dst, 0, proto, 0, 0) }
