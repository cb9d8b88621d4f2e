package capture

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/gopacket"
	"github.com/google/gopacket/layers"
	"github.com/google/gopacket/pcapgo"
	"golang.org/x/net/bpf"

	"github.com/tulle-net/tulle/tunnel/header"
)

var (
	podA = netip.MustParseAddr("10.244.1.2")
	podB = netip.MustParseAddr("10.244.7.3")

	podA6 = netip.MustParseAddr("fd00:10:244:1::2")
	podB6 = netip.MustParseAddr("fd00:10:244:7::3")
)

// datagram is a UDP packet between two pods.
func datagram(src, dst netip.Addr, payload int) []byte {
	from, to := netip.AddrPortFrom(src, 4000), netip.AddrPortFrom(dst, 9)
	udp := header.AppendUDP(nil, from, to, make([]byte, payload))
	if src.Is4() {
		return append(header.AppendIPv4(nil, header.IPv4Fields{Src: src, Dst: dst, PayloadLen: len(udp), TTL: 64, Proto: header.ProtoUDP}), udp...)
	}
	return append(header.AppendIPv6(nil, header.IPv6Fields{Src: src, Dst: dst, PayloadLen: len(udp), HopLimit: 64, NextHeader: header.ProtoUDP}), udp...)
}

func offer(pkt []byte) *Packet {
	return &Packet{Point: FromPods, Peer: "b", Path: "udp", Inner: pkt, Data: [][]byte{pkt}}
}

func listen(t *testing.T, tap *Tap, f Filter, lim Limits) *Listener {
	t.Helper()
	l, err := tap.Listen(f, lim)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(l.Close)
	return l
}

func TestFilter(t *testing.T) {
	pkt := datagram(podA, podB, 10)
	udpTo := func(port uint32) []bpf.RawInstruction { // ip proto 17 and dst port
		prog, err := bpf.Assemble([]bpf.Instruction{
			bpf.LoadAbsolute{Off: 9, Size: 1}, bpf.JumpIf{Cond: bpf.JumpNotEqual, Val: 17, SkipTrue: 3},
			bpf.LoadAbsolute{Off: 22, Size: 2}, bpf.JumpIf{Cond: bpf.JumpNotEqual, Val: port, SkipTrue: 1},
			bpf.RetConstant{Val: 65535}, bpf.RetConstant{},
		})
		if err != nil {
			t.Fatal(err)
		}
		return prog
	}
	dropped := offer(pkt)
	dropped.Reason = "too_big"
	blind := &Packet{Point: FromPeer, Reason: "malformed", Data: [][]byte{{1, 2, 3}}}
	for _, tc := range []struct {
		name   string
		filter Filter
		pkt    *Packet
		want   bool
	}{
		{"everything", Filter{}, offer(pkt), true},
		{"drops: passed", Filter{Drops: true}, offer(pkt), false},
		{"drops: dropped", Filter{Drops: true}, dropped, true},
		{"point", Filter{Points: []Point{ToPods, FromPods}}, offer(pkt), true},
		{"another point", Filter{Points: []Point{ToPods}}, offer(pkt), false},
		{"reason", Filter{Reasons: []string{"loop", "too_big"}}, dropped, true},
		{"another reason", Filter{Reasons: []string{"loop"}}, dropped, false},
		{"peer", Filter{Peer: "b"}, offer(pkt), true},
		{"another peer", Filter{Peer: "c"}, offer(pkt), false},
		{"source", Filter{Pod: podA}, offer(pkt), true},
		{"destination", Filter{Pod: podB}, offer(pkt), true},
		{"another pod", Filter{Pod: podB.Next()}, offer(pkt), false},
		{"program", Filter{Program: udpTo(9)}, offer(pkt), true},
		{"another port", Filter{Program: udpTo(10)}, offer(pkt), false},
		{"no inner packet", Filter{}, blind, true},
		{"pod, no inner packet", Filter{Pod: podA}, blind, false},
		{"program, no inner packet", Filter{Program: udpTo(9)}, blind, false},
	} {
		t.Run(tc.name, func(t *testing.T) {
			var tap Tap
			l := listen(t, &tap, tc.filter, Limits{})
			tap.Offer(tc.pkt)
			if got := len(l.events) == 1; got != tc.want {
				t.Errorf("captured: %v, want %v", got, tc.want)
			}
		})
	}
}

