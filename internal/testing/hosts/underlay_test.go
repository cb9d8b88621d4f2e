package hosts_test

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/tulle-net/tulle/internal/testing/hosts"
	"github.com/tulle-net/tulle/internal/testing/stall"
)

// underlayIs is nil if the agent's underlay addresses are these.
func underlayIs(a *hosts.Agent, want ...string) error {
	st, err := a.TryStatus()
	if err != nil {
		return err
	}
	var list []netip.Addr
	for _, w := range want {
		list = append(list, netip.MustParseAddr(w))
	}
	if !slices.Equal(st.Node.Underlay, list) {
		return fmt.Errorf("underlay %v (%s), want %v", st.Node.Underlay, st.Node.UnderlayReason, list)
	}
	return nil
}

// Whatever a host gets beside the address in use leaves the tunnel where it is, also over a restart of the agent.
func TestUnderlayIsKept(t *testing.T) {
	t.Parallel()
	n := hosts.New(t)
	sw, out := n.Switch(), n.Host("out")
	a, b := n.Host("a"), n.Host("b")
	a.Plug(sw, "eth0", "10.0.1.11/24")
	b.Plug(sw, "eth0", "10.0.1.12/24")
	a.IP("route add default via 10.0.1.1 metric 100")
	first := a.Agent("--bootstrap")
	first.Ready(20 * time.Second)
	second := b.Agent("--join", "10.0.1.11")
	second.Ready(20 * time.Second)
	web, db := first.Pod("web"), second.Pod("db")
	hosts.Within(t, 10*time.Second, "pods reach each other", func() error { return db.Ping(web.IPv4()) })

	s := db.Stream(web.IPv4(), 20*time.Millisecond)
	a.Link("vpn0", "192.0.2.11/24", out, "eth0", "192.0.2.1/24")
	a.IP("route add default via 192.0.2.1 metric 50")
	a.Addr("eth0", "10.0.1.5/32", "10.0.1.200/24")
	a.Addr("eth0", "2001:db8:1::11/64")
	time.Sleep(2 * time.Second) // that nothing happens takes its time
	if sent, lost := s.Stop(); lost > 0 {
		t.Errorf("%d of %d pings lost", lost, sent)
	}
	if err := underlayIs(first, "10.0.1.11"); err != nil {
		t.Error(err)
	}
	first.Stop()
	first = a.Agent("--bootstrap")
	first.Ready(20 * time.Second)
	if err := underlayIs(first, "10.0.1.11", "2001:db8:1::11"); err != nil {
		t.Errorf("after a restart: %v", err)
	}
}

// An address that goes and comes back is waited for; one that goes for good gives way to the next, and status says why.
func TestUnderlayGoes(t *testing.T) {
	t.Parallel()
	n := hosts.New(t)
	sw := n.Switch()
	a, b := n.Host("a"), n.Host("b")
	a.Plug(sw, "eth0", "10.0.1.11/24", "2001:db8:1::11/64")
	b.Plug(sw, "eth0", "10.0.1.12/24")
	first := a.Agent("--bootstrap")
	first.Ready(20 * time.Second)
	second := b.Agent("--join", "10.0.1.11")
	second.Ready(20 * time.Second)
	web, db := first.Pod("web"), second.Pod("db")
	ping := func() error { return db.Ping(web.IPv4()) }
	hosts.Within(t, 10*time.Second, "pods reach each other", ping)

	a.IP("addr add 10.0.1.99/24 dev eth0", "addr del 10.0.1.11/24 dev eth0") // takes the secondary address with it
	hosts.Within(t, 5*time.Second, "status says that it is gone", func() error {
		if p := first.Problems(); !strings.Contains(p, "10.0.1.11") {
			return fmt.Errorf("problems: %s", p)
		}
		return nil
	})
	a.IP("addr add 10.0.1.11/24 dev eth0")
	hosts.Within(t, 5*time.Second, "pods reach each other again", ping)
	a.IP("link set eth0 down", "link set eth0 up", "addr add 2001:db8:1::11/64 dev eth0 nodad")
	hosts.Within(t, 5*time.Second, "pods reach each other after a flap", ping)
	if err := underlayIs(first, "10.0.1.11", "2001:db8:1::11"); err != nil || strings.Contains(first.Log(), "starting again") {
		t.Errorf("the address came back, and still the agent started again: %v", err)
	}

	a.IP("addr flush dev eth0 scope global", "addr add 10.0.1.33/24 dev eth0")
	hosts.Within(t, 15*time.Second, "the new address is used", func() error { return underlayIs(first, "10.0.1.33") })
	hosts.Within(t, time.Minute, "pods reach each other at the new address", ping)
	if why := first.Status().Node.UnderlayReason; !strings.Contains(why, "10.0.1.11") || !strings.Contains(why, "this host has lost") {
		t.Errorf("status says %q of the change", why)
	}
}

