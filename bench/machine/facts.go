// Package machine tells what machine a benchmark runs on, and measures its CPU time. What it reads from /proc needs no
// root.
package machine

import (
	"bytes"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"path"
	"runtime"
	"runtime/debug"
	"slices"
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
	var name unix.Utsname
	if err := unix.Uname(&name); err == nil { // which needs no /proc
		m.Kernel = unix.ByteSliceToString(name.Release[:])
	}
	if b, err := os.ReadFile("/proc/cpuinfo"); err == nil {
		m.CPU = cpuName(string(b))
	}
	if b, err := os.ReadFile("/proc/sys/net/ipv4/tcp_congestion_control"); err == nil {
		m.Congestion = string(bytes.TrimSpace(b))
	}
	m.Quota = quota(os.DirFS("/"))
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

// quota is the number of CPUs that the control groups of this process allow, the tightest of them; 0 if none limits. root is "/".
func quota(root fs.FS) (least float64) {
	groups, err := fs.ReadFile(root, "proc/self/cgroup")
	if err != nil {
		groups = []byte("0::/\n")
	}
	for line := range strings.Lines(string(groups)) { // number:controllers:path (cgroups(7))
		f := strings.SplitN(strings.TrimSpace(line), ":", 3)
		if len(f) != 3 {
			continue
		}
		var mounts []string
		limit := quotaV2
		switch controllers := strings.Split(f[1], ","); {
		case f[1] == "":
			mounts = []string{"", "unified"}
		case slices.Contains(controllers, "cpu"):
			mounts, limit = []string{"cpu", f[1]}, quotaV1
		}
		for _, mount := range mounts {
			// A container may see its own group as the root, and still its path in the host.
			for at := path.Clean("/" + f[2]); ; at = path.Dir(at) {
				if q := limit(root, path.Join("sys/fs/cgroup", mount, at)); q > 0 && (least == 0 || q < least) {
					least = q
				}
				if at == "/" {
					break
				}
			}
		}
	}
	return least
}

// quotaV2 is the limit of one control group of version 2, in CPUs; 0: none.
func quotaV2(root fs.FS, group string) float64 {
	b, _ := fs.ReadFile(root, path.Join(group, "cpu.max")) // "max 100000", or the time in each period
	f := strings.Fields(string(b))
	if len(f) != 2 {
		return 0
	}
	return share(f[0], f[1])
}

// quotaV1 is quotaV2 for version 1.
func quotaV1(root fs.FS, group string) float64 {
	most, _ := fs.ReadFile(root, path.Join(group, "cpu.cfs_quota_us")) // -1: no limit
	period, _ := fs.ReadFile(root, path.Join(group, "cpu.cfs_period_us"))
	return share(strings.TrimSpace(string(most)), strings.TrimSpace(string(period)))
}

func share(most, period string) float64 {
	m, err := strconv.ParseFloat(most, 64)
	p, err2 := strconv.ParseFloat(period, 64)
	if err != nil || err2 != nil || m <= 0 || p <= 0 {
		return 0
	}
	return m / p
}
