package tunnel

import (
	"net"
	"net/netip"
	"testing"

	"github.com/google/gopacket"
	"github.com/google/gopacket/layers"

	"github.com/tulle-net/tulle/tunnel/encap"
	"github.com/tulle-net/tulle/tunnel/header"
)

// datagram is an IP packet that tests make with gopacket, which shares no code with the engine: UDP unless proto says
// otherwise. edit, if any, has the last word over the serialised bytes.
type datagram struct {
	src, dst     netip.Addr
	sport, dport uint16
	ttl          uint8 // 0 means 64; see edit for a real 0
	tos          uint8
	frag         uint16            // IPv4 fragment offset, in units of 8 bytes
	proto        layers.IPProtocol // if not 0, payload is its header and data
	payload      []byte
	edit         func(b []byte)
}

func (d datagram) bytes(t testing.TB) []byte {
	t.Helper()
	if d.ttl == 0 {
		d.ttl = 64
	}
	proto := d.proto
	if proto == 0 {
		proto = layers.IPProtocolUDP
	}
	var ip gopacket.SerializableLayer
	var network gopacket.NetworkLayer
	if d.src.Is4() {
		v4 := &layers.IPv4{
			Version: 4, TTL: d.ttl, TOS: d.tos, Id: 0x4242, Flags: layers.IPv4DontFragment, FragOffset: d.frag,
			Protocol: proto, SrcIP: d.src.AsSlice(), DstIP: d.dst.AsSlice(),
		}
		ip, network = v4, v4
	} else {
		v6 := &layers.IPv6{
			Version: 6, HopLimit: d.ttl, TrafficClass: d.tos, NextHeader: proto, SrcIP: net.IP(d.src.AsSlice()), DstIP: d.dst.AsSlice(),
		}
		ip, network = v6, v6
	}
	parts := []gopacket.SerializableLayer{ip}
	if d.proto == 0 {
		udp := &layers.UDP{SrcPort: layers.UDPPort(d.sport), DstPort: layers.UDPPort(d.dport)}
		must(t, udp.SetNetworkLayerForChecksum(network))
		parts = append(parts, udp)
	}
	buf := gopacket.NewSerializeBuffer()
	must(t, gopacket.SerializeLayers(buf, gopacket.SerializeOptions{FixLengths: true, ComputeChecksums: true}, append(parts, gopacket.Payload(d.payload))...))
	b := buf.Bytes()
	if d.edit != nil {
		d.edit(b)
	}
	return b
}

// outerPacket puts payload into an outer packet of the encapsulation; for vxlan, into a frame from the MAC of node 0 to that
// of node 1, as the intruder sends them.
func outerPacket(t testing.TB, m encap.Mode, src, dst netip.Addr, tos byte, proto layers.IPProtocol, payload []byte) []byte {
	t.Helper()
	d := datagram{src: src, dst: dst, sport: 50123, dport: 6080, tos: tos, payload: payload}
	switch m {
	case encap.IPIP:
		d.proto = proto
	case encap.VXLAN:
		d.dport, d.payload = testVXLANPort, framed(macOf(1), macOf(0), etherTypeOf(proto), payload)
	}
	return d.bytes(t)
}

// framed puts payload into a VXLAN frame.
func framed(to, from header.MAC, etherType uint16, payload []byte) []byte {
	return append(header.AppendVXLAN(nil, testVNI, to, from, etherType), payload...)
}

// etherTypeOf is the EtherType of what IP calls protocol 4 or 41.
func etherTypeOf(proto layers.IPProtocol) uint16 {
	return encap.EtherType(proto == layers.IPProtocolIPv6)
}

// protoOf is the protocol number of an inner family.
func protoOf(family int) layers.IPProtocol {
	return []layers.IPProtocol{layers.IPProtocolIPv4, layers.IPProtocolIPv6}[family]
}

// udpOf parses an IP packet that holds UDP.
func udpOf(pkt []byte) (*layers.UDP, bool) {
	first := layers.LayerTypeIPv4
	if len(pkt) > 0 && pkt[0]>>4 == 6 {
		first = layers.LayerTypeIPv6
	}
	udp, ok := gopacket.NewPacket(pkt, first, gopacket.Default).TransportLayer().(*layers.UDP)
	return udp, ok
}

// carries reports whether pkt is UDP with this payload.
func carries(payload string) func(pkt []byte) bool {
	return func(pkt []byte) bool {
		udp, ok := udpOf(pkt)
		return ok && string(udp.Payload) == payload
	}
}
