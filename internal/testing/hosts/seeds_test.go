package hosts_test

import (
	"fmt"
	"net"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/tulle-net/tulle/internal/testing/hosts"
)

// oneCluster is nil if all agents are ready and in one cluster.
func oneCluster(agents ...*hosts.Agent) error {
	id := ""
	for _, a := range agents {
		if err := a.NotReady(); err != nil {
			return fmt.Errorf("%s: %w", a.Host.Name, err)
		}
		c := a.Status().Cluster.ID
		if id == "" {
			id = c
		}
		if c != id {
			return fmt.Errorf("%s is in cluster %s, others in %s", a.Host.Name, c, id)
		}
	}
	return nil
}

// threeOnASwitch are hosts a, b and c at 10.0.1.11, .12 and .13.
func threeOnASwitch(t *testing.T) (a, b, c *hosts.Host) {
	t.Helper()
	n := hosts.New(t)
	sw := n.Switch()
	a, b, c = n.Host("a"), n.Host("b"), n.Host("c")
	for i, h := range []*hosts.Host{a, b, c} {
		h.Plug(sw, "eth0", fmt.Sprintf("10.0.1.%d/24", 11+i))
	}
	return a, b, c
}

// One name has the addresses of all hosts, as round-robin DNS gives them, and one where nobody is. The node that starts the
// cluster loses its disk: it joins the others, and does not start a second one, also while none of them answers.
func TestOneNameForAll(t *testing.T) {
	t.Parallel()
	a, b, c := threeOnASwitch(t)
	for _, h := range []*hosts.Host{a, b, c} {
		h.EtcHosts("127.0.1.1 seeds", "10.0.1.11 seeds", "10.0.1.12 seeds", "10.0.1.13 seeds")
	}
	first := a.Agent("--bootstrap", "--join", "seeds")
	second, third := b.Agent("--join", "seeds"), c.Agent("--join", "seeds")
	hosts.Within(t, 30*time.Second, "one cluster", func() error { return oneCluster(first, second, third) })

	first.Kill()
	third.Stop()
	second.Signal(syscall.SIGSTOP) // it takes connections, and does not answer
	a.WipeDisk()
	first = a.Agent("--bootstrap", "--join", "seeds")
	hosts.Within(t, 20*time.Second, "it waits, and says for whom", func() error {
		if p := first.Problems(); !strings.Contains(p, "seeds:7946 at 10.0.1.12") || !strings.Contains(p, "10.0.1.13") {
			return fmt.Errorf("problems: %s", p)
		}
		return nil
	})
	second.Signal(syscall.SIGCONT)
	hosts.Within(t, 40*time.Second, "it joins", func() error { return oneCluster(first, second) })
}

// Debian writes `127.0.1.1 HOSTNAME` into /etc/hosts; all hosts share one list of seeds.
func TestOwnNameIsLoopback(t *testing.T) {
	t.Parallel()
	a, b, c := threeOnASwitch(t)
	var agents []*hosts.Agent
	for _, h := range []*hosts.Host{a, b, c} {
		lines := []string{"127.0.1.1 " + h.Name}
		for i, o := range []*hosts.Host{a, b, c} {
			if o != h {
				lines = append(lines, fmt.Sprintf("10.0.1.%d %s", 11+i, o.Name))
			}
		}
		h.EtcHosts(lines...)
		conf := h.WriteFile("tulle.yaml", "bootstrap: a\njoin: [a, b, c]\ncluster_cidr: [10.244.0.0/16]\n")
		agents = append(agents, h.Agent("--config", conf))
	}
	hosts.Within(t, 30*time.Second, "one cluster", func() error { return oneCluster(agents...) })
}

// All hosts share one list of seeds, and the first one does not know its own name: /etc/hosts has the others, and the name server none.
func TestOwnNameIsUnknown(t *testing.T) {
	t.Parallel()
	a, b, _ := threeOnASwitch(t)
	a.DNS("127.0.0.1")
	a.EtcHosts("10.0.1.12 b")
	b.EtcHosts("10.0.1.11 a", "127.0.1.1 b")
	const conf = "bootstrap: a\njoin: [a, b]\ncluster_cidr: [10.244.0.0/16]\n"
	first, second := a.Agent("--config", a.WriteFile("tulle.yaml", conf)), b.Agent("--config", b.WriteFile("tulle.yaml", conf))
	hosts.Within(t, 30*time.Second, "one cluster", func() error { return oneCluster(first, second) })
	hosts.NoProblems(t, "at rest", first, second)
}

