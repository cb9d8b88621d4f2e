package gossip

import (
	"encoding/binary"
	"errors"
	"net"
)

// No version of Tulle compresses what it sends, and memberlist would expand whatever anybody sends to it, to 40 MiB a message. So
// compressed messages are dropped before it reads them. (What is encrypted comes from a holder of the key, and is not looked into.)

// The types of messages that matter here, and the limit of nesting (memberlist net.go: it packs a packet once).
const (
	compoundType   = 7
	compressedType = 9
	checksumType   = 12
	checksumHead   = 1 + 4
	maxNesting     = 2
)

var errCompressed = errors.New("the message is compressed, which no member does")

// hasCompressed reports whether a packet is compressed, or has a part that is.
func hasCompressed(b []byte) bool {
	if len(b) >= checksumHead && b[0] == checksumType {
		b = b[checksumHead:]
	}
	return compressedIn(b, 0)
}

// compressedIn looks into a message: a compound one is its type, the number of its parts (1), the length of each (2), and the parts.
func compressedIn(b []byte, depth int) bool {
	if len(b) < 2 || b[0] != compoundType {
		return len(b) > 0 && b[0] == compressedType
	}
	if depth == maxNesting {
		return true
	}
	n := int(b[1])
	lengths, parts := b[2:], b[min(len(b), 2+2*n):]
	for range n {
		if len(lengths) < 2 {
			break
		}
		size := min(int(binary.BigEndian.Uint16(lengths)), len(parts))
		if compressedIn(parts[:size], depth+1) {
			return true
		}
		lengths, parts = lengths[2:], parts[size:]
	}
	return false
}

// plainConn is a stream that ends if what comes by it is compressed.
type plainConn struct {
	net.Conn
	began   bool
	dropped func()
}

func (c *plainConn) Read(b []byte) (int, error) {
	n, err := c.Conn.Read(b)
	if n > 0 && !c.began {
		if c.began = true; b[0] == compressedType {
			c.dropped()
			c.Conn.Close()
			return 0, errCompressed
		}
	}
	return n, err
}
