package clustertest

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/nftables"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/tulle-net/tulle/internal/hostnet"
	"github.com/tulle-net/tulle/internal/lab"
	"github.com/tulle-net/tulle/internal/testing/stall"
)

// snapshot is a network namespace's state, a sorted line for each object.
type snapshot []string

// network takes a snapshot of the calling thread's network namespace: links, addresses, routes of all tables, rules, nft
// tables and, with sysctls, all settings of the IP stacks.
func network(sysctls bool) (snapshot, error) {
	var s snapshot
	add := func(format string, args ...any) { s = append(s, fmt.Sprintf(format, args...)) }
	links, err := netlink.LinkList()
	if err != nil {
		return nil, err
	}
	names := map[int]string{}
	for _, l := range links {
		a := l.Attrs()
		names[a.Index] = a.Name
		add("link %s type %s mtu %d %v", a.Name, l.Type(), a.MTU, a.Flags)
	}
	addrs, err := netlink.AddrList(nil, netlink.FAMILY_ALL)
	if err != nil {
		return nil, err
	}
	for _, a := range addrs {
		add("address %v on %s", a.IPNet, names[a.LinkIndex])
	}
	for _, family := range []int{netlink.FAMILY_V4, netlink.FAMILY_V6} {
		// A table of 0 asks for all of them.
		routes, err := netlink.RouteListFiltered(family, &netlink.Route{Table: unix.RT_TABLE_UNSPEC}, netlink.RT_FILTER_TABLE)
		if err != nil {
			return nil, err
		}
		for _, r := range routes {
			if r.Flags&unix.RTM_F_CLONED == 0 {
				add("route %v via %v dev %s table %d proto %d type %d src %v metric %d mtu %d",
					r.Dst, r.Gw, names[r.LinkIndex], r.Table, r.Protocol, r.Type, r.Src, r.Priority, r.MTU)
			}
		}
		rules, err := netlink.RuleList(family)
		if err != nil {
			return nil, err
		}
		for _, r := range rules {
			add("rule %v", r)
		}
	}
	nft, err := nftables.New()
	if err != nil {
		return nil, err
	}
	tables, err := nft.ListTables()
	if err != nil {
		return nil, err
	}
	for _, t := range tables {
		add("nft table %d %s", t.Family, t.Name)
	}
	if sysctls {
		for _, pattern := range []string{"ipv4/ip_forward", "ipv4/conf/*/*", "ipv6/conf/*/*"} {
			files, err := filepath.Glob(filepath.Join("/proc/sys/net", pattern))
			if err != nil {
				return nil, err
			}
			for _, f := range files {
				if b, err := os.ReadFile(f); err == nil { // stable_secret cannot be read before it was set
					add("sysctl %s %s", f, bytes.TrimSpace(b))
				}
			}
		}
	}
	slices.Sort(s)
	return s, nil
}

// networkOf is the snapshot of a lab's host.
func networkOf(t *testing.T, l *lab.Lab, host string) (s snapshot) {
	t.Helper()
	err := l.Do(host, func() (err error) {
		s, err = network(true)
		return err
	})
	if err != nil {
		t.Fatalf("%s: %v", host, err)
	}
	return s
}

// sameAs fails the test for each line that only one of them has.
func (s snapshot) sameAs(t *testing.T, when string, before snapshot) {
	t.Helper()
	for _, line := range s {
		if !slices.Contains(before, line) {
			t.Errorf("%s: new: %s", when, line)
		}
	}
	for _, line := range before {
		if !slices.Contains(s, line) {
			t.Errorf("%s: gone: %s", when, line)
		}
	}
}

// steady is the snapshot of a lab's host on which nothing changes for a second: what an agent has decided it does a moment later.
func steady(t *testing.T, l *lab.Lab, host string) (s snapshot) {
	t.Helper()
	since := time.Now()
	until(t, "nothing changes on "+host, func() error {
		if now := networkOf(t, l, host); !slices.Equal(now, s) {
			s, since = now, time.Now()
		}
		if time.Since(since) < time.Second {
			return errors.New("it did a moment ago")
		}
		return nil
	})
	return s
}

// becomes waits until a snapshot is as it was. What differs then fails the test.
func becomes(t *testing.T, when string, now func() snapshot, before snapshot) {
	t.Helper()
	missing := func(s snapshot) func(string) bool { return func(line string) bool { return !slices.Contains(s, line) } }
	is := now()
	differs := func() bool {
		return slices.ContainsFunc(is, missing(before)) || slices.ContainsFunc(before, missing(is))
	}
	for began, meter := time.Now(), stall.Begin(); differs() && time.Since(began) < patience/2+min(meter.Short(), patience); is = now() {
		time.Sleep(100 * time.Millisecond)
	}
	is.sameAs(t, when, before)
}

// with keeps the lines that begin with one of the words.
func (s snapshot) with(words ...string) (out snapshot) {
	for _, line := range s {
		if slices.ContainsFunc(words, func(w string) bool { return strings.HasPrefix(line, w) }) {
			out = append(out, line)
		}
	}
	return out
}

// withoutProbes leaves out the device for direct probes and its routes, but not the policy rule, which outlives them.
func (s snapshot) withoutProbes() (out snapshot) {
	for _, line := range s {
		if !strings.Contains(line, hostnet.DirectDevice) || strings.HasPrefix(line, "rule") {
			out = append(out, line)
		}
	}
	return out
}

// marked are the routes that carry the agent's mark.
func (s snapshot) marked() (out snapshot) {
	for _, line := range s {
		if strings.HasPrefix(line, "route ") && strings.Contains(line, fmt.Sprintf(" proto %d ", hostnet.Protocol)) {
			out = append(out, line)
		}
	}
	return out
}
