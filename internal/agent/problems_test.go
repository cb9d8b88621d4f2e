package agent

import (
	"context"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tulle-net/tulle/internal/api"
	"github.com/tulle-net/tulle/internal/cni/conflist"
	"github.com/tulle-net/tulle/internal/hostnet"
	"github.com/tulle-net/tulle/internal/ownership"
	"github.com/tulle-net/tulle/ipam"
	"github.com/tulle-net/tulle/tunnel"
	"github.com/tulle-net/tulle/tunnel/encap"
	"github.com/tulle-net/tulle/tunnel/path"
)

// The devices whose reverse path filters count: by which the tunnel's packets arrive, and those of pods that come by the bare
// underlay, which IPv6 pods' do not pass.
func TestAsymmetric(t *testing.T) {
	for _, tc := range []struct {
		name   string
		tun    string
		byHost bool // the peer's pods take the tunnel to hosts
		leaves []string
		want   []string
	}{
		{"by the underlay's device", "10.244.0.0", true, []string{"eth1"}, nil},
		{"by another device", "10.244.0.0", true, []string{"eth0"}, []string{"eth1"}},
		{"by another device, IPv6 pods", "fd00:244::", true, []string{"eth0"}, []string{"eth1"}},
		{"pods by the bare underlay", "10.244.0.0", false, []string{"eth1"}, []string{"eth1", "eth2"}},
		{"IPv6 pods by the bare underlay", "fd00:244::", false, []string{"eth1"}, nil},
	} {
		s := &session{}
		s.link.Iface = "eth1"
		s.sizes.Store(&sizes{links: []string{"eth1", "eth2"}})
		p := testPeer(1, "a", api.PeerAlive, "192.0.2.1")
		p.host, p.leaves = tc.byHost, tc.leaves
		v := &view{tun: []netip.Addr{netip.MustParseAddr(tc.tun)}, peers: []peerView{p}}
		if got := s.asymmetric(v); !slices.Equal(got, tc.want) {
			t.Errorf("%s: %v, want %v", tc.name, got, tc.want)
		}
	}
}

// What keeps the network from container engines comes with its remedy.
func TestCNIProblem(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "net.d")
	p := conflist.Publisher{Dir: dir}
	err := p.Set(t.Context(), true, false)
	if got := cniProblem(err, dir); !strings.Contains(got.What, dir+": there is no such directory") || got.Command != "mkdir -p "+dir || !strings.Contains(got.Remedy, "restart") {
		t.Errorf("no directory: %+v", got)
	}
	if got := cniProblem(&os.PathError{Op: "open", Path: dir, Err: unix.EROFS}, dir); !strings.Contains(got.Remedy, "restart") || !strings.Contains(got.Remedy, "ReadWritePaths="+dir) {
		t.Errorf("a directory that came after the start: %+v", got)
	}
}

// Of two members with one name, a problem says which it is about.
func TestProblemsOfTwins(t *testing.T) {
	s := &session{}
	s.probes = newProber(slog.New(slog.DiscardHandler))
	s.link.Addrs = []netip.Addr{netip.MustParseAddr("192.0.2.9")}
	a, b := testPeer(1, "h2", api.PeerDead, "192.0.2.1"), testPeer(2, "h2", api.PeerAlive, "192.0.2.2")
	a.probed, a.path.Up = true, true
	b.probed, b.path.Probed = true, 3
	v := &view{peers: []peerView{a, b}}
	s.view.Store(v)
	for i, want := range []string{"h2 (01010101) is lost for gossip", "h2 (02020202) is alive for gossip"} {
		if p, found := s.peerProblem(v, &v.peers[i]); !found || !strings.HasPrefix(p.What, want) {
			t.Errorf("%q, want %q", p.What, want)
		}
	}
	v.peers[0].otherKey = true // no firewall is to blame
	if p, _ := s.peerProblem(v, &v.peers[0]); !strings.Contains(p.What, "different gossip keys") || !strings.Contains(p.Remedy, "copy the key file") {
		t.Errorf("of a member with another key: %+v", p)
	}
}

