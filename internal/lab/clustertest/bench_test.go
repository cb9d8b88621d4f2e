package clustertest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/google/gopacket"
	"github.com/google/gopacket/layers"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	benchresult "github.com/tulle-net/tulle/bench/result"
	"github.com/tulle-net/tulle/internal/api"
	"github.com/tulle-net/tulle/internal/lab"
	"github.com/tulle-net/tulle/tunnel/encap"
)

// benchTo runs `tulle bench run` on h1 and returns its result, what it said on standard error, and its exit code.
func benchTo(ctx context.Context, t *testing.T, l *lab.Lab, args ...string) (*benchresult.Run, string, int) {
	t.Helper()
	return benchVerb(ctx, t, l, "run", args...)
}

// benchVerb does so with another command of `tulle bench`.
func benchVerb(ctx context.Context, t *testing.T, l *lab.Lab, verb string, args ...string) (*benchresult.Run, string, int) {
	t.Helper()
	var out, errs bytes.Buffer
	code, err := l.Exec(ctx, "h1", append([]string{program, "bench", verb, "-o", "json"}, args...), lab.Stdio{Out: &out, Err: &errs})
	if err != nil && ctx.Err() == nil {
		t.Fatalf("bench %s %v: %v", verb, args, err)
	}
	r, err := benchresult.Read(&out)
	if err != nil {
		return nil, errs.String(), code
	}
	return r, errs.String(), code
}

// outerKinds counts the packets that arrive at a host's underlay device, by what carries them and by their inner destination.
type outerKinds struct {
	stop atomic.Bool
	work sync.WaitGroup
	n    map[outerKind]int
}

// outerKind is how a packet came. "direct" is for pods' packets without encapsulation, "other" is none of a pod.
type outerKind struct {
	carrier string
	inner   netip.Addr // destination
}

func countOuter(t *testing.T, l *lab.Lab, host string) *outerKinds {
	t.Helper()
	c, fd := &outerKinds{n: map[outerKind]int{}}, -1
	err := l.Do(host, func() (err error) {
		link, err := netlink.LinkByName("eth0")
		if err != nil {
			return err
		}
		const all = unix.ETH_P_ALL<<8 | unix.ETH_P_ALL>>8
		if fd, err = unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, all); err != nil {
			return err
		}
		wait := unix.NsecToTimeval(int64(50 * time.Millisecond))
		return errors.Join(unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &wait), unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 64<<20),
			unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: all, Ifindex: link.Attrs().Index}))
	})
	if err != nil {
		t.Fatal(err)
	}
	c.work.Go(func() {
		defer unix.Close(fd)
		buf := make([]byte, 1<<16)
		for flags := 0; ; {
			if c.stop.Load() {
				flags = unix.MSG_DONTWAIT // what is there is counted
			}
			n, from, err := unix.Recvfrom(fd, buf, flags)
			if err == unix.EAGAIN && flags != 0 {
				return
			}
			if ll, ok := from.(*unix.SockaddrLinklayer); err == nil && ok && ll.Pkttype == unix.PACKET_HOST {
				c.n[outerKindOf(buf[:n])]++
			}
		}
	})
	return c
}

// end returns how many packets to these inner destinations came by each carrier.
func (c *outerKinds) end(to []netip.Addr) map[string]int {
	c.stop.Store(true)
	c.work.Wait()
	kinds := map[string]int{}
	for k, n := range c.n {
		if slices.Contains(to, k.inner) {
			kinds[k.carrier] += n
		}
	}
	return kinds
}

