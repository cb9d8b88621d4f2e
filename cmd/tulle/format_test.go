package main

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/tulle-net/tulle/internal/api"
	"github.com/tulle-net/tulle/internal/doctor"
)

func TestFormats(t *testing.T) {
	for _, tc := range []struct{ got, want string }{
		{age(-time.Second), "0s"}, {age(59 * time.Second), "59s"}, {age(61 * time.Second), "1m01s"},
		{age(3*time.Hour + 5*time.Minute), "3h05m"}, {age(49 * time.Hour), "2d01h"},
		{rtt(0), none}, {rtt(7), "7µs"}, {rtt(999), "999µs"}, {rtt(1000), "1ms"}, {rtt(12_345), "12.3ms"}, {rtt(99_999), "100ms"},
		{rtt(999_999), "999ms"}, {rtt(1_500_000), "1.5s"},
		{percent(0), "0%"}, {percent(0.001), "<1%"}, {percent(0.07), "7%"}, {percent(1), "100%"},
		{count(0), "0"}, {count(999), "999"}, {count(1000), "1k"}, {count(999_499), "999k"}, {count(999_600), "1M"}, {count(1_234_567), "1.23M"},
		{count(1<<64 - 1), "18.4E"}, {byteSize(12), "12 B"}, {byteSize(1_718_000_000), "1.72 GB"},
		{size(api.Block{Size: 254}), "254"}, {size(api.Block{Prefix: netip.MustParsePrefix("fd00::/64"), Size: api.MaxCount}), "2^64"}, {plural(1, "peer"), "1 peer"}, {plural(0, "peer"), "0 peers"},
		{nodeRef(api.NodeRef{}), none}, {nodeRef(api.NodeRef{Name: "a"}), "a"}, {nodeRef(api.NodeRef{ID: "0123456789"}), "01234567"},
		{oneLine("a\n  b\tc\n"), "a b c"},
	} {
		if tc.got != tc.want {
			t.Errorf("got %q, want %q", tc.got, tc.want)
		}
	}
}

// However many peers there are, the status is one screen, and those in trouble are on it.
func TestStatusOfALargeCluster(t *testing.T) {
	now := time.Now()
	s := api.Status{Version: "v1", Ready: true, Started: now}
	for i := range 500 {
		p := api.Peer{Name: fmt.Sprintf("node-%d", i), State: api.PeerAlive, Path: api.Path{Mode: "udp", State: api.PathUp, RTTUS: 200, MTU: 1472, Since: now}}
		if i == 444 {
			p.State, p.Since, p.Reason = api.PeerSuspect, now, "no acknowledgement"
			p.Path.State = api.PathDown
			p.Prefixes = append(p.Prefixes, prefix("10.244.9.0/24"))
		}
		s.Peers = append(s.Peers, p)
		s.Problems = append(s.Problems, api.Problem{What: p.Name + " is gone", Remedy: "start its agent", Check: api.CheckOwners})
	}
	s.Problems = append(s.Problems, api.Problem{What: "chain FORWARD drops pods' packets", Check: api.CheckFirewall})
	p := &printer{width: 80, now: now}
	printStatus(p, s)
	out := p.String()
	if n := strings.Count(out, "\n"); n > 40 {
		t.Errorf("%d lines", n)
	}
	for _, line := range []string{"501 problems:", "and 495 more like these (owners): `tulle status -o json` has all", "501.  chain FORWARD drops pods' packets"} {
		if !strings.Contains(out, line) {
			t.Errorf("no %q", line)
		}
	}
	if !strings.Contains(out, "node-444") || !strings.Contains(out, "and 488 more, none of them in trouble: see `tulle peers`") {
		t.Errorf("got\n%s", out)
	}
}

// A check that finds the same of each of many peers leaves room for the others.
func TestDoctorOfALargeCluster(t *testing.T) {
	r := doctor.Report{Results: []doctor.Result{{Check: "versions", State: doctor.Warning}, {Check: "tun", State: doctor.Failed, Findings: []doctor.Finding{{State: doctor.Failed, What: "no TUN"}}}}}
	for range 500 {
		r.Results[0].Findings = append(r.Results[0].Findings, doctor.Finding{State: doctor.Warning, What: "another version", Remedy: "upgrade"})
	}
	p := &printer{width: 80}
	printDoctor(p, r)
	out := p.String()
	if n := strings.Count(out, "another version"); n != maxAlike {
		t.Errorf("%d findings are shown", n)
	}
	for _, line := range []string{"versions: and 495 more like these: `tulle doctor versions -o json` has all", "FAILED tun: no TUN"} {
		if !strings.Contains(out, line) {
			t.Errorf("no %q in\n%s", line, out)
		}
	}
}

// Tables keep to their width however narrow it is, as far as single words allow, and lose nothing.
// An agent of an older version tells only the first address on which it listens.
func TestGossipOfAnOlderAgent(t *testing.T) {
	g := api.Gossip{Bind: netip.MustParseAddrPort("192.168.1.11:7946"), Encrypted: true}
	if got := gossip(new(printer), g); got != "encrypted, 192.168.1.11:7946" {
		t.Errorf("%q", got)
	}
}

