package membership

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
)

// Limits of the metadata. Their sum stays below memberlist's limit of 512 bytes
// (memberlist.MetaMaxSize), above which it panics.
const (
	MaxMeta           = 512 // bytes, encoded
	MaxName           = 128 // bytes
	MaxMetaAddrs      = 8   // of each kind
	MaxProbeAddrs     = 2   // one per family
	MaxProgramVersion = 48  // bytes
)

// Meta is the metadata that every member has of every other member. It is part of
// memberlist's alive messages.
type Meta struct {
	ID           NodeID
	Cluster      ClusterID // zero: in no cluster yet
	Name         string
	Underlay     []netip.Addr // at most 8, best first
	TunAddrs     []netip.Addr // at most 8: addresses of the TUN device
	ProbeAddrs   []netip.Addr // at most 2, one per family: where probes of the direct path go; none in older versions
	Version      string       // of the program; empty in older versions, and where the rest leaves no room for it
	UDPPort      uint16       // of the UDP encapsulation
	VXLANPort    uint16
	HasVNI       bool   // false in older versions
	VNI          uint32 // of the VXLAN encapsulation, 24 bits
	Capabilities uint32 // bits Cap…
	VTEPMAC      [6]byte
	Started      int64 // start of this run by its clock, Unix seconds; by it members without CapTellsRun find out which of two clones is the newer one
	Leaving      bool  // set while the node leaves the cluster
}

// CapHostByTunnel is the capability of a member that accepts packets for its own underlay addresses from the tunnel.
const CapHostByTunnel uint32 = 1 << 0

// CapBench is the capability of a member that understands requests for a benchmark, whether or not it grants them.
const CapBench uint32 = 1 << 1

// CapFastPath is the capability of a member whose kernel takes udp packets without UDP checksum, over IPv4, in place of its agent: packets of the fast path.
const CapFastPath uint32 = 1 << 2

// CapTellsRun is the capability of a member that, asked whether it is there, also tells for how long it has run.
const CapTellsRun uint32 = 1 << 3

// The encoding has a fixed part, then lists. Later versions may append fields: a
// decoder ignores bytes that it does not know.
//
//	 0  version (1)
//	 1  flags: bit 0 leaving, bit 1 has VNI
//	 2  ID (16)
//	18  cluster (16)
//	34  UDP port, VXLAN port (2 each, big endian, as all numbers)
//	38  capabilities (4)
//	42  VTEP MAC (6)
//	48  started (8)
//	56  name: length (1), bytes
//	 …  underlay: count (1), each: length 4 or 16 (1), bytes
//	 …  TUN addresses: the same
//	 …  probe addresses: the same
//	 …  version of the program: length (1), bytes; empty where it would exceed MaxMeta
//	 …  VNI (4), if the flag is set
const (
	metaVersion   = 1
	metaFixed     = 56
	metaOffID     = 2
	metaOffClust  = 18
	metaOffPorts  = 34
	metaOffCaps   = 38
	metaOffMAC    = 42
	metaOffStart  = 48
	metaFlagLeave = 1 << 0
	metaFlagVNI   = 1 << 1
	metaVNISize   = 4
)

// Encode appends the encoding of the metadata to b. It returns an error if a field
// exceeds its limit; it never truncates.
func (m Meta) Encode(b []byte) ([]byte, error) {
	switch {
	case len(m.Name) > MaxName:
		return nil, fmt.Errorf("node name %.20q… has %d bytes, the limit is %d: choose a shorter --node-name", m.Name, len(m.Name), MaxName)
	case len(m.Underlay) > MaxMetaAddrs:
		return nil, fmt.Errorf("%d underlay addresses, the limit is %d: name the interface or address with --underlay", len(m.Underlay), MaxMetaAddrs)
	case len(m.TunAddrs) > MaxMetaAddrs:
		return nil, fmt.Errorf("%d TUN addresses, the limit is %d", len(m.TunAddrs), MaxMetaAddrs)
	case len(m.Version) > MaxProgramVersion:
		return nil, fmt.Errorf("version %.20q… has %d bytes, the limit is %d", m.Version, len(m.Version), MaxProgramVersion)
	case len(m.ProbeAddrs) > MaxProbeAddrs:
		return nil, fmt.Errorf("%d probe addresses, the limit is %d", len(m.ProbeAddrs), MaxProbeAddrs)
	}
	start := len(b)
	var flags byte
	if m.Leaving {
		flags |= metaFlagLeave
	}
	rest := 0 // bytes after the version
	if m.HasVNI {
		flags |= metaFlagVNI
		rest = metaVNISize
	}
	b = append(b, metaVersion, flags)
	b = append(b, m.ID[:]...)
	b = append(b, m.Cluster[:]...)
	b = binary.BigEndian.AppendUint16(b, m.UDPPort)
	b = binary.BigEndian.AppendUint16(b, m.VXLANPort)
	b = binary.BigEndian.AppendUint32(b, m.Capabilities)
	b = append(b, m.VTEPMAC[:]...)
	b = binary.BigEndian.AppendUint64(b, uint64(m.Started))
	b = append(b, byte(len(m.Name)))
	b = append(b, m.Name...)
	for _, list := range [][]netip.Addr{m.Underlay, m.TunAddrs, m.ProbeAddrs} {
		b = append(b, byte(len(list)))
		for _, a := range list {
			if !a.IsValid() || a.Zone() != "" {
				return nil, fmt.Errorf("metadata: %q is not an address that other hosts can use", a)
			}
			s := a.Unmap().AsSlice()
			b = append(b, byte(len(s)))
			b = append(b, s...)
		}
	}
	version := m.Version
	if len(b)-start+1+len(version)+rest > MaxMeta {
		version = ""
	}
	b = append(append(b, byte(len(version))), version...)
	if m.HasVNI {
		b = binary.BigEndian.AppendUint32(b, m.VNI)
	}
	if n := len(b) - start; n > MaxMeta {
		return nil, fmt.Errorf("metadata of %d bytes, the limit is %d", n, MaxMeta)
	}
	return b, nil
}

