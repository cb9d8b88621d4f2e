package config

import (
	"cmp"
	"fmt"
	"log/slog"
	"net/netip"
	"strconv"
	"strings"
)

// kind decides how a key is written. All values are strings until set parses them.
type kind uint8

const (
	kindValue kind = iota
	kindBool
	kindBootstrap // a switch as a flag, a node's name in the file
)

// key is one row of the table.
type key struct {
	name string // as in the file
	arg  string // placeholder in help and reference
	kind kind
	list bool   // may be given several times, or separated by commas
	live bool   // a reload changes it
	def  string // as it would be written; empty: see doc
	help string // one line
	doc  string // the rest, for the reference; Markdown
	set  func(*Config, []string) error
	show func(*Config) string
}

var defaultClusterCIDR = netip.MustParsePrefix("10.244.0.0/16")

// The table. Order is that of help text and reference.
var keys = []key{
	{name: "node_name", arg: "NAME",
		help: "name of this node (default: the host's name)",
		doc: "Letters, digits, `-`, `_` and `.`, at most 63 characters. The name is for people and need not be unique: a node's identity is a random ID in `state_dir`. " +
			"Where it is not set, the agent takes a new name of its host within seconds, unless that is `localhost`.",
		set: text(func(c *Config, s string) (err error) {
			c.hostNamed = s == ""
			c.NodeName, err = parseNodeName(s)
			return
		}),
		show: func(c *Config) string { return c.NodeName }},
	{name: "join", arg: "HOST[:PORT]", list: true,
		help: "a node of the cluster to join; repeatable",
		doc: "A host name or an address, IPv6 in brackets. The default port is `gossip_port`. All hosts can share one list: a node ignores " +
			"its own entry. The agent keeps trying until one of the seeds answers.",
		set:  func(c *Config, v []string) error { c.Join = v; return nil }, // read by validate, which knows the gossip port
		show: func(c *Config) string { return strings.Join(c.Join, ",") }},
	{name: "bootstrap", arg: "NODE-NAME", kind: kindBootstrap,
		help: "start a new cluster, unless a seed is in one; on one node only (=force: even if seeds do not answer)",
		doc: "As a flag it is a switch: give `--bootstrap` to the one node that starts the cluster. In the file it names that node, in upper or lower case, so that all hosts can " +
			"share the file. The node first contacts all seeds in `join`. If one of them is in a cluster, the node joins that cluster. If all of them have " +
			"answered and none is in a cluster, it starts one. If some of them cannot answer, and you are sure that they are in no cluster, start the node once " +
			"with `--bootstrap=force`. A node that has state never bootstraps again.",
		show: func(c *Config) string { return strconv.FormatBool(c.Bootstrap) }},
	{name: "cluster_cidr", arg: "PREFIX", list: true,
		help: "address space of all pods, one prefix per family; repeatable (default of a new cluster: " + defaultClusterCIDR.String() + ")",
		doc: "Only the node that starts the cluster needs it. On other nodes it is optional; if it is set, it must equal the cluster's. It is fixed when the cluster starts: it cannot grow or get a second family later. It must not overlap " +
			"addresses of hosts, nor loopback, link-local, multicast or reserved space.",
		set:  func(c *Config, v []string) (err error) { c.ClusterCIDRs, err = parsePrefixes(v); return },
		show: func(c *Config) string { return join(c.ClusterCIDRs) }},
	{name: "node_prefix_len", arg: "LEN[,LEN6]", def: "24,64", list: true,
		help: "prefix length of the blocks from which a node gives addresses to its pods: IPv4, IPv6",
		doc: "One number means IPv4 if it is at most 32, else IPv6; the other family keeps its default. It must be longer than the `cluster_cidr` of that family, " +
			"and at most 30 for IPv4 and 126 for IPv6. A node whose block is full opens another one.",
		set: func(c *Config, v []string) (err error) {
			c.NodePrefixLen4, c.NodePrefixLen6, err = parseLens(v)
			return
		},
		show: func(c *Config) string { return fmt.Sprintf("%d,%d", c.NodePrefixLen4, c.NodePrefixLen6) }},
	{name: "pod_cidr", arg: "PREFIX", list: true,
		help: "use exactly this prefix for the pods of this node, one per family; repeatable",
		doc:  "It must lie in the cluster's address space. The node asks the current owner for it, who refuses while pods have addresses in it. If the node has pods in other blocks when the key is set or changed, these pods keep their addresses, new ones get addresses of the prefix, and each other block is closed when its last pod is gone. Without this key the node takes whatever space it is given.",
		set:  func(c *Config, v []string) (err error) { c.PodCIDRs, err = parsePrefixes(v); return },
		show: func(c *Config) string { return join(c.PodCIDRs) }},
	{name: "underlay", arg: "IFACE|ADDRESS", list: true,
		help: "interface or address that carries the tunnel (default: the source address of the route to the seeds)",
		doc: "One interface, by its name or an alternative name, or at most one address per family. An address on `lo` works if routes use it as their source, " +
			"as with BGP on the host.",
		set:  func(c *Config, v []string) (err error) { c.Underlay, err = parseUnderlay(v); return },
		show: func(c *Config) string { return c.Underlay.String() }},
	{name: "gossip_port", arg: "PORT", def: "7946",
		help: "UDP and TCP port of gossip; the same on all nodes",
		set:  text(func(c *Config, s string) (err error) { c.GossipPort, err = parsePort(s); return }),
		show: func(c *Config) string { return strconv.Itoa(int(c.GossipPort)) }},
	{name: "gossip_key_file", arg: "FILE",
		help: "file with the AES-256 keys of gossip (default: not encrypted)",
		doc: "Its mode must be 0600. One key per line, 32 bytes in base64; the first key encrypts. `tulle keys generate` makes a key. Rotate keys with " +
			"`tulle keys install|use|remove`, which also updates this file. A file that was changed by hand counts at the next start; a reload says so, and fails if the next start would.",
		set:  text(func(c *Config, s string) (err error) { c.GossipKeyFile, err = parsePath(s); return }),
		show: func(c *Config) string { return c.GossipKeyFile }},
	{name: "udp_port", arg: "PORT", def: "6080",
		help: "UDP port of the udp encapsulation (GUE)",
		doc:  "Nodes announce their port to each other, so it may differ between nodes.",
		set:  text(func(c *Config, s string) (err error) { c.UDPPort, err = parsePort(s); return }),
		show: func(c *Config) string { return strconv.Itoa(int(c.UDPPort)) }},
	{name: "vxlan_port", arg: "PORT", def: "4789",
		help: "UDP port of the vxlan encapsulation",
		set:  text(func(c *Config, s string) (err error) { c.VXLANPort, err = parsePort(s); return }),
		show: func(c *Config) string { return strconv.Itoa(int(c.VXLANPort)) }},
	{name: "vni", arg: "NUMBER", def: "1",
		help: "VXLAN network identifier, 0 to 16777215; the same on all nodes",
		doc:  "Between nodes with different ones vxlan is off, and `tulle peers` says so.",
		set:  text(func(c *Config, s string) (err error) { c.VNI, err = parseVNI(s); return }),
		show: func(c *Config) string { return strconv.FormatUint(uint64(c.VNI), 10) }},
	{name: "vtep_mac", arg: "MAC",
		help: "MAC of this node's VTEP (default: derived from the node ID)",
		doc:  "The Ethernet address of this node inside vxlan; it must be a unicast address. Other nodes learn it by gossip, and VXLAN devices of a kernel by ARP or neighbour discovery.",
		set:  text(func(c *Config, s string) (err error) { c.VTEPMAC, err = parseMAC(s); return }),
		show: func(c *Config) string { return showMAC(c.VTEPMAC) }},
	{name: "paths", arg: "MODE,...", def: "direct,udp,vxlan,ipip", list: true, live: true,
		help: "encapsulations to send with, in order of preference; a single name pins it",
		doc: "`direct` (the host's own route, no encapsulation, for peers in one subnet), `udp`, `vxlan`, `ipip`. All that are named are probed, and to each peer the first one that " +
			"works is used. This setting does not restrict what the node accepts from members. A reload switches without loss; it leaves the MTU of the TUN device as it is.",
		set:  func(c *Config, v []string) (err error) { c.Paths, err = parsePaths(v); return },
		show: func(c *Config) string { return strings.Join(c.Paths, ",") }},
	{name: "fast_path", arg: "true|false", kind: kindBool, def: "false", live: true,
		help: "let the kernel carry packets by BPF programs, without waking the agent; needs CAP_BPF",
		doc:  "It concerns `udp`, over IPv4 and if the peer has it, too, and `ipip`. Whatever is unusual goes through the agent as before. See [operations.md](operations.md#the-fast-path).",
		set:  text(func(c *Config, s string) (err error) { c.FastPath, err = parseBool(s); return }),
		show: func(c *Config) string { return strconv.FormatBool(c.FastPath) }},
	{name: "tun", arg: "NAME", def: "tun0",
		help: "name of the TUN device",
		doc: "The agent makes it. It refuses a device of that name that another program has made, also while that program does not run: choose another name, such as `tulle0`, where a VPN has `tun0`. " +
			"The device stays when the agent ends: to change its name, `systemctl stop tulle`, `tulle cleanup --tun OLD`, then start it again.",
		set:  text(func(c *Config, s string) (err error) { c.Tun, err = parseIfname(s); return }),
		show: func(c *Config) string { return c.Tun }},
	{name: "mtu", arg: "BYTES|auto", def: "auto",
		help: "MTU of the TUN device; auto: the underlay's MTU minus the overhead of the first encapsulation in paths",
		doc:  "576 to 65535, at least 1280 if the cluster has IPv6. If the path to a peer carries less, the routes to that peer get a smaller MTU.",
		set:  text(func(c *Config, s string) (err error) { c.MTU, err = parseMTU(s); return }),
		show: func(c *Config) string { return showAuto(c.MTU) }},
	{name: "queues", arg: "NUMBER|auto", def: "auto",
		help: "queues of the TUN device, each with its own goroutines; auto: one per 4 CPUs, at least 1 and at most 8",
		doc:  "1 to 64. A flow stays on its queue. The best number has not been measured on machines with more than 2 CPUs.",
		set:  text(func(c *Config, s string) (err error) { c.Queues, err = parseQueues(s); return }),
		show: func(c *Config) string { return showAuto(c.Queues) }},
	{name: "masquerade", arg: "true|false", kind: kindBool, def: "true", live: true,
		help: "translate the source of pod traffic to the outside into this host's address; traffic between pods and nodes is never translated",
		set:  text(func(c *Config, s string) (err error) { c.Masquerade, err = parseBool(s); return }),
		show: func(c *Config) string { return strconv.FormatBool(c.Masquerade) }},
	{name: "no_masquerade", arg: "PREFIX", list: true, live: true,
		help: "outside network that has routes to the pods: traffic to it keeps the pod's source address; repeatable",
		doc: "Any number of prefixes. It is for networks whose routers know the way back, for example because they send the pods' prefixes to these hosts; other " +
			"networks could not answer. A reload applies to new connections.",
		set:  func(c *Config, v []string) (err error) { c.NoMasquerade, err = parseNoMasquerade(v); return },
		show: func(c *Config) string { return join(c.NoMasquerade) }},
	{name: "cni_dir", arg: "DIR",
		help: "directory where container engines look for CNI networks, such as /etc/cni/net.d (default: off)",
		doc: "The agent writes `10-tulle.conflist` there while it is ready, and removes it while it is not. The directory must be there. See " +
			"[kubernetes.md](kubernetes.md).",
		set:  text(func(c *Config, s string) (err error) { c.CNIDir, err = parsePath(s); return }),
		show: func(c *Config) string { return c.CNIDir }},
	{name: "cni_bin_dir", arg: "DIR",
		help: "directory with the CNI plugins of the container engine, such as /opt/cni/bin (default: not looked at)",
		doc: "With it the agent checks that `tulle-cni` is installed, and chains `portmap` and `bandwidth` to it where they are. It runs these two to learn which versions " +
			"of the specification they support.",
		set:  text(func(c *Config, s string) (err error) { c.CNIBinDir, err = parsePath(s); return }),
		show: func(c *Config) string { return c.CNIBinDir }},
	{name: "cni_bridge", arg: "NAME",
		help: "bridge on this host that pods of the published CNI network are behind (default: none, each pod has a link of its own)",
		doc:  "The bridge is made when the first pod needs it. See [operations.md](operations.md#pods-behind-a-bridge).",
		set:  text(func(c *Config, s string) (err error) { c.CNIBridge, err = parseBridge(s); return }),
		show: func(c *Config) string { return c.CNIBridge }},
	{name: "docker_socket", arg: "FILE",
		help: "socket of the network and IPAM driver for Docker, such as /run/docker/plugins/tulle.sock (default: off)",
		doc:  "The name of the file, without `.sock`, is the name of the driver. See [docker.md](docker.md).",
		set:  text(func(c *Config, s string) (err error) { c.DockerSocket, err = parsePath(s); return }),
		show: func(c *Config) string { return c.DockerSocket }},
	{name: "docker_api", arg: "FILE", def: "/run/docker.sock",
		help: "socket of the Docker engine, to start containers with a restart policy that failed for want of the agent; \"\": never",
		doc:  "It is used only with `docker_socket`, and need not be there. See [docker.md](docker.md#when-the-agent-does-not-run).",
		set:  text(func(c *Config, s string) (err error) { c.DockerAPI, err = parsePath(s); return }),
		show: func(c *Config) string { return c.DockerAPI }},
	{name: "state_dir", arg: "DIR", def: "/var/lib/tulle",
		help: "directory of the state file: identity, address table and allocations",
		doc:  "To move it, stop the agent, move the directory, let the service write there (`systemctl edit tulle`: `ReadWritePaths=DIR` below `[Service]`), and start the agent again: where it finds no state, the node joins as a new one, and its pods have to be restarted.",
		set:  text(func(c *Config, s string) (err error) { c.StateDir, err = parsePath(s); return }),
		show: func(c *Config) string { return c.StateDir }},
	{name: "socket", arg: "FILE", def: "/run/tulle/tulle.sock",
		help: "control socket; all other commands connect to it",
		doc: "Under systemd the agent may write below /run. Another directory has to be there, with `ReadWritePaths=DIR` below `[Service]` in `systemctl edit tulle`. Other commands, and the unit's `ExecReload`, " +
			"need `--socket FILE` then.",
		set:  text(func(c *Config, s string) (err error) { c.Socket, err = parsePath(s); return }),
		show: func(c *Config) string { return c.Socket }},
	{name: "metrics", arg: "ADDRESS:PORT|off", def: "127.0.0.1:9646",
		help: "address of the HTTP server for Prometheus metrics, /healthz and /readyz",
		set:  text(func(c *Config, s string) (err error) { c.Metrics, err = parseMetrics(s); return }),
		show: func(c *Config) string { return cmp.Or(c.Metrics, "off") }},
	{name: "bench_mbps", arg: "MBPS", def: "100", live: true,
		help: "how many Mb/s tulle bench run --to may send to this node from another member, and from this node; 0: refuse benchmarks",
		doc: "0 to 100000. A benchmark between members is one at a time, ends after ten minutes, and uses addresses of its own. Between two nodes the lower value counts. " +
			"A reload applies to the next benchmark.",
		set:  text(func(c *Config, s string) (err error) { c.BenchMbps, err = parseBenchMbps(s); return }),
		show: func(c *Config) string { return strconv.Itoa(c.BenchMbps) }},
	{name: "log_level", arg: "LEVEL", def: "info", live: true,
		help: "how much is logged: debug, info, warn or error",
		set:  text(func(c *Config, s string) (err error) { c.LogLevel, err = parseLevel(s); return }),
		show: func(c *Config) string { return levelName(c.LogLevel) }},
	{name: "log_format", arg: "text|json", def: "text",
		help: "format of the log on standard error",
		set:  text(func(c *Config, s string) (err error) { c.LogFormat, err = oneOf(s, "text", "json"); return }),
		show: func(c *Config) string { return c.LogFormat }},
}

