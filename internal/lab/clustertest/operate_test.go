package clustertest

import (
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netlink"

	"github.com/tulle-net/tulle/internal/api"
	"github.com/tulle-net/tulle/internal/lab"
	"github.com/tulle-net/tulle/tunnel/encap"
)

// TestAddressChange gives a host another underlay address while its agent runs.
func TestAddressChange(t *testing.T) {
	t.Parallel()
	l := up(t, "addr", lab.Options{Underlay: lab.IPv4Only})
	settled(t, l)
	before := mustStatus(t, l, "h3").Node
	if !slices.Equal(before.Underlay, []netip.Addr{netip.MustParseAddr("192.168.1.13")}) {
		t.Fatalf("underlay %v", before.Underlay)
	}
	h3, err := l.Host("h3")
	if err != nil {
		t.Fatal(err)
	}
	err = l.Do("h3", func() error {
		link, err := netlink.LinkByName("eth0")
		if err != nil {
			return err
		}
		addr := func(s string) *netlink.Addr { a, _ := netlink.ParseAddr(s); return a }
		return errors.Join(
			netlink.AddrDel(link, addr("192.168.1.13/24")), // and with it the default route
			netlink.AddrAdd(link, addr("192.168.1.99/24")),
			netlink.RouteReplace(&netlink.Route{LinkIndex: link.Attrs().Index, Gw: net.IPv4(192, 168, 1, 1)}),
		)
	})
	if err != nil {
		t.Fatal(err)
	}
	moved := netip.MustParseAddr("192.168.1.99")
	untilWithin(t, 2*patience, "everybody knows the new address", func() error {
		for _, h := range hostNames(l) {
			st := mustStatus(t, l, h)
			if !st.Ready {
				return fmt.Errorf("%s: %+v", h, st.Problems)
			}
			if h == "h3" {
				if !slices.Contains(st.Node.Underlay, moved) {
					return fmt.Errorf("h3 itself is at %v", st.Node.Underlay)
				}
				continue
			}
			if p, err := peerOf(&st, "h3"); err != nil || !slices.Contains(p.Underlay, moved) || p.Path.State != api.PathUp || p.State != api.PeerAlive {
				return fmt.Errorf("%s: %+v %w", h, p, err)
			}
		}
		return nil
	})
	settled(t, l)
	sameNode(t, "at the new address", before, mustStatus(t, l, "h3").Node)
	pingAll(t, l, hostStations(t, l))
	if h, err := l.Host("h3"); err != nil || h.PID != h3.PID || !l.AgentRuns("h3") {
		t.Errorf("the agent of h3 was restarted: %v", err)
	}
}

// ask runs a command and decodes its JSON.
func ask[T any](t *testing.T, l *lab.Lab, host string, args ...string) (v T) {
	t.Helper()
	r := tulle(t, l, host, append(args, "-o", "json")...)
	if err := json.Unmarshal([]byte(r.out), &v); err != nil || r.code != 0 {
		t.Fatalf("%s: tulle %q: code %d, %v: %s%s", host, args, r.code, err, r.out, r.err)
	}
	return v
}

// refused wants exit code 1 and one line with the words.
func refused(t *testing.T, r result, words ...string) {
	t.Helper()
	if missing := lacks(r.err, words...); r.code != 1 || len(missing) > 0 || strings.Count(r.err, "\n") != 1 {
		t.Errorf("code %d, lacks %q: %s%s", r.code, missing, r.out, r.err)
	}
	t.Logf("refused: %s", strings.TrimSpace(r.err))
}

