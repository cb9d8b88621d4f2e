package sys

import (
	"encoding/binary"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Control messages (cmsg(3)): struct cmsghdr{size_t len; int level, type},
// the data, and padding up to a multiple of the word size.
const (
	cmsgHdrLen = int(unsafe.Sizeof(unix.Cmsghdr{}))
	cmsgAlign  = int(unsafe.Sizeof(uintptr(0)))
)

// ControlSpace returns the space for a control message with n bytes of data.
func ControlSpace(n int) int { return cmsgAligned(cmsgHdrLen) + cmsgAligned(n) }

func cmsgAligned(n int) int { return (n + cmsgAlign - 1) &^ (cmsgAlign - 1) }

// Control is one control message.
type Control struct {
	Level, Type int
	Data        []byte
}

// NextControl returns the first control message of b and the rest. ok is false at the
// end, or if the rest is malformed.
func NextControl(b []byte) (c Control, rest []byte, ok bool) {
	if len(b) < cmsgHdrLen {
		return Control{}, nil, false
	}
	var n int
	if cmsgAlign == 8 {
		n = int(binary.NativeEndian.Uint64(b))
	} else {
		n = int(binary.NativeEndian.Uint32(b))
	}
	if n < cmsgHdrLen || n > len(b) {
		return Control{}, nil, false
	}
	c = Control{
		Level: int(int32(binary.NativeEndian.Uint32(b[cmsgAlign:]))),
		Type:  int(int32(binary.NativeEndian.Uint32(b[cmsgAlign+4:]))),
		Data:  b[cmsgAligned(cmsgHdrLen):n],
	}
	return c, b[min(cmsgAligned(n), len(b)):], true
}

// AppendControl appends a control message to b, whose length is a multiple of
// the word size.
func AppendControl(b []byte, level, typ int, data []byte) []byte {
	n := cmsgAligned(cmsgHdrLen) + len(data)
	if cmsgAlign == 8 {
		b = binary.NativeEndian.AppendUint64(b, uint64(n))
	} else {
		b = binary.NativeEndian.AppendUint32(b, uint32(n))
	}
	b = binary.NativeEndian.AppendUint32(b, uint32(level))
	b = binary.NativeEndian.AppendUint32(b, uint32(typ))
	b = append(b, data...)
	for range cmsgAligned(len(data)) - len(data) {
		b = append(b, 0)
	}
	return b
}
