package agent

import (
	"errors"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/tulle-net/tulle/internal/config"
	"github.com/tulle-net/tulle/internal/hostnet"
	"github.com/tulle-net/tulle/membership/seed"
)

func addrs(texts ...string) []netip.Addr {
	var out []netip.Addr
	for _, s := range texts {
		out = append(out, netip.MustParseAddr(s))
	}
	return out
}

// The underlay in use stays for whatever comes, and gives way for a reason that is named.
func TestLetGo(t *testing.T) {
	under := func(by hostnet.Basis, texts ...string) hostnet.Underlay {
		return hostnet.Underlay{Iface: "eth0", MTU: 1500, Addrs: addrs(texts...), By: by, Why: "reason"}
	}
	guess, seeds, peers := hostnet.ByGuess, hostnet.BySeeds, hostnet.ByPeers
	for _, c := range []struct {
		name                string
		use                 hostnet.Underlay
		kept                hostnet.Kept // Underlay is filled in
		next                hostnet.Underlay
		lost, alone, wanted bool
		again               bool
		want                string // part of the reason; "" to keep it
	}{
		{name: "at rest", use: under(guess, "10.0.1.11"), next: under(guess, "10.0.1.11")},
		{name: "a better default route, or a virtual address", use: under(guess, "10.0.1.11"), next: under(guess, "192.0.2.11")},
		{name: "the same, on the node that is alone", use: under(guess, "10.0.1.11"), next: under(guess, "192.0.2.11"), alone: true},
		{name: "the route to the seeds leads elsewhere", use: under(seeds, "10.0.1.11"), next: under(seeds, "192.0.2.11")},
		{name: "the same, on the node that is alone: a name that was wrong", use: under(seeds, "192.0.2.11"), next: under(seeds, "10.0.1.11"), alone: true, want: "no other member is in sight from 192.0.2.11; 10.0.1.11 on eth0"},
		{name: "the same, with members from before", use: under(peers, "192.0.2.11"), next: under(seeds, "10.0.1.11"), alone: true, want: "no other member is in sight"},
		{name: "a route leads to the members again", use: under(guess, "192.0.2.11"), next: under(peers, "10.0.1.11"), alone: true, want: "no other member is in sight"},
		{name: "the same, but members are in sight", use: under(guess, "192.0.2.11"), next: under(peers, "10.0.1.11")},
		{name: "the operator has named the address", use: under(hostnet.ByOperator, "192.0.2.11"), next: under(seeds, "10.0.1.11"), alone: true},
		{name: "an address is gone for a moment", use: under(seeds, "10.0.1.11"), kept: hostnet.Kept{Lost: addrs("10.0.1.11")}, next: under(seeds, "10.0.1.12")},
		{name: "an address is gone for good", use: under(seeds, "10.0.1.11"), kept: hostnet.Kept{Lost: addrs("10.0.1.11")}, next: under(seeds, "10.0.1.12"), lost: true,
			want: "this host has lost 10.0.1.11; 10.0.1.12 on eth0 takes over"},
		{name: "one of two addresses is gone for good", use: under(seeds, "10.0.1.11", "2001:db8::11"), kept: hostnet.Kept{Lost: addrs("2001:db8::11")}, next: under(seeds, "10.0.1.11"), lost: true,
			want: "this host has lost 2001:db8::11;"},
		{name: "a named address is gone, and there is nothing else", use: under(hostnet.ByOperator, "10.0.1.11"), kept: hostnet.Kept{Lost: addrs("10.0.1.11")},
			next: under(hostnet.ByOperator, "10.0.1.11"), lost: true},
		{name: "the seeds are known at last", use: under(guess, "192.0.2.11"), next: under(seeds, "10.0.1.11"), alone: true, want: "no other member is in sight from 192.0.2.11"},
		{name: "the same, but members are in sight: it works", use: under(guess, "192.0.2.11"), next: under(seeds, "10.0.1.11")},
		{name: "the guess was right", use: under(guess, "10.0.1.11"), next: under(seeds, "10.0.1.11"), alone: true},
		{name: "a guess at a bridge of containers was wrong", use: under(guess, "172.17.0.1"), next: under(hostnet.ByRoute, "10.0.1.11"), alone: true, want: "172.17.0.1 is on eth0, a bridge of containers; 10.0.1.11"},
		{name: "the same, but members are in sight", use: under(guess, "172.17.0.1"), next: under(hostnet.ByRoute, "10.0.1.11")},
		{name: "the better guess is in use", use: under(hostnet.ByRoute, "10.0.1.11"), next: under(hostnet.ByRoute, "10.0.1.11"), alone: true},
		{name: "another family comes, and nobody needs it", use: under(guess, "10.0.1.11"), kept: hostnet.Kept{More: addrs("2001:db8::11")[0]}, next: under(guess, "10.0.1.11", "2001:db8::11")},
		{name: "and this host had it before", use: under(guess, "10.0.1.11"), kept: hostnet.Kept{More: addrs("2001:db8::11")[0]}, next: under(guess, "10.0.1.11", "2001:db8::11"), again: true,
			want: "had an address of that family before"},
		{name: "and somebody does", use: under(guess, "10.0.1.11"), kept: hostnet.Kept{More: addrs("2001:db8::11")[0]}, next: under(guess, "10.0.1.11", "2001:db8::11"), wanted: true,
			want: "2001:db8::11"},
		{name: "and a change disturbs nobody", use: under(guess, "10.0.1.11"), kept: hostnet.Kept{More: addrs("2001:db8::11")[0]}, next: under(guess, "10.0.1.11", "2001:db8::11"), alone: true,
			want: "2001:db8::11"},
	} {
		t.Run(c.name, func(t *testing.T) {
			c.kept.Underlay = c.use
			got := letGo(c.use, c.kept, c.next, c.lost, c.alone, c.wanted, c.again)
			if (got == "") != (c.want == "") || !strings.Contains(got, c.want) {
				t.Errorf("%q, want %q", got, c.want)
			}
		})
	}
}

