package fastpath

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/tulle-net/tulle/internal/sys"
	"github.com/tulle-net/tulle/internal/testing/namespace"
	"github.com/tulle-net/tulle/tunnel/device"
	"github.com/tulle-net/tulle/tunnel/header"
	"github.com/tulle-net/tulle/tunnel/offload"
)

// The rig is a host with a TUN device, which a test reads as an agent would, and a peer at the other end of its link.
type rig struct {
	t       *testing.T
	host    *namespace.Namespace
	peer    *namespace.Namespace
	tun     *device.Device
	index   int // of the TUN device
	out, in int // packet sockets: into the TUN device; at the peer's end of the link
	path    *Path
	state   State
}

// The addresses of the host, of its peer, of a pod on each, and the host's own in the pods' space, IPv4 and IPv6.
var (
	hostAddr = [2]netip.Addr{addr("192.0.2.1"), addr("2001:db8::1")}
	peerAddr = [2]netip.Addr{addr("192.0.2.2"), addr("2001:db8::2")}
	pod      = [2]netip.Addr{addr("10.1.0.5"), addr("fd00:1::5")}
	far      = [2]netip.Addr{addr("10.2.0.7"), addr("fd00:2::7")}
	tunAddr  = [2]netip.Addr{addr("10.1.0.0"), addr("fd00:1::")}
)

// patience bounds the waits for packets; nothing is asserted about how long they take.
const patience = 20 * time.Second

const (
	mtu      = 1400
	ownPort  = 6080
	peerPort = 6090
)

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// newRig makes the host, whose packets to the peer leave by IPv4 (outer 0) or IPv6 (1).
func newRig(t *testing.T, outer int) *rig {
	r := &rig{t: t, host: namespace.New(t), peer: namespace.New(t)}
	r.host.Do(func() (err error) {
		if r.tun, err = device.Open(device.Options{Name: "tun0"}); err != nil {
			return err
		}
		r.path, err = Open()
		return err
	})
	t.Cleanup(func() { must(t, errors.Join(r.path.Close(), r.tun.Close())) })
	r.host.Netlink(func(nl *sys.Netlink) error {
		ns, err := os.Open(r.peer.Path())
		if err != nil {
			return err
		}
		defer ns.Close()
		v := &netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "eth0", MTU: 1500}, PeerName: "eth0", PeerNamespace: netlink.NsFd(ns.Fd())}
		if err := nl.LinkAdd(v); err != nil {
			return err
		}
		tun, err := nl.LinkByName("tun0")
		if err != nil {
			return err
		}
		r.index = tun.Attrs().Index
		return errors.Join(nl.LinkSetUp(tun), settle(nl, "eth0", hostAddr))
	})
	r.peer.Netlink(func(nl *sys.Netlink) error { return settle(nl, "eth0", peerAddr) })
	r.host.Do(func() (err error) { r.out, err = packetSocket("tun0"); return err })
	r.peer.Do(func() (err error) { r.in, err = packetSocket("eth0"); return err })
	t.Cleanup(func() { must(t, errors.Join(unix.Close(r.out), unix.Close(r.in))) })
	r.state = State{
		TUN: "tun0", Port: ownPort, Links: []string{"eth0"}, Underlay: hostAddr[:], Own: prefixes("10.1.0.0/24", "fd00:1::/64"), Except: tunAddr[:],
		Peers: []Peer{{
			ID: "peer", Accept: peerAddr[:], Prefixes: prefixes("10.2.0.0/24", "fd00:2::/64"), Except: []netip.Addr{addr("10.2.0.9")},
			Way: &Way{From: hostAddr[outer], To: peerAddr[outer], Link: "eth0", MTU: mtu},
		}, {ID: "other", Accept: []netip.Addr{addr("192.0.2.3")}, Prefixes: prefixes("10.3.0.0/24")}},
	}
	r.update()
	return r
}

// settle gives a device its addresses, and sets it up.
func settle(nl *sys.Netlink, name string, addrs [2]netip.Addr) error {
	l, err := nl.LinkByName(name)
	if err != nil {
		return err
	}
	for i, a := range addrs {
		bits := [2]int{24, 64}[i]
		n, err := netlink.ParseIPNet(fmt.Sprintf("%v/%d", a, bits))
		if err != nil {
			return err
		}
		if err := nl.AddrAdd(l, &netlink.Addr{IPNet: n, Flags: unix.IFA_F_NODAD}); err != nil {
			return err
		}
	}
	return nl.LinkSetUp(l)
}

func (r *rig) update() {
	r.t.Helper()
	r.host.Do(func() error { return r.path.Update(r.state) })
}

func htons(v uint16) uint16 { return binary.NativeEndian.Uint16(binary.BigEndian.AppendUint16(nil, v)) }

// packetSocket opens a socket that receives from a device, without its link header, and does not wait.
func packetSocket(name string) (int, error) {
	l, err := netlink.LinkByName(name)
	if err != nil {
		return -1, err
	}
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_DGRAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, int(htons(unix.ETH_P_ALL)))
	if err != nil {
		return -1, err
	}
	return fd, unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: htons(unix.ETH_P_ALL), Ifindex: l.Attrs().Index})
}

// A packet of a pod, before its length and checksums.
type packet struct {
	src, dst netip.Addr
	proto    uint8 // of payload
	tos, ttl uint8
	frag     uint16
	payload  []byte
}

