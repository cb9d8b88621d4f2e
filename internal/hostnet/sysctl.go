package hostnet

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"iter"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

const sysctlRoot = "/proc/sys"

// sysctl is one wanted setting; name is its path below /proc/sys. A slash in a
// device's name cannot be, a dot can: so paths, not dotted names.
type sysctl struct {
	name, value string
	// optional settings are left out where the kernel does not have them.
	optional bool
}

// sysctlsFor lists the wanted settings in the order in which they must be written. uplinks are the devices by which packets to
// pods come from other hosts.
func sysctlsFor(tun, direct string, uplinks []string, v4, v6 bool) []sysctl {
	var list []sysctl
	if v4 {
		list = append(list, sysctl{name: "net/ipv4/ip_forward", value: "1"})
		// IPv6 has no such switch: there conf/all decides alone (ip6_output.c, ip6_forward), and a device's own setting makes
		// it deaf to router advertisements.
		for _, d := range uplinks {
			list = append(list, sysctl{name: forwarding4(d), value: "1", optional: true})
		}
		dev := "net/ipv4/conf/" + tun + "/"
		list = append(list,
			// Forwarding is decided by the device that a packet came in on; ip_forward
			// sets all of them, once, but not a device switched off afterwards.
			sysctl{name: forwarding4(tun), value: "1"},
			// 2, loose: a source needs a route, by whatever device. The kernel uses
			// the larger of conf/all and this one (ip-sysctl.rst), so 0 would become
			// strict on hosts with all=1, and strict drops what a peer sends
			// through the tunnel while our way back to it is direct. With all=2
			// nothing changes. Which peer may send which source is the agent's check.
			sysctl{name: dev + "rp_filter", value: "2"},
			// The ICMP errors that the agent writes to the device come from the device's own
			// address, which the kernel otherwise takes for a martian source (fib_frontend.c,
			// fib_validate_source). What peers send from our addresses the agent has dropped.
			sysctl{name: dev + "accept_local", value: "1"},
			// The kernel ORs send_redirects with conf/all, which is 1 by default and
			// not ours to change; the nft table drops what still gets made.
			sysctl{name: dev + "send_redirects", value: "0"},
			// ANDed with conf/all on a forwarding device: 0 is final.
			sysctl{name: dev + "accept_redirects", value: "0"},
		)
	}
	list = append(list, probeSysctls(direct, v4, v6)...)
	dev := "net/ipv6/conf/" + tun + "/"
	if !v6 {
		// Without IPv6 in the cluster none on the device: no router solicitations
		// or MLD reports into the tunnel.
		return append(list, sysctl{name: dev + "disable_ipv6", value: "1", optional: true})
	}
	return append(list,
		// Generating no link-local address (1: IN6_ADDR_GEN_MODE_NONE) has to precede the
		// device's going up. Without one there are no router solicitations and no neighbours.
		sysctl{name: dev + "addr_gen_mode", value: "1", optional: true},
		sysctl{name: dev + "accept_dad", value: "0"},
		sysctl{name: dev + "dad_transmits", value: "0"},
		sysctl{name: dev + "accept_ra", value: "0"},
		sysctl{name: dev + "autoconf", value: "0"},
		sysctl{name: dev + "router_solicitations", value: "0"},
		sysctl{name: dev + "accept_redirects", value: "0"},
		sysctl{name: dev + "disable_ipv6", value: "0"},
		sysctl{name: allForwarding6, value: "1"},
		sysctl{name: dev + "forwarding", value: "1"},
	)
}

// HasIPv6 reports whether the kernel has IPv6. ipv6.disable=1 on its command line takes it away, with its addresses, routes, rules and settings.
func HasIPv6() bool {
	_, err := os.Stat(filepath.Join(sysctlRoot, "net/ipv6"))
	return !errors.Is(err, fs.ErrNotExist)
}

func forwarding4(device string) string { return "net/ipv4/conf/" + device + "/forwarding" }

// outward are the devices by which packets to pods come from other hosts, sorted: links, by which the tunnel's packets leave, and
// those of the IPv4 default routes, by which the answers of the outside come.
func outward(links iter.Seq[string], routes []netlink.Route, name func(index int) string) []string {
	out := slices.Collect(links)
	for i := range routes {
		rt := &routes[i]
		if rt.Family != unix.AF_INET || rt.Type != unix.RTN_UNICAST || rt.Protocol == Protocol || !isDefault(rt) {
			continue
		}
		for _, h := range hops(rt) {
			out = append(out, name(h))
		}
	}
	slices.Sort(out)
	return slices.DeleteFunc(slices.Compact(out), func(n string) bool { return n == "" || n == "lo" })
}

