package sys

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"runtime"
	"strings"
	"sync"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

func needRoot(t testing.TB) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root: makes network namespaces")
	}
}

func testNetns(t testing.TB, name string) string {
	t.Helper()
	needRoot(t)
	name = fmt.Sprintf("tulle-sys-%d-%s", os.Getpid(), name)
	if err := NewNetns(name); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := DeleteNetns(name); err != nil {
			t.Error(err)
		}
	})
	return name
}

// inode identifies the namespace that the calling thread is in.
func inode(t testing.TB) uint64 {
	t.Helper()
	var st unix.Stat_t
	if err := unix.Stat("/proc/thread-self/ns/net", &st); err != nil {
		t.Fatal(err)
	}
	return st.Ino
}

func TestNetns(t *testing.T) {
	name := testNetns(t, "a")
	if err := NewNetns(name); !errors.Is(err, fs.ErrExist) {
		t.Errorf("second NewNetns: %v, want fs.ErrExist", err)
	}
	home := inode(t)
	var inside uint64
	failure := errors.New("from inside")
	err := WithNetns(NetnsPath(name), func() error {
		inside = inode(t)
		nl, err := NewNetlink(-1)
		if err != nil {
			return err
		}
		defer nl.Close()
		links, err := nl.LinkList()
		if err != nil {
			return err
		}
		if len(links) != 1 || links[0].Attrs().Name != "lo" {
			t.Errorf("new namespace has %d interfaces, want lo alone", len(links))
		}
		return failure
	})
	if err != failure {
		t.Errorf("WithNetns: %v, want the function's own error", err)
	}
	if inside == home || inside == 0 {
		t.Errorf("function ran in namespace %d, home is %d", inside, home)
	}
	if now := inode(t); now != home {
		t.Errorf("back in namespace %d, want %d", now, home)
	}
	if err := DeleteNetns(name); err != nil {
		t.Error(err)
	}
	if err := DeleteNetns(name); err != nil {
		t.Errorf("deleting a missing namespace: %v", err)
	}
	if err := WithNetns(NetnsPath(name), func() error { return nil }); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("WithNetns of a missing namespace: %v, want fs.ErrNotExist", err)
	}
	for _, bad := range []string{"", ".", "..", "a/b"} {
		if NewNetns(bad) == nil || DeleteNetns(bad) == nil {
			t.Errorf("name %q was taken", bad)
		}
	}
}

// A function that ends its goroutine (as t.FailNow does) leaves its thread in
// the foreign namespace: the thread must not go back to the scheduler.
func TestNetnsThreadDiscarded(t *testing.T) {
	name := testNetns(t, "b")
	home := inode(t)
	for range 10 {
		err := WithNetns(NetnsPath(name), func() error {
			runtime.Goexit()
			return nil
		})
		if err == nil {
			t.Error("a function that did not return is no error")
		}
	}
	var wg sync.WaitGroup
	for range 100 {
		wg.Go(func() {
			if got := inode(t); got != home {
				t.Errorf("a goroutine runs in namespace %d, want %d", got, home)
			}
		})
	}
	wg.Wait()
}

func TestRetryDump(t *testing.T) {
	calls := 0
	v, err := RetryDump(func() (int, error) {
		calls++
		switch calls {
		case 1:
			return 0, fmt.Errorf("list: %w", netlink.ErrDumpInterrupted)
		case 2:
			return 0, unix.EINTR
		}
		return 7, nil
	})
	if v != 7 || err != nil || calls != 3 {
		t.Errorf("got %d, %v after %d calls, want 7 after 3", v, err, calls)
	}
	calls = 0
	_, err = RetryDump(func() (int, error) { calls++; return 0, netlink.ErrDumpInterrupted })
	if !errors.Is(err, netlink.ErrDumpInterrupted) || calls != dumpAttempts {
		t.Errorf("got %v after %d calls, want ErrDumpInterrupted after %d", err, calls, dumpAttempts)
	}
	calls = 0
	_, err = RetryDump(func() (int, error) { calls++; return 0, unix.EPERM })
	if err != unix.EPERM || calls != 1 {
		t.Errorf("got %v after %d calls, want EPERM after 1", err, calls)
	}
}

