package lab

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/tulle-net/tulle/internal/sys"
)

// crashEnv makes the test binary a maker of labs, for TestKilledHalfway to kill.
const crashEnv = "TULLE_LAB_TEST_MAKER"

func TestMain(m *testing.M) {
	if name := os.Getenv(crashEnv); name != "" {
		os.Exit(makeLab(name))
	}
	code := m.Run()
	if tulleDir != "" {
		os.RemoveAll(tulleDir)
	}
	os.Exit(code)
}

func needRoot(t *testing.T) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root: makes network namespaces")
	}
}

// testName is a lab name that no other test process uses at this moment.
func testName(what string) string { return fmt.Sprintf("t%d-%s", os.Getpid()%100000, what) }

// up makes a bare lab that the test removes, and checks that nothing of it is left.
func up(t *testing.T, o Options) *Lab {
	t.Helper()
	needRoot(t)
	o.Bare = true
	before := rootLinks(t)
	l, err := Up(t.Context(), o, nil)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := l.Down(context.Background()); err != nil {
			t.Error(err)
		}
		nothingLeft(t, o.Name)
		if after := rootLinks(t); !slices.Equal(before, after) {
			t.Errorf("links of the machine's own namespace: %v before, %v after", before, after)
		}
	})
	return l
}

func nothingLeft(t *testing.T, name string) {
	t.Helper()
	entries, err := os.ReadDir(sys.NetnsDir)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		t.Error(err)
	}
	for _, e := range entries {
		if strings.HasPrefix(e.Name(), name+"-") {
			t.Errorf("namespace %s is left", e.Name())
		}
	}
	if _, err := os.Stat(labDir(name)); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("%s is left: %v", labDir(name), err)
	}
	mounts, err := os.ReadFile("/proc/self/mounts")
	if err != nil || bytes.Contains(mounts, []byte("/"+name+"-")) {
		t.Errorf("mounts of %s are left: %v", name, err)
	}
}

func rootLinks(t *testing.T) []string {
	t.Helper()
	links, err := netlink.LinkList()
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, l := range links {
		names = append(names, l.Attrs().Name)
	}
	slices.Sort(names)
	return names
}

// reach pings everything from everything and compares who is reached with want, and as whom.
func reach(t *testing.T, l *Lab, when string, want func(from, to Pod) bool) {
	t.Helper()
	pongs, err := l.pingAll(t.Context(), false, func(from, to string) time.Duration {
		a, _ := l.Pod(from)
		b, _ := l.Pod(to)
		if want(a, b) {
			return PingPatience
		}
		return PingTimeout // that nothing comes takes its time
	})
	if err != nil {
		t.Fatal(err)
	}
	pods := l.Pods()
	if n := len(pods) * (len(pods) - 1) * len(pods[0].Addresses); len(pongs) != n {
		t.Fatalf("%s: %d pings, want %d", when, len(pongs), n)
	}
	for _, p := range pongs {
		from, _ := l.Pod(p.From)
		to, _ := l.Pod(p.To)
		if ok := p.Err == nil; ok != want(from, to) {
			t.Errorf("%s: %s to %s %v: %v, want reached %v", when, p.From, p.To, p.Addr, p.Err, !ok)
		} else if ok && p.Source != from.Addr(p.Addr.Is6()) {
			t.Errorf("%s: %s to %s %v: seen there as %v, want its own %v", when, p.From, p.To, p.Addr, p.Source, from.Addresses)
		} else if ok && p.RTT <= 0 {
			t.Errorf("%s: %s to %s: round trip %v", when, p.From, p.To, p.RTT)
		}
	}
}

func everyone(Pod, Pod) bool     { return true }
func nobody(from, to Pod) bool   { return false }
func sameHost(from, to Pod) bool { return from.Host == to.Host }

