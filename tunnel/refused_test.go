package tunnel

import (
	"net/netip"
	"testing"

	"github.com/tulle-net/tulle/tunnel/encap"
	"github.com/tulle-net/tulle/tunnel/underlay"
)

// The kernel refuses a train (of more packets than it takes, as that is a refusal on every host). What the engine has learned of that outlives updates of the
// tables, which come with each pod's and each peer's change, until the peer has another address.
func TestRefusedTrainsOutliveUpdates(t *testing.T) {
	for _, m := range []encap.Mode{encap.UDP, encap.VXLAN} {
		t.Run(m.String(), func(t *testing.T) {
			l := testLink{mode: m}
			a, b := startPair(t, l)
			dest := func() *underlay.Dest {
				p := a.engine.fwd.Load().peers[b.ns]
				if m == encap.VXLAN {
					return p.vxlan
				}
				return p.udp
			}
			refuse(t, a, dest())
			if dest().GSO() {
				t.Fatal("the kernel refuses no train, so that nothing is tested")
			}
			peer := a.peers[0]
			peer.MTU -= 8
			a.update(peer)
			if dest().GSO() {
				t.Error("forgotten with another MTU")
			}
			peer.Singles = true
			a.update(peer)
			peer.Singles = false
			a.update(peer)
			if dest().GSO() {
				t.Error("forgotten after trains were off for another reason")
			}
			peer.Endpoint = underlayOf(false, 9)
			peer.Accept = []netip.Addr{peer.Endpoint}
			a.update(peer)
			if !dest().GSO() || dest().Addr().Addr() != peer.Endpoint {
				t.Errorf("of %s nothing is known", dest().Addr())
			}
		})
	}
}

// refuse sends a train that the kernel refuses.
func refuse(t *testing.T, from *testNode, to *underlay.Dest) {
	t.Helper()
	const packets, size = 300, 40
	var s *underlay.Socket
	must(t, from.in(func() (err error) {
		s, err = underlay.OpenSender(underlay.Options{Bind: netip.AddrPortFrom(from.under, 0)})
		return err
	}))
	defer s.Close()
	batch := underlay.NewSendBatch(1, 1)
	batch.Begin(to, 0)
	batch.Append(make([]byte, packets*size))
	batch.End(size)
	r, err := s.Send(batch)
	must(t, err)
	if r.GSOFallbacks != 1 {
		t.Fatalf("%+v, want a fallback", r)
	}
}