// Dumps of a namespace whose routes change all the time still come back whole.
func TestNetlinkUnderChange(t *testing.T) {
	name := testNetns(t, "c")
	err := WithNetns(NetnsPath(name), func() error {
		nl, err := NewNetlink(-1)
		if err != nil {
			return err
		}
		defer nl.Close()
		other, err := NewNetlink(-1)
		if err != nil {
			return err
		}
		defer other.Close()
		if err := nl.LinkSetUp(&netlink.Device{LinkAttrs: netlink.LinkAttrs{Name: "lo", Index: 1}}); err != nil {
			return err
		}
		route := func(i int) *netlink.Route {
			a := netip.AddrFrom4([4]byte{10, byte(i >> 8), byte(i), 0})
			return &netlink.Route{LinkIndex: 1, Dst: &net.IPNet{IP: a.AsSlice(), Mask: []byte{255, 255, 255, 0}}}
		}
		const steady, changing = 300, 20
		for i := range steady {
			if err := nl.RouteAdd(route(i)); err != nil {
				return err
			}
		}
		stop, stopped := make(chan struct{}), make(chan error)
		go func() {
			for {
				for i := steady; i < steady+changing; i++ {
					if err := errors.Join(other.RouteAdd(route(i)), other.RouteDel(route(i))); err != nil {
						stopped <- err
						return
					}
				}
				select {
				case <-stop:
					stopped <- nil
					return
				default:
				}
			}
		}()
		for range 50 {
			routes, err := nl.RouteListFiltered(unix.AF_INET, &netlink.Route{LinkIndex: 1}, netlink.RT_FILTER_OIF)
			if err == nil && len(routes) < steady {
				err = fmt.Errorf("dump gave %d routes of %d", len(routes), steady)
			}
			if err != nil && !errors.Is(err, netlink.ErrDumpInterrupted) {
				close(stop)
				return errors.Join(err, <-stopped)
			}
		}
		close(stop)
		return <-stopped
	})
	if err != nil {
		t.Fatal(err)
	}
}

// A file of a namespace that is gone, as a reboot of /run or an unmount elsewhere leaves it, gives its name to the next one.
func TestNetnsStaleFile(t *testing.T) {
	needRoot(t)
	name := fmt.Sprintf("tulle-sys-%d-stale", os.Getpid())
	path := NetnsPath(name)
	write := func(text string) {
		t.Helper()
		if err := os.WriteFile(path, []byte(text), 0o444); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { os.Remove(path) })
		if _, err := OpenNetns(path); !errors.Is(err, ErrNotNetns) {
			t.Errorf("a file as a network namespace: %v", err)
		}
	}
	write("somebody's")
	if err := NewNetns(name); !errors.Is(err, fs.ErrExist) {
		t.Errorf("over a file with something in it: %v, want fs.ErrExist", err)
	}
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	write("")
	if err := WithNetns(path, func() error { return nil }); err == nil || !strings.Contains(err.Error(), path+" is not a network namespace") {
		t.Errorf("WithNetns of an empty file: %v", err)
	}
	var wg sync.WaitGroup
	made := make(chan error, 4)
	for range cap(made) { // at once: one makes it, the others find it there
		wg.Go(func() { made <- NewNetns(name) })
	}
	wg.Wait()
	close(made)
	ok := 0
	for err := range made {
		if err == nil {
			ok++
		} else if !errors.Is(err, fs.ErrExist) {
			t.Error(err)
		}
	}
	if ok != 1 {
		t.Errorf("%d of 4 made it", ok)
	}
	if f, err := OpenNetns(path); err != nil {
		t.Error(err)
	} else {
		f.Close()
	}
	if err := DeleteNetns(name); err != nil {
		t.Error(err)
	}
}
