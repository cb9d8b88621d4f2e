package main

import (
	"context"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/tulle-net/tulle/internal/api"
)

const (
	quickTimeout    = 10 * time.Second
	maxStatusPeers  = 12 // more do not fit one screen; `tulle peers` lists all
	maxStatusBlocks = 6
	maxAlike        = 5 // problems of one check, and findings of one: half a cluster may be gone, and its thousand lines hide all else
)

func statusCommand() *cobra.Command {
	c := new(client)
	return c.flags(&cobra.Command{
		Use:   "status",
		Short: "Show this node, the cluster, its peers, and problems with remedies",
		Long: "Show one screen about this node, the cluster, the paths to its peers, and problems with their remedies.\n" +
			"The exit code is 0 if all is well and 1 if there is a problem.",
		Args: exactly(),
		RunE: ask(c, func(ctx context.Context, a *api.Client, _ []string) (api.Status, error) { return a.Status(ctx) },
			printStatus, func(s api.Status) bool { return s.Healthy() }),
	}, quickTimeout)
}

// underlay says by which addresses the other hosts know this one, and why.
func underlay(n api.Node) string {
	text := list(n.Underlay, " ")
	if n.Interface != "" {
		text += " on " + n.Interface
	}
	if n.UnderlayReason != "" {
		text += ": " + n.UnderlayReason
	}
	return text
}

// links says by which interfaces packets to the other hosts leave.
func links(n api.Node) string {
	if len(n.Links) == 0 {
		return ""
	}
	return fmt.Sprintf("%s, mtu %s", strings.Join(n.Links, " "), mtu(n.LinkMTU))
}

func printStatus(p *printer, s api.Status) {
	p.fields(
		[2]string{"node", fmt.Sprintf("%s (%s), %s, up %s, tulle %s", s.Node.Name, orNone(short(s.Node.ID)), verdict(&s), p.since(s.Started), s.Version)},
		[2]string{"underlay", underlay(s.Node)},
		[2]string{"links", links(s.Node)},
		[2]string{"tun", fmt.Sprintf("%s, mtu %s, %s", orNone(s.Node.Tun.Name), mtu(s.Node.Tun.MTU), orNone(list(s.Node.Tun.Addresses, " ")))},
		[2]string{"space", orNone(list(s.Node.Prefixes, " "))},
		[2]string{"blocks", blocks(s.Node.Blocks)},
		[2]string{"waiting", s.IPAM.Waiting},
		[2]string{"cluster", cluster(p, &s)},
		[2]string{"table", table1(s.Cluster.Table)},
		[2]string{"gossip", gossip(p, s.Gossip)},
		[2]string{"traffic", traffic(s.Counters)},
		[2]string{"offload", offload(&s)},
		[2]string{"fast path", fastPath(&s)},
		[2]string{"drops", drops(&s)},
	)
	printStatusPeers(p, s.Peers)
	printProblems(p, s.Problems)
}

// printProblems shows each problem with its remedy, of one check not more than fit beside others.
func printProblems(p *printer, problems []api.Problem) {
	if len(problems) == 0 {
		return
	}
	p.line("\n%s:", plural(len(problems), "problem"))
	all, seen := map[string]int{}, map[string]int{} // by check
	for _, pr := range problems {
		all[pr.Check]++
	}
	t := table{}
	for i, pr := range problems {
		n := all[pr.Check]
		seen[pr.Check]++
		switch k := seen[pr.Check]; {
		case pr.Check == "" || k <= shown(n):
		case k == shown(n)+1:
			t.row("", fmt.Sprintf("and %d more like these (%s): `tulle status -o json` has all", n-shown(n), pr.Check))
			continue
		default:
			continue
		}
		text := pr.What
		if !pr.Since.IsZero() {
			text += " (for " + p.since(pr.Since)
			if !pr.Last.IsZero() {
				text += ", last seen " + p.since(pr.Last) + " ago"
			}
			text += ")"
		}
		if pr.Remedy != "" {
			text += "\n→ " + pr.Remedy
		}
		t.row(fmt.Sprintf("%d.", i+1), text)
	}
	p.table(&t)
}

