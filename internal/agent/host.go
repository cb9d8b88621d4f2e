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
	log   *slog.Logger
	lines changeLog
	once  bool // ready before
	text  string
}

func newNotifier(log *slog.Logger) *notifier { return &notifier{log: log} }

// ready reports readiness: to systemd once, in the journal when it comes. It updates the unit's status text.
func (n *notifier) ready(text string) {
	const readyAgain = "ready again"
	if !n.once {
		n.log.Info("ready", "state", text)
		n.lines.is, n.lines.due = readyAgain, time.Time{}
		n.send(daemon.SdNotifyReady)
	}
	n.once = true
	n.lines.log(n.log, slog.LevelInfo, readyAgain, readyAgain, "state", text)
	if text != n.text {
		n.text = text
		n.send("STATUS=" + text)
	}
}

// waiting reports why the node is not ready, in the journal and in the unit's status text, when the reason comes. It is a warning if the
// node was ready before.
func (n *notifier) waiting(why string) {
	why = strings.ReplaceAll(why, "\n", "; ") // errors that were joined; a line is a variable of its own
	level := slog.LevelInfo
	if n.once {
		level = slog.LevelWarn
	}
	n.lines.log(n.log, level, why, "not ready", "reason", why)
	if why != n.text {
		n.text = why
		n.send("STATUS=not ready: " + why)
	}
}

func (n *notifier) send(state string) {
	if _, err := daemon.SdNotify(false, state); err != nil {
		n.log.Warn("systemd does not take the notification", "state", state, "error", err)
	}
}
