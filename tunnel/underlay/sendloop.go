package underlay

import (
	"fmt"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tulle-net/tulle/internal/sys"
)

// Limits of one Send.
const (
	// maxRetries is how often a message is sent again after errors that may be about
	// another packet. Each attempt clears one such error from the socket, but a
	// new one can arrive at any time.
	maxRetries = 3
	// writeWaitMillis is the longest single wait for space in the send buffer before
	// the next attempt.
	writeWaitMillis = 100
	// maxWriteWait limits the sum of these waits for one message. If a device accepts
	// nothing for this long, packets are dropped instead of blocking the agent.
	maxWriteWait = time.Second
)

// isPending reports whether err may be an ICMP error about an earlier packet, to this
// peer or another one. The kernel returns it from the next call (ip(7)).
func isPending(err error) bool {
	switch err {
	case unix.ECONNREFUSED, unix.EHOSTUNREACH, unix.ENETUNREACH, unix.EHOSTDOWN, unix.ENONET,
		unix.ENOPROTOOPT, unix.EPROTO, unix.EMSGSIZE, unix.EACCES, unix.EOPNOTSUPP:
		return true
	}
	return false
}

// isGSORefusal reports whether err is one of the errors with which kernels refuse
// trains: EIO if the device has no checksum offload, EINVAL for an unsupported segment
// size or count and with xfrm, EMSGSIZE for a train above the limit.
func isGSORefusal(err error) bool {
	return err == unix.EIO || err == unix.EINVAL || err == unix.EMSGSIZE || err == unix.EOPNOTSUPP
}

// Send sends all messages of b in order, and resets b. It blocks only while the send
// buffer is full. An error means that the socket is unusable from now on; failures of
// single messages are in the result.
func (s *Socket) Send(b *SendBatch) (SendResult, error) {
	var r SendResult
	defer b.Reset()
	var waiting time.Time // since when the current message waits for space
	retries, stopped := 0, false
	for i := 0; i < b.msgs.Messages(); {
		m := &b.meta[i]
		if m.segment > 0 && !m.to.tryGSO() {
			if !m.to.singles {
				r.GSOFallbacks++
			}
			if err := s.sendSingles(b, i, &r); err != nil {
				return r, err
			}
			i, waiting, retries = i+1, time.Time{}, 0
			continue
		}
		end := b.upTo(i)
		n, err := b.msgs.Send(s.fd, i, end)
		if err == nil {
			if stopped {
				r.Retried++
			}
			for ; n > 0; n-- {
				r.took(&b.meta[i])
				i++
			}
			// Stopped in the middle: sendmmsg does not return the reason. If it was an
			// earlier packet's error, it is now cleared from the socket.
			waiting, retries, stopped = time.Time{}, 0, i < end
			continue
		}
		stopped = false
		switch {
		case err == sys.ErrAgain && (waiting.IsZero() || time.Since(waiting) < maxWriteWait):
			if waiting.IsZero() {
				waiting = time.Now()
			}
			if err := sys.WaitWrite(s.fd, writeWaitMillis); err != nil {
				return r, err
			}
			continue
		case isPending(err) && retries < maxRetries:
			retries++
			r.Retried++
			continue
		case m.segment > 0 && isGSORefusal(err):
			if err := s.sendRefused(b, i, &r); err != nil {
				return r, err
			}
		case isFatal(err):
			return r, fmt.Errorf("send on %v: %w", s.local, err)
		default:
			r.dropped(m, err)
			if b.Refused != nil {
				b.Refused(Refused{To: m.to, TOS: m.tos, batch: b, index: i})
			}
		}
		i, waiting, retries = i+1, time.Time{}, 0
	}
	return r, nil
}

// upTo returns the end of the messages from i on that can be sent together. It stops
// before a train to a destination for which trains are off.
func (b *SendBatch) upTo(i int) int {
	end := i + 1
	for ; end < b.msgs.Messages(); end++ {
		if m := &b.meta[end]; m.segment > 0 && !m.to.tryGSO() {
			break
		}
	}
	return end
}

// isFatal reports whether err is about the socket, not the message.
func isFatal(err error) bool {
	return err == unix.EBADF || err == unix.ENOTSOCK || err == unix.EFAULT
}

func (r *SendResult) took(m *sendMeta) {
	r.Messages++
	r.Sent += m.datagrams()
	if m.segment > 0 {
		m.to.acceptedGSO()
	}
}

func (r *SendResult) dropped(m *sendMeta, err error) {
	r.Dropped += m.datagrams()
	if err == unix.EMSGSIZE {
		r.TooBig += m.datagrams()
	}
	r.LastErr = err
}

// sendRefused sends a train that the kernel has just refused as single datagrams. If
// the kernel accepts these, the refusal was about the train, and trains to that
// destination are off for a while. Datagrams above the link's MTU are refused either
// way.
func (s *Socket) sendRefused(b *SendBatch, i int, r *SendResult) error {
	before := r.Sent
	r.GSOFallbacks++
	err := s.sendSingles(b, i, r)
	if r.Sent > before {
		b.meta[i].to.refusedGSO()
	}
	return err
}

// singles has the buffers for sending one train as single datagrams.
type singles struct {
	batch *SendBatch
}

// sendSingles sends message i, a train, as single datagrams.
func (s *Socket) sendSingles(b *SendBatch, i int, r *SendResult) error {
	if b.single == nil {
		b.single = &singles{NewSendBatch(MaxSegments, MaxIovecs+MaxSegments)}
	}
	out, m := b.single.batch, &b.meta[i]
	out.Refused = b.Refused
	open, left := false, 0
	flush := func() error {
		sr, err := s.Send(out)
		r.add(sr)
		return err
	}
	for k := range b.msgs.MessageIovecs(i) {
		for p := b.msgs.Slice(i, k); len(p) > 0; {
			if !open {
				if out.Len() == MaxSegments { // the caller exceeded MaxSegments
					if err := flush(); err != nil {
						return err
					}
				}
				out.Begin(m.to, m.tos)
				open, left = true, m.segment
			}
			n := min(left, len(p))
			out.Append(p[:n])
			p, left = p[n:], left-n
			if left == 0 {
				out.End(0)
				open = false
			}
		}
	}
	if open {
		out.End(0)
	}
	return flush()
}

func (r *SendResult) add(o SendResult) {
	r.Messages += o.Messages
	r.Sent += o.Sent
	r.Dropped += o.Dropped
	r.TooBig += o.TooBig
	r.Retried += o.Retried
	if o.LastErr != nil {
		r.LastErr = o.LastErr
	}
}
