package mtu

import "testing"

func TestArithmetic(t *testing.T) {
	for _, tt := range []struct {
		link Link
		over Overhead
		want TUN
	}{
		{Ethernet, IPv4 + UDP, 1472},
		{Ethernet, IPv6 + UDP, 1452},
		{Ethernet, IPv4, 1480},
		{Ethernet, IPv6, 1460},
		{Ethernet, IPv4 + UDP + VXLAN + InnerEth, 1450},
		{Ethernet, IPv6 + UDP + VXLAN + InnerEth, 1430},
		{Ethernet, 0, 1500},
		{9000, 28, 8972},
		{20, 28, 0},
		{65535 + 48, 48, 65535},
		{70000, 48, 65535},
	} {
		if got := tt.link.TUN(tt.over); got != tt.want {
			t.Errorf("Link %d − %d = %d, want %d", tt.link, tt.over, got, tt.want)
		}
		if tt.want > 0 && tt.want < Max && tt.want.Link(tt.over) != tt.link {
			t.Errorf("and back: %d", tt.want.Link(tt.over))
		}
	}
}

func TestMSS(t *testing.T) {
	for _, tt := range []struct {
		mtu    TUN
		v4, v6 int
	}{{1500, 1460, 1440}, {1280, 1240, 1220}, {50, 10, 0}, {0, 0, 0}} {
		if tt.mtu.MSS(false) != tt.v4 || tt.mtu.MSS(true) != tt.v6 {
			t.Errorf("%d: %d, %d", tt.mtu, tt.mtu.MSS(false), tt.mtu.MSS(true))
		}
	}
}

func TestCarries(t *testing.T) {
	if m := TUN(1472); !m.Carries(1472) || m.Carries(1473) || !m.Carries(0) {
		t.Error("Carries")
	}
}

func TestValidate(t *testing.T) {
	for _, tt := range []struct {
		mtu TUN
		v6  bool
		ok  bool
	}{
		{575, false, false}, {576, false, true}, {1279, true, false}, {1280, true, true},
		{65535, true, true}, {65536, false, false}, {-1, false, false}, {0, true, false},
	} {
		if err := tt.mtu.Validate(tt.v6); (err == nil) != tt.ok {
			t.Errorf("%d, v6 %v: %v", tt.mtu, tt.v6, err)
		}
	}
}
