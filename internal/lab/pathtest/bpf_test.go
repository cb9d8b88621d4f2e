package pathtest

import (
	"encoding/binary"
	"net"
	"net/netip"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"

	"github.com/tulle-net/tulle/internal/testing/hosts"
)

// damage is what a BPF program does to a UDP datagram, whose address is in R7, at the offsets below.
type damage asm.Instructions

// Offsets into an Ethernet frame with an IPv4 packet without options.
const (
	offType    = 12
	offID      = 18
	offProto   = 23
	offDst     = 30
	offDstPort = 36
	offLen     = 38
	offSum     = 40
	headersLen = 42
)

// badSum makes the UDP checksum wrong. (0 would be none at all.)
var badSum = damage{
	asm.LoadMem(asm.R3, asm.R7, offSum, asm.Half),
	asm.Xor.Imm(asm.R3, 0x5555),
	asm.JNE.Imm(asm.R3, 0, "store"),
	asm.Mov.Imm(asm.R3, 1),
	asm.StoreMem(asm.R7, offSum, asm.R3, asm.Half).WithSymbol("store"),
}

// shortLen makes the UDP length eight bytes less than it is, in a datagram without checksum: the kernel delivers it so.
var shortLen = damage{
	asm.LoadMem(asm.R3, asm.R7, offLen, asm.Half),
	asm.HostTo(asm.BE, asm.R3, asm.Half),
	asm.Sub.Imm(asm.R3, 8),
	asm.HostTo(asm.BE, asm.R3, asm.Half),
	asm.StoreMem(asm.R7, offLen, asm.R3, asm.Half),
	asm.StoreImm(asm.R7, offSum, 0, asm.Half),
}

// damages attaches a BPF program to what a router receives from a device (tcx, Linux 6.6): it damages the datagrams to an
// address and port whose IP ID is not 0, which are all but the first of a train that the sender's kernel has cut.
func damages(t *testing.T, router *hosts.Host, dev string, to netip.AddrPort, how damage) {
	t.Helper()
	dst := to.Addr().As4()
	// The kernel's layout of struct __sk_buff: data at 76, data_end at 80. Values in packets are big endian.
	big := func(v uint16) int32 {
		return int32(binary.NativeEndian.Uint16(binary.BigEndian.AppendUint16(nil, v)))
	}
	differs := func(off int16, size asm.Size, want int32) asm.Instructions {
		return asm.Instructions{asm.LoadMem(asm.R3, asm.R7, off, size), asm.JNE.Imm32(asm.R3, want, "pass")}
	}
	code := asm.Instructions{
		asm.Mov.Reg(asm.R6, asm.R1),
		asm.Mov.Imm(asm.R2, headersLen),
		asm.FnSkbPullData.Call(),
		asm.LoadMem(asm.R7, asm.R6, 76, asm.Word),
		asm.LoadMem(asm.R8, asm.R6, 80, asm.Word),
		asm.Mov.Reg(asm.R3, asm.R7),
		asm.Add.Imm(asm.R3, headersLen),
		asm.JGT.Reg(asm.R3, asm.R8, "pass"),
	}
	code = append(code, differs(offType, asm.Half, big(0x0800))...)
	code = append(code, differs(offProto, asm.Byte, 17)...)
	code = append(code, differs(offDst, asm.Word, int32(binary.NativeEndian.Uint32(dst[:])))...)
	code = append(code, differs(offDstPort, asm.Half, big(to.Port()))...)
	code = append(code, asm.LoadMem(asm.R3, asm.R7, offID, asm.Half), asm.JEq.Imm(asm.R3, 0, "pass"))
	code = append(code, how...)
	code = append(code, asm.Mov.Imm(asm.R0, -1).WithSymbol("pass"), asm.Return()) // TCX_NEXT
	prog, err := ebpf.NewProgram(&ebpf.ProgramSpec{Name: "damage", Type: ebpf.SchedCLS, Instructions: code, License: "GPL"})
	if err != nil {
		t.Fatalf("load a BPF program: %+v", err)
	}
	t.Cleanup(func() { prog.Close() })
	err = router.Do(func() error {
		i, err := net.InterfaceByName(dev)
		if err != nil {
			return err
		}
		l, err := link.AttachTCX(link.TCXOptions{Interface: i.Index, Program: prog, Attach: ebpf.AttachTCXIngress})
		if err == nil {
			t.Cleanup(func() { l.Close() })
		}
		return err
	})
	if err != nil {
		t.Fatalf("attach a BPF program to %s: %v", dev, err)
	}
}