// An address that comes when another one goes, in the same subnet, replaces it at once; one that was there before may be virtual.
func TestReplaced(t *testing.T) {
	began := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	since := began.Add(time.Minute)
	for _, c := range []struct {
		name             string
		lost, near, next string                   // fields
		seen             map[string]time.Duration // after the loss
		want             time.Duration            // after the loss; -1: not replaced
	}{
		{name: "it comes a second later", lost: "10.0.1.11", near: "10.0.1.33", next: "10.0.1.33", seen: map[string]time.Duration{"10.0.1.33": time.Second}, want: time.Second},
		{name: "it comes a second before", lost: "10.0.1.11", near: "10.0.1.33", next: "10.0.1.33", seen: map[string]time.Duration{"10.0.1.33": -time.Second}, want: 0},
		{name: "it came long before", lost: "10.0.1.11", near: "10.0.1.33", next: "10.0.1.33", seen: map[string]time.Duration{"10.0.1.33": -time.Minute / 2}, want: -1},
		{name: "it was always there", lost: "10.0.1.11", near: "10.0.1.33", next: "10.0.1.33", want: -1},
		{name: "another subnet", lost: "10.0.1.11", next: "10.0.2.33", seen: map[string]time.Duration{"10.0.2.33": time.Second}, want: -1},
		{name: "another one is next", lost: "10.0.1.11", near: "10.0.1.33", next: "192.0.2.1", seen: map[string]time.Duration{"10.0.1.33": time.Second}, want: -1},
		{name: "one of two families", lost: "10.0.1.11", near: "10.0.1.33", next: "10.0.1.33 2001:db8::11", seen: map[string]time.Duration{"10.0.1.33": time.Second}, want: time.Second},
		{name: "IPv6 is not there yet", lost: "10.0.1.11 2001:db8::11", near: "10.0.1.33", next: "10.0.1.33", seen: map[string]time.Duration{"10.0.1.33": time.Second}, want: -1},
		{name: "both families", lost: "10.0.1.11 2001:db8::11", near: "10.0.1.33 2001:db8::33", next: "10.0.1.33 2001:db8::33",
			seen: map[string]time.Duration{"10.0.1.33": time.Second, "2001:db8::33": 2 * time.Second}, want: 2 * time.Second},
	} {
		t.Run(c.name, func(t *testing.T) {
			var m sightings
			next := addrs(strings.Fields(c.next)...)
			all := append(addrs(strings.Fields(c.lost)...), next...)
			m.look(slices.DeleteFunc(slices.Clone(all), func(a netip.Addr) bool { _, later := c.seen[a.String()]; return later }), began)
			for _, a := range all {
				m.look([]netip.Addr{a}, since.Add(c.seen[a.String()]))
			}
			at := m.replaced(since, hostnet.Kept{Lost: addrs(strings.Fields(c.lost)...), Near: addrs(strings.Fields(c.near)...)}, hostnet.Underlay{Addrs: next})
			if want := since.Add(c.want); c.want < 0 && !at.IsZero() || c.want >= 0 && !at.Equal(want) {
				t.Errorf("replaced at %v, want %v after the loss at %v", at, c.want, since)
			}
		})
	}
}

func TestSeedAddrs(t *testing.T) {
	since := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	list := []seed.Seed{
		{Name: "node-a:7946", Addrs: []netip.AddrPort{netip.MustParseAddrPort("10.0.1.11:7946"), netip.MustParseAddrPort("[2001:db8::11]:7946")}},
		{Name: "node-b:7946", Err: errors.New("no such host"), Since: since},
		{Name: "node-c:7946"},
	}
	known, unknown := seedAddrs(list)
	if len(known) != 1 || !slices.Equal(known[0], addrs("10.0.1.11", "2001:db8::11")) {
		t.Errorf("known: %v", known)
	}
	if want := "seed node-b:7946 (no such host, since 03:04:05), seed node-c:7946 (its name server has not answered yet)"; unknown != want {
		t.Errorf("unknown: %q, want %q", unknown, want)
	}
	names, err := seed.New([]string{"node-b"}, 7946, nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	for force, want := range map[bool]bool{false: true, true: false} {
		if s := (&underlay{seeds: names}).sought(config.Config{ForceBootstrap: force}, lastUnderlay{}); (s.Unknown != "") != want {
			t.Errorf("force %v: waits for %q", force, s.Unknown)
		}
	}
}

func TestLastUnderlay(t *testing.T) {
	path := filepath.Join(t.TempDir(), "underlay")
	if last := readLastUnderlay(path); len(last.Addrs) > 0 {
		t.Errorf("without a file: %+v", last)
	}
	link := hostnet.Underlay{Iface: "eth0", Addrs: addrs("10.0.1.11", "2001:db8::11"), By: hostnet.BySeeds}
	if err := writeLastUnderlay(path, link); err != nil {
		t.Fatal(err)
	}
	if last := readLastUnderlay(path); !slices.Equal(last.Addrs, link.Addrs) || last.By != link.By || last.Device != "eth0" {
		t.Errorf("read %+v, wrote %+v", last, link)
	}
	if err := os.WriteFile(path, []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	if last := readLastUnderlay(path); len(last.Addrs) > 0 {
		t.Errorf("from a damaged file: %+v", last)
	}
}
