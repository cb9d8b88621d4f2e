package agent

import (
	"context"
	"errors"
	"log/slog"
	"maps"
	"net/netip"
	"path/filepath"
	"testing"
	"time"

	"github.com/vishvananda/netlink"

	"github.com/tulle-net/tulle/internal/api"
	"github.com/tulle-net/tulle/internal/config"
	"github.com/tulle-net/tulle/internal/ownership"
	"github.com/tulle-net/tulle/internal/podnet"
	"github.com/tulle-net/tulle/internal/sys"
	"github.com/tulle-net/tulle/internal/testing/namespace"
	"github.com/tulle-net/tulle/ipam"
	"github.com/tulle-net/tulle/membership"
)

// alone is the world of a node that has no other, with a disk that may be full.
type alone struct {
	full bool
	disk *ipam.State
}

func (e *alone) Persist(st *ipam.State) error {
	if e.full {
		return errors.New("no space left on device")
	}
	e.disk = st
	return nil
}
func (*alone) Send(membership.NodeID, []byte)          {}
func (*alone) Broadcast([]byte)                        {}
func (*alone) Members() []ownership.Member             { return nil }
func (*alone) Seeds() ownership.Seeds                  { return ownership.Seeds{Tried: true} }
func (*alone) TunnelAnswers(id membership.NodeID) bool { return false }

// newLone makes a session of a node that is a cluster by itself: its address space, and nothing else.
func newLone(t *testing.T, cidrs ...string) (*session, *alone) {
	t.Helper()
	s, env := &session{log: slog.New(slog.DiscardHandler)}, new(alone)
	s.cfg = config.Config{Socket: filepath.Join(t.TempDir(), "tulle.sock"), Tun: "tun0"}
	for _, c := range cidrs {
		s.cfg.ClusterCIDRs = append(s.cfg.ClusterCIDRs, netip.MustParsePrefix(c))
	}
	m, err := ownership.New(time.Now(), ownership.Config{ID: membership.NewNodeID(), Name: "one", Bootstrap: true, CIDRs: s.cfg.ClusterCIDRs}, nil, env)
	if err != nil {
		t.Fatal(err)
	}
	if m.Tick(time.Now()); m.Phase() != ownership.Ready {
		t.Fatal(m.Status(time.Now()))
	}
	s.ownership = m
	return s, env
}

// allocated is how many addresses each key has.
func allocated(s *session) map[string]int {
	out := map[string]int{}
	for _, l := range s.ownership.Allocations() {
		out[l.Key]++
	}
	return out
}

// A record frees what was there when it was made, not what its container gets when it comes back.
func TestRecordIsHonouredOnce(t *testing.T) {
	s, _ := newLone(t, "10.244.0.0/16")
	give := func() {
		t.Helper()
		if _, err := s.ownership.Allocate(time.Now(), ownership.PodRequest{Key: "web"}); err != nil {
			t.Fatal(err)
		}
	}
	give()
	if recorded, err := api.NewClient(s.cfg.Socket).FreeOrRecord(t.Context(), "web"); !recorded || err != nil {
		t.Fatal(recorded, err)
	}
	ids, err := api.Freed(s.cfg.Socket)
	if err != nil || len(ids) != 1 {
		t.Fatal(ids, err)
	}
	if err := s.honour("web"); err != nil || len(allocated(s)) > 0 { // as Allocate does
		t.Fatal(allocated(s), err)
	}
	give()
	for _, id := range ids { // the rest of a look at all records that began earlier
		if err := s.honour(id); err != nil {
			t.Fatal(err)
		}
	}
	if allocated(s)["web"] != 1 {
		t.Errorf("the container that is back has lost its address: %v", allocated(s))
	}
}

// onHost gives the session a host that has a pod with these addresses, with the ID web, and somebody else's route to 10.244.0.9.
func onHost(t *testing.T, s *session, addrs ...string) *namespace.Namespace {
	t.Helper()
	host, pod := namespace.New(t), namespace.New(t)
	var err error
	if s.pods, err = podnet.Open(host.Path()); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.pods.Close() })
	c := podnet.Config{ID: "web", Netns: pod.Path(), Interface: "eth0", MTU: 1400}
	for _, a := range addrs {
		c.Addresses = append(c.Addresses, netip.MustParseAddr(a))
	}
	if _, err := s.pods.Add(t.Context(), c); err != nil {
		t.Fatal(err)
	}
	host.Netlink(func(nl *sys.Netlink) error {
		if err := nl.LinkAdd(&netlink.Bridge{LinkAttrs: sys.LinkAttrs("other")}); err != nil {
			return err
		}
		link, err := nl.LinkUp("other")
		if err != nil {
			return err
		}
		return nl.RouteReplace(&netlink.Route{LinkIndex: link.Attrs().Index, Dst: sys.IPNet(sys.HostPrefix(netip.MustParseAddr("10.244.0.9")))})
	})
	return host
}

