// Package membership defines the state that all nodes of a cluster share: the
// replicated CIDR table, which says which node owns which part of the address
// space, and the IDs and metadata of the members.
//
// Think of the table as a function from each address to a pair
// (version, owner), kept as disjoint prefixes. Only the present owner of an
// address may raise its version. So the merge of two tables is the pointwise
// maximum: commutative, associative and idempotent. No consensus is needed.
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