// DHCP gives another address of the same subnet: it is used long before the agent would give up the old one. A virtual address that was there before is not.
func TestUnderlayReplaced(t *testing.T) {
	t.Parallel()
	n := hosts.New(t)
	sw, a, b := n.Switch(), n.Host("a"), n.Host("b")
	a.Plug(sw, "eth0", "10.0.1.11/24")
	b.Plug(sw, "eth0", "10.0.1.12/24")
	b.Sysctl("net.ipv4.conf.eth0.promote_secondaries", "1")
	first := a.Agent("--bootstrap")
	first.Ready(20 * time.Second)
	b.IP("addr add 10.0.1.5/24 dev eth0")
	second := b.Agent("--join", "10.0.1.11")
	second.Ready(20 * time.Second)
	if err := underlayIs(second, "10.0.1.12"); err != nil {
		t.Fatal(err)
	}
	web, db := first.Pod("web"), second.Pod("db")
	ping := func() error { return web.Ping(db.IPv4()) }
	hosts.Within(t, 10*time.Second, "pods reach each other", ping)
	meter := stall.Begin()
	b.IP("addr del 10.0.1.12/24 dev eth0")
	const lost, moves = "this host has lost an underlay address", "the underlay address changes"
	hosts.Within(t, 5*time.Second, "the agent sees the loss", func() error {
		if !strings.Contains(second.Log(), lost) {
			return fmt.Errorf("not in the log: %s", lost)
		}
		return nil
	})
	b.IP("addr add 10.0.1.112/24 dev eth0", "addr del 10.0.1.5/24 dev eth0")
	hosts.Within(t, 15*time.Second, "the new address is used", func() error { return underlayIs(second, "10.0.1.112") })
	hosts.Within(t, time.Minute, "pods reach each other at the new address", ping)
	at := map[string]time.Time{}
	for line := range strings.Lines(second.Log()) {
		for _, what := range []string{lost, moves} {
			if text, _, ok := strings.Cut(strings.TrimPrefix(line, "time="), " "); ok && strings.Contains(line, what) {
				at[what], _ = time.Parse(time.RFC3339, text)
			}
		}
	}
	short := meter.Short()
	if took := at[moves].Sub(at[lost]); took <= 0 || took > 4*time.Second+short { // five without an address in its place
		t.Errorf("the agent kept the lost address for %v after the loss, and for %v the machine was short of CPUs", took, short)
	}
}

// A seed's name that resolves late is waited for: the address of the route to it is used, not that of the default route.
func TestSeedNameResolvesLate(t *testing.T) {
	t.Parallel()
	n := hosts.New(t)
	sw, out := n.Switch(), n.Host("out")
	a, b := n.Host("a"), n.Host("b")
	a.Plug(sw, "eth0", "10.0.1.11/24")
	b.Plug(sw, "eth0", "10.0.1.12/24")
	b.Link("eth1", "192.0.2.12/24", out, "eth0", "192.0.2.1/24")
	b.IP("route add default via 192.0.2.1")
	first := a.Agent("--bootstrap", "--underlay", "eth0")
	second := b.Agent("--join", "node-a", "--join", "node-z")
	hosts.Within(t, 10*time.Second, "status names the seed", func() error {
		if p := second.Problems(); !strings.Contains(p, "node-a") || !strings.Contains(p, "does not resolve") || !strings.Contains(p, "since") {
			return fmt.Errorf("problems: %s", p)
		}
		return nil
	})
	first.Ready(20 * time.Second)
	b.EtcHosts("10.0.1.11 node-a")
	second.Ready(30 * time.Second)
	if err := underlayIs(second, "10.0.1.12"); err != nil {
		t.Error(err)
	}
}

// A host's addresses may come and go while the agent starts (DHCP, a bond that settles): it starts again, and does not end.
func TestUnderlayFlaps(t *testing.T) {
	t.Parallel()
	n := hosts.New(t)
	a := n.Host("a")
	a.Plug(n.Switch(), "eth0", "10.0.1.11/24")
	ag := a.Agent("--bootstrap")
	for end, i := time.Now().Add(4*time.Second), 0; time.Now().Before(end); i++ {
		a.IP("addr del 10.0.1.11/24 dev eth0")
		time.Sleep(time.Duration(i%5) * 2 * time.Millisecond)
		a.IP("addr add 10.0.1.11/24 dev eth0")
		time.Sleep(time.Duration(i%7) * 4 * time.Millisecond)
	}
	ag.Ready(20 * time.Second)
	if err := underlayIs(ag, "10.0.1.11"); err != nil {
		t.Error(err)
	}
}
