package pair

import (
	"bytes"
	"testing"
)

// What is taken for a preamble is one: written again it is the same, up to its padding.
func FuzzPreamble(f *testing.F) {
	f.Add(appendPreamble(nil, kindData, secret{1, 2, 3}, 7))
	f.Add(appendPreamble(nil, kindHello, secret{}, 0))
	f.Add([]byte(magic))
	f.Fuzz(func(t *testing.T, b []byte) {
		kind, s, flow, err := parsePreamble(b)
		if err != nil {
			return
		}
		if again := appendPreamble(nil, kind, s, flow); len(again) != preambleSize || !bytes.Equal(again[:29], b[:29]) || flow < 0 || flow >= maxFlows {
			t.Errorf("%x was read as kind %c, flow %d, which is written as %x", b, kind, flow, again)
		}
	})
}
