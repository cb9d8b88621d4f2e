package hosts_test

import (
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/tulle-net/tulle/internal/testing/hosts"
)

// The underlay's MTU changes while the agents run: packets of the new size pass at once, and nothing is started again.
func TestUnderlayMTUChanges(t *testing.T) {
	t.Parallel()
	n := hosts.New(t)
	sw := n.SwitchNamed("sw", 9000)
	a, b := n.Host("a"), n.Host("b")
	a.Plug(sw, "eth0", "10.0.1.11/24")
	b.Plug(sw, "eth0", "10.0.1.12/24")
	set := func(mtu int) {
		for _, h := range []*hosts.Host{a, b} {
			h.IP(fmt.Sprintf("link set eth0 mtu %d", mtu))
		}
	}
	set(1500)
	first := a.Agent("--bootstrap", "--cluster-cidr", "10.244.0.0/16,fd00:244::/48")
	first.Ready(20 * time.Second)
	second := b.Agent("--join", "10.0.1.11")
	second.Ready(20 * time.Second)
	web, db := first.Pod("web"), second.Pod("db")
	full := func(to netip.Addr) { // fragments of whatever the path carries
		t.Helper()
		hosts.Within(t, 8*time.Second, "large packets to "+to.String(), func() error { return web.PingSize(to, 4000) })
	}
	tun := func(agent *hosts.Agent, want int) {
		t.Helper()
		hosts.Within(t, 8*time.Second, fmt.Sprintf("a TUN MTU of %d", want), func() error {
			if got := agent.Status().Node.Tun.MTU; got != want {
				return fmt.Errorf("it is %d", got)
			}
			return nil
		})
	}
	full(db.IPv4())
	s := web.Stream(db.IPv4(), 10*time.Millisecond)
	for _, mtu := range []int{1400, 9000, 1500} {
		set(mtu)
		tun(first, mtu-28)
		tun(second, mtu-28)
		full(db.IPv4())
		full(db.IPv6())
	}
	proven := func(direct int) {
		t.Helper()
		hosts.Within(t, 8*time.Second, fmt.Sprintf("proven paths of %d bytes directly, and of 28 less by udp", direct), func() error {
			seen := 0
			p, err := peerOf(first, "b")
			if err != nil {
				return err
			}
			for _, c := range p.Candidates {
				want := map[string]int{"udp": direct - 28, "direct": direct}[c.Mode]
				if c.State != "up" || want == 0 {
					continue
				}
				if seen++; c.MTU != want {
					return fmt.Errorf("%s %d", c.Mode, c.MTU)
				}
			}
			if seen != 2 {
				return fmt.Errorf("%d of the two are up", seen)
			}
			return nil
		})
	}
	proven(1500)
	sent, lost := s.Stop()
	if most := sent/20 + s.Most(0); lost > most {
		t.Errorf("%d of %d small pings lost while the MTU changed, at most %d may be", lost, sent, most)
	}
	a.IP("route add default via 10.0.1.254 mtu 1450") // the route's own MTU
	tun(first, 1422)
	a.IP("route del default")
	tun(first, 1472)
	a.IP("route add 10.0.1.12/32 dev eth0 mtu 1350") // that of one peer's route
	proven(1350)
	tun(first, 1472)
	a.IP("route del 10.0.1.12/32")

	// Too small for IPv6: that is said, in one line that has all the numbers, and IPv4 goes on.
	set(1280)
	hosts.Within(t, 8*time.Second, "a word of the MTU", func() error {
		if p := first.Problems(); !strings.Contains(p, "underlay MTU 1280 of eth0") || !strings.Contains(p, "1308") {
			return fmt.Errorf("problems: %s", p)
		}
		return nil
	})
	full(db.IPv4())
	hosts.Within(t, 8*time.Second, "a has no IPv6, and is not ready", func() error {
		if first.NotReady() == nil {
			return errors.New("it is ready")
		}
		return nil
	})
	set(1500)
	full(db.IPv4())
	full(db.IPv6())
	first.Ready(8 * time.Second)
	if strings.Contains(first.Log()+second.Log(), "starting again") {
		t.Error("a session was ended for the MTU")
	}
}

// Underlays of 1,280 bytes, as other tunnels have.
func TestUnderlayMTUSmall(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		name, cidr, addrA, addrB, join, refused string
		mtu                                     int
	}{
		{name: "IPv4 alone", cidr: "10.244.0.0/16", addrA: "10.0.1.11/24", addrB: "10.0.1.12/24", join: "10.0.1.11", mtu: 1280},
		{name: "IPv4 alone, over IPv6", cidr: "10.244.0.0/16", addrA: "fd00:1::11/64", addrB: "fd00:1::12/64", join: "[fd00:1::11]", mtu: 1280},
		{name: "both, and just enough", cidr: "10.244.0.0/16,fd00:244::/48", addrA: "10.0.1.11/24", addrB: "10.0.1.12/24", join: "10.0.1.11", mtu: 1308},
		{name: "both, over IPv6, one byte short", cidr: "10.244.0.0/16,fd00:244::/48", addrA: "fd00:1::11/64", addrB: "fd00:1::12/64", join: "[fd00:1::11]", mtu: 1327, refused: "1328"},
		{name: "both, one byte short", cidr: "10.244.0.0/16,fd00:244::/48", addrA: "10.0.1.11/24", addrB: "10.0.1.12/24", join: "10.0.1.11", mtu: 1307, refused: "1308"},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			n := hosts.New(t)
			a, b := n.Host("a"), n.Host("b")
			a.LinkMTU("eth0", c.addrA, b, "eth0", c.addrB, c.mtu)
			first := a.Agent("--bootstrap", "--cluster-cidr", c.cidr)
			if c.refused != "" {
				hosts.Within(t, 20*time.Second, "a word of the MTU", func() error {
					if p := first.Problems(); !strings.Contains(p, fmt.Sprintf("underlay MTU %d of eth0", c.mtu)) || !strings.Contains(p, c.refused) {
						return fmt.Errorf("problems: %s", p)
					}
					return nil
				})
				return
			}
			first.Ready(20 * time.Second)
			second := b.Agent("--join", c.join)
			second.Ready(20 * time.Second)
			web, db := first.Pod("web"), second.Pod("db")
			for _, to := range db.Addrs {
				hosts.Within(t, 10*time.Second, "large packets to "+to.String(), func() error { return web.PingSize(to, 3000) })
			}
		})
	}
}
