package bench

import (
	"net/netip"
	"os"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// Both sockets of a connection have the congestion control that was asked for, which the machine need not allow to everybody; one that
// the kernel does not have is an error that names it.
func TestCongestion(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root: only root may take a congestion control that the machine does not allow to everybody")
	}
	lo := netip.AddrFrom4([4]byte{127, 0, 0, 1})
	e := &Ends{From: "here", To: "there", FromAddr: lo, ToAddr: lo, Do: func(_ string, fn func() error) error { return fn() }}
	for _, name := range []string{"cubic", "reno"} {
		if err := checkCongestion(name); err != nil {
			t.Fatal(err)
		}
		e.Congestion = name
		from, to, err := e.tcpPair()
		if err != nil {
			t.Fatal(err)
		}
		for end, fd := range map[string]int{"dialled": from, "accepted": to} {
			if got, err := unix.GetsockoptString(fd, unix.SOL_TCP, unix.TCP_CONGESTION); err != nil || strings.TrimRight(got, "\x00") != name {
				t.Errorf("the %s socket uses %q, %v; want %s", end, got, err, name)
			}
			unix.Close(fd)
		}
	}
	if err := checkCongestion("nosuch"); err == nil || !strings.Contains(err.Error(), `"nosuch"`) || !strings.Contains(err.Error(), "tcp_available_congestion_control") {
		t.Errorf("a congestion control that does not exist: %v", err)
	}
}
