package device

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"net"
	"net/netip"
	"os"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/tulle-net/tulle/internal/sys"
	"github.com/tulle-net/tulle/tunnel/header"
	"github.com/tulle-net/tulle/tunnel/offload"
)

// newRouter makes a host which forwards between two TUN devices: what is written
// to the first for an address behind the second is read from the second.
func newRouter(t testing.TB) (in, out *Device) {
	t.Helper()
	h := newHost(t)
	h.Do(func() error {
		for _, s := range []string{"ipv4/ip_forward", "ipv6/conf/all/forwarding"} {
			if err := os.WriteFile("/proc/sys/net/"+s, []byte("1"), 0); err != nil {
				return err
			}
		}
		return nil
	})
	in, out = h.open(Options{Name: "in0"}), h.open(Options{Name: "out0"})
	h.Netlink(func(nl *sys.Netlink) error {
		for i, d := range []*Device{in, out} {
			for _, a := range []string{fmt.Sprintf("10.%d.0.1/24", i+1), fmt.Sprintf("fd00:%d::1/64", i+1)} {
				p := netip.MustParsePrefix(a)
				err := nl.AddrAdd(&netlink.Device{LinkAttrs: netlink.LinkAttrs{Index: d.Index()}}, &netlink.Addr{
					IPNet: &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}, Flags: unix.IFA_F_NODAD})
				if err != nil {
					return err
				}
			}
		}
		return nil
	})
	return in, out
}

// A super is a packet of TCP or UDP from behind the router's first device to
// behind its second, as one or many segments.
type super struct {
	six, tcp bool
	segment  int
	payload  []byte
}

func (s super) headers() (ip, l4 int) {
	ip, l4 = 20, 8
	if s.six {
		ip = 40
	}
	if s.tcp {
		l4 = 20
	}
	return ip, l4
}

func (s super) proto() uint8 {
	if s.tcp {
		return unix.IPPROTO_TCP
	}
	return unix.IPPROTO_UDP
}

func (s super) addrs() (src, dst []byte) {
	if s.six {
		return netip.MustParseAddr("fd00:1::2").AsSlice(), netip.MustParseAddr("fd00:2::2").AsSlice()
	}
	return netip.MustParseAddr("10.1.0.2").AsSlice(), netip.MustParseAddr("10.2.0.2").AsSlice()
}

// build makes the packet with the pseudo-header's sum in place of its checksum.
func (s super) build() (h offload.VnetHdr, pkt []byte) {
	ip, l4 := s.headers()
	src, dst := s.addrs()
	pkt = make([]byte, ip+l4, ip+l4+len(s.payload))
	if s.six {
		pkt[0] = 0x60
		binary.BigEndian.PutUint16(pkt[4:], uint16(l4+len(s.payload)))
		pkt[6], pkt[7] = s.proto(), 64
		copy(pkt[8:], src)
		copy(pkt[24:], dst)
	} else {
		pkt[0] = 0x45
		binary.BigEndian.PutUint16(pkt[2:], uint16(ip+l4+len(s.payload)))
		pkt[6] = 0x40 // DF
		pkt[8], pkt[9] = 64, s.proto()
		copy(pkt[12:], src)
		copy(pkt[16:], dst)
		binary.BigEndian.PutUint16(pkt[10:], header.Checksum(pkt[:20]))
	}
	t := pkt[ip:]
	binary.BigEndian.PutUint16(t[0:], 4000)
	binary.BigEndian.PutUint16(t[2:], 5000)
	h = offload.VnetHdr{Flags: offload.NeedsCsum, HdrLen: uint16(ip + l4), CsumStart: uint16(ip), CsumOffset: 6}
	gso := uint8(offload.GSOUDPL4)
	if s.tcp {
		binary.BigEndian.PutUint32(t[4:], 1000)
		t[12], t[13] = 5<<4, 0x18 // ACK, PSH
		binary.BigEndian.PutUint16(t[14:], 500)
		h.CsumOffset = 16
		gso = offload.GSOTCPv4
		if s.six {
			gso = offload.GSOTCPv6
		}
	} else {
		binary.BigEndian.PutUint16(t[4:], uint16(l4+len(s.payload)))
	}
	if len(s.payload) > s.segment {
		h.GSOType, h.GSOSize = gso, uint16(s.segment)
	}
	sum := header.Fold(header.PseudoSum(s.proto(), src, dst, uint32(l4+len(s.payload))))
	binary.BigEndian.PutUint16(t[h.CsumOffset:], sum)
	return h, append(pkt, s.payload...)
}

