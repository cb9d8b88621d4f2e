package tunnel

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"os/exec"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tulle-net/tulle/tunnel/encap"
	"github.com/tulle-net/tulle/tunnel/header"
	"github.com/tulle-net/tulle/tunnel/mtu"
	"github.com/tulle-net/tulle/tunnel/underlay"
)

// probed waits for a probe.
func (n *testNode) probed(t testing.TB) probe {
	t.Helper()
	select {
	case p := <-n.probes:
		return p
	case <-time.After(patience):
		t.Fatal("no probe arrived")
		return probe{}
	}
}

// Probes go by every encapsulation, whatever the peer's mode is, in every size that the link takes, and no larger. Pods see
// nothing of them.
func TestProbe(t *testing.T) {
	eachLink(t, func(t *testing.T, l testLink) {
		a, b := startPair(t, l)
		pods := b.tap(t, "tun0")
		for f, family := range [][]netip.Addr{a.tun[:], a.tun[1:]} { // with only IPv6 inside, probes are IPv6
			local := a.local
			local.TunAddrs = family
			a.engine.Update(local, a.peers)
			for _, m := range []encap.Mode{encap.UDP, encap.IPIP, encap.VXLAN} {
				largest := int(mtu.Link(1500).TUN(encap.Overhead(m, l.underlay6)))
				least := []int{28, 48}[f] + 16
				for _, size := range []int{0, least, least + 1, 1280, largest - 1, largest} {
					payload := fmt.Appendf(nil, "nonce %10d", size)
					if err := a.engine.Probe(b.ns, m, false, payload, size); err != nil {
						t.Fatalf("%v, %d bytes: %v", m, size, err)
					}
					got := b.probed(t)
					body := make([]byte, max(size, least)-[]int{28, 48}[f])
					copy(body, payload)
					if got.peer != a.ns || got.mode != m || got.six != (f == 1) || got.size != max(size, least) || !bytes.Equal(got.body, body) {
						t.Errorf("%v, %d bytes: probed by %s, %v, %d bytes, % x", m, size, got.peer, got.mode, got.size, got.body)
					}
				}
				if err := a.engine.Probe(b.ns, m, false, []byte("x"), largest+1); !errors.Is(err, unix.EMSGSIZE) {
					t.Errorf("%v, %d bytes on a link of 1500: %v, want EMSGSIZE", m, largest+1, err)
				}
				if err := a.engine.Probe(b.ns, m, false, []byte("after"), 0); err != nil {
					t.Errorf("%v after EMSGSIZE: %v", m, err)
				}
				b.probed(t)
			}
		}
		a.engine.Update(a.local, a.peers)
		for _, m := range []encap.Mode{encap.UDP, encap.IPIP, encap.VXLAN} { // with both inside, the caller chooses
			for _, six := range []bool{true, false} {
				must(t, a.engine.Probe(b.ns, m, six, []byte("by family"), 0))
				if got := b.probed(t); got.six != six {
					t.Errorf("%v: IPv6 is %v, want %v", m, got.six, six)
				}
			}
		}
		for _, pkt := range pods.drain() {
			if udp, ok := udpOf(pkt); ok && udp.DstPort == ProbePort {
				t.Errorf("a probe reached the host: % x", pkt)
			}
		}
		sent, got := a.engine.Stats(), b.engine.Stats()
		if sent.ProbesSent != got.ProbesReceived || sent.ProbesSent == 0 {
			t.Errorf("%d probes sent, %d received", sent.ProbesSent, got.ProbesReceived)
		}
		var heard [2]uint64
		heard[family(underlayOf(l.underlay6, 1))] = sent.ProbesSent
		eventually(t, "all are counted by their outer family", func() bool { return b.engine.Heard(a.ns) == heard })
		noDrops(t, a, b)
	})
}

// A train of probes arrives packet by packet, also with an odd tail, and also at a peer that gets no other trains.
func TestProbeTrain(t *testing.T) {
	eachLink(t, func(t *testing.T, l testLink) {
		a, b := startPair(t, l)
		singles := b.asPeer(l)
		singles.Singles = true
		a.update(singles)
		for _, m := range []encap.Mode{encap.UDP, encap.VXLAN} {
			for _, apart := range []bool{false, true} {
				var packets []ProbePacket
				for i, size := range []int{300, 300, 300, 300, 211} {
					packets = append(packets, ProbePacket{fmt.Appendf(nil, "car %d", i), size})
				}
				if err := a.engine.ProbeTrain(b.ns, m, packets, apart); err != nil {
					t.Fatalf("%v, apart %v: %v", m, apart, err)
				}
				for _, want := range packets {
					if got := b.probed(t); got.mode != m || got.size != want.Size || !bytes.HasPrefix(got.body, want.Payload) {
						t.Errorf("%v, apart %v: %v, %d bytes, %q; want %d, %q", m, apart, got.mode, got.size, got.body[:8], want.Size, want.Payload)
					}
				}
			}
		}
		noDrops(t, a, b)
	})
}

