package doctor

import (
	"context"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/tulle-net/tulle/internal/podnet"
	"github.com/tulle-net/tulle/internal/sys"
)

const networkdLinks = "run/systemd/netif/links"

// gatherManagers reads what systemd-networkd and NetworkManager write into /run of each link.
func gatherManagers(_ context.Context, s *snapshot) {
	m, others := managers{}, s.otherDevices()
	if s.exists(networkdLinks) {
		links, _ := os.ReadDir(s.path(networkdLinks))
		for _, l := range links {
			state := value(s.read(filepath.Join(networkdLinks, l.Name())), "ADMIN_STATE")
			if state == "configured" || state == "configuring" {
				m.networkd = true
			}
			if l.Name() == strconv.Itoa(s.tun.index) {
				m.linkState = state
			} else if other := others[l.Name()]; other != nil && networkdManages(state) {
				m.networkdOthers = append(m.networkdOthers, other.Attrs().Name)
			}
		}
		var files [2]string
		m.routesKept, files[0] = s.networkdKeeps("ManageForeignRoutes")
		m.rulesKept, files[1] = s.networkdKeeps("ManageForeignRoutingPolicyRules")
		m.unread = s.newerThan(networkdStart(), files[:])
	}
	if s.exists(nmDevices) {
		m.nm = true
		if s.tun.index != 0 {
			m.nmManaged = s.nmManages(strconv.Itoa(s.tun.index))
		}
		for index, other := range others {
			// Bridges that others have made it calls managed, too, but it leaves them as they are.
			if other.Type() != "bridge" && s.nmManages(index) == "true" {
				m.nmOthers = append(m.nmOthers, other.Attrs().Name)
			}
		}
	}
	slices.Sort(m.networkdOthers)
	slices.Sort(m.nmOthers)
	s.managers = m
}

const nmDevices = "run/NetworkManager/devices"

func (s *snapshot) nmManages(index string) string {
	return value(s.read(filepath.Join(nmDevices, index)), "managed")
}

// networkdManages tells whether systemd-networkd touches a link in that state. It does nothing to one that is pending (for udev) or initialized.
func networkdManages(state string) bool {
	return slices.Contains([]string{"configuring", "configured", "failed", "linger"}, state)
}

// otherDevices are Tulle's devices besides the TUN device, by index.
func (s *snapshot) otherDevices() map[string]netlink.Link {
	out := map[string]netlink.Link{}
	nl, err := sys.NewNetlink(-1)
	if err != nil {
		return nil
	}
	defer nl.Close()
	links, _ := nl.LinkList()
	for _, l := range links {
		if at := l.Attrs(); podnet.Made(l) || strings.HasPrefix(at.Name, "tulle-") && at.Name != s.Tun {
			out[strconv.Itoa(at.Index)] = l
		}
	}
	return out
}

// networkdKeeps reports whether networkd.conf(5) says no to a key, and which file does: of files with one name those in /etc win, then /run, then /usr/lib; of all files,
// the last one by name.
func (s *snapshot) networkdKeeps(key string) (keeps bool, by string) {
	said := value(s.read("etc/systemd/networkd.conf"), key)
	if said != "" {
		by = s.path("etc/systemd/networkd.conf")
	}
	files := map[string]string{}
	for _, dir := range []string{"usr/lib", "run", "etc"} {
		list, _ := filepath.Glob(s.path(filepath.Join(dir, "systemd/networkd.conf.d/*.conf")))
		for _, f := range list {
			files[filepath.Base(f)] = f
		}
	}
	for _, n := range slices.Sorted(maps.Keys(files)) {
		b, _ := os.ReadFile(files[n])
		if v := value(string(b), key); v != "" {
			said, by = v, files[n]
		}
	}
	return said == "no" || said == "false" || said == "0" || said == "off", by
}

// newerThan are those of the files that were written after start. systemd-networkd reads networkd.conf(5) at its start only.
func (s *snapshot) newerThan(start time.Time, files []string) (out []string) {
	for _, f := range files {
		if info, err := os.Stat(f); err == nil && !start.IsZero() && info.ModTime().After(start) && !slices.Contains(out, f) {
			out = append(out, f)
		}
	}
	return out
}

// networkdStart is when the systemd-networkd of this network namespace was started; zero: none is seen.
func networkdStart() time.Time {
	own, err := os.Readlink("/proc/thread-self/ns/net")
	var now unix.Timespec
	if err != nil || unix.ClockGettime(unix.CLOCK_BOOTTIME, &now) != nil {
		return time.Time{}
	}
	dirs, _ := filepath.Glob("/proc/[0-9]*")
	for _, dir := range dirs {
		b, _ := os.ReadFile(dir + "/stat")
		comm, rest, _ := strings.Cut(string(b), ") ")
		if !strings.HasSuffix(comm, "(systemd-network") { // the kernel keeps 15 bytes of a name
			continue
		}
		if ns, err := os.Readlink(dir + "/ns/net"); err != nil || ns != own {
			continue
		}
		if f := strings.Fields(rest); len(f) > 19 { // the state is field 3 of proc_pid_stat(5), starttime 22, in hundredths of a second since the boot
			ticks, _ := strconv.ParseInt(f[19], 10, 64)
			return time.Now().Add(-time.Duration(now.Nano()) + time.Duration(ticks)*time.Second/100)
		}
	}
	return time.Time{}
}

