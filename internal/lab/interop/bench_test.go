package interop

import (
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/tulle-net/tulle/internal/testing/testbuild"
)

// benchModules are those of the kernel's tunnels that `tulle bench all` compares, and of the labs, each after those that it needs.
const benchModules = `veth tunnel4 ip_tunnel tunnel6 ipip ip6_tunnel udp_tunnel ip6_udp_tunnel fou fou6
	libchacha chacha-x86_64 poly1305-x86_64 libchacha20poly1305 libcurve25519-generic curve25519-x86_64 wireguard
	nfnetlink libcrc32c nf_tables nft_objref`

// benchScript is the first process of a guest that runs the benchmark and ends.
const benchScript = guestStart + `ifconfig lo up
tulle bench throughput --modes kernel-ipip,kernel-fou,kernel-wireguard --rounds 1 --duration 200ms --timeout 3m -o csv
tulle bench throughput --six --modes kernel-fou,kernel-wireguard --rounds 1 --duration 200ms --timeout 3m -o csv | sed 's/^/six,/'
poweroff -f
`

// TestBenchModes measures the tunnels that the kernel of the tests' machine may lack, in one that has them: they carry packets, over both families. How fast they are in software emulation is nobody's concern.
func TestBenchModes(t *testing.T) {
	kernelTree(t)
	dir := t.TempDir()
	check(t, testbuild.Tulle(filepath.Join(dir, "root/bin/tulle"), []string{"CGO_ENABLED=0"}))
	text := runAlone(t, dir, benchModules, benchScript, 5*time.Minute)
	for _, mode := range []string{"kernel-ipip", "kernel-fou", "kernel-wireguard", "six,kernel-fou", "six,kernel-wireguard"} {
		// In emulation on a busy machine a measure may see no byte in its short time: one of a kind has to.
		for _, either := range [][2]string{{"tcp1_gbps", "tcp4_gbps"}, {"udp_flood1_gbps", "udp_flood4_gbps"}} {
			has := func(metric string) bool { return strings.Contains(text, "\n"+mode+","+metric+",") }
			if !has(either[0]) && !has(either[1]) {
				t.Errorf("%s has neither %s nor %s", mode, either[0], either[1])
			}
		}
	}
	if t.Failed() {
		t.Logf("the guest said:\n%s", text)
	}
}
