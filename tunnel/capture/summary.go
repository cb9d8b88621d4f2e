package capture

import (
	"fmt"
	"net"
	"strconv"
	"strings"

	"github.com/google/gopacket"
	"github.com/google/gopacket/layers"
)

// Summary describes an IP packet in one line: addresses, protocol with ports or type, and length in bytes. For an outer
// packet it names what it carries as well. Bytes that are no IP packet are said to be so.
func Summary(pkt []byte, length int) string {
	first := layers.LayerTypeIPv4
	if len(pkt) > 0 && pkt[0]>>4 == 6 {
		first = layers.LayerTypeIPv6
	}
	p := gopacket.NewPacket(pkt, first, gopacket.DecodeOptions{Lazy: false, NoCopy: true})
	ip := p.NetworkLayer()
	if ip == nil || len(ip.NetworkFlow().Src().Raw()) == 0 {
		return fmt.Sprintf("no IP packet, %d bytes", length)
	}
	flow := ip.NetworkFlow()
	src, dst := flow.Src().String(), flow.Dst().String()
	switch t := p.TransportLayer().(type) {
	case *layers.TCP:
		src, dst = endpoint(src, int(t.SrcPort)), endpoint(dst, int(t.DstPort))
	case *layers.UDP:
		src, dst = endpoint(src, int(t.SrcPort)), endpoint(dst, int(t.DstPort))
	}
	return fmt.Sprintf("%s > %s %s, %d bytes", src, dst, protocol(p), length)
}

func endpoint(addr string, port int) string { return net.JoinHostPort(addr, strconv.Itoa(port)) }

// protocol names what an IP packet carries.
func protocol(p gopacket.Packet) string {
	for _, l := range p.Layers()[1:] {
		switch l := l.(type) {
		case *layers.TCP:
			return fmt.Sprintf("TCP %s seq %d", tcpFlags(l), l.Seq)
		case *layers.UDP:
			return "UDP"
		case *layers.ICMPv4:
			return fmt.Sprintf("ICMP %s id %d seq %d", lower(l.TypeCode.String()), l.Id, l.Seq)
		case *layers.ICMPv6:
			return "ICMPv6 " + lower(l.TypeCode.String())
		case *layers.IPv4, *layers.IPv6:
			inner := l.(gopacket.NetworkLayer).NetworkFlow()
			return fmt.Sprintf("IP in IP (%s > %s)", inner.Src(), inner.Dst())
		case *layers.IPv6Fragment:
			return fmt.Sprintf("fragment id %#x offset %d", l.Identification, int(l.FragmentOffset)*8)
		case *gopacket.Fragment:
			return "later fragment"
		}
	}
	switch l := p.NetworkLayer().(type) {
	case *layers.IPv4:
		return "protocol " + l.Protocol.String()
	case *layers.IPv6:
		return "protocol " + l.NextHeader.String()
	}
	return "unknown"
}

// lower turns gopacket's names (EchoRequest) into words.
func lower(s string) string {
	var b strings.Builder
	prev := ' '
	for _, r := range s {
		if r >= 'A' && r <= 'Z' && prev >= 'a' && prev <= 'z' {
			b.WriteByte(' ')
		}
		b.WriteRune(r)
		prev = r
	}
	return strings.ToLower(b.String())
}

func tcpFlags(t *layers.TCP) string {
	var out []string
	for _, f := range []struct {
		set  bool
		name string
	}{{t.SYN, "SYN"}, {t.FIN, "FIN"}, {t.RST, "RST"}, {t.PSH, "PSH"}, {t.ACK, "ACK"}, {t.URG, "URG"}} {
		if f.set {
			out = append(out, f.name)
		}
	}
	if len(out) == 0 {
		return "no flags"
	}
	return strings.Join(out, "+")
}
