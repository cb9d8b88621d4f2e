package doctor_test

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/tulle-net/tulle/internal/api"
	"github.com/tulle-net/tulle/internal/doctor"
	"github.com/tulle-net/tulle/internal/testing/hosts"
)

func TestMain(m *testing.M) { os.Exit(hosts.Main(m)) }

// patient is where a doctor is called: on a host, with the arguments that its agent has.
type patient struct {
	t       *testing.T
	host    *hosts.Host
	program string
	args    []string
}

func at(t *testing.T, n *hosts.Net, h *hosts.Host, a *hosts.Agent, args ...string) patient {
	if a != nil {
		args = append(args, "--socket", a.Socket())
	} else {
		args = append(args, "--socket", "/nonexistent/s")
	}
	return patient{t, h, n.Program(), args}
}

// doctor runs one check by the program, and returns its result. Its exit code must be as documented.
func (p patient) doctor(check string, more ...string) (doctor.Result, error) {
	args := append([]string{"doctor", check, "-o", "json"}, append(more, p.args...)...)
	out, err := p.host.TryRun(p.program, args...)
	var r doctor.Report
	if jerr := json.Unmarshal([]byte(out), &r); jerr != nil || len(r.Results) != 1 {
		return doctor.Result{}, fmt.Errorf("doctor %s: %v, %v: %s", check, err, jerr, out)
	}
	if one := r.Results[0]; (one.State == doctor.Failed) != (err != nil) {
		return one, fmt.Errorf("doctor %s is %s, and ended with %v", check, one.State, err)
	}
	return r.Results[0], nil
}

// finds waits until a check finds something with all the words in it.
func (p patient) finds(check string, st doctor.State, words ...string) doctor.Finding {
	p.t.Helper()
	var found doctor.Finding
	hosts.Within(p.t, time.Minute, p.host.Name+": the doctor's check "+check+" names it", func() error {
		r, err := p.doctor(check)
		if err != nil {
			return err
		}
		for _, f := range r.Findings {
			text, miss := f.What+" → "+f.Remedy+" $ "+f.Command, false
			for _, w := range words {
				miss = miss || !strings.Contains(text, w)
			}
			if f.State == st && !miss {
				found = f
				return nil
			}
		}
		return fmt.Errorf("%+v", r)
	})
	p.t.Logf("%s: %s\n→ %s\n$ %s", found.State, found.What, found.Remedy, found.Command)
	return found
}

// well waits until a check is ok.
func (p patient) well(check string) {
	p.t.Helper()
	hosts.Within(p.t, 25*time.Second, p.host.Name+": the check "+check+" is ok", func() error {
		r, err := p.doctor(check)
		if err == nil && r.State != doctor.OK {
			err = fmt.Errorf("%+v", r)
		}
		if err == nil {
			p.t.Logf("%s: %s", check, r.Seen)
		}
		return err
	})
}

// run runs a command that the doctor has printed, as an operator pastes it.
func (p patient) run(f doctor.Finding) {
	p.t.Helper()
	if f.Command == "" {
		p.t.Fatalf("no command for %q", f.What)
	}
	p.host.Run("env", "PATH="+filepath.Dir(p.program)+":"+os.Getenv("PATH"), "sh", "-ec", f.Command)
}

// mends breaks nothing: it sees the check name what is broken, runs the command and sees the check ok.
func (p patient) mends(check string, st doctor.State, words ...string) {
	p.t.Helper()
	p.run(p.finds(check, st, words...))
	p.well(check)
}

