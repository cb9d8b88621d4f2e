package underlay

import (
	"encoding/binary"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/tulle-net/tulle/internal/sys"
)

// The kernel's limits for one message.
const (
	MaxIovecs   = 1024  // slices (UIO_MAXIOV)
	MaxSegments = 64    // datagrams of a train (UDP_MAX_SEGMENTS before Linux 6.9; 128 since)
	MaxTrain    = 65507 // bytes of a train, or of a UDP datagram over IPv4
)

// A SendBatch collects messages for one Send. Append references slices and does not
// copy them: they must not change until Send or Reset.
type SendBatch struct {
	msgs    *sys.SendMsgs
	meta    []sendMeta
	control []byte // sendControl bytes per message, filled in by End
	single  *singles

	// Refused, if it is set, is called during Send with each message that the kernel does not take.
	Refused func(Refused)
}

// Refused is a message that the kernel did not take, valid during the call.
type Refused struct {
	To  *Dest
	TOS byte

	batch *SendBatch
	index int
}

// Datagrams copies the datagrams of the message: one, or those of a train.
func (r Refused) Datagrams() (out [][]byte) {
	m := &r.batch.meta[r.index]
	all := make([]byte, 0, m.size)
	for k := range r.batch.msgs.MessageIovecs(r.index) {
		all = append(all, r.batch.msgs.Slice(r.index, k)...)
	}
	if m.segment == 0 {
		return [][]byte{all}
	}
	return slices.Collect(slices.Chunk(all, m.segment))
}

type sendMeta struct {
	to      *Dest
	segment int // 0: one datagram
	size    int // bytes
	tos     byte
}

// sendControl is the space for the control messages of one message: TOS and segment size.
var sendControl = sys.ControlSpace(4) + sys.ControlSpace(2)

// NewSendBatch allocates space for maxMessages messages (trains or single datagrams)
// of maxIovecs slices in total.
func NewSendBatch(maxMessages, maxIovecs int) *SendBatch {
	return &SendBatch{
		msgs:    sys.NewSendMsgs(maxMessages, maxIovecs),
		meta:    make([]sendMeta, maxMessages),
		control: make([]byte, maxMessages*sendControl),
	}
}

// Full reports whether a message of n slices does not fit any more. Then Send first.
func (b *SendBatch) Full(n int) bool {
	return b.msgs.Messages() == b.msgs.MaxMessages() || b.msgs.Iovecs()+n > b.msgs.MaxIovecs()
}

// Len returns the number of messages.
func (b *SendBatch) Len() int { return b.msgs.Messages() }

// Begin starts a message to to, with tos as the outer TOS or traffic class. The batch
// must not be Full.
func (b *SendBatch) Begin(to *Dest, tos byte) {
	b.meta[b.msgs.Messages()] = sendMeta{to: to, tos: tos}
	b.msgs.Begin(to.name)
}

// Append adds p to the current message. The batch must have space for it (Full). A
// message has at most MaxIovecs slices.
func (b *SendBatch) Append(p []byte) {
	b.meta[b.msgs.Messages()-1].size += len(p)
	b.msgs.Append(p)
}

// Size returns the number of bytes of the current message.
func (b *SendBatch) Size() int { return b.meta[b.msgs.Messages()-1].size }

// End completes the current message. With segmentSize 0 it is one datagram. Otherwise
// it is a train of datagrams of segmentSize bytes, of which the last may be shorter:
// at most MaxSegments datagrams and MaxTrain bytes, and only on UDP sockets. A train of
// one is sent as a single datagram, because some kernels send a train of one with a
// bad checksum.
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

// Reset discards all messages.
func (b *SendBatch) Reset() { b.msgs.Reset() }

// SendResult counts the results of one Send. Unless noted otherwise it counts
// datagrams (each segment of a train counts).
type SendResult struct {
	Messages     int   // messages handed to the kernel as they were, trains as one
	Sent         int   // accepted by the kernel
	Dropped      int   // not accepted: see LastErr
	TooBig       int   // of Dropped: larger than the route's MTU (EMSGSIZE)
	GSOFallbacks int   // trains sent as single datagrams
	Retried      int   // messages whose send returned an earlier packet's ICMP error; DrainErrors reports it
	LastErr      error // reason for the last of Dropped; nil if none was dropped
}

func (m *sendMeta) datagrams() int {
	if m.segment == 0 {
		return 1
	}
	return (m.size + m.segment - 1) / m.segment
}
