package hostnet

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// A setting that the operator changed after us is left as it is.
func TestRemoveKeepsOthersSysctls(t *testing.T) {
	h := newHost(t)
	h.tun("tun0")
	r := h.reconciler(Options{Tun: "tun0"})
	h.setSysctl("net/ipv4/ip_forward", "1") // was so before us
	h.reconcile(r, dual())
	h.setSysctl("net/ipv4/conf/tun0/rp_filter", "1")
	h.check(r.Remove(t.Context()))
	if a, b := h.sysctl("net/ipv4/ip_forward"), h.sysctl("net/ipv4/conf/tun0/rp_filter"); a != "1" || b != "1" {
		t.Errorf("ip_forward %s, rp_filter %s, want 1 and 1", a, b)
	}
}

// A file system that is full (/run, often) keeps no earlier value: then nothing is set, at the second try as at the first, and the reason is
// told once, not for each setting. When there is room it goes on, and Remove puts back what was there before.
func TestSysctlsAreKeptFirst(t *testing.T) {
	h := newHost(t)
	h.tun("tun0")
	h.setSysctl("net/ipv4/ip_forward", "0")
	o := Options{Tun: "tun0", SysctlFile: filepath.Join(t.TempDir(), "s.json")}
	inTheWay := o.SysctlFile + ".tmp"
	h.check(os.Mkdir(inTheWay, 0o700)) // so that also root cannot write the file
	r := h.reconciler(o)
	for range 3 {
		var err error
		h.do(func() error { _, err = r.Reconcile(t.Context(), dual()); return nil })
		if !errors.Is(err, errNotKept) || strings.Count(err.Error(), errNotKept.Error()) != 1 {
			t.Fatalf("%v; want one line that says %q", err, errNotKept)
		}
		if got := h.sysctl("net/ipv4/ip_forward"); got != "0" {
			t.Fatalf("ip_forward is %s though its earlier value is not kept", got)
		}
	}
	h.check(os.Remove(inTheWay))
	h.reconcile(r, dual())
	if got := h.sysctl("net/ipv4/ip_forward"); got != "1" {
		t.Errorf("with room: ip_forward is %s", got)
	}
	h.check(h.reconciler(o).Remove(t.Context())) // another run
	if got := h.sysctl("net/ipv4/ip_forward"); got != "0" {
		t.Errorf("after Remove: ip_forward is %s, was 0", got)
	}
}

// The file of another boot, another namespace, or a torn one must not be written to /proc/sys.
func TestSysctlFileOfAnotherPlace(t *testing.T) {
	a, b := newHost(t), newHost(t)
	a.tun("tun0")
	o := Options{Tun: "tun0", SysctlFile: filepath.Join(t.TempDir(), "s.json")}
	a.reconcile(a.reconciler(o), dual())
	b.setSysctl("net/ipv4/ip_forward", "1")
	b.check(b.reconciler(o).Remove(t.Context()))
	if got := b.sysctl("net/ipv4/ip_forward"); got != "1" {
		t.Errorf("another namespace's file was applied: ip_forward %s", got)
	}
}

// Every interface that listens to router advertisements goes on listening when forwarding is switched on, with a learned
// default route or without, those that come later too; and Remove undoes it.
func TestKeepsRouterAdvertisements(t *testing.T) {
	h := newHost(t)
	h.tun("tun0")
	h.setSysctl("net/ipv6/conf/all/forwarding", "0")
	h.setSysctl("net/ipv6/conf/default/accept_ra", "1")
	devices := map[string]struct{ forwarding, before, during, after string }{
		"eth0":    {"0", "1", "2", "1"}, // with a default route
		"eth1":    {"0", "1", "2", "1"}, // without
		"userspc": {"0", "0", "0", "0"}, // networkd and the like
		"hybrid":  {"0", "2", "2", "2"},
		"router":  {"1", "1", "1", "1"}, // forwards already, so it does not listen
	}
	value := func(d string) string { return h.sysctl(acceptRA(d)) }
	for d, v := range devices {
		h.device(d)
		h.setSysctl(acceptRA(d), v.before)
		h.setSysctl(conf6+d+"/forwarding", v.forwarding)
	}
	h.ip("link add down0 type veth peer name down0-far")
	h.route("::/0", "fe80::1", "eth0", 1024, unix.RTPROT_RA)
	s := dual()
	s.Uplinks = map[string]int{"eth0": 1500}
	o := Options{Tun: "tun0", SysctlFile: filepath.Join(t.TempDir(), "s.json")}
	r := h.reconciler(o)
	h.reconcile(r, s)
	for d, v := range devices {
		if got := value(d); got != v.during {
			t.Errorf("accept_ra of %s is %s, want %s", d, got, v.during)
		}
	}
	if a, b := value("default"), value("down0"); a != "2" || b != "2" {
		t.Errorf("accept_ra of default is %s, of an interface that is down %s", a, b)
	}
	if !slices.ContainsFunc(h.routes(), func(s string) bool { return strings.HasPrefix(s, "default") }) {
		t.Error("the default route is gone")
	}
	// Later: an interface that comes, one that a tool sets to 1, and one that it sets to 0, after a restart of the agent.
	for _, d := range []string{"late0", "late1", "late2"} {
		h.device(d)
	}
	h.setSysctl(acceptRA("late1"), "1")
	h.setSysctl(acceptRA("late2"), "0")
	h.setSysctl(acceptRA("eth1"), "1")
	again := h.reconciler(o)
	h.reconcile(again, s)
	for d, want := range map[string]string{"late0": "2", "late1": "2", "late2": "0", "eth1": "2", "router": "1"} {
		if got := value(d); got != want {
			t.Errorf("accept_ra of %s is %s, want %s", d, got, want)
		}
	}
	h.quiet(again, s)
	h.check(again.Remove(t.Context()))
	for d, v := range devices {
		if got := value(d); got != v.after {
			t.Errorf("accept_ra of %s is %s after Remove, want %s", d, got, v.after)
		}
	}
	for d, want := range map[string]string{"default": "1", "down0": "1", "late0": "1", "late1": "1", "late2": "0"} {
		if got := value(d); got != want {
			t.Errorf("accept_ra of %s is %s after Remove, want %s", d, got, want)
		}
	}
}

