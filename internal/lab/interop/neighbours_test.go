package interop

import (
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/tulle-net/tulle/internal/testing/testbuild"
)

// neighboursScript is the first process of a host whose neighbour table has room for 16, and that sends to 100 that do not answer.
const neighboursScript = guestStart + `for i in 1 2 3; do echo 16 > /proc/sys/net/ipv4/neigh/default/gc_thresh$i; done
ip link set lo up
ip link add up0 type veth peer name up1
ip addr add 10.9.0.1/24 dev up0
ip link set up0 up; ip link set up1 up
hostname guest
tulle agent --bootstrap --cluster-cidr 10.244.0.0/16 --underlay 10.9.0.1 --state-dir /run/state &
for i in $(seq 60); do tulle status 2>&1 | grep -q ", healthy," && break; sleep 1; done
tulle doctor neighbours 2>&1 | sed "s/^/room: /"
for i in $(seq 100 200); do ping -c 1 -W 5 10.9.0.$i > /dev/null 2>&1 & done
for i in $(seq 60); do tulle status 2>&1 | grep -q "neighbour table" && break; sleep 1; done
tulle doctor neighbours 2>&1 | sed "s/^/full: /"
poweroff -f
`

// TestNeighbours has an agent on a host whose neighbour table is full, which it names with the remedy. Only the kernel's first network namespace sees that.
func TestNeighbours(t *testing.T) {
	t.Parallel()
	kernelTree(t)
	dir := t.TempDir()
	check(t, testbuild.Tulle(filepath.Join(dir, "root/bin/tulle"), []string{"CGO_ENABLED=0"}))
	text := runAlone(t, dir, agentModules, neighboursScript, 5*time.Minute)
	var room, full []string
	for line := range strings.Lines(text) {
		if said, ok := strings.CutPrefix(line, "room: "); ok {
			room = append(room, said)
		} else if said, ok := strings.CutPrefix(line, "full: "); ok {
			full = append(full, said)
		}
	}
	if said := strings.Join(room, ""); !strings.Contains(said, "entries of at most 16") || strings.Contains(said, "is full") {
		t.Errorf("with room: %q", said)
	}
	for _, want := range []string{"the IPv4 neighbour table is full", "gc_thresh3 is 16", "sysctl -w net.ipv4.neigh.default.gc_thresh3=4096 net.ipv4.neigh.default.gc_thresh2=2048"} {
		if said := strings.Join(full, ""); !strings.Contains(said, want) {
			t.Errorf("full: no %q in %q", want, said)
		}
	}
	if t.Failed() {
		t.Logf("the guest said:\n%s", text)
	}
}
