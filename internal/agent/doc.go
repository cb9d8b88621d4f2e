// Package agent wires Tulle's parts into the process that runs on each host.
//
// [Run] is the agent. It serves the control socket from its first moment to its last, and behind it runs sessions: a
// session is everything that hangs on the host's underlay address (sockets, gossip, the TUN's reader), and a new one
// takes its place when that address changes. Packages tunnel, membership and ipam know nothing of each other; what they
// exchange passes through here:
//
//	gossip ◀──── messages, members ────▶ ownership ◀── the table, own blocks ──▶ state file
//	   │ members, metadata                  │ routes
//	   └───────────────┬────────────────────┘
//	               view: each peer's prefixes, endpoint, encapsulation, MTU, and why
//	         ┌─────────┼───────────────┐
//	      engine    hostnet        control socket
//	     (packets) (routes, nft)   (status, peers, …)
//
// Concurrency: each goroutine is started by Run or by a session's run and has ended when that returns. Calls into ownership
// and gossip may come from any of them; both have their own locks, and neither is called with one of this package's held.
//
// Nothing is undone at a stop: the TUN (a persistent device), its addresses, routes and the nft table stay, so that the
// next run finds and adopts them. [Cleanup] removes them.
package agent
