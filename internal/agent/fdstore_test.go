package agent

import (
	"net"
	"os"
	"path/filepath"
	"syscall"
	"testing"
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
