package offload

import (
	"testing"
)

func benchFlow(v6, tcp bool, size, mss int) *flow {
	n := 4
	if v6 {
		n = 16
	}
	f := &flow{v6: v6, tcp: tcp, src: fill(n, 2), dst: fill(n, 3), ttl: 64, df: true, flags: 0x10, payload: fill(size, 4), mss: mss}
	if tcp {
		f.options = timestamps
	}
	return f
}

// benchSplit takes one super-packet apart.
func benchSplit(b *testing.B, f *flow) {
	pkt, h := f.super()
	s := NewSplitter(16 << 10)
	b.SetBytes(int64(len(f.payload)))
	b.ReportAllocs()
	n := 0
	for b.Loop() {
		s.Reset()
		segs, err := s.Split(pkt, h)
		if err != nil {
			b.Fatal(err)
		}
		n = len(segs)
	}
	b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N*n), "ns/segment")
}

func BenchmarkSplitTCP4(b *testing.B) { benchSplit(b, benchFlow(false, true, 46*1400, 1400)) }
func BenchmarkSplitTCP6(b *testing.B) { benchSplit(b, benchFlow(true, true, 46*1400, 1400)) }
func BenchmarkSplitUDP4(b *testing.B) { benchSplit(b, benchFlow(false, false, 46*1400, 1400)) }
func BenchmarkSplitSmall(b *testing.B) {
	benchSplit(b, benchFlow(false, false, 64*36, 36))
}

// benchJoin joins one run into one super-packet.
func benchJoin(b *testing.B, f *flow, trust bool) {
	segs := f.segments()
	j := NewJoiner(true, true)
	j.TrustChecksums = trust
	b.SetBytes(int64(len(f.payload)))
	b.ReportAllocs()
	for b.Loop() {
		for _, p := range segs {
			if !j.Add(p) {
				b.Fatal("not joined")
			}
		}
		if iov, ok := j.FlushVnet(); !ok || len(iov) != len(segs)+1 {
			b.Fatal("not one super-packet")
		}
		j.Undo()
	}
	b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N*len(segs)), "ns/segment")
}

func BenchmarkJoinTCP4(b *testing.B) { benchJoin(b, benchFlow(false, true, 46*1400, 1400), false) }
func BenchmarkJoinTCP6(b *testing.B) { benchJoin(b, benchFlow(true, true, 46*1400, 1400), false) }
func BenchmarkJoinTCP4Trusting(b *testing.B) {
	benchJoin(b, benchFlow(false, true, 46*1400, 1400), true)
}

// A train of 64-byte datagrams: 36 bytes of payload behind 28 of headers.
func BenchmarkJoinSmall(b *testing.B) { benchJoin(b, benchFlow(false, false, 64*36, 36), false) }

// A train of which no two packets belong to one flow: what joining costs where it gains nothing.
func BenchmarkJoinNothing(b *testing.B) {
	var train [][]byte
	for i := range 64 {
		f := benchFlow(false, false, 36, 36)
		f.sport = uint16(i)
		train = append(train, f.segments()[0])
	}
	j := NewJoiner(true, true)
	b.SetBytes(64 * 64)
	b.ReportAllocs()
	for b.Loop() {
		for _, p := range train {
			if !j.Add(p) {
				j.FlushVnet()
				j.Add(p)
			}
		}
		j.FlushVnet()
	}
	b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N*len(train)), "ns/segment")
}

// TestNoAllocations holds what the benchmarks show.
func TestNoAllocations(t *testing.T) {
	f := benchFlow(false, true, 46*1400, 1400)
	pkt, h := f.super()
	segs := f.segments()
	s, j := NewSplitter(16<<10), NewJoiner(true, true)
	if n := testing.AllocsPerRun(100, func() {
		s.Reset()
		if _, err := s.Split(pkt, h); err != nil {
			t.Fatal(err)
		}
		for _, p := range segs {
			if !j.Add(p) {
				t.Fatal("not joined")
			}
		}
		j.FlushVnet()
		j.Undo()
		RawVnetHdr(pkt, 1500, NotTold)
	}); n != 0 {
		t.Errorf("%v allocations per super-packet, want 0", n)
	}
}
