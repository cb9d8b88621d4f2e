package doctor_test

import (
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/tulle-net/tulle/internal/api"
	"github.com/tulle-net/tulle/internal/doctor"
	"github.com/tulle-net/tulle/internal/testing/hosts"
	"github.com/tulle-net/tulle/internal/testing/testbuild"
)

// TestHostWithoutAgent breaks what can be broken before an agent runs.
func TestHostWithoutAgent(t *testing.T) {
	t.Parallel()
	n := hosts.New(t)
	h := n.Host("h")
	sw := n.Switch()
	h.Plug(sw, "eth0", "10.0.1.11/24")
	file := h.WriteFile("tulle.yaml", "udp_prt: 6080\n")
	p := at(t, n, h, nil, "--config", file, "--cluster-cidr", "10.244.0.0/16")

	p.finds("config", doctor.Failed, file+":1", "udp_prt")
	h.WriteFile("tulle.yaml", "udp_port: 6080\n")
	p.well("config")

	// What the agent would refuse, or wait for, is found before it starts.
	keys := h.WriteFile("keys", strings.Repeat("A", 43)+"=\n")
	for _, c := range []struct {
		flag, value string
		state       doctor.State
		words       []string
		mend        func()
	}{
		{"--gossip-key-file", "/nonexistent/keys", doctor.Failed, []string{"gossip_key_file", "/nonexistent/keys"}, nil},
		{"--gossip-key-file", keys, doctor.Failed, []string{"gossip_key_file", keys, "chmod 600"}, func() { h.Run("chmod", "600", keys) }},
		{"--metrics", "10.0.1.77:9646", doctor.Failed, []string{"metrics", "10.0.1.77", "give it to an interface"}, func() { h.Addr("eth0", "10.0.1.77/32") }},
		{"--cni-dir", filepath.Join(filepath.Dir(keys), "cni"), doctor.Warning, []string{"cni_dir", "mkdir -p"}, func() { h.Run("mkdir", filepath.Join(filepath.Dir(keys), "cni")) }},
		{"--underlay", "eth7", doctor.Warning, []string{"underlay", "eth7"}, func() { h.IP("link add eth7 type bridge", "link set eth7 up", "addr add 10.7.0.1/24 dev eth7") }},
		{"--underlay", "10.0.1.78", doctor.Warning, []string{"underlay", "10.0.1.78"}, func() { h.Addr("eth0", "10.0.1.78/32") }},
	} {
		if c.value == keys {
			h.Run("chmod", "644", keys)
		}
		q := p
		q.args = append([]string{c.flag, c.value}, p.args...)
		q.finds("config", c.state, c.words...)
		if c.mend != nil {
			c.mend()
			q.well("config")
		}
	}
	h.IP("link del eth7", "addr del 10.0.1.77/32 dev eth0", "addr del 10.0.1.78/32 dev eth0")

	p.well("tunnels")
	p.well("ports")
	h.IP("link add flannel.1 type vxlan id 1 dstport 4789", "link set flannel.1 up")
	p.finds("ports", doctor.Failed, "UDP port 4789 is in use", "vxlan_port")
	p.finds("tunnels", doctor.Failed, "flannel.1 is a vxlan device of the kernel on UDP port 4789", "ip link del flannel.1")
	h.IP("link del flannel.1")
	p.well("tunnels")
	p.well("ports")
	var taken net.PacketConn
	err := h.Do(func() (err error) { taken, err = net.ListenPacket("udp4", "10.0.1.11:7946"); return err })
	if err != nil {
		t.Fatal(err)
	}
	defer taken.Close()
	p.finds("ports", doctor.Failed, "UDP port 7946 is in use by", fmt.Sprintf("process %d", os.Getpid()))
	taken.Close()
	p.well("ports")

	p.well("routes")
	h.IP("addr add 10.244.3.1/24 dev eth0")
	p.mends("routes", doctor.Failed, "10.244.3.1/24 on eth0", "ip address del")

	// A device of another kind is not Tulle's to change, whatever the configuration says: it may be the uplink.
	h.IP("link add tun0 type bridge")
	for _, tun := range []string{"tun0", "eth0"} {
		q := p
		q.args = append([]string{"--tun", tun}, p.args...)
		if f := q.finds("tun", doctor.Failed, "device "+tun+" is of type", "another --tun", "--underlay"); f.Command != "" {
			t.Errorf("the command for %s is %q", tun, f.Command)
		}
		settings := func() string {
			return h.Run("sh", "-c", "grep . /proc/sys/net/ipv?/conf/"+tun+"/* /proc/sys/net/ipv?/conf/all/forwarding 2>/dev/null || :")
		}
		was := settings()
		for _, check := range []string{"forwarding", "routes", "firewall", "managers"} {
			if r, err := q.doctor(check, "--fix"); err != nil || r.State != doctor.Skipped || !strings.Contains(r.Seen, tun+" is not") || len(r.Findings) > 0 {
				t.Errorf("%s with --tun %s: %+v, %v", check, tun, r, err)
			}
		}
		if is := settings(); is != was {
			t.Errorf("the settings of %s were\n%s\nand are\n%s", tun, was, is)
		}
	}
	h.IP("link del tun0")

	q := p
	q.args = append([]string{"--join", "seed:7946"}, p.args...)
	q.finds("names", doctor.Failed, "seed seed:7946: its name does not resolve")
	h.EtcHosts("127.0.1.1 seed")
	q.finds("names", doctor.Failed, "resolves to 127.0.1.1 on this host: it would be this host itself", "getent ahosts seed")
	h.EtcHosts("10.244.9.9 seed")
	q.finds("names", doctor.Failed, "10.244.9.9, which is an address of the cluster's pods")
	h.EtcHosts("10.0.1.12 seed")
	q.well("names")
}

