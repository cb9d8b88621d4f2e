// Package membership holds what every node of a cluster agrees on: who owns
// which part of the cluster's address space, and how that knowledge travels.
//
// Its pure half (id.go, entry.go, table.go, codec.go) is the replicated CIDR
// table. Think of the table as a function from each address to a pair
// (version, owner), kept as disjoint prefixes. Only the present owner of an
// address may raise its version, so that merging two tables is the pointwise
// maximum: commutative, associative, idempotent, and in need of no consensus.
// The pure half opens no socket, reads no clock and logs nothing.
//
// Its other half (gossip.go and beside it) carries the table over
// hashicorp/memberlist.
//
// Concurrency: a [Table] is not safe for concurrent use while it is being
// changed, but the slices that it hands out are never changed afterwards
// (copy on write), and a [Table.Clone] is free. Everything else says so itself.
//
// Sources: Weave Net's ring (ipam/ring, docs/ipam.md), from which the idea of
// donation between owners comes; RFC 4632 (CIDR), RFC 4291 (IPv6 addressing).
package membership
