package gossip

import (
	"bytes"
	"net/netip"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/tulle-net/tulle/membership"
	"github.com/tulle-net/tulle/membership/keyring"
)

func FuzzEnvelope(f *testing.F) {
	for kind := kindBroadcast; kind < kindEnd; kind++ {
		f.Add(envelope{kind: kind, cluster: membership.ClusterID{1}, from: membership.NodeID{2}, addr: netip.MustParseAddrPort("192.0.2.1:7946"), body: []byte("body")}.encode())
	}
	f.Add([]byte{envelopeVersion, byte(kindState)})
	f.Fuzz(func(t *testing.T, b []byte) {
		e, err := decodeEnvelope(b)
		if err != nil {
			return
		}
		if again, err := decodeEnvelope(e.encode()); err != nil || !reflect.DeepEqual(e, again) {
			t.Fatalf("%+v came back as %+v, %v", e, again, err)
		}
	})
}

func FuzzKeyRequest(f *testing.F) {
	for op := keyList; op < keyOpEnd; op++ {
		f.Add(keyRequest{id: 7, op: op, key: make([]byte, keyring.Size)}.encode())
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		r, err := decodeKeyRequest(b)
		if err != nil {
			return
		}
		if !bytes.Equal(r.encode(), b) {
			t.Fatalf("%x came back as %x", b, r.encode())
		}
	})
}

func FuzzKeyAnswer(f *testing.F) {
	f.Add(keyAnswer{id: 7, reason: "no"}.encode())
	f.Add(keyAnswer{id: 7, age: time.Hour, keys: make([]keyring.Fingerprint, 3)}.encode())
	f.Add(keyAnswer{id: 7, reason: strings.Repeat("x", 1000)}.encode())
	f.Fuzz(func(t *testing.T, b []byte) {
		a, err := decodeKeyAnswer(b)
		if err != nil {
			return
		}
		if again, err := decodeKeyAnswer(a.encode()); err != nil || !reflect.DeepEqual(a, again) {
			t.Fatalf("%+v came back as %+v, %v", a, again, err)
		}
	})
}

// FuzzReceived feeds what a member with the right key could send.
func FuzzReceived(f *testing.F) {
	for kind := kindBroadcast; kind < kindEnd; kind++ {
		f.Add(envelope{kind: kind, from: membership.NodeID{2}, body: keyRequest{id: 7, op: keyList}.encode()}.encode())
	}
	for _, line := range []string{
		"[INFO] memberlist: Suspect 00000000000000000000000000000000 has failed, no acks received",
		"[WARN] memberlist: Was able to connect to x over TCP but UDP probes failed, network may be misconfigured",
		"[ERR] memberlist: Decrypt packet failed: no installed keys could decrypt the message from=127.0.0.1:7946",
	} {
		f.Add([]byte(line))
	}
	if meta, err := (membership.Meta{ID: membership.NodeID{1, 2, 3}, Cluster: membership.ClusterID{4, 5, 6}, Name: "node-a"}).Encode(nil); err != nil {
		f.Fatal(err)
	} else {
		f.Add(append(meta, make([]byte, 256)...))
	}
	g, err := New(Config{ID: membership.NewNodeID(), Bind: netip.MustParseAddr("127.0.0.1"), Port: 1, Handler: newRecorder("")})
	if err != nil {
		f.Fatal(err)
	}
	n := 0
	f.Fuzz(func(t *testing.T, b []byte) {
		g.received(b)
		g.receivedState(b, true)
		(&logWriter{g: g}).Write(b)
		_ = g.checkAlive(sighting{name: string(b), meta: b}, g.bind)
		_ = g.checkMerge([]sighting{{name: string(b), meta: b, alive: true}}, g.bind)
		g.memberEvent(sighting{name: string(b), meta: b}, StateAlive)
		g.sawConflict(sighting{name: string(b), meta: b}, sighting{meta: b})
		if len(b) >= 16 {
			g.sawConflict(sighting{name: membership.NodeID(b[:16]).String(), meta: b}, sighting{meta: b})
		}
		if n := len(g.conflicts.of); n > maxProblems {
			t.Fatalf("%d conflicts are kept", n)
		}
		if g.Problems(); len(g.problems.byKey) > maxProblems {
			t.Fatal("problems pile up")
		}
		if n++; n%100 == 0 {
			g.inbox.take()
			for len(g.keyReqs) > 0 {
				<-g.keyReqs
			}
		}
	})
}

func FuzzPresence(f *testing.F) {
	at := netip.MustParseAddrPort("192.0.2.1:7946")
	f.Add(presenceAsk{id: 7, node: membership.NodeID{1}, at: at, from: netip.MustParseAddrPort("[2001:db8::1]:7946"), who: "node-a at 192.0.2.1:7946"}.encode())
	f.Add(presenceAsk{id: 7, at: at, from: at, who: strings.Repeat("x", maxNewcomer+1)}.encode())
	f.Add(presenceAsk{id: 7, at: at, from: at, who: "node-a", run: true}.encode())
	f.Add(presenceAnswer{id: 7, verdict: presenceLives}.encode())
	f.Add(presenceAnswer{id: 7, verdict: presenceLives, run: &run{true, time.Hour}}.encode())
	f.Fuzz(func(t *testing.T, b []byte) {
		if a, err := decodePresenceAsk(b); err == nil {
			if again, err := decodePresenceAsk(a.encode()); err != nil || !reflect.DeepEqual(a, again) {
				t.Fatalf("%+v came back as %+v, %v", a, again, err)
			}
		}
		if a, err := decodePresenceAnswer(b); err == nil && !bytes.Equal(a.encode(), b) {
			t.Fatalf("%x came back as %x", b, a.encode())
		}
	})
}
