package device

import (
	"bytes"
	"encoding/binary"
	"errors"
	"os"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/tulle-net/tulle/internal/sys"
)

// mark is an IPv4 packet with a UDP header from that port.
func mark(from uint16) []byte {
	b := append([]byte{0x45, 0, 0, 28, 0, 0, 0, 0, 1, 17}, make([]byte, 18)...)
	binary.BigEndian.PutUint16(b[20:], from)
	return b
}

// quiet keeps the kernel from sending packets of its own.
func (h *host) quiet() {
	h.t.Helper()
	h.Do(func() error { return os.WriteFile("/proc/sys/net/ipv6/conf/default/disable_ipv6", []byte("1"), 0) })
}

// What Mark sends comes out as it is, behind what was in the queue before and in front of what comes after.
func TestMark(t *testing.T) {
	h := newHost(t)
	h.quiet()
	d := h.open(Options{Name: "tun0", TxQueueLen: 8})
	buf := make([]byte, VnetHdrLen+MaxPacket)
	for i := range uint16(8) {
		if err := d.Mark(mark(i)); err != nil {
			t.Fatal(err)
		}
	}
	if err := d.Mark(mark(8)); !errors.Is(err, unix.ENOBUFS) {
		t.Errorf("a mark for a full queue: %v, want ENOBUFS", err)
	}
	for i := range uint16(8) {
		n, err := d.Queues()[0].Read(buf)
		if err != nil || !bytes.Equal(buf[VnetHdrLen:n], mark(i)) {
			t.Fatalf("read % x, %v; want % x", buf[:n], err, mark(i))
		}
	}
	if _, err := d.Queues()[0].Read(buf); err != sys.ErrAgain {
		t.Errorf("behind the marks: %v, want an empty queue", err)
	}
}

// With several queues, the flow of a mark chooses one of them, always the same one.
func TestMarkQueues(t *testing.T) {
	h := newHost(t)
	h.quiet()
	d := h.open(Options{Name: "tun0", Queues: 3})
	buf := make([]byte, VnetHdrLen+MaxPacket)
	seen := map[int]bool{}
	for from := range uint16(64) {
		var in []int
		for range 2 {
			if err := d.Mark(mark(from)); err != nil {
				t.Fatal(err)
			}
			for i, q := range d.Queues() {
				if _, err := q.Read(buf); err == nil {
					in = append(in, i)
				}
			}
		}
		if len(in) != 2 || in[0] != in[1] {
			t.Fatalf("two marks of one flow came out of the queues %v", in)
		}
		seen[in[0]] = true
	}
	if len(seen) != 3 {
		t.Errorf("64 flows came out of the queues %v only, want all three", seen)
	}
}
