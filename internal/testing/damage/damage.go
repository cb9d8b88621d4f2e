// Package damage tests decoders with systematically damaged input. Fuzzing finds
// such inputs by chance; these few hundred thousand take milliseconds.
package damage

import (
	"bytes"
	"testing"
)

// Check calls decode with good, which it must take, then with every cut of it,
// and with every message that differs from it in one byte, also with 256 bytes
// behind it, so that a length of 255 finds as many. What decode says of those is
// its own matter, but a panic fails the test and names the message.
func Check(t *testing.T, good []byte, decode func([]byte) error) {
	t.Helper()
	if err := decode(good); err != nil {
		t.Fatalf("undamaged: %v", err)
	}
	var b []byte
	defer func() {
		if v := recover(); v != nil {
			t.Fatalf("%x panics: %v", b, v)
		}
	}()
	for n := range good {
		b = good[:n:n] // with no capacity, so that reading behind the cut panics
		_ = decode(b)
	}
	for _, tail := range []int{0, 256} {
		b = append(bytes.Clone(good), make([]byte, tail)...)
		for i, was := range good {
			for v := range 256 {
				b[i] = byte(v)
				_ = decode(b)
			}
			b[i] = was
		}
	}
}