// TestCluster breaks one thing after the other in a cluster of two hosts.
func TestCluster(t *testing.T) {
	t.Parallel()
	n := hosts.New(t)
	sw := n.Switch()
	a, b := n.Host("a"), n.Host("b")
	a.Plug(sw, "eth0", "10.0.1.11/24")
	b.Plug(sw, "eth0", "10.0.1.12/24")
	n.Host("outside").Plug(sw, "eth0", "10.0.1.99/24")
	cidrs := []string{"--cluster-cidr", "10.244.0.0/16,fd00:244::/48", "--paths", "udp,ipip"}
	first := a.Agent(append(cidrs, "--bootstrap", "--underlay", "eth0")...)
	first.Ready(20 * time.Second)
	second := b.Agent("--join", "10.0.1.11", "--paths", "udp,ipip")
	second.Ready(20 * time.Second)
	pod, near, other := first.Pod("web"), first.Pod("cache"), second.Pod("db")
	hosts.Within(t, 10*time.Second, "pods reach each other", func() error { return pod.Ping(other.IPv4()) })
	stream := pod.Stream(other.IPv4(), 20*time.Millisecond) // busy paths are probed every second
	t.Cleanup(func() { stream.Stop() })
	// Pods that nobody has made, for the last part: a leak counts as one after a minute. The agent frees by itself what names a namespace that is gone.
	for _, id := range []string{"gone1", "gone2"} {
		if _, err := first.Client.Allocate(t.Context(), api.AllocateRequest{ID: id}); err != nil {
			t.Fatal(err)
		}
	}
	on := func(t *testing.T, h *hosts.Host, agent *hosts.Agent) patient {
		return at(t, n, h, agent, "--paths", "udp,ipip", "--config", os.DevNull)
	}

	t.Run("healthy", func(t *testing.T) {
		for h, agent := range map[*hosts.Host]*hosts.Agent{a: first, b: second} {
			hosts.Within(t, 20*time.Second, h.Name+" is well", func() error {
				out, errs, code := agent.Tulle("doctor", "--paths", "udp,ipip", "--config", os.DevNull)
				if code != 0 || strings.Contains(out, "FAILED") || !strings.Contains(out, " 0 failed,") {
					return fmt.Errorf("%d %s%s", code, out, errs)
				}
				for line := range strings.Lines(out) {
					// What the whole machine has is not this test's.
					if f := strings.Fields(line); len(f) > 1 && f[1] == "warning" && f[0] != "clock" && f[0] != "conntrack" && f[0] != "buffers" {
						return fmt.Errorf("%s", line)
					}
				}
				return nil
			})
		}
	})
	t.Run("firewall", func(t *testing.T) {
		p := on(t, a, first)
		p.well("firewall")
		a.Run("nft", "add table inet f; add chain inet f forwarded { type filter hook forward priority 0; policy drop; }")
		p.mends("firewall", doctor.Failed, "inet f forwarded", "policy drop")
		for what, to := range map[string]netip.Addr{"a pod of another host": other.IPv4(), "one by IPv6": other.IPv6(), "a pod of this host": near.IPv4(), "the outside": netip.MustParseAddr("10.0.1.99")} {
			hosts.Within(t, 10*time.Second, "after the remedy a pod reaches "+what, func() error { return pod.Ping(to) })
		}
		a.Run("nft", "delete table inet f")
		for tool, prefix := range map[string]string{"iptables": "10.244.0.0/16", "iptables-legacy": "10.244.0.0/16", "ip6tables-legacy": "fd00:244::/48"} {
			a.Run(tool, "-P", "FORWARD", "DROP")
			p.mends("firewall", doctor.Failed, "FORWARD", tool+" -I FORWARD -s "+prefix+" -j ACCEPT")
			a.Run(tool, "-P", "FORWARD", "ACCEPT")
			a.Run(tool, "-F")
		}
		a.Run("nft", "delete table ip filter")
	})
	t.Run("routes", func(t *testing.T) {
		p := on(t, a, first)
		p.well("routes")
		a.IP("route add 10.244.200.0/24 via 10.0.1.12")
		p.mends("routes", doctor.Failed, "10.244.200.0/24 via 10.0.1.12", "ip route del")
		a.IP("route add 10.0.0.0/8 dev eth0 table 52", "rule add priority 5270 lookup 52") // as a VPN has it
		p.finds("routes", doctor.Failed, "leave by eth0: a policy rule in front of the main table sends them to table 52", "lookup main priority 100")
		a.IP("rule add to 10.244.0.0/16 lookup main priority 100")
		p.well("routes")
		a.IP("rule del priority 100", "rule del priority 5270", "route del 10.0.0.0/8 dev eth0 table 52")
		a.IP("link add br7 type bridge", "link set br7 up", "addr add 10.244.201.1/24 dev br7")
		p.run(p.finds("routes", doctor.Failed, "10.244.201.1/24 on br7"))
		p.well("routes")
		a.IP("link del br7")
	})
	t.Run("cni", func(t *testing.T) {
		dir := filepath.Dir(a.WriteFile("05-flannel.conflist", `{"name":"cbr0","plugins":[{"type":"flannel","delegate":{"ipam":{"ranges":[[{"subnet":"10.244.0.0/14"}]],"routes":[{"dst":"0.0.0.0/0"}]}}}]}`))
		p := on(t, a, first)
		p.args = append(p.args, "--cni-dir", dir)
		p.finds("cni", doctor.Warning, "05-flannel.conflist comes before 10-tulle.conflist")
		p.mends("cni", doctor.Failed, "10.244.0.0/14", "overlaps the cluster's 10.244.0.0/16", "mv ")
	})
	t.Run("ports and paths", func(t *testing.T) { portsAndPaths(t, on(t, a, first), on(t, b, second)) })
	t.Run("gossip", func(t *testing.T) {
		p, q := on(t, a, first), on(t, b, second)
		b.Run("nft", "add table inet f; add chain inet f in { type filter hook input priority 0; }; add rule inet f in meta l4proto { tcp, udp } th dport 7946 drop")
		p.finds("gossip", doctor.Failed, "b is lost for gossip", "TCP and UDP port 7946")
		b.Run("nft", "delete table inet f")
		p.well("gossip")
		q.well("gossip")
	})
	t.Run("mtu", func(t *testing.T) {
		p := on(t, a, first)
		p.well("mtu")
		sw.IP("link set port2 mtu 1400") // towards b
		b.IP("link set eth0 mtu 1400")
		p.finds("mtu", doctor.Warning, "100 bytes less")
		a.IP("link set eth0 mtu 1400")
		p.well("mtu")
		a.IP("link set eth0 mtu 1500")
		b.IP("link set eth0 mtu 1500")
		sw.IP("link set port2 mtu 1500")
	})
	t.Run("underlay", func(t *testing.T) {
		p := on(t, b, second)
		p.well("underlay")
		sw.IP("link set port2 down")
		p.finds("underlay", doctor.Failed, "eth0 has no carrier")
		sw.IP("link set port2 up")
		p.well("underlay")
	})
	t.Run("rp_filter", func(t *testing.T) {
		p := on(t, b, second)
		b.Plug(sw, "eth1", "10.0.1.13/24")
		b.IP("route add 10.0.1.11 dev eth1 src 10.0.1.12") // packets to a leave by eth1, and come by eth0
		b.Sysctl("net.ipv4.conf.eth0.rp_filter", "1")
		b.Sysctl("net.ipv4.conf.eth1.rp_filter", "0")
		p.mends("rp_filter", doctor.Failed, "eth0 is strict", "sysctl -w net.ipv4.conf.eth0.rp_filter=2")
		b.IP("link del eth1")
	})
	t.Run("owners", func(t *testing.T) {
		p := on(t, a, first)
		second.Stop()
		p.finds("owners", doctor.Failed, "b is gone: gossip and data path both lost it", "start its agent", "tulle forget b")
		// The host b without its agent.
		q := on(t, b, nil)
		q.finds("agent", doctor.Warning, "no agent listens", "systemctl start tulle")
		q.well("forwarding")
		b.Sysctl("net.ipv4.ip_forward", "0")
		q.mends("forwarding", doctor.Failed, "net.ipv4.ip_forward is 0")
		b.Sysctl("net.ipv4.conf.tun0.forwarding", "0")
		if r, err := q.doctor("forwarding", "--fix"); err != nil || r.State != doctor.OK || len(r.Fixed) != 1 || !strings.Contains(r.Fixed[0], "net.ipv4.conf.tun0.forwarding from 0 to 1") {
			t.Errorf("--fix: %+v, %v", r, err)
		}
		second = b.Agent("--paths", "udp,ipip")
		second.Ready(20 * time.Second)
		p.well("owners")
		on(t, b, second).well("agent")
	})
	t.Run("identity", func(t *testing.T) {
		c := n.Host("c")
		c.Plug(sw, "eth0", "10.0.1.14/24")
		third := c.Agent("--join", "10.0.1.11", "--node-name", "a")
		third.Ready(20 * time.Second)
		p := on(t, a, first)
		p.finds("identity", doctor.Failed, "2 live hosts have the node name a", "--node-name")
		third.Stop()
		third = c.Agent("--join", "10.0.1.11", "--node-name", "c")
		third.Ready(20 * time.Second)
		p.well("identity")
	})
	t.Run("addresses", func(t *testing.T) {
		p := on(t, a, first)
		p.run(p.finds("addresses", doctor.Warning, "is allocated to gone1, which is gone", "tulle ipam release"))
		p.finds("addresses", doctor.Warning, "is allocated to gone2")
		if r, err := p.doctor("addresses", "--fix"); err != nil || r.State != doctor.OK || len(r.Fixed) != 1 || !strings.HasPrefix(r.Fixed[0], "released 10.244.") {
			t.Errorf("--fix: %+v, %v", r, err)
		}
		p.well("addresses")
	})
}

