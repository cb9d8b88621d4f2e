package bench

import (
	"errors"
	"fmt"
	"math"
	"math/rand/v2"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/tulle-net/tulle/bench/result"
	"github.com/tulle-net/tulle/bench/traffic"
	"github.com/tulle-net/tulle/internal/lab"
	"github.com/tulle-net/tulle/internal/sys"
	"github.com/tulle-net/tulle/internal/testing/testbuild"
)

// detour sends all that the router of a lab forwards between its two hosts through this process, which holds each packet for
// the same time and loses a share of those from the first host. The kernel forwards it before and after: whatever the
// hosts' tunnel is, its outer packets are delayed and lost.
type detour struct {
	delay     atomic.Int64  // nanoseconds
	loss      atomic.Uint64 // the share, as the bits of a float64
	lost, all atomic.Int64  // of large enough packets from the first host
	stop      atomic.Bool
	work      sync.WaitGroup
}

func newDetour(t *testing.T, l *lab.Lab) *detour {
	t.Helper()
	d := &detour{}
	for i, h := range l.Hosts() {
		name, table, fd := fmt.Sprintf("slow%d", i), 1000+i, -1
		err := l.Do(lab.Router, func() (err error) {
			if fd, err = unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0); err != nil {
				return err
			}
			if err := sys.TunAttach(fd, name, unix.IFF_TUN|unix.IFF_NO_PI); err != nil {
				return err
			}
			link, err := netlink.LinkByName(name)
			if err != nil {
				return err
			}
			if err := errors.Join(netlink.LinkSetMTU(link, 1500), netlink.LinkSetTxQLen(link, 4096), netlink.LinkSetUp(link)); err != nil {
				return err
			}
			for _, filter := range []string{"all", name} { // what comes back has the other host's address
				if err := os.WriteFile("/proc/sys/net/ipv4/conf/"+filter+"/rp_filter", []byte("0"), 0); err != nil {
					return err
				}
			}
			to, err := netlink.RouteGet(h.Addr(false).AsSlice())
			if err != nil {
				return err
			}
			port, err := netlink.LinkByIndex(to[0].LinkIndex)
			if err != nil {
				return err
			}
			rule := netlink.NewRule()
			rule.Family, rule.IifName, rule.Table, rule.Priority = unix.AF_INET, port.Attrs().Name, table, 100
			return errors.Join(
				netlink.RouteAdd(&netlink.Route{LinkIndex: link.Attrs().Index, Table: table, Scope: netlink.SCOPE_LINK, Dst: ipNet(everything4)}),
				netlink.RuleAdd(rule))
		})
		if err != nil {
			t.Fatalf("detour in the router: %v", err)
		}
		d.work.Go(func() { d.carry(fd, i == 0) })
	}
	return d
}

func (d *detour) end() {
	d.stop.Store(true)
	d.work.Wait()
}

// carry moves packets one way: back into the device that they came out of.
func (d *detour) carry(fd int, first bool) {
	runtime.LockOSThread()
	defer unix.Close(fd)
	_ = unix.Prctl(unix.PR_SET_TIMERSLACK, 1000, 0, 0, 0)
	type packet struct {
		due  time.Time
		data []byte
	}
	var queue []packet
	rng := rand.New(rand.NewPCG(1, 1))
	buf := make([]byte, 1<<16)
	for !d.stop.Load() {
		wait := 20 * time.Millisecond
		if len(queue) > 0 {
			wait = max(time.Until(queue[0].due), 0)
		}
		ts := unix.NsecToTimespec(int64(wait))
		_, _ = unix.Ppoll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, &ts, nil)
		for len(queue) > 0 && !time.Now().Before(queue[0].due) {
			_, _ = unix.Write(fd, queue[0].data)
			queue = queue[1:]
		}
		n, err := unix.Read(fd, buf)
		if err != nil {
			continue
		}
		if first && n >= truthPayload { // not what agents and WireGuard say to each other
			d.all.Add(1)
			if rng.Float64() < math.Float64frombits(d.loss.Load()) {
				d.lost.Add(1)
				continue
			}
		}
		queue = append(queue, packet{time.Now().Add(time.Duration(d.delay.Load())), append([]byte(nil), buf[:n]...)})
	}
}

