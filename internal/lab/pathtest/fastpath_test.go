package pathtest

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/tulle-net/tulle/internal/api"
	"github.com/tulle-net/tulle/internal/testing/hosts"
)

// fastStage is a stage with pods of both families over one. wrap is a command in front of its agents.
func fastStage(t *testing.T, mode string, six bool, wrap ...string) *stage {
	t.Helper()
	n := hosts.New(t)
	s := &stage{net: n, a: n.Host("a"), b: n.Host("b"), router: n.Host("r")}
	a, b := addrA, addrB
	if six {
		a, b = "2001:db8:1::11", "2001:db8:2::12"
		s.a.Link("eth0", a+"/64", s.router, "toa", "2001:db8:1::1/64")
		s.b.Link("eth0", b+"/64", s.router, "tob", "2001:db8:2::1/64")
		s.router.Sysctl("net.ipv6.conf.all.forwarding", "1")
		s.a.IP("route add default via 2001:db8:1::1")
		s.b.IP("route add default via 2001:db8:2::1")
		a, b = "["+a+"]", "["+b+"]"
	} else {
		s.a.Link("eth0", a+"/24", s.router, "toa", "10.0.1.1/24")
		s.b.Link("eth0", b+"/24", s.router, "tob", "10.0.2.1/24")
		s.router.Sysctl("net.ipv4.ip_forward", "1")
		s.a.IP("route add default via 10.0.1.1")
		s.b.IP("route add default via 10.0.2.1")
	}
	s.a.Wrap, s.b.Wrap = wrap, wrap
	s.startFast(t, mode, a, b)
	return s
}

// startFast starts the agents of a and b, whose underlay addresses are given, and a pod on each.
func (s *stage) startFast(t *testing.T, mode, a, b string) {
	t.Helper()
	s.first = s.a.Agent("--bootstrap", "--join", b, "--cluster-cidr", "10.244.0.0/16,fd00:10:244::/48", "--config", writeFast(s.a, mode, true))
	s.second = s.b.Agent("--join", a, "--config", writeFast(s.b, mode, true))
	s.first.Ready(30 * time.Second)
	s.second.Ready(30 * time.Second)
	s.pod, s.other = s.first.Pod("web"), s.second.Pod("db")
	hosts.Within(t, 20*time.Second, "pods reach each other", func() error { return s.pod.Ping(s.other.IPv4()) })
}

func writeFast(h *hosts.Host, mode string, on bool) string {
	return h.WriteFile("tulle.yaml", fmt.Sprintf("paths: [%s]\nfast_path: %v\n", mode, on))
}

// fast waits until an agent says that the kernel carries packets, or does not for a reason.
func fast(t *testing.T, ag *hosts.Agent, on bool, reason string) {
	t.Helper()
	hosts.Within(t, 20*time.Second, fmt.Sprintf("the fast path of %s is on: %v", ag.Host.Name, on), func() error {
		st, err := ag.TryStatus()
		if err != nil {
			return err
		}
		if st.FastPath.On != on || !strings.Contains(st.FastPath.Reason, reason) {
			return fmt.Errorf("%+v", st.FastPath)
		}
		return nil
	})
}

// carries requires that the kernels of both hosts carry the bytes of a transfer in both directions, and the agents next to none of them.
func (s *stage) carries(t *testing.T, x *transfer) {
	t.Helper()
	for _, ag := range []*hosts.Agent{s.first, s.second} {
		was := ag.Status()
		x.progress(t, 10*time.Second)
		is, a, b := was, was.Counters, was.Counters
		hosts.Within(t, 10*time.Second, ag.Host.Name+": the kernel carries the transfer", func() error { // a part of the progress may have been under way before
			is = ag.Status()
			if b = is.Counters; b.FastTxPackets == a.FastTxPackets || b.FastRxPackets == a.FastRxPackets || b.FastTxBytes+b.FastRxBytes < a.FastTxBytes+a.FastRxBytes+500_000 {
				return fmt.Errorf("%+v, then %+v", a, b)
			}
			return nil
		})
		if n := b.TxBytes + b.RxBytes - a.TxBytes - a.RxBytes; n > 50_000 {
			t.Errorf("%s: the agent has carried %d bytes", ag.Host.Name, n)
		}
		p, q := was.Peers[0], is.Peers[0]
		if got, want := q.TxBytes+q.RxBytes-p.TxBytes-p.RxBytes, b.FastTxBytes+b.FastRxBytes-a.FastTxBytes-a.FastRxBytes; got < want*3/4 { // read one after the other
			t.Errorf("%s: %d bytes with the peer, %d by the fast path", ag.Host.Name, got, want)
		}
	}
}