func (p packet) bytes() []byte {
	if p.src.Is4() {
		return append(header.AppendIPv4(nil, header.IPv4Fields{
			Src: p.src, Dst: p.dst, PayloadLen: len(p.payload), TOS: p.tos, TTL: p.ttl, Proto: p.proto, FlagsFrag: p.frag,
		}), p.payload...)
	}
	return append(header.AppendIPv6(nil, header.IPv6Fields{
		Src: p.src, Dst: p.dst, PayloadLen: len(p.payload), TrafficClass: p.tos, HopLimit: p.ttl, NextHeader: p.proto,
	}), p.payload...)
}

// tcp is a segment from a pod to the far one; f holds flags and options.
func tcp(six int, f header.TCPFields, data int) packet {
	f.From, f.To = netip.AddrPortFrom(pod[six], 1000), netip.AddrPortFrom(far[six], 2000)
	return packet{src: pod[six], dst: far[six], proto: header.ProtoTCP, ttl: 63, payload: header.AppendTCP(nil, f, bytes.Repeat([]byte{'x'}, data))}
}

func udp(six, data int) packet {
	from, to := netip.AddrPortFrom(pod[six], 1000), netip.AddrPortFrom(far[six], 2000)
	return packet{src: pod[six], dst: far[six], proto: header.ProtoUDP, ttl: 63, payload: header.AppendUDP(nil, from, to, bytes.Repeat([]byte{'x'}, data))}
}

func mss(n uint16) []byte { return append([]byte{2, 4}, byte(n>>8), byte(n)) }

// send puts a packet into the TUN device and returns where it comes out: what the peer gets, or what the agent reads.
func (r *rig) send(pkt []byte) (outer, inner []byte) {
	r.t.Helper()
	proto := uint16(unix.ETH_P_IP)
	if pkt[0]>>4 == 6 {
		proto = unix.ETH_P_IPV6
	}
	must(r.t, unix.Sendto(r.out, pkt, 0, &unix.SockaddrLinklayer{Protocol: htons(proto), Ifindex: r.index}))
	buf := make([]byte, 1<<16)
	for deadline := time.Now().Add(patience); time.Now().Before(deadline); time.Sleep(100 * time.Microsecond) {
		if n, err := r.tun.Queues()[0].Read(buf); err == nil && bytes.HasSuffix(buf[:n], pkt) {
			return nil, pkt
		}
		n, from, err := unix.Recvfrom(r.in, buf, 0)
		if l, ok := from.(*unix.SockaddrLinklayer); err != nil || !ok || l.Pkttype == unix.PACKET_OUTGOING {
			continue // an ICMP error of the peer, which takes nothing, quotes the packet
		}
		if bytes.HasSuffix(buf[:n], pkt) {
			return buf[:n], nil
		}
	}
	r.t.Fatalf("lost: % x", pkt)
	return nil, nil
}

// superPacket sends a TCP super-packet into the TUN device, whose checksum is not complete yet, as a pod's kernel does.
func (r *rig) superPacket(pkt []byte, transport, size int) {
	r.t.Helper()
	fd := -1
	r.host.Do(func() (err error) {
		fd, err = unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0)
		return err
	})
	defer unix.Close(fd)
	must(r.t, unix.SetsockoptInt(fd, unix.SOL_PACKET, unix.PACKET_VNET_HDR, 1))
	v := offload.VnetHdr{Flags: offload.NeedsCsum, GSOType: offload.GSOTCPv4, HdrLen: uint16(transport + 20), GSOSize: uint16(size), CsumStart: uint16(transport), CsumOffset: 16}
	proto, addrs := uint16(unix.ETH_P_IP), pkt[12:20]
	if pkt[0]>>4 == 6 {
		v.GSOType, proto, addrs = offload.GSOTCPv6, unix.ETH_P_IPV6, pkt[8:40]
	}
	sum := header.Fold(header.PseudoSum(header.ProtoTCP, addrs[:len(addrs)/2], addrs[len(addrs)/2:], uint32(len(pkt)-transport)))
	binary.BigEndian.PutUint16(pkt[transport+16:], sum)
	buf := make([]byte, offload.VnetHdrLen)
	must(r.t, v.Encode(buf))
	must(r.t, unix.Sendto(fd, append(buf, pkt...), 0, &unix.SockaddrLinklayer{Protocol: htons(proto), Ifindex: r.index}))
}

