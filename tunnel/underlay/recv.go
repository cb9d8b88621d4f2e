package underlay

import (
	"encoding/binary"
	"net/netip"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tulle-net/tulle/internal/sys"
)

// A RecvBatch has the buffers for one Recv.
type RecvBatch struct {
	msgs *sys.RecvMsgs
	meta []recvMeta
}

type recvMeta struct {
	segment int
	tos     byte
}

// MaxMessage is the slot size that fits every message: a train, or an IPIP packet of
// 64 KiB that the kernel has joined.
const MaxMessage = 1 << 16

// recvControl is the space for all control messages that our socket options enable:
// TOS, segment size, overflow counter.
var recvControl = 3 * sys.ControlSpace(4)

// NewRecvBatch allocates slots of slotSize bytes. Trains need slots of MaxMessage
// bytes.
func NewRecvBatch(slots, slotSize int) *RecvBatch {
	return &RecvBatch{msgs: sys.NewRecvMsgs(slots, slotSize, recvControl), meta: make([]recvMeta, slots)}
}

// Received is one message: a datagram, a train of datagrams, or a raw packet.
type Received struct {
	// Data is valid until the batch's next Recv; the caller may write to it. On a
	// raw IPv4 socket it begins with the outer IP header.
	Data []byte
	From netip.AddrPort // without zone; port 0 on raw sockets
	// SegmentSize is the length of the datagrams of a train, in bytes; the last
	// one may be shorter. 0 for a single datagram.
	SegmentSize int
	TOS         byte // outer TOS or traffic class, of every datagram of a train
	Truncated   bool // longer than the slot: the rest is lost
}

// Recv receives the messages that have arrived, as many as the batch has slots,
// without blocking. It returns their number, or sys.ErrAgain if there is none.
// DrainErrors, not Recv, reports pending ICMP errors of the socket.
func (s *Socket) Recv(b *RecvBatch) (n int, err error) {
	for {
		n, err = b.msgs.Recv(s.fd)
		if err == nil {
			s.received(b, n)
			return n, nil
		}
		if !isPending(err) {
			return 0, err
		}
		s.pending = true
	}
}

// WaitRecv is Wait and, if packets come often, Recv of at most most messages in one call: with
// n = 0 and no error, they are still to be received.
func (s *Socket) WaitRecv(b *RecvBatch, most int) (n int, waited time.Duration, err error) {
	if s.pending {
		s.pending = false
		return 0, 0, sys.ErrErrQueue
	}
	n, waited, err = s.poller.WaitRecv(b.msgs, most)
	if isPending(err) {
		return 0, waited, sys.ErrErrQueue
	}
	s.received(b, n)
	return n, waited, err
}

// received reads the control messages of the first n messages.
func (s *Socket) received(b *RecvBatch, n int) {
	for i := range n {
		b.meta[i] = s.control(b.msgs.Control(i))
		if b.msgs.Truncated(i) {
			s.truncated.Add(1)
		}
	}
}

// control reads the control messages of one message, which may be in any order.
func (s *Socket) control(c []byte) (m recvMeta) {
	for len(c) > 0 {
		msg, rest, ok := sys.NextControl(c)
		if !ok {
			break
		}
		c = rest
		switch {
		case msg.Level == unix.SOL_UDP && msg.Type == unix.UDP_GRO && len(msg.Data) >= 4:
			m.segment = int(int32(binary.NativeEndian.Uint32(msg.Data)))
		case msg.Level == unix.SOL_IP && msg.Type == unix.IP_TOS && len(msg.Data) >= 1:
			m.tos = msg.Data[0]
		case msg.Level == unix.SOL_IPV6 && msg.Type == unix.IPV6_TCLASS && len(msg.Data) >= 4:
			m.tos = byte(binary.NativeEndian.Uint32(msg.Data))
		case msg.Level == unix.SOL_SOCKET && msg.Type == unix.SO_RXQ_OVFL && len(msg.Data) >= 4:
			s.overflowed(binary.NativeEndian.Uint32(msg.Data))
		}
	}
	return m
}

// At returns message i of the last Recv.
func (b *RecvBatch) At(i int) Received {
	r := Received{
		Data:      b.msgs.Data(i),
		TOS:       b.meta[i].tos,
		Truncated: b.msgs.Truncated(i),
	}
	r.From, _ = sys.ParseSockaddr(b.msgs.Name(i))
	if seg := b.meta[i].segment; seg > 0 && seg < len(r.Data) {
		r.SegmentSize = seg
	}
	return r
}

// overflowed processes the kernel's 32-bit drop counter. It wraps, and the value of one
// message may be older than that of another.
func (s *Socket) overflowed(now uint32) {
	for {
		old := s.overflows.Load()
		ahead := now - uint32(old)
		if ahead == 0 || ahead >= 1<<31 {
			return
		}
		if s.overflows.CompareAndSwap(old, old+uint64(ahead)) {
			return
		}
	}
}

// Overflows returns the number of messages that the kernel has dropped since the socket
// was opened, because its receive buffer was full or their checksum was wrong.
func (s *Socket) Overflows() uint64 {
	if !s.closed.Load() {
		if n, err := sys.Drops(s.fd); err == nil {
			s.overflowed(n)
		}
	}
	return s.overflows.Load()
}

// Arrived returns when the last message of the last Recv came into the host (see sys.Arrived).
func (s *Socket) Arrived() (time.Time, error) { return sys.Arrived(s.fd) }

// Truncated returns the number of messages that were longer than their slot.
func (s *Socket) Truncated() uint64 { return s.truncated.Load() }
