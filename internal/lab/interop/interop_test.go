package interop

import (
	"bytes"
	"crypto/md5"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/tulle-net/tulle/internal/testing/hosts"
)

func TestMain(m *testing.M) { os.Exit(hosts.Main(m)) }

// way is one kind of tunnel between the agent and the guest's kernel.
type way struct {
	name     string
	args     []string // of `tulle external add`
	six      bool     // over IPv6
	overhead int      // bytes that the agent's encapsulation adds
	setup    []string // commands in the guest, beside the devices
	dev4     string   // the guest's device for IPv4 inside, as `ip link add` has it; "" for none
	dev6     string   // the same for IPv6 inside, if that is another device
}

// In the commands LOCAL and AGENT are the underlay addresses.
var ways = []way{
	{name: "ipip and sit", args: []string{"--encap", "ipip"}, overhead: 20,
		dev4: "type ipip local LOCAL remote AGENT",
		dev6: "type sit local LOCAL remote AGENT"},
	{name: "ip6tnl", args: []string{"--encap", "ipip"}, six: true, overhead: 40,
		dev4: "type ip6tnl mode any encaplimit none local LOCAL remote AGENT"},
	{name: "gue by ipip and sit", args: []string{"--encap", "udp"}, overhead: 28,
		setup: []string{"ip fou add port 6080 gue"},
		dev4:  "type ipip local LOCAL remote AGENT encap gue encap-sport auto encap-dport 6080",
		dev6:  "type sit local LOCAL remote AGENT encap gue encap-sport auto encap-dport 6080"},
	{name: "gue by ip6tnl", args: []string{"--encap", "udp"}, six: true, overhead: 48,
		setup: []string{"ip -6 fou add port 6080 gue"},
		dev4:  "type ip6tnl mode any encaplimit none local LOCAL remote AGENT encap gue encap-sport auto encap-dport 6080"},
	{name: "fou by ipip, its own port", args: []string{"--encap", "udp", "--port", "6081"}, overhead: 28,
		setup: []string{"ip fou add port 6081 ipproto 4"},
		dev4:  "type ipip local LOCAL remote AGENT encap fou encap-sport auto encap-dport 6080"},
	{name: "fou by sit, its own port", args: []string{"--encap", "udp", "--port", "6082"}, overhead: 28,
		setup: []string{"ip fou add port 6082 ipproto 41"},
		dev6:  "type sit local LOCAL remote AGENT encap fou encap-sport auto encap-dport 6080"},
	{name: "vxlan", args: []string{"--encap", "vxlan"}, overhead: 50,
		dev4: "mtu 1450 type vxlan id 1 dstport 4789 local LOCAL remote AGENT"},
	{name: "vxlan over IPv6", args: []string{"--encap", "vxlan"}, six: true, overhead: 70,
		dev4: "mtu 1430 type vxlan id 1 dstport 4789 local LOCAL remote AGENT"},
}

// trial is a way at work: a pod here, addresses inside the tunnel there.
type trial struct {
	way
	t               *testing.T
	host, sw        *hosts.Host
	guest           *guest
	pod             *hosts.Pod
	agent, endpoint netip.Addr    // underlay addresses
	inner           [2]netip.Addr // of the guest, inside the tunnel, IPv4 and IPv6; zero if the way does not carry the family
	device          [2]string     // of the guest
}

