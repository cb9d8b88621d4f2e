package agent

import (
	"bytes"
	"errors"
	"log/slog"
	"net"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/tulle-net/tulle/internal/ownership"
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
	var log bytes.Buffer
	n := newNotifier(slog.New(slog.NewTextHandler(&log, &slog.HandlerOptions{ReplaceAttr: func(_ []string, a slog.Attr) slog.Attr {
		if a.Key == slog.TimeKey {
			return slog.Attr{}
		}
		return a
	}})))
	n.waiting("none of 2 seeds answers")
	n.waiting("none of 2 seeds answers")
	n.ready("3 of 3")
	n.ready("3 of 3")
	n.waiting("gives its space back")
	n.waiting("gives its space back")
	n.ready("3 of 3")
	n.ready("2 of 3")
	n.waiting("one line\nand another") // a line is a variable of its own in sd_notify(3)
	for _, want := range []string{"STATUS=not ready: none of 2 seeds answers", "READY=1", "STATUS=3 of 3", "STATUS=not ready: gives its space back", "STATUS=3 of 3", "STATUS=2 of 3", "STATUS=not ready: one line; and another"} {
		b := make([]byte, 1024)
		if err := conn.SetReadDeadline(time.Now().Add(10 * time.Second)); err != nil {
			t.Fatal(err)
		}
		k, err := conn.Read(b)
		if err != nil || string(b[:k]) != want {
			t.Fatalf("%q, %v; want %q", b[:k], err, want)
		}
	}
	want := `level=INFO msg="not ready" reason="none of 2 seeds answers"
level=INFO msg=ready state="3 of 3"
level=WARN msg="not ready" reason="gives its space back"
level=INFO msg="ready again" state="3 of 3"
level=WARN msg="not ready" reason="one line; and another"
`
	if log.String() != want {
		t.Errorf("the journal has\n%swant\n%s", log.String(), want)
	}
}

// A node that is ready and not ready by turns, or waits for two things by turns, for hours: few lines in the journal, and what holds in the end
// is its last line.
func TestNotifierAlternates(t *testing.T) {
	turns := map[string]func(n *notifier, i int){
		"reasons": func(n *notifier, i int) {
			n.waiting([]string{"none of 2 seeds answers", "waiting for the table of h1"}[i%2])
		},
		"ready": func(n *notifier, i int) {
			if i%2 == 0 {
				n.waiting("none of 2 seeds answers")
			} else {
				n.ready("3 of 3")
			}
		},
	}
	for name, turn := range turns {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var log bytes.Buffer
				n := newNotifier(slog.New(slog.NewTextHandler(&log, nil)))
				const minutes, each = 60, 60
				for i := range minutes * each {
					turn(n, i)
					time.Sleep(time.Minute / each)
				}
				if k := strings.Count(log.String(), "\n"); k > 2*minutes+3 || k < minutes {
					t.Errorf("%d lines in %d minutes, with two things by turns", k, minutes)
				}
				for range 2 * each { // and now it stays so
					turn(n, 0)
					time.Sleep(time.Minute / each)
				}
				lines := strings.Split(strings.TrimSpace(log.String()), "\n")
				if last := lines[len(lines)-1]; !strings.Contains(last, "none of 2 seeds answers") {
					t.Errorf("the last line is %s", last)
				}
			})
		})
	}
}

// A reason that is over is replaced by the next one: what the cluster waited for, by what is wrong with this host.
func TestNotReady(t *testing.T) {
	s, v := new(session), new(view)
	is := func(want string) {
		t.Helper()
		if got := s.notReady(v); got != want {
			t.Errorf("%q, want %q", got, want)
		}
	}
	v.status.Phase, v.status.Why = ownership.Joining, "waiting for the table of h1"
	s.hostErr = errors.New("ip_forward: read-only file system")
	is("waiting for the table of h1")
	v.status.Phase, v.status.Why = ownership.Ready, ""
	is("the host's network is not as it should be: ip_forward: read-only file system")
	s.hostErr = nil
	is("the host's network is not set up yet")
}