// TestFastPath lets the kernels carry the packets of two pods, of both families over each: through the death of both agents, a
// capture, IPsec policies that come and go, and until nobody wants it any more.
func TestFastPath(t *testing.T) {
	t.Parallel()
	for _, tc := range []struct {
		name, mode string
		six        bool
	}{{"ipip over IPv4", "ipip", false}, {"ipip over IPv6", "ipip", true}, {"udp over IPv4", "udp", false}} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			mode := tc.mode
			s := fastStage(t, mode, tc.six)
			s.uses(t, 20*time.Second, mode)
			fast(t, s.first, true, "")
			fast(t, s.second, true, "")
			s.announced(t)
			for i, addr := range []netip.Addr{s.other.IPv4(), s.other.IPv6(), s.other.IPv4(), s.other.IPv6()} {
				if i == 2 { // the wire has passed super-packets whole so far
					s.a.Run("ethtool", "-K", "eth0", "tso", "off", "gso", "off")
					s.b.Run("ethtool", "-K", "eth0", "tso", "off", "gso", "off", "gro", "on")
				}
				x := s.transferTo(t, addr)
				s.carries(t, x)
				x.stop(t)
				s.sendsTrain(t, addr, 1200)
				for _, size := range []int{0, 1, 1000, 1300, 1452, 3000, 9000, 20000} { // larger ones in fragments, which are the agent's
					if err := s.pod.PingOnce(addr, size); err != nil {
						t.Errorf("%d bytes to %v: %v", size, addr, err)
					}
				}
			}
			s.cutsForPods(t)

			x := s.transfer(t)
			file := filepath.Join(t.TempDir(), "all.pcapng")
			_, errs, code := s.second.Tulle("capture", "--all", "-w", file, "--count", "200", "--duration", "20s", "tcp")
			if code != 0 {
				t.Errorf("tulle capture: %s", errs)
			}
			if got := tshark(t, file, "frame.number"); len(got) != 200 {
				t.Errorf("captured %d packets", len(got))
			}
			s.announced(t)
			s.carries(t, x)

			s.ipsec(t, x)
			s.death(t, x, mode, tc.six)

			// Not wanted any more. What was counted stays.
			was := s.first.Status()
			for _, h := range []*hosts.Host{s.a, s.b} {
				writeFast(h, mode, false)
			}
			for _, ag := range []*hosts.Agent{s.first, s.second} {
				if out, errs, code := ag.Tulle("reload"); code != 0 || !strings.Contains(out, "fast_path") {
					t.Errorf("tulle reload: %s%s", out, errs)
				}
				noPrograms(t, ag.Host)
			}
			x.progress(t, 10*time.Second)
			s.notLess(t, "off", was)
			writeFast(s.a, mode, true)
			s.first.Tulle("reload")
			fast(t, s.first, true, "")
			s.notLess(t, "on again", was)
			t.Logf("the longest pause in all that was %v", x.stop(t))
		})
	}
}

// notLess requires that what the first agent's kernel has carried is not less than before.
func (s *stage) notLess(t *testing.T, when string, was api.Status) {
	t.Helper()
	is := s.first.Status()
	if a, b := was.Counters, is.Counters; b.FastTxPackets < a.FastTxPackets || b.FastRxPackets < a.FastRxPackets || a.FastTxPackets == 0 {
		t.Errorf("%s: counted %+v, before that %+v", when, b, a)
	}
	if a, b := was.Peers[0], is.Peers[0]; b.TxBytes < a.TxBytes || b.RxBytes < a.RxBytes {
		t.Errorf("%s: with the peer %d and %d bytes, before that %d and %d", when, b.TxBytes, b.RxBytes, a.TxBytes, a.RxBytes)
	}
}

// announced waits until packets by udp may go the fast path, too: each host has to hear that the other one takes them.
func (s *stage) announced(t *testing.T) {
	t.Helper()
	hosts.Within(t, 10*time.Second, "the kernels carry pings", func() error {
		before := s.first.Status().Counters
		if err := s.pod.Ping(s.other.IPv4()); err != nil {
			return err
		}
		if is := s.first.Status().Counters; is.FastTxPackets == before.FastTxPackets || is.FastRxPackets == before.FastRxPackets {
			return fmt.Errorf("%+v", is)
		}
		return nil
	})
}