// TestPortsAfterTheAgent has what an agent leaves behind when it stops or restarts: connections in TIME_WAIT, and the sockets that systemd keeps for
// the next one.
func TestPortsAfterTheAgent(t *testing.T) {
	t.Parallel()
	n := hosts.New(t)
	h := n.Host("h")
	p := at(t, n, h, nil)
	if err := h.Do(func() error {
		l, err := net.Listen("tcp4", "127.0.0.1:7946")
		if err != nil {
			return err
		}
		defer l.Close()
		p.finds("ports", doctor.Failed, "TCP port 7946 is in use by")
		c, err := net.Dial("tcp4", l.Addr().String())
		if err != nil {
			return err
		}
		defer c.Close()
		s, err := l.Accept()
		if err != nil {
			return err
		}
		return s.Close() // first, so that TIME_WAIT is on this side
	}); err != nil {
		t.Fatal(err)
	}
	hosts.Within(t, 10*time.Second, "a connection is in TIME_WAIT", func() error {
		if out := h.Run("ss", "-tan", "state", "time-wait", "sport = :7946"); !strings.Contains(out, ":7946") {
			return errors.New(out)
		}
		return nil
	})
	p.well("ports")

	// A process namespace whose process 1 is called systemd.
	systemd := filepath.Join(t.TempDir(), "systemd")
	if err := os.Symlink("/bin/sh", systemd); err != nil {
		t.Fatal(err)
	}
	for port, want := range map[int]string{6080: "1 ok, 0 warnings, 0 failed", 7946: "UDP port 7946 is in use by systemd (process 1)"} {
		var taken *net.UDPConn
		if err := h.Do(func() (err error) { taken, err = net.ListenUDP("udp", &net.UDPAddr{Port: port}); return err }); err != nil {
			t.Fatal(err)
		}
		file, err := taken.File()
		if err != nil {
			t.Fatal(err)
		}
		cmd := exec.Command("nsenter", "--net="+h.NetnsPath(), "unshare", "-p", "-f", "--mount-proc", systemd, "-c", n.Program()+" doctor ports --config /dev/null --socket /nonexistent/s 3<&-; :")
		cmd.ExtraFiles = []*os.File{file}
		if out, err := cmd.CombinedOutput(); err != nil || !strings.Contains(string(out), want) {
			t.Errorf("process 1 has port %d: %s, %v; want %q", port, out, err, want)
		}
		if err := errors.Join(file.Close(), taken.Close()); err != nil {
			t.Error(err)
		}
	}
}

