package hostnet

import "testing"

// Hosts that translate what leaves, as people write it, with nft and with iptables: what pods send to other nodes' pods through the tunnel is changed, too,
// unless a rule before says otherwise, or it is about something else.
func TestTranslationProblems(t *testing.T) {
	const post = "nft add table ip n; nft add chain ip n post '{ type nat hook postrouting priority 100; }'; nft add rule ip n post "
	const both = "nft add table inet n; nft add chain inet n post '{ type nat hook postrouting priority 100; }'; nft add rule inet n post "
	for _, c := range []struct {
		name, setup string
		want        []string
	}{
		{name: "nothing"},
		{name: "all", setup: post + "masquerade", want: []string{"rule 1 of nftables chain ip n post translates", "nft insert rule ip n post position", "ip saddr 10.244.0.0/16 ip daddr 10.244.0.0/16 accept"}},
		{name: "all of both families", setup: both + "counter masquerade random", want: []string{"chain inet n post", "ip6 saddr fd00:244::/32"}},
		{name: "all IPv6", setup: both + "meta nfproto ipv6 masquerade", want: []string{"chain inet n post", "ip6 saddr fd00:244::/32"}},
		{name: "all but lo", setup: post + "oifname != lo masquerade", want: []string{"chain ip n post"}},
		{name: "all but lo, by its index", setup: post + "oif != lo masquerade", want: []string{"chain ip n post"}},
		{name: "a larger network", setup: post + "ip saddr 10.0.0.0/8 snat to 192.0.2.1", want: []string{"chain ip n post"}},
		{name: "all but another network", setup: post + "ip daddr != 172.16.0.0/12 masquerade", want: []string{"chain ip n post"}},
		{name: "the uplink, which direct probes find", setup: post + "oifname eth0 masquerade"},
		{name: "Docker's network", setup: "iptables -t nat -A POSTROUTING -s 172.17.0.0/16 ! -o docker0 -j MASQUERADE"},
		{name: "to the outside", setup: post + "ip saddr 10.244.0.0/16 ip daddr != 10.244.0.0/16 masquerade"},
		{name: "to the outside of a larger network", setup: post + "ip daddr != 10.0.0.0/8 masquerade"},
		{name: "of a mark", setup: post + "meta mark 7 masquerade"},
		{name: "of some pods", setup: post + "ip saddr 10.244.3.0/24 masquerade"},
		{name: "a rule before", setup: post + "ip saddr 10.244.0.0/16 ip daddr 10.244.0.0/16 accept; nft add rule ip n post masquerade"},
		{name: "a rule before that may be about pods", setup: post + "ip daddr @s accept; nft add rule ip n post masquerade", want: nil},
		{name: "iptables, all", setup: "iptables -t nat -A POSTROUTING -s 172.17.0.0/16 -j MASQUERADE; iptables -t nat -A POSTROUTING -m comment --comment why -j MASQUERADE",
			want: []string{"rule 2 of nftables chain ip nat POSTROUTING", "iptables -t nat -I POSTROUTING 2 -s 10.244.0.0/16 -d 10.244.0.0/16 -j ACCEPT"}},
		{name: "ip6tables, all", setup: "ip6tables -t nat -A POSTROUTING -j MASQUERADE", want: []string{"ip6tables -t nat -I POSTROUTING 1 -s fd00:244::/32"}},
		{name: "as kube-proxy does", setup: "iptables -t nat -N KUBE-POSTROUTING; iptables -t nat -A POSTROUTING -j KUBE-POSTROUTING; iptables -t nat -A KUBE-POSTROUTING -m mark ! --mark 0x4000/0x4000 -j RETURN; " +
			"iptables -t nat -A KUBE-POSTROUTING -j MARK --xor-mark 0x4000; iptables -t nat -A KUBE-POSTROUTING -j MASQUERADE --random-fully"},
		{name: "in another chain", setup: "iptables -t nat -N MORE; iptables -t nat -A POSTROUTING -j MORE; iptables -t nat -A MORE -j MASQUERADE", want: []string{"chain ip nat MORE", "nft insert rule ip nat MORE position"}},
		{name: "our own table", setup: "nft add table inet tulle; nft add chain inet tulle postrouting '{ type nat hook postrouting priority 100; }'; nft add rule inet tulle postrouting masquerade"},
	} {
		t.Run(c.name, func(t *testing.T) {
			h := newHost(t)
			h.tun("tun0")
			if c.name == "a rule before that may be about pods" {
				h.shell("nft add table ip n; nft add set ip n s '{ type ipv4_addr; }'")
			}
			check := func() ([]Problem, error) {
				return TranslationProblems("tun0", pfx("10.244.0.0/16", "fd00:244::/32"))
			}
			h.shell(c.setup)
			if c.want != nil {
				h.mended(check, c.want...)
			} else if got := h.found(check); len(got) != 0 {
				t.Errorf("problems %v", got)
			}
		})
	}
}