// A full disk ends no start: pods that are found stay out of use, and those that are gone are released when there is space again.
func TestStockOnFullDisk(t *testing.T) {
	s, env := newLone(t, "10.244.0.0/16")
	host := onHost(t, s, "10.244.0.8")
	old := time.Now().Add(-2 * leakGrace)
	for key, at := range map[string]time.Time{"gone": old, "young": time.Now(), "recorded": old} {
		r := ownership.PodRequest{Key: key, Netns: "/run/netns/tulle-test-none"}
		if _, err := s.ownership.Allocate(at, r); err != nil {
			t.Fatal(err)
		}
	}
	// A pod that has lost its route to somebody, and whose namespace has lost its name.
	if _, err := s.ownership.Allocate(old, ownership.PodRequest{Key: "web", Netns: "/run/netns/tulle-test-none", Want: []netip.Addr{netip.MustParseAddr("10.244.0.8")}}); err != nil {
		t.Fatal(err)
	}
	host.Netlink(func(nl *sys.Netlink) error {
		return nl.RouteDel(&netlink.Route{Dst: sys.IPNet(netip.MustParsePrefix("10.244.0.8/32"))})
	})
	if recorded, err := api.NewClient(s.cfg.Socket).FreeOrRecord(context.Background(), "recorded"); !recorded || err != nil {
		t.Fatal(recorded, err)
	}
	env.full = true
	host.Do(func() error { return s.takeStock(false) })
	if want := map[string]int{"gone": 1, "young": 1, "recorded": 1, "web": 1, "found 10.244.0.9": 1}; !maps.Equal(allocated(s), want) {
		t.Errorf("with a full disk: %v, want %v", allocated(s), want)
	}
	env.full = false
	if s.ownership.Tick(time.Now()); len(env.disk.Allocations) != 5 {
		t.Errorf("the disk has %v", env.disk.Allocations)
	}
	host.Do(func() error { s.releaseGone(); return nil })
	if want := map[string]int{"young": 1, "web": 1, "found 10.244.0.9": 1}; !maps.Equal(allocated(s), want) {
		t.Errorf("with space on the disk: %v, want %v", allocated(s), want)
	}
}

// A pod that this program has wired is gone with its link, also where the path of its namespace is there: after a reboot /proc/PID is another
// process. A pod that others wire may have no link that this program knows.
func TestNamespaceOfAnother(t *testing.T) {
	s, _ := newLone(t, "10.244.0.0/16")
	host := onHost(t, s, "10.244.0.8")
	allocate := func(key string, age time.Duration, want ...netip.Addr) {
		t.Helper()
		r := ownership.PodRequest{Key: key, Netns: "/proc/self/ns/net", Want: want}
		if _, err := s.ownership.Allocate(time.Now().Add(-age), r); err != nil {
			t.Fatal(err)
		}
	}
	const old, late = wiring + time.Second, leakGrace + time.Second // an ADD that takes long
	allocate("web", old, netip.MustParseAddr("10.244.0.8"))
	for _, engine := range []string{api.EngineCNI, api.EnginePodman, api.EngineTulle} {
		allocate(engine+"/tulle/gone/eth0", old)
		allocate(engine+"/tulle/young/eth0", late)
	}
	allocate("others", old)
	allocate("cni/tulle/routed/eth0", old, netip.MustParseAddr("10.244.0.9"))
	host.Do(func() error {
		live, err := s.live()
		if leaked := s.ownership.Check(time.Now(), live, leakGrace); len(leaked) != 3 {
			t.Errorf("leaked: %v", leaked)
		}
		s.releaseGone()
		return err
	})
	want := map[string]int{
		"web": 1, "others": 1, "cni/tulle/routed/eth0": 1, "cni/tulle/young/eth0": 1, "podman/tulle/young/eth0": 1, "tulle/tulle/young/eth0": 1,
	}
	if !maps.Equal(allocated(s), want) {
		t.Errorf("left are %v, want %v", allocated(s), want)
	}
}

// Pods that an older state does not know, or knows with another address, keep their addresses out of use, under the ID that
// their engine frees them by.
func TestStockKeepsIDs(t *testing.T) {
	for _, c := range []struct {
		what string
		had  string // the pod's address in the state
		want map[string]int
	}{
		{"a lost state", "", map[string]int{"web": 2, "found 10.244.0.9": 1}},
		{"an older state", "10.244.0.7", map[string]int{"web": 2, "found 10.244.0.8": 1, "found 10.244.0.9": 1}},
	} {
		s, _ := newLone(t, "10.244.0.0/16", "fd00:244::/48")
		host := onHost(t, s, "10.244.0.8", "fd00:244::8")
		if c.had != "" {
			had := ipam.Allocation{Addr: netip.MustParseAddr(c.had), Key: "web"}
			if _, err := s.ownership.Adopt(time.Now(), []ipam.Allocation{had}); err != nil {
				t.Fatal(err)
			}
		}
		host.Do(func() error { return s.takeStock(false) })
		if !maps.Equal(allocated(s), c.want) {
			t.Errorf("%s: %v, want %v", c.what, allocated(s), c.want)
		}
	}
}