// Probes by udp over IPv4 have no UDP checksum if the peer's packets have none, as those of the fast path: where such packets are dropped, so are they.
func TestBareProbe(t *testing.T) {
	eachLink(t, func(t *testing.T, l testLink) {
		if l.mode == encap.IPIP {
			return // has no UDP header
		}
		a, b := startPair(t, l)
		wire := b.tap(t, "eth0")
		for _, bare := range []bool{true, false} {
			p := b.asPeer(l)
			p.Bare = bare
			a.update(p)
			for i := range 2 * minSenders {
				text := fmt.Sprintf("%v, probe %d.", bare, i)
				must(t, a.engine.Probe(b.ns, l.mode, false, []byte(text), 0))
				b.probed(t)
				wire.next(text, func(pkt []byte) bool {
					udp, ok := udpOf(pkt)
					if ok = ok && bytes.Contains(pkt, []byte(text)); ok {
						if want := bare && l.mode == encap.UDP && !l.underlay6; (udp.Checksum == 0) != want {
							t.Errorf("bare %v: UDP checksum %#x, want none: %v", bare, udp.Checksum, want)
						}
					}
					return ok
				})
			}
		}
		noDrops(t, a, b)
	})
}

// Probes leave by the source ports of pods' packets, by each in turn, and a train's packets that go one by one by the port of that train: a network
// that drops some ports does so to probes, too.
func TestProbesTakePodsPorts(t *testing.T) {
	eachLink(t, func(t *testing.T, l testLink) {
		if l.mode == encap.IPIP {
			return // has no ports
		}
		a, b := startPair(t, l)
		wire := b.tap(t, "eth0")
		port := func(text string) (from uint16) {
			t.Helper()
			wire.next(text, func(pkt []byte) bool {
				udp, ok := udpOf(pkt)
				if ok = ok && bytes.Contains(pkt, []byte(text)); ok {
					from = uint16(udp.SrcPort)
				}
				return ok
			})
			return from
		}
		pods := map[uint16]bool{}
		for _, w := range a.engine.tx {
			for _, s := range w.out[family(underlayOf(l.underlay6, 0))].udp {
				pods[s.sock.(*underlay.Socket).Local().Port()] = true
			}
		}
		seen := map[uint16]int{}
		for i := range 3 * len(pods) {
			text := fmt.Sprintf("probe %d.", i)
			must(t, a.engine.Probe(b.ns, l.mode, false, []byte(text), 0))
			b.probed(t)
			seen[port(text)]++
			if i+1 == len(pods) && len(seen) != len(pods) {
				t.Errorf("%d of %d ports after as many probes", len(seen), len(pods))
			}
		}
		for p := range seen {
			if !pods[p] {
				t.Errorf("a probe from port %d, pods have %v", p, pods)
			}
		}
		for i := range 5 {
			text := fmt.Sprintf("train %d.", i)
			train := []ProbePacket{{[]byte(text), 100}, {[]byte(text), 100}}
			send := func(apart bool) {
				t.Helper()
				wire.drain()
				must(t, a.engine.ProbeTrain(b.ns, l.mode, train, apart))
				b.probed(t)
				b.probed(t)
			}
			send(false)
			one := port(text)
			send(true)
			if apart := port(text); apart != one || !pods[one] {
				t.Errorf("a train from port %d, its packets one by one from %d, pods have %v", one, apart, pods)
			}
		}
	})
}

// Whichever turns a kind of probe gets, it meets all sockets in time, and none soon again.
func TestTurns(t *testing.T) {
	const n = 16
	for _, every := range []int{1, 2, 4, 8, 16} {
		var w turns
		seen, last := map[int]bool{}, map[int]int{}
		for i := range 200 * n {
			k := w.next(n)
			if was, ok := last[k]; ok && i-was < n/2 {
				t.Fatalf("socket %d after %d turns again", k, i-was)
			}
			last[k] = i
			if i%every == 0 {
				seen[k] = true
			}
		}
		if len(seen) != n {
			t.Errorf("who has each %d. turn meets %d of %d sockets", every, len(seen), n)
		}
	}
}

