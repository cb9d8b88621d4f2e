package tunnel

import (
	"testing"

	"github.com/tulle-net/tulle/tunnel/capture"
	"github.com/tulle-net/tulle/tunnel/encap"
)

// What the kernel refuses of a detour is captured as what it is, whatever the peer's encapsulation is: an inner packet of 20 bytes has
// no headers of vxlan to cut off.
func TestRefusedOnDetour(t *testing.T) {
	l := testLink{mode: encap.VXLAN}
	a, b := startPair(t, l)
	host, detoured := a.tap(t, "tun0"), b.pod(0).Next()
	p := b.asPeer(l)
	p.MTU += 100
	p.Detours = []Detour{{Addr: detoured, Mode: encap.IPIP, MTU: p.MTU}}
	a.update(p)
	must(t, a.dev.SetMTU(int(p.MTU)))
	seen, err := a.engine.Tap().Listen(capture.Filter{Drops: true, Reasons: []string{encap.DropSendError.String()}, Pod: detoured}, capture.Limits{})
	must(t, err)
	defer seen.Close()
	size := int(p.MTU)
	host.emit(datagram{src: a.pod(0), dst: detoured, sport: 1, dport: 9, payload: random(size - 28)}.bytes(t))
	e, err := seen.Next(t.Context(), patience)
	if err != nil || e.Path != encap.IPIP.String() || e.Length != size+int(encap.Overhead(encap.IPIP, false)) {
		t.Errorf("captured %s by %q, %d bytes, %v", e.Point, e.Path, e.Length, err)
	}
}