func TestBaselines(t *testing.T) {
	for _, tc := range []struct {
		name     string
		underlay Families
	}{{"dual", DualStack}, {"v4", IPv4Only}, {"v6", IPv6Only}} {
		t.Run(tc.name, func(t *testing.T) {
			l := up(t, Options{Name: testName("b" + tc.name), Nodes: 3, Pods: 2, Underlay: tc.underlay})
			for _, b := range []struct {
				name string
				set  func(context.Context) (func() error, error)
				mtu  int
			}{{"direct", l.DirectRoutes, 1500}, {"vxlan", l.KernelVXLAN, map[bool]int{true: 1450, false: 1430}[tc.underlay.V4]}} {
				undo, err := b.set(t.Context())
				if b.name == "direct" && tc.underlay != DualStack {
					if err == nil || !strings.Contains(err.Error(), "lacks its family") {
						t.Errorf("direct routes without the pods' family: %v", err)
					}
					continue
				}
				if err != nil {
					t.Fatal(err)
				}
				reach(t, l, b.name, everyone)
				pods := l.Pods()
				far := pods[2]
				if got := largestUDP(t, l, pods[0].Name, far.Name, far.Addresses[0]); got != b.mtu {
					t.Errorf("%s: the largest packet that goes through unfragmented has %d bytes, want %d", b.name, got, b.mtu)
				}
				if err := undo(); err != nil {
					t.Fatal(err)
				}
			}
			reach(t, l, "after", sameHost)
		})
	}
}

// largestUDP finds the largest IPv4 packet that a pod may send to another with DF, of the sizes that matter.
func largestUDP(t *testing.T, l *Lab, from, to string, addr netip.Addr) int {
	t.Helper()
	pc, err := l.ListenPacket(t.Context(), to, "udp", netip.AddrPortFrom(addr, 9000).String())
	if err != nil {
		t.Fatal(err)
	}
	defer pc.Close()
	c, err := l.Dial(t.Context(), from, "udp", netip.AddrPortFrom(addr, 9000).String())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	setDF(t, c.(syscall.Conn))
	for _, size := range []int{1501, 1500, 1451, 1450, 1431, 1430} {
		if goesThrough(c, pc, size) {
			return size
		}
	}
	return 0
}

// goesThrough sends packets of a size until one arrives, or the kernel refuses more of them.
func goesThrough(c net.Conn, pc net.PacketConn, size int) bool {
	buf := make([]byte, 2000)
	refused := 0
	for end := time.Now().Add(20 * time.Second); time.Now().Before(end); {
		if _, err := c.Write(make([]byte, size-28)); err != nil {
			if refused++; refused == 2 { // the first may be about a packet of before, which a router has found too large
				return false
			}
			continue
		}
		refused = 0
		_ = pc.SetReadDeadline(time.Now().Add(200 * time.Millisecond))
		if n, _, err := pc.ReadFrom(buf); err == nil && n == size-28 {
			return true
		}
	}
	return false
}

// setDF has the kernel send nothing in fragments, and refuse what is too large.
func setDF(t *testing.T, c syscall.Conn) {
	t.Helper()
	rc, err := c.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	var serr error
	err = rc.Control(func(fd uintptr) {
		serr = unix.SetsockoptInt(int(fd), unix.IPPROTO_IP, unix.IP_MTU_DISCOVER, unix.IP_PMTUDISC_DO)
	})
	if err := errors.Join(err, serr); err != nil {
		t.Fatal(err)
	}
}

func TestFamilies(t *testing.T) {
	l := up(t, Options{Name: testName("fam"), Nodes: 2, Subnets: 1, Overlay: IPv6Only, Underlay: IPv6Only, MTU: 1400})
	if _, err := l.DirectRoutes(t.Context()); err != nil {
		t.Fatal(err)
	}
	reach(t, l, "direct, IPv6 only", everyone)
	for _, p := range l.Pods() {
		if len(p.Addresses) != 1 || !p.Addresses[0].Is6() || p.MTU != 1400 {
			t.Errorf("pod %+v", p)
		}
	}
}

