// Package pair measures the path between two ends that run anywhere: [Serve] at one, [Run] at the other, without root and
// without an agent. Traffic goes from Run to Serve; what comes back is answers of the same size.
//
// One TCP port and the UDP port of the same number are used. Run opens a control connection, on which it asks for one
// measure after another in lines of JSON, and data connections. A UDP flow begins with a datagram that carries the secret
// of the run, so that nobody can use a server to send to a third party: a server sends only to the address of the control
// connection, and only answers.
//
// Concurrency: Serve and Run have ended all that they started when they return.
package pair

import (
	"bufio"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"time"

	"github.com/tulle-net/tulle/bench/result"
)

// DefaultPort is the TCP and UDP port of a server.
const DefaultPort = 17979

const (
	version   = 1
	maxFlows  = 16
	maxLine   = 64 << 10               // bytes of a control message
	idleLimit = 30 * time.Second       // of a control connection, and of a connection that has not said what it is
	maxConns  = 128                    // data connections at a time
	patience  = 5 * time.Second        // for answers of the other end
	helloWait = 300 * time.Millisecond // for the answer to the first datagram of a flow
)

// Every TCP connection begins with a preamble of this size, in bytes: magic, kind, secret of the run. A request of
// connect/request/response is a preamble too, and its answer has the same size.
const preambleSize = 64

const magic = "TULLEBN1" // longer than any number of a datagram: see traffic.Sink

// The kinds of preambles, and of a flow's first datagram and its answer.
const (
	kindControl = 'C'
	kindData    = 'D'
	kindOnce    = 'R'
	kindHello   = 'H'
	kindWelcome = 'W'
)

type secret [16]byte

// appendPreamble appends the first bytes of a connection or flow.
func appendPreamble(b []byte, kind byte, s secret, flow int) []byte {
	start := len(b)
	b = append(b, magic...)
	b = append(b, kind)
	b = append(b, s[:]...)
	b = binary.BigEndian.AppendUint32(b, uint32(flow))
	return append(b, make([]byte, preambleSize-(len(b)-start))...)
}

// parsePreamble is the opposite of appendPreamble.
func parsePreamble(b []byte) (kind byte, s secret, flow int, err error) {
	if len(b) != preambleSize || string(b[:8]) != magic {
		return 0, s, 0, errors.New("it does not speak the protocol of tulle bench, or another version of it")
	}
	copy(s[:], b[9:25])
	flow = int(binary.BigEndian.Uint32(b[25:]))
	if flow < 0 || flow >= maxFlows {
		return 0, s, 0, fmt.Errorf("flow %d: there are at most %d", flow, maxFlows)
	}
	return b[8], s, flow, nil
}

// greeting is the server's first message.
type greeting struct {
	Version int    `json:"version"`
	Nonce   []byte `json:"nonce"`
	Token   bool   `json:"token"` // is wanted
	Error   string `json:"error,omitempty"`
}

// hello is the client's first message.
type hello struct {
	Proof []byte `json:"proof"` // that it has the token
}

// welcome admits a client.
type welcome struct {
	Error   string         `json:"error,omitempty"`
	Secret  secret         `json:"secret"`
	Machine result.Machine `json:"machine"`
	Boot    string         `json:"boot"`
	MaxTime float64        `json:"max_time_s"`
	MaxRate float64        `json:"max_rate_bps"` // 0: none
	Loaded  bool           `json:"loaded"`       // it knows jobLoaded; older versions do not
}

// proof is what a client sends instead of the token.
func proof(token string, nonce []byte) []byte {
	m := hmac.New(sha256.New, []byte(token))
	m.Write(nonce)
	return m.Sum(nil)
}

// The jobs that a client asks for.
const (
	jobEcho    = "udp-echo"
	jobSink    = "udp-sink"
	jobStream  = "tcp-sink"
	jobLoaded  = "tcp-sink-udp-echo" // both at once
	jobRespond = "tcp-respond"       // requests on one connection, or on one each
)

// order is a control message of the client. Do is one of the jobs, "begin" (count from now), "count", "end" or "stop".
type order struct {
	Do    string `json:"do"`
	Flows int    `json:"flows,omitempty"`
}

// report answers an order.
type report struct {
	Error     string         `json:"error,omitempty"`
	Received  uint64         `json:"received,omitempty"` // datagrams
	Reordered uint64         `json:"reordered,omitempty"`
	Arriving  float64        `json:"arriving_s,omitempty"`
	Bytes     int64          `json:"bytes,omitempty"` // of TCP
	Seconds   float64        `json:"seconds,omitempty"`
	CPU       *result.CPUUse `json:"cpu,omitempty"`
}

// control is a control connection: lines of JSON in both directions.
type control struct {
	conn net.Conn
	in   *bufio.Reader
}

func newControl(conn net.Conn) *control {
	return &control{conn, bufio.NewReaderSize(conn, maxLine)}
}

func (c *control) send(message any) error {
	b, err := json.Marshal(message)
	if err != nil {
		return err
	}
	if err := c.conn.SetWriteDeadline(time.Now().Add(patience)); err != nil {
		return err
	}
	_, err = c.conn.Write(append(b, '\n'))
	return err
}

func (c *control) receive(message any, within time.Duration) error {
	if err := c.conn.SetReadDeadline(time.Now().Add(within)); err != nil {
		return err
	}
	line, err := c.in.ReadSlice('\n')
	if errors.Is(err, bufio.ErrBufferFull) {
		return fmt.Errorf("a message of more than %d bytes", maxLine)
	}
	if err != nil {
		return err
	}
	return json.Unmarshal(line, message)
}

// readPreamble reads the first bytes of a connection.
func readPreamble(conn net.Conn) (kind byte, s secret, flow int, err error) {
	if err := conn.SetReadDeadline(time.Now().Add(patience)); err != nil {
		return 0, s, 0, err
	}
	b := make([]byte, preambleSize)
	if _, err := io.ReadFull(conn, b); err != nil {
		return 0, s, 0, err
	}
	return parsePreamble(b)
}