// probeSysctls are those of the device for direct probes, which goes with the agent. Its packets have this node's own
// address (accept_local), and the way back there is no reason to drop them.
func probeSysctls(direct string, v4, v6 bool) (list []sysctl) {
	if direct == "" {
		return nil
	}
	add := func(family, name, value string) {
		list = append(list, sysctl{name: "net/" + family + "/conf/" + direct + "/" + name, value: value, optional: true})
	}
	if v4 {
		for _, kv := range [][2]string{{"forwarding", "1"}, {"rp_filter", "2"}, {"accept_local", "1"}, {"send_redirects", "0"}, {"accept_redirects", "0"}} {
			add("ipv4", kv[0], kv[1])
		}
	}
	if !v6 {
		add("ipv6", "disable_ipv6", "1")
		return list
	}
	for _, kv := range [][2]string{{"addr_gen_mode", "1"}, {"disable_ipv6", "0"}, {"accept_dad", "0"}, {"accept_ra", "0"}, {"autoconf", "0"}, {"router_solicitations", "0"}, {"accept_redirects", "0"}, {"forwarding", "1"}} {
		add("ipv6", kv[0], kv[1])
	}
	return list
}

// reconcileSysctls writes the settings that differ.
func (p *pass) reconcileSysctls(context.Context) error {
	v4, v6 := p.s.uses(true), p.s.uses(false)
	var pods []string
	if v6 {
		pods = p.podDevices()
	}
	return p.r.ns.do(func() error {
		var list []sysctl
		if v6 {
			var err error
			if list, err = p.advertisements(); err != nil {
				return err
			}
		}
		var errs []error
		for _, c := range append(list, sysctlsFor(p.s.Tun, p.s.Direct, p.outward, v4, v6)...) {
			err := p.putSysctl(c)
			if errors.Is(err, errNotKept) && slices.ContainsFunc(errs, func(e error) bool { return e.Error() == err.Error() }) {
				continue // one full file system, not one problem for each setting
			}
			if err != nil {
				errs = append(errs, err)
			}
		}
		return errors.Join(append(errs, p.guardPods(pods))...)
	})
}

func (p *pass) putSysctl(c sysctl) error {
	object, is := "sysctl "+c.name, fmt.Sprintf("sysctl %s=%s", c.name, c.value)
	was, err := readSysctl(c.name)
	switch {
	case c.optional && errors.Is(err, fs.ErrNotExist):
		return nil
	case err != nil:
		return fmt.Errorf("hostnet: read sysctl %s: %w", c.name, err)
	case was == c.value:
		p.keep(object, is)
		return nil
	}
	// The earlier value is safe before it is lost.
	if err := p.r.sysctls.remember(c.name, was, c.value); err != nil {
		return err
	}
	if err := writeSysctl(c.name, c.value); err != nil {
		return fmt.Errorf("hostnet: sysctl %s is %s and cannot be set to %s (%w): set it in /etc/sysctl.d", c.name, was, c.value, err)
	}
	text := ""
	if p.r.applied[object] != "" {
		text = was
	}
	p.put(object, text, is)
	return nil
}

func readSysctl(name string) (string, error) {
	b, err := os.ReadFile(filepath.Join(sysctlRoot, name))
	return string(bytes.TrimSpace(b)), err
}

// writeSysctl never creates a file, unlike os.WriteFile.
func writeSysctl(name, value string) error {
	f, err := os.OpenFile(filepath.Join(sysctlRoot, name), os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	_, err = f.WriteString(value)
	return errors.Join(err, f.Close())
}

// sysctlStore remembers what settings were before we changed them, in the order of the
// changes. With a file it outlives the process, which the changes do as well; it is bound to
// the boot and the namespace, beyond which they do not reach.
type sysctlStore struct {
	file string
	data sysctlFile
}

type sysctlFile struct {
	Boot    string          `json:"boot"`
	NetNS   string          `json:"netns"`
	Changed []sysctlChanged `json:"changed"`
	Left    []string        `json:"left,omitempty"` // interfaces that did not listen to router advertisements before us
}

// errNotKept is that the earlier values cannot be saved. Nothing is changed then.
var errNotKept = errors.New("hostnet: keep the earlier sysctl values")

type sysctlChanged struct {
	Name string `json:"name"`
	Was  string `json:"was"`
	Set  string `json:"set"`
}

// openSysctlStore must run inside the namespace.
func openSysctlStore(file string) (*sysctlStore, error) {
	boot, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return nil, fmt.Errorf("hostnet: read the boot ID: %w", err)
	}
	cookie, err := namespaceCookie()
	if err != nil {
		return nil, err
	}
	now := sysctlFile{Boot: strings.TrimSpace(string(boot)), NetNS: cookie}
	s := &sysctlStore{file: file, data: now}
	if file == "" {
		return s, nil
	}
	b, err := os.ReadFile(file)
	if errors.Is(err, fs.ErrNotExist) {
		return s, nil
	}
	if err != nil {
		return nil, fmt.Errorf("hostnet: read the earlier sysctl values: %w", err)
	}
	var old sysctlFile
	// A torn or foreign file is worth nothing: what it says would be written to /proc/sys.
	if json.Unmarshal(b, &old) == nil && old.Boot == now.Boot && old.NetNS == now.NetNS {
		s.data.Left = old.Left
		for _, c := range old.Changed {
			if strings.HasPrefix(c.Name, "net/") && filepath.IsLocal(c.Name) {
				s.data.Changed = append(s.data.Changed, c)
			}
		}
	}
	return s, nil
}