// A probe is refused where none can be sent.
func TestProbeRefused(t *testing.T) {
	l := testLink{mode: encap.UDP}
	a, b := startPair(t, l)
	nowhere, mute, six, portless, macless := b.asPeer(l), b.asPeer(l), b.asPeer(l), b.asPeer(l), b.asPeer(l)
	nowhere.ID, nowhere.Endpoint, nowhere.Accept = "nowhere", netip.Addr{}, nil
	mute.ID, mute.TunAddrs = "mute", nil
	six.ID, six.Endpoint, six.Accept = "six", underlayOf(true, 1), nil
	portless.ID, portless.VXLANPort = "portless", 0
	macless.ID, macless.VTEPMAC = "macless", header.MAC{}
	four := b.asPeer(l)
	four.ID, four.TunAddrs = "four", b.tun[:1]
	a.update(b.asPeer(l), nowhere, mute, six, portless, macless, four)
	for _, tt := range []struct {
		peer string
		mode encap.Mode
		want error
	}{
		{"nobody", encap.UDP, ErrNoPeer},
		{"mute", encap.UDP, ErrNoAddress},
		{"nowhere", encap.UDP, ErrNoSocket},
		{"six", encap.UDP, ErrNoSocket},
		{"six", encap.IPIP, ErrNoSocket},
		{"six", encap.VXLAN, ErrNoSocket},
		{"portless", encap.VXLAN, ErrNoSocket},
		{"macless", encap.VXLAN, ErrNoMAC},
		{b.ns, encap.Direct, ErrNoSocket},
		{"four", encap.IPIP, ErrNoAddress},
	} {
		if err := a.engine.Probe(tt.peer, tt.mode, tt.peer == "four", []byte("x"), 100); !errors.Is(err, tt.want) {
			t.Errorf("probe of %s by %v: %v, want %v", tt.peer, tt.mode, err, tt.want)
		}
	}
	if n := a.engine.Stats().ProbesSent; n != 0 {
		t.Errorf("%d probes counted", n)
	}
	a.stop()
	if err := a.engine.Probe(b.ns, encap.UDP, false, []byte("x"), 100); !errors.Is(err, ErrNoSocket) {
		t.Errorf("probe after the end: %v, want %v", err, ErrNoSocket)
	}
}

// Nobody but a member can make a probe arrive, and only from its own tun address to ours; what merely looks like a probe
// goes where other packets go.
func TestForgedProbes(t *testing.T) {
	eachLink(t, func(t *testing.T, l testLink) {
		i := newIntruder(t, l)
		a, b := i.member, i.victim
		for f := range 2 {
			b.listenUDP(t, netip.AddrPortFrom(b.tun[f], 6081))
			probe := datagram{src: a.tun[f], dst: b.tun[f], sport: ProbePort, dport: ProbePort, payload: []byte("nonce")}
			emit := func(from netip.Addr, d datagram) {
				i.wire.emit(outerPacket(t, l.mode, from, b.under, 0, protoOf(f), d.bytes(t)))
			}
			change := func(c func(*datagram)) datagram { d := probe; c(&d); return d }
			before := b.counts()
			emit(i.nobody, probe)
			i.marker(f)
			b.moved(t, before, encap.DropNotMember, 1)
			i.silent(i.nobody)
			before = b.counts()
			emit(i.other, probe)
			i.marker(f)
			b.moved(t, before, encap.DropSourceNotSenders, 1)
			// Of that peer no tun address is known yet: its probes are nothing to count.
			before = b.counts()
			emit(i.other, change(func(d *datagram) { d.src = spaceOf(f, 2).Addr() }))
			i.marker(f)
			b.moved(t, before, encap.DropNone, 0)
			select {
			case p := <-b.probes:
				t.Errorf("a probe of a peer without a tun address arrived: %+v", p)
			default:
			}

			emit(a.under, probe)
			if p := b.probed(t); string(p.body) != "nonce" || p.peer != a.ns {
				t.Errorf("a real probe arrived as %+v", p)
			}
			before = b.counts()
			// To a pod's address, or to another port, it is a pod's packet.
			emit(a.under, change(func(d *datagram) { d.dst, d.payload = b.pod(f), []byte("to a pod") }))
			i.pods.next("a packet to a pod", carries("to a pod"))
			emit(a.under, change(func(d *datagram) { d.dport, d.payload = 6081, []byte("other port") }))
			i.pods.next("a packet to another port", carries("other port"))
			i.marker(f)
			b.moved(t, before, encap.DropNone, 0)
			// Of the peer's addresses only its tun address probes: its pods and its other programs do not speak for its agent.
			for k, src := range []netip.Addr{a.pod(f), a.under} {
				if src.Is6() != (f == 1) {
					continue
				}
				before = b.counts()
				emit(a.under, change(func(d *datagram) { d.src, d.payload = src, fmt.Appendf(nil, "as the prober %d", k) }))
				i.marker(f)
				b.moved(t, before, encap.DropSourceNotSenders, 1)
			}
			before = b.counts()
			// A probe without payload is nobody's.
			emit(a.under, change(func(d *datagram) { d.payload = nil }))
			i.marker(f)
			select {
			case p := <-b.probes:
				t.Errorf("a forged probe arrived: %+v", p)
			default:
			}
		}
	})
}

