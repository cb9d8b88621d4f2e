package hostnet

import (
	"strings"
	"testing"
)

// A second agent of a host is known by its TUN device from the moment that it has one; what a stopped agent left, and
// other programs' devices, are none.
func TestCheckAlone(t *testing.T) {
	h := newHost(t)
	check := func(want string) {
		t.Helper()
		var err error
		h.do(func() error { err = CheckAlone("tun0"); return nil })
		if (err == nil) != (want == "") || err != nil && !strings.Contains(err.Error(), want) {
			t.Errorf("got %v, want %q", err, want)
		}
	}
	h.device("vpn0")
	h.tun("tun8") // persistent, and nobody holds it
	h.up("tun8")
	h.check(h.nl.LinkSetAlias(h.link("tun8"), Alias))
	check("")
	h.device("tun9") // up with a carrier, as a TUN device that is held
	check("")
	h.check(h.nl.LinkSetAlias(h.link("tun9"), Alias))
	check("--tun tun9")
	h.do(func() error { return CheckAlone("tun9") })
}
