package encap

import "github.com/tulle-net/tulle/tunnel/header"

// ecnDrop marks the cell of decapECN in which the packet is dropped.
const ecnDrop = 0xff

// decapECN is RFC 6040 figure 4: the delivered codepoint by inner and outer. Not-ECT
// in CE means that a router marked what it should have dropped.
var decapECN = [4][4]uint8{
	header.ECNNotECT: {header.ECNNotECT: header.ECNNotECT, header.ECNECT0: header.ECNNotECT, header.ECNECT1: header.ECNNotECT, header.ECNCE: ecnDrop},
	header.ECNECT0:   {header.ECNNotECT: header.ECNECT0, header.ECNECT0: header.ECNECT0, header.ECNECT1: header.ECNECT1, header.ECNCE: header.ECNCE},
	header.ECNECT1:   {header.ECNNotECT: header.ECNECT1, header.ECNECT0: header.ECNECT1, header.ECNECT1: header.ECNECT1, header.ECNCE: header.ECNCE},
	header.ECNCE:     {header.ECNNotECT: header.ECNCE, header.ECNECT0: header.ECNCE, header.ECNECT1: header.ECNCE, header.ECNCE: header.ECNCE},
}

// DecapECN gives the TOS byte of the delivered packet from the inner and outer TOS
// bytes: the inner DSCP stays (uniform DSCP belongs to the sender), the ECN field is
// combined by RFC 6040 §4.2. [DropECN] for inner Not-ECT with outer CE.
func DecapECN(inner, outer byte) (byte, Drop) {
	ecn := decapECN[inner&header.ECNMask][outer&header.ECNMask]
	if ecn == ecnDrop {
		return inner, DropECN
	}
	return inner&^header.ECNMask | ecn, DropNone
}

// ApplyECN does [DecapECN] on pkt in place and mends the IPv4 header checksum. in has
// to be parsed from pkt; its TOS follows. pkt is untouched when it is to be dropped.
func ApplyECN(pkt []byte, in *header.Inner, outerTOS byte) Drop {
	tos, d := DecapECN(in.TOS, outerTOS)
	if d != DropNone || tos == in.TOS {
		return d
	}
	in.TOS = tos
	if in.Version == 4 {
		header.IPv4(pkt).SetTOS(tos)
	} else {
		header.IPv6(pkt).SetTrafficClass(tos)
	}
	return DropNone
}

// OuterTOS is the outer TOS byte or traffic class for an inner one: its ECN field
// (RFC 6040 §4.1, normal mode) and, with copyDSCP, its DSCP (RFC 2983 §3); else DSCP 0.
func OuterTOS(innerTOS byte, copyDSCP bool) byte {
	if copyDSCP {
		return innerTOS
	}
	return innerTOS & header.ECNMask
}
