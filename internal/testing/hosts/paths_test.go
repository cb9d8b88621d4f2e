package hosts_test

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tulle-net/tulle/internal/testing/hosts"
	"github.com/tulle-net/tulle/tunnel/encap"
	"github.com/tulle-net/tulle/tunnel/header"
)

const bothFamilies = "10.244.0.0/16,fd00:244::/48"

// routedPair is two hosts in two subnets with a router between them, an agent on each, and a pod on each.
type routedPair struct {
	n             *hosts.Net
	a, b, r       *hosts.Host
	first, second *hosts.Agent
	web, db       *hosts.Pod
}

// routed makes such hosts. before, if not nil, changes the router before the agents start, which have both families of pods.
func routed(t *testing.T, before func(r *hosts.Host), args ...string) *routedPair {
	t.Helper()
	n := hosts.New(t)
	p := &routedPair{n: n, a: n.Host("a"), r: n.Host("r"), b: n.Host("b")}
	p.a.Link("eth0", "10.0.1.11/24", p.r, "r1", "10.0.1.1/24")
	p.b.Link("eth0", "10.0.2.12/24", p.r, "r2", "10.0.2.1/24")
	p.r.Sysctl("net.ipv4.ip_forward", "1")
	p.a.IP("route add default via 10.0.1.1")
	p.b.IP("route add default via 10.0.2.1")
	if before != nil {
		before(p.r)
	}
	p.start(args...)
	return p
}

// start starts the agents and makes the pods.
func (p *routedPair) start(args ...string) {
	p.first = p.a.Agent(append([]string{"--bootstrap", "--cluster-cidr", bothFamilies}, args...)...)
	p.second = p.b.Agent(append([]string{"--join", "10.0.1.11"}, args...)...)
	p.first.Ready(20 * time.Second)
	p.second.Ready(20 * time.Second)
	p.web, p.db = p.first.Pod("web"), p.second.Pod("db")
}

// reached waits until the pods reach each other.
func (p *routedPair) reached(t *testing.T) {
	t.Helper()
	for _, to := range p.db.Addrs {
		hosts.Within(t, 20*time.Second, "web reaches "+to.String(), func() error { return p.web.Ping(to) })
	}
}

// problem waits until the agent names a problem with all these words.
func problem(t *testing.T, a *hosts.Agent, words ...string) {
	t.Helper()
	hosts.Within(t, 20*time.Second, "a problem with "+strings.Join(words, ", "), func() error {
		p := a.Problems()
		for _, w := range words {
			if !strings.Contains(p, w) {
				return fmt.Errorf("problems: %q", p)
			}
		}
		return nil
	})
}

// knows waits until the agents know all underlay addresses of each other, which gossip tells.
func knows(t *testing.T, addresses int, agents ...*hosts.Agent) {
	t.Helper()
	hosts.Within(t, 20*time.Second, "all know all addresses", func() error {
		for _, a := range agents {
			for _, b := range agents {
				if a == b {
					continue
				}
				if p, err := peerOf(a, b.Host.Name); err != nil || len(p.Underlay) != addresses {
					return fmt.Errorf("%s knows %v of %s, %v", a.Host.Name, p.Underlay, b.Host.Name, err)
				}
			}
		}
		return nil
	})
}

// A pod that sends what looks like probes to the tun address of the other host does not speak for its node's agent: no trains go off, no
// clock is wrong, and the packets are counted.
func TestPodIsNoProber(t *testing.T) {
	t.Parallel()
	p := routed(t, nil, "--paths", "udp")
	p.reached(t)
	for a, peer := range map[*hosts.Agent]string{p.first: "b", p.second: "a"} { // each knows the other's tun address, without which nothing is counted
		hosts.Within(t, 20*time.Second, "udp is up", func() error { return goes(a, peer, "udp") })
	}
	dial := func(from *hosts.Pod, to *hosts.Agent) (conn net.Conn) {
		t.Helper()
		if err := from.Do(func() (err error) {
			conn, err = net.Dial("udp", netip.AddrPortFrom(to.Status().Node.Tun.Addresses[0], 6080).String())
			return err
		}); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { conn.Close() })
		return conn
	}
	say := func(conn net.Conn, kind byte, size int, more ...byte) {
		b := append([]byte("TLPR"), 1, kind, 0, 0)
		b = binary.BigEndian.AppendUint64(b, rand.Uint64())
		b = binary.BigEndian.AppendUint32(b, uint32(size))
		_, _ = conn.Write(append(b, more...))
	}
	clock, train := dial(p.db, p.first), dial(p.web, p.second)
	hosts.NoProblems(t, "before", p.first)
	hour := binary.BigEndian.AppendUint64(nil, uint64(time.Now().Add(time.Hour).UnixMicro()))
	traffic := p.web.Stream(p.db.IPv4(), 100*time.Millisecond) // trains are probed while there is some
	for range 100 {
		say(clock, 2, 100, hour...)
		say(train, 3, 48<<8)
		time.Sleep(100 * time.Millisecond)
		if got := p.first.Problems(); got != "" {
			t.Fatalf("pods made up a problem: %s", got)
		}
	}
	traffic.Stop()
	if skew := p.first.Status().Peers[0].ClockSkewMS; skew > 60_000 {
		t.Errorf("the clock of b is ahead by %d ms, says a pod of b", skew)
	}
	for _, a := range []*hosts.Agent{p.first, p.second} {
		hosts.Within(t, 10*time.Second, "they are counted", func() error {
			if n := a.Status().Drops["source_not_senders"]; n < 90 {
				return fmt.Errorf("%s counts %d of 100 packets that pretend to be probes", a.Host.Name, n)
			}
			return nil
		})
	}
}

