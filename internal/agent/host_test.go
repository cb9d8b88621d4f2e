package agent

import (
	"log/slog"
	"net"
	"path/filepath"
	"testing"
	"time"
)

// What `systemctl status` shows: the reason while the node waits, each once, and then that it is ready.
func TestNotifier(t *testing.T) {
	path := filepath.Join(t.TempDir(), "notify")
	conn, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	t.Setenv("NOTIFY_SOCKET", path)
	n := newNotifier(slog.New(slog.DiscardHandler))
	n.waiting("")
	n.waiting("none of 2 seeds answers")
	n.waiting("none of 2 seeds answers")
	n.ready("3 of 3")
	n.ready("3 of 3")
	n.waiting("gives its space back")
	for _, want := range []string{"STATUS=not ready: none of 2 seeds answers", "READY=1", "STATUS=3 of 3", "STATUS=not ready: gives its space back"} {
		b := make([]byte, 1024)
		if err := conn.SetReadDeadline(time.Now().Add(10 * time.Second)); err != nil {
			t.Fatal(err)
		}
		k, err := conn.Read(b)
		if err != nil || string(b[:k]) != want {
			t.Fatalf("%q, %v; want %q", b[:k], err, want)
		}
	}
}
