package doctor

import (
	"bufio"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/tulle-net/tulle/internal/api"
	"github.com/tulle-net/tulle/internal/hostnet"
	"github.com/tulle-net/tulle/internal/sys"
	"github.com/tulle-net/tulle/ipam"
	"github.com/tulle-net/tulle/membership/keyring"
	"github.com/tulle-net/tulle/tunnel/underlay"
)

// gatherConfig compares the configuration with the host. What the agent refuses has failed; what it goes on without, or waits for, is a warning.
func gatherConfig(_ context.Context, s *snapshot) {
	s.config = nil
	add := func(st State, key string, value any, what error, remedy, command string) {
		s.config = append(s.config, Finding{State: st, What: fmt.Sprintf("%s %v: %v", key, value, what), Remedy: remedy, Command: command})
	}
	if s.KeyFile != "" {
		switch _, err := keyring.Load(s.KeyFile); {
		case errors.Is(err, fs.ErrPermission):
			s.config = append(s.config, unread(err)...)
		case err != nil:
			add(Failed, "gossip_key_file", s.KeyFile, err, "mend the file: the agent does not start without it", "")
		}
	}
	if host, _, err := net.SplitHostPort(s.Metrics); err == nil {
		l, err := net.Listen("tcp", net.JoinHostPort(host, "0"))
		if err == nil {
			l.Close()
		} else if a, _ := netip.ParseAddr(host); errors.Is(err, unix.EADDRNOTAVAIL) {
			add(Failed, "metrics", s.Metrics, errors.New("this host does not have this address, and the agent does not start"), hostnet.ToHave(a)+", choose another address, or off", "")
		} else {
			add(Failed, "metrics", s.Metrics, err, "choose another address, or off", "")
		}
	}
	if s.CNIDir != "" && s.status == nil { // a running agent says so itself
		if _, err := os.Stat(s.CNIDir); errors.Is(err, fs.ErrNotExist) {
			add(Warning, "cni_dir", s.CNIDir, errors.New("there is no such directory"), "make it before the service starts, which can write only where a directory is", "mkdir -p "+s.CNIDir)
		}
	}
	if s.Underlay != "" || s.UnderlayAddrs != nil {
		_, err := hostnet.DetectUnderlay(hostnet.Sought{Interface: s.Underlay, Addresses: s.UnderlayAddrs, Tun: s.Tun, Pods: s.ClusterCIDRs})
		if st := Warning; err != nil {
			if !errors.Is(err, hostnet.ErrNotYet) {
				st = Failed
			}
			add(st, "underlay", cmp.Or(s.Underlay, join(s.UnderlayAddrs, ",")), err, "bring it up, or name another interface or address; the agent waits for what may come", "")
		}
	}
}

func (s *snapshot) gatherTun() {
	s.tun = tunDevice{}
	fd, err := sys.TunOpen()
	if err == nil {
		err = sys.Close(fd)
	}
	s.tun.node = err
	if link, err := netlink.LinkByName(s.Tun); err == nil {
		s.tun.kind, s.tun.index, s.tun.foreign = link.Type(), link.Attrs().Index, hostnet.CheckTun(s.Tun)
		if t, ok := link.(*netlink.Tuntap); ok && t.Mode != netlink.TUNTAP_MODE_TUN {
			s.tun.kind = "tap"
		}
		six, err := netlink.AddrList(link, netlink.FAMILY_V6)
		s.tun.six = err == nil && len(six) > 0
	}
}

func gatherCapabilities(_ context.Context, s *snapshot) {
	f, err := os.Open("/proc/thread-self/status")
	if err != nil {
		return
	}
	defer f.Close()
	for sc := bufio.NewScanner(f); sc.Scan(); {
		if v, ok := strings.CutPrefix(sc.Text(), "CapEff:"); ok {
			s.caps, _ = strconv.ParseUint(strings.TrimSpace(v), 16, 64)
		}
	}
}

