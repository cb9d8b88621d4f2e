package pair

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"maps"
	"math"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/tulle-net/tulle/bench/result"
	"github.com/tulle-net/tulle/internal/sys"
	"github.com/tulle-net/tulle/internal/testing/detour"
	"github.com/tulle-net/tulle/internal/testing/namespace"
	"github.com/tulle-net/tulle/internal/testing/testbuild"
)

// carry makes a wire between two namespaces, 10.99.0.1 and 10.99.0.2, whose faults are known: each end is a TUN device, and this
// process carries the packets until the test ends. It delays every packet by the same time and loses a share of the UDP datagrams from the first end to the
// second; larger packets than its MTU it loses without a word.
func carry(t *testing.T, w *detour.Detour) (a, b *namespace.Namespace) {
	t.Helper()
	a, b = namespace.New(t), namespace.New(t)
	if w.Loses == nil {
		w.Loses = udp
	}
	first, second := end(t, a, "10.99.0.1/24", "fd99::1/64"), end(t, b, "10.99.0.2/24", "fd99::2/64")
	w.Carry(first, second, true)
	w.Carry(second, first, false)
	t.Cleanup(w.End)
	return a, b
}

func end(t *testing.T, n *namespace.Namespace, addrs ...string) (fd int) {
	t.Helper()
	n.Do(func() (err error) {
		if fd, err = unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0); err != nil {
			return err
		}
		return sys.TunAttach(fd, "wire0", unix.IFF_TUN|unix.IFF_NO_PI)
	})
	n.Netlink(func(nl *sys.Netlink) error {
		link, err := nl.LinkByName("wire0")
		if err != nil {
			return err
		}
		for _, addr := range addrs {
			p := netip.MustParsePrefix(addr)
			if err := nl.AddrAdd(link, &netlink.Addr{IPNet: sys.IPNet(p), Flags: unix.IFA_F_NODAD}); err != nil {
				return err
			}
		}
		// Room for all that is overdue after the sender had no CPU for a moment.
		return errors.Join(nl.LinkSetTxQLen(link, 4096), nl.LinkSetUp(link))
	})
	return fd
}

func udp(p []byte) bool {
	return len(p) > 20 && (p[0]>>4 == 4 && p[9] == 17 || p[0]>>4 == 6 && p[6] == 17)
}

// tulle builds the program where everybody can run it.
func tulle(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "tulle-bench")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	binary := filepath.Join(dir, "tulle")
	if err := errors.Join(os.Chmod(dir, 0o755), testbuild.Tulle(binary, nil)); err != nil {
		t.Fatal(err)
	}
	return binary
}

// command is the program without root; it is started in a namespace.
func command(t *testing.T, binary string, args ...string) (*exec.Cmd, *strings.Builder) {
	t.Helper()
	c := exec.CommandContext(context.Background(), binary, append([]string{"bench"}, args...)...)
	c.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
	c.Cancel = func() error { return c.Process.Signal(os.Interrupt) }
	var errs strings.Builder
	c.Stderr = &errs
	return c, &errs
}

// serving runs a server in a namespace until the test ends.
func serving(t *testing.T, n *namespace.Namespace, binary string, args ...string) {
	t.Helper()
	c, _ := command(t, binary, append([]string{"serve"}, args...)...)
	c.Stderr = nil
	out, err := c.StderrPipe()
	if err != nil {
		t.Fatal(err)
	}
	n.Do(c.Start)
	lines := bufio.NewScanner(out)
	if !lines.Scan() || !strings.HasPrefix(lines.Text(), "listening on ") {
		t.Fatalf("serve says %q", lines.Text())
	}
	done := make(chan struct{})
	go func() { // ends with the server
		defer close(done)
		for lines.Scan() {
			t.Log("serve:", lines.Text())
		}
	}()
	t.Cleanup(func() {
		_ = c.Process.Signal(os.Interrupt)
		<-done
		if err := c.Wait(); err != nil {
			t.Errorf("serve: %v", err)
		}
	})
}