func TestTableWidths(t *testing.T) {
	tab := table{head: []string{"NAME", "N", "REASON"}, right: []bool{false, true}}
	tab.row("node-a\nsecond", "7", "the quick brown fox jumps over the lazy dog and goes on for a while")
	tab.row("b", "1234", "")
	tab.row("c", "1", "short")
	words := func(s string) int { return len(strings.Fields(s)) }
	unlimited := &printer{}
	unlimited.table(&tab)
	for width := 20; width <= 200; width++ {
		p := &printer{width: width}
		p.table(&tab)
		for l := range strings.Lines(p.String()) {
			if n := utf8.RuneCountInString(strings.TrimSuffix(l, "\n")); n > width {
				t.Errorf("width %d: %d columns in %q", width, n, l)
			}
		}
		if words(p.String()) != words(unlimited.String()) {
			t.Errorf("width %d: words are lost:\n%s", width, p.String())
		}
	}
}

func TestNamesakes(t *testing.T) {
	peers := []api.Peer{{Name: "a", ID: "0123456789"}, {Name: "b", ID: "1123456789"}, {Name: "a", ID: "2123456789"}}
	for i, want := range []string{"a (01234567)", "b", "a (21234567)"} {
		if got := peerName(peers, peers[i]); got != want {
			t.Errorf("%s, want %s", got, want)
		}
	}
}

// Packets of the two families may go two ways: both are shown and both count.
func TestTwoPathsInUse(t *testing.T) {
	now := time.Now()
	since := now.Add(-time.Hour)
	direct4 := api.Path{Mode: "direct", Family: "ipv4", State: api.PathUp, RTTUS: 300, MTU: 1500, Since: since, Reason: "answers"}
	direct6 := api.Path{Mode: "direct", Family: "ipv6", State: api.PathUp, RTTUS: 320, MTU: 1400, Since: since, Reason: "answers6"}
	udp := api.Path{Mode: "udp", State: api.PathDown, Loss: 1, Since: since, Reason: "no answer yet"}
	peer := func(main api.Path, candidates ...api.Candidate) api.Peer {
		return api.Peer{Name: "b", ID: "0123456789", State: api.PeerAlive, Prefixes: []netip.Prefix{netip.MustParsePrefix("10.244.1.0/24")}, Path: main, Candidates: candidates}
	}
	off := direct6
	off.State = api.PathOff
	for _, tc := range []struct {
		name string
		peer api.Peer
		ok   bool
		want []string // lines
	}{
		{"IPv6 by udp, which does not answer", peer(direct4, api.Candidate{Path: direct4, Active: true}, api.Candidate{Path: off}, api.Candidate{Path: udp, Active: true}), false,
			[]string{"direct 300µs 0% 1500 1h00m answers", "udp down – 100% – 1h00m no answer yet"}},
		{"both direct", peer(direct4, api.Candidate{Path: direct4, Active: true}, api.Candidate{Path: direct6, Active: true}), true,
			[]string{"direct 300µs 0% 1500 1h00m answers", "direct ipv6 320µs 0% 1400 1h00m answers6"}},
		{"IPv4 by udp, IPv6 direct", peer(direct6, api.Candidate{Path: direct4}, api.Candidate{Path: direct6, Active: true}, api.Candidate{Path: udp, Active: true}), false,
			[]string{"direct 320µs 0% 1400 1h00m answers6", "direct ipv4 300µs 0% 1500 1h00m answers", "udp down – 100% – 1h00m no answer yet"}},
		{"not in use, down", peer(direct4, api.Candidate{Path: direct4, Active: true}, api.Candidate{Path: udp}), true,
			[]string{"direct 300µs 0% 1500 1h00m answers", "udp down – 100% – 1h00m no answer yet"}},
		{"of one family, and nothing is known", peer(api.Path{Mode: "udp", State: api.PathUp, MTU: 1472, Since: since, Reason: "external peers are not probed"}), true,
			[]string{"udp – – 1472 1h00m external peers are not probed"}},
	} {
		if got := peerOK(tc.peer); got != tc.ok {
			t.Errorf("%s: OK %v, want %v", tc.name, got, tc.ok)
		}
		status := printer{width: 200, now: now}
		printStatusPeers(&status, []api.Peer{tc.peer})
		if shows := strings.Contains(status.String(), "udp down"); shows == tc.ok {
			t.Errorf("%s: status shows that the peer is in trouble %v:\n%s", tc.name, shows, &status)
		}
		out := printer{width: 200, now: now}
		printPeers(&out, []api.Peer{tc.peer})
		var got []string
		for line := range strings.Lines(out.String()) {
			f := strings.Fields(line)
			if f[0] == "b" {
				f = f[3:]
			}
			if f[0] != "NAME" {
				got = append(got, strings.Join(f, " "))
			}
		}
		if !slices.Equal(got, tc.want) {
			t.Errorf("%s:\n%s\nwant\n%s", tc.name, strings.Join(got, "\n"), strings.Join(tc.want, "\n"))
		}
	}
}
