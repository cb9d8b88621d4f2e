package agent

import (
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/tulle-net/tulle/internal/api"
	"github.com/tulle-net/tulle/internal/cni/conflist"
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
}
