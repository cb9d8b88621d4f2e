package bench

import (
	"context"
	"errors"
	"fmt"
	"math"
	"net/netip"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/tulle-net/tulle/bench/result"
	"github.com/tulle-net/tulle/bench/traffic"
	"github.com/tulle-net/tulle/internal/lab"
	"github.com/tulle-net/tulle/internal/sys"
	"github.com/tulle-net/tulle/internal/testing/detour"
	"github.com/tulle-net/tulle/internal/testing/testbuild"
)

// newDetour has all that goes from one host of a lab to the other pass through this process: whatever the hosts' tunnel is, its
// outer packets are delayed, and large ones from the first host lost. It takes what the lab's router forwards, and hands it
// back to the router; or, where the hosts are in one subnet, it connects the two halves of the switch.
func newDetour(t *testing.T, l *lab.Lab) *detour.Detour {
	t.Helper()
	d := &detour.Detour{Loses: func(p []byte) bool { return len(p) >= truthPayload }} // not what agents and WireGuard say to each other
	hosts := l.Hosts()
	if l.Options().Subnets == 1 {
		between(t, d, l, &hosts[1])
		return d
	}
	for i, h := range hosts {
		through(t, d, l, &h, i)
	}
	return d
}

// between unplugs a host from the switch, and plugs it into another one. This process is the cable between the two.
func between(t *testing.T, d *detour.Detour, l *lab.Lab, h *lab.Host) {
	t.Helper()
	var fds [2]int
	err := l.Do(lab.Router, func() error {
		other := &netlink.Bridge{LinkAttrs: sys.LinkAttrs("slow"), MulticastSnooping: new(bool)}
		if err := errors.Join(netlink.LinkAdd(other), netlink.LinkSetUp(other)); err != nil {
			return err
		}
		port, err := netlink.LinkByName(h.Name)
		if err != nil {
			return err
		}
		first, err := netlink.LinkByIndex(port.Attrs().MasterIndex)
		if err != nil {
			return err
		}
		for i, plug := range []netlink.Link{first, other} {
			fd, link, err := tapOrTun(fmt.Sprintf("slow%d", i), unix.IFF_TAP)
			if err == nil {
				err = netlink.LinkSetMaster(link, plug)
			}
			if err != nil {
				return err
			}
			fds[i] = fd
		}
		return netlink.LinkSetMaster(port, other)
	})
	if err != nil {
		t.Fatalf("detour in the switch: %v", err)
	}
	d.Carry(fds[0], fds[1], true)
	d.Carry(fds[1], fds[0], false)
}

// tapOrTun makes a TUN or TAP device in the namespace of the lab's router.
func tapOrTun(name string, kind uint16) (fd int, link netlink.Link, err error) {
	if fd, err = unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0); err != nil {
		return fd, nil, err
	}
	if err := sys.TunAttach(fd, name, kind|unix.IFF_NO_PI); err != nil {
		return fd, nil, err
	}
	if link, err = netlink.LinkByName(name); err != nil {
		return fd, nil, err
	}
	return fd, link, errors.Join(netlink.LinkSetMTU(link, 1500), netlink.LinkSetTxQLen(link, 4096), netlink.LinkSetUp(link))
}

// through takes what the router forwards from a host.
func through(t *testing.T, d *detour.Detour, l *lab.Lab, h *lab.Host, i int) {
	t.Helper()
	name, table, fd := fmt.Sprintf("slow%d", i), 1000+i, -1
	six := !l.Options().Underlay.V4
	err := l.Do(lab.Router, func() (err error) {
		var link netlink.Link
		if fd, link, err = tapOrTun(name, unix.IFF_TUN); err != nil {
			return err
		}
		for _, filter := range []string{"all", name} { // what comes back has the other host's address
			if err := os.WriteFile("/proc/sys/net/ipv4/conf/"+filter+"/rp_filter", []byte("0"), 0); err != nil {
				return err
			}
		}
		to, err := netlink.RouteGet(h.Addr(six).AsSlice())
		if err != nil {
			return err
		}
		port, err := netlink.LinkByIndex(to[0].LinkIndex)
		if err != nil {
			return err
		}
		rule, everything := netlink.NewRule(), netip.PrefixFrom(netip.IPv4Unspecified(), 0)
		rule.Family, rule.IifName, rule.Table, rule.Priority = unix.AF_INET, port.Attrs().Name, table, 100
		if six {
			rule.Family, everything = unix.AF_INET6, netip.PrefixFrom(netip.IPv6Unspecified(), 0)
		}
		return errors.Join(
			netlink.RouteAdd(&netlink.Route{LinkIndex: link.Attrs().Index, Table: table, Scope: netlink.SCOPE_LINK, Dst: ipNet(everything)}),
			netlink.RuleAdd(rule))
	})
	if err != nil {
		t.Fatalf("detour in the router: %v", err)
	}
	d.Carry(fd, fd, i == 0)
}

// truthPayload is the size of the datagrams that are measured, in bytes: larger than a handshake of WireGuard.
const truthPayload = 900