// A name server that never answers holds up neither the other seeds nor the agent.
func TestNameServerHangs(t *testing.T) {
	t.Parallel()
	a, b, _ := threeOnASwitch(t)
	first := a.Agent("--bootstrap")
	var silent net.PacketConn
	if err := b.Do(func() (err error) { silent, err = net.ListenPacket("udp", "127.0.0.1:53"); return err }); err != nil {
		t.Fatal(err)
	}
	defer silent.Close()
	b.EtcHosts("10.0.1.11 a")
	args := []string{}
	for i := range 10 {
		args = append(args, "--join", fmt.Sprintf("hangs%d", i))
	}
	second := b.Agent(append(args, "--join", "a")...)
	// Two starts and a join on a busy machine; ten names one after the other would take 50 s.
	hosts.Within(t, 25*time.Second, "one cluster", func() error { return oneCluster(first, second) })
}

// The first of two name servers is silent, and resolv.conf has no options: the second one is asked after five seconds.
func TestFirstNameServerIsSilent(t *testing.T) {
	t.Parallel()
	a, b, _ := threeOnASwitch(t)
	first := a.Agent("--bootstrap")
	b.DNS("127.0.0.1").Hang(true)
	b.DNS("127.0.0.2").Set("a", "10.0.1.11")
	b.ResolvConf("nameserver 127.0.0.1", "nameserver 127.0.0.2")
	second := b.Agent("--join", "a")
	hosts.Within(t, 25*time.Second, "one cluster", func() error { return oneCluster(first, second) })
}

// The seed is a virtual address that one of the hosts has (keepalived). It is nobody's underlay address, and whoever has it
// answers there.
func TestSeedIsVirtualAddress(t *testing.T) {
	t.Parallel()
	a, b, c := threeOnASwitch(t)
	a.Addr("eth0", "10.0.1.5/32")
	first := a.Agent("--bootstrap", "--join", "10.0.1.5")
	second := b.Agent("--join", "10.0.1.5")
	hosts.Within(t, 30*time.Second, "one cluster", func() error { return oneCluster(first, second) })
	a.IP("addr del 10.0.1.5/32 dev eth0")
	b.Addr("eth0", "10.0.1.5/32")
	third := c.Agent("--join", "10.0.1.5")
	hosts.Within(t, 30*time.Second, "one cluster after the address has moved", func() error { return oneCluster(first, second, third) })
	for i, agent := range []*hosts.Agent{first, second, third} {
		if err := underlayIs(agent, fmt.Sprintf("10.0.1.%d", 11+i)); err != nil {
			t.Errorf("%s: %v", agent.Host.Name, err)
		}
	}
}

// With names that do not resolve and nothing but loopback the agent waits, however long the host takes.
func TestNothingButLoopback(t *testing.T) {
	t.Parallel()
	n := hosts.New(t)
	sw := n.Switch()
	a, b := n.Host("a"), n.Host("b")
	a.EtcHosts("127.0.1.1 a")
	b.Plug(sw, "eth0", "10.0.1.12/24")
	first := a.Agent("--bootstrap", "--join", "a", "--join", "b")
	hosts.Within(t, 10*time.Second, "status names the seed", func() error {
		if p := first.Problems(); !strings.Contains(p, "b:7946") {
			return fmt.Errorf("problems: %s", p)
		}
		return nil
	})
	a.Plug(sw, "eth0", "10.0.1.11/24")
	a.EtcHosts("127.0.1.1 a", "10.0.1.12 b")
	b.Agent("--join", "10.0.1.11")
	first.Ready(30 * time.Second)
}

// What `tulle reload` reads while the agent waits for an address of the host is in effect when the address comes.
func TestReloadBeforeTheFirstAddress(t *testing.T) {
	t.Parallel()
	n := hosts.New(t)
	a := n.Host("a")
	file := a.WriteFile("tulle.yaml", "masquerade: true\npaths: [ipip, udp]\n")
	ag := a.Agent("--bootstrap", "--config", file)
	hosts.Within(t, 10*time.Second, "it waits", func() error { _, err := ag.TryStatus(); return err })
	a.WriteFile("tulle.yaml", "masquerade: false\npaths: [udp]\n")
	if out, errs, code := ag.Tulle("reload"); code != 0 || !strings.Contains(out, "masquerade") {
		t.Fatalf("tulle reload: %d, %s%s", code, out, errs)
	}
	a.Plug(n.Switch(), "eth0", "10.0.1.11/24")
	ag.Ready(30 * time.Second)
	if rules := a.Run("nft", "list", "table", "inet", "tulle"); strings.Contains(rules, "masquerade fully-random") {
		t.Errorf("pods are masqueraded:\n%s", rules)
	}
	if st := ag.Status(); st.Node.Tun.MTU != 1500-28 {
		t.Errorf("the MTU is %d, not that of udp", st.Node.Tun.MTU)
	}
}
