// Package agent wires Tulle's parts into the process that runs on each host.
//
// [Run] is the agent. It serves the control socket all the time, and runs one session after the other. A session is everything
// that depends on the host's underlay address: sockets, gossip, the engine. When that address changes, a new session replaces
// the old one. Packages tunnel, membership and ipam do not import each other; this package passes data between them:
//
//	gossip ◀──── messages, members ────▶ ownership ◀── the table, own blocks ──▶ state file
//	   │ members, metadata                  │ routes
//	   └───────────────┬────────────────────┘
//	               view: each peer's prefixes, endpoint, encapsulation, MTU, and why
//	         ┌─────────┼───────────────┐
//	      engine    hostnet        control socket
//	     (packets) (routes, nft)   (status, peers, …)
//
// Concurrency: Run or a session's run starts each goroutine, and it has ended when that returns. Any goroutine may call
// ownership and gossip; both have their own locks, and are never called with a lock of this package held.
//
// A stop undoes nothing: the TUN (a persistent device), its addresses, routes and the nft tables stay, and the next run
// adopts them. [Cleanup] removes them.
package agent