func TestSplitAndHeal(t *testing.T) {
	l := up(t, Options{Name: testName("split"), Nodes: 4, Subnets: 2}) // h1 and h3 share a bridge
	if _, err := l.DirectRoutes(t.Context()); err != nil {
		t.Fatal(err)
	}
	reach(t, l, "at first", everyone)
	side := func(names ...string) func(Pod, Pod) bool {
		return func(a, b Pod) bool { return slices.Contains(names, a.Host) == slices.Contains(names, b.Host) }
	}
	if err := l.Split([]string{"h1", "h2"}); err != nil {
		t.Fatal(err)
	}
	reach(t, l, "split across both subnets", side("h1", "h2"))
	if err := l.Split([]string{"h1"}, []string{"h2"}, []string{"h3"}, []string{"h4"}); err != nil {
		t.Fatal(err)
	}
	reach(t, l, "each alone", nobody)
	// Another process can heal what this one split.
	again, err := Open(l.Name())
	if err != nil {
		t.Fatal(err)
	}
	if err := again.Heal(); err != nil {
		t.Fatal(err)
	}
	reach(t, l, "healed", everyone)
	if err := again.Heal(); err != nil {
		t.Errorf("heal what is whole: %v", err)
	}
	if err := l.Split([]string{"h9"}); err == nil || !strings.Contains(err.Error(), "h9") || !strings.Contains(err.Error(), "h1") {
		t.Errorf("split off a host that is not there: %v", err)
	}
	if err := l.Unplug("h3"); err != nil {
		t.Fatal(err)
	}
	reach(t, l, "h3 unplugged", func(a, b Pod) bool { return a.Host != "h3" && b.Host != "h3" })
	if err := l.Plug("h3"); err != nil {
		t.Fatal(err)
	}
	h3, _ := l.Host("h3")
	err = sys.Poll(t.Context(), 20*time.Millisecond, func() (bool, error) {
		return l.Ping(t.Context(), "h1", "h3", h3.Addr(true)).Err == nil, nil
	})
	if err != nil {
		t.Fatal(err)
	}
	reach(t, l, "h3 plugged in again", everyone)
}

func TestAddAndRemove(t *testing.T) {
	l := up(t, Options{Name: testName("add"), Nodes: 2, Pods: -1})
	ctx := t.Context()
	h, err := l.AddHost(ctx, 2)
	if err != nil || h.Name != "h3" {
		t.Fatalf("%+v, %v", h, err)
	}
	for _, name := range []string{"h1", "h3", "h3"} {
		if _, err := l.AddPod(ctx, name); err != nil {
			t.Fatal(err)
		}
	}
	again, err := Open(l.Name())
	if err != nil {
		t.Fatal(err)
	}
	for _, x := range []*Lab{l, again} {
		if len(x.Hosts()) != 3 || len(x.Pods()) != 3 || x.Pods()[2].Name != "p3b" {
			t.Errorf("hosts %v, pods %v", x.Hosts(), x.Pods())
		}
	}
	undo, err := l.DirectRoutes(ctx)
	if err != nil {
		t.Fatal(err)
	}
	reach(t, l, "three hosts", everyone)
	if err := undo(); err != nil {
		t.Fatal(err)
	}
	if err := l.RemovePod(ctx, "p3a"); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(sys.NetnsPath(l.netnsName("p3a"))); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the removed pod's namespace: %v", err)
	}
	if p, err := l.AddPod(ctx, "h3"); err != nil || p.Name != "p3c" {
		t.Errorf("a pod after that: %+v, %v", p, err)
	}
	if err := l.ResetHost(ctx, "h1"); err != nil {
		t.Fatal(err)
	}
	if n := len(l.Pods()); n != 2 {
		t.Errorf("%d pods after h1 lost power", n)
	}
	h3, _ := l.Host("h3")
	eventually(t, "h1 reaches h3 after the power came back", func() error { return l.Ping(ctx, "h1", "h3", h3.Addr(false)).Err })
	if err := l.RemoveHost(ctx, "h3"); err != nil {
		t.Fatal(err)
	}
	if len(l.Hosts()) != 2 || len(l.Pods()) != 0 {
		t.Errorf("hosts %v, pods %v", l.Hosts(), l.Pods())
	}
}

