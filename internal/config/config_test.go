package config

import (
	"flag"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/spf13/pflag"
)

var update = flag.Bool("update", false, "write docs/configuration.md anew")

// try loads file (the text of a configuration file, "" for none) and args as the command line would.
func try(t *testing.T, file string, args ...string) (Config, error) {
	t.Helper()
	flags := pflag.NewFlagSet("agent", pflag.ContinueOnError)
	AddFlags(flags)
	if err := flags.Parse(args); err != nil {
		t.Fatalf("flags %q: %v", args, err)
	}
	path := filepath.Join(t.TempDir(), "tulle.yaml")
	if err := os.WriteFile(path, []byte(file), 0o600); err != nil {
		t.Fatal(err)
	}
	return Load(flags, path)
}

func must(t *testing.T, file string, args ...string) Config {
	t.Helper()
	c, err := try(t, file, args...)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func TestDefaults(t *testing.T) {
	c := must(t, "")
	host, _ := os.Hostname()
	if c.NodeName != host || c.Bootstrap || len(c.Join) != 0 || len(c.ClusterCIDRs) != 0 {
		t.Errorf("node %q, bootstrap %v, join %v, cluster %v", c.NodeName, c.Bootstrap, c.Join, c.ClusterCIDRs)
	}
	got := []any{c.NodePrefixLen4, c.NodePrefixLen6, c.GossipPort, c.UDPPort, c.VXLANPort, c.VNI, c.Tun, c.MTU, c.Masquerade,
		c.StateDir, c.Socket, c.Metrics, c.BenchMbps, c.LogLevel, c.LogFormat, strings.Join(c.Paths, " ")}
	want := []any{24, 64, uint16(7946), uint16(6080), uint16(4789), uint32(1), "tun0", 0, true,
		"/var/lib/tulle", "/run/tulle/tulle.sock", "127.0.0.1:9646", 100, slog.LevelInfo, "text", "direct udp vxlan ipip"}
	if !slices.Equal(got, want) {
		t.Errorf("got  %v\nwant %v", got, want)
	}
	if got := c.BootstrapCIDRs(); !slices.Equal(got, []netip.Prefix{netip.MustParsePrefix("10.244.0.0/16")}) {
		t.Errorf("a new cluster gets %v", got)
	}
}

const everyKey = `
# a comment
node_name: node-a
join:
  - node-a
  - 192.0.2.7:7000      # with a port
  - "[2001:db8::1]"
  - "[2001:db8::2]:7001"
bootstrap: node-a
cluster_cidr: [10.32.0.0/12, "fd00:10:244::/48"]
node_prefix_len: 26,80
pod_cidr: 10.33.0.0/20
underlay: eth1
gossip_port: 7950
gossip_key_file: /etc/tulle/gossip.key
udp_port: 6081
vxlan_port: 4790
vni: 77
vtep_mac: 02:00:5e:10:00:01
paths: udp, ipip
fast_path: true
tun: tulle0
mtu: 1400
queues: 2
masquerade: false
no_masquerade: [198.51.100.0/24, "2001:db8:9::/48", 192.0.2.7/32]
cni_dir: /etc/cni/net.d
cni_bin_dir: /opt/cni/bin
cni_bridge: pods
docker_socket: /run/docker/plugins/tulle.sock
docker_api: /run/d.sock
state_dir: /srv/tulle/
socket: /run/t.sock
metrics: off
bench_mbps: 250
log_level: debug
log_format: json
`

func TestEveryKey(t *testing.T) {
	c := must(t, everyKey)
	want := map[string]string{
		"node_name": "node-a", "join": "node-a:7950,192.0.2.7:7000,[2001:db8::1]:7950,[2001:db8::2]:7001", "bootstrap": "true",
		"cluster_cidr": "10.32.0.0/12,fd00:10:244::/48", "node_prefix_len": "26,80", "pod_cidr": "10.33.0.0/20", "underlay": "eth1",
		"gossip_port": "7950", "gossip_key_file": "/etc/tulle/gossip.key", "udp_port": "6081", "vxlan_port": "4790", "vni": "77",
		"vtep_mac": "02:00:5e:10:00:01",
		"paths":    "udp,ipip", "fast_path": "true", "tun": "tulle0", "mtu": "1400", "queues": "2", "masquerade": "false", "no_masquerade": "192.0.2.7/32,198.51.100.0/24,2001:db8:9::/48", "cni_dir": "/etc/cni/net.d", "cni_bin_dir": "/opt/cni/bin", "cni_bridge": "pods", "docker_socket": "/run/docker/plugins/tulle.sock", "docker_api": "/run/d.sock", "state_dir": "/srv/tulle", "socket": "/run/t.sock",
		"metrics": "off", "bench_mbps": "250", "log_level": "debug", "log_format": "json",
	}
	for _, k := range keys {
		if got := k.show(&c); got != want[k.name] {
			t.Errorf("%s = %q, want %q", k.name, got, want[k.name])
		}
		if !strings.Contains(everyKey, "\n"+k.name+":") {
			t.Errorf("%s is missing in this test's file", k.name)
		}
	}
	if c.LevelVar().Level() != slog.LevelDebug {
		t.Errorf("LevelVar is %v", c.LevelVar().Level())
	}
}

// Interfaces have alternative names of up to 127 bytes (ip link property add altname).
func TestUnderlayAltname(t *testing.T) {
	const name = "enx0123456789ab-to-the-first-switch"
	if c := must(t, "", "--underlay="+name); c.Underlay.Interface != name {
		t.Errorf("%q, want %q", c.Underlay.Interface, name)
	}
}

// Each key as a flag gives what the same key gives in the file.
func TestFlagsEqualFile(t *testing.T) {
	fromFile := must(t, everyKey)
	var args []string
	for _, k := range keys {
		args = append(args, "--"+k.flag()+"="+k.show(&fromFile))
	}
	if d := Diff(fromFile, must(t, "", args...)); len(d) != 0 {
		t.Errorf("differences: %v", d)
	}
}

func TestFlagsWin(t *testing.T) {
	file := "join: [a, b]\nmtu: 1400\nmasquerade: false\nbootstrap: node-a\nnode_name: node-a\n"
	c := must(t, file, "--join", "c", "--join", "d,e:1", "--mtu=auto", "--masquerade", "--bootstrap=false")
	if got := strings.Join(c.Join, " "); got != "c:7946 d:7946 e:1" || c.MTU != 0 || !c.Masquerade || c.Bootstrap {
		t.Errorf("join %q, mtu %d, masquerade %v, bootstrap %v", got, c.MTU, c.Masquerade, c.Bootstrap)
	}
	if c := must(t, file, "--join="); len(c.Join) != 0 {
		t.Errorf("--join= leaves %v", c.Join)
	}
}

func TestBootstrapIsOneNode(t *testing.T) {
	file := "bootstrap: node-a\njoin: [node-a]\n"
	for name, want := range map[string]bool{"node-a": true, "Node-A": true, "node-b": false, "node-aa": false} {
		if c := must(t, file, "--node-name", name); c.Bootstrap != want {
			t.Errorf("%s: bootstrap %v", name, c.Bootstrap)
		}
	}
	if c := must(t, file, "--node-name", "node-b"); c.Bootstrapper != "node-a" {
		t.Errorf("bootstrapper %q", c.Bootstrapper)
	}
	if c := must(t, "", "--bootstrap"); !c.Bootstrap || c.ForceBootstrap || c.Bootstrapper != "" {
		t.Errorf("--bootstrap: %+v", c)
	}
	if c := must(t, file, "--node-name", "node-b", "--bootstrap=force"); !c.Bootstrap || !c.ForceBootstrap {
		t.Errorf("--bootstrap=force: %+v", c)
	}
}

func TestAskedPrefixLens(t *testing.T) {
	for _, tc := range []struct {
		text               string
		len4, len6, a4, a6 int
	}{
		{"", 24, 64, 0, 0},
		{"26", 26, 64, 26, 0},
		{"72", 24, 72, 0, 72},
		{"24,64", 24, 64, 24, 64},
	} {
		var args []string
		if tc.text != "" {
			args = append(args, "--node-prefix-len="+tc.text)
		}
		c := must(t, "", args...)
		if c.NodePrefixLen4 != tc.len4 || c.NodePrefixLen6 != tc.len6 || c.AskedPrefixLen4 != tc.a4 || c.AskedPrefixLen6 != tc.a6 {
			t.Errorf("%q: %d %d, asked %d %d", tc.text, c.NodePrefixLen4, c.NodePrefixLen6, c.AskedPrefixLen4, c.AskedPrefixLen6)
		}
	}
}

func TestNodePrefixLen(t *testing.T) {
	for in, want := range map[string][2]int{"26": {26, 64}, "80": {24, 80}, "26,80": {26, 80}, "28,28": {28, 28}} {
		if c := must(t, "", "--node-prefix-len", in); c.NodePrefixLen4 != want[0] || c.NodePrefixLen6 != want[1] {
			t.Errorf("%s: %d, %d", in, c.NodePrefixLen4, c.NodePrefixLen6)
		}
	}
	if c := must(t, "node_prefix_len: [26, 80]"); c.NodePrefixLen4 != 26 || c.NodePrefixLen6 != 80 {
		t.Errorf("as a list: %d, %d", c.NodePrefixLen4, c.NodePrefixLen6)
	}
	// A node that joins a cluster of unknown size may have larger blocks than the default cluster.
	must(t, "", "--node-prefix-len", "12", "--join", "a")
}

// Every refusal is one line that says where, what, and what to do.
func TestRefusals(t *testing.T) {
	const f = "tulle.yaml:"
	for _, tc := range []struct {
		name, file, args string
		want             []string
	}{
		{"unknown key", "mtu: 1400\n\ncluster_cidrs: 10.0.0.0/16\n", "", []string{f + `3: unknown key "cluster_cidrs"`, "did you mean cluster_cidr?"}},
		{"flag's spelling", "gossip-port: 1\n", "", []string{f + "1: unknown key", "did you mean gossip_port?"}},
		{"far off", "frobnicate_all: 1\n", "", []string{f + "1: unknown key", "docs/configuration.md"}},
		{"twice", "mtu: 1400\ntun: a\nmtu: 1500\n", "", []string{f + "3: mtu is set in line 1 already"}},
		{"no value", "tun: a\nmtu:\n", "", []string{f + "2: mtu has no value"}},
		{"list for one", "mtu: [1400]\n", "", []string{f + "1: mtu wants one value"}},
		{"mapping", "join:\n  a: b\n", "", []string{f + "1: join wants plain values"}},
		{"brackets without quotes", "join:\n- [fd00::1]\n", "", []string{f + "1: join", `"[fd00::1]:7946"`}},
		{"anchor", "tun: &a tun1\n", "", []string{f + "1: tun wants plain values"}},
		{"a list", "- a\n- b\n", "", []string{f + "1: want lines of the form"}},
		{"not YAML", "tun: tun1\nmtu 5\n", "", []string{f + "2:"}},
		{"tab before a key", "\tmtu: 1400\n", "", []string{f + "1: the line begins with a tab"}},
		{"tab before an item", "join:\n\t- a\n", "", []string{f + "2: the line begins with a tab"}},
		{"tab before a later key", "tun: tun1\n\tmtu: 5\n", "", []string{f + "2: the line begins with a tab"}},
		{"two documents", "tun: tun1\n---\nmtu: 1400\n", "", []string{f + "3: a second YAML document"}},
		{"bootstrap forced for ever", "bootstrap: force\n", "", []string{f + "1: bootstrap force", "--bootstrap=force once"}},
		{"bootstrap as a word", "", "--bootstrap=please", []string{"--bootstrap", "true or false, or force"}},
		{"bootstrap as a switch", "node_name: n1\nbootstrap: true\n", "", []string{f + "2: bootstrap true", "write bootstrap: n1"}},
		{"value with line", "tun: a\nmtu: big\n", "", []string{f + `2: mtu "big"`, "576 to 65535"}},

		{"name", "", "--node-name=a/b", []string{"--node-name", `"a/b"`, "63"}},
		{"join without host", "", "--join=:7946", []string{"--join", "HOST:PORT"}},
		{"join with a bad port", "", "--join=a:70000", []string{`"a:70000"`, "1 to 65535"}},
		{"join without brackets", "", "--join=fd00::11:2233:abcd", []string{`write "[fd00::11:2233:abcd]"`}},
		{"join with a port and without brackets", "", "--join=::1:7946", []string{`write "[::1]:7946" if 7946 is the port, or "[::1:7946]"`}},
		{"join of a whole address with a port", "", "--join=fd00:1:2:3:4:5:6:7:7946", []string{`write "[fd00:1:2:3:4:5:6:7]:7946"`}},
		{"join with an open bracket", "", "--join=[fd00::1", []string{"not closed"}},
		{"join with IPv4 in brackets", "", "--join=[10.0.0.1]:1", []string{"not an IPv6 address"}},
		{"join with a tail", "", "--join=[fd00::1]x", []string{`"x" after the bracket`}},
		{"join with a scheme", "", "--join=http://a", []string{"--join"}},
		{"join any", "", "--join=0.0.0.0", []string{"no host's address"}},
		{"join twice", "", "--join=a --join=a:7946", []string{"a:7946 is named twice"}},
		{"cidr", "", "--cluster-cidr=10.244.0.0", []string{"--cluster-cidr", "not a prefix such as"}},
		{"unmasked", "", "--cluster-cidr=10.244.1.0/16", []string{"write 10.244.0.0/16"}},
		{"two of a family", "", "--cluster-cidr=10.244.0.0/16 --cluster-cidr=10.245.0.0/16", []string{"one prefix a family"}},
		{"loopback", "", "--cluster-cidr=127.0.0.0/16", []string{"overlaps 127.0.0.0/8 (loopback)", "choose"}},
		{"link-local", "", "--cluster-cidr=169.254.0.0/17", []string{"link-local"}},
		{"multicast", "", "--cluster-cidr=ff05::/48", []string{"multicast"}},
		{"everything", "", "--cluster-cidr=0.0.0.0/0", []string{"overlaps"}},
		{"mapped", "", "--cluster-cidr=::ffff:10.0.0.0/112", []string{"--cluster-cidr"}},
		{"host inside", "", "--cluster-cidr=192.0.2.0/24 --node-prefix-len=28 --join=192.0.2.9", []string{"--cluster-cidr 192.0.2.0/24", "192.0.2.9", "another prefix"}},
		{"underlay inside", "", "--cluster-cidr=192.0.2.0/24 --node-prefix-len=28 --underlay=192.0.2.9", []string{"holds the host address 192.0.2.9"}},
		{"blocks too large", "cluster_cidr: 10.244.0.0/24\n", "", []string{"--node-prefix-len (default) 24", "from 25 to 30"}},
		{"no room for blocks", "tun: tun1\ncluster_cidr: 10.244.0.0/30\n", "", []string{f + "2: cluster_cidr 10.244.0.0/30: leaves no room for blocks", "/29"}},
		{"no room for IPv6 blocks", "cluster_cidr: fd00::/126\n", "", []string{f + "1: cluster_cidr fd00::/126", "/125"}},
		{"blocks of the default cluster", "", "--bootstrap --node-prefix-len=16", []string{"cluster_cidr 10.244.0.0/16", "from 17 to 30"}},
		{"block too small", "", "--node-prefix-len=31", []string{"1 to 30"}},
		{"block too small, IPv6", "", "--node-prefix-len=24,127", []string{"1 to 126"}},
		{"three lengths", "", "--node-prefix-len=24,64,80", []string{"24,64"}},
		{"pod-cidr outside", "", "--cluster-cidr=10.244.0.0/16 --pod-cidr=10.245.0.0/24", []string{"--pod-cidr 10.245.0.0/24", "not inside"}},
		{"pod-cidr of one address", "", "--pod-cidr=10.245.0.1/32", []string{"/30"}},
		{"underlay of both kinds", "", "--underlay=eth0 --underlay=10.0.0.1", []string{"one interface, or addresses"}},
		{"underlay twice", "", "--underlay=10.0.0.2,10.0.0.1", []string{"at most one address a family"}},
		{"underlay too long", "", "--underlay=" + strings.Repeat("e", 128), []string{"neither an address nor"}},
		{"underlay nonsense", "", "--underlay=not/an/interface", []string{"neither an address nor"}},
		{"port 0", "", "--udp-port=0", []string{"--udp-port", "1 to 65535"}},
		{"one port twice", "", "--udp-port=4789", []string{"--vxlan-port (default) 4789", "udp_port"}},
		{"metrics port", "", "--metrics=:7946", []string{"gossip_port"}},
		{"metrics", "", "--metrics=9646", []string{"ADDRESS:PORT"}},
		{"vni", "", "--vni=16777216", []string{"16777215"}},
		{"MAC", "", "--vtep-mac=02:00:5e:10:00", []string{"02:00:5e:10:00:01"}},
		{"MAC of several", "", "--vtep-mac=01:00:5e:00:00:01", []string{"one station"}},
		{"MAC of nobody", "", "--vtep-mac=00:00:00:00:00:00", []string{"one station"}},
		{"path", "", "--paths=udp,gre", []string{`"gre"`, "direct, udp, ipip, vxlan"}},
		{"path twice", "", "--paths=udp,udp", []string{"twice"}},
		{"no path", "", "--paths=", []string{"--paths is empty"}},
		{"tun", "", "--tun=a-name-that-is-too-long", []string{"1 to 15"}},
		{"bridge", "", "--cni-bridge=a-name-that-is-too-long", []string{"--cni-bridge", "1 to 15"}},
		{"tun pattern", "", "--tun=tun%d", []string{"--tun"}},
		{"mtu", "", "--mtu=100", []string{"576 to 65535"}},
		{"queues", "", "--queues=0", []string{"--queues", "1 to 64"}},
		{"mtu of IPv6", "", "--mtu=1000 --cluster-cidr=fd00:1::/48", []string{"1280"}},
		{"switch", "masquerade: maybe\n", "", []string{f + `1: masquerade "maybe"`, "true or false"}},
		{"no prefix to keep sources for", "no_masquerade: [198.51.100.0/24, 192.0.2.7]\n", "", []string{f + `1: no_masquerade "192.0.2.7"`, "192.0.2.7/32"}},
		{"prefix to keep sources for", "", "--no-masquerade=198.51.100.7/24", []string{"--no-masquerade 198.51.100.7/24", "write 198.51.100.0/24"}},
		{"prefix of everything", "", "--no-masquerade=::/0", []string{"set masquerade to false"}},
		{"relative", "", "--state-dir=var", []string{"absolute path"}},
		{"no socket", "", "--socket=", []string{"--socket is empty"}},
		{"level", "", "--log-level=loud", []string{"debug, info, warn, error"}},
		{"format", "", "--log-format=xml", []string{"text, json"}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			_, err := try(t, tc.file, strings.Fields(tc.args)...)
			if err == nil {
				t.Fatal("accepted")
			}
			for _, w := range tc.want {
				if !strings.Contains(err.Error(), w) {
					t.Errorf("%q does not contain %q", err, w)
				}
			}
			if strings.Contains(err.Error(), "\n") {
				t.Errorf("more than one line: %q", err)
			}
		})
	}
}

