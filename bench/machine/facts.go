// Package machine tells what machine a benchmark runs on, and measures its CPU time. What it reads from /proc needs no
// root.
package machine

import (
	"bytes"
	"net"
	"net/netip"
	"os"
	"runtime"
	"runtime/debug"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/tulle-net/tulle/bench/result"
	"github.com/tulle-net/tulle/internal/sys"
)

// Facts describes this machine. at is an address of it, whose interface is described too; the zero value is for none.
// What cannot be read is left out.
func Facts(at netip.Addr) result.Machine {
	m := result.Machine{CPUs: runtime.NumCPU(), Arch: runtime.GOARCH, Go: runtime.Version()}
	if s, err := readStat(); err == nil {
		m.CPUs = s.cpus
	}
	var mask unix.CPUSet
	if err := unix.SchedGetaffinity(0, &mask); err == nil {
		m.Usable = mask.Count()
	}
	if b, err := os.ReadFile("/proc/sys/kernel/osrelease"); err == nil {
		m.Kernel = string(bytes.TrimSpace(b))
	}
	if b, err := os.ReadFile("/proc/cpuinfo"); err == nil {
		m.CPU = cpuName(string(b))
	}
	if b, err := os.ReadFile("/proc/sys/net/ipv4/tcp_congestion_control"); err == nil {
		m.Congestion = string(bytes.TrimSpace(b))
	}
	if b, err := os.ReadFile("/sys/fs/cgroup/cpu.max"); err == nil {
		m.Quota = quota(string(b))
	}
	if info, ok := debug.ReadBuildInfo(); ok {
		for _, d := range info.Deps {
			if d.Path == "golang.zx2c4.com/wireguard" {
				m.WireGuard = d.Version
			}
		}
	}
	if at.IsValid() {
		m.Interface, m.LinkMTU, m.Offloads = device(at)
	}
	return m
}

// device describes the interface that has an address.
func device(at netip.Addr) (name string, mtu int, offloads []string) {
	list, err := net.Interfaces()
	if err != nil {
		return "", 0, nil
	}
	for _, i := range list {
		if zone := at.Zone(); zone != "" && zone != i.Name { // several may have the same link-local address
			continue
		}
		addrs, err := i.Addrs()
		if err != nil {
			continue
		}
		for _, a := range addrs {
			p, err := netip.ParsePrefix(a.String())
			if err != nil || p.Addr().WithZone("") != at.WithZone("").Unmap() {
				continue
			}
			for _, o := range []struct {
				name string
				bit  sys.Offload
			}{{"tso", sys.TSO}, {"gso", sys.GSO}, {"gro", sys.GRO}} {
				if on, err := sys.GetOffload(i.Name, o.bit); err == nil && on {
					offloads = append(offloads, o.name)
				}
			}
			return i.Name, i.MTU, offloads
		}
	}
	return "", 0, nil
}

// BootID is different for each boot of each machine: two ends with the same one are on one machine. It is "" if it cannot
// be read.
func BootID() string {
	b, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return ""
	}
	return string(bytes.TrimSpace(b))
}

// cpuName returns the CPU's name in /proc/cpuinfo, which some architectures do not have.
func cpuName(cpuinfo string) string {
	for line := range strings.Lines(cpuinfo) {
		if key, value, ok := strings.Cut(line, ":"); ok && strings.TrimSpace(key) == "model name" {
			return strings.TrimSpace(value)
		}
	}
	return ""
}

// quota is the number of CPUs that cpu.max of a control group allows; 0 if it does not limit (cgroups(7)).
func quota(text string) float64 {
	f := strings.Fields(text)
	if len(f) != 2 {
		return 0
	}
	most, err := strconv.ParseFloat(f[0], 64)
	period, err2 := strconv.ParseFloat(f[1], 64)
	if err != nil || err2 != nil || period <= 0 {
		return 0 // "max"
	}
	return most / period
}
