package underlay

import (
	"bytes"
	"errors"
	"fmt"
	"net/netip"
	"os/exec"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tulle-net/tulle/internal/sys"
)

// sendTrain sends data as a train between two single datagrams, and checks that
// all arrive, in order.
func sendTrain(t *testing.T, from, to *Socket, dest *Dest, segment, count int) SendResult {
	t.Helper()
	data := pattern(count, segment*count-segment/2)
	b := NewSendBatch(8, 512)
	b.Begin(dest, 0x10)
	b.Append([]byte("before"))
	b.End(0)
	b.Begin(dest, 0x20)
	for rest, n := data, 1; len(rest) > 0; n = 3*n%400 + 1 {
		n = min(n, len(rest))
		b.Append(rest[:n])
		rest = rest[n:]
	}
	b.End(segment)
	b.Begin(dest, 0x30)
	b.Append([]byte("after"))
	b.End(0)
	res, err := from.Send(b)
	if err != nil || res.Sent != count+2 || res.Dropped != 0 {
		t.Fatalf("Send: %+v, %v; want %d sent", res, err, count+2)
	}
	got := collect(t, to, count+2)
	if string(got[0].data) != "before" || got[0].tos != 0x10 || string(got[count+1].data) != "after" || got[count+1].tos != 0x30 {
		t.Fatalf("neighbours of the train came as %q, %q", got[0].data, got[count+1].data)
	}
	for i, p := range got[1 : count+1] {
		if want := data[i*segment : min((i+1)*segment, len(data))]; !bytes.Equal(p.data, want) || p.tos != 0x20 {
			t.Fatalf("datagram %d of the train: %d bytes tos %#x, want %d", i, len(p.data), p.tos, len(want))
		}
	}
	return res
}

// The kernel really refuses trains, for three reasons that it has; not one
// datagram is lost, trains stay off for a while and come back by themselves.
func TestGSORefused(t *testing.T) {
	eachFamily(t, func(t *testing.T, six bool) {
		// EINVAL: a socket that makes no UDP checksums cannot segment (udp_send_skb).
		t.Run("checksum off", func(t *testing.T) {
			l := newLink(t, 1500)
			from, to := l.udpPair(six)
			dest := NewDest(to.Local())
			noCheck := func(v int) {
				t.Helper()
				if err := sys.SetInt(from.fd, unix.SOL_SOCKET, unix.SO_NO_CHECK, v, "SO_NO_CHECK"); err != nil {
					t.Fatal(err)
				}
				if six {
					// IPv6 takes datagrams without checksum only where allowed.
					if err := sys.SetInt(to.fd, unix.SOL_UDP, unix.UDP_NO_CHECK6_RX, 1, "UDP_NO_CHECK6_RX"); err != nil {
						t.Fatal(err)
					}
					if err := sys.SetInt(from.fd, unix.SOL_UDP, unix.UDP_NO_CHECK6_TX, v, "UDP_NO_CHECK6_TX"); err != nil {
						t.Fatal(err)
					}
				}
			}
			noCheck(1)
			if res := sendTrain(t, from, to, dest, 1000, 20); res.GSOFallbacks != 1 || res.Messages != 22 {
				t.Errorf("first: %+v, want a fallback", res)
			}
			if dest.GSO() {
				t.Error("trains are still on")
			}
			first := dest.gso.retry.Load() + int64(time.Hour) // however long the next one takes, it is off yet
			dest.gso.retry.Store(first)
			if res := sendTrain(t, from, to, dest, 1000, 20); res.GSOFallbacks != 1 || dest.gso.retry.Load() != first {
				t.Errorf("while off: %+v, retry %d then %d", res, first, dest.gso.retry.Load())
			}
			dest.gso.retry.Store(1) // the time has come; still refused
			if res := sendTrain(t, from, to, dest, 1000, 20); res.GSOFallbacks != 1 || dest.gso.retry.Load() <= 1 {
				t.Errorf("retry: %+v, next at %d", res, dest.gso.retry.Load())
			}
			if dest.gso.backoff.Load() != 4*int64(minGSORetry) {
				t.Errorf("backoff %d after two refusals", dest.gso.backoff.Load())
			}
			noCheck(0)
			dest.gso.retry.Store(1)
			if res := sendTrain(t, from, to, dest, 1000, 20); res.GSOFallbacks != 0 || !dest.GSO() || res.Messages != 3 {
				t.Errorf("when taken again: %+v, GSO %v", res, dest.GSO())
			}
		})

		// EINVAL: more datagrams than the kernel takes (UDP_MAX_SEGMENTS).
		t.Run("too many segments", func(t *testing.T) {
			l := newLink(t, 1500)
			from, to := l.udpPair(six)
			if res := sendTrain(t, from, to, NewDest(to.Local()), 40, 200); res.GSOFallbacks != 1 {
				t.Errorf("%+v, want a fallback", res)
			}
		})

		// EMSGSIZE: a train above the limit of an IP packet.
		t.Run("above 64 KiB", func(t *testing.T) {
			l := newLink(t, 1500)
			from, to := l.udpPair(six)
			if res := sendTrain(t, from, to, NewDest(to.Local()), 1400, 50); res.GSOFallbacks != 1 {
				t.Errorf("%+v, want a fallback", res)
			}
		})

		// EIO: UDP-Lite, whose checksum covers what it likes (udp_send_skb).
		t.Run("UDP-Lite", func(t *testing.T) {
			if fd, err := sys.Socket(unix.AF_INET, unix.SOCK_DGRAM, unix.IPPROTO_UDPLITE); err == unix.EPROTONOSUPPORT {
				t.Skip("this kernel has no UDP-Lite")
			} else if err == nil {
				sys.Close(fd)
			}
			l := newLink(t, 1500)
			lite := func(h *host, a netip.Addr) *Socket {
				return h.open(func() (*Socket, error) { return openLite(netipPort(a, 0)) })
			}
			from, to := lite(l.a, addrA[six]), lite(l.b, addrB[six])
			dest := NewDest(to.Local())
			if res := sendTrain(t, from, to, dest, 1000, 30); res.GSOFallbacks != 1 || dest.GSO() {
				t.Errorf("%+v, GSO %v, want a fallback", res, dest.GSO())
			}
		})

		// EIO before Linux 6.11, which segments for such a device in software.
		t.Run("device without offload", func(t *testing.T) {
			l := newLink(t, 1500)
			l.a.ethtool("-K", "eth0", "tx", "off", "tso", "off", "gso", "off", "tx-udp-segmentation", "off")
			from, to := l.udpPair(six)
			res := sendTrain(t, from, to, NewDest(to.Local()), 1000, 30)
			t.Logf("this kernel: %d fallbacks", res.GSOFallbacks)
		})

		// EIO: IPsec on the way.
		t.Run("xfrm", func(t *testing.T) {
			l := newLink(t, 1500)
			if err := l.espBetween(six); err != nil {
				t.Skipf("this kernel has no ESP: %v", err)
			}
			from, to := l.udpPair(six)
			dest := NewDest(to.Local())
			if res := sendTrain(t, from, to, dest, 1000, 30); res.GSOFallbacks != 1 || dest.GSO() {
				t.Errorf("%+v, GSO %v, want a fallback", res, dest.GSO())
			}
		})
	})
}

