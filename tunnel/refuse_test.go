package tunnel

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"testing"
	"time"

	"github.com/google/gopacket"
	"github.com/google/gopacket/layers"
	"golang.org/x/sys/unix"

	"github.com/tulle-net/tulle/internal/sys"
	"github.com/tulle-net/tulle/tunnel/capture"
	"github.com/tulle-net/tulle/tunnel/encap"
	"github.com/tulle-net/tulle/tunnel/header"
)

// icmpError is an ICMP error message as the source of a packet sees it.
type icmpError struct {
	src, dst   netip.Addr
	typ, code  uint8
	mtu        int    // of "too big"
	quote      []byte // the packet that it is about, as far as quoted
	checksumOK bool
}

// parseICMPError reads an ICMP error; ok is false for any other packet.
func parseICMPError(t testing.TB, pkt []byte) (e icmpError, ok bool) {
	t.Helper()
	var in header.Inner
	if header.ParseInner(pkt, &in) != nil {
		return e, false
	}
	e.src, e.dst = in.Src, in.Dst
	first := layers.LayerTypeIPv4
	if in.Version == 6 {
		first = layers.LayerTypeIPv6
	}
	p := gopacket.NewPacket(pkt, first, gopacket.Default)
	var again gopacket.SerializableLayer
	if m, is := p.Layer(layers.LayerTypeICMPv4).(*layers.ICMPv4); is {
		e.typ, e.code, e.mtu, e.quote, again = m.TypeCode.Type(), m.TypeCode.Code(), int(m.Seq), m.Payload, m
		ok = e.typ == layers.ICMPv4TypeDestinationUnreachable
	} else if m, is := p.Layer(layers.LayerTypeICMPv6).(*layers.ICMPv6); is && len(m.Payload) > 4 {
		e.typ, e.code, e.quote = m.TypeCode.Type(), m.TypeCode.Code(), m.Payload[4:]
		e.mtu = int(m.Payload[0])<<24 | int(m.Payload[1])<<16 | int(m.Payload[2])<<8 | int(m.Payload[3])
		must(t, m.SetNetworkLayerForChecksum(p.NetworkLayer()))
		again = m
		ok = e.typ < 128
	}
	if !ok {
		return e, false
	}
	buf := gopacket.NewSerializeBuffer()
	must(t, gopacket.SerializeLayers(buf, gopacket.SerializeOptions{ComputeChecksums: true}, again, gopacket.Payload(p.Layers()[1].LayerPayload())))
	l4 := in.Payload(pkt)
	e.checksumOK = len(buf.Bytes()) >= 4 && slices.Equal(buf.Bytes()[2:4], l4[2:4])
	return e, true
}

// refusal is a packet of a pod that goes nowhere, and what its source is told.
type refusal struct {
	name   string
	drop   encap.Drop
	pkt    []byte
	answer [3]int // ICMP type, code, MTU ; zero: silence
}

// Types and codes by family.
var (
	netUnreachable  = [2][3]int{{3, 0, 0}, {1, 0, 0}}
	hostUnreachable = [2][3]int{{3, 1, 0}, {1, 3, 0}}
	tooBig1300      = [2][3]int{{3, 4, 1300}, {2, 0, 1300}}
)

// refusingPeers are peers to which nothing can be sent, each for another reason, beside a good one. Peer i owns
// spaceOf(f, i).
func refusingPeers(l testLink, good Peer) []Peer {
	peer := func(i int, change func(*Peer)) Peer {
		p := good
		p.ID = fmt.Sprint("peer ", i)
		p.Endpoint = underlayOf(l.underlay6, i)
		p.Accept = []netip.Addr{p.Endpoint}
		p.Prefixes = []netip.Prefix{spaceOf(0, i), spaceOf(1, i)}
		p.TunAddrs = []netip.Addr{spaceOf(0, i).Addr(), spaceOf(1, i).Addr()}
		change(&p)
		return p
	}
	return []Peer{
		good,
		peer(2, func(p *Peer) { p.Unreachable = true }),
		peer(3, func(p *Peer) { p.Endpoint = netip.Addr{}; p.Accept = nil }),
		peer(4, func(p *Peer) { p.Mode = encap.Direct }),
		peer(5, func(p *Peer) { p.Mode = encap.Direct }),
		peer(6, func(p *Peer) { p.Endpoint = underlayOf(!l.underlay6, 6); p.Accept = []netip.Addr{p.Endpoint} }),
		// Their endpoints lie in their own space: what is sent there would go round and round.
		peer(7, func(p *Peer) { p.Endpoint = podOf(0, spacesOf(7)); p.Accept = []netip.Addr{p.Endpoint} }),
		peer(8, func(p *Peer) { p.Endpoint = podOf(1, spacesOf(8)); p.Accept = []netip.Addr{p.Endpoint} }),
		peer(9, func(p *Peer) { p.MTU = 1300 }),
	}
}