func TestBadProgram(t *testing.T) {
	var tap Tap
	for _, prog := range [][]bpf.RawInstruction{
		{{Op: 0xffff}},
		{{Op: 0x15, Jt: 200, Jf: 200}, {Op: 6}},
		{{Op: 0}}, // does not return
	} {
		if _, err := tap.Listen(Filter{Program: prog}, Limits{}); err == nil {
			t.Errorf("%v is taken", prog)
		}
	}
	if tap.On() {
		t.Error("a refused listener listens")
	}
}

func TestListeners(t *testing.T) {
	var tap Tap
	if tap.On() {
		t.Fatal("on without listeners")
	}
	var all []*Listener
	for range MaxListeners {
		all = append(all, listen(t, &tap, Filter{}, Limits{}))
	}
	if _, err := tap.Listen(Filter{}, Limits{}); !errors.Is(err, ErrBusy) {
		t.Errorf("one too many: %v", err)
	}
	all[0].Close()
	all[0].Close()
	tap.Offer(offer(datagram(podA, podB, 1)))
	if len(all[0].events) != 0 || len(all[1].events) != 1 {
		t.Error("a closed listener gets packets, or another one none")
	}
	for _, l := range all {
		l.Close()
	}
	if tap.On() {
		t.Error("on after the last one has closed")
	}
}

// A captured packet is a copy: the data path writes to its buffers.
func TestCopies(t *testing.T) {
	var tap Tap
	l := listen(t, &tap, Filter{}, Limits{Snap: 20})
	pkt := datagram(podA, podB, 100)
	want := bytes.Clone(pkt)
	tap.Offer(offer(pkt))
	clear(pkt)
	e, err := l.Next(t.Context(), 0)
	if err != nil || !bytes.Equal(e.Data, want[:20]) || e.Length != len(want) {
		t.Errorf("%x, length %d, %v; want %x of %d", e.Data, e.Length, err, want[:20], len(want))
	}
}

// Whoever does not read costs a bounded amount, and learns how much was missed.
func TestLimits(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var tap Tap
		slow := listen(t, &tap, Filter{}, Limits{Rate: 100})
		big := listen(t, &tap, Filter{}, Limits{Rate: MaxRate})
		pkt := datagram(podA, podB, 60_000)
		for range 1000 {
			tap.Offer(offer(pkt))
		}
		if n := len(slow.events); n != 100 || slow.Missed() != 900 {
			t.Errorf("rate 100: %d captured, %d missed", n, slow.Missed())
		}
		if n := len(big.events); n*len(pkt) > maxBytes+len(pkt) || n < maxBytes/len(pkt) || big.Missed() != uint64(1000-n) {
			t.Errorf("%d packets of %d bytes wait, %d missed; the limit is %d bytes", n, len(pkt), big.Missed(), maxBytes)
		}
		time.Sleep(time.Second)
		tap.Offer(offer(pkt))
		if n := len(slow.events); n != 101 {
			t.Errorf("in the next second: %d captured", n)
		}
		// What has been read makes room.
		for len(big.events) > 0 {
			if _, err := big.Next(t.Context(), 0); err != nil {
				t.Fatal(err)
			}
		}
		tap.Offer(offer(pkt))
		if e, err := big.Next(t.Context(), 0); err != nil || e.Missed == 0 {
			t.Errorf("after reading: %d missed, %v", e.Missed, err)
		}
		if _, err := big.Next(t.Context(), time.Second); !errors.Is(err, ErrIdle) {
			t.Errorf("nothing to read: %v", err)
		}
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		if _, err := big.Next(ctx, 0); !errors.Is(err, context.Canceled) {
			t.Errorf("cancelled: %v", err)
		}
	})
}