// TestKernel gives prefixes to a Linux that has only the kernel's own tunnels: each kind of tunnel carries packets of all
// kinds, in both directions.
func TestKernel(t *testing.T) {
	kernel := kernelTree(t)
	n := hosts.New(t)
	sw, a := n.Switch(), n.Host("a")
	a.Plug(sw, "eth0", "10.0.1.11/24", "fd00:1::11/64") // port1 of the switch
	agent := a.Agent("--bootstrap", "--cluster-cidr", "10.244.0.0/16,fd00:244::/48")
	agent.Ready(20 * time.Second)
	g := boot(t, sw, kernel)
	g.run("ip link set lo up && ip link set eth0 up")
	tun := agent.Status().Node.Tun.Addresses
	for i, w := range ways {
		t.Run(w.name, func(t *testing.T) {
			x := &trial{way: w, t: t, host: a, sw: sw, guest: g, pod: agent.Pod(fmt.Sprintf("p%d", i))}
			g.t = t
			t.Cleanup(func() {
				if t.Failed() {
					state, err := g.try("ip -s link; ip addr; ip route; ip -6 route; ip neigh; ip fou show; ip -6 fou show")
					t.Logf("the guest's network: %s (%v)", state, err)
				}
			})
			x.connect(i, agent, tun)
			for f, to := range x.inner {
				if to.IsValid() {
					x.inspect(f, to)
				}
			}
			x.narrow()
		})
	}
	// The guest's devices also send link-local packets of their own, which are refused as not_member or source_not_senders.
	for _, reason := range []string{"bad_encap", "malformed", "destination_not_ours", "ecn", "tx_malformed", "send_error"} {
		if count := agent.Status().Drops[reason]; count > 0 {
			t.Errorf("%d packets were dropped as %s", count, reason)
		}
	}
}

// connect sets up both sides of the tunnel.
func (x *trial) connect(i int, agent *hosts.Agent, tun []netip.Addr) {
	x.t.Helper()
	x.agent, x.endpoint = netip.MustParseAddr("10.0.1.11"), netip.MustParseAddr(fmt.Sprintf("10.0.1.%d", 20+i))
	length := 24 // of the underlay's prefix
	if x.six {
		length = 64
		x.agent, x.endpoint = netip.MustParseAddr("fd00:1::11"), netip.MustParseAddr(fmt.Sprintf("fd00:1::%d", 20+i))
	}
	x.guest.run(fmt.Sprintf("ip addr add %v/%d dev eth0 nodad", x.endpoint, length))
	for _, c := range x.setup {
		x.guest.run(c)
	}
	devices := [2]string{x.dev4, x.dev6}
	if x.dev4 != "" {
		x.device[0] = fmt.Sprintf("t%d", i)
	}
	switch {
	case x.dev6 != "":
		x.device[1] = fmt.Sprintf("u%d", i)
	case !strings.Contains(x.dev4, "encap fou"):
		x.device[1] = x.device[0]
	}
	for f, link := range devices {
		if link != "" {
			x.guest.run("ip link add " + x.device[f] + " " + strings.NewReplacer("LOCAL", x.endpoint.String(), "AGENT", x.agent.String()).Replace(link))
			x.guest.run("ip link set " + x.device[f] + " up")
		}
	}
	prefixes := [2]netip.Prefix{netip.MustParsePrefix(fmt.Sprintf("10.244.%d.0/24", 240+i)), netip.MustParsePrefix(fmt.Sprintf("fd00:244:0:fff%d::/64", i))}
	for f, p := range prefixes {
		if x.device[f] == "" {
			continue
		}
		x.inner[f] = p.Addr().Next()
		if out, errs, code := agent.Tulle(append([]string{"external", "add", p.String(), x.endpoint.String()}, x.args...)...); code != 0 {
			x.t.Fatalf("tulle external add: %s%s", out, errs)
		}
		x.guest.run(fmt.Sprintf("ip addr add %v/%d dev %s nodad", x.inner[f], x.inner[f].BitLen(), x.device[f]))
		via := ""
		if strings.Contains(x.dev4, "vxlan") {
			via = fmt.Sprintf("via %v onlink", tun[f])
		}
		x.guest.run(fmt.Sprintf("ip route add %v dev %s %s src %v", x.addr(f), x.device[f], via, x.inner[f]))
	}
}

// addr is the pod's address of a family.
func (x *trial) addr(f int) netip.Addr { return [2]netip.Addr{x.pod.IPv4(), x.pod.IPv6()}[f] }

// header is the length of an echo request without data.
func header(f int) int { return []int{28, 48}[f] }