// namespaceCookie is the kernel's number of the thread's network namespace, never used twice
// in a boot, unlike an inode number.
func namespaceCookie() (string, error) {
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return "", fmt.Errorf("hostnet: open a socket: %w", err)
	}
	defer unix.Close(fd)
	cookie, err := unix.GetsockoptUint64(fd, unix.SOL_SOCKET, unix.SO_NETNS_COOKIE)
	if err == nil {
		return fmt.Sprintf("cookie %d", cookie), nil
	}
	// Linux before 5.14.
	link, err := os.Readlink(threadNS)
	if err != nil {
		return "", fmt.Errorf("hostnet: read the network namespace: %w", err)
	}
	return link, nil
}

// knows reports whether a setting was changed by us.
func (s *sysctlStore) knows(name string) bool {
	return slices.ContainsFunc(s.data.Changed, func(c sysctlChanged) bool { return c.Name == name })
}

// remember keeps the earlier value of a setting. One that cannot be saved is not kept in memory either: the next try would take it for saved.
func (s *sysctlStore) remember(name, was, set string) error {
	before := s.data.Changed
	after := slices.Clone(before)
	switch i := slices.IndexFunc(after, func(c sysctlChanged) bool { return c.Name == name }); {
	case i < 0:
		after = append(after, sysctlChanged{Name: name, Was: was, Set: set})
	case after[i].Set == set:
		return nil // drift repaired: the first value is the host's own
	default:
		after[i].Set = set
	}
	s.data.Changed = after
	err := s.save()
	if err != nil {
		s.data.Changed = before
	}
	return err
}

func (s *sysctlStore) save() error {
	if s.file == "" {
		return nil
	}
	if len(s.data.Changed) == 0 {
		if err := os.Remove(s.file); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("hostnet: remove the earlier sysctl values: %w", err)
		}
		return nil
	}
	b, err := json.MarshalIndent(s.data, "", "\t")
	if err != nil {
		return fmt.Errorf("hostnet: encode the earlier sysctl values: %w", err)
	}
	if err := os.MkdirAll(filepath.Dir(s.file), 0o755); err != nil {
		return fmt.Errorf("%w: %w", errNotKept, err)
	}
	// Renamed into place; no fsync, since neither file nor settings outlive a crash of the host.
	tmp := s.file + ".tmp"
	if err := os.WriteFile(tmp, append(b, '\n'), 0o644); err != nil {
		return fmt.Errorf("%w: %w", errNotKept, err)
	}
	if err := os.Rename(tmp, s.file); err != nil {
		return fmt.Errorf("%w: %w", errNotKept, err)
	}
	return nil
}

// bridged reports whether a bridge has an IPv4 address by which containers or virtual machines of others may reach the outside.
func bridged() bool {
	links, err := dump("devices", netlink.LinkList)
	if err != nil {
		return false
	}
	return slices.ContainsFunc(links, func(l netlink.Link) bool {
		addrs, err := dump("addresses", func() ([]netlink.Addr, error) { return netlink.AddrList(l, netlink.FAMILY_V4) })
		return l.Type() == "bridge" && err == nil && slices.ContainsFunc(addrs, func(a netlink.Addr) bool { return !a.IP.IsLinkLocalUnicast() })
	})
}

// restore puts the earlier values back, the last change first: forwarding goes before
// accept_ra. A setting that somebody changed after us stays theirs, and so does forwarding of IPv4 where a bridge needs it: a container engine that
// found it on has not set it, and will not set it again. tun is the TUN device's name.
func (s *sysctlStore) restore(tun string) error {
	var errs []error
	heirs := s.inheritors(tun)
	var left []sysctlChanged
	for i := len(s.data.Changed) - 1; i >= 0; i-- {
		c := s.data.Changed[i]
		now, err := readSysctl(c.Name)
		if errors.Is(err, fs.ErrNotExist) || err == nil && now != c.Set {
			continue // the device is gone, or the value is not ours any more
		}
		if c.Name == "net/ipv4/ip_forward" && bridged() {
			continue
		}
		if err == nil {
			err = writeSysctl(c.Name, c.Was)
		}
		if err != nil {
			errs = append(errs, fmt.Errorf("hostnet: put sysctl %s back to %s: %w", c.Name, c.Was, err))
			left = append([]sysctlChanged{c}, left...)
		}
	}
	for _, d := range heirs {
		if err := writeSysctl(acceptRA(d), "1"); err != nil && !errors.Is(err, fs.ErrNotExist) {
			errs = append(errs, fmt.Errorf("hostnet: put sysctl %s back to 1: %w", acceptRA(d), err))
		}
	}
	s.data.Changed, s.data.Left = left, nil
	return errors.Join(append(errs, s.save())...)
}
