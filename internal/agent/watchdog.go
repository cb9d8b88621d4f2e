package agent

import (
	"context"
	"log/slog"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	"github.com/coreos/go-systemd/v22/daemon"
)

// watchdog feeds the service manager's watchdog (WatchdogSec, sd_watchdog_enabled(3)) as long as all loops give signs of life.
// If one does not, it stops feeding and names the loop; unless that goes on within the watchdog's time, systemd ends the agent
// with SIGABRT, on which Go's runtime prints where every goroutine is, and starts it again.
type watchdog struct {
	log     *slog.Logger
	every   time.Duration   // between two looks
	stalled func() []string // names the loops that are stuck; must not wait for them
	feed    func()
}

// looksPerTimeout is how often the watchdog looks within its time. A loop may be late for some looks without harm.
const looksPerTimeout = 4

// watch runs the agent's watchdog until ctx is done, if the service manager has set one.
func (a *agent) watch(ctx context.Context) error {
	timeout, err := daemon.SdWatchdogEnabled(false)
	if err != nil || timeout <= 0 {
		return nil
	}
	notify := newNotifier(a.log)
	w := watchdog{
		log: a.log, every: timeout / looksPerTimeout,
		stalled: func() []string { return a.stalled(time.Now(), timeout/2) },
		feed:    func() { notify.send(daemon.SdNotifyWatchdog) },
	}
	w.run(ctx)
	return nil
}

func (w *watchdog) run(ctx context.Context) {
	tick := time.NewTicker(w.every)
	defer tick.Stop()
	told := map[string]bool{} // since all were alive: each loop is told once, also when another one goes on meanwhile
	for {
		stuck := w.stalled()
		if len(stuck) == 0 {
			w.feed()
		}
		switch {
		case slices.ContainsFunc(stuck, func(loop string) bool { return !told[loop] }):
			w.log.Error("no sign of life: the watchdog restarts the agent unless it goes on", "loops", strings.Join(stuck, ", "))
			for _, loop := range stuck {
				told[loop] = true
			}
		case len(stuck) == 0 && len(told) > 0:
			w.log.Warn("all loops give signs of life again")
			clear(told)
		}
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
	}
}

// stalled names the loops that give no sign of life; those that wait with a timeout of their own count as stuck after limit.
func (a *agent) stalled(now time.Time, limit time.Duration) (names []string) {
	s := a.session.Load()
	if s == nil {
		return a.starting.late(now, limit, "start of a session")
	}
	names = append(s.pulse.late(now, limit, "session"), s.probes.pulse.late(now, limit, "prober")...)
	if s.gossip.Stalled() {
		names = append(names, "gossip")
	}
	return append(names, s.engine.Stalled()...)
}

// pulse is when a loop last gave a sign of life. The zero value is a loop that has not begun, and is not late.
type pulse struct{ at atomic.Pointer[time.Time] }

func (p *pulse) beat() {
	now := time.Now()
	p.at.Store(&now)
}

// late returns the name if the loop's last sign is older than limit.
func (p *pulse) late(now time.Time, limit time.Duration, name string) []string {
	if at := p.at.Load(); at != nil && now.Sub(*at) > limit {
		return []string{name}
	}
	return nil
}
