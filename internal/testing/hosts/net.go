package hosts

import (
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"strconv"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/tulle-net/tulle/internal/lab"
	"github.com/tulle-net/tulle/internal/sys"
	"github.com/tulle-net/tulle/internal/testing/stall"
	"github.com/tulle-net/tulle/internal/testing/testbuild"
)

// programDir is where program builds; Main sets and removes it.
var programDir string

// parallel is how many tests run at once. They wait nearly all the time: for agents, names, and what fails after a while.
const parallel = 6

// Main runs a package's tests, and removes the program that they have built. TestMain of each package that uses New calls it.
func Main(m *testing.M) int {
	dir, err := os.MkdirTemp("", "tulle-hosts")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer os.RemoveAll(dir)
	programDir = dir
	if err := flag.Set("test.parallel", strconv.Itoa(max(parallel, runtime.GOMAXPROCS(0)))); err != nil { // -parallel overrides it
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return m.Run()
}

// program builds the program once a process, with the race detector if the tests have it.
var program = sync.OnceValues(func() (string, error) {
	if programDir == "" {
		return "", fmt.Errorf("hosts.New needs a TestMain that calls hosts.Main")
	}
	var flags []string
	if info, ok := debug.ReadBuildInfo(); ok {
		for _, s := range info.Settings {
			if s.Key == "-race" && s.Value == "true" {
				flags = append(flags, "-race")
			}
		}
	}
	path := filepath.Join(programDir, "tulle")
	return path, testbuild.Tulle(path, nil, flags...)
})

// Net is all that one test builds.
type Net struct {
	t       testing.TB
	program string
	prefix  string // of the names of its namespaces
	dir     string // its hosts' files; short, because a socket's path has at most 107 bytes
	hosts   map[string]*Host
}

var nets atomic.Int32 // that this process has made

// New makes an empty Net, which the end of the test removes. Without root it skips the test.
func New(t testing.TB) *Net {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root: makes network namespaces")
	}
	path, err := program()
	if err != nil {
		t.Fatal(err)
	}
	dir, err := os.MkdirTemp("", "th")
	if err != nil {
		t.Fatal(err)
	}
	n := &Net{t: t, program: path, prefix: fmt.Sprintf("t%d-%d-", os.Getpid(), nets.Add(1)), dir: dir, hosts: map[string]*Host{}}
	t.Cleanup(func() { n.check(os.RemoveAll(dir)) })
	return n
}

// Program is the path of the program that agents run.
func (n *Net) Program() string { return n.program }

// check ends the test if something that cannot fail did.
func (n *Net) check(err error) {
	n.t.Helper()
	if err != nil {
		n.t.Fatal(err)
	}
}

// Host makes a host: a network namespace with lo up and nothing else, and an /etc/hosts that knows localhost only.
func (n *Net) Host(name string) *Host {
	n.t.Helper()
	h := &Host{Name: name, net: n, netns: n.prefix + name, dir: filepath.Join(n.dir, name)}
	n.check(os.Mkdir(h.dir, 0o755))
	n.check(sys.NewNetns(h.netns))
	n.t.Cleanup(func() { n.check(sys.DeleteNetns(h.netns)) })
	n.hosts[name] = h
	h.EtcHosts()
	h.ResolvConf("nameserver 127.0.0.1")
	n.check(h.sysctl("net.ipv6.conf.default.accept_dad", "0"))
	h.IP("link set lo up")
	return h
}

// Switch makes a switch named "sw", with an MTU of 1500 bytes, which knows nothing of IP.
func (n *Net) Switch() *Host { n.t.Helper(); return n.SwitchNamed("sw", 1500) }

// SwitchNamed makes a switch.
func (n *Net) SwitchNamed(name string, mtu int) *Host {
	n.t.Helper()
	sw := n.Host(name)
	n.check(sw.sysctl("net.ipv6.conf.default.disable_ipv6", "1"))
	sw.IP("link add br0 type bridge mcast_snooping 0", fmt.Sprintf("link set br0 mtu %d up", mtu))
	return sw
}

// Within polls a condition, and ends the test if it does not come in time, with what it last said. While the machine is short of
// CPUs the limit does not run, for three times as long at most: what is waited for is done by other processes, which have to wait, too.
// It returns how long it took.
func Within(t testing.TB, limit time.Duration, what string, cond func() error) time.Duration {
	t.Helper()
	began, meter := time.Now(), stall.Begin()
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	for {
		err := cond()
		took := time.Since(began)
		if err == nil {
			t.Logf("%s: after %.1f s", what, took.Seconds())
			return took
		}
		if short := min(meter.Short(), 3*limit); took > limit+short {
			t.Fatalf("%s: not within %v, and %v in which the machine was short of CPUs: %v", what, limit, short.Round(time.Millisecond), err)
		}
		select {
		case <-t.Context().Done():
			t.Fatalf("%s: the test ended", what)
		case <-tick.C:
		}
	}
}

// waitUp waits until a link of a host passes packets.
func (n *Net) waitUp(h *Host, dev string) {
	n.t.Helper()
	n.check(lab.WaitUp(n.t.Context(), sys.NetnsPath(h.netns), dev))
}