// Outer headers are right: gopacket verifies lengths and checksums.
func TestOuter(t *testing.T) {
	for _, tc := range []struct {
		name     string
		src, dst string
		proto    uint8
		next     gopacket.LayerType
	}{
		{"udp4", "192.168.1.1:50000", "192.168.2.2:6080", header.ProtoUDP, layers.LayerTypeUDP},
		{"udp6", "[fd00::1]:50000", "[fd00::2]:6080", header.ProtoUDP, layers.LayerTypeUDP},
		{"ipip", "192.168.1.1:0", "192.168.2.2:0", header.ProtoIPv4, layers.LayerTypeIPv4},
		{"ip4 in ip6", "[fd00::1]:0", "[fd00::2]:0", header.ProtoIPv4, layers.LayerTypeIPv4},
	} {
		t.Run(tc.name, func(t *testing.T) {
			var tap Tap
			l := listen(t, &tap, Filter{}, Limits{})
			p := offer(datagram(podA, podB, 11))
			p.Point = ToPeer
			p.Outer = &Outer{Src: netip.MustParseAddrPort(tc.src), Dst: netip.MustParseAddrPort(tc.dst), Proto: tc.proto, TOS: 2}
			tap.Offer(p)
			e, err := l.Next(t.Context(), 0)
			if err != nil {
				t.Fatal(err)
			}
			first := layers.LayerTypeIPv4
			if p.Outer.Src.Addr().Is6() {
				first = layers.LayerTypeIPv6
			}
			got := gopacket.NewPacket(e.Data, first, gopacket.Default)
			if got.Layers()[1].LayerType() != tc.next {
				t.Fatalf("layers: %v", got)
			}
			if tc.proto == header.ProtoUDP {
				u, err := header.ParseUDP(e.Data[len(got.Layers()[0].LayerContents()):])
				src, dst := got.NetworkLayer().NetworkFlow().Src().Raw(), got.NetworkLayer().NetworkFlow().Dst().Raw()
				if err != nil || !u.ChecksumValid(src, dst) || !bytes.Equal(u.Payload(), p.Inner) {
					t.Errorf("UDP header: %v, payload %x", err, u.Payload())
				}
			}
		})
	}
}

// What Writer writes, another implementation reads back.
func TestWriter(t *testing.T) {
	var file bytes.Buffer
	w, err := NewWriter(&file, "tulle v1")
	if err != nil {
		t.Fatal(err)
	}
	at := time.Date(2026, 1, 2, 3, 4, 5, 678_901_234, time.UTC)
	var want [][]byte
	for i, p := range Points() {
		pkt := datagram(podA, podB, i) // lengths of all paddings
		want = append(want, pkt)
		if err := w.Write(Event{Time: at, Point: p, Length: len(pkt) + 5, Data: pkt}, "dropped: too_big"); err != nil {
			t.Fatal(err)
		}
	}
	r, err := pcapgo.NewNgReader(&file, pcapgo.DefaultNgReaderOptions)
	if err != nil {
		t.Fatal(err)
	}
	for i, p := range Points() {
		data, info, err := r.ReadPacketData()
		if err != nil {
			t.Fatal(err)
		}
		if iface, err := r.Interface(info.InterfaceIndex); err != nil || iface.Name != "tulle" || iface.LinkType != layers.LinkTypeRaw {
			t.Errorf("%s: interface %+v, %v", p, iface, err)
		}
		if !bytes.Equal(data, want[i]) || info.Length != len(want[i])+5 || !info.Timestamp.Equal(at) {
			t.Errorf("%s: %x, %+v", p, data, info)
		}
	}
	if _, _, err := r.ReadPacketData(); !errors.Is(err, io.EOF) {
		t.Errorf("after the last packet: %v", err)
	}
}

