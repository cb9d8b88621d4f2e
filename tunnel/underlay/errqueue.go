package underlay

import (
	"net/netip"

	"golang.org/x/sys/unix"

	"github.com/tulle-net/tulle/internal/sys"
)

// Err is one error that the kernel has noted for the socket: an ICMP message
// about a packet sent from it, or a local refusal.
type Err struct {
	Errno    unix.Errno     // what the ICMP message amounts to, e.g. ECONNREFUSED, EHOSTUNREACH, EMSGSIZE
	Local    bool           // this host refused, no ICMP message arrived
	ICMPType uint8          // of ICMP or ICMPv6, by the socket's family; 0 if Local
	ICMPCode uint8          // 0 if Local
	Info     uint32         // for EMSGSIZE the MTU in bytes of the link that was too small, counted with the outer IP header
	Offender netip.Addr     // who sent the ICMP message; invalid if Local
	Dest     netip.AddrPort // where the packet went; port 0 on raw sockets
	Quote    []byte         // the packet behind its outer headers, as far as quoted; valid during the call of fn
}

// drainLimit bounds one DrainErrors: the queue is as long as the receive buffer,
// and under a flood of ICMP it fills as fast as it is read.
const drainLimit = 256

// quoteSpace is enough for what ICMP quotes: 548 bytes, or 1,232 over IPv6. A
// local error quotes the packet whole, of which this is the beginning.
const quoteSpace = 1280

// DrainErrors hands the messages of the error queue to fn, oldest first, and
// returns how many: at most 256 a call. Call it whenever Wait says
// sys.ErrErrQueue and when a SendResult counts Retried. Never take a single one
// as proof that a peer is down: anybody on the way can forge it.
func (s *Socket) DrainErrors(fn func(Err)) (n int, err error) {
	buf := make([]byte, quoteSpace)
	for ; n < drainLimit; n++ {
		m, err := sys.RecvErr(s.fd, buf)
		if err == sys.ErrAgain {
			return n, nil
		}
		if err != nil {
			return n, err
		}
		fn(Err{
			Errno:    unix.Errno(m.Err.Errno),
			Local:    m.Err.Origin == unix.SO_EE_ORIGIN_LOCAL,
			ICMPType: m.Err.Type,
			ICMPCode: m.Err.Code,
			Info:     m.Err.Info,
			Offender: m.Offender.Addr(),
			Dest:     m.Dest,
			Quote:    m.Data,
		})
	}
	return n, nil
}
