// Package header holds views of the headers that Tulle reads and writes, inner
// and outer: IPv4, IPv6, TCP, UDP, ICMP, GUE and VXLAN.
//
// A view is a []byte whose length its Parse function has checked once; after that
// every accessor reads at a named offset without a further check. Writers append
// to a slice. Nothing here does I/O, keeps state, reads a clock or logs, so all
// of it may be called from any number of goroutines on buffers of their own.
//
// Byte order is the network's, big endian. Sizes are bytes. No view copies, and
// no function allocates except by growing the slice that it appends to.
//
// Sources: RFC 791 and 1122 (IPv4), 8200 (IPv6), 9293 (TCP), 768 (UDP), 792, 1191
// and 1812 (ICMP), 4443 (ICMPv6), 7348 (VXLAN), draft-ietf-intarea-gue (GUE),
// 3168 and 6040 (ECN), 1071 and 1624 (checksums).
package header

import "errors"

// IP protocol numbers (IANA "Assigned Internet Protocol Numbers") that Tulle distinguishes.
const (
	ProtoHopByHop = 0   // IPv6 Hop-by-Hop Options, RFC 8200 §4.3
	ProtoICMP     = 1   // ICMP for IPv4, RFC 792
	ProtoIPv4     = 4   // IPv4 encapsulation, RFC 2003
	ProtoTCP      = 6   // RFC 9293
	ProtoUDP      = 17  // RFC 768
	ProtoIPv6     = 41  // IPv6 encapsulation, RFC 2473 and 4213
	ProtoRouting  = 43  // IPv6 Routing, RFC 8200 §4.4
	ProtoFragment = 44  // IPv6 Fragment, RFC 8200 §4.5
	ProtoESP      = 50  // RFC 4303
	ProtoAH       = 51  // RFC 4302
	ProtoICMPv6   = 58  // RFC 4443
	ProtoNoNext   = 59  // IPv6 No Next Header, RFC 8200 §4.7
	ProtoDestOpts = 60  // IPv6 Destination Options, RFC 8200 §4.6
	ProtoSCTP     = 132 // RFC 9260
	ProtoMobility = 135 // RFC 6275
	ProtoUDPLite  = 136 // RFC 3828
	ProtoHIP      = 139 // RFC 7401
	ProtoShim6    = 140 // RFC 5533
)

// ECN codepoints: the low two bits of the TOS byte or traffic class (RFC 3168 §5).
const (
	ECNMask   = 0b11
	ECNNotECT = 0b00
	ECNECT1   = 0b01
	ECNECT0   = 0b10
	ECNCE     = 0b11
)

// Errors of the Parse functions. They return them unwrapped,
// so that a bad packet costs no allocation.
var (
	ErrTruncated  = errors.New("header: truncated")
	ErrVersion    = errors.New("header: bad IP version")
	ErrHeaderLen  = errors.New("header: bad header length")
	ErrTotalLen   = errors.New("header: bad total length")
	ErrFragment   = errors.New("header: fragment reaches beyond 65535 bytes")
	ErrExtensions = errors.New("header: IPv6 extension headers broken or too many")
	ErrGUE        = errors.New("header: unsupported GUE variant, flags or options")
	ErrVXLAN      = errors.New("header: reserved VXLAN bits set or no VNI")
)
