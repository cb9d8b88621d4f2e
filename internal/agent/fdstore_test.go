package agent

import (
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/tulle-net/tulle/internal/config"
)

// The service manager's side of sd_pid_notify_with_fds(3): state and descriptor arrive in one datagram.
func TestNotifyFDs(t *testing.T) {
	path := filepath.Join(t.TempDir(), "notify")
	manager, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	defer manager.Close()
	t.Setenv("NOTIFY_SOCKET", path)
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	defer w.Close()
	const state = "FDSTORE=1\nFDNAME=tun-tun0"
	if err := notifyFDs(state, int(w.Fd())); err != nil {
		t.Fatal(err)
	}
	buf, oob := make([]byte, 256), make([]byte, 256)
	n, on, _, _, err := manager.ReadMsgUnix(buf, oob)
	if err != nil {
		t.Fatal(err)
	}
	if string(buf[:n]) != state {
		t.Errorf("state %q, want %q", buf[:n], state)
	}
	msgs, err := syscall.ParseSocketControlMessage(oob[:on])
	if err != nil || len(msgs) != 1 {
		t.Fatalf("%d control messages, %v; want one", len(msgs), err)
	}
	fds, err := syscall.ParseUnixRights(&msgs[0])
	if err != nil || len(fds) != 1 {
		t.Fatalf("descriptors %v, %v; want one", fds, err)
	}
	kept := os.NewFile(uintptr(fds[0]), "kept")
	defer kept.Close()
	if _, err := kept.WriteString("x"); err != nil {
		t.Fatal(err)
	}
	if n, err := r.Read(buf); n != 1 || err != nil || buf[0] != 'x' {
		t.Errorf("what was written to the kept descriptor did not arrive: %q, %v", buf[:n], err)
	}
}

// The unit keeps all descriptors of an agent with as many queues as the configuration takes: those of the TUN, and for each underlay
// address a socket of udp and one of vxlan a queue, and two raw ones (TestSockets in package tunnel counts them).
func TestStoreIsLargeEnough(t *testing.T) {
	b, err := os.ReadFile("../../packaging/tulle.service")
	if err != nil {
		t.Fatal(err)
	}
	const families = 2
	if want := fmt.Sprintf("\nFileDescriptorStoreMax=%d\n", config.MaxQueues+families*(2*config.MaxQueues+2)); !strings.Contains(string(b), want) {
		t.Errorf("tulle.service lacks %q", want)
	}
}

// More descriptors than fit into one message go in several.
func TestKeepMany(t *testing.T) {
	path := filepath.Join(t.TempDir(), "notify")
	manager, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	defer manager.Close()
	t.Setenv("NOTIFY_SOCKET", path)
	null, err := os.Open(os.DevNull)
	if err != nil {
		t.Fatal(err)
	}
	defer null.Close()
	a := &agent{log: slog.New(slog.NewTextHandler(t.Output(), nil))}
	const many = 2 * (2*config.MaxQueues + 2)
	a.keep("sockets", slices.Repeat([]int{int(null.Fd())}, many))
	got := 0
	for got < many {
		if err := manager.SetReadDeadline(time.Now().Add(10 * time.Second)); err != nil {
			t.Fatal(err)
		}
		buf, oob := make([]byte, 256), make([]byte, 4096)
		n, on, _, _, err := manager.ReadMsgUnix(buf, oob)
		if err != nil {
			t.Fatalf("%d of %d descriptors came: %v", got, many, err)
		}
		if strings.HasPrefix(string(buf[:n]), "FDSTOREREMOVE=1\n") {
			continue
		}
		if want := "FDSTORE=1\nFDPOLL=0\nFDNAME=sockets"; string(buf[:n]) != want {
			t.Errorf("state %q, want %q", buf[:n], want)
		}
		msgs, err := syscall.ParseSocketControlMessage(oob[:on])
		if err != nil || len(msgs) != 1 {
			t.Fatalf("%d control messages, %v; want one", len(msgs), err)
		}
		fds, err := syscall.ParseUnixRights(&msgs[0])
		if err != nil {
			t.Fatal(err)
		}
		for _, fd := range fds {
			syscall.Close(fd)
		}
		got += len(fds)
	}
	if got != many {
		t.Errorf("%d descriptors came, want %d", got, many)
	}
}

// The store gives a name's descriptors only as a whole: half of a device's queues, or sockets for another address, are closed.
func TestStore(t *testing.T) {
	pipe := func() int {
		t.Helper()
		r, w, err := os.Pipe()
		if err != nil {
			t.Fatal(err)
		}
		w.Close()
		t.Cleanup(func() { r.Close() })
		fd, err := syscall.Dup(int(r.Fd()))
		if err != nil {
			t.Fatal(err)
		}
		return fd
	}
	open := func(fd int) bool { return syscall.Fstat(fd, new(syscall.Stat_t)) == nil }
	tun := tunName("tun0", 2)
	s := fdStore{tun: {pipe(), pipe()}, "old": {pipe()}}
	a := &agent{log: slog.New(slog.DiscardHandler), store: s}
	old := s["old"][0]
	if !a.discard(tun, "sockets") || open(old) || len(s) != 1 {
		t.Errorf("the store has %v; want only what is kept, the rest closed", s)
	}
	if a.discard(tun) {
		t.Error("there was nothing more to discard")
	}
	half := slices.Clone(s[tun])
	if fds := s.take(tun, 3); fds != nil || open(half[0]) || open(half[1]) {
		t.Errorf("two descriptors for three queues: got %v; want none, all closed", fds)
	}
	s[tun] = []int{pipe(), pipe()}
	fds := s.take(tun, 2)
	if len(fds) != 2 || !open(fds[0]) || !open(fds[1]) || len(s) != 0 {
		t.Errorf("got %v, the store has %v; want both, open, and an empty store", fds, s)
	}
	for _, fd := range fds {
		syscall.Close(fd)
	}
}

// Sockets of another address, port or number of queues have another name, and every name is one that systemd takes
// (fdname_is_valid: printable, no colon, at most 255 bytes).
func TestStoreNames(t *testing.T) {
	v4, v6 := netip.MustParseAddr("192.0.2.1"), netip.MustParseAddr("2001:db8::1")
	names := []string{
		tunName("tun0", 1), tunName("tun0", 2), tunName("tun1", 1),
		socketsName([]netip.Addr{v4}, 6080, 4789, 1), socketsName([]netip.Addr{v6}, 6080, 4789, 1), socketsName([]netip.Addr{v4, v6}, 6080, 4789, 1),
		socketsName([]netip.Addr{v4}, 6081, 4789, 1), socketsName([]netip.Addr{v4}, 6080, 8472, 1), socketsName([]netip.Addr{v4}, 6080, 4789, 2),
	}
	seen := map[string]bool{}
	for _, n := range names {
		if seen[n] || strings.ContainsAny(n, ": \n") || len(n) > 255 {
			t.Errorf("%q is not a name of its own", n)
		}
		seen[n] = true
	}
}
