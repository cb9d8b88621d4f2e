package clustertest

import (
	"fmt"
	"net"
	"net/netip"
	"os/exec"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/tulle-net/tulle/internal/lab"
	"github.com/tulle-net/tulle/internal/sys"
)

// policy lets one pod be reached by a single other pod, in the way of the programs that enforce a NetworkPolicy: a chain of their own at the
// forward hook that accepts answers, and drops what is not allowed. The addresses: the pod and the allowed source, IPv4 and IPv6.
const policy = `table inet policies {
	counter refused { }
	chain forward {
		type filter hook forward priority filter; policy accept;
		ct state established,related accept
		ip daddr %[1]v ip saddr != %[2]v counter name refused drop
		ip6 daddr %[3]v ip6 saddr != %[4]v counter name refused drop
	}
}`

// inNetns runs a program in a network namespace.
func inNetns(t *testing.T, netns, input string, args ...string) string {
	t.Helper()
	cmd := exec.Command(args[0], args[1:]...)
	cmd.Stdin = strings.NewReader(input)
	var out []byte
	err := sys.WithNetns(netns, func() (err error) {
		out, err = cmd.CombinedOutput()
		return err
	})
	if err != nil {
		t.Fatalf("%v: %v: %s", args, err, out)
	}
	return string(out)
}

// policyDrops is how many packets the policy has dropped.
func policyDrops(t *testing.T, h lab.Host) int {
	t.Helper()
	m := regexp.MustCompile(`packets (\d+)`).FindStringSubmatch(inNetns(t, h.Netns, "", "nft", "list", "counter", "inet", "policies", "refused"))
	if m == nil {
		t.Fatal("no counter")
	}
	n, err := strconv.Atoi(m[1])
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// TestPolicies: a policy in a host's forward chain sees what reaches a pod, from the same host and from another one, by each path. What it
// allows passes, the host itself reaches its pod (kubelet's probes), and the agent has nothing against the chain.
func TestPolicies(t *testing.T) {
	t.Parallel()
	l := up(t, "pol", lab.Options{Nodes: 2, Subnets: 1, Pods: 2, ClusterCIDRs: dualCIDRs})
	settled(t, l)
	pods := map[string]*lab.Pod{}
	for _, p := range l.Pods() {
		pods[p.Name] = &p
	}
	h, to, allowed := l.Hosts()[0], pods["p1a"], pods["p2b"]
	inNetns(t, h.Netns, fmt.Sprintf(policy, to.Addr(false), allowed.Addr(false), to.Addr(true), allowed.Addr(true)), "nft", "-f", "-")
	for _, mode := range []string{"direct", "udp", "ipip", "vxlan"} {
		onlyBy(t, l, mode)
		for _, v6 := range []bool{false, true} {
			passes := func(from, at *lab.Pod) {
				t.Helper()
				until(t, fmt.Sprintf("%s to %s by %s", from.Name, at.Name, mode), func() error {
					seen, err := seenAs(from.Netns, at.Netns, at.Addr(v6))
					if err == nil && seen != from.Addr(v6) {
						err = fmt.Errorf("seen as %v", seen)
					}
					return err
				})
			}
			passes(allowed, to)
			passes(to, pods["p2a"]) // the answers come from a pod that may not ask
			passes(to, pods["p1b"])
			for _, from := range []*lab.Pod{pods["p2a"], pods["p1b"]} {
				before := policyDrops(t, h)
				if connects(t, from.Netns, to.Netns, to.Addr(v6)) {
					t.Errorf("%s: %s reaches %s at %v", mode, from.Name, to.Name, to.Addr(v6))
				}
				until(t, mode+": the policy has seen what comes from "+from.Name, func() error {
					if n := policyDrops(t, h); n == before { // on a busy machine the packet may be on its way still
						return fmt.Errorf("%d packets dropped", n)
					}
					return nil
				})
			}
			if _, err := seenAs(h.Netns, to.Netns, to.Addr(v6)); err != nil {
				t.Errorf("%s: the host to its pod at %v: %v", mode, to.Addr(v6), err)
			}
		}
	}
	until(t, "no problems", func() error {
		if p := mustStatus(t, l, h.Name).Problems; len(p) > 0 {
			return fmt.Errorf("%+v", p)
		}
		return nil
	})
}

// connects tells whether a TCP connection comes about within a second, at a port where somebody listens.
func connects(t *testing.T, from, at string, to netip.Addr) bool {
	t.Helper()
	var ln net.Listener
	if err := sys.WithNetns(at, func() (err error) {
		ln, err = net.Listen("tcp", netip.AddrPortFrom(to, 0).String())
		return err
	}); err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	return sys.WithNetns(from, func() error {
		c, err := net.DialTimeout("tcp", ln.Addr().String(), time.Second)
		if err == nil {
			err = c.Close()
		}
		return err
	}) == nil
}