func TestFiles(t *testing.T) {
	load := func(args ...string) (Config, error) {
		flags := pflag.NewFlagSet("agent", pflag.ContinueOnError)
		AddFlags(flags)
		if err := flags.Parse(args); err != nil {
			t.Fatal(err)
		}
		return Load(flags, "")
	}
	missing := filepath.Join(t.TempDir(), "no.yaml")
	if _, err := load("--config", missing); err == nil || !strings.Contains(err.Error(), "--config") {
		t.Errorf("a named file that is missing: %v", err)
	}
	if _, err := load("--config", t.TempDir()); err == nil || !strings.Contains(err.Error(), "is a directory; name the file with --config") {
		t.Errorf("a directory: %v", err)
	}
	if _, err := load("--config", "/proc/self/mem"); err == nil || !strings.Contains(err.Error(), "input/output error") {
		t.Errorf("a file that cannot be read: %v", err)
	}
	if _, err := load("--config", "/dev/null"); err != nil {
		t.Errorf("an empty file: %v", err)
	}
	big := filepath.Join(t.TempDir(), "big.yaml")
	if err := os.WriteFile(big, []byte(strings.Repeat("#", maxFile+1)), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := load("--config", big); err == nil || !strings.Contains(err.Error(), "larger than") {
		t.Errorf("a file that is too large: %v", err)
	}
	if err := os.WriteFile(big, []byte("# nothing but a comment\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if c, err := load("--config", big); err != nil || c.File() != big {
		t.Errorf("a file of comments: %v, %v", c.File(), err)
	}
}

func TestReread(t *testing.T) {
	path := filepath.Join(t.TempDir(), "tulle.yaml")
	write := func(s string) {
		if err := os.WriteFile(path, []byte(s), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write("log_level: warn\nmtu: 1400\nudp_port: 7000\n")
	flags := pflag.NewFlagSet("agent", pflag.ContinueOnError)
	AddFlags(flags)
	if err := flags.Parse([]string{"--config", path, "--udp-port=6081"}); err != nil {
		t.Fatal(err)
	}
	before, err := Load(flags, "")
	if err != nil {
		t.Fatal(err)
	}
	write("log_level: debug\nmtu: 1500\nudp_port: 7001\n")
	after, err := before.Reread()
	if err != nil {
		t.Fatal(err)
	}
	want := []Change{{"mtu", "1400", "1500", false}, {"log_level", "warn", "debug", true}}
	if got := Diff(before, after); !slices.Equal(got, want) {
		t.Errorf("got %v, want %v (the flag still wins for udp_port)", got, want)
	}
	if after.LevelVar() != before.LevelVar() || before.LevelVar().Level() != slog.LevelWarn {
		t.Error("the level changed before the agent said so, or in a LevelVar that the logger does not follow")
	}
	write("log_level: 7\n")
	if _, err := before.Reread(); err == nil {
		t.Error("a bad file was accepted")
	}
}

// A reload without the file would set everything to its default, so it is refused, unless there was no file from the start.
func TestRereadMissing(t *testing.T) {
	path := filepath.Join(t.TempDir(), "tulle.yaml")
	write := func() {
		if err := os.WriteFile(path, []byte("bench_mbps: 0\n"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	refused := func(when string, c Config) {
		t.Helper()
		if err := os.Remove(path); err != nil {
			t.Fatal(err)
		}
		if n, err := c.Reread(); err == nil || !strings.Contains(err.Error(), path) || !strings.Contains(err.Error(), "put the file back") {
			t.Errorf("%s: %v, bench_mbps %d", when, err, n.BenchMbps)
		}
	}
	flags := pflag.NewFlagSet("agent", pflag.ContinueOnError)
	AddFlags(flags)
	if err := flags.Parse([]string{"--config", path}); err != nil {
		t.Fatal(err)
	}
	write()
	named, err := Load(flags, "")
	if err != nil {
		t.Fatal(err)
	}
	refused("a named file is gone", named)

	flags = pflag.NewFlagSet("agent", pflag.ContinueOnError)
	AddFlags(flags)
	if err := flags.Set("config", path); err != nil {
		t.Fatal(err)
	}
	flags.Lookup("config").Changed = false // as if it were the default
	byDefault, err := Load(flags, "")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := byDefault.Reread(); err != nil {
		t.Errorf("there is still no file: %v", err)
	}
	write()
	if n, err := byDefault.Reread(); err != nil || n.BenchMbps != 0 {
		t.Errorf("the file has come: %v, bench_mbps %d", err, n.BenchMbps)
	}
	refused("it was there at the last reload", byDefault)
	write()
	if byDefault, err = Load(flags, ""); err != nil {
		t.Fatal(err)
	}
	refused("it was there at the start", byDefault)
}

// Some editors begin a file with a byte order mark.
func TestByteOrderMark(t *testing.T) {
	if c := must(t, "\ufeffmtu: 1400\n"); c.MTU != 1400 {
		t.Errorf("MTU %d", c.MTU)
	}
	if _, err := try(t, "\ufeff# a comment\nmtu: big\n"); err == nil || !strings.Contains(err.Error(), "tulle.yaml:2: mtu") {
		t.Errorf("the line of an error: %v", err)
	}
}

func TestReference(t *testing.T) {
	const path = "../../docs/configuration.md"
	if *update {
		if err := os.WriteFile(path, []byte(Reference()), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	got, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if string(got) != Reference() {
		t.Errorf("%s is not what keys.go says; run: go test ./internal/config -update", path)
	}
}

// The file that is packaged must be one that the agent takes.
func TestPackagedFile(t *testing.T) {
	data, err := os.ReadFile("../../packaging/tulle.yaml")
	if err != nil {
		t.Fatal(err)
	}
	if c := must(t, string(data), "--node-name=node-a"); !c.Bootstrap || len(c.Join) == 0 {
		t.Errorf("bootstrap %v, join %v", c.Bootstrap, c.Join)
	}
	// With every commented key switched on, each key of the table is there.
	var all []string
	for l := range strings.Lines(string(data)) {
		if rest, ok := strings.CutPrefix(l, "#"); ok && !strings.HasPrefix(rest, " ") {
			l = rest
		}
		all = append(all, l)
	}
	text := strings.Join(all, "")
	must(t, text, "--node-name=node-a")
	for _, k := range keys {
		if !strings.Contains("\n"+text, "\n"+k.name+":") {
			t.Errorf("packaging/tulle.yaml does not mention %s", k.name)
		}
	}
}

func FuzzFile(f *testing.F) {
	f.Add([]byte(everyKey))
	f.Add([]byte("- a\n- b: [c, {d: e}]\n"))
	f.Add([]byte("a: &x [1]\nb: *x\n<<: {c: d}\n--- !!map\n? a\n: b\n"))
	f.Fuzz(func(t *testing.T, data []byte) {
		if len(data) > 4<<10 {
			return
		}
		entries, err := parseFile("f", data)
		if err != nil {
			if strings.Contains(err.Error(), "\n") {
				t.Errorf("more than one line: %q", err)
			}
			return
		}
		var c Config
		for name, e := range entries {
			if k := find(name); k == nil {
				t.Errorf("unknown key %q", name)
			} else if k.set != nil {
				_ = k.set(&c, split(e.texts))
			}
		}
	})
}