// The programs that people read captures with read them, and tshark says of each packet where it was seen.
func TestProgramsReadCaptures(t *testing.T) {
	path := filepath.Join(t.TempDir(), "c.pcapng")
	file, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	w, err := NewWriter(file, "tulle v1")
	if err != nil {
		t.Fatal(err)
	}
	var comments strings.Builder
	for _, p := range Points() {
		for _, pkt := range [][]byte{datagram(podA, podB, 7), datagram(podA6, podB6, 8)} {
			if err := w.Write(Event{Time: time.Unix(1, 0), Point: p, Length: len(pkt), Data: pkt}, "passed, peer b, path udp"); err != nil {
				t.Fatal(err)
			}
			fmt.Fprintf(&comments, "%s: passed, peer b, path udp\n", p)
		}
	}
	read := func(name string, args ...string) string {
		t.Helper()
		cmd := exec.CommandContext(t.Context(), name, args...)
		cmd.Stderr = t.Output()
		out, err := cmd.Output()
		if errors.Is(err, exec.ErrNotFound) {
			t.Skipf("needs %s: make deps", name)
		}
		if err != nil {
			t.Errorf("%v: %v", cmd, err)
		}
		return string(out)
	}
	if got := read("tcpdump", "-nr", path, "udp"); strings.Count(got, "\n") != 8 || strings.Count(got, " IP "+podA.String()) != 4 || strings.Count(got, " IP6 "+podA6.String()) != 4 {
		t.Errorf("tcpdump reads\n%s", got)
	}
	if got := read("tshark", "-r", path, "-T", "fields", "-e", "frame.comment"); got != comments.String() {
		t.Errorf("tshark reads\n%s", got)
	}
	if got := read("tshark", "-r", path, "-Y", `frame.comment contains "from-peer"`); strings.Count(got, "\n") != 2 {
		t.Errorf("tshark selects\n%s", got)
	}
}

func TestSummary(t *testing.T) {
	tcp := make([]byte, 20)
	binary.BigEndian.PutUint16(tcp, 1000)
	binary.BigEndian.PutUint16(tcp[2:], 80)
	binary.BigEndian.PutUint32(tcp[4:], 77)
	tcp[12], tcp[13] = 5<<4, 0x12
	ip4 := func(proto uint8, payload []byte) []byte {
		return append(header.AppendIPv4(nil, header.IPv4Fields{Src: podA, Dst: podB, PayloadLen: len(payload), TTL: 64, Proto: proto}), payload...)
	}
	six := datagram(netip.MustParseAddr("fd00::1"), netip.MustParseAddr("fd00::2"), 3)
	for _, tc := range []struct {
		pkt  []byte
		want string
	}{
		{datagram(podA, podB, 10), "10.244.1.2:4000 > 10.244.7.3:9 UDP, 38 bytes"},
		{six, "[fd00::1]:4000 > [fd00::2]:9 UDP, 51 bytes"},
		{ip4(header.ProtoTCP, tcp), "10.244.1.2:1000 > 10.244.7.3:80 TCP SYN+ACK seq 77, 40 bytes"},
		{ip4(header.ProtoICMP, []byte{8, 0, 0, 0, 0, 7, 0, 1}), "10.244.1.2 > 10.244.7.3 ICMP echo request id 7 seq 1, 28 bytes"},
		{ip4(header.ProtoIPv4, datagram(podB, podA, 0)), "10.244.1.2:4000 > 10.244.7.3:9 IP in IP (10.244.7.3 > 10.244.1.2), 48 bytes"},
		{ip4(132, []byte{0, 1, 0, 2}), "10.244.1.2 > 10.244.7.3 protocol SCTP, 24 bytes"},
		{[]byte{0x45, 0}, "no IP packet, 2 bytes"},
		{nil, "no IP packet, 0 bytes"},
	} {
		if got := Summary(tc.pkt, len(tc.pkt)); got != tc.want {
			t.Errorf("%x: %q, want %q", tc.pkt, got, tc.want)
		}
	}
}

// Summary reads what others sent: whatever that is, it does not panic.
func FuzzSummary(f *testing.F) {
	f.Add(datagram(podA, podB, 10))
	f.Add(datagram(netip.MustParseAddr("fd00::1"), netip.MustParseAddr("fd00::2"), 3))
	f.Fuzz(func(t *testing.T, pkt []byte) {
		if Summary(pkt, len(pkt)) == "" {
			t.Error("empty")
		}
	})
}

func BenchmarkNobodyLooks(b *testing.B) {
	var tap Tap
	for b.Loop() {
		if tap.On() {
			b.Fatal("on")
		}
	}
}
