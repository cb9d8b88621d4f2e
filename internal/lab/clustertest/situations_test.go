package clustertest

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/containernetworking/cni/libcni"
	"github.com/vishvananda/netlink"

	"github.com/tulle-net/tulle/internal/api"
	"github.com/tulle-net/tulle/internal/lab"
	"github.com/tulle-net/tulle/internal/sys"
	"github.com/tulle-net/tulle/internal/testing/testbuild"
)

// referencePlugins is where Debian's containernetworking-plugins are.
const referencePlugins = "/usr/lib/cni"

// engineOn is an engine on a host of a lab whose plugins are tulle-cni, portmap and bandwidth.
func engineOn(t *testing.T, l *lab.Lab, host, plugins string) *engine {
	t.Helper()
	h, err := l.Host(host)
	if err != nil {
		t.Fatal(err)
	}
	lib := libcni.NewCNIConfigWithCacheDir([]string{plugins, referencePlugins}, t.TempDir(), nil)
	return &engine{t: t, l: l, host: host, socket: h.Socket, lib: lib}
}

// box is a container that an engine has wired.
type box struct {
	name  string
	netns string
	addrs []netip.Addr
}

// start wires a container, behind a bridge if it has a name, and with a published port if that is not 0.
func (e *engine) start(name, bridge string, port int) box {
	e.t.Helper()
	list, err := libcni.NetworkConfFromBytes(fmt.Appendf(nil, `{"cniVersion": "1.0.0", "name": "tulle", "plugins": [
		{"type": "tulle-cni", "socket": %q, "bridge": %q}, {"type": "portmap", "capabilities": {"portMappings": true}, "snat": true},
		{"type": "bandwidth", "capabilities": {"bandwidth": true}}]}`, e.socket, bridge))
	if err != nil {
		e.t.Fatal(err)
	}
	c := e.container()
	if port != 0 {
		c.CapabilityArgs = map[string]any{"portMappings": []map[string]any{{"hostPort": port, "containerPort": 80, "protocol": "tcp"}}}
	}
	res, raw, err := e.add(list, c)
	if err != nil {
		e.t.Fatalf("ADD %s: %v", name, err)
	}
	e.t.Cleanup(func() {
		if err := e.l.Do(e.host, func() error { return e.lib.DelNetworkList(context.Background(), list, c) }); err != nil {
			e.t.Errorf("DEL %s: %v", name, err)
		}
	})
	b := box{name: name, netns: c.NetNS}
	for _, ip := range res.IPs {
		a, _ := netip.AddrFromSlice(ip.Address.IP)
		b.addrs = append(b.addrs, a.Unmap())
	}
	if n := len(res.Interfaces); len(b.addrs) != 2 || n < 2 || res.Interfaces[n-1].Sandbox != c.NetNS || (n == 3) != (bridge != "") || bridge != "" && res.Interfaces[0].Name != bridge {
		e.t.Errorf("%s: result %s", name, raw)
	}
	return b
}

// TestSituations: the four situations of container networking. A namespace and its host; two containers on one host, each
// with a link of its own or behind a bridge; hosts in one subnet; hosts in different subnets. Nobody sees another address than
// the sender's own but the outside, and that only where it does not know routes to the pods.
func TestSituations(t *testing.T) {
	t.Parallel()
	plugins := t.TempDir()
	if err := testbuild.Command("tulle-cni", filepath.Join(plugins, "tulle-cni"), nil); err != nil {
		t.Fatal(err)
	}
	l := up(t, "sit", lab.Options{Nodes: 3, Subnets: 2, Pods: -1, ClusterCIDRs: dualCIDRs})
	settled(t, l)
	h1, h2, h3 := l.Hosts()[0], l.Hosts()[1], l.Hosts()[2]
	e1 := engineOn(t, l, h1.Name, plugins)
	own1, own2 := e1.start("own1", "", 8081), e1.start("own2", "", 0)
	br1, br2 := e1.start("behind1", "pods", 8082), e1.start("behind2", "pods", 0)
	far := engineOn(t, l, h2.Name, plugins).start("far", "pods", 0)
	near := engineOn(t, l, h3.Name, plugins).start("near", "", 0)

	st := mustStatus(t, l, h1.Name).Node
	hostAddrs := append(slices.Clone(st.Underlay), st.Tun.Addresses...)
	for i := range own1.addrs {
		sees := func(what string, from, to box, want []netip.Addr) {
			t.Helper()
			seen, err := seenAs(from.netns, to.netns, to.addrs[i])
			if err != nil || !slices.Contains(want, seen) {
				t.Errorf("%s: %s to %s at %v: seen as %v (%v), want %v", what, from.name, to.name, to.addrs[i], seen, err, want)
			}
		}
		for _, c := range []box{own1, br1} {
			host := box{"its host", h1.Netns, st.Underlay}
			sees("a namespace and its host", c, host, c.addrs)
			sees("a namespace and its host", host, c, hostAddrs)
		}
		for _, pair := range []struct {
			what string
			a, b box
		}{
			{"two on one host", own1, own2},
			{"two on one host behind a bridge", br1, br2},
			{"two on one host, one of them behind a bridge", own1, br1},
			{"hosts in one subnet", own1, near},
			{"hosts in one subnet", br1, near},
			{"hosts in different subnets", own1, far},
			{"hosts in different subnets, both behind bridges", br1, far},
		} {
			sees(pair.what, pair.a, pair.b, pair.a.addrs)
			sees(pair.what, pair.b, pair.a, pair.b.addrs)
		}
		outside := box{"the outside", sys.NetnsPath(l.Name() + "-" + lab.Router), []netip.Addr{routerOf(h1, 0), routerOf(h1, 1)}}
		for _, c := range []box{own1, br1} {
			sees("masquerade", c, outside, st.Underlay)
		}
		published(t, h1.Underlay[i], own1, 8081, outside, own1, own2, br1, far, near)
		published(t, h1.Underlay[i], br1, 8082, outside, br1, br2, own1, far, near)
	}
	noMasquerade(t, l, []box{own1, br1})
	for _, host := range []string{h1.Name, h2.Name, h3.Name} {
		for reason, n := range mustStatus(t, l, host).Drops {
			if n != 0 && (reason == "pod_source" || reason == "pod_neighbour" || reason == "pod_protocol") {
				t.Errorf("%s has dropped %d packets of honest containers: %s", host, n, reason)
			}
		}
	}
}

