package header

import (
	"encoding/hex"
	"net/netip"
	"strings"
	"testing"
)

var (
	src4 = netip.MustParseAddr("10.244.1.2")
	dst4 = netip.MustParseAddr("10.244.2.3")
	src6 = netip.MustParseAddr("fd00:244:1::2")
	dst6 = netip.MustParseAddr("fd00:244:2::3")
)

// unhex reads hex with blanks and line ends.
func unhex(t testing.TB, s string) []byte {
	t.Helper()
	b, err := hex.DecodeString(strings.Join(strings.Fields(s), ""))
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// ip4 and ip6 build whole packets around payload.
func ip4(proto uint8, flagsFrag uint16, payload []byte) []byte {
	return append(AppendIPv4(nil, IPv4Fields{
		Src: src4, Dst: dst4, PayloadLen: len(payload), ID: 0x1234,
		FlagsFrag: flagsFrag, TOS: 0xb9, TTL: 63, Proto: proto,
	}), payload...)
}

func ip6(next uint8, payload []byte) []byte {
	return append(AppendIPv6(nil, IPv6Fields{
		Src: src6, Dst: dst6, PayloadLen: len(payload), FlowLabel: 0xabcde,
		TrafficClass: 0xb9, HopLimit: 63, NextHeader: next,
	}), payload...)
}

func udp4(payload string) []byte {
	return ip4(ProtoUDP, 0, AppendUDP(nil, netip.AddrPortFrom(src4, 1000), netip.AddrPortFrom(dst4, 2000), []byte(payload)))
}

func udp6(payload string) []byte {
	return ip6(ProtoUDP, AppendUDP(nil, netip.AddrPortFrom(src6, 1000), netip.AddrPortFrom(dst6, 2000), []byte(payload)))
}

func tcp(v6 bool, flags TCPFlags, options, payload []byte) []byte {
	f := TCPFields{
		From: netip.AddrPortFrom(src4, 1000), To: netip.AddrPortFrom(dst4, 2000),
		Seq: 0x01020304, Ack: 0x05060708, Flags: flags, Window: 0x1000, Urgent: 7, Options: options,
	}
	if v6 {
		f.From, f.To = netip.AddrPortFrom(src6, 1000), netip.AddrPortFrom(dst6, 2000)
		return ip6(ProtoTCP, AppendTCP(nil, f, payload))
	}
	return ip4(ProtoTCP, IPv4FlagDF, AppendTCP(nil, f, payload))
}

// Extension headers of eight bytes.
func ext(next uint8) []byte { return []byte{next, 0, 1, 4, 0, 0, 0, 0} }

func join(parts ...[]byte) []byte {
	var b []byte
	for _, p := range parts {
		b = append(b, p...)
	}
	return b
}
