package header

import (
	"testing"

	"github.com/tulle-net/tulle/internal/testing/damage"
)

// TestDamaged runs what reads an inner packet over damaged ones, with what a
// forwarder then does to them.
func TestDamaged(t *testing.T) {
	for name, good := range map[string][]byte{
		"TCP, v4":          tcp(false, TCPSyn, []byte{1, 1, 8, 10, 0, 0, 0, 0, 0, 0, 0, 0, 2, 4, 5, 180}, []byte("x")),
		"TCP, v6":          tcp(true, TCPSyn, []byte{2, 4, 5, 180}, []byte("x")),
		"UDP, v4":          udp4("x"),
		"extensions, v6":   ip6(ProtoHopByHop, join(ext(ProtoRouting), ext(ProtoFragment), AppendIPv6Fragment(nil, ProtoTCP, 0, true, 1), make([]byte, 20))),
		"authenticated":    ip6(ProtoAH, join([]byte{ProtoUDP, 4}, make([]byte, 30))),
		"fragment, v4":     ip4(ProtoUDP, IPv4FlagMF|3, []byte("12345678")),
		"ICMP error, v4":   ip4(ProtoICMP, 0, join([]byte{3, 4, 0, 0, 0, 0, 5, 0}, udp4("x"))),
		"ICMP error, v6":   ip6(ProtoICMPv6, join([]byte{2, 0, 0, 0, 0, 0, 5, 0}, udp6("x"))),
		"destination opts": ip6(ProtoDestOpts, join(ext(ProtoUDP), make([]byte, 8))),
	} {
		t.Run(name, func(t *testing.T) {
			damage.Check(t, good, func(b []byte) error {
				b = append(make([]byte, 0, len(b)), b...) // ClampMSS writes
				MayAnswer(b)
				var in Inner
				if err := ParseInner(b, &in); err != nil {
					return err
				}
				FlowHash(b, &in)
				ClampMSS(b, &in, 1400)
				return nil
			})
		})
	}
}
