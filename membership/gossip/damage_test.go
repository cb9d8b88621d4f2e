package gossip

import (
	"net/netip"
	"testing"
	"time"

	"github.com/tulle-net/tulle/internal/testing/damage"
	"github.com/tulle-net/tulle/membership"
	"github.com/tulle-net/tulle/membership/keyring"
)

// Each decoder of gossip sees every one-byte change and every cut of a good
// message: it may refuse what it sees, or take it, and must not panic.
func TestDecodersDamaged(t *testing.T) {
	for name, c := range map[string]struct {
		good   []byte
		decode func([]byte) error
	}{
		"envelope": {
			envelope{kind: kindState, from: membership.NodeID{2}, addr: netip.MustParseAddrPort("[2001:db8::1]:7946"), body: []byte("x")}.encode(),
			func(b []byte) error { _, err := decodeEnvelope(b); return err },
		},
		"key request": {keyRequest{op: keyInstall, key: make([]byte, keyring.Size)}.encode(), func(b []byte) error { _, err := decodeKeyRequest(b); return err }},
		"question about a presence": {
			presenceAsk{at: netip.MustParseAddrPort("192.0.2.1:7946"), from: netip.MustParseAddrPort("[2001:db8::1]:7946"), who: "x", run: true}.encode(),
			func(b []byte) error { _, err := decodePresenceAsk(b); return err },
		},
		"answer about a presence": {
			presenceAnswer{verdict: presenceLives, run: &run{age: time.Hour}}.encode(),
			func(b []byte) error { _, err := decodePresenceAnswer(b); return err },
		},
		"digests":    {digests{meta: digest{1}, table: digest{2}}.encode(), func(b []byte) error { decodeDigests(b); return nil }},
		"key answer": {keyAnswer{keys: make([]keyring.Fingerprint, 3)}.encode(), func(b []byte) error { _, err := decodeKeyAnswer(b); return err }},
	} {
		t.Run(name, func(t *testing.T) {
			damage.Check(t, c.good, c.decode)
		})
	}
}
