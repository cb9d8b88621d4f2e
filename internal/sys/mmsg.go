package sys

import (
	"unsafe"

	"golang.org/x/sys/unix"
)

// mmsghdr is struct mmsghdr of recvmmsg(2). Go pads it to a multiple of the
// pointer size as C does.
type mmsghdr struct {
	hdr unix.Msghdr
	n   uint32
}

// sockaddrSpace is the size of a sockaddr_in6, the larger of our two families.
const sockaddrSpace = unix.SizeofSockaddrInet6

// RecvMsgs has the buffers for one recvmmsg(2): slots of equal size, each with space
// for the sender's address and for control messages. NewRecvMsgs allocates them;
// Recv allocates nothing.
type RecvMsgs struct {
	hdrs    []mmsghdr
	iovs    []unix.Iovec
	data    []byte
	names   []byte
	control []byte
	slot    int
	ctl     int
	used    int // slots that the last Recv filled, whose lengths need resetting
}

// NewRecvMsgs allocates slots of slotSize bytes, with controlSize bytes of
// control messages each.
func NewRecvMsgs(slots, slotSize, controlSize int) *RecvMsgs {
	controlSize = (controlSize + 7) &^ 7
	m := &RecvMsgs{
		hdrs:    make([]mmsghdr, slots),
		iovs:    make([]unix.Iovec, slots),
		data:    make([]byte, slots*slotSize),
		names:   make([]byte, slots*sockaddrSpace),
		control: make([]byte, slots*controlSize),
		slot:    slotSize,
		ctl:     controlSize,
		used:    slots,
	}
	for i := range m.hdrs {
		m.iovs[i].Base = &m.data[i*slotSize]
		m.iovs[i].SetLen(slotSize)
		h := &m.hdrs[i].hdr
		h.Iov = &m.iovs[i]
		h.SetIovlen(1)
		h.Name = &m.names[i*sockaddrSpace]
		if controlSize > 0 {
			h.Control = &m.control[i*controlSize]
		}
	}
	return m
}

// Slots returns the maximum number of messages per Recv.
func (m *RecvMsgs) Slots() int { return len(m.hdrs) }

// Recv receives up to Slots() messages from the socket fd, without waiting, and returns
// their number, or ErrAgain if there is none. It overwrites the messages of the previous
// Recv.
func (m *RecvMsgs) Recv(fd int) (int, error) {
	for {
		n, err := m.recv(fd, len(m.hdrs), unix.MSG_DONTWAIT)
		if err != unix.EINTR {
			return n, err
		}
	}
}

// recv is one call of recvmmsg(2), for at most that many messages.
func (m *RecvMsgs) recv(fd, most int, flags uintptr) (int, error) {
	for i := range m.hdrs[:m.used] {
		h := &m.hdrs[i].hdr
		h.Namelen = sockaddrSpace
		h.SetControllen(m.ctl)
		h.Flags = 0
	}
	n, _, errno := unix.RawSyscall6(unix.SYS_RECVMMSG, uintptr(fd), uintptr(unsafe.Pointer(&m.hdrs[0])), uintptr(min(most, len(m.hdrs))), flags, 0, 0)
	if errno != 0 {
		m.used = 1 // the kernel may have modified the first header
		return 0, errno
	}
	m.used = int(n)
	return int(n), nil
}

// Data returns the payload of message i, valid until the next Recv.
func (m *RecvMsgs) Data(i int) []byte {
	off := i * m.slot
	return m.data[off : off+min(int(m.hdrs[i].n), m.slot) : off+m.slot]
}

// Name returns the raw sockaddr of the sender of message i.
func (m *RecvMsgs) Name(i int) []byte {
	off := i * sockaddrSpace
	return m.names[off : off+min(int(m.hdrs[i].hdr.Namelen), sockaddrSpace)]
}

// Control returns the raw control messages of message i; see NextControl.
func (m *RecvMsgs) Control(i int) []byte {
	off := i * m.ctl
	return m.control[off : off+min(int(m.hdrs[i].hdr.Controllen), m.ctl)]
}

// Truncated reports whether message i was longer than its slot.
func (m *RecvMsgs) Truncated(i int) bool {
	return m.hdrs[i].hdr.Flags&unix.MSG_TRUNC != 0
}

