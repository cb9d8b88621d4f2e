package interop

import (
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/tulle-net/tulle/internal/testing/testbuild"
)

// agentModules are those of a host with an agent, each after those that it needs.
const agentModules = `tun veth vrf nfnetlink libcrc32c nf_defrag_ipv4 nf_defrag_ipv6 nf_conntrack nf_nat nf_tables nft_ct nft_masq nft_chain_nat nft_fib nft_fib_ipv4 nft_fib_ipv6 nft_fib_inet nft_objref`

// vrfScript is the first process of a host whose only address is in a VRF, leaves it and comes back.
const vrfScript = guestStart + `ip link set lo up
ip link add up0 type veth peer name up1
ip link add blue type vrf table 10
ip link set up0 master blue
ip addr add 10.9.0.1/24 dev up0
ip link set blue up; ip link set up0 up; ip link set up1 up
ip route add default via 10.9.0.2 dev up0 vrf blue
hostname guest
tulle agent --bootstrap --cluster-cidr 10.244.0.0/16 --state-dir /run/state &
await() { for i in $(seq 60); do tulle status 2>&1 | grep -q "$1" && break; sleep 1; done; tulle status 2>&1 | sed "s/^/$2: /"; }
await "VRF blue" inside
ip link set up0 nomaster
ip route add default via 10.9.0.2 dev up0
await ", healthy," outside
ip link set up0 master blue
await "VRF blue" again
poweroff -f
`

// TestVRF has an agent on a host whose uplink is in a VRF, which it names, and leaves it.
func TestVRF(t *testing.T) {
	t.Parallel()
	kernelTree(t)
	dir := t.TempDir()
	check(t, testbuild.Tulle(filepath.Join(dir, "root/bin/tulle"), []string{"CGO_ENABLED=0"}))
	text := runAlone(t, dir, agentModules, vrfScript, 5*time.Minute)
	for when, want := range map[string]string{"inside": "take up0 out of the VRF blue, or name another", "outside": ", healthy,", "again": "is in the VRF blue"} {
		if !slices.ContainsFunc(strings.Split(text, "\n"), func(line string) bool { return strings.HasPrefix(line, when+": ") && strings.Contains(line, want) }) {
			t.Errorf("%s of the VRF, status has no %q", when, want)
		}
	}
	if t.Failed() {
		t.Logf("the guest said:\n%s", text)
	}
}
