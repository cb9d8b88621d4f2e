package doctor

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/tulle-net/tulle/internal/api"
	"github.com/tulle-net/tulle/internal/testing/testbuild"
	"github.com/tulle-net/tulle/tunnel/underlay"
)

func pfx(texts ...string) (out []netip.Prefix) {
	for _, t := range texts {
		out = append(out, netip.MustParsePrefix(t))
	}
	return out
}

// What cannot be broken for one namespace alone is judged here: the machine's clock, its buffers, its table of connections. And
// the other judgements in all their states.
func TestJudge(t *testing.T) {
	agent := func(change func(*api.Status)) *api.Status {
		st := &api.Status{Version: api.Version(), Ready: true, Cluster: api.Cluster{ID: "c", CIDRs: pfx("10.244.0.0/16")}}
		change(st)
		return st
	}
	peer := func(change func(*api.Peer), more ...api.Peer) *api.Status {
		p := api.Peer{Name: "b", State: api.PeerAlive, Prefixes: pfx("10.244.1.0/24"), Path: api.Path{Mode: "udp", State: api.PathUp, MTU: 1472, MTULimit: 1472}}
		change(&p)
		return agent(func(st *api.Status) {
			st.Peers = append([]api.Peer{p}, more...)
			st.Node.Links = []string{"eth0"}
			st.Node.LinkMTU = 1500
		})
	}
	for _, c := range []struct {
		name, check string
		s           snapshot
		want        State
		words       string // in what it found, with remedy and command
	}{
		{"the clock follows NTP", "clock", snapshot{kernel: kernel{synced: true}}, OK, ""},
		{"the clock runs free", "clock", snapshot{}, Warning, "install an NTP client: chrony or systemd-timesyncd"},
		{"the clock runs free, and need not", "clock", snapshot{kernel: kernel{ntpClient: true}}, Warning, "timedatectl set-ntp true"},
		{"a peer's clock is nearly right", "clock", snapshot{kernel: kernel{synced: true}, status: peer(func(p *api.Peer) { p.ClockSkewMS = -2000 })}, OK, ""},
		{"a peer's clock is ahead", "clock", snapshot{kernel: kernel{synced: true}, status: peer(func(p *api.Peer) { p.ClockSkewMS = 3_600_500 })}, Warning, "the clock of b is 1h0m0.5s ahead of this host's"},
		{"a peer's clock is behind", "clock", snapshot{kernel: kernel{synced: true}, status: peer(func(p *api.Peer) { p.ClockSkewMS = -90_000 })}, Warning, "1m30s behind"},
		{"the clock cannot be read", "clock", snapshot{kernel: kernel{clockErr: unix.EPERM}}, Warning, "not looked at"},
		{"large buffers", "buffers", snapshot{kernel: kernel{buffer: 2 * underlay.DefaultBuffer}}, OK, ""},
		{"small buffers", "buffers", snapshot{kernel: kernel{buffer: 425984, rmemMax: 212992}}, Warning, fmt.Sprintf("sysctl -w net.core.rmem_max=%d", underlay.DefaultBuffer)},
		{"overflows", "buffers", snapshot{kernel: kernel{buffer: 2 * underlay.DefaultBuffer}, status: agent(func(st *api.Status) { st.Counters.SocketOverflows = 5000; st.Counters.RxPackets = 1e5 })}, Warning, "5000 of 105000 packets"},
		{"damaged packets", "buffers", snapshot{kernel: kernel{buffer: 2 * underlay.DefaultBuffer, badChecksums: 4000}, status: agent(func(st *api.Status) { st.Counters.SocketOverflows = 5000; st.Counters.RxPackets = 1e5 })}, Warning, "4000 UDP packets of this host had wrong checksums"},
		{"no connection tracking", "conntrack", snapshot{kernel: kernel{conntrack: -1, conntrackMax: -1}}, Skipped, ""},
		{"few connections", "conntrack", snapshot{kernel: kernel{conntrack: 749, conntrackMax: 1000}}, OK, ""},
		{"many connections", "conntrack", snapshot{kernel: kernel{conntrack: 750, conntrackMax: 1000}}, Warning, "sysctl -w net.netfilter.nf_conntrack_max=2000"},
		{"too many connections", "conntrack", snapshot{kernel: kernel{conntrack: 950, conntrackMax: 1000}}, Failed, "950 of 1000"},

		{"no driver", "tun", snapshot{tun: tunDevice{node: unix.ENODEV}}, Failed, "modprobe tun"},
		{"no permission", "tun", snapshot{tun: tunDevice{node: unix.EPERM}}, Failed, "DeviceAllow"},
		{"the device is gone", "tun", snapshot{status: agent(func(*api.Status) {})}, Failed, "systemctl restart tulle"},
		{"all capabilities", "capabilities", snapshot{caps: 1<<unix.CAP_NET_ADMIN | 1<<unix.CAP_NET_RAW}, OK, ""},
		{"no capability", "capabilities", snapshot{}, Failed, "CAP_NET_ADMIN and CAP_NET_RAW"},
		{"another agent", "agent", snapshot{agentErr: api.Errorf(api.CodeNoAgent, "no agent"), alone: errors.New("another agent runs")}, Failed, "another agent runs"},
		{"not ready", "agent", snapshot{status: agent(func(st *api.Status) { st.Ready = false })}, Failed, "not ready"},
		{"a problem of no other check", "agent", snapshot{status: agent(func(st *api.Status) { st.Problems = []api.Problem{{What: "odd"}} })}, Failed, "odd"},

		{"trains of kernel 6.12.48+deb13-amd64", "trains", snapshot{kernel: kernel{release: "6.12.48+deb13-amd64"}}, OK, ""},
		{"trains of kernel 7.0.0-rc3", "trains", snapshot{kernel: kernel{release: "7.0.0-rc3"}}, Warning, "kernel 7.0.0-rc3 is one of those"},
		{"trains of kernel 7.1.4-1-pve", "trains", snapshot{kernel: kernel{release: "7.1.4-1-pve"}}, Warning, "7.1.4-1-pve"},
		{"trains of kernel 7.1.5", "trains", snapshot{kernel: kernel{release: "7.1.5"}}, OK, ""},
		{"trains of kernel 7.2.1", "trains", snapshot{kernel: kernel{release: "7.2.1"}}, OK, ""},
		{"trains of kernel 6.1", "trains", snapshot{kernel: kernel{release: "6.1"}}, OK, ""},
		{"trains of kernel odd", "trains", snapshot{kernel: kernel{release: "odd"}}, OK, ""},

		{"networkd manages it", "managers", snapshot{Options: Options{Tun: "tun0"}, managers: managers{networkd: true, linkState: "configured", routesKept: true, rulesKept: true}}, Failed, "networkctl reload"},
		{"networkd leaves it alone", "managers", snapshot{managers: managers{networkd: true, linkState: "unmanaged", routesKept: true, rulesKept: true}}, OK, ""},
		{"networkd waits", "managers", snapshot{managers: managers{networkd: true, linkState: "pending", routesKept: true, rulesKept: true}}, OK, ""},
		{"networkd is older than its file", "managers", snapshot{managers: managers{networkd: true, linkState: "unmanaged", routesKept: true, rulesKept: true, unread: []string{"/etc/a.conf"}}}, Warning, "has not read /etc/a.conf"},
		{"networkd removes routes", "managers", snapshot{managers: managers{networkd: true, linkState: "unmanaged", rulesKept: true}}, Warning, "removes the agent's routes when"},
		{"networkd removes rules", "managers", snapshot{managers: managers{networkd: true, linkState: "unmanaged", routesKept: true}}, Warning, "removes the agent's policy rules when"},
		{"networkd removes routes and rules", "managers", snapshot{managers: managers{networkd: true, linkState: "unmanaged"}}, Warning, "removes the agent's routes and policy rules when"},
		{"networkd manages pods' links", "managers", snapshot{Options: Options{Tun: "tun0"}, managers: managers{networkd: true, linkState: "unmanaged", networkdOthers: []string{"pods", "tp0123456789ab", "tp0123456789ac", "tp0123456789ad", "tulle-direct"}, routesKept: true, rulesKept: true}}, Failed, "manages pods, tp0123456789ab, tp0123456789ac and 2 more"},
		{"NetworkManager manages a pod's link", "managers", snapshot{Options: Options{Tun: "tun0"}, managers: managers{nm: true, nmManaged: "false", nmOthers: []string{"tp0123456789ab"}}}, Failed, "nmcli device set tp0123456789ab managed no"},
		{"NetworkManager manages it", "managers", snapshot{Options: Options{Tun: "tun7"}, managers: managers{nm: true, nmManaged: "true"}}, Failed, "nmcli device set tun7 managed no"},
		{"NetworkManager leaves it alone", "managers", snapshot{managers: managers{nm: true, nmManaged: "false"}}, OK, ""},

		{"neither the agent nor the doctor sees the firewall", "firewall", snapshot{status: agent(func(*api.Status) {}), forward: seen{err: unix.EPERM}}, Warning, "not looked at"},
		{"the agent alone sees the firewall", "firewall", snapshot{status: agent(func(st *api.Status) {
			st.Problems = []api.Problem{{What: "policy drop", Check: api.CheckFirewall}}
		}), forward: seen{err: unix.EPERM}}, Failed, "policy drop"},

		{"space is used up", "space", snapshot{status: agent(func(st *api.Status) {
			st.Problems = []api.Problem{{What: "the blocks of this node are full", Check: api.CheckSpace}}
		})}, Failed, "full"},
		{"a leak", "addresses", snapshot{status: agent(func(*api.Status) {}), leaks: &api.IPAMCheck{Leaked: []api.LeakedAddr{{Address: netip.MustParseAddr("10.244.0.7"), ID: "x"}}}}, Warning, "tulle ipam release 10.244.0.7"},
		{"a stranded pod", "addresses", snapshot{status: agent(func(*api.Status) {}), leaks: &api.IPAMCheck{Stranded: []api.LeakedAddr{{Address: netip.MustParseAddr("10.244.0.7"), ID: "x", Reason: "another node owns it now"}}}}, Warning, "restart that pod"},
		{"an unknown pod", "addresses", snapshot{status: agent(func(*api.Status) {}), leaks: &api.IPAMCheck{Unknown: []api.UnknownAddr{{Address: netip.MustParseAddr("10.244.0.7"), Where: "veth1"}}}}, Warning, "never allocated"},
		{"a foreign cluster", "cluster", snapshot{status: agent(func(st *api.Status) {
			st.Problems = []api.Problem{{What: "belongs to cluster X", Check: api.CheckCluster}}
		})}, Failed, "cluster X"},
		{"another version there", "versions", snapshot{status: peer(func(p *api.Peer) { p.Version = "v0.0.1" })}, Warning, "b runs version v0.0.1"},
		{"an old plugin", "versions", snapshot{status: agent(func(*api.Status) {}), plugin: plugin{path: "/opt/cni/bin/tulle-cni", version: "0.0.1"}}, Warning, "/opt/cni/bin/tulle-cni is of version 0.0.1"},
		{"a plugin that does not run", "versions", snapshot{status: agent(func(*api.Status) {}), plugin: plugin{path: "/opt/cni/bin/tulle-cni", err: os.ErrPermission}}, Warning, "/opt/cni/bin/tulle-cni does not say its version"},
		{"no plugin", "versions", snapshot{status: agent(func(*api.Status) {}), plugin: plugin{path: "/opt/cni/bin/tulle-cni", err: os.ErrNotExist}}, OK, ""},
		{"the plugin of this version", "versions", snapshot{status: agent(func(*api.Status) {}), plugin: plugin{path: "/opt/cni/bin/tulle-cni", version: api.Version()}}, OK, ""},
		{"an old plugin without an agent", "versions", snapshot{plugin: plugin{path: "/opt/cni/bin/tulle-cni", version: "0.0.1"}}, Warning, "0.0.1"},
		{"one version", "versions", snapshot{status: peer(func(p *api.Peer) { p.Version = api.Version() })}, OK, ""},

		{"the whole MTU", "mtu", snapshot{status: peer(func(*api.Peer) {})}, OK, ""},
		{"a smaller MTU", "mtu", snapshot{status: peer(func(p *api.Peer) { p.Path.MTU = 1372 })}, Warning, "raise the MTU of the link on the way"},
		{"a smaller MTU by another link", "mtu", snapshot{status: peer(func(p *api.Peer) { p.Path.MTU = 1372; p.Leaves = []string{"eth1"} })}, Warning, "100 bytes less"},
		{"no path", "mtu", snapshot{status: peer(func(p *api.Peer) { p.Path.State = api.PathDown })}, Skipped, ""},
		{"two of one name", "paths", snapshot{status: peer(func(p *api.Peer) {
			p.ID = "c2d85b1f90e34d6d8a40f7b91e2c6d03"
			p.Candidates = []api.Candidate{{Path: api.Path{Mode: "ipip", State: api.PathDown}}, {Path: p.Path, Active: true}}
		}, api.Peer{Name: "b", ID: "b0914e6627aa4c35be7f81d6e5c3a972"})}, Warning, "ipip is preferred toward b (c2d85b1f), and blocked"},
		{"a path that loses packets", "paths", snapshot{status: peer(func(p *api.Peer) {
			p.Path.Loss = 0.48
			p.Candidates = []api.Candidate{{Path: p.Path, Active: true}}
		})}, Warning, "48 % of the probes to b by udp were lost"},
		{"a path that loses hardly anything", "paths", snapshot{status: peer(func(p *api.Peer) {
			p.Path.Loss = 0.05
			p.Candidates = []api.Candidate{{Path: p.Path, Active: true}}
		})}, OK, ""},
		{"no peers", "paths", snapshot{status: agent(func(*api.Status) {})}, Skipped, ""},
		{"what is not preferred is blocked", "paths", snapshot{status: peer(func(p *api.Peer) {
			p.Candidates = []api.Candidate{{Path: p.Path, Active: true}, {Path: api.Path{Mode: "ipip", State: api.PathDown}}}
		})}, OK, ""},
		{"one family goes directly, the other cannot", "paths", snapshot{status: peer(func(p *api.Peer) {
			p.Path = api.Path{Mode: "direct", Family: "ipv4", State: api.PathUp}
			p.Candidates = []api.Candidate{{Path: p.Path, Active: true}, {Path: api.Path{Mode: "direct", Family: "ipv6", State: api.PathDown}}, {Path: api.Path{Mode: "udp", State: api.PathUp}, Active: true}}
		})}, Warning, "direct (IPv6) is preferred toward b, and blocked"},
		{"both families go directly, and the tunnel is blocked", "paths", snapshot{status: peer(func(p *api.Peer) {
			p.Path = api.Path{Mode: "direct", Family: "ipv4", State: api.PathUp}
			p.Candidates = []api.Candidate{{Path: p.Path, Active: true}, {Path: api.Path{Mode: "direct", Family: "ipv6", State: api.PathUp}, Active: true}, {Path: api.Path{Mode: "udp", State: api.PathDown}}}
		})}, OK, ""},
		{"no agent", "paths", snapshot{}, Skipped, ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			var r Result
			for _, k := range checks() {
				if k.name == c.check {
					r = k.judge(&c.s)
				}
			}
			var all strings.Builder
			for _, f := range r.Findings {
				all.WriteString(f.What + " → " + f.Remedy + " $ " + f.Command + "\n")
				if f.What == "" || f.State != Warning && f.State != Failed {
					t.Errorf("finding %+v", f)
				}
			}
			text := all.String()
			if r.State != c.want || !strings.Contains(text, c.words) || (text == "") != (r.State == OK || r.State == Skipped) {
				t.Errorf("%+v, want %s and %q", r, c.want, c.words)
			}
		})
	}
}