// MetaHead decodes only the two IDs. The checks of the many alive messages need no
// more.
func MetaHead(b []byte) (NodeID, ClusterID, error) {
	if len(b) < metaFixed || len(b) > MaxMeta {
		return NodeID{}, ClusterID{}, fmt.Errorf("metadata of %d bytes", len(b))
	}
	if b[0] != metaVersion {
		return NodeID{}, ClusterID{}, fmt.Errorf("metadata version %d, this agent reads version %d", b[0], metaVersion)
	}
	return NodeID(b[metaOffID:]), ClusterID(b[metaOffClust:]), nil
}

var errMetaShort = errors.New("metadata is cut short")

// DecodeMeta decodes the output of [Meta.Encode]. The result shares no memory with b.
func DecodeMeta(b []byte) (Meta, error) {
	var m Meta
	var err error
	if m.ID, m.Cluster, err = MetaHead(b); err != nil {
		return Meta{}, err
	}
	m.Leaving, m.HasVNI = b[1]&metaFlagLeave != 0, b[1]&metaFlagVNI != 0
	m.UDPPort = binary.BigEndian.Uint16(b[metaOffPorts:])
	m.VXLANPort = binary.BigEndian.Uint16(b[metaOffPorts+2:])
	m.Capabilities = binary.BigEndian.Uint32(b[metaOffCaps:])
	copy(m.VTEPMAC[:], b[metaOffMAC:])
	m.Started = int64(binary.BigEndian.Uint64(b[metaOffStart:]))
	b = b[metaFixed:]

	name, b, ok := CutField(b)
	if !ok {
		return Meta{}, errMetaShort
	}
	if len(name) > MaxName {
		return Meta{}, fmt.Errorf("metadata with a name of %d bytes, the limit is %d", len(name), MaxName)
	}
	m.Name = string(name)
	for _, list := range []*[]netip.Addr{&m.Underlay, &m.TunAddrs} {
		if *list, b, err = decodeAddrs(b, MaxMetaAddrs); err != nil {
			return Meta{}, err
		}
	}
	if len(b) > 0 { // an older version ends here
		if m.ProbeAddrs, b, err = decodeAddrs(b, MaxProbeAddrs); err != nil {
			return Meta{}, err
		}
	}
	if len(b) > 0 {
		version, rest, ok := CutField(b)
		if !ok {
			return Meta{}, errMetaShort
		}
		if len(version) > MaxProgramVersion {
			return Meta{}, fmt.Errorf("metadata with a version of %d bytes, the limit is %d", len(version), MaxProgramVersion)
		}
		m.Version, b = string(version), rest
	}
	if m.HasVNI {
		if len(b) < metaVNISize {
			return Meta{}, errMetaShort
		}
		m.VNI = binary.BigEndian.Uint32(b)
	}
	return m, nil
}

func decodeAddrs(b []byte, limit int) ([]netip.Addr, []byte, error) {
	if len(b) < 1 {
		return nil, nil, errMetaShort
	}
	n := int(b[0])
	if n > limit {
		return nil, nil, fmt.Errorf("metadata with %d addresses", n)
	}
	b = b[1:]
	var list []netip.Addr
	for range n {
		field, rest, ok := CutField(b)
		if !ok {
			return nil, nil, errMetaShort
		}
		a, ok := netip.AddrFromSlice(field)
		if !ok {
			return nil, nil, fmt.Errorf("metadata with an address of %d bytes", len(field))
		}
		list, b = append(list, a.Unmap()), rest
	}
	return list, b, nil
}

// CutField splits the first field off b: its length (1 byte), then that many bytes.
func CutField(b []byte) (field, rest []byte, ok bool) {
	if len(b) < 1 || len(b)-1 < int(b[0]) {
		return nil, nil, false
	}
	end := 1 + int(b[0])
	return b[1:end], b[end:], true
}