// A network that passes IP protocol 4 and drops 41: ipip works for IPv4 pods alone, so it is not used, and the agent says what is filtered.
func TestIPIPNeedsBothProtocols(t *testing.T) {
	t.Parallel()
	p := routed(t, func(r *hosts.Host) {
		r.Run("nft", "add table inet t; add chain inet t c { type filter hook forward priority 0; }; add rule inet t c ip protocol 41 drop")
	}, "--paths", "ipip,udp")
	for _, a := range []*hosts.Agent{p.first, p.second} {
		peer := map[*hosts.Agent]string{p.first: "b", p.second: "a"}[a]
		hosts.Within(t, 20*time.Second, "udp is used", func() error { return goes(a, peer, "udp") })
		hosts.Within(t, 20*time.Second, "protocol 41 is named", func() error {
			got, err := peerOf(a, peer)
			if err == nil && !strings.Contains(got.Path.Reason, "IP protocol 41 is filtered on the way") {
				err = fmt.Errorf("%q", got.Path.Reason)
			}
			return err
		})
	}
	p.reached(t)
	hosts.Within(t, 20*time.Second, "tulle ping says so", func() error {
		if out, _, _ := p.first.Tulle("ping", "b"); !strings.Contains(out, "IP protocol 41 is filtered on the way") {
			return errors.New(out)
		}
		return nil
	})
	p.r.Run("nft", "delete table inet t")
	hosts.Within(t, 30*time.Second, "ipip is used", func() error { return goes(p.first, "b", "ipip") })
	p.reached(t)
}

// A network that passes UDP from port 6080 to port 6080 and nothing else to that port: pods' packets have other source ports, so udp does not work,
// and the agent does not say that it does.
func TestDataPortsAreDropped(t *testing.T) {
	for _, paths := range []string{"udp,ipip", "udp"} {
		t.Run(paths, func(t *testing.T) {
			t.Parallel()
			p := routed(t, func(r *hosts.Host) {
				r.Run("nft", "add table inet t; add chain inet t c { type filter hook forward priority 0; }; add rule inet t c udp sport 49152-65535 udp dport 6080 drop")
			}, "--paths", paths)
			if paths == "udp" {
				problem(t, p.first, "udp packets to it are not answered", "UDP port 6080")
				return
			}
			hosts.Within(t, 20*time.Second, "ipip is used", func() error { return goes(p.first, "b", "ipip") })
			hosts.Within(t, 20*time.Second, "ipip is used", func() error { return goes(p.second, "a", "ipip") })
			p.reached(t)
		})
	}
}

// sourcePorts are those of the tunnel's UDP packets from host a of a routed pair, also to peers of the fast path.
func sourcePorts(t *testing.T, a *hosts.Host) (ports []uint16) {
	t.Helper()
	for line := range strings.Lines(a.Run("ss", "-Huln")) {
		for f := range strings.FieldsSeq(line) {
			if at, err := netip.ParseAddrPort(f); err == nil && at.Addr().String() == "10.0.1.11" && at.Port() >= encap.FirstSourcePort {
				ports = append(ports, at.Port())
			}
		}
	}
	if len(ports) < 4 {
		t.Fatalf("source ports %v", ports)
	}
	return ports
}