// measured runs the program and reads its result.
func measured(t *testing.T, n *namespace.Namespace, binary string, args ...string) *result.Run {
	t.Helper()
	r, err := tried(t, n, binary, args...)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// tried is measured for a path on which a run may end without a result.
func tried(t *testing.T, n *namespace.Namespace, binary string, args ...string) (*result.Run, error) {
	t.Helper()
	c, errs := command(t, binary, append([]string{"run", "-o", "json"}, args...)...)
	var out bytes.Buffer
	c.Stdout = &out
	n.Do(c.Start)
	err := c.Wait()
	r, rerr := result.Read(&out)
	if rerr != nil {
		return nil, fmt.Errorf("run %v: %v, %w\n%s", args, err, rerr, errs)
	}
	if (err != nil) != (len(r.Modes[0].Errors) > 0) {
		t.Errorf("run %v: %v, with measures that failed: %q", args, err, r.Modes[0].Errors)
	}
	return r, nil
}

// Two machines on one link need no addresses but those that every link has: the zone says which link.
func TestLinkLocal(t *testing.T) {
	a, b := namespace.New(t), namespace.New(t)
	peer, err := os.Open(b.Path())
	if err != nil {
		t.Fatal(err)
	}
	defer peer.Close()
	a.Netlink(func(nl *sys.Netlink) error {
		return nl.LinkAdd(&netlink.Veth{LinkAttrs: sys.LinkAttrs("v0"), PeerName: "v1", PeerNamespace: netlink.NsFd(peer.Fd())})
	})
	for _, end := range []struct {
		n          *namespace.Namespace
		link, addr string
	}{{a, "v0", "fe80::1/64"}, {b, "v1", "fe80::2/64"}} {
		end.n.Netlink(func(nl *sys.Netlink) error {
			link, err := nl.LinkByName(end.link)
			if err != nil {
				return err
			}
			add := nl.AddrAdd(link, &netlink.Addr{IPNet: sys.IPNet(netip.MustParsePrefix(end.addr)), Flags: unix.IFA_F_NODAD})
			return errors.Join(add, nl.LinkSetUp(link))
		})
	}
	binary := tulle(t)
	serving(t, b, binary, "--listen", "[fe80::2%v1]:17979")
	for _, host := range []string{"fe80::2%v0", "[fe80::2%v0]:17979"} {
		for attempt := 1; ; attempt++ { // nothing may arrive within 50 ms on a busy machine, which has ten
			r := measured(t, a, binary, host, "--rounds", "1", "--duration", "50ms")
			m := r.Machines[0]
			if len(r.Modes[0].Errors) == 0 && len(r.Asked) == 12 && r.MTU == 1500 && m.Interface == "v0" {
				break
			}
			t.Logf("%s: MTU %d, from %s, %q", host, r.MTU, m.Interface, r.Modes[0].Errors)
			if attempt == 10 {
				t.Fatal("not all was measured")
			}
		}
	}
}

// What needs root says so to others, before it does anything.
func TestNeedsRoot(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root: it runs the program as another user")
	}
	binary := tulle(t)
	for _, what := range []string{"all", "latency", "throughput"} {
		c, errs := command(t, binary, what)
		if err := c.Run(); c.ProcessState.ExitCode() != 1 || !strings.Contains(errs.String(), "needs root") || !strings.Contains(errs.String(), "sudo") {
			t.Errorf("bench %s as an ordinary user: %v: %s", what, err, errs)
		}
	}
}

// A wire that delays each packet by 1 ms is seen to delay by 1 ms: never less, and more only by what a wire without delay
// and the late timers of this process add. What is compared is the time that a twentieth of the answers do not exceed:
// a machine that others use as well adds to most answers, but not to all. A busy machine has ten attempts at each figure, each longer than the
// one before: it answers some dozens a second.
func TestKnownDelay(t *testing.T) {
	if testing.Short() {
		t.Skip("the race detector does not look into the program that this runs")
	}
	binary := tulle(t)
	w := &detour.Detour{}
	a, b := carry(t, w)
	serving(t, b, binary)
	const delay = time.Millisecond
	right, least := map[string]bool{}, map[string]float64{} // the least without delay, by figure
	for attempt := 1; ; attempt++ {
		w.Delay(0)
		d := time.Duration(attempt) * 250 * time.Millisecond
		base := latencies(t, a, binary, d)
		for name, l := range base {
			if least[name] == 0 || l.At(5) < least[name] {
				least[name] = l.At(5)
			}
		}
		w.Delay(delay)
		for name, l := range latencies(t, a, binary, d) {
			if b := base[name]; b != nil && checkDelay(t, name, b.At(5), l, delay) || least[name] > 0 && checkDelay(t, name, least[name], l, delay) {
				right[name] = true
			}
		}
		if len(right) == kinds {
			return
		}
		if attempt == 10 {
			t.Fatalf("a delay of 1 ms is seen as 1 ms by these only: %v", slices.Sorted(maps.Keys(right)))
		}
	}
}

// kinds is how many figures latencies measures.
const kinds = 5