// A line for people names a few of many peers, those in trouble first.
func TestManyPeers(t *testing.T) {
	st := &api.Status{Version: "v2"}
	for i := range 1000 {
		p := api.Peer{Name: fmt.Sprintf("node-%d", i), Version: "v1", State: api.PeerAlive, Prefixes: pfx("10.244.1.0/24"), Path: api.Path{Mode: "udp", State: api.PathUp, MTU: 1472, MTULimit: 1472}}
		if i == 777 {
			p.Path.State = api.PathDown
		}
		st.Peers = append(st.Peers, p)
	}
	s := &snapshot{status: st}
	for _, r := range []Result{judgePaths(s), judgeMTU(s), judgeVersions(s)} {
		if len(r.Seen) > 400 {
			t.Errorf("%d bytes: %s", len(r.Seen), r.Seen)
		}
	}
	if r := judgePaths(s); !strings.HasPrefix(r.Seen, "node-777 by udp down, ") || !strings.HasSuffix(r.Seen, ", and 988 more") {
		t.Errorf("got %q", r.Seen)
	}
}

// What the doctor's commands write is what the package has.
func TestCommandsWriteTheDropIns(t *testing.T) {
	lines := func(name string) string {
		b, err := os.ReadFile(filepath.Join("../../packaging", name))
		if err != nil {
			t.Fatal(err)
		}
		return strings.TrimSpace(regexp.MustCompile("(?m)^#.*\n").ReplaceAllString(string(b), "")) + "\n"
	}
	r := judgeManagers(&snapshot{Options: Options{Tun: "tun0"}, managers: managers{networkd: true, linkState: "configured", nm: true, nmManaged: "true"}})
	var all strings.Builder
	for _, f := range r.Findings {
		all.WriteString(f.Command + "\n")
	}
	for name, to := range map[string]string{
		"05-tulle.network": "/etc/systemd/network/05-tulle.network", "05-tulle-bridge.network": "/etc/systemd/network/05-tulle-bridge.network",
		"90-tulle.networkd.conf": "/etc/systemd/networkd.conf.d/90-tulle.conf", "90-tulle.NetworkManager.conf": "/etc/NetworkManager/conf.d/90-tulle.conf",
	} {
		if want := "printf '" + strings.ReplaceAll(lines(name), "\n", `\n`) + "' > " + to + " "; !strings.Contains(all.String(), want) {
			t.Errorf("no command has %q:\n%s", want, all.String())
		}
	}
}

