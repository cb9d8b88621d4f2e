package agent

import (
	"bufio"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"strconv"
	"strings"
	"time"

	"github.com/coreos/go-systemd/v22/daemon"
)

// effectiveCapabilities reads the process's effective capability set, capabilities(7).
func effectiveCapabilities() (uint64, error) {
	f, err := os.Open("/proc/self/status")
	if err != nil {
		return 0, err
	}
	defer f.Close()
	for sc := bufio.NewScanner(f); sc.Scan(); {
		if v, ok := strings.CutPrefix(sc.Text(), "CapEff:"); ok {
			return strconv.ParseUint(strings.TrimSpace(v), 16, 64)
		}
	}
	return 0, fmt.Errorf("%s has no CapEff line", f.Name())
}

// namespaceLives reports whether the file of a network namespace exists, or may exist: a file that this process may not access
// (/proc/PID/ns/net of another user) counts as existing.
func namespaceLives(path string) bool {
	_, err := os.Stat(path)
	return !errors.Is(err, fs.ErrNotExist)
}

func uid() string { return strconv.Itoa(os.Geteuid()) }

// notifier implements sd_notify(3). Without systemd it does nothing.
type notifier struct {
	log      *slog.Logger
	isReady  bool
	text     string
	watchdog time.Duration // 0: none is set
	last     time.Time
}

func newNotifier(log *slog.Logger) *notifier {
	n := &notifier{log: log}
	if d, err := daemon.SdWatchdogEnabled(false); err == nil {
		n.watchdog = d
	}
	return n
}

// alive feeds the watchdog. The session's loop calls it, so that the watchdog detects a loop that hangs.
func (n *notifier) alive() {
	if n.watchdog > 0 && time.Since(n.last) > n.watchdog/4 {
		n.last = time.Now()
		n.send(daemon.SdNotifyWatchdog)
	}
}

// ready reports readiness once, and updates the unit's status text.
func (n *notifier) ready(text string) {
	if !n.isReady {
		n.isReady = true
		n.log.Info("ready", "state", text)
		n.send(daemon.SdNotifyReady)
	}
	if text != n.text {
		n.text = text
		n.send("STATUS=" + text)
	}
}

// waiting reports why the node is not ready, in the journal and in the unit's status text, once per reason.
func (n *notifier) waiting(why string) {
	if why == "" || why == n.text {
		return
	}
	n.text = why
	n.log.Info("not ready", "reason", why)
	n.send("STATUS=not ready: " + why)
}

func (n *notifier) send(state string) {
	if _, err := daemon.SdNotify(false, state); err != nil {
		n.log.Warn("systemd does not take the notification", "state", state, "error", err)
	}
}