// Where somebody else has made the host a router before, nothing is changed: what is to listen has 2 already.
func TestAdvertisementsOfARouter(t *testing.T) {
	h := newHost(t)
	h.tun("tun0")
	h.device("eth0")
	h.setSysctl(acceptRA("eth0"), "1")
	h.setSysctl(allForwarding6, "1")
	def := h.sysctl(acceptRA("default"))
	h.reconcile(h.reconciler(Options{Tun: "tun0"}), dual())
	if a, b := h.sysctl(acceptRA("eth0")), h.sysctl(acceptRA("default")); a != "1" || b != def {
		t.Errorf("accept_ra of eth0 is %s, of default %s", a, b)
	}
}

// A pod must not become the host's router.
func TestAdvertisementsOfPods(t *testing.T) {
	h := newHost(t)
	h.tun("tun0")
	h.setSysctl(allForwarding6, "0")
	h.device("eth0", "192.0.2.1/24")
	s := dual()
	s.Uplinks = map[string]int{"eth0": 1500}
	r := h.reconciler(Options{Tun: "tun0"})
	h.reconcile(r, s)
	h.device("pod4")
	h.device("pod6")
	h.device("bridge", "10.244.1.1/26")
	h.device("other")
	h.route("10.244.1.77/32", "", "pod4", 0, unix.RTPROT_STATIC)
	h.route("10.244.1.78/32", "", "eth0", 0, unix.RTPROT_STATIC)
	h.route("fd00:244:0:1::5/128", "", "pod6", 0, unix.RTPROT_STATIC)
	h.reconcile(r, s)
	for d, want := range map[string]string{"pod4": "0", "pod6": "0", "bridge": "0", "other": "2", "eth0": "2"} {
		if got := h.sysctl(acceptRA(d)); got != want {
			t.Errorf("accept_ra of %s is %s, want %s", d, got, want)
		}
	}
}

// A container engine that found forwarding on goes on to need it when the agent goes.
func TestForwardingStaysForBridges(t *testing.T) {
	for name, want := range map[string]string{"no bridge": "0", "a bridge without addresses": "0", "a bridge of containers": "1"} {
		t.Run(name, func(t *testing.T) {
			h := newHost(t)
			h.setSysctl("net/ipv4/ip_forward", "0")
			h.tun("tun0")
			r := h.reconciler(Options{})
			h.reconcile(r, dual())
			if name != "no bridge" {
				h.shell("ip link add docker0 type bridge; ip link set docker0 up")
			}
			if want == "1" {
				h.addrs("docker0", "172.17.0.1/16")
			}
			h.check(r.Remove(t.Context()))
			if got := h.sysctl("net/ipv4/ip_forward"); got != want {
				t.Errorf("net.ipv4.ip_forward is %s, want %s", got, want)
			}
		})
	}
}

// The kernel forwards an IPv4 packet only where the device that it came by forwards. So the devices by which packets to pods
// come from other hosts do, whatever is set there later; others are left alone. Of IPv6 nothing is set by device.
func TestForwardingOfUplinks(t *testing.T) {
	h := newHost(t)
	h.tun("tun0")
	off := func(devices ...string) {
		for _, d := range devices {
			h.setSysctl(forwarding4(d), "0")
		}
	}
	want := func(value string, devices ...string) {
		t.Helper()
		for _, d := range devices {
			if got := h.sysctl(forwarding4(d)); got != value {
				t.Errorf("IPv4 forwarding of %s is %s, want %s", d, got, value)
			}
		}
	}
	all := []string{"eth0", "eth0.7", "eth1", "storage"}
	for _, d := range all {
		h.device(d)
	}
	h.setSysctl("net/ipv4/ip_forward", "1")
	off(all...)
	h.shell("ip route add default nexthop dev eth0.7 nexthop dev eth1")
	s := dual()
	o := Options{Tun: "tun0", SysctlFile: filepath.Join(t.TempDir(), "s.json")}
	r := h.reconciler(o)
	h.reconcile(r, s)
	want("1", "eth0", "eth0.7", "eth1")
	want("0", "storage")
	h.quiet(r, s)
	off("eth0", "eth1")
	if rep := h.reconcile(r, s); len(rep.Repaired) != 2 || !strings.Contains(rep.Repaired[0], "net/ipv4/conf/eth0/forwarding=1 (was: 0)") {
		t.Errorf("repaired %q", rep.Repaired)
	}
	want("1", "eth0", "eth1")
	// Without IPv4 pods nothing depends on it, and IPv6 does not ask the device.
	h.device("late")
	off("late")
	h.setSysctl(conf6+"late/forwarding", "0")
	s.Uplinks = map[string]int{"eth0": 1500, "late": 1500, "gone": 1500}
	h.reconcile(r, s)
	want("1", "late")
	if got := h.sysctl(conf6 + "late/forwarding"); got != "0" {
		t.Errorf("IPv6 forwarding of late is %s", got)
	}
	h.check(h.reconciler(o).Remove(t.Context()))
	want("0", all...)
	want("0", "late")
}