// What routers say about outer packets reaches the pods that sent the inner ones (RFC 2003 §4): no route, host unreachable and a
// loop, also where the router quotes less than the whole packet. What the peer's own host says does not, nor does an error about
// what nobody here can have sent, or about a probe.
func TestUnreachableIsRelayed(t *testing.T) {
	eachLink(t, func(t *testing.T, l testLink) {
		a, b := startPair(t, l)
		features(t, a.ns, "eth0", false, featureChecksum)
		host, out := a.tap(t, "tun0"), b.tap(t, "eth0").toward(a.ns, "eth0")
		router := underlayOf(l.underlay6, 50)
		lastHop := [][2]byte{{header.ICMPv4TimeExceeded}, {header.ICMPv6TimeExceeded}}[outer(l.underlay6)]
		noPort := [][2]byte{{header.ICMPv4DstUnreachable, 3}, {header.ICMPv6DstUnreachable, 4}}[outer(l.underlay6)]
		for f := range 2 {
			codes := [2][2]byte{{header.ICMPv4CodeNet, header.ICMPv4CodeHost}, {header.ICMPv6CodeNoRoute, header.ICMPv6CodeAddrUnreach}}[f]
			for n, tt := range []struct {
				name  string
				size  int
				kind  header.ICMPKind
				typ   [2]byte // type and code of the message instead of that kind's
				about func(*datagram)
				want  int // the code in what is relayed; -1: nothing is
			}{
				{"no route", 20, header.NetUnreachable, [2]byte{}, nil, int(codes[0])},
				{"no host", 1300, header.HostUnreachable, [2]byte{}, nil, int(codes[1])},
				{"a loop", 300, header.NetUnreachable, lastHop, nil, int(codes[1])},
				{"port unreachable", 20, header.HostUnreachable, noPort, nil, -1},
				{"another's packet", 20, header.HostUnreachable, [2]byte{}, func(d *datagram) { d.src = podOf(f, spacesOf(7)) }, -1},
				{"a packet to another", 20, header.HostUnreachable, [2]byte{}, func(d *datagram) { d.dst = a.pod(f) }, -1},
				{"a probe", 20, header.HostUnreachable, [2]byte{}, func(d *datagram) { d.src, d.dst, d.dport = a.tun[f], b.tun[f], ProbePort }, -1},
			} {
				d := datagram{src: a.pod(f), dst: b.pod(f), sport: uint16(1000 + n), dport: 9, payload: random(tt.size)}
				inner := d.bytes(t)
				host.emit(inner)
				pkt := out.next("the outer packet", func(pkt []byte) bool { return bytes.HasSuffix(pkt, inner) })
				if tt.about != nil {
					tt.about(&d)
					pkt = append(pkt[:len(pkt)-len(inner)], d.bytes(t)...)
				}
				said := header.AppendICMPError(nil, pkt, router, tt.kind, 1400)
				if tt.typ != [2]byte{} {
					said = retyped(said, tt.typ[0], tt.typ[1])
				}
				sent := a.engine.Stats()
				out.emit(said)
				host.emit(inner) // the next send finds it; or else a timer does
				// It is counted after it was relayed: what is sent next must not be taken for read because this one is.
				eventually(t, tt.name+" is read", func() bool { return a.engine.Stats().ICMPReceived > sent.ICMPReceived })
				if tt.want < 0 {
					if now := a.engine.Stats(); now.ICMPSent != sent.ICMPSent {
						t.Errorf("inner %s, %s: relayed", familyName(f == 1), tt.name)
					}
					continue
				}
				got := host.next(tt.name, func(pkt []byte) bool { _, ok := parseICMPError(t, pkt); return ok })
				e, _ := parseICMPError(t, got)
				if e.src != a.tun[f] || e.dst != d.src || int(e.code) != tt.want || len(e.quote) < 100 && !bytes.Equal(e.quote, inner) || !bytes.HasPrefix(inner, e.quote) {
					t.Errorf("inner %s, %s: relayed %+v", familyName(f == 1), tt.name, e)
				}
			}
		}
		noDrops(t, a, b)
	})
}