// TestRouterKeepsItsMAC plugs a port with an address below all others into a bridge, as a host's arrival may: the
// neighbours' entries for the router must stay true.
func TestRouterKeepsItsMAC(t *testing.T) {
	l := up(t, Options{Name: testName("mac"), Nodes: 2, Subnets: 2, Pods: -1})
	h, err := sys.OpenNetlink(sys.NetnsPath(l.netnsName(Router)))
	if err != nil {
		t.Fatal(err)
	}
	defer h.Close()
	get := func(name string) netlink.Link {
		t.Helper()
		link, err := h.LinkByName(name)
		if err != nil {
			t.Fatal(err)
		}
		return link
	}
	before := get(gatewayName(1)).Attrs().HardwareAddr
	if other := get(gatewayName(2)).Attrs().HardwareAddr; bytes.Equal(before, other) {
		t.Errorf("both bridges have the address %v", other)
	}
	if err := h.LinkSetHardwareAddr(get("h1"), net.HardwareAddr{0x02, 0, 0, 0, 0, 1}); err != nil {
		t.Fatal(err)
	}
	if after := get(gatewayName(1)).Attrs().HardwareAddr; !bytes.Equal(before, after) {
		t.Errorf("the router's address changed from %v to %v", before, after)
	}
	// Nobody else answers for it: a switch's address changes with its ports.
	gateway := underlayAddrs(1, routerHost, IPv4Only)[0].String()
	out, err := exec.Command("nsenter", "--net="+l.Hosts()[0].Netns, "busybox", "arping", "-c3", "-w20", "-I", "eth0", gateway).CombinedOutput()
	if err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	answers := regexp.MustCompile(`\[([0-9a-f:]+)\]`).FindAllStringSubmatch(string(out), -1)
	if len(answers) == 0 {
		t.Errorf("nobody answers for %s: %s", gateway, out)
	}
	for _, a := range answers {
		if a[1] != before.String() {
			t.Errorf("%s answers for %s, which is %v: %s", a[1], gateway, before, out)
		}
	}
}

func TestExec(t *testing.T) {
	l := up(t, Options{Name: testName("exec"), Nodes: 2})
	run := func(target string, argv ...string) (int, string, error) {
		var out bytes.Buffer
		code, err := l.Exec(t.Context(), target, argv, Stdio{Out: &out, Err: &out})
		return code, out.String(), err
	}
	if code, out, err := run("p1a", "cat", "/proc/net/dev"); code != 0 || err != nil || !strings.Contains(out, "eth0") || strings.Contains(out, "veth") {
		t.Errorf("devices of p1a: %d, %v\n%s", code, err, out)
	}
	if _, out, err := run("h1", "ls", "/sys/class/net"); err != nil || !strings.Contains(out, "veth-p1a") {
		t.Errorf("/sys of h1: %v\n%s", err, out)
	}
	if code, _, err := run("r", "sh", "-c", "exit 7"); code != 7 || err != nil {
		t.Errorf("exit 7: %d, %v", code, err)
	}
	if code, _, err := run("r", "sh", "-c", "kill -TERM $$"); code != 128+15 || err != nil {
		t.Errorf("ended by SIGTERM: %d, %v", code, err)
	}
	if _, _, err := run("p9z", "true"); err == nil || !strings.Contains(err.Error(), "p2a") {
		t.Errorf("a pod that is not there: %v", err)
	}
	if _, _, err := run("h1", "no-such-program"); err == nil || !strings.Contains(err.Error(), "no-such-program") {
		t.Errorf("a program that is not there: %v", err)
	}
	// The thread whose mounts were changed must not have come back.
	if b, err := os.ReadFile("/proc/thread-self/mountinfo"); err != nil || bytes.Contains(b, []byte(l.Name()+"/h1")) {
		t.Errorf("mounts of this process after Exec: %v\n%s", err, b)
	}
}

func TestRefusals(t *testing.T) {
	l := up(t, Options{Name: testName("twice"), Nodes: 1, Pods: -1})
	if _, err := Up(t.Context(), Options{Name: l.Name(), Bare: true}, nil); err == nil || !strings.Contains(err.Error(), "tulle lab down --name "+l.Name()) {
		t.Errorf("a second lab of the name: %v", err)
	}
	if _, err := Up(t.Context(), Options{Name: l.Name(), Bare: true, Replace: true}, nil); err == nil || !strings.Contains(err.Error(), "in use by process") {
		t.Errorf("replacing a lab in use: %v", err)
	}
	if _, err := Open("t-no-such"); !errors.Is(err, errNoLab) || !strings.Contains(err.Error(), "tulle lab up --name t-no-such") {
		t.Errorf("open a lab that is not there: %v", err)
	}
	if err := l.StartAgent(t.Context(), "h1"); !errors.Is(err, errNoAgent) {
		t.Errorf("an agent in a bare lab: %v", err)
	}
	names, err := List()
	if err != nil || !slices.Contains(names, l.Name()) {
		t.Errorf("list: %v, %v", names, err)
	}
}

func TestParallel(t *testing.T) {
	needRoot(t)
	for i := range 3 {
		t.Run("", func(t *testing.T) {
			t.Parallel()
			l := up(t, Options{Name: testName(fmt.Sprintf("par%d", i)), Nodes: 2, Subnets: 2})
			if _, err := l.DirectRoutes(t.Context()); err != nil {
				t.Fatal(err)
			}
			reach(t, l, "parallel", everyone)
		})
	}
}

