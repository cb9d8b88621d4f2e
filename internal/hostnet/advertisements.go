package hostnet

import (
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"slices"

	"golang.org/x/sys/unix"
)

// A host that forwards IPv6 does not listen to router advertisements where accept_ra is 1 (net/ipv6/ndisc.c,
// ipv6_accept_ra), and the kernel drops the routes that it has learned there (addrconf.c, rt6_purge_dflt_routers). 2 makes
// an interface listen all the same. So before forwarding is switched on for all, every interface that listens gets 2,
// and so does `default`, for those that come later. Interfaces that did not listen are left alone: those with 0, as
// where userspace handles advertisements, and those that forwarded already.

const (
	conf6          = "net/ipv6/conf/"
	allForwarding6 = conf6 + "all/forwarding"
)

func acceptRA(device string) string { return conf6 + device + "/accept_ra" }

// advertisements lists what keeps the host listening. It must run inside the namespace. Where somebody else has switched
// forwarding on, whatever listens has 2 already.
func (p *pass) advertisements() ([]sysctl, error) {
	forwarding, err := readSysctl(allForwarding6)
	if err != nil {
		return nil, fmt.Errorf("hostnet: read sysctl %s: %w", allForwarding6, err)
	}
	store := p.r.sysctls
	first := !store.knows(allForwarding6)
	if first && forwarding != "0" {
		return nil, nil
	}
	devices, err := devices6(p.s.Tun)
	if err != nil {
		return nil, err
	}
	if first {
		store.data.Left = nil
	}
	var list []sysctl
	for _, d := range devices {
		listens, err := readSysctl(acceptRA(d))
		if err != nil {
			continue // gone meanwhile
		}
		if first {
			if own, err := readSysctl(conf6 + d + "/forwarding"); err == nil && (listens != "1" || own != "0") && !store.knows(acceptRA(d)) {
				store.data.Left = append(store.data.Left, d)
				continue
			}
		}
		if listens == "1" && !slices.Contains(store.data.Left, d) {
			list = append(list, sysctl{name: acceptRA(d), value: "2"})
		}
	}
	return list, nil
}

// devices6 names the interfaces that have IPv6 settings, and `default`, without lo, `all` and the TUN device.
func devices6(tun string) ([]string, error) {
	entries, err := os.ReadDir(filepath.Join(sysctlRoot, conf6))
	if err != nil {
		return nil, fmt.Errorf("hostnet: list the interfaces' IPv6 settings: %w", err)
	}
	var out []string
	for _, e := range entries {
		if n := e.Name(); n != "all" && n != "lo" && n != tun {
			out = append(out, n)
		}
	}
	return out, nil
}

// guardPods makes the interfaces of pods deaf to advertisements: a pod must not become the host's router because
// `default` is 2 now. It must run inside the namespace. What pods had before is not remembered.
func (p *pass) guardPods(devices []string) error {
	if !p.r.sysctls.knows(acceptRA("default")) {
		return nil
	}
	var errs []error
	for _, d := range devices {
		if v, err := readSysctl(acceptRA(d)); err != nil || v == "0" {
			continue
		}
		if err := writeSysctl(acceptRA(d), "0"); err != nil && !errors.Is(err, fs.ErrNotExist) {
			errs = append(errs, fmt.Errorf("hostnet: make %s deaf to router advertisements of its pod: %w", d, err))
		}
	}
	return errors.Join(errs...)
}

// podDevices names the interfaces by which this node's own space is reached, except uplinks: a bridge may be both.
func (p *pass) podDevices() []string {
	var out []string
	routes := p.before
	seen := map[int]bool{}
	for i := range routes {
		prefix := prefixOf(routes[i].Dst)
		inside := func(o netip.Prefix) bool { return contains(o, prefix) }
		if routes[i].Type != unix.RTN_UNICAST || !prefix.IsValid() || !slices.ContainsFunc(p.s.Own, inside) {
			continue
		}
		for _, h := range hops(&routes[i]) {
			if seen[h] {
				continue
			}
			seen[h] = true
			l, err := p.r.rt.LinkByIndex(h)
			if err != nil || l.Attrs().Name == p.s.Tun {
				continue
			}
			if _, uplink := p.s.Uplinks[l.Attrs().Name]; !uplink {
				out = append(out, l.Attrs().Name)
			}
		}
	}
	return out
}

// inheritors are the interfaces that came after `default` was changed, and have its 2. It must run inside the namespace.
func (s *sysctlStore) inheritors(tun string) []string {
	if !s.knows(acceptRA("default")) {
		return nil
	}
	devices, err := devices6(tun)
	if err != nil {
		return nil // no IPv6 any more
	}
	return slices.DeleteFunc(devices, func(d string) bool {
		v, err := readSysctl(acceptRA(d))
		return err != nil || v != "2" || s.knows(acceptRA(d)) || slices.Contains(s.data.Left, d)
	})
}
