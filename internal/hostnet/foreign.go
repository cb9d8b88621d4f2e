package hostnet

import (
	"fmt"
	"slices"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// TunnelProblems lists the kernel's own tunnel devices, in the calling thread's network namespace, that take packets which are meant
// for the agent: those of IP in IP that accept any sender, as tunl0, which the ipip module makes by itself, deliver them a
// second time, and a vxlan device on the agent's port keeps that port.
func TunnelProblems(vxlanPort uint16) ([]Problem, error) {
	links, err := dump("devices", netlink.LinkList)
	if err != nil {
		return nil, err
	}
	var out []Problem
	for _, l := range links {
		name, up := l.Attrs().Name, l.Attrs().RawFlags&unix.IFF_UP != 0
		takes := ""
		switch d := l.(type) {
		case *netlink.Iptun:
			if up && (d.Remote == nil || d.Remote.IsUnspecified()) {
				takes = "IP protocol 4"
			}
		case *netlink.Sittun:
			if up && (d.Remote == nil || d.Remote.IsUnspecified()) {
				takes = "IP protocol 41"
			}
		case *netlink.Ip6tnl:
			if up && (d.Remote == nil || d.Remote.IsUnspecified()) {
				takes = "IP protocols 4 and 41 over IPv6"
			}
		case *netlink.Vxlan:
			if uint16(d.Port) == vxlanPort && up {
				out = append(out, Problem{
					What:   fmt.Sprintf("device %s is a vxlan device of the kernel on UDP port %d, the agent's vxlan_port", name, vxlanPort),
					Remedy: "give either of them another port (vxlan_port), or delete the device if nothing needs it (ip link del " + name + ")",
				})
			}
		}
		if takes != "" {
			out = append(out, Problem{
				What:    fmt.Sprintf("device %s (%s) is up and takes %s from any sender: packets of the encapsulation ipip are delivered a second time", name, l.Type(), takes),
				Remedy:  "set it down if nothing needs it; a device with a remote address of its own is no problem",
				Command: fmt.Sprintf("ip link set %s down", name),
			})
		}
	}
	return out, nil
}

// SettingProblems lists the sysctls that differ from what the agent sets while it runs, in the calling thread's network
// namespace; links are the devices by which the tunnel's packets leave. Settings of the TUN device are left out if the agent has no such device.
func SettingProblems(tun string, links []string, v4, v6 bool) ([]Problem, error) {
	list, err := settings(tun, links, v4, v6)
	if err != nil {
		return nil, err
	}
	var out []Problem
	for _, c := range list {
		is, err := readSysctl(c.name)
		if err != nil {
			if c.optional {
				continue
			}
			return out, fmt.Errorf("hostnet: read sysctl %s: %w", c.name, err)
		}
		if is != c.value {
			out = append(out, Problem{
				What:    fmt.Sprintf("sysctl %s is %s, and pods need %s", dotted(c.name), is, c.value),
				Remedy:  fmt.Sprintf("set it; a file in /etc/sysctl.d that says otherwise sets it again at the next boot (grep -r %s /etc/sysctl.conf /etc/sysctl.d)", dotted(c.name)),
				Command: fmt.Sprintf("sysctl -w %s=%s", dotted(c.name), c.value),
			})
		}
	}
	return out, nil
}

// MendSettings sets what SettingProblems lists, and returns a line for each change. It leaves the forwarding of IPv6 to the agent,
// which first sees to it that the host keeps listening to router advertisements.
func MendSettings(tun string, links []string, v4, v6 bool) ([]string, error) {
	list, err := settings(tun, links, v4, v6)
	if err != nil {
		return nil, err
	}
	var done []string
	for _, c := range list {
		is, err := readSysctl(c.name)
		if err != nil || is == c.value || c.name == allForwarding6 {
			continue
		}
		if err := writeSysctl(c.name, c.value); err != nil {
			return done, fmt.Errorf("hostnet: set sysctl %s: %w", dotted(c.name), err)
		}
		done = append(done, fmt.Sprintf("set sysctl %s from %s to %s", dotted(c.name), is, c.value))
	}
	return done, nil
}

// settings are sysctlsFor the calling thread's network namespace, without those of a TUN device that is not there, or is not the agent's.
func settings(tun string, links []string, v4, v6 bool) ([]sysctl, error) {
	routes, err := mainUnicast(true)
	if err != nil {
		return nil, err
	}
	uplinks := outward(slices.Values(links), routes, func(index int) string {
		if l, err := netlink.LinkByIndex(index); err == nil {
			return l.Attrs().Name
		}
		return ""
	})
	list := sysctlsFor(tun, "", slices.DeleteFunc(uplinks, func(n string) bool { return n == tun }), v4, v6 && HasIPv6())
	link, err := netlink.LinkByName(tun)
	if _, isTun := link.(*netlink.Tuntap); err == nil && isTun && link.Attrs().Alias == Alias {
		return list, nil
	}
	return slices.DeleteFunc(list, func(c sysctl) bool { return strings.Contains(c.name, "/conf/"+tun+"/") }), nil
}
