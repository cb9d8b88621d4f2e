package clustertest

import (
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/tulle-net/tulle/internal/api"
	"github.com/tulle-net/tulle/internal/lab"
)

// sameNode fails the test unless the node has kept what makes it the node that it was.
func sameNode(t *testing.T, when string, before, after api.Node) {
	t.Helper()
	if after.ID != before.ID {
		t.Errorf("%s: node ID %s, want %s as before", when, after.ID, before.ID)
	}
	if !slices.Equal(after.Prefixes, before.Prefixes) {
		t.Errorf("%s: owns %v, want %v as before", when, after.Prefixes, before.Prefixes)
	}
	if !slices.Equal(after.Tun.Addresses, before.Tun.Addresses) {
		t.Errorf("%s: tun addresses %v, want %v as before", when, after.Tun.Addresses, before.Tun.Addresses)
	}
	blocks := func(n api.Node) (out []string) {
		for _, b := range n.Blocks {
			out = append(out, b.Prefix.String())
		}
		return out
	}
	if !slices.Equal(blocks(after), blocks(before)) {
		t.Errorf("%s: blocks %v, want %v as before", when, blocks(after), blocks(before))
	}
}

// TestKill9 kills an agent, and then a whole host: both come back as who they were, and nothing else has to be restarted.
func TestKill9(t *testing.T) {
	t.Parallel()
	l := up(t, "kill", lab.Options{})
	if _, err := l.AddPod(t.Context(), "h1"); err != nil {
		t.Fatal(err)
	}
	settled(t, l)
	all := pods(l)
	tr := newTraffic(t, l, all)
	local := [][2]station{}
	for _, p := range allPairs(all, nil) {
		if p[0].host == "h1" && p[1].host == "h1" {
			local = append(local, p)
		}
	}
	if len(local) != 2 {
		t.Fatalf("%d pairs of pods on h1", len(local))
	}
	before := mustStatus(t, l, "h1")
	netBefore := steady(t, l, "h1")
	if len(netBefore.marked()) < 8 { // own, cluster and two peers, in two families
		t.Fatalf("routes of the agent on h1: %q", netBefore.marked())
	}

	if err := l.StopAgent(t.Context(), "h1", syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	// Everything stays, and the pods of the host talk on.
	dead := networkOf(t, l, "h1")
	outlives := netBefore.withoutProbes() // only the device for direct probes ends with the agent
	objects := []string{"link", "address", "rule", "nft", "sysctl"}
	dead.with(objects...).carrierless().sameAs(t, "while the agent is dead", outlives.with(objects...).carrierless())
	dead.marked().sameAs(t, "while the agent is dead", outlives.marked())
	tr.all(t, local, before.Node.Tun.MTU, 1<<20)

	if err := l.StartAgent(t.Context(), "h1"); err != nil {
		t.Fatal(err)
	}
	if err := l.WaitReady(t.Context(), "h1"); err != nil {
		t.Fatal(err)
	}
	sameNode(t, "after SIGKILL", before.Node, mustStatus(t, l, "h1").Node)
	settled(t, l)
	becomes(t, "after SIGKILL", func() snapshot { return networkOf(t, l, "h1").marked() }, netBefore.marked())
	tr.all(t, allPairs(all, nil), before.Node.Tun.MTU, 256<<10)

	t.Run("second agent", func(t *testing.T) { secondAgent(t, l) })

	// A power failure: the disk stays.
	if err := l.ResetHost(t.Context(), "h1"); err != nil {
		t.Fatal(err)
	}
	if left := networkOf(t, l, "h1").marked(); len(left) > 0 {
		t.Fatalf("a host that has just booted has routes: %q", left)
	}
	if err := l.StartAgent(t.Context(), "h1"); err != nil {
		t.Fatal(err)
	}
	if err := l.WaitReady(t.Context(), "h1"); err != nil {
		t.Fatal(err)
	}
	sameNode(t, "after a power failure", before.Node, mustStatus(t, l, "h1").Node)
	p, err := l.AddPod(t.Context(), "h1")
	if err != nil {
		t.Fatal(err)
	}
	if !slices.Equal(p.Addresses, all[0].addrs) {
		t.Errorf("pod %s got %v, want %v: the node holds them for a pod of this name until it is told that it is gone", p.Name, p.Addresses, all[0].addrs)
	}
	c, err := l.Client("h1")
	if err != nil {
		t.Fatal(err)
	}
	other, err := c.Allocate(t.Context(), api.AllocateRequest{ID: "another pod"})
	if err != nil {
		t.Fatal(err)
	}
	for _, a := range other.Addresses {
		if slices.ContainsFunc(all, func(s station) bool { return slices.Contains(s.addrs, a.Address) }) {
			t.Errorf("another pod got %v, which an earlier pod may still have", a.Address)
		}
	}
	settled(t, l)
	pingAll(t, l, hostStations(t, l))
	for _, h := range []string{"h2", "h3"} {
		if st := mustStatus(t, l, h); st.Counters.Repairs != 0 {
			t.Errorf("%s had to repair its host %d times", h, st.Counters.Repairs)
		}
	}
}

// carrierless leaves out whether links have a carrier: a TUN device has one while somebody holds it.
func (s snapshot) carrierless() (out snapshot) {
	for _, line := range s {
		out = append(out, strings.Replace(line, "|running", "", 1))
	}
	return out
}

// secondAgent starts further agents on a host whose agent runs: each finds another thing taken, and leaves it alone.
func secondAgent(t *testing.T, l *lab.Lab) {
	h, err := l.Host("h2")
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	for _, tc := range []struct {
		name string
		args []string
		want []string
	}{
		{"socket", nil, []string{h.Socket, "another agent", "--socket"}},
		{"state", []string{"--socket", dir + "/2.sock", "--metrics", "off"}, []string{filepath.Join(h.Dir, "state"), "in use by another process", "--state-dir"}},
		{"tun", []string{"--socket", dir + "/3.sock", "--metrics", "off", "--state-dir", dir + "/state3"}, []string{"tun0", "another process", "--tun"}},
		{
			"device of another name", []string{"--socket", dir + "/4.sock", "--metrics", "off", "--state-dir", dir + "/state4", "--tun", "tun1"},
			[]string{"10.244.0.0/16", "dev tun0", "tulle cleanup --tun tun0", "--cluster-cidr"},
		},
	} {
		before := networkOf(t, l, "h2").with("link")
		r := inHost(t, l, "h2", append([]string{"agent", "--config", h.Config}, tc.args...)...)
		oneLineError(t, tc.name, r, 1, tc.want...)
		networkOf(t, l, "h2").with("link").sameAs(t, tc.name, before)
	}
	settled(t, l) // the first agent
}

// inHost runs the program in a host's namespace. An agent that does run is ended when the test's patience is.
func inHost(t *testing.T, l *lab.Lab, host string, args ...string) result {
	t.Helper()
	var r result
	if err := l.Do(host, func() error {
		r = run(t, newCommand(t, args...))
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	return r
}

// oneLineError wants that exit code and, last on stderr behind the log, one line by tulle that has the words.
func oneLineError(t *testing.T, name string, r result, code int, words ...string) {
	t.Helper()
	lines := strings.Split(strings.TrimSpace(r.err), "\n")
	last := lines[len(lines)-1]
	t.Logf("%s: %s", name, last)
	if r.code != code {
		t.Errorf("%s: exit code %d, want %d; it says: %s", name, r.code, code, r.err)
	}
	said := 0
	for _, line := range lines {
		if strings.HasPrefix(line, "tulle: ") {
			said++
		}
	}
	if said != 1 || !strings.HasPrefix(last, "tulle: ") {
		t.Errorf("%s: want one line that begins with \"tulle: \", got:\n%s", name, r.err)
	}
	if missing := lacks(last, words...); len(missing) > 0 {
		t.Errorf("%s: the line lacks %q: %s", name, missing, last)
	}
}