func gatherAgent(_ context.Context, s *snapshot) {
	s.alone = hostnet.CheckAlone(s.Tun)
	if s.status == nil && s.StateDir != "" {
		st, err := ipam.ReadState(s.StateDir)
		s.state.member = err == nil && !st.Left
		if errors.Is(err, ipam.ErrCorrupt) || errors.Is(err, ipam.ErrNewer) {
			s.state.err, _ = errors.AsType[*ipam.StoreError](err)
		}
	}
}

func gatherSettings(_ context.Context, s *snapshot) {
	v4, v6 := s.families()
	s.settings.problems, s.settings.err = hostnet.SettingProblems(s.Tun, s.links(), v4, v6)
}

// fixSettings is safe: the agent sets the same values while it runs.
func fixSettings(_ context.Context, s *snapshot) ([]string, error) {
	if s.tun.kind == "" {
		return nil, nil
	}
	v4, v6 := s.families()
	return hostnet.MendSettings(s.Tun, s.links(), v4, v6)
}

func gatherOverlap(_ context.Context, s *snapshot) {
	s.overlap.problems, s.overlap.err = hostnet.OverlapProblems(s.Tun, s.ClusterCIDRs, s.own())
}

func gatherForward(_ context.Context, s *snapshot) {
	forward, err := hostnet.ForwardProblems(s.Tun, s.ClusterCIDRs)
	nat, natErr := hostnet.TranslationProblems(s.Tun, s.ClusterCIDRs)
	s.forward.problems, s.forward.err = append(forward, nat...), errors.Join(err, natErr)
}

func gatherTunnels(_ context.Context, s *snapshot) {
	s.tunnels.problems, s.tunnels.err = hostnet.TunnelProblems(s.VXLANPort)
}

// ports are what other hosts send to this one: gossip first, then what the encapsulations in use need.
func (s *snapshot) ports() []hostnet.Port {
	out := []hostnet.Port{{Proto: unix.IPPROTO_UDP, Number: s.GossipPort}, {Proto: unix.IPPROTO_TCP, Number: s.GossipPort}}
	for _, p := range s.Paths {
		switch p {
		case "udp":
			out = append(out, hostnet.Port{Proto: unix.IPPROTO_UDP, Number: s.UDPPort})
		case "vxlan":
			out = append(out, hostnet.Port{Proto: unix.IPPROTO_UDP, Number: s.VXLANPort})
		case "ipip":
			out = append(out, hostnet.Port{Proto: unix.IPPROTO_IPIP})
			if _, v6 := s.families(); v6 {
				out = append(out, hostnet.Port{Proto: unix.IPPROTO_IPV6})
			}
		}
	}
	return out
}

// links are the interfaces that carry the tunnel, as far as the agent says.
func (s *snapshot) links() []string {
	if s.status == nil {
		return nil
	}
	return s.status.Node.Links
}

// underlay are this node's addresses between hosts, as far as the agent says.
func (s *snapshot) underlay() []netip.Addr {
	if s.status == nil {
		return nil
	}
	return s.status.Node.Underlay
}

func gatherPorts(_ context.Context, s *snapshot) {
	s.blocked.problems, s.blocked.err = hostnet.PortProblems(hostnet.Outer{Ports: s.ports(), Gossip: s.GossipPort, Links: s.links(), Addrs: s.underlay(), Pods: s.ClusterCIDRs})
	if s.taken = nil; s.absent() {
		for _, p := range s.ports() {
			if p.Number == 0 || !inUse(p) {
				continue
			}
			// systemd keeps the tunnel's sockets, not those of gossip, while the agent restarts.
			if who := holder(p); who != "systemd (process 1)" || p.Number == s.GossipPort {
				s.taken = append(s.taken, takenPort{p, who})
			}
		}
	}
}

