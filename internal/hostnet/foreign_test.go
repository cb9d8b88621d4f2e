package hostnet

import (
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
		{name: "policy DROP", setup: "iptables-legacy -P FORWARD DROP", want: []string{"the FORWARD chain of iptables-legacy has the policy DROP", "iptables-legacy -I FORWARD -i tun0 -j ACCEPT"}},
		{name: "IPv6", setup: "ip6tables-legacy -P FORWARD DROP", want: []string{"the FORWARD chain of ip6tables-legacy has the policy DROP"}},
		{name: "as Docker has it", setup: "iptables-legacy -N DOCKER; iptables-legacy -P FORWARD DROP; iptables-legacy -A FORWARD -m conntrack --ctstate ESTABLISHED -j ACCEPT; iptables-legacy -A FORWARD -o docker0 -j DOCKER; iptables-legacy -A INPUT -p udp --dport 9 -j DROP",
			want: []string{"has the policy DROP"}},
		{name: "REJECT at the end", setup: "iptables-legacy -A FORWARD -i eth1 -j ACCEPT; iptables-legacy -A FORWARD -j REJECT", want: []string{"refuses in its last rule"}},
		{name: "DROP at the end", setup: "iptables-legacy -A FORWARD -j DROP", want: []string{"refuses in its last rule"}},
		{name: "some are refused at the end", setup: "iptables-legacy -A FORWARD -p tcp --dport 25 -j REJECT"},
		{name: "the device is accepted", setup: "iptables-legacy -P FORWARD DROP; iptables-legacy -A FORWARD -i tun0 -j ACCEPT; iptables-legacy -A FORWARD -o tun0 -j ACCEPT"},
		{name: "another device is accepted", setup: "iptables-legacy -P FORWARD DROP; iptables-legacy -A FORWARD -i tun01 -j ACCEPT", want: []string{"policy DROP"}},
		{name: "the cluster is accepted", setup: "iptables-legacy -P FORWARD DROP; iptables-legacy -A FORWARD -s 10.0.0.0/8 -j ACCEPT"},
		{name: "a part of the cluster is accepted", setup: "iptables-legacy -P FORWARD DROP; iptables-legacy -A FORWARD -s 10.244.3.0/24 -j ACCEPT", want: []string{"policy DROP"}},
		{name: "the cluster is dropped", setup: "iptables-legacy -P FORWARD DROP; iptables-legacy -A FORWARD -s 10.0.0.0/8 -j DROP", want: []string{"policy DROP"}},
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
	for i := range whole {
		for _, b := range []byte{0, 1, 0x7f, 0xff} {
			damaged := append([]byte(nil), whole...)
			damaged[i] = b
			_, _, _ = l.parse(damaged, 0, 0)
		}
	}
}

// Firewalls as people write them, with nft and with iptables.
func TestPortProblems(t *testing.T) {
	const nft = "nft add table inet f; nft add chain inet f in '{ type filter hook input priority 0; policy %; }'; "
	accept, drop := strings.ReplaceAll(nft, "%", "accept"), strings.ReplaceAll(nft, "%", "drop")
	udp := []Port{{unix.IPPROTO_UDP, 6080}}
	for _, c := range []struct {
		name, setup string
		ports       []Port
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
				return PortProblems(Outer{Ports: c.ports, Links: []string{"eth0"}, Pods: pfx("10.244.0.0/16", "fd00:244::/48")})
			}
			if c.want != nil {
				h.mended(check, c.want...)
			} else if got := h.found(check); len(got) != 0 {
				t.Errorf("problems %v", got)
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
	h.mended(check, "flannel.1", "UDP port 4789")
}

func TestSettingProblems(t *testing.T) {
	h := newHost(t)
	h.tun("tun0")
	check := func() ([]Problem, error) { return SettingProblems("tun0", true, true) }
	h.reconcile(h.reconciler(Options{}), dual())
	if got := h.found(check); len(got) != 0 {
		t.Fatalf("an agent's host has problems: %v", got)
	}
	for name, wrong := range map[string]string{"net/ipv4/ip_forward": "0", "net/ipv4/conf/tun0/rp_filter": "1", "net/ipv6/conf/all/forwarding": "0"} {
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
	h.setSysctl("net/ipv4/conf/tun0/accept_redirects", "1")
	h.do(func() error {
		done, err := MendSettings("tun0", true, true)
		if err == nil && (len(done) != 1 || !strings.Contains(done[0], "net.ipv4.conf.tun0.accept_redirects from 1 to 0")) {
			t.Errorf("mended %q", done)
		}
		return err
	})
	if got := h.found(check); len(got) != 0 {
		t.Errorf("after mending: %v", got)
	}
}
