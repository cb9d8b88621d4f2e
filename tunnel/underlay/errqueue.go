package underlay

import (
	"net/netip"

	"golang.org/x/sys/unix"

	"github.com/tulle-net/tulle/internal/sys"
)

// Err is one entry of the socket's error queue: an ICMP error about a packet that
// the socket sent, or an error of this host.
type Err struct {
	Errno    unix.Errno     // the meaning of the ICMP message, e.g. ECONNREFUSED, EHOSTUNREACH, EMSGSIZE
	Local    bool           // the error is from this host, not from an ICMP message
	ICMPType uint8          // of ICMP or ICMPv6, by the socket's family; 0 if Local
	ICMPCode uint8          // 0 if Local
	Info     uint32         // for EMSGSIZE: MTU of the link that was too small, in bytes with the outer IP header
	Offender netip.Addr     // sender of the ICMP message; invalid if Local
	Dest     netip.AddrPort // destination of the packet; port 0 on raw sockets
	Quote    []byte         // the quoted part of the packet after its outer headers; valid during the call of fn
}

// drainLimit limits one DrainErrors: the queue is as long as the receive buffer, and a
// flood of ICMP messages fills it as fast as it is read.
const drainLimit = 256

// quoteSpace is enough for the quote of an ICMP message: 548 bytes, or 1,232 over
// IPv6. A local error quotes the complete packet; only its beginning is kept.
const quoteSpace = 1280

// DrainErrors passes the entries of the error queue to fn, oldest first, and returns
// their number, at most 256 per call. Call it when Wait returns sys.ErrErrQueue and
// when SendResult.Retried is not 0. A single entry never proves that a peer is down:
// anybody on the path can forge it.
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
