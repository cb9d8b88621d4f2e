package direct

import (
	"net/netip"
	"testing"

	"github.com/tulle-net/tulle/tunnel/device"
	"github.com/tulle-net/tulle/tunnel/encap"
)

var (
	tun   = [2]netip.Addr{netip.MustParseAddr("10.244.1.0"), netip.MustParseAddr("fd00:244:0:1::")}
	probe = [2]netip.Addr{netip.MustParseAddr("10.244.1.255"), netip.MustParseAddr("fd00:244:0:1:ffff:ffff:ffff:ffff")}
	far   = [2]netip.Addr{netip.MustParseAddr("10.244.2.0"), netip.MustParseAddr("fd00:244:0:2::")}
)

// receiver is a Prober without a device, which notes what arrives.
func receiver() (p *Prober, got *[]string) {
	got = new([]string)
	p = &Prober{cfg: Config{Probed: func(peer string, m encap.Mode, payload []byte, size int) {
		*got = append(*got, peer+" "+string(payload[:min(len(payload), 5)]))
	}}}
	p.Update(Peer{Tun: tun, Probe: probe}, map[string]Peer{"b": {Tun: far}})
	return p, got
}

// framed is a packet as the device delivers it.
func framed(pkt []byte) []byte { return append(make([]byte, device.VnetHdrLen), pkt...) }

func TestPacket(t *testing.T) {
	for f := range tun {
		good := encap.AppendProbe(nil, far[f], probe[f], []byte("hello"), 100)
		otherPort := append([]byte(nil), good...)
		otherPort[len(good)-100+map[int]int{0: 22, 1: 42}[f]] ^= 1
		gso := framed(good)
		gso[1] = 1
		for _, tc := range []struct {
			name string
			b    []byte
			want int
		}{
			{"a peer's probe", framed(good), 1},
			{"from a stranger", framed(encap.AppendProbe(nil, probe[f].Prev(), probe[f], []byte("hello"), 100)), 0},
			{"from a pod of the peer", framed(encap.AppendProbe(nil, far[f].Next(), probe[f], []byte("hello"), 100)), 0},
			{"to another address", framed(encap.AppendProbe(nil, far[f], tun[f], []byte("hello"), 100)), 0},
			{"to another port", framed(otherPort), 0},
			{"without payload", framed(encap.AppendProbe(nil, far[f], probe[f], nil, 0)), 0},
			{"cut short", framed(good[:len(good)-1]), 0},
			{"a super-packet", gso, 0},
			{"nothing", nil, 0},
		} {
			p, got := receiver()
			p.packet(tc.b)
			if len(*got) != tc.want {
				t.Errorf("%s, family %d: %v, want %d", tc.name, f, *got, tc.want)
			}
			if _, received := p.Stats(); int(received) != tc.want {
				t.Errorf("%s, family %d: %d counted", tc.name, f, received)
			}
		}
	}
}

func FuzzPacket(f *testing.F) {
	for i := range tun {
		f.Add(framed(encap.AppendProbe(nil, far[i], probe[i], []byte("hello"), 64)))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		p, _ := receiver()
		p.packet(b)
	})
}