// otherNames match the names of all devices of Tulle but the TUN device and bridges, for NetworkManager and systemd-networkd.
var otherNames = []string{"tulle-*", podnet.HostPattern, podnet.PodPattern}

func judgeManagers(s *snapshot) Result {
	m := s.managers
	if !m.networkd && m.linkState == "" && !m.nm {
		return result("neither NetworkManager nor systemd-networkd manages this host's links")
	}
	var text []string
	var out []Finding
	if m.networkd || m.linkState != "" {
		text = append(text, fmt.Sprintf("systemd-networkd: %s %s, keeps routes of others %v, policy rules %v, manages %d other devices of Tulle",
			s.Tun, orNone(m.linkState), m.routesKept, m.rulesKept, len(m.networkdOthers)))
	}
	managed := m.networkdOthers
	if networkdManages(m.linkState) {
		managed = append([]string{s.Tun}, managed...)
	}
	if len(managed) > 0 {
		out = append(out, Finding{State: Failed, What: "systemd-networkd manages " + few(managed) + ": it takes addresses and routes away, and may take those that a pod offers", Remedy: "tell it to leave these devices alone",
			Command: fmt.Sprintf(`mkdir -p /etc/systemd/network && printf '[Match]\nName=%s %s\n\n[Link]\nUnmanaged=yes\nRequiredForOnline=no\n' > /etc/systemd/network/05-tulle.network && printf '[Match]\nKind=bridge\nMACAddress=%s\n\n[Link]\nUnmanaged=yes\nRequiredForOnline=no\n' > /etc/systemd/network/05-tulle-bridge.network && networkctl reload`,
				s.Tun, strings.Join(otherNames, " "), podnet.HostMAC)})
	}
	var removed []string
	if !m.routesKept {
		removed = append(removed, "routes")
	}
	if !m.rulesKept {
		removed = append(removed, "policy rules")
	}
	if what := strings.Join(removed, " and "); m.networkd && what != "" {
		out = append(out, Finding{State: Warning, What: "systemd-networkd removes the agent's " + what + " when it configures a link again: the agent restores them, and packets are lost in between",
			Remedy:  "tell it to keep " + what + " of others",
			Command: `mkdir -p /etc/systemd/networkd.conf.d && printf '[Network]\nManageForeignRoutes=no\nManageForeignRoutingPolicyRules=no\n' > /etc/systemd/networkd.conf.d/90-tulle.conf && systemctl restart systemd-networkd`})
	}
	if m.networkd && len(m.unread) > 0 {
		out = append(out, Finding{State: Warning, What: "systemd-networkd was started before its settings were written: it has not read " + strings.Join(m.unread, ", "),
			Remedy:  "restart it; it keeps what it has configured itself, but may take away addresses that others have given to its links (keepalived)",
			Command: "systemctl restart systemd-networkd"})
	}
	if m.nm {
		text = append(text, fmt.Sprintf("NetworkManager: %s managed %s, manages %d other devices of Tulle", s.Tun, orNone(m.nmManaged), len(m.nmOthers)))
	}
	managed = m.nmOthers
	if m.nmManaged == "true" {
		managed = append([]string{s.Tun}, managed...)
	}
	if len(managed) > 0 {
		command := fmt.Sprintf(`mkdir -p /etc/NetworkManager/conf.d && printf '[device-tulle]\nmatch-device=interface-name:%s,interface-name:%s\nmanaged=0\n' > /etc/NetworkManager/conf.d/90-tulle.conf && nmcli general reload`,
			s.Tun, strings.Join(otherNames, ",interface-name:"))
		command += " && nmcli device set " + strings.Join(managed, " managed no && nmcli device set ") + " managed no"
		out = append(out, Finding{State: Failed, What: "NetworkManager manages " + few(managed) + ": it changes addresses and routes", Remedy: "tell it to leave these devices alone", Command: command})
	}
	return result(strings.Join(text, "; "), out...)
}

// few names the first of many.
func few(names []string) string {
	if len(names) <= 3 {
		return strings.Join(names, ", ")
	}
	return fmt.Sprintf("%s and %d more", strings.Join(names[:3], ", "), len(names)-3)
}

func orNone(s string) string {
	if s == "" {
		return "not known"
	}
	return s
}
