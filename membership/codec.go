package membership

import (
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
)

// The binary form of entries, for gossip, messages and the state file.
// All integers are big-endian or unsigned varints (LEB128).
//
//	offset  size  field
//	0       1     format version, 1
//	1       1–10  number of entries, varint, at most MaxEntries
//	…             entries, each:
//	  0     1     flags: bit 0 IPv6 prefix, bit 1 external, bit 2 IPv6 endpoint, bit 3 port and MAC; others 0
//	  1     1     prefix length
//	  2     n     the prefix's first ⌈length/8⌉ bytes; bits beyond the length are 0
//	        16    owner
//	        1–10  version, varint, 1…MaxVersion
//	  when external:
//	        4|16  endpoint
//	        1     length of the encapsulation's name, at most 16
//	        n     the name
//	  with port and MAC, not both 0:
//	        2     port
//	        6     MAC
//
// Entries are in table order and do not overlap. A decoder refuses other encodings:
// each set of entries has exactly one encoding, and merging stays linear.
const formatVersion = 1

// MaxEntries is the maximum number of entries in one encoding. The design target is
// 10,000 prefixes; this is six times as many.
const MaxEntries = 65536

const (
	flagPrefix6       = 1 << 0
	flagExternal      = 1 << 1
	flagEndpoint6     = 1 << 2
	flagPortMAC       = 1 << 3
	flagsKnown        = flagPrefix6 | flagExternal | flagEndpoint6 | flagPortMAC
	flagsExternalOnly = flagEndpoint6 | flagPortMAC
)

// minEntrySize is the smallest encoded entry: a /0, with a one-byte version.
const minEntrySize = 1 + 1 + 0 + 16 + 1

// ErrFormat is wrapped by every error of [DecodeEntries] about bytes that are
// not an encoding of this format version.
var ErrFormat = errors.New("malformed table entries")

// AppendEntries appends the encoding of the entries to b. It normalises the entries
// first, as [NewTable] does.
func AppendEntries(b []byte, entries []Entry) []byte {
	entries = normalise(entries)
	b = append(b, formatVersion)
	b = binary.AppendUvarint(b, uint64(len(entries)))
	for _, e := range entries {
		b = appendEntry(b, e)
	}
	return b
}

func appendEntry(b []byte, e Entry) []byte {
	var flags byte
	a := e.Prefix.Addr()
	if a.Is6() {
		flags |= flagPrefix6
	}
	if x := e.External; x != nil {
		flags |= flagExternal
		if x.Endpoint.Is6() {
			flags |= flagEndpoint6
		}
		if x.Port != 0 || x.MAC != [6]byte{} {
			flags |= flagPortMAC
		}
	}
	b = append(b, flags, byte(e.Prefix.Bits()))
	b = appendAddr(b, a, (e.Prefix.Bits()+7)/8)
	b = append(b, e.Owner[:]...)
	b = binary.AppendUvarint(b, e.Version)
	if x := e.External; x != nil {
		b = appendAddr(b, x.Endpoint, x.Endpoint.BitLen()/8)
		b = append(b, byte(len(x.Encap)))
		b = append(b, x.Encap...)
		if flags&flagPortMAC != 0 {
			b = binary.BigEndian.AppendUint16(b, x.Port)
			b = append(b, x.MAC[:]...)
		}
	}
	return b
}

func appendAddr(b []byte, a netip.Addr, n int) []byte {
	if a.Is4() {
		v := a.As4()
		return append(b, v[:n]...)
	}
	v := a.As16()
	return append(b, v[:n]...)
}