// shown is how many of n alike are shown. In place of the last one alone, a number would be no gain.
func shown(n int) int {
	if n <= maxAlike+1 {
		return n
	}
	return maxAlike
}

func verdict(s *api.Status) string {
	switch {
	case s.Healthy():
		return "healthy"
	case !s.Ready:
		return "NOT READY"
	}
	return "UNHEALTHY"
}

func blocks(bs []api.Block) string {
	var lines []string
	for i, b := range bs {
		if i == maxStatusBlocks && len(bs) > maxStatusBlocks+1 {
			lines = append(lines, fmt.Sprintf("and %d more: see `tulle ipam`", len(bs)-i))
			break
		}
		lines = append(lines, b.Prefix.String()+": "+blockUse(b))
	}
	return strings.Join(lines, "\n")
}

func blockUse(b api.Block) string {
	s := fmt.Sprintf("%d of %s used", b.Used, size(b))
	if b.Cooling > 0 {
		s += fmt.Sprintf(", %d cooling", b.Cooling)
	}
	return s
}

func cluster(p *printer, s *api.Status) string {
	c := &s.Cluster
	if c.ID == "" {
		return "none yet"
	}
	text := fmt.Sprintf("%s, %d of %d members alive, %s", short(c.ID), c.Alive, c.Members, orNone(list(c.CIDRs, " ")))
	if c.Isolated {
		text += ", ISOLATED"
		if !c.Since.IsZero() {
			text += " for " + p.since(c.Since)
		}
	}
	return text
}

func table1(t api.Table) string {
	text := fmt.Sprintf("%d entries, digest %s", t.Entries, orNone(short(t.Digest)))
	if t.Entries == 1 {
		text = strings.Replace(text, "entries", "entry", 1)
	}
	if !t.Confirmed {
		text += ", not yet confirmed by a peer"
	}
	return text
}

// gossip is empty while it is not started yet.
func gossip(p *printer, g api.Gossip) string {
	if !g.Bind.IsValid() {
		return ""
	}
	parts := []string{"not encrypted"}
	if g.Encrypted {
		parts[0] = "encrypted"
		if g.Keys > 1 {
			parts[0] += " with " + plural(g.Keys, "key")
		}
	}
	if len(g.Listens) == 0 { // an agent of an older version tells the first one only
		g.Listens = []netip.AddrPort{g.Bind}
	}
	parts = append(parts, list(g.Listens, " "))
	if !g.LastSync.IsZero() {
		parts = append(parts, "synced "+p.since(g.LastSync)+" ago")
	}
	if g.Health > 0 {
		parts = append(parts, fmt.Sprintf("health score %d (0 is best)", g.Health))
	}
	if g.Undecrypted > 0 {
		parts = append(parts, fmt.Sprintf("%s messages not decryptable", count(g.Undecrypted)))
	}
	if g.Rejected > 0 {
		parts = append(parts, fmt.Sprintf("%s refused", count(g.Rejected)))
	}
	return strings.Join(parts, ", ")
}

func traffic(c api.Counters) string {
	parts := []string{
		fmt.Sprintf("out %s packets, %s%s", count(c.TxPackets), byteSize(c.TxBytes), batch(c.TxPackets, c.TxSends, "send")),
		fmt.Sprintf("in %s packets, %s%s", count(c.RxPackets), byteSize(c.RxBytes), batch(c.RxPackets, c.RxReceives, "receive")),
	}
	if c.DirectTxPackets+c.DirectRxPackets > 0 {
		parts = append(parts, fmt.Sprintf("directly out %s packets, %s, in %s packets, %s",
			count(c.DirectTxPackets), byteSize(c.DirectTxBytes), count(c.DirectRxPackets), byteSize(c.DirectRxBytes)))
	}
	for _, x := range []struct {
		n    uint64
		what string
	}{{c.GSOFallbacks, "GSO fallbacks"}, {c.TunFallbacks, "TUN fallbacks"}, {c.SocketOverflows, "lost in a full socket"}, {c.TunDrops, "lost in a full TUN"}, {c.Repairs, "host settings mended"}} {
		if x.n > 0 {
			parts = append(parts, count(x.n)+" "+x.what)
		}
	}
	return strings.Join(parts, "; ")
}