func spacesOf(i int) [2]netip.Prefix { return [2]netip.Prefix{spaceOf(0, i), spaceOf(1, i)} }

// refusals are those of one inner family. Each packet has a source of its own, so that none drains another's bucket.
func refusals(t testing.TB, n *testNode, f int) []refusal {
	src := n.pod(f)
	to := func(dst netip.Addr) datagram {
		src = src.Next()
		return datagram{src: src, dst: dst, sport: 5, dport: 9, payload: random(100)}
	}
	pick := func(four, six string) netip.Addr { return netip.MustParseAddr([]string{four, six}[f]) }
	icmp := []layers.IPProtocol{layers.IPProtocolICMPv4, layers.IPProtocolICMPv6}[f]
	edit := func(d datagram, change func(*datagram)) []byte { change(&d); return d.bytes(t) }
	nobody, silence := podOf(f, spacesOf(200)), [3]int{}
	good := to(podOf(f, spacesOf(1)))
	rs := []refusal{
		{"nobody's address", encap.DropNoOwner, to(nobody).bytes(t), netUnreachable[f]},
		{"echo request to nobody", encap.DropNoOwner, edit(to(nobody), func(d *datagram) {
			d.proto, d.payload = icmp, []byte{[]byte{8, 128}[f], 0, 0, 0, 0, 1, 0, 1}
		}), netUnreachable[f]},
		{"long packet to nobody", encap.DropNoOwner, edit(to(nobody), func(d *datagram) { d.payload = random(1350) }), netUnreachable[f]},
		{"own space", encap.DropLoop, to(n.pod(f)).bytes(t), silence},
		{"own tun address", encap.DropLoop, to(n.tun[f]).bytes(t), silence},
		{"endpoint inside the tunnel", encap.DropLoop, to(podOf(f, spacesOf(7+f))).bytes(t), silence},
		{"endpoint as source", encap.DropLoop, edit(to(spaceOf(f, 7+f).Addr()), func(d *datagram) { d.src = podOf(f, spacesOf(7+f)) }), silence},
		{"multicast", encap.DropLocalMulticast, to(pick("224.0.0.251", "ff02::fb")).bytes(t), silence},
		{"link-local", encap.DropLocalMulticast, to(pick("169.254.1.1", "fe80::1")).bytes(t), silence},
		{"peer that is gone", encap.DropPeerDown, to(podOf(f, spacesOf(2))).bytes(t), hostUnreachable[f]},
		{"peer without endpoint", encap.DropNoPath, to(podOf(f, spacesOf(3))).bytes(t), hostUnreachable[f]},
		{"peer by direct", encap.DropNoPath, to(podOf(f, spacesOf(4))).bytes(t), hostUnreachable[f]},
		{"peer by no encapsulation", encap.DropNoPath, to(podOf(f, spacesOf(5))).bytes(t), hostUnreachable[f]},
		{"peer of the other outer family", encap.DropNoEncapSocket, to(podOf(f, spacesOf(6))).bytes(t), hostUnreachable[f]},
		{"one byte too many", encap.DropTooBig, edit(to(podOf(f, spacesOf(9))), func(d *datagram) { d.payload = random(1301 - []int{28, 48}[f]) }), tooBig1300[f]},
		{"TTL 0", encap.DropTxTTLZero, edit(good, func(d *datagram) { d.edit = func(b []byte) { b[[]int{8, 7}[f]] = 0 } }), silence},
		{"half a header", encap.DropTxMalformed, good.bytes(t)[:19], silence},
		{"cut short", encap.DropTxMalformed, good.bytes(t)[:60], silence},

		// RFC 1122 §3.2.2, RFC 4443 §2.4(e): what must never be answered.
		{"ICMP error to nobody", encap.DropNoOwner, edit(to(nobody), func(d *datagram) {
			d.proto, d.payload = icmp, append([]byte{[]byte{3, 1}[f], 1, 0, 0, 0, 0, 0, 0}, good.bytes(t)...)
		}), silence},
		{"no source", encap.DropNoOwner, edit(to(nobody), func(d *datagram) { d.src = pick("0.0.0.0", "::") }), silence},
		{"loopback as source", encap.DropNoOwner, edit(to(nobody), func(d *datagram) { d.src = pick("127.0.0.1", "::1") }), silence},
		{"multicast as source", encap.DropNoOwner, edit(to(nobody), func(d *datagram) { d.src = pick("224.1.2.3", "ff05::3") }), silence},
		{"link-local source", encap.DropNoOwner, edit(to(nobody), func(d *datagram) { d.src = pick("169.254.3.3", "fe80::3") }), silence},
	}
	if f == 0 {
		rs = append(rs,
			refusal{"broadcast", encap.DropLocalMulticast, to(netip.MustParseAddr("255.255.255.255")).bytes(t), silence},
			refusal{"later fragment to nobody", encap.DropNoOwner, edit(to(nobody), func(d *datagram) { d.frag = 10 }), silence},
			refusal{"version 5", encap.DropTxMalformed, edit(good, func(d *datagram) { d.edit = func(b []byte) { b[0] = 0x55 } }), silence})
	}
	return rs
}