// TestSend sends all kinds of packets into the TUN device, and checks who carries them, and how.
func TestSend(t *testing.T) {
	for i, name := range []string{"over IPv4", "over IPv6", "in UDP over IPv4"} {
		t.Run(name, func(t *testing.T) {
			outer, port := i%2, i/2*peerPort
			r := newRig(t, outer)
			r.state.Peers[0].Way.Port = uint16(port)
			r.update()
			icmp := func(six int, proto uint8) packet {
				return packet{src: pod[six], dst: far[six], proto: proto, ttl: 63, payload: []byte{8, 0, 0, 0, 1, 2, 3, 4}}
			}
			cases := []struct {
				name    string
				pkt     packet
				carried bool
			}{
				{"ICMP", icmp(0, header.ProtoICMP), true},
				{"ICMPv6", icmp(1, header.ProtoICMPv6), true},
				{"another protocol", icmp(0, 47), false},
				{"TTL 0", func() packet { p := icmp(0, header.ProtoICMP); p.ttl = 0; return p }(), false},
				{"the first fragment", func() packet { p := icmp(0, header.ProtoICMP); p.frag = header.IPv4FlagMF; return p }(), false},
				{"the last fragment", func() packet { p := icmp(0, header.ProtoICMP); p.frag = 1; return p }(), false},
				{"an extension header", packet{src: pod[1], dst: far[1], proto: 60, ttl: 63, payload: append([]byte{59, 0, 1, 4, 0, 0, 0, 0}, "end"...)}, false},
				{"an address that is left to the agent", packet{src: pod[0], dst: addr("10.2.0.9"), proto: header.ProtoUDP, ttl: 63, payload: make([]byte, 20)}, false},
				{"a peer to which the agent sends", packet{src: pod[0], dst: addr("10.3.0.9"), proto: header.ProtoUDP, ttl: 63, payload: make([]byte, 20)}, false},
				{"nobody's address", packet{src: pod[0], dst: addr("10.4.0.9"), proto: header.ProtoUDP, ttl: 63, payload: make([]byte, 20)}, false},
				{"a packet from the peer's host, which did not come through the tunnel", packet{src: peerAddr[outer], dst: far[outer], proto: header.ProtoUDP, ttl: 63, payload: make([]byte, 20)}, false},
				{"a packet to this host's own pod", packet{src: far[0], dst: pod[0], proto: header.ProtoUDP, ttl: 63, payload: make([]byte, 20)}, false},
			}
			for six := range 2 {
				head := 20 + 20*six
				v := fmt.Sprintf("IPv%d ", 4+2*six)
				marked := udp(six, 100)
				marked.tos = 0xb9 // EF, ECT(1)
				cases = append(cases, []struct {
					name    string
					pkt     packet
					carried bool
				}{
					{v + "UDP", udp(six, 1), true},
					{v + "UDP with DSCP and ECN", marked, true},
					{v + "UDP that just fits", udp(six, mtu-head-8), true},
					{v + "UDP that does not", udp(six, mtu-head-7), false},
					{v + "TCP", tcp(six, header.TCPFields{Flags: header.TCPAck}, 10), true},
					{v + "TCP that just fits", tcp(six, header.TCPFields{Flags: header.TCPAck}, mtu-head-20), true},
					{v + "TCP that does not", tcp(six, header.TCPFields{Flags: header.TCPAck}, mtu-head-19), false},
					{v + "SYN whose segments fit", tcp(six, header.TCPFields{Flags: header.TCPSyn, Options: mss(uint16(mtu - head - 20))}, 0), true},
					{v + "SYN whose segments do not", tcp(six, header.TCPFields{Flags: header.TCPSyn, Options: mss(uint16(mtu - head - 19))}, 0), false},
					{v + "SYN with another option first", tcp(six, header.TCPFields{Flags: header.TCPSyn, Options: append([]byte{1, 1, 4, 2}, mss(500)...)}, 0), false},
					{v + "SYN with an unknown option first", tcp(six, header.TCPFields{Flags: header.TCPSyn, Options: []byte{254, 4, 1, 0}}, 0), false},
					{v + "SYN without options, whose data looks like one", func() packet {
						p := tcp(six, header.TCPFields{Flags: header.TCPSyn}, 4)
						copy(p.payload[20:], mss(500))
						return p
					}(), false},
				}...)
			}
			for _, tc := range cases {
				before := r.path.Counts("peer")
				pkt := tc.pkt.bytes()
				out, _ := r.send(pkt)
				if (out != nil) != tc.carried {
					t.Errorf("%s: carried %v, want %v", tc.name, out != nil, tc.carried)
					continue
				}
				got, want := r.path.Counts("peer"), before
				if tc.carried {
					want.TxPackets++
					want.TxBytes += uint64(len(pkt))
					checkOuter(t, tc.name, out[:len(out)-len(pkt)], outer, port, pkt, tc.pkt.tos)
				}
				if got != want {
					t.Errorf("%s: counts %+v, want %+v", tc.name, got, want)
				}
			}
			if out, _ := r.send(append(udp(0, 10).bytes(), "more"...)); out != nil {
				t.Error("carried: a packet with bytes behind it")
			}
			// Nothing is carried while somebody wants to see packets, nor where nothing is to be.
			data := udp(0, 10).bytes()
			carried := func(when string, want bool) {
				t.Helper()
				if out, _ := r.send(data); (out != nil) != want {
					t.Errorf("%s: carried %v, want %v", when, out != nil, want)
				}
			}
			must(t, r.path.Pause(true))
			carried("paused", false)
			r.update()
			carried("updated while paused", false)
			must(t, r.path.Pause(false))
			carried("not paused", true)
			r.state.Off = "a test"
			r.update()
			carried("off", false)
			r.state.Off = ""
			r.update()
			carried("on again", true)
			total := r.path.Total()
			r.state.Peers = r.state.Peers[1:]
			r.update()
			carried("the peer is gone", false)
			if got := r.path.Total(); got != total || total.TxPackets == 0 {
				t.Errorf("in all %+v, before the peer went %+v", got, total)
			}
		})
	}
}

// TestPauseEnds pauses the programs and does so never again, as an agent that is killed during a capture.
func TestPauseEnds(t *testing.T) {
	r := newRig(t, 0)
	data := udp(0, 10).bytes()
	must(t, r.path.Pause(true))
	if out, _ := r.send(data); out != nil {
		t.Error("carried although paused")
	}
	for deadline := time.Now().Add(2*pauseLasts + 20*time.Second); ; time.Sleep(100 * time.Millisecond) {
		if out, _ := r.send(data); out != nil {
			break
		}
		if time.Now().After(deadline) {
			t.Fatal("nothing is carried any more")
		}
	}
	// Whoever still looks says so.
	must(t, r.path.Pause(true))
	if out, _ := r.send(data); out != nil {
		t.Error("carried although paused again")
	}
}