func batch(packets, calls uint64, verb string) string {
	if calls == 0 {
		return ""
	}
	return fmt.Sprintf(" (%.3g per %s)", float64(packets)/float64(calls), verb)
}

// offload is empty while there is no data path yet.
func offload(s *api.Status) string {
	o := s.Offload
	if !s.Gossip.Bind.IsValid() {
		return ""
	}
	var on, off []string
	for _, f := range []struct {
		on   bool
		name string
	}{{o.TunCSUM, "tun checksum"}, {o.TunTSO, "tun TSO"}, {o.TunUSO, "tun USO"}, {o.UDPGSO, "UDP GSO"}, {o.UDPGRO, "UDP GRO"}} {
		if f.on {
			on = append(on, f.name)
		} else {
			off = append(off, f.name)
		}
	}
	text := "on: " + orNone(strings.Join(on, ", "))
	if len(off) > 0 {
		text += "; off: " + strings.Join(off, ", ")
		if o.Reason != "" {
			text += " (" + o.Reason + ")"
		}
	}
	return text
}

// fastPath is empty where nobody wants one.
func fastPath(s *api.Status) string {
	f, c := s.FastPath, s.Counters
	switch {
	case !f.Wanted:
		return ""
	case !f.On:
		return "off: " + f.Reason
	}
	return fmt.Sprintf("on: out %s packets, %s, in %s packets, %s", count(c.FastTxPackets), byteSize(c.FastTxBytes), count(c.FastRxPackets), byteSize(c.FastRxBytes))
}

// drops lists what was dropped, the most frequent reason first.
func drops(s *api.Status) string {
	type drop struct {
		reason string
		n      uint64
	}
	var ds []drop
	for r, n := range s.Drops {
		if n > 0 {
			ds = append(ds, drop{r, n})
		}
	}
	slices.SortFunc(ds, func(a, b drop) int {
		if a.n != b.n {
			if a.n > b.n {
				return -1
			}
			return 1
		}
		return strings.Compare(a.reason, b.reason)
	})
	var out []string
	for _, d := range ds {
		text := d.reason + " " + count(d.n)
		if d.reason == "send_error" && s.LastSendError != "" {
			text += " (last: " + s.LastSendError + ")"
		}
		out = append(out, text)
	}
	if out == nil {
		return "none"
	}
	return strings.Join(out, ", ")
}

// printStatusPeers shows at most as many peers as fit one screen, those with problems first.
func printStatusPeers(p *printer, peers []api.Peer) {
	if len(peers) == 0 {
		p.line("\nno peers")
		return
	}
	sorted := slices.Clone(peers)
	slices.SortStableFunc(sorted, func(a, b api.Peer) int { return btoi(peerOK(a)) - btoi(peerOK(b)) })
	t := table{head: []string{"PEER", "STATE", "PATH", "RTT", "LOSS", "MTU", "SINCE", "REASON"},
		right: []bool{false, false, false, true, true, true, true}}
	shown := len(sorted)
	if shown > maxStatusPeers+1 {
		shown = maxStatusPeers
	}
	for _, x := range sorted[:shown] {
		x.Path = worst(x)
		at, why := stateOf(x)
		why = withLeaves(x, why)
		t.row(peerName(peers, x), x.State, pathName(x.Path), rtt(x.Path.RTTUS), lossOf(x.Path), mtu(x.Path.MTU), p.since(at), why)
	}
	p.line("")
	p.table(&t)
	if rest := len(sorted) - shown; rest > 0 {
		bad := 0
		for _, x := range sorted[shown:] {
			bad += btoi(!peerOK(x))
		}
		p.line("and %d more, %s of them in trouble: see `tulle peers`", rest, orNoneOf(bad))
	}
}

// worst is the path in use to show where one is shown: the first that does not answer.
func worst(p api.Peer) api.Path {
	paths := p.InUse()
	if i := slices.IndexFunc(paths, func(x api.Path) bool { return x.State != api.PathUp }); i >= 0 && p.Path.State == api.PathUp && !peerOK(p) {
		return paths[i]
	}
	return p.Path
}

func orNoneOf(n int) string {
	if n == 0 {
		return "none"
	}
	return fmt.Sprint(n)
}

func btoi(b bool) int {
	if b {
		return 1
	}
	return 0
}
