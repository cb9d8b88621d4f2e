package doctor

import (
	"cmp"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/tulle-net/tulle/internal/api"
	"github.com/tulle-net/tulle/internal/sys"
)

// checks are all checks, in the order in which one thing builds on another.
func checks() []check {
	return []check{
		{name: "config", about: "the configuration file, against the host and the cluster", gather: gatherConfig, judge: judgeConfig},
		{name: "tun", about: "/dev/net/tun and the TUN device", judge: judgeTun},
		{name: "capabilities", about: "CAP_NET_ADMIN and CAP_NET_RAW", gather: gatherCapabilities, judge: judgeCapabilities},
		{name: "agent", about: "the agent answers and is ready", gather: gatherAgent, judge: judgeAgent},
		{name: "underlay", about: "the address and the links that carry the tunnel", judge: judgeTold(api.CheckUnderlay, Failed, seenUnderlay)},
		{name: "forwarding", about: "sysctls that pods need", tun: true, gather: gatherSettings, judge: judgeForwarding, fix: fixSettings},
		{name: "rp_filter", about: "strict reverse path filters", judge: judgeRPFilter},
		{name: "routes", about: "addresses and routes of others inside the cluster's space", tun: true, gather: gatherOverlap, judge: judgeRoutes},
		{name: "cni", about: "networks of other container engines and CNI plugins", gather: gatherNetworks, judge: judgeNetworks},
		{name: "firewall", about: "FORWARD chains and NAT of nftables, iptables and firewalld", tun: true, gather: gatherForward, judge: judgeFirewall},
		{name: "ports", about: "the agent's ports: taken, or dropped by this host's firewall", gather: gatherPorts, judge: judgePorts},
		{name: "tunnels", about: "tunnel devices of the kernel that take the agent's packets", gather: gatherTunnels, judge: judgeTunnels},
		{name: "fast_path", about: "BPF programs that carry packets in place of the agent", judge: judgeTold(api.CheckFastPath, Failed, seenFastPath)},
		{name: "managers", about: "NetworkManager and systemd-networkd leave Tulle's links alone", tun: true, gather: gatherManagers, judge: judgeManagers},
		{name: "names", about: "the names of seeds", gather: gatherNames, judge: judgeNames},
		{name: "clock", about: "the clock follows NTP, and those of the peers agree", gather: gatherClock, judge: judgeClock},
		{name: "buffers", about: "socket buffers", gather: gatherBuffers, judge: judgeBuffers},
		{name: "conntrack", about: "the size of the connection tracking table", gather: gatherConntrack, judge: judgeConntrack},
		{name: "neighbours", about: "the size of the kernel's neighbour tables", judge: judgeTold(api.CheckNeighbours, Failed, seenNeighbours)},
		{name: "gossip", about: "gossip, its seeds and its keys", judge: judgeTold(api.CheckGossip, Failed, seenGossip)},
		{name: "identity", about: "node IDs and names that several hosts have", judge: judgeTold(api.CheckIdentity, Failed, seenIdentity)},
		{name: "cluster", about: "hosts of other clusters", judge: judgeTold(api.CheckCluster, Failed, seenCluster)},
		{name: "paths", about: "encapsulations that are blocked, and in which direction", judge: judgePaths},
		{name: "mtu", about: "path MTUs against those of the links", judge: judgeMTU},
		{name: "trains", about: "UDP_SEGMENT trains that a kernel or network card breaks", gather: gatherKernel, judge: judgeTrains},
		{name: "space", about: "address space: enough of it, and nothing claimed twice", judge: judgeSpace},
		{name: "owners", about: "owners of address space that are not reachable", judge: judgeTold(api.CheckOwners, Failed, seenOwners)},
		{name: "addresses", about: "addresses of pods that are gone", gather: gatherAddresses, judge: judgeAddresses, fix: fixAddresses},
		{name: "state", about: "the state on disk can be saved", judge: judgeTold(api.CheckState, Failed, seenState)},
		{name: "versions", about: "versions of the program, the CNI plugin, the agent and its peers", gather: gatherVersions, judge: judgeVersions},
	}
}

