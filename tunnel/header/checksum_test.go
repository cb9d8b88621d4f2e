package header

import (
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"testing"

	"pgregory.net/rapid"
)

// slowSum is RFC 1071 §4.1 as it stands there, over big-endian words.
func slowSum(b []byte, initial uint32) uint16 {
	s := uint64(initial)
	for len(b) > 1 {
		s += uint64(b[0])<<8 | uint64(b[1])
		b = b[2:]
	}
	if len(b) == 1 {
		s += uint64(b[0]) << 8
	}
	for s>>16 != 0 {
		s = s>>16 + s&0xffff
	}
	return uint16(s)
}

func TestSumLengthsAndAlignments(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	random := make([]byte, 4096+64)
	for i := range random {
		random[i] = byte(r.Uint32())
	}
	ones := make([]byte, len(random))
	for i := range ones {
		ones[i] = 0xff
	}
	for name, sum := range implementations() {
		t.Run(name, func(t *testing.T) {
			for _, buf := range [][]byte{random, ones, make([]byte, len(random))} {
				for n := range 1100 {
					for off := range 9 {
						if got, want := sum(buf[off:off+n]), slowSum(buf[off:off+n], 0); got != want {
							t.Fatalf("%d bytes at %d: %#04x, want %#04x", n, off, got, want)
						}
					}
				}
				for n := 1100; n < 4096; n += 61 {
					if got, want := sum(buf[:n]), slowSum(buf[:n], 0); got != want {
						t.Fatalf("%d bytes: %#04x, want %#04x", n, got, want)
					}
				}
			}
		})
	}
}

// All ones are the worst case for carries, at the length of the longest packet and beyond.
func TestSumLong(t *testing.T) {
	for _, n := range []int{65535, 1 << 20, 1<<22 + 3} {
		b := make([]byte, n)
		for i := range b {
			b[i] = 0xff
		}
		want := slowSum(b, 0)
		for name, sum := range implementations() {
			if got := sum(b); got != want {
				t.Errorf("%s: %d bytes of 0xff: %#04x, want %#04x", name, n, got, want)
			}
		}
	}
}

func TestSumProperties(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		b := rapid.SliceOfN(rapid.Byte(), 0, 3000).Draw(t, "b")
		initial := rapid.Uint32().Draw(t, "initial")
		want := slowSum(b, initial)
		if got := Fold(Sum(b, initial)); got != want {
			t.Fatalf("Sum %#04x, want %#04x", got, want)
		}
		if got := Checksum(b); got != ^slowSum(b, 0) {
			t.Fatalf("Checksum %#04x, want %#04x", got, ^slowSum(b, 0))
		}
		cut := rapid.IntRange(0, len(b)/2).Draw(t, "cut") * 2
		if got := Fold(Sum(b[cut:], Sum(b[:cut], initial))); got != want {
			t.Fatalf("in pieces of %d and %d: %#04x, want %#04x", cut, len(b)-cut, got, want)
		}
	})
}

func TestPseudoSum(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		n := rapid.SampledFrom([]int{4, 16}).Draw(t, "address length")
		src := rapid.SliceOfN(rapid.Byte(), n, n).Draw(t, "src")
		dst := rapid.SliceOfN(rapid.Byte(), n, n).Draw(t, "dst")
		proto := rapid.Byte().Draw(t, "proto")
		length := rapid.Uint32().Draw(t, "length")
		pseudo := append(append([]byte{}, src...), dst...)
		pseudo = binary.BigEndian.AppendUint32(pseudo, length)
		pseudo = append(pseudo, 0, 0, 0, proto)
		if got, want := Fold(PseudoSum(proto, src, dst, length)), slowSum(pseudo, 0); got != want {
			t.Fatalf("%#04x, want %#04x", got, want)
		}
	})
}

func TestUpdateChecksum16(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		b := rapid.SliceOfN(rapid.Byte(), 2, 64).Draw(t, "b")
		b[0] |= 1 // a header is never all zero
		before := Checksum(b)
		at := rapid.IntRange(0, len(b)/2-1).Draw(t, "word") * 2
		old, to := binary.BigEndian.Uint16(b[at:]), rapid.Uint16().Draw(t, "to")
		binary.BigEndian.PutUint16(b[at:], to)
		if at == 0 && to == 0 {
			return
		}
		if got, want := UpdateChecksum16(before, old, to), Checksum(b); got != want {
			t.Fatalf("%#04x from %#04x to %#04x: %#04x, want %#04x", before, old, to, got, want)
		}
	})
}

// The examples of RFC 1071 §3 and RFC 1624 §4.
func TestChecksumExamples(t *testing.T) {
	if got := Fold(Sum([]byte{0x00, 0x01, 0xf2, 0x03, 0xf4, 0xf5, 0xf6, 0xf7}, 0)); got != 0xddf2 {
		t.Errorf("RFC 1071 §3: %#04x, want 0xddf2", got)
	}
	if got := UpdateChecksum16(0xdd2f, 0x5555, 0x3285); got != 0x0000 {
		t.Errorf("RFC 1624 §4: %#04x, want 0", got)
	}
}

func FuzzSum(f *testing.F) {
	f.Add([]byte{}, uint32(0))
	f.Add([]byte{0xff, 0xff, 0xff}, uint32(0xffffffff))
	f.Fuzz(func(t *testing.T, b []byte, initial uint32) {
		want := slowSum(b, initial)
		if got := Fold(Sum(b, initial)); got != want {
			t.Fatalf("Sum %#04x, want %#04x", got, want)
		}
		for name, sum := range implementations() {
			if got := sum(b); got != slowSum(b, 0) {
				t.Fatalf("%s: %#04x, want %#04x", name, got, slowSum(b, 0))
			}
		}
	})
}

var sink uint16

func BenchmarkSum(b *testing.B) {
	buf := make([]byte, 65536)
	for name, sum := range implementations() {
		for _, n := range []int{20, 40, 64, 128, 192, 256, 1400, 65536} {
			b.Run(fmt.Sprintf("%s/%d", name, n), func(b *testing.B) {
				b.SetBytes(int64(n))
				b.ReportAllocs()
				for b.Loop() {
					sink = sum(buf[:n])
				}
			})
		}
	}
}