// latencies measures over the wire, and returns what was measured by kind and size; without those of which a busy machine let too few answers come.
func latencies(t *testing.T, a *namespace.Namespace, binary string, d time.Duration) map[string]*result.Latency {
	t.Helper()
	m := measured(t, a, binary, "10.99.0.2", "--rounds", "1", "--duration", d.String(), "--measures", Latency).Modes[0]
	out := map[string]*result.Latency{}
	for _, l := range []*result.Latency{
		m.Merged(result.PingPong, 64, false), m.Merged(result.PingPong, 1200, false), m.Merged(result.OpenLoop, 64, false),
		m.Merged(result.RR, 64, false), m.Merged(result.CRR, 64, false),
	} {
		if l == nil {
			t.Fatalf("not measured: %q", m.Errors)
		}
		if l.Answers < 20 {
			t.Logf("too few answers: %+v", l)
			continue
		}
		out[fmt.Sprintf("%s %d", l.Kind, l.Payload)] = l
	}
	return out
}

// checkDelay reports whether a delay was seen as it is. Less than that is wrong in any attempt.
func checkDelay(t *testing.T, name string, base float64, l *result.Latency, delay time.Duration) bool {
	t.Helper()
	once := delay.Seconds() * 1e6
	switch l.Kind {
	case result.RR:
		once *= 2 // there and back
	case result.CRR:
		once *= 4 // a handshake before it
	}
	if low := l.At(0); low < once*0.999 {
		t.Errorf("%s: %v µs over a wire that takes %v", name, low, once)
	}
	added := l.At(5) - base
	t.Logf("%s: %.1f µs without delay, %.1f with: a delay of %.1f where %.0f was injected", name, base, l.At(5), added, once)
	return added >= once*0.9 && added <= once*1.25
}

// A wire that loses a tenth of the datagrams, and those above its MTU, is seen to do so. A busy machine, which loses more, has
// ten attempts.
func TestKnownLoss(t *testing.T) {
	if testing.Short() {
		t.Skip("the race detector does not look into the program that this runs")
	}
	binary := tulle(t)
	for host, mtu := range map[string]int{"10.99.0.2": 1400, "fd99::2": 1500} {
		w := &detour.Detour{MTU: mtu}
		a, b := carry(t, w)
		serving(t, b, binary)
		for attempt := 1; ; attempt++ {
			w.Loss(0.1)
			r, err := tried(t, a, binary, host, "--rounds", "1", "--duration", "500ms")
			wrong := []string{fmt.Sprint(err)} // the run's own connection may stand still for half a minute, too
			if err == nil {
				wrong = lossSeen(t, r, mtu)
			}
			lost, all := w.Lost()
			if len(wrong) == 0 {
				break
			}
			t.Logf("%s, attempt %d: %q; the wire lost %d of %d", host, attempt, wrong, lost, all)
			if attempt == 10 {
				t.Fatal("a loss of a tenth is not seen as that")
			}
		}
	}
}

// Where a firewall lets no datagram through, TCP is measured, and it is said once that UDP is not.
func TestTCPOnly(t *testing.T) {
	binary := tulle(t)
	w := &detour.Detour{}
	a, b := carry(t, w)
	serving(t, b, binary)
	w.Loss(1)
	r := measured(t, a, binary, "10.99.0.2", "--rounds", "2", "--duration", "50ms")
	m := r.Modes[0]
	if len(m.Errors) != 1 || !strings.HasPrefix(m.Errors[0], "all of UDP, and the path MTU: no answer to UDP datagrams") || len(m.Rounds) != 2 || len(r.Asked) != 12 || r.MTU != 0 {
		t.Errorf("MTU %d, %d rounds, %d measures asked for, failed: %q", r.MTU, len(m.Rounds), len(r.Asked), m.Errors)
	}
	for _, key := range []string{"tcp1_gbps", "tcp4_gbps", "rr_p50_us", "crr_p50_us"} {
		if m.Summary[key].N != 2 {
			t.Errorf("%s was not measured", key)
		}
	}
	for key := range m.Summary {
		if strings.HasPrefix(key, "rtt") || strings.HasPrefix(key, "open") || strings.HasPrefix(key, "udp") {
			t.Errorf("%s was measured without an answer", key)
		}
	}
	if got := r.Verdict(); !strings.Contains(got, "in one TCP stream") || !strings.HasSuffix(got, "path MTU unknown.") {
		t.Errorf("the result says %q", got)
	}
	if notes := strings.Join(r.Notes, " "); strings.Contains(notes, "MTU") || strings.Contains(notes, "Fixed rate") {
		t.Errorf("the method of what was not measured is described: %q", r.Notes)
	}
	c, errs := command(t, binary, "run", "10.99.0.2", "--measures", "rate")
	a.Do(c.Start)
	if err := c.Wait(); err == nil || !strings.Contains(errs.String(), "is UDP port 17979 open") {
		t.Errorf("UDP alone: %v, %s", err, errs)
	}
}