// ControlTruncated reports whether the control messages of message i did not fit.
func (m *RecvMsgs) ControlTruncated(i int) bool {
	return m.hdrs[i].hdr.Flags&unix.MSG_CTRUNC != 0
}

// SendMsgs has the buffers for one sendmmsg(2): up to a fixed number of messages,
// gathered from up to a fixed number of slices. It references names, payloads and
// control bytes and does not copy them: the caller must not change them until
// Reset.
type SendMsgs struct {
	hdrs []mmsghdr
	iovs []unix.Iovec
	msgs int
	used int // iovecs
}

// NewSendMsgs allocates space for messages and iovecs.
func NewSendMsgs(messages, iovecs int) *SendMsgs {
	return &SendMsgs{hdrs: make([]mmsghdr, messages), iovs: make([]unix.Iovec, iovecs)}
}

// Begin starts a message to the raw sockaddr name. There must be space for it.
func (m *SendMsgs) Begin(name []byte) {
	h := &m.hdrs[m.msgs].hdr
	m.msgs++
	h.Name = unsafe.SliceData(name)
	h.Namelen = uint32(len(name))
	h.Iov = nil
	h.SetIovlen(0)
	h.Control = nil
	h.SetControllen(0)
	h.Flags = 0
}

// Append adds a slice to the current message. An empty slice adds nothing.
func (m *SendMsgs) Append(p []byte) {
	if len(p) == 0 {
		return
	}
	h := &m.hdrs[m.msgs-1].hdr
	v := &m.iovs[m.used]
	m.used++
	v.Base = unsafe.SliceData(p)
	v.SetLen(len(p))
	if h.Iov == nil {
		h.Iov = v
	}
	h.Iovlen++
}

// SetControl sets the control messages of the current message.
func (m *SendMsgs) SetControl(c []byte) {
	h := &m.hdrs[m.msgs-1].hdr
	h.Control = unsafe.SliceData(c)
	h.SetControllen(len(c))
}

// Messages and Iovecs return the space in use; MaxMessages and MaxIovecs the total.
func (m *SendMsgs) Messages() int    { return m.msgs }
func (m *SendMsgs) Iovecs() int      { return m.used }
func (m *SendMsgs) MaxMessages() int { return len(m.hdrs) }
func (m *SendMsgs) MaxIovecs() int   { return len(m.iovs) }

// MessageIovecs returns the number of slices of message i.
func (m *SendMsgs) MessageIovecs(i int) int { return int(m.hdrs[i].hdr.Iovlen) }

// Slice returns the k-th slice of message i.
func (m *SendMsgs) Slice(i, k int) []byte {
	h := &m.hdrs[i].hdr
	v := unsafe.Slice(h.Iov, h.Iovlen)[k]
	return unsafe.Slice(v.Base, v.Len)
}

// Reset discards all messages. The slices stay referenced until later messages
// overwrite them, which only delays their garbage collection.
func (m *SendMsgs) Reset() { m.msgs, m.used = 0, 0 }

// Send sends messages [from, to) on the socket fd, without waiting. It returns how many
// the kernel accepted: at least one, or an error about message from. For a later
// message the kernel reports no error, only that it stopped.
func (m *SendMsgs) Send(fd, from, to int) (int, error) {
	if h := &m.hdrs[from].hdr; to == from+1 && h.Iovlen == 1 && h.Controllen == 0 {
		return sendOne(fd, h)
	}
	for {
		n, _, errno := unix.RawSyscall6(unix.SYS_SENDMMSG, uintptr(fd), uintptr(unsafe.Pointer(&m.hdrs[from])),
			uintptr(to-from), unix.MSG_DONTWAIT, 0, 0)
		switch errno {
		case 0:
			return int(n), nil
		case unix.EINTR:
		default:
			return 0, errno
		}
	}
}

// sendOne sends a message that is one slice without control messages by sendto(2), which has less to read than sendmmsg(2).
func sendOne(fd int, h *unix.Msghdr) (int, error) {
	for {
		_, _, errno := unix.RawSyscall6(unix.SYS_SENDTO, uintptr(fd), uintptr(unsafe.Pointer(h.Iov.Base)), uintptr(h.Iov.Len),
			unix.MSG_DONTWAIT, uintptr(unsafe.Pointer(h.Name)), uintptr(h.Namelen))
		switch errno {
		case 0:
			return 1, nil
		case unix.EINTR:
		default:
			return 0, errno
		}
	}
}
