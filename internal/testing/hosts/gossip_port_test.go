package hosts_test

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/tulle-net/tulle/internal/api"
	"github.com/tulle-net/tulle/internal/testing/hosts"
)

// A firewall blocks the gossip port of one host, and its best encapsulation, while the next one works. The agents of the others
// restart: they know the host only from before, and still probe it, use the encapsulation that works, and refuse to forget it.
func TestGossipPortBlockedOverARestart(t *testing.T) {
	t.Parallel()
	hs, agents := subnet(t, 3, "--paths", "udp,vxlan")
	for _, a := range agents[:2] {
		hosts.Within(t, 20*time.Second, a.Host.Name+" reaches c", func() error { return goes(a, "c", "udp") })
	}
	pa, pc := agents[0].Pod("pa"), agents[2].Pod("pc")
	hs[2].Run("nft", "add table inet t; add chain inet t c { type filter hook input priority -300; }; add chain inet t o { type filter hook output priority -300; }; "+
		"add rule inet t c th dport { 7946, 6080 } drop; add rule inet t c th sport 7946 drop; add rule inet t o th dport 7946 drop")
	dead := func(a *hosts.Agent) error {
		p, err := peerOf(a, "c")
		if err == nil && p.State != api.PeerDead {
			err = fmt.Errorf("c is %s for %s", p.State, a.Host.Name)
		}
		if err == nil {
			err = goes(a, "c", "vxlan")
		}
		return err
	}
	for i, a := range agents[:2] {
		hosts.Within(t, 40*time.Second, "gossip has lost c, and its tunnel works", func() error { return dead(a) })
		a.Stop()
		agents[i] = hs[i].Agent("--join", "10.0.1.11,10.0.1.12", "--paths", "udp,vxlan")
	}
	for _, a := range agents[:2] {
		a.Ready(20 * time.Second)
		hosts.Within(t, 20*time.Second, "c is probed after the restart", func() error { return dead(a) })
	}
	hosts.Within(t, 10*time.Second, "c is as it was", func() error {
		p, err := peerOf(agents[0], "c")
		if err == nil && (p.Version == "" || p.Reason == "") {
			err = fmt.Errorf("%+v", p)
		}
		return err
	})
	if out, errs, code := agents[0].Tulle("forget", "c"); code == 0 || !strings.Contains(errs, "the tunnel from a to c ") {
		t.Errorf("c is forgotten, with exit code %d: %s%s", code, out, errs)
	}
	hosts.Within(t, 20*time.Second, "pods reach each other", func() error { return pa.Ping(pc.IPv4()) })

	// Once the host is really gone, it is given up like any other, and can be forgotten.
	agents[2].Kill()
	hosts.Within(t, 40*time.Second, "c is given up", func() error {
		p, err := peerOf(agents[0], "c")
		if err == nil && !strings.Contains(p.Reason, "both lost it") {
			err = fmt.Errorf("%s: %s", p.State, p.Reason)
		}
		return err
	})
	hosts.Within(t, 20*time.Second, "c is forgotten", func() error {
		if _, errs, code := agents[0].Tulle("forget", "c"); code != 0 {
			return fmt.Errorf("%d: %s", code, errs)
		}
		return nil
	})
	hosts.Within(t, 20*time.Second, "c is not listed any more", func() error {
		for _, a := range agents[:2] {
			if p, err := peerOf(a, "c"); err == nil {
				return fmt.Errorf("%s lists it: %+v", a.Host.Name, p)
			}
		}
		return nil
	})
}