// Every reason not to send a pod's packet: it moves exactly its counter by one, and the source gets the right ICMP error,
// once, or none.
func TestRefusals(t *testing.T) {
	eachLink(t, func(t *testing.T, l testLink) {
		a, b := startPair(t, l)
		a.update(refusingPeers(l, b.asPeer(l))...)
		host, far := a.tap(t, "tun0"), b.tap(t, "tun0")
		tried := map[encap.Drop]bool{}
		for f := range 2 {
			for _, r := range refusals(t, a, f) {
				tried[r.drop] = true
				t.Run(fmt.Sprintf("inner %s/%s", familyName(f == 1), r.name), func(t *testing.T) {
					host.t, far.t = t, t
					host.drain()
					before, quiet := a.counts(), a.engine.Stats()
					host.emit(r.pkt)
					// Behind it, a good packet makes its way to the far end: what the engine has to say, it has said by then.
					text := "behind " + r.name
					host.emit(datagram{src: a.pod(f), dst: b.pod(f), sport: 1, dport: 9, payload: []byte(text)}.bytes(t))
					far.next(text, carries(text))
					now := a.engine.Stats()
					if r.drop == encap.DropLocalMulticast {
						if name := r.drop.String(); now.Drops[name] <= quiet.Drops[name] {
							t.Error("not counted as local_multicast")
						}
						a.moved(t, before, encap.DropNone, 0)
					} else {
						a.moved(t, before, r.drop, 1)
					}
					want := 0
					if r.answer[0] != 0 {
						want = 1
					}
					if got := now.ICMPSent - quiet.ICMPSent; got != uint64(want) {
						t.Errorf("%d ICMP errors sent, want %d", got, want)
					}
					checkAnswers(t, host, a.tun[f], r, want)
				})
			}
		}
		for d := encap.DropNoOwner; d <= encap.DropTxTTLZero; d++ {
			if !tried[d] {
				t.Errorf("%v was never provoked", d)
			}
		}
	})
}

