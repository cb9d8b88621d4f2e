package encap

import (
	"bytes"
	"testing"

	"github.com/tulle-net/tulle/tunnel/header"
)

// Every cell of RFC 6040 figure 4, on real packets of both families: what arrives,
// with the DSCP of the inner header and a right IPv4 checksum.
func TestECNCells(t *testing.T) {
	const (
		not, ect1, ect0, ce = header.ECNNotECT, header.ECNECT1, header.ECNECT0, header.ECNCE
		drop                = 0xff
	)
	names := [4]string{not: "Not-ECT", ect1: "ECT(1)", ect0: "ECT(0)", ce: "CE"}
	for _, tt := range []struct{ inner, outer, want byte }{
		{not, not, not}, {not, ect0, not}, {not, ect1, not}, {not, ce, drop},
		{ect0, not, ect0}, {ect0, ect0, ect0}, {ect0, ect1, ect1}, {ect0, ce, ce},
		{ect1, not, ect1}, {ect1, ect0, ect1}, {ect1, ect1, ect1}, {ect1, ce, ce},
		{ce, not, ce}, {ce, ect0, ce}, {ce, ect1, ce}, {ce, ce, ce},
	} {
		t.Run(names[tt.inner]+" in "+names[tt.outer], func(t *testing.T) {
			const innerDSCP, outerDSCP = 46 << 2, 10 << 2
			tos, d := DecapECN(innerDSCP|tt.inner, outerDSCP|tt.outer)
			if tt.want == drop {
				if d != DropECN {
					t.Fatalf("%#x, %v", tos, d)
				}
			} else if d != DropNone || tos != innerDSCP|tt.want {
				t.Fatalf("%#x, %v", tos, d)
			}
			for _, v6 := range []bool{false, true} {
				p := goldenInner(v6)
				if v6 {
					header.IPv6(p).SetTrafficClass(innerDSCP | tt.inner)
				} else {
					header.IPv4(p).SetTOS(innerDSCP | tt.inner)
				}
				before := bytes.Clone(p)
				var in header.Inner
				if err := header.ParseInner(p, &in); err != nil {
					t.Fatal(err)
				}
				d := ApplyECN(p, &in, outerDSCP|tt.outer)
				if tt.want == drop {
					if d != DropECN || !bytes.Equal(p, before) {
						t.Errorf("v6 %v: %v", v6, d)
					}
					continue
				}
				var after header.Inner
				if err := header.ParseInner(p, &after); err != nil {
					t.Fatal(err)
				}
				if d != DropNone || after.TOS != innerDSCP|tt.want || in != after {
					t.Errorf("v6 %v: %v, TOS %#x, %#x in in", v6, d, after.TOS, in.TOS)
				}
				if !v6 && !header.IPv4(p).ChecksumValid() {
					t.Error("header checksum")
				}
				if tt.want == tt.inner && !bytes.Equal(p, before) {
					t.Errorf("v6 %v: changed without need", v6)
				}
			}
		})
	}
}

func TestOuterTOS(t *testing.T) {
	for tos := range 256 {
		if got := OuterTOS(byte(tos), true); got != byte(tos) {
			t.Errorf("copy: %#x to %#x", tos, got)
		}
		if got := OuterTOS(byte(tos), false); got != byte(tos&3) {
			t.Errorf("no copy: %#x to %#x", tos, got)
		}
	}
}
