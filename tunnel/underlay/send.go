package underlay

import (
	"encoding/binary"

	"golang.org/x/sys/unix"

	"github.com/tulle-net/tulle/internal/sys"
)

// The kernel's limits for one message.
const (
	MaxIovecs   = 1024  // slices (UIO_MAXIOV)
	MaxSegments = 64    // datagrams of a train (UDP_MAX_SEGMENTS before Linux 6.9; 128 since)
	MaxTrain    = 65507 // bytes of a train, or of a UDP datagram over IPv4
)

// A SendBatch gathers messages for one Send. Slices handed to Append are
// referenced, not copied: they stay unchanged until the Send or Reset.
type SendBatch struct {
	msgs    *sys.SendMsgs
	meta    []sendMeta
	control []byte // controlSpace bytes a message, filled in End
	single  *singles
}

type sendMeta struct {
	to      *Dest
	segment int // 0: one datagram
	size    int // bytes
	tos     byte
}

// sendControl is room for a TOS and a segment size.
var sendControl = sys.ControlSpace(4) + sys.ControlSpace(2)

// NewSendBatch allocates room for messages (trains or single datagrams) and for
// the slices that they are gathered from.
func NewSendBatch(maxMessages, maxIovecs int) *SendBatch {
	return &SendBatch{
		msgs:    sys.NewSendMsgs(maxMessages, maxIovecs),
		meta:    make([]sendMeta, maxMessages),
		control: make([]byte, maxMessages*sendControl),
	}
}

// Full reports that a message of n further slices has no room: Send first.
func (b *SendBatch) Full(n int) bool {
	return b.msgs.Messages() == b.msgs.MaxMessages() || b.msgs.Iovecs()+n > b.msgs.MaxIovecs()
}

// Len is the number of messages gathered.
func (b *SendBatch) Len() int { return b.msgs.Messages() }

// Begin starts a message with outer TOS or traffic class tos. The batch must
// not be Full.
func (b *SendBatch) Begin(to *Dest, tos byte) {
	b.meta[b.msgs.Messages()] = sendMeta{to: to, tos: tos}
	b.msgs.Begin(to.name)
}

// Append adds p to the message begun last. There must be room for it (Full),
// and a message has at most MaxIovecs slices.
func (b *SendBatch) Append(p []byte) {
	b.meta[b.msgs.Messages()-1].size += len(p)
	b.msgs.Append(p)
}

// Size is the number of bytes of the message begun last.
func (b *SendBatch) Size() int { return b.meta[b.msgs.Messages()-1].size }

// End completes the message begun last. segmentSize 0 makes it one datagram;
// otherwise it is a train of datagrams of segmentSize bytes, the last of which
// may be shorter: at most MaxSegments of them, MaxTrain bytes in all, and on
// UDP sockets only. A train of one is sent as a single datagram, because some
// kernels send a train of one with a bad checksum.
func (b *SendBatch) End(segmentSize int) {
	i := b.msgs.Messages() - 1
	m := &b.meta[i]
	if segmentSize > 0 && m.size > segmentSize {
		m.segment = segmentSize
	}
	if m.segment == 0 && m.tos == 0 {
		return
	}
	c := b.control[i*sendControl : i*sendControl : (i+1)*sendControl]
	c = appendTOS(c, m.to, m.tos)
	if m.segment > 0 {
		var v [2]byte
		binary.NativeEndian.PutUint16(v[:], uint16(m.segment))
		c = sys.AppendControl(c, unix.SOL_UDP, unix.UDP_SEGMENT, v[:])
	}
	b.msgs.SetControl(c)
}

// appendTOS adds the TOS or traffic class, unless it is the socket's default.
func appendTOS(c []byte, to *Dest, tos byte) []byte {
	if tos == 0 {
		return c
	}
	var v [4]byte
	binary.NativeEndian.PutUint32(v[:], uint32(tos))
	if to.addr.Addr().Is4() {
		return sys.AppendControl(c, unix.SOL_IP, unix.IP_TOS, v[:])
	}
	return sys.AppendControl(c, unix.SOL_IPV6, unix.IPV6_TCLASS, v[:])
}

// Reset forgets all messages.
func (b *SendBatch) Reset() { b.msgs.Reset() }

// SendResult counts what became of a batch. Its units are datagrams (the
// segments of a train each count) where nothing else is said.
type SendResult struct {
	Messages     int   // messages handed to the kernel as they were, trains as one
	Sent         int   // taken by the kernel
	Dropped      int   // not taken: see LastErr
	TooBig       int   // of Dropped: larger than the route's MTU (EMSGSIZE)
	GSOFallbacks int   // trains sent as single datagrams
	Retried      int   // messages that met an earlier packet's ICMP error: DrainErrors has it
	LastErr      error // why the last of Dropped was; nil when none was
}

func (m *sendMeta) datagrams() int {
	if m.segment == 0 {
		return 1
	}
	return (m.size + m.segment - 1) / m.segment
}