// openLite is openUDP for UDP-Lite (RFC 3828).
func openLite(bind netip.AddrPort) (*Socket, error) {
	domain := unix.AF_INET
	if bind.Addr().Is6() {
		domain = unix.AF_INET6
	}
	fd, err := sys.Socket(domain, unix.SOCK_DGRAM, unix.IPPROTO_UDPLITE)
	if err != nil {
		return nil, err
	}
	s := &Socket{fd: fd}
	if err := errors.Join(s.configure(Options{}, domain, false), sys.Bind(fd, bind)); err != nil {
		sys.Close(fd)
		return nil, err
	}
	if s.local, err = sys.LocalAddr(fd); err == nil {
		s.poller, err = sys.NewPoller(fd)
	}
	if err != nil {
		sys.Close(fd)
	}
	return s, err
}

func (h *host) ethtool(args ...string) {
	h.t.Helper()
	h.Do(func() error {
		if out, err := exec.Command("ethtool", args...).CombinedOutput(); err != nil {
			return fmt.Errorf("ethtool %v: %w: %s", args, err, out)
		}
		return nil
	})
}

// Datagrams above the link's MTU are refused in a train and alone: that says
// nothing about trains, which stay on, and what fits is not disturbed.
func TestTrainOfTooBig(t *testing.T) {
	l := newLink(t, 1400)
	eachFamily(t, func(t *testing.T, six bool) {
		from, to := l.udpPair(six)
		dest := NewDest(to.Local())
		b := NewSendBatch(8, 8)
		for _, segment := range []int{1000, 1390, 900} {
			b.Begin(dest, 0)
			b.Append(pattern(segment, 4*segment-1000+100))
			b.End(segment)
		}
		res, err := from.Send(b)
		// 1000: 3100 bytes, 4 datagrams. 1390: 4660, of which the last, 490, fits. 900: 2700, 3.
		if err != nil || res.Sent != 8 || res.Dropped != 3 || res.TooBig != 3 {
			t.Errorf("Send: %+v, %v; want 8 sent, 3 too big", res, err)
		}
		collect(t, to, 8)
	})
}

// A singles destination gets no trains, and that is no refusal of the kernel.
func TestSinglesDest(t *testing.T) {
	eachFamily(t, func(t *testing.T, six bool) {
		from, to := newLink(t, 1500).udpPair(six)
		dest := NewDest(to.Local()).WithSingles(true)
		if res := sendTrain(t, from, to, dest, 700, 9); res.Messages != 11 || res.GSOFallbacks != 0 || dest.GSO() {
			t.Errorf("%+v, GSO %v; want 11 messages and no fallback", res, dest.GSO())
		}
	})
}
