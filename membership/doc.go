// Package membership holds what every node of a cluster agrees on: who owns
// which part of the cluster's address space (the replicated CIDR table), and
// what members know of each other (IDs, metadata).
//
// Think of the table as a function from each address to a pair
// (version, owner), kept as disjoint prefixes. Only the present owner of an
// address may raise its version, so that merging two tables is the pointwise
// maximum: commutative, associative, idempotent, and in need of no consensus.
//
// The package is pure: it opens no socket, reads no clock and logs nothing.
// Package gossip below it carries the table between nodes.
//
// Concurrency: a [Table] is not safe for concurrent use while it is being
// changed, but the slices that it hands out are never changed afterwards
// (copy on write), and a [Table.Clone] is free.
//
// Sources: Weave Net's ring (ipam/ring, docs/ipam.md), from which the idea of
// donation between owners comes; RFC 4632 (CIDR), RFC 4291 (IPv6 addressing).
package membership
