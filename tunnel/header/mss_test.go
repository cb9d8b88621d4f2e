package header

import (
	"bytes"
	"encoding/binary"
	"testing"
)

func TestClampMSS(t *testing.T) {
	mss := func(n uint16) []byte { return binary.BigEndian.AppendUint16([]byte{2, 4}, n) }
	odd := join([]byte{1}, mss(1460), []byte{1, 1, 0}) // begins at an odd offset
	late := join([]byte{1, 1, 8, 10, 0, 0, 0, 0, 0, 0, 0, 0}, mss(1460))
	for _, tt := range []struct {
		name    string
		v6      bool
		flags   TCPFlags
		options []byte
		mtu     int
		want    uint16 // 0: untouched
	}{
		{"SYN", false, TCPSyn, mss(1460), 1400, 1360},
		{"SYN/ACK", false, TCPSyn | TCPAck, mss(1460), 1400, 1360},
		{"v6", true, TCPSyn, mss(1440), 1400, 1340},
		{"v6 SYN/ACK", true, TCPSyn | TCPAck, mss(1440), 1280, 1220},
		{"odd offset", false, TCPSyn, odd, 1400, 1360},
		{"odd offset, v6", true, TCPSyn, odd, 1400, 1340},
		{"behind timestamps", false, TCPSyn, late, 1400, 1360},
		{"jumbo", false, TCPSyn, mss(65495), 8972, 8932},
		{"equal", false, TCPSyn, mss(1360), 1400, 0},
		{"never raised", false, TCPSyn, mss(536), 1400, 0},
		{"zero is not raised", false, TCPSyn, mss(0), 1400, 0},
		{"no SYN", false, TCPAck, mss(1460), 1400, 0},
		{"no option", false, TCPSyn, nil, 1400, 0},
		{"after the end of options", false, TCPSyn, join([]byte{0, 1, 1, 1}, mss(1460)), 1400, 0},
		{"option of length 0", false, TCPSyn, join([]byte{8, 0, 1, 1}, mss(1460)), 1400, 0},
		{"option of length 1", false, TCPSyn, join([]byte{8, 1, 1, 1}, mss(1460)), 1400, 0},
		{"option beyond the header", false, TCPSyn, []byte{8, 10, 0, 0}, 1400, 0},
		{"kind without length", false, TCPSyn, []byte{1, 1, 1, 2}, 1400, 0},
		{"MSS of length 3", false, TCPSyn, []byte{2, 3, 5, 0}, 1400, 0},
		{"MTU too small to make sense", false, TCPSyn, mss(1460), 40, 0},
		{"MTU negative", false, TCPSyn, mss(1460), -1, 0},
	} {
		t.Run(tt.name, func(t *testing.T) {
			p := tcp(tt.v6, tt.flags, tt.options, nil)
			before := bytes.Clone(p)
			var in Inner
			if err := ParseInner(p, &in); err != nil {
				t.Fatal(err)
			}
			if got := ClampMSS(p, &in, tt.mtu); got != (tt.want != 0) {
				t.Fatalf("changed: %v", got)
			}
			if tt.want == 0 {
				if !bytes.Equal(p, before) {
					t.Error("packet changed")
				}
				return
			}
			seg := TCP(in.Payload(p))
			if !seg.ChecksumValid(in.SrcBytes(p), in.DstBytes(p)) {
				t.Error("checksum wrong")
			}
			i := bytes.Index(seg.Options(), []byte{2, 4})
			if got := binary.BigEndian.Uint16(seg.Options()[i+2:]); got != tt.want {
				t.Errorf("MSS %d, want %d", got, tt.want)
			}
			if ClampMSS(p, &in, tt.mtu) {
				t.Error("changed again")
			}
		})
	}
}

func TestClampMSSLeavesOthersAlone(t *testing.T) {
	syn := tcp(false, TCPSyn, []byte{2, 4, 5, 180}, nil)[20:]
	for _, tt := range []struct {
		name string
		p    []byte
	}{
		{"UDP", ip4(ProtoUDP, 0, syn)},
		{"later fragment", ip4(ProtoTCP, 1, syn)},
		{"header cut", ip4(ProtoTCP, 0, syn[:16])},
		{"options cut", ip4(ProtoTCP, IPv4FlagMF, syn[:22])},
		{"data offset 0", ip4(ProtoTCP, 0, append(append(bytes.Clone(syn[:12]), 0), syn[13:]...))},
		{"v6 later fragment", ip6(ProtoFragment, join(AppendIPv6Fragment(nil, ProtoTCP, 8, false, 1), syn))},
	} {
		t.Run(tt.name, func(t *testing.T) {
			var in Inner
			if err := ParseInner(tt.p, &in); err != nil {
				t.Fatal(err)
			}
			before := bytes.Clone(tt.p)
			if ClampMSS(tt.p, &in, 1000) || !bytes.Equal(tt.p, before) {
				t.Error("changed")
			}
		})
	}
}