// TestNotEthernet has an underlay of devices that the programs cannot use.
func TestNotEthernet(t *testing.T) {
	r := newRig(t, 0)
	r.state.Links = []string{"tun0", "gone0"}
	r.host.Do(func() error {
		if err := r.path.Update(r.state); err == nil || !strings.Contains(err.Error(), "tun0") || !strings.Contains(err.Error(), "Ethernet") {
			t.Errorf("%v", err)
		}
		return nil
	})
	if out, _ := r.send(udp(0, 10).bytes()); out != nil {
		t.Error("carried")
	}
	r.state.Links = []string{"tun0", "eth0"}
	r.update()
	if out, _ := r.send(udp(0, 10).bytes()); out == nil {
		t.Error("not carried")
	}
}

// checkOuter checks an outer header: docs/wire.md.
func checkOuter(t *testing.T, name string, h []byte, outer, port int, inner []byte, tos uint8) {
	t.Helper()
	if port != 0 && len(h) == 28 {
		if from := binary.BigEndian.Uint16(h[20:]); from < 49152 {
			t.Errorf("%s: source port %d", name, from)
		}
		want := header.AppendIPv4(nil, header.IPv4Fields{Src: hostAddr[0], Dst: peerAddr[0], PayloadLen: 8 + len(inner), FlagsFrag: header.IPv4FlagDF, TOS: tos, TTL: 64, Proto: header.ProtoUDP})
		want = header.AppendUDPHeader(want, binary.BigEndian.Uint16(h[20:]), uint16(port), len(inner))
		if !bytes.Equal(h, want) {
			t.Errorf("%s: outer headers\n% x, want\n% x", name, h, want)
		}
		return
	}
	proto := uint8(header.ProtoIPv4)
	if inner[0]>>4 == 6 {
		proto = header.ProtoIPv6
	}
	var want []byte
	if outer == 0 {
		want = header.AppendIPv4(nil, header.IPv4Fields{Src: hostAddr[0], Dst: peerAddr[0], PayloadLen: len(inner), FlagsFrag: header.IPv4FlagDF, TOS: tos, TTL: 64, Proto: proto})
	} else if len(h) == 40 {
		label := binary.BigEndian.Uint32(h) & 0xfffff
		want = header.AppendIPv6(nil, header.IPv6Fields{Src: hostAddr[1], Dst: peerAddr[1], PayloadLen: len(inner), TrafficClass: tos, HopLimit: 64, NextHeader: proto, FlowLabel: label})
		if label == 0 {
			t.Errorf("%s: no flow label", name)
		}
	}
	if !bytes.Equal(h, want) {
		t.Errorf("%s: outer header\n% x, want\n% x", name, h, want)
	}
}