// published connects from each box to a host's published port (portmap), which leads to port 80 of the container, also if that
// is the one that asks (hairpin).
func published(t *testing.T, host netip.Addr, to box, port uint16, from ...box) {
	t.Helper()
	a := to.addrs[slices.IndexFunc(to.addrs, func(a netip.Addr) bool { return a.Is4() == host.Is4() })]
	var ln net.Listener
	if err := sys.WithNetns(to.netns, func() (err error) {
		ln, err = net.Listen("tcp", netip.AddrPortFrom(a, 80).String())
		return err
	}); err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	for _, f := range from {
		err := sys.WithNetns(f.netns, func() error {
			c, err := net.DialTimeout("tcp", netip.AddrPortFrom(host, port).String(), 30*time.Second)
			if err == nil {
				err = c.Close()
			}
			return err
		})
		if err != nil {
			t.Errorf("%s to %s by port %d of its host %v: %v", f.name, to.name, port, host, err)
			continue
		}
		c, err := ln.Accept()
		if err != nil {
			t.Fatal(err)
		}
		c.Close()
	}
}

// noMasquerade tells the router a route to each box, and the agents that it knows them: from then on it sees the boxes' own
// addresses, and after the key is gone the host's again.
func noMasquerade(t *testing.T, l *lab.Lab, boxes []box) {
	t.Helper()
	h := l.Hosts()[0]
	conf, err := os.ReadFile(h.Config)
	if err != nil {
		t.Fatal(err)
	}
	router := sys.NetnsPath(l.Name() + "-" + lab.Router)
	n, err := sys.OpenNetlink(router)
	if err != nil {
		t.Fatal(err)
	}
	defer n.Close()
	for _, b := range boxes {
		for i, a := range b.addrs {
			if err := n.RouteReplace(&netlink.Route{Dst: sys.IPNet(sys.HostPrefix(a)), Gw: h.Underlay[i].AsSlice()}); err != nil {
				t.Fatal(err)
			}
		}
	}
	for _, step := range []struct {
		keys string
		kept bool
	}{
		{fmt.Sprintf("no_masquerade: [%v, \"%v\"]\n", sys.HostPrefix(routerOf(h, 0)), sys.HostPrefix(routerOf(h, 1))), true},
		{"", false},
	} {
		if err := os.WriteFile(h.Config, append(slices.Clip(conf), step.keys...), 0o600); err != nil {
			t.Fatal(err)
		}
		res, err := api.NewClient(h.Socket).Reload(t.Context())
		if err != nil || len(res.Changed) != 1 || res.Changed[0].Key != "no_masquerade" || len(res.NeedsRestart) != 0 {
			t.Fatalf("reload: %+v, %v", res, err)
		}
		for _, b := range boxes {
			for i, a := range b.addrs {
				until(t, fmt.Sprintf("%s with %q", b.name, step.keys), func() error {
					seen, err := seenAs(b.netns, router, routerOf(h, i))
					if err == nil && (seen == a) != step.kept {
						err = fmt.Errorf("the outside sees %v", seen)
					}
					return err
				})
			}
		}
	}
}
