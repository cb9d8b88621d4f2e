package hosts_test

import (
	"fmt"
	"testing"
	"time"

	"github.com/tulle-net/tulle/internal/testing/hosts"
)

// Packets go back to IPv6, where that is the first family, also by an encapsulation with larger headers than the preferred one, which the
// MTU of the TUN device is made for: the trial is as large as IPv6 carries, not as IPv4 does.
func TestFirstFamilyAgainIPv6(t *testing.T) {
	n := hosts.New(t)
	sw := n.Switch()
	var agents []*hosts.Agent
	for i := range 2 {
		h := n.Host(string(rune('a' + i)))
		h.Plug(sw, "eth0", fmt.Sprintf("10.0.1.%d/24", 11+i), fmt.Sprintf("2001:db8:1::%d/64", 11+i))
		agents = append(agents, h.Agent("--paths", "ipip,udp", "--underlay", fmt.Sprintf("2001:db8:1::%d,10.0.1.%[1]d", 11+i), []string{"--bootstrap", "--join=[2001:db8:1::11]"}[i]))
		agents[i].Ready(20 * time.Second)
	}
	web, db := agents[0].Pod("web"), agents[1].Pod("db")
	hosts.Within(t, 20*time.Second, "pods reach each other", func() error { return web.Ping(db.IPv4()) })
	both := func(why string, addrs ...string) {
		t.Helper()
		hosts.Within(t, 100*time.Second, "over "+addrs[0], func() error { return over(agents[0], "b", addrs[0], why) })
		hosts.Within(t, 100*time.Second, "over "+addrs[1], func() error { return over(agents[1], "a", addrs[1], why) })
	}
	both("", "2001:db8:1::12", "2001:db8:1::11")
	agents[0].Host.Run("nft", "add table inet t; add chain inet t o { type filter hook output priority -300; }; add chain inet t i { type filter hook input priority -300; };"+
		"add rule inet t o oifname eth0 meta l4proto { 4, 41 } drop; add rule inet t i iifname eth0 meta l4proto { 4, 41 } drop;"+
		"add table ip6 t; add chain ip6 t o { type filter hook output priority -300; }; add chain ip6 t i { type filter hook input priority -300; };"+
		"add rule ip6 t o oifname eth0 udp dport 6080 drop; add rule ip6 t i iifname eth0 udp dport 6080 drop")
	both("over IPv4, because IPv6 was not answered", "10.0.1.12", "10.0.1.11")
	agents[0].Host.Run("nft", "delete table ip6 t")
	both("", "2001:db8:1::12", "2001:db8:1::11")
}
