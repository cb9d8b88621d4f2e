package keyring

import (
	"testing"
)

func FuzzKeyringFile(f *testing.F) {
	f.Add([]byte("# a comment\n" + Generate() + "\n"))
	f.Add([]byte("AAAA"))
	f.Fuzz(func(t *testing.T, b []byte) {
		keys, err := parse(b)
		if err != nil {
			return
		}
		for _, k := range keys {
			if len(k) != Size {
				t.Fatalf("key of %d bytes", len(k))
			}
		}
	})
}
