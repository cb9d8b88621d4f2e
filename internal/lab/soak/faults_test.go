package soak

import (
	"fmt"
	"syscall"
	"time"

	"github.com/tulle-net/tulle/internal/testing/hosts"
)

// fault is a kind of trouble. inject begins it at one machine and returns what ends it.
type fault struct {
	name   string
	ends   bool // it ends an agent
	inject func(c *cluster, m *machine) (mend func())
}

// faults are all kinds. The figures in docs/reliability.md have their names.
var faults = []fault{
	{"agent killed, started later", true, func(c *cluster, m *machine) func() {
		m.agent.Kill()
		return func() { c.start(m) }
	}},
	{"agent restarted", true, func(c *cluster, m *machine) func() {
		m.agent.Stop()
		c.start(m)
		return func() {}
	}},
	{"agent killed, started at once, its clock hours ahead", true, func(c *cluster, m *machine) func() {
		m.agent.Kill()
		m.clock = c.rand.IntN(10) * 3600
		c.start(m)
		return func() {}
	}},
	{"host cut off", false, func(c *cluster, m *machine) func() {
		return m.firewall(`chain i { type filter hook input priority -300; iifname "eth0" drop; }
			chain o { type filter hook output priority -300; oifname "eth0" drop; }
			chain f { type filter hook forward priority -300; oifname "eth0" drop; }`)
	}},
	{"subnets cut off from each other", false, func(c *cluster, m *machine) func() {
		return firewall(c.router, "chain f { type filter hook forward priority 0; policy drop; }")
	}},
	{"link down and up", false, func(c *cluster, m *machine) func() {
		m.IP("link set eth0 down")
		return func() { m.IP("link set eth0 up", "route replace default via "+m.gateway) }
	}},
	{"MTU of the router lowered to 1300", false, func(c *cluster, m *machine) func() {
		c.router.IP("link set " + m.dev + " mtu 1300")
		return func() { c.router.IP("link set " + m.dev + " mtu 1500") }
	}},
	{"MTU lowered, and no ICMP says so", false, func(c *cluster, m *machine) func() {
		mend := firewall(c.router, "chain o { type filter hook output priority 0; icmp type destination-unreachable drop; }")
		c.router.IP("link set " + m.dev + " mtu 1300")
		return func() {
			c.router.IP("link set " + m.dev + " mtu 1500")
			mend()
		}
	}},
	{"udp filtered", false, func(c *cluster, m *machine) func() {
		return m.firewall("chain i { type filter hook input priority -300; udp dport 6080 drop; }")
	}},
	{"ipip and direct filtered", false, func(c *cluster, m *machine) func() {
		return m.firewall(`chain p { type filter hook prerouting priority -300; iifname "eth0" meta l4proto { 4, 41 } drop
			iifname "eth0" ip saddr 10.244.0.0/16 drop; }`)
	}},
	{"one direction filtered", false, func(c *cluster, m *machine) func() {
		return m.firewall("chain o { type filter hook output priority -300; udp dport { 6080, 4789 } drop; }")
	}},
	{"gossip filtered", false, func(c *cluster, m *machine) func() {
		return m.firewall("chain i { type filter hook input priority -300; th dport 7946 drop; }")
	}},
	{"disk full", false, func(c *cluster, m *machine) func() { return m.fill(c.t) }},
	{"disk full at a restart", true, func(c *cluster, m *machine) func() {
		mend := m.fill(c.t)
		m.agent.Stop()
		c.start(m)
		return mend
	}},
	{"agent stopped for a while, not ended", false, func(c *cluster, m *machine) func() {
		m.agent.Signal(syscall.SIGSTOP)
		return func() { m.agent.Signal(syscall.SIGCONT) }
	}},
	{"underlay address changed", false, func(c *cluster, m *machine) func() {
		other := fmt.Sprintf("%s2", m.addr) // .11 becomes .112
		m.IP("address del "+m.addr+"/24 dev eth0", "address add "+other+"/24 dev eth0", "route replace default via "+m.gateway)
		time.Sleep(3 * time.Second)
		return func() {
			m.IP("address del "+other+"/24 dev eth0", "address add "+m.addr+"/24 dev eth0", "route replace default via "+m.gateway)
		}
	}},
}

// firewall adds a table of chains to the machine, and returns what removes it.
func (m *machine) firewall(chains string) (mend func()) { return firewall(m.Host, chains) }

func firewall(h *hosts.Host, chains string) (mend func()) {
	h.Run("nft", "-f", h.WriteFile("soak.nft", "table inet soak {\n"+chains+"\n}\n"))
	return func() { h.Run("nft", "delete table inet soak") }
}
