package soak

import (
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tulle-net/tulle/internal/testing/hosts"
)

// machine is a host with its agent and a pod.
type machine struct {
	*hosts.Host
	addr, gateway, dev string // of its underlay; dev is the router's
	index              int
	agent              *hosts.Agent
	clock              int // seconds that its monotonic clock is ahead
}

// cluster is four machines in two subnets, with a router between them.
type cluster struct {
	t        *testing.T
	router   *hosts.Host
	machines []*machine
	traffic  *traffic
	rand     *rand.Rand
	long     bool // some faults last long
}

func newCluster(t *testing.T, r *rand.Rand) *cluster {
	n := hosts.New(t)
	c := &cluster{t: t, router: n.Host("r"), rand: r}
	c.router.Sysctl("net.ipv4.ip_forward", "1")
	for s, dev := range []string{"to1", "to2"} {
		sw := n.SwitchNamed("sw"+strconv.Itoa(s+1), 1500)
		gateway := fmt.Sprintf("10.0.%d.1", s+1)
		c.router.Plug(sw, dev, gateway+"/24")
		for i := range 2 {
			m := &machine{Host: n.Host(string(rune('a' + 2*s + i))), dev: dev, gateway: gateway, index: 2*s + i}
			m.addr = fmt.Sprintf("10.0.%d.%d", s+1, 11+i)
			m.Plug(sw, "eth0", m.addr+"/24")
			m.IP("route add default via " + gateway)
			c.machines = append(c.machines, m)
			// A disk of its own, which can be filled.
			if err := os.Mkdir(m.StateDir(), 0o700); err != nil {
				t.Fatal(err)
			}
			if err := unix.Mount("tmpfs", m.StateDir(), "tmpfs", 0, "size=1m"); err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { _ = unix.Unmount(m.StateDir(), unix.MNT_DETACH) })
		}
	}
	var pods []*hosts.Pod
	for _, m := range c.machines { // the first one begins the cluster when the others have answered
		c.start(m)
	}
	for _, m := range c.machines {
		m.agent.Ready(30 * time.Second)
		pods = append(pods, m.agent.Pod("pod-"+m.Name))
	}
	c.traffic = startTraffic(t, pods)
	return c
}

// start starts a machine's agent, the way its unit does: the same arguments on all hosts.
func (c *cluster) start(m *machine) {
	m.Wrap = nil
	if m.clock > 0 {
		m.Wrap = []string{"unshare", "--time", "--monotonic", strconv.Itoa(m.clock), "--boottime", strconv.Itoa(m.clock)}
	}
	args := []string{"--bootstrap=" + strconv.FormatBool(m.index == 0), "--cluster-cidr", "10.244.0.0/16", "--metrics", "127.0.0.1:9646"}
	for _, o := range c.machines {
		args = append(args, "--join", o.addr)
	}
	m.agent = m.Agent(args...)
}

// sound checks what must hold at every time.
func (c *cluster) sound(after string) {
	c.t.Helper()
	c.traffic.mu.Lock()
	defer c.traffic.mu.Unlock()
	if len(c.traffic.wrong) > 0 {
		c.t.Fatalf("after %s: %d datagrams arrived wrongly: %s", after, len(c.traffic.wrong), strings.Join(c.traffic.wrong[:min(10, len(c.traffic.wrong))], "\n"))
	}
}

// fill writes until a machine's disk is full, and returns what empties it.
func (m *machine) fill(t *testing.T) (mend func()) {
	path := filepath.Join(m.StateDir(), "ballast")
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for block := 64 << 10; block > 0; block /= 2 {
		for err = nil; err == nil; {
			_, err = f.Write(make([]byte, block))
		}
	}
	return func() {
		if err := os.Remove(path); err != nil {
			t.Fatal(err)
		}
	}
}