// inUse reports whether the port cannot be bound on all addresses. Connections of TCP that are over do not count, as for the agent.
func inUse(p hostnet.Port) bool {
	typ := unix.SOCK_DGRAM
	if p.Proto == unix.IPPROTO_TCP {
		typ = unix.SOCK_STREAM
	}
	for domain, addr := range map[int]unix.Sockaddr{
		unix.AF_INET:  &unix.SockaddrInet4{Port: int(p.Number)},
		unix.AF_INET6: &unix.SockaddrInet6{Port: int(p.Number)},
	} {
		fd, err := sys.Socket(domain, typ, 0)
		if err != nil {
			continue // no such family
		}
		if domain == unix.AF_INET6 {
			_ = unix.SetsockoptInt(fd, unix.IPPROTO_IPV6, unix.IPV6_V6ONLY, 1)
		}
		if typ == unix.SOCK_STREAM { // of UDP sockets it would let two have one port
			_ = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1)
		}
		err = unix.Bind(fd, addr)
		_ = sys.Close(fd)
		if errors.Is(err, unix.EADDRINUSE) {
			return true
		}
	}
	return false
}

// holder finds the process with a socket on the port, by proc(5).
func holder(p hostnet.Port) string {
	name := "udp"
	if p.Proto == unix.IPPROTO_TCP {
		name = "tcp"
	}
	inodes := map[string]bool{}
	for _, file := range []string{name, name + "6"} {
		b, err := os.ReadFile("/proc/thread-self/net/" + file)
		if err != nil {
			continue
		}
		for line := range strings.Lines(string(b)) {
			// sl, local_address, rem_address, st, queues, tr, retrnsmt, uid, timeout, inode
			if f := strings.Fields(line); len(f) > 9 && strings.HasSuffix(f[1], fmt.Sprintf(":%04X", p.Number)) {
				inodes["socket:["+f[9]+"]"] = true
			}
		}
	}
	fds, _ := filepath.Glob("/proc/[0-9]*/fd/*")
	for _, fd := range fds {
		if to, err := os.Readlink(fd); err == nil && inodes[to] {
			pid := strings.Split(fd, "/")[2]
			comm, _ := os.ReadFile("/proc/" + pid + "/comm")
			return fmt.Sprintf("%s (process %s)", strings.TrimSpace(string(comm)), pid)
		}
	}
	return ""
}

func gatherClock(_ context.Context, s *snapshot) {
	var t unix.Timex
	_, err := unix.Adjtimex(&t) // with no mode set it only reads
	s.kernel.clockErr = err
	s.kernel.synced, s.kernel.maxError = t.Status&unix.STA_UNSYNC == 0, time.Duration(t.Maxerror)*time.Microsecond
	for _, dir := range ntpUnits {
		list, _ := filepath.Glob(filepath.Join(dir, "*.list")) // fails only for a bad pattern
		s.kernel.ntpClient = s.kernel.ntpClient || len(list) > 0
	}
}

// ntpUnits are where packages tell systemd-timedated of their NTP clients (systemd-timedated.service(8)).
var ntpUnits = []string{"/etc/systemd/ntp-units.d", "/run/systemd/ntp-units.d", "/usr/local/lib/systemd/ntp-units.d", "/usr/lib/systemd/ntp-units.d"}

func judgeClock(s *snapshot) Result {
	k := s.kernel
	if k.clockErr != nil {
		return result("", unread(k.clockErr)...)
	}
	text := fmt.Sprintf("synchronised: %v, error at most %v", k.synced, k.maxError)
	out := s.skewed()
	if k.synced {
		return result(text, out...)
	}
	f := Finding{State: Warning, What: "nothing keeps the clock right: logs of several hosts cannot be compared", Remedy: "install an NTP client: chrony or systemd-timesyncd"}
	if k.ntpClient {
		f.Remedy, f.Command = "run the NTP client that is installed", "timedatectl set-ntp true"
	}
	return result(text, append(out, f)...)
}

// mostSkew is how far the clocks of two hosts may be apart. Nothing in Tulle needs better ones.
const mostSkew = 2 * time.Second