// An injected delay of 1 ms is found as 1 ms, and an injected loss as that loss, in every mode, over IPv4 and IPv6. The delay
// is that which a twentieth of the answers do not exceed, less the same without delay, as in TestKnownDelay of package pair. A busy
// machine has thirty attempts at each of the two. It only ever adds to a delay, so that the least of all attempts count, too.
func TestKnownTruth(t *testing.T) {
	if testing.Short() {
		t.Skip("the race detector does not look into the programs that this runs")
	}
	o := labOptions(t, "true")
	o.Binary, o.Duration = filepath.Join(t.TempDir(), "tulle"), 400*time.Millisecond
	o.Timeout = 5 * time.Minute // forty agents start together
	if err := testbuild.Tulle(o.Binary, nil); err != nil {
		t.Fatal(err)
	}
	type site struct {
		name string
		o    AllOptions
		s    *stand
		err  error
	}
	var sites []*site
	for _, family := range []string{"IPv4", "IPv6"} {
		o := o
		o.Six = family == "IPv6"
		o, err := o.withDefaults()
		if err != nil {
			t.Fatal(err)
		}
		for _, m := range modes {
			sites = append(sites, &site{name: m.name + " " + family, o: o})
		}
	}
	var work sync.WaitGroup
	for i, x := range sites {
		work.Go(func() { x.s, x.err = modes[i%len(modes)].build(t.Context(), &x.o, fmt.Sprintf("%s-%d", x.o.Name, i)) })
	}
	work.Wait()
	for _, x := range sites {
		t.Run(x.name, func(t *testing.T) {
			if x.s != nil {
				defer func() {
					if err := x.s.down(context.Background()); err != nil {
						t.Error(err)
					}
				}()
			}
			if _, lacking := errors.AsType[lackError](x.err); lacking {
				t.Log(x.err)
				return
			}
			if x.err != nil {
				t.Fatal(x.err)
			}
			x.s.knownTruth(t, &x.o)
		})
	}
}

func (s *stand) knownTruth(t *testing.T, o *AllOptions) {
	d := newDetour(t, s.lab)
	defer d.End()
	least := [2]float64{math.Inf(1), math.Inf(1)}
	findDelay := func(t *testing.T, o *AllOptions, d *detour.Detour) string { return s.findDelay(t, o, d, &least) }
	for _, find := range []func(*testing.T, *AllOptions, *detour.Detour) string{findDelay, s.findLoss} {
		for attempt := 1; ; attempt++ {
			wrong := find(t, o, d)
			if wrong == "" {
				break
			}
			t.Logf("attempt %d: %s", attempt, wrong)
			if attempt == 30 {
				t.Fatal("what was injected is not what was found")
			}
		}
	}
}

// latency measures between the ends.
func (s *stand) latency(t *testing.T, how func(fd int) (*result.Latency, error)) *result.Latency {
	t.Helper()
	cpus, err := allCPUs()
	if err != nil {
		t.Fatal(err)
	}
	l, err := overUDP(&s.ends, cpus, how)
	if err != nil {
		t.Fatal(err)
	}
	return l
}

// findDelay injects a delay, and says if it was not seen as it is. least is the least that was measured so far, without the delay and with it.
func (s *stand) findDelay(t *testing.T, o *AllOptions, d *detour.Detour, least *[2]float64) (wrong string) {
	t.Helper()
	const delay = time.Millisecond
	pingPong := func(fd int) (*result.Latency, error) {
		return traffic.PingPong(t.Context(), fd, truthPayload, o.warm(), o.Duration, 0)
	}
	d.Loss(0)
	d.Delay(0)
	before := s.latency(t, pingPong).At(5)
	least[0] = min(least[0], before)
	d.Delay(delay)
	with := s.latency(t, pingPong)
	least[1] = min(least[1], with.At(5))
	added := with.At(5) - before // of two moments that were alike, or of the best ones
	if best := least[1] - least[0]; added < 900 || added > 1250 {
		added = best
	}
	if low := with.At(0); low < 999 {
		t.Errorf("half a round trip of %v µs over a router that takes 1000", low)
	}
	if added < 900 || added > 1250 {
		return fmt.Sprintf("a delay of 1000 µs was found as %.0f", added)
	}
	t.Logf("a delay of 1000 µs is found as %.0f", added)
	return ""
}

// findLoss injects a loss, and says if it was not seen as it is.
func (s *stand) findLoss(t *testing.T, o *AllOptions, d *detour.Detour) (wrong string) {
	t.Helper()
	const share = 0.1
	d.Delay(0)
	d.Loss(share)
	l := s.latency(t, func(fd int) (*result.Latency, error) {
		return traffic.Paced(t.Context(), fd, truthPayload, openRate, 0, o.Duration, 0)
	})
	n := float64(l.Answers + l.Lost)
	lost, all := d.Lost()
	// What the detour lost is known exactly; the share that was asked for within four standard errors.
	if got := float64(l.Lost) / n; math.Abs(got-share) > 4*math.Sqrt(share*(1-share)/n) {
		return fmt.Sprintf("a loss of %v was found as %.3f: %d of %.0f, and the router lost %d of %d", share, got, l.Lost, n, lost, all)
	}
	t.Logf("a loss of 10 %% is found as %.1f %% (the router lost %d, missing are %d)", 100*float64(l.Lost)/n, lost, l.Lost)
	return ""
}