// agentTakes waits until the agent of b takes what comes to it.
func (s *stage) agentTakes(t *testing.T, when string) {
	t.Helper()
	hosts.Within(t, 8*time.Second, when+": the agent of b takes pings", func() error {
		before := s.second.Status().Counters
		if err := s.pod.Ping(s.other.IPv4()); err != nil {
			return err
		}
		if is := s.second.Status().Counters; is.FastRxPackets != before.FastRxPackets {
			return fmt.Errorf("%+v", is)
		}
		return nil
	})
}

// sendsTrain sends a UDP super-packet (UDP_SEGMENT) between the pods, whose datagrams arrive one by one.
func (s *stage) sendsTrain(t *testing.T, addr netip.Addr, size int) {
	t.Helper()
	const n = 10
	var in, out *net.UDPConn
	err := s.other.Do(func() (err error) {
		in, err = net.ListenUDP("udp", net.UDPAddrFromAddrPort(netip.AddrPortFrom(addr, 0)))
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	defer in.Close()
	err = s.pod.Do(func() (err error) {
		if out, err = net.DialUDP("udp", nil, in.LocalAddr().(*net.UDPAddr)); err != nil {
			return err
		}
		c, err := out.SyscallConn()
		if err != nil {
			return err
		}
		cerr := c.Control(func(fd uintptr) { err = unix.SetsockoptInt(int(fd), unix.SOL_UDP, unix.UDP_SEGMENT, size) })
		return errors.Join(err, cerr)
	})
	if err != nil {
		t.Fatal(err)
	}
	defer out.Close()
	data := make([]byte, n*size)
	rand.NewChaCha8([32]byte{}).Read(data)
	if _, err := out.Write(data); err != nil {
		t.Fatal(err)
	}
	_ = in.SetReadDeadline(time.Now().Add(20 * time.Second))
	buf := make([]byte, 1<<16)
	for i := range n {
		m, err := in.Read(buf)
		if err != nil || string(buf[:m]) != string(data[i*size:(i+1)*size]) {
			t.Fatalf("datagram %d of %d to %v: %d bytes, %v", i+1, n, addr, m, err)
		}
	}
}

// A wire that cuts nothing, and a receiver whose agent takes the packets: a raw socket is not told how long the datagrams of a UDP
// super-packet are, so none may come that way.
func TestFastPathTrainsToAgent(t *testing.T) {
	t.Parallel()
	s := fastStage(t, "ipip", false)
	fast(t, s.first, true, "")
	s.announced(t)
	trains := func(when string) {
		t.Log(when)
		for _, addr := range s.other.Addrs {
			for _, size := range []int{100, 1200} {
				s.sendsTrain(t, addr, size)
			}
		}
	}
	trains("both hosts have the fast path")
	stop := s.b.Start(s.net.Program(), "capture", "--all", "--duration", "5m", "--socket", s.second.Socket())
	s.agentTakes(t, "a capture")
	trains("a capture")
	stop()
	writeFast(s.b, "ipip", false)
	if out, errs, code := s.second.Tulle("reload"); code != 0 {
		t.Fatalf("tulle reload: %s%s", out, errs)
	}
	noPrograms(t, s.b)
	trains("the receiver has no fast path")
	if is := s.first.Status(); !is.FastPath.On {
		t.Errorf("the sender has lost its fast path: %+v", is.FastPath)
	}
}

// An agent that is killed while it captures, and therefore carries everything, leaves the packets to its kernel.
func TestFastPathCaptureKilled(t *testing.T) {
	t.Parallel()
	s := fastStage(t, "ipip", false)
	fast(t, s.second, true, "")
	s.announced(t)
	done := make(chan struct{})
	go func() {
		defer close(done)
		s.second.Tulle("capture", "--all", "--duration", "2m")
	}()
	s.agentTakes(t, "a capture has begun")
	for end := time.Now().Add(6 * time.Second); time.Now().Before(end); time.Sleep(100 * time.Millisecond) { // longer than what nobody prolongs
		_ = s.pod.Ping(s.other.IPv4())
	}
	s.agentTakes(t, "the capture goes on")
	s.second.Kill()
	<-done
	hosts.Within(t, 20*time.Second, "the kernel of b carries pings", func() error { return s.pod.Ping(s.other.IPv4()) })
	x := s.transfer(t)
	x.progress(t, 10*time.Second)
	x.stop(t)
}

// A router drops UDP packets over IPv4 that have no checksum, as those of the fast path: probes find it, and packets go another way until they pass again.
func TestFastPathNoChecksum(t *testing.T) {
	t.Parallel()
	s := fastStage(t, "udp,vxlan", false)
	fast(t, s.first, true, "")
	fast(t, s.second, true, "")
	s.announced(t)
	ping := s.pod.Stream(s.other.IPv4(), 10*time.Millisecond)
	s.router.Run("nft", "table ip filter { chain forward { type filter hook forward priority 0; udp dport 6080 udp checksum 0 drop; }; }")
	s.uses(t, 15*time.Second, "vxlan")
	says(t, "the filtered path", reason(t, s.first, "udp"), "vxlan works: UDP port 6080 without UDP checksum (fast_path) is filtered on the way")
	hosts.Within(t, 10*time.Second, "pods reach each other by vxlan", func() error { return s.pod.Ping(s.other.IPv4()) })
	sent, lost := ping.Stop()
	if most := ping.Most(failover); lost == 0 || lost > most {
		t.Errorf("%d of %d pings lost, want 1 to %d", lost, sent, most)
	}
	s.router.Run("nft", "delete table ip filter")
	s.uses(t, 60*time.Second, "udp")
	s.announced(t)
}

// TestFastPathBridge has a host whose network card is a port of a bridge, which has the address.
func TestFastPathBridge(t *testing.T) {
	t.Parallel()
	for _, mode := range []string{"ipip", "udp"} {
		t.Run(mode, func(t *testing.T) {
			t.Parallel()
			n := hosts.New(t)
			s := &stage{net: n, a: n.Host("a"), b: n.Host("b"), router: n.Host("r")}
			s.a.Link("eth0", addrA+"/24", s.router, "toa", "10.0.1.1/24")
			s.b.Link("eth0", "", s.router, "tob", "10.0.2.1/24")
			s.b.IP("link add br0 type bridge", "link set eth0 master br0", "link set br0 up")
			s.b.Addr("br0", addrB+"/24")
			s.router.Sysctl("net.ipv4.ip_forward", "1")
			s.a.IP("route add default via 10.0.1.1")
			s.b.IP("route add default via 10.0.2.1")
			s.startFast(t, mode, addrA, addrB)
			s.announced(t)
			for _, addr := range []netip.Addr{s.other.IPv4(), s.other.IPv6()} {
				x := s.transferTo(t, addr)
				s.carries(t, x)
				x.stop(t)
			}
		})
	}
}

// TestFastPathMoves gives a host another underlay address. What was counted stays.
func TestFastPathMoves(t *testing.T) {
	t.Parallel()
	s := fastStage(t, "ipip", false)
	fast(t, s.first, true, "")
	s.announced(t)
	was := s.first.Status().Counters
	s.a.IP("addr del "+addrA+"/24 dev eth0", "addr add 10.0.1.77/24 dev eth0", "route replace default via 10.0.1.1")
	hosts.Within(t, 30*time.Second, "the new address is in use", func() error {
		st, err := s.first.TryStatus()
		if err != nil {
			return err
		}
		if got := fmt.Sprint(st.Node.Underlay); !st.Ready || got != "[10.0.1.77]" {
			return fmt.Errorf("ready %v, %s", st.Ready, got)
		}
		return nil
	})
	hosts.Within(t, 20*time.Second, "pods reach each other", func() error { return s.pod.Ping(s.other.IPv4()) })
	fast(t, s.first, true, "")
	s.announced(t)
	if is := s.first.Status().Counters; is.FastTxPackets < was.FastTxPackets || is.FastRxPackets < was.FastRxPackets {
		t.Errorf("counted %+v, before that %+v", is, was)
	}
	x := s.transfer(t)
	s.carries(t, x)
	x.stop(t)
}

// cutsForPods checks that super-packets, which the kernel has joined, arrive at a pod whose device takes none.
func (s *stage) cutsForPods(t *testing.T) {
	t.Helper()
	s.other.Run("ethtool", "-K", "eth0", "tso", "off", "gso", "off", "gro", "off")
	s.b.Run("ethtool", "-K", "v"+s.other.Name, "tso", "off", "gso", "off")
	x := s.transfer(t)
	s.carries(t, x)
	x.stop(t)
}

// ipsec gives a host IPsec policies, which the fast path would pass by.
func (s *stage) ipsec(t *testing.T, x *transfer) {
	t.Helper()
	policy := &netlink.XfrmPolicy{Dir: netlink.XFRM_DIR_OUT, Src: prefixOf("192.0.2.0/24"), Dst: prefixOf("198.51.100.0/24"), Action: netlink.XFRM_POLICY_ALLOW}
	change := func(f func(*netlink.XfrmPolicy) error) {
		t.Helper()
		if err := s.a.Do(func() error { return f(policy) }); err != nil {
			t.Fatal(err)
		}
	}
	change(netlink.XfrmPolicyAdd)
	fast(t, s.first, false, "IPsec")
	says(t, "status", s.first.Problems, "fast_path", "IPsec")
	if _, _, code := s.first.Tulle("status"); code != 1 {
		t.Errorf("tulle status: exit code %d", code)
	}
	x.progress(t, 10*time.Second)
	change(netlink.XfrmPolicyDel)
	fast(t, s.first, true, "")
	s.announced(t)
	s.carries(t, x)
}

func prefixOf(s string) *net.IPNet {
	_, n, _ := net.ParseCIDR(s)
	return n
}

// death kills one agent, which the other one gives up, and then that one, too: what was begun goes on, and more can begin. Then they return.
func (s *stage) death(t *testing.T, x *transfer, mode string, six bool) {
	t.Helper()
	s.second.Kill()
	hosts.Within(t, 30*time.Second, "the other agent would have refused packets by now", func() error {
		st, err := s.first.TryStatus()
		if err != nil {
			return err
		}
		if p := st.Peers[0]; p.State != api.PeerDead || time.Since(p.Since) < 8*time.Second || !strings.Contains(p.Reason, "its kernel carries packets") {
			return fmt.Errorf("%s for %v: %s", p.State, time.Since(p.Since), p.Reason)
		}
		return nil
	})
	x.progress(t, 10*time.Second)
	s.first.Kill()
	x.progress(t, 10*time.Second)
	took := s.transferSix(t)
	for range 4 { // the machine may stand still: the best of five counts
		if took <= time.Second {
			break
		}
		took = min(took, s.transferSix(t))
	}
	if took > time.Second {
		t.Errorf("a transfer without agents stood still for %v", took)
	}
	for _, addr := range []netip.Addr{s.other.IPv4(), s.other.IPv6()} {
		if err := s.pod.PingOnce(addr, 56); err != nil {
			t.Errorf("%v, without agents: %v", addr, err)
		}
	}
	a, b := addrA, addrB
	if six {
		a, b = "[2001:db8:1::11]", "[2001:db8:2::12]"
	}
	s.first = s.a.Agent("--join", b, "--config", writeFast(s.a, mode, true))
	s.second = s.b.Agent("--join", a, "--config", writeFast(s.b, mode, true))
	s.first.Ready(30 * time.Second)
	s.second.Ready(30 * time.Second)
	fast(t, s.first, true, "")
	fast(t, s.second, true, "")
	s.uses(t, 20*time.Second, mode)
	s.announced(t)
	s.carries(t, x)
}

// transferSix makes a transfer by IPv6 and returns the longest time without an arrival.
func (s *stage) transferSix(t *testing.T) time.Duration {
	t.Helper()
	x := s.transferTo(t, s.other.IPv6())
	x.progress(t, 10*time.Second)
	return x.stop(t)
}

// noPrograms requires that a host has no program of the fast path.
func noPrograms(t *testing.T, h *hosts.Host) {
	t.Helper()
	hosts.Within(t, 10*time.Second, "the programs are gone from "+h.Name, func() error {
		for _, where := range [][2]string{{"tun0", "egress"}, {"eth0", "ingress"}} {
			if out, _ := h.TryRun("tc", "filter", "show", "dev", where[0], where[1]); strings.Contains(out, "tulle_") {
				return fmt.Errorf("%s", out)
			}
		}
		return nil
	})
}

// TestFastPathWithoutCapability runs agents that may not load programs, as by the systemd unit: they say so, and carry everything.
func TestFastPathWithoutCapability(t *testing.T) {
	t.Parallel()
	s := fastStage(t, "ipip", false, "setpriv", "--inh-caps", "-all", "--bounding-set", "-all,+net_admin,+net_raw")
	fast(t, s.first, false, "CAP_BPF")
	says(t, "status", s.first.Problems, "fast_path", "CAP_BPF", "operations.md")
	says(t, "tulle doctor", command(s.first, "doctor"), "fast_path", "CAP_BPF")
	if _, _, code := s.first.Tulle("doctor"); code != 1 {
		t.Errorf("tulle doctor: exit code %d", code)
	}
	x := s.transfer(t)
	x.progress(t, 10*time.Second)
	x.stop(t)
	s.second.Stop()
	if out, errs, code := s.second.Tulle("cleanup"); code != 0 {
		t.Errorf("tulle cleanup: %s%s", out, errs)
	}
}
