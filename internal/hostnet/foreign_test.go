package hostnet

import (
	"net/netip"
	"os/exec"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// shell runs a line of shell in the host's namespace.
func (h *host) shell(line string) {
	h.t.Helper()
	if out, err := exec.Command("ip", "netns", "exec", h.name, "sh", "-ec", line).CombinedOutput(); err != nil {
		h.t.Fatalf("%s: %v: %s", line, err, out)
	}
}

// found runs a check in the host's namespace, and returns its problems in one text.
func (h *host) found(check func() ([]Problem, error)) []Problem {
	h.t.Helper()
	var got []Problem
	h.do(func() (err error) { got, err = check(); return err })
	return got
}

// mended fails the test unless the check finds one problem with all the words, and none after the problem's command was run.
func (h *host) mended(check func() ([]Problem, error), words ...string) {
	h.t.Helper()
	got := h.found(check)
	if len(got) != 1 {
		h.t.Fatalf("problems %v, want one", got)
	}
	for _, w := range words {
		if !strings.Contains(got[0].String(), w) {
			h.t.Errorf("%q is not in %q", w, got[0])
		}
	}
	h.shell(got[0].Command)
	if got := h.found(check); len(got) != 0 {
		h.t.Errorf("after the remedy: %v", got)
	}
}

// The rules of iptables-legacy, made by the real programs.
func TestLegacyForward(t *testing.T) {
	for _, c := range []struct {
		name, setup string
		want        []string // nil: no problem
	}{
		{name: "no table"},
		{name: "policy ACCEPT", setup: "iptables-legacy -P FORWARD ACCEPT"},
		{name: "policy DROP", setup: "iptables-legacy -P FORWARD DROP", want: []string{"the FORWARD chain of iptables-legacy has the policy DROP", "iptables-legacy -I FORWARD -s 10.244.0.0/16 -j ACCEPT && iptables-legacy -I FORWARD -d 10.244.0.0/16 -j ACCEPT"}},
		{name: "IPv6", setup: "ip6tables-legacy -P FORWARD DROP", want: []string{"the FORWARD chain of ip6tables-legacy has the policy DROP"}},
		{name: "as Docker has it", setup: "iptables-legacy -N DOCKER; iptables-legacy -P FORWARD DROP; iptables-legacy -A FORWARD -m conntrack --ctstate ESTABLISHED -j ACCEPT; iptables-legacy -A FORWARD -o docker0 -j DOCKER; iptables-legacy -A INPUT -p udp --dport 9 -j DROP",
			want: []string{"has the policy DROP"}},
		{name: "REJECT at the end", setup: "iptables-legacy -A FORWARD -i eth1 -j ACCEPT; iptables-legacy -A FORWARD -j REJECT", want: []string{"refuses in its last rule"}},
		{name: "DROP at the end", setup: "iptables-legacy -A FORWARD -j DROP", want: []string{"refuses in its last rule"}},
		{name: "some are refused at the end", setup: "iptables-legacy -A FORWARD -p tcp --dport 25 -j REJECT"},
		{name: "the device is accepted", setup: "iptables-legacy -P FORWARD DROP; iptables-legacy -A FORWARD -i tun0 -j ACCEPT; iptables-legacy -A FORWARD -o tun0 -j ACCEPT"},
		{name: "as Docker 27 has it", setup: "iptables-legacy -P FORWARD DROP; iptables-legacy -A FORWARD -i docker0 ! -o docker0 -j ACCEPT; iptables-legacy -A FORWARD -i docker0 -o docker0 -j ACCEPT", want: []string{"policy DROP"}},
		{name: "all but another network is accepted", setup: "iptables-legacy -P FORWARD DROP; iptables-legacy -A FORWARD ! -s 192.168.0.0/16 -j ACCEPT"},
		{name: "another device is accepted", setup: "iptables-legacy -P FORWARD DROP; iptables-legacy -A FORWARD -i tun01 -j ACCEPT", want: []string{"policy DROP"}},
		{name: "the cluster is accepted", setup: "iptables-legacy -P FORWARD DROP; iptables-legacy -A FORWARD -s 10.0.0.0/8 -j ACCEPT"},
		{name: "a part of the cluster is accepted", setup: "iptables-legacy -P FORWARD DROP; iptables-legacy -A FORWARD -s 10.244.3.0/24 -j ACCEPT", want: []string{"policy DROP"}},
		{name: "the cluster is dropped", setup: "iptables-legacy -P FORWARD DROP; iptables-legacy -A FORWARD -s 10.0.0.0/8 -j DROP", want: []string{"policy DROP"}},
		{name: "the cluster is accepted in a chain of its own", setup: "iptables-legacy -P FORWARD DROP; iptables-legacy -N DOCKER-USER; iptables-legacy -N other; iptables-legacy -A FORWARD -j DOCKER-USER; iptables-legacy -A DOCKER-USER -i eth7 -j RETURN; iptables-legacy -A DOCKER-USER -s 10.244.0.0/16 -j ACCEPT"},
		{name: "everything is accepted in a chain of its own", setup: "iptables-legacy -P FORWARD DROP; iptables-legacy -N DOCKER-USER; iptables-legacy -A FORWARD -j DOCKER-USER; iptables-legacy -A DOCKER-USER -j ACCEPT; iptables-legacy -A DOCKER-USER -j RETURN"},
		{name: "everything of one device is accepted in a chain of its own", setup: "iptables-legacy -P FORWARD DROP; iptables-legacy -N DOCKER; iptables-legacy -A FORWARD -o docker0 -j DOCKER; iptables-legacy -A DOCKER -j ACCEPT", want: []string{"policy DROP"}},
		{name: "everything is accepted too late", setup: "iptables-legacy -P FORWARD DROP; iptables-legacy -N DOCKER-USER; iptables-legacy -A FORWARD -j DOCKER-USER; iptables-legacy -A DOCKER-USER -j RETURN; iptables-legacy -A DOCKER-USER -j ACCEPT", want: []string{"policy DROP"}},
		{name: "a chain that forwarded packets do not come to", setup: "iptables-legacy -P FORWARD DROP; iptables-legacy -N DOCKER-USER; iptables-legacy -A DOCKER-USER -s 10.244.0.0/16 -j ACCEPT; iptables-legacy -A INPUT -j DOCKER-USER", want: []string{"policy DROP"}},
		{name: "the cluster is accepted, IPv6", setup: "ip6tables-legacy -P FORWARD DROP; ip6tables-legacy -A FORWARD -d fd00:244::/32 -j ACCEPT"},
	} {
		t.Run(c.name, func(t *testing.T) {
			h := newHost(t)
			check := func() ([]Problem, error) { return ForwardProblems("tun0", pfx("10.244.0.0/16", "fd00:244::/32")) }
			if c.setup != "" {
				h.shell(c.setup)
			}
			if c.want != nil {
				h.mended(check, c.want...)
			} else if got := h.found(check); len(got) != 0 {
				t.Errorf("problems %v", got)
			}
		})
	}
}

// Rules about forwarded packets as people write them, with nft and with iptables.
func TestForwardRules(t *testing.T) {
	const drop = "nft add table inet f; nft add chain inet f forwarded '{ type filter hook forward priority 0; policy drop; }'; "
	const both = "; nft add rule inet f forwarded ip6 saddr fd00:244::/32 accept; nft add rule inet f forwarded ip6 daddr fd00:244::/32 accept"
	for _, c := range []struct {
		name, setup string
		want        []string
	}{
		{name: "policy drop", setup: drop, want: []string{"inet f forwarded", "policy drop", "does not name tun0, 10.244.0.0/16, fd00:244::/32"}},
		{name: "both families accepted", setup: drop + "nft add rule inet f forwarded ip saddr 10.244.0.0/16 accept; nft add rule inet f forwarded ip daddr 10.244.0.0/16 accept" + both},
		{name: "one family accepted", setup: drop + "nft add rule inet f forwarded ip saddr 10.244.0.0/16 accept; nft add rule inet f forwarded ip daddr 10.244.0.0/16 accept", want: []string{"does not name fd00:244::/32: pods' packets are dropped; nft insert rule inet f forwarded ip6 saddr"}},
		{name: "a larger network accepted", setup: drop + "nft add rule inet f forwarded ip saddr 10.0.0.0/8 accept; nft add rule inet f forwarded ip daddr 10.240.0.0/12 accept" + both},
		{name: "a part accepted", setup: drop + "nft add rule inet f forwarded ip saddr 10.244.3.0/24 accept" + both, want: []string{"does not name 10.244.0.0/16: pods"}},
		{name: "another family's beginning", setup: drop + "nft add rule inet f forwarded meta nfproto ipv6 accept", want: []string{"10.244.0.0/16"}},
		{name: "devices by a set", setup: drop + "nft add rule inet f forwarded iifname '{ tun0, docker0 }' accept; nft add rule inet f forwarded oifname '{ tun0, docker0 }' accept"},
		{name: "other devices by a set", setup: drop + "nft add rule inet f forwarded iifname '{ br0, docker0 }' accept", want: []string{"does not name tun0"}},
		{name: "devices by their beginning", setup: drop + "nft add rule inet f forwarded iifname 'tun*' accept"},
		{name: "addresses by a set", setup: drop + "nft add set inet f pods '{ type ipv4_addr; flags interval; }'; nft add rule inet f forwarded ip saddr @pods accept" + both},
		{name: "all but them", setup: drop + "nft add rule inet f forwarded ip saddr != 10.244.0.0/16 accept" + both, want: []string{"does not name 10.244.0.0/16: pods"}},
		{name: "another chain of the table", setup: drop + "nft add chain inet f in '{ type filter hook input priority 0; }'; nft add rule inet f in iifname tun0 accept", want: []string{"does not name tun0"}},
		{name: "a chain that it leads to", setup: drop + "nft add chain inet f more; nft add rule inet f more iifname tun0 accept; nft add rule inet f forwarded jump more"},
		{name: "a chain by a map", setup: drop + "nft add chain inet f more; nft add rule inet f more oifname tun0 accept; nft add rule inet f forwarded meta nfproto vmap '{ ipv4 : jump more }'"},
		{name: "iptables, a last REJECT", setup: "iptables -A FORWARD -i eth1 -j ACCEPT; iptables -A FORWARD -j REJECT --reject-with icmp-host-prohibited", want: []string{"ip filter FORWARD", "refuses in its last rule"}},
		{name: "iptables, as Docker has it", setup: "iptables -P FORWARD DROP; iptables -A FORWARD -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT; iptables -A FORWARD -i docker0 ! -o docker0 -j ACCEPT; iptables -A FORWARD -i docker0 -o docker0 -j ACCEPT", want: []string{"ip filter FORWARD", "policy drop"}},
		{name: "iptables, everything accepted in a chain of its own", setup: "iptables -P FORWARD DROP; iptables -N DOCKER-USER; iptables -A FORWARD -j DOCKER-USER; iptables -A DOCKER-USER -j ACCEPT; iptables -A DOCKER-USER -j RETURN"},
		{name: "iptables, everything accepted of one device", setup: "iptables -P FORWARD DROP; iptables -N DOCKER-USER; iptables -A FORWARD -i docker0 -j DOCKER-USER; iptables -A DOCKER-USER -j ACCEPT", want: []string{"ip filter FORWARD"}},
		{name: "iptables, everything accepted too late", setup: "iptables -P FORWARD DROP; iptables -N DOCKER-USER; iptables -A FORWARD -j DOCKER-USER; iptables -A DOCKER-USER -j RETURN; iptables -A DOCKER-USER -j ACCEPT", want: []string{"ip filter FORWARD"}},
		{name: "a table of the same names", setup: "nft add table inet filter; nft add chain inet filter FORWARD '{ type filter hook forward priority 0; policy drop; }'", want: []string{"nft insert rule inet filter FORWARD ip6 daddr fd00:244::/32 accept"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			h := newHost(t)
			check := func() ([]Problem, error) { return ForwardProblems("tun0", pfx("10.244.0.0/16", "fd00:244::/32")) }
			h.shell(c.setup)
			if c.want != nil {
				h.mended(check, c.want...)
			} else if got := h.found(check); len(got) != 0 {
				t.Errorf("problems %v", got)
			}
		})
	}
}

// A table that is not what this program knows is an error, and nothing is read outside of it.
func TestLegacyLayout(t *testing.T) {
	l := legacyLayouts[0]
	whole := make([]byte, 152)
	whole[l.offsets], whole[l.offsets+2], whole[l.extensions], whole[l.extensions+iptTargetLen] = 112, 152, 40, 0xfe
	for _, i := range []int{1, 2, 3} {
		whole[l.extensions+iptTargetLen+i] = 0xff
	}
	if rules, policy, err := l.parse(whole, 0, 0); err != nil || policy != legacyAccept || len(rules) != 0 {
		t.Fatalf("%v, policy %d, %v", rules, policy, err)
	}
	for n := range whole {
		if _, _, err := l.parse(whole[:n], 0, 0); err == nil {
			t.Errorf("%d bytes of %d were read", n, len(whole))
		}
	}
	for _, at := range [][2]int{{-1, 0}, {8, 0}, {152, 152}, {1 << 20, 1 << 20}, {0, 100}} {
		if _, _, err := l.parse(whole, at[0], at[1]); err == nil {
			t.Errorf("a chain from %d to %d was read", at[0], at[1])
		}
	}
	for _, at := range []int{-1, 8, 152, 1 << 20} {
		if _, err := l.user(whole, at); err == nil {
			t.Errorf("a chain from %d was read", at)
		}
	}
	for i := range whole {
		for _, b := range []byte{0, 1, 0x7f, 0xff} {
			damaged := append([]byte(nil), whole...)
			damaged[i] = b
			_, _, _ = l.parse(damaged, 0, 0)
			_, _ = l.user(damaged, 0)
		}
	}
}

// Firewalls as people write them, with nft and with iptables.
func TestPortProblems(t *testing.T) {
	const nft = "nft add table inet f; nft add chain inet f in '{ type filter hook input priority 0; policy %; }'; "
	accept, drop := strings.ReplaceAll(nft, "%", "accept"), strings.ReplaceAll(nft, "%", "drop")
	udp := []Port{{unix.IPPROTO_UDP, 6080}}
	gossip := []Port{{unix.IPPROTO_TCP, 7946}}
	// What ufw 0.36 makes of its before.rules, as far as it concerns such packets.
	const ufw = "iptables -N ufw-before-input; iptables -N ufw-user-input; iptables -N ufw-not-local; iptables -P INPUT DROP; iptables -A INPUT -j ufw-before-input; " +
		"iptables -A ufw-before-input -i lo -j ACCEPT; iptables -A ufw-before-input -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT; " +
		"iptables -A ufw-before-input -m conntrack --ctstate INVALID -j DROP; iptables -A ufw-before-input -p icmp --icmp-type echo-request -j ACCEPT; " +
		"iptables -A ufw-before-input -p udp --sport 67 --dport 68 -j ACCEPT; iptables -A ufw-before-input -j ufw-not-local; " +
		"iptables -A ufw-not-local -m addrtype --dst-type LOCAL -j RETURN; iptables -A ufw-not-local -m addrtype --dst-type MULTICAST -j RETURN; " +
		"iptables -A ufw-not-local -m addrtype --dst-type BROADCAST -j RETURN; iptables -A ufw-not-local -m limit --limit 3/min --limit-burst 10 -j LOG; iptables -A ufw-not-local -j DROP; " +
		"iptables -A ufw-before-input -d 224.0.0.251 -p udp --dport 5353 -j ACCEPT; iptables -A ufw-before-input -j ufw-user-input; "
	for _, c := range []struct {
		name, setup string
		ports       []Port
		addrs       []netip.Addr
		want        []string
	}{
		{name: "nothing"},
		{name: "accepts all", setup: accept},
		{name: "the port is dropped", setup: accept + "nft add rule inet f in udp dport 6080 drop", want: []string{"inet f in drops what arrives by UDP port 6080", "nft delete rule inet f in handle"}},
		{name: "the port of a source is dropped", setup: accept + "nft add rule inet f in ip saddr 10.0.1.0/24 udp dport 6080 counter drop", want: []string{"UDP port 6080"}},
		{name: "the port is rejected", setup: accept + "nft add rule inet f in udp dport 6080 reject", want: []string{"UDP port 6080"}},
		{name: "another port is dropped", setup: accept + "nft add rule inet f in udp dport 6081 drop"},
		{name: "the port of TCP is dropped", setup: accept + "nft add rule inet f in tcp dport 6080 drop"},
		{name: "accepted before it is dropped", setup: accept + "nft add rule inet f in udp dport 6080 accept; nft add rule inet f in udp dport 6080 drop"},
		{name: "policy drop", setup: drop, want: []string{"inet f in drops what no rule accepts, and none names UDP port 6080", "nft insert rule inet f in udp dport 6080 accept"}},
		{name: "policy drop, as usual", setup: drop + "nft add rule inet f in iifname lo accept; nft add rule inet f in ct state established,related accept; nft add rule inet f in ip protocol icmp accept; nft add rule inet f in tcp dport 22 accept",
			want: []string{"none names UDP port 6080"}},
		{name: "policy drop, a last rule", setup: accept + "nft add rule inet f in tcp dport 22 accept; nft add rule inet f in reject", want: []string{"none names UDP port 6080"}},
		{name: "policy drop, the port accepted", setup: drop + "nft add rule inet f in udp dport 6080 accept"},
		{name: "policy drop, all UDP accepted", setup: drop + "nft add rule inet f in meta l4proto udp accept"},
		{name: "policy drop, the neighbours accepted", setup: drop + "nft add rule inet f in ip saddr 10.0.0.0/20 accept"},
		{name: "policy drop, the interface accepted", setup: drop + "nft add rule inet f in iifname eth0 accept"},
		{name: "policy drop, a set accepted", setup: drop + "nft add rule inet f in udp dport '{ 53, 6080 }' accept"},
		{name: "policy drop, a range accepted", setup: drop + "nft add rule inet f in udp dport 6000-6100 accept"},
		{name: "policy drop, another chain", setup: drop + "nft add chain inet f more; nft add rule inet f in jump more", want: []string{"none names UDP port 6080"}},
		{name: "another chain accepts it", setup: drop + "nft add chain inet f more; nft add rule inet f more udp dport 6080 accept; nft add rule inet f in jump more"},
		{name: "another chain drops it", setup: accept + "nft add chain inet f more; nft add rule inet f more udp dport 6080 drop; nft add rule inet f in jump more", want: []string{"inet f more drops", "nft delete rule inet f more handle"}},
		{name: "another chain for another interface", setup: drop + "nft add chain inet f more; nft add rule inet f more accept; nft add rule inet f in iifname docker0 jump more", want: []string{"none names UDP port 6080"}},
		{name: "another chain for pods", setup: drop + "nft add chain inet f more; nft add rule inet f more accept; nft add rule inet f in ip saddr 10.244.0.0/16 goto more; nft add rule inet f in ip6 saddr fd00:244::/48 goto more", want: []string{"none names UDP port 6080"}},
		{name: "another chain for the interface", setup: drop + "nft add chain inet f more; nft add rule inet f more accept; nft add rule inet f in iifname eth\\* goto more"},
		{name: "a verdict by a map", setup: drop + "nft add chain inet f more; nft add rule inet f more accept; nft add rule inet f in iifname vmap '{ eth0 : goto more }'"},
		{name: "policy drop, a set without the port accepted", setup: drop + "nft add rule inet f in udp dport '{ 53, 67 }' accept; nft add rule inet f in meta l4proto '{ icmp, ipv6-icmp }' accept", want: []string{"none names UDP port 6080"}},
		{name: "the first of its connections accepted", setup: drop + "nft add rule inet f in ct state new tcp dport 7946 accept", ports: gossip},
		{name: "… with others", setup: drop + "nft add rule inet f in ct state '{ new, established }' tcp dport 7946 accept", ports: gossip},
		{name: "… but the tunnel is not tracked", setup: drop + "nft add rule inet f in ct state new udp dport 6080 accept", want: []string{"none names UDP port 6080"}},
		{name: "packets that are not tracked accepted", setup: drop + "nft add rule inet f in ct state untracked accept"},
		{name: "all but those that are tracked dropped", setup: accept + "nft add rule inet f in ct state != established udp dport 6080 drop", want: []string{"UDP port 6080"}},
		{name: "verdicts by state", setup: drop + "nft add rule inet f in ct state vmap '{ established : accept, related : accept, invalid : drop }'", want: []string{"none names UDP port 6080"}},
		{name: "as RHEL writes it", setup: "iptables -P INPUT DROP; iptables -A INPUT -p tcp -m state --state NEW -m tcp --dport 7946 -j ACCEPT", ports: gossip},
		{name: "iptables, not tracked", setup: "iptables -P INPUT DROP; iptables -A INPUT -p udp --dport 6080 -m conntrack --ctstate NEW,UNTRACKED -j ACCEPT"},
		{name: "iptables, new only", setup: "iptables -P INPUT DROP; iptables -A INPUT -p udp --dport 6080 -m conntrack --ctstate NEW -j ACCEPT", want: []string{"none names UDP port 6080"}},
		{name: "iptables, a last REJECT", setup: "iptables -A INPUT -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT; iptables -A INPUT -p tcp --dport 22 -j ACCEPT; iptables -A INPUT -j REJECT --reject-with icmp-host-prohibited", want: []string{"ip filter INPUT drops what no rule accepts, and none names UDP port 6080"}},
		{name: "iptables, the port rejected, with a comment", setup: "iptables -A INPUT -p udp --dport 6080 -m comment --comment why -j REJECT", want: []string{"ip filter INPUT drops what arrives by UDP port 6080"}},
		{name: "lo by its index", setup: drop + "nft add rule inet f in iif lo accept", want: []string{"none names UDP port 6080"}},
		{name: "a pair of protocol and port accepted", setup: drop + "nft add rule inet f in meta l4proto . th dport '{ udp . 6080 }' accept"},
		{name: "strangers' packets to the port dropped", setup: accept + "nft add set inet f friends '{ type ipv4_addr; }'; nft add rule inet f in ip saddr != @friends udp dport 6080 drop; nft add rule inet f in ip saddr != 10.0.1.0/24 udp dport 6080 drop"},
		{name: "the other family is dropped", setup: "ip6tables -P INPUT DROP; ip6tables-legacy -P INPUT DROP", addrs: []netip.Addr{netip.MustParseAddr("10.0.1.11")}},
		{name: "this family is dropped", setup: "iptables -P INPUT DROP", addrs: []netip.Addr{netip.MustParseAddr("10.0.1.11")}, want: []string{"none names UDP port 6080"}},
		{name: "iptables-legacy, as RHEL writes it", setup: "iptables-legacy -P INPUT DROP; iptables-legacy -A INPUT -p tcp -m state --state NEW -m tcp --dport 7946 -j ACCEPT", ports: gossip},
		{name: "iptables-legacy, not tracked", setup: "iptables-legacy -P INPUT DROP; iptables-legacy -A INPUT -p udp --dport 6080 -m conntrack --ctstate NEW,UNTRACKED -j ACCEPT"},
		{name: "iptables-legacy, new only", setup: "iptables-legacy -P INPUT DROP; iptables-legacy -A INPUT -p udp --dport 6080 -m conntrack --ctstate NEW -j ACCEPT", want: []string{"none names UDP port 6080"}},
		{name: "ufw", setup: ufw + "iptables -A ufw-user-input -p tcp --dport 7946 -j ACCEPT; iptables -A ufw-user-input -p udp --dport 6080 -j ACCEPT", ports: append(gossip, udp...)},
		{name: "ufw, which leads to another chain that drops", setup: ufw + "iptables -D ufw-not-local -j DROP; iptables -N ufw-drop; iptables -A ufw-drop -j DROP; iptables -A ufw-not-local -j ufw-drop; " +
			"iptables -A ufw-user-input -p udp --dport 6080 -j ACCEPT"},
		{name: "ufw, the port of another protocol", setup: ufw + "iptables -A ufw-user-input -p tcp --dport 6080 -j ACCEPT", want: []string{"none names UDP port 6080"}},
		{name: "as ufw begins", setup: "iptables -P INPUT DROP; iptables -A INPUT -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT", want: []string{"none names UDP port 6080"}},
		{name: "on its way out", setup: "nft add table ip f; nft add chain ip f out '{ type filter hook output priority 0; }'; nft add rule ip f out udp dport 6080 drop", want: []string{"ip f out drops what is sent by UDP port 6080"}},
		{name: "of a protocol", setup: accept + "nft add rule inet f in meta l4proto 4 drop", ports: []Port{{Proto: 4}}, want: []string{"IP protocol 4"}},
		{name: "of a protocol, by the header", setup: "nft add table ip f; nft add chain ip f in '{ type filter hook input priority 0; }'; nft add rule ip f in ip protocol 4 drop", ports: []Port{{Proto: 4}}, want: []string{"IP protocol 4"}},
		{name: "iptables", setup: "iptables -A INPUT -p udp --dport 6080 -j DROP", want: []string{"ip filter INPUT drops what arrives by UDP port 6080"}},
		{name: "iptables, protocol 4", setup: "iptables -A INPUT -p 4 -j DROP", ports: []Port{{Proto: 4}}, want: []string{"IP protocol 4"}},
		{name: "ip6tables, a policy", setup: "ip6tables -P INPUT DROP", want: []string{"ip6 filter INPUT drops what no rule accepts"}},
		{name: "iptables-legacy", setup: "iptables-legacy -A INPUT -i lo -j ACCEPT; iptables-legacy -A INPUT -p udp --dport 6080 -j DROP", want: []string{"chain INPUT of iptables-legacy drops UDP port 6080 (rule 2)", "iptables-legacy -D INPUT 2"}},
		{name: "iptables-legacy, another port", setup: "iptables-legacy -A INPUT -p udp --dport 6081 -j DROP; iptables-legacy -A INPUT -p tcp --dport 6080 -j DROP; iptables-legacy -A INPUT -p udp ! --dport 6081 -m comment --comment x -j ACCEPT"},
		{name: "iptables-legacy, protocol 4 on its way out", setup: "iptables-legacy -A OUTPUT -p 4 -j REJECT", ports: []Port{{Proto: 4}}, want: []string{"chain OUTPUT of iptables-legacy drops IP protocol 4"}},
		{name: "iptables-legacy, a policy", setup: "iptables-legacy -P INPUT DROP; iptables-legacy -A INPUT -m conntrack --ctstate ESTABLISHED -j ACCEPT; iptables-legacy -A INPUT -p tcp --dport 22 -j ACCEPT", want: []string{"drops what no rule accepts, and none names UDP port 6080", "iptables-legacy -I INPUT -p 17 --dport 6080 -j ACCEPT"}},
		{name: "iptables-legacy, a policy, the neighbours accepted", setup: "iptables-legacy -P INPUT DROP; iptables-legacy -A INPUT -s 10.0.0.0/8 -j ACCEPT"},
		{name: "iptables-legacy, all but UDP", setup: "iptables-legacy -A INPUT ! -p udp -j DROP"},
		{name: "iptables-legacy, with a comment", setup: "iptables-legacy -A INPUT -p udp --dport 6080 -m comment --comment why -j DROP", want: []string{"drops UDP port 6080"}},
		{name: "ip6tables-legacy", setup: "ip6tables-legacy -A INPUT -p udp -m udp --dport 6080 -j DROP", want: []string{"chain INPUT of ip6tables-legacy drops UDP port 6080"}},
		{name: "Tulle's own table", setup: "nft add table inet tulle; nft add chain inet tulle out '{ type filter hook output priority 0; }'; nft add rule inet tulle out meta l4proto 4 drop", ports: []Port{{Proto: 4}}},
	} {
		t.Run(c.name, func(t *testing.T) {
			h := newHost(t)
			if c.setup != "" {
				h.shell(c.setup)
			}
			if c.ports == nil {
				c.ports = udp
			}
			check := func() ([]Problem, error) {
				return PortProblems(Outer{Ports: c.ports, Gossip: 7946, Addrs: c.addrs, Links: []string{"eth0"}, Pods: pfx("10.244.0.0/16", "fd00:244::/48")})
			}
			if c.want != nil {
				h.mended(check, c.want...)
			} else if got := h.found(check); len(got) != 0 {
				t.Errorf("problems %v", got)
			}
		})
	}
}

// Commands for what a cluster CIDR overlaps are printed where they take nothing from the host but that, and then they work.
func TestOverlapCommands(t *testing.T) {
	for _, c := range []struct{ name, setup, what, command string }{
		{"an address", "ip addr add 10.244.7.1/24 dev eth0", "10.244.7.1/24 on eth0", "ip address del 10.244.7.1/24 dev eth0"},
		{"the address of the default route", "ip addr add 10.244.7.1/24 dev eth0; ip route add default via 10.244.7.254", "10.244.7.1/24 on eth0", ""},
		{"a network around", "ip addr add 10.1.0.1/8 dev eth0", "route 10.0.0.0/8 dev eth0", ""},
		{"a route with two next hops", "ip addr add 192.0.2.1/24 dev eth0; ip route add 10.244.9.0/24 proto bird metric 20 nexthop via 192.0.2.8 nexthop via 192.0.2.9", "10.244.9.0/24", "ip route del 10.244.9.0/24 proto bird metric 20 nexthop via 192.0.2.8 dev eth0 nexthop via 192.0.2.9 dev eth0"},
	} {
		t.Run(c.name, func(t *testing.T) {
			h := newHost(t)
			h.device("eth0")
			h.shell(c.setup)
			check := func() ([]Problem, error) { return OverlapProblems("tun0", pfx("10.244.0.0/16"), nil) }
			got := h.found(check)
			if len(got) != 1 || !strings.Contains(got[0].What, c.what) || got[0].Command != c.command {
				t.Fatalf("problems %q, want one of %q with the command %q", got, c.what, c.command)
			}
			if c.command != "" {
				h.mended(check)
			}
		})
	}
}

func TestTunnelProblems(t *testing.T) {
	h := newHost(t)
	check := func() ([]Problem, error) { return TunnelProblems(4789) }
	h.shell("ip link add other type vxlan id 7 dstport 4790; ip link set other up; ip link add down type vxlan id 8 dstport 4789")
	if got := h.found(check); len(got) != 0 {
		t.Errorf("problems %v", got)
	}
	h.shell("ip link add flannel.1 type vxlan id 1 dstport 4789; ip link set flannel.1 up")
	if got := h.found(check); len(got) != 1 || !strings.Contains(got[0].String(), "flannel.1") || !strings.Contains(got[0].What, "UDP port 4789") || got[0].Command != "" {
		t.Errorf("problems %v", got) // something may need that device: no command is printed for scripts
	}
}

func TestSettingProblems(t *testing.T) {
	h := newHost(t)
	h.tun("tun0")
	h.check(h.nl.LinkSetAlias(h.link("tun0"), Alias))
	for _, d := range []string{"eth0", "eth0.7", "eth1"} {
		h.device(d)
	}
	h.route("0.0.0.0/0", "", "eth0.7", 0, unix.RTPROT_STATIC)
	check := func() ([]Problem, error) { return SettingProblems("tun0", []string{"eth0"}, true, true) }
	h.reconcile(h.reconciler(Options{}), dual())
	if got := h.found(check); len(got) != 0 {
		t.Fatalf("an agent's host has problems: %v", got)
	}
	for name, wrong := range map[string]string{"net/ipv4/ip_forward": "0", "net/ipv4/conf/tun0/rp_filter": "1", "net/ipv4/conf/eth0/forwarding": "0", "net/ipv4/conf/eth0.7/forwarding": "0", "net/ipv6/conf/all/forwarding": "0"} {
		h.setSysctl(name, wrong)
		got := h.found(check)
		if len(got) == 0 || !strings.Contains(got[0].What, dotted(name)+" is "+wrong) {
			t.Errorf("%s: problems %v", name, got)
		}
		for _, p := range got { // the kernel derives other settings of this one
			h.shell(p.Command)
		}
		if got := h.found(check); len(got) != 0 {
			t.Errorf("%s: after the remedy: %v", name, got)
		}
	}
	h.setSysctl("net/ipv4/conf/eth1/forwarding", "0") // nothing of ours comes by it
	h.setSysctl("net/ipv4/conf/tun0/accept_redirects", "1")
	h.do(func() error {
		done, err := MendSettings("tun0", []string{"eth0"}, true, true)
		if err == nil && (len(done) != 1 || !strings.Contains(done[0], "net.ipv4.conf.tun0.accept_redirects from 1 to 0")) {
			t.Errorf("mended %q", done)
		}
		return err
	})
	if got := h.found(check); len(got) != 0 {
		t.Errorf("after mending: %v", got)
	}
	// What is not the agent's device is left alone: an uplink, or the TUN device of a VPN.
	h.tun("vpn0")
	for _, name := range []string{"eth1", "vpn0"} {
		h.setSysctl("net/ipv4/conf/"+name+"/accept_redirects", "1")
		h.do(func() error {
			done, err := MendSettings(name, []string{"eth0"}, true, true)
			if len(done) > 0 {
				t.Errorf("with --tun %s mended %q", name, done)
			}
			return err
		})
	}
}