// portsAndPaths blocks what b receives, as b's own firewall: both sides see it, each what it can.
func portsAndPaths(t *testing.T, a, b patient) {
	for _, p := range []patient{a, b} { // the better encapsulation has to answer for a while
		hosts.Within(t, 25*time.Second, p.host.Name+" sends by udp", func() error {
			if r, err := p.doctor("paths"); err != nil || !strings.Contains(r.Seen, "by udp up") {
				return fmt.Errorf("%+v, %v", r, err)
			}
			return nil
		})
	}
	a.well("paths")
	b.well("ports")
	b.host.Run("nft", "add table inet f; add chain inet f in { type filter hook input priority 0; }; add rule inet f in udp dport 6080 drop")
	a.finds("paths", doctor.Warning, "udp is preferred toward b, and blocked", "filtered on the way from here to there", "UDP port 6080")
	b.finds("paths", doctor.Warning, "udp is preferred toward a, and blocked", "UDP port 6080")
	b.mends("ports", doctor.Warning, "inet f in drops what arrives by UDP port 6080", "nft delete rule")
	a.well("paths")
	b.well("paths")

	// With no other encapsulation that works, it is a failure.
	b.host.Run("nft", "add rule inet f in udp dport 6080 drop; add rule inet f in meta l4proto { 4, 41 } drop")
	a.finds("paths", doctor.Failed, "b is alive for gossip", "its own probes arrive: what is lost is on the way from here to there", "tulle doctor ports")
	b.finds("paths", doctor.Failed, "a is alive for gossip", "none of its own probes arrives")
	b.run(b.finds("ports", doctor.Failed, "UDP port 6080", "nft delete rule"))
	b.host.Run("nft", "flush chain inet f in")
	a.well("paths")
	b.well("paths")
	b.host.Run("nft", "delete table inet f")
}