// write hands the packet to d: headers apart from the payload, which is cut into
// uneven slices.
func (s super) write(d *Device, cut int) error {
	h, pkt := s.build()
	ip, l4 := s.headers()
	var hdr [VnetHdrLen]byte
	h.Encode(hdr[:])
	iov := [][]byte{hdr[:], pkt[:ip+l4]}
	for rest := pkt[ip+l4:]; len(rest) > 0; {
		n := min(cut, len(rest))
		iov, rest = append(iov, rest[:n]), rest[n:]
	}
	return d.Queues()[0].Write(iov)
}

// read returns the next packet for the far side's address, skipping what the
// kernel itself sends into a device.
func (s super) read(t testing.TB, d *Device) (h offload.VnetHdr, pkt []byte) {
	t.Helper()
	q := d.Queues()[0]
	_, dst := s.addrs()
	timer := time.AfterFunc(patience, q.Wake)
	defer timer.Stop()
	buf := make([]byte, VnetHdrLen+MaxPacket)
	for {
		n, err := q.Read(buf)
		if err == sys.ErrAgain {
			if _, err := q.Wait(); err != nil {
				t.Fatalf("no packet: %v", err)
			}
			continue
		}
		if err != nil {
			t.Fatal(err)
		}
		h.Decode(buf)
		pkt = buf[VnetHdrLen:n]
		at := 16
		if s.six {
			at = 24
		}
		if len(pkt) > at+len(dst) && bytes.Equal(pkt[at:at+len(dst)], dst) && (pkt[0]>>4 == 6) == s.six {
			return h, pkt
		}
	}
}

// checksumOK verifies a complete TCP or UDP checksum.
func (s super) checksumOK(pkt []byte) bool {
	ip, _ := s.headers()
	src, dst := s.addrs()
	return header.Fold(header.Sum(pkt[ip:], header.PseudoSum(s.proto(), src, dst, uint32(len(pkt)-ip)))) == 0xffff
}

func payload(n int) []byte {
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(i*7 + i>>8)
	}
	return b
}

func eachSuper(t *testing.T, f func(t *testing.T, s super)) {
	for _, six := range []bool{false, true} {
		for _, tcp := range []bool{true, false} {
			for _, c := range []struct{ segment, size int }{
				{1000, 1}, {1000, 1000}, {1000, 1001}, {1000, 2000}, {100, 6400}, {100, 6350}, {1400, 46*1400 - 1}, {1200, 65535 - 60},
			} {
				if !tcp && c.size > 64*c.segment {
					continue
				}
				name := map[bool]string{false: "UDP", true: "TCP"}[tcp] + map[bool]string{false: "4", true: "6"}[six]
				t.Run(fmt.Sprintf("%s/%d/%d", name, c.segment, c.size), func(t *testing.T) {
					f(t, super{six, tcp, c.segment, payload(c.size)})
				})
			}
		}
	}
}

// Super-packets written to one device come whole out of another, through the
// kernel's forwarding.
func TestSuperPackets(t *testing.T) {
	in, out := newRouter(t)
	if !out.Offloads().USO {
		t.Log("this kernel has no USO: UDP super-packets are cut on the way")
	}
	eachSuper(t, func(t *testing.T, s super) {
		if err := s.write(in, 777); err != nil {
			t.Fatal(err)
		}
		if !s.tcp && !out.Offloads().USO {
			s.readSegments(t, out)
			return
		}
		sent, want := s.build()
		h, pkt := s.read(t, out)
		if h.GSOType != sent.GSOType || h.GSOSize != sent.GSOSize || h.Flags&offload.NeedsCsum == 0 ||
			h.CsumStart != sent.CsumStart || h.CsumOffset != sent.CsumOffset {
			t.Errorf("virtio-net header %+v, written %+v", h, sent)
		}
		if s.six {
			want[7]-- // hop limit
		} else {
			want[8]--
			binary.BigEndian.PutUint16(want[10:], 0)
			binary.BigEndian.PutUint16(want[10:], header.Checksum(want[:20]))
		}
		if !bytes.Equal(pkt, want) {
			t.Errorf("packet of %d bytes differs from the %d written", len(pkt), len(want))
		}
	})
}

