package membership

import (
	"bytes"
	"encoding/hex"
	"errors"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"pgregory.net/rapid"
)

func TestCodecRoundTrip(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		tab := NewTable(rapid.SliceOfN(anEntry, 0, 20).Draw(t, "entries"))
		b := append(AppendEntries(nil, tab.Entries()), "rest"...)
		got, rest, err := DecodeEntries(b)
		if err != nil || string(rest) != "rest" || !slices.EqualFunc(got, tab.Entries(), Entry.Equal) {
			t.Fatalf("%v: got %v, rest %q, %v", tab.Entries(), got, rest, err)
		}
	})
}

// golden is an encoding with a comment for each field.
const golden = `
01                                # format version
02                                # entries
00 18 0af401                      # IPv4, /24, 10.244.1
  01000000000000000000000000000000  # owner
  81 01                           # version 129
07 20 fd001234                    # IPv6, external with IPv6 endpoint, /32, fd00:1234
  02000000000000000000000000000000
  01
  20010db8000000000000000000000001  # endpoint 2001:db8::1
  04 69706970                     # "ipip"
`

func unhex(s string) []byte {
	var clean strings.Builder
	for line := range strings.Lines(s) {
		code, _, _ := strings.Cut(line, "#")
		clean.WriteString(strings.Join(strings.Fields(code), ""))
	}
	b, err := hex.DecodeString(clean.String())
	if err != nil {
		panic(err)
	}
	return b
}

func TestCodecGolden(t *testing.T) {
	want := []Entry{
		{Prefix: netip.MustParsePrefix("10.244.1.0/24"), Owner: owner(0), Version: 129},
		{Prefix: netip.MustParsePrefix("fd00:1234::/32"), Owner: owner(1), Version: 1, External: &External{Endpoint: netip.MustParseAddr("2001:db8::1"), Encap: "ipip"}},
	}
	got, rest, err := DecodeEntries(unhex(golden))
	if err != nil || len(rest) != 0 || !slices.EqualFunc(got, want, Entry.Equal) {
		t.Fatalf("%v %v %v", got, rest, err)
	}
	if b := AppendEntries(nil, want); !bytes.Equal(b, unhex(golden)) {
		t.Fatalf("% x", b)
	}
}

// Port and MAC of an external peer travel where it has them, each alone too.
func TestCodecPortAndMAC(t *testing.T) {
	for _, x := range []External{
		{Encap: "vxlan", Port: 8472, MAC: [6]byte{2, 0, 0x5e, 0x10, 0, 1}}, {Encap: "vxlan", MAC: [6]byte{5: 1}}, {Encap: "udp", Port: 1},
	} {
		x.Endpoint = netip.MustParseAddr("192.0.2.1")
		want := []Entry{{Prefix: netip.MustParsePrefix("10.244.1.0/24"), Owner: owner(0), Version: 1, External: &x}}
		got, rest, err := DecodeEntries(AppendEntries(nil, want))
		if err != nil || len(rest) != 0 || !slices.EqualFunc(got, want, Entry.Equal) {
			t.Errorf("%v %v %v", got, rest, err)
		}
	}
}

func TestCodecRefuses(t *testing.T) {
	for name, s := range map[string]string{
		"nothing":              "",
		"another version":      "02 00",
		"a million entries":    "01 c0843d",
		"more than there are":  "01 02 00 08 0a 01000000000000000000000000000000 01",
		"host bits":            "01 01 00 07 0b 01000000000000000000000000000000 01",
		"length 33":            "01 01 00 21 0a00000000 01000000000000000000000000000000 01",
		"port of no external":  "01 01 08 08 0a 01000000000000000000000000000000 01",
		"no port and no MAC":   "01 01 0a 08 0a 01000000000000000000000000000000 01 c0000201 03 756470 0000 000000000000",
		"unknown flag":         "01 01 10 08 0a 01000000000000000000000000000000 01",
		"endpoint w/o ext.":    "01 01 04 08 0a 01000000000000000000000000000000 01",
		"no owner":             "01 01 00 08 0a 00000000000000000000000000000000 01",
		"version 0":            "01 01 00 08 0a 01000000000000000000000000000000 00",
		"version too high":     "01 01 00 08 0a 01000000000000000000000000000000 81808080808040",
		"version in long form": "01 01 00 08 0a 01000000000000000000000000000000 8100",
		"wrong order":          "01 02 00 08 0b 01000000000000000000000000000000 01 00 08 0a 01000000000000000000000000000000 01",
		"overlap":              "01 02 00 08 0a 01000000000000000000000000000000 01 00 10 0a01 01000000000000000000000000000000 01",
		"long encap":           "01 01 02 08 0a 01000000000000000000000000000000 01 c0000201 ff" + strings.Repeat("61", 255),
	} {
		if got, _, err := DecodeEntries(unhex(s)); err == nil || !errors.Is(err, ErrFormat) {
			t.Errorf("%s: %v, %v", name, got, err)
		}
	}
	whole := unhex(golden)
	for i := range whole {
		if _, _, err := DecodeEntries(whole[:i]); err == nil {
			t.Errorf("the first %d bytes decode", i)
		}
	}
}

func FuzzDecodeEntries(f *testing.F) {
	f.Add(unhex(golden))
	f.Add([]byte{1, 0})
	f.Fuzz(func(t *testing.T, b []byte) {
		entries, rest, err := DecodeEntries(b)
		if err != nil {
			return
		}
		// What decodes is a table's list, and has one encoding.
		if again := AppendEntries(nil, entries); !bytes.Equal(again, b[:len(b)-len(rest)]) {
			t.Fatalf("% x decodes and encodes to % x", b, again)
		}
		tab := NewTable(entries)
		checkCanonical(t, tab)
		if changed, conflicts := tab.Merge(entries); len(changed) != 0 || len(conflicts) != 0 {
			t.Fatalf("merging it again: %v %v", changed, conflicts)
		}
	})
}