// checkAnswers looks at the ICMP errors that arrived at the host: want of them, 0 or 1.
func checkAnswers(t *testing.T, host *tap, from netip.Addr, r refusal, want int) {
	t.Helper()
	var got []icmpError
	isError := func(pkt []byte) bool {
		e, ok := parseICMPError(t, pkt)
		if ok {
			got = append(got, e)
		}
		return ok
	}
	if want > 0 {
		host.next("an ICMP error", isError)
	}
	for _, pkt := range host.drain() {
		isError(pkt)
	}
	if len(got) != want {
		t.Fatalf("%d answers, want %d: %+v", len(got), want, got)
	}
	if want == 0 {
		return
	}
	e := got[0]
	if a := [3]int{int(e.typ), int(e.code), e.mtu}; a != r.answer {
		t.Errorf("answered by type, code, MTU %v; want %v", a, r.answer)
	}
	if src, _ := outerSource(r.pkt); e.src != from || e.dst != src || !e.checksumOK {
		t.Errorf("from %v to %v, checksum right: %v; want from %v to %v", e.src, e.dst, e.checksumOK, from, src)
	}
	quote := r.pkt[:min(len(r.pkt), map[bool]int{true: 548, false: 1280 - 48}[e.src.Is4()])]
	if !slices.Equal(e.quote, quote) {
		t.Errorf("quotes\n% x, want\n% x", e.quote, quote)
	}
}

// A process sees the errors as errors of its socket: the kernel believes the engine's ICMP messages.
func TestErrorsReachSockets(t *testing.T) {
	l := testLink{mode: encap.UDP}
	a, b := startPair(t, l)
	a.update(refusingPeers(l, b.asPeer(l))...)
	for f := range 2 {
		for _, tt := range []struct {
			peer, size int
			errno      unix.Errno
			info       uint32
		}{
			{200, 100, unix.ENETUNREACH, 0},
			{2, 100, unix.EHOSTUNREACH, 0},
			{3, 100, unix.EHOSTUNREACH, 0},
			{9, 1400, unix.EMSGSIZE, 1300},
		} {
			t.Run(fmt.Sprintf("inner %s/%v to peer %d", familyName(f == 1), tt.errno, tt.peer), func(t *testing.T) {
				c := a.dialUDP(t, a.tun[f], netip.AddrPortFrom(podOf(f, spacesOf(tt.peer)), 9))
				level := []int{unix.SOL_IP, unix.SOL_IPV6}[f]
				option(t, c, level, []int{unix.IP_RECVERR, unix.IPV6_RECVERR}[f], 1)
				option(t, c, level, []int{unix.IP_MTU_DISCOVER, unix.IPV6_MTU_DISCOVER}[f], unix.IP_PMTUDISC_DO)
				_, err := c.Write(random(tt.size))
				must(t, err)
				var m sys.ErrMsg
				eventually(t, "an error is queued at the socket", func() bool {
					var err error
					withFD(t, c, func(fd int) error { m, err = sys.RecvErr(fd, make([]byte, 2000)); return nil })
					if err != nil && !errors.Is(err, sys.ErrAgain) {
						t.Fatal(err)
					}
					return err == nil
				})
				if unix.Errno(m.Err.Errno) != tt.errno || m.Err.Info != tt.info || m.Offender.Addr() != a.tun[f] || m.Err.Origin == unix.SO_EE_ORIGIN_LOCAL {
					t.Errorf("%v, info %d, from %v; want %v, %d, %v", unix.Errno(m.Err.Errno), m.Err.Info, m.Offender, tt.errno, tt.info, a.tun[f])
				}
			})
		}
	}
}

// A flood of packets that go nowhere is answered at the rate of the bucket, and other sources are answered meanwhile.
func TestErrorsAreBounded(t *testing.T) {
	l := testLink{mode: encap.UDP}
	a, b := startPair(t, l)
	host, far := a.tap(t, "tun0"), b.tap(t, "tun0")
	const flood = 2000
	for f := range 2 {
		nobody := podOf(f, spacesOf(200))
		pkt := datagram{src: a.pod(f), dst: nobody, sport: 5, dport: 9, payload: []byte("x")}.bytes(t)
		before, sent := a.counts(), a.engine.Stats().ICMPSent
		start := time.Now()
		for range flood {
			host.emit(pkt)
		}
		text := "behind the flood"
		host.emit(datagram{src: a.pod(f), dst: b.pod(f), sport: 1, dport: 9, payload: []byte(text)}.bytes(t))
		far.next(text, carries(text))
		a.moved(t, before, encap.DropNoOwner, flood)
		most := icmpBurst + int(time.Since(start)/icmpEvery) + 1
		if got := int(a.engine.Stats().ICMPSent - sent); got < icmpBurst || got > most {
			t.Errorf("%d errors about %d packets, want %d to %d", got, flood, icmpBurst, most)
		}
		other := a.pod(f).Next()
		host.emit(datagram{src: other, dst: nobody, sport: 5, dport: 9, payload: []byte("other")}.bytes(t))
		host.next("an answer to another source", func(pkt []byte) bool {
			e, ok := parseICMPError(t, pkt)
			return ok && e.dst == other
		})
	}
}

