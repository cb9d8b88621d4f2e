package doctor

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io/fs"
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
	"github.com/tulle-net/tulle/tunnel/underlay"
)

func gatherTun(_ context.Context, s *snapshot) {
	s.tun = tunDevice{}
	fd, err := sys.TunOpen()
	if err == nil {
		err = sys.Close(fd)
	}
	s.tun.node = err
	if link, err := netlink.LinkByName(s.Tun); err == nil {
		s.tun.kind, s.tun.index = link.Type(), link.Attrs().Index
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

func gatherAlone(_ context.Context, s *snapshot) { s.alone = hostnet.CheckAlone(s.Tun) }

func gatherSettings(ctx context.Context, s *snapshot) {
	gatherTun(ctx, s)
	v4, v6 := s.families()
	s.settings.problems, s.settings.err = hostnet.SettingProblems(s.Tun, v4, v6)
}

// fixSettings is safe: the agent sets the same values while it runs.
func fixSettings(_ context.Context, s *snapshot) ([]string, error) {
	if s.tun.kind == "" {
		return nil, nil
	}
	v4, v6 := s.families()
	return hostnet.MendSettings(s.Tun, v4, v6)
}

func gatherOverlap(_ context.Context, s *snapshot) {
	s.overlap.problems, s.overlap.err = hostnet.OverlapProblems(s.Tun, s.ClusterCIDRs, s.own())
}

func gatherForward(_ context.Context, s *snapshot) {
	s.forward.problems, s.forward.err = hostnet.ForwardProblems(s.Tun, s.ClusterCIDRs)
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

func gatherPorts(_ context.Context, s *snapshot) {
	s.blocked.problems, s.blocked.err = hostnet.PortProblems(hostnet.Outer{Ports: s.ports(), Links: s.links(), Pods: s.ClusterCIDRs})
	if s.taken = nil; s.status == nil {
		for _, p := range s.ports() {
			if p.Number != 0 && inUse(p) {
				s.taken = append(s.taken, takenPort{p, holder(p)})
			}
		}
	}
}

// inUse reports whether the port cannot be bound on all addresses.
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
}

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
	return result(text, append(out, Finding{State: Warning, What: "nothing keeps the clock right: logs of several hosts cannot be compared, and which of two clones is the newer one is decided by their clocks",
		Remedy: "run an NTP client", Command: "timedatectl set-ntp true"})...)
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
			out = append(out, Finding{State: Warning, What: fmt.Sprintf("the clock of %s is %v %s this host's", p.Name, skew, way),
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
		if c.SocketOverflows > c.RxPackets/1000 && c.SocketOverflows > 100 {
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

const conntrackDir = "/proc/sys/net/netfilter/nf_conntrack_"

func gatherConntrack(_ context.Context, s *snapshot) {
	s.kernel.conntrack, s.kernel.conntrackMax = readNumber(conntrackDir+"count"), readNumber(conntrackDir+"max")
}

// The fractions of the connection tracking table above which it is a warning and a failure, in percent. In a full one the kernel
// drops the first packet of every new connection.
const (
	conntrackWarn = 75
	conntrackFail = 95
)

func judgeConntrack(s *snapshot) Result {
	k := s.kernel
	if k.conntrack < 0 || k.conntrackMax <= 0 {
		return skip("connection tracking is not loaded")
	}
	percent := 100 * k.conntrack / k.conntrackMax
	text := fmt.Sprintf("%d of %d connections (%d %%)", k.conntrack, k.conntrackMax, percent)
	f := Finding{State: Warning, What: "the connection tracking table is nearly full: " + text, Remedy: "raise its size, and write the same line into a file in /etc/sysctl.d",
		Command: fmt.Sprintf("sysctl -w net.netfilter.nf_conntrack_max=%d", 2*k.conntrackMax)}
	switch {
	case percent >= conntrackFail:
		f.State = Failed
	case percent < conntrackWarn:
		return result(text)
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

const networkdLinks = "run/systemd/netif/links"

// gatherManagers reads what systemd-networkd and NetworkManager write into /run of each link.
func gatherManagers(ctx context.Context, s *snapshot) {
	gatherTun(ctx, s)
	m := managers{}
	if s.exists(networkdLinks) {
		links, _ := os.ReadDir(s.path(networkdLinks))
		for _, l := range links {
			state := value(s.read(filepath.Join(networkdLinks, l.Name())), "ADMIN_STATE")
			if state == "configured" || state == "configuring" {
				m.networkd = true
			}
			if l.Name() == strconv.Itoa(s.tun.index) {
				m.linkState = state
			}
		}
		m.routesKept = s.routesKept()
	}
	if s.exists("run/NetworkManager/devices") {
		m.nm = true
		if s.tun.index != 0 {
			m.nmManaged = value(s.read(fmt.Sprintf("run/NetworkManager/devices/%d", s.tun.index)), "managed")
		}
	}
	s.managers = m
}

// routesKept reports what networkd.conf(5) says of routes that it did not make: of files with one name those in /etc win, then /run, then
// /usr/lib; of all files, the last one by name.
func (s *snapshot) routesKept() bool {
	said := value(s.read("etc/systemd/networkd.conf"), "ManageForeignRoutes")
	files := map[string]string{}
	for _, dir := range []string{"usr/lib", "run", "etc"} {
		list, _ := filepath.Glob(s.path(filepath.Join(dir, "systemd/networkd.conf.d/*.conf")))
		for _, f := range list {
			files[filepath.Base(f)] = f
		}
	}
	var names []string
	for n := range files {
		names = append(names, n)
	}
	slices.Sort(names)
	for _, n := range names {
		b, _ := os.ReadFile(files[n])
		if v := value(string(b), "ManageForeignRoutes"); v != "" {
			said = v
		}
	}
	return said == "no" || said == "false" || said == "0" || said == "off"
}

// otherDevices matches the names of all devices of Tulle but the TUN device, for NetworkManager and systemd-networkd.
const otherDevices = "tulle-*"

func judgeManagers(s *snapshot) Result {
	m := s.managers
	if !m.networkd && m.linkState == "" && !m.nm {
		return result("neither NetworkManager nor systemd-networkd manages this host's links")
	}
	var text []string
	var out []Finding
	if m.networkd || m.linkState != "" {
		text = append(text, fmt.Sprintf("systemd-networkd: %s %s, keeps routes of others %v", s.Tun, orNone(m.linkState), m.routesKept))
	}
	// It does nothing to a link whose state is pending (for udev) or initialized.
	if slices.Contains([]string{"configuring", "configured", "failed", "linger"}, m.linkState) {
		out = append(out, Finding{State: Failed, What: fmt.Sprintf("systemd-networkd manages %s (%s): it takes its addresses and routes away", s.Tun, m.linkState), Remedy: "tell it to leave the device alone",
			Command: fmt.Sprintf(`mkdir -p /etc/systemd/network && printf '[Match]\nName=%s %s\n\n[Link]\nUnmanaged=yes\nRequiredForOnline=no\n' > /etc/systemd/network/05-tulle.network && networkctl reload`, s.Tun, otherDevices)})
	}
	if m.networkd && !m.routesKept {
		out = append(out, Finding{State: Warning, What: "systemd-networkd removes the agent's routes when it configures a link again: the agent restores them, and packets are lost in between",
			Remedy:  "tell it to keep routes of others",
			Command: `mkdir -p /etc/systemd/networkd.conf.d && printf '[Network]\nManageForeignRoutes=no\nManageForeignRoutingPolicyRules=no\n' > /etc/systemd/networkd.conf.d/90-tulle.conf && systemctl restart systemd-networkd`})
	}
	if m.nm {
		text = append(text, fmt.Sprintf("NetworkManager: %s managed %s", s.Tun, orNone(m.nmManaged)))
	}
	if m.nmManaged == "true" {
		out = append(out, Finding{State: Failed, What: fmt.Sprintf("NetworkManager manages %s: it changes its addresses and routes", s.Tun), Remedy: "tell it to leave the device alone",
			Command: fmt.Sprintf(`mkdir -p /etc/NetworkManager/conf.d && printf '[device-tulle]\nmatch-device=interface-name:%s,interface-name:%s\nmanaged=0\n' > /etc/NetworkManager/conf.d/90-tulle.conf && nmcli general reload && nmcli device set %[1]s managed no`, s.Tun, otherDevices)})
	}
	return result(strings.Join(text, "; "), out...)
}

func orNone(s string) string {
	if s == "" {
		return "not known"
	}
	return s
}
