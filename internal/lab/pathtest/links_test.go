package pathtest

import (
	"testing"
	"time"

	"github.com/tulle-net/tulle/internal/testing/hosts"
)

// TestFlappingLink takes the carrier from a host's only link again and again, each time for less than a path needs to be
// given up. Nothing is switched, and no more pings are lost than were sent while the link was down and until the hosts'
// neighbour tables are mended.
func TestFlappingLink(t *testing.T) {
	t.Parallel()
	const (
		flaps = 5
		each  = 500 * time.Millisecond // without carrier
		mends = 400 * time.Millisecond // until packets pass again, on a busy machine
	)
	s := newStage(t, "udp,ipip", 1500, 1500)
	s.uses(t, 20*time.Second, "udp")
	x := s.transfer(t)
	x.progress(t, 10*time.Second)
	before, err := path(s.first)
	if err != nil {
		t.Fatal(err)
	}
	ping := s.pod.Stream(s.other.IPv4(), 10*time.Millisecond)
	var down, allMends time.Duration
	for flap := 1; flap <= flaps; flap++ {
		began := time.Now()
		s.router.IP("link set toa down")
		<-time.After(each)
		s.router.IP("link set toa up")
		took := time.Since(began)
		down, allMends = down+each, allMends+mends // what took longer, the stream's meter has seen
		x.progress(t, 10*time.Second)
		if took > 2*time.Second { // on a machine that stood still: in that time the path may rightly be given up
			s.uses(t, 20*time.Second, "udp")
			if before, err = path(s.first); err != nil {
				t.Fatal(err)
			}
			flap = 0
		}
	}
	sent, lost := ping.Stop()
	t.Logf("%d of %d pings lost, the link was down for %v, the transfer stood still for %v", lost, sent, down.Round(time.Millisecond), x.stop(t).Round(time.Millisecond))
	if most := ping.Most(down + allMends); lost == 0 || lost > most {
		t.Errorf("%d pings lost, want 1 to %d", lost, most)
	}
	for _, ag := range []*hosts.Agent{s.first, s.second} {
		if p, err := path(ag); err != nil || p.Mode != "udp" || !p.Since.Equal(before.Since) && ag == s.first {
			t.Errorf("%s: the path has changed from %+v to %+v (%v)", ag.Host.Name, before, p, err)
		}
	}
}

// TestAsymmetricPath has another router for each direction, one of which has a smaller MTU. Each host finds the path MTU of
// its own direction; what one router filters concerns both directions' choice, since an answer is part of a probe.
func TestAsymmetricPath(t *testing.T) {
	t.Parallel()
	n := hosts.New(t)
	s := &stage{net: n, a: n.Host("a"), b: n.Host("b"), router: n.Host("r")}
	back := n.Host("q")
	left, right := n.SwitchNamed("left", 1500), n.SwitchNamed("right", 1500)
	s.a.Plug(left, "eth0", addrA+"/24")
	s.b.Plug(right, "eth0", addrB+"/24")
	s.router.Plug(left, "toa", "10.0.1.1/24")
	s.router.Plug(right, "tob", "10.0.2.1/24")
	back.Plug(left, "toa", "10.0.1.2/24")
	back.Plug(right, "tob", "10.0.2.2/24")
	back.IP("link set toa mtu 1400")
	for _, r := range []*hosts.Host{s.router, back} {
		r.Sysctl("net.ipv4.ip_forward", "1")
		r.Sysctl("net.ipv4.conf.all.send_redirects", "0")
	}
	s.a.IP("route add default via 10.0.1.1")
	s.b.IP("route add default via 10.0.2.2")
	s.start(t, "udp,ipip")
	mtus := func(limit time.Duration, mode string, toB, toA int) {
		t.Helper()
		s.uses(t, limit, mode)
		finds(t, limit, s.first, toB)
		finds(t, limit, s.second, toA)
	}
	mtus(20*time.Second, "udp", 1472, 1372)
	x := s.transfer(t)
	x.progress(t, 10*time.Second)
	ping := s.pod.Stream(s.other.IPv4(), 10*time.Millisecond)
	back.Run("nft", "table ip filter { chain forward { type filter hook forward priority 0; udp dport 6080 drop; }; }")
	mtus(15*time.Second, "ipip", 1472, 1380) // the first is that of the TUN
	x.progress(t, 10*time.Second)
	sent, lost := ping.Stop()
	t.Logf("%d of %d pings lost, the transfer stood still for %v", lost, sent, x.stop(t).Round(time.Millisecond))
	if most := ping.Most(failover); lost == 0 || lost > most {
		t.Errorf("%d pings lost, want 1 to %d", lost, most)
	}
}
