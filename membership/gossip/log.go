package gossip

import (
	"context"
	"fmt"
	"log/slog"
	"net/netip"
	"regexp"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/tulle-net/tulle/membership"
)

// logWriter parses memberlist's log lines. They become slog records, and some are the only
// sign of an event that is counted. memberlist writes one line per call.
type logWriter struct {
	g *Gossip

	mu         sync.Mutex
	window     time.Time // start of the current window
	lines      int       // in it
	suppressed int
	failures   map[string]*failure // by failureKind
}

// failure is a kind of failed send, or of ping that is not for this node, of which memberlist logs every one.
type failure struct {
	told     time.Time // when it was last logged
	last     string    // the last line that was not
	repeated int       // how many were not since then
}

// Such a line is logged once in this time, and then their number.
const failureWindow = time.Minute

const (
	maxLogLine = 512 // bytes; some lines print metadata as decimal bytes
	// memberlist logs a line for each bad packet. Of what is left to log,
	// this much passes in each window.
	logWindow   = 10 * time.Second
	linesWindow = 50
)

// pass reports whether a line may be logged, and how many lines of the previous window
// were suppressed.
func (w *logWriter) pass(now time.Time) (ok bool, suppressed int) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if now.Sub(w.window) > logWindow {
		suppressed, w.window, w.lines, w.suppressed = w.suppressed, now, 0, 0
	}
	if w.lines++; w.lines > linesWindow {
		w.suppressed++
		return false, 0
	}
	return true, suppressed
}

// pingForAnother begins a line that memberlist logs for each ping for another node at this address: one that has left, or was reset.
const pingForAnother = "Got ping for unexpected node"

// failedTCPPing begins a line that memberlist logs each second or two while a member answers neither over UDP nor over TCP.
const failedTCPPing = "Failed fallback TCP ping: "

// failureKind is the part of a line about a failed send that does not depend on the destination and the error, pingForAnother or failedTCPPing; "" for
// other lines.
func failureKind(line string) string {
	for _, kind := range []string{pingForAnother, failedTCPPing} {
		if strings.HasPrefix(line, kind) {
			return kind
		}
	}
	if !strings.HasPrefix(line, "Failed to send ") {
		return ""
	}
	kind, _, _ := strings.Cut(line, ":")
	if i := strings.IndexAny(kind, "[0123456789"); i > 0 {
		kind = kind[:i]
	}
	return kind
}

// held reports whether a line repeats one that was logged less than a minute ago. If not, it returns what was held back meanwhile:
// of its own kind, or of all kinds if the line is of none.
func (w *logWriter) held(now time.Time, line string) (hold bool, over []failure) {
	kind := failureKind(line)
	w.mu.Lock()
	defer w.mu.Unlock()
	if f := w.failures[kind]; f != nil && now.Sub(f.told) < failureWindow {
		f.last, f.repeated = line, f.repeated+1
		return true, nil
	}
	for k, f := range w.failures {
		if (kind == "" || k == kind) && now.Sub(f.told) >= failureWindow {
			if f.repeated > 0 {
				over = append(over, *f)
			}
			delete(w.failures, k)
		}
	}
	if kind == "" {
		return false, over
	}
	if w.failures == nil {
		w.failures = map[string]*failure{}
	}
	w.failures[kind] = &failure{told: now}
	if len(over) > 0 { // it goes on: the number is enough
		over[0].repeated, over[0].last = over[0].repeated+1, line
		return true, over
	}
	return false, nil
}

func (w *logWriter) Write(b []byte) (int, error) {
	n := len(b)
	line := strings.TrimSpace(string(b[:min(n, maxLogLine)]))
	level := slog.LevelInfo
	if rest, ok := strings.CutPrefix(line, "["); ok {
		if tag, text, ok := strings.Cut(rest, "] "); ok {
			line = text
			switch tag {
			case "DEBUG":
				level = slog.LevelDebug
			case "WARN":
				level = slog.LevelWarn
			case "ERR", "ERROR":
				level = slog.LevelWarn // a failure of a remote member; our own are returned as errors
			}
		}
	}
	line = strings.TrimPrefix(line, "memberlist: ")
	if w.g.logEvent(line) || strings.Contains(line, "use of closed network connection") {
		level = slog.LevelDebug // counted, and shown as a problem; or the end of a probe after shutdown
	}
	l := w.g.log
	if !l.Enabled(context.Background(), level) {
		return n, nil
	}
	hold, over := w.held(time.Now(), line)
	for _, f := range over {
		l.Warn("gossip: "+w.g.named(f.last), "more", f.repeated, "since", f.told.Format(time.TimeOnly))
	}
	if hold {
		return n, nil
	}
	ok, suppressed := w.pass(time.Now())
	if suppressed > 0 {
		l.Warn("gossip: log lines were suppressed", "lines", suppressed)
	}
	if ok {
		l.Log(context.Background(), level, "gossip: "+w.g.named(line))
	}
	return n, nil
}

// named is a line with the names of members beside the first digits of their IDs, in place of the IDs by which memberlist knows them.
func (g *Gossip) named(line string) string {
	g.mu.RLock()
	defer g.mu.RUnlock()
	return nodeIDs.ReplaceAllStringFunc(line, func(text string) string {
		id, err := membership.ParseNodeID(text)
		if err != nil {
			return text
		}
		switch p := g.peers[id]; {
		case id == g.cfg.ID:
			return g.cfg.Name + " (" + id.Short() + ", this node)"
		case p != nil && p.Name != "":
			return p.Name + " (" + id.Short() + ")"
		}
		return text
	})
}

var nodeIDs = regexp.MustCompile(`\b[0-9a-f]{32}\b`)

