package gossip

import (
	"bytes"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/tulle-net/tulle/membership"
	"github.com/tulle-net/tulle/membership/keyring"
)

// quietGossip returns a Gossip that never runs, with one live member, and what
// it logs.
func quietGossip(t *testing.T) (g *Gossip, peer membership.NodeID, logged *bytes.Buffer) {
	t.Helper()
	logged = new(bytes.Buffer)
	g, err := New(Config{
		ID: membership.NewNodeID(), Name: "self", Bind: netip.MustParseAddr("127.0.0.1"), Port: 7946, Handler: newRecorder(""),
		Logger: slog.New(slog.NewTextHandler(logged, nil)),
	})
	if err != nil {
		t.Fatal(err)
	}
	m := membership.Meta{ID: membership.NodeID{1, 2, 3}, Cluster: membership.ClusterID{4, 5, 6}, Name: "node-a"}
	wire, err := m.Encode(nil)
	if err != nil {
		t.Fatal(err)
	}
	g.memberEvent(sighting{name: m.ID.String(), addr: netip.MustParseAddrPort("192.0.2.7:7946"), meta: wire, alive: true}, StateAlive)
	return g, m.ID, logged
}

// memberlist tells some events in its log only.
func TestLogEvents(t *testing.T) {
	g, peer, logged := quietGossip(t)
	w := &logWriter{g: g}
	state := func() MemberState { m, _ := g.Member(peer); return m.State }

	fmt.Fprintf(w, "[INFO] memberlist: Suspect %v has failed, no acks received\n", peer)
	if state() != StateSuspect || g.Alive() != 1 {
		t.Errorf("after a failed probe: %v, %d alive", state(), g.Alive())
	}
	g.pinged(peer.String(), time.Millisecond)
	if m, _ := g.Member(peer); m.State != StateAlive || m.RTT != time.Millisecond {
		t.Errorf("after an answer: %+v", m)
	}

	fmt.Fprintf(w, "[WARN] memberlist: Was able to connect to %v over TCP but UDP probes failed, network may be misconfigured\n", peer)
	for range udpTries { // by chance, all packets of a probe may be lost
		if p := g.Problems(); len(p) != 0 || g.suspects()[peer] == (netip.AddrPort{}) {
			t.Errorf("it is to be pinged first: %v", p)
		}
		g.missed(peer)
	}
	if p := g.Problems(); len(p) != 1 || !strings.Contains(p[0].String(), "node-a (192.0.2.7:7946) answers gossip over TCP but not over UDP") {
		t.Errorf("problems %v", p)
	}
	g.pinged(peer.String(), time.Millisecond)
	if p := g.Problems(); len(p) != 0 {
		t.Errorf("problems after an answer: %v", p)
	}
	fmt.Fprintf(w, "[WARN] memberlist: Was able to connect to %v over TCP but UDP probes failed, network may be misconfigured\n", peer)
	for range udpTries {
		g.missed(peer)
		g.pinged(peer.String(), time.Millisecond)
	}
	if p := g.Problems(); len(p) != 0 || len(g.suspects()) != 0 {
		t.Errorf("problems though it answers: %v", p)
	}

	for range 100 {
		fmt.Fprint(w, "[ERR] memberlist: Decrypt packet failed: no installed keys could decrypt the message from=192.0.2.9:7946\n")
	}
	if n := g.Stats().Undecryptable; n != 100 {
		t.Errorf("%d messages counted", n)
	}
	if p := g.Problems(); len(p) != 1 || !strings.Contains(p[0].What, "192.0.2.9") || strings.Contains(p[0].What, "7946") {
		t.Errorf("problems %v", p)
	}
	if n := strings.Count(logged.String(), "no key of this node opens"); n != 1 {
		t.Errorf("logged %d times", n)
	}

	if m, _ := g.Member(peer); m.OtherKey {
		t.Error("a member that reads everything is said to have another key")
	}
	fmt.Fprint(w, "[ERR] memberlist: Decrypt packet failed: no installed keys could decrypt the message from=192.0.2.7:7946\n")
	if m, _ := g.Member(peer); !m.OtherKey {
		t.Error("a member whose messages cannot be opened is not said to have another key")
	}
	before := g.Stats().Undecryptable
	fmt.Fprintf(w, "[ERR] memberlist: Push/Pull with %v failed: remote error: no installed keys could decrypt the message\n", peer)
	if p := g.Problems(); g.Stats().Undecryptable != before || len(p) != 2 || !strings.Contains(p[1].String(), "node-a (192.0.2.7:7946) does not open the gossip messages of this node") {
		t.Errorf("a member that does not open what this node sends: %v, %d counted", p, g.Stats().Undecryptable-before)
	}

	logged.Reset()
	stranger := membership.NodeID{9}
	fmt.Fprintf(w, "[INFO] memberlist: Marking %v as failed, suspect timeout reached (2 peer confirmations)\n", peer)
	fmt.Fprintf(w, "[WARN] memberlist: Refuting a suspect message (from: %v)\n", g.cfg.ID)
	fmt.Fprintf(w, "[WARN] memberlist: Got something from %v\n", stranger)
	for _, want := range []string{"Marking node-a (01020300) as failed", "(from: self (" + g.cfg.ID.Short() + ", this node))", "from " + stranger.String()} {
		if !strings.Contains(logged.String(), want) {
			t.Errorf("the log has no %q:\n%s", want, logged)
		}
	}

	logged.Reset()
	fmt.Fprint(w, "[WARN] memberlist: something new\n")
	fmt.Fprint(w, "[DEBUG] memberlist: chatter\n")
	fmt.Fprintf(w, "[WARN] memberlist: Refuting an alive message for '%v' (192.0.2.7:7946) meta:([1 0] VS [1 1]), vsn:([1] VS [1])\n", g.cfg.ID) // after each restart
	fmt.Fprintf(w, "[ERR] memberlist: %s\n", strings.Repeat("9 ", 5000))
	if s := logged.String(); !strings.Contains(s, `level=WARN msg="gossip: something new"`) || strings.Contains(s, "chatter") || strings.Contains(s, "Refuting") || len(s) > 2*maxLogLine {
		t.Errorf("log: %s", s)
	}

	logged.Reset()
	w.window = time.Time{}
	for range 10 * linesWindow {
		fmt.Fprint(w, "[WARN] memberlist: msg type (99) not supported\n")
	}
	if n := strings.Count(logged.String(), "not supported"); n != linesWindow {
		t.Errorf("%d lines for %d bad packets", n, 10*linesWindow)
	}
	w.window = time.Time{}
	fmt.Fprint(w, "[WARN] memberlist: later\n")
	if s := logged.String(); !strings.Contains(s, fmt.Sprint("lines=", 9*linesWindow)) || !strings.Contains(s, "later") {
		t.Errorf("log: %s", s)
	}
	for range 3 {
		fmt.Fprint(w, "[WARN] memberlist: handler queue full, dropping message (8) from=192.0.2.9:7946\n")
	}
	if n := g.Stats().Dropped; n != 3 {
		t.Errorf("%d dropped messages counted", n)
	}
}