// inspect sends packets of all kinds of one family, there and back.
func (x *trial) inspect(f int, to netip.Addr) {
	x.t.Helper()
	hosts.Within(x.t, 10*time.Second, fmt.Sprintf("the pod reaches %v", to), func() error { return x.pod.Ping(to) })
	x.guest.run(fmt.Sprintf("ping -c 1 -W 5 %v", x.addr(f)))
	// The first large packets may cost an ICMP error: either side's device may have a larger MTU than the other's.
	hosts.Within(x.t, 10*time.Second, "fragments there and back", func() error { return x.pod.PingSize(to, 4000) })
	x.guest.run(fmt.Sprintf("ping -c 1 -W 1 -s 4000 %[1]v || ping -c 1 -W 5 -s 4000 %[1]v", x.addr(f)))
	full := min(x.pod.MTU, 1500-x.overhead)
	hosts.Within(x.t, 10*time.Second, fmt.Sprintf("packets of %d bytes, whole", full), func() error { return x.pod.PingDF(to, full-header(f)) })
	x.bulk(f)
	x.marks(f, to)
}

// bulk is a TCP connection from the guest to the pod, by which both send megabytes at once.
func (x *trial) bulk(f int) {
	x.t.Helper()
	const size = 2 << 20
	var ln *net.TCPListener
	check(x.t, x.pod.Do(func() (err error) {
		ln, err = net.ListenTCP("tcp", &net.TCPAddr{IP: x.addr(f).AsSlice()})
		return err
	}))
	defer ln.Close()
	ours := make([]byte, size)
	_, _ = rand.NewChaCha8([32]byte{}).Read(ours)
	var theirs []byte
	ended := make(chan error, 1)
	go func() { ended <- exchange(ln, ours, &theirs) }()
	began := time.Now()
	x.guest.run(fmt.Sprintf("test -s /data || head -c %d /dev/urandom >/data", size))
	x.guest.run(fmt.Sprintf("nc %v %d </data >/got", x.addr(f), ln.Addr().(*net.TCPAddr).Port))
	check(x.t, <-ended)
	x.t.Logf("IPv%d: 2 MiB each way in %.1f s", 4+2*f, time.Since(began).Seconds())
	for what, b := range map[string][]byte{"/got": ours, "/data": theirs} {
		if sum, want := x.guest.run("md5sum <"+what), fmt.Sprintf("%x", md5.Sum(b)); !strings.HasPrefix(sum, want) {
			x.t.Errorf("IPv%d: %s of the guest has the sum %s, the pod's bytes %s", 4+2*f, what, sum, want)
		}
	}
}

// exchange sends and receives over the next connection until both sides have said all.
func exchange(ln *net.TCPListener, ours []byte, theirs *[]byte) error {
	if err := ln.SetDeadline(time.Now().Add(30 * time.Second)); err != nil {
		return err
	}
	c, err := ln.AcceptTCP()
	if err != nil {
		return err
	}
	defer c.Close()
	if err := c.SetDeadline(time.Now().Add(time.Minute)); err != nil {
		return err
	}
	sent := make(chan error, 1)
	go func() { _, err := io.Copy(c, bytes.NewReader(ours)); _ = c.CloseWrite(); sent <- err }()
	*theirs, err = io.ReadAll(c)
	if e := <-sent; e != nil {
		return e
	}
	return err
}

// narrow makes the path MTU to each other smaller by 100 bytes on both sides: packets above it are answered, and TCP
// goes on.
func (x *trial) narrow() {
	x.t.Helper()
	bits := x.endpoint.BitLen()
	x.host.IP(fmt.Sprintf("route add %v/%d dev eth0 mtu 1400", x.endpoint, bits))
	defer x.host.IP(fmt.Sprintf("route del %v/%d dev eth0", x.endpoint, bits))
	x.guest.run(fmt.Sprintf("ip route add %v/%d dev eth0 src %v mtu 1400", x.agent, bits, x.endpoint))
	defer x.guest.run(fmt.Sprintf("ip route del %v/%d dev eth0", x.agent, bits))
	for f, to := range x.inner {
		if !to.IsValid() {
			continue
		}
		hosts.Within(x.t, 10*time.Second, "what is larger than 1400 bytes with its headers is refused", func() error {
			if err := x.pod.PingDF(to, 1400-x.overhead-header(f)+1); err == nil {
				return fmt.Errorf("it has passed")
			}
			return x.pod.PingDF(to, 1400-x.overhead-header(f))
		})
		x.bulk(f)
	}
}