// readSegments reads the packet cut up by the kernel, and checks each part.
func (s super) readSegments(t *testing.T, d *Device) {
	t.Helper()
	ip, l4 := s.headers()
	for at := 0; at < len(s.payload); at += s.segment {
		h, pkt := s.read(t, d)
		want := s.payload[at:min(at+s.segment, len(s.payload))]
		if h.GSOType != offload.GSONone || h.Flags&offload.NeedsCsum != 0 {
			t.Errorf("at %d: virtio-net header %+v", at, h)
		}
		if !bytes.Equal(pkt[ip+l4:], want) || !s.checksumOK(pkt) {
			t.Fatalf("at %d: %d bytes, checksum right: %v; want %d bytes", at, len(pkt)-ip-l4, s.checksumOK(pkt), len(want))
		}
		if seq := binary.BigEndian.Uint32(pkt[ip+4:]); s.tcp && seq != uint32(1000+at) {
			t.Errorf("at %d: sequence %d", at, seq)
		}
	}
}

// A device without offloads gets the same, cut into packets with complete
// checksums.
func TestWithoutOffloads(t *testing.T) {
	in, out := newRouter(t)
	if err := sys.TunSetOffload(out.FD(), 0); err != nil {
		t.Fatal(err)
	}
	eachSuper(t, func(t *testing.T, s super) {
		if err := s.write(in, 4096); err != nil {
			t.Fatal(err)
		}
		s.readSegments(t, out)
	})
}

// A super-packet that the kernel refuses is told from a bad packet. If its kind
// has never been taken, the device goes down the ladder; if it has, it stays.
func TestLadder(t *testing.T) {
	for _, worked := range []bool{false, true} {
		for _, tcp := range []bool{false, true} {
			t.Run(fmt.Sprintf("worked=%v/tcp=%v", worked, tcp), func(t *testing.T) {
				in, out := newRouter(t)
				s := super{tcp: tcp, segment: 1000, payload: payload(3000)}
				before := in.Offloads()
				if !tcp && !before.USO {
					t.Skip("this kernel has no USO")
				}
				if worked {
					if err := s.write(in, 5000); err != nil {
						t.Fatal(err)
					}
					s.read(t, out)
				}
				h, pkt := s.build()
				h.GSOSize = 0 // EINVAL in virtio_net_hdr_to_skb
				var hdr [VnetHdrLen]byte
				h.Encode(hdr[:])
				if err := in.Queues()[0].Write([][]byte{hdr[:], pkt}); err != ErrGSO {
					t.Errorf("Write: %v, want ErrGSO", err)
				}
				want := before
				if !worked {
					want.USO = false
					if tcp {
						want = Offloads{}
					}
				}
				if got := in.Offloads(); got != want {
					t.Errorf("offloads %v, want %v", got, want)
				}
				// The kernel must have been told: the other way, it now cuts what this
				// device does not take.
				back := super{tcp: tcp, segment: 1000, payload: payload(3000)}
				if err := back.writeBack(out); err != nil {
					t.Fatal(err)
				}
				if hdr, _ := back.readBack(t, in); (hdr.GSOType != offload.GSONone) != worked {
					t.Errorf("comes with GSO type %d", hdr.GSOType)
				}
			})
		}
	}
	// Other malformed packets are no matter of offloads.
	in, _ := newRouter(t)
	if err := in.Queues()[0].Write([][]byte{make([]byte, VnetHdrLen), {0x00, 1, 2}}); err == nil || err == ErrGSO {
		t.Errorf("a packet of no IP version: %v", err)
	}
}

// writeBack and readBack are write and read in the other direction.
func (s super) writeBack(d *Device) error {
	h, pkt := s.build()
	var src [4]byte
	copy(src[:], pkt[12:16]) // swapping addresses changes neither sum
	copy(pkt[12:16], pkt[16:20])
	copy(pkt[16:20], src[:])
	var hdr [VnetHdrLen]byte
	h.Encode(hdr[:])
	return d.Queues()[0].Write([][]byte{hdr[:], pkt})
}