// skewed are the peers whose clocks differ.
func (s *snapshot) skewed() (out []Finding) {
	if s.status == nil {
		return nil
	}
	for _, p := range s.status.Peers {
		skew, way := time.Duration(p.ClockSkewMS)*time.Millisecond, "ahead of"
		if skew < 0 {
			skew, way = -skew, "behind"
		}
		if skew > mostSkew && p.State == api.PeerAlive {
			out = append(out, Finding{State: Warning, What: fmt.Sprintf("the clock of %s is %v %s this host's", s.label(p), skew, way),
				Remedy: "run an NTP client on both hosts"})
		}
	}
	return out
}

func gatherKernel(_ context.Context, s *snapshot) {
	var u unix.Utsname
	if unix.Uname(&u) == nil {
		s.kernel.release = unix.ByteSliceToString(u.Release[:])
	}
}

// breaksTrains reports whether a kernel is one of those that cut UDP_SEGMENT trains wrongly with some network cards: 7.0 to 7.1.4
// (as reported to Tailscale, github.com/tailscale/tailscale issues 19777, 19918 and 21335).
func breaksTrains(release string) bool {
	var major, minor, patch int
	if n, _ := fmt.Sscanf(release, "%d.%d.%d", &major, &minor, &patch); n < 2 {
		return false
	}
	return major == 7 && (minor == 0 || minor == 1 && patch <= 4)
}

func gatherBuffers(_ context.Context, s *snapshot) {
	k := &s.kernel
	k.buffer, k.bufferErr = 0, nil
	fd, err := sys.Socket(unix.AF_INET, unix.SOCK_DGRAM, 0)
	if err == nil {
		k.buffer, _, err = sys.SetBuffers(fd, underlay.DefaultBuffer, 0)
		err = errors.Join(err, sys.Close(fd))
	}
	k.bufferErr = err
	k.rmemMax = readNumber("/proc/sys/net/core/rmem_max")
	v4, _ := os.ReadFile("/proc/net/snmp")
	v6, _ := os.ReadFile("/proc/net/snmp6") // not there without IPv6
	k.badChecksums = badChecksums(string(v4), string(v6))
}

// badChecksums is how many UDP packets had a wrong checksum. snmp has a line of names and one of values for each protocol, snmp6 a name and
// a value in each line.
func badChecksums(snmp, snmp6 string) (n int) {
	var names []string
	for line := range strings.Lines(snmp) {
		switch f := strings.Fields(line); {
		case len(f) == 0 || f[0] != "Udp:":
		case names == nil:
			names = f
		default:
			if i := slices.Index(names, "InCsumErrors"); i >= 0 && i < len(f) {
				n, _ = strconv.Atoi(f[i])
			}
		}
	}
	for line := range strings.Lines(snmp6) {
		if f := strings.Fields(line); len(f) == 2 && f[0] == "Udp6InCsumErrors" {
			v6, _ := strconv.Atoi(f[1])
			n += v6
		}
	}
	return n
}

