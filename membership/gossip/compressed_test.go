package gossip

import (
	"bytes"
	"compress/lzw"
	"encoding/binary"
	"io"
	"net"
	"net/netip"
	"testing"
	"time"

	"github.com/tulle-net/tulle/membership"
)

// compressed is memberlist's message for another one (net.go: compress, in msgpack).
func compressed(t *testing.T, msg []byte) []byte {
	t.Helper()
	var z bytes.Buffer
	w := lzw.NewWriter(&z, lzw.LSB, 8)
	if _, err := w.Write(msg); err != nil {
		t.Fatal(err)
	}
	w.Close()
	b := append([]byte{compressedType, 0x82, 0xa4}, "Algo"...)
	b = append(append(b, 0, 0xa3), "Buf"...)
	b = binary.BigEndian.AppendUint16(append(b, 0xc5), uint16(z.Len()))
	return append(b, z.Bytes()...)
}

// compound is memberlist's message with several parts.
func compound(parts ...[]byte) []byte {
	b := []byte{compoundType, byte(len(parts))}
	for _, p := range parts {
		b = binary.BigEndian.AppendUint16(b, uint16(len(p)))
	}
	return append(b, bytes.Join(parts, nil)...)
}

func checked(msg []byte) []byte { return append([]byte{checksumType, 1, 2, 3, 4}, msg...) }

func TestHasCompressed(t *testing.T) {
	plain, z := []byte{8, 9, 9}, compressed(t, []byte{8, 1})
	for name, tc := range map[string]struct {
		packet []byte
		want   bool
	}{
		"nothing":                       {nil, false},
		"plain":                         {plain, false},
		"compressed":                    {z, true},
		"behind a checksum":             {checked(z), true},
		"plain behind a checksum":       {checked(plain), false},
		"one of two":                    {compound(plain, z), true},
		"none of two":                   {compound(plain, plain), false},
		"one of two behind a checksum":  {checked(compound(plain, z)), true},
		"in a compound in a compound":   {compound(plain, compound(plain, z)), true},
		"compounds without an end":      {compound(compound(compound(plain))), true},
		"a compound that is cut off":    {compound(plain, plain)[:4], false},
		"a part longer than the packet": {[]byte{compoundType, 1, 255, 255, compressedType}, true},
		"a compound's first byte":       {[]byte{compoundType}, false},
	} {
		if got := hasCompressed(tc.packet); got != tc.want {
			t.Errorf("%s: %v", name, got)
		}
	}
}

// A compressed message, by packet or stream, does nothing but be counted.
func TestCompressedIsDropped(t *testing.T) {
	leakCheck(t)
	n := launch(t, "n", cluster(membership.NewClusterID()))
	to := netip.AddrPortFrom(n.addr, testPort).String()
	message := func(text string) []byte {
		return append([]byte{8}, envelope{kind: kindBroadcast, cluster: n.Cluster(), body: []byte(text)}.encode()...)
	}
	udp, err := net.Dial("udp", to)
	if err != nil {
		t.Fatal(err)
	}
	defer udp.Close()
	for _, b := range [][]byte{compressed(t, message("a")), compound(message("b"), compressed(t, message("c"))), message("plain")} {
		if _, err := udp.Write(b); err != nil {
			t.Fatal(err)
		}
	}
	has := func(text string) bool {
		n.recorder.mu.Lock()
		defer n.recorder.mu.Unlock()
		return n.broadcasts[text] > 0
	}
	eventually(t, "a plain message arrives", func() bool { return has("plain") })
	if has("a") || has("b") || has("c") || n.Stats().Malformed != 2 {
		t.Errorf("%v, %d dropped", n.broadcasts, n.Stats().Malformed)
	}
	tcp, err := net.Dial("tcp", to)
	if err != nil {
		t.Fatal(err)
	}
	defer tcp.Close()
	if _, err := tcp.Write(compressed(t, make([]byte, 1000))); err != nil {
		t.Fatal(err)
	}
	_ = tcp.SetReadDeadline(time.Now().Add(30 * time.Second))
	if b, err := io.ReadAll(tcp); len(b) > 0 && b[0] != 13 && b[0] != 8 || n.Stats().Malformed != 3 { // an error, if anything
		t.Errorf("answered %x, %v; %d dropped", b, err, n.Stats().Malformed)
	}
}
