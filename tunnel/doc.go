// Package tunnel moves packets between the TUN device and the underlay.
//
// An [Engine] owns the TUN's queues and the underlay's sockets. One goroutine per queue reads packets and super-packets, looks
// up the peer that owns the destination, and sends them in that peer's encapsulation. One goroutine per socket receives
// packets, decapsulates and validates them, joins adjacent packets of a flow, and writes them to the TUN. Each goroutine runs to
// completion: it passes no packet to another goroutine and has its own buffers. They look up peers in an immutable table that
// [Engine.Update] replaces.
//
//	pod ─▶ tun0 ─ txWorker: parse ▶ lookup ▶ split ▶ sender ─▶ socket ═▶ underlay
//	                          └ no owner, too big, gone: ICMP back through tun0, counted
//	underlay ═▶ socket ─ rxWorker: unwrap ▶ checks ▶ join ─▶ tun0 ─▶ pod
//	                          └ each reason for a drop has a counter (encap.Drop)
//
// The steady state allocates nothing and logs nothing per packet. Any goroutine may call Update, Probe, Stats and Peers.
//
// Sources: docs/wire.md for formats and checks, docs/datapath.md for the design; Linux drivers/net/tun.c, net/ipv4/udp.c.
package tunnel