func judgeConfig(s *snapshot) Result {
	if s.ConfigErr != nil {
		return result(s.ConfigFile, Finding{State: Failed, What: s.ConfigErr.Error(), Remedy: "correct it there; the checks below use the defaults"})
	}
	text := s.ConfigFile
	if _, err := os.Stat(text); err != nil {
		text += " does not exist: the defaults and the flags count"
	}
	return result(text, append(s.config, s.told(api.CheckConfig, Warning)...)...)
}

func judgeTun(s *snapshot) Result {
	t := s.tun
	var out []Finding
	switch {
	case t.node == nil:
	case errors.Is(t.node, fs.ErrNotExist):
		out = append(out, Finding{State: Failed, What: sys.TunPath + " is missing", Remedy: "make it; in a container, pass it in (--device " + sys.TunPath + ")",
			Command: "mkdir -p /dev/net && mknod -m 666 " + sys.TunPath + " c 10 200"})
	case errors.Is(t.node, unix.ENODEV), errors.Is(t.node, unix.ENXIO):
		out = append(out, Finding{State: Failed, What: "the kernel has no TUN driver: " + t.node.Error(), Remedy: "load it", Command: "modprobe tun"})
	default:
		out = append(out, Finding{State: Failed, What: fmt.Sprintf("%s cannot be opened: %v", sys.TunPath, t.node), Remedy: "run as root; in a container or a unit, allow the device (DeviceAllow=" + sys.TunPath + " rw)"})
	}
	text := s.Tun + " does not exist yet"
	switch t.kind {
	case "":
		if s.status != nil && s.status.Ready {
			out = append(out, Finding{State: Failed, What: "the agent runs, and the device " + s.Tun + " is gone", Remedy: "restart the agent", Command: "systemctl restart tulle"})
		}
	case "tuntap":
		text = fmt.Sprintf("%s opens, %s is a TUN device", sys.TunPath, s.Tun)
		if t.foreign != nil {
			out = append(out, Finding{State: Failed, What: t.foreign.Error(), Remedy: "give the agent another --tun"})
		}
	default:
		text = fmt.Sprintf("%s is a device of type %s", s.Tun, t.kind)
		out = append(out, Finding{State: Failed, What: fmt.Sprintf("device %s is of type %s, not a TUN device", s.Tun, t.kind),
			Remedy: "give the agent another --tun; the interface that carries the tunnel is named with --underlay"})
	}
	return result(text, out...)
}

func judgeCapabilities(s *snapshot) Result {
	if s.status != nil {
		return result("the agent runs, so it has them")
	}
	var missing []string
	for _, c := range []struct {
		bit  int
		name string
	}{{unix.CAP_NET_ADMIN, "CAP_NET_ADMIN"}, {unix.CAP_NET_RAW, "CAP_NET_RAW"}} {
		if s.caps&(1<<c.bit) == 0 {
			missing = append(missing, c.name)
		}
	}
	text := fmt.Sprintf("of this process: %#x", s.caps)
	if missing == nil {
		return result(text)
	}
	return result(text, Finding{State: Failed, What: "this process lacks " + strings.Join(missing, " and ") + ", which the agent needs",
		Remedy: "run it as root, or by its systemd unit", Command: "systemctl start tulle"})
}

func judgeAgent(s *snapshot) Result {
	if s.status == nil {
		out := []Finding{s.noAnswer()}
		if s.state.err != nil {
			out = append(out, Finding{State: Failed, What: fmt.Sprintf("state file %s: %v", s.state.err.Path, s.state.err.Err), Remedy: s.state.err.Remedy})
		}
		if s.alone != nil {
			out = append(out, Finding{State: Failed, What: s.alone.Error(), Remedy: "stop one of the two"})
		}
		return result("no answer", out...)
	}
	st := s.status
	text := fmt.Sprintf("%s, version %s, ready: %v, up since %s", st.Node.Name, st.Version, st.Ready, st.Started.Format("2006-01-02 15:04:05"))
	out := s.told("", Failed) // problems of no other check
	if !st.Ready && len(st.Problems) == 0 {
		out = append(out, Finding{State: Failed, What: "the agent is not ready", Remedy: "wait a moment, then see `tulle status`"})
	}
	return result(text, out...)
}