// The bucket: a burst, then one for each interval, never more than a burst after a pause.
func TestBucket(t *testing.T) {
	var w icmpWriter
	src, now := netip.MustParseAddr("10.77.0.5"), time.Unix(1e9, 0)
	take := func() (n int) {
		for w.allow(src, now) {
			n++
		}
		return n
	}
	for _, tt := range []struct {
		pause time.Duration
		want  int
	}{
		{0, icmpBurst}, {0, 0}, {icmpEvery - 1, 0}, {1, 1}, {3*icmpEvery + icmpEvery/2, 3}, {icmpEvery / 2, 1},
		{time.Hour, icmpBurst}, {-time.Hour, 0}, {icmpEvery, 0},
	} {
		now = now.Add(tt.pause)
		if got := take(); got != tt.want {
			t.Errorf("%v later: %d allowed, want %d", tt.pause, got, tt.want)
		}
	}
}

// What the kernels refuse is counted and does not stop anything else.
func TestKernelRefusals(t *testing.T) {
	eachLink(t, func(t *testing.T, l testLink) {
		a, b := startPair(t, l)
		host, far := a.tap(t, "tun0"), b.tap(t, "tun0")
		dropped := func(n *testNode) func(at capture.Point, d encap.Drop, peer *testNode, size int) {
			seen, err := n.engine.Tap().Listen(capture.Filter{Drops: true, Reasons: []string{encap.DropSendError.String(), encap.DropTunWrite.String()}, Pod: a.pod(0)}, capture.Limits{})
			must(t, err)
			t.Cleanup(seen.Close)
			return func(at capture.Point, d encap.Drop, peer *testNode, size int) {
				t.Helper()
				e, err := seen.Next(t.Context(), patience)
				if err != nil || e.Point != at || e.Reason != d.String() || e.Peer != peer.ns || e.Length != size {
					t.Errorf("captured at %s for %q, peer %s, %d bytes, %v; want at %s for %s, peer %s, %d bytes", e.Point, e.Reason, e.Peer, e.Length, err, at, d, peer.ns, size)
				}
			}
		}
		atA, atB := dropped(a), dropped(b)
		good := func(text string) []byte {
			return datagram{src: a.pod(0), dst: b.pod(0), sport: 1, dport: 9, payload: []byte(text)}.bytes(t)
		}

		// A path MTU above the link's: the kernel says EMSGSIZE.
		wrong := b.asPeer(l)
		wrong.MTU += 100
		a.update(wrong)
		must(t, a.dev.SetMTU(int(wrong.MTU)))
		before := a.counts()
		host.emit(datagram{src: a.pod(0), dst: b.pod(0), sport: 1, dport: 9, payload: random(int(l.mtu()) + 1 - 28)}.bytes(t))
		host.emit(good("after send_error"))
		far.next("after send_error", carries("after send_error"))
		a.moved(t, before, encap.DropSendError, 1)
		if a.engine.Stats().LastSendError == "" {
			t.Error("no reason is noted")
		}
		atA(capture.ToPeer, encap.DropSendError, b, int(l.mtu()+1)+int(encap.Overhead(l.mode, l.underlay6)))

		// The far TUN goes down and comes up again.
		before = b.counts()
		setTunUp(t, b, false)
		host.emit(good("while down"))
		b.moved(t, before, encap.DropTunWrite, 1)
		atB(capture.ToPods, encap.DropTunWrite, a, len(good("while down")))
		setTunUp(t, b, true)
		host.emit(good("up again"))
		far.next("up again", carries("up again"))
	})
}

func setTunUp(t testing.TB, n *testNode, up bool) {
	t.Helper()
	withNetlink(t, n.ns, func(nl *sys.Netlink) error {
		link, err := nl.LinkByName("tun0")
		if err != nil {
			return err
		}
		if up {
			return nl.LinkSetUp(link)
		}
		return nl.LinkSetDown(link)
	})
}