// TestReceive runs the receiving program on frames of all kinds, and checks which it takes.
func TestReceive(t *testing.T) {
	r := newRig(t, 0)
	type frame struct {
		outer, inner packet
		mac          byte // last byte of the destination's; 0 is the device's own
		cut, pad     int  // bytes taken from or added to the end of the frame
		behind       int  // bytes between the ends of the inner and the outer packet
		udp          []byte
	}
	// A frame of the peer's pod to this host's.
	good := func(outer, inner int) frame {
		in := udp(inner, 50)
		in.src, in.dst = far[inner], pod[inner]
		proto := uint8(header.ProtoIPv4)
		if inner == 1 {
			proto = header.ProtoIPv6
		}
		return frame{outer: packet{src: peerAddr[outer], dst: hostAddr[outer], ttl: 60, proto: proto}, inner: in}
	}
	type buff struct { // the kernel's struct __sk_buff, and some room
		Len, PktType, Mark uint32
		_                  [61]uint32
	}
	var after buff
	run := func(f frame) (int, []byte, []byte) {
		t.Helper()
		pkt := f.inner.bytes()
		f.outer.payload = append(append(bytes.Clone(f.udp), pkt...), make([]byte, f.behind)...)
		etherType := uint16(unix.ETH_P_IP)
		if f.outer.src.Is6() {
			etherType = unix.ETH_P_IPV6
		}
		data := append(binary.BigEndian.AppendUint16([]byte{0, 0, 0, 0, 0, f.mac, 2, 0, 0, 0, 0, 1}, etherType), f.outer.bytes()...)
		data = append(data[:len(data)-f.cut], make([]byte, f.pad)...)
		out := make([]byte, len(data)+64)
		var ret uint32
		r.host.Do(func() error {
			opts := ebpf.RunOptions{Data: data, DataOut: out, Context: buff{Mark: 7}, ContextOut: &after} // a filter of others has marked it
			var err error
			ret, err = r.path.programs.Receive.Run(&opts)
			out = opts.DataOut
			return err
		})
		return int(int32(ret)), out, pkt
	}
	const taken, left = 7, -1 // TC_ACT_REDIRECT, TC_ACT_UNSPEC
	for outer := range 2 {
		for inner := range 2 {
			what := fmt.Sprintf("IPv%d in IPv%d", 4+2*inner, 4+2*outer)
			before := r.path.Counts("peer")
			ret, out, pkt := run(good(outer, inner))
			if ret != taken || !bytes.Equal(out[14:], pkt) {
				t.Errorf("%s: %d, left % x, want % x", what, ret, out[min(14, len(out)):], pkt)
			}
			if after.Mark != 0 {
				t.Errorf("%s: the inner packet has the mark %d, of the outer one", what, after.Mark)
			}
			if got := r.path.Counts("peer"); got.RxPackets != before.RxPackets+1 || got.RxBytes != before.RxBytes+uint64(len(pkt)) {
				t.Errorf("%s: counts %+v after %+v", what, got, before)
			}
			for name, spoil := range map[string]func(f *frame){
				"from no member":                   func(f *frame) { f.outer.src = addr("192.0.2.77") },
				"from another member":              func(f *frame) { f.outer.src = addr("192.0.2.3") },
				"from this host itself":            func(f *frame) { f.outer.src = hostAddr[outer] },
				"to another host":                  func(f *frame) { f.outer.dst = peerAddr[outer] },
				"to another MAC":                   func(f *frame) { f.mac = 9 },
				"outer fragment":                   func(f *frame) { f.outer.frag = header.IPv4FlagMF },
				"outer protocol of the other kind": func(f *frame) { f.outer.proto ^= header.ProtoIPv4 ^ header.ProtoIPv6 },
				"UDP":                              func(f *frame) { f.outer.proto = header.ProtoUDP },
				"inner fragment":                   func(f *frame) { f.inner.frag = 5 },
				"inner TTL 0":                      func(f *frame) { f.inner.ttl = 0 },
				"outer CE":                         func(f *frame) { f.outer.tos, f.inner.tos = 3, 2 },
				"outer CE, inner not ECN-capable":  func(f *frame) { f.outer.tos = 3 },
				"inner source of another member":   func(f *frame) { f.inner.src = addr("10.3.0.1") },
				"inner source of this host's pods": func(f *frame) { f.inner.src = pod[inner] },
				"inner source of nobody":           func(f *frame) { f.inner.src = addr("10.4.0.1") },
				"inner source is the host's":       func(f *frame) { f.inner.src = peerAddr[inner] },
				"to this host's own address":       func(f *frame) { f.inner.dst = tunAddr[inner] },
				"to this host's underlay address":  func(f *frame) { f.inner.dst = hostAddr[inner] },
				"to another host's pods":           func(f *frame) { f.inner.dst = addr("10.3.0.1") },
				"another protocol":                 func(f *frame) { f.inner.proto = 60 },
				"ICMP of the other family": func(f *frame) {
					f.inner.proto = header.ProtoICMP ^ header.ProtoICMPv6 ^ []uint8{header.ProtoICMP, header.ProtoICMPv6}[inner]
				},
				"truncated":                     func(f *frame) { f.cut = 1 },
				"no whole inner header":         func(f *frame) { f.cut = 60 },
				"bytes behind the packet":       func(f *frame) { f.pad = 6 },
				"bytes behind the inner packet": func(f *frame) { f.behind = 6 },
			} {
				f := good(outer, inner)
				spoil(&f)
				if f.outer.src.Is4() != f.outer.dst.Is4() || f.inner.src.Is4() != f.inner.dst.Is4() || outer == 1 && f.outer.frag != 0 || inner == 1 && f.inner.frag != 0 {
					continue // of the other family
				}
				if ret, _, _ := run(f); ret != left {
					t.Errorf("%s, %s: %d, want it left to the agent", what, name, ret)
				}
			}
		}
	}
	// IPv4 addresses as IPv6 ones.
	mapped := func(a netip.Addr) netip.Addr { return netip.AddrFrom16(a.As16()) }
	f := good(1, 0)
	f.outer.src, f.outer.dst = mapped(peerAddr[0]), mapped(hostAddr[0])
	if ret, _, _ := run(f); ret != left {
		t.Errorf("outer addresses of IPv4 in IPv6: %d", ret)
	}
	f = good(1, 1)
	f.inner.src, f.inner.dst = mapped(far[0]), mapped(pod[0])
	if ret, _, _ := run(f); ret != left {
		t.Errorf("inner addresses of IPv4 in IPv6: %d", ret)
	}
	// A host's address among the pods' is the agent's affair.
	r.state.Peers[1].Accept = append(r.state.Peers[1].Accept, pod[0])
	r.update()
	if ret, _, _ := run(good(0, 0)); ret != left {
		t.Errorf("to a host's address among the pods': %d", ret)
	}
	r.state.Peers[1].Accept = r.state.Peers[1].Accept[:1]
	r.update()
	// A change of the tables holds for packets whose like have passed before.
	passes := func(when string, want int) {
		t.Helper()
		if ret, _, _ := run(good(0, 0)); ret != want {
			t.Errorf("%s: %d, want %d", when, ret, want)
		}
	}
	for what, change := range map[string]func(){
		"the peer has other pods":       func() { r.state.Peers[0].Prefixes = prefixes("10.9.0.0/24") },
		"this host has other pods":      func() { r.state.Own = prefixes("10.9.0.0/24") },
		"the peer has other addresses":  func() { r.state.Peers[0].Accept = peerAddr[1:] },
		"this host has other addresses": func() { r.state.Underlay = hostAddr[1:] },
		"the peer is gone":              func() { r.state.Peers = r.state.Peers[1:] },
	} {
		before := r.state
		r.state.Peers = append([]Peer{}, r.state.Peers...)
		passes("before "+what, taken)
		change()
		r.update()
		passes(what, left)
		r.state = before
		r.update()
		passes("after "+what, taken)
	}
	// The same in UDP, over IPv4 and without checksum.
	inUDP := func(inner int) frame {
		f := good(0, inner)
		f.outer.proto = header.ProtoUDP
		f.udp = header.AppendUDPHeader(nil, 50000, ownPort, len(f.inner.bytes()))
		return f
	}
	for inner := range 2 {
		what := fmt.Sprintf("IPv%d in UDP", 4+2*inner)
		segment := inUDP(inner)
		segment.inner = tcp(inner, header.TCPFields{Flags: header.TCPAck}, 50)
		segment.inner.src, segment.inner.dst = far[inner], pod[inner]
		segment.udp = header.AppendUDPHeader(nil, 50000, ownPort, len(segment.inner.bytes()))
		for i, f := range []frame{inUDP(inner), segment} {
			ret, out, pkt := run(f)
			if ret != taken || !bytes.Equal(out[14:], pkt) {
				t.Errorf("%s, %d: %d, left % x, want % x", what, i, ret, out[min(14, len(out)):], pkt)
			}
			// The joint's devices are Ethernet; the TUN device goes by the packet.
			if got, want := binary.BigEndian.Uint16(out[12:]), []uint16{unix.ETH_P_IP, unix.ETH_P_IPV6}[inner]; i == 1 && got != want {
				t.Errorf("%s: EtherType %#x, want %#x", what, got, want)
			}
		}
		for name, spoil := range map[string]func(f *frame){
			"with a checksum":              func(f *frame) { f.udp[7] = 1 },
			"to another port":              func(f *frame) { f.udp[3]++ },
			"of another length":            func(f *frame) { f.udp[5]++ },
			"over IPv6":                    func(f *frame) { f.outer.src, f.outer.dst = peerAddr[1], hostAddr[1] },
			"from no member":               func(f *frame) { f.outer.src = addr("192.0.2.77") },
			"inner source of another host": func(f *frame) { f.inner.src = addr("10.3.0.1") },
			"cut behind the UDP header":    func(f *frame) { f.cut = len(f.inner.bytes()) },
			"cut within the UDP header":    func(f *frame) { f.cut = len(f.inner.bytes()) + 4 },
			"not GUE variant 1":            func(f *frame) { f.udp = append(f.udp, 0, 4, 0, 0); f.udp[5] += 4 },
		} {
			f := inUDP(inner)
			spoil(&f)
			if f.inner.src.Is4() != f.inner.dst.Is4() {
				continue
			}
			if ret, _, _ := run(f); ret != left {
				t.Errorf("%s, %s: %d, want it left to the agent", what, name, ret)
			}
		}
	}
	r.state.Port = 0
	r.update()
	if ret, _, _ := run(inUDP(0)); ret != left {
		t.Errorf("UDP without a port: %d", ret)
	}
	// DSCP does not matter, nor ECN marks that agree.
	f = good(0, 0)
	f.outer.tos, f.inner.tos = 0xb9, 0x01
	if ret, _, _ := run(f); ret != taken {
		t.Errorf("equal ECN marks: %d", ret)
	}
}

