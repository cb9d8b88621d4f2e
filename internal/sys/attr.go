package sys

import (
	"bytes"
	"encoding/binary"
)

// EachAttr calls f for each netlink attribute of b; it ends at the first malformed one.
func EachAttr(b []byte, f func(kind uint16, value []byte)) {
	const header, nested = 4, 0x3fff // struct nlattr; NLA_TYPE_MASK
	native := binary.NativeEndian
	for len(b) >= header {
		n := int(native.Uint16(b))
		if n < header || n > len(b) {
			return
		}
		f(native.Uint16(b[2:])&nested, b[header:n])
		b = b[min((n+3)&^3, len(b)):]
	}
}

// CString is the text of an attribute, up to its zero byte.
func CString(b []byte) string {
	text, _, _ := bytes.Cut(b, []byte{0})
	return string(text)
}
