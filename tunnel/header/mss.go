package header

import "encoding/binary"

// ClampMSS lowers the MSS option of a TCP SYN or SYN/ACK so that the connection's
// segments fit into mtu bytes: mtu − 40 for IPv4, mtu − 60 for IPv6 (RFC 9293 §3.7.1,
// RFC 6691), and mends the TCP checksum (RFC 1624). It reports whether it changed
// pkt, which has to be the packet that in was parsed from. A smaller MSS, a missing
// option, later fragments and headers that do not fit stay untouched.
func ClampMSS(pkt []byte, in *Inner, mtu int) bool {
	if in.Proto != ProtoTCP || !in.HasPorts {
		return false
	}
	t := in.Payload(pkt)
	if len(t) < TCPMinLen || TCPFlags(t[tcpFlags])&TCPSyn == 0 {
		return false
	}
	hlen := int(t[tcpDataOff]>>4) * 4
	if hlen < TCPMinLen || hlen > len(t) {
		return false
	}
	limit := mtu - IPv4MinLen - TCPMinLen
	if in.Version == 6 {
		limit = mtu - IPv6Len - TCPMinLen
	}
	if limit <= 0 || limit > 0xffff {
		return false
	}
	for off := TCPMinLen; off < hlen; {
		switch t[off] {
		case tcpOptEnd:
			return false
		case tcpOptNop:
			off++
			continue
		}
		if off+1 >= hlen {
			return false
		}
		n := int(t[off+1])
		if n < 2 || off+n > hlen {
			return false
		}
		if t[off] == tcpOptMSS && n == 4 {
			return lowerMSS(t, off+2, uint16(limit))
		}
		off += n
	}
	return false
}

// lowerMSS writes limit at t[off:] if what stands there is larger. An option may
// begin at an odd offset: then its bytes lie in two words of the checksum.
func lowerMSS(t []byte, off int, limit uint16) bool {
	old := binary.BigEndian.Uint16(t[off:])
	if old <= limit {
		return false
	}
	binary.BigEndian.PutUint16(t[off:], limit)
	from, to := old, limit
	if off%2 != 0 { // swapping both bytes swaps their sum alike, RFC 1071 §2(B)
		from, to = old<<8|old>>8, limit<<8|limit>>8
	}
	sum := binary.BigEndian.Uint16(t[tcpChecksum:])
	binary.BigEndian.PutUint16(t[tcpChecksum:], UpdateChecksum16(sum, from, to))
	return true
}