// TestContainer: /dev/net is empty, as in a container; and the remedy is run there.
func TestContainer(t *testing.T) {
	t.Parallel()
	n := hosts.New(t)
	h := n.Host("h")
	script := h.WriteFile("script", fmt.Sprintf(`
mount -t tmpfs none /dev/net
PATH=%s:$PATH
tulle doctor tun --socket /nonexistent/s > %[2]s && exit 1
cat %[2]s
sh -ec "$(sed -n 's/^ *\$ //p' %[2]s)"
tulle doctor tun --socket /nonexistent/s
`, filepath.Dir(n.Program()), filepath.Join(t.TempDir(), "out")))
	out := h.Run("unshare", "-m", "sh", "-e", script)
	for _, want := range []string{"FAILED tun: /dev/net/tun is missing", "mknod -m 666 /dev/net/tun c 10 200", "1 ok, 0 warnings, 0 failed"} {
		if !strings.Contains(out, want) {
			t.Errorf("%q is not in %s", want, out)
		}
	}
	_, err := h.TryRun("setpriv", "--bounding-set", "-net_raw", n.Program(), "doctor", "capabilities", "--socket", "/nonexistent/s")
	if err == nil || !strings.Contains(err.Error(), "this process lacks CAP_NET_RAW") {
		t.Errorf("without CAP_NET_RAW: %v", err)
	}
	at(t, n, h, nil).well("capabilities")
}

// TestAgents has agents that differ: in what their network card makes of trains, in their disk, in their version.
func TestAgents(t *testing.T) {
	t.Parallel()
	n := hosts.New(t)
	sw := n.Switch()
	a, b := n.Host("a"), n.Host("b")
	a.Plug(sw, "eth0", "10.0.1.11/24")
	b.Plug(sw, "eth0", "10.0.1.12/24")
	// The sender's kernel cuts trains, and a card breaks what is not their first packet: such packets count up their IP IDs.
	a.IP("link set eth0 gso_max_segs 1")
	sw.Run("nft", "add table bridge f; add chain bridge f forwarded { type filter hook forward priority 0; }; add rule bridge f forwarded ip daddr 10.0.1.12 udp dport 6080 ip id != 0 drop")
	first := a.Agent("--bootstrap", "--underlay", "eth0", "--paths", "udp")
	first.Ready(20 * time.Second)
	second := b.Agent("--join", "10.0.1.11", "--paths", "udp")
	second.Ready(20 * time.Second)

	pod, db := first.Pod("web"), second.Pod("db")
	pod.Stream(db.IPv4(), 20*time.Millisecond)

	p := at(t, n, a, first)
	p.finds("trains", doctor.Warning, "do not reach b", "UDP_SEGMENT", "ethtool -K eth0 tx-udp-segmentation off")
	sw.Run("nft", "delete table bridge f") // another card
	first.Stop()
	first = a.Agent("--paths", "udp")
	first.Ready(20 * time.Second)
	p = at(t, n, a, first)
	p.well("trains")

	// A disk that takes no file for a while: something is in the place where the state is written first.
	q := at(t, n, b, second)
	q.well("state")
	obstacle := filepath.Join(b.StateDir(), "state.tmp")
	if err := os.Mkdir(obstacle, 0o700); err != nil {
		t.Fatal(err)
	}
	allocate := func(id string) error {
		_, err := second.Client.Allocate(t.Context(), api.AllocateRequest{ID: id})
		return err
	}
	if allocate("x1") == nil {
		t.Error("an address was given that is not on disk")
	}
	q.finds("state", doctor.Failed, "the state cannot be saved", "state.tmp")
	if r, err := q.doctor("state"); err != nil || !strings.Contains(r.Seen, "not saved") {
		t.Errorf("%+v, %v", r, err)
	}
	if err := os.Remove(obstacle); err != nil {
		t.Fatal(err)
	}
	hosts.Within(t, 10*time.Second, "addresses again", func() error { return allocate("x1") })
	q.well("state")

	// Another version of the program on disk.
	p.well("versions")
	other := filepath.Join(t.TempDir(), "tulle")
	if err := testbuild.Tulle(other, nil, "-ldflags=-X github.com/tulle-net/tulle/internal/api.version=v99.0.0"); err != nil {
		t.Fatal(err)
	}
	p.program = other
	p.finds("versions", doctor.Warning, "the program on disk is v99.0.0", "restart the agent")
	p.program = n.Program()
	p.well("versions")
	second.Stop()
	second = b.AgentOf(other, "--paths", "udp")
	second.Ready(20 * time.Second)
	p.finds("versions", doctor.Warning, "b runs version v99.0.0, this node", "upgrade the older one")
	second.Stop()
	second = b.Agent("--paths", "udp")
	second.Ready(20 * time.Second)
	p.well("versions")
}