// outerKindOf looks into a frame.
func outerKindOf(frame []byte) outerKind {
	p := gopacket.NewPacket(frame, layers.LayerTypeEthernet, gopacket.DecodeOptions{NoCopy: true})
	carrier := "other"
	switch udp, _ := p.TransportLayer().(*layers.UDP); {
	case udp != nil && udp.DstPort == 6080:
		inner, d := encap.UnwrapUDP(udp.Payload)
		if d != encap.DropNone {
			return outerKind{carrier: carrier}
		}
		first := layers.LayerTypeIPv4
		if inner[0]>>4 == 6 {
			first = layers.LayerTypeIPv6
		}
		carrier, p = "udp", gopacket.NewPacket(inner, first, gopacket.DecodeOptions{NoCopy: true})
	case udp != nil && udp.DstPort == 4789:
		carrier = "vxlan"
	}
	var dst []netip.Addr // from the outermost to the innermost
	for _, layer := range p.Layers() {
		var a netip.Addr
		switch ip := layer.(type) {
		case *layers.IPv4:
			a, _ = netip.AddrFromSlice(ip.DstIP)
		case *layers.IPv6:
			a, _ = netip.AddrFromSlice(ip.DstIP)
		default:
			continue
		}
		dst = append(dst, a)
	}
	switch {
	case len(dst) == 0:
		return outerKind{carrier: carrier}
	case carrier == "other" && len(dst) == 2:
		carrier = "ipip"
	case carrier == "other" && (netip.MustParsePrefix("10.244.0.0/16").Contains(dst[0]) || netip.MustParsePrefix("fd00:10:244::/48").Contains(dst[0])):
		carrier = "direct"
	}
	return outerKind{carrier, dst[len(dst)-1]}
}