// One of the source ports is dropped, as by one dead link of many equal ones: the path stays, with some loss.
func TestOneDataPortIsDropped(t *testing.T) {
	t.Parallel()
	p := routed(t, func(r *hosts.Host) {
		r.Run("nft", "add table inet t; add chain inet t c { type filter hook forward priority 0; }; add set inet t seen { type inet_service; flags dynamic; }; "+
			"add rule inet t c ip saddr 10.0.1.11 udp dport 6080 add @seen { udp sport }")
	}, "--paths", "udp,ipip")
	p.reached(t)
	// One that the agent sends from: it also has sockets for peers of the fast path, of which there are none.
	_, seen, _ := strings.Cut(p.r.Run("nft", "list set inet t seen"), "elements = {")
	var port uint16
	if _, err := fmt.Sscan(seen, &port); err != nil {
		t.Fatalf("no source port in %q: %v", seen, err)
	}
	p.r.Run("nft", fmt.Sprintf("add rule inet t c udp sport %d drop", port))
	traffic := p.web.Stream(p.db.IPv4(), 100*time.Millisecond)
	defer traffic.Stop()
	hosts.Within(t, 3*time.Minute, "a loss is seen", func() error { // that of a liveness probe, which are a quarter of what takes turns at the ports: after 15 s on average
		got, err := peerOf(p.first, "b")
		if err == nil && got.Path.Loss == 0 {
			err = fmt.Errorf("%+v", got.Path)
		}
		return err
	})
	time.Sleep(20 * time.Second)
	if log := p.first.Log() + p.second.Log(); strings.Contains(log, "packets go another way") {
		t.Error("the path was left for one port")
	}
	hosts.NoProblems(t, "with one port less", p.first)
}

// A host that is no member and not on the way says that packets between two members are too big. No packet between pods is lost for it, and the path
// MTU is back at once.
func TestForgedTooBig(t *testing.T) {
	t.Parallel()
	p := routed(t, nil, "--paths", "udp")
	x := p.n.Host("x")
	x.Link("eth0", "10.0.3.13/24", p.r, "r3", "10.0.3.1/24")
	x.IP("route add default via 10.0.3.1")
	p.reached(t)
	mtu := func() error {
		got, err := peerOf(p.first, "b")
		if err == nil && got.Path.MTU != 1472 {
			err = fmt.Errorf("%+v", got.Path)
		}
		return err
	}
	hosts.Within(t, 20*time.Second, "the whole MTU is proven", mtu)
	a, b, router := netip.MustParseAddr("10.0.1.11"), netip.MustParseAddr("10.0.2.12"), netip.MustParseAddr("10.0.3.13")
	ports := sourcePorts(t, p.a)
	forge := func() error {
		fd, err := unix.Socket(unix.AF_INET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_RAW)
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		for _, port := range ports {
			quote := header.AppendIPv4(nil, header.IPv4Fields{Src: a, Dst: b, PayloadLen: 1480, FlagsFrag: header.IPv4FlagDF, TTL: 60, Proto: header.ProtoUDP})
			quote = header.AppendUDP(quote, netip.AddrPortFrom(a, port), netip.AddrPortFrom(b, 6080), make([]byte, 1472))
			if err := unix.Sendto(fd, header.AppendICMPError(nil, quote, router, header.TooBig, 604), 0, &unix.SockaddrInet4{Addr: a.As4()}); err != nil {
				return err
			}
		}
		return nil
	}
	const found = "path MTU found"
	before := strings.Count(p.first.Log(), found)
	s := p.web.Stream(p.db.IPv6(), 50*time.Millisecond)
	for range 10 {
		if err := x.Do(forge); err != nil {
			t.Fatal(err)
		}
		for range 10 {
			if err := p.web.PingOnce(p.db.IPv6(), 1180); err != nil {
				t.Fatalf("a packet of 1228 bytes after the forged message: %v", err)
			}
			time.Sleep(100 * time.Millisecond)
		}
	}
	s.Stop()
	hosts.Within(t, 2*time.Second, "the whole MTU is proven again", mtu)
	if strings.Count(p.first.Log(), found) == before {
		t.Error("no forged message has arrived")
	}
}

// A network that passes only small packets of the preferred encapsulation: the next one is used.
func TestOnlySmallPacketsPass(t *testing.T) {
	t.Parallel()
	p := routed(t, func(r *hosts.Host) {
		r.Run("nft", "add table inet t; add chain inet t c { type filter hook forward priority 0; }; add rule inet t c udp dport 6080 meta length > 600 drop")
	}, "--paths", "udp,ipip")
	p.reached(t)
	traffic := p.web.Stream(p.db.IPv4(), 200*time.Millisecond)
	hosts.Within(t, 40*time.Second, "ipip is used", func() error { return goes(p.first, "b", "ipip") })
	hosts.Within(t, 40*time.Second, "ipip is used", func() error { return goes(p.second, "a", "ipip") })
	if sent, lost := traffic.Stop(); lost > traffic.Most(0) {
		t.Errorf("%d of %d small packets lost", lost, sent)
	}
	for _, to := range p.db.Addrs {
		hosts.Within(t, 5*time.Second, "large packets to "+to.String(), func() error { return p.web.PingSize(to, 4000) })
	}
}

