package soak

import (
	"bufio"
	"fmt"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tulle-net/tulle/internal/testing/hosts"
)

func TestMain(m *testing.M) { os.Exit(hosts.Main(m)) }

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
}

// healing is how long a cluster may take to be as before after the last fault has ended.
const healing = 60 * time.Second

func TestSoak(t *testing.T) {
	text := os.Getenv("TULLE_SOAK")
	if text == "" {
		t.Skip("runs for as long as TULLE_SOAK says, such as 10m: see `make soak`")
	}
	length, err := time.ParseDuration(text)
	if err != nil {
		t.Fatalf("TULLE_SOAK=%q: %v; want a time such as 1h", text, err)
	}
	seed := uint64(time.Now().UnixNano())
	if s := os.Getenv("TULLE_SOAK_SEED"); s != "" {
		n, err := strconv.ParseUint(s, 10, 64)
		if err != nil {
			t.Fatalf("TULLE_SOAK_SEED=%q: %v", s, err)
		}
		seed = n
	}
	t.Logf("TULLE_SOAK_SEED=%d", seed)
	c := newCluster(t, rand.New(rand.NewPCG(seed, 1)))
	c.heal("start", time.Now())
	before := c.sizes()
	times := map[string][]time.Duration{}
	var order []fault
	for end := time.Now().Add(length); time.Now().Before(end); {
		if len(order) == 0 { // each kind as often as the others
			order = slices.Clone(faults)
			c.rand.Shuffle(len(order), func(i, j int) { order[i], order[j] = order[j], order[i] })
		}
		f := order[0]
		order = order[1:]
		m := c.machines[c.rand.IntN(len(c.machines))]
		mend := f.inject(c, m)
		time.Sleep(time.Duration(500+c.rand.IntN(4000)) * time.Millisecond)
		mend()
		name := f.name + " of " + m.Name
		times[f.name] = append(times[f.name], c.heal(name, time.Now()))
		c.sound(name)
	}
	c.grown(before)
	sent, received := c.traffic.totals()
	c.traffic.end()
	c.report(length, times, sent, received)
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

// heal waits until every pod hears every other again, and every agent is ready and without problems.
func (c *cluster) heal(name string, since time.Time) time.Duration {
	c.t.Helper()
	flowing := time.Duration(0)
	hosts.Within(c.t, healing, "healed: "+name, func() error {
		if err := c.traffic.flows(since.Add(every)); err != nil {
			return err
		}
		if flowing == 0 {
			flowing = time.Since(since)
		}
		for _, m := range c.machines {
			st, err := m.agent.TryStatus()
			if err != nil {
				return fmt.Errorf("%s: %w", m.Name, err)
			}
			if !st.Ready || st.Cluster.Alive != len(c.machines) {
				return fmt.Errorf("%s: ready %v, %d members alive: %s", m.Name, st.Ready, st.Cluster.Alive, m.agent.Problems())
			}
			if p := m.agent.Problems(); p != "" {
				return fmt.Errorf("%s: %s", m.Name, p)
			}
		}
		return nil
	})
	return flowing
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

// size is what an agent holds.
type size struct{ goroutines, files, resident int }

// sizes asks all agents.
func (c *cluster) sizes() (out []size) {
	c.t.Helper()
	for _, m := range c.machines {
		var s size
		hosts.Within(c.t, 10*time.Second, "metrics of "+m.Name, func() (err error) { s, err = m.size(); return })
		out = append(out, s)
	}
	return out
}

func (m *machine) size() (s size, err error) {
	client := &http.Client{Timeout: 5 * time.Second, Transport: &http.Transport{DisableKeepAlives: true, Dial: func(network, addr string) (c net.Conn, err error) {
		err = m.Do(func() error { c, err = net.Dial(network, addr); return err })
		return c, err
	}}}
	res, err := client.Get("http://127.0.0.1:9646/metrics")
	if err != nil {
		return s, err
	}
	defer res.Body.Close()
	into := map[string]*int{"go_goroutines": &s.goroutines, "process_open_fds": &s.files, "process_resident_memory_bytes": &s.resident}
	found := 0
	for sc := bufio.NewScanner(res.Body); sc.Scan(); {
		name, value, _ := strings.Cut(sc.Text(), " ")
		if p := into[name]; p != nil {
			v, err := strconv.ParseFloat(value, 64)
			if err != nil {
				return s, err
			}
			*p = int(v)
			found++
		}
	}
	if found != len(into) {
		return s, fmt.Errorf("%d of %d metrics", found, len(into))
	}
	return s, nil
}

// grown compares what agents hold with what they held at the start. Agents that were restarted meanwhile count, too: they have
// been through the faults of others.
func (c *cluster) grown(before []size) {
	c.t.Helper()
	const moreGoroutines, moreFiles, moreMemory = 30, 20, 48 << 20
	var err error
	for end := time.Now().Add(20 * time.Second); time.Now().Before(end); time.Sleep(500 * time.Millisecond) { // what ends by itself has ended then
		err = nil
		for i, now := range c.sizes() {
			b := before[i]
			if now.goroutines > b.goroutines+moreGoroutines || now.files > b.files+moreFiles || now.resident > b.resident+moreMemory {
				err = fmt.Errorf("the agent of %s has grown: goroutines %d, was %d; open files %d, was %d; resident bytes %d, was %d",
					c.machines[i].Name, now.goroutines, b.goroutines, now.files, b.files, now.resident, b.resident)
			}
		}
		if err == nil {
			return
		}
	}
	c.t.Error(err)
}

// report prints the figures, and writes them to the file that TULLE_SOAK_REPORT names.
func (c *cluster) report(length time.Duration, times map[string][]time.Duration, sent, received uint64) {
	var b strings.Builder
	fmt.Fprintf(&b, "%v, %d faults, %d datagrams sent, %d received, 0 misdelivered, changed or duplicated.\n\n", length, count(times), sent, received)
	fmt.Fprintf(&b, "| fault | times | all pods reach each other again: median | longest |\n|---|---|---|---|\n")
	for _, f := range faults {
		all := slices.Sorted(slices.Values(times[f.name]))
		if len(all) == 0 {
			continue
		}
		fmt.Fprintf(&b, "| %s | %d | %.1f s | %.1f s |\n", f.name, len(all), all[len(all)/2].Seconds(), all[len(all)-1].Seconds())
	}
	c.t.Logf("\n%s", &b)
	if path := os.Getenv("TULLE_SOAK_REPORT"); path != "" {
		if err := os.WriteFile(path, []byte(b.String()), 0o644); err != nil {
			c.t.Error(err)
		}
	}
}

func count(times map[string][]time.Duration) (n int) {
	for _, l := range times {
		n += len(l)
	}
	return n
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