// A node that was reset or has left hears pings for who it was: a few a second, each with another sender. The first one is told, then their number.
func TestPingsForAnotherAreCounted(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g, _, logged := quietGossip(t)
		w := &logWriter{g: g}
		for i := range 5 * 60 {
			fmt.Fprintf(w, "[WARN] memberlist: Got ping for unexpected node '%032x' from=192.0.2.%d:7946\n", i, i%9)
			time.Sleep(200 * time.Millisecond)
		}
		if s := logged.String(); strings.Count(s, "Got ping") != 1 {
			t.Fatalf("a minute of them:\n%s", s)
		}
		time.Sleep(time.Minute)
		logged.Reset()
		fmt.Fprint(w, "[WARN] memberlist: something else\n")
		if s := logged.String(); strings.Count(s, "Got ping") != 1 || !strings.Contains(s, "more=299") {
			t.Fatalf("later:\n%s", s)
		}
	})
}

// A member that is suspect for long is pinged over TCP again and again: the first failure is told, then their number.
func TestFailedTCPPingsAreCounted(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g, peer, logged := quietGossip(t)
		w := &logWriter{g: g}
		for range 50 {
			fmt.Fprint(w, "[ERR] memberlist: Failed fallback TCP ping: timeout 1s: read tcp 192.0.2.1:57259->192.0.2.7:7946: i/o timeout\n")
			time.Sleep(time.Second)
		}
		if s := logged.String(); strings.Count(s, "Failed") != 1 {
			t.Fatalf("a minute of them:\n%s", s)
		}
		// An error in place of an answer: without keys, it says nothing about them.
		for _, keyed := range []bool{false, true} {
			if keyed {
				g.cfg.Keyring, _ = keyring.New(newKey(t))
			}
			fmt.Fprint(w, "[ERR] memberlist: Failed fallback TCP ping: unexpected msgType (13) from ping from=192.0.2.7:7946\n")
			if m, _ := g.Member(peer); m.OtherKey != keyed {
				t.Errorf("keys: %v, another key: %v", keyed, m.OtherKey)
			}
		}
	})
}