func (s super) readBack(t *testing.T, d *Device) (h offload.VnetHdr, pkt []byte) {
	t.Helper()
	q := d.Queues()[0]
	timer := time.AfterFunc(patience, q.Wake)
	defer timer.Stop()
	buf := make([]byte, VnetHdrLen+MaxPacket)
	for {
		n, err := q.Read(buf)
		if err == sys.ErrAgain {
			if _, err := q.Wait(); err != nil {
				t.Fatalf("no packet: %v", err)
			}
			continue
		}
		if err != nil {
			t.Fatal(err)
		}
		if pkt = buf[VnetHdrLen:n]; pkt[0]>>4 == 4 && bytes.Equal(pkt[16:20], []byte{10, 1, 0, 2}) {
			h.Decode(buf)
			return h, pkt
		}
	}
}

// A device that is down says so, and works again when it is up.
func TestDown(t *testing.T) {
	in, out := newRouter(t)
	s := super{segment: 1000, payload: payload(100)}
	if err := in.link(func(l netlink.Link) error { return in.nl.LinkSetDown(l) }); err != nil {
		t.Fatal(err)
	}
	if err := s.write(in, 1000); err != error(unix.EIO) {
		t.Errorf("Write to a device that is down: %v, want EIO", err)
	}
	if err := in.link(func(l netlink.Link) error { return in.nl.LinkSetUp(l) }); err != nil {
		t.Fatal(err)
	}
	if err := s.write(in, 1000); err != nil {
		t.Error(err)
	}
	s.read(t, out)
}

// What finds the queue full is counted.
func TestQueueFull(t *testing.T) {
	in, out := newRouter(t)
	const room = 50
	if err := out.SetTxQueueLen(room); err != nil {
		t.Fatal(err)
	}
	before, err := out.Stats()
	if err != nil {
		t.Fatal(err)
	}
	s := super{segment: 1000, payload: payload(100)}
	for range 4 * room {
		if err := s.write(in, 1000); err != nil {
			t.Fatal(err)
		}
	}
	after, err := out.Stats()
	if err != nil {
		t.Fatal(err)
	}
	if lost := after.TxDropped - before.TxDropped; lost < 2*room || lost > 4*room {
		t.Errorf("%d of %d packets counted as dropped, queue of %d", lost, 4*room, room)
	}
}

// step writes one packet and reads it from the far side, with nothing allocated.
func step(in, out *Queue, iov [][]byte, buf []byte) error {
	if err := in.Write(iov); err != nil {
		return err
	}
	for {
		n, err := out.Read(buf)
		if err == sys.ErrAgain {
			if _, err := out.Wait(); err != nil {
				return err
			}
			continue
		}
		if err != nil {
			return err
		}
		if n == len(iov[0])+len(iov[1]) {
			return nil
		}
	}
}

var steps = []struct {
	name string
	s    super
}{
	{"UDP64", super{segment: 100, payload: payload(64)}},
	{"TSO64K", super{tcp: true, segment: 1400, payload: payload(46 * 1400)}},
	{"TSO64Kv6", super{six: true, tcp: true, segment: 1400, payload: payload(46 * 1400)}},
	{"USO", super{segment: 1000, payload: payload(60 * 1000)}},
}

func (s super) iov() [][]byte {
	h, pkt := s.build()
	hdr := make([]byte, VnetHdrLen)
	h.Encode(hdr)
	return [][]byte{hdr, pkt}
}

func TestNoAllocations(t *testing.T) {
	in, out := newRouter(t)
	buf := make([]byte, VnetHdrLen+MaxPacket)
	for _, c := range steps {
		if !c.s.tcp && len(c.s.payload) > c.s.segment && !out.Offloads().USO {
			continue
		}
		iov := c.s.iov()
		var failed error
		if n := testing.AllocsPerRun(100, func() {
			if err := step(in.Queues()[0], out.Queues()[0], iov, buf); err != nil {
				failed = err
			}
		}); n != 0 || failed != nil {
			t.Errorf("%s: %v allocations, %v", c.name, n, failed)
		}
	}
}

// BenchmarkForward is one write, the kernel's forwarding, and one read.
func BenchmarkForward(b *testing.B) {
	in, out := newRouter(b)
	buf := make([]byte, VnetHdrLen+MaxPacket)
	for _, c := range steps {
		b.Run(c.name, func(b *testing.B) {
			if !c.s.tcp && len(c.s.payload) > c.s.segment && !out.Offloads().USO {
				b.Skip("this kernel has no USO")
			}
			iov := c.s.iov()
			b.ReportAllocs()
			b.SetBytes(int64(len(c.s.payload)))
			for b.Loop() {
				if err := step(in.Queues()[0], out.Queues()[0], iov, buf); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