// A path MTU is not taken for smaller because datagrams are lost by chance: here the first four of each size.
func TestPathMTUWithLoss(t *testing.T) {
	binary := tulle(t)
	seen := map[int]int{}
	w := &detour.Detour{MTU: 1400, Loses: func(p []byte) bool {
		seen[len(p)]++
		return udp(p) && len(p) > 500 && seen[len(p)] <= 4
	}}
	a, b := carry(t, w)
	w.Loss(1)
	serving(t, b, binary)
	r := measured(t, a, binary, "10.99.0.2", "--rounds", "1", "--duration", "50ms", "--measures", "latency", "--sizes", "64,1400")
	if r.MTU != 1400 {
		t.Errorf("a path MTU of %d was found, not 1400", r.MTU)
	}
	if got, want := strings.Join(r.Modes[0].Errors, " "), "a packet of 1428 bytes, and the path takes 1400"; !strings.Contains(got, want) || !strings.Contains(got, "--sizes of at most 1372") {
		t.Errorf("of a datagram that is too large it is said %q, not %q", got, want)
	}
}

// Over a long path TCP is not measured before it sends what the path carries.
func TestLongWarmUp(t *testing.T) {
	binary := tulle(t)
	w := &detour.Detour{}
	a, b := carry(t, w)
	serving(t, b, binary)
	w.Delay(25 * time.Millisecond)
	r := measured(t, a, binary, "10.99.0.2", "--rounds", "1", "--duration", "100ms", "--measures", "throughput")
	if notes := strings.Join(r.Notes, " "); !strings.Contains(notes, "with TCP streams of ") || r.Seconds < 2*warmTrips*0.05 {
		t.Errorf("one stream and four, each after %d round trips of 50 ms, took %.1f s: %q", warmTrips, r.Seconds, r.Notes)
	}
}

// Ctrl-C ends the search for the path MTU, too, which is long where the path is.
func TestInterruptedSearch(t *testing.T) {
	binary := tulle(t)
	w := &detour.Detour{MTU: 1400}
	a, b := carry(t, w)
	w.Delay(100 * time.Millisecond)
	serving(t, b, binary)
	c, errs := command(t, binary, "run", "10.99.0.2")
	a.Do(c.Start)
	time.Sleep(2 * time.Second) // it takes 20 s
	began := time.Now()
	if err := c.Cancel(); err != nil {
		t.Fatal(err)
	}
	err := c.Wait()
	if took := time.Since(began); took > 4*time.Second || c.ProcessState.ExitCode() != 1 || !strings.Contains(errs.String(), "tulle: interrupted before the first round was complete") {
		t.Errorf("after %v: %v, %s", took, err, errs)
	}
}

// lossSeen says what in a result does not fit a wire that loses a tenth of the datagrams, and all that are larger than mtu. What
// no busy machine explains is wrong in any attempt.
func lossSeen(t *testing.T, r *result.Run, mtu int) (wrong []string) {
	t.Helper()
	not := func(format string, args ...any) { wrong = append(wrong, fmt.Sprintf(format, args...)) }
	if r.MTU > mtu {
		t.Errorf("a path MTU of %d was found, not %d", r.MTU, mtu)
	}
	if r.MTU != mtu || !strings.Contains(r.Verdict(), fmt.Sprintf("path MTU %d", mtu)) {
		not("a path MTU of %d was found, not %d", r.MTU, mtu)
	}
	// Below the devices' MTU it is a black hole for TCP, which is said.
	if hole := strings.Contains(strings.Join(r.Modes[0].Errors, " "), "TCP, one stream: no byte arrived"); hole != (mtu < 1500) {
		not("with an MTU of %d on the way, these failed: %q", mtu, r.Modes[0].Errors)
	}
	l, floods := r.Modes[0].Merged(result.OpenLoop, 64, false), r.Modes[0].Rounds[0].Floods
	if l == nil || len(floods) == 0 {
		not("not measured: %q", r.Modes[0].Errors)
		return wrong
	}
	n := float64(l.Answers + l.Lost)
	if share, noise := float64(l.Lost)/n, 4*math.Sqrt(0.1*0.9/n); n != 500 || math.Abs(share-0.1) > noise {
		not("%d of %.0f datagrams lost, %.3f", l.Lost, n, share)
	}
	if flood := floods[0].Trial; flood.Received > flood.Sent || flood.Loss() < 0.05 {
		t.Errorf("of a flood a tenth is lost, and more if the wire is too slow: %+v", flood)
	}
	if s := r.Modes[0].Summary["udp_full_kpps"]; s.Median != 0 {
		t.Errorf("%v without loss over a wire that loses", s)
	}
	if !strings.Contains(strings.Join(r.Warnings, " "), " % of a flow of ") {
		not("the loss is no reason to distrust: %q", r.Warnings)
	}
	return wrong
}