// While an address is gone, memberlist logs each packet that it cannot send: some a second.
func TestFailedSendsAreCounted(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g, _, logged := quietGossip(t)
		w := &logWriter{g: g}
		fail := func() {
			fmt.Fprint(w, "[ERR] memberlist: Failed to send gossip to 192.0.2.7:7946: write udp 192.0.2.1:7946->192.0.2.7:7946: sendmsg: network is unreachable\n")
			fmt.Fprint(w, "[ERR] memberlist: Failed to send UDP ping: write udp 192.0.2.1:7946->192.0.2.7:7946: sendmsg: network is unreachable\n")
		}
		for range 5 * 60 {
			fail()
			time.Sleep(200 * time.Millisecond)
		}
		if s := logged.String(); strings.Count(s, "Failed to send gossip to 192.0.2.7") != 1 || strings.Count(s, "Failed to send UDP ping") != 1 {
			t.Fatalf("a minute of failures:\n%s", s)
		}
		logged.Reset()
		fail()
		if s := logged.String(); strings.Count(s, "Failed") != 2 || strings.Count(s, "more=300") != 2 {
			t.Fatalf("after a minute:\n%s", s)
		}
		fail()
		logged.Reset()
		time.Sleep(time.Hour)
		fmt.Fprint(w, "[WARN] memberlist: something else\n") // it works again: what was held back is told with whatever comes next
		if s := logged.String(); strings.Count(s, "more=1") != 2 || !strings.Contains(s, "something else") {
			t.Fatalf("after an hour:\n%s", s)
		}
		logged.Reset()
		time.Sleep(time.Hour)
		fail()
		if s := logged.String(); strings.Count(s, "Failed") != 2 || strings.Contains(s, "more=") {
			t.Fatalf("later again:\n%s", s)
		}
	})
}

func TestExplainJoin(t *testing.T) {
	wrap := func(s string) error {
		return errors.New("1 error occurred:\n\t* failed to join [2001:db8::1]:7946: " + s + "\n\n")
	}
	for text, want := range map[string]string{
		"dial tcp 127.0.0.1:0->[2001:db8::1]:7946: connect: connection refused":       "nothing listens there",
		"dial tcp [2001:db8::1]:7946: i/o timeout":                                    "no answer",
		"dial tcp [2001:db8::1]:7946: connect: no route to host":                      "no route",
		"dial tcp 192.0.2.1:0->192.0.2.2:7946: bind: cannot assign requested address": "this host does not have its own underlay address",
		"no installed keys could decrypt the message":                                 "another gossip key",
		"remote error: remote state is encrypted and encryption is not configured":    "without a gossip key",
		"remote state is encrypted and encryption is not configured":                  "this node has none",
		"EOF": "closed the connection",
		"Node 'x' delegate protocol version (0) is incompatible: [1, 1]": "incompatible",
		"a at 192.0.2.1:1: it belongs to cluster 01, this node to 02":    "belongs to cluster 01",
	} {
		reason, remedy := explainJoin(wrap(text), true)
		if !strings.Contains(reason, want) || remedy == "" || strings.Contains(reason, "failed to join") {
			t.Errorf("%s: %q, %q", text, reason, remedy)
		}
	}
}

func TestPeersAreForgottenInTheEnd(t *testing.T) {
	g, peer, _ := quietGossip(t)
	g.memberEvent(sighting{name: peer.String(), addr: netip.MustParseAddrPort("192.0.2.7:7946")}, StateDead)
	if !g.Isolated() || len(g.KnownPeers()) != 1 {
		t.Error("the dead member's address is not tried again")
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	g.pruneLocked(time.Now().Add(keepDead - time.Minute))
	if len(g.peers) != 1 {
		t.Error("forgotten too soon")
	}
	g.pruneLocked(time.Now().Add(keepDead + time.Minute))
	if len(g.peers) != 0 {
		t.Error("remembered for ever")
	}
}

func TestSeenSet(t *testing.T) {
	var s seenSet
	a, b := []byte("a"), []byte("b")
	if !s.first(a) || s.first(a) {
		t.Error("from the network, a message is news once")
	}
	if !s.passed(a) {
		t.Error("a message that was passed on need not be sent again")
	}
	if s.passed(b) || s.passed(b) {
		t.Error("a node may repeat its own message")
	}
	if s.first(b) {
		t.Error("the echo of an own message is no news")
	}
	for i := range 5 * maxSeen {
		s.first(fmt.Appendf(nil, "%d", i))
		if len(s.now)+len(s.old) > 2*maxSeen {
			t.Fatal("grows without bound")
		}
	}
	if !s.first(a) {
		t.Error("remembered for ever")
	}
}