// TestJoint sends a super-packet, which the link cuts, in UDP to another host: it comes out of that one's TUN device joined. What else gets to the joint
// does not.
func TestJoint(t *testing.T) {
	r := newRig(t, 0)
	r.state.Peers[0].Way.Port = ownPort
	r.update()
	r.host.Do(func() error {
		return errors.Join(sys.SetOffload("eth0", sys.TSO, false), sys.SetOffload("eth0", sys.GSO, false))
	})
	// The peer has a fast path of its own.
	var peer *Path
	var seen, joint int
	r.peer.Do(func() error {
		tun, err := device.Open(device.Options{Name: "tun0"})
		if err != nil {
			return err
		}
		t.Cleanup(func() { must(t, tun.Close()) })
		if peer, err = Open(); err != nil {
			return err
		}
		t.Cleanup(func() { must(t, peer.Close()) })
		l, err := peer.nl.LinkByName("tun0")
		if err != nil {
			return err
		}
		if err := errors.Join(peer.nl.LinkSetUp(l), sys.SetOffload("eth0", sys.GRO, true)); err != nil {
			return err
		}
		seen, err = packetSocket("tun0")
		return err
	})
	t.Cleanup(func() { must(t, unix.Close(seen)) })
	state := State{
		TUN: "tun0", Port: ownPort, Links: []string{"eth0"}, Underlay: peerAddr[:], Own: prefixes("10.2.0.0/24", "fd00:2::/64"),
		Peers: []Peer{{ID: "host", Accept: hostAddr[:], Prefixes: prefixes("10.1.0.0/24", "fd00:1::/64")}},
	}
	update := func() { r.peer.Do(func() error { return peer.Update(state) }) }
	update()
	r.peer.Netlink(func(nl *sys.Netlink) error {
		l, err := nl.LinkByName(jointIn)
		if err == nil {
			joint = l.Attrs().Index
		}
		return err
	})
	// received are the packets that came out of the peer's TUN device.
	received := func() (out [][]byte) {
		for {
			buf := make([]byte, 1<<16)
			n, from, err := unix.Recvfrom(seen, buf, 0)
			if err != nil {
				return out
			}
			if l, ok := from.(*unix.SockaddrLinklayer); ok && l.Pkttype != unix.PACKET_OUTGOING && bytes.Contains(buf[:n], []byte("xxxxx")) {
				out = append(out, buf[:n])
			}
		}
	}
	// through counts packets that have gone through the joint.
	through := func() (n uint64) {
		r.peer.Netlink(func(nl *sys.Netlink) error {
			l, err := nl.LinkByName(jointIn)
			if err == nil {
				n = l.Attrs().Statistics.TxPackets
			}
			return err
		})
		return n
	}
	const segments, size = 8, 1000
	for six := range 2 {
		pkt := tcp(six, header.TCPFields{Flags: header.TCPAck, Window: 1000}, segments*size).bytes()
		r.superPacket(pkt, 20+20*six, size)
		var got [][]byte
		payload := 0
		for deadline := time.Now().Add(patience); payload < segments*size && time.Now().Before(deadline); time.Sleep(time.Millisecond) {
			for _, p := range received() {
				got = append(got, p)
				payload += len(p) - (len(pkt) - segments*size)
			}
		}
		if payload != segments*size || len(got) > segments/2 {
			t.Errorf("IPv%d: %d of %d bytes came, in %d packets", 4+2*six, payload, segments*size, len(got))
		}
		if c := peer.Counts("host"); c.RxPackets != uint64(segments*(six+1)) {
			t.Errorf("IPv%d: counts %+v", 4+2*six, c)
		}
	}
	if n := through(); n < 2*segments {
		t.Errorf("%d packets have gone through the joint, of %d segments", n, 2*segments)
	}
	// What is not TCP is not joined.
	for six := range 2 {
		before := through()
		r.send(udp(six, 100).bytes())
		var got [][]byte
		for deadline := time.Now().Add(patience); len(got) == 0 && time.Now().Before(deadline); time.Sleep(time.Millisecond) {
			got = received()
		}
		if n := through() - before; len(got) != 1 || n != 0 {
			t.Errorf("IPv%d: of one datagram %d came, %d through the joint", 4+2*six, len(got), n)
		}
	}
	// A packet that was not checked.
	to := unix.SockaddrLinklayer{Protocol: htons(unix.ETH_P_IP), Ifindex: joint, Halen: 6}
	copy(to.Addr[:], jointMAC)
	r.peer.Do(func() error { return unix.Sendto(seen, udp(0, 100).bytes(), 0, &to) })
	time.Sleep(50 * time.Millisecond)
	if got := received(); len(got) != 0 {
		t.Errorf("a packet that nobody has checked came out of the joint: % x", got)
	}
	// Without a port there is no joint. One of somebody else is left alone.
	there := func() (is bool) {
		r.peer.Netlink(func(nl *sys.Netlink) error {
			_, err := nl.LinkByName(jointIn)
			is = err == nil
			return nil
		})
		return is
	}
	state.Port = 0
	if update(); there() {
		t.Error("the joint stays though nothing comes by udp")
	}
	state.Port = ownPort
	if update(); !there() {
		t.Error("no joint")
	}
	if !peer.Whole() {
		t.Error("something is missing, right after the update")
	}
	r.peer.Netlink(func(nl *sys.Netlink) error {
		l, err := nl.LinkByName(jointIn)
		if err != nil {
			return err
		}
		return nl.LinkDel(l)
	})
	if peer.Whole() {
		t.Error("nobody misses the joint")
	}
	if update(); !there() || !peer.Whole() {
		t.Error("the joint does not return")
	}
	for _, name := range []string{jointIn, jointOut} {
		r.peer.Netlink(func(nl *sys.Netlink) error {
			l, err := nl.LinkByName(name)
			if err != nil {
				return err
			}
			return nl.LinkSetDown(l)
		})
		if peer.Whole() {
			t.Errorf("%s is down, and nobody notices", name)
		}
		if update(); !peer.Whole() {
			t.Errorf("%s stays down", name)
		}
	}
	r.peer.Do(Remove)
	if there() || peer.Whole() {
		t.Error("the joint stays, or nobody misses the programs")
	}
	r.peer.Netlink(func(nl *sys.Netlink) error {
		return nl.LinkAdd(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: jointIn}, PeerName: "other"})
	})
	r.peer.Do(func() error {
		if err := peer.Update(state); err == nil || !strings.Contains(err.Error(), jointIn) {
			t.Errorf("with a device of somebody else: %v", err)
		}
		return Remove()
	})
	if !there() {
		t.Error("a device of somebody else was removed")
	}
}