// noAnswer says why the agent does not answer. One that has never run on this host is nothing wrong.
func (s *snapshot) noAnswer() Finding {
	f := Finding{State: Warning, What: s.agentErr.Error(), Remedy: "start the agent", Command: "systemctl start tulle"}
	if e, ok := errors.AsType[*api.Error](s.agentErr); ok {
		f.What, f.Remedy = e.Message, cmp.Or(e.Remedy, f.Remedy)
	}
	switch {
	case s.stuck():
		f.State, f.Remedy, f.Command = Failed, "the agent has the socket and is stuck: restart it; its log may say why", "systemctl restart tulle"
	case !s.absent():
		f.Command = ""
	case s.state.member:
		f.State, f.Remedy = Failed, "start it (`systemctl status tulle` says why it ended), or name its socket with --socket"
		f.What += ", though this host is a member of a cluster, by the state in " + s.StateDir
	}
	f.What += ": only this host is checked"
	return f
}

func judgeForwarding(s *snapshot) Result {
	told := s.told(api.CheckForwarding, Failed)
	if s.status == nil && s.tun.kind == "" && s.settings.err == nil {
		return result(fmt.Sprintf("%d settings are not yet as pods need them; the agent makes them so when it starts", len(s.settings.problems)), told...)
	}
	return result("sysctls of forwarding and of "+s.Tun, append(told, s.settings.found(Failed)...)...)
}

func judgeRPFilter(s *snapshot) Result {
	if s.status == nil {
		return skip(noAgent)
	}
	return result("interfaces: "+cmp.Or(strings.Join(s.status.Node.Links, ", "), "none"), s.told(api.CheckRPFilter, Failed)...)
}

func judgeRoutes(s *snapshot) Result {
	if len(s.ClusterCIDRs) == 0 {
		return skip("the cluster's address space is not known: no agent runs, and the configuration has no cluster_cidr")
	}
	out := s.told(api.CheckRoutes, Failed)
	for _, f := range s.overlap.found(Failed) {
		if !has(out, f) {
			out = append(out, f)
		}
	}
	return result("against "+join(s.ClusterCIDRs, ", "), out...)
}

// has reports whether a finding of the same text, or with the same command, is there already.
func has(list []Finding, f Finding) bool {
	return slices.ContainsFunc(list, func(g Finding) bool { return f.What == g.What || f.Command != "" && f.Command == g.Command })
}

// judgeFirewall prefers what this process sees now to what the agent saw, which is the same rule. The agent does not say whether it could look.
func judgeFirewall(s *snapshot) Result {
	if s.forward.err != nil && s.status != nil {
		return result("as the agent sees it", append(unread(s.forward.err), s.told(api.CheckFirewall, Failed)...)...)
	}
	return result("chains on the forward hook, and of NAT", s.forward.found(Failed)...)
}

func judgePorts(s *snapshot) Result {
	st := Warning // a rule may be about some sources only, and what is in use may get through
	if s.status == nil || s.silentPeer() {
		st = Failed
	}
	out := s.blocked.found(st)
	for _, t := range s.taken {
		who := "something"
		command := ""
		remedy := "stop it, or give the agent another port (gossip_port, udp_port, vxlan_port); this shows it"
		if strings.HasPrefix(t.holder, "tulle (") {
			remedy = "if that is the agent, name its socket with --socket; else " + remedy
		}
		if t.holder != "" {
			who, command = t.holder, fmt.Sprintf("ss -lnp 'sport = :%d'", t.port.Number)
		}
		out = append(out, Finding{State: Failed, What: fmt.Sprintf("%v is in use by %s, and no agent listens on %s", t.port, who, s.Socket), Remedy: remedy, Command: command})
	}
	return result("gossip "+fmt.Sprint(s.GossipPort)+", "+join(s.ports()[2:], ", "), out...)
}

func judgeTunnels(s *snapshot) Result {
	out := s.tunnels.found(Failed)
	if len(out) == 0 {
		out = s.told(api.CheckTunnels, Failed)
	}
	return result("devices of the types ipip, sit, ip6tnl and vxlan", out...)
}
