package membership

import (
	"net/netip"
	"testing"

	"github.com/tulle-net/tulle/internal/testing/damage"
)

// Each decoder of what members tell each other sees every one-byte change and every cut of a good
// message: it may refuse what it sees, or take it, and must not panic.
func TestDecodersDamaged(t *testing.T) {
	meta := sampleMeta()
	meta.Underlay = append(meta.Underlay, netip.MustParseAddr("2001:db8::1"))
	metaWire, err := meta.Encode(nil)
	if err != nil {
		t.Fatal(err)
	}
	entries := []Entry{
		{Prefix: netip.MustParsePrefix("10.32.0.0/24"), Owner: NodeID{1}, Version: 300},
		{Prefix: netip.MustParsePrefix("fd00::/48"), Owner: NodeID{2}, Version: 1,
			External: &External{Endpoint: netip.MustParseAddr("192.0.2.1"), Encap: "udp", Port: 5555, MAC: [6]byte{2, 5: 1}}},
	}
	for name, c := range map[string]struct {
		good   []byte
		decode func([]byte) error
	}{
		"metadata": {metaWire, func(b []byte) error { _, err := DecodeMeta(b); return err }},
		"entries":  {AppendEntries(nil, entries), func(b []byte) error { _, _, err := DecodeEntries(b); return err }},
	} {
		t.Run(name, func(t *testing.T) {
			damage.Check(t, c.good, c.decode)
		})
	}
}