// judgeBuffers goes by what a socket gets, which the kernel counts twice.
func judgeBuffers(s *snapshot) Result {
	k := s.kernel
	if k.bufferErr != nil {
		return result("", unread(k.bufferErr)...)
	}
	text := fmt.Sprintf("a socket gets %d KiB of %d; net.core.rmem_max is %d", k.buffer/2>>10, underlay.DefaultBuffer>>10, k.rmemMax)
	var out []Finding
	if k.buffer/2 < underlay.DefaultBuffer {
		out = append(out, Finding{State: Warning, What: fmt.Sprintf("sockets get receive buffers of %d bytes, and the agent wants %d: bursts are lost", k.buffer/2, underlay.DefaultBuffer),
			Remedy: "run it with CAP_NET_ADMIN in the host's user namespace, or raise the limit and restart the agent", Command: fmt.Sprintf("sysctl -w net.core.rmem_max=%d", underlay.DefaultBuffer)})
	}
	if s.status != nil {
		c := s.status.Counters
		text += fmt.Sprintf("; lost in full sockets %d, in the full TUN %d", c.SocketOverflows, c.TunDrops)
		switch many := c.SocketOverflows > c.RxPackets/1000 && c.SocketOverflows > 100; {
		case many && uint64(k.badChecksums) > c.SocketOverflows/2: // the kernel counts them as lost by the socket, too
			out = append(out, Finding{State: Warning, What: fmt.Sprintf("%d UDP packets of this host had wrong checksums: a link or a device on the way damages packets", k.badChecksums),
				Remedy: "look for errors of links (ip -s link, ethtool -S, counters of switches), and replace the cable, transceiver or card; \"lost in full sockets\" counts these packets, too"})
		case many:
			out = append(out, Finding{State: Warning, What: fmt.Sprintf("%d of %d packets were lost in full sockets: this host has too little CPU for its bursts", c.SocketOverflows, c.RxPackets+c.SocketOverflows),
				Remedy: "give the agent more CPU (CPUWeight=), or more `queues` where there are CPUs for them"})
		}
	}
	return result(text, out...)
}

func readNumber(file string) int {
	b, err := os.ReadFile(file)
	if err != nil {
		return -1
	}
	n, err := strconv.Atoi(strings.TrimSpace(string(b)))
	if err != nil {
		return -1
	}
	return n
}

func gatherConntrack(_ context.Context, s *snapshot) {
	s.kernel.conntrack, s.kernel.conntrackMax = hostnet.Conntrack()
}

// conntrackWarn is the part of the connection tracking table, in percent, from which it is a warning.
const conntrackWarn = 75

// judgeConntrack judges by itself, and not by what status says of a full table.
func judgeConntrack(s *snapshot) Result {
	k := s.kernel
	if k.conntrack < 0 || k.conntrackMax <= 0 {
		return skip("connection tracking is not loaded")
	}
	percent := 100 * k.conntrack / k.conntrackMax
	text := fmt.Sprintf("%d of %d connections (%d %%)", k.conntrack, k.conntrackMax, percent)
	if percent < conntrackWarn {
		return result(text)
	}
	p := hostnet.ConntrackProblem(k.conntrack, k.conntrackMax)
	f := Finding{State: Warning, What: p.What, Remedy: p.Remedy, Command: p.Command}
	if percent >= hostnet.ConntrackFull {
		f.State = Failed
	}
	return result(text, f)
}

// fixAddresses is safe: the agent looks again, and releases only what is still leaked.
func fixAddresses(ctx context.Context, s *snapshot) ([]string, error) {
	if s.leaks == nil || len(s.leaks.Leaked) == 0 {
		return nil, nil
	}
	ctx, cancel := context.WithTimeout(ctx, agentPatience)
	defer cancel()
	r, err := api.NewClient(s.Socket).IPAMRelease(ctx, api.ReleaseRequest{All: true})
	if err != nil || len(r.Released) == 0 {
		return nil, err
	}
	return []string{"released " + join(r.Released, ", ")}, nil
}

// path is a path of the host's file system.
func (s *snapshot) path(name string) string { return filepath.Join("/", s.Root, name) }

// read returns a file's text; "" if there is none.
func (s *snapshot) read(name string) string {
	b, err := os.ReadFile(s.path(name))
	if err != nil {
		return ""
	}
	return string(b)
}

// exists reports whether there is such a file.
func (s *snapshot) exists(name string) bool {
	_, err := os.Stat(s.path(name))
	return !errors.Is(err, fs.ErrNotExist)
}

// value is that of KEY=value in a file of such lines, the last one that names it.
func value(text, key string) string {
	out := ""
	for line := range strings.Lines(text) {
		if k, v, ok := strings.Cut(strings.TrimSpace(line), "="); ok && strings.TrimSpace(k) == key {
			out = strings.TrimSpace(v)
		}
	}
	return out
}