// A member to which no route leads is no matter of firewalls, unless this host's own link is down.
func TestProblemOfNoRoute(t *testing.T) {
	s := &session{}
	s.probes = newProber(slog.New(slog.DiscardHandler))
	s.link.Addrs = []netip.Addr{netip.MustParseAddr("192.0.2.9")}
	p := testPeer(1, "h2", api.PeerSuspect, "198.51.100.1")
	p.unrouted = true
	v := &view{peers: []peerView{p}}
	s.view.Store(v)
	got, found := s.peerProblem(v, &v.peers[0])
	if want := "no route of this host leads to h2 at 198.51.100.1"; !found || got.What != want {
		t.Errorf("%q, want %q", got.What, want)
	}
	s.kept.Store(&hostnet.Kept{Down: "eth0 has no carrier"})
	if got, found := s.peerProblem(v, &v.peers[0]); found {
		t.Errorf("while the link is down: %q", got.What)
	}
}

// With nothing but direct paths, one family may be answered and the other not.
func TestProblemOfOneDirectFamily(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := &session{}
		s.link.Addrs = []netip.Addr{netip.MustParseAddr("192.0.2.9"), netip.MustParseAddr("2001:db8::9")}
		s.prefer.Store(&preference{modes: []encap.Mode{encap.Direct}})
		s.sizes.Store(&sizes{})
		p := testPeer(1, "h2", api.PeerAlive, "192.0.2.1", "10.244.1.0/24", "fd00:244:0:1::/64")
		p.mode = encap.Direct
		p.direct[0].via, p.direct[1].via = netip.MustParseAddr("192.0.2.1"), netip.MustParseAddr("2001:db8::1")
		v := &view{peers: []peerView{p}}
		v.status.Params.Families = []ipam.Family{{CIDR: netip.MustParsePrefix("10.244.0.0/16")}, {CIDR: netip.MustParsePrefix("fd00:244::/48")}}
		s.view.Store(v)

		s.probes = newProber(slog.New(slog.DiscardHandler))
		s.probes.traffic = func(string) tunnel.PeerStats { return tunnel.PeerStats{} }
		s.probes.train = func(string, encap.Mode, []tunnel.ProbePacket, bool) error { return nil }
		var answers sync.WaitGroup
		s.probes.send = func(peer string, mode encap.Mode, six bool, payload []byte, size int) error {
			if _, nonce, _, ok := parseProbe(payload); ok && mode == encap.Direct {
				answers.Go(func() { s.probes.received(peer, mode, six, appendProbe(nil, probeReply, nonce, size), 0) })
			}
			return nil
		}
		s.probes.setPeers(time.Now(), map[string][]path.Candidate{p.id: {{Mode: encap.Direct, Max: 1500}, {Mode: encap.Direct6, Max: 1500}}})
		ctx, cancel := context.WithCancel(t.Context())
		answers.Go(func() { _ = s.probes.run(ctx) })
		time.Sleep(10 * time.Second)
		synctest.Wait() // for what happens at this very instant
		v.peers[0].path, v.peers[0].probed = s.probes.info(p.id, encap.Direct)
		got, found := s.peerProblem(v, &v.peers[0])
		for _, want := range []string{"h2 is alive for gossip, but direct packets to it are not answered", "no answer yet"} {
			if !strings.Contains(got.What, want) {
				t.Errorf("%q, want %q", got.What, want)
			}
		}
		if want := "let packets between IPv6 addresses of pods pass from 2001:db8::9 to 2001:db8::1"; !found || !strings.Contains(got.Remedy, want) {
			t.Errorf("%q, want %q", got.Remedy, want)
		}
		cancel()
		answers.Wait()
	})
}

// Whoever forgot to mount the state directory has to hear of that before pods are restarted for nothing.
func TestStateLostRemedy(t *testing.T) {
	stranded := ownership.Problem{What: "2 pods of this node have addresses that belong to others now", Remedy: "restart them", Topic: "stranded"}
	for _, tc := range []struct {
		p    ownership.Problem
		lost bool
		want bool
	}{{stranded, true, true}, {stranded, false, false}, {ownership.Problem{Remedy: "wait", Topic: "full"}, true, false}} {
		got := stateLostRemedy(tc.p, tc.lost, "/var/lib/tulle")
		if strings.Contains(got, "no state in /var/lib/tulle") != tc.want || !strings.HasSuffix(got, tc.p.Remedy) {
			t.Errorf("%s, state lost %v: %s", tc.p.Topic, tc.lost, got)
		}
	}
}