// DecodeEntries decodes the encoding at the start of b and returns the bytes after
// it. It never panics, and allocates at most in proportion to len(b). The entries do
// not share memory with b.
func DecodeEntries(b []byte) (entries []Entry, rest []byte, err error) {
	d := decoder{b: b}
	if v := d.byte(); d.err == nil && v != formatVersion {
		return nil, nil, fmt.Errorf("%w: format version %d, this program reads %d", ErrFormat, v, formatVersion)
	}
	n := d.uvarint()
	if d.err == nil && (n > MaxEntries || n > uint64(len(d.b)/minEntrySize)) {
		return nil, nil, fmt.Errorf("%w: %d entries announced in %d bytes", ErrFormat, n, len(d.b))
	}
	if d.err != nil {
		return nil, nil, d.err
	}
	if n > 0 {
		entries = make([]Entry, 0, n)
	}
	for range n {
		e := d.entry()
		if d.err != nil {
			return nil, nil, d.err
		}
		if len(entries) > 0 {
			last := entries[len(entries)-1].Prefix
			if comparePrefix(last, e.Prefix) >= 0 || last.Overlaps(e.Prefix) {
				return nil, nil, fmt.Errorf("%w: %v follows %v", ErrFormat, e.Prefix, last)
			}
		}
		entries = append(entries, e)
	}
	return entries, d.b, nil
}

// decoder reads from b. After the first error it reads nothing more.
type decoder struct {
	b   []byte
	err error
}

func (d *decoder) fail(format string, args ...any) {
	if d.err == nil {
		d.err = fmt.Errorf("%w: %s", ErrFormat, fmt.Sprintf(format, args...))
	}
}

func (d *decoder) take(n int) []byte {
	if d.err != nil {
		return nil
	}
	if n > len(d.b) {
		d.fail("truncated: %d bytes where %d are wanted", len(d.b), n)
		return nil
	}
	v := d.b[:n]
	d.b = d.b[n:]
	return v
}

func (d *decoder) byte() byte {
	if v := d.take(1); v != nil {
		return v[0]
	}
	return 0
}

func (d *decoder) uint16() uint16 {
	if v := d.take(2); v != nil {
		return binary.BigEndian.Uint16(v)
	}
	return 0
}

func (d *decoder) uvarint() uint64 {
	if d.err != nil {
		return 0
	}
	v, n := binary.Uvarint(d.b)
	if n <= 0 || n > 1 && d.b[n-1] == 0 { // too long, or not the shortest form
		d.fail("bad varint")
		return 0
	}
	d.b = d.b[n:]
	return v
}

func (d *decoder) addr(six bool, n int) netip.Addr {
	if six {
		var v [16]byte
		copy(v[:], d.take(n))
		return netip.AddrFrom16(v)
	}
	var v [4]byte
	copy(v[:], d.take(n))
	return netip.AddrFrom4(v)
}

func (d *decoder) entry() (e Entry) {
	flags, bits := d.byte(), int(d.byte())
	size := 32
	if flags&flagPrefix6 != 0 {
		size = 128
	}
	if flags&^flagsKnown != 0 || flags&flagsExternalOnly != 0 && flags&flagExternal == 0 || bits > size {
		d.fail("flags %#x with a prefix length of %d", flags, bits)
		return e
	}
	e.Prefix = netip.PrefixFrom(d.addr(size == 128, (bits+7)/8), bits)
	copy(e.Owner[:], d.take(len(e.Owner)))
	e.Version = d.uvarint()
	if flags&flagExternal != 0 {
		n := 4
		if flags&flagEndpoint6 != 0 {
			n = 16
		}
		x := &External{Endpoint: d.addr(n == 16, n)}
		x.Encap = string(d.take(int(d.byte())))
		if flags&flagPortMAC != 0 {
			x.Port = d.uint16()
			copy(x.MAC[:], d.take(len(x.MAC)))
			if x.Port == 0 && x.MAC == [6]byte{} {
				d.fail("an external peer with neither port nor MAC announced both")
			}
		}
		e.External = x
	}
	if d.err == nil {
		if err := e.Check(); err != nil {
			d.fail("%v", err)
		}
	}
	return e
}

// Digest returns a hash of the table: equal for equal tables. It is computed once
// after each change.
func (t *Table) Digest() [32]byte {
	if t.digest == nil {
		d := sha256.Sum256(AppendEntries(make([]byte, 0, 32*len(t.entries)+8), t.entries))
		t.digest = &d
	}
	return *t.digest
}