// makeLab makes a lab and, in it, a process, then waits to be killed.
func makeLab(name string) int {
	l, err := Up(context.Background(), Options{Name: name, Bare: true, Replace: true}, func(s string) { fmt.Println(s) })
	if err != nil {
		fmt.Println("failed:", err)
		return 1
	}
	code, err := l.Exec(context.Background(), "p1a", []string{"sh", "-c", "echo $$; exec sleep 3600"}, Stdio{Out: os.Stdout})
	fmt.Println("sleep ended:", code, err)
	return 1
}

// A maker is killed at moments spread over all that Up does, the last ones with a lab that is whole and a process in it.
// Each time the next Up of the name works, and Down leaves nothing.
func TestKilledHalfway(t *testing.T) {
	needRoot(t)
	name := testName("crash")
	for i := range 12 {
		cmd := exec.Command("/proc/self/exe")
		cmd.Env = append(os.Environ(), crashEnv+"="+name)
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		var sleeper process
		if i < 10 {
			// A moment to be killed in, not a wait for something: any length is right.
			timer := time.NewTimer(time.Duration(i) * 6 * time.Millisecond)
			<-timer.C
		} else {
			var pid int
			buf := make([]byte, 4096)
			var text string
			for pid == 0 {
				n, err := out.Read(buf)
				if err != nil {
					t.Fatalf("%v\n%s", err, text)
				}
				text += string(buf[:n])
				lines := strings.Split(text, "\n")
				if len(lines) >= 4 {
					fmt.Sscan(lines[2], &pid)
				}
			}
			sleeper.PID = pid
			if sleeper.Start, _, err = procStat(pid); err != nil {
				t.Fatal(err)
			}
		}
		if err := cmd.Process.Signal(syscall.SIGKILL); err != nil {
			t.Fatal(err)
		}
		_ = cmd.Wait()
		l, err := Up(t.Context(), Options{Name: name, Bare: true, Replace: true}, nil)
		if err != nil {
			t.Fatalf("round %d: %v", i, err)
		}
		if sleeper.PID != 0 && sleeper.alive() {
			t.Errorf("process %d of the killed maker's lab still lives", sleeper.PID)
		}
		if _, err := l.DirectRoutes(t.Context()); err != nil {
			t.Fatal(err)
		}
		reach(t, l, "after the crash", everyone)
		if err := l.Down(t.Context()); err != nil {
			t.Fatal(err)
		}
		nothingLeft(t, name)
	}
}

func TestIsOurs(t *testing.T) {
	for ns, want := range map[string]bool{
		"a-r": true, "a-h1": true, "a-h12": true, "a-p1a": true, "a-p12ab": true,
		"a": false, "a-": false, "a-h": false, "a-p": false, "a-p1": false, "a-pa": false, "a-h1a": false, "a-x1": false,
		"a-b-h1": false, "ab-h1": false, "b-h1": false, "a-p1a2": false, "a-rr": false, "a-p1A": false,
	} {
		if got := isOurs("a", ns); got != want {
			t.Errorf("isOurs(a, %q) = %v", ns, got)
		}
	}
	if !isOurs("a-b", "a-b-h1") {
		t.Error("a name with a dash")
	}
}

func TestLetters(t *testing.T) {
	seen := map[string]bool{}
	for n := 1; n <= 1000; n++ {
		s := letters(n)
		if seen[s] || s == "" {
			t.Fatalf("letters(%d) = %q, again", n, s)
		}
		seen[s] = true
	}
	for n, want := range map[int]string{1: "a", 26: "z", 27: "aa", 28: "ab", 52: "az", 53: "ba"} {
		if got := letters(n); got != want {
			t.Errorf("letters(%d) = %q, want %q", n, got, want)
		}
	}
}