// logEvent recognises events, and reports whether the line needs no log record.
// memberlist may hold its node lock.
func (g *Gossip) logEvent(line string) (told bool) {
	lower := strings.ToLower(line)
	switch {
	case strings.HasPrefix(line, "Suspect ") && strings.HasSuffix(line, " has failed, no acks received"):
		name, _, _ := strings.Cut(strings.TrimPrefix(line, "Suspect "), " ")
		g.suspected(name)
	case strings.HasPrefix(line, "Refuting a suspect message (from: "): // it does not hear this node
		name, _, _ := strings.Cut(strings.TrimPrefix(line, "Refuting a suspect message (from: "), ")")
		g.doubt(name)
	case strings.HasPrefix(line, "Was able to connect to "):
		name, _, _ := strings.Cut(strings.TrimPrefix(line, "Was able to connect to "), " ")
		g.udpBlocked(name)
		return true
	case strings.HasPrefix(line, "handler queue full"):
		g.inbox.dropped.Add(1)
		return true
	case strings.HasPrefix(line, failedTCPPing+errorForPing): // most likely, it has not the key
		_, from, _ := strings.Cut(line, "from=")
		if a, err := netip.ParseAddrPort(from); err == nil && g.cfg.Keyring != nil {
			g.otherKey(a.Addr())
		}
	case undecryptable(lower) && strings.Contains(lower, "remote error: "):
		g.unread(line)
		return true
	case undecryptable(lower):
		g.count.undecryptable.Add(1)
		_, from, ok := strings.Cut(line, "from=")
		if !ok || strings.HasPrefix(from, "<unknown") {
			from = "an unknown address"
		}
		if i := strings.LastIndexByte(from, ':'); i > 0 {
			from = from[:i] // ports of streams are arbitrary
		}
		if a, err := netip.ParseAddr(strings.Trim(from, "[]")); err == nil {
			g.otherKey(a)
		}
		g.note("undecryptable", "gossip messages arrive that no key of this node opens, the last one from "+from,
			"compare `tulle keys list` there and here: copy the key file of a member to the host that has missed a rotation, and restart its agent; or correct --gossip-key-file")
		return true
	case strings.HasPrefix(line, "Refuting an alive message for "): // after each restart members tell what this node said before it
		return true
	case strings.Contains(line, "it belongs to cluster"), strings.HasPrefix(line, "Conflicting address for "),
		strings.Contains(line, "it has this node's identity"):
		return true
	}
	return false
}

// unread handles that a member does not open what this node sends, though this node opens what it sends.
func (g *Gossip) unread(line string) {
	_, name, _ := strings.Cut(line, " with ")
	name, _, _ = strings.Cut(name, " ")
	g.mu.Lock()
	defer g.mu.Unlock()
	if id, err := membership.ParseNodeID(name); err == nil && g.peers[id] != nil {
		p := g.peers[id]
		p.otherKey = time.Now()
		g.noteLocked("undecryptable "+name, fmt.Sprintf("%s (%v) does not open the gossip messages of this node", p.Name, p.Addr),
			"compare `tulle keys list` there and here: if it has missed a rotation, copy this node's key file to it, and restart its agent")
	}
}

// otherKey records that a member at that address and this node do not open each other's messages.
func (g *Gossip) otherKey(a netip.Addr) {
	g.mu.Lock()
	defer g.mu.Unlock()
	for _, p := range g.peers {
		if p.Addr.Addr() == a || slices.Contains(p.Meta.Underlay, a) {
			p.otherKey = time.Now()
		}
	}
}

// called notes whether a host that was called has another key.
func (g *Gossip) called(a netip.Addr, err error) {
	other := err != nil && undecryptable(strings.ToLower(err.Error()))
	if other {
		g.otherKey(a)
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	if delete(g.otherKeys, a); other {
		g.otherKeys[a] = time.Now()
	}
}

// OtherKey reports whether the host at that address had another key when this node called it last. An agent that starts with
// another key than the members calls them, and none becomes a member in its sight.
func (g *Gossip) OtherKey(a netip.Addr) bool {
	g.mu.RLock()
	defer g.mu.RUnlock()
	at, ok := g.otherKeys[a]
	return ok && time.Since(at) < problemExpiry
}

// errorForPing is what memberlist says of a member that has answered a ping with an error (net.go: errMsg is 13).
const errorForPing = "unexpected msgType (13)"

// undecryptable recognises memberlist's lines about messages that the keyring cannot
// decrypt (memberlist security.go, net.go).
func undecryptable(line string) bool {
	for _, s := range []string{
		"no installed keys could decrypt the message",
		"encryption is configured but remote state is not encrypted",
		"remote state is encrypted and encryption is not configured",
		"decrypt packet failed",
	} {
		if strings.Contains(line, s) {
			return true
		}
	}
	return false
}

// udpBlocked handles that a member has answered a probe over TCP only. It is a problem only if it does not answer some more pings over
// UDP: where packets are lost by chance, all of one probe's may be.
func (g *Gossip) udpBlocked(name string) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if id, err := membership.ParseNodeID(name); err == nil && g.peers[id] != nil && !g.problems.has(udpProblem+name) {
		g.peers[id].udpLost = max(g.peers[id].udpLost, 1)
		return
	}
	g.noteUDPLocked(name)
}

func (g *Gossip) noteUDPLocked(name string) {
	who := "member " + name
	if id, err := membership.ParseNodeID(name); err == nil && g.peers[id] != nil {
		who = g.peers[id].Name + " (" + g.peers[id].Addr.String() + ")"
	}
	g.noteLocked(udpProblem+name, who+" answers gossip over TCP but not over UDP", "let UDP of the gossip port through the firewall, both ways")
}

// udpProblem begins the key of that problem.
const udpProblem = "udp "