// The real plugin says its version.
func TestPluginVersion(t *testing.T) {
	dir := t.TempDir()
	if err := testbuild.Command("tulle-cni", filepath.Join(dir, "tulle-cni"), nil, "-ldflags", "-X github.com/tulle-net/tulle/internal/api.version=0.0.7"); err != nil {
		t.Fatal(err)
	}
	t.Setenv("CNI_COMMAND", "DEL") // of whatever called the doctor
	s := &snapshot{Options: Options{CNIBinDir: dir}}
	if gatherVersions(t.Context(), s); s.plugin.version != "0.0.7" || s.plugin.err != nil {
		t.Errorf("%+v", s.plugin)
	}
	s = &snapshot{}
	if gatherVersions(t.Context(), s); s.plugin != (plugin{}) {
		t.Errorf("no directory: %+v", s.plugin)
	}
}

// The files of network managers and of other networks, as these programs write them.
func TestFiles(t *testing.T) {
	root := t.TempDir()
	write := func(name, text string) {
		t.Helper()
		path := filepath.Join(root, name)
		if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o755), os.WriteFile(path, []byte(text), 0o600)); err != nil {
			t.Fatal(err)
		}
	}
	s := &snapshot{Options: Options{Root: root, Tun: "no such device", ClusterCIDRs: pfx("10.244.0.0/16"), CNIDir: "/etc/cni/net.d"}}
	gatherManagers(context.Background(), s)
	if !reflect.DeepEqual(s.managers, managers{}) {
		t.Errorf("nothing there: %+v", s.managers)
	}
	// No device: its state is looked up under index 0.
	write("run/systemd/netif/links/2", "# This is private data. Do not parse.\nADMIN_STATE=configured\nOPER_STATE=routable\n")
	write("run/systemd/netif/links/0", "ADMIN_STATE=unmanaged\nOPER_STATE=carrier\n")
	write("run/NetworkManager/devices/3", "[device]\nmanaged=true\n")
	gatherManagers(context.Background(), s)
	if want := (managers{networkd: true, linkState: "unmanaged", nm: true}); !reflect.DeepEqual(s.managers, want) {
		t.Errorf("managers %+v, want %+v", s.managers, want)
	}
	for _, step := range []struct {
		file, text    string
		routes, rules bool
	}{
		{"usr/lib/systemd/networkd.conf.d/80-site.conf", "[Network]\nManageForeignRoutes=no\n", true, false},
		{"usr/lib/systemd/networkd.conf.d/90-tulle.conf", "[Network]\nManageForeignRoutes=no\nManageForeignRoutingPolicyRules=no\n", true, true},
		{"etc/systemd/networkd.conf.d/95-site.conf", "[Network]\nManageForeignRoutes = yes\n", false, true},
		{"etc/systemd/networkd.conf.d/99-last.conf", "[Network]\nManageForeignRoutes=false\n", true, true},
		{"run/systemd/networkd.conf.d/99-last.conf", "[Network]\nManageForeignRoutes=yes\n", true, true}, // /etc wins
	} {
		write(step.file, step.text)
		if gatherManagers(context.Background(), s); s.managers.routesKept != step.routes || s.managers.rulesKept != step.rules {
			t.Errorf("with %s: %+v", step.file, s.managers)
		}
	}

	write("etc/cni/net.d/10-tulle.conflist", `{"name":"tulle"}`)
	write("etc/cni/net.d/05-bridge.conf", `{"name":"br","ipam":{"type":"host-local","subnet":"10.88.0.0/16","routes":[{"dst":"10.0.0.0/8"}]}}`)
	write("etc/cni/net.d/87-podman.conflist", `{"name":"podman","plugins":[{"ipam":{"ranges":[[{"subnet":"10.244.9.0/24"}]]}}]}`)
	write("etc/cni/net.d/README", `10.244.0.0/16`)
	write("etc/cni/net.d/99-broken.conf", `{`)
	write("etc/docker/daemon.json", `{"bip":"10.244.100.1/24","fixed-cidr-v6":"fd00:7::/64","default-address-pools":[{"base":"172.20.0.0/14","size":24},{"base":"10.244.192.0/18","size":24}],
		"insecure-registries":["10.0.0.0/8"],"log-opts":{"env":"10.0.0.0/8"}}`)
	write("run/flannel/subnet.env", "FLANNEL_NETWORK=10.244.0.0/16\nFLANNEL_SUBNET=10.244.1.1/24\nFLANNEL_MTU=1450\n")
	gatherNetworks(context.Background(), s)
	r := judgeNetworks(s)
	var got []string
	for _, f := range r.Findings {
		got = append(got, f.What)
	}
	want := []string{
		"/etc/cni/net.d/05-bridge.conf comes before 10-tulle.conflist: engines that take the first network in /etc/cni/net.d do not take Tulle's",
		"/etc/cni/net.d/87-podman.conflist gives containers addresses of 10.244.9.0/24, which overlaps the cluster's 10.244.0.0/16",
		"/etc/docker/daemon.json gives containers addresses of 10.244.100.0/24, which overlaps the cluster's 10.244.0.0/16",
		"/etc/docker/daemon.json gives containers addresses of 10.244.192.0/18, which overlaps the cluster's 10.244.0.0/16",
		"/run/flannel/subnet.env gives containers addresses of 10.244.0.0/16, which overlaps the cluster's 10.244.0.0/16",
	}
	if strings.Join(got, "\n") != strings.Join(want, "\n") {
		t.Errorf("findings:\n%s\nwant:\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
}

func TestUnknownCheck(t *testing.T) {
	if _, err := Run(t.Context(), Options{Checks: []string{"tun", "nonsense"}}); err == nil || !strings.Contains(err.Error(), `no check "nonsense"`) {
		t.Errorf("%v", err)
	}
	seen := map[string]bool{}
	for _, n := range Names() {
		if seen[n[0]] || n[1] == "" {
			t.Errorf("check %q", n)
		}
		seen[n[0]] = true
	}
}

// The counters of wrong checksums are found by name: kernels add columns.
func TestBadChecksums(t *testing.T) {
	const snmp = "Tcp: RtoAlgorithm InCsumErrors\nTcp: 1 9\nUdp: InDatagrams NoPorts InCsumErrors IgnoredMulti\nUdp: 5 0 40 1\nUdpLite: InDatagrams InCsumErrors\nUdpLite: 0 8\n"
	if got := badChecksums(snmp, "Udp6InErrors 3\nUdp6InCsumErrors                \t2\n"); got != 42 {
		t.Errorf("%d wrong checksums, want 42", got)
	}
	if got := badChecksums("", ""); got != 0 {
		t.Errorf("%d wrong checksums without files, want 0", got)
	}
}