// retyped gives an ICMP error another type and code.
func retyped(pkt []byte, typ, code byte) []byte {
	m := pkt[header.IPv4MinLen:]
	if pkt[0]>>4 == 6 {
		m = pkt[header.IPv6Len:]
	}
	old := [2]uint16{uint16(m[0])<<8 | uint16(m[1]), uint16(typ)<<8 | uint16(code)}
	m[0], m[1] = typ, code
	binary.BigEndian.PutUint16(m[2:], header.UpdateChecksum16(binary.BigEndian.Uint16(m[2:]), old[0], old[1]))
	return pkt
}

// ICMP errors about the tunnel's own packets: "too big" is passed on as a hint if it is about a member; none of them
// stops or loses what is sent next.
func TestICMPFromUnderlay(t *testing.T) {
	eachLink(t, func(t *testing.T, l testLink) {
		a, b := startPair(t, l)
		features(t, a.ns, "eth0", false, featureChecksum)
		host, out, far := a.tap(t, "tun0"), b.tap(t, "eth0").toward(a.ns, "eth0"), b.tap(t, "tun0")
		inner := datagram{src: a.pod(0), dst: b.pod(0), sport: 1, dport: 9, payload: []byte("quoted later")}.bytes(t)
		host.emit(inner)
		outer := out.next("the outer packet", func(pkt []byte) bool { return bytes.HasSuffix(pkt, inner) })
		far.next("the first", carries("quoted later"))

		router := underlayOf(l.underlay6, 50)
		// The error queue, which a worker looks into once a second or when a send fails, says it all in the end.
		about := func(quote []byte, kind header.ICMPKind, linkMTU int) []byte {
			return header.AppendICMPError(nil, quote, router, kind, linkMTU)
		}
		stranger := bytes.Clone(outer)
		if l.underlay6 {
			copy(stranger[24:], underlayOf(true, 98).AsSlice())
		} else {
			copy(stranger[16:], underlayOf(false, 98).AsSlice())
		}
		for _, pkt := range [][]byte{about(stranger, header.TooBig, 1333), about(outer, header.HostUnreachable, 0), about(outer, header.NetUnreachable, 0)} {
			out.emit(pkt)
		}
		const n = 20
		for k := range n {
			text := fmt.Sprint("after errors ", k)
			host.emit(datagram{src: a.pod(0), dst: b.pod(0), sport: 1, dport: 9, payload: []byte(text)}.bytes(t))
			far.next(text, carries(text))
		}
		out.emit(about(outer, header.TooBig, 1400))
		host.emit(datagram{src: a.pod(0), dst: b.pod(0), sport: 1, dport: 9, payload: []byte("after too big")}.bytes(t))
		far.next("after too big", carries("after too big"))
		select {
		case h := <-a.hints:
			if h.peer != b.ns || h.six != l.underlay6 || h.link != 1400 {
				t.Errorf("hint %+v, want %s and 1400", h, b.ns)
			}
		case <-time.After(patience):
			t.Errorf("no hint; %+v", a.engine.Stats())
		}
		noDrops(t, a, b)
		if got := a.engine.Stats().ICMPReceived; got == 0 {
			t.Error("no error counted")
		}
	})
}

// The kernel of this host refuses what is larger than the link: that is a hint too, at once and without any router.
func TestLinkGetsSmaller(t *testing.T) {
	eachLink(t, func(t *testing.T, l testLink) {
		a, b := startPair(t, l)
		host := a.tap(t, "tun0")
		if out, err := exec.Command("ip", "-n", a.ns, "link", "set", "eth0", "mtu", "1400").CombinedOutput(); err != nil {
			t.Fatalf("ip: %v: %s", err, out)
		}
		host.emit(datagram{src: a.pod(0), dst: b.pod(0), sport: 1, dport: 9, payload: make([]byte, 1380)}.bytes(t))
		select {
		case h := <-a.hints:
			if h.peer != b.ns || h.six != l.underlay6 || h.link != 1400 {
				t.Errorf("hint %+v, want %s and 1400", h, b.ns)
			}
		case <-time.After(patience):
			t.Errorf("no hint; %+v", a.engine.Stats())
		}
	})
}
