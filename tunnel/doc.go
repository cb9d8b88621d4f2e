// Package tunnel moves packets between the TUN device and the underlay.
//
// An [Engine] owns the TUN's queues and the underlay's sockets. For each queue one goroutine reads packets and
// super-packets, looks up the peer that owns the destination, and sends them in that peer's encapsulation; for each
// socket one goroutine receives, unwraps, checks who may send what, joins adjacent packets of a flow and writes them to
// the TUN. Every goroutine runs to completion: nothing is handed from one to another, and the buffers of each belong to
// it alone. What they look up is an immutable table that [Engine.Update] swaps.
//
//	pod ─▶ tun0 ─ txWorker: parse ▶ lookup ▶ split ▶ sender ─▶ socket ═▶ underlay
//	                          └ no owner, too big, gone: ICMP back through tun0, counted
//	underlay ═▶ socket ─ rxWorker: unwrap ▶ checks ▶ join ─▶ tun0 ─▶ pod
//	                          └ each refusal has its counter (encap.Drop)
//
// Steady state allocates nothing and logs nothing per packet. Update, Probe, Stats and Peers may be called from any
// goroutine.
//
// Sources: docs/wire.md for formats and checks, docs/datapath.md for the shape; Linux drivers/net/tun.c, net/ipv4/udp.c.
package tunnel