// TestUplinks sends and receives by devices that lie above a network card.
func TestUplinks(t *testing.T) {
	const name = "up0"
	attrs := netlink.LinkAttrs{Name: name}
	bond := netlink.NewLinkBond(attrs)
	bond.Mode, bond.Miimon = netlink.BOND_MODE_ACTIVE_BACKUP, 100
	for _, tc := range []struct {
		name string
		link netlink.Link // above eth0
		both bool         // the peer needs one, too
		port bool         // eth0 becomes its port
	}{
		{"bridge", &netlink.Bridge{LinkAttrs: attrs}, false, true},
		{"VLAN", &netlink.Vlan{LinkAttrs: attrs, VlanId: 7}, true, false},
		{"bond", bond, false, true},
		{"macvlan", &netlink.Macvlan{LinkAttrs: attrs, Mode: netlink.MACVLAN_MODE_BRIDGE}, false, false},
	} {
		t.Run(tc.name, func(t *testing.T) {
			r := newRig(t, 0)
			above := func(n *namespace.Namespace, addrs [2]netip.Addr) (lacks bool) {
				n.Netlink(func(nl *sys.Netlink) error {
					eth, err := nl.LinkByName("eth0")
					if err != nil {
						return err
					}
					tc.link.Attrs().ParentIndex = 0
					if !tc.port {
						tc.link.Attrs().ParentIndex = eth.Attrs().Index
					}
					if err := nl.LinkAdd(tc.link); errors.Is(err, unix.EOPNOTSUPP) {
						lacks = true
						return nil
					} else if err != nil {
						return err
					}
					own, err := nl.AddrList(eth, netlink.FAMILY_ALL)
					if err != nil {
						return err
					}
					for _, a := range own {
						err = errors.Join(err, nl.AddrDel(eth, &a))
					}
					up, lerr := nl.LinkByName(name)
					if err = errors.Join(err, lerr); err != nil {
						return err
					}
					if tc.port {
						err = errors.Join(nl.LinkSetDown(eth), nl.LinkSetMaster(eth, up), nl.LinkSetUp(eth))
					}
					return errors.Join(err, settle(nl, name, addrs))
				})
				return lacks
			}
			if above(r.host, hostAddr) {
				t.Skip("this kernel has no such device")
			}
			if tc.both {
				above(r.peer, peerAddr)
			}
			r.state.Links = []string{name}
			r.state.Peers[0].Way.Link = name
			r.update()
			if out, _ := r.send(udp(0, 100).bytes()); out == nil {
				t.Error("not sent by the kernel")
			}
			var raw, seen int
			r.peer.Do(func() (err error) {
				raw, err = unix.Socket(unix.AF_INET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_IPIP)
				return err
			})
			defer unix.Close(raw)
			r.host.Do(func() (err error) { seen, err = packetSocket("tun0"); return err })
			defer unix.Close(seen)
			in := udp(0, 100)
			in.src, in.dst = far[0], pod[0]
			pkt, buf := in.bytes(), make([]byte, 1<<16)
			must(t, unix.Sendto(raw, pkt, 0, &unix.SockaddrInet4{Addr: hostAddr[0].As4()}))
			for deadline := time.Now().Add(20 * time.Second); ; time.Sleep(time.Millisecond) {
				n, from, err := unix.Recvfrom(seen, buf, 0)
				if l, ok := from.(*unix.SockaddrLinklayer); err == nil && ok && l.Pkttype != unix.PACKET_OUTGOING && bytes.Equal(buf[:n], pkt) {
					break
				}
				if time.Now().After(deadline) {
					t.Fatalf("not received by the kernel: %+v", r.path.Counts("peer"))
				}
			}
		})
	}
}