// A host that drops large packets which arrive without a tunnel: they take the tunnel.
func TestDirectPassesSmallPacketsOnly(t *testing.T) {
	t.Parallel()
	hs, agents := subnet(t, 2)
	pa, pb := agents[0].Pod("pa"), agents[1].Pod("pb")
	hosts.Within(t, 20*time.Second, "pods reach each other", func() error { return pa.Ping(pb.IPv4()) })
	for a, peer := range map[*hosts.Agent]string{agents[0]: "b", agents[1]: "a"} {
		hosts.Within(t, 20*time.Second, "packets go direct", func() error { return goes(a, peer, "direct") })
	}
	hs[1].Run("nft", "add table inet t; add chain inet t c { type filter hook prerouting priority -300; }; add rule inet t c iifname eth0 ip saddr 10.244.0.0/16 meta length > 500 drop")
	traffic := pa.Stream(pb.IPv4(), 200*time.Millisecond)
	hosts.Within(t, 40*time.Second, "packets take the tunnel", func() error { return goes(agents[0], "b", "udp") })
	if sent, lost := traffic.Stop(); lost > traffic.Most(0) {
		t.Errorf("%d of %d small packets lost", lost, sent)
	}
	hosts.Within(t, 5*time.Second, "large packets", func() error { return pa.PingSize(pb.IPv4(), 4000) })
	hosts.Within(t, 20*time.Second, "status says why", func() error {
		got, err := peerOf(agents[0], "b")
		if err == nil && !strings.Contains(got.Path.Reason, "direct answers, but does not carry packets of 1280 bytes") {
			err = fmt.Errorf("%q", got.Path.Reason)
		}
		return err
	})
}

// The same where nothing but the direct path is configured: it stays, and its route has a size that most paths carry, not the link's.
func TestDirectAlonePassesSmallPackets(t *testing.T) {
	t.Parallel()
	hs, agents := subnet(t, 2, "--paths", "direct")
	hosts.Within(t, 20*time.Second, "packets go direct", func() error { return goes(agents[0], "b", "direct") })
	hs[1].Run("nft", "add table inet t; add chain inet t c { type filter hook prerouting priority -300; }; add rule inet t c iifname eth0 ip saddr 10.244.0.0/16 meta length > 500 drop")
	hosts.Within(t, 40*time.Second, "nothing is proven of larger packets", func() error {
		got, err := peerOf(agents[0], "b")
		if err == nil && got.Path.MTU != 0 {
			err = fmt.Errorf("%+v", got.Path)
		}
		return err
	})
	hosts.Within(t, 5*time.Second, "the route does not have the link's MTU", func() error {
		if out := hs[0].Run("ip", "route", "show", "via", "10.0.1.12"); !strings.Contains(out, "mtu 1280") {
			return fmt.Errorf("%s", out)
		}
		return nil
	})
}

// A link on the way that carries less than IPv6 pods need: status and doctor say so, with the sizes, until it is mended. IPv4 goes on.
func TestPathTooSmallForIPv6(t *testing.T) {
	t.Parallel()
	p := routed(t, nil, "--paths", "udp")
	p.reached(t)
	large := func() error { return p.web.PingSize(p.db.IPv4(), 4000) }
	hosts.Within(t, 5*time.Second, "large packets", large)
	traffic := p.web.Stream(p.db.IPv4(), 200*time.Millisecond)
	p.r.IP("link set r2 mtu 1300")
	hosts.Within(t, 4*time.Second, "large packets over the smaller link", large)
	if err := p.web.PingSize(p.db.IPv6(), 1232); err == nil {
		t.Error("an IPv6 packet of 1280 bytes passes 1300 bytes with a tunnel")
	}
	words := []string{"the path to b by udp carries packets of 1272 bytes at most", "IPv6 pods need 1280", "1273 to 1280 bytes are lost", "between 10.0.1.11 and 10.0.2.12", "packets of 1308 bytes"}
	problem(t, p.first, words...)
	if out, _, code := p.first.Tulle("status"); code != 1 {
		t.Errorf("exit code %d of status:\n%s", code, out)
	}
	if out, _, code := p.first.Tulle("doctor", "mtu"); code != 1 || !strings.Contains(out, "1308") {
		t.Errorf("exit code %d of doctor mtu:\n%s", code, out)
	}
	p.r.IP("link set r2 mtu 1500")
	hosts.Within(t, 20*time.Second, "all is well", func() error {
		if got := p.first.Problems(); got != "" {
			return fmt.Errorf("problems: %s", got)
		}
		return p.web.PingSize(p.db.IPv6(), 1232)
	})
	traffic.Stop()
}
