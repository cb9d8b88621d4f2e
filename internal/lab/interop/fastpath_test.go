package interop

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// fastModules are what the fast path's tests need of a kernel, each after those that it needs.
const fastModules = `tun veth sch_ingress cls_bpf llc stp bridge garp mrp 8021q tls bonding macvlan`

// fastScript is the first process of a guest that runs those tests which hold for kernels before 6.3, and ends. TestCapability loads the programs with no
// capability that the documentation does not ask for: without CAP_PERFMON, verifiers of that time refuse much that later ones take.
const fastScript = guestStart + `export PATH=/bin:/sbin
mkdir -p /var /run/netns
ln -s /run /var/run
fastpath.test -test.v -test.timeout 6m -test.run 'TestCapability|TestSend|TestUplinks|TestFilters|TestNotEthernet'
echo "::code:: $?"
poweroff -f
`

// TestFastPath loads the programs of the fast path into an older kernel than that of the tests' machine, and sends and receives with them.
func TestFastPath(t *testing.T) {
	kernelTree(t)
	dir := t.TempDir()
	build := exec.Command("go", "test", "-c", "-o", filepath.Join(dir, "root/bin/fastpath.test"), "github.com/tulle-net/tulle/tunnel/fastpath")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	text := runAlone(t, dir, fastModules, fastScript, 8*time.Minute)
	if !strings.Contains(text, "\n::code:: 0\n") {
		t.Fatal(text)
	}
	for _, name := range []string{"TestCapability", "TestSend", "TestUplinks/VLAN", "TestUplinks/bond", "TestUplinks/bridge", "TestUplinks/macvlan"} {
		if !strings.Contains(text, "--- PASS: "+name+" ") {
			t.Errorf("%s has not passed: %s", name, text)
		}
	}
}
