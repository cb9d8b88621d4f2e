// Package fastpath lets the kernel carry packets that need no decision: BPF programs wrap and unwrap packets to and from peers,
// without waking the agent's workers. It is off unless the operator wants it.
//
// # What it carries
//
// TCP, UDP, ICMP and ICMPv6 packets and super-packets, of both families, as IP in IP over both families (the ipip encapsulation of docs/wire.md; the other end need
// not know), or in UDP over IPv4 (udp, without UDP checksum, which the other end has to expect). The program send hangs on the way into the TUN device. It sends what is for a peer's pod, if the agent
// says how packets to that peer go, if no packet is larger than the path takes, and if the agent would change nothing in it: it
// lowers the MSS of a SYN. Program receive hangs on the way in from the underlay. It takes what passes every check that the agent makes (docs/wire.md), and
// hands it to the host as if the agent had written it to the TUN device. TCP that came in UDP goes through the joint (joint.go) before, and
// program deliver takes it from there.
//
// They drop nothing and answer nothing. Whatever is unusual (options, extension headers, fragments, a TTL of 0, ECN marks to combine, flows with UDP super-packets, a source
// that is not the sender's, probes, unknown destinations) goes on to the agent, which has the counters, the ICMP errors and
// the captures for it. So the programs are a cache of the agent's decisions, not a second place where they are made. What the kernel itself drops behind
// them (no neighbour, a full queue) it counts itself; [Counts].Lost are packets to which it could not add a header.
//
// # What passes it by
//
// Packets that the programs carry see the host's firewall as pods' packets only, before and behind the TUN device, and not as outer ones. IPsec does not
// see them at all: a host with IPsec policies must not use it ([State.Off]).
//
// # Lifetime
//
// The programs and their tables outlive the agent, like its routes: pods reach each other while it restarts, also if it dies while they are
// paused ([Path.Pause]). The next agent replaces them, or removes them if it does not want them ([Remove]). They carry the name and the priority below, and nothing else is touched.
//
// # Concurrency and sources
//
// A [Path]'s methods may be called from several goroutines. Linux net/core/filter.c, net/sched/cls_bpf.c; RFC 2003, 2473, 4213, 6040, 6438.
package fastpath
