package hosts_test

import (
	"fmt"
	"regexp"
	"strconv"
	"testing"
	"time"

	"github.com/tulle-net/tulle/internal/testing/hosts"
)

// A host whose interface gets another MAC address, as a new card, a bridge with another port or a bond that fails over has, is known by it at once
// to the other hosts: its ARP requests ask in the name of its underlay address, also where a probe of the direct path is the first packet.
func TestMACChanges(t *testing.T) {
	t.Parallel()
	hs, agents := subnet(t, 2)
	web, db := agents[0].Pod("web"), agents[1].Pod("db")
	ping := func() error { return db.Ping(web.IPv4()) }
	hosts.Within(t, 20*time.Second, "packets go directly", func() error { return goes(agents[0], "b", "direct") })
	hosts.Within(t, 10*time.Second, "pods reach each other", ping)
	hs[1].Run("nft", "add table netdev seen; add chain netdev seen in { type filter hook ingress device eth0 priority 0; };"+
		"add rule netdev seen in ether type arp arp operation request arp saddr ip 10.0.1.11 counter;"+
		"add rule netdev seen in ether type arp arp operation request arp saddr ip 10.244.0.0/16 counter")
	counter := regexp.MustCompile(`counter packets (\d+)`)
	asked := func() (underlay, tun int) {
		found := counter.FindAllStringSubmatch(hs[1].Run("nft", "list table netdev seen"), -1)
		underlay, _ = strconv.Atoi(found[0][1])
		tun, _ = strconv.Atoi(found[1][1])
		return underlay, tun
	}
	for i := range 12 {
		before, _ := asked()
		hs[0].IP(fmt.Sprintf("link set eth0 address 02:00:00:00:01:%02x", i))
		hosts.Within(t, 10*time.Second, "a asks for b", func() error {
			if underlay, tun := asked(); underlay == before && tun == 0 {
				return fmt.Errorf("no request")
			}
			return nil
		})
		if _, tun := asked(); tun > 0 {
			t.Fatalf("change %d: %d ARP requests in the name of the tun address", i, tun)
		}
		hosts.Within(t, 3*time.Second, "pods reach each other", ping)
	}
}