// benchAddresses are a host's addresses that benchmarks have, or had a moment ago: those rest before anybody gets them again.
func benchAddresses(t *testing.T, l *lab.Lab, host string) (out []netip.Addr) {
	t.Helper()
	c, err := l.Client(host)
	if err != nil {
		t.Fatal(err)
	}
	space, err := c.IPAM(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for _, a := range space.Allocations {
		if strings.HasPrefix(a.ID, "bench/") || a.State == api.AllocationCooling {
			out = append(out, a.Addresses...)
		}
	}
	return out
}

// benchHelpers are the processes that answer measuring traffic, of this test's program.
func benchHelpers(t *testing.T) (pids []string) {
	t.Helper()
	files, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range files {
		line, _ := os.ReadFile(f)
		exe, _ := os.Readlink(filepath.Join(filepath.Dir(f), "exe"))
		if exe == program && strings.Contains(string(line), "bench\x00helper\x00serve") {
			pids = append(pids, filepath.Base(filepath.Dir(f)))
		}
	}
	return pids
}

// sending is how each host sends to each other one's pods.
func sending(t *testing.T, l *lab.Lab) (out []string) {
	t.Helper()
	for _, h := range hostNames(l) {
		for _, p := range mustStatus(t, l, h).Peers {
			out = append(out, fmt.Sprintf("%s to %s by %s, MTU %d", h, p.Name, p.Path.Mode, p.Path.MTU))
		}
	}
	return out
}

// sendingIs waits until each host sends to the others as it did before.
func sendingIs(t *testing.T, l *lab.Lab, before []string) {
	t.Helper()
	until(t, "pods' packets go as before", func() error {
		if now := sending(t, l); !slices.Equal(now, before) {
			return fmt.Errorf("they went\n%q\nand now go\n%q", before, now)
		}
		return nil
	})
}

// noBenchLeft waits until no trace of a benchmark is on the hosts: addresses, routes, processes, allocations.
func noBenchLeft(t *testing.T, l *lab.Lab, before map[string]snapshot, what string) {
	t.Helper()
	untilWithin(t, 2*patience, "nothing is left "+what, func() error {
		if h := benchHelpers(t); len(h) > 0 {
			return fmt.Errorf("processes %v", h)
		}
		for _, h := range slices.Sorted(maps.Keys(before)) {
			if is, was := networkOf(t, l, h).with("address").withoutProbes(), before[h].with("address").withoutProbes(); !slices.Equal(is, was) {
				return fmt.Errorf("%s has %q, and had %q", h, is, was)
			}
			if is, was := networkOf(t, l, h).marked(), before[h].marked(); !slices.Equal(is, was) {
				return fmt.Errorf("%s has %q, and had %q", h, is, was)
			}
			c, err := l.Client(h)
			if err != nil {
				return err
			}
			space, err := c.IPAM(t.Context())
			if err != nil {
				return err
			}
			for _, a := range space.Allocations {
				if strings.HasPrefix(a.ID, "bench/") {
					return fmt.Errorf("%s still has %v", h, a)
				}
			}
		}
		return nil
	})
}

// TestBenchTo measures from one member to another through each way, over both families, and holds what the result says
// against what crossed the wire. Pods' packets keep their way meanwhile, and nothing is left.
func TestBenchTo(t *testing.T) {
	t.Parallel()
	l := up(t, "bto", lab.Options{Nodes: 3, Subnets: 1, Paths: "udp, direct, vxlan, ipip"})
	settled(t, l)
	before := map[string]snapshot{}
	var waysBefore []string
	until(t, "all ways are proven", func() error {
		for _, h := range hostNames(l) {
			for _, p := range mustStatus(t, l, h).Peers {
				for _, c := range p.Candidates {
					if c.State != "up" || c.MTU < 1450 {
						return fmt.Errorf("%s to %s: %+v", h, p.Name, c)
					}
				}
			}
		}
		return nil
	})
	for _, h := range hostNames(l) {
		before[h] = networkOf(t, l, h)
	}
	waysBefore = sending(t, l)
	mtus := map[string]map[string]int{"--six=false": {"direct": 1500, "udp": 1472, "vxlan": 1450, "ipip": 1472}, "--six": {"direct": 1500, "udp": 1472, "vxlan": 1450, "ipip": 1472}}
	for six, want := range mtus {
		for mode, mtu := range want {
			t.Run(mode+six, func(t *testing.T) {
				seen := countOuter(t, l, "h2")
				measure := func() (*benchresult.Run, string) {
					t.Helper()
					r, said, code := benchTo(t.Context(), t, l, "--to", "h2", "--modes", mode, six, "--rounds", "1", "--duration", "400ms", "--max-mbps", "20")
					if r == nil || code != 0 {
						t.Fatalf("exit code %d: %s", code, said)
					}
					return r, said
				}
				r, said := measure()
				kinds := seen.end(benchAddresses(t, l, "h2"))
				rest := 0
				for k, n := range kinds {
					if k != mode {
						rest += n
					}
				}
				// How many there are depends on how busy the machine is; by what way they come does not.
				if kinds[mode] < 200 || rest > kinds[mode]/50 {
					t.Errorf("h2 got these packets while %s was measured: %v", mode, kinds)
				}
				m := r.Mode(mode)
				if m == nil || m.MTU != mtu || len(m.Errors) > 0 {
					t.Fatalf("%+v", r.Modes)
				}
				for _, key := range []string{"rtt64_p50_us", "rtt1200_p50_us", "open64_p50_us", "rr_p50_us", "crr_p50_us", "tcp1_gbps", "udp_flood1_gbps"} {
					if s, ok := m.Summary[key]; !ok || s.Median <= 0 {
						t.Errorf("%s is %v", key, s)
					}
				}
				// Never above the rate, which is 0.02 Gb/s, but for what was held up before the counted time and arrives within it:
				// the time is so long that an agent may stand still for 200 ms. Where one stands still for longer, another measurement tells.
				for attempt := 1; ; attempt++ {
					tcp, udp := m.Summary["tcp1_gbps"].Median, m.Summary["udp_flood1_gbps"].Median
					if tcp <= 0.03 && udp <= 0.022 {
						break
					}
					if t.Logf("held to 20 Mb/s, TCP had %v Gb/s and UDP %v", tcp, udp); attempt == 4 {
						t.Errorf("that was so %d times", attempt)
						break
					}
					again, _ := measure()
					if m = again.Mode(mode); m == nil {
						t.Fatalf("%+v", again.Modes)
					}
				}
				if !strings.Contains(strings.Join(r.Limits, " "), "Held to 20.0 Mb/s") || !strings.Contains(said, "held to 20.0 Mb/s") {
					t.Errorf("it does not say that it held back: %q, %q", r.Limits, said)
				}
			})
		}
	}
	sendingIs(t, l, waysBefore)
	for verb, has := range map[string][2]bool{"all": {true, true}, "latency": {true, false}, "throughput": {false, true}} {
		r, said, code := benchVerb(t.Context(), t, l, verb, "--to", "h2", "--modes", "vxlan", "--rounds", "1", "--duration", "50ms")
		if r == nil || code != 0 {
			t.Fatalf("bench %s --to: exit code %d: %s", verb, code, said)
		}
		_, latency := r.Mode("vxlan").Summary["rtt64_p50_us"]
		_, throughput := r.Mode("vxlan").Summary["tcp1_gbps"]
		if [2]bool{latency, throughput} != has {
			t.Errorf("bench %s --to measured %v", verb, slices.Sorted(maps.Keys(r.Mode("vxlan").Summary)))
		}
	}
	noBenchLeft(t, l, before, "after benchmarks that ended")
	t.Run("refused", func(t *testing.T) { benchRefused(t, l) })
	t.Run("killed", func(t *testing.T) { benchKilled(t, l, before, waysBefore) })
}

// lockedBuffer is what a running command has written so far.
type lockedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *lockedBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *lockedBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

// benchRefused tries what cannot work; each says why and what to do.
func benchRefused(t *testing.T, l *lab.Lab) {
	say := func(want string, code int, args ...string) {
		t.Helper()
		r, said, is := benchTo(t.Context(), t, l, append([]string{"--rounds", "1", "--duration", "50ms"}, args...)...)
		if r != nil || is != code || !strings.Contains(said, want) {
			t.Errorf("bench run %v: exit code %d, want %d and %q: %s", args, is, code, want, said)
		}
	}
	say(`no node`, 1, "--to", "h9")
	say("h1 is this node itself", 2, "--to", "h1")
	say(`no path "gre"; with --to there are direct, udp, vxlan, ipip`, 2, "--to", "h2", "--modes", "gre")
	say("exclude each other", 2, "--to", "h2", "10.0.0.1")
	say("--modes is of use with --to only", 2, "10.0.0.1", "--modes", "udp")
	say("--streams is of no use with --to", 2, "--to", "h2", "--streams", "3")
	say("no agent listens on /nowhere", 1, "--to", "h2", "--socket", "/nowhere")
	// A member that allows none, by a reload; and one that is down.
	h2, err := l.Host("h2")
	if err != nil {
		t.Fatal(err)
	}
	config, err := os.ReadFile(h2.Config)
	if err != nil {
		t.Fatal(err)
	}
	reload := func(more string) {
		t.Helper()
		if err := os.WriteFile(h2.Config, append(slices.Clone(config), more...), 0o600); err != nil {
			t.Fatal(err)
		}
		c, err := l.Client("h2")
		if err != nil {
			t.Fatal(err)
		}
		if r, err := c.Reload(t.Context()); err != nil || len(r.NeedsRestart) > 0 {
			t.Fatalf("reload: %+v, %v", r, err)
		}
	}
	reload("bench_mbps: 0\n")
	say("h2: it allows no benchmarks (bench_mbps is 0); set bench_mbps there and reload", 1, "--to", "h2")
	reload("bench_mbps: 10\n")
	r, said, code := benchTo(t.Context(), t, l, "--to", "h2", "--modes", "udp", "--rounds", "1", "--duration", "50ms")
	if code != 0 || !strings.Contains(said, "held to 10.0 Mb/s") {
		t.Errorf("the other end's limit does not count: exit code %d, %s, %v", code, said, r)
	}
	reload("")
	if err := l.StopAgent(t.Context(), "h3", syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	until(t, "h3 is dead", func() error {
		for _, p := range mustStatus(t, l, "h1").Peers {
			if p.Name == "h3" && p.State != "dead" {
				return errors.New(p.State)
			}
		}
		return nil
	})
	say("h3 is dead since", 1, "--to", "h3")
	if err := l.StartAgent(t.Context(), "h3"); err != nil {
		t.Fatal(err)
	}
	settled(t, l)
}

// benchKilled ends benchmarks the hard ways, and looks for what is left.
func benchKilled(t *testing.T, l *lab.Lab, before map[string]snapshot, ways []string) {
	// reached waits until the benchmark that began last is in a round, counted from one.
	var reached func(round int)
	begin := func(args ...string) (end func(sig os.Signal) (*benchresult.Run, string, int)) {
		t.Helper()
		var out bytes.Buffer
		var errs lockedBuffer
		pid := filepath.Join(t.TempDir(), "pid")
		done := make(chan int, 1)
		go func() {
			argv := []string{"sh", "-c", `echo $$ >"$0"; exec "$@"`, pid, program, "bench", "run", "-o", "json", "--to", "h2", "--rounds", "100", "--duration", "50ms"}
			code, err := l.Exec(context.WithoutCancel(t.Context()), "h1", append(argv, args...), lab.Stdio{Out: &out, Err: &errs})
			if err != nil {
				code = -1
			}
			done <- code
		}()
		reached = func(round int) {
			t.Helper()
			until(t, fmt.Sprintf("a benchmark is in round %d", round), func() error {
				if said := errs.String(); !strings.Contains(said, fmt.Sprintf("round %d of", round)) {
					return errors.New(said)
				}
				return nil
			})
		}
		reached(1)
		return func(sig os.Signal) (*benchresult.Run, string, int) {
			if sig != nil {
				text, err := os.ReadFile(pid)
				if err != nil {
					t.Fatal(err)
				}
				var n int
				if _, err := fmt.Sscan(string(text), &n); err != nil {
					t.Fatal(err)
				}
				if err := syscall.Kill(n, sig.(syscall.Signal)); err != nil {
					t.Fatal(err)
				}
			}
			code := <-done
			r, _ := benchresult.Read(&out)
			return r, errs.String(), code
		}
	}
	// A second one of the same node is refused, and one of another node, too.
	end := begin("--modes", "udp")
	if _, said, code := benchTo(t.Context(), t, l, "--to", "h3", "--rounds", "1"); code != 1 || !strings.Contains(said, "another benchmark of this node is running") {
		t.Errorf("a second benchmark: exit code %d: %s", code, said)
	}
	var errs bytes.Buffer
	if code, err := l.Exec(t.Context(), "h3", []string{program, "bench", "run", "--to", "h2"}, lab.Stdio{Err: &errs}); err != nil || code != 1 || !strings.Contains(errs.String(), "it serves a benchmark of another node") {
		t.Errorf("a benchmark of another node: %d, %v: %s", code, err, &errs)
	}
	// Ctrl-C keeps complete rounds.
	reached(3)
	if r, said, code := end(syscall.SIGINT); r == nil || !r.Interrupted || len(r.Modes[0].Rounds) == 0 || code != 1 {
		t.Errorf("Ctrl-C: exit code %d, %+v: %s", code, r, said)
	}
	noBenchLeft(t, l, before, "after Ctrl-C")
	end = begin()
	end(syscall.SIGKILL)
	noBenchLeft(t, l, before, "after the command was killed")
	// The agent that serves is killed: its process goes with it, and the other end says why it is over.
	end = begin("--modes", "udp")
	if err := l.StopAgent(t.Context(), "h2", syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	if r, said, code := end(nil); code != 1 || r != nil && !strings.Contains(r.Verdict(), "NOT TO BE TRUSTED") {
		t.Errorf("the serving agent was killed: exit code %d, %+v: %s", code, r, said)
	}
	if err := l.StartAgent(t.Context(), "h2"); err != nil {
		t.Fatal(err)
	}
	settled(t, l)
	noBenchLeft(t, l, before, "after the serving agent was killed")
	// The asking agent is killed: the other one ends it when its lease is over.
	end = begin("--modes", "udp")
	if err := l.StopAgent(t.Context(), "h1", syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	end(nil)
	if err := l.StartAgent(t.Context(), "h1"); err != nil {
		t.Fatal(err)
	}
	settled(t, l)
	noBenchLeft(t, l, before, "after the asking agent was killed")
	sendingIs(t, l, ways)
}
