package membership

import (
	"bytes"
	"net/netip"
	"reflect"
	"strings"
	"testing"
	"time"

	"pgregory.net/rapid"
)

func sampleMeta() Meta {
	return Meta{
		ID: NodeID{1, 2, 3}, Cluster: ClusterID{4, 5, 6}, Name: "node-a",
		Underlay: []netip.Addr{netip.MustParseAddr("192.0.2.7"), netip.MustParseAddr("2001:db8::7")},
		TunAddrs: []netip.Addr{netip.MustParseAddr("10.244.3.1")},
		UDPPort:  6080, VXLANPort: 4789, Capabilities: 0xdeadbeef, VTEPMAC: [6]byte{2, 0, 0, 0, 0, 9},
		Started: 1_700_000_000, Leaving: true,
	}
}

func TestMetaRoundTrip(t *testing.T) {
	addr := rapid.Custom(func(t *rapid.T) netip.Addr {
		n := rapid.SampledFrom([]int{4, 16}).Draw(t, "bytes")
		a, _ := netip.AddrFromSlice(rapid.SliceOfN(rapid.Byte(), n, n).Draw(t, "address"))
		return a.Unmap()
	})
	rapid.Check(t, func(t *rapid.T) {
		m := sampleMeta()
		m.Name = string(rapid.SliceOfN(rapid.Byte(), 0, MaxName).Draw(t, "name"))
		m.Underlay = rapid.SliceOfN(addr, 1, maxMetaAddrs).Draw(t, "underlay")
		m.TunAddrs = rapid.SliceOfN(addr, 1, maxMetaAddrs).Draw(t, "tun")
		m.Leaving = rapid.Bool().Draw(t, "leaving")
		m.Capabilities = rapid.Uint32().Draw(t, "capabilities")
		b, err := m.encode(nil)
		if err != nil {
			t.Fatal(err)
		}
		if len(b) > MaxMeta {
			t.Fatalf("%d bytes", len(b))
		}
		// Fields that a later version appends are passed over.
		later := append(bytes.Clone(b), make([]byte, MaxMeta-len(b))...)
		for _, wire := range [][]byte{b, later} {
			got, err := decodeMeta(wire)
			if err != nil || !reflect.DeepEqual(got, m) {
				t.Fatalf("%+v came back as %+v, %v", m, got, err)
			}
		}
	})
}

func TestMetaLimits(t *testing.T) {
	a := netip.MustParseAddr("2001:db8::1")
	for name, spoil := range map[string]func(*Meta){
		"name":          func(m *Meta) { m.Name = strings.Repeat("n", MaxName+1) },
		"underlay":      func(m *Meta) { m.Underlay = make([]netip.Addr, maxMetaAddrs+1) },
		"tun addresses": func(m *Meta) { m.TunAddrs = make([]netip.Addr, maxMetaAddrs+1) },
		"zone":          func(m *Meta) { m.Underlay = []netip.Addr{a.WithZone("eth0")} },
		"no address":    func(m *Meta) { m.TunAddrs = []netip.Addr{{}} },
	} {
		m := sampleMeta()
		spoil(&m)
		if b, err := m.encode(nil); err == nil {
			t.Errorf("%s: encoded to %d bytes", name, len(b))
		}
	}
}

func FuzzMeta(f *testing.F) {
	b, err := sampleMeta().encode(nil)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(b)
	f.Add(append(b, make([]byte, 256)...)) // a length of 255 fits
	f.Add(b[:metaFixed])
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, b []byte) {
		m, err := decodeMeta(b)
		if err != nil {
			return
		}
		if len(m.Name) > MaxName || len(m.Underlay) > maxMetaAddrs || len(m.TunAddrs) > maxMetaAddrs {
			t.Fatalf("limits passed: %+v", m)
		}
		wire, err := m.encode(nil)
		if err != nil {
			t.Fatalf("decoded, but does not encode: %v", err)
		}
		again, err := decodeMeta(wire)
		if err != nil || !reflect.DeepEqual(m, again) {
			t.Fatalf("%+v came back as %+v, %v", m, again, err)
		}
		id, cluster, err := metaHead(b)
		if err != nil || id != m.ID || cluster != m.Cluster {
			t.Fatal("metaHead disagrees")
		}
	})
}

func FuzzEnvelope(f *testing.F) {
	for kind := kindBroadcast; kind < kindEnd; kind++ {
		f.Add(envelope{kind: kind, cluster: ClusterID{1}, from: NodeID{2}, addr: netip.MustParseAddrPort("192.0.2.1:7946"), body: []byte("body")}.encode())
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
		f.Add(keyRequest{id: 7, op: op, key: make([]byte, KeySize)}.encode())
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
	f.Add(keyAnswer{id: 7, age: time.Hour, keys: make([]Fingerprint, 3)}.encode())
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

func FuzzKeyringFile(f *testing.F) {
	f.Add([]byte("# a comment\n" + GenerateKey() + "\n"))
	f.Add([]byte("AAAA"))
	f.Fuzz(func(t *testing.T, b []byte) {
		keys, err := parseKeyring(b)
		if err != nil {
			return
		}
		for _, k := range keys {
			if len(k) != KeySize {
				t.Fatalf("key of %d bytes", len(k))
			}
		}
	})
}

// FuzzReceived feeds what a member with the right key could send.
func FuzzReceived(f *testing.F) {
	for kind := kindBroadcast; kind < kindEnd; kind++ {
		f.Add(envelope{kind: kind, from: NodeID{2}, body: keyRequest{id: 7, op: keyList}.encode()}.encode())
	}
	for _, line := range []string{
		"[INFO] memberlist: Suspect 00000000000000000000000000000000 has failed, no acks received",
		"[WARN] memberlist: Was able to connect to x over TCP but UDP probes failed, network may be misconfigured",
		"[ERR] memberlist: Decrypt packet failed: no installed keys could decrypt the message from=127.0.0.1:7946",
	} {
		f.Add([]byte(line))
	}
	if meta, err := sampleMeta().encode(nil); err != nil {
		f.Fatal(err)
	} else {
		f.Add(append(meta, make([]byte, 256)...))
	}
	g, err := New(Config{ID: NewNodeID(), Bind: netip.MustParseAddr("127.0.0.1"), Port: 1, Handler: newRecorder("")})
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
		g.conflict(sighting{name: string(b), meta: b}, sighting{meta: b})
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
