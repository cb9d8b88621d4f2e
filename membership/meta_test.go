package membership

import (
	"bytes"
	"net/netip"
	"reflect"
	"strings"
	"testing"

	"pgregory.net/rapid"
)

func sampleMeta() Meta {
	return Meta{
		ID: NodeID{1, 2, 3}, Cluster: ClusterID{4, 5, 6}, Name: "node-a",
		Underlay:   []netip.Addr{netip.MustParseAddr("192.0.2.7"), netip.MustParseAddr("2001:db8::7")},
		TunAddrs:   []netip.Addr{netip.MustParseAddr("10.244.3.1")},
		ProbeAddrs: []netip.Addr{netip.MustParseAddr("10.244.3.255")},
		UDPPort:    6080, VXLANPort: 4789, Capabilities: 0xdeadbeef, VTEPMAC: [6]byte{2, 0, 0, 0, 0, 9},
		Started: 1_700_000_000, Leaving: true, Version: "v1.2.3", HasVNI: true, VNI: 77,
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
		m.Underlay = rapid.SliceOfN(addr, 1, MaxMetaAddrs).Draw(t, "underlay")
		m.TunAddrs = rapid.SliceOfN(addr, 1, MaxMetaAddrs).Draw(t, "tun")
		m.ProbeAddrs = rapid.SliceOfN(addr, 1, MaxProbeAddrs).Draw(t, "probe")
		m.Leaving = rapid.Bool().Draw(t, "leaving")
		if m.HasVNI = rapid.Bool().Draw(t, "has VNI"); m.HasVNI {
			m.VNI = rapid.Uint32Range(0, 1<<24-1).Draw(t, "VNI")
		} else {
			m.VNI = 0
		}
		m.Capabilities = rapid.Uint32().Draw(t, "capabilities")
		m.Version = ""
		bare, err := m.Encode(nil)
		if err != nil {
			t.Fatal(err)
		}
		m.Version = string(rapid.SliceOfN(rapid.Byte(), 0, MaxProgramVersion).Draw(t, "version"))
		b, err := m.Encode(nil)
		if err != nil {
			t.Fatal(err)
		}
		if len(b) > MaxMeta {
			t.Fatalf("%d bytes", len(b))
		}
		if len(bare)+len(m.Version) > MaxMeta {
			m.Version = "" // there is no room for it
		}
		// Fields that a later version appends are passed over.
		later := append(bytes.Clone(b), make([]byte, MaxMeta-len(b))...)
		for _, wire := range [][]byte{b, later} {
			got, err := DecodeMeta(wire)
			if err != nil || !reflect.DeepEqual(got, m) {
				t.Fatalf("%+v came back as %+v, %v", m, got, err)
			}
		}
	})
}

func TestMetaLimits(t *testing.T) {
	a := netip.MustParseAddr("2001:db8::1")
	for name, spoil := range map[string]func(*Meta){
		"name":            func(m *Meta) { m.Name = strings.Repeat("n", MaxName+1) },
		"underlay":        func(m *Meta) { m.Underlay = make([]netip.Addr, MaxMetaAddrs+1) },
		"tun addresses":   func(m *Meta) { m.TunAddrs = make([]netip.Addr, MaxMetaAddrs+1) },
		"probe addresses": func(m *Meta) { m.ProbeAddrs = make([]netip.Addr, MaxProbeAddrs+1) },
		"version":         func(m *Meta) { m.Version = strings.Repeat("v", MaxProgramVersion+1) },
		"zone":            func(m *Meta) { m.Underlay = []netip.Addr{a.WithZone("eth0")} },
		"no address":      func(m *Meta) { m.TunAddrs = []netip.Addr{{}} },
	} {
		m := sampleMeta()
		spoil(&m)
		if b, err := m.Encode(nil); err == nil {
			t.Errorf("%s: encoded to %d bytes", name, len(b))
		}
	}
}

func FuzzMeta(f *testing.F) {
	b, err := sampleMeta().Encode(nil)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(b)
	f.Add(append(b, make([]byte, 256)...)) // a length of 255 fits
	f.Add(b[:metaFixed])
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, b []byte) {
		m, err := DecodeMeta(b)
		if err != nil {
			return
		}
		if len(m.Name) > MaxName || len(m.Underlay) > MaxMetaAddrs || len(m.TunAddrs) > MaxMetaAddrs {
			t.Fatalf("limits passed: %+v", m)
		}
		wire, err := m.Encode(nil)
		if err != nil {
			t.Fatalf("decoded, but does not encode: %v", err)
		}
		again, err := DecodeMeta(wire)
		if err != nil || !reflect.DeepEqual(m, again) {
			t.Fatalf("%+v came back as %+v, %v", m, again, err)
		}
		id, cluster, err := MetaHead(b)
		if err != nil || id != m.ID || cluster != m.Cluster {
			t.Fatal("metaHead disagrees")
		}
	})
}