func TestOptions(t *testing.T) {
	o, err := Options{}.withDefaults()
	if err != nil || o.Name != DefaultName || o.Nodes != 3 || o.Subnets != 2 || o.Pods != 1 || o.MTU != 1500 || o.Wire != WireCut || len(o.ClusterCIDRs) != 2 {
		t.Errorf("defaults: %+v, %v", o, err)
	}
	for _, tc := range []struct {
		o    Options
		want string
	}{
		{Options{Name: "Upper"}, "lab name"},
		{Options{Name: "a/../b"}, "lab name"},
		{Options{Name: strings.Repeat("a", 21)}, "lab name"},
		{Options{Nodes: -1}, "nodes"},
		{Options{Nodes: 241}, "1 to 240"},
		{Options{Subnets: 241}, "1 to 240"},
		{Options{Pods: 251}, "at most 250"},
		{Options{MTU: 576}, "1280"},
		{Options{Wire: "bent"}, "use cut or whole"},
		{Options{Nodes: 3, Straight: true}, "one in each"},
		{Options{ClusterCIDRs: prefixes("10.0.0.1/16", "fd00::/48")}, "use 10.0.0.0/16"},
		{Options{ClusterCIDRs: prefixes("192.168.0.0/20", "fd00:1::/48")}, "overlaps 192.168.0.0/16"},
		{Options{ClusterCIDRs: prefixes("10.0.0.0/16")}, "IPv6"},
	} {
		_, err := tc.o.withDefaults()
		if err == nil || !strings.Contains(err.Error(), tc.want) {
			t.Errorf("%+v: %v, want %q", tc.o, err, tc.want)
		}
	}
}

func prefixes(s ...string) (out []netip.Prefix) {
	for _, p := range s {
		out = append(out, netip.MustParsePrefix(p))
	}
	return out
}

// A process is found also in the moment in which it executes another program.
func TestProcessesInWhileTheyExecute(t *testing.T) {
	l := up(t, Options{Name: testName("again"), Nodes: 1})
	script := filepath.Join(t.TempDir(), "again")
	if err := os.WriteFile(script, []byte("#!/bin/sh\nexec \"$0\"\n"), 0o700); err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(t.Context())
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		_, _ = l.Exec(ctx, "p1a", []string{script}, Stdio{}) // ends by being killed
	}()
	defer func() {
		stop()
		<-ended
	}()
	find := func() int { return len(processesIn(l.Name(), []string{l.Name() + "-p1a"})) }
	if err := sys.Poll(t.Context(), time.Millisecond, func() (bool, error) { return find() > 0, nil }); err != nil {
		t.Fatal(err)
	}
	for i := range 300 {
		if n := find(); n != 1 {
			t.Fatalf("look %d found %d processes", i, n)
		}
	}
}

func TestProcess(t *testing.T) {
	self := thisProcess()
	if !self.alive() {
		t.Error("this process is not alive")
	}
	other := process{self.PID, self.Start + 1}
	if other.alive() {
		t.Error("a process with this PID and another start time is alive")
	}
	if err := other.signal(syscall.SIGKILL); !errors.Is(err, os.ErrProcessDone) {
		t.Errorf("signal to a reused PID: %v", err) // and this test goes on
	}
	cmd := exec.Command("sleep", "3600")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	p := process{PID: cmd.Process.Pid}
	var err error
	if p.Start, _, err = procStat(p.PID); err != nil {
		t.Fatal(err)
	}
	if err := p.end(t.Context(), syscall.SIGTERM); err != nil { // not yet reaped: a zombie counts as gone
		t.Error(err)
	}
	_ = cmd.Wait()
	if err := p.end(t.Context(), syscall.SIGTERM); err != nil {
		t.Errorf("end a process that has ended: %v", err)
	}
}

// A lab that was built is unlocked although a child that is being started holds the lock's file, too.
func TestUnlock(t *testing.T) {
	name := fmt.Sprintf("t%d-lock", os.Getpid())
	unlock, err := lock(name)
	if err != nil {
		t.Fatal(err)
	}
	defer os.Remove(labDir(name))
	files, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	found := false
	for _, f := range files {
		if to, _ := os.Readlink("/proc/self/fd/" + f.Name()); to != labDir(name) {
			continue
		}
		fd, err := strconv.Atoi(f.Name())
		if err != nil {
			t.Fatal(err)
		}
		held, err := syscall.Dup(fd)
		if err != nil {
			t.Fatal(err)
		}
		defer syscall.Close(held)
		found = true
		break
	}
	if _, err := lock(name); err == nil || !found {
		t.Fatalf("a locked lab was locked again, or its lock was not found: %v", found)
	}
	unlock()
	if unlock, err = lock(name); err != nil {
		t.Fatal(err)
	}
	unlock()
}
