package capture

import (
	"encoding/binary"
	"io"
)

// Writer writes events as pcapng (draft-ietf-opsawg-pcapng) with a comment on each packet, which gopacket's writer has no
// place for. The comment begins with the point. All packets belong to one interface of link type RAW: libpcap reads a file with
// a second one only if both have the same type, and up to 1.10 at least takes RAW and RAW for two (pcapng.c compares the type of
// the first as DLT_RAW, 12, with LINKTYPE_RAW, 101). The format's byte order is the writer's choice: little endian here.
type Writer struct {
	w   io.Writer
	buf []byte
}

// Block types and options of pcapng.
const (
	blockSection   = 0x0A0D0D0A
	blockInterface = 1
	blockPacket    = 6
	optEnd         = 0
	optComment     = 1
	optName        = 2 // of an interface
	optTSResol     = 9
	optFlags       = 2 // of a packet
	optUserAppl    = 4
	linkRaw        = 101
	flagInbound    = 1
	flagOutbound   = 2
)

// NewWriter writes the header of a capture. program names the program that captured.
func NewWriter(w io.Writer, program string) (*Writer, error) {
	p := &Writer{w: w}
	at := p.begin(blockSection)
	p.u32(0x1A2B3C4D)
	p.u16(1)
	p.u16(0)
	p.buf = append(p.buf, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff) // length of the section: not known
	p.option(optUserAppl, []byte(program))
	p.option(optEnd, nil)
	p.end(at)
	at = p.begin(blockInterface)
	p.u16(linkRaw)
	p.u16(0)
	p.u32(0) // no limit of the length
	p.option(optName, []byte("tulle"))
	p.option(optTSResol, []byte{9})
	p.option(optEnd, nil)
	p.end(at)
	return p, p.flush()
}

// Write writes one packet with its point and what became of it as the comment.
func (p *Writer) Write(e Event, outcome string) error {
	at := p.begin(blockPacket)
	flags := uint32(flagInbound)
	if e.Point == ToPeer || e.Point == ToPods {
		flags = flagOutbound
	}
	ns := uint64(e.Time.UnixNano())
	p.u32(0) // the interface
	p.u32(uint32(ns >> 32))
	p.u32(uint32(ns))
	p.u32(uint32(len(e.Data)))
	p.u32(uint32(e.Length))
	p.padded(e.Data)
	p.option(optComment, []byte(string(e.Point)+": "+outcome))
	p.option(optFlags, binary.LittleEndian.AppendUint32(nil, flags))
	p.option(optEnd, nil)
	p.end(at)
	return p.flush()
}

func (p *Writer) u16(v uint16) { p.buf = binary.LittleEndian.AppendUint16(p.buf, v) }
func (p *Writer) u32(v uint32) { p.buf = binary.LittleEndian.AppendUint32(p.buf, v) }

// padded appends b up to a multiple of four bytes.
func (p *Writer) padded(b []byte) {
	p.buf = append(p.buf, b...)
	for n := len(b); n%4 != 0; n++ {
		p.buf = append(p.buf, 0)
	}
}

func (p *Writer) option(code uint16, value []byte) {
	value = value[:min(len(value), 0xffff)]
	p.u16(code)
	p.u16(uint16(len(value)))
	p.padded(value)
}

// begin starts a block; end writes its length, in front and behind.
func (p *Writer) begin(kind uint32) int {
	at := len(p.buf)
	p.u32(kind)
	p.u32(0)
	return at
}

func (p *Writer) end(at int) {
	n := uint32(len(p.buf) - at + 4)
	binary.LittleEndian.PutUint32(p.buf[at+4:], n)
	p.u32(n)
}

func (p *Writer) flush() error {
	_, err := p.w.Write(p.buf)
	p.buf = p.buf[:0]
	return err
}
