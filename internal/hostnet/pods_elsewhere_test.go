package hostnet

import (
	"errors"
	"net"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

type countingRouter struct{ asked int }

func (c *countingRouter) RouteGetWithOptions(net.IP, *netlink.RouteGetOptions) ([]netlink.Route, error) {
	c.asked++
	return nil, errors.New("no route")
}

func (c *countingRouter) RouteListFiltered(int, *netlink.Route, uint64) ([]netlink.Route, error) {
	return nil, errors.New("no routes")
}

func (c *countingRouter) LinkByIndex(int) (netlink.Link, error) { return nil, errors.New("no link") }

// Without a policy rule of others, no packet leaves by a table of others: the kernel is not asked for each pod address of each node.
func TestCheckPodsAsksOnlyWithRules(t *testing.T) {
	rules := []netlink.Rule{{Table: unix.RT_TABLE_LOCAL}, {Table: unix.RT_TABLE_MAIN, Priority: 32766}, {Table: unix.RT_TABLE_DEFAULT, Priority: 32767},
		{Table: HostsTable}, {Table: DirectTable}, {Priority: 1000}}
	for _, tc := range []struct {
		rules []netlink.Rule
		want  int
	}{{rules, 0}, {append(rules, netlink.Rule{Table: 52, Priority: 5270}), 3 + 2}} {
		var c countingRouter
		podsElsewhere(&c, tc.rules, "tun0", ips("192.0.2.1"), ips("10.244.64.0", "fd00:244:64::"), ips("10.244.1.255"))
		if c.asked != tc.want {
			t.Errorf("%d rules: %d questions, want %d", len(tc.rules), c.asked, tc.want)
		}
	}
}