// TestLeaveAndForget takes nodes out of a cluster, with and without their help.
func TestLeaveAndForget(t *testing.T) {
	t.Parallel()
	l := up(t, "leave", lab.Options{Nodes: 4, Pods: -1})
	settled(t, l)
	const cidr4, cidr6 = "10.244.0.0/16", "fd00:10:244::/48"

	refused(t, tulle(t, l, "h1", "forget", "h2"), "h2", "alive")
	refused(t, tulle(t, l, "h1", "forget", "h2", "--force"), "h2", "alive")
	refused(t, tulle(t, l, "h1", "forget", "nobody"), "nobody", "h2", "h3", "h4")

	left := ask[api.LeaveResult](t, l, "h4", "leave")
	if len(left.Transfers) < 2 {
		t.Errorf("h4 gave back %+v", left)
	}
	if r := tulle(t, l, "h4", "status"); r.code != 1 || len(lacks(r.out, "left the cluster")) > 0 {
		t.Errorf("status of a node that left: %d %s", r.code, r.out)
	}
	rest := []string{"h1", "h2", "h3"}
	hasLeft := func() {
		t.Helper()
		for _, h := range rest {
			until(t, h+" says that h4 has left", func() error {
				p, err := peerOf(new(mustStatus(t, l, h)), "h4")
				if err == nil && (p.State != api.PeerLeft || p.Path.State != api.PathOff || len(lacks(p.Reason, "it has left the cluster")) > 0 && len(lacks(p.Reason, "as after tulle leave")) > 0) {
					err = fmt.Errorf("%+v", p)
				}
				return err
			})
		}
	}
	hasLeft()
	if err := l.StopAgent(t.Context(), "h4", syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	h4, _ := l.Host("h4")
	if log, err := os.ReadFile(h4.Log); err != nil || !strings.Contains(string(log), "stopped; this node has left the cluster") || strings.Contains(string(log), "has not left") {
		t.Errorf("the log of h4 (%v):\n%s", err, log[max(0, len(log)-2000):])
	}
	owned := func() (out map[string][]netip.Prefix) {
		out = map[string][]netip.Prefix{}
		for _, h := range rest {
			out[h] = mustStatus(t, l, h).Node.Prefixes
		}
		return out
	}
	until(t, "the space of h4 is with the others", func() error {
		return errors.Join(conserved(owned(), netip.MustParsePrefix(cidr4)), conserved(owned(), netip.MustParsePrefix(cidr6)))
	})
	settled(t, l, rest...) // a node that has left is no trouble
	hasLeft()
	for _, h := range rest {
		if m := metrics(t, l, h); strings.Contains(m, `peer="h4"`) || len(lacks(m, `peer="h2"`, `tulle_members{state="left"} 1`)) > 0 && h != "h2" {
			t.Errorf("metrics of %s, after h4 has left:\n%s", h, m)
		}
	}

	if err := l.RemoveHost(t.Context(), "h3"); err != nil {
		t.Fatal(err)
	}
	rest = rest[:2]
	var forgot api.ForgetResult
	until(t, "h3 is gone", func() error {
		r := tulle(t, l, "h1", "forget", "h3", "-o", "json")
		if r.code != 0 {
			return errors.New(r.err)
		}
		return json.Unmarshal([]byte(r.out), &forgot)
	})
	for _, x := range forgot.Transfers {
		if x.From != forgot.Node || x.From.Name != "h3" || x.To.Name != "h1" {
			t.Errorf("forget: %+v", x)
		}
	}
	if len(forgot.Transfers) < 2 {
		t.Errorf("forget: %+v", forgot)
	}
	quiet(t, l, rest, cidr4, cidr6)

	// Of two nodes, one alone is no majority.
	if err := l.RemoveHost(t.Context(), "h2"); err != nil {
		t.Fatal(err)
	}
	until(t, "h2 is gone, and h1 alone does not see a majority", func() error {
		if r := tulle(t, l, "h1", "forget", "h2"); r.code != 1 || len(lacks(r.err, "majority", "--force")) > 0 {
			return fmt.Errorf("%d %s%s", r.code, r.out, r.err)
		}
		return nil
	})
	if r := tulle(t, l, "h1", "forget", "h2", "--force"); r.code != 0 {
		t.Errorf("forget --force: %+v", r)
	}
	rest = rest[:1]
	quiet(t, l, rest, cidr4, cidr6)
}

// metrics of a host's agent.
func metrics(t *testing.T, l *lab.Lab, host string) string {
	t.Helper()
	c := http.Client{Timeout: patience, Transport: &http.Transport{DialContext: func(ctx context.Context, network, address string) (net.Conn, error) {
		return l.Dial(ctx, host, network, address)
	}}}
	defer c.CloseIdleConnections()
	r, err := c.Get("http://127.0.0.1:9646/metrics")
	if err != nil {
		t.Fatal(err)
	}
	defer r.Body.Close()
	b, err := io.ReadAll(r.Body)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// TestExternal gives a prefix to a host that has no agent: a plain socket stands for its kernel's tunnel.
func TestExternal(t *testing.T) {
	t.Parallel()
	l := up(t, "ext", lab.Options{Underlay: lab.IPv4Only, Overlay: lab.IPv4Only, Nodes: 2})
	settled(t, l)
	const endpoint = "192.168.1.1" // the router
	own := mustStatus(t, l, "h1").Node.Prefixes[0]
	b := lastOf(own).As4()
	prefix := netip.PrefixFrom(netip.AddrFrom4([4]byte{b[0], b[1], b[2], 0}), 24)
	outer, err := l.ListenPacket(t.Context(), lab.Router, "udp4", endpoint+":6080")
	if err != nil {
		t.Fatal(err)
	}
	defer outer.Close()

	theirs := mustStatus(t, l, "h2").Node.Prefixes[0]
	refused(t, tulle(t, l, "h1", "external", "add", netip.PrefixFrom(lastOf(theirs), 24).Masked().String(), endpoint), "belongs to h2", "tulle ipam show")
	began := time.Now()
	e := ask[api.External](t, l, "h1", "external", "add", prefix.String(), endpoint, "--encap", "udp")
	if e.Prefix != prefix || e.Endpoint.String() != endpoint || e.Encapsulation != "udp" || e.Owner.Name != "h1" {
		t.Errorf("added %+v", e)
	}
	for _, h := range hostNames(l) {
		until(t, h+" knows the external peer", func() error {
			list := ask[[]api.External](t, l, h, "external", "list")
			if len(list) != 1 || list[0].Prefix != prefix {
				return fmt.Errorf("%+v", list)
			}
			p, err := peerOf(new(mustStatus(t, l, h)), endpoint)
			if err == nil && (p.Since.Before(began) || p.Path.Since.Before(began)) {
				t.Errorf("%s says that the external peer is there since %v, and was added at %v", h, p.Path.Since, began)
			}
			return err
		})
	}
	// Each node sends there, and takes what comes from there.
	target := prefix.Addr().Next()
	for _, pod := range pods(l) {
		until(t, pod.name+" reaches the external peer", func() error {
			return externalEcho(t, l, outer, pod, target)
		})
	}
	if r := ask[api.RouteAnswer](t, l, "h2", "route", "get", target.String()); r.Kind != api.RouteExternal || r.Endpoint.String() != endpoint+":6080" {
		t.Errorf("route: %+v", r)
	}
	ask[api.External](t, l, "h1", "external", "remove", prefix.String())
	until(t, "nobody lists it any more", func() error {
		for _, h := range hostNames(l) {
			if list := ask[[]api.External](t, l, h, "external", "list"); len(list) > 0 {
				return fmt.Errorf("%s: %+v", h, list)
			}
		}
		return nil
	})
	refused(t, tulle(t, l, "h1", "external", "remove", prefix.String()), prefix.String(), "tulle external list")

	// Halves of a prefix: the answers name what was asked for, however the table joins it.
	low, high := netip.PrefixFrom(prefix.Addr(), 25), netip.PrefixFrom(lastOf(prefix), 25).Masked()
	answers := func(word string, p netip.Prefix, more ...string) {
		t.Helper()
		args := append([]string{"external", word, p.String()}, more...)
		if e := ask[api.External](t, l, "h1", args...); e.Prefix != p || e.Endpoint.String() != endpoint {
			t.Errorf("%q: %+v", args, e)
		}
	}
	answers("add", low, endpoint)
	answers("add", high, endpoint)
	answers("add", low, endpoint) // again
	answers("remove", high)
	if list := ask[[]api.External](t, l, "h1", "external", "list"); len(list) != 1 || list[0].Prefix != low {
		t.Errorf("after %v was removed: %+v", high, list)
	}
	refused(t, tulle(t, l, "h1", "external", "remove", prefix.String()), "only a part of "+prefix.String(), low.String())
	const other = "192.168.1.200"
	answers("remove", low)
	answers("add", low, endpoint)
	if r := tulle(t, l, "h1", "external", "add", high.String(), other); r.code != 0 || !strings.Contains(r.out, "added "+high.String()+" at "+other) {
		t.Errorf("another peer: %+v", r)
	}
	refused(t, tulle(t, l, "h1", "external", "remove", prefix.String()), "several external peers", low.String()+" ("+endpoint+")", high.String()+" ("+other+")")
	answers("remove", low)
	if r := tulle(t, l, "h1", "external", "remove", high.String()); r.code != 0 || !strings.Contains(r.out, "removed "+high.String()+" at "+other) {
		t.Errorf("another peer: %+v", r)
	}
	settled(t, l)
}

// externalEcho sends a datagram from a pod and plays the far end's part: it unwraps the packet, and sends one back.
func externalEcho(t *testing.T, l *lab.Lab, outer net.PacketConn, pod station, target netip.Addr) error {
	t.Helper()
	c, err := l.Dial(t.Context(), pod.name, "udp", netip.AddrPortFrom(target, 4000).String())
	if err != nil {
		return err
	}
	defer c.Close()
	if _, err := c.Write([]byte("ping " + pod.name)); err != nil {
		return err
	}
	buf := make([]byte, 2048)
	if err := outer.SetReadDeadline(soon()); err != nil {
		return err
	}
	port := netip.MustParseAddrPort(c.LocalAddr().String()).Port()
	var inner []byte
	var from net.Addr
	for mine := false; !mine; { // what an earlier attempt sent may come late
		var n int
		if n, from, err = outer.ReadFrom(buf); err != nil {
			return err
		}
		var d encap.Drop
		if inner, d = encap.UnwrapUDP(buf[:n]); d != encap.DropNone || len(inner) < 28 {
			return fmt.Errorf("drop %v, inner packet %x", d, inner)
		}
		mine = binary.BigEndian.Uint16(inner[20:]) == port
	}
	if string(inner[28:]) != "ping "+pod.name {
		return fmt.Errorf("inner packet %x", inner)
	}
	// Back: addresses and ports change places, which no checksum minds.
	back := slices.Clone(inner)
	copy(back[12:16], inner[16:20])
	copy(back[16:20], inner[12:16])
	copy(back[20:22], inner[22:24])
	copy(back[22:24], inner[20:22])
	if _, err := outer.WriteTo(back, &net.UDPAddr{IP: from.(*net.UDPAddr).IP, Port: 6080}); err != nil {
		return err
	}
	if err := c.SetReadDeadline(soon()); err != nil {
		return err
	}
	n, err := c.Read(buf)
	if err == nil && string(buf[:n]) != "ping "+pod.name {
		err = fmt.Errorf("got %q", buf[:n])
	}
	return err
}

// TestAddresses is about single addresses: what leaks, fixed blocks, and a cluster that is full.
func TestAddresses(t *testing.T) {
	t.Parallel()
	l := up(t, "ipam", lab.Options{Bare: true, Nodes: 3, Subnets: 1, Pods: -1, Underlay: lab.IPv4Only})
	hosts := l.Hosts()
	first := newStray(t, "--node-name", "h1", "--bootstrap", "--cluster-cidr", "10.77.0.0/25", "--node-prefix-len", "28")
	first.start(t, l, "h1")
	first.ready(t)
	join := []string{"--join", hosts[0].Underlay[0].String()}
	fixed := newStray(t, append(join, "--node-name", "h2", "--pod-cidr", "10.77.0.112/28")...)
	fixed.start(t, l, "h2")
	st := fixed.ready(t)
	if want := []netip.Prefix{netip.MustParsePrefix("10.77.0.112/28")}; !slices.Equal(st.Node.Prefixes, want) || len(st.Node.Blocks) != 1 {
		t.Errorf("--pod-cidr: owns %v, blocks %v, want %v", st.Node.Prefixes, st.Node.Blocks, want)
	}
	cli := func(s *stray, args ...string) result {
		t.Helper()
		return run(t, newCommand(t, append(args, "--socket", s.socket)...))
	}
	// A pod whose namespace is gone.
	c := api.NewClient(first.socket)
	space := filepath.Join(t.TempDir(), "netns")
	write(t, space, "", 0o600)
	a, err := c.Allocate(t.Context(), api.AllocateRequest{ID: "leaky", Netns: space})
	if err != nil {
		t.Fatal(err)
	}
	addr := a.Addresses[0].Address
	if r := cli(first, "ipam", "check"); r.code != 0 {
		t.Errorf("check of a pod that lives: %+v", r)
	}
	if err := os.Remove(space); err != nil {
		t.Fatal(err)
	}
	// It is younger than a pod's setup may take, so it is no leak yet, and cannot be released.
	if r := cli(first, "ipam", "check"); r.code != 0 {
		t.Errorf("check of a pod that is being set up: %+v", r)
	}
	if r := cli(first, "ipam", "release", addr.String()); r.code != 1 || len(lacks(r.out+r.err, addr.String(), "too young")) > 0 {
		t.Errorf("release of a pod that is being set up: %+v", r)
	}

	// Requested addresses.
	want := addr.Next().Next()
	got, err := c.Allocate(t.Context(), api.AllocateRequest{ID: "wanted", Requested: []netip.Addr{want}})
	if err != nil || got.Addresses[0].Address != want {
		t.Errorf("requested %v: %+v, %v", want, got, err)
	}
	if _, err := c.Allocate(t.Context(), api.AllocateRequest{ID: "too late", Requested: []netip.Addr{want}}); err == nil || len(lacks(err.Error(), want.String())) > 0 {
		t.Errorf("requested twice: %v", err)
	}
	if _, err := c.Allocate(t.Context(), api.AllocateRequest{ID: "outside", Requested: []netip.Addr{netip.MustParseAddr("192.0.2.1")}}); err == nil || len(lacks(err.Error(), "192.0.2.1", "10.77.0.0/25")) > 0 {
		t.Errorf("requested outside: %v", err)
	}

	// All of it is used up. Owners have names as soon as gossip has told them.
	until(t, "h1 knows the name of h2", func() error {
		st, err := c.Status(t.Context())
		if err == nil && !slices.ContainsFunc(st.Peers, func(p api.Peer) bool { return p.Name == "h2" }) {
			err = fmt.Errorf("it has the peers %+v", st.Peers)
		}
		return err
	})
	var full error
	for i := 0; full == nil && i < 200; i++ {
		until(t, "an answer", func() error {
			_, err := c.Allocate(t.Context(), api.AllocateRequest{ID: fmt.Sprint("filler-", i)})
			if err != nil && len(lacks(err.Error(), "owns")) > 0 {
				return err
			}
			full = err
			return nil
		})
	}
	if full == nil || len(lacks(full.Error(), "10.77.0.0/25", "h1", "h2", "owns")) > 0 {
		t.Errorf("a full cluster: %v", full)
	}
	t.Logf("full: %v", full)
	late := newStray(t, append(join, "--node-name", "h3")...)
	late.start(t, l, "h3")
	late.says(t, "no pod addresses", "10.77.0.0/25", "h1", "owns")

	// Once it is old enough, the leaked address is found, and released; it rests before anybody gets it again.
	untilWithin(t, 2*patience, "the leak is found", func() error {
		if r := cli(first, "ipam", "check"); r.code != 1 || len(lacks(r.out+r.err, addr.String(), "leaky")) > 0 {
			return fmt.Errorf("%+v", r)
		}
		return nil
	})
	// Meanwhile h3, which has no pod addresses, has probed nobody, and blames no firewall.
	const unprobed = "this node has no pod addresses yet, so nothing is probed"
	if st, err := api.NewClient(late.socket).Status(t.Context()); err != nil || len(st.Peers) != 2 {
		t.Errorf("h3 has the peers %+v, %v", st.Peers, err)
	} else {
		for _, p := range st.Peers {
			if p.Path.State != api.PathProbing || p.Path.Reason != unprobed || p.Path.Loss != 0 {
				t.Errorf("h3 to %s: %+v", p.Name, p.Path)
			}
		}
		for _, p := range st.Problems {
			if strings.Contains(p.What, "not answered") {
				t.Errorf("h3: %s → %s", p.What, p.Remedy)
			}
		}
	}
	if r := cli(late, "ping", "h1"); r.code != 1 || len(lacks(r.out, api.PathOff, unprobed)) > 0 || strings.Contains(r.out, "3 of 3") {
		t.Errorf("ping of a host without pod addresses: %+v", r)
	}
	if r := cli(first, "ipam", "release", addr.String()); r.code != 0 || len(lacks(r.out, addr.String())) > 0 {
		t.Errorf("release of a leak: %+v", r)
	}
	if r := cli(first, "ipam", "show"); r.code != 0 || len(lacks(r.out, addr.String(), api.AllocationCooling)) > 0 {
		t.Errorf("a released address rests: %+v", r)
	}
	if _, err := c.Allocate(t.Context(), api.AllocateRequest{ID: "hasty", Requested: []netip.Addr{addr}}); err == nil || len(lacks(err.Error(), addr.String())) > 0 {
		t.Errorf("an address that rests: %v", err)
	}
}
