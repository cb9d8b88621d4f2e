package clustertest

import (
	"errors"
	"fmt"
	"net/netip"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/vishvananda/netlink"

	"github.com/tulle-net/tulle/internal/api"
	"github.com/tulle-net/tulle/internal/lab"
	"github.com/tulle-net/tulle/ipam"
	"github.com/tulle-net/tulle/membership"
)

// TestExternalInsideCluster has external peers whose endpoint lies inside the cluster's own space, as a mistyped address does: a
// node refuses to add one, and one that comes from a member that did not refuse it takes no route away.
func TestExternalInsideCluster(t *testing.T) {
	t.Parallel()
	l := up(t, "inside", lab.Options{})
	settled(t, l)
	own := mustStatus(t, l, "h1").Node.Prefixes
	bad := map[netip.Prefix]netip.Addr{} // the endpoint for each prefix of h1: a pod of another host
	for _, p := range own {
		six := p.Addr().Is6()
		part := netip.PrefixFrom(lastOf(p), 24)
		if six {
			part = netip.PrefixFrom(lastOf(p), 64)
		}
		for _, pod := range pods(l) {
			if pod.host == "h2" {
				bad[part.Masked()] = pod.addr(six)
			}
		}
	}
	for p, endpoint := range bad {
		cidr := "10.244.0.0/16"
		if endpoint.Is6() {
			cidr = "fd00:10:244::/48"
		}
		for _, mode := range []string{"ipip", "direct"} {
			refused(t, tulle(t, l, "h1", "external", "add", p.String(), endpoint.String(), "--encap", mode), endpoint.String(), cidr, "underlay address")
		}
	}
	if list := ask[[]api.External](t, l, "h1", "external", "list"); len(list) > 0 {
		t.Errorf("listed: %+v", list)
	}

	// h1's table gets such entries all the same, as from a program that does not check them.
	h1, err := l.Host("h1")
	if err != nil {
		t.Fatal(err)
	}
	if err := l.StopAgent(t.Context(), "h1", syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	store, err := ipam.OpenStore(filepath.Join(h1.Dir, "state"), "")
	if err != nil {
		t.Fatal(err)
	}
	if err := addExternals(store, bad); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(store.Close(), l.StartAgent(t.Context(), "h1")); err != nil {
		t.Fatal(err)
	}
	for _, h := range hostNames(l) {
		until(t, h+" names the entries and the remedy", func() error {
			st, err := status(t.Context(), l, h)
			if err != nil {
				return err
			}
			for p, endpoint := range bad {
				named := func(x api.Problem) bool {
					return len(lacks(x.What, "external peer", endpoint.String())) == 0 && strings.Contains(x.Remedy, "on h1: tulle external remove "+p.String())
				}
				if !slices.ContainsFunc(st.Problems, named) {
					return fmt.Errorf("%v: %+v", p, st.Problems)
				}
			}
			if len(st.Problems) != len(bad) || !st.Ready {
				return fmt.Errorf("ready %v, %+v", st.Ready, st.Problems)
			}
			return nil
		})
		if err := l.Do(h, clusterRouted); err != nil {
			t.Errorf("%s: %v", h, err)
		}
	}
	until(t, "pods reach each other", func() error { return l.WaitPods(t.Context()) })
	pingAll(t, l, hostStations(t, l))
	for p := range bad {
		if r := tulle(t, l, "h3", "route", "get", p.Addr().Next().String()); r.code != 1 || len(lacks(r.out, "external", "inside the cluster", "host unreachable")) > 0 {
			t.Errorf("route to %v: %+v", p, r)
		}
		ask[api.External](t, l, "h1", "external", "remove", p.String())
	}
	settled(t, l)
}

// addExternals gives prefixes of a stopped node to external peers.
func addExternals(store *ipam.Store, endpoints map[netip.Prefix]netip.Addr) error {
	st, err := store.Load()
	if err != nil {
		return err
	}
	entries, _, err := membership.DecodeEntries(st.Table)
	if err != nil {
		return err
	}
	var table membership.Table
	table.Merge(entries)
	for p, endpoint := range endpoints {
		if _, err := table.Assign(p, membership.NodeID(st.Node), &membership.External{Endpoint: endpoint, Encap: "ipip"}); err != nil {
			return err
		}
	}
	st.Table = membership.AppendEntries(nil, table.Entries())
	return store.Save(st)
}

// clusterRouted wants the cluster's whole space in the tunnel.
func clusterRouted() error {
	tun, err := netlink.LinkByName("tun0")
	if err != nil {
		return err
	}
	routes, err := netlink.RouteList(tun, netlink.FAMILY_ALL)
	for _, cidr := range []string{"10.244.0.0/16", "fd00:10:244::/48"} {
		if !slices.ContainsFunc(routes, func(r netlink.Route) bool { return r.Dst != nil && r.Dst.String() == cidr }) {
			err = errors.Join(err, fmt.Errorf("%s is not routed into tun0: %v", cidr, routes))
		}
	}
	return err
}