// everything4 is the default route.
var everything4 = netip.MustParsePrefix("0.0.0.0/0")

// truthPayload is the size of the datagrams that are measured, in bytes: larger than a handshake of WireGuard.
const truthPayload = 900

// An injected delay of 1 ms is found as 1 ms, and an injected loss as that loss, in every mode whose hosts are in two subnets. The delay
// is that which a twentieth of the answers do not exceed, less the same without delay, as in TestKnownDelay of package pair. A busy
// machine has three attempts.
func TestKnownTruth(t *testing.T) {
	if testing.Short() {
		t.Skip("the race detector does not look into the programs that this runs")
	}
	o := labOptions(t, "true")
	o.Binary, o.Duration = filepath.Join(t.TempDir(), "tulle"), 400*time.Millisecond
	if err := testbuild.Tulle(o.Binary, nil); err != nil {
		t.Fatal(err)
	}
	o, err := o.withDefaults()
	if err != nil {
		t.Fatal(err)
	}
	for i, m := range modes {
		if m.wiring == result.OneSubnet {
			continue // a switch has no place for it
		}
		t.Run(m.name, func(t *testing.T) {
			s, err := m.build(t.Context(), &o, fmt.Sprintf("%s-%d", o.Name, i))
			if _, lacking := errors.AsType[lackError](err); lacking {
				t.Log(err)
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			defer func() {
				if err := s.down(t.Context()); err != nil {
					t.Error(err)
				}
			}()
			d := newDetour(t, s.lab)
			defer d.end()
			for attempt := 1; ; attempt++ {
				wrong := s.truths(t, &o, d)
				if len(wrong) == 0 {
					return
				}
				t.Logf("attempt %d: %q", attempt, wrong)
				if attempt == 3 {
					t.Fatal("what was injected is not what was found")
				}
			}
		})
	}
}

// truths injects a delay and a loss, and returns what was not seen as it is.
func (s *stand) truths(t *testing.T, o *AllOptions, d *detour) (wrong []string) {
	t.Helper()
	cpus, err := allCPUs()
	if err != nil {
		t.Fatal(err)
	}
	measure := func(how func(fd int) (*result.Latency, error)) *result.Latency {
		t.Helper()
		l, err := overUDP(&s.ends, cpus, how)
		if err != nil {
			t.Fatal(err)
		}
		return l
	}
	const delay = time.Millisecond
	pingPong := func(fd int) (*result.Latency, error) {
		return traffic.PingPong(t.Context(), fd, truthPayload, o.warm(), o.Duration, 0)
	}
	d.loss.Store(0)
	d.delay.Store(0)
	before := measure(pingPong).At(5)
	d.delay.Store(int64(delay))
	with := measure(pingPong)
	added := with.At(5) - before
	if low := with.At(0); low < 999 {
		t.Errorf("half a round trip of %v µs over a router that takes 1000", low)
	}
	if added < 900 || added > 1250 {
		wrong = append(wrong, fmt.Sprintf("a delay of 1000 µs was found as %.0f", added))
	}
	d.delay.Store(0)
	const share = 0.1
	d.loss.Store(math.Float64bits(share))
	d.lost.Store(0)
	d.all.Store(0)
	l := measure(func(fd int) (*result.Latency, error) {
		return traffic.Paced(t.Context(), fd, truthPayload, openRate, 0, o.Duration)
	})
	n := float64(l.Answers + l.Lost)
	// What the detour lost is known exactly; the share that was asked for within four standard errors.
	if got := float64(l.Lost) / n; math.Abs(got-share) > 4*math.Sqrt(share*(1-share)/n) {
		wrong = append(wrong, fmt.Sprintf("a loss of %v was found as %.3f: %d of %.0f, and the router lost %d of %d", share, got, l.Lost, n, d.lost.Load(), d.all.Load()))
	}
	t.Logf("a delay of 1000 µs is found as %.0f, a loss of 10 %% as %.1f %% (the router lost %d, missing are %d)", added, 100*float64(l.Lost)/n, d.lost.Load(), l.Lost)
	return wrong
}
