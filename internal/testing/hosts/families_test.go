package hosts_test

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/tulle-net/tulle/internal/testing/hosts"
)

// Hosts with both families or one, names with addresses of both or one, in any order: one cluster, and pods reach each other
// wherever two hosts have a family in common.
func TestFamilies(t *testing.T) {
	for name, c := range map[string]struct {
		has   [3]string // a letter for each family of hosts a, b and c, in the order in which their interfaces got them
		names [3]string // what b and c know of a, and c of b
		args  []string  // of all agents
	}{
		"both, names with both":                    {has: [3]string{"46", "46", "46"}, names: [3]string{"46", "46", "46"}},
		"both, names with both, by interface":      {has: [3]string{"64", "46", "64"}, names: [3]string{"64", "46", "64"}, args: []string{"--underlay", "eth0"}},
		"both, each name with another family":      {has: [3]string{"46", "46", "46"}, names: [3]string{"6", "4", "6"}},
		"the first announces IPv4, one has IPv6":   {has: [3]string{"46", "46", "6"}, names: [3]string{"46", "46", "46"}},
		"the first announces IPv4, both have IPv6": {has: [3]string{"46", "6", "6"}, names: [3]string{"6", "46", "6"}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			n := hosts.New(t)
			sw := n.Switch()
			var list []*hosts.Host
			for i, host := range []string{"a", "b", "c"} {
				h := n.Host(host)
				h.Plug(sw, "eth0")
				for _, family := range c.has[i] {
					if family == '4' {
						h.Addr("eth0", fmt.Sprintf("10.0.1.%d/24", 11+i))
						h.IP("route add default via 10.0.1.1")
					} else {
						h.Addr("eth0", fmt.Sprintf("2001:db8:1::%d/64", 11+i))
						h.IP("route add default via 2001:db8:1::1")
					}
				}
				list = append(list, h)
			}
			lines := func(host string, i int, families string) (out []string) {
				for _, f := range families {
					if f == '4' {
						out = append(out, fmt.Sprintf("10.0.1.%d %s", 11+i, host))
					} else {
						out = append(out, fmt.Sprintf("2001:db8:1::%d %s", 11+i, host))
					}
				}
				return out
			}
			a, b, c2 := list[0], list[1], list[2]
			b.EtcHosts(lines("a", 0, c.names[0])...)
			c2.EtcHosts(append(lines("a", 0, c.names[1]), lines("b", 1, c.names[2])...)...)
			first := a.Agent(append(c.args, "--bootstrap")...)
			second := b.Agent(append(c.args, "--join", "a")...)
			third := c2.Agent(append(c.args, "--join", "a", "--join", "b")...)
			hosts.Within(t, 40*time.Second, "one cluster", func() error { return oneCluster(first, second, third) })
			pods := []*hosts.Pod{first.Pod("pa"), second.Pod("pb"), third.Pod("pc")}
			for i, p := range pods {
				for _, q := range pods[:i] {
					hosts.Within(t, 15*time.Second, p.Name+" reaches "+q.Name, func() error { return p.Ping(q.IPv4()) })
				}
			}
			hosts.Within(t, 10*time.Second, "all see all", func() error {
				for _, agent := range []*hosts.Agent{first, second, third} {
					if st := agent.Status(); st.Cluster.Alive != 3 {
						return fmt.Errorf("%s sees %d of 3: %s", agent.Host.Name, st.Cluster.Alive, agent.Problems())
					}
				}
				return nil
			})
		})
	}
}

// A host whose kernel has no IPv6 (ipv6.disable=1: the settings of IPv6 are not there) is a member of a cluster with both families. Its pods have IPv4, and it says that they
// have no IPv6.
func TestKernelWithoutIPv6(t *testing.T) {
	t.Parallel()
	n := hosts.New(t)
	sw := n.Switch()
	a, b := n.Host("a"), n.Host("b")
	a.Plug(sw, "eth0", "10.0.1.11/24", "fd00:1::11/64")
	b.Plug(sw, "eth0", "10.0.1.12/24")
	b.Wrap = []string{"unshare", "--mount", "sh", "-c", `mount -t tmpfs none /mnt && for d in core ipv4 netfilter; do
		mkdir /mnt/$d && mount --bind /proc/sys/net/$d /mnt/$d || exit; done; mount --rbind /mnt /proc/sys/net && exec "$@"`, "sh"}
	first := a.Agent("--bootstrap", "--cluster-cidr", "10.244.0.0/16,fd00:10:244::/48")
	without := b.Agent("--join", "10.0.1.11")
	first.Ready(60 * time.Second)
	without.Ready(60 * time.Second)
	podA, podB := first.Pod("pod-a"), without.Pod("pod-b")
	if !podA.IPv6().IsValid() || !podB.IPv4().IsValid() || podB.IPv6().IsValid() {
		t.Errorf("the pods have %v and %v", podA.Addrs, podB.Addrs)
	}
	hosts.Within(t, 20*time.Second, "pods reach each other", func() error { return podB.Ping(podA.IPv4()) })
	if p := without.Problems(); !strings.Contains(p, "this host's kernel has no IPv6, and the cluster has: its pods get IPv4 addresses only (start the host without ipv6.disable=1") {
		t.Errorf("problems of the host without IPv6: %s", p)
	}
	hosts.NoProblems(t, "a member without IPv6", first)
}
