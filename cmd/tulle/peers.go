package main

import (
	"context"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/tulle-net/tulle/internal/api"
)

func peersCommand() *cobra.Command {
	c := new(client)
	return c.flags(&cobra.Command{
		Use:   "peers",
		Short: "List the peers: state, prefixes, path, round-trip time, loss, MTU",
		Long: "List the peers, one per line: state, prefixes, path in use, round-trip time, loss, MTU, since when and why.\n" +
			"Below a peer is a line for each other path that is probed or in use: packets of IPv4 and IPv6 may go two ways.\n" +
			"The exit code is 1 if a peer that owns address space cannot be reached by a path in use.",
		Args: exactly(),
		RunE: ask(c, func(ctx context.Context, a *api.Client, _ []string) ([]api.Peer, error) { return a.Peers(ctx) },
			printPeers, func(peers []api.Peer) bool {
				return !slices.ContainsFunc(peers, func(p api.Peer) bool { return !peerOK(p) })
			}),
	}, quickTimeout)
}

// peerName is the peer's name, with its ID if another peer has the same name: a host that lost its disk returns as another node.
func peerName(all []api.Peer, x api.Peer) string {
	for i := range all {
		if all[i].Name == x.Name && all[i].ID != x.ID {
			return nodeRef(api.NodeRef{Name: x.Name, ID: x.ID})
		}
	}
	return x.Name
}

func printPeers(p *printer, peers []api.Peer) {
	if len(peers) == 0 {
		p.line("no peers")
		return
	}
	t := table{head: []string{"NAME", "STATE", "PREFIXES", "PATH", "RTT", "LOSS", "MTU", "SINCE", "REASON"},
		right: []bool{false, false, false, false, true, true, true, true}}
	for _, x := range peers {
		at, why := stateOf(x)
		why = withLeaves(x, why)
		t.row(peerName(peers, x), x.State, orNone(list(x.Prefixes, "\n")), pathName(x.Path), rtt(x.Path.RTTUS), lossOf(x.Path), mtu(x.Path.MTU), p.since(at), why)
		for _, c := range x.Candidates {
			shown := c.Active && c.Mode == x.Path.Mode && c.Family == x.Path.Family
			if !shown && (c.Active || c.State != api.PathOff) {
				t.row("", "", "", pathOf(c.Path), rtt(c.RTTUS), lossOf(c.Path), mtu(c.MTU), p.since(c.Since), c.Reason)
			}
		}
	}
	p.table(&t)
}

// peerOK reports whether packets to the peer's space arrive by all paths in use, as far as this node knows. A peer that has left, or that is dead
// and owns nothing, is OK.
func peerOK(p api.Peer) bool {
	switch p.State {
	case api.PeerLeft:
		return true
	case api.PeerDead:
		return len(p.Prefixes) == 0
	}
	return len(p.Prefixes) == 0 || !slices.ContainsFunc(p.InUse(), func(path api.Path) bool { return path.State != api.PathUp })
}

// stateOf returns the more important state of a peer: gossip's if it is bad, else the path's.
func stateOf(p api.Peer) (time.Time, string) {
	if p.State == api.PeerAlive || p.State == api.PeerExternal || p.Reason == "" {
		return p.Path.Since, p.Path.Reason
	}
	return p.Since, p.Reason
}

// withLeaves adds by which interfaces packets to the peer leave, where they are not those of the underlay address.
func withLeaves(p api.Peer, why string) string {
	if len(p.Leaves) == 0 {
		return why
	}
	return strings.TrimPrefix(why+"; packets leave by "+strings.Join(p.Leaves, " "), "; ")
}

// pathName is the encapsulation in use, and its state unless that is "up".
func pathName(p api.Path) string {
	if p.State == api.PathUp || p.State == "" {
		return orNone(p.Mode)
	}
	return strings.TrimSpace(p.Mode + " " + p.State)
}

// pathOf is pathName with the family that a direct path carries, where each has its own.
func pathOf(p api.Path) string {
	p.Mode = strings.TrimSpace(p.Mode + " " + p.Family)
	return pathName(p)
}

// lossOf is the loss of a path of which anything is measured.
func lossOf(p api.Path) string {
	if p.RTTUS == 0 && p.Loss == 0 {
		return none
	}
	return percent(p.Loss)
}