// text adapts a setter of a single value. No value (a default of "") is passed on as "".
func text(set func(*Config, string) error) func(*Config, []string) error {
	return func(c *Config, v []string) error {
		if len(v) > 1 {
			return fmt.Errorf("%v: want one value, not %d", v, len(v))
		}
		return set(c, strings.Join(v, ""))
	}
}

func flagName(name string) string { return strings.ReplaceAll(name, "_", "-") }

func (k *key) flag() string { return flagName(k.name) }

// defaults is the default as if it had been given.
func (k *key) defaults() []string {
	if k.def == "" {
		return nil
	}
	return []string{k.def}
}

// usage is the help text of the flag.
func (k *key) usage() string {
	if k.def == "" {
		return k.help
	}
	return fmt.Sprintf("%s (default %s)", k.help, k.def)
}

// find returns the row of that name.
func find(name string) *key {
	for i := range keys {
		if keys[i].name == name {
			return &keys[i]
		}
	}
	return nil
}

func join[T fmt.Stringer](v []T) string {
	s := make([]string, len(v))
	for i := range v {
		s[i] = v[i].String()
	}
	return strings.Join(s, ",")
}

func levelName(l slog.Level) string { return strings.ToLower(l.String()) }

// String is the value as it would be written.
func (u Underlay) String() string { return cmp.Or(u.Interface, join(u.Addresses)) }