// TestFilters checks what is attached, and that filters of others stay.
func TestFilters(t *testing.T) {
	r := newRig(t, 0)
	r.state.Port = 0
	r.update()
	names := func() (out []string) {
		r.host.Netlink(func(nl *sys.Netlink) error {
			for _, dev := range []string{"tun0", "eth0"} {
				l, err := nl.LinkByName(dev)
				if err != nil {
					return err
				}
				for _, parent := range []uint32{netlink.HANDLE_MIN_INGRESS, netlink.HANDLE_MIN_EGRESS} {
					list, err := nl.FilterList(l, parent)
					if err != nil && !errors.Is(err, unix.EINVAL) {
						return err
					}
					for _, f := range list {
						out = append(out, dev+" "+f.(*netlink.BpfFilter).Name)
					}
				}
			}
			return nil
		})
		return out
	}
	check := func(when string, want ...string) {
		t.Helper()
		if got := names(); fmt.Sprint(got) != fmt.Sprint(want) {
			t.Errorf("%s: %q, want %q", when, got, want)
		}
	}
	check("on", "tun0 tulle_send", "eth0 tulle_receive")
	r.host.Netlink(func(nl *sys.Netlink) error {
		l, err := nl.LinkByName("eth0")
		if err != nil {
			return err
		}
		return nl.FilterAdd(&netlink.BpfFilter{
			FilterAttrs: netlink.FilterAttrs{LinkIndex: l.Attrs().Index, Parent: netlink.HANDLE_MIN_INGRESS, Handle: 1, Priority: 9000, Protocol: unix.ETH_P_ALL},
			Fd:          r.path.programs.Receive.FD(), Name: "other", DirectAction: true,
		})
	})
	check("beside another", "tun0 tulle_send", "eth0 tulle_receive", "eth0 other")
	r.state.Links = nil
	r.update()
	check("without the link", "tun0 tulle_send", "eth0 other")
	r.state.Links = []string{"eth0"}
	r.update()
	// The next run replaces the programs, and leaves none on links that it does not use.
	var next *Path
	r.host.Do(func() (err error) { next, err = Open(); return err })
	defer next.Close()
	r.state.Links = nil
	r.host.Do(func() error { return next.Update(r.state) })
	check("the next run, without the link", "tun0 tulle_send", "eth0 other")
	if out, _ := r.send(udp(0, 10).bytes()); out == nil || next.Counts("peer").TxPackets != 1 {
		t.Errorf("the next run's program does not carry: %+v", next.Counts("peer"))
	}
	r.host.Do(Remove)
	check("removed", "eth0 other")
	r.host.Netlink(func(nl *sys.Netlink) error {
		list, err := nl.QdiscList(nil)
		for _, q := range list {
			if q.Type() == "clsact" && q.Attrs().LinkIndex == r.index {
				t.Error("the TUN device still has a clsact qdisc")
			}
		}
		return err
	})
	r.host.Do(Remove)
}

// TestCapability opens the programs as a process that may administer networks and nothing else, and as one with CAP_BPF besides.
func TestCapability(t *testing.T) {
	for _, bpf := range []uint32{0, 1 << (unix.CAP_BPF - 32)} {
		n := namespace.New(t)
		n.Do(func() error { // on a thread that ends with it
			head := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
			var data [2]unix.CapUserData
			data[0].Effective = 1<<unix.CAP_NET_ADMIN | 1<<unix.CAP_NET_RAW
			data[1].Effective = bpf
			data[0].Permitted, data[1].Permitted = data[0].Effective, data[1].Effective
			if err := unix.Capset(&head, &data[0]); err != nil {
				return err
			}
			p, err := Open()
			if err == nil {
				err = p.Update(State{TUN: "lo", Port: 6080})
				p.Close()
			}
			if bpf == 0 && (err == nil || !strings.Contains(err.Error(), "CAP_BPF")) {
				t.Errorf("without CAP_BPF: %v", err)
			}
			if bpf != 0 && err != nil {
				t.Errorf("with CAP_BPF: %v", err)
				if refused, ok := errors.AsType[*ebpf.VerifierError](err); ok {
					t.Logf("%+v", refused)
				}
			}
			return Remove()
		})
	}
}
